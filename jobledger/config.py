"""Settings: one frozen object, read from ``JOBLEDGER_*``; and the one place that resolves which broker is meant.

Security settings are written once, with librdkafka's names (``JOBLEDGER_KAFKA__SECURITY_PROTOCOL=SASL_SSL``,
``JOBLEDGER_KAFKA__SASL_USERNAME=…``), and are translated here for both clients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import platformdirs

from jobledger.errors import BrokerUnavailable, ConfigError

PREFIX = "JOBLEDGER_"
KAFKA_PREFIX = "JOBLEDGER_KAFKA__"

#: Environment variables that are read, beside ``JOBLEDGER_KAFKA__*``.
KNOWN = (
    "BOOTSTRAP",
    "SCHEMA_REGISTRY",
    "STATUS_URL",
    "SUBMIT_TIMEOUT",
    "MAX_RECORD_BYTES",
    "RETENTION_DAYS",
    "HOME",
    "LOG_LEVEL",
    "TEST_KAFKA_IMAGE",
    "TEST_POSTGRES",
    "TEST_PROMETHEUS",
    "TEST_REGISTRY",
)

#: A broker that stands still answers nothing and closes nothing. So that its partitions' new leaders are
#: found in seconds, as measured: 8 s, against 22 s to 30 s with the client's own defaults of one and five
#: minutes. New partitions, too.
PATIENCE: Mapping[str, int] = {"socket.timeout.ms": 10_000, "topic.metadata.refresh.interval.ms": 5_000}

DEFAULT_MAX_RECORD_BYTES = 1_000_000  # the broker's message.max.bytes default is 1,048,588 with the batch overhead
DEFAULT_SUBMIT_TIMEOUT_S = 30.0
DEFAULT_RETENTION_DAYS = 90.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How this process reaches Kafka and the status database.

    ``bootstrap``: ``host:port[,host:port]`` or None for the embedded broker if it runs. ``status_url``:
    ``sqlite:///path`` or ``postgresql://user:password@host/database``; None means one SQLite file per namespace under
    the user's data folder. Not shown where settings are: it may hold a password. ``submit_timeout``: seconds a
    submission may wait for its acknowledgement before `BrokerUnavailable`. ``max_record_bytes``: largest encoded record
    that is sent; larger ones raise `PayloadTooLarge`. ``retention_days``: how long the log keeps what happened to jobs
    that have ended; the stream processor deletes what is older. ``kafka``: extra client settings with librdkafka's
    names, e.g. ``{"security.protocol": "SSL"}``. Not shown where settings are: they may hold passwords and keys.
    ``home``: folder of the embedded broker's data, jars and pid file. ``schema_registry``: URL of a
    Confluent-compatible Schema Registry, ``http[s]://[user:password@]host[:port][/path]``, or None for events that need
    none. Not shown where settings are: it may hold a password. ``role``: which part of Jobledger this process is, for
    errors and for the broker's logs (the client id).
    """

    bootstrap: str | None = None
    status_url: str | None = field(default=None, repr=False)
    submit_timeout: float = DEFAULT_SUBMIT_TIMEOUT_S
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    retention_days: float = DEFAULT_RETENTION_DAYS
    kafka: Mapping[str, str] = field(default_factory=dict, repr=False)
    home: Path = field(default_factory=lambda: default_home())
    schema_registry: str | None = field(default=None, repr=False)
    role: str = "client"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read ``JOBLEDGER_*``. A name or value that means nothing raises `ConfigError`: a typo must not be silent."""
        env = os.environ if environ is None else environ
        kafka: dict[str, str] = {}
        for name, value in env.items():
            if name.startswith(KAFKA_PREFIX):
                kafka[name[len(KAFKA_PREFIX) :].lower().replace("_", ".")] = value
            elif name.startswith(PREFIX) and name[len(PREFIX) :] not in KNOWN:
                known = ", ".join(PREFIX + k for k in KNOWN)
                raise ConfigError(f"{name} is no setting of Jobledger; known are {known} and {KAFKA_PREFIX}*")
        return cls(
            bootstrap=env.get(PREFIX + "BOOTSTRAP") or None,
            status_url=env.get(PREFIX + "STATUS_URL") or None,
            submit_timeout=_positive(env, "SUBMIT_TIMEOUT", DEFAULT_SUBMIT_TIMEOUT_S),
            max_record_bytes=int(_positive(env, "MAX_RECORD_BYTES", DEFAULT_MAX_RECORD_BYTES)),
            retention_days=_positive(env, "RETENTION_DAYS", DEFAULT_RETENTION_DAYS),
            kafka=kafka,
            home=Path(env[PREFIX + "HOME"]).expanduser() if env.get(PREFIX + "HOME") else default_home(),
            schema_registry=env.get(PREFIX + "SCHEMA_REGISTRY") or None,
        )

    def with_bootstrap(self, bootstrap: str | None) -> Settings:
        """The same settings, with ``--bootstrap`` from a command line winning over the environment."""
        return self if bootstrap is None else replace(self, bootstrap=bootstrap)

    def with_status_url(self, status_url: str | None) -> Settings:
        """The same settings, with ``--status-url`` from a command line winning over the environment."""
        return self if status_url is None else replace(self, status_url=status_url)

    def acting_as(self, role: str) -> Settings:
        """The same settings for one part of Jobledger, e.g. ``worker``."""
        return replace(self, role=role)

    def resolve_bootstrap(self) -> str:
        """The broker's address: the setting, else the embedded broker if it runs, else `BrokerUnavailable`."""
        if self.bootstrap:
            return self.bootstrap
        from jobledger.kafka.embedded import running_bootstrap  # late: pulls in process handling

        found = running_bootstrap(self.home)
        if found is None:
            raise BrokerUnavailable(
                "no Kafka broker is configured: set JOBLEDGER_BOOTSTRAP=host:port (or --bootstrap), "
                "or start the embedded one with `jobledger kafka start`"
            )
        return found

    def resolve_status_url(self, namespace: str) -> str:
        """The status database's URL: the setting, else one SQLite file per namespace under the user's data folder."""
        if self.status_url:
            return self.status_url
        folder = self.home / "status"
        folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{folder / (namespace + '.db')}"

    def librdkafka(self) -> dict[str, str | int | float | bool | None]:
        """Client settings for confluent-kafka, without those of a producer or consumer.

        Raises `ConfigError` where credentials are given and ``security.protocol`` would leave them unused.
        """
        _check_protocol(self.kafka)
        conf: dict[str, str | int | float | bool | None] = {
            "client.id": f"jobledger-{self.role}",
            **PATIENCE,
            **self.kafka,
        }
        conf["bootstrap.servers"] = self.resolve_bootstrap()
        return conf


def default_home() -> Path:
    """``JOBLEDGER_HOME``, else the platform's user data folder."""
    configured = os.environ.get(PREFIX + "HOME")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_data_dir("jobledger"))


def _check_protocol(kafka: Mapping[str, str]) -> None:
    protocol = kafka.get("security.protocol", "PLAINTEXT").upper()
    idle = [
        name
        for name in (
            "sasl.username",
            "sasl.password",
            "ssl.certificate.location",
            "ssl.certificate.pem",
            "ssl.ca.location",
        )
        if name in kafka and name.partition(".")[0].upper() not in protocol
    ]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} would not be used with security.protocol={protocol}: set "
            f"{KAFKA_PREFIX}SECURITY_PROTOCOL to SSL, SASL_SSL or SASL_PLAINTEXT, or leave them out"
        )
    if protocol.startswith("SASL") and not {"sasl.mechanism", "sasl.mechanisms"} & set(kafka):
        raise ConfigError(
            f"security.protocol={protocol} needs {KAFKA_PREFIX}SASL_MECHANISM: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or "
            "OAUTHBEARER"
        )


def _positive(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(PREFIX + name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value <= 0:
        raise ConfigError(f"{PREFIX}{name}={text!r} is not a number above 0")
    return value
