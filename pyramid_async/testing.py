"""Tests of jobs: run them at commit or by hand, see what was scheduled, let a step go wrong.

`inline` and `manual` replace the executor until their block is left.  `faults` injects what
otherwise takes a crash.  All take a registry, or a scheduler where there is no Pyramid.
"""

from __future__ import annotations

import difflib
import math
import os
import signal
import threading
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Any, NoReturn, Self
from unittest.mock import patch

import transaction
from transaction import TransactionManager
from transaction.interfaces import TransientError
from ZODB.POSException import ConflictError
from zope.interface import implementer

from .interfaces import IExecutor, IScheduler, JobInterrupted, JobNotFound
from .jobs import FRESH, JobRecord, JobStatus
from .recovery import Recovery
from .scheduler import Scheduler
from .transactional import manager_itself, transact
from .tries import Try, end_transaction

# What ends a job that raises it, and nothing else.
ORDINARY = (Exception, JobInterrupted, SystemExit, CancelledError)

# Seconds after which a pause gives up.
PATIENCE = 30.0


def inline(where: Any) -> InlineExecutor:
    """Run each job at the commit that schedules it, in the same thread; see InlineExecutor."""
    return InlineExecutor(_scheduler(where))


def manual(where: Any) -> ManualExecutor:
    """Run jobs when the test says so; see ManualExecutor."""
    return ManualExecutor(_scheduler(where))


def _scheduler(where: Any) -> Scheduler:
    return where if isinstance(where, Scheduler) else where.getUtility(IScheduler)


def _replace(undo: ExitStack, owner: Any, **attributes: Any) -> None:
    """Set attributes of an object until *undo* is closed."""
    undo.enter_context(patch.multiple(owner, **attributes))


@contextmanager
def _another_manager() -> Iterator[None]:
    """Give the thread another ``transaction.manager`` for the block."""
    apart = TransactionManager(explicit=transaction.manager.explicit)
    with patch.object(transaction.manager, "manager", apart):
        try:
            yield
        finally:
            end_transaction(apart)


# -- executors -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduled:
    """A job as it was scheduled.

    Persistent objects among the arguments are read by a connection of the executor.
    """

    sid: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]  # of `using`, without run_after
    delay: float  # seconds from schedule to run_after
    owner: str | None
    process_id: str | None


class Clock:
    """The store's clock, which can be put forward."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.ahead = 0.0

    def __call__(self) -> float:
        return self.clock() + self.ahead


@implementer(IExecutor)
class ManualExecutor:
    """See IExecutor.  Runs jobs where and when `drain` is called.

    It is in place as soon as it is made, until `restore` or the end of its ``with`` block.
    A job has a transaction manager of its own, and so has its thread as long as the job runs:
    it touches no transaction of the test, and commits for real.
    """

    workers = 1
    max_pending = 10_000
    grace = 0.0
    stopped = False
    suspended = False

    def __init__(self, scheduler: Scheduler) -> None:
        self.worker = scheduler.worker
        self.store = scheduler.store
        self.previous = scheduler.executor
        self.clock = Clock(self.store.clock)
        times = self.previous.recovery
        self.recovery = Recovery(
            self,
            heartbeat=times.heartbeat,
            lease=times.lease,
            interval=times.interval,
            monotonic=self.clock,
        )
        self.scheduled: list[Scheduled] = []  # what was committed, in this order
        self._scheduler = scheduler
        self._waiting: dict[str, tuple[float, int]] = {}  # sid -> (when, seen)
        self._lock = threading.Lock()
        self._turn = threading.RLock()  # of the thread that runs jobs
        self._runs = False
        self._ending: BaseException | None = None  # what is to end the test
        self._reader = TransactionManager(explicit=True)
        self._surroundings = self.worker.surroundings
        self._undo = ExitStack()
        self._take_over()

    def _take_over(self) -> None:
        self._undo.callback(self._close)
        _replace(self._undo, self._scheduler, executor=self)
        _replace(self._undo, self.worker, surroundings=self._apart, later=self.later)
        _replace(self._undo, self.worker, keeps=True, stops=False)
        _replace(self._undo, self.worker, _fail=partial(self._fail, self.worker._fail))
        _replace(self._undo, self.store, clock=self.clock)
        # Without room its threads take nothing, nor does its recovery; and a scheduler that was
        # bound before, as `using` makes one, wakes it and not us.
        _replace(self._undo, self.previous, room=lambda: 0, wake=self._wake)

    def _wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        self.wake(committed, sid, queue)  # as it is then: faults, or another one in our place

    def restore(self) -> None:
        """Give the scheduler its executor back; jobs that wait here are recovery's to find."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        self.restore()
        if kind is None:
            self._end_test()

    def _close(self) -> None:
        end_transaction(self._reader)
        self.store.release(self._reader)

    # -- for tests

    def drain(self) -> list[JobStatus]:
        """Run every job that is due, and those scheduled meanwhile; return their statuses.

        They come in the order in which the jobs ran.  A job that waits for its time, or for its
        next try, is run after `advance`.
        """
        ran = {sid: self._status(sid) for sid in self._run_due()}
        self._end_test()
        return [status for status in ran.values() if status is not None]

    def advance(self, seconds: float) -> None:
        """Put the clock forward: jobs become due, results expire, leases run out."""
        self.clock.ahead += seconds

    def recover(self) -> None:
        """Look for lost jobs, as the recovery thread does every few seconds; they wait then."""
        self.recovery.look()

    def _status(self, sid: str) -> JobStatus | None:
        return self._scheduler.transact(lambda inside: inside.status(sid))

    # -- for the library

    def wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        """See IExecutor.  Reads the record, which the executors of real life never do here."""
        with self._lock:
            end_transaction(self._reader)
            self._reader.begin()
            table = self.store.table(self._reader)
            record = table.get(sid)
            if record is None:
                return  # nothing was committed
            self._waiting.setdefault(sid, (record.run_after or 0.0, FRESH))
            if all(job.sid != sid for job in self.scheduled):
                self.scheduled.append(self._read(record, table))

    def _read(self, record: JobRecord, table: Any) -> Scheduled:
        payload = record.arguments
        args, kwargs = ((), {}) if payload is None else self.store.unpack(payload, table)
        return Scheduled(
            sid=record.sid,
            function=self.store.resolve(record.function),
            args=args,
            kwargs=kwargs,
            options=dict(record.options or {}),
            delay=0.0 if record.run_after is None else record.run_after - record.created,
            owner=record.owner,
            process_id=record.process_id,
        )

    def put(self, sid: str, seen: int, queue: str | None = None) -> None:
        """Let a job wait that recovery found; *seen* as in `Worker.run`."""
        with self._lock:
            self._waiting.setdefault(sid, (0.0, seen))

    def later(self, when: float, sid: str) -> None:
        """Let a job wait for a moment, seconds since the epoch."""
        with self._lock:
            self._waiting[sid] = (when, FRESH)

    @property
    def held(self) -> set[str]:
        with self._lock:
            return {*self._waiting, *self.worker.running}

    def room(self) -> int:
        """See IExecutor."""
        return self.max_pending

    def start(self) -> None:
        """Do nothing: there are no threads."""

    def stop(self, timeout: float | None = None) -> None:
        """See IExecutor.  Restores the executor that was here before, and stops it."""
        self.restore()
        self.previous.stop(timeout)

    # -- running

    def _run_due(self) -> list[str]:
        """Run jobs until none is due, one at a time; return the sids in order, each once."""
        with self._turn:
            if self._runs:
                return []  # called by a job, which itself runs in this loop
            self._runs = True
            try:
                ran = {}
                while self._ending is None and (job := self._next()) is not None:
                    self._run(*job)
                    ran[job[0]] = True
                return list(ran)
            finally:
                self._runs = False

    def _run(self, sid: str, seen: int) -> None:
        # The thread's manager may be in the midst of the commit that woke the job.
        with _another_manager():
            try:
                self.worker.run(sid, seen)
            except BaseException as error:  # which met it in the pause after a conflict, say
                self._ending = error

    def _fail(self, fail: Callable[..., None], job: Any, error: BaseException, *args: Any) -> None:
        """Let a job fail; note what met it because it runs in the thread of the test.

        That is KeyboardInterrupt, a time limit's exception, `pytest.fail`.
        """
        fail(job, error, *args)
        if not isinstance(error, ORDINARY):
            self._ending = error

    def _end_test(self) -> None:
        """Raise what is to end the test: no sooner, for a hook's exceptions reach nobody."""
        error, self._ending = self._ending, None
        if error is not None:
            raise error

    def _next(self) -> tuple[str, int] | None:
        with self._lock:
            sid = min(self._waiting, key=lambda sid: self._waiting[sid][0], default=None)
            if sid is None or self._waiting[sid][0] > self.store.clock():
                return None
            return sid, self._waiting.pop(sid)[1]

    def _apart(self, tm: Any = None) -> Any:
        """Return the worker's surroundings in a manager that is not the test's.

        *tm*: of another executor of this kind, which stands in place of this one.
        """
        surroundings = self._surroundings(tm=tm or self._manager())
        finish = surroundings.end

        def finish_and_release() -> None:
            finish()
            self.store.release(surroundings.tm)

        surroundings.end = finish_and_release
        return surroundings

    def _manager(self) -> TransactionManager:
        usual = manager_itself(self._surroundings().tm)
        if usual is transaction.manager.manager:
            return usual  # of `_run`: what the function joins to it is the job's, as in life
        # Explicit or not, as in life: a job that commits by itself needs the same there.
        return TransactionManager(explicit=usual.explicit)


class InlineExecutor(ManualExecutor):
    """Runs each job in the after-commit hook of the transaction that scheduled it.

    When the commit returns, the job has ended, with all that it scheduled itself.  What waits
    for its time is run by `advance`.
    """

    def wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        super().wake(committed, sid, queue)
        self._run_due()

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        self.drain()

    def recover(self) -> None:
        super().recover()
        self.drain()


# -- faults ----------------------------------------------------------------------------


def conflict() -> NoReturn:
    """Raise a ConflictError."""
    raise ConflictError("a fault of the test")


def lose_reply() -> NoReturn:
    """Raise what a client raises that has lost its server; for ``after`` a commit."""
    raise TransientError("a fault of the test: the reply to the commit was lost")


def kill() -> None:
    """End this process as a crash does: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


class Pause:
    """A fault that stands still until it is opened.

    To enter its ``with`` block waits until a job stands there; to leave it opens the fault::

        stop = Pause()
        plan.at("commit", before=stop)
        ...
        with stop:  # the job stands before its commit
            ...
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        if not self.opened.wait(self.patience):
            raise TimeoutError(f"nobody opened a pause for {self.patience:g} s")

    def __enter__(self) -> Self:
        if not self.reached.wait(self.patience):
            raise TimeoutError(f"nobody reached a pause for {self.patience:g} s")
        return self

    def __exit__(self, *exc: object) -> None:
        self.opened.set()


def steal(where: Any, sid: str) -> None:
    """Take an unfinished job away as another process does that saw no sign of life of ours.

    That process is gone at once: recovery finds the job lost.
    """
    store = _scheduler(where).store
    thief, signature = token_hex(16), token_hex(16)

    def claim(table: Any) -> None:
        record = table.get(sid)
        if record is None:
            raise JobNotFound(sid)
        record.claim(thief, signature, store.clock())

    transact(store, claim)


# Step -> whether it ends in a commit.
STEPS = {
    "schedule": True,  # the record joins the caller's transaction, which commits
    "wake": False,  # the after-commit hook
    "claim": True,  # of a job that was lost
    "begin": False,  # a transaction, and the record is read
    "prepare": False,  # the job's request
    "call": False,  # the function
    "checkpoint": True,
    "succeed": False,  # the result and the status are written to the record
    "commit": True,  # effects, result and status
    "end": False,  # the request and its connection
    "fail": True,  # the failure is recorded
    "release": True,  # the job is given back, since the process stops
}

Fault = Callable[[], Any]


@contextmanager
def faults(where: Any) -> Iterator[Plan]:
    """Let steps in the life of jobs go wrong as the plan says, in every thread.

    Raises AssertionError at the end of the block for a fault that never struck.
    """
    scheduler = _scheduler(where)
    plan = Plan()
    with ExitStack() as undo:
        undo.callback(plan.forget)
        _install(plan, scheduler, undo)
        yield plan
        plan.check()


class Plan:
    """Which faults strike where; ``struck`` tells which did, as (step, moment)."""

    def __init__(self) -> None:
        self.struck: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._faults: dict[tuple[str, str], tuple[Fault, float]] = {}  # and how often still

    def at(
        self,
        step: str,
        *,
        before: Fault | None = None,
        during: Fault | None = None,
        after: Fault | None = None,
        times: float = 1,
    ) -> None:
        """Call faults before a step, after it, or between the two phases of its commit.

        A fault is called without arguments, in the thread of the step, *times* times.  What it
        raises is raised there.  *after* a step that commits, all is durable and the caller of
        the commit has not been told.  Each place has one fault; a later one replaces it.
        """
        given = {"before": before, "during": during, "after": after}
        for moment, fault in given.items():
            if fault is not None:
                self._faults[_place(step, moment)] = fault, times

    def lose_wakeups(self) -> None:
        """Let wake-ups vanish, as when the process dies after the commit."""
        self._faults["wake", "lost"] = _nothing, math.inf

    def double_wakeups(self) -> None:
        """Let wake-ups arrive twice."""
        self._faults["wake", "doubled"] = _nothing, math.inf

    def check(self) -> None:
        """Raise AssertionError for a fault that never struck."""
        missed = [f"{step}/{moment}" for step, moment in self._faults.keys() - set(self.struck)]
        if missed:
            raise AssertionError(f"faults that never struck: {', '.join(sorted(missed))}")

    def forget(self) -> None:
        """Let nothing strike any more, and no job stand still, also in threads that run one."""
        for fault, _ in self._faults.values():
            if isinstance(fault, Pause):
                fault.opened.set()  # the test may have failed before it did
        self._faults = {}

    # -- what stands in the place of a step

    def strike(self, step: str, moment: str) -> bool:
        """Call the fault that stands there, if one does; say whether one did."""
        with self._lock:
            fault, times = self._faults.get((step, moment), (_nothing, 0))
            if times < 1:
                return False
            self._faults[step, moment] = fault, times - 1
            self.struck.append((step, moment))
        with _another_manager():  # a request that it makes would end the transaction of the step
            fault()
        return True

    def around(self, step: str, method: Callable[..., Any], *args: Any) -> Any:
        self.strike(step, "before")
        value = method(*args)
        self.strike(step, "after")
        return value

    def ending(self, end: Callable[[], None]) -> None:
        try:
            self.strike("end", "before")
        finally:
            end()  # or the connection would stay open for ever
        self.strike("end", "after")

    def committing(self, step: str, tm: Any, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method that leads to a commit of the manager's transaction."""
        self.strike(step, "before")
        tm.get().join(_Witness(self, step))
        return method(*args)

    def writing(self, step: str, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method whose last argument is the table that it writes in."""
        return self.committing(step, args[-1].tm, method, *args)

    def table(self, make: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        table = make(*args, **kw)
        # The RAM store's table is the same one all through a transaction.
        if "add" not in vars(table):
            table.add = partial(self.committing, "schedule", table.tm, table.add)
        return table

    def wake(self, wake: Callable[..., None], *args: Any) -> None:
        self.strike("wake", "before")
        if not self.strike("wake", "lost"):
            wake(*args)
        if self.strike("wake", "doubled"):
            wake(*args)
        self.strike("wake", "after")


def _nothing() -> None:
    pass


def _place(step: str, moment: str) -> tuple[str, str]:
    if step not in STEPS:
        near = difflib.get_close_matches(step, STEPS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(STEPS)}"
        raise ValueError(f"there is no step {step!r}; {hint}")
    if moment == "during" and not STEPS[step]:
        raise ValueError(f"step {step!r} commits nothing: it has a before and an after only")
    return step, moment


class _Witness:
    """A data manager that sees the records vote and finish, and stands before zope.sqlalchemy's.

    Whose vote is a commit: nothing is to go wrong after it that cannot in life.
    """

    transaction_manager = None

    def __init__(self, plan: Plan, step: str) -> None:
        self.plan = plan
        self.step = step

    def sortKey(self) -> str:
        return "~pyramid_async.testing"

    def tpc_vote(self, txn: Any) -> None:
        self.plan.strike(self.step, "during")

    def tpc_finish(self, txn: Any) -> None:
        self.plan.strike(self.step, "after")

    def savepoint(self) -> _Witness:
        return self

    def nothing(self, txn: Any = None) -> None:
        """Neither begin nor abort nor a rollback changes what the witness does."""

    tpc_begin = commit = abort = tpc_abort = rollback = nothing


class _FaultyTry(Try):
    """A try whose steps go wrong as a plan says."""

    def __init__(self, plan: Plan, *args: Any) -> None:
        super().__init__(*args)
        self.plan = plan
        self.committing = "commit"
        for step in ("begin", "call", "succeed"):
            setattr(self, f"_{step}", partial(plan.around, step, getattr(self, f"_{step}")))

    def run(self, surroundings: Any) -> None:
        surroundings.prepare = partial(self.plan.around, "prepare", surroundings.prepare)
        surroundings.end = partial(self.plan.ending, surroundings.end)
        super().run(surroundings)

    def _checkpoint(self, cursor: Any) -> None:
        self.committing = "checkpoint"
        try:
            super()._checkpoint(cursor)
        finally:
            self.committing = "commit"

    def _commit(self) -> None:
        self.plan.committing(self.committing, self.surroundings.tm, super()._commit)


def _install(plan: Plan, scheduler: Scheduler, undo: ExitStack) -> None:
    worker, store, executor = scheduler.worker, scheduler.store, scheduler.executor
    _replace(undo, worker, make_try=partial(_FaultyTry, plan))
    for step, name in (("claim", "_take"), ("fail", "_record_failure"), ("release", "_release")):
        _replace(undo, worker, **{name: partial(plan.writing, step, getattr(worker, name))})
    _replace(undo, store, table=partial(plan.table, store.table))
    _replace(undo, executor, wake=partial(plan.wake, executor.wake))
