"""The RAM store: job records in dictionaries, seen by one process and lost with it."""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import ref

from persistent import Persistent
from ZODB.POSException import ConflictError
from zope.interface import implementer

from .conflicts import explain
from .connections import Connections
from .context import PersistentContext, map_references, parts, refer, resolve_references
from .interfaces import IJobStore, IJobTable, NotSchedulable, SchedulerFull
from .jobs import FileResult, JobRecord, name_of
from .process import Identity, at_rest, renew_in_children

# Longest wait for another transaction between its vote and its finish, seconds.
VOTE_TIMEOUT = 10.0

# Characters and items: up to here a result's size is not noted, and how far it is counted.
SMALL = 64 * 1024
COUNTED = 1024 * 1024
SIZED = (str, bytes, dict, list, tuple, set, frozenset)


@implementer(IJobStore)
class RamStore:
    """See IJobStore.  Optimistic like the ZODB: transactions copy records and compare at vote."""

    exclusive = True
    durable = False

    def __init__(self, max_pending: int = 10_000, clock: Any = time.time) -> None:
        self.max_pending = max_pending
        self.closed = False  # nobody will run what is added
        self.clock = clock
        self.identity = Identity()
        # sid -> (serial, state of the record); states are replaced, never changed.
        self.states: dict[str, tuple[int, dict[str, Any]]] = {}
        self.pending: set[str] = set()
        self.finished: OrderedDict[str, None] = OrderedDict()  # sids of the others, as they ended
        self.keys: dict[str, str] = {}  # key -> sid; those of finished jobs may be among them
        self.expiry: list[tuple[float, str]] = []  # heap
        self.connections = Connections()
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """Forget what transactions are at; a child has none of its parent's."""
        self.lock = threading.Lock()
        self.votes_ended = threading.Condition(self.lock)
        self.waiting = 0  # transactions that wait for the end of another one's vote
        # Records added by transactions that have not ended: (id of the table, sid).  No number,
        # which what a signal handler raises in the midst of a change would make wrong for ever.
        self.promised: set[tuple[int, str]] = set()
        self.voted: set[Any] = set()  # sids and keys between tpc_vote and tpc_finish

    @property
    def process(self) -> str:
        return self.identity()

    def alive_here(self, process: str) -> bool:
        # A forked child has copies of its parent's jobs, which the parent runs.
        return self.identity.was(process)

    def table(self, tm: Any, connect: Any = None) -> RamTable:
        txn = tm.get()
        try:
            table: RamTable = txn.data(self)
        except KeyError:
            table = RamTable(self, tm, connect)
            txn.set_data(self, table)
        return table

    def release(self, tm: Any) -> None:
        self.connections.release(tm)

    def reference(self, f: Any) -> Any:
        if not callable(f):
            raise NotSchedulable(name_of(f), "it is not callable")
        return f

    def resolve(self, function: Any) -> Any:
        return function

    def pack(self, value: Any, table: RamTable) -> Any:
        if isinstance(value, BaseException):
            _strip(value, set())
            return value

        if isinstance(value, FileResult):
            return replace(value, content=self.pack(value.content, table))

        def refer_to(obj: Any) -> Any:
            if isinstance(obj, PersistentContext):
                if obj.database is not None:
                    self.connections.know(obj.database)
                    try:
                        obj.resolve(table.connection)
                    except ValueError as error:
                        raise NotSchedulable("a PersistentContext", str(error)) from None
                return obj
            reference = refer(obj, table.tm, table.connection)
            self.connections.know(obj._p_jar.db())
            return reference

        # Copies, or else a try would find what an earlier one made of its arguments.
        return map_references(value, refer_to, (Persistent, PersistentContext), copies=True)

    def size(self, payload: Any) -> int | None:
        """See IJobStore: at least so many; what is large is not counted to its end."""
        waiting, size = [payload], 0
        while waiting and size < COUNTED:
            each = waiting.pop()
            size += len(each) if isinstance(each, SIZED) else 1
            if size < COUNTED:
                waiting += parts(each)
        return size if size > SMALL else None

    def unpack(self, payload: Any, table: RamTable) -> Any:
        if isinstance(payload, FileResult):
            return replace(payload, content=self.unpack(payload.content, table))
        return resolve_references(payload, lambda: table.connection)

    def explain(self, error: BaseException) -> str:
        db = self.connections.db
        return repr(error) if db is None else explain(error, db)

    # -- maintenance

    def archive(self, sids: list[str], goes_on: Any = None) -> None:
        """Do nothing: finished records are told apart already."""

    def expire(self, now: float, goes_on: Any = None) -> None:
        """Forget the records that expired."""
        with at_rest(self.lock):
            while self.expiry and self.expiry[0][0] <= now:
                self._expire_first()

    def _expire_first(self) -> None:
        expires, sid = heapq.heappop(self.expiry)
        _, state = self.states.get(sid, (0, {}))
        if state.get("expires") == expires:  # else it was removed, and the sid may be another's
            self.finished.pop(sid, None)
            del self.states[sid]

    # -- called by tables, under no lock

    def promise(self, table: int, sid: str) -> None:
        if self.closed:
            raise RuntimeError("the scheduler was stopped and runs no more jobs: make a new one")
        with at_rest(self.lock):
            if len(self.pending) + len(self.promised) >= self.max_pending:
                raise SchedulerFull(self.max_pending)
            self.promised.add((table, sid))

    def vote(
        self, changed: dict[str, JobRecord], keys: dict[str, tuple[Any, str]], ours: set[Any]
    ) -> None:
        """Reserve records and keys for one transaction, or raise ConflictError.

        They are noted in *ours* until `apply` or `unvote`.  Waits for a transaction that has
        voted on one of them, as a storage would.
        """
        wanted: set[Any] = set(changed)
        if keys:
            wanted.update(("key", key) for key in keys)
        with at_rest(self.lock):
            if not self.voted.isdisjoint(wanted):
                self._wait_for_votes(wanted)
            for sid, record in changed.items():
                if sid in self.voted or self.serial(sid) != record._v_serial:
                    raise ConflictError(f"job {sid!r} was changed by another transaction")
            for key, (seen, _) in keys.items():
                # What was seen may have ended meanwhile, and so have given its key back.
                if ("key", key) in self.voted or self.keys.get(key) not in (None, seen):
                    raise ConflictError(f"key {key!r} was taken by another transaction")
            ours |= wanted  # first, for whoever is interrupted here gives back what is there
            self.voted |= wanted

    def _wait_for_votes(self, wanted: set[Any]) -> None:
        self.waiting += 1
        try:
            self.votes_ended.wait_for(lambda: self.voted.isdisjoint(wanted), VOTE_TIMEOUT)
        finally:
            self.waiting -= 1

    def serial(self, sid: str) -> int:
        entry = self.states.get(sid)
        return 0 if entry is None else entry[0]

    def apply(
        self,
        changes: dict[str, dict[str, Any] | None],
        keys: dict[str, tuple[Any, str]],
        ours: set[Any],
    ) -> None:
        with at_rest(self.lock):
            for sid, state in changes.items():
                self._apply(sid, state)
            # Only now: who looks at a key meanwhile, without the lock, must find its job.
            for key, (_, sid) in keys.items():
                if sid in self.pending:  # else it was removed, or ended, by who scheduled it
                    self.keys[key] = sid
            self._unvote(ours)

    def unvote(self, ours: set[Any]) -> None:
        with at_rest(self.lock):
            self._unvote(ours)

    def _unvote(self, ours: set[Any]) -> None:
        self.voted -= ours
        ours.clear()
        if self.waiting:
            self.votes_ended.notify_all()

    def _apply(self, sid: str, state: dict[str, Any] | None) -> None:
        serial, old = self.states.get(sid, (0, None))
        if state is None:
            self.states.pop(sid, None)
        else:
            self.states[sid] = (serial + 1, state)
        expires = None if state is None else state.get("expires")
        if state is not None and expires is None:
            self.pending.add(sid)
            self.finished.pop(sid, None)  # of an expired job that had the sid
            return
        self.pending.discard(sid)
        self._free_key(sid, old or state or {})
        if expires is None:
            self.finished.pop(sid, None)
        else:
            self.finished.setdefault(sid)
            heapq.heappush(self.expiry, (expires, sid))
            self._bound_finished()

    def _bound_finished(self) -> None:
        """Let those finished jobs give way that ended first.

        Of those that expire first the last one may be the very job that ends now.
        """
        while len(self.finished) > self.max_pending:
            self.states.pop(self.finished.popitem(last=False)[0], None)
        if len(self.expiry) > 2 * self.max_pending:
            # Most of them were removed long ago.
            finished = (item for item in self.states.items() if item[0] not in self.pending)
            self.expiry = sorted((state["expires"], sid) for sid, (_, state) in finished)

    def _free_key(self, sid: str, state: dict[str, Any]) -> None:
        key: Any = (state.get("options") or {}).get("key")
        if self.keys.get(key) == sid:
            del self.keys[key]


def _strip(error: BaseException, seen: set[int]) -> None:
    """Free an exception, and those that it holds, from the frames of the job.

    They would keep its connection and objects alive.  Raises NotSchedulable for one that holds
    a persistent object.
    """

    def look(obj: Any) -> Any:
        if isinstance(obj, BaseException):
            _strip(obj, seen)
            return obj
        raise NotSchedulable(
            f"an exception that holds {type(obj).__name__}",
            "a persistent object belongs to its connection",
        )

    if id(error) not in seen:
        seen.add(id(error))
        map_references([*error.args, vars(error)], look, (Persistent, BaseException))
        error.__traceback__ = error.__context__ = error.__cause__ = None
        if isinstance(error, AttributeError):
            error.obj = None  # any object of the job's, which a pickle leaves out as well


@implementer(IJobTable)
class RamTable:
    """See IJobTable; the data manager of one transaction and the ``_p_jar`` of its records."""

    def __init__(self, store: RamStore, tm: Any, connect: Any) -> None:
        self.store = store
        self.tm = tm
        self.transaction_manager = tm
        self._connect = connect
        self._joined = False
        self._voted: set[Any] = set()  # sids and keys that are reserved for us
        # As last read, by who has them still: they refer to us, and to read alone ends nothing.
        self._records: dict[str, ref[JobRecord]] = {}
        self._changed: dict[str, JobRecord] = {}  # written or added
        self._removed: set[str] = set()  # of those
        self._added: set[str] = set()  # of those
        self._keys: dict[str, tuple[Any, str]] = {}  # key -> (sid as seen, new sid)
        self._seen: dict[str, str | None] = {}  # key -> sid as last read

    def __del__(self) -> None:
        # Nobody ends the transaction of a thread that ended before.
        self._forget_promises()

    @property
    def connection(self) -> Any:
        if self._connect:
            return self._connect()
        self.store.connections.forget_closed()
        return self.store.connections.open(self.tm)

    # -- IJobTable

    def get(self, sid: str) -> JobRecord | None:
        """See IJobTable.  What others committed meanwhile is seen, unlike in the ZODB."""
        record = self._find(sid)
        return None if record is None or record.expired(self.store.clock()) else record

    def knows(self, sid: str) -> bool:
        return self._find(sid) is not None

    def _find(self, sid: str) -> JobRecord | None:
        return None if sid in self._removed else self._changed.get(sid) or self._load(sid)

    def _load(self, sid: str) -> JobRecord | None:
        # One dictionary look-up is atomic, and states are never changed in place.
        serial, state = self.store.states.get(sid, (0, None))
        known = self._records.get(sid)
        record = None if known is None else known()
        if record is not None and record._v_serial == serial:
            return record
        if state is None:
            return None
        record = JobRecord.__new__(JobRecord)
        self._records[sid] = ref(record)
        record.__setstate__(state)
        return self._adopt(record, serial)

    def _adopt(self, record: JobRecord, serial: int) -> JobRecord:
        # The serial stays with the object: a later read must not refresh what was read before.
        record._v_serial = serial
        record._p_jar = self
        record._p_oid = record.sid
        return record

    def add(self, record: JobRecord) -> None:
        self._join()  # first: only a transaction that we take part in takes promises back
        self._added.add(record.sid)
        self.store.promise(id(self), record.sid)
        # Where an expired record still has the sid, it is replaced.
        self.register(self._adopt(record, self.store.serial(record.sid)))

    def remove(self, record: JobRecord) -> None:
        self.register(record)
        self._removed.add(record.sid)

    def drop(self, sid: str) -> None:
        record = self._find(sid)
        if record is not None:
            self.remove(record)

    forget = remove

    def is_removed(self, record: JobRecord) -> bool:
        # Not one that others collected, while they could: who collects it too must conflict.
        return record.sid in self._removed or record.expired(self.store.clock())

    def keyed(self, key: str) -> str | None:
        if key in self._keys:
            return self._keys[key][1]
        sid = self._seen[key] = self.store.keys.get(key)
        return sid

    def take_key(self, key: str, sid: str) -> None:
        # As it was read for the decision: by now it may be another's.
        seen = self._keys[key][0] if key in self._keys else self._seen.get(key)
        self._keys[key] = (seen, sid)

    def sign(self, process: str | None) -> None:
        """Return None: nobody else is there to be told."""

    def signs(self) -> tuple[()]:
        return ()

    def show_sign(self, process: str, sign: Any) -> None:
        raise NotImplementedError("the records end with this process, and so does its life")

    def remove_sign(self, process: str) -> None:
        pass

    def last_seen(self, process: str | None) -> str:
        return f"process {process}"

    def runner(self, record: JobRecord) -> None:
        """Return None: no other process runs what is in RAM."""

    live = runner

    def records(self) -> Iterator[tuple[str, JobRecord]]:
        return self._all(self.store.states)

    def unfinished(self, after: str | None = None) -> Iterator[tuple[str, JobRecord]]:
        return self._all(self.store.pending, after)

    all_unfinished = unfinished

    def ended(
        self, statuses: Any, before: tuple[float, str] | None = None
    ) -> list[tuple[float, str]]:
        places = ((s["finished"], s["sid"]) for s in self._ended(statuses))
        return sorted((p for p in places if before is None or p < before), reverse=True)

    def owned(self, owner: str, statuses: Any) -> list[str]:
        return [s["sid"] for s in self._ended(statuses) if s.get("owner") == owner]

    def _ended(self, statuses: Any) -> Iterator[dict[str, Any]]:
        with at_rest(self.store.lock):
            states = [state for _, state in self.store.states.values()]
        return (state for state in states if state.get("status") in statuses)

    def findings(self) -> tuple[()]:
        return ()  # there is nothing beside the records

    def _all(self, sids: Any, after: str | None = None) -> Iterator[tuple[str, JobRecord]]:
        with at_rest(self.store.lock):
            sids = {*sids, *self._changed}
        if after is not None:
            sids = sorted(sid for sid in sids if sid > after)
        return ((sid, record) for sid in sids if (record := self.get(sid)) is not None)

    # -- the persistence machinery's jar

    def register(self, record: JobRecord) -> None:
        if self._changed.setdefault(record.sid, record) is not record:
            raise ConflictError(f"job {record.sid!r} was read twice and changed in between")
        self._join()

    def _join(self) -> None:
        if not self._joined:
            self.tm.get().join(self)
            self._joined = True

    def _undo(self, sid: str) -> None:
        del self._changed[sid]
        self._records.pop(sid, None)
        if sid in self._added:
            self.store.promised.discard((id(self), sid))
            self._added.discard(sid)

    def _forget_promises(self) -> None:
        # No lock: the garbage collector may run while this very thread holds it.
        if self._added:
            self.store.promised.difference_update([(id(self), sid) for sid in self._added])
            self._added.clear()

    # -- the transaction's data manager

    def sortKey(self) -> str:
        # After every storage: nothing may fail between this vote and this finish.
        return f"~pyramid_async.ram:{id(self.store)}"

    def abort(self, txn: Any) -> None:
        if self._voted:
            self.store.unvote(self._voted)
        self._forget_promises()
        for held in (self._records, self._changed, self._removed, self._keys, self._seen):
            held.clear()
        self._joined = False

    tpc_abort = abort

    def tpc_begin(self, txn: Any) -> None:
        pass

    def commit(self, txn: Any) -> None:
        pass

    def tpc_vote(self, txn: Any) -> None:
        self.store.vote(self._changed, self._keys, self._voted)

    def tpc_finish(self, txn: Any) -> None:
        states: dict[str, Any] = {
            sid: None if sid in self._removed else record.__getstate__()
            for sid, record in self._changed.items()
        }
        self.store.apply(states, self._keys, self._voted)
        self.abort(txn)

    def savepoint(self) -> _Savepoint:
        return _Savepoint(self)


class _Savepoint:
    """What a table held when the savepoint was made."""

    def __init__(self, table: RamTable) -> None:
        self.table = table
        self.states = {sid: record.__getstate__() for sid, record in table._changed.items()}
        self.removed = set(table._removed)
        self.keys = dict(table._keys)

    def rollback(self) -> None:
        table = self.table
        for sid in [sid for sid in table._changed if sid not in self.states]:
            table._undo(sid)
        for sid, state in self.states.items():
            # Assigned through the machinery the record stays registered.
            serial = table._changed[sid]._v_serial
            table._changed[sid].__setstate__(state)
            table._changed[sid]._v_serial = serial
        table._removed = set(self.removed)
        table._keys = dict(self.keys)
