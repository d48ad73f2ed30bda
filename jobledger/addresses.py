"""Validates broker addresses, and converts them to the one form that both Kafka clients understand. Looks up host
names; opens no connection to a broker."""

from __future__ import annotations

import re
import socket
import threading
import time
from functools import lru_cache

from jobledger.errors import ConfigError

SETTING = "JOBLEDGER_BOOTSTRAP (or --bootstrap)"
#: Seconds for which the result of a look-up of host names is kept: many errors need the same result.
KEPT_S = 30.0
#: Seconds to wait for a look-up. Look-ups are made for error messages, also on event loops and in a worker's threads. A
#: name service that is not available answers only after many seconds.
LOOK_UP_S = 2.0

_ADDRESS = re.compile(
    r"(?:(?P<scheme>[A-Za-z_0-9+.-]+)://)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,6})"
)


def normal(text: str, protocol: str) -> str:
    """Return the addresses as ``host:port[,host:port]``, without spaces and without the protocol prefix of Kafka's own
    listener settings.

    ``protocol``: the value of ``security.protocol``; a prefix must be equal to it. Raises `ConfigError` for an invalid
    address.
    """
    addresses = [_one(part.strip(), protocol) for part in text.split(",") if part.strip()]
    if not addresses:
        raise ConfigError(
            f"{SETTING} is {text!r}, which names no broker: write host:port[,host:port], or leave the setting "
            "unset for the embedded broker"
        )
    return ",".join(addresses)


def _one(text: str, protocol: str) -> str:
    matched = _ADDRESS.fullmatch(text)
    if matched is None:
        raise ConfigError(f"{SETTING}: {text!r} is not an address: {_wrong(text)}")
    scheme, host, port = matched.group("scheme", "host", "port")
    if scheme is not None and scheme.upper() != protocol.upper():
        raise ConfigError(
            f"{SETTING}: {text!r} begins with {scheme}://, but JOBLEDGER_KAFKA__SECURITY_PROTOCOL is {protocol}: write "
            "host:port, and set the protocol with that variable"
        )
    if not 1 <= int(port) <= 65_535:
        raise ConfigError(f"{SETTING}: {text!r} has the port {port}, but ports are 1 to 65535")
    return f"{host}:{port}"


def _wrong(text: str) -> str:
    bare = text.rpartition("://")[2]
    if re.search(r"\s", text):
        return "separate addresses with commas: host:port,host:port"
    if bare.count(":") > 1 and "[" not in bare:
        return "write an IPv6 address in brackets, for example [::1]:9092"
    if re.fullmatch(r"\[.*\]|[^:/]+:?", bare):
        return f"it has no port; write {bare.rstrip(':')}:9092 for Kafka's usual port"
    return "write host:port"


def unresolved(bootstrap: str) -> str | None:
    """Return the reason why none of the hosts can be resolved. Return None if a host can be resolved, or if the result
    is not known within `LOOK_UP_S` seconds."""
    if ":" not in bootstrap:
        return None  # words such as "the embedded broker", not an address
    return _unresolved(bootstrap, int(time.monotonic() // KEPT_S))


@lru_cache(maxsize=8)
def _unresolved(bootstrap: str, period: int) -> str | None:
    reasons: list[str | None] = []
    thread = threading.Thread(
        target=lambda: reasons.append(_looked_up(bootstrap)), name="jobledger-look-up", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # no thread can be started any more: the process is ending
        return None
    thread.join(LOOK_UP_S)
    return reasons[0] if reasons else None


def _looked_up(bootstrap: str) -> str | None:
    problems = []
    for each in bootstrap.split(","):
        host, _, port = each.strip().rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as exc:  # ValueError: a name that cannot be encoded for the look-up
            problems.append(f"host {host!r} cannot be resolved ({getattr(exc, 'strerror', None) or exc})")
        else:
            return None
    return ", ".join(problems)
