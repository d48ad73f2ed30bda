"""Taskiq's jobs, and the program that submits them. This module runs in Taskiq's own environment."""

import asyncio
import os
import time

import uvloop
from taskiq.serializers import ORJSONSerializer
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from bench.peers.submitting import Course

results = {"serializer": ORJSONSerializer()} if os.environ.get("BENCH_ORJSON") else {}
broker = RedisStreamBroker(os.environ["BENCH_JOBS"], xread_count=int(os.environ.get("BENCH_READ", "100")))
broker = broker.with_result_backend(RedisAsyncResultBackend(os.environ["BENCH_RESULTS"], **results))
if os.environ.get("BENCH_ORJSON"):
    broker = broker.with_serializer(ORJSONSerializer())


@broker.task(task_name="noop")
async def noop(number: int) -> int:
    return number


@broker.task(task_name="nap")
async def nap(number: int) -> int:
    await asyncio.sleep(0.05)
    return number


@broker.task(task_name="stamp")
async def stamp(at_ns: int) -> int:
    with open(os.environ["BENCH_STAMPS"], "a") as file:  # noqa: ASYNC230  # one short line
        file.write(f"{time.time_ns() - at_ns}\n")
    return at_ns


async def main() -> None:
    course = Course()
    task = {"noop": noop, "nap": nap, "stamp": stamp}[course.task]
    await broker.startup()
    if course.bulk:  # Taskiq has no call for many jobs: send as many at once as there are connections
        for numbers in course.chunks(50):
            await asyncio.gather(*(task.kiq(number) for number in numbers))
    else:
        for number in course:
            await task.kiq(number)
    await broker.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
