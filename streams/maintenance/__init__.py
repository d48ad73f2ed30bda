"""What runs beside the materializer once in a while: the watchdog for overdue jobs, the check of commits, trimming of old
records, removal of old cancels.

It reads the status table and the log, and repairs only by writing records.
"""
