"""Checks of the status table: whether it can be read, whether a materializer writes it, and how far it is behind the log."""

from __future__ import annotations

from contextlib import closing

from jobledger.doctor.checks import Finding, Subject
from jobledger.doctor.roles import PROGRESS_S, behind_of, bounds, lanes, progress
from jobledger.process.wording import counted
from jobledger.streams.status.store import StatusReader, open_reader, shown
from jobledger.streams.status.store.tables import REVISION

_MIB = 1 << 20
_START = "Start `jobledger streams MODULE:APP`."


def _opened(subject: Subject) -> StatusReader:
    """Open the table. The app's own reader is not used: `App.close` may close it while a check that has timed out still runs."""
    namespace = subject.names.namespace
    return open_reader(subject.settings.resolve_status_url(namespace), namespace)


def readable(subject: Subject) -> Finding:
    """Check whether the table can be read, and is of the revision of this version."""
    with closing(_opened(subject)) as reader:
        facts = reader.about()
    url = shown(subject.settings.resolve_status_url(subject.names.namespace))
    detail = f"{url}: {counted(facts.jobs, 'job')}, {facts.size_bytes / _MIB:,.0f} MiB, revision {facts.revision}"
    if facts.revision < REVISION:
        return Finding(
            f"{detail}; this version has revision {REVISION}", "Restart `jobledger streams` with this version once."
        )
    return Finding(detail)


def materializer(subject: Subject) -> Finding:
    """Check whether a materializer writes the table."""
    with closing(_opened(subject)) as reader:
        facts = reader.about()
    if not facts.held:
        was = f"; the last one was {facts.holder}, whose lease has ended" if facts.holder else ""
        return Finding(f"no materializer writes the table{was}", _START)
    return Finding(f"{facts.holder} writes the table")


def lag(subject: Subject) -> Finding:
    """Check whether the table is up to date with the log, or makes progress."""
    names = subject.names
    topics = [*map(names.jobs, lanes(subject)), names.lifecycle, names.coordination, names.dead_letter, names.plans]
    with closing(_opened(subject)) as reader:
        number, moves = progress(lambda: behind_of(bounds(subject, topics), reader.offsets()))
    detail = f"{counted(number, 'record')} not in the table yet"
    if not moves:
        return Finding(
            f"{detail}, and no progress for {PROGRESS_S:g} s",
            "Start `jobledger streams MODULE:APP`, or look at its log.",
        )
    return Finding(detail)
