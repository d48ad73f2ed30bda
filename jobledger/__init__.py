"""Jobledger: background jobs on the Kafka log."""
