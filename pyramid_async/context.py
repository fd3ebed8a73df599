"""Persistent objects as (database name, oid), reloaded by the reader's own connection.

A persistent object belongs to its connection, and a connection to one transaction and thread.
So what crosses to another thread or process is a `Reference`.  `refer` makes one and
`Reference.resolve` loads the object again; `map_references` and `resolve_references` do so
within containers, `dumps` and `loads` within whatever can be pickled.

A reference can be followed once the transaction that made it has committed.  A new object gets
its oid by a savepoint.  If no object of the database refers to it, it is added to the connection,
where one is given.  Programs that pass references on by themselves use a `PersistentContext`.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from operator import attrgetter, is_
from time import monotonic
from typing import Any

import transaction
from persistent import Persistent
from transaction.interfaces import NoTransaction, TransientError
from ZODB import DB
from ZODB.broken import Broken
from ZODB.Connection import Connection
from ZODB.POSException import POSKeyError
from ZODB.utils import oid_repr, z64

from .interfaces import AsyncError, NotSchedulable
from .transactional import pending

log = logging.getLogger(__name__)

PROTOCOL = 4

# Longest search for the part of a value that cannot be stored, seconds.
SEARCH = 1.0


class NotStorable(NotSchedulable):
    """An argument or result that cannot reach another transaction (what, why)."""

    def __str__(self) -> str:
        what, why = self.args
        return f"{what} cannot be stored: {why}"


class ObjectGone(AsyncError, LookupError):
    """The object is no longer in the database (class name, oid, database name)."""

    def __str__(self) -> str:
        kind, oid, database = self.args
        return f"{kind} {oid_repr(oid)} of database {database!r} is gone"


class ClassGone(AsyncError, LookupError):
    """This process does not know the object's class (class name, oid, database name)."""

    def __str__(self) -> str:
        kind, oid, database = self.args
        return f"the class of {kind} {oid_repr(oid)} of database {database!r} is gone"


class DatabaseMissing(AsyncError, LookupError):
    """The reader's connection reaches no database of that name (class name, oid, database name)."""

    def __str__(self) -> str:
        kind, oid, database = self.args
        return (
            f"{kind} {oid_repr(oid)} is in database {database!r}, which is none of the databases"
            " of this connection; name it in the multi-database of this process too"
        )


class NoRootConnection(AsyncError, LookupError):
    """A `PersistentContext` that came from a pickle and was told no connection."""

    def __str__(self) -> str:
        return (
            "this PersistentContext was made elsewhere and knows no database here;"
            " call its set_root_connection(connection) in this transaction first"
        )


# -- one object ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """The place of a persistent object: a value that any thread or process may hold."""

    database: str
    oid: bytes
    kind: str = field(default="object", compare=False)  # class name, for messages

    def load(self, connection: Any) -> Any:
        """Return the object, its state loaded, as the connection sees it.

        Raises `ObjectGone`, `ClassGone` or `DatabaseMissing`.
        """
        obj = self._get(connection)
        self._activate(obj)
        return obj

    def resolve(self, connection: Any) -> Any:
        """Do as `load`, but ask the storage even for an object that is in the cache.

        A pack removes objects from the storage and not from the caches of connections.
        """
        obj = self._get(connection)
        # Changed objects stay as they are.  One without a serial was never stored: if it is
        # no ghost, its state is nowhere else.
        if obj._p_serial != z64:
            obj._p_deactivate()
        self._activate(obj)
        return obj

    def _get(self, connection: Any) -> Any:
        if self.database not in connection.db().databases:
            raise DatabaseMissing(self.kind, self.oid, self.database)
        try:
            return connection.get_connection(self.database).get(self.oid)
        except POSKeyError as error:
            raise ObjectGone(self.kind, self.oid, self.database) from error

    def _activate(self, obj: Any) -> None:
        try:
            obj._p_activate()
        except POSKeyError as error:
            raise ObjectGone(self.kind, self.oid, self.database) from error
        if isinstance(obj, Broken):
            # What stands in for it has no method and no default of its class, and would be
            # taken for the object where none is asked for.
            raise ClassGone(self.kind, self.oid, self.database)


# Not `dataclasses.astuple`, which copies deeply: `schedule` calls it for each persistent argument.
_facts = attrgetter("database", "oid", "kind")


def refer(obj: Any, tm: Any = None, connection: Any = None) -> Reference:
    """Return the object's reference.

    A new object gets its oid by a savepoint of *tm* (default: the connection's transaction
    manager, else the thread's own).  If the savepoint does not reach it, it is added to
    *connection*.  Raises `NotStorable` for an object that is still outside of the database, or
    in a database that *connection* does not reach.
    """
    _give_oids([obj], tm, connection)
    return _reference(obj, None if connection is None else connection.db())


def _give_oids(objects: Iterable[Any], tm: Any, connection: Any) -> None:
    new = [obj for obj in objects if _is_outside(obj)]
    if not new:
        return
    _savepoint(tm, connection)
    if connection is not None:
        for obj in filter(_is_outside, new):
            connection.add(obj)


def _is_outside(obj: Any) -> bool:
    return obj._p_jar is None or obj._p_oid is None


def _savepoint(tm: Any, connection: Any) -> None:
    if tm is None:
        tm = transaction.manager if connection is None else connection.transaction_manager
    # Without a transaction there is no modified object that could refer to a new one.
    with suppress(NoTransaction):
        tm.savepoint(optimistic=True)


def _reference(obj: Any, db: Any) -> Reference:
    """Return the object's reference for readers of *db* and its multi-database, if given."""
    kind = _kind(obj)
    if _is_outside(obj):
        raise NotStorable(kind, "it is not part of the graph of persistent objects")
    home = obj._p_jar.db()
    if db is not None and db.databases.get(home.database_name) is not home:
        raise NotStorable(
            kind, f"its database {home.database_name!r} is none of those of {db.database_name!r}"
        )
    return Reference(home.database_name, obj._p_oid, kind)


def _kind(obj: Any) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


# -- containers ------------------------------------------------------------------------


_LEAVES = frozenset({bool, bytes, complex, float, int, str, type(None)})


def map_references(
    value: Any, f: Callable[[Any], Any], types: Any = Persistent, *, copies: bool = False
) -> Any:
    """Return *value* with *f* applied to the instances of *types* in it.

    Looks into lists, tuples, dicts (keys too), sets, frozensets and their subclasses, at any
    depth.  Any other object is left as it is.  A container in which nothing changed is not
    copied, unless *copies* asks for it.  Raises `NotStorable` for a container that contains
    itself or is nested too deeply.
    """
    try:
        return _Walk(f, types, copies)(value)
    except RecursionError:
        raise NotStorable(_kind(value), "it is nested too deeply") from None


_IMMUTABLE = (tuple, frozenset)


class _Walk:
    """One pass over a value; remembers containers, so that one met twice stays one."""

    def __init__(self, f: Callable[[Any], Any], types: Any, copies: bool) -> None:
        self.f = f
        self.types = types
        self.copies = copies
        self.open: set[int] = set()
        self.done: dict[int, tuple[Any, Any]] = {}  # what was met, alive so that its id stays its

    def __call__(self, value: Any) -> Any:
        if type(value) in _LEAVES:
            return value
        if isinstance(value, self.types):
            return self.f(value)
        if isinstance(value, dict | list | tuple | set | frozenset):
            return self._container(value)
        return value

    def _container(self, value: Any) -> Any:
        key = id(value)
        if key in self.done:
            return self.done[key][1]
        if key in self.open:
            raise NotStorable(_kind(value), "it contains itself")
        self.open.add(key)
        result = self._dict(value) if isinstance(value, dict) else self._items(value)
        self.open.discard(key)
        self.done[key] = value, result
        return result

    def _dict(self, value: Any) -> Any:
        keys, values = self._items([*value]), self._items([*value.values()])
        if all(map(is_, keys, value)) and all(map(is_, values, value.values())):
            return self._same(value)
        pairs = list(zip(keys, values, strict=True))
        new = _emptied(value)
        if new is None:
            return type(value)(pairs)
        # Not `update`, which counts in a Counter.
        for k, v in pairs:
            new[k] = v
        return new

    def _items(self, value: Any) -> Any:
        if _LEAVES.issuperset(map(type, value)):
            return self._same(value)
        items = [self(item) for item in value]
        return self._same(value) if all(map(is_, items, value)) else _rebuilt(value, items)

    def _same(self, value: Any) -> Any:
        return copy.copy(value) if self.copies and not isinstance(value, _IMMUTABLE) else value


def _rebuilt(value: Any, items: list[Any]) -> Any:
    if isinstance(value, tuple):
        return tuple.__new__(type(value), items)  # named tuples take no iterable
    if isinstance(value, frozenset):
        return type(value)(items)
    new = _emptied(value)
    if new is None:
        return type(value)(items)
    (new.extend if isinstance(new, list) else new.update)(items)
    return new


def _emptied(value: Any) -> Any:
    """Return an empty copy of a dict, list or set, or None where its class lets none be changed."""
    new = copy.copy(value)
    try:
        new.clear()
    except (AttributeError, TypeError):
        return None
    return new


def resolve_references(value: Any, connect: Callable[[], Any]) -> Any:
    """Return a copy of *value*, references replaced by objects of *connect*'s connection.

    Each `PersistentContext` is replaced by one bound to that connection.  *connect* is not
    called for a value that holds neither.
    """

    def resolve(item: Reference | PersistentContext) -> Any:
        return item.resolve(connect())

    return map_references(value, resolve, (Reference, PersistentContext), copies=True)


# -- pickles ---------------------------------------------------------------------------


def dumps(value: Any, connection: Any, tm: Any = None) -> tuple[bytes, list[Any]]:
    """Return the pickle of *value* for `loads`, and the connection's persistent objects in it.

    Persistent objects at any depth become references; new ones are treated as in `refer`.
    Whoever keeps the pickle in the same database should keep the objects too: else a pack removes
    those that nothing else refers to.  Objects of other databases, and those of a
    `PersistentContext`, must be reachable without that.

    The pickle is loaded once as a trial.  What cannot be pickled or loaded raises `NotStorable`,
    which names the class at fault.
    """
    body, objects = _pickled(value, connection)
    _give_oids(objects, tm, connection)
    references = tuple(_facts(_reference(obj, connection.db())) for obj in objects)
    data = pickle.dumps((references, body), PROTOCOL)
    return data, [obj for obj in objects if obj._p_jar is connection]


def loads(data: bytes, connection: Any) -> Any:
    """Return the value of a pickle made by `dumps`, its objects loaded by *connection*.

    A `PersistentContext` in it is bound to the connection.  Raises `ObjectGone`, `ClassGone` or
    `DatabaseMissing`, and what unpickling raises where a class is gone.
    """
    references, body = pickle.loads(data)
    objects = [Reference(*reference).resolve(connection) for reference in references]
    return _Unpickler(body, objects, connection).load()


def _pickled(value: Any, connection: Any) -> tuple[bytes, list[Any]]:
    """Return pickle and persistent objects of *value*, having loaded it once."""
    try:
        return _trial(value, connection)
    except TransientError:
        raise
    except RecursionError:
        raise NotStorable(_kind(value), "it is nested too deeply") from None
    except Exception as error:
        culprit = _culprit(value, connection)
        raise NotStorable(_kind(culprit), f"{type(error).__name__}: {error}") from error


def _trial(value: Any, connection: Any) -> tuple[bytes, list[Any]]:
    file = io.BytesIO()
    pickler = _Pickler(file, connection)
    pickler.dump(value)
    # The objects stand in for what a reader's connection will load.
    _Unpickler(file.getvalue(), pickler.objects, connection).load()
    return file.getvalue(), pickler.objects


def _culprit(value: Any, connection: Any) -> Any:
    """Return the innermost part of *value* that fails by itself, looking into containers."""
    seen = {id(value)}
    # What many parts refer to is tried with each of them, and who is told of the fault waits.
    end = monotonic() + SEARCH
    while True:
        unseen = (part for part in parts(value) if id(part) not in seen)
        timely = takewhile(lambda _: monotonic() < end, unseen)
        faulty = next((part for part in timely if not _is_storable(part, connection)), None)
        if faulty is None:
            return value
        value = faulty
        seen.add(id(value))


def parts(value: Any) -> Iterable[Any]:
    """Return what a container holds; of anything else nothing."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _is_storable(value: Any, connection: Any) -> bool:
    try:
        _trial(value, connection)
    except Exception:
        return False
    return True


_READER = object()  # stands in a pickle for the connection that loads it
_READER_ID = "reader"


class _Pickler(pickle.Pickler):
    """Puts numbers into the pickle for persistent objects, and collects them."""

    def __init__(self, file: io.BytesIO, connection: Any) -> None:
        super().__init__(file, PROTOCOL)
        self._connection = connection
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if obj is _READER:
            return _READER_ID
        if not isinstance(obj, Persistent):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.objects)
            self.objects.append(obj)
        return self._numbers[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, PersistentContext):
            # Once pickled it knows its databases by their names alone.
            obj._check(self._connection)
            return _bound, (type(obj), obj.__getstate__(), _READER)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Takes persistent objects by number."""

    def __init__(self, body: bytes, objects: list[Any], connection: Any) -> None:
        super().__init__(io.BytesIO(body))
        self._objects = objects
        self._connection = connection

    def persistent_load(self, number: Any) -> Any:
        return self._connection if number == _READER_ID else self._objects[number]


# -- PersistentContext -----------------------------------------------------------------


# Key of the root connections among a transaction's data: {id of the multi-database: connection}.
_ROOTS = object()


class PersistentContext:
    """Persistent objects to be passed to another thread, process or transaction.

    Made with objects by position and by name.  ``c[0]`` and ``c['name']`` load them by the
    connection of whoever reads; ``len(c)`` counts those by position; ``keys()`` names the others.

    A new object must be reachable from the graph of persistent objects.  It gets its oid by a
    savepoint: of the transaction of the first object that has a connection, or else of the
    thread's own manager.  Raises ValueError for an object outside of the graph and
    AttributeError for one that is not persistent.

    Objects are loaded by one root connection, and by those it opens to the other databases of
    its multi-database.  The root connection is found like this:

    * the arguments and the result of a job are bound to the job's or the reader's own
      connection for good (`resolve`); nothing needs to be done;
    * `set_root_connection` names one for the current transaction;
    * otherwise one is opened to the root database, on the thread's own transaction, and closed
      when that ends.  All contexts that do so in one transaction share it.

    The root database is that of the first object, unless a database, or a connection to it, is
    passed before the objects.  A pickle holds references only: a context that was unpickled
    by anything but `loads` must be told its connection in each transaction.

    Beware of two connections to one database in one transaction: they do not see each other's
    changes, and their commit conflicts or, on some storages, deadlocks.  So where a connection
    is open already, as in the thread that made the context, call `set_root_connection` first.
    """

    def __init__(self, /, *objs: Any, **kwobjs: Any) -> None:
        root, objs = _leading_root(objs)
        together = [*objs, *kwobjs.values()]
        for obj in together:
            if not isinstance(obj, Persistent):
                raise AttributeError(f"{_kind(obj)} is not persistent: it has no _p_oid")
        if any(map(_is_outside, together)):
            _savepoint(None, _connection_of(root, together))
        self._database = _database_of(root, together)
        self._objs = tuple(_reference(obj, self._database) for obj in objs)
        self._kwobjs = {name: _reference(obj, self._database) for name, obj in kwobjs.items()}
        self._forget()

    def _forget(self) -> None:
        self._connection: Any = None
        # One context may be used by several threads: what each was told is its own.
        self._told = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_database": None}
        del state["_connection"], state["_told"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        references = [*self._objs, *(f"{name}={ref}" for name, ref in self._kwobjs.items())]
        return f"PersistentContext({', '.join(map(str, references))})"

    def __getitem__(self, key: int | str) -> Any:
        """Return the object; raise IndexError, KeyError, `ObjectGone` or `NoRootConnection`."""
        reference = self._objs[key] if isinstance(key, int) else self._kwobjs[key]
        return reference.load(self.get_root_connection())

    def __len__(self) -> int:
        return len(self._objs)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the object of that name, or *default* where there is none."""
        return self[name] if name in self._kwobjs else default

    def keys(self) -> Iterable[str]:
        return self._kwobjs.keys()

    @property
    def database(self) -> Any:
        """The root database, or None where the context came from a pickle."""
        return self._database

    def resolve(self, connection: Any) -> PersistentContext:
        """Return the same context, bound to *connection* across transactions; None unbinds it."""
        context = type(self).__new__(type(self))
        context.__setstate__({**self.__getstate__(), "_database": self._database})
        if connection is not None:
            context._check(connection)
            context._connection = connection
            context._database = connection.db()
        return context

    def get_root_connection(self) -> Any:
        """Return the connection that loads the objects, opening one if need be."""
        if self._connection is not None:
            return self._connection
        told = self._told_connection()
        return self._opened_connection() if told is None else told

    def set_root_connection(self, connection: Any, close: bool = False) -> None:
        """Use *connection* in the current transaction of its transaction manager.

        Other contexts whose root connection would be looked for in that transaction get it
        too.  With *close* it is closed when the transaction ends.  Raises ValueError where
        another one is in use, and for a connection that does not reach the objects' databases.
        """
        if self._connection is not None:
            _require_same(self._connection, connection)
            return
        self._check(connection)
        manager = connection.transaction_manager
        txn = manager.get()
        self._told.by = (_remember(txn, connection, close), manager, txn)

    def _get_root_database(self) -> Any:
        """Return the database to open a connection to; to be overridden where it is known."""
        if self._database is None:
            raise NoRootConnection()
        return self._database

    def _check(self, connection: Any) -> None:
        """Raise ValueError unless the connection is open and reaches the objects."""
        if connection.opened is None:
            raise ValueError(f"{connection!r} is closed")
        databases = connection.db().databases
        if self._database is not None and self._database.databases is not databases:
            raise ValueError(f"{connection!r} is to other databases than those of {self!r}")
        names = {reference.database for reference in (*self._objs, *self._kwobjs.values())}
        if not names <= databases.keys():
            raise ValueError(
                f"{connection!r} reaches no database {min(names - databases.keys())!r}"
            )

    def _told_connection(self) -> Any:
        """Return the connection set in this thread, while the transaction it was set in lasts."""
        connection, manager, txn = getattr(self._told, "by", (None, None, None))
        if connection is None or pending(manager) is not txn:
            return None
        return connection

    def _opened_connection(self) -> Any:
        db = self._get_root_database()
        txn = transaction.manager.get()
        connection = _roots(txn).get(id(db.databases))
        if connection is None:
            connection = db.open()
            _remember(txn, connection, close=True)
        return connection


def _bound(kind: type[PersistentContext], state: dict[str, Any], connection: Any) -> Any:
    context = kind.__new__(kind)
    context.__setstate__(state)
    return context.resolve(connection)


def _leading_root(objs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Split off the database or connection that may stand before the objects."""
    if objs and isinstance(objs[0], DB | Connection):
        return objs[0], objs[1:]
    return None, objs


def _database_of(root: Any, objects: list[Any]) -> Any:
    if isinstance(root, DB):
        return root
    connection = _connection_of(root, objects)
    return None if connection is None else connection.db()


def _connection_of(root: Any, objects: list[Any]) -> Any:
    """Return the connection that stands before the objects, else the first of theirs, or None."""
    if isinstance(root, Connection):
        return root
    return next((obj._p_jar for obj in objects if obj._p_jar is not None), None)


def _roots(txn: Any) -> dict[int, Any]:
    """Return the transaction's root connections by multi-database."""
    try:
        roots: dict[int, Any] = txn.data(_ROOTS)
    except KeyError:
        roots = {}
        txn.set_data(_ROOTS, roots)
    return roots


def _remember(txn: Any, connection: Any, close: bool) -> Any:
    """Make the connection the transaction's root connection of its multi-database; return it."""
    known = _roots(txn).setdefault(id(connection.db().databases), connection)
    _require_same(known, connection)
    if close:
        txn.addAfterCommitHook(_close, (connection, txn))
        txn.addAfterAbortHook(_close, (None, connection, txn))
    return known


def _require_same(known: Any, connection: Any) -> None:
    # Connections that opened one another share this dictionary.
    if known.connections is not connection.connections:
        raise ValueError(f"root connection already set up: {known!r}, not {connection!r}")


def _close(_committed: bool | None, connection: Any, txn: Any) -> None:
    """Close the connection: its transaction has ended, or its commit has failed."""
    roots, key = _roots(txn), id(connection.db().databases)
    if key not in roots or roots[key] is not connection:
        return  # the abort after a failed commit
    del roots[key]
    try:
        # A connection may be missing among its own: when another one comes from a pool together
        # with connections that it opened earlier, `get_connection` puts those in their places.
        for each in [connection, *connection.connections.values()]:
            # After its hooks, a transaction aborts whatever joined it once more.  By then
            # another thread may have the connection from the pool, and would lose its changes.
            # So take it out, and do now what would have been done then.
            txn._unjoin(each)
            each.abort(txn)
        connection.close()
    except Exception:
        # An exception would break the abort off.
        log.exception("%r is not returned to its pool", connection)
