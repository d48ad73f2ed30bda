"""Reading and writing records of the log outside of the hot paths: ranges of partitions, sending, framing, schemas that
other writers have published, offsets of groups.

Knows how an event becomes bytes on a topic and back. Decides nothing about jobs.
"""
