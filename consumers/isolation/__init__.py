"""Child processes: the pool, the fork server that creates them, the protocol between worker and child, and the child's
own code.

A child knows its job and the app, but not Kafka's partitions or offsets.
"""
