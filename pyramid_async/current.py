"""What a job's function sees of its job: `current_job`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from copy import copy
from decimal import Decimal
from typing import Any, ClassVar, TypeVar

from .interfaces import JobInterrupted, JobTimeout
from .jobs import Live
from .process import new_id

T = TypeVar("T")

# Longest message of a job, in characters; what is longer is cut.
MESSAGE_LIMIT = 500


class Job:
    """One attempt at a job, from the inside; it lasts while conflicts are tried again.

    The function's own thread calls the methods; other threads read the attributes, which are
    replaced and never changed in place, and call `interrupt`.  Nothing here but `checkpoint`
    touches the job's record or its transaction.
    """

    request: Any = None
    attempt = 1
    cursor: Any = None  # of the last checkpoint, also of an earlier attempt

    def __init__(self, sid: str, holder: str | None = None, clock: Any = time.time) -> None:
        self.sid = sid
        self.clock = clock
        # What the function tells.
        self.started = self.changed = clock()
        self.percent: int | None = None
        self.message: str | None = None
        self.remaining: float | None = None
        self.ticks = 1  # visible changes: to run is one
        self.checkpoints = 0
        self.commit_checkpoint: Callable[[Any], None]  # of the present try
        # What it is told.
        self.deadline: float | None = None  # monotonic
        self._interrupt: JobInterrupted | None = None
        self.heard = False  # `check` has raised it
        # What the worker notes.
        self.holder = holder  # from whose queue it is run without a claim: see `belongs_to`
        self.signature = new_id()
        self.begun = False  # the function was called
        self.revision: int | None = None  # of the record that its last try read
        self.ending = threading.Lock()  # held by who records and tells how the attempt ended
        self.over = False  # that was done

    def progress(
        self, done: float | Decimal, total: float | Decimal | None = None, message: Any = None
    ) -> None:
        """Tell how far the job is: *done* of *total* units, and a *message*.

        Without *total* only the message counts.  Of a message the first 500 characters are kept.
        Raises what `check` raises.  Costs about a microsecond; nothing is written.
        """
        self.check()
        percent = self.percent
        share = 100 * float(done) / float(total) if total else math.nan
        if not math.isnan(share):
            # 100 is for successful jobs, and progress never falls.
            percent = max(percent or 0, int(min(99.0, max(0.0, share))))
            elapsed = self.clock() - self.started
            self.remaining = max(0.0, elapsed * (100 / share - 1)) if share > 0 else None
        text = self.message if message is None else str(message)[:MESSAGE_LIMIT]
        if (percent, text) != (self.percent, self.message):
            self.percent, self.message = percent, text
            self.changed = self.clock()
            self.ticks += 1

    def track(
        self, iterable: Iterable[T], total: float | None = None, message: Any = None
    ) -> Iterator[T]:
        """Yield the items and tell the progress after each; *total*: ``len``, if any."""
        if total is None:
            total = len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
        self.progress(0, total, message)
        for done, item in enumerate(iterable, 1):
            yield item
            self.progress(done, total, message)

    def checkpoint(self, cursor: Any) -> None:
        """Commit the work so far together with *cursor*, any value that can be stored.

        A later try, after a conflict or a crash, finds the cursor in ``job.cursor`` and
        goes on from there.  What is committed here stays, also when the job fails or is
        dismissed.  Costs a commit, and begins a new transaction, which sees what others did.

        Raises what `check` raises.  Raises ConflictError, which the function must let pass.
        """
        self.check()
        self.commit_checkpoint(cursor)
        self.cursor = cursor
        self.checkpoints += 1

    def check(self) -> None:
        """Raise JobDismissed, JobTimeout or JobStopped when the job must not go on."""
        if self._interrupt is not None:
            self.heard = True
            # A copy: with the traceback in it the function's objects would wait for the collector.
            raise copy(self._interrupt)
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.interrupt(JobTimeout(f"job {self.sid!r} ran longer than its timeout"))
            self.check()

    def live(self) -> Live:
        """Return what others may see of the attempt.  Called from any thread."""
        return Live(
            self.started,
            self.changed,
            self.ticks,
            self.percent,
            self.message,
            self.remaining,
            self.signature,
            self.revision,
        )

    def interrupt(self, reason: JobInterrupted) -> None:
        """Make the next `check` raise; the first reason stays.  Called from any thread."""
        if self._interrupt is None:
            self._interrupt = reason


class NoJob:
    """The stand-in outside of a job: its calls do nothing, so functions stay callable."""

    sid = None
    request: Any = None
    attempt = 0
    cursor: Any = None

    def progress(
        self, done: float | Decimal, total: float | Decimal | None = None, message: Any = None
    ) -> None:
        pass

    def track(
        self, iterable: Iterable[T], total: float | None = None, message: Any = None
    ) -> Iterator[T]:
        return iter(iterable)

    def checkpoint(self, cursor: Any) -> None:
        pass

    def check(self) -> None:
        pass


_no_job = NoJob()
_current: ContextVar[Job | NoJob] = ContextVar("pyramid_async.current_job", default=_no_job)


def current_job() -> Job | NoJob:
    """Return the job that this thread (or asyncio task) runs; outside of a job a stand-in."""
    return _current.get()


class running:
    """Context manager: make a job the current one."""

    jobs: ClassVar[set[Job]] = set()  # of this process, in all its threads

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> Job:
        self.jobs.add(self.job)
        self.token = _current.set(self.job)
        return self.job

    def __exit__(self, *exc: object) -> None:
        _current.reset(self.token)
        self.jobs.discard(self.job)
