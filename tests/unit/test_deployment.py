"""The files of the repository that are deployed: their command lines are valid, their grace times are long enough, and
their alerts fire when a part is gone.

Prometheus' own promtool runs the alerts; without promtool these tests are skipped.
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
    """Return the words that the image puts before its arguments."""
    line = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert line is not None
    words: list[str] = yaml.safe_load(line.group(1))
    return words


def compose() -> dict[str, Any]:
    """Return the content of docker-compose.yml."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return content


def worker() -> dict[str, Any]:
    """Return the pod of the Deployment in examples/kubernetes."""
    deployment: dict[str, Any] = yaml.safe_load((ROOT / "examples/kubernetes/worker.yaml").read_text("utf-8"))
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def command_lines() -> list[list[str]]:
    """Return each ``jobledger …`` with which one of our containers starts."""
    (container,) = worker()["containers"]
    lines = [[*container.get("command", entrypoint()), *container["args"]]]
    for service in compose()["services"].values():
        words = service.get("entrypoint", [])
        if words[:2] == ["sh", "-c"]:
            script = words[2].replace("$$APP", "examples.shop:app")
            lines += [shlex.split(line) for line in re.findall(r"\bjobledger [^&|>\n]+", script)]
    return lines


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_containers_start_with_valid_command_lines(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of the command line accepts the command and the options of each container."""
    monkeypatch.setenv("JOBLEDGER_LOG_FORMAT", "")  # restored after the test, because the option sets it
    assert words[0] == "jobledger"
    command: Any = typer.main.get_command(cli)
    rest, context = words[1:], None
    while hasattr(command, "commands"):
        context = command.make_context(command.name, rest[:1], parent=context)
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(command.name, rest, parent=context)  # raises an error if an option is wrong


def test_every_part_is_among_the_containers() -> None:
    """So the previous test has checked the command line of each part."""
    assert {line[1] for line in command_lines()} >= {
        *("worker", "topics", "router", "coordinator", "materializer", "projections", "web")
    }


def test_a_worker_is_not_killed_while_it_still_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor, Compose and Kubernetes wait longer than a worker may need: its grace time, and the time to cancel,
    flush, commit, leave its groups and exit."""
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
    # If a supervisor runs in the container, its time limit must end first.
    asked = float(args[args.index("--grace") + 1]) + LEAVING_S + running.KILL_MARGIN_S
    assert worker()["terminationGracePeriodSeconds"] > asked


def test_the_pipeline_makes_no_folder_that_anybody_may_write_to() -> None:
    """Other users of the machine could change programs in the folder that the pipeline runs as root."""
    assert not re.search(r"chmod\b.*(777|[ao]\+\S*w)", (ROOT / ".ci/run").read_text("utf-8"))


# -- alerts ----------------------------------------------------------------------------------------------------------

EVERY_S, MINUTES = 15, 10
SCRAPES = MINUTES * 60 // EVERY_S
PARTS = ("worker", "router", "coordinator", "materializer", "projections", "web")


def healthy() -> promtool.Series:
    """Return ten minutes of metrics of a deployment in which all parts run."""
    instances: promtool.Series = {f'up{{job="{job}",instance="{job}-1:9100"}}': [1.0] * SCRAPES for job in PARTS}
    return {
        **instances,
        'up{job="worker",instance="worker-2:9100"}': [1.0] * SCRAPES,
        'jobledger_coordinator_ready{job="coordinator",instance="coordinator-1:9100"}': [1.0] * SCRAPES,
        'jobledger_materializer_active{job="materializer",instance="materializer-1:9100"}': [1.0] * SCRAPES,
    }


def gone(series: promtool.Series, *instances: str, after: int = SCRAPES // 2) -> promtool.Series:
    """Return the series without these instances: they are no targets any more, so they have not even an `up` of 0."""
    return {
        name: values if not any(each in name for each in instances) else [*values[:after], math.nan]
        for name, values in series.items()
    }


def firing(folder: Path, series: promtool.Series) -> set[str]:
    """Return the alerts that fire at the end."""
    rules = ROOT / "docker/alerts.yml"
    names = [rule["alert"] for rule in yaml.safe_load(rules.read_text("utf-8"))["groups"][0]["rules"]]
    alerts = set()
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
        content, output = promtool.run(folder, quiet)
        assert content or f"alertname: {name}" in output, output  # otherwise promtool complains of something else
        if not content:
            alerts.add(name)
    return alerts


def test_no_alert_fires_while_every_part_runs(tmp_path: Path) -> None:
    """A part may have fewer instances than before, because it was scaled down."""
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
def test_an_alert_fires_when_the_last_instance_of_a_part_is_gone(
    tmp_path: Path, instance: str, alerts: set[str]
) -> None:
    """If Prometheus finds the parts by DNS, the series of the last instance ends. A missing value is neither 0 nor
    1."""
    assert firing(tmp_path, gone(healthy(), instance)) == alerts


def test_an_alert_fires_if_the_coordinator_or_the_materializer_never_ran(tmp_path: Path) -> None:
    """Delayed jobs and the status table do not work without them, so the alerts need no earlier value."""
    assert firing(tmp_path, gone(healthy(), "coordinator-1", "materializer-1", after=0)) == {
        *("JobledgerCoordinatorNotReady", "JobledgerNoMaterializer")
    }
