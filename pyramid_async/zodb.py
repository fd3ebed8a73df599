"""The ZODB store: job records beside the application's data, in the same commits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from heapq import merge
from importlib import import_module
from inspect import ismethod
from itertools import groupby, islice
from operator import attrgetter
from typing import Any
from zlib import crc32

from BTrees.OOBTree import OOBTree
from persistent import Persistent
from ZODB.blob import BlobStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError, StateLoadError
from zope.interface import implementer

from .conflicts import explain
from .connections import Connections, refuse_two_connections
from .context import dumps, loads
from .interfaces import AsyncError, BadRecord, IJobStore, IJobTable, NotSchedulable
from .jobs import DISMISSED, FAILED, SUCCESSFUL, JobRecord, name_of
from .process import Identity
from .transactional import OwnManager, TransactionManager, manager_itself, pending, transact
from .zeo import forget_oids_on_reconnect, unwrapped

ROOT_KEY = "pyramid_async"
SHARDS = 256

# Of the records; it grows when versions that know no more than the one before cannot read them,
# or would spoil them.
FORMAT = 1

# A payload over this many bytes is an object of its own, so that a status does not load it.
INLINE_PAYLOAD = 64 * 1024

# The record of a job that was dismissed or rescued stays this long, unseen perhaps, seconds: once
# a pack has taken it, nothing would stop an attempt that was frozen all the time.
HAUNTED = 24 * 3600.0

# Time after which an expired record should be gone where processes run, seconds.
OVERDUE = 600.0

# Shards whose records are asked for at once.
FETCHED = 16

# Records that one transaction of maintenance changes.
BATCH = 200

# Finished jobs are listed by spans of their end, seconds, and in a span by sid as they are stored:
# a batch writes few of the list's buckets.
SPAN = 10


class JobRoot(Persistent):
    """All job records of a database.

    Shards are made up front and chosen by the random sid, so that transactions which
    schedule at the same time write different objects.  A record enters ``unfinished`` when it
    is scheduled and stays there until maintenance moves it: the commit that finishes a job
    writes the record alone.
    """

    format = 1  # what it is where none is stored: stays, when FORMAT grows

    def __init__(self) -> None:
        self.unfinished = tuple(OOBTree() for _ in range(SHARDS))  # sid -> JobRecord
        self.finished = tuple(OOBTree() for _ in range(SHARDS))  # sid -> JobRecord
        self.keys = tuple(OOBTree() for _ in range(SHARDS))  # key -> sid, also of finished jobs
        # Written by maintenance alone; of removed records too, until their time is over.
        # (minute, sid) -> span, where one of `ended` has it; or None: only what is large goes then.
        self.expiry = OOBTree()
        # Status -> {(span, sid): (time of the end, owner)}; the spans grow towards the past.
        self.ended = {status: OOBTree() for status in (SUCCESSFUL, FAILED, DISMISSED)}
        self.signs = OOBTree()  # process -> Sign; see recovery

    def expiry_key(self, record: JobRecord) -> tuple[int, str]:
        """Return the key of a finished record in ``expiry``."""
        until = record.expires or 0.0
        if record.haunted:
            until = max(until, (record.finished or 0.0) + HAUNTED)
        return int(until // 60), record.sid

    def shard(self, sid: str) -> int:
        """Return the number of the sid's shard; raise ValueError or TypeError for what is none."""
        return int(sid[:2], 16) % len(self.unfinished)

    def key_tree(self, key: str) -> Any:
        """Return the tree of a key: the same in every process, which ``hash`` is not."""
        return self.keys[crc32(key.encode()) % len(self.keys)]


def span_of(finished: float) -> int:
    """Return the span of a time: the later, the smaller."""
    return -int(finished // SPAN)


class Large(Persistent):
    """A payload in an object of its own."""

    def __init__(self, data: bytes) -> None:
        self.data = data


AFTER_FORK = (
    "a forked FileStorage destroys data and a forked ZEO client hangs; make the application after"
    " the fork (gunicorn without --preload, uWSGI with lazy-apps)"
)


class OpenedBeforeFork(AsyncError, RuntimeError):
    """The database was opened in a parent process (its pid, ours)."""

    def __str__(self) -> str:
        parent, pid = self.args
        return (
            f"the ZODB was opened by process {parent} and is used by its child {pid}: {AFTER_FORK}"
        )


class NewerFormat(AsyncError, RuntimeError):
    """The records are in a format that this version does not know (the format, ours)."""

    def __str__(self) -> str:
        theirs, ours = self.args
        return (
            f"the jobs of this database are in format {theirs}, and this version of pyramid_async"
            f" knows {ours}: install the version that wrote them, or a newer one"
        )


@implementer(IJobStore)
class ZodbStore:
    """See IJobStore.  *locate* finds the JobRoot from an open connection."""

    durable = True

    def __init__(self, db: Any, locate: Any = None, clock: Any = time.time) -> None:
        self.db = db
        self.clock = clock
        self.locate = locate or locate_root
        self.identity = Identity()
        self.connections = Connections(db)
        self.pid = os.getpid()
        for each in db.databases.values():
            forget_oids_on_reconnect(each.storage)

    @property
    def process(self) -> str:
        return self.identity()

    @property
    def exclusive(self) -> bool:
        """True for a storage that one process owns: nobody else can hold its jobs."""
        return isinstance(innermost(self.db.storage), FileStorage | MappingStorage | DemoStorage)

    def alive_here(self, process: str) -> bool:
        return Identity.lives_here(process)

    def table(self, tm: Any, connect: Any = None) -> ZodbTable:
        if self.pid != os.getpid():
            raise OpenedBeforeFork(self.pid, os.getpid())
        connection = connect() if connect else self.connections.open(tm)
        if type(tm) is not OwnManager and (pending(tm) or not manager_itself(tm).explicit):
            refuse_two_connections(tm.get())
        return ZodbTable(connection, known(self.locate(connection)), tm, self.clock)

    def release(self, tm: Any) -> None:
        self.connections.release(tm)

    def install(self) -> None:
        """Make the JobRoot where it is missing; at start-up, never in a racing request.

        Processes that start together conflict, and the later one finds it made.
        """
        tm = OwnManager()
        try:
            TransactionManager(manager=tm)(self._make_root)(tm)
        finally:
            self.release(tm)

    def _make_root(self, tm: Any) -> None:
        root = self.connections.open(tm).root()
        if ROOT_KEY not in root:
            root[ROOT_KEY] = JobRoot()
        known(root[ROOT_KEY])

    def explain(self, error: BaseException) -> str:
        return explain(error, self.db)

    def reference(self, f: Any) -> str:
        return dotted_name(f)

    def resolve(self, function: str) -> Any:
        return find(function)

    def pack(self, value: Any, table: ZodbTable) -> Any:
        """See IJobStore: the pickle, and the persistent objects that it refers to.

        The record holds the objects too, so that a pack of the database does not remove
        those that nothing else refers to.
        """
        data, kept = dumps(value, table.connection, table.tm)
        stored: Any = data if len(data) <= INLINE_PAYLOAD else Large(data)
        return (stored, *kept) if kept else stored

    def size(self, payload: Any) -> int | None:
        stored = payload[0] if isinstance(payload, tuple) else payload
        return len(stored.data) if isinstance(stored, Large) else None

    def unpack(self, payload: Any, table: ZodbTable) -> Any:
        stored = payload[0] if isinstance(payload, tuple) else payload
        data = stored.data if isinstance(stored, Large) else stored
        return loads(data, table.connection)

    # -- maintenance: its own short transactions, so that no job's commit meets a bookkeeper

    def archive(self, sids: list[str], goes_on: Any = lambda: True) -> None:
        """Move finished records out of ``unfinished`` and note when they expire."""
        for start in range(0, len(sids), BATCH):
            batch = sids[start : start + BATCH]
            transact(self, partial(ZodbTable.archive_all, sids=batch))
            if not goes_on():
                return

    def expire(self, now: float, goes_on: Any = lambda: True) -> None:
        """Remove the archived records that expired."""
        while transact(self, lambda table: table.expire_batch(now)) == BATCH and goes_on():
            pass


def innermost(storage: Any) -> Any:
    """Return the storage that others wrap; in a BlobStorage it has no public name."""
    storage = unwrapped(storage)
    while isinstance(storage, BlobStorage):
        storage = unwrapped(storage._BlobStorage__storage)
    return storage


def utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def locate_root(connection: Any) -> JobRoot:
    """Return the JobRoot of the connection's database; the store's `install` made it."""
    root = connection.root().get(ROOT_KEY)
    if root is None:
        raise AsyncError(
            "the database has no place for jobs, which config.make_wsgi_app() makes: call it, in a"
            " test too, before the request looks at the database"
        )
    return root


def known(root: JobRoot) -> JobRoot:
    """Return the JobRoot, or raise NewerFormat."""
    if root.format > FORMAT:
        raise NewerFormat(root.format, FORMAT)
    return root


def dotted_name(f: Any) -> str:
    """Return ``module:qualified.name`` of a function that can be found again by it."""
    reference = name_of(f)
    if ismethod(f) and not isinstance(f.__self__, type):
        raise NotSchedulable(
            reference,
            "it is a bound method; schedule a function and pass the object as its argument",
        )
    if not (callable(f) and getattr(f, "__module__", None) and getattr(f, "__qualname__", None)):
        raise NotSchedulable(reference, "it is not a function of a module")
    if "<" in f.__qualname__:  # <lambda> or <locals>
        raise NotSchedulable(
            reference,
            "a lambda or a function inside a function has no name that a worker could find",
        )
    with suppress(ImportError, AttributeError, ValueError):
        if find(reference) == f:
            return reference
    raise NotSchedulable(reference, "another object has this name")


def find(reference: str) -> Any:
    """Return what ``module:qualified.name`` refers to; raise ImportError or AttributeError."""
    module, _, name = reference.partition(":")
    return attrgetter(name)(import_module(module))


def fault_of(obj: Any) -> str | None:
    """Load a persistent object, and say what it is if that fails."""
    try:
        obj._p_activate()
    except POSKeyError:
        return "lost object"
    except StateLoadError:
        return "record that this version cannot load"
    return None


@implementer(IJobTable)
class ZodbTable:
    """See IJobTable: the records as one connection sees them."""

    def __init__(self, connection: Any, root: JobRoot, tm: Any, clock: Any) -> None:
        self.connection = connection
        self.root = root
        self.tm = tm
        self.clock = clock

    def get(self, sid: str) -> JobRecord | None:
        record = self._find(sid)
        return None if record is None or record.expired(self.clock()) else record

    def knows(self, sid: str) -> bool:
        return self._find(sid) is not None

    def _find(self, sid: str) -> JobRecord | None:
        try:
            shard = self.root.shard(sid)
        except (TypeError, ValueError):
            return None
        record: Any = self.root.unfinished[shard].get(sid)
        if record is None:
            record = self.root.finished[shard].get(sid)
        if not isinstance(record, JobRecord | None):
            raise BadRecord(sid, type(record).__name__)
        fault = None if record is None else fault_of(record)
        if fault is not None:
            raise BadRecord(sid, fault)
        return record

    def drop(self, sid: str) -> None:
        for trees in (self.root.unfinished, self.root.finished):
            trees[self.root.shard(sid)].pop(sid, None)

    def add(self, record: JobRecord) -> None:
        # Where none was begun the tree would refuse the record and keep it, for a later commit.
        self.tm.get()
        self.root.unfinished[self.root.shard(record.sid)][record.sid] = record

    def remove(self, record: JobRecord) -> None:
        self._free_key(record)
        # Deletion from the tree alone would not conflict with an attempt that writes it.
        record.clear()
        if record.haunted:
            return  # nor would a record that a pack has taken; maintenance removes it later
        self.drop(record.sid)

    def keyed(self, key: str) -> str | None:
        return self.root.key_tree(key).get(key)

    def take_key(self, key: str, sid: str) -> None:
        self.root.key_tree(key)[key] = sid

    def sign(self, process: str | None) -> Any:
        sign = self.root.signs.get(process)
        return None if sign is None or fault_of(sign) else sign

    def signs(self) -> Iterator[tuple[str, Any]]:
        for process, sign in self.root.signs.items():
            yield process, None if fault_of(sign) else sign

    def show_sign(self, process: str, sign: Any) -> None:
        self.root.signs[process] = sign

    def remove_sign(self, process: str) -> None:
        self.root.signs.pop(process, None)

    def last_seen(self, process: str | None) -> str:
        sign = self.sign(process)
        seen = f"{sign.name}, last sign of life {utc(sign.at)}" if sign else "no sign of life"
        return f"process {process} ({seen})"

    def runner(self, record: JobRecord) -> str | None:
        return self._shown(record)[0]

    def live(self, record: JobRecord) -> Any:
        return self._shown(record)[1]

    def _shown(self, record: JobRecord) -> tuple[str | None, Any]:
        """Return the process that shows that it runs the job, and what it shows of it."""
        holder = record.holder
        if not record.done:
            for process, sign in self.signs() if holder is None else [(holder, self.sign(holder))]:
                live = sign and sign.running.get(record.sid)
                if live is not None and live.shows(record):
                    return process, live
        return None, None

    def archive_all(self, sids: list[str]) -> None:
        for sid in sids:
            self.archive(sid)

    def archive(self, sid: str) -> None:
        shard = self.root.shard(sid)
        record = self.root.unfinished[shard].get(sid)
        if record is None or not record.done:
            return
        del self.root.unfinished[shard][sid]
        self.root.finished[shard][sid] = record
        span = span_of(record.finished)
        self.root.ended[record.status][span, sid] = record.finished, record.owner
        self.root.expiry[self.root.expiry_key(record)] = span
        if record.haunted and not record.empty:
            self.root.expiry.setdefault((int(record.expires // 60), sid), None)
        self._free_key(record)

    def forget(self, record: JobRecord) -> None:
        self.root.ended[record.status].pop((span_of(record.finished or 0.0), record.sid), None)
        if not record.haunted:
            self.root.expiry.pop(self.root.expiry_key(record), None)
        self.remove(record)

    def is_removed(self, record: JobRecord) -> bool:
        return self.get(record.sid) is None

    def _free_key(self, record: JobRecord) -> None:
        key = record.option("key")
        if key is not None and self.keyed(key) == record.sid:
            del self.root.key_tree(key)[key]

    def expire_batch(self, now: float) -> int:
        """Remove a batch of records whose minute has passed, or empty them; return how many."""
        past = list(islice(self.root.expiry.items(max=(int(now // 60), "")), BATCH))
        for (minute, sid), span in past:
            del self.root.expiry[minute, sid]
            if span is None:
                self._empty(sid, now)
                continue
            for tree in self.root.ended.values():
                tree.pop((span, sid), None)
            # No attempt can write a final record, so it need not be written here.
            self.root.finished[self.root.shard(sid)].pop(sid, None)
        return len(past)

    def _empty(self, sid: str, now: float) -> None:
        """Take out of an expired record, which must stay for a while, what is large."""
        with suppress(BadRecord):
            record = self._find(sid)
            if record is not None and record.expired(now):  # else a later job has the sid
                record.clear()

    def records(self) -> Iterator[tuple[str, JobRecord]]:
        yield from self.unfinished()
        for tree in self.root.finished:
            yield from tree.items()

    def unfinished(self, after: str | None = None) -> Iterator[tuple[str, JobRecord]]:
        trees = self.root.unfinished
        if after:
            shard = self.root.shard(after)
            yield from trees[shard].items(min=after, excludemin=True)
            trees = trees[shard + 1 :]
        for tree in trees:
            yield from tree.items()

    def all_unfinished(self) -> Iterator[tuple[str, JobRecord]]:
        trees = self.root.unfinished
        for start in range(0, len(trees), FETCHED):
            group = trees[start : start + FETCHED]
            self._fetch(group)
            found = [item for tree in group for item in tree.items()]
            self._fetch(record for _, record in found)
            yield from found
            # By itself only at the end of the transaction: all records would be in memory by then.
            self.connection.cacheGC()

    def _fetch(self, objects: Any) -> None:
        """Let a storage that is a server's send what is missing, all at once."""
        missing = [o for o in objects if getattr(o, "_p_changed", False) is None]
        # Behind a savepoint it has none, and the connection would never try again.
        if missing and hasattr(self.connection._storage, "prefetch"):
            self.connection.prefetch(missing)

    def ended(
        self, statuses: Any, before: tuple[float, str] | None = None
    ) -> Iterator[tuple[float, str]]:
        first = None if before is None else (span_of(before[0]), "")
        listed = merge(*(self.root.ended[status].items(min=first) for status in statuses))
        for _, span in groupby(listed, key=lambda item: item[0][0]):
            places = sorted(((finished, sid) for (_, sid), (finished, _) in span), reverse=True)
            yield from places if before is None else (p for p in places if p < before)

    def owned(self, owner: str, statuses: Any) -> Iterator[str]:
        for status in statuses:
            for (_, sid), (_, theirs) in self.root.ended[status].items():
                if theirs == owner:
                    yield sid

    def findings(self) -> Iterator[tuple[str, str]]:
        unfinished, archived = _sids(self.root.unfinished), _sids(self.root.finished)
        expiring = {sid for _, sid in self.root.expiry}
        listed = {sid for tree in self.root.ended.values() for _, sid in tree}
        for sids, sentence in (
            (unfinished & archived, "is among the unfinished records and the finished ones"),
            (archived - expiring, "is finished and will never expire"),
            (listed - expiring, "is listed and will never be taken off the list"),
            ({sid for sid in archived - listed if self.is_seen(sid)}, "is finished and not listed"),
        ):
            yield from ((sid, sentence) for sid in sorted(sids))
        for tree in self.root.keys:
            for key, sid in tree.items():
                if sid not in unfinished:
                    yield sid, f"is gone or finished, and its key {key!r} is not"
        # In running processes that takes two looks at most.
        overdue = self.root.expiry.keys(max=(int((self.clock() - OVERDUE) // 60), ""))
        for _, sid in islice(overdue, 1):
            yield sid, "expired long ago, and nobody removed it: does any process run jobs?"

    def is_seen(self, sid: str) -> bool:
        """Say whether a job has a record that is not hidden, be it one that cannot be read."""
        try:
            return self.get(sid) is not None
        except BadRecord:
            return True


def _sids(trees: Any) -> set[str]:
    return {sid for tree in trees for sid in tree}
