"""``--metrics-port``: the metrics of a process and the figures of its health, over HTTP."""

from __future__ import annotations

import logging
import re
import socket
import urllib.request

import pytest
import typer

from jobledger.cli.metrics import serving
from jobledger.cli.options import HOST, Listen
from jobledger.errors import PortTaken
from tests.patience import PATIENCE

HEALTH = {
    "status": "ok",
    "reasons": [],
    "running": 3,
    "worker": "h:1",
    "queues": {"mail": {"partitions": [0, 1], "held": 7}, "default": {"partitions": [], "held": 0}},
}


def test_health_figures_are_gauges(caplog: pytest.LogCaptureFixture) -> None:
    """Each number is a gauge, and a queue's numbers have a label. The gauge of a list is its length. Text is left
    out."""
    with caplog.at_level(logging.INFO, "jobledger.metrics"), serving(Listen(HOST, 0), "jl_test", lambda: HEALTH):
        address = re.search(r"http://\S+", caplog.text)
        assert address is not None
        with urllib.request.urlopen(address.group(), timeout=10 * PATIENCE) as answer:
            text = answer.read().decode()
    lines = set(text.splitlines())
    assert {"jl_test_healthy 1.0", "jl_test_running 3.0"} <= lines
    assert {'jl_test_queue_held{queue="mail"} 7.0', 'jl_test_queue_partitions{queue="mail"} 2.0'} <= lines
    assert "h:1" not in text


def test_the_error_of_a_port_in_use_names_the_port() -> None:
    """The error has a remedy."""
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(PortTaken, match=f"{HOST}:{port}.*choose another --metrics-port"),
            serving(Listen(HOST, port)),
        ):
            pass


def test_without_a_port_no_metrics_are_served() -> None:
    """Without the option no server is started."""
    with serving(None):
        pass


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("9100", HOST, 9100, "127.0.0.1:9100"),
        ("0.0.0.0:9100", "0.0.0.0", 9100, "0.0.0.0:9100"),  # parsed, not listened on
        ("[::]:0", "::", 0, "[::]:0"),
    ],
)
def test_the_option_takes_a_port_or_a_host_with_a_port(text: str, host: str, port: int, shown: str) -> None:
    """A port without a host is on the loopback address."""
    listen = Listen.parse(text)
    assert listen == Listen(host, port)
    assert str(listen) == shown
    assert listen.following(2).port == (port + 2 if port else 0)


@pytest.mark.parametrize("text", ["", "nine", "70000", "localhost:", "-1"])
def test_a_wrong_port_is_refused(text: str) -> None:
    """The error has the value and the right form."""
    with pytest.raises(typer.BadParameter, match="HOST:PORT"):
        Listen.parse(text)
