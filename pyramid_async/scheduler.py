"""Schedule, ask, cancel: inside the caller's transaction; the after-commit hook."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, ParamSpec, Unpack

import transaction
from persistent import Persistent
from transaction.interfaces import TransientError
from zope.interface import implementer

from .interfaces import (
    BadRecord,
    IScheduler,
    JobDismissed,
    JobFailed,
    JobNotFound,
    NotRetriable,
)
from .jobs import (
    ACCEPTED,
    DISMISSED,
    FAILED,
    FINAL,
    STATUSES,
    JobRecord,
    JobStatus,
    Options,
    check_options,
    status_of,
)
from .process import new_id
from .ram import RamStore
from .standalone import executor_for, executor_of, stop_executor_of
from .transactional import transact
from .worker import Worker
from .zodb import JobRoot

log = logging.getLogger(__name__)

P = ParamSpec("P")


def moment(when: datetime | float | None, now: float) -> float | None:
    """Return a datetime, or seconds from *now*, as seconds since the epoch."""
    if when is None:
        return None
    return when.timestamp() if isinstance(when, datetime) else now + when


# What `get_result` returns: unknown, not finished, or (value, exception).
Collected = Literal[False] | tuple[Any, BaseException | None] | None


class Caller(NamedTuple):
    """For whom a scheduler speaks: the request, or nobody.

    *connect* returns the ZODB connection to use; *new_sid* makes the same ids again when the
    same request is *repeated*.
    """

    connect: Callable[[], Any] | None = None
    owner: str | None = None
    origin: tuple[str, ...] | None = None
    new_sid: Callable[[], str] = new_id
    repeated: bool = False
    respond: Callable[[JobStatus], Any] | None = None
    sees_all: bool = False
    operation: str | None = None  # the name that it is called by, where several have one function


NOBODY = Caller(sees_all=True)


class Operation(NamedTuple):
    """A function that has a public name, who may start it by that, and its options."""

    function: Any
    permission: str | None
    options: dict[str, Any]


@implementer(IScheduler)
class Scheduler:
    """See IScheduler.  Cheap to make: one for each request and each `using`."""

    def __init__(
        self, worker: Worker, executor: Any, settings: dict[str, Any] | None = None
    ) -> None:
        self.worker = worker
        self.store = worker.store
        self.executor = executor
        self.settings = settings or {}
        self.operations: dict[str, Operation] = {}
        self._tm: Any = None
        self._caller = NOBODY
        self._options: dict[str, Any] = {}

    def bind(self, tm: Any, caller: Caller = NOBODY) -> Scheduler:
        """Return this scheduler for another transaction manager and caller."""
        bound = object.__new__(type(self))
        vars(bound).update(vars(self), _tm=tm, _caller=caller)
        return bound

    def using(self, *, tm: Any = None, **options: Unpack[Options]) -> Scheduler:
        """See IScheduler."""
        if tm is None:
            scheduler = self.bind(self._tm, self._caller)
        else:
            # The request's connection belongs to the request's manager.
            scheduler = self.bind(tm, self._caller._replace(connect=None))
        scheduler._options = {**self._options, **check_options(options)}
        return scheduler

    def named(self, name: str) -> Scheduler:
        """Return the same scheduler for calls of the operation of this name."""
        return self.bind(self._tm, self._caller._replace(operation=name))

    def transact(self, work: Callable[[Scheduler], Any]) -> Any:
        """Call ``work(scheduler)`` in a transaction and on a connection of its own.

        Commits, and repeats *work* after a conflict.  For callers that must know the outcome,
        as the HTTP views: it never touches their transaction.
        """
        return transact(self.store, lambda table: work(self.bind(table.tm)))

    # -- schedule

    def schedule(self, f: Callable[P, Any], /, *args: P.args, **kw: P.kwargs) -> str:
        """See IScheduler."""
        function = self.store.reference(f)
        table = self._table()
        sid = self._caller.new_sid()
        if self._caller.repeated and table.knows(sid):
            # Only the reply to its commit was lost.
            return self._wake_after_commit(sid, self._options.get("queue"))
        existing = self._unfinished(self._options.get("key"), table)
        if existing is not None:
            return existing
        record = self._record(sid, f, function, args, kw, table)
        self._add(record, table)
        return self._accept(record)

    def _unfinished(self, key: str | None, table: Any) -> str | None:
        """Return the sid of the unfinished job that has the key, or None."""
        sid: str | None = None if key is None else table.keyed(key)
        record = None if sid is None else table.get(sid)
        return None if record is None or record.done else sid

    def _add(self, record: JobRecord, table: Any) -> None:
        table.add(record)  # first: it refuses where there is no room, or no transaction
        key = record.option("key")
        if key is not None:
            table.take_key(key, record.sid)

    def _accept(self, record: JobRecord) -> str:
        self.worker.notify(record.sid, ACCEPTED)
        return self._wake_after_commit(record.sid, record.option("queue"))

    def _wake_after_commit(self, sid: str, queue: str | None) -> str:
        self._tm_in_use().get().addAfterCommitHook(self.executor.wake, (sid, queue))
        return sid

    def _record(self, sid: str, f: Any, function: Any, args: Any, kw: Any, table: Any) -> JobRecord:
        now = self.store.clock()
        options = {name: v for name, v in self._options.items() if name != "run_after"}
        return JobRecord(
            sid,
            now,
            function,
            arguments=self.store.pack((args, kw), table) if args or kw else None,
            owner=self._caller.owner,
            origin=self._caller.origin,
            process_id=self._caller.operation or self._operation_name(f),
            options=options or None,
            run_after=moment(self._options.get("run_after"), now),
            holder=self.worker.holder,
        )

    def _operation_name(self, f: Any) -> str | None:
        names = (name for name, known in self.operations.items() if known.function is f)
        return next(names, None)

    def retry(self, sid: str) -> str:
        """See IScheduler."""
        table = self._table()
        new_sid = self._caller.new_sid()  # whatever comes of it: a repeated request counts alike
        record = table.get(sid)
        if record is None:
            raise JobNotFound(sid)
        if record.retried is not None:
            return record.retried
        if record.status != FAILED:
            raise NotRetriable(sid, f"it is {record.status}; only a failed job can be")
        key = record.option("key")
        rival = self._unfinished(key, table)
        if rival is not None:
            raise NotRetriable(sid, f"the unfinished job {rival!r} has its key {key!r}")
        new = record.again(new_sid, self.store.clock(), self.worker.holder)
        self._add(new, table)
        record.give_away(new.sid)  # only now: there may have been no room
        return self._accept(new)

    # -- ask

    def completed(self, sid: str) -> bool | None:
        """See IScheduler."""
        record = self._table().get(sid)
        return None if record is None else record.done

    def get_result(self, sid: str) -> Collected:
        """See IScheduler."""
        table = self._table()
        record = table.get(sid)
        if record is None:
            return None
        if not record.done:
            return False
        result = self._result(record, table)  # which may fail: then nobody has collected it
        # Not removed yet: the same transaction may ask again.
        self._tm_in_use().get().addBeforeCommitHook(self._collected, (record,))
        return result

    def _collected(self, record: JobRecord) -> None:
        table = self._table()
        now = table.get(record.sid)
        if now is not None and not now.done:
            return  # it ended in this transaction, and a savepoint took that back
        # The record as it was read: of two who collect it at once, one must conflict.
        if not table.is_removed(record):
            table.remove(record)

    def _result(self, record: JobRecord, table: Any) -> tuple[Any, BaseException | None]:
        if record.status == DISMISSED:
            return None, JobDismissed(f"job {record.sid!r} was dismissed")
        if record.status == FAILED:
            return None, self._exception(record, table)
        return self._value(record, table), None

    def _exception(self, record: JobRecord, table: Any) -> BaseException:
        if record.exception is not None:
            try:
                return self.store.unpack(record.exception, table)
            except TransientError:
                raise
            except Exception as why:  # its class is gone, or is made in another way
                log.debug("the exception of job %r cannot be loaded: %r", record.sid, why)
        assert record.failure is not None  # also where the workers died and nothing was raised
        return JobFailed(*record.failure[:2])

    def _value(self, record: JobRecord, table: Any) -> Any:
        return None if record.result is None else self.store.unpack(record.result, table)

    def outcome(self, sid: str) -> tuple[JobStatus, Any] | None:
        """See IScheduler."""
        table = self._table()
        record = table.get(sid)
        if record is None:
            return None
        return self._status(record, table), self._value(record, table)

    def status(self, sid: str) -> JobStatus | None:
        """See IScheduler."""
        table = self._table()
        record = table.get(sid)
        return None if record is None else self._status(record, table)

    def _status(self, record: JobRecord, table: Any) -> JobStatus:
        live = self.worker.live(record.sid)
        if live is not None and live.shows(record):
            return status_of(record, live)
        return status_of(record, table.live(record))

    def jobs(self, status: str | Iterable[str] | None = None) -> list[JobStatus]:
        """See IScheduler."""
        wanted = {status} if isinstance(status, str) else set(status or STATUSES)
        if not wanted <= set(STATUSES):
            raise ValueError(f"status is {status!r}; allowed: {', '.join(STATUSES)}")
        if self._caller.owner is None and not self._caller.sees_all:
            return []  # a job without an owner is known by its id alone
        found = [job for job in self._statuses(wanted) if job.status in wanted]
        return sorted(found, key=lambda job: (job.created, job.sid), reverse=True)

    def _statuses(self, wanted: set[str]) -> Iterator[JobStatus]:
        table, caller = self._table(), self._caller
        # One that ends meanwhile may be told twice, in RAM.
        for sid in dict.fromkeys(self._sids(wanted, table)):
            try:
                record = table.get(sid)
                if record is not None and (caller.sees_all or record.owner == caller.owner):
                    yield self._status(record, table)
            except TransientError:
                raise
            except Exception:
                # One bad record must not hide the others.
                log.exception("the record of job %r cannot be read", sid)

    def _sids(self, wanted: set[str], table: Any) -> Iterator[str]:
        """Yield the ids of jobs that may be wanted; others may be among them."""
        yield from (sid for sid, _ in table.all_unfinished())
        final = wanted.intersection(FINAL)
        if self._caller.sees_all:
            yield from (sid for _, sid in table.ended(final))
        else:
            yield from table.owned(self._caller.owner, final)

    def accepted(self, sid: str) -> Any:
        """See IScheduler."""
        status = self.status(sid)
        if status is None:
            raise JobNotFound(sid)
        if self._caller.respond is None:
            raise TypeError("accepted() makes a response: it needs request.scheduler")
        return self._caller.respond(status)

    # -- cancel, remove

    def cancel(self, sid: str) -> bool:
        """See IScheduler."""
        return self.dismiss(sid) is not None

    def dismiss(self, sid: str) -> JobStatus | None:
        """Cancel the job and return what it is now, or None where there is nothing to cancel.

        Where the jobs are kept for no time it is unknown as soon as it is dismissed.
        """
        table = self._table()
        record = table.get(sid)
        if record is None or record.done:
            return None
        status = self._status(record, table)
        record.reach(status.progress, status.started)
        record.finish(DISMISSED, self.store.clock(), self.worker.result_timeout)
        self._tm_in_use().get().addBeforeCommitHook(self._confirm_dismissal, (sid,))
        self.worker.notify(sid, DISMISSED)
        return self._status(record, table)

    def _confirm_dismissal(self, sid: str) -> None:
        """Have the job told after the commit, unless a savepoint took its dismissal back."""
        record = self._table().get(sid)
        if record is None or record.status == DISMISSED:
            self._tm_in_use().get().addAfterCommitHook(self._dismissed, (sid,))

    def _dismissed(self, committed: bool, sid: str) -> None:
        if committed:
            self.worker.interrupt(sid, JobDismissed(f"job {sid!r} was dismissed"))
            self.worker.changes.tell()

    def remove(self, sid: str) -> None:
        """See IScheduler."""
        table = self._table()
        try:
            self.cancel(sid)
            record = table.get(sid)
        except BadRecord:
            table.drop(sid)
            return
        if record is not None:
            table.remove(record)

    # -- internal

    def _tm_in_use(self) -> Any:
        return transaction.manager.manager if self._tm is None else self._tm

    def _table(self) -> Any:
        return self.store.table(self._tm_in_use(), self._caller.connect)


class RequestIds:
    """Makes the sids of one request: the same ones when pyramid_retry runs it again.

    A commit whose reply was lost is repeated; only the same id tells that its job exists.
    """

    def __init__(self, environ: dict[str, Any]) -> None:
        # The environ outlives the attempts; this object, like the request, does not.  Copies
        # of the environ, as subrequests have them, share the list and so go on counting.
        attempt = environ.get("retry.attempt", 0)
        self.counter = environ.setdefault("pyramid_async.ids", [new_id(), attempt, 0])
        self.repeated = attempt > 0
        if attempt > self.counter[1]:
            self.counter[1:] = attempt, 0

    def __call__(self) -> str:
        self.counter[2] += 1
        nonce, _, ordinal = self.counter
        return blake2b(f"{nonce}:{ordinal}".encode(), digest_size=16).hexdigest()


# -- without Pyramid: the library that this one grew out of, under its names ------------


class TransactionalScheduler(Scheduler):
    """A scheduler in RAM for programs without Pyramid; thread-safe.

    Works in the thread's own transaction, ``transaction.manager``.  Seen by this process
    alone and lost with it; see PersistentTransactionalScheduler.
    """

    timeout = 3600.0  # seconds that a finished job is kept for who may still ask
    workers = 4  # threads, started with the first job

    def __init__(self, timeout: float | None = None) -> None:
        """*timeout*: seconds that a finished job is kept."""
        self.records = RamStore()
        worker = Worker(self.records, result_timeout=self.timeout if timeout is None else timeout)
        super().__init__(worker, executor_for(worker, self.workers))

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the threads for good; waiting jobs are lost, and to schedule is a RuntimeError."""
        self.records.closed = True
        self.executor.stop(timeout)


class PersistentTransactionalScheduler(Persistent):
    """A scheduler that keeps its jobs in itself, and so in the ZODB; without Pyramid.

    Put one into the database, commit, and use it from any connection, in the transaction of
    that connection.  Jobs that a dead process left are run again by the next one that uses
    the scheduler.  Call `stop` in each of them before you take it out of the database: a pack would
    leave its threads there without their records.
    """

    timeout = 3600.0  # seconds that a finished job is kept for who may still ask
    workers = 4  # threads in each process, started at the first use

    def __init__(self, timeout: float | None = None) -> None:
        """*timeout*: seconds that a finished job is kept."""
        if timeout is not None:
            self.timeout = timeout
        self.records = JobRoot()

    def schedule(self, f: Callable[P, Any], /, *args: P.args, **kw: P.kwargs) -> str:
        """See IScheduler."""
        return self._scheduler().schedule(f, *args, **kw)

    def completed(self, sid: str) -> bool | None:
        """See IScheduler."""
        return self._scheduler().completed(sid)

    def get_result(self, sid: str) -> Collected:
        """See IScheduler."""
        return self._scheduler().get_result(sid)

    def remove(self, sid: str) -> None:
        """See IScheduler."""
        self._scheduler().remove(sid)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop this process's threads of this scheduler; the next use starts them again."""
        stop_executor_of(self, timeout)

    def _scheduler(self) -> Scheduler:
        executor = executor_of(self)
        scheduler, connection = Scheduler(executor.worker, executor), self._p_jar
        return scheduler.bind(connection.transaction_manager, Caller(connect=lambda: connection))
