"""The decisions of the coordinator, as functions of rows and records: what a record changes, what is written, and when
a timer must look at a row.

These modules are pure: they use no Kafka client, no Faust, no clock and no thread. So the same log always gives the
same decisions.
"""
