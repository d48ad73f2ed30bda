"""Log lines have the job during which they were written."""

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
from jobledger.definitions.context import enter
from jobledger.definitions.log_context import JobFilter, add_job
from tests.unit.test_hooks import job

PROGRAM = """
import logging, structlog
from jobledger.cli import logs
from jobledger.definitions.context import enter
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
    """Return the lines that a process with logging writes to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % kind], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stderr.splitlines()


def test_json_lines_carry_the_job() -> None:
    """This holds for lines of logging and of structlog, which keep their own fields. Outside a job no field is
    added."""
    before, paid, sent, broke = [json.loads(line) for line in written("json")]
    about = {"job_id": "j", "task": "charge", "queue": "default", "run": 1, "attempt": 2}
    assert (before["event"], before["level"], before["logger"]) == ("before 1", "warning", "shop")
    assert "job_id" not in before
    assert {**paid, **about, "order": 7, "event": "paid €"} == paid
    assert {**sent, **about, "to": "a@b", "event": "sent", "logger": "shop.pay"} == sent
    assert "ZeroDivisionError" in broke["exception"]
    assert paid["timestamp"].endswith("Z")


def test_text_lines_carry_the_job() -> None:
    """The fields of the job are after the message."""
    lines = written("text")
    assert lines[0].endswith("WARNING shop: before 1")
    assert any(
        line.endswith("WARNING shop: paid € [job_id=j task=charge queue=default run=1 attempt=2]") for line in lines
    )


def test_an_unknown_log_format_is_refused() -> None:
    """The error lists the formats."""
    with pytest.raises(ConfigError, match="the formats are text, json"):
        logs.set_up({"JOBLEDGER_LOG_FORMAT": "xml"})


def test_the_filter_and_the_processor_work_in_other_log_configurations() -> None:
    """A field of the line itself is not replaced by the field of the job."""

    def inside() -> None:
        enter(job("charge"))
        record = logging.makeLogRecord({"task": "mine"})
        assert JobFilter().filter(record)
        assert (record.task, record.job_id) == ("mine", "j")  # type: ignore[attr-defined]  # set by the filter
        event: dict[str, Any] = {"event": "x", "attempt": "mine"}
        assert add_job(None, "info", event)["attempt"] == "mine"
        assert event["job_id"] == "j"

    contextvars.copy_context().run(inside)


SETS_UP = """
import logging, logging.config, sys
from jobledger.cli import logs
from jobledger.consumers.state.outcome import Failed, Retried, error_info
from jobledger.consumers.recording.outcome_log import log_outcome
from jobledger.schemas.events import JobEvent

{theirs}
logs.set_up({env})
try:
    raise ValueError("no such city")
except ValueError as caught:
    error = error_info(caught)
event = JobEvent("e", "j1", 1, 2, 1, 0, "charge", "default", None, None, "test", None, None)
log_outcome(event, Retried(error, 1500))
log_outcome(event, Failed("exhausted", error))
logging.getLogger("jobledger.worker").info("a line of information")
"""
RETRIED = "job j1 (charge) is tried again in 1.5 s at attempt 2: ValueError: no such city"
FAILED = "job j1 (charge) failed (exhausted), with no further attempt, at attempt 2: ValueError: no such city"
DICT = """logging.config.dictConfig({"version": 1, "handlers": {"h": {"class": "logging.StreamHandler", "level": "CRITICAL"}},
    "root": {"handlers": ["h"]}})"""


@pytest.mark.parametrize(
    ("theirs", "env", "lines"),
    [
        ("", {}, [RETRIED, FAILED, "a line of information"]),
        ("logging.basicConfig(format='APP %(message)s')", {}, [f"APP {RETRIED}", f"APP {FAILED}"]),
        (
            "logging.basicConfig(format='APP %(message)s')",
            {"JOBLEDGER_LOG_LEVEL": "INFO"},
            [f"APP {RETRIED}", f"APP {FAILED}", "APP a line of information"],
        ),
        ("logging.basicConfig(format='APP %(message)s', level='CRITICAL')", {}, [f"APP {FAILED}"]),
        (DICT, {}, [FAILED]),
        ("logging.disable()", {}, [FAILED]),
        ("logging.basicConfig(handlers=[logging.NullHandler()])", {}, [FAILED]),
        ("logging.basicConfig(); logging.getLogger('jobledger').setLevel('CRITICAL')", {}, []),
        ("", {"JOBLEDGER_LOG_LEVEL": "CRITICAL"}, []),
    ],
)
def test_the_apps_log_configuration_is_kept_and_hides_no_failed_job(
    theirs: str, env: dict[str, str], lines: list[str]
) -> None:
    """Jobledger's lines use the app's handlers. The failure of a job is written with any configuration, unless the
    configuration sets a level for Jobledger's loggers."""
    program = SETS_UP.format(theirs=theirs, env=env)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, encoding="utf-8")
    written_lines = done.stderr.splitlines()
    assert len(written_lines) == len(lines), written_lines
    assert all(line.endswith(wanted) for line, wanted in zip(written_lines, lines, strict=True)), written_lines


def test_an_attempt_s_traceback_is_shown_at_debug_level() -> None:
    """This holds for a retry and for a failure."""
    program = SETS_UP.format(theirs="", env={"JOBLEDGER_LOG_LEVEL": "DEBUG"})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stderr.count("Traceback (most recent call last):") == 2
