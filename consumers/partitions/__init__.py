"""The partitions that a worker owns: reading their records, committing their offsets, and taking them over from another
worker.

Owns the consumers and their threads. Finds out which releases are settled, and starts no job.
"""
