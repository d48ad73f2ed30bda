"""Settings, and the names of topics."""

from __future__ import annotations

import math
import re
import stat
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from jobledger.config import KAFKA_PREFIX, KNOWN, PREFIX, Settings
from jobledger.errors import BrokerUnavailable, ConfigError
from jobledger.kafka.embedded.defaults import default_home
from jobledger.kafka.topic_names import Names


def test_settings_are_read_from_the_environment(tmp_path: Path) -> None:
    """Each variable becomes a setting, and Kafka's own settings get librdkafka's names."""
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


def test_the_home_folder_is_read_in_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is expanded, an empty value does not count, and a given environment is used instead of this process's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JOBLEDGER_HOME", "~/here")
    assert default_home() == Settings().home == Settings.from_env().home == tmp_path / "here"
    assert Settings.from_env({"JOBLEDGER_HOME": "~/there"}).home == tmp_path / "there"
    for environ in ({}, {"JOBLEDGER_HOME": ""}):
        assert Settings.from_env(environ).home == Path(platformdirs.user_data_dir("jobledger"))


def test_a_misspelt_variable_is_refused() -> None:
    """An unknown name is an error, because the setting would have no effect."""
    with pytest.raises(ConfigError, match=r"JOBLEDGER_BOOTSTRAPS .*did you mean JOBLEDGER_BOOTSTRAP\?"):
        Settings.from_env({"JOBLEDGER_BOOTSTRAPS": "a:1"})
    with pytest.raises(ConfigError, match=r"JOBLEDGER_KAFKA_SSL_CA_LOCATION is not a setting"):
        Settings.from_env({"JOBLEDGER_KAFKA_SSL_CA_LOCATION": "/ca.pem"})


def test_every_variable_that_the_code_and_the_reference_name_is_known() -> None:
    """A variable that one part reads must not be refused as a typo by another part."""
    root = Path(__file__).resolve().parents[2]
    sources = [p for folder in ("jobledger", "consumers", "streams", "schemas") for p in (root / folder).rglob("*.py")]
    sources += [*root.glob("tests/*.py"), *root.glob(".ci/run")]  # the tests' own variables
    variables: set[str] = set()
    for path in (*sources, root / "docs/reference.md", root / "docs/hooks.md", root / "docker-compose.yml"):
        variables |= set(re.findall(rf"(?<![_A-Z]){PREFIX}[A-Z_]+", path.read_text("utf-8")))
    named = {name for name in variables if not name.startswith(KAFKA_PREFIX)}
    assert {"JOBLEDGER_LOG_LEVEL", "JOBLEDGER_LOG_FORMAT"} <= named
    assert named - {PREFIX + name for name in KNOWN} == set()
    reference = (root / "docs/reference.md").read_text("utf-8")
    assert [name for name in KNOWN if f"`{PREFIX}{name}`" not in reference] == []
    Settings.from_env(dict.fromkeys(named - {"JOBLEDGER_BOOTSTRAP"}, ""))


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["SUBMIT_TIMEOUT", "RETENTION_DAYS", "MAX_RECORD_BYTES"])
def test_the_error_of_a_bad_number_names_its_variable(name: str, value: str) -> None:
    """The value must be a positive, finite number."""
    with pytest.raises(ConfigError, match=rf"{PREFIX}{name}.* is not a"):
        Settings.from_env({PREFIX + name: value})


def test_a_maximum_record_size_is_a_whole_number_of_at_least_1000_bytes() -> None:
    """A fraction of a byte and a size too small for an event are refused; 1e6 is accepted."""
    assert Settings.from_env({"JOBLEDGER_MAX_RECORD_BYTES": "1e6"}).max_record_bytes == 1_000_000
    for value in ("0.5", "1000.5", "999"):
        with pytest.raises(ConfigError, match=r"MAX_RECORD_BYTES.* is not a whole number of bytes, 1,000 or more"):
            Settings.from_env({"JOBLEDGER_MAX_RECORD_BYTES": value})


@pytest.mark.parametrize("name", ["submit_timeout", "retention_days", "max_record_bytes"])
@pytest.mark.parametrize("value", [-3, 0, math.nan, math.inf, "30"])
def test_numbers_in_code_are_checked_as_in_the_environment(name: str, value: Any) -> None:
    """The error has the value, the argument and the variable."""
    with pytest.raises(ConfigError, match=rf"{name}={value!r} \({PREFIX}{name.upper()}\) is not a"):
        Settings(**{name: value})


def test_only_this_user_can_read_the_folders_of_databases(tmp_path: Path) -> None:
    """The databases contain arguments and results of jobs."""
    from jobledger.streams.coordinator.faust.instance_dir import lock_instance_dir
    from jobledger.streams.projections.projection_store import ProjectionStore
    from jobledger.streams.status.store import open_store

    Settings(home=tmp_path).resolve_status_url("shop")
    lock_instance_dir(tmp_path / "coordinator", "shop").release()
    open_store(f"sqlite:///{tmp_path}/table/s.db", "shop").close()
    ProjectionStore(f"sqlite:///{tmp_path}/folds/s.db", "shop").close()
    made = [tmp_path / name for name in ("status", "coordinator", "coordinator/0", "table", "folds")]
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in made} == {path.name: "0o700" for path in made}


def test_the_error_without_a_broker_names_both_remedies(tmp_path: Path) -> None:
    """Without an address and an embedded broker, the error names the variable and the command."""
    with pytest.raises(BrokerUnavailable, match=r"JOBLEDGER_BOOTSTRAP.*jobledger kafka start"):
        Settings(home=tmp_path).resolve_bootstrap()


def test_options_of_the_command_line_replace_settings() -> None:
    """``--bootstrap`` replaces the address of the environment. Without the option the settings do not change."""
    settings = Settings(bootstrap="a:1")
    assert settings.with_bootstrap("b:2").bootstrap == "b:2"
    assert settings.with_bootstrap(None) is settings
    assert settings.with_status_url("sqlite:///y.db").status_url == "sqlite:///y.db"


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "-a", "x" * 101])
def test_a_namespace_that_cannot_be_a_topic_is_refused(name: str) -> None:
    """The error is raised when the names are made."""
    with pytest.raises(ConfigError):
        Names(name)


@pytest.mark.parametrize("page", ["reference.md", "wire.md"])
def test_every_topic_is_in_the_tables_of_topics(page: str) -> None:
    """The reference and the page about the wire list every topic that `topics apply` makes."""
    from jobledger import App
    from jobledger.definitions.queues import Queue
    from jobledger.kafka.topology import wanted

    app = App("shop", settings=Settings(), queues=[Queue("mail", priorities=True)])

    @app.event
    class Happened:
        what: str

    made = {re.sub(r"\.(high|low)$", "", spec.name) for spec in wanted(app, 1)[0]}
    assert len(made) >= 8
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text("utf-8").partition("## Topics")[2]
    documented = [re.sub("<.*?>", "[^.]+", name) for name in re.findall(r"^\| `<ns>\.(\S+?)`", text, re.MULTILINE)]
    assert {name for name in made if not any(re.fullmatch(rf"shop\.{each}", name) for each in documented)} == set()


def test_topic_names_can_be_read_back() -> None:
    """The queue of a work topic is read from its name. The names of other topics have no queue."""
    names = Names("shop")
    assert names.jobs("mail") == "shop.jobs.mail"
    assert names.queue_of("shop.jobs.mail") == "mail"
    assert names.queue_of("shop.lifecycle") is None
