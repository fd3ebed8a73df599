"""What `using` offers and what long jobs need: keys, times, retries, checkpoints, conflicts."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import transaction
from BTrees.OOBTree import OOBTree
from transaction.interfaces import TransientError
from ZODB.POSException import ConflictError, POSKeyError, ReadConflictError

from pyramid_async import current_job
from pyramid_async.interfaces import NotSchedulable, SchedulerFull
from pyramid_async.jobs import OPTIONS, Options
from pyramid_async.ram import RamStore
from pyramid_async.scheduler import Caller, Scheduler
from pyramid_async.standalone import executor_for
from pyramid_async.tries import Unreliable
from pyramid_async.worker import Worker
from pyramid_async.zodb import ZodbStore


class Stage:
    """Events and counts of one test."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()
        self.calls = []


stage = Stage()


class System:
    """A scheduler on a store, and a database that its jobs write."""

    def __init__(self, store, db):
        self.db = db
        self.worker = Worker(store)
        self.executor = executor_for(self.worker, 2)
        self.scheduler = Scheduler(self.worker, self.executor)
        self.connection = db.open()
        self.root = self.connection.root()
        self.root["log"] = OOBTree()
        self.commit()

    def commit(self):
        transaction.commit()

    def finished(self, sid, wait):
        def done():
            transaction.abort()
            return self.scheduler.completed(sid)

        wait(done)
        return self.scheduler.status(sid)


@pytest.fixture(params=["ram", "zodb"])
def system(request, file_db):
    global stage
    stage = Stage()
    store = RamStore() if request.param == "ram" else ZodbStore(file_db)
    if request.param == "zodb":
        store.install()
    made = System(store, file_db)
    yield made
    stage.go.set()
    made.executor.stop(5)
    transaction.abort()


def touch(log):
    stage.calls.append(current_job().attempt)
    log[len(log)] = True


def hold(log):
    stage.reached.set()
    assert stage.go.wait(10)
    touch(log)


# -- key


def test_type_checkers_know_the_options():
    assert Options.__annotations__.keys() == OPTIONS.keys()


def test_an_aborted_schedule_leaves_its_key_free(system):
    scheduler = system.scheduler.using(key="nightly")
    first = scheduler.schedule(touch, system.root["log"])
    transaction.abort()
    assert scheduler.schedule(touch, system.root["log"]) != first
    transaction.abort()


def test_a_refused_schedule_leaves_its_key_free(system):
    """Though its caller commits: the RAM store is full, the ZODB store cannot pickle a lock."""
    system.worker.store.max_pending = 0
    with pytest.raises((NotSchedulable, SchedulerFull)):
        system.scheduler.using(key="nightly").schedule(touch, threading.Lock())
    transaction.commit()
    assert system.worker.store.table(transaction.manager).keyed("nightly") is None
    transaction.abort()


def test_of_two_transactions_that_take_one_key_one_conflicts(system):
    managers = [transaction.TransactionManager(explicit=True) for _ in range(2)]
    sids = []
    for tm in managers:
        tm.begin()
        sids.append(system.scheduler.using(tm=tm, key="nightly").schedule(len, []))
    managers[0].commit()
    with pytest.raises(ConflictError):
        managers[1].commit()
    managers[1].abort()
    managers[1].begin()
    repeated = system.scheduler.using(tm=managers[1], key="nightly").schedule(len, [])
    # The first may have finished by now; then the key was free.
    status = system.scheduler.using(tm=managers[1]).status(sids[0])
    assert (repeated == sids[0]) or status.done
    managers[1].abort()
    for tm in managers:
        system.worker.store.release(tm)


def test_the_key_of_an_archived_job_is_cleaned_away(file_db, wait_for):
    store = ZodbStore(file_db)
    store.install()
    system = System(store, file_db)
    try:
        sid = system.scheduler.using(key="k").schedule(len, [])
        system.commit()
        system.finished(sid, wait_for)
        store.archive([sid])
        transaction.begin()
        table = store.table(transaction.manager)
        assert table.keyed("k") is None
        assert system.scheduler.status(sid).status == "successful"
    finally:
        transaction.abort()
        system.executor.stop(5)


# -- run_after


def test_a_job_does_not_run_before_its_time(system, wait_for):
    begun = time.time()
    sid = system.scheduler.using(run_after=0.2).schedule(time.time)
    system.commit()
    system.finished(sid, wait_for)
    value, error = system.scheduler.get_result(sid)
    assert error is None
    assert value >= begun + 0.2


def test_run_after_takes_a_datetime_with_a_time_zone(system, wait_for):
    when = datetime.now(UTC) + timedelta(seconds=0.1)
    sid = system.scheduler.using(run_after=when).schedule(time.time)
    system.commit()
    system.finished(sid, wait_for)
    assert system.scheduler.get_result(sid)[0] >= when.timestamp()


def test_a_waiting_job_holds_no_thread_and_survives_a_restart(file_db, wait_for):
    store = ZodbStore(file_db)
    store.install()
    first = System(store, file_db)
    sid = first.scheduler.using(run_after=0.3).schedule(time.time)
    begun = time.time()
    first.commit()
    wait_for(lambda: sid not in first.executor.held)
    assert not first.worker.running
    first.executor.stop(5)
    store.identity.end()
    second = System(ZodbStore(file_db), file_db)
    second.executor.recovery.interval = 0.05
    second.executor.start()
    try:
        second.finished(sid, wait_for)
        assert second.scheduler.get_result(sid)[0] >= begun + 0.25
    finally:
        transaction.abort()
        second.executor.stop(5)


# -- retry_on, timeout


def fail_first(log):
    touch(log)
    if len(stage.calls) < 3:
        raise FileNotFoundError("not yet")


@pytest.fixture
def no_delay(monkeypatch):
    """Retry at once, nearly."""
    monkeypatch.setattr("pyramid_async.worker.LONGEST_DELAY", 0.01)


def test_a_chosen_error_is_tried_again_and_leaves_no_effects(system, wait_for, no_delay):
    sid = system.scheduler.using(retry_on=OSError, max_attempts=5).schedule(
        fail_first, system.root["log"]
    )
    system.commit()
    status = system.finished(sid, wait_for)
    assert (status.status, status.failure, status.attempts) == ("successful", None, 3)
    assert stage.calls == [1, 2, 3]
    assert list(system.root["log"]) == [0]


def test_a_chosen_error_that_stays_fails_after_max_attempts(system, wait_for, no_delay):
    sid = system.scheduler.using(retry_on=(OSError, KeyError), max_attempts=2).schedule(
        fail_first, system.root["log"]
    )
    system.commit()
    assert system.finished(sid, wait_for).status == "failed"
    assert type(system.scheduler.get_result(sid)[1]) is FileNotFoundError
    assert stage.calls == [1, 2]
    assert list(system.root["log"]) == []


def test_another_error_is_not_tried_again(system, wait_for):
    sid = system.scheduler.using(retry_on=KeyError).schedule(fail_first, system.root["log"])
    system.commit()
    assert system.finished(sid, wait_for).status == "failed"
    assert stage.calls == [1]


# -- checkpoints


def count_up(log, conflict_at):
    job = current_job()
    stage.calls.append(("from", job.cursor))
    for number in range(job.cursor or 0, 4):
        log[number] = job.attempt
        if number == conflict_at and len(stage.calls) < 3:
            raise ConflictError("injected")
        job.checkpoint(number + 1)
    return "counted"


def test_an_attempt_goes_on_from_the_cursor_of_the_last_checkpoint(system, wait_for):
    sid = system.scheduler.schedule(count_up, system.root["log"], 2)
    system.commit()
    assert system.finished(sid, wait_for).status == "successful"
    assert stage.calls == [("from", None), ("from", 2), ("from", 2)]
    assert list(system.root["log"]) == [0, 1, 2, 3]


def dismissed_at_work(system, f, wait_for):
    """Return the sid of a job that was dismissed while it ran, when it has ended."""
    sid = system.scheduler.schedule(f, system.root["log"])
    system.commit()
    wait_for(stage.reached)
    transaction.begin()
    assert system.scheduler.cancel(sid)
    system.commit()
    stage.go.set()
    wait_for(lambda: not system.worker.running)
    transaction.begin()
    return sid


def checkpoint_then_hold(log):
    log["part"] = 1
    current_job().checkpoint("half")
    log["rest"] = 1
    stage.reached.set()
    assert stage.go.wait(10)


def test_a_dismissed_job_keeps_what_a_checkpoint_committed_and_nothing_later(system, wait_for):
    sid = dismissed_at_work(system, checkpoint_then_hold, wait_for)
    assert list(system.root["log"]) == ["part"]
    assert system.scheduler.status(sid).status == "dismissed"


def hold_then_checkpoint(log):
    log["part"] = 1
    stage.reached.set()
    assert stage.go.wait(10)
    current_job().commit_checkpoint("half")  # without the check that would stop it


def test_a_checkpoint_of_a_dismissed_job_does_not_commit(system, wait_for):
    dismissed_at_work(system, hold_then_checkpoint, wait_for)
    assert list(system.root["log"]) == []


@pytest.mark.parametrize("error", [ConflictError, Unreliable])
def test_what_may_pass_is_counted_anew_after_a_checkpoint(system, wait_for, error):
    system.worker.conflict_attempts = 2
    sid = system.scheduler.schedule(fail_once_a_step, system.root["log"], error)
    system.commit()
    assert system.finished(sid, wait_for).status == "successful"


def fail_once_a_step(log, error):
    job = current_job()
    for number in range(job.cursor or 0, 4):
        if stage.calls.count(number) == 0:
            stage.calls.append(number)
            raise error("injected")
        job.checkpoint(number + 1)


def note_the_transaction(log):
    job = current_job()
    for place in ("first", "second"):
        txn = transaction.get()
        stage.calls.append((txn.user, txn.description, txn.extension["pyramid_async"]))
        job.checkpoint(place)


def test_each_transaction_between_checkpoints_tells_whose_job_it_is(system, wait_for):
    scheduler = system.scheduler.bind(None, Caller(owner="ann"))
    sid = scheduler.schedule(note_the_transaction, system.root["log"])
    system.commit()
    assert system.finished(sid, wait_for).status == "successful"
    assert stage.calls == [("ann", f"job {sid}", sid)] * 2


# -- conflicts and reads that fail


def meet(log):
    stage.calls.append(log.get("n", 0))
    log["n"] = log.get("n", 0) + 1
    stage.reached.set()
    assert stage.go.wait(10)


def always_meet(log, rival):
    log["n"] = log.get("n", 0) + 1
    rival()


def write_as_rival(system):
    tm = transaction.TransactionManager()
    connection = system.db.open(tm)
    log = connection.root()["log"]
    log["n"] = log.get("n", 0) + 10
    tm.get().user = "rival"
    tm.get().note("/rivals/1")
    tm.commit()
    connection.close()


def test_a_conflict_is_tried_again_with_fresh_data(system, wait_for, caplog):
    caplog.set_level("INFO")
    system.root["log"]["n"] = 0
    sid = system.scheduler.schedule(meet, system.root["log"])
    system.commit()
    wait_for(stage.reached)
    write_as_rival(system)
    stage.go.set()
    assert system.finished(sid, wait_for).status == "successful"
    assert stage.calls == [0, 10]
    assert system.root["log"]["n"] == 11
    assert "BTrees.OOBTree" in caplog.text
    assert "written by '/rivals/1' of user 'rival'" in caplog.text


rival_of = None


def rival():
    write_as_rival(rival_of)


def test_a_conflict_that_stays_is_explained_in_the_record(system, wait_for):
    global rival_of
    rival_of = system
    system.worker.conflict_attempts = 2
    sid = system.scheduler.schedule(always_meet, system.root["log"], rival)
    system.commit()
    status = system.finished(sid, wait_for)
    assert status.status == "failed"
    assert "conflict on BTrees.OOBTree" in status.failure.message
    assert "written by '/rivals/1' of user 'rival'" in status.failure.message
    assert isinstance(system.scheduler.get_result(sid)[1], TransientError)


def read_after_pack(root):
    root["log"].get("x")
    stage.reached.set()
    assert stage.go.wait(10)
    try:
        list(root["log"])
        return root["other"]["n"]
    except ReadConflictError:
        stage.calls.append("swallowed")
        return "half of the truth"


def test_a_job_that_reads_what_was_packed_away_is_repeated(system, wait_for):
    system.root["other"] = OOBTree({"n": 1})
    system.commit()
    sid = system.scheduler.schedule(read_after_pack, system.root)
    system.commit()
    wait_for(stage.reached)
    transaction.begin()
    system.root["other"]["n"] = 2
    system.commit()
    system.db.pack()
    stage.go.set()
    assert system.finished(sid, wait_for).status == "successful"
    assert system.scheduler.get_result(sid) == (2, None)
    assert stage.calls == ["swallowed"]


def read_what_was_removed(root):
    stage.calls.append("called")
    root._p_jar.cacheMinimize()
    other = root.get("other")
    stage.reached.set()
    assert stage.go.wait(10)
    return None if other is None else other["n"]


def test_a_job_that_reads_what_was_removed_and_packed_away_is_repeated(system, wait_for):
    system.root["other"] = OOBTree({"n": 1})
    system.commit()
    sid = system.scheduler.schedule(read_what_was_removed, system.root)
    system.commit()
    wait_for(stage.reached)
    transaction.begin()
    del system.root["other"]
    system.commit()
    system.db.pack(time.time() + 1)
    stage.go.set()
    assert system.finished(sid, wait_for).status == "successful"
    assert stage.calls == ["called", "called"]


def read_nothing(root):
    stage.calls.append("called")
    raise POSKeyError(b"nowhere!")


def test_a_job_that_reads_what_is_nowhere_fails_with_that_in_the_end(system, wait_for):
    sid = system.scheduler.schedule(read_nothing, system.root)
    system.commit()
    assert system.finished(sid, wait_for).failure.class_name == "POSKeyError"
    assert stage.calls == ["called"] * 3


def read_nothing_after_a_checkpoint(root):
    current_job().checkpoint(None)
    read_nothing(root)


def test_what_is_nowhere_is_not_looked_for_anew_after_each_checkpoint(system, wait_for):
    sid = system.scheduler.schedule(read_nothing_after_a_checkpoint, system.root)
    system.commit()
    assert system.finished(sid, wait_for).failure.class_name == "POSKeyError"
    assert stage.calls == ["called"] * 3


# -- a frozen attempt, and a pack


@pytest.mark.parametrize("take_away", ["cancel", "remove"])
def test_a_frozen_attempt_cannot_commit_after_a_pack(system, wait_for, monkeypatch, take_away):
    """A storage does not compare what it no longer has, so the record must outlive the attempt."""
    monkeypatch.setattr(system.worker, "interrupt", lambda sid, reason: None)
    sid = system.scheduler.schedule(hold, system.root["log"])
    system.commit()
    wait_for(stage.reached)
    transaction.begin()
    getattr(system.scheduler, take_away)(sid)
    system.commit()
    system.db.pack(time.time() + 1)
    stage.go.set()
    wait_for(lambda: not system.worker.running)
    transaction.begin()
    assert list(system.root["log"]) == []


def test_a_removed_job_is_gone_for_everybody_also_where_its_record_is_kept(system, wait_for):
    sid = system.scheduler.schedule(hold, system.root["log"])
    system.commit()
    wait_for(stage.reached)
    transaction.begin()
    system.scheduler.remove(sid)
    assert system.scheduler.status(sid) is None
    system.commit()
    assert system.scheduler.status(sid) is None
    assert system.scheduler.jobs() == []
