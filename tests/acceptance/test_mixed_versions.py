"""A rolling upgrade: workers of an older version and of this one in one group, stopped and killed in turn.

The older version is this repository at `OLD`, the last commit with the first schema and the first text of commits; a
checkout without that history skips, and says so.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from tests.acceptance.fleet import ROOT, Fleet, Member, serves
from tests.acceptance.promises import Promise
from tests.acceptance.test_worker_faults import PARTITIONS, UNACKNOWLEDGED, drained, progress, runs, submit
from tests.acceptance.test_worker_faults import fleet as made_fleet

pytestmark = [pytest.mark.kafka, pytest.mark.extended]

#: "The coordinator gives up on a broker that is away …": schema 1, commits in text 1, no order of any kind.
OLD = "a36ba67"
JOBS = 12_000
AT_ONCE = 10

fleet = made_fleet


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older version's checkout."""
    found = subprocess.run(["git", "-C", str(ROOT), "archive", OLD], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"the history of this checkout does not have {OLD}: {found.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="tar")  # it has symbolic links, all inside it
    return folder


def texts(fleet: Fleet) -> list[str]:
    """What the group has committed beside its offsets."""
    from jobledger.log.group_offsets import group_offsets

    names = Names(fleet.namespace)
    found = group_offsets(Settings(bootstrap=fleet.bootstrap), names.worker_group("default"), names.jobs("default"))
    return [commit.metadata or "" for commit in found.values()]


def replaced(fleet: Fleet, member: Member, cwd: Path) -> None:
    """Start a member that has ended as another version."""
    member.cwd = cwd
    fleet.restart(member)


def test_a_rolling_upgrade_loses_nothing_and_reruns_no_success(
    fleet: Fleet, old: Path, say: Callable[[str], None]
) -> None:
    """Old beside new, each taking over from the other, by hand-over and by kill -9: both read
    each other's facts and commits."""
    submit(fleet, 0, JOBS)
    fleet.start("materializer", "--no-upkeep")
    one, two = (fleet.start("worker", "--concurrency", str(AT_ONCE), cwd=old) for _ in range(2))
    step = JOBS // 8
    progress(fleet, step)
    assert all(text.startswith("1") for text in texts(fleet)), "these are the old version"

    assert fleet.stop(one) == 0, one.tail()  # the upgrade begins: old hands over to old, new joins
    replaced(fleet, one, ROOT)
    progress(fleet, 2 * step)
    assert set(runs(fleet).values()) == {1}, "nothing ran twice: nobody was killed yet"

    two.wanted = False
    fleet.kill(two)  # new takes over what old left dirty
    fleet.until(lambda: {text[0] for text in texts(fleet)} == {"2"}, 40.0, "the takeover by the new version")
    progress(fleet, 3 * step)
    replaced(fleet, two, old)  # one of the old ones is still there, as in any deploy that takes its time
    progress(fleet, 4 * step)
    one.wanted = False
    fleet.kill(one)  # old takes over what new left dirty
    fleet.until(lambda: {text[0] for text in texts(fleet)} == {"1"}, 40.0, "the takeover by the old version")
    # That version calls a takeover done, and clean, that its stop cuts short; so it is stopped only after.
    fleet.until(
        lambda: two.output().rsplit("--- life", 1)[-1].count(": taken over at") >= PARTITIONS, 40.0, "its takeovers"
    )
    progress(fleet, 5 * step)
    replaced(fleet, one, ROOT)
    progress(fleet, 6 * step)
    assert fleet.stop(two) == 0, two.tail()
    replaced(fleet, two, ROOT)

    seen = drained(fleet, JOBS)
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not seen.begun_after_success(), seen.begun_after_success()[:3])
    again = sum(count - 1 for count in runs(fleet).values())
    Promise.AT_LEAST_ONCE.hold(len(runs(fleet)) == JOBS, f"{len(runs(fleet))} of {JOBS} ran")
    assert again <= 2 * (AT_ONCE + UNACKNOWLEDGED), "only what ran at the two kills may run again"
    fleet.until(lambda: all(text[:2] == "2d" for text in texts(fleet)), 20.0, "the new version's commits")
    for member in (one, two):
        serves(fleet, member)
    assert fleet.stop(one) == 0
    assert fleet.stop(two) == 0
    assert [text[:2] for text in texts(fleet)] == ["2c"] * PARTITIONS
    code, report, errors = fleet.run("verify", "tests/acceptance/faults_app.py:app")
    Promise.STATUS_CONVERGES.hold(code == 0, f"verify: {report}, {errors[-1000:]}")
    say(f"rolling upgrade from {OLD}: {JOBS} jobs, 2 kills, {again} ran again, none after its success")
