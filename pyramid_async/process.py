"""What belongs to one process and must not cross a fork: its identity, its connections."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections import deque
from contextlib import suppress
from typing import Any
from weakref import WeakSet, WeakValueDictionary, finalize

from transaction.interfaces import NoTransaction
from ZODB.Connection import Connection

from .interfaces import AsyncError
from .transactional import OwnManager, failing_for_good, flush, manager_itself

# Pid -> ids that were drawn and not used.  Not emptied by a hook of `os.fork`: a server that
# forks in C (uWSGI) calls none.
_drawn: dict[int, list[str]] = {}


class Exit:
    """Whether the process was told to exit; no Event, for a signal handler must take no lock."""

    asked = False


def new_id() -> str:
    """Return 128 bits from `secrets`, in hexadecimal.

    Many are drawn at once, for each call of the system lets other threads run first, which
    costs more than the bits.  Never the same in two processes.
    """
    ids = _drawn.setdefault(os.getpid(), [])
    try:
        return ids.pop()
    except IndexError:
        data = secrets.token_bytes(64 * 16).hex()
        ids.extend(data[start : start + 32] for start in range(32, len(data), 32))
        return data[:32]


_renewed: Any = WeakSet()


def renew_in_children(thing: Any) -> None:
    """Have ``thing.renew()`` called in each child of a fork, as long as the thing lives.

    A lock that a thread of the parent held would stay locked there for ever.
    """
    _renewed.add(thing)


def _renew_all() -> None:
    for thing in list(_renewed):
        thing.renew()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_renew_all)


def at_rest(lock: Any) -> Any:
    """Return a lock once nobody holds it, or so it was a moment ago: ``with at_rest(lock):``.

    For locks that are held for microseconds, by many threads.  Who waits in ``acquire`` is
    handed the lock before the interpreter, and all the others queue up behind; who looks has
    the interpreter when the lock is free.
    """
    while lock.locked():
        time.sleep(0)
    return lock


class Identity:
    """A random id, a fresh one for each process.

    Never a host or pod name: a restarted pod must not keep a dead process's jobs alive.
    """

    _living: Any = WeakValueDictionary()  # id -> Identity

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}  # pid -> id

    def __call__(self) -> str:
        known = self._ids.get(os.getpid())
        if known is None:
            # Of two threads that ask first, one wins.
            known = self._ids.setdefault(os.getpid(), new_id())
            self._living[known] = self
        return known

    def was(self, id: str) -> bool:
        """Say whether the id is ours, or was our parent's when it forked."""
        return id in self._ids.values()

    def end(self) -> None:
        """Be dead for others; whoever asks next gets a new id."""
        self._living.pop(self._ids.pop(os.getpid(), ""), None)

    @classmethod
    def lives_here(cls, id: str) -> bool:
        """Say whether the id belongs to somebody in this very process."""
        identity = cls._living.get(id)
        return identity is not None and identity._ids.get(os.getpid()) == id


def process_name() -> str:
    """Return what an operator finds a process by; never its identity."""
    return f"{platform.node()}:{os.getpid()}"


class Connections:
    """The ZODB connection to use with a transaction manager that came without one.

    Two connections to one storage in one transaction would wait for each other's commit for
    ever, so one that the caller has open is used.  Where there is none, we open one, which
    stays open as long as the manager lives: a connection closed by an after-commit hook is
    aborted once more by its transaction, when another thread may already have it from the
    pool.
    """

    _left: deque[Any] = deque()  # of all: one that is dead itself could release nothing

    def __init__(self, db: Any = None) -> None:
        self.db = db
        # Our connection is an attribute of its manager: a dictionary here would keep both, for
        # a connection refers to its manager.
        self._name = f"_pyramid_async_{id(self)}"
        # Connections that may go with their managers, and the storages of those that went.  A
        # storage lists these, and tells each of every commit, until they are released; not by the
        # garbage collector, which may run while this very thread holds the lock of that list.
        self._watched: Any = WeakSet()

    def know(self, db: Any) -> None:
        """Remember a database of those that persistent arguments come from."""
        self.forget_closed()
        self.db = self.db or db

    def forget_closed(self) -> None:
        """Forget a database that was closed: it would be nobody's, and fail whoever opens it."""
        db = self.db  # another thread may forget it meanwhile
        if db is not None and not db.databases:
            self.db = None

    def open(self, tm: Any) -> Any:
        """Return the connection of the manager's transaction, or None: no database is known."""
        db = self.db
        if db is None:
            return None
        # A manager belongs to one thread, so no lock is needed; and none must be held here, for
        # to open a connection may take as long as a server is away.
        self._release_left()
        tm = manager_itself(tm)
        ours = vars(tm).get(self._name)
        if ours is not None and (ours.opened is None or ours.db() is not db):
            ours = None  # closed with its database, or of another store that was where we are
        theirs = [c for c in connections_of(tm, db) if c is not ours]
        if theirs:
            return theirs[0]
        if ours is None:
            ours = vars(tm)[self._name] = db.open(tm if type(tm) is OwnManager else Kept(tm))
            if type(tm) is not OwnManager and ours not in self._watched:
                self._watched.add(ours)
                finalize(ours, self._left.append, ours._normal_storage).atexit = False
        if type(tm) is not OwnManager:
            refuse_two_connections(tm.get())
        return ours

    def _release_left(self) -> None:
        while self._left:
            with suppress(Exception):  # its database was closed, or another thread was quicker
                self._left.popleft().release()

    def release(self, tm: Any) -> None:
        """Close the connection that we opened for a manager, if any; its transaction has ended."""
        ours = vars(manager_itself(tm)).pop(self._name, None)
        if ours is not None and ours.opened is not None:
            ours.close()


def refuse_two_connections(txn: Any) -> None:
    """Let the commit fail, and not hang, where two connections to one database have changes.

    Nor does it hang where SQLAlchemy has some: see `flush`.
    """
    try:
        txn.data(_check)
    except KeyError:
        txn.set_data(_check, True)
        # Twice, so that it comes after what other hooks write.
        txn.addBeforeCommitHook(txn.addBeforeCommitHook, (_check, (txn,)))


def _check(txn: Any) -> None:
    flush(txn)
    databases = [r.db() for r in txn._resources if isinstance(r, Connection)]
    with failing_for_good(txn):
        for db in databases:
            if databases.count(db) > 1:
                raise TwoConnections(db.database_name)


class TwoConnections(AsyncError, RuntimeError):
    """A transaction has written through two connections to one database (its name)."""

    def __str__(self) -> str:
        return (
            f"two connections to the database {self.args[0]!r} take part in one transaction and"
            " would wait for each other for ever: open yours before you use the scheduler, or use"
            " request.scheduler, which has the connection of its request; a job uses that of"
            " current_job().request, or a transaction manager of its own"
        )


class Kept:
    """A manager of the caller's, for a connection of ours that stays open with it.

    ``DB.close`` aborts the managers of all its connections, and fails where an explicit one has
    no transaction.
    """

    def __init__(self, tm: Any) -> None:
        self._tm = tm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tm, name)

    def abort(self) -> None:
        with suppress(NoTransaction):
            self._tm.abort()


def connections_of(tm: Any, db: Any) -> list[Any]:
    """Return the open connections to a database that take part in a manager's transactions."""
    found: list[Any] = []

    def note(synchronizer: Any) -> None:
        if isinstance(synchronizer, Connection) and synchronizer.db() is db:
            found.append(synchronizer)

    # Every open connection is a synchronizer of its manager; nothing public lists them.
    tm._synchs.map(note)
    return [connection for connection in found if connection.opened is not None]
