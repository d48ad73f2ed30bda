"""Jobledger: background jobs on the Kafka log.

This package re-exports what a service uses. Importing it reads no settings and opens no connection.
"""

import logging

from jobledger.app import App
from jobledger.config import Settings
from jobledger.definitions.context import JobContext, current_job
from jobledger.definitions.handles import EventHandle, JobHandle
from jobledger.definitions.policy import Adaptive, Breaker
from jobledger.definitions.queues import Queue
from jobledger.definitions.resources import Depends, Resource
from jobledger.definitions.retry import NO_RETRY, Reject, Retry, RetryLater, Snooze
from jobledger.definitions.task import AsyncTask, JobRequest, PlainTask, Task
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
    UnknownQueue,
    UnknownTask,
)
from jobledger.job import JobStatus, State
from jobledger.schemas.events import Position

__version__ = "0.1.0"

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
    "Breaker",
    "BrokerUnavailable",
    "ConfigError",
    "ConnectionUnusable",
    "Depends",
    "EventHandle",
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
    "Position",
    "Queue",
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
    "TaskTimedOut",
    "TopicMissing",
    "UnknownQueue",
    "UnknownTask",
    "current_job",
]
