"""Decides which record is taken next, which job waits, and which job starts; holds the control commands in force.

These decisions are made on the event loop. Only the readers of the control topic and of schemas have threads of their
own. The package `running` runs the code of a job, and the package `recording` sends records.
"""
