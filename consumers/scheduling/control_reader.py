"""Reads the control commands in force: cancels, pauses, limits.

The control topic is compacted, so a reader rebuilds the commands in force from it. The topic is read to its end before
the worker starts any job, and is read continuously after that. So a command also holds for workers that were down when
the command was given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from jobledger.config import Settings
from jobledger.consumers.state.outcome import Cancelled
from jobledger.definitions.policy import Limits
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError, RegistryNeeded, SchemaError
from jobledger.kafka.auth import read
from jobledger.kafka.clients import PASSING, consumer, consumer_config, translate
from jobledger.kafka.topic_names import Names
from jobledger.log.schema_lookup import decoder
from jobledger.process.logger import get_logger
from jobledger.schemas.events import CancelRequested, JobEvent, QueueLimited, QueuePaused, QueueResumed

LOG = get_logger("jobledger.worker")

#: Seconds within which the topic's end must be reached at the start.
START_S = 30.0
POLL_S = 0.5


class Control:
    """Holds the control commands in force. ``cancels``: by (job id, run). ``paused``: texts that name who paused, and
    why; ``limits``: the limits set at run time; both by (``queue`` or ``task``, name)."""

    def __init__(self) -> None:
        self.cancels: dict[tuple[str, int], Cancelled] = {}
        self.paused: dict[tuple[str, str], str] = {}
        self.limits: dict[tuple[str, str], Limits] = {}
        self._keys: dict[str, tuple[str, tuple[str, int] | tuple[str, str]]] = {}

    def apply(self, key: str, event: JobEvent | None) -> tuple[str, int] | str | None:
        """Apply one record. ``event``: the record's event; None stands for a tombstone. Return what the record changed:
        a job's (id, run) for a cancel, ``"gates"`` for a pause or limit, or None."""
        if event is None:
            return self._revoked(key)
        job = (event.job_id, event.run)
        target = ("queue", event.queue) if event.queue else ("task", event.task)
        match event.fact:
            case CancelRequested(by=by, reason=reason):
                self.cancels[job] = Cancelled(by, reason)
                self._keys[key] = ("cancels", job)
                return job
            case QueuePaused(by=by, reason=reason):
                self.paused[target] = f"by {by}" + (f": {reason}" if reason else "")
                self._keys[key] = ("paused", target)
            case QueueResumed():
                self.paused.pop(target, None)
            case QueueLimited(rate=rate, concurrency=concurrency):
                if rate is None and concurrency is None:
                    self.limits.pop(target, None)
                else:
                    self.limits[target] = Limits(rate, concurrency)
                    self._keys[key] = ("limits", target)
            case _:
                return None
        return "gates"

    def _revoked(self, key: str) -> str | None:
        entry = self._keys.pop(key, None)
        if entry is None:
            return None
        kind, what = entry
        getattr(self, kind).pop(what, None)
        return None if kind == "cancels" else "gates"


class ControlReader(threading.Thread):
    """Updates a `Control` from the control topic. ``cancelled(job, run, cancel)``: a cancel was read that came after
    the records that the topic had at the start. ``regated()``: pauses or limits have changed. Both are called in this
    thread. ``fail(error)``: stops the worker."""

    def __init__(
        self,
        settings: Settings,
        names: Names,
        control: Control,
        *,
        cancelled: Callable[[str, int, Cancelled], None],
        regated: Callable[[], None],
        fail: Callable[[JobledgerError], None],
    ) -> None:
        super().__init__(name="jobledger-control", daemon=True)
        self._settings, self._topic, self.control = settings, names.control, control
        self._cancelled, self._regated, self._fail = cancelled, regated, fail
        self._decoder = decoder(settings, names)
        self._consumer: Consumer | None = None
        self._closing = threading.Event()
        self.live = threading.Event()  # set when all records that the topic had at the start have been read
        self.error: str | None = None

    def run(self) -> None:
        """Read until closed. Pass an error to ``fail``, and end."""
        try:
            config = consumer_config(self._settings) | {"enable.partition.eof": True, "fetch.wait.max.ms": 100}
            reader = self._consumer = consumer(config)
            reader.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])
            while not self._closing.is_set():
                message = reader.poll(POLL_S)
                if message is not None:
                    self._take(message)
        except JobledgerError as exc:
            self._fail(exc)
        except KafkaException as exc:
            self._fail(translate(exc.args[0], self._settings, f"reading {self._topic}", read(self._topic)))
        except Exception as exc:
            LOG.exception("the reader of the control topic failed")
            self._fail(JobledgerError(f"the reader of {self._topic} failed: {exc!r}"))
        finally:
            if self._consumer is not None:
                self._consumer.close()

    def await_live(self) -> None:
        """Wait until all commands that the topic had at the start are known. Returns early if the reader is closed or
        has ended. Raises `BrokerUnavailable` after `START_S` seconds."""
        deadline = time.monotonic() + START_S
        while not self.live.wait(0.1):
            if self._closing.is_set() or not self.is_alive():
                return  # the failure has been reported
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"{self._topic} could not be read to its end within {START_S:g} s"
                    + (f": {self.error}" if self.error else "")
                )

    def close(self) -> None:
        """End the thread after the current poll."""
        self._closing.set()

    def _take(self, message: Message) -> None:
        error = message.error()
        if error is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                self.live.set()
                return
            if error.retriable() or error.code() in PASSING:  # the client itself tries again
                if self.error is None:
                    LOG.warning("%s: %s", self._topic, error.str())
                self.error = error.str()
                return
            problem = translate(error, self._settings, f"reading {self._topic}", read(self._topic))
            if isinstance(problem, AccessDenied) or error.fatal():
                raise problem
            LOG.warning("%s: %s", self._topic, error.str())
            self.error = error.str()
            return
        self.error = None
        key, value = message.key(), message.value()
        name = key.decode(errors="replace") if isinstance(key, bytes) else str(key or "")
        try:
            event = None if value is None else self._decoder.decode(value if isinstance(value, bytes) else None)
        except RegistryNeeded as exc:
            raise JobledgerError(f"{self._topic}@{message.offset()}: {exc}") from exc
        except SchemaError as exc:
            # A restart could not read this command either: log the error and continue.
            LOG.error("%s@%s is not a command that this worker can read: %s", self._topic, message.offset(), exc)
            return
        changed = self.control.apply(name, event)
        if changed == "gates":
            self._regated()
        elif isinstance(changed, tuple):
            cancel = self.control.cancels.get(changed)
            if cancel is not None and self.live.is_set():
                self._cancelled(*changed, cancel)
