"""Jobledger: background jobs on the Kafka log.

This package re-exports what a service uses. Importing it reads no settings and opens no connection.
"""

import logging

from jobledger.app import App
from jobledger.causes import CauseKind
from jobledger.config import Settings
from jobledger.definitions.context import JobContext, current_job
from jobledger.definitions.handles import EventHandle, JobHandle, Plan
from jobledger.definitions.options import TaskOptions
from jobledger.definitions.policy import Adaptive, Breaker, HandlerOptions
from jobledger.definitions.projection import Where
from jobledger.definitions.queues import Queue
from jobledger.definitions.resources import Depends, Resource
from jobledger.definitions.retry import NO_RETRY, Reject, Retry, RetryLater, Snooze
from jobledger.definitions.task import AsyncTask, BoundTask, JobRequest, PlainTask, Task
from jobledger.errors import (
    AccessDenied,
    BadArguments,
    BadEvent,
    BrokerUnavailable,
    ConfigError,
    ConnectionUnusable,
    IncompatibleEvent,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    JobledgerError,
    JobNotFound,
    NotAuthenticated,
    NotAuthorized,
    PayloadTooLarge,
    PlanNotFound,
    RegistryUnavailable,
    ResourceFailed,
    ResultInsideJob,
    ResultMismatch,
    SchemaRefused,
    StatusTimeout,
    StoreError,
    StoreNotFound,
    StoreTooSlow,
    StoreUnavailable,
    TaskCancelled,
    TaskInterrupted,
    TaskTimedOut,
    TopicMissing,
    UnknownFact,
    UnknownQueue,
    UnknownTask,
)
from jobledger.explain import Cause, Explanation
from jobledger.job import JobStatus, State
from jobledger.plan import PlanState, PlanStatus
from jobledger.process.version import VERSION
from jobledger.schemas.events import Position, Recorded
from jobledger.worker_status import WorkerState, WorkerStatus

__version__ = VERSION

# A library writes no log lines until the application configures logging.
logging.getLogger("jobledger").addHandler(logging.NullHandler())

__all__ = [
    "NO_RETRY",
    "AccessDenied",
    "Adaptive",
    "App",
    "AsyncTask",
    "BadArguments",
    "BadEvent",
    "BoundTask",
    "Breaker",
    "BrokerUnavailable",
    "Cause",
    "CauseKind",
    "ConfigError",
    "ConnectionUnusable",
    "Depends",
    "EventHandle",
    "Explanation",
    "HandlerOptions",
    "IncompatibleEvent",
    "JobCancelled",
    "JobContext",
    "JobEnded",
    "JobExpired",
    "JobFailed",
    "JobHandle",
    "JobNotFound",
    "JobRequest",
    "JobStatus",
    "JobledgerError",
    "NotAuthenticated",
    "NotAuthorized",
    "PayloadTooLarge",
    "PlainTask",
    "Plan",
    "PlanNotFound",
    "PlanState",
    "PlanStatus",
    "Position",
    "Queue",
    "Recorded",
    "RegistryUnavailable",
    "Reject",
    "Resource",
    "ResourceFailed",
    "ResultInsideJob",
    "ResultMismatch",
    "Retry",
    "RetryLater",
    "SchemaRefused",
    "Settings",
    "Snooze",
    "State",
    "StatusTimeout",
    "StoreError",
    "StoreNotFound",
    "StoreTooSlow",
    "StoreUnavailable",
    "Task",
    "TaskCancelled",
    "TaskInterrupted",
    "TaskOptions",
    "TaskTimedOut",
    "TopicMissing",
    "UnknownFact",
    "UnknownQueue",
    "UnknownTask",
    "Where",
    "WorkerState",
    "WorkerStatus",
    "current_job",
]
