"""Creates OpenTelemetry spans, if the process uses OpenTelemetry. One trace contains a submission, the attempts of its
job, and the jobs that these attempts submit.

This module does not import OpenTelemetry: a process that has set a tracer provider has loaded OpenTelemetry itself. In
any other process, tracing costs one lookup in ``sys.modules``. The W3C traceparent is in the event's ``trace``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobledger.definitions.context import JobContext
from jobledger.definitions.retry import Snooze
from jobledger.errors import is_a, leaves, text_of, type_of

if TYPE_CHECKING:
    from jobledger.definitions.task import Task

_MODULE = "opentelemetry.trace"
_SCOPE = "jobledger"


def _tracer() -> Any:
    """Return the tracer if a tracer provider has been set; else None."""
    otel = sys.modules.get(_MODULE)
    # Without a provider, the API creates only spans that record nothing.
    if otel is None or type(otel.get_tracer_provider()).__name__ in ("ProxyTracerProvider", "NoOpTracerProvider"):
        return None
    return otel.get_tracer(_SCOPE)


def flush(most_ms: int) -> None:
    """Make a provider that buffers spans export them within ``most_ms`` milliseconds."""
    if (otel := sys.modules.get(_MODULE)) is not None:
        force = getattr(otel.get_tracer_provider(), "force_flush", None)
        if force is not None:
            force(most_ms)


def current() -> str | None:
    """Return the traceparent of the current span; None if there is no current span."""
    otel = sys.modules.get(_MODULE)
    if otel is None:
        return None
    context = otel.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def parse(traceparent: str | None) -> tuple[int, int, int] | None:
    """Return the trace id, the span id and the flags of a W3C traceparent; None if the traceparent is not valid."""
    parts = (traceparent or "").split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2] or parts[0] == "ff":
        return None
    try:
        trace, span, flags = (int(part, 16) for part in parts[1:4])
    except ValueError:
        return None
    return (trace, span, flags) if trace and span else None


@contextlib.contextmanager
def _submitting(tracer: Any, name: str, attributes: dict[str, Any]) -> Iterator[None]:
    otel = sys.modules[_MODULE]
    with tracer.start_as_current_span(
        name, kind=otel.SpanKind.PRODUCER, attributes={"messaging.system": "kafka", **attributes}
    ):
        yield


_NOTHING = contextlib.nullcontext()


def submitting(task: str, queue: str, count: int = 1) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that creates a span ``submit TASK`` around a submission. The span is the current span
    while the block runs. Without a tracer provider, no span is created."""
    tracer = _tracer()
    if tracer is None:
        return _NOTHING
    attributes: dict[str, Any] = {"messaging.operation.type": "send", "messaging.operation.name": "submit"}
    if task:
        attributes |= {"jobledger.task": task, "jobledger.queue": queue}
    if count != 1:
        attributes["messaging.batch.message_count"] = count
    return _submitting(tracer, f"submit {task}".strip(), attributes)


class Span:
    """An ``around`` hook that creates the span of an attempt."""

    is_async = False

    def __init__(self, task: Task[Any, Any], tracer: Any) -> None:
        self._name, self._tracer = f"run {task.name}", tracer
        self._topics = task.registry.names

    @contextlib.contextmanager
    def fn(self, job: JobContext) -> Iterator[None]:
        """Create a CONSUMER span, a child of the submission's span, and make it current while the job's code runs."""
        otel: Any = sys.modules[_MODULE]
        submitted = parse(job.trace)
        context, links = None, []
        if submitted is not None:
            trace, span_id, flags = submitted
            origin = otel.SpanContext(trace, span_id, is_remote=True, trace_flags=otel.TraceFlags(flags))
            context = otel.set_span_in_context(otel.NonRecordingSpan(origin))
            links = [otel.Link(origin)]
        with self._tracer.start_as_current_span(
            self._name,
            context=context,
            kind=otel.SpanKind.CONSUMER,
            links=links,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.type": "process",
                "messaging.operation.name": "run",
                "messaging.destination.name": self._topics.jobs(job.queue),
                "messaging.message.id": job.job_id,
                "jobledger.job_id": job.job_id,
                "jobledger.task": job.task,
                "jobledger.queue": job.queue,
                "jobledger.attempt": job.attempt,
                "jobledger.run": job.run,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                if all(is_a(leaf, Snooze) for leaf in leaves(error)):  # a snooze is not an error: the job was too early
                    span.set_attribute("jobledger.snoozed", text_of(error))
                    raise
                try:
                    span.record_exception(error)
                except BaseException:  # noqa: BLE001  # the exception's own code is the user's, and may raise anything
                    message = text_of(error)
                    span.add_event("exception", {"exception.type": type_of(error), "exception.message": message})
                span.set_status(otel.Status(otel.StatusCode.ERROR, type_of(error)))
                raise


def span_of(task: Task[Any, Any]) -> Span | None:
    """Return the `Span` for a task's attempts; None if the process does not use OpenTelemetry."""
    tracer = _tracer()
    return None if tracer is None else Span(task, tracer)
