"""Kafka as Jobledger uses it: clients and their settings, clear errors, logins, rights, and the topics of a namespace.

This package owns everything that depends on a cluster's settings. The contents of records belong to `jobledger.schemas`
and `jobledger.log`.
"""
