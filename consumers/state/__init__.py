"""What a worker holds in memory: partitions, records in work, offsets, known releases, limits, outcomes; and the rules that
need nothing else.

The lowest package of the worker: it sends nothing, starts no code of a job, and imports no other package of the worker.
"""
