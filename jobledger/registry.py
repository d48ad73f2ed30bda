"""A client of a Confluent-compatible Schema Registry: registers our schema, and asks what an id stands for.

Knows HTTP and no Kafka. Every question is bounded; an answer that is no registry's is never taken for a "no".
"""

from __future__ import annotations

import json
import ssl
import time
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from jobledger.config import PREFIX
from jobledger.errors import ConfigError, NotAnEvent, RegistryUnavailable, SchemaError, SchemaRefused

SETTING = PREFIX + "SCHEMA_REGISTRY"
#: Seconds for all that one call of `Registry` asks, how often each question is asked, and seconds between.
TOTAL_S = 5.0
TRIES = 3
PAUSE_S = 0.5
#: Newer schemas read all that older ones wrote: what the log, kept for years, needs of its readers.
COMPATIBILITY = "BACKWARD_TRANSITIVE"

_MEDIA = "application/vnd.schemaregistry.v1+json"
_NO_SUBJECT, _NO_SCHEMA = 40401, 40403
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class Registry:
    """The registry at ``url``. Thread-safe. Raises `ConfigError` for a URL of another kind, or if httpx2 is missing."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            raise ConfigError(f"{SETTING} is no URL: it is to be http[s]://host[:port][/path]") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{SETTING} is to be http[s]://[user:password@]host[:port][/path]")
        try:
            import httpx2
        except ImportError:
            raise ConfigError(
                f"{SETTING} is set, but httpx2 is not installed: pip install 'jobledger[registry]'"
            ) from None
        self._httpx: Any = httpx2
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self._base = f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
        # Apart from the URL: that is logged, by httpx2 too.
        self._auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        self._tls: ssl.SSLContext | None = None
        #: The address as it may be shown.
        self.shown = self._base if self._auth is None else self._base.replace("://", f"://{parts.username}:***@", 1)

    def schema(self, schema_id: int, *, sure: bool = True) -> str | None:
        """The text of an Avro schema, or None if the registry says that there is no such id.

        ``sure``: a "no" is asked again; an instance that follows another may know an id a moment later. Raises
        `RegistryUnavailable`, `ConfigError`, `SchemaError` for a schema of another kind.
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
        """The id of a schema under a subject, registered if need be.

        A subject that there was not is set to `COMPATIBILITY`; what an operator set for one that there is stays. Raises
        `SchemaRefused`, `RegistryUnavailable`, `ConfigError`.
        """
        path, body, what = f"/subjects/{quote(subject, safe='')}", {"schema": text}, f"registering {subject}"
        until = time.monotonic() + TOTAL_S
        # Asked first: so a process that may only read can start, once the schema is there.
        status, answer = self._ask("POST", path, what, until, body)
        if status == 200:
            return self._id(status, answer)
        code = answer.get("error_code")
        if code not in (_NO_SUBJECT, _NO_SCHEMA):
            raise self._not_a_registry(status, answer)
        # Before the first version, so that there is none without it. Some registries want the subject first.
        unset = code == _NO_SUBJECT and not self._restrict(subject, what, until)
        status, answer = self._ask("POST", path + "/versions", what, until, body)
        if status in (409, 422):
            raise SchemaRefused(
                f"the schema registry {self.shown} refuses this version's schema for {subject}: {_said(answer)}. "
                "Compare the subject's versions and its compatibility with schemas/released/; nothing was sent"
            )
        if unset and status == 200 and not self._restrict(subject, what, until):
            raise self._not_a_registry(status, answer)
        return self._id(status, answer)

    def _restrict(self, subject: str, what: str, until: float) -> bool:
        path = f"/config/{quote(subject, safe='')}"
        return self._ask("PUT", path, what, until, {"compatibility": COMPATIBILITY})[0] == 200

    def _id(self, status: int, answer: dict[str, Any]) -> int:
        found = answer.get("id")
        if status != 200 or not isinstance(found, int):
            raise self._not_a_registry(status, answer)
        return found

    def _text(self, schema_id: int, answer: dict[str, Any]) -> str:
        if answer.get("schemaType", "AVRO") != "AVRO":
            raise NotAnEvent(f"schema id {schema_id} is of the kind {answer['schemaType']}, which no event is")
        if answer.get("references"):
            raise SchemaError(f"schema id {schema_id} refers to other schemas: register it whole")
        text = answer.get("schema")
        if not isinstance(text, str):
            raise self._not_a_registry(200, answer)
        return text

    def _ask(self, method: str, path: str, what: str, until: float, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Status and body; asked again while the registry is away or busy, until ``until`` (monotonic clock)."""
        problem = "no answer in time"
        for asked in range(1, TRIES + 1):
            try:
                status, content = self._answer(method, path, until, body)
            except self._httpx.TransportError as exc:
                problem = f"{type(exc).__name__}: {exc}"
            else:
                if status not in _BUSY:
                    return self._read(status, content)
                problem = f"HTTP status {status}"
            if asked == TRIES or time.monotonic() + PAUSE_S >= until:
                break
            time.sleep(PAUSE_S)
        raise RegistryUnavailable(
            f"{what}: the schema registry {self.shown} did not answer within {TOTAL_S:g} s ({problem}; asked {asked} "
            f"times); check {SETTING} and that the registry runs"
        )

    def _answer(self, method: str, path: str, until: float, body: Any) -> tuple[int, bytes]:
        """Status and content, by ``until``: also of a registry that takes the question and gives its answer in drops."""
        left = max(0.001, until - time.monotonic())
        content = b""
        # A client for each question: they are few, and nothing has to be closed or survives a fork.
        with (
            self._httpx.Client(auth=self._auth, timeout=left, verify=self._context()) as client,
            client.stream(method, self._base + path, json=body, headers={"Content-Type": _MEDIA}) as response,
        ):
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() >= until:
                    raise self._httpx.ReadTimeout("the answer was not complete in time")
        return response.status_code, content

    def _read(self, status: int, content: bytes) -> tuple[int, dict[str, Any]]:
        if status in (401, 403):
            raise ConfigError(f"the schema registry {self.shown} refuses us (HTTP status {status}): check {SETTING}")
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._not_a_registry(status, {})
        return status, answer

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            # The platform's certificates, or SSL_CERT_FILE's; reading them takes a while and plain HTTP needs none.
            plain = self._base.startswith("http:")
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else ssl.create_default_context()
        return self._tls

    def _not_a_registry(self, status: int, answer: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self.shown} does not answer as a schema registry does (HTTP status {status}: {_said(answer)}); "
            f"check {SETTING}, its path too"
        )


def _said(answer: dict[str, Any]) -> str:
    return str(answer.get("message") or answer.get("title") or "no message")[:500]
