"""What a service does with jobs: submit them, emit events, wait for jobs, send control commands, read `app.lifecycle`.

Owns the producers of a service and the thread that waits for the status table. Runs no task's code, and imports nothing of
the worker or the stream processor.
"""
