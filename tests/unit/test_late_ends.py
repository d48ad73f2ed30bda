"""Who asks for late ends, without a broker."""

from __future__ import annotations

import threading
import uuid
from typing import Any, cast

from jobledger import Settings
from jobledger.consumers.late_ends import LateEnds
from jobledger.consumers.work import Found, Lease, Partition, Work
from jobledger.schemas import codec
from jobledger.schemas import events as ev


def test_who_asks_while_the_worker_ends_is_answered_once() -> None:
    """A job that waits for an answer is counted as running: without one the worker would wait for it in vain."""
    partition = Partition("shop.jobs.default", 0, Lease(1.0), -1, None)
    partition.give_up()  # so nothing is read, and no broker needed
    event = ev.JobEvent(
        str(uuid.uuid4()), "j", 1, 1, 1, 0, "t", "default", None, None, "c", None, ev.JobDue(ev.JobSpec(b"{}"), 1)
    )
    works = [Work(partition, offset, event, cast(Any, None)) for offset in range(200)]
    for _ in range(50):
        answered: list[tuple[Work, Found | None]] = []
        failed: list[Exception] = []
        late = LateEnds(
            Settings(bootstrap="127.0.0.1:1"),
            "shop.lifecycle",
            codec.Decoder(),
            looked=lambda *answer, answered=answered: answered.append(answer),
            fail=failed.append,
        )
        late.start()
        asking = threading.Thread(target=lambda late=late: [late.look(work) for work in works])
        asking.start()
        late.close()
        asking.join()
        late.join(10)
        assert not late.is_alive()
        assert not failed
        assert sorted(work.offset for work, _ in answered) == list(range(200))
        assert {found for _, found in answered} == {None}
