"""Security settings, written once with librdkafka's names, for Faust and aiokafka. Connects nowhere."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faust
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from jobledger.config import Settings
from jobledger.errors import ConfigError

_SSL_FILES = {"ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.key.password"}
_KNOWN_SECURITY = _SSL_FILES | {
    "security.protocol",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "sasl.password",
    "ssl.ca.pem",
    "ssl.endpoint.identification.algorithm",
    "enable.ssl.certificate.verification",
}


def credentials(kafka: Mapping[str, str]) -> Any:
    """Security settings with librdkafka's names as Faust's credentials; None for plain text.

    Raises `ConfigError` for a security setting that has no translation: it must not be left out in silence.
    """
    for name in kafka:
        if name.startswith(("ssl.", "sasl.", "security.")) and name not in _KNOWN_SECURITY:
            raise ConfigError(
                f"Kafka setting {name!r} cannot be translated for the coordinator (aiokafka); "
                f"known are {', '.join(sorted(_KNOWN_SECURITY))}"
            )
    protocol = kafka.get("security.protocol", "PLAINTEXT").upper()
    if protocol == "PLAINTEXT":
        return None
    if protocol == "SSL":
        return faust.SSLCredentials(ssl_context(kafka))
    if protocol not in ("SASL_PLAINTEXT", "SASL_SSL"):
        raise ConfigError(f"security.protocol={protocol!r} is none of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL")
    mechanism = kafka.get("sasl.mechanism", kafka.get("sasl.mechanisms", "PLAIN")).upper()
    if mechanism not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise ConfigError(f"sasl.mechanism={mechanism!r} is none of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512")
    return faust.SASLCredentials(
        username=kafka.get("sasl.username"),
        password=kafka.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=ssl_context(kafka) if protocol == "SASL_SSL" else None,
    )


def security(settings: Settings) -> Mapping[str, Any]:
    """The same for an aiokafka client of our own."""
    found: Mapping[str, Any] = credentials_to_aiokafka_auth(credentials(settings.kafka))
    return found


def ssl_context(kafka: Mapping[str, str]) -> ssl.SSLContext:
    """A client context from librdkafka's ``ssl.*`` settings. Raises `ConfigError` naming what cannot be read."""
    authority = kafka.get("ssl.ca.location")
    folder = authority is not None and Path(authority).is_dir()
    try:
        context = ssl.create_default_context(
            cafile=None if folder else authority,
            capath=authority if folder else None,
            cadata=kafka.get("ssl.ca.pem"),
        )
        if "ssl.certificate.location" in kafka:
            context.load_cert_chain(
                kafka["ssl.certificate.location"], kafka.get("ssl.key.location"), kafka.get("ssl.key.password")
            )
    except (OSError, ssl.SSLError) as exc:
        files = {name: kafka[name] for name in sorted(_SSL_FILES - {"ssl.key.password"}) if name in kafka}
        raise ConfigError(f"the TLS settings {files} cannot be used: {exc}") from exc
    if kafka.get("ssl.endpoint.identification.algorithm", "https").lower() == "none":
        context.check_hostname = False
    if kafka.get("enable.ssl.certificate.verification", "true").lower() == "false":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
