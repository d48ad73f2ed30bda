"""Log lines tell which job they are about."""

from __future__ import annotations

import contextvars
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from jobledger import ConfigError
from jobledger.cli import logs
from jobledger.context import enter
from jobledger.logs import JobFilter, add_job
from tests.unit.test_hooks import job

PROGRAM = """
import logging, structlog
from jobledger.cli import logs
from jobledger.context import enter
from tests.unit.test_hooks import job

logs.set_up({"JOBLEDGER_LOG_FORMAT": %r})
logging.getLogger("shop").warning("before %%d", 1)
enter(job("charge", attempt=2))
logging.getLogger("shop").warning("paid %%s", "€", extra={"order": 7})
structlog.get_logger("shop.pay").warning("sent", to="a@b")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("shop").exception("broke")
"""


def written(kind: str) -> list[str]:
    """What a process that logs writes on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % kind], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stderr.splitlines()


def test_json_lines_carry_the_job() -> None:
    """Of logging and of structlog, with what was given to each; outside a job nothing is added."""
    before, paid, sent, broke = [json.loads(line) for line in written("json")]
    about = {"job_id": "j", "task": "charge", "queue": "default", "run": 1, "attempt": 2}
    assert (before["event"], before["level"], before["logger"]) == ("before 1", "warning", "shop")
    assert "job_id" not in before
    assert {**paid, **about, "order": 7, "event": "paid €"} == paid
    assert {**sent, **about, "to": "a@b", "event": "sent", "logger": "shop.pay"} == sent
    assert "ZeroDivisionError" in broke["exception"]
    assert paid["timestamp"].endswith("Z")


def test_text_lines_carry_the_job() -> None:
    """Behind the message."""
    lines = written("text")
    assert lines[0].endswith("WARNING shop: before 1")
    assert any(
        line.endswith("WARNING shop: paid € [job_id=j task=charge queue=default run=1 attempt=2]") for line in lines
    )


def test_a_format_that_is_none_is_refused() -> None:
    """Naming those there are."""
    with pytest.raises(ConfigError, match="there are text, json"):
        logs.set_up({"JOBLEDGER_LOG_FORMAT": "xml"})


def test_for_loggers_that_somebody_else_set_up() -> None:
    """The filter and the processor can be used by themselves; what the line says wins."""

    def inside() -> None:
        enter(job("charge"))
        record = logging.makeLogRecord({"task": "mine"})
        assert JobFilter().filter(record)
        assert (record.task, record.job_id) == ("mine", "j")  # type: ignore[attr-defined]  # put there
        event: dict[str, Any] = {"event": "x", "attempt": "mine"}
        assert add_job(None, "info", event)["attempt"] == "mine"
        assert event["job_id"] == "j"

    contextvars.copy_context().run(inside)
