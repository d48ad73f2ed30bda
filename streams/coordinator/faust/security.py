"""Translate security settings with librdkafka's names for Faust and aiokafka. This module opens no connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobledger.config import Settings
from jobledger.errors import ConfigError
from jobledger.kafka import tls
from jobledger.kafka.tls import setting
from jobledger.process.extras import missing
from jobledger.streams.coordinator.faust import oauth

try:
    import faust
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
except ImportError as exc:
    raise missing("streams", exc) from exc

PASSWORDS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_KNOWN = {"security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password"} | tls.KNOWN


def credentials(kafka: Mapping[str, str]) -> Any:
    """Return security settings with librdkafka's names as Faust's credentials; None for plain text.

    Raises `ConfigError` for a security setting that has no translation, because such a setting must not be ignored.
    """
    protocol = kafka.get("security.protocol", "PLAINTEXT").upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise ConfigError(
            f"{setting('security.protocol')}={protocol} is not one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"
        )
    mechanism = kafka.get("sasl.mechanism", kafka.get("sasl.mechanisms", "")).upper()
    known = _KNOWN | (oauth.KNOWN if mechanism == "OAUTHBEARER" else set())
    context = tls.context(kafka) if protocol.endswith("SSL") else None
    for name in kafka:
        if name.startswith(("ssl.", "sasl.", "security.", "https.")) and name not in known:
            raise ConfigError(
                f"{setting(name)} is not supported by the coordinator (aiokafka){_alternatives(mechanism)}. Supported "
                "settings: "
                f"{', '.join(sorted(known))}"
            )
    if protocol == "PLAINTEXT":
        return None
    if protocol == "SSL":
        return faust.SSLCredentials(context)
    if mechanism == "OAUTHBEARER":
        return faust.OAuthCredentials(oauth_cb=oauth.ClientCredentials(kafka), ssl_context=context)
    if mechanism not in PASSWORDS:
        raise ConfigError(
            f"{setting('sasl.mechanism')}={mechanism} is not supported by the coordinator "
            f"(aiokafka){_alternatives(mechanism)}"
        )
    for name in ("sasl.username", "sasl.password"):
        if not kafka.get(name):
            raise ConfigError(f"{setting('sasl.mechanism')}={mechanism} needs {setting(name)}")
    return faust.SASLCredentials(
        username=kafka["sasl.username"], password=kafka["sasl.password"], mechanism=mechanism, ssl_context=context
    )


def _alternatives(mechanism: str) -> str:
    ways = f"{', '.join(PASSWORDS)}, OAUTHBEARER with {setting('sasl.oauthbearer.method')}=oidc, or mutual TLS"
    return "" if mechanism in (*PASSWORDS, "", "OAUTHBEARER") else f": use {ways}"


def security(settings: Settings) -> Mapping[str, Any]:
    """Return the security settings for an aiokafka client that Faust does not create. Raises as `credentials` does."""
    translated: Mapping[str, Any] = credentials_to_aiokafka_auth(credentials(settings.kafka))
    return translated
