"""The contract between all parts: the Avro schemas of events, their frozen types, and the code that encodes and decodes
them.

Pure functions on bytes and values. Imports nothing of Jobledger but `jobledger.errors`.
"""
