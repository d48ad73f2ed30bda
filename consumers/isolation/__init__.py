"""Child processes: the pool, the process that forks them, the protocol between worker and child, and the code of a child.

A child knows its job and the app, and nothing of Kafka's partitions or offsets.
"""
