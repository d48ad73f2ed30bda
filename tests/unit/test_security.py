"""Security settings: the settings of librdkafka are translated for aiokafka, and a setting without a translation is an
error."""

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
    """The authority that signs the certificates of this module."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def user(authority: Authority) -> Identity:
    """A certificate with a key that has a password."""
    return authority.issue("user", password="open sesame")


def test_without_security_settings_the_connection_is_plain_text() -> None:
    """There are no credentials."""
    assert credentials({}) is None
    assert security(Settings()) == {"security_protocol": "PLAINTEXT"}


def test_mutual_tls_is_set_up_from_files(authority: Authority, user: Identity) -> None:
    """The files have a certificate, its encrypted key and the authority. The server's certificate and host name are
    verified."""
    made = credentials(
        {
            "security.protocol": "ssl",
            "ssl.ca.location": str(authority.ca),
            "ssl.certificate.location": str(user.certificate),
            "ssl.key.location": str(user.key),
            "ssl.key.password": "open sesame",
        }
    )
    assert isinstance(made, SSLCredentials)
    assert made.context.verify_mode is ssl.CERT_REQUIRED
    assert made.context.check_hostname
    assert len(made.context.get_ca_certs()) == 1


def test_mutual_tls_is_set_up_from_text(
    authority: Authority, user: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings have the certificates as text, as an orchestrator passes secrets. No temporary file remains."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests write into the common folder at the same time
    made = tls.context(
        {
            "ssl.ca.pem": authority.ca.read_text(),
            "ssl.certificate.pem": user.certificate.read_text(),
            "ssl.key.pem": user.key.read_text(),
            "ssl.key.password": "open sesame",
        }
    )
    assert len(made.get_ca_certs()) == 1
    assert list(tmp_path.iterdir()) == []


def test_tls_checks_are_turned_off_only_by_their_settings(authority: Authority) -> None:
    """`none` turns off the check of the host name, and `false` the check of the certificate."""
    ca = {"ssl.ca.location": str(authority.ca)}
    unnamed = tls.context({**ca, "ssl.endpoint.identification.algorithm": "none"})
    assert (unnamed.check_hostname, unnamed.verify_mode) == (False, ssl.CERT_REQUIRED)
    anything = tls.context({**ca, "enable.ssl.certificate.verification": "false"})
    assert (anything.check_hostname, anything.verify_mode) == (False, ssl.CERT_NONE)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ssl.ca.location", "/nowhere/ca.pem", "JOBLEDGER_KAFKA__SSL_CA_LOCATION=/nowhere/ca.pem cannot be read"),
        ("ssl.key.password", "wrong", "check JOBLEDGER_KAFKA__SSL_KEY_PASSWORD"),
        ("ssl.keystore.location", "client.p12", "openssl pkcs12"),
        ("ssl.cipher.suites", "ALL", "JOBLEDGER_KAFKA__SSL_CIPHER_SUITES is not supported"),
        ("ssl.crl.location", "crl.pem", "JOBLEDGER_KAFKA__SSL_CRL_LOCATION is not supported"),
    ],
)
def test_the_error_of_an_unusable_security_setting_names_it(
    authority: Authority, user: Identity, name: str, value: str, expected: str
) -> None:
    """The errors are a missing file, a wrong password and a setting without a translation. No error shows a
    password."""
    kafka = {
        "security.protocol": "SSL",
        "ssl.ca.location": str(authority.ca),
        "ssl.certificate.location": str(user.certificate),
        "ssl.key.location": str(user.key),
        "ssl.key.password": "open sesame",
    }
    with pytest.raises(ConfigError) as caught:
        credentials({**kafka, name: value})
    assert expected in str(caught.value)
    assert "sesame" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_an_encrypted_key_without_its_password_is_an_error(user: Identity) -> None:
    """The program does not ask for the password at a terminal."""
    with pytest.raises(ConfigError, match="cannot be used"):
        tls.context({"ssl.certificate.location": str(user.certificate), "ssl.key.location": str(user.key)})


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "scram-sha-512"])
@pytest.mark.parametrize("name", ["sasl.mechanism", "sasl.mechanisms"])
def test_user_and_password_are_used_with_plain_and_scram(mechanism: str, name: str) -> None:
    """They are used with and without TLS, and with both names of the setting for the mechanism."""
    kafka = {name: mechanism, "sasl.username": "u", "sasl.password": "p"}
    plain = credentials({**kafka, "security.protocol": "SASL_PLAINTEXT"})
    assert isinstance(plain, SASLCredentials)
    assert (plain.username, plain.password, plain.ssl_context) == ("u", "p", None)
    assert security(Settings(kafka={**kafka, "security.protocol": "SASL_SSL"}))["security_protocol"] == "SASL_SSL"


@pytest.mark.parametrize(
    ("kafka", "expected"),
    [
        ({"security.protocol": "TLS"}, "not one of PLAINTEXT"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI"}, "or mutual TLS"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN", "sasl.username": "u"}, "SASL_PASSWORD"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "GSSAPI", "sasl.kerberos.keytab": "x"}, "mutual TLS"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "MSK"),
        ({**OIDC, "sasl.oauthbearer.token.endpoint.url": "token"}, "write https://"),
        ({**OIDC, "sasl.oauthbearer.token.endpoint.url": "https://[half"}, "write https://"),
        (OIDC, "JOBLEDGER_KAFKA__SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL"),
    ],
)
def test_unknown_or_incomplete_ways_to_log_in_are_refused(kafka: dict[str, str], expected: str) -> None:
    """The error names the protocols or mechanisms that aiokafka can use, or the missing setting."""
    with pytest.raises(ConfigError, match=expected):
        credentials(kafka)


@pytest.mark.parametrize(
    ("kafka", "expected"),
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
def test_credentials_that_would_not_be_used_are_refused(kafka: dict[str, str], expected: str) -> None:
    """With a password or a certificate in the settings, a connection in plain text is refused. The clients would allow
    it."""
    with pytest.raises(ConfigError, match=expected):
        Settings(bootstrap="h:1", kafka=kafka).librdkafka()


def test_unusable_settings_raise_our_error_for_each_kind_of_client() -> None:
    """If librdkafka refuses the settings, a `ConfigError` is raised."""
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
    """The `repr` of settings has no password and no key."""
    assert "hunter2" not in repr(Settings(kafka={"sasl.password": "hunter2", "ssl.key.pem": "hunter2"}))


def test_the_error_of_a_failed_login_shows_settings_but_no_secret() -> None:
    """The error shows only the settings of an allow-list, which contain no secret. So a setting that this version does
    not know is not shown."""
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
    message = str(refusal(settings, "SASL authentication error: no"))
    assert "hunter2" not in message
    assert "JOBLEDGER_KAFKA__SASL_OAUTHBEARER_TOKEN_ENDPOINT_URL=https://login.example/token" in message
    assert [name for name, value in harmless.items() if f"{tls.setting(name)}={value}" not in message] == []
    unknown = Settings(bootstrap="h:1", kafka={"sasl.something.new": "hunter2"})
    assert "check JOBLEDGER_KAFKA__SASL_*, and" in str(refusal(unknown, "SASL authentication error: no"))


def test_the_error_of_a_missing_right_names_role_operation_and_resource() -> None:
    """They are in the message and in attributes. The message also has the user's name, if there is one, and a
    remedy."""
    settings = Settings(kafka={"sasl.username": "jobs"}, role="worker")
    error = unauthorized(settings, "sending to shop.lifecycle", "topic", Need("Write", "topic", "shop.lifecycle"))
    assert str(error) == (
        "sending to shop.lifecycle: the cluster does not let user 'jobs' do this: the worker needs Write on topic "
        "shop.lifecycle; `jobledger topics acls MODULE:APP` prints the rights of each role"
    )
    assert (error.role, error.operation, error.resource_type, error.resource) == (
        "worker",
        "Write",
        "topic",
        "shop.lifecycle",
    )


class Endpoint:
    """A token endpoint that keeps its requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.lasts, self.status = 3600, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.asked.append((self.headers["Authorization"], form))
                good = self.headers["Authorization"] == "Basic am9iczpzM2NyZXQ="  # jobs:s3cret
                body: Any = {"access_token": f"token-{len(outer.asked)}", "expires_in": outer.lasts} if good else {}
                self.send_response(outer.status or (200 if good else 401))
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A running token endpoint."""
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_token_is_fetched_kept_and_renewed(endpoint: Endpoint) -> None:
    """The client credentials grant is used, with scope and extensions. A token is kept until most of its lifetime is
    over."""
    kafka = {
        **OIDC,
        "sasl.oauthbearer.token.endpoint.url": endpoint.url,
        "sasl.oauthbearer.scope": "kafka",
        "sasl.oauthbearer.extensions": "logicalCluster=lkc-1, identityPoolId=p",
    }
    made = credentials(kafka)
    assert isinstance(made, OAuthCredentials)
    provider = made.oauth_cb
    assert asyncio.run(provider.token()) == asyncio.run(provider.token()) == "token-1"
    assert endpoint.asked[0][1] == "grant_type=client_credentials&scope=kafka"
    assert provider.extensions() == {"logicalCluster": "lkc-1", "identityPoolId": "p"}
    endpoint.lasts = 0
    fleeting = ClientCredentials(kafka)
    assert fleeting.fetch() != fleeting.fetch()


def test_the_error_of_a_refused_token_hides_the_secret(endpoint: Endpoint) -> None:
    """The error names the endpoint and the settings, but shows no values of settings."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": endpoint.url, "sasl.oauthbearer.client.secret": "hunter2"}
    with pytest.raises(NotAuthenticated, match=r"answers 401 .*CLIENT_SECRET") as caught:
        ClientCredentials(kafka).fetch()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://login.example/token", r"TOKEN_ENDPOINT_URL=http://login\.example… would send .* plain text"),
        ("http://10.0.0.7:8080/token", "plain text"),
        ("https://me:hunter2@login.example/token", "contains a user or a password"),
    ],
)
def test_a_secret_is_not_sent_in_plain_text(url: str, expected: str) -> None:
    """No client asks an endpoint of another machine without TLS. The error names the setting, and shows no secret."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": url}
    for asked in (lambda: ClientCredentials(kafka), Settings(bootstrap="h:1", kafka=kafka).librdkafka):
        with pytest.raises(ConfigError, match=expected) as caught:
            asked()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:1/t", "http://127.0.0.2/t", "http://[::1]:1/t", "https://any.example"]
)
def test_a_secret_is_sent_with_tls_or_to_this_machine(url: str) -> None:
    """These endpoints are accepted."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": url}
    ClientCredentials(kafka)
    Settings(bootstrap="h:1", kafka=kafka).librdkafka()


def test_an_unreachable_token_endpoint_is_no_refusal() -> None:
    """The error is raised within a bounded time. aiokafka tries again after a `ConnectionError`, but not after a
    `NotAuthenticated`."""
    away = {**OIDC, "sasl.oauthbearer.token.endpoint.url": f"http://127.0.0.1:{free_port()}/token"}
    with pytest.raises(ConnectionError, match=r"the token endpoint http://127\.0\.0\.1:.* does not answer"):
        ClientCredentials(away).fetch()


@pytest.mark.parametrize("runs", [True, False])
def test_a_client_without_a_token_is_refused_only_if_the_endpoint_can_be_reached(
    endpoint: Endpoint, runs: bool
) -> None:
    """An unreachable endpoint is an outage, and each part retries as long as for an unreachable broker."""
    url = endpoint.url if runs else f"http://127.0.0.1:{free_port()}/token"
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": url, "sasl.oauthbearer.client.secret": "wrong"}
    with pytest.raises(NotAuthenticated if runs else BrokerUnavailable) as caught:
        auth.check_connection(Settings(bootstrap="127.0.0.1:9", kafka=kafka))
    assert url in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_token_endpoint_is_no_refusal(endpoint: Endpoint, status: int) -> None:
    """A token that is still valid is used until its end."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": endpoint.url}
    provider = ClientCredentials(kafka)
    assert provider.fetch() == "token-1"
    endpoint.status, provider._until = status, 0.0
    assert provider.fetch() == "token-1"
    with pytest.raises(ConnectionError, match=f"answers {status}"):
        ClientCredentials(kafka).fetch()
    endpoint.status = 0
    assert provider.fetch() == "token-4"


@pytest.mark.parametrize("setting", [{"https.ca.location": "/nowhere/ca.pem"}, {"https.ca.pem": "no PEM"}])
def test_an_unusable_certificate_file_is_a_refusal(setting: dict[str, str]) -> None:
    """A retry does not help."""
    kafka = {**OIDC, "sasl.oauthbearer.token.endpoint.url": "https://127.0.0.1:9/token", **setting}
    with pytest.raises(NotAuthenticated, match="gives no token"):
        ClientCredentials(kafka).fetch()


def test_a_topic_is_not_called_missing_if_no_broker_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never reached a broker reports the topic as unknown, but the cause is the unreachable broker."""
    monkeypatch.setattr(auth, "AWAY_S", 600.0)
    address = f"127.0.0.1:{free_port()}"
    settings = Settings(bootstrap=address)
    monitor = AuthMonitor(settings)
    unknown = KafkaError(KafkaError._UNKNOWN_TOPIC)
    assert monitor.behind(unknown) is None
    assert isinstance(undelivered(unknown, settings, "sending to t"), TopicMissing)
    errors: list[KafkaError] = []

    def on_error(error: KafkaError) -> None:
        errors.append(error)
        monitor(error)

    client = producer(producer_config(settings) | {"error_cb": on_error})
    until = time.monotonic() + 60
    while not errors and time.monotonic() < until:
        client.poll(0.05)
    cause = monitor.behind(unknown)
    assert isinstance(cause, BrokerUnavailable), errors
    assert f"{address} cannot be reached" in str(cause)
    assert monitor.behind(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE)) is None
