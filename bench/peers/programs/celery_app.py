"""Celery's jobs, and the program that submits them. This module runs in Celery's own environment."""

import os
import time

from celery import Celery

from bench.peers.submitting import Course

app = Celery("bench", broker=os.environ["BENCH_JOBS"], backend=os.environ["BENCH_RESULTS"])
app.conf.update(
    task_acks_late=True,  # at least once, as all other systems here
    task_ignore_result=False,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


@app.task
def noop(number):
    return number


@app.task
def nap(number):
    time.sleep(0.05)
    return number


@app.task
def stamp(at_ns):
    with open(os.environ["BENCH_STAMPS"], "a") as file:
        file.write(f"{time.time_ns() - at_ns}\n")
    return at_ns


if __name__ == "__main__":
    course = Course()
    # The task is called by the name that the workers know, because here the module's name is __main__.
    task = app.signature(f"bench.peers.programs.celery_app.{course.task}")
    for number in course:
        task.delay(number)
