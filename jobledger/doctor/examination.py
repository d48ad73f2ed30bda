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

#: Checks of an app, its cluster and its status table, in the order in which they are shown. If the
#: check ``BROKER`` or ``TABLE`` fails, the checks that depend on it are not made.
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

    The checks run at the same time, and together take at most ``time_most`` seconds. If no broker answers or the table
    cannot be read, the checks that need it are not made, and count as failed. Uses connections of its own. An error of a
    check is not raised, but becomes its result.
    """
    return all_made([*MACHINE, *APP], Subject(app), time_most)


def examine_machine(*, time_most: float = TIME_MOST_S) -> list[Check]:
    """Make the checks that need no app: for an app that cannot be loaded."""
    return all_made(MACHINE, None, time_most)
