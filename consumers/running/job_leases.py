"""Takes and renews the leases of long jobs, so that long jobs do not block their partition while they run.

`JobLeased` (lifecycle) and `Leased` (coordination) are acknowledged before the code runs; then the work record is done,
and the job does not depend on the partition. The lease is renewed until the job's outcome for the coordinator is
acknowledged. If no renewal is acknowledged for the duration of a lease, another worker may run the job; the code in
this worker is then told to end, and its outcome no longer counts. Runs on the event loop, except where stated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message

from jobledger.consumers.recording.recorder import Recorder
from jobledger.consumers.recording.worker_producer import BY_KEY, WorkerProducer
from jobledger.consumers.state.reports import Asked, Reports
from jobledger.consumers.state.work import JobLease, JobRun
from jobledger.errors import AccessDenied, BrokerUnavailable, JobledgerError
from jobledger.log.writer import Outgoing
from jobledger.process.logger import get_logger
from jobledger.schemas import codec
from jobledger.schemas.events import JobLeased, LeaseRenewed

LOG = get_logger("jobledger.worker")

#: Seconds between two checks of the leases.
TICK_S = 0.5
#: How often the outcome of a leased job is sent again before the worker stops.
RESENDS = 20

_monotonic = time.monotonic


class JobLeases:
    """Takes, renews and gives back the leases of one worker, and sends the outcomes of leased jobs to the coordinator.
    It asks the dispatcher through ``reports``."""

    def __init__(self, sender: WorkerProducer, recorder: Recorder, reports: Reports) -> None:
        self._event_builder, self._sender = recorder.event_builder, sender
        self._names = recorder.event_builder.names
        self._recorder, self._reports, self._calls = recorder, reports, reports.calls
        self._held: dict[JobRun, JobLease] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self.lost = 0

    @property
    def count(self) -> int:
        """The number of leases held now."""
        return len(self._held)

    # -- taking -------------------------------------------------------------------------------------------------------

    def take(self, work: JobRun) -> None:
        """Take a lease for a job that may run. The job's code is begun when the lease is in the log. Raises what
        `WorkerProducer.send` raises."""
        event, runtime = work.event, work.runtime
        assert event is not None
        assert runtime is not None
        seconds = runtime.task.policy.lease
        lease = work.lease = JobLease(self, seconds, _monotonic())
        self._held[work] = lease
        work.remaining = 2
        lease_ms = round(seconds * 1000)
        value = codec.encode(self._event_builder.event(event, JobLeased(self._event_builder.source, lease_ms)))
        self._sender.send(self._names.lifecycle, value, event.job_id, work.partition.number, work.settling_delivered)
        record = self._event_builder.leased(event, self._event_builder.source, lease_ms)
        assert record.value is not None
        self._sender.send(record.topic, record.value, record.key, BY_KEY, work.derived_delivered)
        if self._ticking is None:
            self._ticking = self._calls.later(TICK_S, self._tick)

    def written(self, work: JobRun) -> None:
        """Report that both facts of the job's lease are acknowledged. Any thread."""
        self._reports.ask(Asked.LEASED, work)

    def grant(self, work: JobRun) -> bool:
        """Return whether the code of a job whose lease is in the log may begin now. If the lease is over or the job was
        abandoned, give the lease back. If the job was stopped meanwhile, close the job."""
        lease = work.lease
        if lease is None or lease.granted:
            return False
        lease.granted = True
        if work.abandoned or _monotonic() > lease.until:
            self.give_back(work)
        elif work.stop_outcome is not None:
            self._recorder.close_with(work, work.stop_outcome)
        else:
            return True
        self._reports.ended(work)
        return False

    # -- renewing -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._ticking = None
        if self._held:
            self._ticking = self._calls.later(TICK_S, self._tick)
        self._look()

    def _look(self) -> None:
        now = _monotonic()
        for work, lease in list(self._held.items()):
            if not lease.granted:
                continue
            if now > lease.until and not lease.closing:
                self._lose(work)
            elif now >= lease.renew_at:
                lease.renew_at = now + lease.seconds / 3
                self._renew(work, round(lease.seconds * 1000), partial(self._renewed, lease, now))

    def _renew(
        self, work: JobRun, lease_ms: int, delivered: Callable[[KafkaError | None, Message], None] | None
    ) -> None:
        event = work.event
        assert event is not None
        value = codec.encode(self._event_builder.event(event, LeaseRenewed(self._event_builder.source, lease_ms)))
        try:
            self._sender.send(self._names.coordination, value, event.home or event.job_id, BY_KEY, delivered)
        except (JobledgerError, KafkaException, BufferError) as exc:  # retried after a third of the lease
            LOG.warning("the lease of job %s was not renewed: %s", event.job_id, exc)

    @staticmethod
    def _renewed(lease: JobLease, asked_at: float, error: KafkaError | None, message: Message) -> None:
        if error is None:
            lease.until = max(lease.until, asked_at + lease.seconds)

    def _lose(self, work: JobRun) -> None:
        """Give up a job whose lease is over: no renewal was acknowledged in time, so another worker may run the job
        now."""
        assert work.event is not None
        LOG.warning(
            "the lease of job %s (%s) is over: it was not renewed in time. Its code here is told to stop, and its "
            "outcome no longer counts",
            work.event.job_id,
            work.event.task,
        )
        self.lost += 1
        self.give_back(work)
        self._reports.ask(Asked.LEASE_LOST, work)

    def give_back(self, work: JobRun) -> None:
        """End the lease and abandon the job in this worker, so that another worker can run the job at once."""
        work.abandoned = True
        if self._held.pop(work, None) is not None:
            self._renew(work, 0, None)

    # -- closing ------------------------------------------------------------------------------------------------------

    def send_outcome(self, work: JobRun, value: bytes, before: list[Outgoing]) -> None:
        """Send the job's outcome, encoded in ``value``, to the coordinator, after the records ``before`` are
        acknowledged. The lease is renewed until the outcome is acknowledged. Any thread. Raises what
        `WorkerProducer.send` raises."""
        lease = work.lease
        assert lease is not None
        lease.closing = True
        if not before:
            self._send_to_coordinator(work, value)
            return
        left = [len(before)]

        def written(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed(f"the fallback job of {_name(work)}", error, message.topic() or self._names.coordination)
                return
            left[0] -= 1
            if not left[0]:
                self._calls.call(self._send_to_coordinator, work, value)

        for record in before:
            assert record.value is not None
            self._sender.send(record.topic, record.value, record.key, BY_KEY, written)

    def _send_to_coordinator(self, work: JobRun, value: bytes) -> None:
        event = work.event
        assert event is not None
        self._sender.send(
            self._names.coordination,
            value,
            event.home or event.job_id,
            BY_KEY,
            partial(self._outcome_delivered, work, value),
        )

    def _outcome_delivered(self, work: JobRun, value: bytes, error: KafkaError | None, message: Message) -> None:
        """Handle the delivery of the outcome. Any thread."""
        lease = work.lease
        assert lease is not None
        if error is None:
            self._calls.call(self._held.pop, work, None)
        elif error.code() == KafkaError.MSG_SIZE_TOO_LARGE and not work.shortened:
            work.shortened = True
            limit = f"what topic {self._names.coordination} takes (its max.message.bytes)"
            self._calls.call(self._recorder.refused_as_too_large, work, len(value), limit)
        elif error.fatal() or lease.tries >= RESENDS:
            self._failed(f"the outcome of {_name(work)}", error, self._names.coordination)
        else:
            lease.tries += 1
            self._calls.call(self._send_to_coordinator, work, value)

    def _failed(self, what: str, error: KafkaError, topic: str) -> None:
        refused = self._sender.failed(error, topic)
        if isinstance(refused, AccessDenied):
            self._calls.fail(refused)
        else:
            self._calls.fail(
                BrokerUnavailable(
                    f"{what} could not be written ({error.str()}); the job's lease ends by itself, and another worker "
                    "runs the job again"
                )
            )

    def give_back_all(self) -> None:
        """Give back the leases of jobs without an outcome, and stop renewing leases, because the worker ends."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        for work, lease in list(self._held.items()):
            if not lease.closing:
                self.give_back(work)


def _name(work: JobRun) -> str:
    return f"job {work.event.job_id}" if work.event is not None else "a job"
