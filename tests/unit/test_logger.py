"""Jobledger's own loggers."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobledger
from jobledger.errors import TaskTimedOut
from jobledger.process.logger import get_logger, loop_error


class Raises(logging.Handler):
    """A handler that raises an exception for each record."""

    def __init__(self, raised: type[BaseException]) -> None:
        super().__init__()
        self.raised = raised

    def emit(self, record: logging.LogRecord) -> None:
        raise self.raised("no room")


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A new logger of Jobledger."""
    made = get_logger(f"jobledger.test.{uuid.uuid4().hex}")
    yield made
    made.handlers.clear()


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, GeneratorExit])
def test_an_error_of_a_log_handler_does_not_reach_the_code_that_logs(
    logger: logging.Logger, raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is written to standard error, with the error."""
    logger.addHandler(Raises(raised))
    logger.warning("job %s failed", "j1", extra={"job_id": "j1"})
    try:
        raise ValueError("the job's")
    except ValueError:
        logger.exception("it broke")
    written = capsys.readouterr().err
    assert f"WARNING {logger.name}: job j1 failed [logging failed: {raised.__name__}: no room]" in written
    assert "it broke" in written


def test_an_error_of_a_log_filter_does_not_reach_the_code_that_logs(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is written to standard error."""

    def refuses(record: logging.LogRecord) -> bool:
        raise RuntimeError("no")

    logger.addFilter(refuses)
    logger.warning("seen all the same")
    assert "seen all the same" in capsys.readouterr().err


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TaskTimedOut])
def test_ctrl_c_and_a_time_limit_during_logging_are_raised(logger: logging.Logger, raised: type[BaseException]) -> None:
    """These two exceptions are not errors of a handler."""
    logger.addHandler(Raises(raised))
    with pytest.raises(raised):
        logger.warning("x")


def test_a_log_record_has_the_position_of_the_code_that_logs(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """The record does not have the position of the guard around the handlers."""
    logger.warning("here")
    assert caplog.records[-1].filename == Path(__file__).name
    assert caplog.records[-1].funcName == "test_a_log_record_has_the_position_of_the_code_that_logs"


CONFIGURES = """
import logging.config
from jobledger.process.logger import get_logger
ours, other = get_logger("jobledger.worker"), logging.getLogger("other")
handler = {"class": "logging.StreamHandler"}
logging.config.dictConfig({"version": 1, "handlers": {"err": handler}, "root": {"handlers": ["err"]}})
ours.warning("still here")
other.warning("disabled")
"""


def test_a_logging_configuration_does_not_disable_our_loggers() -> None:
    """By default, `dictConfig` disables every existing logger that the configuration does not name."""
    done = subprocess.run([sys.executable, "-c", CONFIGURES], capture_output=True, text=True, check=True)
    assert done.stderr == "still here\n"


def test_every_logger_of_ours_is_guarded() -> None:
    """No module makes a logger of Jobledger with `logging.getLogger`."""
    folder = Path(jobledger.__file__).parent
    files = [
        path for part in (".", "consumers", "streams", "schemas") for path in (folder / part).resolve().rglob("*.py")
    ]
    assert len(files) > 100
    wrong = [path.name for path in files if re.search(r"^\w+ = logging\.getLogger\(", path.read_text(), re.MULTILINE)]
    assert wrong == []


def test_a_broken_log_does_not_stop_an_event_loop() -> None:
    """A callback fails, and the log handler for its error raises. The loop continues."""
    handler = Raises(RuntimeError)
    asyncio_log = logging.getLogger("asyncio")
    asyncio_log.addHandler(handler)

    async def main() -> str:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(loop_error)
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return "ran on"

    try:
        assert asyncio.run(main()) == "ran on"
    finally:
        asyncio_log.removeHandler(handler)
