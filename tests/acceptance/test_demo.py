"""The demo as a user runs it: real processes, its own account checked, nothing left running however it ends."""

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
#: Marks every process of one test, in its environment: Kafka's JVM and grandchildren included.
MARK = "AIRPORTS_TEST"
#: `python -m examples.airports`, that hears Ctrl-C even if these tests run in the background of a shell, which ignores it.
AS_IN_A_TERMINAL = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('examples.airports', run_name='__main__', alter_sys=True)"
)

pytestmark = pytest.mark.kafka


@pytest.fixture
def mark() -> Iterator[str]:
    """A text that the environment of every process of this test holds; what still runs at the end is killed."""
    text = uuid.uuid4().hex
    yield text
    for process in marked(text):
        process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """The living processes whose environment holds ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def demo(mark: str, home: Path, rows: int, bootstrap: str | None) -> subprocess.Popen[str]:
    """The demo as a process, in a home of its own."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("JOBLEDGER_")} | {MARK: mark}
    if bootstrap is not None:
        environ["JOBLEDGER_BOOTSTRAP"] = bootstrap
    argv = [sys.executable, "-c", AS_IN_A_TERMINAL, "--home", str(home), "--rows", str(rows)]
    return subprocess.Popen(argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process printed up to the line that holds ``text``."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the demo ended without printing {text!r}:\n{seen}")


def wait_for(check: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until ``check`` is true, at most ``timeout`` seconds."""
    deadline = time.monotonic() + PATIENCE * timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {PATIENCE * timeout:g} s: {what}"
        time.sleep(0.1)


def test_the_demo_balances_and_leaves_nothing_running(mark: str, tmp_path: Path) -> None:
    """With a broker of its own it ends with 0, every claim is ticked, and the commands it prints work."""
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
    """An interrupt in the middle of the import ends with 130 and no process left behind."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    assert len(marked(mark)) >= 4
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 130, out
    assert marked(mark) == [], "left running"


@pytest.mark.extended
def test_kill_9_leaves_no_orphan(mark: str, broker: str, tmp_path: Path) -> None:
    """Killed without a chance to clean up, the demo still takes its children with it."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    process.kill()
    process.communicate(timeout=10 * PATIENCE)
    wait_for(lambda: marked(mark) == [], 60, f"all of {marked(mark)} have ended")


@pytest.mark.extended
def test_a_child_that_dies_fails_the_demo(mark: str, broker: str, tmp_path: Path) -> None:
    """If the third party goes away the demo says so, ends with 1 and stops the others."""
    process = demo(mark, tmp_path / "demo", 20_000, broker)
    read_until(process, "submitted")
    victims = [p for p in marked(mark) if "examples.airports.thirdparty" in p.cmdline()]
    assert len(victims) == 1
    victims[0].kill()
    out, _ = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 1, out
    assert "thirdparty ended with -9" in out
    assert marked(mark) == [], "left running"


def test_the_third_party_answers_what_can_be_checked(mark: str) -> None:
    """Over HTTP it gives the great-circle distance, refuses what is no place, counts its calls and ends when told."""
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
            # The outcome of each call is known beforehand, so a slow answer is not taken for a missing one.
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
