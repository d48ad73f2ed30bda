"""The client of the Schema Registry without a registry, or with another server. The tests with a real registry are in
tests/integration."""

from __future__ import annotations

import builtins
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, NotAnEvent, RegistryUnavailable, SchemaError
from jobledger.kafka.embedded.ports import free_port
from jobledger.log import schema_registry
from jobledger.log.framing import Framing
from jobledger.log.schema_registry import SchemaRegistry
from jobledger.schemas import codec

Answer = tuple[int, Any]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once, and let no answer be late, because the servers of these tests may be slow."""
    monkeypatch.setattr(schema_registry, "PAUSE_S", 0.0)
    monkeypatch.setattr(schema_registry, "TOTAL_S", 120.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """A function that starts an HTTP server with these answers, and repeats the last one. It returns the address and
    the requests."""
    running: list[ThreadingHTTPServer] = []

    def start(*answers: Answer) -> tuple[str, list[Any]]:
        left, seen = list(answers), list[Any]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append((self.path, self.headers.get("Authorization")))
                status, body = left.pop(0) if len(left) > 1 else left[0]
                raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                """Print nothing."""

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        running.append(made)
        return f"127.0.0.1:{made.server_port}", seen

    yield start
    for made in running:
        made.shutdown()
        made.server_close()


NONE = (404, {"error_code": 40403, "message": "Schema not found"})


def test_the_error_of_an_unreachable_registry_hides_its_password() -> None:
    """The error has the address without the password, the setting and a remedy. It is retried like an error of a
    broker."""
    port = free_port()
    with pytest.raises(RegistryUnavailable, match="JOBLEDGER_SCHEMA_REGISTRY") as caught:
        SchemaRegistry(f"http://me:s3cret@127.0.0.1:{port}/api").schema(1)
    assert f"http://me:***@127.0.0.1:{port}/api" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert isinstance(caught.value, BrokerUnavailable)
    assert "s3cret" not in repr(Settings(schema_registry="http://me:s3cret@here"))


def test_a_busy_registry_is_asked_again(server: Callable[..., tuple[str, list[Any]]]) -> None:
    """The client asks again a few times, because the registry may be overloaded or restarting."""
    address, seen = server((503, "later"), (429, {}), (200, {"schema": '"int"'}))
    assert SchemaRegistry(f"http://{address}/").schema(4) == '"int"'
    assert [path for path, _ in seen] == ["/schemas/ids/4"] * 3
    address, _ = server((503, "later"))
    with pytest.raises(RegistryUnavailable, match="HTTP status 503"):
        SchemaRegistry(f"http://{address}").schema(4)


def test_the_client_asks_again_for_an_unknown_id_if_the_answer_must_be_certain(
    server: Callable[..., tuple[str, list[Any]]],
) -> None:
    """A registry that follows another one may know the id a moment later."""
    address, seen = server(NONE, NONE, (200, {"schema": '"int"'}))
    assert SchemaRegistry(f"http://{address}").schema(4) == '"int"'
    address, seen = server(NONE)
    assert SchemaRegistry(f"http://{address}").schema(4, sure=False) is None
    assert len(seen) == 1


@pytest.mark.parametrize("answer", [(404, "<html>"), (404, {"detail": "no such path"}), (200, "<html>"), (200, [])])
def test_another_server_is_never_taken_for_a_registry(
    server: Callable[..., tuple[str, list[Any]]], answer: Answer
) -> None:
    """Good records must not be rejected because of a 404 of a wrong address. Only a registry's own error says that an
    id is unknown."""
    address, _ = server(answer)
    with pytest.raises(ConfigError, match="JOBLEDGER_SCHEMA_REGISTRY"):
        SchemaRegistry(f"http://{address}").schema(4)


def test_credentials_of_the_url_are_sent_and_their_refusal_is_an_error(
    server: Callable[..., tuple[str, list[Any]]],
) -> None:
    """User and password of the URL are sent as basic authentication."""
    address, seen = server((401, {}))
    with pytest.raises(ConfigError, match="refuses this client"):
        SchemaRegistry(f"http://me:p%40ss@{address}").schema(4)
    assert seen == [("/schemas/ids/4", "Basic bWU6cEBzcw==")]


def test_a_schema_of_another_type_is_no_event(server: Callable[..., tuple[str, list[Any]]]) -> None:
    """A registry may hold Protobuf schemas, and Avro schemas with references."""
    address, _ = server((200, {"schema": "message X {}", "schemaType": "PROTOBUF"}))
    with pytest.raises(NotAnEvent, match="PROTOBUF"):
        SchemaRegistry(f"http://{address}").schema(4)
    address, _ = server((200, {"schema": '"int"', "references": [{"name": "x", "subject": "y", "version": 1}]}))
    with pytest.raises(SchemaError, match="register it without references"):
        SchemaRegistry(f"http://{address}").schema(4)


@pytest.mark.parametrize("url", ["here:8081", "ftp://here", "http://", "http://here:port", "http://u:s3cret@here/?a=b"])
def test_a_wrong_url_is_refused(url: str) -> None:
    """The error is raised at the start, and does not show the password."""
    with pytest.raises(ConfigError, match="JOBLEDGER_SCHEMA_REGISTRY") as caught:
        SchemaRegistry(url)
    assert "s3cret" not in str(caught.value)


def test_the_error_without_the_registry_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the name of the extra to install."""
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "httpx2":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"jobledger\[registry\]"):
        SchemaRegistry("http://here:8081")


@pytest.fixture
def hanging() -> Iterator[Callable[[bytes], tuple[str, list[float]]]]:
    """A function that starts a server which takes requests and sends only these bytes, one every 50 ms. It returns the
    address and the times of the requests."""
    open_: list[socket.socket] = []
    done = threading.Event()

    def start(drops: bytes) -> tuple[str, list[float]]:
        asked: list[float] = []
        listener = socket.create_server(("127.0.0.1", 0))
        open_.append(listener)

        def answer(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                for n in range(len(drops)):
                    connection.sendall(drops[n : n + 1])
                    if done.wait(0.05):
                        return
                done.wait(60)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    asked.append(time.monotonic())
                    open_.append(connection)
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}", asked

    yield start
    done.set()
    for each in open_:
        each.close()


@pytest.mark.parametrize("drops", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 4_000])
@pytest.mark.parametrize(
    "ask", [lambda registry: registry.schema(1), lambda registry: registry.register("s-value", '"int"')]
)
def test_a_call_to_a_registry_that_hangs_ends_after_one_time_limit(
    hanging: Callable[[bytes], tuple[str, list[float]]],
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[SchemaRegistry], Any],
    drops: bytes,
) -> None:
    """The registry sends nothing, or single bytes. The time limit holds for all requests of a call together."""
    monkeypatch.setattr(schema_registry, "TOTAL_S", 1.0)
    address, asked = hanging(drops)
    registry = SchemaRegistry(f"http://{address}")
    began = time.monotonic()
    with pytest.raises(RegistryUnavailable, match=r"at most 1 s.*JOBLEDGER_SCHEMA_REGISTRY"):
        ask(registry)
    took = time.monotonic() - began
    # In the cases with bytes, the server sends one every 50 ms, for 200 s in all. A time limit for each single read would
    # never be reached, and the call would take the 200 s.
    assert took < 60.0
    assert len(asked) <= 1


def test_submissions_that_wait_for_the_same_registration_fail_with_it(
    hanging: Callable[[bytes], tuple[str, list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry hangs. Ten threads get the error of one request, and do not make their own requests one after the
    other."""
    monkeypatch.setattr(schema_registry, "TOTAL_S", 1.0)
    address, asked = hanging(b"")
    framing = Framing(f"http://{address}", lambda key: None)
    failed: list[RegistryUnavailable] = []
    together = threading.Barrier(10)

    def submit() -> None:
        together.wait()
        try:
            framing.framed("shop.jobs.mail", codec.MAGIC + codec.FINGERPRINT + b"datum")
        except RegistryUnavailable as exc:
            failed.append(exc)

    threads = [threading.Thread(target=submit) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failed) == 10
    assert len(asked) < 5
