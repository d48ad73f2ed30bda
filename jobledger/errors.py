"""The whole error tree. Every message names the value, the setting and the way out.

``JobledgerError``
├── ``ConfigError``              the app, a setting or an option is wrong; raised when the app is loaded or called
│   ├── ``UnknownTask``          a task name nobody registered
│   ├── ``UnknownQueue``         a queue the app does not declare
│   ├── ``BadArguments``         arguments that do not fit the task's signature
│   ├── ``BadEvent``             an event whose values do not fit its class
│   ├── ``BadTags``              a handler's ``tags=`` that fails for an event
│   ├── ``IncompatibleEvent``    an event class that cannot read what earlier ones wrote
│   ├── ``RegistryNeeded``       a record that only a Schema Registry explains, and none is configured
│   └── ``SchemaRefused``        the Schema Registry does not take this version's schema
├── ``BrokerUnavailable``        no broker answered within the bound
│   └── ``RegistryUnavailable``  no Schema Registry answered within the bound
├── ``AccessDenied``             the cluster refuses this client; trying again does not help
│   ├── ``NotAuthenticated``     it does not let it in: password, certificate, listener
│   └── ``NotAuthorized``        it does not let it do something: an ACL is missing
├── ``ConnectionUnusable``       a connection that another process opened, that is closed, or that a signal handler interrupts
├── ``PayloadTooLarge``          one record would exceed the broker's limit
├── ``TopicMissing``             a topic the app needs is not there
├── ``PortTaken``                the embedded broker's port belongs to somebody else
├── ``KafkaStartFailed``         the embedded broker did not come up
├── ``ResourceFailed``           a resource that tasks need could not be opened
├── ``StoreError``               the status database is away, or is not ours
│   ├── ``StoreNotFound``        there is no status table at this address yet
│   ├── ``StoreUnavailable``     no database answers there now; it may later
│   │   └── ``StoreTooSlow``     a statement took longer than the database or a reader's patience allows
│   ├── ``CommitUnknown``        the table is not where its writer left it: it reads on from the table's offsets
│   └── ``LeaseLost``            another materializer took this store over
├── ``StatusTimeout``            the status table did not reach a position, or a job its end, in time
├── ``JobNotFound``              no such job in the status table (never reported as "pending")
├── ``JobFailed``                the job ended in failure; carries type, message and traceback
├── ``JobCancelled``             the job was cancelled before it ended by itself
├── ``JobExpired``               the job passed its expiry before it could start
├── ``ResultMismatch``           the job succeeded, and its result is not what its task's annotation says
├── ``ResultInsideJob``          a job waited for a job of its own pool
└── ``SchemaError``              bytes that are no event of ours
    ├── ``NotAnEvent``           no known framing
    ├── ``UnknownSchema``        framed, but the writer's schema is nowhere published
    └── ``UnknownFact``          a well-formed event whose fact this version does not know

``TaskInterrupted``              (a `BaseException`) told to a task's code in a thread or a process: end
├── ``TaskTimedOut``             its ``timeout`` is over
└── ``TaskCancelled``            its job was cancelled
"""

from __future__ import annotations

from types import TracebackType

# What users raise may break when it is looked at: a property, ``__str__``, even ``__class__`` may raise anything. These
# read what the interpreter itself keeps, and call no code of the exception's but its ``__str__``, guarded.

_TYPE_ATTRIBUTES = type.__dict__


def is_a(error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    """As ``except kinds:`` judges it: by the exception's type. `isinstance` asks its ``__class__`` as well."""
    return issubclass(type(error), kinds)


def type_of(error: object, *, full: bool = False) -> str:
    """The name of an object's type; with ``full`` its module before it, unless that is ``builtins``."""
    kind = type(error)
    name: str = str.__str__(_TYPE_ATTRIBUTES["__qualname__"].__get__(kind))
    if not full:
        return name
    try:
        module = _TYPE_ATTRIBUTES["__module__"].__get__(kind)
    except BaseException:  # noqa: BLE001  # a class may have deleted it
        return name
    return name if type(module) is not str or module == "builtins" else f"{module}.{name}"


def traceback_of(error: BaseException) -> TracebackType | None:
    """Where it was raised, as the interpreter knows it."""
    found: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return found


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    """Of a group, what it holds; empty for any other exception."""
    if not is_a(error, BaseExceptionGroup):
        return ()
    found: tuple[BaseException, ...] = BaseExceptionGroup.__dict__["exceptions"].__get__(error)
    return found


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group and in its groups, each once, from left to right; the exception itself if it is no group."""
    found, todo, seen = [], [error], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        members = members_of(each)
        todo += reversed(members)
        if not members:
            found.append(each)
    return found


def text_of(error: BaseException) -> str:
    """What an exception says, whatever its ``str()`` does."""
    try:
        return str.__str__(str(error))  # a subclass of str has methods of its own
    except BaseException as broken:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<its str() raised {type_of(broken)}>"


class TaskInterrupted(BaseException):
    """Raised inside a task's code that runs in a thread or a process of its own, to end it; no `Exception`, so that
    ``except Exception`` lets it pass. Clean up and let it go on: what returns all the same has succeeded."""


class TaskTimedOut(TaskInterrupted):
    """The attempt has run for as long as the task's ``timeout``."""


class TaskCancelled(TaskInterrupted):
    """Somebody cancelled the job."""


class JobledgerError(Exception):
    """Base of every error that Jobledger raises on purpose.

    ``failed``: of `App.submit_many` and `App.emit_many`, the places, counted from 0, of what was not accepted.
    """

    failed: tuple[int, ...] = ()


class ConfigError(JobledgerError):
    """The app, a setting or an option is wrong."""


class UnknownTask(ConfigError):
    """No task of this name is registered with the app."""


class UnknownQueue(ConfigError):
    """The app does not declare this queue."""


class BadArguments(ConfigError):
    """The arguments do not fit the task's signature, or cannot be written as JSON."""


class BadEvent(ConfigError):
    """The event's values do not fit its class, or its class is no event of the app."""


class BadTags(ConfigError):
    """The ``tags=`` of a handler cannot be told for an event: its function raised, or gave something else than tags."""


class IncompatibleEvent(ConfigError):
    """The event's class cannot read what an earlier version of it wrote to the log."""


class RegistryNeeded(ConfigError):
    """A record carries a Schema Registry's id, and no registry is configured: ``JOBLEDGER_SCHEMA_REGISTRY`` names it.

    No `SchemaError`: the record may be good, so it is neither rejected nor passed.
    """


class SchemaRefused(ConfigError):
    """The Schema Registry does not take this version's schema for a topic; nothing was sent."""


class BrokerUnavailable(JobledgerError):
    """No broker answered, or none acknowledged, within the bound."""


class RegistryUnavailable(BrokerUnavailable):
    """The Schema Registry did not answer within the bound; what needed it is neither done nor rejected."""


class AccessDenied(JobledgerError):
    """The cluster refuses this client. What was to be sent was not, and trying again does not help."""


class NotAuthenticated(AccessDenied):
    """The cluster does not let this client in: a password, a certificate or the kind of listener is wrong."""


class NotAuthorized(AccessDenied):
    """The cluster lets this client in, and does not let it do this.

    ``role``: the part of Jobledger that asked, e.g. ``worker``; ``operation``, ``resource_type`` and ``resource``: the
    right it lacks, e.g. ``Write``, ``topic``, ``shop.lifecycle``.
    """

    def __init__(self, message: str, *, role: str, operation: str, resource_type: str, resource: str) -> None:
        super().__init__(message)
        self.role = role
        self.operation = operation
        self.resource_type = resource_type
        self.resource = resource


class ConnectionUnusable(JobledgerError):
    """The connection cannot be used here and now: it was opened before a fork, it has been closed, the interpreter is
    ending, or this is a signal handler that interrupted its own thread while it was opening it. Nothing was sent."""


class PayloadTooLarge(JobledgerError):
    """The encoded record is larger than the limit; nothing was sent."""


class TopicMissing(JobledgerError):
    """A topic the app needs does not exist; `jobledger topics apply` creates it."""


class PortTaken(JobledgerError):
    """The embedded broker's port is held by another process."""


class KafkaStartFailed(JobledgerError):
    """The embedded broker did not come up; the message carries the end of its log."""


class ResourceFailed(JobledgerError):
    """A resource that tasks need could not be opened; the message names it, and the cause is its own error."""


class StoreError(JobledgerError):
    """The status database is away, or is not a status database of this namespace."""


class StoreNotFound(StoreError):
    """There is no status table at this address yet."""


class StoreUnavailable(StoreError):
    """No database answers at this address now. It may later: what was asked can be tried again."""


class StoreTooSlow(StoreUnavailable):
    """The database cancelled a statement that took too long: by the user's ``statement_timeout``, or a reader's own."""


class CommitUnknown(StoreError):
    """The table is not where its writer left it: a connection broke in a commit, or a crash took the last commits away.

    Nothing is lost: the offsets are in the table, and its writer reads on from them.
    """


class LeaseLost(StoreError):
    """Another materializer took this store over; this one must stop."""


class StatusTimeout(JobledgerError):
    """The status table did not reach the asked position, or the job its end, in time."""


class JobNotFound(JobledgerError):
    """The status table knows no such job. It is never reported as pending."""


class JobFailed(JobledgerError):
    """The job ended in failure.

    ``error_type``, ``error_message`` and ``error_traceback`` are the text the worker
    recorded; ``job_id`` names the job.
    """

    def __init__(self, job_id: str, error_type: str, error_message: str, error_traceback: str | None = None) -> None:
        super().__init__(f"job {job_id} failed with {error_type}: {error_message}")
        self.job_id = job_id
        self.error_type = error_type
        self.error_message = error_message
        self.error_traceback = error_traceback


class JobCancelled(JobledgerError):
    """The job was cancelled."""


class JobExpired(JobledgerError):
    """The job passed its expiry before it could start."""


class ResultMismatch(JobledgerError):
    """The job succeeded, and its result does not fit the task's return annotation here.

    ``value``: the result as JSON gives it; ``job_id``, ``task``: which job.
    """

    def __init__(self, job_id: str, task: str, expected: str, value: object, why: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 500 else shown[:500] + "…"
        super().__init__(
            f"job {job_id} succeeded, and its result does not fit {task}() -> {expected}: {why}. It returned {shown}: "
            "annotate the task with what it returns; this error's .value and App.job(…).result hold the result as JSON"
        )
        self.job_id = job_id
        self.task = task
        self.value = value


class ResultInsideJob(JobledgerError):
    """A job waited for another job; with a full pool this would wait forever, so it is refused."""


class JobEnded(JobledgerError):
    """A job's code that still ran when its attempt had ended wanted to report progress, or to submit a job."""


class SchemaError(JobledgerError):
    """Bytes that cannot be read as an event of ours."""


class NotAnEvent(SchemaError):
    """The bytes carry none of the known framings, or end too early."""


class UnknownSchema(SchemaError):
    """The framing names a writer's schema that is published nowhere."""


class UnknownFact(SchemaError):
    """A well-formed event whose fact this version does not know; ``fact`` is its name."""

    def __init__(self, fact: str, message: str | None = None) -> None:
        super().__init__(message or f"fact {fact!r} is unknown to this version of Jobledger: upgrade this process")
        self.fact = fact
