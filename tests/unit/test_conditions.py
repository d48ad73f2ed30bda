"""The conditions of ``--where``, and the formats of lists of jobs."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest

from jobledger import job as fold
from jobledger.cli.commands import Wrong
from jobledger.cli.conditions import NAMES, conditions_of, together
from jobledger.cli.main import main
from jobledger.cli.output import Exit
from jobledger.plan import SCOPES
from jobledger.schemas import events as ev
from jobledger.schemas.codec import Decoder
from jobledger.streams.status.row_folder import RowFolder
from jobledger.streams.status.store.sqlite import SqliteStore

BAD = ev.ErrorInfo("builtins.ValueError", "no", "trace")
IDS = [f"01a2{n}000-0000-7000-8000-000000000000" for n in range(3)]


def test_conditions_become_filters() -> None:
    """A name that takes several values may be repeated, and so may tags."""
    texts = ["task=a", "task=b", "tag.x=1", "tag.y=a=b", "id_prefix=01", "attempts_least=3", "since=2026-01-31T08:00"]
    assert conditions_of(texts) == {
        "task": ["a", "b"],
        "id_prefix": "01",
        "attempts_least": 3,
        "since": dt.datetime(2026, 1, 31, 8, tzinfo=dt.UTC),
        "tag": {"x": "1", "y": "a=b"},
    }
    assert conditions_of(None) == conditions_of([]) == {}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["colour=red"], f"'colour' is not a condition; the conditions are {', '.join(NAMES)}"),
        (["tag.=1"], "'tag.' is not a condition"),
        (["task"], "not of the form NAME=VALUE"),
        (["state=lost"], "'lost' is not a state"),
        (["state=running"], "state=running: no"),
        (["tag.x=1", "tag.x=2"], "--where tag x is given as '1' and as '2'"),
        (["since=1h", "since=2h"], "--where since is given as '1h' and as '2h'"),
        (["until=soon"], "--where until 'soon'"),
        *((["attempts_least=" + text], "a whole number above 0") for text in ("0", "-1", "x", "9" * 10, "²")),
    ],
)
def test_wrong_conditions_are_refused(texts: list[str], message: str) -> None:
    """The error names the condition, and what is possible."""
    with pytest.raises(Wrong) as caught:
        conditions_of(texts, SCOPES["redrive"].states, "no")
    assert message in caught.value.format_message()


def test_options_and_conditions_are_combined() -> None:
    """Tags of both must match. Any other name may be given only once."""
    both = together({"task": ["a"], "tag": {"x": "1"}, "state": [], "late": None}, {"queue": ["q"], "tag": {"y": "2"}})
    assert both == {"task": ["a"], "queue": ["q"], "tag": {"x": "1", "y": "2"}}
    with pytest.raises(Wrong, match="--task and --where task"):
        together({"task": ["a"]}, {"task": ["b"]})


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a status table with three failed jobs, which commands read."""
    monkeypatch.setenv("JOBLEDGER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JOBLEDGER_STATUS_URL", raising=False)
    with SqliteStore(f"sqlite:///{tmp_path}/home/status/shop.db", "shop") as store:
        assert store.acquire()
        lives = []
        for number, job_id in enumerate(IDS):
            life = None
            facts: list[ev.Fact] = [ev.JobSubmitted(ev.JobSpec(b"{}")), ev.JobFailedFact("exhausted", BAD)]
            for offset, fact in enumerate(facts):
                event = ev.JobEvent("e", job_id, 1, 1, 1, 0, f"t{number}", "mail", None, None, "test", None, fact)
                at = ev.Position("shop.lifecycle", 0, 10 * number + offset)
                life = fold.apply(life, ev.Recorded(event, at, 1_700_000_000_000 + number))
            assert life is not None
            lives.append((job_id, life))
        store.write(RowFolder(store, Decoder()).merge(lives).changes)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """Run a command about the table, and return what it printed on both streams."""
    assert main([*words, "--namespace", "shop"]) == Exit.OK
    return capsys.readouterr()


def test_lists_of_jobs_have_formats_for_pipes(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids and JSON objects are printed one in each line, an array in one line. A note says if the list is cut."""
    ids, note = run(capsys, "jobs", "list", "--format", "ids", "--where", "error=builtins.ValueError", "-n", "2")
    assert ids.split("\n") == [IDS[2], IDS[1], ""]
    assert "only the newest 2" in note
    lines, note = run(capsys, "jobs", "list", "--format", "jsonl", "--where", "id_prefix=01a2", "--task", "t1")
    assert ([json.loads(line)["job_id"] for line in lines.splitlines()], note) == ([IDS[1]], "")
    array, _ = run(capsys, "jobs", "list", "--json")
    assert [each["job_id"] for each in json.loads(array)] == IDS[::-1]
    shown, _ = run(capsys, "jobs", "list", "--format", "table")
    assert len(shown.splitlines()) == 4
    assert main(["jobs", "list", "--namespace", "shop", "--json", "--format", "ids"]) == Exit.USAGE
    assert "give only one of them" in capsys.readouterr().err


def test_jobs_are_counted(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number alone is on standard output. A note says that there may be more."""
    assert run(capsys, "jobs", "count", "--state", "failed") == ("3\n", "")
    assert json.loads(run(capsys, "jobs", "count", "--json", "--where", "task=t1")[0]) == {"jobs": 1, "exact": True}
    number, note = run(capsys, "jobs", "count", "--since", "2020-01-01", "-n", "2")
    assert (number, "there may be more" in note) == ("2\n", True)


def test_errors_are_listed_in_groups(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A group has its numbers, and the times of its first and last submission."""
    (group,) = json.loads(run(capsys, "errors", "list", "--json")[0])
    assert (group["type"], group["jobs"], group["exact"], group["job_id"]) == (BAD.type, 3, True, IDS[2])
    assert (group["tasks"], group["versions"], group["last_success"]) == ({"t0": 1, "t1": 1, "t2": 1}, {"": 3}, {})
    assert group["first_seen"].startswith("2023-11-14T22:13:20")
    shown, _ = run(capsys, "errors", "list")
    assert "ValueError" in shown
    assert run(capsys, "errors", "list", "--since", "1h") == ("", "no errors\n")
