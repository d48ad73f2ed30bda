"""Kafka as Jobledger uses it: clients and their settings, errors in plain words, logins, rights, and the topics of a
namespace.

Everything that depends on a cluster's settings is here. What the records contain is not: that is `jobledger.schemas` and
`jobledger.log`.
"""
