"""Periodic maintenance beside the materializer: the watchdog for overdue jobs, the commit check, trimming of old
records, and removal of old cancels and of workers that are gone.

The package reads the status table and the log. It repairs only by writing records. Only trimming deletes records.
"""
