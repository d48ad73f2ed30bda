"""The lag of each role: the number of records in the log that the role has not committed yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobledger.app import App
from jobledger.kafka.clients import partitions_of
from jobledger.log.group_offsets import group_offsets
from jobledger.streams.status.log_feed import bounds

#: Seconds that the broker has to answer each request, and largest numbers of lanes and of topics of events that are
#: measured.
ANSWER_S, LANES_MOST = 5.0, 50


@dataclass(frozen=True)
class Lag:
    """``role``: the reader, ``what``: its topics. ``records``: how many are not committed; None: the role has never
    committed."""

    role: str
    what: str
    records: int | None


def lags(app: App, table_offsets: Mapping[tuple[str, int], int]) -> list[Lag]:
    """Return the lag of each role of an app. ``table_offsets``: the next offsets of the status table. Raises
    `BrokerUnavailable`, `TopicMissing` or `AccessDenied`."""
    settings, names = app.settings, app.names
    found = [
        Lag("materializer", "every topic of facts", _behind(table_offsets, bounds(settings, table_offsets, ANSWER_S)))
    ]
    readers = [("coordinator", names.coordinator_group, names.coordination)]
    readers += [
        (f"worker of {lane}", names.worker_group(lane), names.jobs(lane)) for lane in list(app.lanes)[:LANES_MOST]
    ]
    if app.events:
        readers += [("router", names.router_group, names.events(name)) for name in list(app.events)[:LANES_MOST]]
    for role, group, topic in readers:
        commits = {where: each.offset for where, each in group_offsets(settings, group, topic, ANSWER_S).items()}
        if not commits:
            found.append(Lag(role, topic, None))
            continue
        partitions = [(topic, number) for number in range(partitions_of(settings, topic, ANSWER_S))]
        known = bounds(settings, partitions, ANSWER_S)
        # Records below the first offset were deleted, and a partition without a commit was never read.
        found.append(Lag(role, topic, _behind({where: commits.get(where, 0) for where in partitions}, known)))
    return found


def _behind(offsets: Mapping[tuple[str, int], int], known: Mapping[tuple[str, int], tuple[int, int]]) -> int:
    lows_and_highs = ((offset, *known.get(where, (0, 0))) for where, offset in offsets.items())
    return sum(max(0, high - max(low, offset)) for offset, low, high in lows_and_highs)
