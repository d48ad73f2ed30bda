"""docker-compose.yml as people use it: start, jobs, events, a killed worker, the demo in a container, Prometheus,
Grafana.

The tests need a Docker engine with Compose, and the images, local or from a registry. Without them the tests are
skipped, with a reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobledger import App, Settings
from jobledger.kafka.embedded.ports import free_port
from tests.patience import PATIENCE

pytestmark = [pytest.mark.kafka, pytest.mark.extended, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PULL_S, BUILD_S, UP_S = 300, 600, 240
PORTS = ("KAFKA_PORT", "REGISTRY_PORT", "POSTGRES_PORT", "WEB_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
#: A program of this machine, for use without the official image.
PROMETHEUS = os.environ.get("JOBLEDGER_TEST_PROMETHEUS") or shutil.which("prometheus")


class Stack:
    """One project of docker-compose.yml, with its own ports."""

    def __init__(self) -> None:
        self.project = f"jl{uuid.uuid4().hex[:10]}"
        self.ports = {name: free_port() for name in PORTS}
        self.env = {**os.environ, **{name: str(port) for name, port in self.ports.items()}}
        self.files = ["docker-compose.yml"]

    def docker(self, *words: str, seconds: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``docker WORDS``. With ``check``, a failure raises an error with the output."""
        done = subprocess.run(
            ["docker", *words], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"[-6000:])
        return done

    def compose(self, *words: str, seconds: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``docker compose WORDS`` for this project."""
        files = [word for name in self.files for word in ("--file", name)]
        return self.docker("compose", "--project-name", self.project, *files, *words, seconds=seconds, check=check)

    def cli(self, *words: str) -> str:
        """Return the output of ``jobledger WORDS`` in a new container."""
        return self.compose("run", "--rm", "--no-TTY", "cli", *words).stdout

    def image(self, service: str) -> None:
        """Make sure that the image of a service exists: pull it if it is not local. Skips the test if that fails."""
        image = self.config(service)["image"]
        if self.docker("image", "inspect", image, check=False).returncode == 0:
            return
        try:
            done = self.docker("pull", "--quiet", image, seconds=PULL_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"the image {image} cannot be had within {PULL_S} s")
        if done.returncode:
            pytest.skip(f"the image {image} cannot be had: {done.stderr.strip().splitlines()[-1][:160]}")

    def config(self, service: str) -> dict[str, Any]:
        """Return a service's settings as Compose reads them."""
        told = self.compose("--profile", "*", "config", "--format", "json").stdout
        found: dict[str, Any] = json.loads(told)["services"][service]
        return found


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Build and start the whole system."""
    made = Stack()
    if shutil.which("docker") is None:
        pytest.skip("no `docker` on the PATH")
    engine = made.docker("info", "--format", "{{.ServerVersion}}", check=False)
    if engine.returncode or not engine.stdout.strip():
        pytest.skip("no Docker engine answers")
    if made.docker("compose", "version", check=False).returncode:
        pytest.skip("`docker` has no Compose")
    for service in ("kafka", "registry", "postgres"):
        made.image(service)
    base = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)[0]
    if made.docker("image", "inspect", base, check=False).returncode and (
        made.docker("pull", "--quiet", base, seconds=PULL_S, check=False).returncode
    ):
        pytest.skip(f"the image {base} cannot be had")
    try:
        made.compose("build", seconds=BUILD_S)
        made.compose("up", "--wait", "--quiet-pull", seconds=UP_S)
        yield made
    finally:
        made.compose("--profile", "*", "down", "--volumes", "--timeout", "10", check=False)


def test_every_service_is_healthy(stack: Stack, say: Callable[[str], None]) -> None:
    """Every running service has a healthcheck, which passes."""
    told = [json.loads(line) for line in stack.compose("ps", "--format", "json").stdout.splitlines()]
    states = {each["Service"]: each["Health"] for each in told}
    assert states == dict.fromkeys(
        ("kafka", "registry", "postgres", "worker", "router", "coordinator", "materializer", "projections", "web"),
        "healthy",
    )
    say(
        f"compose: up, {len(states)} services healthy ({stack.config('kafka')['image']}, {stack.config('postgres')['image']})"
    )


def test_jobs_and_events_run_and_the_tables_agree_with_the_log(stack: Stack) -> None:
    """A job fails once and is retried. An event gets its two jobs and its projection. The tables agree with the log."""
    ended = stack.cli("submit", "examples.shop:app", "send_mail", "to=slow@example.org", "--wait")
    assert re.search(r"state\s+succeeded", ended)
    assert re.search(r"attempt\s+2", ended)
    stack.cli("emit", "examples.shop:app", "UserRegistered", "user_id=u-1")

    def listed() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(stack.cli("jobs", "list", "--namespace", "shop", "--json"))
        return found

    until(
        lambda: sorted(j["task"] for j in listed() if j["state"] == "succeeded") == ["send_mail", "sync_crm", "welcome"]
    )
    assert json.loads(stack.cli("verify", "examples.shop:app", "--json"))["equal"] is True
    told = json.loads(stack.cli("projections", "verify", "examples.shop:app", "count_signups", "--json"))
    assert (told["equal"], told["rows"]) == (True, 1)
    rows = stack.compose(
        "exec", "--no-TTY", "postgres", "psql", "-At", "--username=jobledger", "-c", "SELECT plan, people FROM signups"
    )
    assert rows.stdout.split() == ["free|1"]


def test_the_dashboard_admits_only_those_with_a_token(stack: Stack) -> None:
    """A token that is added while the service runs is accepted. Without one there is no page and no job."""
    base = f"http://127.0.0.1:{stack.ports['WEB_PORT']}"
    add = "jobledger web-token add ann --role read --tokens /data/web-tokens.json --json"
    token = json.loads(stack.compose("exec", "--no-TTY", "web", *add.split()).stdout)["token"]
    request = urllib.request.Request(f"{base}/api/v1/queues", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10 * PATIENCE) as answer:
        assert "mail" in {each["queue"] for each in json.load(answer)["queues"]}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{base}/api/v1/queues", timeout=10 * PATIENCE)


def test_a_program_outside_the_containers_can_submit(stack: Stack) -> None:
    """Kafka, the registry and PostgreSQL can be reached at their published ports."""
    settings = Settings(
        bootstrap=f"localhost:{stack.ports['KAFKA_PORT']}",
        schema_registry=f"http://localhost:{stack.ports['REGISTRY_PORT']}/apis/ccompat/v7",
        status_url=f"postgresql://jobledger:jobledger@localhost:{stack.ports['POSTGRES_PORT']}/jobledger",
    )
    app = App("shop", settings=settings)

    @app.task(queue="mail")
    def send_mail(to: str, template: str = "welcome") -> str:
        raise AssertionError("it runs in the worker's container, as that one's task")

    try:
        assert send_mail.submit("b@example.org").result(timeout=30 * PATIENCE) == "sent welcome to b@example.org"
    finally:
        app.close()


def test_a_killed_worker_loses_nothing(stack: Stack) -> None:
    """A worker is killed with kill -9 while it has jobs. The service starts again, and each job succeeds."""
    ids = [stack.cli("submit", "examples.shop:app", "send_mail", f"to=k{n}@example.org", "--json") for n in range(3)]
    stack.compose("kill", "--signal", "SIGKILL", "worker")
    ids += [stack.cli("submit", "examples.shop:app", "send_mail", "to=later@example.org", "--json")]
    stack.compose("up", "--wait", "--no-build", seconds=UP_S)
    for each in ids:
        job_id = json.loads(each)["job_id"]
        waited = json.loads(stack.cli("jobs", "wait", job_id, "--namespace", "shop", "--timeout", "60", "--json"))
        assert waited["state"] == "succeeded"
    assert json.loads(stack.cli("verify", "examples.shop:app", "--json"))["equal"] is True


def test_the_demo_runs_in_a_container(stack: Stack, say: Callable[[str], None]) -> None:
    """The demo runs its own worker and stream processor with this broker, and all its checks pass."""
    began = time.monotonic()
    done = stack.compose("run", "--rm", "--no-TTY", "demo", seconds=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    say(f"compose: the demo inside, {time.monotonic() - began:.0f} s")


def test_prometheus_sees_every_part(stack: Stack, tmp_path: Path, say: Callable[[str], None]) -> None:
    """A real Prometheus uses docker/prometheus.yml: all parts answer, no alert fires, and each query of the dashboard
    has data."""
    how = "the official image"
    if stack.docker("image", "inspect", stack.config("prometheus")["image"], check=False).returncode:
        if PROMETHEUS is None:
            stack.image("prometheus")
        else:
            # The same settings and network, with another build of the program.
            how = f"{Path(PROMETHEUS).name} of this machine in {stack.config('worker')['image']}"
            stack.files.append(_with_this_machines(tmp_path, stack))
    stack.compose("--profile", "metrics", "up", "--detach", "--no-deps", "prometheus", seconds=UP_S)
    at = f"http://127.0.0.1:{stack.ports['PROMETHEUS_PORT']}"

    def ask(expression: str) -> list[Any]:
        with urllib.request.urlopen(f"{at}/api/v1/query?query={urllib.parse.quote(expression)}", timeout=10) as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
        return found

    def parts() -> set[str]:
        try:
            return {each["metric"]["job"] for each in ask("up == 1")}
        except OSError:
            return set()

    until(lambda: parts() == {"worker", "router", "coordinator", "materializer", "projections"})
    time.sleep(12)  # rates need two scrapes
    board = json.loads((ROOT / "docker/grafana/jobledger.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    empty = [expression for expression in expressions if not ask(expression)]
    assert not empty
    with urllib.request.urlopen(f"{at}/api/v1/rules", timeout=10) as answer:
        rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
    assert len(rules) == 14
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    say(f"compose: Prometheus ({how}), {len(expressions)} queries of the dashboard and {len(rules)} alerts")


def _with_this_machines(folder: Path, stack: Stack) -> str:
    service = {
        "image": stack.config("worker")["image"],
        "user": "root",
        "entrypoint": [
            "/opt/prometheus",
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
        ],
        "volumes": [f"{Path(PROMETHEUS or '').absolute()}:/opt/prometheus:ro"],
    }
    file = folder / "prometheus.json"
    file.write_text(json.dumps({"services": {"prometheus": service}}), "utf-8")
    return str(file)


def test_grafana_shows_the_dashboard(stack: Stack) -> None:
    """Grafana has the dashboard and its data source."""
    stack.image("grafana")
    stack.compose("--profile", "metrics", "up", "--detach", "--no-deps", "grafana", seconds=UP_S)
    at = f"http://127.0.0.1:{stack.ports['GRAFANA_PORT']}"

    def answer(path: str) -> Any:
        try:
            with urllib.request.urlopen(at + path, timeout=10) as got:
                return json.load(got)
        except OSError:
            return None

    until(lambda: answer("/api/health"))
    until(lambda: answer("/api/dashboards/uid/jobledger"))
    assert answer("/api/dashboards/uid/jobledger")["dashboard"]["title"] == "Jobledger"


def until(true: Callable[[], Any], seconds: float = 60.0, every: Sequence[float] = (0.5,)) -> None:
    """Poll ``true`` until it is true, for ``seconds`` times `PATIENCE`. Raises `AssertionError`."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not true():
        assert time.monotonic() < deadline, "not within its time"
        time.sleep(every[0])
