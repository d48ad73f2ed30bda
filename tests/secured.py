"""A broker that accepts only clients with a certificate or a password, and allows only what ACLs allow.

Its plain listener is for the operators of the cluster: clients of this listener may do everything.
"""

from __future__ import annotations

import base64
import http.server
import json
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without __all__
    AclBindingFilter,
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialAlteration,
    UserScramCredentialUpsertion,
)

from jobledger.config import Settings
from jobledger.kafka import acls
from jobledger.kafka.acls import Right
from tests.brokers import Brokers
from tests.certificates import Authority, Identity
from tests.patience import PATIENCE

MTLS, SCRAM, PLAIN, OIDC = "mtls", "scram", "plain", "oidc"
WAYS = (MTLS, SCRAM, PLAIN, OIDC)


class Tokens:
    """An OAuth token endpoint. A client with a user's password gets a token for that user, unsigned, as the broker
    accepts it in tests."""

    def __init__(self, passwords: Mapping[str, str]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                pair = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
                user, _, password = pair.partition(":")
                good = user in passwords and passwords[user] == password
                body = json.dumps({"access_token": _token(user), "expires_in": 3600} if good else {}).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"

    def close(self) -> None:
        """Stop the endpoint."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _token(user: str) -> str:
    now = int(time.time())
    parts = ({"alg": "none"}, {"sub": user, "iat": now, "exp": now + 3600})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


class Secured:
    """A broker with the listeners SSL (a certificate is required) and SASL_SSL (SCRAM-SHA-512, PLAIN and OAUTHBEARER);
    a context manager.

    ``users``: names that can log in in every way. ACLs decide what they may do; there are no ACLs at first. A user
    ``name`` is always the principal ``User:name``.
    """

    def __init__(self, folder: Path, users: Iterable[str]) -> None:
        self.authority = Authority(folder / "trusted")
        self.stranger = Authority(folder / "stranger", "another authority")
        # A recognisable text, so that a test can find a password in a wrong place.
        self.passwords = {user: f"s3cret-{user}-{secrets.token_hex(8)}" for user in users}
        self.identities = {user: self.authority.issue(user) for user in users}
        self.tokens = Tokens(self.passwords)
        server = self.authority.issue("broker", server=True)
        plain = "".join(f' user_{user}="{password}"' for user, password in self.passwords.items())
        modules = "org.apache.kafka.common.security"
        self.brokers = Brokers(
            1,
            listeners=("SSL", "SASL_SSL"),
            config={
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "allow.everyone.if.no.acl.found": "false",
                "super.users": "User:ANONYMOUS",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(server.chain),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.authority.ca),
                "listener.name.ssl.ssl.client.auth": "required",
                "listener.name.ssl.ssl.principal.mapping.rules": "RULE:^CN=([^,]+)$/$1/,DEFAULT",
                "listener.name.sasl_ssl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512,OAUTHBEARER",
                "listener.name.sasl_ssl.oauthbearer.sasl.jaas.config": (
                    f'{modules}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
                ),
                "listener.name.sasl_ssl.plain.sasl.jaas.config": (f"{modules}.plain.PlainLoginModule required{plain};"),
                "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
                    f"{modules}.scram.ScramLoginModule required;"
                ),
            },
        )

    def __enter__(self) -> Self:
        self.brokers.__enter__()
        try:
            self._scram()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the broker and the token endpoint."""
        self.tokens.close()
        self.brokers.close()

    @property
    def admin(self) -> AdminClient:
        """Return a client that may do everything."""
        return AdminClient({"bootstrap.servers": self.brokers.bootstrap})

    def _scram(self) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        wanted: list[UserScramCredentialAlteration] = [
            UserScramCredentialUpsertion(user, info, word.encode()) for user, word in self.passwords.items()
        ]
        admin = self.admin
        for future in admin.alter_user_scram_credentials(wanted).values():
            future.result(30 * PATIENCE)

    def give(self, principal: str, *wanted: Right) -> None:
        """Give a principal these rights."""
        acls.grant(self.admin, Settings(), [acls.binding(principal, right) for right in wanted])

    def take(self, principal: str, right: Right) -> None:
        """Remove a right from a principal, and return as soon as the broker no longer has the ACL."""
        given = acls.binding(principal, right)
        pattern = (given.restype, given.name, given.resource_pattern_type)
        same = AclBindingFilter(*pattern, principal, given.host, given.operation, given.permission_type)
        admin = self.admin
        (taken,) = admin.delete_acls([same]).values()
        assert len(taken.result(10 * PATIENCE)) == 1
        while admin.describe_acls(same).result(10 * PATIENCE):
            time.sleep(0.01)

    def address(self, way: str) -> str:
        """Return the addresses of the listener for this way to log in."""
        return self.brokers.listener("SSL" if way == MTLS else "SASL_SSL")

    def kafka(self, user: str, way: str) -> dict[str, str]:
        """Return the client settings, with librdkafka's names, with which ``user`` logs in in this way."""
        if way == MTLS:
            return with_certificate(self.authority.ca, self.identities[user])
        over_tls = {"security.protocol": "SASL_SSL", "ssl.ca.location": str(self.authority.ca)}
        if way == OIDC:
            return {
                **over_tls,
                "sasl.mechanism": "OAUTHBEARER",
                "sasl.oauthbearer.method": "oidc",
                "sasl.oauthbearer.token.endpoint.url": self.tokens.url,
                "sasl.oauthbearer.client.id": user,
                "sasl.oauthbearer.client.secret": self.passwords[user],
            }
        return {
            **over_tls,
            "sasl.mechanism": "SCRAM-SHA-512" if way == SCRAM else "PLAIN",
            "sasl.username": user,
            "sasl.password": self.passwords[user],
        }


def with_certificate(ca: Path, identity: Identity) -> dict[str, str]:
    """Return the client settings to log in with this certificate."""
    found = {
        "security.protocol": "SSL",
        "ssl.ca.location": str(ca),
        "ssl.certificate.location": str(identity.certificate),
        "ssl.key.location": str(identity.key),
    }
    return found if identity.password is None else {**found, "ssl.key.password": identity.password}


def environment(bootstrap: str, kafka: Mapping[str, str]) -> dict[str, str]:
    """Return the same settings as environment variables."""
    named = {f"JOBLEDGER_KAFKA__{name.upper().replace('.', '_')}": value for name, value in kafka.items()}
    return {"JOBLEDGER_BOOTSTRAP": bootstrap, **named}
