"""Asynchronous long-running operations for Pyramid, safe by one commit.

A job's life, in reading order:

1. A view calls ``request.scheduler.schedule(f, ...)`` (`scheduler`).  A record (`jobs`) joins
   the request's transaction through a store (`zodb`, `ram`); an after-commit hook passes the
   job's id to an executor (`threads`, `celery`).
2. A thread of that, or a Celery worker, runs it (`worker`).  A try (`tries`) makes a
   request (`requests`), begins a transaction, loads the record, calls ``f``, and commits effects,
   result and status together.
3. ``f`` sees its job through `current_job` (`current`).
4. Clients poll ``GET /async/<sid>`` (`views`); somebody collects or cancels (`scheduler`).
5. What a dead process left behind is found and run again (`recovery`).
"""

from __future__ import annotations

from typing import Any

from .application import close_application, get_application, init_application
from .current import current_job
from .interfaces import (
    AsyncError,
    IJobAccepted,
    IJobCancelled,
    IJobFinished,
    IJobStarted,
    IScheduler,
    JobAccepted,
    JobCancelled,
    JobDismissed,
    JobFailed,
    JobFinished,
    JobInterrupted,
    JobNotFound,
    JobStarted,
    JobStopped,
    JobTimeout,
    NotRetriable,
    NotSchedulable,
    OperationFailed,
    SchedulerFull,
)
from .jobs import FileResult, JobStatus

__all__ = [
    "AsyncError",
    "FileResult",
    "IJobAccepted",
    "IJobCancelled",
    "IJobFinished",
    "IJobStarted",
    "IScheduler",
    "JobAccepted",
    "JobCancelled",
    "JobDismissed",
    "JobFailed",
    "JobFinished",
    "JobInterrupted",
    "JobNotFound",
    "JobStarted",
    "JobStatus",
    "JobStopped",
    "JobTimeout",
    "NotRetriable",
    "NotSchedulable",
    "OperationFailed",
    "SchedulerFull",
    "close_application",
    "current_job",
    "get_application",
    "includeme",
    "init_application",
]


def includeme(config: Any) -> None:
    """Set up the scheduler: ``config.include('pyramid_async')``.

    Includes pyramid_tm; ``route_prefix=...`` moves the HTTP resource from ``/async``.
    """
    from .config import setup

    setup(config)
