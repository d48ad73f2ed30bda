"""Reading and writing the log outside of the hot paths: ranges of partitions, sending, framing, schemas that other
writers have published, committed offsets of groups.

Owns the conversion between events and the bytes on a topic, except the Avro encoding itself. Decides nothing about
jobs.
"""
