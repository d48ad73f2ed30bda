"""A coordinator in its own process, which can kill itself at a given step. The fault tests run this program."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from jobledger.config import Settings
from jobledger.kafka.topic_names import Names
from jobledger.streams.coordinator.coordinator import Coordinator, supervise
from jobledger.streams.coordinator.faust.faust_app import Options, PatientRecovery


def main() -> int:
    """Run the coordinator. The argument is one JSON object: bootstrap, namespace, partitions, folder, options, kill (a
    step, and at which occurrence of it), freeze (the broker's pid and a file: if the file exists, the broker is frozen
    directly before the table is restored)."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    step, times = given.get("kill") or ("", 0)
    seen = 0

    def on_step(name: str) -> None:
        nonlocal seen
        if name == step:
            seen += 1
            if seen == times:
                os.kill(os.getpid(), signal.SIGKILL)

    if given.get("freeze"):
        freeze_at_the_next_restore(int(given["freeze"][0]), Path(given["freeze"][1]))

    async def run() -> None:
        coordinator = Coordinator(
            Names(given["namespace"]),
            Settings(bootstrap=given["bootstrap"]),
            partitions=given["partitions"],
            options=Options(**given["options"]),
            data_dir=Path(given["folder"]),
            on_step=on_step if step else None,
        )
        threading.Thread(target=report, args=(coordinator, Path(given["health"])), daemon=True).start()
        await supervise(coordinator)

    def report(coordinator: Coordinator, file: Path) -> None:
        while True:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(coordinator.health()), "utf-8")
            part.replace(file)
            threading.Event().wait(0.1)

    with asyncio.Runner() as runner:
        try:
            runner.run(run())
        except Exception:
            logging.getLogger("jobledger").exception("the coordinator gave up")
            logging.shutdown()
            # The runner would wait for tasks that wait for a dead broker. `run_coordinator` exits in the same way.
            os._exit(70)
    return 0


def freeze_at_the_next_restore(pid: int, file: Path) -> None:
    """Stop process ``pid`` when ``file`` exists and a rebalance has assigned partitions whose rows must be read."""
    ask = PatientRecovery._build_highwaters

    async def frozen(recovery: Any, *given: Any) -> None:
        if file.exists():
            file.unlink()
            os.kill(pid, signal.SIGSTOP)
        await ask(recovery, *given)

    PatientRecovery._build_highwaters = frozen  # type: ignore[method-assign,assignment]  # this is the fault


if __name__ == "__main__":
    sys.exit(main())
