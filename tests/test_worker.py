"""Run one job: attempts, conflicts, failures, claims; against both stores, without Pyramid."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import functools
import gc
import logging
import threading
import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
import transaction
import ZODB
from bare import CALLS, ROOT, Clock, LosesReply, Process, note, process, together
from persistent import Persistent
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from webapp import GATES, Barrier, SqlSession, refused_once
from ZODB.blob import Blob
from ZODB.DemoStorage import DemoStorage
from ZODB.POSException import ConflictError

import pyramid_async.tries
import pyramid_async.worker
from pyramid_async import (
    FileResult,
    JobDismissed,
    JobFailed,
    JobStopped,
    JobTimeout,
    OperationFailed,
    current_job,
)
from pyramid_async.failures import TEXT_LIMIT, TRACEBACK_LIMIT, members
from pyramid_async.interfaces import JobTaken, NotSchedulable
from pyramid_async.jobs import ACCEPTED, RUNNING, UNHELD, Live
from pyramid_async.signs import Sign
from pyramid_async.tries import Surroundings, Try
from pyramid_async.worker import LEFT_PAUSE, LONGEST_DELAY, LONGEST_PAUSE
from pyramid_async.zodb import ZodbStore

OWN = {}  # key of a test -> the process whose scheduler its jobs use


@pytest.fixture
def key(key):
    yield key
    OWN.pop(key, None)


@pytest.fixture
def unlogged(caplog):
    """What ends a job is not told to pytest, which would describe it, and keep its frames."""
    caplog.set_level(logging.CRITICAL, "pyramid_async")


# -- what jobs do --------------------------------------------------------------------------


def give(value):
    return value


def mark(root, key):
    root["marked"] = key
    CALLS[key].append(current_job().attempt)
    return key


def mark_and_raise(root, key, error):
    mark(root, key)
    raise error()


def mark_and_return(root, key, make):
    mark(root, key)
    return make()


def count(root, key):
    CALLS[key].append(current_job().attempt)
    root["n"] = root.get("n", 0) + 1
    return root["n"]


def note_deadline_and_conflict(key):
    note(key, current_job().deadline)
    if len(CALLS[key]) == 1:
        raise ConflictError


def count_and_lose_the_reply(root, key, error):
    transaction.get().join(LosesReply(error()))
    return count(root, key)


def count_behind_gate(root, key, name):
    count(root, key)
    GATES[name].pass_through()


def count_and_commit_behind_gate(root, key, name, phase, sort_key):
    count(root, key)
    transaction.get().join(Barrier(name, phase, sort_key))


def dismiss_oneself(root, key, ended, how="cancel"):
    """Have effects and dismiss the own job, in a transaction of one's own perhaps."""
    if ended is not None:
        getattr(transaction, ended)()
    mark(root, key)
    getattr(OWN[key].scheduler, how)(current_job().sid)


def fail_with_item(root, key):
    mark(root, key)
    raise ValueError("bad", Item(root))


def fail_with_unpicklable(root, key):
    mark(root, key)
    raise ValueError("bad", Unpicklable())


def fail_without_arguments(root, key):
    mark(root, key)
    raise ArgumentsThatAreNone


def fail_with_a_long_text(root, key):
    mark(root, key)
    raise ValueError("x" * 1_000_000)


def fail_with_a_local(key, how):
    """Raise what holds an exception whose frame has a local."""
    try:
        hold_and_fail(key)
    except ZeroDivisionError as error:
        raise how(error)  # noqa: B904 - the context is meant


def hold_and_fail(key):
    local = ArgumentsThatAreNone()
    CALLS[key].append(weakref.ref(local))
    raise ZeroDivisionError


def meet_a_deadlock(key, times, in_commit=False):
    CALLS[key].append(current_job().attempt)
    met = len(CALLS[key]) <= times
    transaction.get().join(SqlManager("tpc_vote" if met and in_commit else None, Deadlock))
    if met and not in_commit:
        raise Deadlock("could not serialize access")


def write_sql(root, key, checkpoint):
    """Write to the ZODB and to SQL; note whether the ZODB is locked when SQL is sent."""
    lock = root._p_jar.db().storage._commit_lock
    root[key] = True
    transaction.get().join(SqlSession(lambda: CALLS[key].append(lock.locked())))
    if checkpoint:
        current_job().checkpoint(1)


def meet_conflicts_and_then_a_storage_error(key, times, errors):
    CALLS[key].append(current_job().attempt)
    if len(CALLS[key]) <= times:
        raise ConflictError("injected")
    if len(CALLS[key]) <= times + errors:
        transaction.get().join(SqlManager("tpc_vote"))


def fail_after_a_checkpoint(name):
    current_job().checkpoint(1)
    GATES[name].pass_through()
    raise ValueError("too late")


def show_progress():
    current_job().progress(1, 2)


def check_behind_gate(key, name):
    GATES[name].pass_through()
    current_job().check()


def take_back_a_checkpoint(root, key):
    """Try to keep a cursor that cannot be stored, and go on without it."""
    savepoint, cursor = transaction.savepoint(), []
    cursor.append(cursor)  # which RAM does not keep
    try:
        current_job().checkpoint(cursor)
    except NotSchedulable:
        savepoint.rollback()
    return count(root, key)


def take_back_a_dismissal(root, key):
    savepoint = transaction.savepoint()
    OWN[key].scheduler.cancel(current_job().sid)
    savepoint.rollback()
    return count(root, key)


def conflict(key, times):
    """Raise as many conflicts, then return the number of calls."""
    CALLS[key].append(current_job().attempt)
    if len(CALLS[key]) <= times:
        raise ConflictError("injected")
    return len(CALLS[key])


def stop_once(key):
    CALLS[key].append(current_job().attempt)
    if len(CALLS[key]) == 1:
        raise JobStopped("the process stops")


def stop_half_way():
    current_job().progress(1, 2)
    raise JobStopped("the process stops")


def progress_of_attempts(key, *percents):
    percent = percents[current_job().attempt - 1]
    CALLS[key].append(percent)
    current_job().progress(percent, 100)
    raise KeyError


def progress(name, steps):
    for step in range(steps):
        current_job().progress(step, steps, f"step {step}")
    GATES[name].pass_through()


class Item(Persistent):
    """A new object that refers to its container, as those of traversal do."""

    def __init__(self, parent):
        self.__parent__ = parent


class Unpicklable(Persistent):
    def __init__(self):
        self.held = (n for n in range(3))


class ArgumentsThatAreNone(Exception):
    args = None


class SqlManager(Barrier):
    """A data manager of another database; *fails* names its method that does."""

    def __init__(self, fails=None, error=OSError):
        super().__init__(None, None, "~sql")
        self.fails, self.error = fails, error

    def should_retry(self, error):
        return isinstance(error, Deadlock)

    def abort(self, txn):
        self.fail("abort")

    def tpc_vote(self, txn):
        self.fail("tpc_vote")

    def fail(self, name):
        if name == self.fails:
            raise self.error("the server says so")


class Deadlock(Exception):
    pass


class TwoRequired(Exception):
    """Can be pickled and not be loaded again."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Textless(Exception):
    def __str__(self):
        raise ZeroDivisionError


class HoldsLock(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class Unloadable:
    def __reduce__(self):
        return explode, ()


def explode():
    raise RuntimeError("cannot be loaded")


def two_required():
    return TwoRequired("one", "two")


def lambda_result():
    return [1, {"a": lambda: None}]


def generator_result():
    return (n for n in range(3))


def lazy():
    yield "the body of a generator"


async def lazy_and_asynchronous():
    yield "the body of another"


def decorated(f):
    @functools.wraps(f)
    def call(*args):
        return f(*args)

    return call


@decorated
def lazy_and_decorated():
    yield "the body of a third"


def run_to_its_end(f):
    @functools.wraps(f)
    def call(*args):
        return list(f(*args))

    return call


@run_to_its_end
def not_lazy():
    yield "the body of a fourth"


def fail_for_the_user():
    raise OperationFailed("This file is damaged.")


def file_of(content):
    return FileResult(content)


def blob_of(root, content):
    root["blob"] = blob = Blob()
    with blob.open("w") as file:
        file.write(content)
    return FileResult(blob, "text/plain")


def sell_out(root):
    root["lamp"] = PersistentMapping(title="The lamp")
    raise SoldOut(root)


class SoldOut(OperationFailed):
    """Reads an object when it is asked for its text."""

    def __str__(self):
        return f"{self.args[0]['lamp']['title']} is sold out."


# -- conflicts -----------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    """Bounds of the random pauses; the pauses themselves are over at once."""
    bounds = []

    def uniform(low, high):
        bounds.append((low, high))
        return high

    slept = []
    fake = SimpleNamespace(now=0.0, took=0.0, bounds=bounds, slept=slept)

    def monotonic():
        fake.now += fake.took / 2  # asked before and after an attempt
        return fake.now

    clock = SimpleNamespace(monotonic=monotonic, sleep=slept.append)
    monkeypatch.setattr(pyramid_async.worker, "random", SimpleNamespace(uniform=uniform))
    for module in (pyramid_async.tries, pyramid_async.worker):
        monkeypatch.setattr(module, "time", clock)
    return fake


def test_job_that_meets_conflicts_is_tried_again_until_it_succeeds(one, key, pauses):
    sid = one.run(conflict, key, 9)
    assert one.result(sid) == (10, None)
    assert len(pauses.slept) == 9


def test_conflicts_are_no_attempts(one, key, pauses):
    sid = one.run(conflict, key, 3)
    assert CALLS[key] == [1, 1, 1, 1]
    assert one.status(sid).attempts == 1


def test_time_that_a_job_has_does_not_begin_anew_after_a_conflict(one, key):
    one.run(note_deadline_and_conflict, key, timeout=600)
    first, second = CALLS[key]
    assert first == second


def test_job_fails_when_conflicts_go_on(one, key, pauses):
    one.worker.conflict_attempts = 4
    sid = one.run(conflict, key, 100)
    assert (one.status(sid).status, len(CALLS[key])) == ("failed", 4)
    assert isinstance(one.result(sid)[1], ConflictError)


def test_job_with_one_attempt_fails_at_its_first_conflict(one, key, pauses):
    one.worker.conflict_attempts = 1
    one.run(conflict, key, 100)
    assert (len(CALLS[key]), pauses.slept) == (1, [])


def test_pauses_are_random_from_nothing_to_a_bound_that_doubles(one, key, pauses):
    one.run(conflict, key, 5)
    assert pauses.bounds == [(0, bound) for bound in (0.02, 0.04, 0.08, 0.16, 0.32)]
    assert pauses.slept == [high for _, high in pauses.bounds]


def test_pauses_grow_with_the_duration_of_the_attempt_up_to_a_limit(one, key, pauses):
    pauses.took = 2.0
    one.run(conflict, key, 4)
    elapsed = [high for _, high in pauses.bounds]
    assert elapsed == [2.0, 4.0, LONGEST_PAUSE, LONGEST_PAUSE]


def test_pause_is_bounded_however_many_conflicts_there_were(pauses):
    conflicts = pyramid_async.worker.Conflicts(10_000)
    conflicts.tried = 5_000
    assert conflicts.pause(0, 1.0, ConflictError()) == LONGEST_PAUSE


def drain(items, key):
    """Use up the argument, and conflict the first time."""
    found = [items["all"].pop() for _ in range(len(items["all"]))]
    CALLS[key].append(found)
    if len(CALLS[key]) == 1:
        raise ConflictError("injected")
    return found


def test_next_attempt_gets_the_arguments_as_they_were_scheduled(one, key, pauses):
    sid = one.run(drain, {"all": [1, 2, 3]}, key)
    assert CALLS[key] == [[3, 2, 1], [3, 2, 1]]
    assert one.result(sid) == ([3, 2, 1], None)


# -- one commit ----------------------------------------------------------------------------


def serials(durable, sid):
    with durable.transaction() as (table, root):
        record = table.get(sid)
        record._p_activate()
        root._p_activate()
        return record._p_serial, root._p_serial


def test_effects_result_and_status_are_one_commit(durable, key):
    sid = durable.schedule(mark, ROOT, key)
    before = durable.commits()
    durable.worker.run(sid)
    assert durable.commits() == before + 1
    of_record, of_effect = serials(durable, sid)
    assert of_record == of_effect == durable.db.lastTransaction()
    assert durable.result(sid) == (key, None)


def test_undo_log_shows_one_transaction_that_bears_the_sid(file_db, key):
    with process("zodb", file_db) as one:
        sid = one.schedule(mark, ROOT, key)
        one.worker.run(sid)
        newest, before = file_db.undoLog(0, 2)
        assert newest["pyramid_async"] == sid
        assert "pyramid_async" not in before


def last_oids(db):
    *_, last = db.storage.iterator()
    return {record.oid for record in last}


def test_final_commit_writes_the_record_and_the_effects_and_nothing_else(durable, key):
    """An index or a counter there would make long jobs conflict over bookkeeping."""
    sid = durable.run(mark, ROOT, key)
    with durable.transaction() as (table, root):
        assert last_oids(durable.db) == {table.get(sid)._p_oid, root._p_oid}


def test_final_commit_of_a_claimed_job_writes_the_record_alone(durable):
    sid = durable.schedule(give, 1)
    durable.worker.run(sid, durable.die(sid))
    with durable.transaction() as (table, _):
        assert last_oids(durable.db) == {table.get(sid)._p_oid}


def test_failure_writes_the_record_alone(durable, key):
    sid = durable.run(mark_and_raise, ROOT, key, ZeroDivisionError)
    with durable.transaction() as (table, _):
        assert last_oids(durable.db) == {table.get(sid)._p_oid}


def test_jobs_that_commit_at_the_same_time_do_not_conflict(durable, key, pauses):
    """Also those of one shard; there is but one here."""
    with durable.transaction() as (table, _):
        table.root.unfinished = table.root.unfinished[:1]
        table.root.finished = table.root.finished[:1]
    sids = [durable.schedule(note, key) for _ in range(8)]
    together(*[lambda sid=sid: durable.worker.run(sid) for sid in sids])
    assert len(CALLS[key]) == 8
    assert pauses.slept == []


def test_progress_writes_nothing(durable, at):
    sid = durable.schedule(progress, at, 1000)
    before = durable.db.lastTransaction()
    with durable.standing_at(at, sid):
        assert durable.status(sid).message == "step 999"
        assert durable.db.lastTransaction() == before
    assert durable.status(sid).status == "successful"


def test_outcome_and_effects_appear_at_the_same_time(one, key, at):
    """Whoever looks while the commit waits at its vote sees neither."""
    sid = one.schedule(count_and_commit_behind_gate, ROOT, key, at, "tpc_begin", "!first")
    with one.standing_at(at, sid):
        assert one.status(sid).status == "running"
        assert one.root(lambda root: "n" in root) is False
    assert one.status(sid).status == "successful"
    assert one.root(lambda root: root["n"]) == 1


# -- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "f", [fail_with_item, fail_with_unpicklable, fail_without_arguments], ids=lambda f: f.__name__
)
def test_failure_whose_exception_cannot_be_stored_is_recorded_all_the_same(one, key, f):
    sid = one.run(f, ROOT, key)
    status = one.status(sid)
    assert (status.status, CALLS[key]) == ("failed", [1])
    assert one.root(lambda root: "marked" in root) is False
    _, error = one.result(sid)
    assert isinstance(error, JobFailed | ValueError | ArgumentsThatAreNone)


def test_exception_that_quotes_a_document_is_cut(durable, key):
    sid = durable.run(fail_with_a_long_text, ROOT, key)
    failure = durable.status(sid).failure
    assert len(failure.message) == TEXT_LIMIT
    assert TEXT_LIMIT < len(failure.traceback) <= TRACEBACK_LIMIT
    assert "in fail_with_a_long_text" in failure.traceback


def test_job_lost_by_its_worker_may_be_haunted(durable, key):
    """Its last attempt may only be frozen, so a pack must not take the record at once."""
    sid = durable.schedule(count, ROOT, key, max_attempts=1)
    durable.worker.run(sid, durable.die(sid))
    assert durable.status(sid).failure.class_name == "JobLost"
    with durable.transaction() as (table, _):
        assert table.get(sid).haunted


def test_job_that_was_freed_may_be_haunted(durable, key):
    sid = durable.schedule(count, ROOT, key)
    assert durable.worker.free(sid, durable.die(sid))
    with durable.transaction() as (table, _):
        assert table.get(sid).haunted


def test_job_that_was_rescued_may_be_haunted(durable, key):
    sid = durable.schedule(count, ROOT, key)
    durable.worker.run(sid, durable.die(sid))
    with durable.transaction() as (table, _):
        assert table.get(sid).haunted


def conflict_when_told(key):
    CALLS[key].append(current_job().attempt)
    current_job().interrupt(JobDismissed("meanwhile"))
    raise ConflictError("injected")


def test_job_that_was_told_while_it_waited_after_a_conflict_is_not_called_again(one, key):
    sid = one.run(conflict_when_told, key)
    assert (one.status(sid).status, len(CALLS[key])) == ("dismissed", 1)


def note_oneself():
    CALLS[current_job().sid].append("called")


def test_bell_of_a_job_that_was_dismissed_before_it_began_runs_nothing(one):
    one.worker.keeps = False  # as where a broker keeps the bells
    sid = one.schedule(note_oneself)
    one.cancel(sid)
    one.worker.run(sid)
    assert (one.status(sid).status, CALLS.pop(sid, [])) == ("dismissed", [])


def test_job_that_a_queue_of_this_process_takes_from_nobody_is_not_haunted(durable, key):
    sid = durable.schedule(count, ROOT, key)
    durable.record(sid, holder=None)
    durable.worker.run(sid, UNHELD)
    assert durable.status(sid).status == "successful"
    with durable.transaction() as (table, _):
        assert not table.get(sid).haunted


def test_who_waits_for_a_change_is_told_when_a_job_ends(one):
    seen = one.worker.changes.count
    one.run(give, 1)
    assert one.worker.changes.count > seen


def test_who_waits_for_a_change_is_told_when_a_job_is_dismissed_before_it_began(one):
    sid = one.schedule(give, 1)
    seen = one.worker.changes.count
    one.cancel(sid)
    assert one.worker.changes.count > seen


def test_failed_job_leaves_no_transaction_to_who_ran_it(one, key):
    one.run(mark_and_raise, ROOT, key, ZeroDivisionError)
    assert transaction.manager.manager._txn is None


@pytest.mark.parametrize("in_commit", [False, True])
def test_error_that_a_data_manager_would_retry_is_retried(one, key, in_commit):
    sid = one.run(meet_a_deadlock, key, 4, in_commit)
    assert (one.status(sid).status, len(CALLS[key])) == ("successful", 5)


def test_error_that_a_data_manager_would_retry_for_ever_fails_the_job_as_itself(db, key):
    with process("ram", db, conflict_attempts=3) as one:
        sid = one.run(meet_a_deadlock, key, 100)
        assert (one.status(sid).failure.class_name, len(CALLS[key])) == ("Deadlock", 3)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_sql_is_sent_before_the_commit_locks_the_database(one, key, checkpoint):
    """The row may be another transaction's that waits for the database."""
    one.run(write_sql, ROOT, key, checkpoint)
    assert CALLS[key][0] is False


def swallow_what_a_checkpoint_raises(root, error):
    root["n"] = 1
    transaction.get().join(refused_once(error))
    with suppress(Exception):
        current_job().checkpoint(1)


def test_checkpoint_whose_sql_is_refused_commits_nothing_although_the_job_swallows_that(one):
    sid = one.run(swallow_what_a_checkpoint_raises, ROOT, KeyError("no such row"))
    assert one.status(sid).status == "failed"
    assert one.root(lambda root: "n" in root) is False


class WithoutRequests(Surroundings):
    """Surroundings that cannot make a request, as where a root factory meets conflicts."""

    def prepare(self, record):
        raise ConflictError


def test_job_whose_request_meets_conflicts_for_ever_fails(db, key):
    with process("ram", db, surroundings=WithoutRequests, conflict_attempts=3) as one:
        sid = one.run(give, key)
        assert one.status(sid).failure.class_name == "ConflictError"


def hold_and_conflict(key, times):
    alive = [ref() is not None for ref in CALLS[key]]
    local = ArgumentsThatAreNone()
    CALLS[key].append(weakref.ref(local))
    if len(alive) < times:
        raise ConflictError
    return alive


def test_what_an_attempt_held_is_let_go_before_the_next_one(one, key, pauses, uncollected):
    assert one.result(one.run(hold_and_conflict, key, 3)) == ([False] * 3, None)


def remember_the_job(key):
    CALLS[key].append(weakref.ref(current_job()))


def test_what_a_job_held_is_let_go_at_its_end(one, key, uncollected):
    one.run(remember_the_job, key)
    assert CALLS[key][0]() is None


def hold_and_be_interrupted(key):
    local = ArgumentsThatAreNone()
    CALLS[key].append(weakref.ref(local))
    current_job().interrupt(JobTimeout("injected"))
    current_job().check()


def test_what_a_job_held_is_let_go_when_it_is_interrupted(one, key, unlogged, uncollected):
    one.run(hold_and_be_interrupted, key)
    assert CALLS[key][0]() is None


def remember_the_checkpoint(key):
    CALLS[key].append(current_job().checkpoint)


def checkpoint_in_a_new_transaction(name, key):
    GATES[name].pass_through()
    transaction.abort()
    try:
        current_job().checkpoint("late")
    except JobDismissed as error:
        CALLS[key].append(type(error))
        raise


def test_checkpoint_of_a_job_that_is_another_workers_tells_so(one, key, at):
    sid = one.schedule(checkpoint_in_a_new_transaction, at, key)
    with one.standing_at(at, sid):
        one.die(sid)
    assert CALLS[key] == [JobTaken]


def test_checkpoint_after_the_end_is_refused(one, key):
    one.run(remember_the_checkpoint, key)
    with pytest.raises(JobTaken, match="has ended"):
        CALLS[key][0]("late")


@pytest.mark.parametrize(
    ("conflicts", "errors", "status", "calls"),
    [(5, 2, "successful", 8), (9, 2, "successful", 12), (0, 3, "failed", 3), (5, 3, "failed", 8)],
)
def test_conflicts_use_up_no_attempts_of_a_bad_storage(
    one, key, conflicts, errors, status, calls, pauses
):
    sid = one.run(meet_conflicts_and_then_a_storage_error, key, conflicts, errors)
    assert (one.status(sid).status, len(CALLS[key])) == (status, calls)


def test_failed_job_leaves_no_effects(one, key):
    sid = one.run(mark_and_raise, ROOT, key, ZeroDivisionError)
    assert one.status(sid).status == "failed"
    assert one.root(lambda root: "marked" in root) is False
    assert one.told == [(sid, "failed")]


UNSTORABLE = pytest.mark.parametrize(
    "make", [lambda_result, generator_result, threading.Lock, Unloadable]
)


@UNSTORABLE
def test_result_that_cannot_be_kept_fails_its_job_and_leaves_no_effects(durable, key, make):
    sid = durable.run(mark_and_return, ROOT, key, make)
    status = durable.status(sid)
    assert (status.status, durable.root(lambda root: "marked" in root)) == ("failed", False)
    value, error = durable.result(sid)
    assert value is None
    assert isinstance(error, NotSchedulable)
    assert "cannot be stored" in str(error)
    assert CALLS[key] == [1]


def test_generator_function_that_its_decorator_runs_is_a_function_like_any_other(one):
    assert one.result(one.run(not_lazy)) == (["the body of a fourth"], None)


@pytest.mark.parametrize("kind", ["ram", "zodb"])
@pytest.mark.parametrize("f", [lazy, lazy_and_asynchronous, lazy_and_decorated])
def test_function_whose_body_does_not_run_fails_its_job(db, kind, f):
    with process(kind, db) as one:
        failure = one.status(one.run(f)).failure
        assert (failure.class_name, failure.message[:11]) == ("TypeError", "the body of")


@pytest.mark.parametrize("kind", ["ram", "zodb"])
@pytest.mark.parametrize("content", ["text", None, bytearray(b"x"), ["x"]])
def test_file_that_is_neither_bytes_nor_a_blob_fails_its_job(db, kind, content):
    with process(kind, db) as one:
        failure = one.status(one.run(file_of, content)).failure
        assert (failure.class_name, failure.message[:12]) == ("TypeError", "a FileResult")


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_blob_of_a_file_belongs_to_the_readers_connection(kind):
    db = ZODB.DB(DemoStorage())
    with process(kind, db) as one:
        sid = one.run(blob_of, ROOT, b"a,b")
        with one.transaction() as (table, root):
            result, _ = one.scheduler.using(tm=table.tm).get_result(sid)
            assert (result.content._p_jar, result.media_type) == (root._p_jar, "text/plain")
            with result.content.open() as file:
                assert file.read() == b"a,b"
    db.close()


def test_failure_that_the_user_reads_is_found_in_a_log_of_warnings(durable, caplog):
    caplog.set_level(logging.WARNING)
    failure = durable.status(durable.run(fail_for_the_user)).failure
    [record] = [r for r in caplog.records if failure.error_id in r.getMessage()]
    assert (record.levelname, record.exc_info) == ("WARNING", None)


@UNSTORABLE
def test_ram_keeps_any_result(db, key, make):
    with process("ram", db) as one:
        value, error = one.result(one.run(mark_and_return, ROOT, key, make))
        assert (type(value), error) == (type(make()), None)
        assert one.root(lambda root: root["marked"]) == key


@pytest.mark.parametrize("make", [two_required, HoldsLock])
def test_exception_that_cannot_be_kept_is_kept_by_name_and_text(durable, key, make):
    sid = durable.run(mark_and_raise, ROOT, key, make)
    with durable.transaction() as (table, _):
        table.connection.cacheMinimize()
    failure = durable.status(sid).failure
    assert (failure.class_name, failure.message) == (type(make()).__name__, str(make()))
    assert "in mark_and_raise" in failure.traceback
    value, error = durable.result(sid)
    assert value is None
    assert type(error) is JobFailed
    assert error.args == (failure.class_name, failure.message)


def raise_with_new_objects():
    outer = PersistentMapping(inner=PersistentMapping(there=lambda: None))
    raise ValueError("it carries something", outer)


def test_exception_that_the_commit_refuses_is_kept_by_name_and_text(durable):
    """What is wrong with its inner object is seen as late as that."""
    sid = durable.run(raise_with_new_objects)
    failure = durable.status(sid).failure
    assert (failure.class_name, durable.told) == ("ValueError", [(sid, "failed")])
    error = durable.result(sid)[1]
    assert (type(error), error.args) == (JobFailed, failure[:2])


def test_conflict_while_an_exception_is_stored_does_not_make_another_of_it(one, key, monkeypatch):
    pack, met = one.store.pack, []

    def meet_a_conflict_first(value, table):
        if isinstance(value, KeyError) and not met:
            met.append(value)
            raise ConflictError("injected")
        return pack(value, table)

    monkeypatch.setattr(one.store, "pack", meet_a_conflict_first)
    sid = one.run(mark_and_raise, ROOT, key, KeyError)
    assert (len(met), type(one.result(sid)[1])) == (1, KeyError)


def test_ram_keeps_any_exception(db, key):
    with process("ram", db) as one:
        _, error = one.result(one.run(mark_and_raise, ROOT, key, two_required))
        assert type(error) is TwoRequired
        assert error.__traceback__ is None


class Carrier(Exception):
    """Holds an object beside its arguments."""

    def __init__(self, thing):
        super().__init__("it carries something")
        self.thing = thing


def in_groups(thing):
    return ExceptionGroup("outer", [ExceptionGroup("inner", [KeyError(thing)])])


def raise_with_object(root, how):
    thing = root["thing"] = PersistentMapping()
    transaction.savepoint()
    del root["thing"]
    raise how(thing if how is Carrier else root)


@pytest.mark.parametrize("how", [ValueError, Carrier, in_groups])
def test_exception_brings_no_object_of_the_jobs_connection(one, how):
    """That connection is another thread's."""
    sid = one.run(raise_with_object, ROOT, how)
    failure = one.status(sid).failure
    assert failure.class_name == type(how("")).__name__
    with one.transaction() as (table, root):
        _, error = one.scheduler.using(tm=table.tm).get_result(sid)
        objects = [obj for e in members(error) for obj in (*e.args, *vars(e).values())]
        jars = {obj._p_jar for obj in objects if isinstance(obj, Persistent)}
        assert jars <= {root._p_jar, None}


@pytest.mark.parametrize("how", [ValueError, Carrier, in_groups])
def test_ram_keeps_an_exception_that_holds_an_object_by_name_and_text(db, how):
    with process("ram", db) as one:
        sid = one.run(raise_with_object, ROOT, how)
        failure, (_, error) = one.status(sid).failure, one.result(sid)
        assert (type(error), error.args) == (JobFailed, failure[:2])


def test_exception_whose_text_raises_fails_its_job(one, key):
    sid = one.run(mark_and_raise, ROOT, key, Textless)
    status = one.status(sid)
    assert (status.status, status.failure.class_name) == ("failed", "Textless")
    assert status.failure.message == "(its text raises ZeroDivisionError)"
    value, error = one.result(sid)
    assert value is None
    assert isinstance(error, Textless | JobFailed)


def odd_syntax_error():
    """Its facts are no numbers, so its traceback cannot be written."""
    return SyntaxError("x", ("f", 1, "2", "text"))


class TextExits(Exception):
    def __str__(self):
        raise SystemExit


class PickleExits(Exception):
    def __reduce__(self):
        raise SystemExit


class NotesFail(Exception):
    @property
    def __notes__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("make", [odd_syntax_error, TextExits, PickleExits, NotesFail])
def test_exception_that_cannot_be_described_fails_its_job_at_once(one, key, make):
    sid = one.run(mark_and_raise, ROOT, key, make)
    status, name = one.status(sid), type(make()).__name__
    assert (status.status, status.failure.class_name, CALLS[key]) == ("failed", name, [1])
    assert "in mark_and_raise" in status.failure.traceback
    assert one.told == [(sid, "failed")]
    assert type(one.result(sid)[1]) in (type(make()), JobFailed)


def test_text_of_an_exception_is_read_before_what_the_job_changed_is_gone(one):
    sid = one.run(sell_out, ROOT)
    failure = one.status(sid).failure
    assert failure.text == failure.message == "The lamp is sold out."
    if not one.store.durable:  # which keeps no exception that holds an object
        assert one.result(sid)[1].args == ("SoldOut", "The lamp is sold out.")


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, BaseException]
)
def test_base_exception_of_the_function_fails_its_job_and_not_the_worker(one, key, error):
    sid = one.run(mark_and_raise, ROOT, key, error)
    assert (one.status(sid).status, one.status(sid).failure.class_name) == (
        "failed",
        error.__name__,
    )
    assert type(one.result(sid)[1]) is error
    assert one.root(lambda root: "marked" in root) is False
    assert one.result(one.run(give, 1)) == (1, None)


def test_exception_keeps_no_frame_and_no_connection_alive(one, key):
    sid = one.run(mark_and_raise, ROOT, key, ZeroDivisionError)
    error = one.result(sid)[1]
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def misspell(root):
    return root["thing"].nmae


def misspell_in_group(root):
    try:
        misspell(root)
    except AttributeError as error:
        raise ExceptionGroup("outer", [error]) from None


@pytest.mark.parametrize("f", [misspell, misspell_in_group])
def test_exception_does_not_keep_what_has_no_such_attribute(one, f):
    """It is no argument of the exception; in RAM it would stay as long as the job is kept."""
    one.root(lambda root: root.update(thing=PersistentMapping()))
    error = list(members(one.result(one.run(f, ROOT))[1]))[-1]
    assert (type(error), error.obj) == (AttributeError, None)


def in_list(error):
    return ValueError([{"why": error}])


def in_group(error):
    return ExceptionGroup("outer", [ExceptionGroup("inner", [error])])


def in_context(error):
    return ValueError("raised while the other was handled")


@pytest.mark.parametrize("how", [Carrier, in_list, in_group, in_context])
def test_exception_within_an_exception_keeps_no_frame_alive(one, key, how, unlogged):
    sid = one.run(fail_with_a_local, key, how)
    gc.collect()
    [local] = CALLS[key]
    assert local() is None
    assert type(one.result(sid)[1]) is type(how(KeyError()))


def divide(precision=None):
    if precision:
        decimal.getcontext().prec = precision
    return str(decimal.Decimal(1) / 3)


def test_what_a_job_sets_in_its_context_is_not_the_next_ones(one):
    def calculate():
        for precision in (3, None):
            values.append(one.result(one.run(divide, precision))[0])

    values = []
    together(calculate)  # in a thread of its own, as a worker is
    assert values == ["0.333", "0.3333333333333333333333333333"]


BOUND = contextvars.ContextVar("BOUND", default=None)


def conflict_and_look(key):
    note(key, BOUND.get())
    if len(CALLS[key]) == 1:
        raise ConflictError("injected")


def test_what_a_subscriber_sets_at_the_start_of_a_job_is_there_until_its_end(one, key):
    """As who binds the job's id for the log, or begins a span, and ends it, does."""
    tokens = []

    def tell(sid, status):
        if status == "running":
            tokens.append(BOUND.set(sid))
        elif status == "successful":
            note(key, BOUND.get())
            BOUND.reset(tokens.pop())
            tokens.append(BOUND.get())

    one.worker.notify = tell
    sid = one.run(conflict_and_look, key)
    assert CALLS[key] == [sid, sid, sid]
    assert tokens == [None]


# -- groups of exceptions ------------------------------------------------------------------


async def raise_in_a_group(key, times, kind, *args):
    """Raise in a task of a group, as often as told; return the number of calls."""

    async def task():
        CALLS[key].append(current_job().attempt)
        if len(CALLS[key]) <= times:
            raise kind(*args)

    async with asyncio.TaskGroup() as group:
        group.create_task(task())
    return len(CALLS[key])


def raise_together(key, *errors):
    CALLS[key].append(current_job().attempt)
    raise BaseExceptionGroup("outer", [KeyError(), BaseExceptionGroup("inner", errors)])


def test_dismissal_in_a_group_dismisses_the_job(one, key):
    sid = one.run(raise_in_a_group, key, 1, JobDismissed, "not wanted")
    assert (one.status(sid).status, CALLS[key], one.told) == ("dismissed", [1], [])


def test_conflict_in_a_group_is_tried_again(one, key, pauses):
    sid = one.run(raise_in_a_group, key, 2, ConflictError)
    assert (one.result(sid), CALLS[key]) == ((3, None), [1, 1, 1])


def test_attempt_that_is_stopped_in_a_group_is_given_back(one, key):
    sid = one.run(raise_in_a_group, key, 1, JobStopped, "the process stops")
    assert (one.status(sid).status, one.record(sid).get("attempts", 0)) == (ACCEPTED, 0)
    one.worker.run(sid, UNHELD)
    assert (one.result(sid), CALLS[key]) == ((2, None), [1, 1])


def test_failure_for_the_user_in_a_group_is_the_jobs_own(one, key):
    sid = one.run(raise_in_a_group, key, 1, OperationFailed, "This file is damaged.")
    failure, (_, error) = one.status(sid).failure, one.result(sid)
    assert (failure.class_name, failure.text) == ("OperationFailed", "This file is damaged.")
    assert (type(error), str(error)) == (OperationFailed, "This file is damaged.")


async def fail_for_a_reason_in_a_group():
    async def task():
        try:
            raise KeyError("the reason")
        except KeyError as error:
            raise OperationFailed("This file is damaged.") from error

    async with asyncio.TaskGroup() as group:
        group.create_task(task())


def test_failure_in_a_group_keeps_its_reason(one):
    failure = one.status(one.run(fail_for_a_reason_in_a_group)).failure
    assert failure.text == "This file is damaged."
    assert "KeyError: 'the reason'" in failure.traceback


def meet_a_deadlock_in_a_group(key):
    try:
        meet_a_deadlock(key, 2)
    except Deadlock as error:
        raise ExceptionGroup("of one", [error]) from None


def test_error_in_a_group_that_a_data_manager_would_retry_is_retried(one, key):
    sid = one.run(meet_a_deadlock_in_a_group, key)
    assert (one.status(sid).status, len(CALLS[key])) == ("successful", 3)


def test_error_of_retry_on_is_found_in_a_group(one, key):
    sid = one.run(raise_in_a_group, key, 1, UnicodeError, "x", retry_on=ValueError)
    assert one.status(sid).status == ACCEPTED
    one.record(sid, run_after=None)
    one.worker.run(sid)
    assert (one.result(sid), CALLS[key]) == ((2, None), [1, 2])


def test_group_in_which_nothing_decides_is_the_exception_of_the_job(one, key):
    sid = one.run(raise_in_a_group, key, 1, ValueError, "x", retry_on=KeyError)
    assert one.status(sid).failure.class_name == "ExceptionGroup"
    _, group = one.result(sid)
    assert type(group) is ExceptionGroup
    assert [repr(error) for error in group.exceptions] == ["ValueError('x')"]


@pytest.mark.parametrize(
    ("errors", "status", "calls"),
    [
        ([OperationFailed("x"), ConflictError(), JobDismissed("y")], "dismissed", 1),
        ([OperationFailed("x"), ConflictError()], "failed", 10),
        ([ValueError("z"), OperationFailed("x")], "failed", 1),
    ],
)
def test_of_a_group_a_dismissal_counts_before_a_conflict_and_that_before_a_failure(
    one, key, pauses, errors, status, calls
):
    sid = one.run(raise_together, key, *errors)
    assert (one.status(sid).status, len(CALLS[key])) == (status, calls)


# -- replies that are lost -----------------------------------------------------------------


class ReplyLost(TransientError):
    pass


@pytest.mark.parametrize("error", [ReplyLost, OSError, ValueError, SystemExit])
def test_lost_reply_to_the_final_commit_leaves_the_effects_once(durable, key, error, pauses):
    sid = durable.run(count_and_lose_the_reply, ROOT, key, error)
    assert CALLS[key] == [1]
    assert durable.root(lambda root: root["n"]) == 1
    assert durable.status(sid).status == "successful"
    assert durable.status(sid).attempts == 1
    assert durable.told == [(sid, "successful")]
    assert durable.result(sid) == (1, None)


def test_lost_reply_to_a_claim_does_not_count_the_attempt_twice(durable, key, monkeypatch):
    sid = durable.schedule(count, ROOT, key)
    seen = durable.die(sid)
    lost = [1]
    take = durable.worker._take

    def take_and_lose(record, job, table):
        taken = take(record, job, table)
        if lost.pop() if lost else False:
            table.tm.get().join(LosesReply(ReplyLost()))
        return taken

    monkeypatch.setattr(durable.worker, "_take", take_and_lose)
    durable.worker.run(sid, seen)
    assert (CALLS[key], lost) == ([2], [])
    assert durable.status(sid).attempts == 2
    assert durable.status(sid).status == "successful"


@pytest.fixture
def recorded(durable, monkeypatch):
    """What was made of failures; the reply to the first commit that records one is lost."""
    record_failure, outcomes = durable.worker._record_failure, []

    def record_and_lose(*arguments):
        *_, table = arguments
        outcomes.append(record_failure(*arguments))
        if len(outcomes) == 1:
            table.tm.get().join(LosesReply(ReplyLost()))
        return outcomes[-1]

    monkeypatch.setattr(durable.worker, "_record_failure", record_and_lose)
    return outcomes


def test_lost_reply_to_the_commit_of_a_failure_leaves_one_failure(durable, key, recorded):
    sid = durable.run(mark_and_raise, ROOT, key, ZeroDivisionError)
    assert [status for status, _ in recorded] == ["failed", "failed"]
    assert CALLS[key] == [1]
    assert durable.told == [(sid, "failed")]


def test_lost_reply_to_the_commit_of_a_retry_makes_the_job_wait_all_the_same(
    durable, key, recorded
):
    waits = []
    durable.worker.later = lambda when, sid: waits.append((when, sid))
    sid = durable.run(mark_and_raise, ROOT, key, KeyError, retry_on=KeyError)
    assert len(recorded) == 2
    assert waits == [(durable.record(sid)["run_after"], sid)]
    assert durable.status(sid).attempts == 1


# -- dismissal -----------------------------------------------------------------------------


def test_job_dismissed_while_it_runs_leaves_no_effects_and_is_not_repeated(one, key, at):
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    with one.standing_at(at, sid):
        assert one.cancel(sid) is True
    assert one.status(sid).status == "dismissed"
    assert one.root(lambda root: "n" in root) is False
    assert (CALLS[key], one.told, one.worker.running) == ([1], [], {})


def test_job_that_is_kept_for_no_time_is_told_of_its_dismissal(one, at):
    sid = one.schedule(raise_behind_gate, at, ZeroDivisionError, result_timeout=0)
    with one.standing_at(at, sid):
        assert one.cancel(sid) is True
        assert one.status(sid) is None
        with pytest.raises(JobDismissed):
            one.worker.running[sid].check()


@pytest.mark.parametrize("how", ["cancel", "remove"])
@pytest.mark.parametrize("ended", [None, "commit", "abort"])
def test_job_that_dismisses_itself_is_dismissed_and_leaves_no_effects(one, key, ended, how):
    OWN[key] = one
    sid = one.schedule(dismiss_oneself, ROOT, key, ended, how)
    one.worker.run(sid)
    assert one.status(sid).status == "dismissed"
    assert one.root(lambda root: "marked" in root) is False
    assert CALLS[key] == [1]


@pytest.mark.parametrize("f", [take_back_a_checkpoint, take_back_a_dismissal])
def test_job_that_takes_back_a_savepoint_has_its_effect_and_its_end_together(one, key, f):
    OWN[key] = one
    sid = one.run(f, ROOT, key)
    one.worker.run(sid)
    assert (one.status(sid).status, one.root(lambda root: root["n"])) == ("successful", 1)


def test_attempt_that_lost_its_job_does_not_dismiss_it(bells, key, at):
    """It was frozen; another one had the job meanwhile, and gave it back."""
    sid = bells.schedule(check_behind_gate, key, at)
    with bells.standing_at(at, sid):
        facts = dict(signature="another worker's", status="running", holder="another")
        bells.record(sid, **facts)
        bells.recovery.tell()
        bells.record(sid, signature=None, status="accepted", holder=None, revision=9)
    assert bells.status(sid).status == "accepted"


def test_attempt_that_lost_its_job_tells_nobody_of_its_failure(bells, key, at):
    """Another one ended the job, and told."""
    sid = bells.schedule(fail_behind_gate, key, at)
    with bells.standing_at(at, sid):
        bells.record(sid, signature="another worker's", status="successful", finished=1.0)
    assert bells.told == []


def test_job_that_was_given_up_tells_its_end_once(durable, key, at):
    """Its last attempt was frozen; it fails when it goes on."""
    sid = durable.schedule(fail_after_a_checkpoint, at, max_attempts=1)
    with durable.standing_at(at, sid):
        assert durable.worker.free(sid, durable.revision(sid)) is False
    assert durable.told == [(sid, "failed")]
    assert durable.status(sid).failure.class_name == "JobLost"


def test_who_reads_an_older_snapshot_sees_the_job_run_and_not_wait(durable, key):
    """The attempt is over, but for this reader its commit has not happened."""
    sid = durable.schedule(show_progress)
    with durable.transaction() as (table, _):
        older = durable.scheduler.bind(table.tm)
        assert older.status(sid).status == "accepted"
        thread = threading.Thread(target=durable.worker.run, args=[sid])
        thread.start()
        thread.join(10)
        status = older.status(sid)
        assert (status.status, status.progress) == ("running", 50)
    assert durable.status(sid).status == "successful"


def test_few_attempts_are_remembered(durable, monkeypatch):
    monkeypatch.setattr(pyramid_async.worker, "REMEMBERED", 3)
    sids = [durable.run(give, n) for n in range(10)]
    assert set(sids[-3:]) <= set(durable.worker.ended)
    assert len(durable.worker.ended) <= 6


def test_last_attempt_of_a_job_is_remembered_however_long_ago_the_first_one_was(
    durable, key, monkeypatch
):
    monkeypatch.setattr(pyramid_async.worker, "REMEMBERED", 3)
    sid = durable.run(stop_once, key)
    for n in range(5):
        durable.run(give, n)
    durable.worker.run(sid, UNHELD)
    durable.run(give, 5)
    assert sid in durable.worker.ended


def test_job_that_raises_jobdismissed_is_dismissed(one, key):
    sid = one.schedule(mark_and_raise, ROOT, key, JobDismissed)
    one.worker.run(sid)
    assert one.status(sid).status == "dismissed"
    assert one.root(lambda root: "marked" in root) is False


def dismiss_half_way():
    current_job().progress(50, 100)
    raise JobDismissed


def test_dismissal_of_a_job_by_itself_is_told_and_keeps_its_progress(one):
    sid, told = one.schedule(dismiss_half_way), []
    one.worker.notify = lambda sid, status: told.append((sid, status))
    one.worker.run(sid)
    status = one.status(sid)
    assert told == [(sid, "running"), (sid, "dismissed")]
    assert (status.status, status.progress) == ("dismissed", 50)
    assert status.started is not None


def test_job_dismissed_while_it_begins_to_commit_leaves_no_effects(one, key, at):
    """It has passed its last check; the record is the fence."""
    sid = one.schedule(count_and_commit_behind_gate, ROOT, key, at, "tpc_begin", "!first")
    with one.standing_at(at, sid):
        assert one.cancel(sid) is True
    assert one.status(sid).status == "dismissed"
    assert one.root(lambda root: "n" in root) is False
    assert (CALLS[key], one.told) == ([1], [])


def take_over(one, sid):
    with one.transaction() as (table, _):
        table.get(sid).claim("other", "signature of the other", 1.0)


def test_job_taken_by_another_worker_while_it_runs_leaves_no_effects(one, key, at):
    """A zombie that wakes after its lease finds its job in other hands."""
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    with one.standing_at(at, sid):
        other = Process(one.store, one.db)
        take_over(one, sid)
    assert one.root(lambda root: "n" in root) is False
    record = one.record(sid)
    assert (record["status"], record["signature"]) == (RUNNING, "signature of the other")
    other.worker.run(sid, record["revision"])
    assert one.root(lambda root: root["n"]) == 1
    assert (one.told, other.told) == ([], [(sid, "successful")])


def test_attempt_that_lost_its_job_shows_nothing_of_it(one, key, at):
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    with one.standing_at(at, sid):
        one.worker.running[sid].progress(1, 2, "half of it")
        assert one.status(sid).message == "half of it"
        take_over(one, sid)
        status = one.status(sid)
        assert (status.status, status.progress, status.message) == (RUNNING, None, None)


def test_failure_of_a_job_that_was_taken_by_another_is_not_recorded(one, key, at):
    sid = one.schedule(fail_behind_gate, key, at)
    with one.standing_at(at, sid):
        take_over(one, sid)
    assert one.status(sid).status == "running"
    assert one.status(sid).failure is None
    assert one.told == []


def fail_behind_gate(key, name):
    GATES[name].pass_through()
    raise ZeroDivisionError


@pytest.mark.parametrize("error", [JobDismissed, JobStopped, ConflictError])
def test_whatever_ends_an_attempt_that_lost_its_job_leaves_it_to_the_other(one, at, error):
    """The function raises by itself what dismisses a job, or gives it back."""
    one.worker.conflict_attempts = 1
    sid = one.schedule(raise_behind_gate, at, error)
    with one.standing_at(at, sid):
        take_over(one, sid)
        before = one.record(sid)
    assert one.record(sid) == before
    assert one.told == []


def raise_behind_gate(name, error):
    GATES[name].pass_through()
    raise error("too late")


def test_failure_of_a_removed_job_is_nobodys(one, key, at):
    sid = one.schedule(fail_behind_gate, key, at)
    with one.standing_at(at, sid):
        one.ask(lambda scheduler: scheduler.remove(sid))
    assert (one.status(sid), one.told) == (None, [])


# -- claims --------------------------------------------------------------------------------


def contenders(one, number):
    """Workers of several processes on one database, or of one RAM store."""
    stores = [
        ZodbStore(one.db) if isinstance(one.store, ZodbStore) else one.store for _ in range(number)
    ]
    return [Process(store, one.db) for store in stores]


def test_one_of_eight_rescuers_runs_the_job(one, key):
    sid = one.schedule(count, ROOT, key)
    seen = one.die(sid)
    others = contenders(one, 8)
    together(*[lambda p=p: p.worker.run(sid, seen) for p in others])
    assert CALLS[key] == [2]
    assert one.root(lambda root: root["n"]) == 1
    assert [told for p in others for told in p.told] == [(sid, "successful")]
    assert one.status(sid).attempts == 2


def test_one_of_eight_who_answer_runs_the_job(one, key):
    sid = one.schedule(count, ROOT, key)
    one.record(sid, holder=None)
    others = contenders(one, 8)
    together(*[lambda p=p: p.worker.run(sid, UNHELD) for p in others])
    assert CALLS[key] == [1]
    assert one.root(lambda root: root["n"]) == 1
    assert one.status(sid).attempts == 1


def test_rescuer_that_saw_another_signature_leaves_the_job_alone(one, key):
    sid = one.schedule(count, ROOT, key)
    one.die(sid, signature="newer")
    for seen in ("older", None):
        one.worker.run(sid, seen)
    assert CALLS[key] == []
    assert one.record(sid)["signature"] == "newer"


def test_job_that_nobody_signed_is_rescued(one, key):
    sid = one.schedule(count, ROOT, key)
    seen = one.die(sid, status=ACCEPTED, signature=None, attempts=0)
    one.worker.run(sid, seen)
    assert CALLS[key] == [1]
    assert one.status(sid).attempts == 1


def test_worker_does_not_run_what_waits_in_anothers_queue(one, key):
    sid = one.schedule(count, ROOT, key)
    one.die(sid, status=ACCEPTED, signature=None, attempts=0)
    one.worker.run(sid)
    assert CALLS[key] == []


@pytest.mark.parametrize("seen", ["", None])
def test_bell_for_a_job_that_somebody_claimed_changes_nothing(one, key, seen):
    sid = one.schedule(note, key)
    before = one.record(sid, status=RUNNING, signature="x", holder=None)
    one.worker.keeps = False
    one.worker.run(sid, seen)
    assert CALLS[key] == []
    assert one.record(sid) == before


def test_bell_for_what_waits_in_the_queue_of_a_process_changes_nothing(one, key):
    sid = one.schedule(note, key)
    before = one.record(sid)
    one.worker.keeps = False
    one.worker.run(sid)
    assert CALLS[key] == []
    assert one.record(sid) == before


@pytest.mark.parametrize("sid", ["0" * 32, "", "no sid\n", "../..", "é" * 1000])
def test_bell_for_no_job_changes_nothing(one, sid):
    before = one.db.lastTransaction()
    assert not one.worker.run(sid)
    assert not one.worker.run(sid, UNHELD)
    assert one.db.lastTransaction() == before
    assert one.told == []


@pytest.mark.parametrize("end", ["successful", "failed", "dismissed"])
def test_late_bell_for_a_job_that_ended_changes_nothing(one, key, end, caplog):
    sid = one.schedule(note if end != "failed" else fail, key)
    if end == "dismissed":
        one.cancel(sid)
    else:
        one.worker.run(sid)
    calls, told = list(CALLS[key]), list(one.told)
    before = one.record(sid)
    one.worker.run(sid, UNHELD)
    one.worker.run(sid)
    one.worker.run(sid, one.revision(sid))
    assert (CALLS[key], one.told, one.record(sid)) == (calls, told, before)
    assert one.status(sid).status == end
    assert "was left as it is" not in caplog.text  # as what nobody may claim is, after an error


def fail(key):
    CALLS[key].append("failed")
    raise ZeroDivisionError


def test_bell_for_a_job_that_is_not_due_makes_it_wait(one, key):
    sid = one.schedule(note, key, run_after=3600)
    before = one.record(sid, holder=None)
    waits = []
    one.worker.later = lambda when, sid: waits.append((when, sid))
    one.worker.run(sid, UNHELD)
    assert (CALLS[key], waits) == ([], [(before["run_after"], sid)])
    assert one.record(sid) == before  # nobody claimed it, and no attempt counts


def meet_a_conflict_and_put_back(key, clock):
    CALLS[key].append(current_job().attempt)
    if len(CALLS[key]) == 1:
        clock.now -= 3600
        raise ConflictError("injected")


def test_job_that_was_due_goes_on_after_a_conflict_whatever_the_clock_says(db, key):
    clock = Clock()
    with process("ram", db, clock=clock) as one:
        sid = one.schedule(meet_a_conflict_and_put_back, key, clock, run_after=60)
        clock.now += 60
        one.worker.run(sid)
        assert (CALLS[key], one.told) == ([1, 1], [(sid, "successful")])


def test_own_job_that_is_not_due_waits(one, key):
    sid = one.schedule(note, key, run_after=3600)
    waits = []
    one.worker.later = lambda when, sid: waits.append((when, sid))
    one.worker.run(sid)
    assert (CALLS[key], waits) == ([], [(one.record(sid)["run_after"], sid)])


# -- attempts ------------------------------------------------------------------------------


def test_attempt_counts_when_it_is_claimed(one, key, at):
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    with one.standing_at(at, sid, one.die(sid, attempts=1)):
        assert one.record(sid)["attempts"] == 2
    assert one.status(sid).attempts == 2


def test_attempt_that_is_given_back_does_not_count(one, key):
    sid = one.schedule(stop_once, key)
    one.worker.run(sid)
    record = one.record(sid)
    assert (record["status"], record.get("attempts", 0), one.told) == (ACCEPTED, 0, [])
    one.worker.run(sid, UNHELD)
    assert CALLS[key] == [1, 1]
    assert one.status(sid).attempts == 1


def test_rescued_attempt_that_is_given_back_does_not_count(one, key):
    sid = one.schedule(stop_once, key)
    one.worker.run(sid, one.die(sid, attempts=1))
    record = one.record(sid)
    assert (record["status"], record["attempts"], record["holder"]) == (ACCEPTED, 1, None)
    one.worker.run(sid, UNHELD)
    assert CALLS[key] == [2, 2]


def test_job_that_kills_its_workers_ends_failed(one, key):
    sid = one.schedule(count, ROOT, key)
    seen = one.die(sid, attempts=3)
    one.worker.run(sid, seen)
    status = one.status(sid)
    assert (status.status, CALLS[key]) == ("failed", [])
    assert status.failure.message.startswith("3 attempts ended without a word")
    assert "process dead" in status.failure.message
    value, error = one.result(sid)
    assert value is None
    assert type(error) is JobFailed
    assert "3 attempts ended without a word" in str(error)


def test_id_of_the_error_that_the_user_sees_is_in_the_log(one, key, caplog):
    claimed, freed = (one.schedule(count, ROOT, key) for _ in range(2))
    one.worker.run(claimed, one.die(claimed, attempts=3))
    one.worker.free(freed, one.die(freed, attempts=3))
    for sid in (claimed, freed):
        [line] = [r.getMessage() for r in caplog.records if sid in r.getMessage()]
        assert f"errorID {one.status(sid).failure.error_id}: 3 attempts ended" in line


def fail_first_and_wait(key, name):
    CALLS[key].append(current_job().attempt)
    if len(CALLS[key]) == 1:
        raise KeyError
    GATES[name].pass_through()


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_dismissal_of_a_second_attempt_leaves_the_start_that_was_shown(db, kind, key, at):
    clock = Clock()
    with process(kind, db, clock=clock) as one:
        sid = one.schedule(fail_first_and_wait, key, at, retry_on=KeyError)
        one.worker.run(sid)
        clock.now += 1000
        with one.standing_at(at, sid):
            shown = one.status(sid).started
            assert shown == clock.now
            one.cancel(sid)
            assert one.status(sid).started == shown
        assert one.status(sid).started == shown


def test_progress_never_falls(one, key):
    """Not by a second attempt that begins anew, nor by its failure."""
    sid = one.schedule(progress_of_attempts, key, 60, 20, retry_on=KeyError, max_attempts=2)
    one.worker.run(sid)
    assert one.status(sid).progress == 60
    one.record(sid, run_after=None)
    one.worker.run(sid)
    assert CALLS[key] == [60, 20]
    assert (one.status(sid).status, one.status(sid).progress) == ("failed", 60)


def progress_and_wait(key, name, *percents):
    percent = percents[current_job().attempt - 1]
    current_job().progress(percent, 100)
    if percent == max(percents):
        raise KeyError
    GATES[name].pass_through()


def test_progress_does_not_fall_while_a_second_attempt_catches_up(one, key, at):
    sid = one.schedule(progress_and_wait, key, at, 60, 20, retry_on=KeyError)
    one.worker.run(sid)
    one.record(sid, run_after=None)
    one.worker.ended.clear()  # as in another process
    with one.standing_at(at, sid):
        assert (one.status(sid).status, one.status(sid).progress) == ("running", 60)


def progress_and_dismiss_oneself(root, key):
    current_job().progress(60, 100)
    dismiss_oneself(root, key, None)


def test_progress_of_a_job_that_dismisses_itself_is_kept(one, key):
    OWN[key] = one
    sid = one.run(progress_and_dismiss_oneself, ROOT, key)
    assert (one.status(sid).status, one.status(sid).progress) == ("dismissed", 60)


def test_progress_of_the_last_attempt_is_kept_too(one, key):
    sid = one.schedule(progress_of_attempts, key, 20, 60, retry_on=KeyError, max_attempts=2)
    one.worker.run(sid)
    one.record(sid, run_after=None)
    one.worker.run(sid)
    assert (one.status(sid).status, one.status(sid).progress) == ("failed", 60)


def test_progress_is_kept_by_a_dismissal(one, at):
    sid = one.schedule(progress, at, 4)
    with one.standing_at(at, sid):
        job = one.worker.running[sid]
        job.progress(75, 100)
        assert one.cancel(sid)
        assert one.status(sid).progress == 75
    assert one.status(sid).progress == 75


def test_progress_is_kept_by_an_attempt_that_is_given_back(one):
    sid = one.run(stop_half_way)
    status = one.status(sid)
    assert (status.status, status.progress) == ("accepted", 50)
    assert status.updated > status.created


def test_reason_names_the_worker_and_its_last_sign_of_life(durable, key):
    sid = durable.schedule(count, ROOT, key)
    with durable.transaction() as (table, _):
        sign = table.root.signs["dead"] = Sign("host-7:4711")
        sign.at = 0.0
    durable.worker.run(sid, durable.die(sid, attempts=3))
    message = durable.status(sid).failure.message
    assert "process dead (host-7:4711, last sign of life 1970-01-01T00:00:00+00:00)" in message


def test_reason_says_when_there_was_no_sign_of_life(durable, key):
    sid = durable.schedule(count, ROOT, key)
    durable.worker.run(sid, durable.die(sid, attempts=3))
    assert "process dead (no sign of life)" in durable.status(sid).failure.message


def test_jobs_own_limit_of_attempts_wins(one, key):
    sid = one.schedule(count, ROOT, key, max_attempts=1)
    one.worker.run(sid, one.die(sid, attempts=1))
    assert one.status(sid).status == "failed"
    sid = one.schedule(count, ROOT, key, max_attempts=5)
    one.worker.run(sid, one.die(sid, attempts=4))
    assert (one.status(sid).status, CALLS[key]) == ("successful", [5])


def test_delay_is_bounded_however_many_attempts_there_were(one, key, pauses):
    sid = one.schedule(mark_and_raise, ROOT, key, OSError, retry_on=OSError, max_attempts=10_000)
    one.record(sid, attempts=5_000)
    one.worker.run(sid)
    assert (one.status(sid).status, one.status(sid).attempts) == ("accepted", 5_001)
    assert pauses.bounds == [(0, LONGEST_DELAY)]


@pytest.mark.parametrize("keeps", [True, False])
def test_job_to_be_tried_again_waits_in_the_same_kind_of_queue(one, key, keeps):
    """In that of this process; a broker's is for whoever answers."""
    one.worker.keeps = keeps
    sid = one.run(mark_and_raise, ROOT, key, KeyError, retry_on=KeyError)
    assert one.record(sid)["holder"] == (one.store.process if keeps else None)


def test_job_that_only_waited_in_a_dead_process_has_lost_no_attempt(one, key):
    sid = one.schedule(count, ROOT, key, max_attempts=1)
    seen = one.die(sid, status=ACCEPTED, signature=None, attempts=0)
    one.worker.run(sid, seen)
    assert (one.status(sid).status, CALLS[key]) == ("successful", [1])


def test_progress_of_a_dead_attempt_is_not_lost(durable, key):
    sid = durable.schedule(count, ROOT, key)
    with durable.transaction() as (table, _):
        sign = table.root.signs["dead"] = Sign("host-7:4711")
        sign.running = {sid: Live(1.0, 1.0, 1, 40, signature="the dead one's")}
    seen = durable.die(sid, signature="the dead one's")
    durable.worker.free(sid, seen)
    assert durable.status(sid).progress == 40
    assert durable.record(sid)["holder"] is None


def test_job_whose_signature_changed_is_not_freed(one, key):
    sid = one.schedule(count, ROOT, key)
    one.die(sid, signature="newer")
    one.worker.free(sid, one.revision(sid) - 1)
    assert one.record(sid)["signature"] == "newer"


def test_a_lost_job_without_attempts_left_is_not_freed_but_failed(one, key):
    sid = one.schedule(count, ROOT, key)
    seen = one.die(sid, attempts=3)
    assert not one.worker.free(sid, seen)
    assert "process dead" in one.status(sid).failure.message
    assert one.told == [(sid, "failed")]
    assert not one.worker.free(sid, seen)
    assert not one.worker.free("0" * 32, seen)
    assert one.told == [(sid, "failed")]


# -- jobs of a broker's queue: the first bell needs no claim ---------------------------------


@pytest.fixture
def bells(one):
    """A process whose jobs wait in a broker's queue."""
    one.worker.keeps = False
    return one


def test_first_bell_costs_one_commit(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(count, ROOT, key)
    before = durable.commits()
    durable.worker.run(sid)
    assert durable.commits() == before + 1
    assert (durable.status(sid).status, durable.status(sid).attempts) == ("successful", 1)


def test_one_of_eight_who_got_the_same_first_bell_has_effects(bells, key):
    sid = bells.schedule(count, ROOT, key)
    others = contenders(bells, 8)
    for other in others:
        other.worker.keeps = False
    together(*[lambda p=p: p.worker.run(sid) for p in others])
    assert bells.root(lambda root: root["n"]) == 1
    assert [told for p in others for told in p.told] == [(sid, "successful")]
    assert bells.status(sid).attempts == 1


def test_what_a_later_bell_claims_the_attempt_of_the_first_one_cannot_commit(bells, key, at):
    sid = bells.schedule(count_behind_gate, ROOT, key, at)
    thread = threading.Thread(target=bells.worker.run, args=[sid])
    thread.start()
    GATES[at].reach()
    [other] = contenders(bells, 1)
    other.worker.keeps = False

    def let_the_first_end(*args):
        GATES[at].opened.set()
        thread.join(10)
        return Try(*args)

    other.worker.make_try = let_the_first_end
    other.worker.run(sid, UNHELD)
    assert bells.root(lambda root: root["n"]) == 1
    assert (bells.told, other.told) == ([], [(sid, "successful")])


def test_a_record_that_an_unclaimed_attempt_may_still_write_outlives_its_removal(durable, key):
    """A pack would take it, and nothing would stop that attempt any more."""
    durable.worker.keeps = False
    first, later = durable.schedule(note, key), durable.schedule(note, key)
    durable.worker.run(first)
    durable.worker.run(later, UNHELD)
    assert "contested" not in durable.record(first)
    assert durable.record(later)["contested"]


def list_attempt(durable, sid, **facts):
    """Let the sign of life of a process list an attempt."""
    with durable.transaction() as (table, _):
        sign = table.root.signs["dead"] = Sign("host-7:4711")
        sign.running = {sid: Live(1.0, 1.0, 1, 40, **facts)}


def test_unclaimed_attempt_counts_once_it_was_shown(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(count, ROOT, key)
    list_attempt(durable, sid, signature="x", revision=durable.record(sid).get("revision", 1))
    assert (durable.status(sid).status, durable.status(sid).progress) == (RUNNING, 40)
    durable.worker.run(sid, durable.revision(sid))
    assert (CALLS[key], durable.status(sid).attempts) == ([2], 2)


def test_unclaimed_attempt_counts_when_its_job_is_freed(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(count, ROOT, key)
    list_attempt(durable, sid, signature="x", revision=1)
    assert durable.worker.free(sid, 1)
    assert (durable.status(sid).status, durable.status(sid).attempts) == (ACCEPTED, 1)
    durable.worker.run(sid, UNHELD)
    assert (CALLS[key], durable.status(sid).attempts) == ([2], 2)


def test_bell_that_is_late_takes_no_job_from_who_is_seen_to_run_it(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(count, ROOT, key, max_attempts=1)
    list_attempt(durable, sid, signature="x", revision=1)
    assert durable.worker.run(sid, UNHELD)
    assert (CALLS[key], durable.record(sid).get("attempts", 0)) == ([], 0)
    assert durable.status(sid).status == RUNNING


def test_bell_takes_no_job_from_another_s_queue(one, key):
    sid = one.schedule(count, ROOT, key)
    one.record(sid, holder="another")
    one.worker.run(sid, UNHELD)
    assert CALLS[key] == []


def test_unclaimed_attempts_have_a_limit_too(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(count, ROOT, key, max_attempts=1)
    list_attempt(durable, sid, signature="x", revision=1)
    durable.worker.run(sid, durable.revision(sid))
    message = durable.status(sid).failure.message
    assert message.startswith("1 attempts ended")
    assert "process dead (host-7:4711" in message


def test_sign_of_an_attempt_that_was_given_back_shows_and_counts_nothing(durable, key):
    durable.worker.keeps = False
    sid = durable.schedule(stop_once, key)
    list_attempt(durable, sid, signature="x", revision=1)
    durable.worker.run(sid)
    assert CALLS[key] == [1]
    status = durable.status(sid)
    assert (status.status, status.attempts) == (ACCEPTED, 0)
    durable.worker.run(sid, UNHELD)
    assert (CALLS[key], durable.status(sid).attempts) == ([1, 1], 1)


def test_unclaimed_job_that_fails_was_tried_once(bells, key):
    sid = bells.schedule(fail, key)
    bells.worker.run(sid)
    assert (bells.status(sid).status, bells.status(sid).attempts) == ("failed", 1)
    assert bells.told == [(sid, "failed")]


def test_unclaimed_job_that_is_dismissed_has_no_effects(bells, key, at):
    sid = bells.schedule(count_behind_gate, ROOT, key, at)
    with bells.standing_at(at, sid):
        assert bells.cancel(sid)
    assert bells.root(lambda root: root.get("n", 0)) == 0
    assert bells.status(sid).status == "dismissed"


# -- wake-ups ------------------------------------------------------------------------------


def test_wake_up_that_comes_twice_runs_the_job_once(one, key, at):
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    with one.standing_at(at, sid):
        assert one.worker.run(sid)
        assert one.worker.run(sid, UNHELD)
    one.worker.run(sid)
    assert CALLS[key] == [1]
    assert one.told == [(sid, "successful")]


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_many_wake_ups_from_many_threads_run_each_job_once(db, key, kind):
    with process(kind, db, workers=4) as one:
        sids = [one.schedule(note, key, number) for number in range(10)]
        together(*[lambda: [one.executor.wake(True, sid) for sid in sids] for _ in range(4)])
        for sid in sids:
            one.wait(sid)
        assert sorted(CALLS[key]) == list(range(10))


def test_worker_leaves_the_job_when_the_database_is_out_of_reach(durable, key, caplog, monkeypatch):
    """It logs, waits for a moment and goes on; recovery finds the job later."""
    slept = []
    clock = SimpleNamespace(monotonic=Clock(), sleep=slept.append)
    monkeypatch.setattr(pyramid_async.worker, "time", clock)
    sid = durable.schedule(note, key)
    table = durable.store.table

    def unreachable(tm, connect=None):
        raise ConnectionError("no route to host")

    durable.store.table = unreachable
    durable.worker.conflict_attempts = 1
    durable.worker.run(sid)
    durable.store.table = table
    assert "was left as it is" in caplog.text
    assert slept[-1:] == [LEFT_PAUSE]
    assert (CALLS[key], durable.status(sid).status) == ([], "accepted")
    durable.worker.run(sid)
    assert CALLS[key] == [None]
