"""A coordinator as a process of its own, which kills itself at a given step. Run by the
fault tests, not a test itself."""

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
    """Arguments as one JSON object: bootstrap, namespace, partitions, folder, options, kill (step, which time), freeze (the
    broker's pid and a file: if it is there, the broker is frozen when the table is about to be restored)."""
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
        freeze_at_a_restoring(int(given["freeze"][0]), Path(given["freeze"][1]))

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
            os._exit(70)  # before the runner waits for tasks that hang on a dead broker, as `run_coordinator` does
    return 0


def freeze_at_a_restoring(pid: int, file: Path) -> None:
    """Stop process ``pid`` once ``file`` is there and a rebalance has brought partitions whose rows are to be read."""
    ask = PatientRecovery._build_highwaters

    async def frozen(recovery: Any, *given: Any) -> None:
        if file.exists():
            file.unlink()
            os.kill(pid, signal.SIGSTOP)
        await ask(recovery, *given)

    PatientRecovery._build_highwaters = frozen  # type: ignore[method-assign,assignment]  # the fault


if __name__ == "__main__":
    sys.exit(main())
