"""The brokers' addresses, and client settings that users cannot change."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from jobledger import addresses
from jobledger.config import KAFKA_PREFIX, OWNED, Settings
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.kafka.auth import away, check_connection
from jobledger.kafka.clients import consumer_config, producer_config
from jobledger.streams.coordinator.faust.async_producer import compression, unused
from jobledger.streams.coordinator.faust.faust_app import Options, faust_settings
from jobledger.streams.coordinator.faust.instance_dir import InstanceDir


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("kafka-1:9092", "kafka-1:9092"),
        (" a:1 , b:2,", "a:1,b:2"),
        ("PLAINTEXT://a:9092,plaintext://b:9092", "a:9092,b:9092"),
        ("[::1]:9092", "[::1]:9092"),
        ("10.0.0.1:65535", "10.0.0.1:65535"),
    ],
)
def test_addresses_are_brought_into_one_form(written: str, meant: str) -> None:
    """Both of Kafka's clients get the same plain list, from the environment, from code and from the command line."""
    assert Settings.from_env({"JOBLEDGER_BOOTSTRAP": written}).bootstrap == meant
    assert Settings(bootstrap=written).resolve_bootstrap() == meant
    assert Settings().with_bootstrap(written).librdkafka()["bootstrap.servers"] == meant


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "names no broker.*embedded broker"),
        (" , ", "names no broker"),
        ("kafka", r"'kafka' is not an address: it has no port; write kafka:9092"),
        ("a:1,kafka:", "'kafka:' is not an address: it has no port"),
        ("[::1]", "has no port"),
        ("host:99999", "port 99999, but ports are 1 to 65535"),
        ("host:0", "port 0"),
        ("host:http", "write host:port"),
        ("::1:9092", r"IPv6 address in brackets, for example \[::1\]:9092"),
        ("a:1 b:2", "separate addresses with commas"),
        ("SSL://a:9093", "begins with SSL://, but JOBLEDGER_KAFKA__SECURITY_PROTOCOL is PLAINTEXT"),
        ("kafka://a:9093", "begins with kafka://"),
        ("http://a:9093/x", "write host:port"),
    ],
)
def test_a_wrong_address_is_refused_with_the_reason(written: str, reason: str) -> None:
    """Every source of settings refuses it at once. An empty value does not mean the embedded broker."""
    ways: list[Callable[[], Settings]] = [
        lambda: Settings.from_env({"JOBLEDGER_BOOTSTRAP": written}),
        lambda: Settings(bootstrap=written),
        lambda: Settings().with_bootstrap(written),
    ]
    for make in ways:
        with pytest.raises(ConfigError, match=f"JOBLEDGER_BOOTSTRAP.*{reason}"):
            make()


def test_a_protocol_that_agrees_with_the_setting_is_left_out() -> None:
    """``SSL://host:port`` is an address where ``security.protocol`` is SSL."""
    assert Settings(bootstrap="SSL://a:9093", kafka={"security.protocol": "SSL"}).bootstrap == "a:9093"


def test_a_name_service_that_does_not_answer_delays_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about a broker is raised within a bound, also while the look-up of the broker's host still waits."""
    answer = threading.Event()

    def look_up(*of: Any, **more: Any) -> Any:
        if not answer.wait(60):
            raise OSError("nobody answered for a minute")
        return []

    monkeypatch.setattr(addresses, "LOOK_UP_S", 0.1)
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    try:
        assert "did not answer" in away(Settings(bootstrap="slow-name-service.invalid:9092"), "did not answer")
    finally:
        answer.set()


def test_a_host_that_cannot_be_resolved_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that the host cannot be resolved, and not that the broker did not answer."""
    monkeypatch.setattr(addresses, "LOOK_UP_S", 60.0)
    settings = Settings(bootstrap="no-such-host.invalid:9092")
    with pytest.raises(BrokerUnavailable, match=r"host 'no-such-host\.invalid' cannot be resolved"):
        check_connection(settings, timeout=0.2)
    assert "cannot be resolved" in away(settings, "did not answer")
    assert addresses.unresolved("no-such-host.invalid:9092,127.0.0.1:1") is None
    assert "did not answer" in away(Settings(bootstrap="127.0.0.1:1"), "did not answer")


@pytest.mark.parametrize("name", sorted(OWNED))
def test_client_settings_that_jobledger_owns_are_refused_by_name(name: str) -> None:
    """The error gives the reason, for settings from the environment and from code. Such a setting would have no effect,
    or would break a promise."""
    variable = KAFKA_PREFIX + name.upper().replace(".", "_")
    ways: list[Callable[[], Settings]] = [
        lambda: Settings.from_env({variable: "1"}),
        lambda: Settings(kafka={name: "1"}),
    ]
    for make in ways:
        with pytest.raises(ConfigError, match=f"{variable} cannot be set: " + re.escape(OWNED[name])):
            make()


def test_every_setting_of_our_clients_is_obeyed_or_refused() -> None:
    """If Jobledger sets a setting of a producer or consumer, the user's value replaces it, or is refused by name."""
    ours = producer_config(Settings(bootstrap="a:1")).keys() | consumer_config(Settings(bootstrap="a:1")).keys()
    for name in sorted(ours - OWNED.keys() - {"error_cb", "logger"}):
        settings = Settings(bootstrap="a:1", kafka={name: "12345"})
        assert producer_config(settings).get(name) == consumer_config(settings).get(name) == "12345", name


def test_every_refused_name_is_a_setting_of_librdkafka() -> None:
    """A name that librdkafka does not know need not be listed: librdkafka refuses it."""
    assert [name for name in OWNED if not all(_known(make, name) for make in (Producer, Consumer))] == []


def _known(make: Callable[[dict[str, Any]], Any], name: str) -> bool:
    try:
        make({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "log_level": 0, name: "nonsense"})
    except Exception as exc:  # noqa: BLE001  # the value is refused, as it should be
        return "No such configuration property" not in str(exc)
    return True


def test_the_coordinators_clients_obey_the_settings_that_aiokafka_has(tmp_path: Path) -> None:
    """Compression and the client id reach aiokafka. Settings that aiokafka does not have are listed, for a warning."""
    kafka = {"compression.type": "lz4", "client.id": "mine", "socket.keepalive.enable": "true"}
    settings = Settings(bootstrap="a:1", kafka=kafka)
    assert compression(settings) == "lz4"
    assert compression(Settings(bootstrap="a:1")) is None
    for given, taken in (("ZSTD", "zstd"), ("None", None)):  # librdkafka takes capital letters, aiokafka raises
        assert compression(Settings(bootstrap="a:1", kafka={"compression.codec": given})) == taken
    assert (
        faust_settings(settings, Options(), 3, InstanceDir(tmp_path, False, None, None))["broker_client_id"] == "mine"
    )
    assert unused(settings) == ["socket.keepalive.enable"]
    assert unused(Settings(bootstrap="a:1", kafka={"security.protocol": "SSL", "ssl.ca.location": "x"})) == []
