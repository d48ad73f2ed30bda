"""The app whose web process `bench.web` measures: the tasks of `bench.seed_table`, which do nothing."""

from __future__ import annotations

import os

from bench.seed_table import TASKS
from jobledger import App

app = App(os.environ.get("BENCH_NAMESPACE", "shop"), partitions=6)

for _name, _queue in TASKS:

    @app.task(name=_name, queue=_queue)
    async def _nothing() -> None: ...
