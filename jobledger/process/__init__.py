"""Everything that belongs to one process: forks and what must not survive them, threads under gevent, signals, loggers,
locks between processes, optional packages, retries until a deadline, words of messages, and the end of the process.

Knows nothing of jobs, Kafka's topics or the tables of a database.
"""
