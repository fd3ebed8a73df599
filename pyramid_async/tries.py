"""One try at a job: begin, load, call, record, commit, all in one transaction.

After a conflict another try follows.  All of them are one *attempt*, which the record counts.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import wraps
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, NoReturn, TypeVar

import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from .current import Job, running
from .failures import LASTING, failure_of, members
from .interfaces import (
    AsyncError,
    JobDismissed,
    JobInterrupted,
    JobStopped,
    JobTaken,
    OperationFailed,
)
from .jobs import (
    ACCEPTED,
    DISMISSED,
    RUNNING,
    SUCCESSFUL,
    Failure,
    FileResult,
    JobRecord,
    name_of,
)
from .transactional import flush, manager_itself, mark, pending
from .watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")


class Surroundings:
    """What a try runs in, without a web framework: the thread's own transaction.

    `~pyramid_async.requests.RequestSurroundings` is the other kind.
    """

    connect: Any = None

    def __init__(self, tm: Any = None) -> None:
        # Not the proxy: what the function does in other threads would join their transactions.
        self.tm = manager_itself(transaction.manager if tm is None else tm)

    def begin(self) -> None:
        # Nested @transactional functions join.
        mark(self.tm.begin())

    def prepare(self, record: JobRecord) -> Any:
        """Return the job's request, or None."""

    def end(self) -> None:
        end_transaction(self.tm)


def end_transaction(tm: Any) -> None:
    """Abort what is left of a transaction, if any is; log what fails."""
    # Asked of the manager, for one that is not explicit would begin a transaction to abort it.
    if pending(tm) is not None:
        try:
            tm.abort()
        except Exception:
            # A data manager lost its server, say.  The outcome is known, and workers go on.
            log.exception("what a job left in its transaction could not be aborted")


class Passing(AsyncError, TransientError):
    """A data manager says that the next try may succeed (why), as of a deadlock in SQL."""

    def __str__(self) -> str:
        return f"this may pass: {self.args[0]}"


class Unreliable(Passing):
    """The storage failed, so the outcome of the try cannot be trusted (why)."""

    def __str__(self) -> str:
        return f"the storage failed: {self.args[0]}"


class Gone(Unreliable):
    """An object is gone, as after a pack (why); it may be gone for good."""


# What a storage raises that says what it means.
TRUE_ERRORS = (TransientError, AsyncError, *LASTING)


def storage_at_work(step: Callable[[Any], T]) -> Callable[[Any], T]:
    """Decorator: turn what a storage raises (a lost backend, no memory) into Unreliable.

    Or into Passing, where its data manager knows the error.
    """

    @wraps(step)
    def call(this: Any) -> T:
        try:
            return step(this)
        except TRUE_ERRORS:
            raise
        except Exception as error:
            kind = Passing if this.may_pass(error) else Unreliable
            raise kind(repr(error)) from error

    return call


class NotOurs(Exception):
    """The job is not this attempt's to run; the argument is its record, or None."""


class NotDue(Exception):
    """The job is not to run before a moment, the argument."""


class Try:
    """One try of an attempt; everything is read anew, so it finds what an earlier one committed."""

    def __init__(
        self,
        job: Job,
        store: Any,
        result_timeout: float,
        tell: Callable[[str, str], None],
    ) -> None:
        self.job = job
        self.store = store
        self.result_timeout = result_timeout
        self.tell = tell  # as in `Worker`; called before the function is called for the first time
        self.since = time.monotonic()  # when it began
        self.record_read = False
        self.failure: Failure | None = None  # what is kept of what the function raised
        self.watch = Watch()

    def run(self, surroundings: Any) -> None:
        """Call the function and commit effects, result and status together.

        Raises NotOurs, NotDue, what the function raises, and what the commit raises.
        """
        self.surroundings = surroundings
        try:
            record = self._begin()
            if record is None or not record.belongs_to(self.job.holder, self.job.signature):
                raise NotOurs(record)
            if not self.job.begun and (record.run_after or 0.0) > self.store.clock():
                raise NotDue(record.run_after)
            self.record_read = True
            self.job.request = self.surroundings.prepare(record)
            self.watch.begin(self.table.connection)
            value = self._call(record)
            self._succeed(value)
            self._commit()
        except (TransientError, JobInterrupted, NotOurs, NotDue):
            raise
        except BaseException as error:
            passing = self._passing(error)
            if passing is not None:
                raise passing from error
            # Before the abort: its text may read objects, also those that the job has changed.
            self.failure = failure_of(error)
            raise
        finally:
            self.watch.end()
            self.job.commit_checkpoint = too_late  # else both would wait for the collector
            self.surroundings.end()

    def _passing(self, error: BaseException) -> Passing | None:
        """Return what stands for an error that the next try may not meet, or None."""
        if self.watch.unread is not None:
            return Unreliable(repr(self.watch.unread))
        if any(isinstance(each, POSKeyError) for each in members(error)):
            # A pack may have taken what the transaction still sees; the next one does not.
            return Gone(repr(error))
        if any(map(self.may_pass, members(error))):
            return Passing(repr(error))
        return None

    # -- steps

    @storage_at_work
    def _begin(self) -> JobRecord | None:
        self.surroundings.begin()
        record = self._read()
        if record is not None:
            annotate(self.surroundings.tm.get(), record)
        return record

    def _read(self) -> JobRecord | None:
        """Return the record, or None, as the present transaction sees it."""
        self.table = self.store.table(self.surroundings.tm, self.surroundings.connect)
        return self.table.get(self.job.sid)

    def _call(self, record: JobRecord) -> Any:
        job = self.job
        self._set_up(record)
        f = self.store.resolve(record.function)
        args, kw = self._unpacked(record.arguments) or ((), {})
        with running(job):
            job.check()  # it may have been told while it waited after a conflict
            value = call_function(f, args, kw)
            # What has ended in time need not be run again; what swallowed the word (`gather` with
            # its exceptions as values, say) has left something out.
            with nullcontext() if job.heard else suppress(JobStopped):
                job.check()
        return value

    def _set_up(self, record: JobRecord) -> None:
        job = self.job
        job.attempt = record.attempts + (record.status == ACCEPTED)
        job.revision = record.revision
        job.cursor = self._unpacked(record.cursor)
        job.commit_checkpoint = self._checkpoint
        if not job.begun:
            job.begun = True
            self.tell(job.sid, RUNNING)
        timeout = record.option("timeout")
        if timeout is not None and job.deadline is None:
            job.deadline = time.monotonic() + timeout

    def _unpacked(self, payload: Any) -> Any:
        return None if payload is None else self.store.unpack(payload, self.table)

    def _own(self) -> JobRecord:
        """Return the record, signed by this attempt; raise JobDismissed if it lost the job.

        The function may have ended the transaction, or taken back a savepoint, so it is read
        anew.
        """
        if pending(self.surroundings.tm) is None:
            self.surroundings.begin()  # an explicit manager does not by itself
        job, record = self.job, self._read()
        if record is None or not record.belongs_to(job.holder, job.signature):
            # By itself perhaps, in this very transaction.
            dismissed = record is None or record.status == DISMISSED
            kind = JobDismissed if dismissed else JobTaken
            raise kind(f"job {job.sid!r} was dismissed or is another worker's")
        if record.status == ACCEPTED:
            # Nobody claimed it, and nobody needed to until something is written.
            record.claim(self.store.process, job.signature, job.started)
        return record

    def _succeed(self, value: Any) -> None:
        if isinstance(value, FileResult) and not isinstance(value.content, bytes | Blob):
            raise TypeError(f"a FileResult is bytes or a Blob, not {type(value.content).__name__}")
        record = self._own()
        if value is not None:
            record.result = self.store.pack(value, self.table)
            size = self.store.size(record.result)
            if size is not None:
                record.result_size = size
        if isinstance(value, FileResult):
            record.media_type = str(value.media_type or "")
        if record.failure is not None:
            record.failure = None  # of an earlier attempt
        record.finish(SUCCESSFUL, self.store.clock(), self.result_timeout)

    def _checkpoint(self, cursor: Any) -> None:
        record = self._own()
        record.cursor = self.store.pack(cursor, self.table)
        self._commit()
        self._begin()

    @storage_at_work
    def _commit(self) -> None:
        unread = self.watch.unread
        if unread is not None:
            # A function that swallows a ReadConflictError has seen half of the truth.
            raise Unreliable(repr(unread)) from unread
        flush(self.surroundings.tm.get())
        self.surroundings.tm.commit()

    def may_pass(self, error: BaseException) -> bool:
        """Ask the data managers whether the next try may succeed; before the abort."""
        txn = pending(self.surroundings.tm)
        return txn is not None and bool(txn.isRetryableError(error))


def too_late(cursor: Any) -> None:
    raise JobTaken("the attempt has ended: a thread that outlives it has nothing to commit")


# What decides about a job also from within a group, as an ``asyncio.TaskGroup`` raises it.
DECISIVE = (JobInterrupted, TransientError, OperationFailed)


def call_function(f: Any, args: Any, kw: Any) -> Any:
    """Call the function; of a group raise what decides about the job, if that is in it."""
    process = os.getpid()
    try:
        value = f(*args, **kw)
        return run_body(f, value) if isinstance(value, LAZY) else value
    except BaseExceptionGroup as group:
        for kind in DECISIVE:
            for error in members(group):
                if isinstance(error, kind):
                    raise error from error.__cause__ or error.__context__ or group
        raise
    finally:
        if os.getpid() != process:
            leave(f)


def leave(f: Any) -> NoReturn:
    """End a child that a function forked and let return or raise, as ``multiprocessing`` does.

    It would go on as a second process of the same pool, on the same connections, and the job
    would wait for its end for ever.
    """
    status, error = 1, sys.exception()
    with suppress(Exception):
        if not isinstance(error, SystemExit):
            log.critical(
                "a child that %s forked did not end by os._exit", name_of(f), exc_info=error
            )
        elif isinstance(error.code, int | None):
            status = (error.code or 0) & 0xFF
        else:
            print(error.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


# What a call returns whose body has not run yet.
LAZY = (CoroutineType, GeneratorType, AsyncGeneratorType)


def run_body(f: Any, value: Any) -> Any:
    """Run a coroutine and return its value; raise TypeError for a function with ``yield``.

    A generator that a function made elsewhere is a value like any other.
    """
    if isinstance(value, CoroutineType):
        return asyncio.run(value)
    body = inspect.unwrap(f)  # of what a decorator made of it
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise TypeError(f"the body of {f!r} did not run: it makes a generator")
    return value


def annotate(txn: Any, record: JobRecord) -> None:
    """Tell in the database's log whose transaction this is."""
    if record.owner is not None:
        txn.user = str(record.owner)
    txn.note(f"job {record.sid}")
    txn.setExtendedInfo("pyramid_async", record.sid)
