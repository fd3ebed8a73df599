"""Executors of schedulers without Pyramid: made at the first use, stopped with the database."""

from __future__ import annotations

import os
import threading
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, WeakSet

from .current import current_job
from .exits import stop_together
from .recovery import add_recovery
from .threads import ThreadExecutor
from .worker import Worker
from .zodb import ZodbStore


def executor_for(worker: Worker, workers: int) -> ThreadExecutor:
    executor = ThreadExecutor(worker, workers)
    add_recovery(executor)
    return executor


def executor_of(scheduler: Any) -> ThreadExecutor:
    """Return what runs the jobs of a PersistentTransactionalScheduler; start it where needed."""
    db, oid = key = _key(scheduler)
    executor = _in_use.get(key)
    if not _serves(executor):
        with _in_use_lock():
            stop_before_close(db)
            if db in _closing or not db.databases:
                current_job().check()  # it would fail of a stop, and no other process run it
                raise ValueError(f"the database of {scheduler!r} is closed")
            executor = _in_use.get(key)
            if not _serves(executor):
                executor = _in_use[key] = _start(scheduler, db, oid)
    return executor


def stop_executor_of(scheduler: Any, timeout: float) -> None:
    """Stop what runs its jobs in this process, if anything does."""
    key = _key(scheduler)
    executor = _in_use.get(key)
    if executor is not None:
        try:
            executor.stop(timeout)
        finally:
            _forget(key, executor)


def _key(scheduler: Any) -> tuple[Any, bytes]:
    if scheduler._p_jar is None:
        raise ValueError(
            f"{scheduler!r} is not in a database: make it an attribute or item of an object that"
            " is, and commit"
        )
    return scheduler._p_jar.db(), scheduler._p_oid


def _start(scheduler: Any, db: Any, oid: bytes) -> ThreadExecutor:
    known = _used[db]
    if oid not in known:
        # A connection for each worker and each of their failures, for recovery and a caller.
        db.setPoolSize(db.getPoolSize() + 2 * scheduler.workers + 2)
        known.add(oid)
    store = ZodbStore(db, locate=lambda connection: connection.get(oid).records)
    executor = executor_for(Worker(store, result_timeout=scheduler.timeout), scheduler.workers)
    executor.start()
    return executor


def stop_before_close(db: Any) -> None:
    """Have the executors of a database stopped when it closes; it tells nobody.

    Else their threads would go on, keep it in memory, and complain that it is closed.
    """
    if db in _used:
        return
    _used[db] = set()
    close = db.close

    def stop_and_close() -> None:
        with _in_use_lock():  # who is just starting one has it stopped with the others
            ours = {key: use for key, use in list(_in_use.items()) if key[0] is db}
            _closing.add(db)  # else whoever uses one while the others stop would start it anew
        try:
            stop_together(list(ours.values()))
            if db.databases:  # else a signal handler or another thread closed it meanwhile
                close()
        finally:
            _closing.discard(db)
            for key, use in ours.items():
                _forget(key, use)

    db.close = stop_and_close


def _serves(executor: ThreadExecutor | None) -> TypeGuard[ThreadExecutor]:
    """Say whether it may be used: one that stops by the jobs alone that it still waits for.

    They would start another one.
    """
    if executor is None:
        return False
    return not executor.stopped or current_job().sid is not None


def _in_use_lock() -> threading.RLock:
    # A signal handler or finalizer may close a database in the thread that just has it.
    return _in_use_locks.setdefault(os.getpid(), threading.RLock())


def _forget(key: tuple[Any, bytes], executor: ThreadExecutor) -> None:
    with _in_use_lock():
        if _in_use.get(key) is executor:  # else another thread forgot it, or started a new one
            del _in_use[key]


# (database, oid of the scheduler) -> what runs its jobs in this process, until it is stopped or
# the database closes.
_in_use: dict[tuple[Any, bytes], ThreadExecutor] = {}
# Databases that are being closed.
_closing: Any = WeakSet()
# Database -> oids of the schedulers that were ever in use in this process.
_used: Any = WeakKeyDictionary()
# One a process: a fork may have copied a lock that is held.
_in_use_locks: dict[int, threading.RLock] = {}
