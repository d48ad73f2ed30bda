"""Settings and names."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobledger.config import Settings
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.names import Names


def test_settings_are_read_from_the_environment(tmp_path: Path) -> None:
    """Every variable arrives, and Kafka's own settings get librdkafka's names."""
    settings = Settings.from_env(
        {
            "JOBLEDGER_BOOTSTRAP": "a:1,b:2",
            "JOBLEDGER_STATUS_URL": "sqlite:///x.db",
            "JOBLEDGER_SUBMIT_TIMEOUT": "2.5",
            "JOBLEDGER_RETENTION_DAYS": "7",
            "JOBLEDGER_HOME": str(tmp_path),
            "JOBLEDGER_KAFKA__SECURITY_PROTOCOL": "SSL",
            "JOBLEDGER_SCHEMA_REGISTRY": "http://me:secret@here",
            "PATH": "ignored",
        }
    )
    assert settings.bootstrap == "a:1,b:2"
    assert settings.submit_timeout == 2.5
    assert (settings.retention_days, Settings().retention_days) == (7, 90)
    assert settings.schema_registry == "http://me:secret@here"
    assert "secret" not in repr(settings)
    assert settings.kafka == {"security.protocol": "SSL"}
    assert settings.librdkafka()["bootstrap.servers"] == "a:1,b:2"
    assert settings.resolve_status_url("shop") == "sqlite:///x.db"


def test_a_misspelt_variable_is_refused() -> None:
    """A name that means nothing is an error: it would be a setting that silently does nothing."""
    with pytest.raises(ConfigError, match="JOBLEDGER_BOOTSTRAPS"):
        Settings.from_env({"JOBLEDGER_BOOTSTRAPS": "a:1"})


@pytest.mark.parametrize("value", ["0", "-1", "soon"])
def test_a_bad_number_is_named(value: str) -> None:
    """A value that is no positive number is named with its variable."""
    with pytest.raises(ConfigError, match="JOBLEDGER_SUBMIT_TIMEOUT"):
        Settings.from_env({"JOBLEDGER_SUBMIT_TIMEOUT": value})


def test_without_a_broker_both_ways_out_are_named(tmp_path: Path) -> None:
    """With no address and no embedded broker the error names the variable and the command."""
    with pytest.raises(BrokerUnavailable, match=r"JOBLEDGER_BOOTSTRAP.*jobledger kafka start"):
        Settings(home=tmp_path).resolve_bootstrap()


def test_the_command_line_wins() -> None:
    """``--bootstrap`` wins over the environment; without it nothing changes."""
    settings = Settings(bootstrap="a:1")
    assert settings.with_bootstrap("b:2").bootstrap == "b:2"
    assert settings.with_bootstrap(None) is settings
    assert settings.with_status_url("sqlite:///y.db").status_url == "sqlite:///y.db"


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "-a", "x" * 101])
def test_a_namespace_that_cannot_be_a_topic_is_refused(name: str) -> None:
    """A name that could not stand in a topic's name is refused at once."""
    with pytest.raises(ConfigError):
        Names(name)


def test_topic_names_can_be_read_back() -> None:
    """The queue of a work topic is found from its name; other topics have none."""
    names = Names("shop")
    assert names.jobs("mail") == "shop.jobs.mail"
    assert names.queue_of("shop.jobs.mail") == "mail"
    assert names.queue_of("shop.lifecycle") is None
