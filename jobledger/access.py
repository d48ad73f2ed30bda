"""Who may come in and do what: a cluster's refusals, told apart from a cluster that is away, and put into words.

Kafka's clients try for ever to come in, also where they never will be let in. A `Door` listens to what a client says of
its connections; `knock` asks once.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from jobledger import addresses, forks, greenlets, tls
from jobledger.config import TOKEN_ENDPOINT, Settings
from jobledger.errors import AccessDenied, BrokerUnavailable, ConfigError, NotAuthenticated, NotAuthorized
from jobledger.logger import get_logger
from jobledger.outage import outage_of

LOG = get_logger("jobledger.kafka")

#: A cluster that starts may refuse for a moment: so it must have done so twice, this many seconds apart.
AGAIN_S = 0.4
#: Seconds for which the same line about connections is not said again.
SAY_EVERY_S = 30.0
KNOCK_S = 10.0
#: For so many seconds after no broker could be reached, a topic that a client does not know may well be there.
AWAY_S = 10.0

_DENIED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "cluster",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional-id",
}
_REFUSED = (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED)

#: A connection is lost, or cannot be made: told as an outage, if it is one.
_LOST = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)

_URLS = frozenset({TOKEN_ENDPOINT})
#: Settings whose values an error may show: those that say in which way and as whom, and where files lie. Any other one
#: may hold a secret; librdkafka gets new ones, so those are not what is listed.
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
    """A right that is needed for something: ``Write`` on ``topic`` ``shop.lifecycle``."""

    operation: str
    kind: str
    name: str


def read(topic: str) -> Need:
    """The right to read a topic."""
    return Need("Read", "topic", topic)


def write(topic: str) -> Need:
    """The right to write to a topic."""
    return Need("Write", "topic", topic)


def join(group: str) -> Need:
    """The right to be a member of a group, and to commit for it."""
    return Need("Read", "group", group)


def denied(error: KafkaError, settings: Settings, what: str, *needs: Need) -> AccessDenied | None:
    """Our error if Kafka's says that this user may not come in, or may not do this; else None.

    ``needs``: the rights that ``what`` takes; the first of the kind that Kafka speaks of is named.
    """
    code = error.code()
    if code in _REFUSED:
        return refusal(settings, error.str())
    kind = _DENIED.get(code)
    if code == KafkaError._FATAL:  # a group that is left for good: its reason is told in words only
        kind = next((kind for kind in _DENIED.values() if f"{kind} authorization failed" in error.str().lower()), None)
    return None if kind is None else unauthorized(settings, what, kind, *needs)


def unauthorized(settings: Settings, what: str, kind: str, *needs: Need) -> NotAuthorized:
    """The error for rights on a ``kind`` of resource that are lacking; its attributes are the first one's."""
    lacking = [n for n in needs if n.kind == kind] or [Need("a right", kind, "")]
    need = lacking[0]
    shown = ", ".join(f"{n.operation} on {kind} {n.name}".rstrip() for n in lacking)
    user = f"user {name!r}" if (name := settings.kafka.get("sasl.username")) else "this user"
    return NotAuthorized(
        f"{what}: the cluster does not let {user} do this: the {settings.role} needs {shown}; "
        "`jobledger topics acls MODULE:APP` prints the rights of each part",
        role=settings.role,
        operation=need.operation,
        resource_type=kind,
        resource=need.name,
    )


def refusal(settings: Settings, said: str) -> NotAuthenticated:
    """The error for a client that is not let in; ``said``: the client's or broker's own
    words. Looks at the brokers' TLS."""
    address = settings.bootstrap or "the embedded broker"
    kafka = settings.kafka
    found = None
    if "SASL" not in said:  # whoever is asked for a password has got through TLS
        try:
            found = tls.trouble(settings.resolve_bootstrap(), kafka)
        except (ConfigError, BrokerUnavailable) as exc:
            found = f"{address}: {exc}"
    if found is not None:
        return NotAuthenticated(found)
    words = re.sub(r"\s*\((after|install).*", "", said.rpartition("bootstrap: ")[2])
    ways = [name for name in sorted(kafka) if name.startswith("sasl.")]
    if not ways:
        return NotAuthenticated(f"{address} does not let this client in: {words}; check JOBLEDGER_KAFKA__*")
    shown = ", ".join(_shown(name, kafka[name]) for name in ways if name in SHOWN)
    return NotAuthenticated(
        f"{address} does not let this client in: {words}; check {shown or 'JOBLEDGER_KAFKA__SASL_*'}, and the password, "
        "secret or key beside it"
    )


def _shown(name: str, value: str) -> str:
    if name in _URLS:  # it might carry a user and a password, or a key in its query
        value = re.sub(r"//.*@", "//", value).partition("?")[0]
    return f"{tls.setting(name)}={value}"


def _told_by_door(record: logging.LogRecord) -> bool:
    """A connection that fails is told by every `Door`, once in a while; librdkafka would say so at each attempt. A cluster
    that has just started has no id for a producer yet, and gives it one a moment later."""
    text = record.getMessage()
    return not (text.startswith("FAIL [") or (text.startswith("GETPID [") and text.endswith("retrying")))


LOG.addFilter(_told_by_door)


class Door:
    """Given to a client as its ``error_cb``: hears of refused connections. Thread-safe.

    ``patient`` False: a token that is not given is a refusal at once, where a running
    client has one that may still be good.
    """

    def __init__(self, settings: Settings, *, patient: bool = True) -> None:
        self._settings, self._patient = settings, patient
        self._lock = greenlets.native_lock()
        self._first: float | None = None
        self._no_token = ""
        self._looked = float("-inf")
        self._said: dict[str, float] = {}
        self._refusal: NotAuthenticated | None = None
        self._away_at = float("-inf")

    @property
    def refusal(self) -> NotAuthenticated | None:
        """Why this client is not let in; None as long as it may be, or is away."""
        return self._refusal

    def behind(self, error: KafkaError) -> NotAuthenticated | BrokerUnavailable | None:
        """What is behind an error of the client's: a refusal, or that no broker is there; None if nothing is. A client
        says once that it has got no token, and might get one yet: that counts when something has timed out over it. And
        one that never got to ask for a topic says that there is none."""
        if error.code() == KafkaError._UNKNOWN_TOPIC and time.monotonic() - self._away_at < AWAY_S:
            return BrokerUnavailable(away(self._settings, "cannot be reached"))
        if self._refusal is None and self._no_token and error.code() == KafkaError._MSG_TIMED_OUT:
            return refusal(self._settings, self._no_token)
        return self._refusal

    def check(self) -> None:
        """Raise `NotAuthenticated` if the cluster does not let this client in."""
        if self._refusal is not None:
            raise self._refusal

    def __call__(self, error: KafkaError) -> None:
        now, text = time.monotonic(), error.str()
        with self._lock:
            if self._refusal is not None:
                return
            if error.code() in _REFUSED or _refused_in_words(error):
                if "OAUTHBEARER token" in text:
                    self._no_token = text
                    if not self._patient:
                        self._refusal = refusal(self._settings, text)
                elif self._first is None:
                    self._first = now
                elif now - self._first >= AGAIN_S:
                    self._refusal = refusal(self._settings, text)
            elif error.code() in _LOST:
                if error.code() == KafkaError._ALL_BROKERS_DOWN:
                    self._away_at = now
                    self._look(now)
                elif error.code() == KafkaError._TRANSPORT and "Connect to" in text:
                    self._away_at = now
                    self._first = None  # a broker that is away, or comes up: what it refused before says nothing
                if self._patient and self._refusal is None:
                    outage_of(self._settings).heard(text, self)
                return
            said = re.sub(r"\(.*|\d+ms", "", text)
            if now - self._said.get(said, float("-inf")) < SAY_EVERY_S:
                return
            self._said[said] = now
        LOG.warning("%s", text)

    def _look(self, now: float) -> None:
        """A broker that speaks TLS hangs up on a client that does not, without a word: so ask it."""
        plain = self._settings.kafka.get("security.protocol", "PLAINTEXT").upper() in ("PLAINTEXT", "SASL_PLAINTEXT")
        if not plain or now - self._looked < SAY_EVERY_S:
            return
        self._looked = now
        try:
            found = tls.trouble(self._settings.resolve_bootstrap(), self._settings.kafka, 1.0)
        except (ConfigError, BrokerUnavailable):
            return
        if found is not None:
            self._refusal = NotAuthenticated(found)


def _refused_in_words(error: KafkaError) -> bool:
    # A broker's alert on our certificate arrives as a broken connection.
    text = error.str()
    return error.code() == KafkaError._TRANSPORT and ("SSL alert" in text or "PLAINTEXT broker listener" in text)


def knock(settings: Settings, timeout: float = KNOCK_S) -> None:
    """Return once the cluster has let this client in. Raises `NotAuthenticated` as soon as it is plain that it will
    not; `BrokerUnavailable` if nobody has answered within ``timeout`` seconds; `ConfigError` for unusable settings."""
    door = Door(settings, patient=False)
    conf: dict[str, Any] = {**settings.librdkafka(), "error_cb": door, "logger": LOG, "log_level": 0}
    try:
        client = forks.client(AdminClient, conf)
    except KafkaException as exc:
        raise unusable(exc) from exc
    asked = client.describe_cluster(request_timeout=timeout)
    deadline = time.monotonic() + timeout
    while not greenlets.finished(asked) and time.monotonic() < deadline:
        client.poll(0.02)
        door.check()
    with suppress(KafkaException, TimeoutError):
        greenlets.outcome(asked, 0.0)
        return
    found = tls.trouble(settings.resolve_bootstrap(), settings.kafka)
    if found is not None:
        raise NotAuthenticated(found)
    raise BrokerUnavailable(away(settings, f"did not answer within {timeout:g} s"))


def away(settings: Settings, said: str) -> str:
    """What to say of a broker that is away: that its host has no address, if that is so; else that it ``said``."""
    if settings.bootstrap is None:
        return f"the embedded broker {said}; check that it runs: `jobledger kafka status`"
    found = addresses.unresolved(settings.bootstrap)
    if found is not None:
        return f"{settings.bootstrap}: {found}; check JOBLEDGER_BOOTSTRAP and the name service"
    return f"{settings.bootstrap} {said}; check JOBLEDGER_BOOTSTRAP and that the broker runs"


def unusable(error: KafkaException) -> ConfigError:
    """The error for client settings that no client can be made with."""
    text = re.sub(r"^Failed to create \w+( \w+)?: ", "", error.args[0].str())
    return ConfigError(f"the Kafka settings (JOBLEDGER_KAFKA__*) cannot be used: {text}")
