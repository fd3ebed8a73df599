"""Run a function in a transaction of its own, retrying what may be retried.

Decorate with `transactional`, or with a `TransactionManager` of your own::

    @transactional
    def rename(folder, name):
        folder.name = name

A call begins a transaction (a pending one is aborted), notes user and description on it, and
commits it when the function returns or aborts it when the function raises.  What may succeed
next time, a ConflictError above all, is tried again after a random delay.  A transactional
function that is called by another one joins the caller's transaction: it is simply called.

Only transactions begun by a `TransactionManager`, or marked with `mark`, are joined.  Nothing tells
whether somebody will end any other transaction, so that is aborted and a new one begun.
"""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from time import monotonic, sleep
from types import MethodType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import transaction
from transaction.interfaces import NoTransaction, TransientError

log = logging.getLogger(__name__)

# How often `transact` tries in all.
ATTEMPTS = 5
# Seconds after which it repeats nothing: a server that is away was waited for already.
PATIENCE = 5.0

P = ParamSpec("P")
T = TypeVar("T")

# Key of the mark among a transaction's data.  Data go when the transaction ends, and so does
# the mark: a transaction that the function begins after a commit of its own has none.
_MANAGED = object()


class _Thread(threading.local):
    """The transactions of other managers that were marked in this thread."""

    def __init__(self) -> None:
        self.marked: WeakSet[Any] = WeakSet()


_thread = _Thread()


def mark(txn: Any) -> Any:
    """Make the transactional calls of this thread join a transaction, until it ends; return it.

    For whoever begins and ends a transaction without a `TransactionManager`.  The transaction
    may belong to any manager.  A `TransactionManager` with a manager of its own joins it only
    where it belongs to that one.
    """
    _set_mark(txn)
    if pending(transaction.manager) is not txn:  # which is looked at without being listed
        _thread.marked.add(txn)
    return txn


def _set_mark(txn: Any) -> None:
    txn.set_data(_MANAGED, True)


def is_managed(txn: Any) -> bool:
    """Say whether the transaction is marked: somebody is going to end it."""
    try:
        return bool(txn.data(_MANAGED))
    except KeyError:
        return False


def backoff(attempts: int, initial: float, factor: float = 2) -> Iterator[float]:
    """Yield as many random delays, each between 0 and a bound that grows."""
    bound = float(initial)
    for _ in range(attempts):
        yield random.uniform(0, bound)
        bound *= factor


class _OnClassOrInstance:
    """A method that takes the class where it is called on the class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> MethodType:
        return MethodType(self.function, owner if instance is None else instance)


class TransactionManager:
    """Decorator for functions and methods that run in a transaction.

    Set the attributes by keyword or in a subclass.  An instance keeps nothing of a call, so any
    number of threads can share it.
    """

    retry_number = 3  # retries after the first attempt
    retry_initial_delay: float = 1  # seconds, the upper bound of the first delay
    retry_delay_factor: float = 2  # from each upper bound to the next
    debug: Callable[[], Any] | None = None  # called before the abort when an exception gets out
    manager: Any = None  # transaction manager; None: the thread's own, `transaction.manager`

    def __init__(
        self,
        retry_number: int | None = None,
        retry_initial_delay: float | None = None,
        retry_delay_factor: float | None = None,
        debug: Callable[[], Any] | None = None,
        *,
        manager: Any = None,
    ) -> None:
        given = {
            "retry_number": retry_number,
            "retry_initial_delay": retry_initial_delay,
            "retry_delay_factor": retry_delay_factor,
            "debug": debug,
            "manager": manager,
        }
        vars(self).update((name, value) for name, value in given.items() if value is not None)

    def get_user_info(self) -> tuple[str, ...] | None:
        """Return None, or name and path of the user for the transaction; to be overridden."""
        return None

    def get_description(
        self, f: Callable[..., Any], args: tuple[Any, ...], kw: dict[str, Any]
    ) -> str:
        """Return the text to note on the transaction; to be overridden."""
        return _name(f)

    @_OnClassOrInstance
    def begin(self: Any) -> Any:
        """Begin a transaction that transactional calls join, and return it.

        A pending transaction is aborted.  Call this on an instance, or on the class for the
        thread's own manager.  A transactional function that committed or aborted by itself
        calls it, so that the transactional functions that it calls afterwards join again.
        """
        manager = _manager(self)
        if pending(manager) is not None:
            manager.abort()
        txn = manager.begin()
        _set_mark(txn)
        return txn

    def __call__(self, f: Callable[P, T]) -> Callable[P, T]:
        """Return the function that runs *f* in a transaction.

        Raises TypeError for coroutine functions and generators: their call returns before their
        body runs, so the transaction would have ended by then.
        """
        if any(test(f) for test in _LAZY):
            raise TypeError(f"{f!r} cannot be transactional: its call returns before its body runs")

        @wraps(f)
        def call(*args: P.args, **kw: P.kwargs) -> T:
            if self._joins():
                return f(*args, **kw)
            return self._run(f, args, kw)

        return call

    def _joins(self) -> bool:
        txn = pending(_manager(self))
        if txn is not None and is_managed(txn):
            return True
        return self.manager is None and any(map(is_managed, _thread.marked))

    def _run(self, f: Callable[..., T], args: tuple[Any, ...], kw: dict[str, Any]) -> T:
        for delay in self._delays():
            description = _name(f)
            try:
                txn = self.begin()
                description = self._annotate(txn, f, args, kw)
                result = f(*args, **kw)
                # The function may have begun another transaction, so never `txn.commit()`.
                self._commit()
                return result
            except BaseException as error:
                if delay is None or not self._may_succeed_later(error):
                    self._give_up()
                    raise
                self._abort()
                log.exception("retrying %s", description)
            sleep(delay)
        raise AssertionError("the last attempt returns or raises")  # pragma: no cover

    def _delays(self) -> Iterator[float | None]:
        """Yield the delay after each attempt that may be followed by another, then None."""
        yield from backoff(self.retry_number, self.retry_initial_delay, self.retry_delay_factor)
        yield None

    def _annotate(
        self, txn: Any, f: Callable[..., Any], args: tuple[Any, ...], kw: dict[str, Any]
    ) -> str:
        user = self.get_user_info()
        if user is not None:
            txn.setUser(*user)
        description = self.get_description(f, args, kw)
        txn.note(description)
        return description

    def _may_succeed_later(self, error: BaseException) -> bool:
        """Return True for transient errors; must be asked before the abort.

        The data managers are asked too: SQL databases have errors that are transient and no
        TransientError.
        """
        if not isinstance(error, Exception):
            return False
        txn = pending(_manager(self))
        return isinstance(error, TransientError) or (
            txn is not None and txn.isRetryableError(error)
        )

    def _give_up(self) -> None:
        try:
            if self.debug is not None:
                self.debug()
        finally:
            self._abort()

    # There is no transaction when the function ended its own by itself.

    def _commit(self) -> None:
        txn = pending(_manager(self))
        if txn is not None:
            flush(txn)
            txn.commit()

    def _abort(self) -> None:
        txn = pending(_manager(self))
        if txn is not None:
            txn.abort()


_LAZY = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def _manager(owner: Any) -> Any:
    return transaction.manager if owner.manager is None else owner.manager


def manager_itself(tm: Any) -> Any:
    """Return the manager of this thread where *tm* is ``transaction.manager``."""
    return getattr(tm, "manager", tm)


def pending(tm: Any) -> Any:
    """Return the manager's transaction, or None; `get` would begin one, or raise."""
    return manager_itself(tm)._txn


def flush(txn: Any) -> None:
    """Let SQLAlchemy's sessions send what they hold, before the commit.

    zope.sqlalchemy does so in the commit, when the storage is already locked.  It would wait for
    ever for a row of another transaction, if that waits for the storage.
    """
    try:
        for resource in txn._resources:  # which may grow: a flush may write through another one
            session: Any = getattr(resource, "session", None)
            if hasattr(session, "flush"):
                session.flush()
    except BaseException:
        fail_for_good(txn)


def fail_for_good(txn: Any) -> None:
    """Raise the exception that is being handled, as if it had come from the commit itself.

    Otherwise a caller that swallows it, and commits once more, would commit what is left.
    """
    txn._saveAndRaiseCommitishError()


def _name(f: Callable[..., Any]) -> str:
    return getattr(f, "__name__", None) or repr(f)


transactional = TransactionManager()


class OwnManager(transaction.TransactionManager):
    """An explicit manager for transactions of our own; an abort without one does nothing.

    A connection that could not be opened keeps its manager, and ``DB.close`` aborts the managers
    of all its connections: it would fail, and leave the storage open, where one has no transaction.
    """

    def __init__(self) -> None:
        super().__init__(explicit=True)

    def abort(self) -> None:
        with suppress(NoTransaction):
            super().abort()


def transact(store: Any, work: Callable[[Any], Any]) -> Any:
    """Call ``work(table)`` in a transaction and on a connection of its own; return its value.

    Commits.  Conflicts and other transient errors are tried again.  One may be the lost reply to a
    commit, so *work* must recognise its own earlier work.
    """
    pauses, begun = backoff(ATTEMPTS - 1, 0.01), monotonic()
    while True:
        tm = OwnManager()
        tm.begin()
        try:
            value = work(store.table(tm))
            tm.commit()
            return value
        except TransientError:
            tm.abort()
            pause = next(pauses, None)
            if pause is None or monotonic() - begun > PATIENCE:
                raise
        except BaseException:
            tm.abort()
            raise
        finally:
            store.release(tm)
        sleep(pause)
