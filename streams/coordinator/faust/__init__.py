"""All code that depends on Faust, aiokafka and RocksDB: the app, the producer, the local copy of the table, logins.

No other package imports these libraries. This package decides nothing about jobs.
"""
