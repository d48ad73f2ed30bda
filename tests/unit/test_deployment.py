"""What is deployed as it stands in the repository: command lines that the command knows, time enough to end, alerts
that fire when a part is gone.

The alerts are run by Prometheus' own promtool; without it those tests are skipped.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from jobledger.cli import running
from jobledger.cli.main import cli, main
from jobledger.consumers.worker.options import WorkerOptions
from jobledger.consumers.worker.worker import LEAVING_S
from jobledger.process.process_exit import EXIT_S, HARD_S
from tests import promtool

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]


def entrypoint() -> list[str]:
    """The words that the image puts before those it is given."""
    found = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    words: list[str] = yaml.safe_load(found.group(1))
    return words


def compose() -> dict[str, Any]:
    """docker-compose.yml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return found


def worker() -> dict[str, Any]:
    """The pod of the Deployment in examples/kubernetes."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "examples/kubernetes/worker.yaml").read_text("utf-8"))
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


def command_lines() -> list[list[str]]:
    """Each ``jobledger …`` that a container of ours begins with."""
    (container,) = worker()["containers"]
    found = [[*container.get("command", entrypoint()), *container["args"]]]
    for service in compose()["services"].values():
        words = service.get("entrypoint", [])
        if words[:2] == ["sh", "-c"]:
            for line in words[2].replace("$$APP", "examples.shop:app").split("&&"):
                found.append(shlex.split(line.strip().removeprefix("exec ")))
    return found


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_containers_begin_with_commands_that_there_are(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Command and options of every container are read by the command line's own parser."""
    monkeypatch.setenv("JOBLEDGER_LOG_FORMAT", "")  # given back as it was: the option sets it
    assert words[0] == "jobledger"
    command: Any = typer.main.get_command(cli)
    rest, context = words[1:], None
    while hasattr(command, "commands"):
        context = command.make_context(command.name, rest[:1], parent=context)
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(command.name, rest, parent=context)  # raises what is wrong with them


def test_every_part_is_among_the_containers() -> None:
    """So the test before this one has looked at something."""
    assert {line[1] for line in command_lines()} >= {
        *("worker", "topics", "router", "coordinator", "materializer", "projections")
    }


def test_nobody_kills_a_worker_that_is_still_committing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor, Compose and Kubernetes wait for longer than a worker may take: its grace time, and what it needs to
    cancel, flush, commit, leave and exit."""
    (tmp_path / "graceful_shop.py").write_text("from jobledger import App\napp = App('shop')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given: list[float] = []

    def supervised(children: Any, *, restarts: int, grace: float) -> int:
        given.append(grace)
        return 0

    monkeypatch.setattr(running, "supervised", supervised)
    assert main(["worker", "graceful_shop:app", "--processes", "2", "--grace", "7"]) == 0
    longest = LEAVING_S + EXIT_S + HARD_S
    assert given[0] > 7 + longest

    default = WorkerOptions().grace
    assert float(compose()["x-jobledger"]["stop_grace_period"].removesuffix("s")) > default + longest
    args = worker()["containers"][0]["args"]
    # There may be a supervisor in between, which must come first.
    asked = float(args[args.index("--grace") + 1]) + LEAVING_S + running.KILL_MARGIN_S
    assert worker()["terminationGracePeriodSeconds"] > asked


def test_the_pipeline_makes_no_folder_that_anybody_may_write_to() -> None:
    """What it runs as root could be changed there by others of the machine."""
    assert not re.search(r"chmod\b.*(777|[ao]\+\S*w)", (ROOT / ".ci/run").read_text("utf-8"))


# -- alerts ----------------------------------------------------------------------------------------------------------

EVERY_S, MINUTES = 15, 10
SCRAPES = MINUTES * 60 // EVERY_S
PARTS = ("worker", "router", "coordinator", "materializer", "projections")


def healthy() -> promtool.Series:
    """What Prometheus hears for ten minutes where all is well."""
    instances: promtool.Series = {f'up{{job="{job}",instance="{job}-1:9100"}}': [1.0] * SCRAPES for job in PARTS}
    return {
        **instances,
        'up{job="worker",instance="worker-2:9100"}': [1.0] * SCRAPES,
        'jobledger_coordinator_ready{job="coordinator",instance="coordinator-1:9100"}': [1.0] * SCRAPES,
        'jobledger_materializer_active{job="materializer",instance="materializer-1:9100"}': [1.0] * SCRAPES,
    }


def gone(series: promtool.Series, *instances: str, after: int = SCRAPES // 2) -> promtool.Series:
    """The same, where these instances are no targets any more: nothing is told of them, not even that they are down."""
    return {
        name: values if not any(each in name for each in instances) else [*values[:after], math.nan]
        for name, values in series.items()
    }


def firing(folder: Path, series: promtool.Series) -> set[str]:
    """The alerts that fire at the end."""
    rules = ROOT / "docker/alerts.yml"
    names = [rule["alert"] for rule in yaml.safe_load(rules.read_text("utf-8"))["groups"][0]["rules"]]
    found = set()
    for name in names:
        quiet = {
            "rule_files": [str(rules)],
            "evaluation_interval": f"{EVERY_S}s",
            "tests": [
                {
                    "interval": f"{EVERY_S}s",
                    "input_series": promtool.told(series),
                    "alert_rule_test": [{"eval_time": f"{MINUTES}m", "alertname": name, "exp_alerts": []}],
                }
            ],
        }
        content, said = promtool.run(folder, quiet)
        assert content or f"alertname: {name}" in said, said  # else it is not an alert that it complains of
        if not content:
            found.add(name)
    return found


def test_alerts_are_silent_where_all_is_well(tmp_path: Path) -> None:
    """Also where a part has fewer instances than before: somebody has scaled it down."""
    assert firing(tmp_path, healthy()) == set()
    assert firing(tmp_path, gone(healthy(), "worker-2")) == set()


@pytest.mark.parametrize(
    ("instance", "alerts"),
    [
        ("worker", {"JobledgerPartGone"}),
        ("router-1", {"JobledgerPartGone"}),
        ("coordinator-1", {"JobledgerPartGone", "JobledgerCoordinatorNotReady"}),
        ("materializer-1", {"JobledgerPartGone", "JobledgerNoMaterializer"}),
    ],
)
def test_a_part_of_which_nothing_is_left_is_told(tmp_path: Path, instance: str, alerts: set[str]) -> None:
    """Where parts are found by DNS the last one takes its series with it, and nothing is neither 0 nor 1."""
    assert firing(tmp_path, gone(healthy(), instance)) == alerts


def test_a_coordinator_and_a_materializer_that_never_were_are_told(tmp_path: Path) -> None:
    """Nothing works without them, whether anybody has seen them or not."""
    assert firing(tmp_path, gone(healthy(), "coordinator-1", "materializer-1", after=0)) == {
        *("JobledgerCoordinatorNotReady", "JobledgerNoMaterializer")
    }
