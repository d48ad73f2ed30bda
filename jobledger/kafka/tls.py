"""Translates librdkafka's ``ssl.*`` settings into Python's TLS settings.

aiokafka needs Python's settings. `trouble` uses them to find out why a broker closes connections.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jobledger.errors import ConfigError

#: Settings that can be translated. Any other ``ssl.*`` setting is refused: to ignore it could weaken a connection.
KNOWN = frozenset(
    {
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.certificate.pem",
        "ssl.key.location",
        "ssl.key.pem",
        "ssl.key.password",
        "ssl.endpoint.identification.algorithm",
        "enable.ssl.certificate.verification",
    }
)
#: Settings whose values may be shown in a message, because they are file names. Passwords and keys may not be shown.
_FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location")
#: Seconds that one broker may take for each step of a TLS check.
LOOK_S = 2.0

_UNTRUSTED = (2, 18, 19, 20, 21)
_OTHER_HOST = (62, 63, 64)
_EXPIRED, _NOT_YET = 10, 9


def setting(name: str) -> str:
    """Return the environment variable of a client setting."""
    return f"JOBLEDGER_KAFKA__{name.upper().replace('.', '_')}"


def context(kafka: Mapping[str, str]) -> ssl.SSLContext:
    """Return the TLS context of a client.

    Raises `ConfigError` for a setting that cannot be translated, and for a file that cannot be read.
    """
    for name in kafka:
        if name.startswith("ssl.keystore."):
            raise ConfigError(
                f"{setting(name)}: the coordinator (aiokafka) cannot read a PKCS#12 keystore. Extract the certificate and the key "
                "once, `openssl pkcs12 -in keystore.p12 -out client.pem`, and name that file in "
                f"{setting('ssl.certificate.location')} and {setting('ssl.key.location')}"
            )
        if name.startswith("ssl.") and name not in KNOWN:
            raise ConfigError(
                f"{setting(name)} is not supported by the coordinator (aiokafka). To ignore this setting could weaken "
                "the "
                f"connections, so remove it. Supported settings: {', '.join(sorted(KNOWN))}"
            )
    authority = kafka.get("ssl.ca.location")
    if authority == "probe":  # librdkafka's name for the system's own certificate authorities
        authority = None
    folder = authority is not None and Path(authority).is_dir()
    try:
        tls_context = ssl.create_default_context(
            cafile=None if folder else authority,
            capath=authority if folder else None,
            cadata=kafka.get("ssl.ca.pem"),
        )
        _load_certificate(tls_context, kafka)
    except (OSError, ssl.SSLError, ValueError) as exc:
        files = {name: kafka[name] for name in _FILES if name in kafka}
        raise ConfigError(
            f"the TLS settings {files} cannot be used: {exc or type(exc).__name__}{_hint(kafka)}"
        ) from exc
    # From Python 3.13 on, the default is stricter than librdkafka's. A setting must mean the same for both clients.
    tls_context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    if kafka.get("ssl.endpoint.identification.algorithm", "https").lower() == "none":
        tls_context.check_hostname = False
    if kafka.get("enable.ssl.certificate.verification", "true").lower() == "false":
        tls_context.check_hostname = False
        tls_context.verify_mode = ssl.CERT_NONE
    return tls_context


def _hint(kafka: Mapping[str, str]) -> str:
    for name in _FILES:
        if name in kafka and not os.access(kafka[name], os.R_OK):
            return f"; {setting(name)}={kafka[name]} cannot be read"
    return f"; check {setting('ssl.key.password')}" if "ssl.key.password" in kafka else ""


def _load_certificate(tls_context: ssl.SSLContext, kafka: Mapping[str, str]) -> None:
    # Without a password, pass an empty one instead of None: with None, OpenSSL would ask for a password at the
    # terminal.
    password = kafka.get("ssl.key.password", "")
    chain, key = kafka.get("ssl.certificate.location"), kafka.get("ssl.key.location")
    texts = (kafka.get("ssl.certificate.pem"), kafka.get("ssl.key.pem"))
    if texts == (None, None):
        if chain is not None:
            tls_context.load_cert_chain(chain, key, password)
        elif key is not None:
            raise ValueError("there is a key but no certificate: set ssl.certificate.location as well")
        return
    # Python reads certificates only from files. So write files that only this user can read, and delete them at once.
    with tempfile.TemporaryDirectory(prefix="jobledger-tls-") as folder:
        paths = [chain, key]
        for index, text in enumerate(texts):
            if text is not None:
                path = Path(folder, str(index))
                path.touch(0o600)
                path.write_text(text, "utf-8")
                paths[index] = str(path)
        if paths[0] is None:
            raise ValueError("there is a key but no certificate: set ssl.certificate.pem as well")
        tls_context.load_cert_chain(paths[0], paths[1], password)


def trouble(bootstrap: str, kafka: Mapping[str, str], timeout: float = LOOK_S) -> str | None:
    """Return why TLS fails with one of these brokers and how to correct this; None if no fault is found.

    Each broker is checked in turn, with at most ``timeout`` seconds for each step. A broker that does not answer has no
    TLS fault. Raises `ConfigError` for settings that cannot be used.
    """
    wanted = kafka.get("security.protocol", "PLAINTEXT").upper() in ("SSL", "SASL_SSL")
    for address in bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        with suppress(OSError, ValueError), socket.create_connection((host.strip("[]"), int(port)), timeout) as plain:
            problem = _handshake_problem(plain, host.strip("[]"), kafka) if wanted else _tls_of_plain_client(plain)
            if problem is not None:
                return f"{address.strip()} {problem}"
    return None


def _tls_of_plain_client(plain: socket.socket) -> str | None:
    # Do not use an `ssl.SSLSocket`: Python leaks the object if its connection is reset while the object is created.
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    incoming, hello = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        client.wrap_bio(incoming, hello).do_handshake()
    try:
        plain.sendall(hello.read())
        head = b""
        while len(head) < 6 and (more := plain.recv(6 - len(head))):
            head += more
    except OSError:
        return None
    # The broker uses TLS if it answers with an alert (0x15), or with a handshake message (0x16) that is a ServerHello
    # (2). A ClientHello would be this client's own message: the socket has connected to itself.
    if head[:1] == b"\x15" or (head[:1] == b"\x16" and head[5:6] == b"\x02"):
        return f"uses TLS, but this client does not: set {setting('security.protocol')} to SSL or SASL_SSL"
    return None


def _handshake_problem(plain: socket.socket, host: str, kafka: Mapping[str, str]) -> str | None:
    try:
        with context(kafka).wrap_socket(plain, server_hostname=host) as tls:
            # In TLS 1.3 a broker accepts or refuses a client's certificate only after the handshake.
            tls.recv(1)
    except ssl.SSLCertVerificationError as exc:
        return _certificate_problem(exc, host)
    except TimeoutError:
        return None  # the broker waits for a request, so it has accepted the connection
    except ssl.SSLError as exc:
        if "CERTIFICATE" in (exc.reason or ""):
            reason = (exc.reason or "").lower().replace("_", " ")
            return (
                f"refuses this client's certificate ({reason}): check {setting('ssl.certificate.location')} and "
                f"{setting('ssl.key.location')}, that it has not expired, and that the broker trusts its authority"
            )
        if exc.reason in ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING", "RECORD_LAYER_FAILURE"):
            return f"does not use TLS: check {setting('security.protocol')} and the port"
        return f"aborts the TLS handshake ({exc.reason})"
    except ConnectionError:
        return None
    return None


def _certificate_problem(exc: ssl.SSLCertVerificationError, host: str) -> str:
    if exc.verify_code in _OTHER_HOST:
        return (
            f"has a certificate that is not for {host} ({exc.verify_message}): connect with a name in the certificate, or disable "
            f"the check with {setting('ssl.endpoint.identification.algorithm')}=none"
        )
    if exc.verify_code in (_EXPIRED, _NOT_YET):
        return (
            f"has a certificate that is expired or not yet valid ({exc.verify_message}): renew it, and check the clocks"
        )
    if exc.verify_code in _UNTRUSTED:
        return (
            f"has a certificate that is not trusted ({exc.verify_message}): {setting('ssl.ca.location')} must contain the "
            "certificate of the authority that signed it"
        )
    return f"has a certificate that is not accepted: {exc.verify_message}"
