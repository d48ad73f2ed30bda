"""Everything that depends on Faust, aiokafka and RocksDB: the app, the producer, the local copy of the table, logins.

No other package imports these libraries. Decides nothing about jobs.
"""
