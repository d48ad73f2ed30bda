"""A program in another language, which Maven builds from `examples/java`. It uses the schema and docs/wire.md, and no
code of Jobledger."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobledger.kafka.topics import ensure
from jobledger.schemas.events import JobSucceeded
from tests.integration.worker_app import closings, made, working

pytestmark = [pytest.mark.kafka, pytest.mark.extended]

ROOT = Path(__file__).resolve().parents[2]
MAVEN = shutil.which("mvn") if shutil.which("javac") else None


@pytest.mark.skipif(MAVEN is None, reason="no mvn and javac on the path: the example in Java is not built")
def test_a_java_program_submits_a_job_and_reads_its_outcome(
    broker: str, namespace: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """The program publishes the schema itself, submits `add(40, 2)`, and reads the start and the result from the
    lifecycle topic."""
    app = made(namespace, broker)
    ensure(app, app.settings)
    project = tmp_path / "java"
    shutil.copytree(ROOT / "examples" / "java", project)
    assert MAVEN is not None
    maven = [MAVEN, "--batch-mode", "--quiet", "--file", str(project / "pom.xml")]
    built = subprocess.run([*maven, "compile"], capture_output=True, text=True, timeout=400, check=False)
    if built.returncode and "Could not transfer artifact" in built.stdout:
        pytest.skip("no Maven repository can be reached: the example in Java is not built")
    assert built.returncode == 0, built.stdout
    words = [broker, namespace, "default", "add", '{"a":40,"b":2}', str(ROOT / "schemas" / "job_event.avsc")]
    run = [*maven, "exec:java", "-Dexec.mainClass=Wire", "-Dexec.args=" + " ".join(f"'{word}'" for word in words)]
    with working(app):
        ran = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    # Maven colours its output, even if the output is no terminal.
    assert re.sub("\x1b\\[[0-9;]*m", "", ran.stdout).split("\n")[:2] == ["JobStarted", "JobSucceeded 42"]
    ((record,),) = closings(app).values()
    assert isinstance(record.event.fact, JobSucceeded)
    app.close()
    say("java: examples/java, built by Maven, submitted a job and read its end")
