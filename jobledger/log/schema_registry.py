"""A client of a Confluent-compatible Schema Registry: registers Jobledger's schema, and looks up the schema of an id.

This module uses HTTP and does not depend on Kafka. Every request has a time limit. An answer that does not come from a
schema registry is never treated as "not found".
"""

from __future__ import annotations

import json
import ssl
import time
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from jobledger.config import PREFIX
from jobledger.errors import ConfigError, NotAnEvent, RegistryUnavailable, SchemaError, SchemaRefused
from jobledger.process.wording import counted

SETTING = PREFIX + "SCHEMA_REGISTRY"
#: Seconds for all requests of one call of `SchemaRegistry`, attempts for each request, and seconds between attempts.
TOTAL_S = 5.0
TRIES = 3
PAUSE_S = 0.5
#: A newer schema must be able to read everything that older schemas wrote, because the log is kept for years.
COMPATIBILITY = "BACKWARD_TRANSITIVE"

_MEDIA = "application/vnd.schemaregistry.v1+json"
_NO_SUBJECT, _NO_SCHEMA = 40401, 40403
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class SchemaRegistry:
    """The registry at ``url``. Thread-safe. Raises `ConfigError` for a URL that cannot be used, or if httpx2 is not
    installed."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            raise ConfigError(f"{SETTING} is not a URL: write http[s]://host[:port][/path]") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{SETTING} is not of the form http[s]://[user:password@]host[:port][/path]")
        try:
            import httpx2
        except ImportError:
            raise ConfigError(
                f"{SETTING} is set, but httpx2 is not installed: pip install 'jobledger[registry]'"
            ) from None
        self._httpx: Any = httpx2
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._base = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
        # The password is not part of the URL, because the URL is logged, also by httpx2.
        self._auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        self._tls: ssl.SSLContext | None = None
        #: The address without the password, for messages.
        self.shown = self._base if self._auth is None else self._base.replace("://", f"://{parts.username}:***@", 1)

    def schema(self, schema_id: int, *, sure: bool = True) -> str | None:
        """Return the text of an Avro schema, or None if the registry does not have this id.

        ``sure``: ask again after "not found", because a replica of the registry may learn an id a moment later. Raises
        `RegistryUnavailable`, `ConfigError`, and `SchemaError` for a schema that is not a self-contained Avro schema.
        """
        until = time.monotonic() + TOTAL_S
        for last in (False,) * (TRIES - 1) + (True,) if sure else (True,):
            status, answer = self._ask("GET", f"/schemas/ids/{schema_id}", f"asking for schema {schema_id}", until)
            if status == 200:
                return self._text(schema_id, answer)
            if answer.get("error_code") != _NO_SCHEMA:
                raise self._not_a_registry(status, answer)
            if not last:
                time.sleep(PAUSE_S)
        return None

    def register(self, subject: str, text: str) -> int:
        """Register a schema under a subject, unless it is registered already, and return its id.

        A new subject gets the compatibility level `COMPATIBILITY`; the level of an existing subject is not changed.
        Raises `SchemaRefused`, `RegistryUnavailable`, `ConfigError`.
        """
        path, body, what = f"/subjects/{quote(subject, safe='')}", {"schema": text}, f"registering {subject}"
        until = time.monotonic() + TOTAL_S
        # Look the schema up first, so that a process with read access only can start once the schema is registered.
        status, answer = self._ask("POST", path, what, until, body)
        if status == 200:
            return self._id(status, answer)
        code = answer.get("error_code")
        if code not in (_NO_SUBJECT, _NO_SCHEMA):
            raise self._not_a_registry(status, answer)
        # Before the first version, so that no version exists without the level. Some registries need the subject first.
        unset = code == _NO_SUBJECT and not self._restrict(subject, what, until)
        status, answer = self._ask("POST", path + "/versions", what, until, body)
        if status in (409, 422):
            raise SchemaRefused(
                f"the schema registry {self.shown} refuses this version's schema for {subject}: {_message_of(answer)}. "
                "Compare the subject's versions and its compatibility with schemas/released/; nothing was sent"
            )
        if unset and status == 200 and not self._restrict(subject, what, until):
            raise self._not_a_registry(status, answer)
        return self._id(status, answer)

    def _restrict(self, subject: str, what: str, until: float) -> bool:
        path = f"/config/{quote(subject, safe='')}"
        return self._ask("PUT", path, what, until, {"compatibility": COMPATIBILITY})[0] == 200

    def _id(self, status: int, answer: dict[str, Any]) -> int:
        schema_id = answer.get("id")
        if status != 200 or not isinstance(schema_id, int):
            raise self._not_a_registry(status, answer)
        return schema_id

    def _text(self, schema_id: int, answer: dict[str, Any]) -> str:
        if answer.get("schemaType", "AVRO") != "AVRO":
            raise NotAnEvent(f"schema id {schema_id} is of the type {answer['schemaType']}, but events use Avro")
        if answer.get("references"):
            raise SchemaError(f"schema id {schema_id} refers to other schemas: register it without references")
        text = answer.get("schema")
        if not isinstance(text, str):
            raise self._not_a_registry(200, answer)
        return text

    def _ask(self, method: str, path: str, what: str, until: float, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Return status and body of one request. The request is repeated while the registry is unavailable or busy,
        until ``until`` (monotonic clock)."""
        problem = "no answer in time"
        for attempt in range(1, TRIES + 1):
            try:
                status, content = self._answer(method, path, until, body)
            except self._httpx.TransportError as exc:
                problem = f"{type(exc).__name__}: {exc}"
            else:
                if status not in _BUSY:
                    return self._read(status, content)
                problem = f"HTTP status {status}"
            if attempt == TRIES or time.monotonic() + PAUSE_S >= until:
                break
            time.sleep(PAUSE_S)
        raise RegistryUnavailable(
            f"{what}: the schema registry {self.shown} could not be reached or was busy ({problem}; asked "
            f"{counted(attempt, 'time')}, for at most {TOTAL_S:g} s); check {SETTING} and that the registry runs"
        )

    def _answer(self, method: str, path: str, until: float, body: Any) -> tuple[int, bytes]:
        """Return status and content of one answer. The answer must be complete before ``until`` (monotonic clock), even
        if the registry sends it slowly."""
        remaining = max(0.001, until - time.monotonic())
        content = b""
        # A new HTTP client for each request: requests are few, and no client must be closed later or exists in a fork.
        with (
            self._httpx.Client(auth=self._auth, timeout=remaining, verify=self._context()) as client,
            client.stream(method, self._base + path, json=body, headers={"Content-Type": _MEDIA}) as response,
        ):
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() >= until:
                    raise self._httpx.ReadTimeout("the answer was not complete in time")
        return response.status_code, content

    def _read(self, status: int, content: bytes) -> tuple[int, dict[str, Any]]:
        if status in (401, 403):
            raise ConfigError(
                f"the schema registry {self.shown} refuses this client (HTTP status {status}): check {SETTING}"
            )
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._not_a_registry(status, {})
        return status, answer

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            # The platform's certificates, or SSL_CERT_FILE's. Reading them takes time, and plain HTTP needs none.
            plain = self._base.startswith("http:")
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else ssl.create_default_context()
        return self._tls

    def _not_a_registry(self, status: int, answer: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self.shown} does not answer as a schema registry does (HTTP status {status}: {_message_of(answer)}); "
            f"check {SETTING}, including its path"
        )


def _message_of(answer: dict[str, Any]) -> str:
    return str(answer.get("message") or answer.get("title") or "no message")[:500]


def id_key(schema_id: int) -> str:
    """Return the key on ``<ns>.schemas`` of the schema that has this id in a registry."""
    return f"id-{schema_id}"
