"""Finds problems of an app, its cluster, its status table and this machine, and says how to fix them.

This package repairs nothing. It writes one kind of record: the schema of Jobledger's events, which every process writes
at its start. Each check is a small function of one of the modules; `examination` has the table of all checks.
"""

from jobledger.doctor.checks import Check
from jobledger.doctor.examination import examine, examine_machine

__all__ = ["Check", "examine", "examine_machine"]
