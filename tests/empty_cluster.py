"""A server that answers like a broker that was frozen and has not joined its cluster again: the server lists no
brokers.

Its first answer names itself as the cluster's only broker, so that a client sends its request to this server.
"""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

API_VERSIONS, METADATA = 18, 3
UNKNOWN_TOPIC = 3
CLUSTER = "a-cluster"


class _Broker(socketserver.StreamRequestHandler):
    """Answers two requests of Kafka's protocol: ApiVersions 3 and Metadata 8."""

    server: _Server

    def handle(self) -> None:
        while len(size := self.rfile.read(4)) == 4:
            request = self.rfile.read(*struct.unpack(">i", size))
            api, _, number, client = struct.unpack_from(">hhih", request)
            body = request[10 + max(client, 0) :]
            answer = struct.pack(">i", number) + (
                _api_versions() if api == API_VERSIONS else _metadata(body, self.server.member())
            )
            self.wfile.write(struct.pack(">i", len(answer)) + answer)


def _api_versions() -> bytes:
    known = b"".join(struct.pack(">hhhB", api, 0, most, 0) for api, most in ((API_VERSIONS, 3), (METADATA, 8)))
    return struct.pack(">hB", 0, 3) + known + struct.pack(">iB", 0, 0)


def _metadata(request: bytes, member: tuple[str, int] | None) -> bytes:
    """Return an answer with the one broker or none, in which each requested topic is unknown."""
    asked, at = max(struct.unpack_from(">i", request)[0], 0), 4
    topics = b""
    for _ in range(asked):
        end = at + 2 + struct.unpack_from(">h", request, at)[0]
        topics += struct.pack(">h", UNKNOWN_TOPIC) + request[at:end] + struct.pack(">?ii", False, 0, 0)
        at = end
    brokers = struct.pack(">i", 0)
    if member is not None:
        host, port = member
        brokers = struct.pack(">ii", 1, 0) + _text(host) + struct.pack(">ih", port, -1)
    cluster = _text(CLUSTER) + struct.pack(">i", -1 if member is None else 0)
    return struct.pack(">i", 0) + brokers + cluster + struct.pack(">i", asked) + topics + struct.pack(">i", 0)


def _text(text: str) -> bytes:
    return struct.pack(">h", len(text)) + text.encode()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Broker)
        self._answered = False
        self._lock = threading.Lock()

    def member(self) -> tuple[str, int] | None:
        """Return the broker that the next answer lists: this server in the first answer, none later."""
        with self._lock:
            first, self._answered = not self._answered, True
        return self.server_address[:2] if first else None  # type: ignore[return-value]  # an IPv4 address has two elements


@contextmanager
def empty_cluster() -> Iterator[str]:
    """Yield the address of such a server."""
    with _Server() as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            serving.join()
