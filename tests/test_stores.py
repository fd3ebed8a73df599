"""The contract of IJobStore: one suite, run against the RAM store and the ZODB store.

With the marker ``services`` also against the ZODB store on a ZEO server and on PostgreSQL,
where transactions go in turn to two clients, as if two processes shared the storage.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict, namedtuple
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import count, cycle
from uuid import uuid4

import pytest
import transaction
import ZODB
from bare import Clock
from crash.storages import HistoryFree, RelStorage
from persistent import Persistent
from transaction.interfaces import NoTransaction, TransactionFailedError, TransientError
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from pyramid_async.conflicts import explain
from pyramid_async.connections import Connections
from pyramid_async.context import PersistentContext
from pyramid_async.interfaces import (
    AsyncError,
    InvalidTransition,
    NotSchedulable,
    SchedulerFull,
)
from pyramid_async.jobs import (
    ACCEPTED,
    DISMISSED,
    FAILED,
    FINAL,
    RUNNING,
    STATUSES,
    SUCCESSFUL,
    TRANSITIONS,
    JobRecord,
)
from pyramid_async.ram import VOTE_TIMEOUT, RamStore
from pyramid_async.transactional import manager_itself
from pyramid_async.zodb import FORMAT, HAUNTED, INLINE_PAYLOAD, JobRoot, NewerFormat, ZodbStore

NOW = 1_000_000.0
SID = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
BESIDE = SID[:2] + OTHER[2:]  # in the same tree of the ZODB as SID

Pair = namedtuple("Pair", "first second")


class Thing(Persistent):
    """An object of the application."""

    def __init__(self, name):
        self.name = name


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def databases(request):
    """A database of the application, beside whichever store; two clients of a shared one."""
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("store")
    shared = SHARED.get(kind)
    made = request.getfixturevalue(shared) if shared else [ZODB.DB(MappingStorage())]
    yield made
    transaction.abort()
    for db in made:
        db.close()


@pytest.fixture
def database(databases):
    return databases[0]


@pytest.fixture
def zodb_store(database, clock):
    store = ZodbStore(database, clock=clock)
    store.install()
    return store


# -- storages that processes share


class InTurn:
    """Gives each transaction manager a connection of the next client."""

    def __init__(self, databases):
        self.clients = [Connections(db) for db in databases]
        self.turn = cycle(self.clients)

    def open(self, tm):
        client = vars(manager_itself(tm)).setdefault("client", next(self.turn))
        return client.open(tm)

    def release(self, tm):
        vars(manager_itself(tm)).pop("client", None)
        for client in self.clients:
            client.release(tm)


@pytest.fixture
def shared_store(databases, zodb_store):
    zodb_store.connections = InTurn(databases)
    return zodb_store


@pytest.fixture
def zeo():
    import ZEO

    address, stop = ZEO.server()
    yield [ZEO.DB(address, server_sync=True) for _ in range(2)]
    stop()


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """The names of two databases of our own in PostgreSQL, by kind."""
    kinds = {"relstorage": RelStorage, "relstorage-hf": HistoryFree}
    made = {name: kind(tmp_path_factory.mktemp(name)) for name, kind in kinds.items()}
    for name, storage in made.items():
        storage.database = f"stores_{name.replace('-', '_')}_{uuid4().hex}"
        storage.start()
    yield {name: storage.database for name, storage in made.items()}
    for storage in made.values():
        storage.stop()


def relstorage(database, keep_history):
    from relstorage.adapters.postgresql import PostgreSQLAdapter
    from relstorage.options import Options
    from relstorage.storage import RelStorage

    options = Options(keep_history=keep_history)
    dsn = f"dbname={database} user=postgres host=127.0.0.1"
    return RelStorage(PostgreSQLAdapter(dsn, options=options), options=options)


@pytest.fixture
def emptied(request, postgresql):
    kind = request.node.callspec.params["store"]
    storages = [relstorage(postgresql[kind], kind == "relstorage") for _ in range(2)]
    storages[0].zap_all(slow=True)  # which deletes rows: quicker where there are few
    return [ZODB.DB(storage) for storage in storages]


# Kind of a storage that processes share -> fixture of its clients.
SHARED = {"zeo": "zeo", "relstorage": "emptied", "relstorage-hf": "emptied"}


@pytest.fixture
def ram_store(clock):
    return RamStore(clock=clock)


@pytest.fixture(
    params=["ram", "zodb", *[pytest.param(kind, marks=pytest.mark.services) for kind in SHARED]]
)
def store(request):
    kind = "shared" if request.param in SHARED else request.param
    return request.getfixturevalue(f"{kind}_store")


class View:
    """One transaction and what the store shows it."""

    def __init__(self, store):
        self.store = store
        self.tm = transaction.TransactionManager(explicit=True)
        self.tm.begin()
        self.table = store.table(self.tm)

    def add(self, sid=SID, **facts):
        record = JobRecord(sid, self.store.clock(), self.store.reference(int), **facts)
        self.table.add(record)
        return record

    def get(self, sid=SID):
        return self.table.get(sid)

    def commit(self):
        self.tm.commit()


@contextmanager
def view(store):
    seen = View(store)
    try:
        yield seen
    finally:
        with suppress(NoTransaction):
            seen.tm.abort()
        store.release(seen.tm)


@contextmanager
def committed(store):
    with view(store) as seen:
        yield seen
        seen.commit()


def add(store, sid=SID, **facts):
    with committed(store) as seen:
        seen.add(sid, holder=store.process, **facts)


def finish(record, status=SUCCESSFUL, keep=100):
    if record.status == ACCEPTED and status != DISMISSED:
        record.move(RUNNING, NOW)
    record.finish(status, NOW, keep)


def status_in(store, sid=SID):
    with view(store) as seen:
        record = seen.get(sid)
        return None if record is None else record.status


class Resource:
    """A data manager that calls a function in one phase of its transaction's commit."""

    def __init__(self, phase, call, sort_key="~~last"):
        self.phase, self.call, self.sort_key = phase, call, sort_key

    def sortKey(self):
        return self.sort_key

    def __getattr__(self, name):
        if name not in {"abort", "commit", "tpc_begin", "tpc_vote", "tpc_finish", "tpc_abort"}:
            raise AttributeError(name)
        return lambda txn: self.call() if name == self.phase else None


def refuse():
    raise RuntimeError("the vote failed")


# -- commit and abort ----------------------------------------------------------------------


def test_unknown_sid_is_none(store):
    with view(store) as seen:
        assert seen.get() is None


@pytest.mark.parametrize(
    "sid", ["", "z", "zz", "\x00", "0" * 10_000, "ä" * 32, "../..", "0x", " 1"]
)
def test_what_is_no_sid_is_none(store, sid):
    add(store)
    with view(store) as seen:
        assert seen.get(sid) is None


def test_new_record_is_seen_by_its_own_transaction_alone(store):
    with view(store) as one, view(store) as two:
        record = one.add()
        assert one.get() is record
        assert two.get() is None
        assert status_in(store) is None


def test_committed_record_is_seen_by_everybody(store):
    add(store, owner="ann", origin=("https", "example.org", "/app"), options={"title": "T"})
    with view(store) as seen:
        record = seen.get()
        assert (record.sid, record.status, record.created) == (SID, ACCEPTED, NOW)
        assert (record.owner, record.origin, record.option("title")) == (
            "ann",
            ("https", "example.org", "/app"),
            "T",
        )


def test_abort_leaves_no_trace(store):
    with view(store) as seen:
        seen.add()
        seen.tm.abort()
    assert status_in(store) is None
    with view(store) as seen:
        assert list(seen.table.records()) == list(seen.table.unfinished()) == []


def test_change_is_seen_after_its_commit(store):
    add(store)
    with view(store) as one:
        finish(one.get())
        assert status_in(store) == ACCEPTED
        one.commit()
    assert status_in(store) == SUCCESSFUL


def test_change_is_gone_after_abort(store):
    add(store)
    with view(store) as one:
        finish(one.get())
        one.tm.abort()
    assert status_in(store) == ACCEPTED


def test_record_that_is_added_without_a_transaction_is_in_no_later_one(zodb_store):
    """As where a view that ``tm.activate_hook`` leaves out schedules with an explicit manager."""
    with view(zodb_store) as seen:
        seen.add()
        seen.commit()
        with pytest.raises(NoTransaction):
            seen.add(BESIDE)
        seen.tm.begin()
        assert seen.get(BESIDE) is None


def test_one_transaction_sees_one_object(store):
    add(store)
    with view(store) as seen:
        assert seen.get() is seen.get()
        finish(seen.get())
        assert seen.get().status == SUCCESSFUL


def test_record_stays_as_it_was_read_whatever_others_commit(store):
    add(store)
    with view(store) as one:
        record = one.get()
        assert record.status == ACCEPTED
        with committed(store) as two:
            finish(two.get())
        assert record.status == ACCEPTED


def test_table_of_the_next_transaction_sees_what_others_committed(store):
    add(store)
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    assert store.table(tm).get(SID).status == ACCEPTED
    with committed(store) as other:
        finish(other.get())
    tm.abort()
    tm.begin()
    assert store.table(tm).get(SID).status == SUCCESSFUL
    tm.abort()
    store.release(tm)


def test_table_is_the_same_records_wherever_it_is_asked_for(store):
    with view(store) as seen:
        seen.add()
        assert store.table(seen.tm).get(SID) is seen.get()


def test_commit_goes_on_in_the_next_transaction_of_the_same_manager(store):
    with view(store) as seen:
        record = seen.add()
        seen.commit()
        seen.tm.begin()
        table = store.table(seen.tm)
        finish(table.get(SID))
        seen.commit()
        assert record.sid == SID
    assert status_in(store) == SUCCESSFUL


def test_thread_local_manager_works_too(store):
    try:
        transaction.begin()
        record = JobRecord(SID, NOW, store.reference(int))
        store.table(transaction.manager).add(record)
        transaction.commit()
        assert store.table(transaction.manager).get(SID).status == ACCEPTED
    finally:
        transaction.abort()
        store.release(transaction.manager)


def test_failed_commit_of_another_resource_leaves_no_trace_and_no_lock(store):
    add(store)
    with view(store) as seen:
        finish(seen.get())
        seen.add(OTHER)
        seen.tm.get().join(Resource("tpc_vote", refuse))
        with pytest.raises(RuntimeError):
            seen.commit()
        seen.tm.abort()
    assert (status_in(store), status_in(store, OTHER)) == (ACCEPTED, None)
    with committed(store) as seen:
        finish(seen.get(), FAILED)
        seen.add(OTHER)
    assert (status_in(store), status_in(store, OTHER)) == (FAILED, ACCEPTED)


def test_many_threads_insert_side_by_side(store):
    start, failed = threading.Barrier(4), []

    def insert(number):
        start.wait(20)
        for ordinal in range(25):
            try:
                add(store, f"{number * 25 + ordinal:02x}{SID}")
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=insert, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(45)  # a hundred commits
    assert failed == []
    with view(store) as seen:
        assert len(list(seen.table.unfinished())) == 100


# -- conflicts -----------------------------------------------------------------------------


def test_two_inserts_of_one_sid_conflict(store):
    with view(store) as one, view(store) as two:
        one.add()
        two.add()
        one.commit()
        with pytest.raises(TransientError):
            two.commit()


def test_two_writers_of_one_record_conflict(store):
    add(store)
    with view(store) as one, view(store) as two:
        finish(one.get())
        finish(two.get(), DISMISSED)
        one.commit()
        with pytest.raises(ConflictError):
            two.commit()
    assert status_in(store) == SUCCESSFUL


def test_writer_of_what_was_changed_since_it_was_read_conflicts(store):
    add(store)
    with view(store) as one:
        record = one.get()
        assert record.status == ACCEPTED
        with committed(store) as two:
            finish(two.get(), DISMISSED)
        with pytest.raises(ConflictError):
            # At the write already, or at the commit.
            finish(record)
            one.commit()
    assert status_in(store) == DISMISSED


def test_writer_that_reads_again_before_it_writes_conflicts_all_the_same(store):
    add(store)
    with view(store) as one:
        record = one.get()
        assert record.status == ACCEPTED
        with committed(store) as two:
            finish(two.get(), DISMISSED)
        one.get()
        with pytest.raises(ConflictError):
            finish(record)
            one.commit()
    assert status_in(store) == DISMISSED


@pytest.mark.parametrize("fence", ["removed", "dismissed", "claimed", "removed when finished"])
def test_whatever_takes_a_job_away_makes_the_attempt_that_has_it_conflict(store, fence):
    """Removal from a tree alone would let both commit."""
    add(store)
    if fence == "removed when finished":
        with committed(store) as seen:
            finish(seen.get())
    with view(store) as attempt:
        attempt.get().result = b"an attempt writes this"
        with committed(store) as other:
            record = other.get()
            if fence == "dismissed":
                record.finish(DISMISSED, NOW, 100)
            elif fence == "claimed":
                record.move(RUNNING, NOW)
            else:
                other.table.remove(record)
        with pytest.raises(ConflictError):
            attempt.commit()
    expected = {"dismissed": DISMISSED, "claimed": RUNNING}.get(fence)
    assert status_in(store) == expected


@pytest.mark.parametrize("first", ["write", "remove"])
def test_removal_and_write_conflict_in_either_order(store, first):
    add(store)
    with view(store) as writer, view(store) as remover:
        finish(writer.get())
        remover.table.remove(remover.get())
        winner, loser = (writer, remover) if first == "write" else (remover, writer)
        winner.commit()
        with pytest.raises(ConflictError):
            loser.commit()
    assert status_in(store) == (SUCCESSFUL if first == "write" else None)


def test_two_removals_conflict(store):
    add(store)
    with view(store) as one, view(store) as two:
        one.table.remove(one.get())
        two.table.remove(two.get())
        one.commit()
        with pytest.raises(ConflictError):
            two.commit()


def test_readers_never_conflict(store):
    add(store)
    add(store, OTHER)
    with view(store) as reader:
        assert reader.get().status == ACCEPTED
        with committed(store) as writer:
            finish(writer.get())
        finish(reader.get(OTHER))
        reader.commit()
    assert (status_in(store), status_in(store, OTHER)) == (SUCCESSFUL, SUCCESSFUL)


def test_writers_of_different_records_do_not_conflict(store):
    add(store)
    add(store, OTHER)
    with view(store) as one, view(store) as two:
        finish(one.get())
        finish(two.get(OTHER))
        one.commit()
        two.commit()
    assert (status_in(store), status_in(store, OTHER)) == (SUCCESSFUL, SUCCESSFUL)


def test_conflict_spoils_the_whole_transaction(store):
    add(store)
    add(store, OTHER)
    with view(store) as one:
        finish(one.get())
        finish(one.get(OTHER))
        with committed(store) as two:
            finish(two.get(), DISMISSED)
        with pytest.raises(ConflictError):
            one.commit()
    assert (status_in(store), status_in(store, OTHER)) == (DISMISSED, ACCEPTED)


def test_after_a_conflict_the_work_can_be_done_again(store):
    add(store)
    with view(store) as one:
        finish(one.get())
        with committed(store) as two:
            two.get().move(RUNNING, NOW)
        with pytest.raises(ConflictError):
            one.commit()
        one.tm.abort()
        one.tm.begin()
        one.table = store.table(one.tm)
        finish(one.get())
        one.commit()
    assert status_in(store) == SUCCESSFUL


def test_commit_that_meets_another_between_vote_and_finish_conflicts(store, wait_for):
    add(store)
    voted, go_on, outcome = threading.Event(), threading.Event(), []

    def hold():
        voted.set()
        assert go_on.wait(10)

    def slow():
        with committed(store) as seen:
            finish(seen.get())
            seen.tm.get().join(Resource("tpc_vote", hold))

    def quick():
        try:
            quicker.commit()
        except ConflictError as error:
            outcome.append(error)

    with view(store) as quicker:
        finish(quicker.get(), DISMISSED)
        threads = [threading.Thread(target=target) for target in (slow, quick)]
        threads[0].start()
        wait_for(voted)
        threads[1].start()  # refused at once, or held by the storage's commit lock
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert len(outcome) == 1
    assert status_in(store) == SUCCESSFUL


def test_commit_that_waits_for_another_for_too_long_conflicts(ram_store, monkeypatch):
    monkeypatch.setattr("pyramid_async.ram.VOTE_TIMEOUT", 0.01)
    store, refused = ram_store, []
    add(store)
    with view(store) as slow, view(store) as quick:
        finish(slow.get())
        finish(quick.get(), DISMISSED)

        def commit_meanwhile():
            try:
                quick.commit()
            except ConflictError as error:
                refused.append(error)

        slow.tm.get().join(Resource("tpc_vote", commit_meanwhile))
        slow.commit()
    assert len(refused) == 1
    assert status_in(store) == SUCCESSFUL


def test_commit_that_waits_for_another_which_then_fails_goes_through(ram_store, wait_for):
    store = ram_store
    add(store)
    with view(store) as slow, view(store) as quick:
        finish(slow.get())
        finish(quick.get(), DISMISSED)
        thread = threading.Thread(target=quick.commit)

        def fail_while_the_other_waits():
            thread.start()
            wait_for(lambda: store.waiting)
            refuse()

        slow.tm.get().join(Resource("tpc_vote", fail_while_the_other_waits))
        with pytest.raises(RuntimeError, match="the vote failed"):
            slow.commit()
        thread.join(VOTE_TIMEOUT / 2)
        was_told = not thread.is_alive()
        thread.join(VOTE_TIMEOUT)
    assert (was_told, status_in(store)) == (True, DISMISSED)


def test_outcome_in_ram_appears_when_every_other_data_manager_has_finished(ram_store):
    add(ram_store)
    seen = []
    with committed(ram_store) as one:
        finish(one.get())
        one.tm.get().join(
            Resource("tpc_finish", lambda: seen.append(status_in(ram_store)), sort_key="zodb")
        )
    assert (seen, status_in(ram_store)) == ([ACCEPTED], SUCCESSFUL)


def test_no_record_resolves_conflicts():
    assert not hasattr(JobRecord, "_p_resolveConflict")


# -- removal -------------------------------------------------------------------------------


def test_removed_record_is_gone_for_its_own_transaction_at_once(store):
    add(store)
    with view(store) as one:
        one.table.remove(one.get())
        assert one.get() is None
        assert list(one.table.records()) == []
        assert status_in(store) == ACCEPTED


def test_removal_is_undone_by_abort(store):
    add(store)
    with view(store) as one:
        one.table.remove(one.get())
        one.tm.abort()
    assert status_in(store) == ACCEPTED


def test_dropped_record_is_gone(store):
    add(store)
    with committed(store) as seen:
        seen.table.drop(SID)
        seen.table.drop(OTHER)
        assert seen.get() is None
    assert status_in(store) is None


def test_record_removed_in_the_transaction_that_added_it_never_existed(store):
    with committed(store) as one:
        one.table.remove(one.add())
        assert one.get() is None
    assert status_in(store) is None
    with view(store) as seen:
        assert list(seen.table.records()) == []


def test_removed_sid_can_be_used_again(store):
    add(store)
    with committed(store) as one:
        one.table.remove(one.get())
    add(store, owner="second")
    with view(store) as seen:
        assert seen.get().owner == "second"


# -- savepoints ----------------------------------------------------------------------------


def test_rollback_forgets_what_was_added_since(store):
    with committed(store) as seen:
        seen.add()
        savepoint = seen.tm.savepoint()
        seen.add(OTHER)
        savepoint.rollback()
        assert (seen.get().status, seen.get(OTHER)) == (ACCEPTED, None)
    assert (status_in(store), status_in(store, OTHER)) == (ACCEPTED, None)


def test_rollback_to_before_the_first_use_forgets_all(store):
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        seen.add()
        savepoint.rollback()
        assert store.table(seen.tm).get(SID) is None
    assert status_in(store) is None


def test_rolled_back_sid_can_be_added_again(store):
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        seen.add(owner="first")
        savepoint.rollback()
        seen.add(owner="second")
    with view(store) as seen:
        assert seen.get().owner == "second"


def test_rollback_restores_what_was_changed_since(store):
    add(store)
    with committed(store) as seen:
        seen.get().move(RUNNING, NOW)
        savepoint = seen.tm.savepoint()
        finish(seen.get())
        savepoint.rollback()
        assert seen.get().status == RUNNING
        assert seen.get().result is None
    assert status_in(store) == RUNNING


def test_rollback_restores_a_record_that_was_only_read_before(store):
    add(store)
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        finish(seen.get())
        savepoint.rollback()
        assert seen.get().status == ACCEPTED
    assert status_in(store) == ACCEPTED


def test_who_still_has_a_record_that_was_rolled_back_does_not_read_its_change(store):
    add(store)
    add(store, OTHER)
    with committed(store) as seen:
        seen.get(OTHER).move(RUNNING, NOW)
        savepoint = seen.tm.savepoint()
        record = seen.get()
        finish(record)
        savepoint.rollback()
        assert seen.get().status == ACCEPTED
    assert status_in(store) == ACCEPTED


def test_record_can_be_changed_after_a_rollback(store):
    add(store)
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        seen.get().move(RUNNING, NOW)
        savepoint.rollback()
        seen.get().finish(DISMISSED, NOW, 100)
    assert status_in(store) == DISMISSED


def test_rollback_brings_back_what_was_removed_since(store):
    add(store)
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        seen.table.remove(seen.get())
        savepoint.rollback()
        assert seen.get().status == ACCEPTED
    assert status_in(store) == ACCEPTED


def test_removal_that_was_rolled_back_can_be_done_again(store):
    """Also by a hook of the commit that has the record of before, as who collects a result."""
    add(store)
    with committed(store) as seen:
        record = seen.get()
        savepoint = seen.tm.savepoint()
        seen.table.remove(record)
        savepoint.rollback()
        seen.table.remove(record)
    assert status_in(store) is None


def test_rollback_to_after_the_first_change_brings_back_what_was_removed_since(store):
    add(store)
    with committed(store) as seen:
        seen.add(OTHER)
        savepoint = seen.tm.savepoint()
        seen.table.remove(seen.get())
        savepoint.rollback()
        assert seen.get().status == ACCEPTED
    assert status_in(store) == status_in(store, OTHER) == ACCEPTED


def test_changed_record_that_was_rolled_back_is_still_a_fence(store):
    add(store)
    with view(store) as one:
        one.get().move(RUNNING, NOW)
        savepoint = one.tm.savepoint()
        finish(one.get())
        savepoint.rollback()
        with committed(store) as two:
            finish(two.get(), DISMISSED)
        with pytest.raises(ConflictError):
            one.commit()
    assert status_in(store) == DISMISSED


def test_savepoints_can_be_rolled_back_one_after_the_other(store):
    with committed(store) as seen:
        seen.add("00")
        outer = seen.tm.savepoint()
        seen.add("01")
        inner = seen.tm.savepoint()
        seen.add("02")
        inner.rollback()
        assert [seen.get(sid) is not None for sid in ("00", "01", "02")] == [True, True, False]
        inner.rollback()
        outer.rollback()
        assert [seen.get(sid) is not None for sid in ("00", "01", "02")] == [True, False, False]
    assert [status_in(store, sid) for sid in ("00", "01", "02")] == [ACCEPTED, None, None]


# -- listing -------------------------------------------------------------------------------


def listed(pairs):
    return sorted(sid for sid, _record in pairs)


def test_records_lists_finished_and_unfinished_and_what_the_transaction_did(store):
    add(store, "00")
    add(store, "01")
    add(store, "02")
    with committed(store) as seen:
        finish(seen.get("00"))
    with view(store) as seen:
        seen.add("03")
        seen.table.remove(seen.get("02"))
        assert listed(seen.table.records()) == ["00", "01", "03"]


def test_unfinished_lists_all_that_is_unfinished(store):
    add(store, "00")
    add(store, "01")
    with committed(store) as seen:
        finish(seen.get("00"))
        seen.get("01").move(RUNNING, NOW)
    add(store, "02")
    with view(store) as seen:
        assert {"01", "02"} <= set(listed(seen.table.unfinished()))
        assert listed(seen.table.all_unfinished()) == listed(seen.table.unfinished())


def test_unfinished_goes_on_after_any_of_them(store):
    sids = {"0000", "0001", "0002", "0100", "0101", "ff00"}
    for sid in sids:
        add(store, sid)
    with view(store) as seen:
        order = [sid for sid, _record in seen.table.unfinished("")]
        assert set(order) == sids
        for place, sid in enumerate(order):
            assert [later for later, _ in seen.table.unfinished(sid)] == order[place + 1 :]


def test_server_is_asked_for_what_is_not_in_the_cache_in_few_parts(zodb_store):
    for number in range(100):
        add(zodb_store, f"{number:02x}")
    with view(zodb_store) as seen:
        asked = []
        seen.table.connection.cacheMinimize()
        seen.table.connection.prefetch = lambda objects: asked.append(len(objects))
        for _ in range(2):
            assert len([r.sid for _, r in seen.table.all_unfinished()]) == 100
        del seen.table.connection.prefetch
    assert sum(asked) == 100 + 256
    assert len(asked) <= 2 * 256 / 16


def test_look_at_many_records_keeps_no_more_in_memory_than_the_cache_may_hold(zodb_store):
    zodb_store.db.setCacheSize(10)
    for number in range(200):
        add(zodb_store, f"{number:02x}")
    with view(zodb_store) as seen:
        connection = seen.table.connection
        most = max(connection._cache.cache_non_ghost_count for _ in seen.table.all_unfinished())
        # Those of 16 trees at once, and the trees.
        assert most < 10 + 2 * 16 + 10


def test_finished_record_leaves_the_unfinished_ones_when_it_is_archived(store):
    add(store)
    with committed(store) as seen:
        finish(seen.get())
    store.archive([SID])
    with view(store) as seen:
        assert listed(seen.table.unfinished()) == []
        assert listed(seen.table.records()) == [SID]
        assert seen.get().status == SUCCESSFUL


def test_archived_records_are_found_by_owner_and_status(store):
    ends = {"00": ("ann", SUCCESSFUL), "01": ("bob", SUCCESSFUL), "02": ("ann", DISMISSED)}
    for sid, (owner, status) in ends.items():
        add(store, sid, owner=owner)
        with committed(store) as seen:
            finish(seen.get(sid), status)
    add(store, "03", owner="ann")
    add(store, "04")
    store.archive([*ends])
    with view(store) as seen:
        assert sorted(seen.table.owned("ann", FINAL)) == ["00", "02"]
        assert list(seen.table.owned("ann", [DISMISSED])) == ["02"]
        assert list(seen.table.owned("bob", FINAL)) == ["01"]
        assert list(seen.table.owned("bob", [])) == list(seen.table.owned("eve", FINAL)) == []


def test_unfinished_unknown_and_archived_records_are_not_archived(store):
    add(store)
    add(store, OTHER)
    with committed(store) as seen:
        finish(seen.get(OTHER))
    store.archive([SID, OTHER, "00", OTHER])
    store.archive([SID, OTHER])
    with view(store) as seen:
        assert listed(seen.table.unfinished()) == [SID]
        assert listed(seen.table.records()) == [SID, OTHER]


def test_archived_record_can_be_removed(store):
    add(store)
    with committed(store) as seen:
        finish(seen.get())
    store.archive([SID])
    with committed(store) as seen:
        seen.table.remove(seen.get())
    assert status_in(store) is None


def test_listing_may_be_broken_off_while_others_write(store):
    for number in range(20):
        add(store, f"{number:02x}")
    with view(store) as seen:
        pairs = iter(seen.table.records())
        next(pairs)
        add(store, "ff")
        with committed(store) as other:
            other.table.remove(other.get("05"))
        assert len(list(pairs)) >= 18


# -- expiry --------------------------------------------------------------------------------


def test_finished_record_is_gone_when_its_time_is_over(store, clock):
    add(store)
    with committed(store) as seen:
        finish(seen.get(), keep=100)
    clock.now += 99.9
    assert status_in(store) == SUCCESSFUL
    clock.now += 0.1
    assert status_in(store) is None


def test_option_of_the_job_wins_over_the_default_time(store, clock):
    add(store, options={"result_timeout": 5})
    with committed(store) as seen:
        finish(seen.get(), keep=100)
    clock.now += 5
    assert status_in(store) is None


def test_unfinished_record_never_expires(store, clock):
    add(store)
    clock.now += 1e9
    store.expire(clock.now)
    assert status_in(store) == ACCEPTED


def test_expire_forgets_what_is_over_and_keeps_the_rest(store, clock):
    for sid, keep in (("00", 100), ("01", 100), ("02", 10_000)):
        add(store, sid)
        with committed(store) as seen:
            finish(seen.get(sid), keep=keep)
    store.archive(["00", "01", "02"])
    clock.now += 1000
    store.expire(clock.now)
    clock.now -= 1000  # so that only what is gone is gone
    assert [status_in(store, sid) for sid in ("00", "01", "02")] == [None, None, SUCCESSFUL]


def test_many_records_expire_at_once(store, clock):
    sids = [f"{number % 256:02x}{number}" for number in range(450)]
    with committed(store) as seen:
        for sid in sids:
            finish(seen.add(sid))
    store.archive(sids)
    clock.now += 1000
    store.expire(clock.now)
    clock.now -= 1000
    with view(store) as seen:
        assert listed(seen.table.records()) == []


def test_dismissed_record_is_kept_for_a_day_whatever_its_time(zodb_store, clock):
    """An attempt that was frozen all the time must still find what it conflicts with."""
    add(zodb_store)
    with committed(zodb_store) as seen:
        finish(seen.get(), DISMISSED)
    zodb_store.archive([SID])
    for age, kept in [(HAUNTED - 120, [SID]), (HAUNTED + 120, [])]:
        clock.now = NOW + age
        zodb_store.expire(clock.now)
        with view(zodb_store) as seen:
            assert seen.get() is None
            assert listed(seen.table.records()) == kept


def test_dismissed_record_is_kept_longer_than_a_day_where_its_time_is_longer(zodb_store, clock):
    add(zodb_store)
    with committed(zodb_store) as seen:
        finish(seen.get(), DISMISSED, keep=2 * HAUNTED)
    zodb_store.archive([SID])
    clock.now = NOW + HAUNTED + 120
    zodb_store.expire(clock.now)
    assert status_in(zodb_store) == DISMISSED


def test_removed_record_that_is_kept_for_a_day_is_small(zodb_store):
    add(zodb_store, arguments="large", cursor="large")
    with committed(zodb_store) as seen:
        record = seen.get()
        finish(record, FAILED)
        record.contested, record.exception = True, "large"
        seen.table.remove(record)
    with view(zodb_store) as seen:
        [(_, kept)] = seen.table.unfinished()
        assert "large" not in kept.__getstate__().values()


@pytest.mark.parametrize("status", [SUCCESSFUL, FAILED])
def test_expired_record_that_is_kept_for_a_day_is_small(zodb_store, clock, status):
    add(zodb_store, arguments="large")
    with committed(zodb_store) as seen:
        record = seen.get()
        record.result = record.exception = "large"
        record.contested = True  # as after each claim that answers another bell than the first
        finish(record, status, keep=100)
    zodb_store.archive([SID])
    for age, large in [(99, True), (220, False), (HAUNTED - 120, False)]:
        clock.now = NOW + age
        zodb_store.expire(clock.now)
        with view(zodb_store) as seen:
            assert (seen.get() is not None) == large
            [(_, kept)] = seen.table.records()
            assert ("large" in kept.__getstate__().values()) == large
            assert listed(seen.table.findings()) == []
    clock.now = NOW + HAUNTED + 120
    zodb_store.expire(clock.now)
    with view(zodb_store) as seen:
        assert listed(seen.table.records()) == [] == [*seen.table.root.expiry]


def contested(store, sid, keep):
    add(store, sid)
    with committed(store) as seen:
        record = seen.get(sid)
        record.contested, record.result = True, "large"
        finish(record, keep=keep)
    store.archive([sid])


@pytest.mark.parametrize("keep", [HAUNTED, 2 * HAUNTED])
def test_record_that_is_kept_for_a_day_and_longer_expires_once(zodb_store, clock, keep):
    contested(zodb_store, SID, keep)
    clock.now = NOW + keep + 120
    zodb_store.expire(clock.now)
    with view(zodb_store) as seen:
        assert listed(seen.table.records()) == [] == [*seen.table.root.expiry]


def test_expired_record_that_cannot_be_read_keeps_no_other_from_being_emptied(zodb_store, clock):
    for sid in ("00", "01"):
        contested(zodb_store, sid, keep=10)
    with committed(zodb_store) as seen:
        seen.table.root.finished[0]["00"] = "no record"
    clock.now = NOW + 220
    zodb_store.expire(clock.now)
    with view(zodb_store) as seen:
        assert dict(seen.table.records())["01"].empty


def test_later_job_of_an_expired_sid_is_not_emptied(zodb_store, clock):
    add(zodb_store)
    with committed(zodb_store) as seen:
        record = seen.get()
        record.contested, record.result = True, "large"
        finish(record, keep=10)
    zodb_store.archive([SID])
    clock.now += 220
    add(zodb_store, arguments="large")
    zodb_store.expire(clock.now)
    with view(zodb_store) as seen:
        assert seen.get().arguments == "large"


def test_expired_sid_can_be_used_again(store, clock):
    add(store)
    with committed(store) as seen:
        finish(seen.get(), keep=10)
    clock.now += 10
    add(store, owner="second")
    store.expire(clock.now)
    with view(store) as seen:
        assert seen.get().owner == "second"


def test_expiry_of_a_removed_job_does_not_hit_a_later_one_of_its_sid(store, clock):
    """A request that is repeated after a lost reply makes the same sids again."""
    add(store)
    with committed(store) as seen:
        finish(seen.get(), keep=10)
    store.archive([SID])
    with committed(store) as seen:
        seen.table.remove(seen.get())
    add(store, owner="second")
    clock.now += 1000
    store.expire(clock.now)
    assert status_in(store) == ACCEPTED


# -- keys ----------------------------------------------------------------------------------


def add_keyed(store, sid=SID, key="k"):
    with committed(store) as seen:
        seen.table.take_key(key, sid)
        seen.add(sid, options={"key": key})


def test_key_that_nobody_took_is_none(store):
    with view(store) as seen:
        assert seen.table.keyed("k") is None


@pytest.mark.parametrize("key", ["k", "", "ä\n\x00", "k" * 10_000])
def test_taken_key_names_its_job(store, key):
    add_keyed(store, key=key)
    with view(store) as seen:
        assert seen.table.keyed(key) == SID
        assert seen.table.keyed(key + "2") is None


def test_two_that_take_one_key_conflict(store):
    with view(store) as one, view(store) as two:
        for seen, sid in ((one, SID), (two, OTHER)):
            assert seen.table.keyed("k") is None
            seen.table.take_key("k", sid)
            seen.add(sid, options={"key": "k"})
        one.commit()
        with pytest.raises(TransientError):
            two.commit()
    assert (status_in(store), status_in(store, OTHER)) == (ACCEPTED, None)


def test_who_takes_a_key_that_a_rival_took_since_it_was_looked_at_conflicts(store):
    with view(store) as seen:
        assert seen.table.keyed("k") is None
        add_keyed(store, OTHER)
        seen.table.take_key("k", SID)
        seen.add(options={"key": "k"})
        with pytest.raises(TransientError):
            seen.commit()
    assert (status_in(store), status_in(store, OTHER)) == (None, ACCEPTED)


def test_key_is_reserved_between_vote_and_finish(ram_store, monkeypatch):
    monkeypatch.setattr("pyramid_async.ram.VOTE_TIMEOUT", 0.01)
    with view(ram_store) as slow, view(ram_store) as quick:
        for seen, sid in ((slow, SID), (quick, OTHER)):
            seen.table.take_key("k", sid)
            seen.add(sid, options={"key": "k"})

        def commit_meanwhile():
            with pytest.raises(ConflictError, match="key 'k' was taken"):
                quick.commit()

        slow.tm.get().join(Resource("tpc_vote", commit_meanwhile))
        slow.commit()
    assert (status_in(ram_store), status_in(ram_store, OTHER)) == (ACCEPTED, None)


def test_key_whose_job_ends_while_another_takes_it_makes_no_conflict_in_ram(ram_store):
    add_keyed(ram_store, OTHER)
    with committed(ram_store) as seen:
        assert seen.table.keyed("k") == OTHER
        with committed(ram_store) as other:
            finish(other.get(OTHER))
        seen.table.take_key("k", SID)
        seen.add(options={"key": "k"})
    with view(ram_store) as seen:
        assert seen.table.keyed("k") == SID


def test_who_finds_a_key_in_ram_finds_its_job(ram_store):
    """Else he takes the job for one that ended, and the key for another one; he takes no lock."""

    class Keys(dict):
        def __setitem__(self, key, sid):
            found.append(sid in ram_store.states)
            super().__setitem__(key, sid)

    found, ram_store.keys = [], Keys()
    with committed(ram_store) as seen:
        seen.add("00")
        seen.table.take_key("k", "00")
    assert (found, dict(ram_store.keys)) == ([True], {"k": "00"})


def test_key_is_not_taken_after_abort_or_rollback(store):
    with committed(store) as seen:
        savepoint = seen.tm.savepoint()
        seen.table.take_key("k", SID)
        seen.add(options={"key": "k"})
        savepoint.rollback()
        assert store.table(seen.tm).keyed("k") is None
    with view(store) as seen:
        seen.table.take_key("k", SID)
        seen.add(options={"key": "k"})
        seen.tm.abort()
    with view(store) as seen:
        assert seen.table.keyed("k") is None


def test_key_taken_after_a_savepoint_is_free_after_its_rollback(store):
    with committed(store) as seen:
        seen.add(OTHER)
        savepoint = seen.tm.savepoint()
        seen.table.take_key("k", SID)
        seen.add(options={"key": "k"})
        savepoint.rollback()
        assert seen.table.keyed("k") is None


def test_key_of_a_job_that_its_own_transaction_removes_is_free(store):
    with committed(store) as seen:
        seen.table.take_key("k", SID)
        seen.table.remove(seen.add(options={"key": "k"}))
    assert not getattr(store, "keys", None)
    add_keyed(store, OTHER)
    with view(store) as seen:
        assert seen.table.keyed("k") == OTHER


def test_key_of_a_job_that_ends_in_its_own_transaction_is_free(ram_store):
    with committed(ram_store) as seen:
        record = seen.add(options={"key": "k"})
        seen.table.take_key("k", SID)
        finish(record, DISMISSED)
    assert ram_store.keys == {}


def test_key_of_a_finished_job_can_be_taken_by_another(store):
    add_keyed(store)
    with committed(store) as seen:
        finish(seen.get())
    add_keyed(store, OTHER)
    store.archive([SID])
    with view(store) as seen:
        assert seen.table.keyed("k") == OTHER


def test_no_key_outlives_its_job(store):
    """Keys may be of any number: those of finished jobs must not stay for ever."""
    add_keyed(store, "00", "finished")
    add_keyed(store, "01", "removed")
    add_keyed(store, "02", "removed when finished")
    with committed(store) as seen:
        finish(seen.get("00"))
        finish(seen.get("02"))
        seen.table.remove(seen.get("01"))
    with committed(store) as seen:
        seen.table.remove(seen.get("02"))
    store.archive(["00", "01", "02"])
    with view(store) as seen:
        keys = ("finished", "removed", "removed when finished")
        assert [seen.table.keyed(key) for key in keys] == [None, None, None]


# -- the bound of the RAM store ------------------------------------------------------------


@pytest.fixture
def full(clock):
    """A RAM store with room for two jobs, both taken."""
    store = RamStore(max_pending=2, clock=clock)
    add(store, "00")
    add(store, "01")
    return store


def has_room(store):
    with view(store) as seen:
        try:
            seen.add()
        except SchedulerFull:
            return False
    return True


def test_full_store_refuses_before_anything_is_promised(full):
    with view(full) as seen:
        with pytest.raises(SchedulerFull, match=r"2 jobs.*async\.max_pending"):
            seen.add()
        assert seen.get() is None
        seen.commit()
    assert status_in(full) is None


def test_room_comes_back_when_a_job_ends(full):
    assert not has_room(full)
    with committed(full) as seen:
        finish(seen.get("00"))
    assert has_room(full)


def test_room_comes_back_when_a_job_is_removed(full):
    with committed(full) as seen:
        seen.table.remove(seen.get("00"))
    assert has_room(full)


def promised(store):
    return len(store.promised)


def test_nothing_is_promised_to_a_transaction_that_has_failed(ram_store):
    with view(ram_store) as seen:
        seen.tm.get().join(Resource("tpc_vote", refuse))
        with pytest.raises(RuntimeError, match="the vote failed"):
            seen.commit()
        with pytest.raises(TransactionFailedError):
            seen.add()
    assert promised(ram_store) == 0


class Raced(Connections):
    """Another thread forgets the database right after each look at it."""

    @property
    def db(self):
        return vars(self).pop("known", None)

    @db.setter
    def db(self, db):
        vars(self)["known"] = db


@pytest.mark.parametrize("closed", [True, False])
def test_database_that_another_thread_forgets_at_the_same_time_is_no_error(closed):
    db = ZODB.DB(MappingStorage())
    connections, tm = Raced(db), transaction.TransactionManager()
    if closed:
        db.close()
        connections.forget_closed()
        assert connections.open(tm) is None
    else:
        assert connections.open(tm).db() is db
        db.close()


@pytest.mark.parametrize("step", ["promise", "vote"])
def test_step_after_which_a_signal_comes_leaves_nothing_reserved(ram_store, monkeypatch, step):
    take = getattr(ram_store, step)

    def interrupted(*args):
        take(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ram_store, step, interrupted)
    with view(ram_store) as seen, pytest.raises(KeyboardInterrupt):
        seen.add()
        seen.commit()
    assert (promised(ram_store), ram_store.voted) == (0, set())


def test_child_that_ends_its_parents_transaction_gains_no_room(ram_store):
    with view(ram_store) as seen:
        seen.add()
        ram_store.renew()
        seen.tm.abort()
    assert promised(ram_store) == 0


def test_promises_count_until_their_transaction_ends(clock):
    store = RamStore(max_pending=2, clock=clock)
    with view(store) as one:
        one.add("00")
        one.add("01")
        assert not has_room(store)
        one.tm.abort()
        assert has_room(store)


def test_child_has_the_room_that_was_promised_in_its_parent(clock):
    """The parent's transactions end in the parent alone."""
    store = RamStore(max_pending=2, clock=clock)
    with view(store) as one:
        one.add("00")
        one.add("01")
        store.renew()  # as in a child, once it is forked
        assert has_room(store)


def test_promise_ends_with_the_rollback_of_its_savepoint(clock):
    store = RamStore(max_pending=2, clock=clock)
    with view(store) as one:
        before = one.tm.savepoint()
        one.add("00")
        between = one.tm.savepoint()
        one.add("01")
        assert not has_room(store)
        between.rollback()
        assert (promised(store), has_room(store)) == (1, True)
        before.rollback()
        assert promised(store) == 0


def test_rollback_of_a_change_gives_no_room_back(full):
    with view(full) as one:
        one.get("00").move(RUNNING, NOW)
        savepoint = one.tm.savepoint()
        finish(one.get("01"))
        savepoint.rollback()
        assert (promised(full), has_room(full)) == (0, False)


def test_transaction_that_nobody_ends_gives_its_room_back_with_its_manager(clock):
    """As that of a thread which ended before it."""
    store = RamStore(max_pending=1, clock=clock)
    abandoned = View(store)
    abandoned.add("00")
    assert not has_room(store)
    del abandoned
    gc.collect()
    assert has_room(store)


def finished_in(store, sid, keep):
    add(store, sid)
    with committed(store) as seen:
        finish(seen.get(sid), keep=keep)


def test_finished_jobs_give_way_to_more_of_them_those_that_ended_first(clock):
    store = RamStore(max_pending=2, clock=clock)
    for sid, keep in [("00", 100), ("01", 200), ("02", 50)]:
        finished_in(store, sid, keep)
    assert set(store.states) == {"01", "02"} == set(store.finished)


@pytest.mark.parametrize(("keep", "step"), [(50, 0), (100, -3600)])
def test_job_that_ends_never_gives_way_itself(clock, keep, step):
    """Neither with a short time of its own, nor after the clock was set back."""
    store = RamStore(max_pending=2, clock=clock)
    finished_in(store, "00", 100)
    finished_in(store, "01", 100)
    add(store, "02")
    with committed(store) as seen:
        record = seen.get("02")
        record.move(RUNNING, NOW + step)
        record.finish(SUCCESSFUL, NOW + step, keep)
    clock.now += step
    assert status_in(store, "02") == SUCCESSFUL


def test_what_is_known_of_finished_jobs_ends_with_them(clock):
    store = RamStore(max_pending=2, clock=clock)
    finished_in(store, "00", 100)
    finished_in(store, "01", 100)
    with committed(store) as seen:
        seen.table.remove(seen.get("00"))
    assert set(store.finished) == {"01"}
    clock.now += 101
    add(store, "01")
    assert not store.finished
    finished_in(store, "02", 1)
    store.expire(clock.now + 2)
    assert not store.finished


def test_removed_jobs_take_the_place_of_no_finished_one(clock):
    store = RamStore(max_pending=2, clock=clock)
    finished_in(store, "00", 100)
    for number in range(1, 100):
        sid = f"{number:02x}"
        finished_in(store, sid, 200)
        with committed(store) as seen:
            seen.table.remove(seen.get(sid))
    assert set(store.states) == {"00"}
    assert len(store.expiry) <= 5
    clock.now += 101
    store.expire(clock.now)
    assert not store.states


def test_job_with_the_sid_of_a_removed_one_expires_in_its_own_time(clock):
    store = RamStore(clock=clock)
    finished_in(store, "00", 100)
    with committed(store) as seen:
        seen.table.remove(seen.get("00"))
    finished_in(store, "00", 200)
    clock.now += 150
    store.expire(clock.now)
    assert status_in(store, "00") == "successful"


@pytest.mark.parametrize("end", ["abort", "commit", "failed commit", "rollback", "conflict"])
def test_no_end_of_a_transaction_leaks_room(clock, end):
    store = RamStore(max_pending=3, clock=clock)
    for number in count():
        if number == 5:
            break
        sid = f"{number:02x}"
        with view(store) as seen:
            savepoint = seen.tm.savepoint()
            seen.add(sid)
            if end == "rollback":
                savepoint.rollback()
            if end == "failed commit":
                seen.tm.get().join(Resource("tpc_vote", refuse))
            if end == "conflict":
                add(store, sid)
            if end != "abort":
                with suppress(RuntimeError, ConflictError):
                    seen.commit()
        with committed(store) as seen:
            if seen.get(sid):
                finish(seen.get(sid))
    assert (len(store.pending), promised(store), store.voted) == (0, 0, set())


def test_transaction_that_only_read_goes_without_the_garbage_collector(clock, uncollected):
    store = RamStore(clock=clock)
    add(store)
    with view(store) as seen:
        record = seen.get()
        assert seen.get() is record
        gone = weakref.ref(seen.table)
    del seen, record
    assert gone() is None


# -- payloads ------------------------------------------------------------------------------


VALUES = [
    None,
    False,
    0,
    "",
    b"\x00" * 100_000,
    "\ud800",
    10**4000,
    [1, (2, {3: {4}}), frozenset({5})],
    OrderedDict(b=1, a=2),
    Pair(1, [2]),
    float("inf"),
    ValueError("x", 2),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_value_comes_back_as_it_was(store, value):
    with committed(store) as seen:
        seen.add().result = store.pack(value, seen.table)
    with view(store) as seen:
        back = store.unpack(seen.get().result, seen.table)
        assert type(back) is type(value)
        assert repr(back) == repr(value)


@pytest.fixture
def home(database):
    """The oid of an object in the database."""
    with database.transaction() as connection:
        connection.root()["home"] = Thing("home")
    with database.transaction() as connection:
        return connection.root()["home"]._p_oid


def test_ram_store_learns_its_database_from_a_context(ram_store, database, home):
    with database.transaction() as connection:
        context = PersistentContext(connection.root()["home"])
    with view(ram_store) as seen:
        assert seen.table.connection is None
        ram_store.pack([context], seen.table)
        assert seen.table.connection.db() is database


DEPTHS = {
    "itself": (lambda obj: obj, lambda value: value),
    "list": (lambda obj: [1, obj], lambda value: value[1]),
    "named tuple": (lambda obj: Pair(obj, 1), lambda value: value.first),
    "dict": (lambda obj: {"a": {"b": obj}}, lambda value: value["a"]["b"]),
    "key": (lambda obj: {(1, obj): 1}, lambda value: next(iter(value))[1]),
    "set": (lambda obj: {obj}, lambda value: value.pop()),
    "deep": (lambda obj: [({"x": [(obj,)]},)], lambda value: value[0][0]["x"][0][0]),
    "twice": (lambda obj: [obj, obj], lambda value: value[0] if value[0] is value[1] else None),
}


@contextmanager
def connected(store, database):
    """A table on a connection of the application's, and that connection; committed."""
    tm = transaction.TransactionManager(explicit=True)
    with tm:
        connection = database.open(tm)
        yield store.table(tm, lambda: connection), connection
    connection.close()


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1], lambda value: value.append(2)),
        ({"a": 1}, lambda value: value.clear()),
        ({1}, lambda value: value.add(2)),
        (({"a": [1]},), lambda value: value[0]["a"].append(2)),
        ([[{1}]], lambda value: value[0][0].add(2)),
    ],
)
def test_stored_value_is_nobodys_to_change(store, value, change):
    """Neither whoever gave it nor an attempt that failed nor a reader that aborted."""
    given, expected = deepcopy(value), deepcopy(value)
    with view(store) as seen:
        payload = store.pack(given, seen.table)
        change(given)
        read = store.unpack(payload, seen.table)
        assert read == expected
        change(read)
        assert store.unpack(payload, seen.table) == expected


@pytest.mark.parametrize("depth", DEPTHS)
def test_persistent_object_is_loaded_by_the_reader(store, database, home, depth):
    put, take = DEPTHS[depth]
    with connected(store, database) as (table, connection):
        record = JobRecord(SID, NOW, store.reference(int))
        record.arguments = store.pack(put(connection.root()["home"]), table)
        table.add(record)
    with connected(store, database) as (table, connection):
        back = take(store.unpack(table.get(SID).arguments, table))
        assert back._p_jar is connection
        assert (back._p_oid, back.name) == (home, "home")


def test_new_persistent_object_is_stored_with_the_record(store, database):
    with connected(store, database) as (table, connection):
        record = JobRecord(SID, NOW, store.reference(int))
        record.arguments = store.pack([Thing("new")], table)
        table.add(record)
    with connected(store, database) as (table, connection):
        [back] = store.unpack(table.get(SID).arguments, table)
        assert (back._p_jar, back.name) == (connection, "new")


def test_pack_of_the_database_keeps_what_only_a_record_refers_to(zodb_store, database):
    with connected(zodb_store, database) as (table, _connection):
        record = JobRecord(SID, NOW, "builtins:int")
        record.arguments = zodb_store.pack(Thing("new"), table)
        table.add(record)
    database.pack()
    with connected(zodb_store, database) as (table, _connection):
        assert zodb_store.unpack(table.get(SID).arguments, table).name == "new"


def test_large_value_is_an_object_of_its_own(zodb_store):
    with committed(zodb_store) as seen:
        seen.add().result = zodb_store.pack("x" * INLINE_PAYLOAD, seen.table)
    with view(zodb_store) as seen:
        record = seen.get()
        data, _serial = zodb_store.db.storage.load(record._p_oid)
        assert len(data) < 2000
        assert zodb_store.unpack(record.result, seen.table) == "x" * INLINE_PAYLOAD


UNPICKLABLE = [
    lambda: None,
    threading.Lock(),
    (n for n in ()),
    [{"deep": [print, threading.Lock()]}],
]


@pytest.mark.parametrize("value", UNPICKLABLE, ids=range(4))
def test_what_cannot_be_pickled_is_refused_before_it_can_break_a_commit(zodb_store, value):
    with view(zodb_store) as seen:
        with pytest.raises(NotSchedulable):
            zodb_store.pack(value, seen.table)
        seen.add()
        seen.commit()


class TwoArguments(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_what_can_be_pickled_and_not_loaded_is_refused_too(zodb_store):
    with view(zodb_store) as seen, pytest.raises(NotSchedulable, match="TwoArguments"):
        zodb_store.pack(TwoArguments(1, 2), seen.table)


# -- the table of states -------------------------------------------------------------------


def test_every_transition_is_allowed_or_refused_as_the_table_says():
    for status in STATUSES:
        for wanted in STATUSES:
            record = JobRecord(SID, NOW, int)
            record.status = status
            if wanted in TRANSITIONS[status]:
                record.move(wanted, NOW + 1)
                assert (record.status, record.updated, record.revision) == (wanted, NOW + 1, 2)
            else:
                with pytest.raises(InvalidTransition, match=f"is {status} and cannot .* {wanted}"):
                    record.move(wanted, NOW + 1)
                assert (record.status, record.updated, record.revision) == (status, NOW, 1)


def test_final_states_are_final():
    assert [status for status in STATUSES if not TRANSITIONS[status]] == [
        SUCCESSFUL,
        FAILED,
        DISMISSED,
    ]


def test_finished_record_keeps_nothing_of_its_arguments():
    record = JobRecord(SID, NOW, int, arguments=b"arguments", holder="p")
    finish(record, keep=10)
    assert (record.arguments, record.holder, record.expires) == (None, None, NOW + 10)


def test_small_job_is_a_small_record(zodb_store):
    """Bytes per job are what the size of a database grows by."""
    add(zodb_store)
    with view(zodb_store) as seen:
        data, _serial = zodb_store.db.storage.load(seen.get()._p_oid)
    assert len(data) < 350


# -- the place of the records --------------------------------------------------------------


def test_installing_twice_keeps_the_records(zodb_store, clock):
    add(zodb_store)
    zodb_store.install()
    other = ZodbStore(zodb_store.db, clock=clock)
    other.install()
    assert status_in(other) == ACCEPTED


def test_installing_twice_writes_once(zodb_store):
    last = zodb_store.db.lastTransaction()
    zodb_store.install()
    assert zodb_store.db.lastTransaction() == last


def test_installing_leaves_no_connection_open(database):
    ZodbStore(database).install()
    assert {info["opened"] for info in database.connectionDebugInfo()} == {None}


def test_records_of_a_newer_format_are_left_alone(zodb_store, database):
    """The application went back to an older version of this library."""
    with database.transaction() as connection:
        connection.root()["pyramid_async"].format = FORMAT + 1
    with pytest.raises(NewerFormat, match=f"in format {FORMAT + 1}, .* knows {FORMAT}:"):
        zodb_store.install()
    tm = transaction.TransactionManager()
    with pytest.raises(NewerFormat):
        zodb_store.table(tm)
    tm.abort()
    zodb_store.release(tm)


def test_processes_may_install_at_the_same_time(database, monkeypatch):
    monkeypatch.setattr("pyramid_async.transactional.sleep", lambda seconds: None)
    start = threading.Barrier(4)
    failed = []

    def install():
        start.wait(20)
        try:
            ZodbStore(database).install()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert failed == []


def test_database_that_misses_the_place_says_what_to_do(database):
    store = ZodbStore(database)
    tm = transaction.TransactionManager()
    try:
        with pytest.raises(AsyncError, match="make_wsgi_app"):
            store.table(tm)
    finally:
        tm.abort()
        store.release(tm)


def test_tree_of_a_key_is_the_same_in_every_process():
    """``hash`` of a text is not, and two processes would run two jobs of one key."""
    root = JobRoot()
    trees = [[*map(id, root.keys)].index(id(root.key_tree(key))) for key in ("nightly", "é")]
    assert trees == [90, 62]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"user": "ann"}, ", written by '' of user 'ann'"),
        ({"extension": {"pyramid_async": "a" * 32}}, f", written by job '{'a' * 32}'"),
        ({}, " 0x00"),
    ],
)
def test_a_rival_without_a_description_is_told_by_what_it_has(file_db, facts, told):
    managers = [transaction.TransactionManager() for _ in range(2)]
    for tm in managers:
        file_db.open(tm).root()["written"] = id(tm)
    for name, value in facts.items():
        setattr(managers[0].get(), name, value)
    managers[0].commit()
    with pytest.raises(ConflictError) as caught:
        managers[1].commit()
    managers[1].abort()
    assert explain(caught.value, file_db).endswith(told)
