"""How checks are made together, and the checks that need no broker."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from jobledger import App, Settings
from jobledger.cli.main import main
from jobledger.cli.output import Exit
from jobledger.doctor import Check, examine, machine, roles
from jobledger.doctor.checks import Examination, Finding, Subject, all_made
from jobledger.errors import ConfigError, NotAuthorized, TopicMissing
from tests.patience import PATIENCE


def good(subject: object) -> Finding:
    return Finding("good")


def bad(subject: object) -> Finding:
    return Finding("bad", "Mend it.")


def missing(subject: object) -> Finding:
    raise TopicMissing("no topic x")


def broken(subject: object) -> Finding:
    raise ZeroDivisionError


def forbidden(subject: object) -> Finding:
    raise NotAuthorized("no right", role="web", operation="Read", resource_type="topic", resource="x")


def test_each_check_has_a_result_whatever_it_raises() -> None:
    """A failing check has a fix. A check that needs a failed one is not made. A missing right is no failure."""
    checks = all_made(
        [
            Examination("c", good, "b"),
            Examination("a", good),
            Examination("b", bad, "a"),
            Examination("missing", missing),
            Examination("broken", broken),
            Examination("forbidden", forbidden),
        ],
        None,
    )
    assert checks[:3] == [
        Check("c", False, "not checked, because the check 'b' failed", "Mend it."),
        Check("a", True, "good"),
        Check("b", False, "bad", "Mend it."),
    ]
    assert checks[3] == Check("missing", False, "no topic x", "Run `jobledger topics apply MODULE:APP`.")
    assert (checks[4].detail, checks[4].ok) == ("ZeroDivisionError", False)
    assert checks[5] == Check("forbidden", True, "not checked: no right")


def test_a_check_that_does_not_end_is_given_up() -> None:
    """The other checks have their results, and the checks that wait for it are reported, too."""
    stop = threading.Event()

    def endless(subject: object) -> Finding:
        stop.wait(60 * PATIENCE)
        return Finding("late")

    examinations = [Examination("endless", endless), Examination("good", good), Examination("after", good, "endless")]
    began = time.monotonic()
    try:
        checks = all_made(examinations, None, 0.5)
    finally:
        stop.set()
    assert time.monotonic() - began < 30 * PATIENCE
    assert [(check.name, check.ok) for check in checks] == [("endless", False), ("good", True), ("after", False)]
    assert "did not end within 0.5 s" in checks[0].detail


def test_without_a_broker_the_checks_of_the_cluster_are_left_out(tmp_path: Path) -> None:
    """The check of the broker says what to do, and the checks that need no broker are made."""
    settings = Settings(bootstrap="localhost:1", status_url=f"sqlite:///{tmp_path / 's.db'}", home=tmp_path)
    app = App("doctor", settings=settings)
    checks = {check.name: check for check in examine(app, time_most=30 * PATIENCE)}
    assert "JOBLEDGER_BOOTSTRAP" in (checks["broker"].fix or "")
    for name in ("topics", "clock", "workers", "coordinator"):
        assert (checks[name].ok, checks[name].detail) == (False, "not checked, because the check 'broker' failed")
    assert "jobledger streams" in (checks["table"].fix or "")
    assert checks["python"].ok
    assert checks["packages"].ok
    assert checks["disk"].ok


def test_an_unknown_setting_is_found_although_the_app_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The detail names the setting and the one that was probably meant."""
    monkeypatch.setenv("JOBLEDGER_BOOTSTRAB", "localhost:1")
    assert main(["doctor", "--namespace", "shop", "--json"]) == Exit.DIFFERS
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert not checks["settings"]["ok"]
    assert "did you mean JOBLEDGER_BOOTSTRAP?" in checks["settings"]["detail"]
    monkeypatch.delenv("JOBLEDGER_BOOTSTRAB")
    assert main(["doctor", "no_such_module:app"]) == Exit.DIFFERS
    shown = capsys.readouterr()
    assert "app: Correct the app as the detail says." in shown.out
    assert "to fix: 1 of 4 checks" in shown.err


class Usage(NamedTuple):
    """The space of a disk, in bytes."""

    total: int
    used: int
    free: int


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fix names what is on the disk, and the settings that move it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10 << 30, 10 << 30, 1 << 20))
    settings = Settings(bootstrap="localhost:1", status_url=f"sqlite:///{tmp_path / 's.db'}", home=tmp_path / "none")
    found = machine.disk(Subject(App("doctor", settings=settings)))
    assert "coordinator and the status table" in (found.fix or "")
    assert "JOBLEDGER_HOME" in (found.fix or "")


def test_a_missing_extra_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the extras that the settings need must be installed."""
    monkeypatch.setattr(machine, "installed", lambda module: False)
    app = App("doctor", settings=Settings(bootstrap="localhost:1", status_url="postgresql://u@h/d"))
    assert machine.extras(Subject(app)).fix == "Run `pip install 'jobledger[postgres]'`."
    without = App("doctor", settings=Settings(bootstrap="localhost:1"))
    assert machine.extras(Subject(without)).fix is None


def test_progress_is_any_step_towards_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is up to date once, or gets nearer to the end of a partition, makes progress."""
    monkeypatch.setattr(roles, "PROGRESS_S", 0.05)
    monkeypatch.setattr(roles, "LOOK_S", 0.001)
    one, two = ("t", 0), ("t", 1)
    assert roles.progress(dict) == (0, True)
    assert roles.progress(lambda: {one: 3, two: 0}) == (3, False)
    looks = iter([{one: 3, two: 1}, {one: 9, two: 1}, {one: 9, two: 0}])
    assert roles.progress(lambda: next(looks)) == (9, True)


def test_records_below_the_first_offset_are_not_behind() -> None:
    """A reader that was never there is behind by the records that the log still has, and one at the end by none."""
    known = {("t", 0): (5, 9), ("t", 1): (5, 9), ("t", 2): (5, 9), ("t", 3): (0, 0)}
    assert list(roles.behind_of(known, {("t", 0): 7, ("t", 1): 2, ("t", 3): 4}).values()) == [2, 4, 4, 0]


def test_a_wrong_setting_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the settings reads the environment as each process does."""
    monkeypatch.setenv("JOBLEDGER_SUBMIT_TIMEOUT", "never")
    with pytest.raises(ConfigError):
        Settings.from_env()
    assert "JOBLEDGER_SUBMIT_TIMEOUT" in machine.settings(None).detail
