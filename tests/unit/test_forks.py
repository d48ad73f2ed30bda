"""Objects of one process: locks that refuse a second use by their own thread and are free in a fork, and clients that
do nothing in a fork."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from jobledger import ConnectionUnusable
from jobledger.process import forks
from tests.running_job import running_job

NOWHERE = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


def in_a_fork(act: Callable[[], None]) -> int:
    """Call ``act`` in a forked child process; return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: pytest has threads
        pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as exc:  # noqa: BLE001  # no exception may reach pytest's code in the fork
            os.write(2, f"{exc!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_a_fork_can_connect_although_a_thread_looked_up_an_address_at_that_moment() -> None:
    """glibc has a lock in the look-up of addresses that it does not free in a fork. In a fork of a process with Kafka
    clients the lock is free."""
    client = forks.client(AdminClient, NOWHERE)
    done = threading.Event()

    def look_up() -> None:
        # As bytes: for a text, Python imports a codec, and a fork must not happen meanwhile.
        socket.getaddrinfo(b"127.0.0.1", 9092, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)

    def look_up_all_the_time() -> None:
        while not done.is_set():
            look_up()

    def look_up_in_time() -> None:
        signal.alarm(60)  # ends the process
        look_up()

    threads = [threading.Thread(target=look_up_all_the_time) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert [in_a_fork(look_up_in_time) for _ in range(20)] == [0] * 20
    finally:
        done.set()
        for thread in threads:
            thread.join()
    del client


def test_a_thread_that_holds_a_lock_cannot_take_it_again() -> None:
    """A signal handler could try that. The error has the reason, and the lock can be used afterwards."""
    lock = forks.Lock()
    refused = pytest.raises(ConnectionUnusable, match="while it was opening the connection")
    with lock("opening the connection"), refused, lock("opening the connection"):
        pass
    with lock("opening the connection"):
        pass


def test_a_lock_that_another_thread_holds_is_free_in_a_fork() -> None:
    """The lock of the thread that forks is not changed."""
    mine, others = forks.Lock(), forks.Lock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with others("x"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)

    def use() -> None:
        with others("x"):
            pass

    with mine("x"):
        assert in_a_fork(use) == 0
    done.set()
    thread.join()


def test_a_fork_finds_a_moment_without_a_query() -> None:
    """Eight threads query without a pause, so that always a query runs. New queries wait until the fork is done, and
    then all threads continue."""
    stop, ended = threading.Event(), [0] * 8

    def query(number: int) -> None:
        while not stop.is_set():
            token = forks.begin_query()
            time.sleep(0.002)
            forks.end_query(token)
            ended[number] += 1

    threads = [threading.Thread(target=query, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            forks._before()
            try:
                assert not forks._queries
            finally:
                forks._in_parent()
            before, deadline = list(ended), time.monotonic() + 60
            while not all(now > then for now, then in zip(ended, before, strict=True)):
                assert time.monotonic() < deadline, ended
                time.sleep(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not forks._forking


def test_a_long_query_and_a_fork_delay_each_other_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread may also query while it uses the result of another query, and a fork may happen inside a query."""
    monkeypatch.setattr(forks, "QUIET_S", 0.05)
    long = forks.begin_query()
    forks._before()  # returns although a query runs
    try:
        forks.end_query(forks.begin_query())  # a query of the thread that forks
        other = threading.Thread(target=lambda: forks.end_query(forks.begin_query()))
        other.start()
        other.join(60)
        assert not other.is_alive()
    finally:
        forks._in_parent()
    assert in_a_fork(lambda: forks.end_query(long)) == 0
    assert forks._queries == {long}
    forks.end_query(long)


def test_a_client_does_nothing_in_a_fork() -> None:
    """In a fork, `close` does nothing, other uses raise, and freeing the client does not hang. In the parent the client
    still works."""
    held = [
        forks.client(Producer, NOWHERE),
        forks.client(Consumer, {**NOWHERE, "group.id": "g"}),
        forks.client(AdminClient, NOWHERE),
    ]

    def use() -> None:
        producer, consumer, admin = held
        assert isinstance(producer, Producer)
        assert isinstance(consumer, Consumer)
        assert isinstance(admin, AdminClient)
        for ask in (lambda: producer.produce("t"), lambda: consumer.poll(0), lambda: admin.list_topics(timeout=1)):
            with pytest.raises(ConnectionUnusable, match="a fork of it"):
                ask()
        assert producer.flush(10.0) == 0
        producer.close()
        consumer.close()
        held.clear()

    assert in_a_fork(use) == 0
    assert isinstance(held[1], Consumer)
    assert held[1].poll(0) is None
    held[1].close()


def test_identical_children_of_a_job_get_different_ids_from_any_thread() -> None:
    """The ids are the same in each run."""
    job = running_job("01890a5d-ac96-774b-bcce-b302099a8057", "t", lambda job, report: None)
    again = running_job("01890a5d-ac96-774b-bcce-b302099a8057", "t", lambda job, report: None)
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(job.child_id("t", b"{}") for _ in range(200))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 800
    assert set(ids) == {again.child_id("t", b"{}") for _ in range(800)}


def test_a_thread_knows_whether_it_holds_a_lock() -> None:
    """In that case a blocking call is made in this thread, because another thread could wait for this one."""
    lock = forks.Lock()
    assert not forks.inside()
    with lock("opening the connection"):
        assert forks.inside()
    assert not forks.inside()
