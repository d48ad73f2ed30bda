"""The demo as people run it: real processes. Its own checks pass, and no process is left running, however the demo
ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from examples.airports.database import saved_rows
from examples.airports.rows import zones
from examples.airports.thirdparty import distance_m, fate
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
#: The environment variable that marks every process of one test, including Kafka's JVM and child processes of child
#: processes.
MARK = "AIRPORTS_TEST"
#: `python -m examples.airports`, which reacts to Ctrl-C even if these tests run in the background of a shell, where
#: SIGINT is ignored.
AS_IN_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('examples.airports', run_name='__main__', alter_sys=True)"
)

pytestmark = pytest.mark.kafka


@pytest.fixture
def mark() -> Iterator[str]:
    """Yield a text that is in the environment of every process of this test. Processes that still run at the end are
    killed."""
    text = uuid.uuid4().hex
    yield text
    for process in marked(text):
        process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Return the running processes with ``mark`` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def demo(mark: str, home: Path, rows: int, bootstrap: str | None) -> subprocess.Popen[str]:
    """Start the demo in its own home."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_")} | {MARK: mark}
    if bootstrap is not None:
        environ["JOBLEDGER_BOOTSTRAP"] = bootstrap
    argv = [sys.executable, "-c", AS_IN_A_TERMINAL, "--home", str(home), "--rows", str(rows)]
    return subprocess.Popen(argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return the output of the process up to the line with ``text``."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the demo ended without printing {text!r}:\n{seen}")


def wait_for(check: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll ``check`` until it is true, for at most ``timeout`` seconds times `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {PATIENCE * timeout:g} s: {what}"
        time.sleep(0.1)


@pytest.mark.extended
def test_the_demo_succeeds_and_leaves_nothing_running(mark: str, tmp_path: Path) -> None:
    """With its own broker, the demo exits with 0, every check passes, and the commands that it prints work."""
    process = demo(mark, tmp_path / "demo", 1_000, None)
    out, _ = process.communicate(timeout=100 * PATIENCE)
    assert process.returncode == 0, out
    assert "✗" not in out
    assert "rows = succeeded + failed" in out
    assert "digest" in out
    assert marked(mark) == [], "left running"
    assert 800 < len(saved_rows(tmp_path / "demo" / "airports.db")) < 1_000
    commands = out.split("Look further", 1)[1].split("\n", 1)[1]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_")} | {MARK: mark}
    tried = subprocess.run(
        ["/bin/sh", "-ec", commands],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50 * PATIENCE,
        check=False,
    )
    assert tried.returncode == 0, f"{commands}\n{tried.stdout}{tried.stderr}"
    assert "JobRetried" in tried.stdout
    assert marked(mark) == [], "left running"


@pytest.mark.extended
def test_ctrl_c_stops_everything(mark: str, broker: str, tmp_path: Path) -> None:
    """After an interrupt during the import, the demo exits with 130, and no process is left running."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    assert len(marked(mark)) >= 4
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 130, out
    assert marked(mark) == [], "left running"


@pytest.mark.extended
def test_kill_9_leaves_no_orphan(mark: str, broker: str, tmp_path: Path) -> None:
    """If the demo is killed, its child processes end, too."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    process.kill()
    process.communicate(timeout=10 * PATIENCE)
    wait_for(lambda: marked(mark) == [], 60, f"all of {marked(mark)} have ended")


@pytest.mark.extended
def test_a_child_that_dies_fails_the_demo(mark: str, broker: str, tmp_path: Path) -> None:
    """If the third party's process dies, the demo reports that, exits with 1 and stops the other processes."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    victims = [p for p in marked(mark) if "examples.airports.thirdparty" in p.cmdline()]
    assert len(victims) == 1
    victims[0].kill()
    out, _ = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 1, out
    assert "thirdparty ended with -9" in out
    assert marked(mark) == [], "left running"


def test_the_answers_of_the_third_party_can_be_checked(mark: str) -> None:
    """Over HTTP, the third party returns the great-circle distance, refuses an invalid place, counts its calls and ends
    on SIGTERM."""
    seed = 3
    argv = [sys.executable, "-m", "examples.airports.thirdparty", "--seed", str(seed)]
    with subprocess.Popen(argv, cwd=ROOT, env=os.environ | {MARK: mark}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]

        def ask(query: str) -> dict[str, object]:
            with urllib.request.urlopen(f"{url}/v1/distance?{query}", timeout=5 * PATIENCE) as answer:
                found: dict[str, object] = json.load(answer)
                return found

        answers = refused = 0
        for lat in range(30):
            query = f"lat={lat}&lon=7.5&tz=Europe/Zurich"
            # The outcome of each call is known beforehand, so a slow answer does not count as a missing one.
            outcome = fate(seed, query, 1).outcome
            try:
                found = ask(query)
            except (urllib.error.HTTPError, TimeoutError):
                assert outcome != "answer"
                refused += 1
                continue
            assert outcome == "answer"
            answers += 1
            zone = zones()["Europe/Zurich"]
            assert found == {"tz": "Europe/Zurich", "metres": round(distance_m(lat, 7.5, zone.lat, zone.lon))}
        assert answers > 20
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("lat=x&lon=7.5&tz=Europe/Zurich")
        with urllib.request.urlopen(f"{url}/stats", timeout=5 * PATIENCE) as answer:
            assert json.load(answer)["calls"] == answers + refused + 1
        process.terminate()
        assert process.wait(10 * PATIENCE) == 0
