"""The tree of all errors. Every message names the value and the setting, and says what to do.

``JobledgerError``
├── ``ConfigError``              the app, a setting or an option is wrong; raised when the app is loaded or called
│   ├── ``UnknownTask``          a task name that is not registered
│   ├── ``UnknownQueue``         a queue the app does not declare
│   ├── ``BadArguments``         arguments that do not fit the task's signature
│   ├── ``BadEvent``             an event whose values do not fit its class
│   ├── ``BadTags``              a handler's ``tags=`` that fails for an event
│   ├── ``IncompatibleEvent``    an event class that cannot read earlier records
│   ├── ``RegistryNeeded``       a record that needs a Schema Registry, and none is configured
│   └── ``SchemaRefused``        the Schema Registry rejected this version's schema
├── ``BrokerUnavailable``        no broker answered in time
│   └── ``RegistryUnavailable``  no Schema Registry answered in time
├── ``AccessDenied``             the cluster refuses this client; a retry does not help
│   ├── ``NotAuthenticated``     the client's login is refused: password, certificate, listener
│   └── ``NotAuthorized``        the client may not do something: an ACL is missing
├── ``ConnectionUnusable``       a connection of another process, a closed one, or one that a signal handler interrupts
├── ``PayloadTooLarge``          one record would exceed the broker's limit
├── ``TopicMissing``             a topic the app needs does not exist
├── ``PortTaken``                the port of the embedded broker, or of the metrics, is in use
├── ``KafkaStartFailed``         the embedded broker did not start
├── ``ResourceFailed``           a resource that tasks need could not be opened
├── ``StoreError``               the status database is not available, or is not one of this namespace
│   ├── ``StoreNotFound``        there is no status table at this address yet
│   ├── ``StoreUnavailable``     no database answers there now; a retry may help
│   │   └── ``StoreTooSlow``     a statement took longer than the database or the reader allows
│   ├── ``CommitUnknown``        the table differs from what its writer committed; the writer continues
│   └── ``LeaseLost``            another materializer has taken over this store
├── ``StatusTimeout``            the status table did not reach a position, or a job did not end, in time
├── ``JobNotFound``              the status table does not know the job (never reported as "pending")
├── ``PlanNotFound``             the status table does not know the plan
├── ``JobFailed``                the job ended in failure; carries type, message and traceback
├── ``JobCancelled``             the job was cancelled
├── ``JobExpired``               the job passed its expiry before it could start
├── ``ResultMismatch``           the job succeeded, but its result does not fit the task's annotation
├── ``ResultInsideJob``          a job waited for another job
├── ``JobEnded``                 code of an ended attempt tried to report progress, submit a job or emit an event
└── ``SchemaError``              bytes that are not one of Jobledger's events
    ├── ``NotAnEvent``           no known framing
    ├── ``UnknownSchema``        framed, but the writer's schema is not published
    └── ``UnknownFact``          a valid event whose fact this version does not know

``TaskInterrupted``              (a `BaseException`) raised in a task's code, to stop it
├── ``TaskTimedOut``             the task's ``timeout`` is over
└── ``TaskCancelled``            the job was cancelled
"""

from __future__ import annotations

from types import TracebackType

# An exception of a user's class may itself raise when it is inspected: a property, ``__str__`` and even ``__class__``
# may raise anything. These functions read what the interpreter itself stores. The only code of the exception that they
# call is its ``__str__``, inside a ``try``.

_TYPE_ATTRIBUTES = type.__dict__


def is_a(error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    """Return whether ``except kinds:`` would catch the error, which depends on the exception's type only. `isinstance`
    would also use its ``__class__``."""
    return issubclass(type(error), kinds)


def type_of(error: object, *, full: bool = False) -> str:
    """Return the name of an object's type; with ``full`` preceded by its module, unless the module is ``builtins``."""
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
    """Return the exception's traceback as the interpreter stores it."""
    traceback: TracebackType | None = BaseException.__dict__["__traceback__"].__get__(error)
    return traceback


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    """Return the members of an exception group; empty for any other exception."""
    if not is_a(error, BaseExceptionGroup):
        return ()
    members: tuple[BaseException, ...] = BaseExceptionGroup.__dict__["exceptions"].__get__(error)
    return members


def leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group and its subgroups, each once, from left to right; for any other exception only
    that exception."""
    single, todo, seen = [], [error], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        members = members_of(each)
        todo += reversed(members)
        if not members:
            single.append(each)
    return single


def text_of(error: BaseException) -> str:
    """Return an exception's message; if its ``str()`` raises, a text that says so."""
    try:
        return str.__str__(str(error))  # a subclass of str may override methods
    except BaseException as broken:  # noqa: BLE001  # a user's __str__ may raise anything
        return f"<str() of this exception raised {type_of(broken)}>"


class TaskInterrupted(BaseException):
    """Raised inside a task's code, to stop the code: in a thread, in a child process, or in a coroutine that blocks the
    event loop beyond its timeout.

    This class is not an `Exception`, so ``except Exception`` does not catch it. Clean up and let the exception
    propagate: if the code returns a value instead, the job has succeeded.
    """


class TaskTimedOut(TaskInterrupted):
    """The attempt has run for as long as the task's ``timeout``."""


class TaskCancelled(TaskInterrupted):
    """The job was cancelled."""


class JobledgerError(Exception):
    """Base of every error that Jobledger raises on purpose.

    ``failed``: for `App.submit_many` and `App.emit_many`, the indexes, from 0, of the jobs or events that were not
    accepted.
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
    """The event's values do not fit its class, or its class is not an event of the app."""


class BadTags(ConfigError):
    """The ``tags=`` of a handler failed for an event: the function raised an error, or did not return tags."""


class IncompatibleEvent(ConfigError):
    """The event's class cannot read the records that another version of the class, or another program, wrote to the
    log."""


class RegistryNeeded(ConfigError):
    """A record has a Schema Registry's id, but no registry is configured: set ``JOBLEDGER_SCHEMA_REGISTRY``.

    This is not a `SchemaError`: the record may be valid, so it is neither rejected nor skipped.
    """


class SchemaRefused(ConfigError):
    """The Schema Registry rejected this version's schema for a topic; nothing was sent."""


class BrokerUnavailable(JobledgerError):
    """No broker answered or acknowledged in time."""


class RegistryUnavailable(BrokerUnavailable):
    """The Schema Registry did not answer in time; the operation that needed it was neither done nor rejected."""


class AccessDenied(JobledgerError):
    """The cluster refuses this client. Nothing was sent, and a retry does not help."""


class NotAuthenticated(AccessDenied):
    """The cluster does not accept this client's login: a password, a certificate or the kind of listener is wrong."""


class NotAuthorized(AccessDenied):
    """The cluster accepts this client's login, but does not allow this operation.

    ``role``: the part of Jobledger that made the request, e.g. ``worker``; ``operation``, ``resource_type`` and
    ``resource``: the right it lacks, e.g. ``Write``, ``topic``, ``shop.lifecycle``.
    """

    def __init__(self, message: str, *, role: str, operation: str, resource_type: str, resource: str) -> None:
        super().__init__(message)
        self.role = role
        self.operation = operation
        self.resource_type = resource_type
        self.resource = resource


class ConnectionUnusable(JobledgerError):
    """The connection cannot be used: it was opened before a fork, it has been closed, the interpreter is shutting down,
    or the caller is a signal handler that interrupted its thread while this thread was opening the connection. Nothing
    was sent."""


class PayloadTooLarge(JobledgerError):
    """The encoded record is larger than the limit; it was not sent."""


class TopicMissing(JobledgerError):
    """A topic the app needs does not exist; `jobledger topics apply` creates it."""


class PortTaken(JobledgerError):
    """The port of the embedded broker, or of the metrics, is in use."""


class KafkaStartFailed(JobledgerError):
    """The embedded broker did not start; the message contains the end of its log."""


class ResourceFailed(JobledgerError):
    """A resource that tasks need could not be opened. The message names the resource; the original error is the
    cause."""


class StoreError(JobledgerError):
    """The status database is not available, or is not a status database of this namespace."""


class StoreNotFound(StoreError):
    """There is no status table at this address yet."""


class StoreUnavailable(StoreError):
    """No database answers at this address now. A later retry may succeed."""


class StoreTooSlow(StoreUnavailable):
    """The database cancelled a statement that took too long: because of the user's ``statement_timeout``, or the
    reader's own limit."""


class CommitUnknown(StoreError):
    """The table's state differs from what its writer has committed: a connection broke during a commit, or a crash
    undid the last commits.

    Nothing is lost: the offsets are in the same table, and its writer continues reading from these offsets.
    """


class LeaseLost(StoreError):
    """Another materializer has taken over this store; this materializer must stop."""


class StatusTimeout(JobledgerError):
    """The status table did not reach the requested position, or the job did not end, in time."""


class JobNotFound(JobledgerError):
    """The status table does not know this job. An unknown job is never reported as pending."""


class PlanNotFound(JobledgerError):
    """The status table does not know the plan."""


class JobFailed(JobledgerError):
    """The job ended in failure.

    ``error_type``, ``error_message`` and ``error_traceback`` are the texts that the worker recorded; ``job_id`` names
    the job.
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
    """The job succeeded, but its result does not fit the task's return annotation in this process.

    ``value``: the result as plain JSON; ``job_id``, ``task``: which job.
    """

    def __init__(self, job_id: str, task: str, expected: str, value: object, why: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 500 else shown[:500] + "…"
        super().__init__(
            f"job {job_id} succeeded, but its result does not fit {task}() -> {expected}: {why}. The result is {shown}: "
            "annotate the task with the type of its result; this error's .value and App.job(…).result hold the result as "
            "JSON"
        )
        self.job_id = job_id
        self.task = task
        self.value = value


class ResultInsideJob(JobledgerError):
    """A job waited for another job. This is refused, because in a worker without a free slot the wait would never
    end."""


class JobEnded(JobledgerError):
    """Code that still ran after the attempt of its job had ended tried to report progress, to submit a job or to emit
    an event."""


class SchemaError(JobledgerError):
    """Bytes that cannot be read as one of Jobledger's events."""


class NotAnEvent(SchemaError):
    """The bytes have none of the known framings, or end too early."""


class UnknownSchema(SchemaError):
    """The framing names a writer's schema that is not published."""


class UnknownFact(SchemaError):
    """A valid event whose fact this version does not know; ``fact`` is its name."""

    def __init__(self, fact: str, message: str | None = None) -> None:
        super().__init__(message or f"fact {fact!r} is unknown to this version of Jobledger: upgrade this process")
        self.fact = fact
