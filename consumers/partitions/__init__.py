"""Reads the partitions that a worker owns, commits their offsets, and takes partitions over from other workers.

This package owns the consumers and their threads. It finds out which releases are settled, and starts no job.
"""
