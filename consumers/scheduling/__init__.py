"""Which record is taken next, which job waits, and which job starts.

Runs on the event loop only. The code of a job is run by `running`, and records are sent by `recording`.
"""
