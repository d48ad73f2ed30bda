"""The decisions of the coordinator, as functions of rows and records: what a record changes, what is written, and when a row
acts.

Pure: no Kafka client, no Faust, no clock, no thread. So the same log always gives the same decisions.
"""
