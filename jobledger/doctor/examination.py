"""The table of all checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobledger.doctor import broker, machine, roles, table
from jobledger.doctor.checks import TIME_MOST_S, Check, Examination, Subject, all_made

if TYPE_CHECKING:
    from jobledger.app import App

#: Checks that need no app.
MACHINE: Sequence[Examination] = (
    Examination("python", machine.python),
    Examination("packages", machine.packages),
    Examination("settings", machine.settings),
)

#: Checks of an app, its cluster and its status table, in the order in which they are shown. ``BROKER`` and ``TABLE`` are
#: the checks without which others cannot be made.
BROKER, TABLE = "broker", "table"
APP: Sequence[Examination] = (
    Examination("extras", machine.extras),
    Examination("disk", machine.disk),
    Examination("embedded broker", machine.embedded_broker),
    Examination(BROKER, broker.reachable),
    Examination("broker version", broker.version, BROKER),
    Examination("clock", broker.clock, BROKER),
    Examination("topics", broker.topics, BROKER),
    Examination("schemas", broker.schemas, BROKER),
    Examination("rights", broker.rights, BROKER),
    Examination("workers", roles.workers, BROKER),
    Examination("coordinator", roles.coordinator, BROKER),
    Examination(TABLE, table.readable),
    Examination("materializer", table.materializer, TABLE),
    Examination("table lag", table.lag, TABLE),
)


def examine(app: App, *, time_most: float = TIME_MOST_S) -> list[Check]:
    """Examine an app, its cluster, its status table and this machine.

    The checks do not depend on each other, except that most checks of a cluster are left out if no broker answers. They
    run at the same time, and together take at most ``time_most`` seconds. Opens connections of its own, and raises no
    error of a check.
    """
    return all_made([*MACHINE, *APP], Subject(app), time_most)


def examine_machine(*, time_most: float = TIME_MOST_S) -> list[Check]:
    """Make the checks that need no app: for an app that cannot be loaded."""
    return all_made(MACHINE, None, time_most)
