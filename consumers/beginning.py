"""Where the router begins in partitions that its group has never committed, of topics that are read from their end.

The first member that reads such a topic writes into its commits how many partitions there were. So a partition without
a commit is either one of those, which another member has not been given yet: it begins at its end, too. Or it was added
later: it begins at its beginning, or what came before the router noticed it would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from jobledger import commits
from jobledger.config import Settings
from jobledger.log import LogReader, partitions_of


def note(partitions: int) -> str:
    """What every commit of such a topic carries: how many partitions it was first read with."""
    return json.dumps({"began_with": partitions})


def began_with(notes: Iterable[str | None]) -> int | None:
    """How many partitions a topic was first read with, by what its commits carry; None: it was never read.

    0 if none of them says: the group has read it from its beginning.
    """
    found, counts = list(notes), []
    for text in found:
        try:
            said = json.loads(text or "")["began_with"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(said, int):
            counts.append(said)
    return min(counts, default=0) if found else None


def at_the_end(settings: Settings, group: str, topic: str, assigned: Sequence[int]) -> tuple[dict[int, int], str]:
    """The offsets at which a member begins in those of its partitions that are to be read from their end, by number;
    and the note for its commits of this topic. What is left out goes on where it was, or at its beginning.

    Raises `BrokerUnavailable`, `TopicMissing` or `AccessDenied`.
    """
    known = commits.group_offsets(settings, group, topic)
    began = began_with(each.metadata for each in known.values())
    if began is None:
        began = partitions_of(settings, topic)
    fresh = [number for number in assigned if (topic, number) not in known and number < began]
    with LogReader(settings) as log:
        return {number: log.watermarks(topic, number)[1] for number in fresh}, note(began)
