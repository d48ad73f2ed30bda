"""Periodic maintenance in the materializer's process: the watchdog for overdue jobs, the commit check, trimming of old
records, the removal of old cancels, of old rows and of workers that are gone, and the plans.

The package reads the status table and the log, and acts by writing records. Only trimming deletes records, and only the
materializer changes the status table.
"""
