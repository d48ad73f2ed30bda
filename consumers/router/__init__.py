"""Submits jobs for domain events: the router for new events, the backfill for past events.

This package runs no code of a task.
"""
