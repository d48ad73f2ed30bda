"""The figures that the benchmarks measure, without a broker."""

from __future__ import annotations

import socket
import subprocess
import sys

import psutil

from bench import scaling

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(64 * 2**20); print('up', flush=True); input()"])
child.wait()
"""


def test_the_memory_of_a_process_includes_its_child_processes() -> None:
    """A worker's jobs may run in child processes."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "up\n"
        whole = scaling._memory(psutil.Process(process.pid))
        assert whole > psutil.Process(process.pid).memory_full_info().uss / 2**20 + 64
        process.stdin.write("\n")


def test_the_broker_is_the_process_that_listens_at_its_address() -> None:
    """Another Kafka on this machine is not measured, and neither is a broker on another machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        broker = scaling._listening(f"127.0.0.1:{port},127.0.0.1:1")
        assert broker == psutil.Process()
        assert scaling._listening(f"kafka-1:{port}") is None
    assert scaling._listening(f"127.0.0.1:{port}") is None
