"""Security settings: one set of them, for librdkafka as it is and for aiokafka in translation;
nothing is left out in silence."""

from __future__ import annotations

import asyncio
import http.server
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError
from faust import OAuthCredentials, SASLCredentials, SSLCredentials

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError, NotAuthenticated, TopicMissing
from jobledger.kafka import auth, tls
from jobledger.kafka.auth import AuthMonitor, Need, refusal, unauthorized
from jobledger.kafka.clients import admin, consumer, consumer_config, producer, producer_config, undelivered
from jobledger.kafka.embedded.ports import free_port
from jobledger.streams.coordinator.faust.oauth import ClientCredentials
from jobledger.streams.coordinator.faust.security import credentials, security
from tests.certificates import Authority, Identity

OIDC = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "OAUTHBEARER",
    "sasl.oauthbearer.method": "oidc",
    "sasl.oauthbearer.client.id": "jobs",
    "sasl.oauthbearer.client.secret": "s3cret",
}


TLS = (
    "ssl.certificate.location",
    "ssl.certificate.pem",
    "ssl.key.location",
    "ssl.key.pem",
    "ssl.key.password",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.ca.certificate.stores",
    "ssl.keystore.location",
    "ssl.keystore.password",
    "ssl.crl.location",
    "ssl.endpoint.identification.algorithm",
)
SASL = ("sasl.username", "sasl.password", "sasl.mechanism", "sasl.oauthbearer.client.secret", "sasl.kerberos.keytab")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs this module's certificates."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def user(authority: Authority) -> Identity:
    """A certificate whose key has a password."""
    return authority.issue("user", password="open sesame")


def test_plain_text_needs_no_credentials() -> None:
    """Without settings there is nothing to translate."""
    assert credentials({}) is None
    assert security(Settings()) == {"security_protocol": "PLAINTEXT"}


def test_mutual_tls_from_files(authority: Authority, user: Identity) -> None:
    """A certificate, its locked key and the authority, from files: verified, and by the host's name."""
    found = credentials(
        {
            "security.protocol": "ssl",
            "ssl.ca.location": str(authority.ca),
            "ssl.certificate.location": str(user.certificate),
            "ssl.key.location": str(user.key),
            "ssl.key.password": "open sesame",
        }
    )
    assert isinstance(found, SSLCredentials)
    assert found.context.verify_mode is ssl.CERT_REQUIRED
    assert found.context.check_hostname
    assert len(found.context.get_ca_certs()) == 1


def test_mutual_tls_from_texts(
    authority: Authority, user: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same from the settings' own text, as secrets of an orchestrator arrive; no file of it is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests write into the common one at the same time
    found = tls.context(
        {
            "ssl.ca.pem": authority.ca.read_text(),
            "ssl.certificate.pem": user.certificate.read_text(),
            "ssl.key.pem": user.key.read_text(),
            "ssl.key.password": "open sesame",
        }
    )
    assert len(found.get_ca_certs()) == 1
    assert list(tmp_path.iterdir()) == []


def test_checks_are_turned_off_only_on_demand(authority: Authority) -> None:
    """`none` leaves the name unchecked, `false` the certificate."""
    ca = {"ssl.ca.location": str(authority.ca)}
    unnamed = tls.context({**ca, "ssl.endpoint.identification.algorithm": "none"})
    assert (unnamed.check_hostname, unnamed.verify_mode) == (False, ssl.CERT_REQUIRED)
    anything = tls.context({**ca, "enable.ssl.certificate.verification": "false"})
    assert (anything.check_hostname, anything.verify_mode) == (False, ssl.CERT_NONE)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ssl.ca.location", "/nowhere/ca.pem", "JOBLEDGER_KAFKA__SSL_CA_LOCATION=/nowhere/ca.pem cannot be read"),
        ("ssl.key.password", "wrong", "is JOBLEDGER_KAFKA__SSL_KEY_PASSWORD right?"),
        ("ssl.keystore.location", "client.p12", "openssl pkcs12"),
        ("ssl.cipher.suites", "ALL", "JOBLEDGER_KAFKA__SSL_CIPHER_SUITES has no translation"),
        ("ssl.crl.location", "crl.pem", "JOBLEDGER_KAFKA__SSL_CRL_LOCATION has no translation"),
    ],
)
def test_what_cannot_be_used_is_said(authority: Authority, user: Identity, name: str, value: str, said: str) -> None:
    """A file that is not there, a wrong password and a setting without translation are errors that name the
    setting; none shows a password."""
    kafka = {
        "security.protocol": "SSL",
        "ssl.ca.location": str(authority.ca),
        "ssl.certificate.location": str(user.certificate),
        "ssl.key.location": str(user.key),
        "ssl.key.password": "open sesame",
    }
    with pytest.raises(ConfigError) as caught:
        credentials({**kafka, name: value})
    assert said in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_a_locked_key_without_its_password_is_said(user: Identity) -> None:
    """Nobody is asked at a terminal."""
    with pytest.raises(ConfigError, match="cannot be used"):
        tls.context({"ssl.certificate.location": str(user.certificate), "ssl.key.location": str(user.key)})


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "scram-sha-512"])
@pytest.mark.parametrize("name", ["sasl.mechanism", "sasl.mechanisms"])
def test_passwords(mechanism: str, name: str) -> None:
    """User and password by PLAIN and SCRAM, with or without TLS, under both names of the setting."""
    kafka = {name: mechanism, "sasl.username": "u", "sasl.password": "p"}
    plain = credentials({**kafka, "security.protocol": "SASL_PLAINTEXT"})
    assert isinstance(plain, SASLCredentials)
    assert (plain.username, plain.password, plain.ssl_context) == ("u", "p", None)
    assert security(Settings(kafka={**kafka, "security.protocol": "SASL_SSL"}))["security_protocol"] == "SASL_SSL"


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"security.protocol": "TLS"}, "none of PLAINTEXT"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"}, "or mutual TLS"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u"}, "SASL_PASSWORD"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI", "sasl.kerberos.keytab": "x"}, "mutual TLS"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "MSK"),
        ({**OIDC, "sasl.oauthbearer.token.endpoint.url": "token"}, "write https://"),
        ({**OIDC, "sasl.oauthbearer.token.endpoint.url": "https://[half"}, "write https://"),
        (OIDC, "JOBLEDGER_KAFKA__SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL"),
    ],
)
def test_ways_in_that_are_not_known_are_refused(kafka: dict[str, str], said: str) -> None:
    """A protocol, a mechanism or a half of a pair that aiokafka cannot use is an error that names the ways out."""
    with pytest.raises(ConfigError, match=said):
        credentials(kafka)


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"sasl.username": "u", "sasl.password": "p"}, "would not be used with security.protocol=PLAINTEXT"),
        ({"ssl.certificate.location": "c.pem"}, "would not be used with security.protocol=PLAINTEXT"),
        ({"security.protocol": "SSL", "sasl.username": "u"}, "sasl.username would not be used"),
        ({"security.protocol": "SASL_SSL", "sasl.username": "u"}, "JOBLEDGER_KAFKA__SASL_MECHANISM"),
        *(
            ({"security.protocol": protocol, name: "x"}, f"{name} would not be used with security.protocol={protocol}")
            for protocol, names in {"PLAINTEXT": (*TLS, *SASL), "SASL_PLAINTEXT": TLS, "SSL": SASL}.items()
            for name in names
        ),
    ],
)
def test_credentials_that_would_not_be_used_are_refused(kafka: dict[str, str], said: str) -> None:
    """Nobody connects in plain text who has set a password or a certificate; the clients would."""
    with pytest.raises(ConfigError, match=said):
        Settings(bootstrap="h:1", kafka=kafka).librdkafka()


def test_no_client_is_made_of_unusable_settings() -> None:
    """What librdkafka refuses is an error of ours for each kind of client, without a traceback of Kafka's."""
    settings = Settings(
        bootstrap="h:1",
        kafka={"security.protocol": "SSL", "ssl.certificate.location": "/nowhere", "ssl.key.location": "/nowhere"},
    )
    for make in (
        lambda: admin(settings),
        lambda: producer(producer_config(settings)),
        lambda: consumer(consumer_config(settings)),
    ):
        with pytest.raises(ConfigError, match="cannot be used"):
            make()


def test_settings_do_not_show_secrets() -> None:
    """Not in what Python shows of them."""
    assert "hunter2" not in repr(Settings(kafka={"sasl.password": "hunter2", "ssl.key.pem": "hunter2"}))


def test_a_refusal_shows_the_way_in_and_no_secret() -> None:
    """Of the settings an error shows those that are known to hold none, by an allow-list: also of ways in that this
    version does not know."""
    harmless = {
        "sasl.mechanism": "OAUTHBEARER",
        "sasl.oauthbearer.method": "oidc",
        "sasl.oauthbearer.client.id": "jobs",
        "sasl.oauthbearer.scope": "kafka",
        "sasl.oauthbearer.assertion.private.key.file": "/etc/kafka/key.pem",
    }
    secret = {
        "sasl.password": "hunter2",
        "sasl.oauthbearer.client.secret": "hunter2",
        "sasl.oauthbearer.config": "principal=hunter2",
        "sasl.oauthbearer.assertion.private.key.pem": "hunter2",
        "sasl.oauthbearer.assertion.private.key.passphrase": "hunter2",
        "sasl.oauthbearer.assertion.jwt.template.file": "hunter2",
        "sasl.something.new": "hunter2",
        "ssl.key.pem": "hunter2",
    }
    url = {"sasl.oauthbearer.token.endpoint.url": "https://me:hunter2@login.example/token?key=hunter2"}
    settings = Settings(bootstrap="h:1", kafka={**harmless, **secret, **url, "security.protocol": "SASL_SSL"})
    said = str(refusal(settings, "SASL authentication error: no"))
    assert "hunter2" not in said
    assert "JOBLEDGER_KAFKA__SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL=https://login.example/token" in said
    assert [name for name, value in harmless.items() if f"{tls.setting(name)}={value}" not in said] == []
    unknown = Settings(bootstrap="h:1", kafka={"sasl.something.new": "hunter2"})
    assert "check JOBLEDGER_KAFKA__SASL_*, and" in str(refusal(unknown, "SASL authentication error: no"))


def test_a_missing_right_is_said_with_the_way_out() -> None:
    """Role, operation and resource, in the text and as attributes; the user if there is a name."""
    settings = Settings(kafka={"sasl.username": "jobs"}, role="worker")
    error = unauthorized(settings, "sending to shop.lifecycle", "topic", Need("Write", "topic", "shop.lifecycle"))
    assert str(error) == (
        "sending to shop.lifecycle: the cluster does not let user 'jobs' do this: the worker needs Write on topic "
        "shop.lifecycle; `jobledger topics acls MODULE:APP` prints the rights of each part"
    )
    assert (error.role, error.operation, error.resource_type, error.resource) == (
        "worker",
        "Write",
        "topic",
        "shop.lifecycle",
    )


class Endpoint:
    """A token endpoint that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.lasts = 3600
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.asked.append((self.headers["Authorization"], form))
                good = self.headers["Authorization"] == "Basic am9iczpzM2NyZXQ="  # jobs:s3cret
                body: Any = {"access_token": f"token-{len(outer.asked)}", "expires_in": outer.lasts} if good else {}
                self.send_response(200 if good else 401)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """One that runs."""
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_token_is_got_kept_and_renewed(endpoint: Endpoint) -> None:
    """The client credentials grant, with scope and extensions; a token is asked for once,
    until most of its life is over."""
    kafka = {
        **OIDC,
        "sasl.oauthbearer.token.endpoint.url": endpoint.url,
        "sasl.oauthbearer.scope": "kafka",
        "sasl.oauthbearer.extensions": "logicalCluster=lkc-1, identityPoolId=p",
    }
    found = credentials(kafka)
    assert isinstance(found, OAuthCredentials)
    provider = found.oauth_cb
    assert asyncio.run(provider.token()) == asyncio.run(provider.token()) == "token-1"
    assert endpoint.asked[0][1] == "grant_type=client_credentials&scope=kafka"
    assert provider.extensions() == {"logicalCluster": "lkc-1", "identityPoolId": "p"}
    endpoint.lasts = 0
    fleeting = ClientCredentials(kafka)
    assert fleeting.fetch() != fleeting.fetch()


def test_a_token_that_is_refused_is_said_without_the_secret(endpoint: Endpoint) -> None:
    """The error names the endpoint and the settings, not what is in them."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": endpoint.url, "sasl.oauthbearer.client.secret": "hunter2"}
    with pytest.raises(NotAuthenticated, match=r"answers 401 .*CLIENT_SECRET") as caught:
        ClientCredentials(kafka).fetch()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://login.example/token", r"TOKEN_ENDPOINT_URL=http://login\.example… would send .* plain text"),
        ("http://10.0.0.7:8080/token", "plain text"),
        ("https://me:hunter2@login.example/token", "contains a user or a password"),
    ],
)
def test_a_secret_does_not_travel_as_plain_text(url: str, said: str) -> None:
    """Neither client asks an endpoint of another machine's without TLS; the setting is named, what is in it not."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": url}
    for asked in (lambda: ClientCredentials(kafka), Settings(bootstrap="h:1", kafka=kafka).librdkafka):
        with pytest.raises(ConfigError, match=said) as caught:
            asked()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:1/t", "http://127.0.0.2/t", "http://[::1]:1/t", "https://any.example"]
)
def test_endpoints_that_a_secret_may_be_sent_to(url: str) -> None:
    """TLS, or this machine."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": url}
    ClientCredentials(kafka)
    Settings(bootstrap="h:1", kafka=kafka).librdkafka()


def test_an_endpoint_that_is_away_is_said() -> None:
    """Within a bounded time."""
    away = {**OIDC, "sasl.oauthbearer.token.endpoint.url": "http://127.0.0.1:9/token"}
    with pytest.raises(NotAuthenticated, match="gives no token"):
        ClientCredentials(away).fetch()


def test_a_topic_nobody_could_be_asked_for_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never reached a broker says that the topic is unknown; it is the broker that is away."""
    monkeypatch.setattr(auth, "AWAY_S", 600.0)
    address = f"127.0.0.1:{free_port()}"
    settings = Settings(bootstrap=address)
    door = AuthMonitor(settings)
    unknown = KafkaError(KafkaError._UNKNOWN_TOPIC)
    assert door.behind(unknown) is None
    assert isinstance(undelivered(unknown, settings, "sending to t"), TopicMissing)
    told: list[KafkaError] = []

    def heard(error: KafkaError) -> None:
        told.append(error)
        door(error)

    client = producer(producer_config(settings) | {"error_cb": heard})
    until = time.monotonic() + 60
    while not told and time.monotonic() < until:
        client.poll(0.05)
    found = door.behind(unknown)
    assert isinstance(found, BrokerUnavailable), told
    assert f"{address} cannot be reached" in str(found)
    assert door.behind(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)) is None
