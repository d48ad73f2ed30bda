"""A check, its subject and its result; and how several checks run at the same time, together within a time limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from jobledger.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigError,
    JobledgerError,
    NotAuthenticated,
    StoreError,
    StoreNotFound,
    TopicMissing,
    text_of,
)
from jobledger.process.logger import get_logger

if TYPE_CHECKING:
    from jobledger.app import App
    from jobledger.config import Settings
    from jobledger.kafka.topic_names import Names

LOG = get_logger("jobledger.doctor")

#: Seconds for all checks together.
TIME_MOST_S = 60.0
#: Seconds for one request to a broker.
REQUEST_S = 5.0


class Check(msgspec.Struct, frozen=True):
    """The result of one check. ``detail``: the finding. ``fix``: one sentence that names a command or a setting; None
    if ``ok``."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of a check. ``fix`` None: nothing needs a fix."""

    detail: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of the checks: an app, or only a namespace without tasks."""

    app: App

    @property
    def settings(self) -> Settings:
        """The settings of this process."""
        return self.app.settings

    @property
    def names(self) -> Names:
        """The names of topics and groups."""
        return self.app.names

    @property
    def lanes(self) -> Sequence[str]:
        """The lanes of the app: its queues, or the priorities of a queue."""
        return list(self.app.lanes)


@dataclass(frozen=True, slots=True)
class Examination:
    """One check: a function of a `Subject` (of None, if it is a check of this machine). ``after``: the name of a check
    without which this one cannot be made; None: it does not depend on others."""

    name: str
    look: Callable[[Any], Finding]
    after: str | None = None


#: The fix of each class of errors. The message of an error, which is the check's detail, often names a better fix.
_FIXES: Sequence[tuple[type[JobledgerError], str]] = (
    (TopicMissing, "Run `jobledger topics apply MODULE:APP`."),
    (NotAuthenticated, "Correct the login and the certificates in JOBLEDGER_KAFKA__*."),
    (BrokerUnavailable, "Set JOBLEDGER_BOOTSTRAP to a broker that runs, or start one with `jobledger kafka start`."),
    (StoreNotFound, "Start `jobledger streams MODULE:APP`, or set JOBLEDGER_STATUS_URL as it is set there."),
    (StoreError, "Correct JOBLEDGER_STATUS_URL, or start its database."),
    (ConfigError, "Correct the setting that the detail names."),
)
_OTHER_FIX = "Run `jobledger --traceback doctor MODULE:APP`, and look at the log of the broker and the database."


def made(examination: Examination, subject: Subject | None) -> Check:
    """Make one check. An error of the check becomes its result."""
    try:
        finding = examination.look(subject)
    except NotAuthenticated as exc:
        finding = _failed(exc)
    except AccessDenied as exc:  # the check of the rights judges this
        finding = Finding(f"not checked: {text_of(exc)}")
    except Exception as exc:  # one check must not end the others
        if not isinstance(exc, JobledgerError):
            LOG.debug("the check %s raised an error", examination.name, exc_info=True)
        finding = _failed(exc)
    return Check(examination.name, finding.fix is None, finding.detail, finding.fix)


def _failed(exc: Exception) -> Finding:
    text = text_of(exc)
    if not isinstance(exc, JobledgerError):
        text = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return Finding(text, next((fix for kind, fix in _FIXES if isinstance(exc, kind)), _OTHER_FIX))


def all_made(
    examinations: Sequence[Examination], subject: Subject | None, time_most: float = TIME_MOST_S
) -> list[Check]:
    """Make the checks at the same time, and return their results in the order of ``examinations``.

    A check that depends on another one is made after it; if the other one failed, the check is not made and counts as
    failed. After ``time_most`` seconds the checks that have not ended are reported as failed; their threads may continue
    to run.
    """
    results: dict[str, Check] = {}
    answers: queue.SimpleQueue[Check] = queue.SimpleQueue()
    deadline = time.monotonic() + time_most
    waiting, running = list(examinations), 0
    names = {each.name for each in examinations}
    while waiting or running:
        for each in [one for one in waiting if one.after not in names or one.after in results]:
            waiting.remove(each)
            before = None if each.after is None else results.get(each.after)
            if before is not None and not before.ok:
                detail = f"not checked, because the check {before.name!r} failed"
                results[each.name] = Check(each.name, False, detail, before.fix)
                continue
            running += 1
            start = threading.Thread(
                target=lambda one=each: answers.put(made(one, subject)),
                name=f"jobledger-doctor-{each.name}",
                daemon=True,
            )
            start.start()
        if not running:
            continue
        try:
            done = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        running -= 1
        results[done.name] = done
    late = f"not known: the check did not end within {time_most:g} s"
    missing = Check("", False, late, "Check that the broker and the database answer, and run `jobledger doctor` again.")
    return [results.get(each.name) or msgspec.structs.replace(missing, name=each.name) for each in examinations]
