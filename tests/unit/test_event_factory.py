"""The events that all parts build."""

from __future__ import annotations

import msgspec
import pytest

from jobledger.schemas import codec
from jobledger.schemas import events as ev
from jobledger.schemas.event_factory import about, derived, standalone, submission
from jobledger.schemas.ids import derived_id
from jobledger.streams.coordinator.rules.schedule_rows import Scheduled

JOB = "0197a3f0-1c2d-7e4f-8a5b-6c7d8e9f0a1b"
SPEC = ev.JobSpec(b"[1]", {"tenant": "acme"}, "parent", None, 5, "high")
WORK = ev.JobEvent("e", JOB, 2, 3, 4, 5, "send", "mail", "k", "home", "client", "trace", ev.JobDue(SPEC, 6))
ROW = Scheduled(0, 1, 2, 4, 3, 6, JOB, "send", "mail", "k", "home", "trace", b"[1]", {}, None)


@pytest.mark.parametrize("release", [WORK, ROW], ids=["an event", "a row"])
def test_an_event_about_a_release_has_the_header_of_the_release(release: ev.JobEvent | Scheduled) -> None:
    """Only the id, the time, the source and the fact are new."""
    fact = ev.JobStarted("w", None, {}, "t", 7)
    event = about(release, fact, "id", 99, "worker@h:1")
    assert event == msgspec.structs.replace(WORK, event_id="id", occurred_at=99, source="worker@h:1", fact=fact)


def test_a_derived_event_has_the_derived_id() -> None:
    """The rest is as of any other event about the release."""
    fact = ev.DeadLettered(SPEC, "exhausted", ev.ErrorInfo("E", "m"))
    event = derived(WORK, "dead-letter", fact, 99, "w")
    assert event == about(WORK, fact, derived_id(JOB, 2, 4, "dead-letter"), 99, "w")


def test_a_submission_is_release_1_or_with_a_delay_release_0() -> None:
    """The coordinator makes release 1 of a delayed job, and keeps the job under its id."""
    at_once = submission(JOB, "send", "mail", "k", SPEC, 99, "client", "trace")
    assert at_once == ev.JobEvent(
        JOB, JOB, 1, 1, 1, 99, "send", "mail", "k", None, "client", "trace", ev.JobSubmitted(SPEC)
    )
    assert submission(JOB, "send", "mail", "k", SPEC, 99, "client", "trace", 0) == msgspec.structs.replace(
        at_once, release=0, home=JOB, fact=ev.JobSubmitted(SPEC, 0)
    )


def test_a_standalone_event_names_a_job_only_if_it_is_about_one() -> None:
    """A pause names a queue, and a cancel names a run of a job. Both have no attempt and no release."""
    pause = standalone(ev.QueuePaused("me", None), "id", 99, "client", queue="mail")
    assert pause == ev.JobEvent(
        "id", "", 0, 0, 0, 99, "", "mail", None, None, "client", None, ev.QueuePaused("me", None)
    )
    cancel = standalone(
        ev.CancelRequested("me", None), "id", 99, "c", job_id=JOB, run=2, task="send", queue="mail", home="home"
    )
    assert (cancel.job_id, cancel.run, cancel.attempt, cancel.release) == (JOB, 2, 0, 0)
    assert (cancel.task, cancel.queue, cancel.home) == ("send", "mail", "home")
    assert codec.decode(codec.encode(cancel)) == cancel
