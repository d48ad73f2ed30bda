"""The fixtures of all contract tests: a status database of each kind, its writer and its reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from jobledger.streams.status.store import StatusReader, Store, open_reader
from tests.contract.test_store import BACKENDS, NAMESPACE, Backend


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with BACKENDS[request.param](request) as made:
        yield made


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    with backend.store() as made:
        assert made.acquire()
        yield made


@pytest.fixture
def reader(backend: Backend, store: Store) -> Iterator[StatusReader]:
    with closing(open_reader(backend.url, NAMESPACE)) as made:
        yield made
