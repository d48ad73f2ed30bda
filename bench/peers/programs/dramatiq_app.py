"""Dramatiq's jobs, and the program that submits them. This module runs in Dramatiq's own environment."""

import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Retries
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from bench.peers.submitting import Course

CONNECTIONS = "?max_connections=2000"  # the default is too low for 500 threads: results would be lost
lean = {"middleware": [Retries()]} if os.environ.get("BENCH_LEAN") else {}
broker = RedisBroker(url=os.environ["BENCH_JOBS"] + CONNECTIONS, **lean)
results = RedisBackend(url=os.environ["BENCH_RESULTS"] + CONNECTIONS)
broker.add_middleware(Results(backend=results, result_ttl=3_600_000))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(number):
    return number


@dramatiq.actor(store_results=True)
def nap(number):
    time.sleep(0.05)
    return number


@dramatiq.actor(store_results=True)
def stamp(at_ns):
    with open(os.environ["BENCH_STAMPS"], "a") as file:
        file.write(f"{time.time_ns() - at_ns}\n")
    return at_ns


if __name__ == "__main__":
    course = Course()
    actor = {"noop": noop, "nap": nap, "stamp": stamp}[course.task]
    for number in course:
        actor.send(number)
