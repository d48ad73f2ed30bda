"""A rolling upgrade: workers of an older and of this version in one group are stopped and killed in turn.

The older version is the commit `OLD` of this repository, the last commit with the first schema and the first format of
commits. The test is skipped, with a reason, if the checkout does not have that history.
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
from tests.acceptance.fleet import ROOT, Fleet, Member, wait_until_serving
from tests.acceptance.promises import Promise
from tests.acceptance.test_worker_faults import (
    PARTITIONS,
    UNACKNOWLEDGED,
    runs_by_job,
    submit,
    wait_for_starts,
    wait_until_closed,
)
from tests.acceptance.test_worker_faults import fleet as made_fleet

pytestmark = [pytest.mark.kafka, pytest.mark.extended]

#: A commit with the first schema and the first format of commits, before control commands existed.
OLD = "a36ba67"
JOBS = 12_000
AT_ONCE = 10

fleet = made_fleet


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the older version."""
    found = subprocess.run(["git", "-C", str(ROOT), "archive", OLD], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"the history of this checkout does not have {OLD}: {found.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="tar")  # the archive has symbolic links, all of which stay inside it
    return folder


def commit_metadata(fleet: Fleet) -> list[str]:
    """Return the metadata of the group's commits."""
    from jobledger.log.group_offsets import group_offsets

    names = Names(fleet.namespace)
    found = group_offsets(Settings(bootstrap=fleet.bootstrap), names.worker_group("default"), names.jobs("default"))
    return [commit.metadata or "" for commit in found.values()]


def restart_as(fleet: Fleet, member: Member, cwd: Path) -> None:
    """Start a member that has ended again, with another version."""
    member.cwd = cwd
    fleet.restart(member)


def test_a_rolling_upgrade_loses_nothing_and_reruns_no_success(
    fleet: Fleet, old: Path, say: Callable[[str], None]
) -> None:
    """Old and new workers run together and take over partitions from each other, after a stop and after a kill -9. Both
    versions read each other's facts and commits."""
    submit(fleet, 0, JOBS)
    fleet.start("materializer", "--no-maintenance")
    one, two = (fleet.start("worker", "--concurrency", str(AT_ONCE), cwd=old) for _ in range(2))
    step = JOBS // 8
    wait_for_starts(fleet, step)
    assert all(text.startswith("1") for text in commit_metadata(fleet)), "these are the old version"

    assert fleet.stop(one) == 0, one.tail()  # the upgrade begins, and a new one joins
    restart_as(fleet, one, ROOT)
    wait_for_starts(fleet, 2 * step)
    assert set(runs_by_job(fleet).values()) == {1}, "nothing ran twice: nobody was killed yet"

    two.wanted = False
    fleet.kill(two)  # a new worker takes over partitions that an old one left not clean
    fleet.until(lambda: {text[0] for text in commit_metadata(fleet)} == {"2"}, 40.0, "the takeover by the new version")
    wait_for_starts(fleet, 3 * step)
    restart_as(fleet, two, old)  # an old worker runs again, as in any slow deployment
    wait_for_starts(fleet, 4 * step)
    one.wanted = False
    fleet.kill(one)  # an old worker takes over partitions that a new one left not clean
    fleet.until(lambda: {text[0] for text in commit_metadata(fleet)} == {"1"}, 40.0, "the takeover by the old version")
    # The old version regards a takeover that its stop interrupts as finished and clean. So it is stopped only
    # afterwards.
    fleet.until(
        lambda: two.output().rsplit("--- life", 1)[-1].count(": taken over at") >= PARTITIONS, 40.0, "its takeovers"
    )
    wait_for_starts(fleet, 5 * step)
    restart_as(fleet, one, ROOT)
    wait_for_starts(fleet, 6 * step)
    assert fleet.stop(two) == 0, two.tail()
    restart_as(fleet, two, ROOT)

    seen = wait_until_closed(fleet, JOBS)
    Promise.NO_RERUN_AFTER_SUCCESS.hold(not seen.begun_after_success(), seen.begun_after_success()[:3])
    again = sum(count - 1 for count in runs_by_job(fleet).values())
    Promise.AT_LEAST_ONCE.hold(len(runs_by_job(fleet)) == JOBS, f"{len(runs_by_job(fleet))} of {JOBS} ran")
    assert again <= 2 * (AT_ONCE + UNACKNOWLEDGED), "only what ran at the two kills may run again"
    fleet.until(lambda: all(text[:2] == "2d" for text in commit_metadata(fleet)), 20.0, "the new version's commits")
    for member in (one, two):
        wait_until_serving(fleet, member)
    assert fleet.stop(one) == 0
    assert fleet.stop(two) == 0
    assert [text[:2] for text in commit_metadata(fleet)] == ["2c"] * PARTITIONS
    code, report, errors = fleet.run("verify", "tests/acceptance/faults_app.py:app")
    Promise.STATUS_CONVERGES.hold(code == 0, f"verify: {report}, {errors[-1000:]}")
    say(f"rolling upgrade from {OLD}: {JOBS} jobs, 2 kills, {again} ran again, none after its success")
