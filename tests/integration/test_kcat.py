"""Runs the recipes of docs/wire.md unchanged in a shell. kcat uses no code of Jobledger."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka.cimpl import NewTopic

from jobledger import App
from jobledger.kafka.clients import admin
from jobledger.kafka.topics import ensure
from jobledger.schemas import codec
from tests.integration.test_router import routing
from tests.integration.worker_app import build, closings, until, working
from tests.patience import PATIENCE

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(shutil.which("kcat") is None, reason="no `kcat` on the PATH (apt-get install kcat)"),
]


@dataclass
class Shipped:
    parcel: str


class Page:
    """The recipes, and the app whose topics they use."""

    def __init__(self, app: App, folder: Path) -> None:
        self.app, self._folder = app, folder
        section = Path("docs/wire.md").read_text("utf-8").partition("## With kcat")[2].partition("\n## ")[0]
        found = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
        names = ("length", "facts", "recent", "schemas", "again", "event")
        self.recipes: dict[str, str] = dict(zip(names, found, strict=True))
        self.parcels = f"{app.names.namespace}-shipped"

    def run(self, name: str) -> str:
        """Run a recipe and return its output."""
        script = (
            self.recipes[name]
            .replace("shop.", f"{self.app.names.namespace}.")
            .replace("-t shipped", f"-t {self.parcels}")
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self._folder,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "BROKER": self.app.settings.resolve_bootstrap()},
            capture_output=True,
            text=True,
            timeout=PATIENCE * 60,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def page(broker: str, namespace: str, tmp_path: Path) -> Iterator[Page]:
    app = build(namespace, broker)
    made = Page(app, tmp_path)
    app.event(topic=made.parcels, format="json")(Shipped)

    @app.on(Shipped)
    async def thank(event: Shipped) -> str:
        return f"thanks for {event.parcel}"

    ensure(app, app.settings)
    with ExitStack() as stack:
        stack.callback(app.close)
        client = admin(app.settings)
        for done in client.create_topics([NewTopic(made.parcels, 2, 1)]).values():
            done.result(PATIENCE * 20)
        yield made


def test_every_recipe_does_what_it_says(page: Page, say: Callable[[str], None]) -> None:
    app = page.app
    ids = {handle.job_id for handle in app.submit_many(app.tasks["add"].job(n) for n in range(30))}
    assert {line.split()[1] for line in page.run("recent").splitlines()} == ids
    with working(app) as worker, routing(app) as router:
        until(lambda: len(router.partitions) == 2)  # the router reads topics of other systems from this moment on
        until(lambda: ids <= set(closings(app)))
        facts = page.run("facts")
        # two facts of each job: its start and its success
        assert sorted(line.split()[2] for line in facts.splitlines()) == sorted([*ids, *ids])
        lengths = [int(line.rpartition(" ")[2]) for line in page.run("length").splitlines()]
        counted = [sum(f"[{n}]@" in line for line in facts.splitlines()) for n in (0, 1)]
        assert lengths == counted
        assert page.run("schemas").startswith(f"{codec.FINGERPRINT.hex()} {{")
        ran = len(app.ran)  # type: ignore[attr-defined]
        page.run("again")
        page.run("event")
        until(lambda: len(closings(app)) == 31)
        (thanks,) = set(closings(app)) - ids
        assert closings(app)[thanks][0].event.fact.result == b'"thanks for p-1"'  # type: ignore[union-attr]
        # The worker read the record, and recognised a job that has run.
        until(lambda: worker.health()["duplicates"] + worker.health()["found_closed"] == 1)
    assert len(app.ran) == ran  # type: ignore[attr-defined]
    assert all(len(ends) == 1 for ends in closings(app).values())
    say("kcat: the six recipes of docs/wire.md")
