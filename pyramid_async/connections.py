"""The ZODB connection to use with a transaction manager, and what keeps two from meeting in one."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any
from weakref import WeakSet, finalize

from transaction.interfaces import NoTransaction
from ZODB.Connection import Connection

from .interfaces import AsyncError
from .transactional import OwnManager, fail_for_good, flush, manager_itself


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
        if isinstance(tm, OwnManager):  # nobody else has it
            if ours is None:
                ours = db.open(tm)
                setattr(tm, self._name, ours)
            return ours
        theirs = [c for c in connections_of(tm, db) if c is not ours]
        if theirs:
            return theirs[0]
        if ours is None:
            ours = vars(tm)[self._name] = db.open(Kept(tm))
            if ours not in self._watched:
                self._watched.add(ours)
                finalize(ours, self._left.append, ours._normal_storage).atexit = False
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
    try:
        for db in databases:
            if databases.count(db) > 1:
                raise TwoConnections(db.database_name)
    except TwoConnections:
        fail_for_good(txn)


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
    """Return the open connections to a database that take part in a manager's transactions.

    But for historical ones, which know no later jobs and store none.
    """
    # Every open connection is a synchronizer of its manager; nothing public lists them.
    found = [reference() for reference in tm._synchs.as_weakref_list()]
    ours = [c for c in found if isinstance(c, Connection) and c.db() is db]
    return [c for c in ours if c.opened is not None and c.before is None]
