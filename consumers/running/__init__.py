"""Running the code of jobs, on the event loop, in threads and in child processes, and turning its end into an outcome.

Owns the threads of jobs, the leases of long jobs and the hooks. Does not decide which job runs.
"""
