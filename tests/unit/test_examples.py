"""The app that docker-compose.yml runs can be loaded, and its parts fit together."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from examples import shop
from jobledger import Reject

ROOT = Path(__file__).resolve().parents[2]


def test_the_shop_loads_and_its_functions_run_as_functions() -> None:
    """Queues, handlers and the projection are registered. A handler and a fold can be called as plain functions."""
    shop.app.check()
    assert sorted(shop.app.queues) == ["crm", "mail"]
    assert [h.task.name for h in shop.app.registry.handlers["UserRegistered"]] == ["sync_crm", "welcome"]
    assert asyncio.run(shop.welcome(shop.UserRegistered("u-1"))) == "wrote to u-1"
    assert shop.count_signups({"people": 2}, shop.UserRegistered("u-1")) == {"people": 3}
    with pytest.raises(Reject):
        asyncio.run(shop.send_mail("nonsense"))


def test_the_compose_file_and_the_image_name_existing_files_and_versions() -> None:
    """The app, the copied packages and the pinned versions of the demo's data are those of this checkout."""
    compose, image = (ROOT / "docker-compose.yml").read_text("utf-8"), (ROOT / "Dockerfile").read_text("utf-8")
    assert "${APP:-examples.shop:app}" in compose
    copied = re.findall(r"^COPY (?:\S+ )*(\S+) \S+$", image, re.MULTILINE)
    assert {"jobledger", "schemas", "consumers", "streams", "examples"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    pins = re.findall(r"(airportsdata|tzdata)==([\d.]+)", image)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert len(pins) == 2
    assert all(f"{name}=={version}" in project for name, version in pins)
