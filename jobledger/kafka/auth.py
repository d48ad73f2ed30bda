"""Finds out whether a cluster refuses a login or a right, or is only unavailable, and explains the cause to the user.

Kafka's clients retry a login forever, even if the login can never succeed. An `AuthMonitor` receives the errors that a
client reports about its connections. `check_connection` checks the login once.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from jobledger import addresses
from jobledger.config import TOKEN_ENDPOINT, Settings
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, NotAuthenticated, NotAuthorized
from jobledger.kafka import cluster, tls
from jobledger.kafka.outage import outage_of
from jobledger.process import forks, greenlets
from jobledger.process.logger import get_logger

LOG = get_logger("jobledger.kafka")

#: A starting cluster may refuse a login for a moment, so a refusal counts only if it is repeated after this many
#: seconds or more.
AGAIN_S = 0.4
#: Seconds for which the same message about connections is not logged again.
SAY_EVERY_S = 30.0
CONNECTION_TIMEOUT_S = 10.0
#: Timeout in seconds of the connection that shows whether the token endpoint can be reached.
ENDPOINT_S = 2.0
#: For this many seconds after a client could not connect, a topic that the client reports as unknown may still exist.
AWAY_S = 10.0

_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "cluster",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional-id",
}
_REFUSED = (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED)

#: Errors of lost or failed connections, which may be an outage.
_LOST = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)

_URLS = frozenset({TOKEN_ENDPOINT})
#: Settings whose values an error may show: the mechanism, the user, the paths of files. Any other setting may be a
#: secret. The secret settings are not listed instead, because new librdkafka versions may add more.
SHOWN = _URLS | {
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "sasl.kerberos.principal",
    "sasl.kerberos.service.name",
    "sasl.kerberos.keytab",
    "sasl.oauthbearer.method",
    "sasl.oauthbearer.client.id",
    "sasl.oauthbearer.scope",
    "sasl.oauthbearer.grant.type",
    "sasl.oauthbearer.assertion.file",
    "sasl.oauthbearer.assertion.private.key.file",
}


class Need(NamedTuple):
    """A right that an operation needs: ``Write`` on ``topic`` ``shop.lifecycle``."""

    operation: str
    kind: str
    name: str


def read(topic: str) -> Need:
    """Return the right to read a topic."""
    return Need("Read", "topic", topic)


def write(topic: str) -> Need:
    """Return the right to write to a topic."""
    return Need("Write", "topic", topic)


def join(group: str) -> Need:
    """Return the right to be a member of a group and to commit its offsets."""
    return Need("Read", "group", group)


def denied(error: KafkaError, settings: Settings, what: str, *needs: Need) -> AccessDenied | None:
    """Return Jobledger's error if Kafka's error means that this user's login or operation is refused; else None.

    ``what``: the operation, as text. ``needs``: the rights that the operation needs. The message names those of the
    kind of resource in Kafka's error.
    """
    code = error.code()
    if code in _REFUSED:
        return refusal(settings, error.str())
    kind = _DENIED.get(code)
    if code == KafkaError._FATAL:  # the consumer left its group permanently: only the text has the reason
        kind = next((kind for kind in _DENIED.values() if f"{kind} authorization failed" in error.str().lower()), None)
    return None if kind is None else unauthorized(settings, what, kind, *needs)


def unauthorized(settings: Settings, what: str, kind: str, *needs: Need) -> NotAuthorized:
    """Return the error for missing rights on a ``kind`` of resource.

    The message names all rights of this kind in ``needs``. The error's attributes describe the first of them.
    """
    lacking = [n for n in needs if n.kind == kind] or [Need("a right", kind, "")]
    need = lacking[0]
    shown = ", ".join(f"{n.operation} on {kind} {n.name}".rstrip() for n in lacking)
    user = f"user {name!r}" if (name := settings.kafka.get("sasl.username")) else "this user"
    return NotAuthorized(
        f"{what}: the cluster does not let {user} do this: the {settings.role} needs {shown}; "
        "`jobledger topics acls MODULE:APP` prints the rights of each role",
        role=settings.role,
        operation=need.operation,
        resource_type=kind,
        resource=need.name,
    )


def refusal(settings: Settings, message: str) -> NotAuthenticated:
    """Return the error for a client whose login is refused.

    ``message``: the message of the client or the broker. Unless this message is about SASL, the function connects to
    the brokers to check their TLS.
    """
    address = settings.bootstrap or "the embedded broker"
    kafka = settings.kafka
    problem = None
    if "SASL" not in message:  # a client that is asked for a password has passed TLS
        try:
            problem = tls.trouble(settings.resolve_bootstrap(), kafka)
        except (ConfigError, BrokerUnavailable) as exc:
            problem = f"{address}: {exc}"
    if problem is not None:
        return NotAuthenticated(problem)
    reason = re.sub(r"\s*\((after|install).*", "", message.rpartition("bootstrap: ")[2])
    sasl_settings = [name for name in sorted(kafka) if name.startswith("sasl.")]
    if not sasl_settings:
        return NotAuthenticated(f"{address} refuses this client's login: {reason}; check JOBLEDGER_KAFKA__*")
    shown = ", ".join(_shown(name, kafka[name]) for name in sasl_settings if name in SHOWN)
    return NotAuthenticated(
        f"{address} refuses this client's login: {reason}; check {shown or 'JOBLEDGER_KAFKA__SASL_*'}, and the "
        "password, "
        "secret or key that belongs to it"
    )


def _shown(name: str, value: str) -> str:
    if name in _URLS:  # a URL may contain a user and a password, or a key in its query
        value = re.sub(r"//.*@", "//", value).partition("?")[0]
    return f"{tls.setting(name)}={value}"


def _may_be_logged(record: logging.LogRecord) -> bool:
    """Return False for messages of librdkafka that must not be logged.

    These are the messages about failed connections, which are logged less often through `AuthMonitor`, and those about
    the missing producer id of a cluster that has just started.
    """
    text = record.getMessage()
    return not (text.startswith("FAIL [") or (text.startswith("GETPID [") and text.endswith("retrying")))


LOG.addFilter(_may_be_logged)


class AuthMonitor:
    """The ``error_cb`` of a client: notices that the cluster refuses the login. Thread-safe.

    ``patient`` False: if the client cannot obtain a token, the login counts as refused at once, unless the token
    endpoint cannot be reached. ``patient`` True is for a running client, which may still have a valid token.
    """

    def __init__(self, settings: Settings, *, patient: bool = True) -> None:
        self._settings, self._patient = settings, patient
        self._lock = greenlets.native_lock()
        self._first_refused_at: float | None = None
        self._no_token = ""
        self._tls_checked_at = float("-inf")
        self._logged_at: dict[str, float] = {}
        self._refusal: NotAuthenticated | None = None
        self._no_endpoint: BrokerUnavailable | None = None
        self._unreachable_at = float("-inf")

    @property
    def refusal(self) -> NotAuthenticated | None:
        """The error of this client's refused login; None if the login is not refused, or the cluster is unavailable."""
        return self._refusal

    def behind(self, error: KafkaError) -> NotAuthenticated | BrokerUnavailable | None:
        """Return the cause of a client's error: a refused login or an unavailable broker; None for any other cause.

        A client reports only once that it has no token, and may obtain one later. So a missing token counts as a
        refusal only if a message has timed out. A client that could never connect reports an existing topic as unknown.
        So an unknown topic counts as an unavailable broker if the client failed to connect in the last `AWAY_S`
        seconds.
        """
        if error.code() == KafkaError._UNKNOWN_TOPIC and time.monotonic() - self._unreachable_at < AWAY_S:
            return BrokerUnavailable(away(self._settings, "cannot be reached"))
        if self._refusal is None and self._no_token and error.code() == KafkaError._MSG_TIMED_OUT:
            return refusal(self._settings, self._no_token)
        return self._refusal

    def check(self) -> None:
        """Raise `NotAuthenticated` if the cluster refuses this client's login, and, unless ``patient``,
        `BrokerUnavailable` if the token endpoint cannot be reached."""
        if self._refusal is not None:
            raise self._refusal
        if self._no_endpoint is not None:
            raise self._no_endpoint

    def __call__(self, error: KafkaError) -> None:
        now, text = time.monotonic(), error.str()
        with self._lock:
            if self._refusal is not None:
                return
            if error.code() in _REFUSED or _refused_in_words(error):
                if "OAUTHBEARER token" in text:
                    self._no_token = text
                    if not self._patient:
                        self._no_endpoint = _unreachable_endpoint(self._settings)
                        if self._no_endpoint is None:
                            self._refusal = refusal(self._settings, text)
                elif self._first_refused_at is None:
                    self._first_refused_at = now
                elif now - self._first_refused_at >= AGAIN_S:
                    self._refusal = refusal(self._settings, text)
            elif error.code() in _LOST:
                if error.code() == KafkaError._ALL_BROKERS_DOWN:
                    self._unreachable_at = now
                    self._check_tls(now)
                elif error.code() == KafkaError._TRANSPORT and "Connect to" in text:
                    self._unreachable_at = now
                    self._first_refused_at = (
                        None  # the broker is unavailable or starting, so earlier refusals do not count
                    )
                if self._patient and self._refusal is None:
                    outage_of(self._settings).heard(text, self)
                return
            template = re.sub(r"\(.*|\d+ms", "", text)
            if now - self._logged_at.get(template, float("-inf")) < SAY_EVERY_S:
                return
            self._logged_at[template] = now
        LOG.warning("%s", text)

    def _check_tls(self, now: float) -> None:
        """Check the broker's TLS: a broker that uses TLS closes a plain connection without an error message."""
        plain = self._settings.kafka.get("security.protocol", "PLAINTEXT").upper() in ("PLAINTEXT", "SASL_PLAINTEXT")
        if not plain or now - self._tls_checked_at < SAY_EVERY_S:
            return
        self._tls_checked_at = now
        try:
            problem = tls.trouble(self._settings.resolve_bootstrap(), self._settings.kafka, 1.0)
        except (ConfigError, BrokerUnavailable):
            return
        if problem is not None:
            self._refusal = NotAuthenticated(problem)


def _unreachable_endpoint(settings: Settings) -> BrokerUnavailable | None:
    """Return the error for a token endpoint to which no connection can be opened; None for any other endpoint."""
    url = settings.kafka.get(TOKEN_ENDPOINT, "")
    with suppress(ValueError):  # not a valid URL
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if not parts.hostname:
            return None
        try:
            socket.create_connection((parts.hostname, port), ENDPOINT_S).close()
        except OSError as exc:
            shown = _shown(TOKEN_ENDPOINT, url)
            return BrokerUnavailable(f"the token endpoint cannot be reached ({exc}); check {shown} and that it runs")
    return None


def _refused_in_words(error: KafkaError) -> bool:
    # librdkafka reports a broker's TLS alert about this client's certificate as a broken connection.
    text = error.str()
    return error.code() == KafkaError._TRANSPORT and ("SSL alert" in text or "PLAINTEXT broker listener" in text)


def check_connection(settings: Settings, timeout: float = CONNECTION_TIMEOUT_S) -> None:
    """Return once the cluster has accepted this client's login.

    Raises `NotAuthenticated` as soon as it is certain that the login is refused, `BrokerUnavailable` if no broker has
    answered within ``timeout`` seconds, and `ConfigError` for settings that cannot be used.
    """
    monitor = AuthMonitor(settings, patient=False)
    conf: dict[str, Any] = {**settings.librdkafka(), "error_cb": monitor, "logger": LOG, "log_level": 0}
    try:
        client = forks.client(AdminClient, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc
    if cluster.answers(client, timeout, monitor.check):
        return
    problem = tls.trouble(settings.resolve_bootstrap(), settings.kafka)
    if problem is not None:
        raise NotAuthenticated(problem)
    raise BrokerUnavailable(away(settings, f"did not answer within {timeout:g} s"))


def away(settings: Settings, problem: str) -> str:
    """Return the message for an unavailable broker.

    The message says that the name of the broker's host cannot be resolved, if this is the case, and otherwise
    ``problem``.
    """
    if settings.bootstrap is None:
        return f"the embedded broker {problem}; check that it runs: `jobledger kafka status`"
    unresolved = addresses.unresolved(settings.bootstrap)
    if unresolved is not None:
        return f"{settings.bootstrap}: {unresolved}; check JOBLEDGER_BOOTSTRAP and the name service"
    return f"{settings.bootstrap} {problem}; check JOBLEDGER_BOOTSTRAP and that the broker runs"


def unusable(error: KafkaException) -> ConfigError:
    """Return the error for settings with which no client can be created."""
    text = re.sub(r"^Failed to create \w+( \w+)?: ", "", error.args[0].str())
    return ConfigError(f"the Kafka settings (JOBLEDGER_KAFKA__*) cannot be used: {text}")
