"""A broker that lets nobody in without a certificate or a password, and lets nobody do what no ACL allows.

Its plain listener stands for the people who run it: whoever comes in there may do anything.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
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

MTLS, SCRAM, PLAIN = "mtls", "scram", "plain"
WAYS = (MTLS, SCRAM, PLAIN)


class Secured:
    """One broker with the listeners SSL (a certificate is required) and SASL_SSL (SCRAM-SHA-512 and PLAIN). For `with`.

    ``users``: names that may come in every way; what they may do is ACLs' business, of which there are none at first.
    A user ``name`` is the principal ``User:name``, however it comes in.
    """

    def __init__(self, folder: Path, users: Iterable[str]) -> None:
        self.authority = Authority(folder / "trusted")
        self.stranger = Authority(folder / "stranger", "another authority")
        # Recognisable wherever it should not be.
        self.passwords = {user: f"s3cret-{user}-{secrets.token_hex(8)}" for user in users}
        self.identities = {user: self.authority.issue(user) for user in users}
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
                "listener.name.sasl_ssl.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
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
            self.brokers.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.brokers.close()

    @property
    def admin(self) -> AdminClient:
        """A client that may do anything."""
        return AdminClient({"bootstrap.servers": self.brokers.bootstrap})

    def _scram(self) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        wanted: list[UserScramCredentialAlteration] = [
            UserScramCredentialUpsertion(user, info, word.encode()) for user, word in self.passwords.items()
        ]
        admin = self.admin
        for future in admin.alter_user_scram_credentials(wanted).values():
            future.result(30)

    def give(self, principal: str, *wanted: Right) -> None:
        """Allow this."""
        acls.grant(self.admin, Settings(), [acls.binding(principal, right) for right in wanted])

    def take(self, principal: str, right: Right) -> None:
        """Allow it no more; returns once the broker knows."""
        given = acls.binding(principal, right)
        pattern = (given.restype, given.name, given.resource_pattern_type)
        same = AclBindingFilter(*pattern, principal, given.host, given.operation, given.permission_type)
        admin = self.admin
        (taken,) = admin.delete_acls([same]).values()
        assert len(taken.result(10)) == 1
        while admin.describe_acls(same).result(10):
            time.sleep(0.01)

    def address(self, way: str) -> str:
        """Where clients that come in this way connect."""
        return self.brokers.listener("SSL" if way == MTLS else "SASL_SSL")

    def kafka(self, user: str, way: str) -> dict[str, str]:
        """The client settings with which ``user`` comes in, with librdkafka's names."""
        if way == MTLS:
            return with_certificate(self.authority.ca, self.identities[user])
        return {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.authority.ca),
            "sasl.mechanism": "SCRAM-SHA-512" if way == SCRAM else "PLAIN",
            "sasl.username": user,
            "sasl.password": self.passwords[user],
        }


def with_certificate(ca: Path, identity: Identity) -> dict[str, str]:
    """The client settings of whoever has this certificate."""
    found = {
        "security.protocol": "SSL",
        "ssl.ca.location": str(ca),
        "ssl.certificate.location": str(identity.certificate),
        "ssl.key.location": str(identity.key),
    }
    return found if identity.password is None else {**found, "ssl.key.password": identity.password}


def environment(bootstrap: str, kafka: Mapping[str, str]) -> dict[str, str]:
    """The same as environment variables."""
    named = {f"JOBLEDGER_KAFKA__{name.upper().replace('.', '_')}": value for name, value in kafka.items()}
    return {"JOBLEDGER_BOOTSTRAP": bootstrap, **named}
