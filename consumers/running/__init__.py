"""Runs the code of jobs on the event loop, in threads and in child processes, and passes what the code returned or
raised to `recording`.

This package owns the threads of jobs, the leases of long jobs and the hooks. It does not decide which job runs.
"""
