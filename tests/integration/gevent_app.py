"""Functions that the tests of gevent run in separate processes: ``python gevent_app.py NAME`` calls the function NAME.

The process first applies gevent's patches, as a server with gevent workers does. Each function checks its result
itself, and raises an error if something is wrong.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("GREEN") == "eventlet":
    import eventlet

    eventlet.monkey_patch()
else:
    from gevent import monkey

    monkey.patch_all()

import time  # after the patches
from dataclasses import dataclass, replace  # after the patches
from typing import Any, Self  # after the patches

from jobledger import App, BrokerUnavailable, ConfigError, Settings  # after the patches
from jobledger.kafka import outage
from jobledger.kafka.acls import check  # after the patches
from jobledger.kafka.auth import check_connection  # after the patches
from jobledger.kafka.clients import topic_settings
from jobledger.kafka.embedded.ports import free_port  # after the patches
from jobledger.kafka.topics import ensure  # after the patches
from jobledger.log.group_offsets import lifecycle_groups  # after the patches

app: App = App(os.environ["NAMESPACE"], settings=Settings.from_env(), partitions=3)


@app.task
def add_in_thread(a: int) -> Any:
    """Declare the task that the tests' worker runs."""
    raise NotImplementedError


@app.event
@dataclass(frozen=True)
class Happened:
    """A domain event."""

    n: int


class Ticking:
    """A greenlet that counts while the code inside the block waits."""

    def __enter__(self) -> Self:
        import gevent

        self.ticks = 0
        self._greenlet = gevent.spawn(self._tick)
        return self

    def __exit__(self, *exc: object) -> None:
        self._greenlet.kill()

    def _tick(self) -> None:
        while True:
            time.sleep(0.005)
            self.ticks += 1


def uses() -> None:
    """Use all functions of a client, in one greenlet and in many at the same time."""
    import gevent

    ensure(app, app.settings)
    with Ticking() as other:
        assert len({add_in_thread.submit(n).job_id for n in range(50)}) == 50
        assert len(app.submit_many(add_in_thread.job(n) for n in range(3000))) == 3000
        app.emit(Happened(1))
        assert len(app.emit_many([Happened(n) for n in range(100)])) == 100
        add_in_thread.submit(1).cancel("in vain")
        jobs = [gevent.spawn(lambda n=n: [add_in_thread.submit(n).job_id for _ in range(10)]) for n in range(100)]
        gevent.joinall(jobs, raise_error=True)
        assert len({job for each in jobs for job in each.value}) == 1000
        app.close()
        add_in_thread.submit(1)
        with app.lifecycle("readers", timeout=60.0) as records:
            assert any(True for _ in records)
        list(gevent.get_hub().threadpool.apply(lambda: [add_in_thread.submit(1)]))
    assert other.ticks > 20


def results() -> None:
    """Wait for the results of jobs that another process runs, in as many greenlets as there are jobs."""
    import gevent

    handles = app.submit_many(add_in_thread.job(n) for n in range(40))
    assert handles[0].wait(timeout=100).state.ended
    with Ticking() as other:
        waiting = [gevent.spawn(handle.result, 100) for handle in handles]
        one = add_in_thread.submit(99)
        assert one.status(timeout=100).job_id == one.job_id
        assert one.result(timeout=100)["sum"] == 100
        gevent.joinall(waiting, raise_error=True)
    assert [each.value["sum"] for each in waiting] == [n + 1 for n in range(40)]
    assert other.ticks
    assert len(list(app.jobs(limit=5))) == 5


def asks() -> None:
    """Send requests to the cluster whose answers arrive in librdkafka's own thread, while this process does nothing
    else."""
    ensure(app, app.settings)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that the thread with the answers is interrupted at any place
    for _ in range(30):
        check_connection(app.settings)
        assert outage._answers(app.settings)
        assert topic_settings(app.settings, [app.names.lifecycle, app.names.control])
        check(app.settings, app.names.namespace, [app.names.lifecycle])
        assert lifecycle_groups(app.settings, app.names) == []
        ensure(app, app.settings)
    sys.setswitchinterval(switching)


def away() -> None:
    """Submit without a broker: thirty greenlets get an error after the time limit, and other greenlets run meanwhile."""
    import gevent

    nowhere = App("nowhere", settings=replace(app.settings, bootstrap=f"127.0.0.1:{free_port()}", submit_timeout=3.0))
    task = nowhere.task(name="t")(lambda n: n)

    def fails() -> None:
        try:
            task.submit(1)
        except BrokerUnavailable:
            return
        raise AssertionError("who has acknowledged that?")

    began = time.monotonic()
    with Ticking() as other:
        gevent.joinall([gevent.spawn(fails) for _ in range(30)], raise_error=True)
    assert time.monotonic() - began < 60.0, "they have waited one after the other, for 90 s in all"
    assert other.ticks > 50


def forks() -> None:
    """Submit in processes that gevent has forked. Each of them exits with code 0."""
    add_in_thread.submit(1)
    app.submit_many([add_in_thread.job(1)])
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            add_in_thread.submit(2)
            app.submit_many([add_in_thread.job(1)])
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        add_in_thread.submit(3)


def refused() -> None:
    """Use something that does not work with greenlets, here a client under eventlet: it raises an error at once."""
    began = time.monotonic()
    try:
        add_in_thread.submit(1)
    except ConfigError as exc:
        assert "eventlet" in str(exc), exc  # noqa: PT017  # this function is no test
    else:
        raise AssertionError("it works?")
    assert time.monotonic() - began < 20.0


if __name__ == "__main__":
    globals()[sys.argv[1]]()
