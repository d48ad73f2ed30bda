"""What a worker holds in memory: partitions, work records in progress, offsets, known releases, limits and outcomes.
The package also owns the rules that need nothing else.

This is the lowest package of the worker. It sends nothing, starts no code of a job, and imports no other package of the
worker.
"""
