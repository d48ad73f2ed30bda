"""The operations of a service: submit jobs, emit events, wait for jobs, send control commands, read `app.lifecycle`.

Owns the producers of a service and the thread that queries the status table for callers that wait. Runs no task's code,
and imports nothing of the worker or the stream processor.
"""
