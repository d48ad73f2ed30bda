"""The command line without a broker: help, errors in one line, exit codes, and how values are read and shown."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from jobledger import errors
from jobledger import job as fold
from jobledger.cli import output
from jobledger.cli.commands import Wrong, moment_ms
from jobledger.cli.events import Line, _json_line, _Printer, newest
from jobledger.cli.job_views import fields, row
from jobledger.cli.kafka import in_lines
from jobledger.cli.main import cli, main
from jobledger.cli.output import MEANINGS, Exit, duration, exit_code, relative
from jobledger.cli.submit import read_value
from jobledger.errors import JobFailed, JobledgerError
from jobledger.kafka.topic_names import Names
from jobledger.process.wording import counted
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.streams.projections.projection_store import ProjectionStore, offsets_table
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store.rows import key_text
from jobledger.streams.status.store.sqlite import SqliteStore
from jobledger.views import facts
from jobledger.views.jobs import fact_json, status_json
from jobledger.views.values import NESTED_MOST, iso, jsonable

UUID = "00000000-0000-7000-8000-000000000000"

APP = """\
from jobledger import App
app = App("shop")

@app.task
def add(a: int, b: int = 1, label: str = "") -> int:
    return a + b
"""


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a working directory with an app, a home folder without a broker, and an output 200 columns wide without a
    terminal."""
    for name in list(os.environ):
        if name.startswith("JOBLEDGER_") or name in ("FORCE_COLOR", "NO_COLOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JOBLEDGER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    (tmp_path / "cli_shop.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("cli_shop", None)


def bare(text: str) -> str:
    """Remove colours: typer writes them in a CI pipeline that asks for colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def commands() -> list[list[str]]:
    """Return every command and group, each as a list of words."""
    all_of_them: list[list[str]] = [[]]

    def walk(command: Any, words: list[str]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            all_of_them.append([*words, name])
            walk(below, [*words, name])

    walk(typer.main.get_command(cli), [])
    return all_of_them


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_a_help_text(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` of every command ends with 0 and prints more than the command's name."""
    assert main([*words, "--help"]) == Exit.OK
    shown = bare(capsys.readouterr().out)
    assert "Usage: jobledger " + " ".join(words) in shown
    assert len(shown.splitlines()) > 6


def test_the_commands_of_the_readme_exist() -> None:
    """Each command that the README names is a command of the program."""
    names = {" ".join(words) for words in commands()}
    assert names >= {
        *("dev", "worker", "streams", "coordinator", "materializer", "submit", "audit", "verify", "rebuild"),
        *("jobs list", "jobs show", "jobs wait", "events tail", "kafka start", "kafka stop", "kafka status"),
        *("topics plan", "topics apply"),
    }


def test_the_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """``jobledger --help`` lists every exit code with its meaning."""
    main(["--help"])
    shown = bare(capsys.readouterr().out)
    for code, meaning in MEANINGS.items():
        assert re.search(rf"{int(code)} +{re.escape(meaning.replace('`', ''))}", shown), meaning
    assert set(MEANINGS) == set(Exit)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` names program and version."""
    assert main(["--version"]) == Exit.OK
    assert re.fullmatch(r"jobledger \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["submit", "cli_shop:app", "add", "a=1"], "set JOBLEDGER_BOOTSTRAP=host:port (or --bootstrap)"),
        (["submit", "cli_shp:app", "add"], "did you mean 'cli_shop'?"),
        (["streams", "cli_shop:app"], "no Kafka broker is configured"),
        (["events", "tail", "--namespace", "shop"], "no Kafka broker is configured"),
        (["queues", "list", "--namespace", "shop"], "no Kafka broker is configured"),
        (["jobs", "cancel", UUID, "--namespace", "shop"], "set JOBLEDGER_BOOTSTRAP=host:port (or --bootstrap)"),
    ],
)
def test_an_error_is_one_line_with_the_value_and_the_remedy(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is one line on standard error with exit code 1, and standard output is empty. With --json the error is
    an object."""
    assert main(words) == Exit.ERROR
    shown = capsys.readouterr()
    assert shown.out == ""
    assert expected in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    if words[0] != "streams":
        assert main([*words, "--json"]) == Exit.ERROR
        shown = capsys.readouterr()
        assert shown.out == ""
        error = json.loads(shown.err)["error"]
        assert expected in error["message"]
        assert issubclass(getattr(errors, error["type"]), JobledgerError)


def test_a_missing_status_table_ends_a_command_with_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a status table the exit code is 3, and the error names the command that makes a table."""
    assert main(["jobs", "show", "x", "--namespace", "shop"]) == Exit.NOT_FOUND
    assert "jobledger streams" in capsys.readouterr().err


SUBMIT = ["submit", "cli_shop:app", "add"]
SHOP = ["--namespace", "shop"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nope"], "No such command 'nope'"),
        (["jobs", "list", "--limit", "x"], "Invalid value for '--limit'"),
        (["jobs", "list", "--stat", "failed"], "--state"),
        (["submit"], "Missing argument 'MODULE:APP'"),
        (["worker", "--grace", "1"], "Missing argument 'MODULE:APP'"),
        # names and values that the app does not have or take
        (["submit", "cli_shop:app", "ad", "a=1"], "task 'ad' is not registered with app 'shop': the app has ['add']"),
        ([*SUBMIT, "a=x"], "Expected `int`, got `str`"),
        ([*SUBMIT, "nonsense"], "argument 'nonsense' is not of the form NAME=VALUE"),
        ([*SUBMIT, "--args", "[1]"], "--args '[1]' is not a JSON object"),
        ([*SUBMIT, "--args", "{"], "--args '{' is not JSON"),
        ([*SUBMIT, "a=1", "--queue", "nope"], "queue 'nope' is not declared"),
        ([*SUBMIT, "a=1", "--priority", "urgent"], "is not 'high', 'normal' or 'low'"),
        (["worker", "cli_shop:app", "--queue", "default", "--queue", "nope"], "--queue: queue 'nope' is not declared by app 'shop'"),
        (["emit", "cli_shop:app", "Nope"], "app 'shop' has no event 'Nope'; its events: none"),
        (["backfill", "cli_shop:app", "nope"], "no handler is called 'nope'"),
        (["projections", "verify", "cli_shop:app", "nope"], "app 'shop' has no projection 'nope'; its projections: none"),
        (["queues", "pause", "cli_shop:app", "nope"], "app 'shop' has no queue 'nope'; its queues: default"),
        (["tasks", "pause", "cli_shop:app", "nope"], "app 'shop' has no task 'nope'; its tasks: add"),
        (["tasks", "limit", "cli_shop:app", "add", "--rate", "often"], "'often' is not a rate"),
        (["queues", "limit", "cli_shop:app", "default", "--concurrency", "1"], "is less than the 6 partitions"),
        (["topics", "acls", "cli_shop:app", "--principal", "cook=User:x"], "'cook' is not a role; the roles are"),
        (["jobs", "list", *SHOP, "--state", "lost"], "--state 'lost' is not a state; the states are scheduled, queued, running,"),
        (["jobs", "list", *SHOP, "--show", "colour"], "--show 'colour' is not a column; the columns are tags, args"),
        (["events", "tail", *SHOP, "--topic", "orders"], "'lifecycle', 'work', 'coordination', 'dead-letter', 'plans', 'all'"),
        # numbers and times
        *(([*SUBMIT, "a=1", "--delay", each], f"'{each}' is not a number of seconds from 0 to 31622400 (366 days)")
          for each in ("-2", "nan", "inf", "1e300", "soon")),
        ([*SUBMIT, "a=1", "--expires-in", "0"], "expires_in=0"),
        (["jobs", "wait", UUID, *SHOP, "--timeout", "-1"], "'-1' is not a number of seconds"),
        (["worker", "cli_shop:app", "--grace", "-1"], "'-1' is not a number of seconds"),
        (["kafka", "start", "--port", "99999"], "Invalid value for '--port'"),
        (["jobs", "list", *SHOP, "--since", "soon"], "--since 'soon' is neither an age such as 10m or 2h, nor a time"),
        (["events", "tail", *SHOP, "--from", "soon"], "--from 'soon' is neither start, end, an age"),
        (["backfill", "cli_shop:app", "x", "--to", "soon"], "--to 'soon' is neither an age"),
        (["backfill", "cli_shop:app", "x", "--rate", "soon"], "--rate: rate='soon' is not a rate"),
        # which app
        (["jobs", "list"], "Give MODULE:APP, --app MODULE:APP or --namespace NAME"),
        (["jobs", "list", "--app", "cli_shop", "--namespace", "x"], "give only one of them"),
        (["jobs", "list", "cli_shop:app", "--namespace", "x"], "the app is named twice"),
        (["jobs", "list", "--namespace", "no spaces"], "namespace 'no spaces' is not usable"),
        (["jobs", "list", "a:app", "b"], "unexpected 'b': the command takes no argument"),
        (["jobs", "show", *SHOP], "ID is missing"),
        (["jobs", "show", "cli_shop:app"], "ID is missing after cli_shop:app"),
        (["jobs", "show", UUID, UUID, *SHOP], "the command takes 1 ID"),
        (["queues", "pause", *SHOP], "NAME is missing"),
        (["jobs", "cancel", *SHOP], "which jobs? Give their ids, or --where NAME=VALUE"),
        (["jobs", "cancel", UUID, "--where", "task=add", *SHOP], "give ids or --where, not both"),
        (["jobs", "cancel", UUID, "TYPO", *SHOP], "'TYPO' is not a job's id: job ids are UUIDs"),
        (["jobs", "cancel", "--where", "colour=red", *SHOP], "'colour' is not a condition"),
        # options that would do nothing, or be dropped
        ([*SUBMIT, "a=1", "--timeout", "5"], "--timeout needs --wait"),
        (["topics", "acls", "cli_shop:app", "--yes"], "--yes needs --apply"),
        ([*SUBMIT, "a=1", "--delay", "1", "--delay", "2"], "--delay is given 2 times, but takes one value"),
        ([*SUBMIT, "a=1", "a=2"], "argument a is given twice"),
        ([*SUBMIT, "a=1", "--tag", "x=1", "--tag", "x=2"], "--tag x is given as '1' and as '2': only one value is possible"),
        (["jobs", "list", "--tag", "x=1", "--tag", "x=2", *SHOP], "--tag x is given as '1' and as '2'"),
        (["jobs", "list", *SHOP, "-n", "1", "--limit", "2"], "--limit is given 2 times"),
        (["jobs", "list", *SHOP, "--namespace", "other"], "--namespace is given 2 times"),
        (["queues", "list", "--bootstrap", "a:1", "--bootstrap", "b:1"], "--bootstrap is given 2 times"),
        # no text
        (["jobs", "show", "\udcff", *SHOP], "is not UTF-8 text"),
    ],
    ids=lambda value: " ".join(value).replace("\udcff", "…") if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_command_line_is_a_usage_error(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is one line with the wrong word and the possible values, and the exit code is 2. With --json the error
    is an object."""
    assert main(words) == Exit.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert expected in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert main([*words, "--json"]) == Exit.USAGE
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["type"] == "UsageError"
    if words[0] != "worker":  # the worker has no --json
        assert expected in error["message"]


def test_a_group_without_its_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    """``jobledger jobs`` prints the commands of the group, and ends with 2."""
    assert main(["jobs"]) == Exit.USAGE
    assert "cancel" in "".join(capsys.readouterr())


def _completed(words: str, folder: Path) -> list[str]:
    """Return what a shell offers for the last of ``words``. As bash does, split the words at ``:`` and ``=``."""
    parts = ["jobledger"]
    for word in words.split(" "):
        parts += [part for part in re.split("([:=])", word) if part] or [""]
    environ = {
        **os.environ,
        "_JOBLEDGER_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(parts),
        "COMP_CWORD": str(len(parts) - 1),
    }
    command = [sys.executable, "-c", "from jobledger.cli.main import run; run([])"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("jobs list --state ", ["cancelled", "expired", "failed", "queued", "retrying", "running", "scheduled", "succeeded"]),
        ("jobs list --state sch", ["scheduled"]),
        ("jobs list cli_shop:app --task ", ["add"]),
        ("jobs list --app cli_shop:app --queue d", ["default"]),
        ("jobs list --state=sch", ["scheduled"]),
        ("jobs list cli_shop:app --queue=d", ["default"]),
        ("jobs list --task ", ["old"]),
        ("jobs list --namespace ", ["shop"]),
        ("jobs show 01a2", [f"01a2{n}000-0000-7000-8000-000000000000" for n in range(3)]),
        ("jobs cancel --namespace shop 01a21", ["01a21000-0000-7000-8000-000000000000"]),
        ("queues list cli_shop:app --namespace ", ["shop"]),
        ("queues pause cli_shop:app ", ["default"]),
        ("tasks pause cli_shop:app ", ["add"]),
        ("tasks pause --namespace shop ", ["old"]),
        ("submit cli_shop:app ", ["add"]),
        ("submit cli_shop:app add --queue ", ["default"]),
        ("events tail --topic w", ["work"]),
        ("submit nowhere:app ", []),
    ],
)  # fmt: skip
def test_a_shell_completes_names(words: str, offered: list[str], tmp_path: Path) -> None:
    """A shell offers states, queues, tasks, namespaces and jobs, from the named app or from the status table. If that
    fails, nothing is offered and nothing is printed."""
    (tmp_path / "cli_shop.py").write_text(APP + "print('loaded')\n")
    with SqliteStore(f"sqlite:///{tmp_path}/home/status/shop.db", "shop") as store:
        assert store.acquire()
        lives = []
        for number in range(3):
            event = msgspec.structs.replace(_job(ev.JobSubmitted(SPEC)), task="old")
            life = fold.apply(None, ev.Recorded(event, ev.Position("shop.jobs.mail", 0, number), 1_700_000_000_000))
            assert life is not None
            lives.append((f"01a2{number}000-0000-7000-8000-000000000000", life))
        store.write(RowFolder(store, Decoder()).merge(lives).changes)
    assert _completed(words, tmp_path) == offered


def test_cancel_skips_a_job_whose_id_the_table_has_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cancel with the shortened id would have no effect, so a note says that the job is not cancelled."""
    with SqliteStore(f"sqlite:///{tmp_path}/home/status/shop.db", "shop") as store:
        assert store.acquire()
        event = msgspec.structs.replace(_job(ev.JobSubmitted(SPEC)), task="old")
        life = fold.apply(None, ev.Recorded(event, ev.Position("shop.jobs.mail", 0, 0), 1_700_000_000_000))
        assert life is not None
        store.write(RowFolder(store, Decoder()).merge([(key_text("x" * 300), life)]).changes)
    assert main(["jobs", "cancel", "--namespace", "shop", "x" * 300, "--dry-run", "--json"]) == Exit.OK
    answer = json.loads(capsys.readouterr().out)
    assert answer["jobs"] == []
    assert "more than 200 characters" in answer["notes"][0]


def test_a_traceback_is_shown_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Without ``--traceback`` an error has no traceback."""
    words = ["submit", "cli_shop:app", "nope"]
    main(words)
    assert "Traceback" not in capsys.readouterr().err
    main(["--traceback", *words])
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of the operating system becomes one line with the path and the reason."""
    monkeypatch.setenv("JOBLEDGER_HOME", os.devnull)
    assert main(["jobs", "list", "--namespace", "shop"]) == Exit.ERROR
    assert capsys.readouterr().err == f"error: {os.devnull}/status: Not a directory\n"


def test_a_setting_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelled environment variable is an error that names the variable."""
    monkeypatch.setenv("JOBLEDGER_BOOTSRAP", "x:1")
    assert main(["jobs", "list", "--namespace", "shop"]) == Exit.ERROR
    assert "JOBLEDGER_BOOTSRAP is not a setting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["worker", "nowhere:app"], "module 'nowhere' does not exist"),
        (["router", "cli_shop:app"], "has no handlers"),
        (["streams", "cli_shop:app"], "no Kafka broker is configured"),
        (["dev", "cli_shop:nope"], "nope"),
    ],
)
def test_log_format_is_passed_on_in_the_environment(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--log-format`` sets a variable of the environment for the processes that a command starts. The settings know
    this variable."""
    monkeypatch.setenv("JOBLEDGER_LOG_FORMAT", "")  # restored after the test, because the option sets it
    assert main([*words, "--log-format", "json"]) == Exit.ERROR
    assert os.environ["JOBLEDGER_LOG_FORMAT"] == "json"
    shown = capsys.readouterr().err
    assert "is not a setting of Jobledger" not in shown
    assert expected in shown


def test_every_error_of_ours_has_an_exit_code() -> None:
    """Errors that scripts must distinguish have their own codes. All other errors of Jobledger have the exit code 1."""
    codes = {name: exit_code(kind.__new__(kind)) for name, kind in vars(errors).items() if _is_error(kind)}
    assert {name: code for name, code in codes.items() if code != Exit.ERROR} == {
        "JobNotFound": Exit.NOT_FOUND,
        "PlanNotFound": Exit.NOT_FOUND,
        "StoreNotFound": Exit.NOT_FOUND,
        "StatusTimeout": Exit.TIMEOUT,
        "JobFailed": Exit.JOB_FAILED,
        "JobCancelled": Exit.JOB_FAILED,
        "JobExpired": Exit.JOB_FAILED,
        "AccessDenied": Exit.DENIED,
        "NotAuthenticated": Exit.DENIED,
        "NotAuthorized": Exit.DENIED,
    }
    assert exit_code(JobFailed("id", "E", "m")) == Exit.JOB_FAILED


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, JobledgerError)


def _shell(line: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell, with the tested ``jobledger``."""
    line = line.replace("jobledger", f"{sys.executable} -m jobledger")
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )


#: A command for each way to write output: typer's help, plain print, a table, JSON, fields.
WRITERS = ("--help", "--version", "topics acls cli_shop:app", "topics acls cli_shop:app --json", "kafka status")


@pytest.mark.parametrize("words", WRITERS)
def test_output_that_cannot_be_written_is_an_error_of_one_line(words: str, tmp_path: Path) -> None:
    """If standard output is closed or full, a command ends with 1 and the reason. That is also so if only the end of
    the interpreter notices it. With --json the error is an object."""
    for where, why in ((">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")):
        done = _shell(f"jobledger {words} {where}", tmp_path)
        assert done.returncode == Exit.ERROR, done.stderr
        message = f"standard output cannot be written: {why}"
        if "--json" in words:
            assert json.loads(done.stderr) == {"error": {"type": "OutputLost", "message": message}}
        else:
            assert done.stderr == f"error: {message}\n"


@pytest.mark.parametrize("words", WRITERS)
def test_a_closed_pipe_ends_a_command_without_an_error_message(words: str, tmp_path: Path) -> None:
    """If the reader of the output has closed the pipe, a command prints nothing and ends with the exit code that a
    shell shows for a program killed by SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "jobledger", *words.split()]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.stderr, done.returncode) == ("", Exit.UNREAD)


@pytest.mark.parametrize("words", WRITERS)
@pytest.mark.parametrize(
    "environ", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_output_in_an_ascii_terminal_is_readable(words: str, environ: dict[str, str], tmp_path: Path) -> None:
    """If the encoding lacks a character, the character's number is written. JSON output is still JSON."""
    done = _shell(f"jobledger {words}", tmp_path, **environ)
    assert done.returncode in (Exit.OK, Exit.NOT_FOUND)
    assert "Traceback" not in done.stderr
    assert done.stdout.isascii()
    if "--json" in words:
        json.loads(done.stdout)


def test_exit_codes_are_the_same_without_standard_streams(tmp_path: Path) -> None:
    """A command that starts with three closed streams ends with the same exit code, and does not write its output into
    a file that it opens."""
    assert _shell("jobledger jobs show x --namespace shop <&- >&- 2>&-", tmp_path).returncode == Exit.NOT_FOUND
    assert _shell("jobledger jobs show x --namespace shop 2>/dev/full", tmp_path).returncode == Exit.NOT_FOUND
    assert _shell("jobledger queues list --namespace shop <&- >&- 2>&-", tmp_path).returncode == Exit.ERROR


OWN_ERROR = """\
from jobledger.errors import ConfigError

class E(ConfigError):
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

raise E(1, 2)
"""


@pytest.mark.parametrize(("words", "code"), [("worker", 0), ("worker --processes=2", 1), ("streams", 1)])
def test_only_a_supervisor_fails_if_its_output_cannot_be_written(words: str, code: int, tmp_path: Path) -> None:
    """Jobs may print in a worker whose standard output is full or closed. A supervisor writes the lines of its child
    processes, so it ends with an error."""
    (tmp_path / "prints.py").write_text(
        "import sys\n"
        "from jobledger.cli import main\n"
        "def prints(words, **options):\n"
        "    print('x' * 100_000, flush=True)\n"
        "    return 0\n"
        "main._run = prints  # in place of the command\n"
        "main.run()\n"
    )
    for where in (">/dev/full", ">&-"):
        done = _shell(f"{sys.executable} prints.py {words} {where}", tmp_path)
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class E(Exception):\n    def __str__(self): raise RuntimeError('no')\nraise E", "str() of this exception raised RuntimeError"),
        ("class E(Exception):\n    def __str__(self): return 5\nraise E", "str() of this exception raised TypeError"),
        ("raise BaseException('all of it')", "BaseException: all of it"),
        ("raise GeneratorExit", "importing it failed"),
        (OWN_ERROR, "1 and 2"),
        ("raise ModuleNotFoundError('odd', name=5)", "odd"),
        ("raise ValueError('\\x1b[2Jgone\\nsecond')", "␛[2Jgone second"),
        ("raise ValueError('\\ud800')", "ValueError: �"),
        ("class O:\n    @property\n    def __class__(self): raise RuntimeError('not now')\napp = O()", "is a O, not a"),
        ("def __getattr__(name): raise OSError('lazy ' + name)", "lazy app"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ],
)  # fmt: skip
def test_any_exception_of_an_apps_module_becomes_one_line(
    source: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An app's module may raise any exception and contain any object. The command ends with 1 and prints one line."""
    (tmp_path / "cli_shop.py").write_text(source)
    for words in (["worker", "cli_shop:app"], ["topics", "acls", "cli_shop:app"]):
        sys.modules.pop("cli_shop", None)
        assert main(words) == Exit.ERROR
        shown = capsys.readouterr().err
        assert expected in shown
        assert "lazy" in expected or shown.count("\n") == 1  # an unexpected error of a worker has a traceback


@pytest.mark.parametrize("text", ["[" * 20_000, '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", "9" * 6_000])
def test_json_with_too_deep_nesting_or_too_long_numbers_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an argument ends the command with one line."""
    for words in ([f"label={text}", "a=x"], ["--args", text]):
        assert main(["submit", "cli_shop:app", "add", *words]) == Exit.USAGE
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "unexpected" not in shown


def test_the_command_line_loads_no_heavy_package() -> None:
    """The import of the command line loads neither SQLAlchemy nor Faust, so help is fast."""
    probe = (
        "import sys, jobledger.cli.main; print([m for m in ('faust', 'sqlalchemy', 'watchfiles') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("1", int, 1),
        ("1", str, "1"),
        ("01234", str, "01234"),
        ("a@example.org", str, "a@example.org"),
        ('"quoted"', str, "quoted"),
        ("null", str | None, None),
        ("7", str | None, "7"),
        ("null", str, "null"),
        ("[1, 2]", list[int], [1, 2]),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        ("true", bool, True),
        ("2026-01-31", None, "2026-01-31"),
        ("3", int | str, 3),
        ("", str, ""),
    ],
)
def test_an_argument_is_read_by_the_type_of_its_parameter(text: str, hint: Any, value: Any) -> None:
    """The argument is read as JSON if it is JSON, and as text if the parameter takes text or if nothing else fits."""
    assert read_value(text, hint) == value


@given(st.text())
def test_text_for_a_str_parameter_arrives_unchanged(text: str) -> None:
    """Only a JSON string is changed: it arrives without its quotes."""
    try:
        quoted = isinstance(json.loads(text), str)
    except ValueError:
        quoted = False
    assert read_value(text, str) == (json.loads(text) if quoted else text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.00123, "1.23 ms"),
        (0.34, "340 ms"),
        (0.9994, "999 ms"),
        (1.0, "1.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (4 * 86400 + 3 * 3600, "4 d 3 h"),
    ],
)
def test_a_duration_is_shown_with_at_most_two_units(seconds: float, text: str) -> None:
    """A duration has at most two units, and no false precision."""
    assert duration(seconds) == text


@given(st.floats(0, 1e9))
def test_a_duration_is_shown_in_the_largest_fitting_unit(seconds: float) -> None:
    """No duration is shown as 1000 ms, 60 s or 60 min."""
    assert not re.match(r"(1000 ms|60(\.0)? s|60 min)", duration(seconds))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 jobs"), (1, "1 job"), (2, "2 jobs"), (1234, "1,234 jobs"), (1.0, "1 job"), (0.5, "0.5 jobs")],
)
def test_a_count_has_the_singular_only_for_one(number: float, text: str) -> None:
    """A number is shown with its noun, in the plural unless the number is 1."""
    assert counted(number, "job") == text


def test_times_are_shown_relative_to_now() -> None:
    """A past time has "ago", a future time has "in", and a missing time is a dash."""
    assert relative(1_000_000, 13_000_000) == "12.0 s ago"
    assert relative(13_000_000, 1_000_000) == "in 12.0 s"
    assert relative(5, 5) == "now"
    assert relative(None) == "-"


def test_times_on_the_command_line_are_ages_or_iso_8601(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--from``, ``--to`` and ``--since`` take an age or a time in ISO 8601. A time without an offset is UTC."""
    assert moment_ms("10m", "--from", now=1_000_000.0) == 999_400_000
    assert moment_ms("1.5 h", "--from", now=1_000_000.0) == 994_600_000
    assert moment_ms("2026-01-31T14:05:00+00:00", "--from") == 1_769_868_300_000
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    assert moment_ms("2026-01-31T14:05", "--from") == 1_769_868_300_000
    assert moment_ms("2026-01-31T14:05:00+01:00", "--from") == 1_769_864_700_000
    monkeypatch.undo()
    time.tzset()
    assert moment_ms("0001-01-01", "--from") == moment_ms("9" * 16 + "d", "--from") == 0
    for text in ("later", "", "2026-02-30", "9" * 400 + "d", "9999-12-31T23:59:59-23:59"):
        with pytest.raises(Wrong, match=r"--since .* is neither an age such as 10m"):
            moment_ms(text, "--since")


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3), st.integers(0, 10**6)), unique=True), st.integers(1, 9)
)
def test_the_newest_events_are_the_last_lines_of_the_whole_output(
    appended: list[tuple[int, int, int]], count: int
) -> None:
    """``-n`` shows the last lines of the output without ``-n``."""
    lines = [Line(ev.Position("t", partition, offset), ms, None) for ms, partition, offset in appended]
    whole = list(newest(iter(lines), None))
    assert [line.appended_ms for line in whole] == sorted(ms for ms, _, _ in appended)
    assert list(newest(iter(lines), count)) == whole[-count:]


# -- showing ---------------------------------------------------------------------------------------------------------

SPEC = ev.JobSpec(b'{"to":"a@example.org"}', {"tenant": "acme"})
ERROR = ev.ErrorInfo("ValueError", "no\nsuch thing", "Traceback …")
FACTS: list[tuple[ev.Fact, str]] = [
    (ev.JobSubmitted(SPEC, 1500), 'in 1.5 s {"to":"a@example.org"} [tenant=acme]'),
    (ev.JobDue(SPEC, 0), "due 19"),
    (ev.JobStarted("h:1", None, {}, "t", 0, 2), "by h:1, takeover 2"),
    (
        ev.JobStarted("h:1", "7", {"key": 2_500, "slots": 40}, "t", 0),
        "by h:1, version 7, waited 2.5 s (key), 40 ms (slots)",
    ),
    (ev.JobProgressed(1, 3, 10, "unpacking"), "3/10 (30 %) unpacking"),
    (ev.JobRetried(ERROR, 2000, 5000), "ValueError: no such thing after 5 ms, again in 2.0 s"),
    (ev.JobSnoozed(2000, "closed"), "again in 2.0 s: closed"),
    (ev.JobSucceeded(b"42", 5000), "42 after 5 ms"),
    (ev.JobFailedFact("exhausted", ERROR, 0), "exhausted: ValueError: no such thing"),
    (ev.JobCancelledFact("ann", "why not"), "by ann: why not"),
    (ev.JobExpiredFact(0), "at 19"),
    (ev.ReleaseRequested(SPEC, 10), "in 10 ms"),
    (ev.ReleaseDecided(0), "due 19"),
    (ev.ReleaseOverdue(SPEC, 0), "due 19"),
    (ev.DeadLettered(SPEC, "rejected", ERROR), "rejected: ValueError"),
    (ev.RecordRejected("t", 1, 2, None, b"\xff", "no event"), "t[1]@2: no event"),
    (ev.JobLeased("h:1", 30_000), "by h:1 for 30"),
    (ev.Leased(SPEC, "h:1", 30_000, 1), "by h:1 for 30"),
    (ev.LeaseRenewed("h:1", 0), "given back by h:1"),
    (ev.CancelRequested("ann", "wrong list"), "by ann: wrong list"),
    (ev.QueuePaused("ann", "they are down"), "by ann: they are down"),
    (ev.QueueResumed("ann"), "by ann"),
    (ev.QueueLimited(5.0, 3, "ann"), "5 starts/s and 3 jobs at once, by ann"),
    (ev.QueueLimited(1.0, 1, "ann"), "1 start/s and 1 job at once, by ann"),
    (ev.JobSubmitted(SPEC, 0, None, ev.Redrive("ann", "mended", "p")), "redriven by ann, plan p: mended"),
    (ev.PlanOpened("redrive", "{}", "slow", 5.0, "ann", "mended"), "redrive to slow, 5 jobs/s, by ann: mended"),
    (ev.PlanListed(2, [ev.PlannedJob("a", 1)]), "part 2: 1 job"),
    (ev.PlanSealed(3, 1_200), "1,200 jobs in 3 parts"),
    (ev.PlanAdvanced(2, 10, 1, 1, "a: gone"), "part 2: done 10, skipped 1, failed 1 (a: gone)"),
    (ev.PlanSteered("paused", "ann"), "paused by ann"),
    (
        ev.WorkerReported(
            "h", 1, "2", "0.1", 0, ["mail", "slow"], 0, ["send"], 0, 100, 1, [ev.RunningJob("a", 0)], None, 4
        ),
        "1 job in 100 slots, serves mail, slow",
    ),
]


def test_every_fact_is_shown() -> None:
    """The list above has every type of fact."""
    assert {type(fact) for fact, _ in FACTS} == set(ev.Fact.__args__)


@pytest.mark.parametrize(("fact", "text"), FACTS, ids=lambda value: type(value).__name__)
def test_a_fact_is_one_line_and_one_json_object(fact: ev.Fact, text: str) -> None:
    """A fact is shown on one line that begins with its main content. As JSON it has its type, and its bytes as text."""
    # a due time of 0 is in 1969 or 1970, by the time zone of this machine
    assert facts.describe(fact).startswith(text)
    assert "\n" not in facts.describe(fact)
    assert json.loads(json.dumps(fact_json(fact)))["type"] == ev.fact_name(fact)


#: Unusual values that a well-formed record may have.
ODD: dict[str, list[Any]] = {
    "int": [-(2**63), -1, 0, 2**31 - 1, 253_402_300_799_999_999, 253_402_300_800_000_000, time.time_ns(), 2**63 - 1],
    "float": [float("nan"), float("inf"), -1e300],
    "str": ["", "\x1b[2J\x07\r", "a\nb\tc", "\ud800", "\u202eabc\u2028\x9b31m", "é" * 5_000],
    "bytes": [b"", b"\xff\xfe", b"[" * 20_000 + b"]" * 20_000, b"[" * 300 + b"]" * 300, b"9" * 6_000, b'"\\ud800"',
              b'{"a": {"b": 1}, "a": 2}', b"NaN", b'"\x1b[2J"'],
}  # fmt: skip


def odd(value: Any) -> list[Any]:
    """Return ``value`` and its variants: in each variant one field has an unusual value."""
    variants: list[Any] = [value]
    for name in value.__struct_fields__:
        there = getattr(value, name)
        if isinstance(there, ev.JobSpec | ev.ErrorInfo | ev.Fact):
            news = odd(there)
        elif isinstance(there, dict):
            kind = typing.get_args(typing.get_type_hints(type(value))[name])[1].__name__
            news = [dict.fromkeys(ODD["str"], odd_value) for odd_value in ODD[kind]]
        else:
            hint = typing.get_type_hints(type(value))[name]
            news = [each for kind in typing.get_args(hint) or (hint,) for each in ODD.get(kind.__name__, [])]
        variants += [msgspec.structs.replace(value, **{name: new}) for new in news]
    return variants


@pytest.mark.parametrize("fact", [fact for fact, _ in FACTS], ids=ev.fact_name)
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/Los_Angeles"])
def test_an_odd_record_is_shown_as_far_as_it_can_be(
    fact: ev.Fact, zone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For any values in a record's fields, `events tail` prints one line without control characters, and with --json
    one object."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    event = _job(fact)
    show = _Printer(Names("shop"))
    try:
        for each in odd(event):
            line = Line(ev.Position("shop.lifecycle", 0, 1), 1_700_000_000_000, None)
            recorded = ev.Recorded(each, line.position, line.appended_ms)
            show(dataclasses.replace(line, recorded=recorded))
            text = capsys.readouterr().out
            assert len(text.splitlines()) == 1, text
            assert text[:-1].isprintable(), text
            _json_line(dataclasses.replace(line, recorded=recorded))
            text = capsys.readouterr().out
            assert len(text.splitlines()) == 1
            text.encode()  # no lone surrogates
            assert json.loads(text)["fact"]["type"] == ev.fact_name(fact)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("fact", [fact for fact, _ in FACTS], ids=ev.fact_name)
def test_an_odd_job_is_shown_as_far_as_it_can_be(fact: ev.Fact, capsys: pytest.CaptureFixture[str]) -> None:
    """For any values in a job's records, `jobs list` and `jobs show` print a row and fields, as text and as JSON."""
    event = _job(fact)
    position = ev.Position("shop.lifecycle", 0, 1)
    base = fold.apply(None, ev.Recorded(_job(ev.JobSubmitted(SPEC)), ev.Position("t", 0, 0), 1_700_000_000_000))
    for each in odd(event):
        life = fold.apply(base, ev.Recorded(each, position, 1_700_000_000_001))
        assert life is not None
        status = fold.status(UUID, life)
        output.print_table(("",) * 8, [row(status)])
        output.print_fields(fields(status))
        shown = capsys.readouterr().out
        assert shown.replace("\n", "").replace("\t", "").isprintable()
        output.print_json(status_json(status))
        assert json.loads(capsys.readouterr().out)["job_id"] == UUID


def _job(fact: ev.Fact) -> ev.JobEvent:
    return ev.JobEvent("id", UUID, 1, 1, 1, 0, "add", "default", None, None, "test", None, fact)


def test_values_that_cannot_be_shown_are_replaced() -> None:
    """A time outside the calendar is shown as a number, deep nesting is cut, and control characters are replaced by
    visible ones."""
    assert output.clock(2**63 - 1) == "outside the calendar (9223372036854775807 µs)"
    assert iso(2**63 - 1) == 2**63 - 1
    assert iso(0) == "1970-01-01T00:00:00+00:00"
    assert jsonable(b"[" * 20_000 + b"]" * 20_000) == "[" * 20_000 + "]" * 20_000
    deep = jsonable(b"[" * 300 + b"]" * 300)
    for _ in range(NESTED_MOST + 1):
        (deep,) = deep
    assert deep == "…"
    assert output.printable("a\x1b[2J\x7f\x9b\u202eb\nc\td") == "a␛[2J␡\ufffd\ufffdb\nc\td"
    assert output.duration(-90) == "-1 min 30 s"


def test_progress_is_complete_only_at_its_end() -> None:
    """99.6 % is shown as 99 %."""
    assert facts.progress(498, 500, None) == "498/500 (99 %)"
    assert facts.progress(500, 500, "row") == "500/500 (100 %) row"
    assert facts.progress(3, 0, None) == "3/0"
    assert facts.progress(0, None, None) == "0"


def test_arguments_and_results_are_part_of_the_json_output() -> None:
    """JSON output has no base64 and no JSON within a string."""
    shown = fact_json(ev.JobSubmitted(SPEC))
    assert shown["spec"]["args"] == {"to": "a@example.org"}
    assert fact_json(ev.JobSucceeded(b"[1]"))["result"] == [1]


def test_a_table_without_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """The output has columns under a heading and one line for each row, without a frame, without colours and without
    cuts."""
    output.print_table(("a", "b"), [["x" * 300, ("y\nz", "red")], ["1", "2"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a" + " " * 301 + "b", "x" * 300 + "  y z", "1" + " " * 301 + "2"]


def test_a_table_for_a_terminal_shows_ids_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first column is not cut in a narrow terminal, and states have colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    job = "01a20559-6ae1-7578-bb70-f86db3b39485"
    output.print_table(("job", "state", ""), [[job, output.state_cell("failed"), "some long text " * 9]])
    shown = capsys.readouterr().out
    assert job in shown
    assert "\x1b[1;31m" in shown


def test_a_file_of_projections_is_not_counted_as_a_namespace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`jobs list` finds the only namespace of this machine, although the file of its projections is beside its status
    table."""
    folder = tmp_path / "home" / "status"
    SqliteStore(f"sqlite:///{folder / 'orders.db'}", "orders").close()
    projections = ProjectionStore(f"sqlite:///{folder / 'orders.db'}", "orders")
    projections.make(offsets_table)
    projections.close()
    assert sorted(path.name for path in folder.glob("*.db")) == ["orders-projections.db", "orders.db"]
    assert (main(["jobs", "list", "--json"]), capsys.readouterr()) == (0, ("[]\n", ""))
    SqliteStore(f"sqlite:///{folder / 'stock-projections.db'}", "stock-projections").close()
    assert main(["jobs", "list", "--json"]) == Exit.USAGE
    assert "(namespaces on this machine: orders, stock-projections)" in capsys.readouterr().err


def test_the_first_start_of_kafka_without_a_terminal_prints_its_steps() -> None:
    """Each step is printed once, with the amount of the download and its end."""
    lines: list[str] = []
    report = in_lines("4.4.0", lines.append)
    report("resolve", 0, 0)
    for done in range(34):
        report("fetch", done, 33)
    report("format", 0, 0)
    report("boot", 0, 0)
    report("boot", 0, 0)
    assert lines == [
        "looking up the files of Apache Kafka 4.4.0 (about 45 MB from a Maven repository, once per user and version) …",
        "fetching Apache Kafka 4.4.0: 33 files …",
        "fetched 33 of 33 files",
        "formatting the data folder …",
        "starting the broker …",
    ]
