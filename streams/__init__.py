"""The stream processor: the coordinator, the materializer, maintenance, projections, and the supervisor that keeps their
processes running.

Imports nothing of `jobledger.consumers`: both meet only in the log.
"""
