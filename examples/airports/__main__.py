"""Runs the whole demo: ``python -m examples.airports``, or ``make demo``.

The demo starts a broker of its own (unless ``JOBLEDGER_BOOTSTRAP`` names one), the third party, a worker and the stream
processor as real processes. It submits one job for each row, shows the jobs' progress, checks the report, rebuilds the
status table from the log, and stops everything that it started. The files of the run stay in ``.demo`` for inspection.

Exit codes: 0 if all checks hold; 1 if one does not, or after an error, which is printed; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException

from examples.airports import history, report
from examples.airports.database import saved_rows
from examples.airports.place import DemoFailed, Place, claimed
from examples.airports.processes import ProcessDied, Processes
from examples.airports.report import Check
from examples.airports.rows import Airport, airports
from examples.airports.screen import Progress, Screen
from examples.airports.thirdparty import BUSY_SHARE, HANG_SHARE
from jobledger import JobledgerError
from jobledger.errors import StoreNotFound
from jobledger.kafka.clients import admin
from jobledger.kafka.embedded import EmbeddedKafka
from jobledger.kafka.embedded.ports import bindable
from jobledger.kafka.topics import ensure
from jobledger.log.reading import LogReader, high_watermarks

if TYPE_CHECKING:
    from jobledger import App

TARGET = "examples.airports.app:app"
#: Seconds after which the demo gives up if no job has ended in this time.
STALL_S = 60.0
READY_S = 60.0
#: The port of the dashboard is the first free one from here on.
PAGE_PORT = 8420
POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.airports", description="Import real airports as jobs.")
    parser.add_argument("--rows", type=int, help="import only so many rows, drawn by the seed")
    parser.add_argument("--concurrency", type=int, default=100, help="jobs the worker runs at once (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="decides how the third party fails (default: 1)")
    parser.add_argument("--home", type=Path, default=Path(".demo"), help="folder of the run (default: .demo)")
    parser.add_argument("--svg", type=Path, help="save what was shown as a picture")
    parser.add_argument("--stay", action="store_true", help="then show the jobs in a browser, until Ctrl-C")
    options = parser.parse_args(argv)
    screen = Screen(picture=options.svg is not None)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _end)
    try:
        good = run(screen, options)
    except KeyboardInterrupt:
        screen.console.print("\n  interrupted; everything that was started has been stopped", style="yellow")
        return 130
    except (JobledgerError, DemoFailed, ProcessDied) as error:
        screen.console.print(f"\n{error}", style="red", markup=False)
        return 1
    if options.svg is not None:
        screen.save(options.svg, "python -m examples.airports")
    return 0 if good else 1


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def run(screen: Screen, options: argparse.Namespace) -> bool:
    """Run the demo, and stop everything that it started. Return whether all checks hold."""
    start = time.monotonic()
    given = os.environ.get("JOBLEDGER_BOOTSTRAP")
    exports = {"JOBLEDGER_HOME": _short(options.home.expanduser().absolute())}
    exports |= {"JOBLEDGER_BOOTSTRAP": given} if given else {}
    exports |= {"JOBLEDGER_STATUS_URL": ""} if os.environ.get("JOBLEDGER_STATUS_URL") else {}
    namespace = f"airports-{time.strftime('%Y%m%d-%H%M%S')}" if given else "airports"
    with ExitStack() as stack:
        try:
            place = stack.enter_context(claimed(options.home, namespace))
            checks, example = _story(screen, stack, place, given, options)
        finally:
            # From here on the processes are stopped. A second Ctrl-C must not leave some of them running.
            deaf = [(each, signal.signal(each, signal.SIG_IGN)) for each in (signal.SIGINT, signal.SIGTERM)]
            began = time.monotonic()
    for each, handler in deaf:
        signal.signal(each, handler)
    screen.print()
    screen.done("stopped", "everything that was started", time.monotonic() - began)
    failed = sum(not check.holds for check in checks)
    screen.verdict(
        f"{failed} of {len(checks)} checks failed" if failed else f"All {len(checks)} checks hold",
        f", after {time.monotonic() - start:.0f} s",
        good=not failed,
    )
    screen.heading("Look further")
    screen.commands(_commands(exports, given is None, example))
    return not failed


def _story(
    screen: Screen, stack: ExitStack, place: Place, given: str | None, options: argparse.Namespace
) -> tuple[list[Check], str | None]:
    """Run the steps of the demo. Return the checks, and the id of a job that is worth inspecting."""
    place.logs.mkdir()
    logging.basicConfig(filename=place.logs / "demo.log", level=logging.INFO)
    rows = list(airports())
    if options.rows is not None:
        rows = random.Random(options.seed).sample(rows, min(options.rows, len(rows)))
    screen.title(f"Importing {len(rows):,} airports in the background, one job a row")
    bootstrap = given or _start_broker(screen, stack, place)
    os.environ.update(place.environ(bootstrap))
    processes = stack.enter_context(Processes(place.logs))
    api = os.environ["AIRPORTS_API"] = _start_third_party(screen, processes, options.seed)
    from examples.airports.app import app  # the import reads the settings that the lines above made

    stack.callback(app.close)
    _start_jobledger(screen, processes, app, options.concurrency)
    _import(screen, processes, app, rows)
    checks, example = _account(screen, app, place, rows, api)
    checks += _rebuild(screen, processes, app, api)
    if options.stay:
        _stay(screen, processes)
    return checks, example


def _start_broker(screen: Screen, stack: ExitStack, place: Place) -> str:
    with screen.step("broker") as shown:

        def progress(step: str, done: int, total: int) -> None:
            shown.doing(f"{step} {done} of {total}" if total else step)

        kafka = EmbeddedKafka(place.home, jars=place.jars, progress=progress)
        stack.callback(kafka.close)
        started = kafka.start()
        shown.result = f"Apache Kafka {started.version} of its own at {kafka.bootstrap}"
        return kafka.bootstrap


def _start_third_party(screen: Screen, processes: Processes, seed: int) -> str:
    with screen.step("third party") as step:
        argv = [sys.executable, "-m", "examples.airports.thirdparty", "--seed", str(seed)]
        url: str = processes.first_line(processes.start("thirdparty", argv), READY_S)["url"]
        step.result = f"{url}: 2–50 ms a call, {BUSY_SHARE:.0%} busy, {HANG_SHARE:.0%} never answer"
        return url


def _start_jobledger(screen: Screen, processes: Processes, app: App, concurrency: int) -> None:
    with screen.step("topics") as step:
        topics = [change for change in ensure(app, app.settings).changes if change.kind == "topic"]
        step.result = f"{len(topics)} of namespace {app.names.namespace}, {app.partitions} partitions each"
    with screen.step("processes") as step:
        jobledger = [sys.executable, "-m", "jobledger"]
        processes.start("streams", [*jobledger, "streams", TARGET])
        processes.start("worker", [*jobledger, "worker", TARGET, "--concurrency", str(concurrency)])
        for what, ready in _readiness(app).items():
            step.doing(f"waiting for the {what}")
            _wait(processes, ready, READY_S, f"the {what} was not ready")
        step.result = f"a worker for {concurrency} jobs at once, the coordinator, the materializer"


def _wait(processes: Processes, check: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not check():
        processes.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what} within {timeout:g} s; what the processes wrote is in {processes.logs}")
        time.sleep(POLL_S)


def _readiness(app: App) -> dict[str, Callable[[], bool]]:
    """Return, for each process, a function that tells from the broker or the status table whether the process is
    ready."""
    client = admin(app.settings)
    partitions = app.queues["import"].partitions

    def owned(group: str) -> int:
        """Return the number of partitions that are assigned to the members of a consumer group."""
        try:
            found = client.describe_consumer_groups([group], request_timeout=5)[group].result()
        except KafkaException:
            return 0  # no member has joined it yet
        return sum(len(member.assignment.topic_partitions) for member in found.members if member.assignment)

    def table() -> bool:
        try:
            _counts(app)
        except StoreNotFound:
            return False
        return True

    return {
        "materializer": table,
        "worker": lambda: owned(app.names.worker_group("import")) == partitions,
        "coordinator": lambda: owned(app.names.coordinator_group) > 0,
    }


def _counts(app: App) -> dict[str, int]:
    """Return the number of jobs in each state."""
    found: dict[str, int] = app.status_table().counts_by_state()
    return found


def _import(screen: Screen, processes: Processes, app: App, rows: Sequence[Airport]) -> None:
    from examples.airports.app import import_airport

    with screen.step("submitted") as step:
        began = time.monotonic()
        handles = app.submit_many(import_airport.using(tags={"country": row.country}).job(row) for row in rows)
        rate = len(handles) / (time.monotonic() - began)
        step.result = f"{len(handles):,} jobs, each acknowledged by the log: {rate:,.0f} a second"
    with Progress(screen, len(rows)) as progress:
        moved, ended = time.monotonic(), 0
        while progress.ended < len(rows):
            processes.check()
            progress.show(_counts(app))
            if progress.ended != ended:
                moved, ended = time.monotonic(), progress.ended
            elif time.monotonic() - moved > STALL_S:
                raise DemoFailed(
                    f"no job has ended for {STALL_S:g} s, {len(rows) - ended:,} have not; what the processes wrote is "
                    f"in {processes.logs}"
                )
            time.sleep(POLL_S)


def _account(
    screen: Screen, app: App, place: Place, rows: Sequence[Airport], api: str
) -> tuple[list[Check], str | None]:
    with screen.step("read back") as step:
        failed = [status.error.message if status.error else "" for status in app.jobs(state="failed", page=5_000)]
        saved = saved_rows(place.database)
        lives = history.fold(history.read(app))
        retries, calls = sum(life.retries for life in lives.values()), _stats(api)
        step.result = f"{len(lives):,} jobs with {retries:,} retries, from the log and the status table"
    checks = report.account(rows, _counts(app), failed, saved, lives)
    screen.heading("The account")
    screen.checks(checks)
    screen.heading("Rejects")
    screen.rejects(report.rejects(failed), report.examples(rows))
    screen.heading("Time")
    screen.latencies(report.latencies(lives.values()))
    screen.spent(report.spent(lives.values()), len(lives))
    screen.note(
        f"All jobs were submitted at once, so they wait for each other. The third party got {calls['calls']:,} calls: "
        f"{calls.get('busy', 0):,} were answered 503, {calls.get('hang', 0):,} never."
    )
    most_tried = max(lives, key=lambda job_id: lives[job_id].retries, default=None)
    return checks, most_tried


def _rebuild(screen: Screen, processes: Processes, app: App, api: str) -> list[Check]:
    screen.heading("The status table again, made from the log alone")
    with screen.step("verified") as step:
        # Records that the last jobs caused in addition to their outcomes may not be in the table yet.
        _wait(processes, lambda: _abreast(app), READY_S, "the status table was not abreast of the log")
        processes.stop("streams")  # the table has one writer; the worker stays and would run any new job
        before, calls, written = _jobledger("verify", TARGET), _stats(api)["calls"], _written(app)
        step.result = f"{before['jobs']:,} jobs of the table the import has made, against the log"
    with screen.step("rebuilt") as step:
        made = _jobledger("rebuild", TARGET, "--yes")
        step.result = f"{made['jobs']:,} jobs from {made['records']:,} records of the log"
    with screen.step("verified") as step:
        after = _jobledger("verify", TARGET)
        step.result = f"{after['jobs']:,} jobs of the new table, against the log"
    checks = [
        Check("the table the import has made equals the log", before["equal"], f"digest {before['table_digest'][:16]}"),
        Check(
            "the rebuilt table equals it",
            after["equal"] and after["table_digest"] == before["table_digest"] and made["jobs"] == before["jobs"],
            f"digest {after['table_digest'][:16]}",
        ),
        Check(
            "no job has run for it: no call, no new record",
            (_stats(api)["calls"], _written(app)) == (calls, written),
            f"{calls:,} calls, {written:,} records",
        ),
    ]
    screen.print()
    screen.checks(checks)
    return checks


def _stay(screen: Screen, processes: Processes) -> None:
    """Show the dashboard until Ctrl-C."""
    screen.heading("The dashboard")
    with screen.step("page") as step:
        address = f"127.0.0.1:{next(filter(bindable, range(PAGE_PORT, PAGE_PORT + 1_000)))}"
        jobledger = [sys.executable, "-m", "jobledger"]
        processes.start("streams", [*jobledger, "streams", TARGET])  # stopped for the rebuild
        processes.start("web", [*jobledger, "web", TARGET, "--listen", address])
        _wait(processes, lambda: _answers(f"http://{address}/api/v1/readyz"), READY_S, "the page was not ready")
        step.result = f"http://{address} shows all of these jobs; Ctrl-C ends the demo"
    try:
        while True:
            processes.check()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        screen.print()


def _answers(url: str) -> bool:
    """Return whether a server answers at this address, and is ready."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _abreast(app: App) -> bool:
    """Return whether the status table has read the log up to its end."""
    with LogReader(app.settings) as reader:
        return all(reader.bounds(*place)[1] == offset for place, offset in app.status_table().offsets().items())


def _written(app: App) -> int:
    """Return the number of records in the work topics and the lifecycle topic."""
    topics = [*(app.names.jobs(queue) for queue in app.queues), app.names.lifecycle]
    with LogReader(app.settings) as reader:
        return sum(high_watermarks(reader, topics, app.settings).values())


def _stats(api: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{api}/stats", timeout=10) as answer:
        found: dict[str, int] = json.load(answer)
    return found


def _jobledger(*words: str) -> dict[str, Any]:
    """Run ``jobledger … --json`` and return what it prints. Raises `DemoFailed` with the output if that is not JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "jobledger", *words, "--json"], capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise DemoFailed(
            f"`jobledger {' '.join(words)}` ended with {done.returncode}: {done.stdout}{done.stderr}"
        ) from None
    return found


def _commands(exports: Mapping[str, str], own_broker: bool, example: str | None) -> list[tuple[str, list[str]]]:
    """Return the commands with which a user can inspect what the run left, each group with what it shows."""
    script = Path(sys.executable).with_name("jobledger")
    jobledger = "jobledger" if shutil.which("jobledger") == str(script) else _short(script)
    from_log = [f"{jobledger} events tail -n 20"]
    if example is not None:
        from_log.insert(0, f"{jobledger} jobs show {example} --timeline")
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in exports.items())
    commands = [
        ("the rejects, and the airports of one country", [f"export {settings}"]),
        ("a job that was retried, and the end of the log", from_log),
    ]
    commands[0][1].extend([f"{jobledger} jobs list --state failed", f"{jobledger} jobs list --tag country=CH"])
    if own_broker:
        from_log.insert(0, f"{jobledger} kafka start --port 0")
        from_log.append(f"{jobledger} kafka stop")
    return commands


def _short(path: Path) -> str:
    """Return ``path`` relative to the working directory if it is inside, else unchanged."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
