"""The parts that all benchmarks share: a broker, topics, figures with their targets, and the output of figures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from jobledger.config import Settings
from jobledger.kafka.topic_names import Names


class Figure(msgspec.Struct, frozen=True):
    """One measured figure.

    ``value`` is in ``unit``. ``bare``: the bare loop's figure of the same run, if there is one; ``target``: the
    project's target; ``higher``: whether values above the target are good, or values below; ``note``: how the figure
    was measured.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    higher: bool = True
    bare: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.higher else self.value <= self.target

    @property
    def ratio(self) -> float | None:
        """The figure divided by the bare loop's; None without one."""
        return self.value / self.bare if self.bare else None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0-1) of the values are, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@contextlib.contextmanager
def broker(bootstrap: str | None = None) -> Iterator[Settings]:
    """Yield settings for ``bootstrap``, else for ``JOBLEDGER_BOOTSTRAP``, else for an embedded broker that stops after
    the block."""
    found = bootstrap or os.environ.get("JOBLEDGER_BOOTSTRAP")
    if found:
        yield Settings.from_env().with_bootstrap(found)
        return
    from jobledger.kafka.embedded import EmbeddedKafka

    with EmbeddedKafka(heap_mb=1024) as kafka:
        yield Settings.from_env().with_bootstrap(kafka.bootstrap)


def fresh_names(what: str) -> Names:
    """Return the names of a new namespace for one measurement."""
    return Names(f"bench-{what}-{time.time_ns() // 1_000_000:x}")


def create(settings: Settings, names: Names, queues: Sequence[str], partitions: int) -> None:
    """Create the topics of a namespace, as the project declares them."""
    from jobledger.kafka import topics, topology

    specs = topology.desired(names, dict.fromkeys(queues, partitions), partitions=partitions, replication=1)
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    topics.apply(client, topics.plan(client, specs))


def drop(settings: Settings, names: Names) -> None:
    """Delete a namespace's topics, so that the data of one measurement does not slow down the next one."""
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    mine = [t for t in client.list_topics(timeout=10).topics if t.startswith(names.namespace + ".")]
    for future in client.delete_topics(mine).values() if mine else ():
        future.result()


def machine() -> dict[str, Any]:
    """Describe the machine on which the figures were measured."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0],
    }


def as_json(figures: Sequence[Figure]) -> str:
    """Return figures and machine as one JSON document."""
    rows = [msgspec.to_builtins(f) | {"ratio": f.ratio, "met": f.met} for f in figures]
    return json.dumps({"machine": machine(), "figures": rows}, indent=2)


def show(figures: Sequence[Figure]) -> None:
    """Print figures as a table on stderr, so that stdout contains only JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Jobledger beside a bare loop of the same run")
    for column, justify in (("figure", "left"), ("value", "right"), ("bare", "right"), ("ratio", "right"),
                            ("target", "right"), ("", "center"), ("how", "left")):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # literals above
    for f in figures:
        sign = {True: "[green]✔[/]", False: "[red]✘[/]", None: ""}[f.met]
        table.add_row(
            f.name,
            f"{f.value:,.4g} {f.unit}" if f.value < 100 else f"{f.value:,.0f} {f.unit}",
            "" if f.bare is None else (f"{f.bare:,.4g}" if f.bare < 100 else f"{f.bare:,.0f}"),
            "" if f.ratio is None else f"{f.ratio:.2f}",
            "" if f.target is None else f"{'≥' if f.higher else '≤'} {f.target:,.5g}",
            sign,
            f.note,
        )
    Console(stderr=True, width=150).print(table)


def new_topic(settings: Settings, name: str, partitions: int) -> None:
    """Create one plain topic for a bare loop."""
    client = AdminClient({"bootstrap.servers": settings.resolve_bootstrap()})
    config = {"message.timestamp.type": "LogAppendTime"}
    client.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result()
