"""Jobs from domain events: the router, which follows the topics of events, and the backfill, which reads them again.

Runs no code of a task.
"""
