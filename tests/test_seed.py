"""The library that this one grew out of: its promises, kept under its names, without Pyramid."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from contextlib import suppress

import pytest
import transaction
import ZODB
from bare import Clock, CountedLock, LosesReply
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from transaction.interfaces import TransactionFailedError
from webapp import GATES, Barrier, SqlSession, refused_once
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from pyramid_async import JobStopped, current_job, standalone
from pyramid_async.connections import TwoConnections
from pyramid_async.context import PersistentContext
from pyramid_async.interfaces import JobDismissed, NotSchedulable
from pyramid_async.scheduler import (
    PersistentTransactionalScheduler,
    TransactionalScheduler,
)
from pyramid_async.standalone import executor_for
from pyramid_async.transactional import transactional


class App(Persistent):
    """The root object of an application."""

    x = 0


SHOWN = []


def show(*args, **kw):
    SHOWN.append((args, kw))
    return "ok"


def exc():
    raise Exception()


def at_gate(name, app=None):
    GATES[name].pass_through()
    if app is not None:
        app.x = "changed"
    return "through"


def change_and_fail(app):
    app.x = "changed"
    raise ZeroDivisionError("why")


def schedule_when_told_to_stop(name, scheduler):
    GATES[name].reached.set()
    with suppress(JobStopped):
        while True:
            current_job().check()
            GATES[name].opened.wait(0.005)
    scheduler.schedule(show)


def pass_gate(name):
    GATES[name].pass_through()


def thread_of_the_job():
    return threading.current_thread().name


def came_through_the_same_connection(app, context):
    return app is context[0]


def store_in(app, value):
    app.x = value
    return app


def store_through_a_connection_of_its_own(app, value):
    app._p_jar.db().open().root()["app"].x = value


def give(value):
    return value


@transactional
def asynchronous_operation(context):
    return context["param"].x, context[0].x


@transactional
def fail_transactionally(context):
    context[0].x = "changed"
    raise ZeroDivisionError("why")


# -- both schedulers -----------------------------------------------------------------------


class Setting:
    """A database with an application in it, a scheduler, and the thread's own transaction."""

    def __init__(self, db, kind):
        self.db = db
        self.connection = db.open()
        self.root = self.connection.root()
        self.app = self.root["app"] = App()
        self.root["log"] = OOBTree()
        if kind == "ram":
            self.scheduler = TransactionalScheduler()
        else:
            self.scheduler = self.root["scheduler"] = PersistentTransactionalScheduler()
        transaction.commit()

    def ends(self, sid, wait):
        """Wait until the job is complete; leaves a fresh transaction."""

        def completed():
            transaction.abort()
            return self.scheduler.completed(sid) is not False

        wait(completed)

    def close(self):
        transaction.abort()
        self.scheduler.stop()
        transaction.abort()
        self.connection.close()


@pytest.fixture(params=["ram", "persistent"])
def here(request, db):
    setting = Setting(db, request.param)
    del SHOWN[:]
    yield setting
    setting.close()


@pytest.fixture
def persistent(db):
    setting = Setting(db, "persistent")
    del SHOWN[:]
    yield setting
    setting.close()


def test_schedule_returns_an_identifier(here):
    sid = here.scheduler.schedule(show)
    assert isinstance(sid, str)
    assert sid != here.scheduler.schedule(show)


def test_new_schedule_is_known_and_not_yet_complete(here):
    sid = here.scheduler.schedule(show, 1, 2, a="a")
    assert here.scheduler.get_result(sid) is False
    assert here.scheduler.completed(sid) is False


def test_abort_deletes_the_schedule_and_the_operation_never_runs(here, wait_for):
    sid = here.scheduler.schedule(show, 1, 2, a="a")
    transaction.abort()
    assert here.scheduler.get_result(sid) is None
    assert here.scheduler.completed(sid) is None
    later = here.scheduler.schedule(show, "later")
    transaction.commit()
    here.ends(later, wait_for)
    assert SHOWN == [(("later",), {})]


def test_commit_starts_the_operation(here, wait_for):
    sid = here.scheduler.schedule(show, 1, 2, a="a")
    assert SHOWN == []
    transaction.commit()
    here.ends(sid, wait_for)
    assert SHOWN == [((1, 2), {"a": "a"})]
    assert here.scheduler.completed(sid) is True
    assert here.scheduler.get_result(sid) == ("ok", None)


def test_operation_runs_in_another_thread(here, wait_for):
    sid = here.scheduler.schedule(thread_of_the_job)
    transaction.commit()
    here.ends(sid, wait_for)
    name, error = here.scheduler.get_result(sid)
    assert error is None
    assert name != threading.current_thread().name
    assert name.startswith("pyramid_async-worker-")


def test_result_is_deleted_by_a_commit_and_not_by_an_abort(here, wait_for):
    sid = here.scheduler.schedule(show)
    transaction.commit()
    here.ends(sid, wait_for)
    assert here.scheduler.get_result(sid) == ("ok", None)
    transaction.abort()
    assert here.scheduler.get_result(sid) == ("ok", None)
    transaction.commit()
    assert here.scheduler.get_result(sid) is None
    assert here.scheduler.completed(sid) is None


def test_asking_whether_it_is_completed_deletes_nothing(here, wait_for):
    sid = here.scheduler.schedule(show)
    transaction.commit()
    here.ends(sid, wait_for)
    for _ in range(2):
        assert here.scheduler.completed(sid) is True
        transaction.commit()


def test_exception_of_the_operation_is_its_result(here, wait_for, caplog):
    sid = here.scheduler.schedule(exc)
    transaction.commit()
    here.ends(sid, wait_for)
    value, error = here.scheduler.get_result(sid)
    assert value is None
    assert type(error) is Exception
    wait_for(lambda: "in exc" in caplog.text)  # "comes from the logging"


def test_unknown_schedule_is_none(here):
    assert here.scheduler.get_result("0" * 32) is None
    assert here.scheduler.completed("0" * 32) is None
    assert here.scheduler.remove("0" * 32) is None


def test_remove_deletes_the_schedule_at_commit(here, wait_for):
    sid = here.scheduler.schedule(show)
    transaction.commit()
    here.ends(sid, wait_for)
    here.scheduler.remove(sid)
    transaction.abort()
    assert here.scheduler.completed(sid) is True
    here.scheduler.remove(sid)
    assert here.scheduler.completed(sid) is None
    transaction.commit()
    assert here.scheduler.get_result(sid) is None


def test_running_operation_that_is_removed_leaves_no_effect(here, at, wait_for):
    sid = here.scheduler.schedule(at_gate, at, here.app)
    transaction.commit()
    GATES[at].reach()
    here.scheduler.remove(sid)
    transaction.commit()
    GATES[at].opened.set()
    later = here.scheduler.schedule(show)
    transaction.commit()
    here.ends(later, wait_for)
    assert here.scheduler.get_result(sid) is None
    assert here.app.x == 0


def test_operation_sees_what_was_changed_after_it_was_scheduled(here, wait_for):
    sid = here.scheduler.schedule(
        asynchronous_operation, PersistentContext(here.app, param=here.app)
    )
    here.app.x = 1
    transaction.commit()
    here.ends(sid, wait_for)
    assert here.scheduler.get_result(sid) == ((1, 1), None)


def test_context_and_argument_arrive_as_one_object(here, wait_for):
    sid = here.scheduler.schedule(
        came_through_the_same_connection, here.app, PersistentContext(here.app)
    )
    transaction.commit()
    here.ends(sid, wait_for)
    assert here.scheduler.get_result(sid) == (True, None)


def test_persistent_result_arrives_at_the_readers_connection(here, wait_for):
    sid = here.scheduler.schedule(store_in, here.app, 5)
    transaction.commit()
    here.ends(sid, wait_for)
    app, _ = here.scheduler.get_result(sid)
    assert app is here.app
    assert app.x == 5


def test_failed_operation_leaves_no_effect(here, wait_for):
    """The seed committed the partial effects where the function was not transactional."""
    sids = [
        here.scheduler.schedule(change_and_fail, here.app),
        here.scheduler.schedule(fail_transactionally, PersistentContext(here.app)),
    ]
    transaction.commit()
    for sid in sids:
        here.ends(sid, wait_for)
        assert type(here.scheduler.get_result(sid)[1]) is ZeroDivisionError
    assert here.app.x == 0


def test_failure_of_the_operation_is_no_failure_of_whoever_asks(here, wait_for):
    sid = here.scheduler.schedule(exc)
    transaction.commit()
    here.ends(sid, wait_for)
    here.scheduler.get_result(sid)
    here.app.x = "asked"
    transaction.commit()
    assert here.root["app"].x == "asked"


def test_conflict_of_whoever_schedules_starts_nothing(here, wait_for):
    with here.db.transaction() as connection:
        connection.root()["app"].x = "rival"
    here.app.x = "ours"
    sid = here.scheduler.schedule(show)
    with pytest.raises(ConflictError):
        transaction.commit()
    transaction.abort()
    assert here.scheduler.get_result(sid) is None
    later = here.scheduler.schedule(show, "later")
    transaction.commit()
    here.ends(later, wait_for)
    assert SHOWN == [(("later",), {})]


def test_operation_runs_although_the_reply_to_its_commit_was_lost(here, wait_for):
    sid = here.scheduler.schedule(show)
    transaction.get().join(LosesReply(OSError("reply lost")))
    with pytest.raises(OSError, match="reply lost"):
        transaction.commit()
    here.ends(sid, wait_for)
    assert here.scheduler.get_result(sid) == ("ok", None)


def test_many_operations_use_a_bounded_number_of_threads(here, wait_for):
    sids = [here.scheduler.schedule(thread_of_the_job) for _ in range(20)]
    transaction.commit()
    for sid in sids:
        here.ends(sid, wait_for)
    assert len({here.scheduler.get_result(sid)[0] for sid in sids}) <= 4


def test_dismissal_is_the_result_of_a_dismissed_operation(here, at):
    """The seed had no word for it, so the persistent scheduler has none either."""
    if isinstance(here.scheduler, PersistentTransactionalScheduler):
        scheduler = here.scheduler._scheduler()
    else:
        scheduler = here.scheduler
    sid = here.scheduler.schedule(at_gate, at)
    transaction.commit()
    GATES[at].reach()
    assert scheduler.cancel(sid) is True
    transaction.commit()
    GATES[at].opened.set()
    value, error = here.scheduler.get_result(sid)
    assert value is None
    assert type(error) is JobDismissed


# -- in RAM --------------------------------------------------------------------------------


@pytest.fixture
def ram():
    scheduler = TransactionalScheduler()
    yield scheduler
    transaction.abort()
    scheduler.stop()


def ends(scheduler, sid, wait):
    wait(lambda: scheduler.completed(sid) is not False)


def test_ram_scheduler_works_without_any_database(ram, wait_for):
    sid = ram.schedule(show, 1)
    transaction.commit()
    ends(ram, sid, wait_for)
    assert ram.get_result(sid) == ("ok", None)


def test_ram_scheduler_takes_any_callable(ram, wait_for):
    sid = ram.schedule(lambda: "from a lambda")
    transaction.commit()
    ends(ram, sid, wait_for)
    assert ram.get_result(sid) == ("from a lambda", None)


def test_ram_scheduler_is_seen_by_every_thread_of_the_process(ram, wait_for):
    sid = ram.schedule(show)
    transaction.commit()
    ends(ram, sid, wait_for)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(ram.get_result(sid)))
    thread.start()
    thread.join(10)
    assert seen == [("ok", None)]


def test_ram_schedulers_do_not_see_each_others_schedules(ram):
    sid = ram.schedule(show)
    assert TransactionalScheduler().get_result(sid) is None


def test_forgotten_result_is_deleted_after_the_timeout(wait_for):
    """By itself; the seed waited until another operation ended."""
    scheduler = TransactionalScheduler(timeout=100)
    scheduler.store.clock = clock = Clock()
    sid = scheduler.schedule(show)
    transaction.commit()
    ends(scheduler, sid, wait_for)
    clock.now += 99
    assert scheduler.completed(sid) is True
    clock.now += 1
    assert scheduler.completed(sid) is None
    scheduler.stop()
    scheduler.executor.recovery.look()
    assert scheduler.store.states == {}


def test_result_is_kept_for_an_hour_unless_told_otherwise():
    assert TransactionalScheduler().worker.result_timeout == 3600
    assert TransactionalScheduler(0).worker.result_timeout == 0


def test_making_a_scheduler_starts_no_thread():
    before = threading.active_count()
    TransactionalScheduler()
    assert threading.active_count() == before


# -- in the ZODB ---------------------------------------------------------------------------


def test_persistent_scheduler_is_used_from_any_connection(persistent, wait_for):
    sid = persistent.scheduler.schedule(show)
    transaction.commit()
    persistent.ends(sid, wait_for)
    with persistent.db.transaction() as connection:
        assert connection.root()["scheduler"].get_result(sid) == ("ok", None)
    transaction.abort()
    assert persistent.scheduler.get_result(sid) is None


def test_schedule_and_result_survive_a_restart(tmp_path, wait_for):
    path = str(tmp_path / "data.fs")
    db = ZODB.DB(FileStorage(path))
    first = Setting(db, "persistent")
    sid = first.scheduler.schedule(show, "restarted")
    transaction.commit()
    first.ends(sid, wait_for)
    first.close()
    db.close()

    db = ZODB.DB(FileStorage(path))
    connection = db.open()
    scheduler = connection.root()["scheduler"]
    assert scheduler.get_result(sid) == ("ok", None)
    transaction.commit()
    assert scheduler.get_result(sid) is None
    transaction.abort()
    scheduler.stop()
    connection.close()
    db.close()


def test_operation_that_waited_when_the_process_ended_runs_in_the_next_one(tmp_path, at, wait_for):
    """At the next use; the seed never restarted it."""
    path = str(tmp_path / "data.fs")
    db = ZODB.DB(FileStorage(path))
    first = Setting(db, "persistent")
    del SHOWN[:]
    blocking = [first.scheduler.schedule(at_gate, at) for _ in range(first.scheduler.workers)]
    sid = first.scheduler.schedule(show, "waited")
    transaction.commit()
    GATES[at].reach()
    first.scheduler.stop(0.01)
    GATES[at].opened.set()
    executor_has_ended(wait_for)
    first.close()
    db.close()
    assert SHOWN == []

    db = ZODB.DB(FileStorage(path))
    second = db.open()
    scheduler = second.root()["scheduler"]
    assert scheduler.completed(sid) is False

    def completed():
        transaction.abort()
        return scheduler.completed(sid)

    wait_for(completed)
    assert SHOWN == [(("waited",), {})]
    assert len(blocking) == 4
    transaction.abort()
    scheduler.stop()
    second.close()
    db.close()


def executor_has_ended(wait):
    names = "pyramid_async-worker-"
    wait(lambda: not any(t.name.startswith(names) for t in threading.enumerate()))


def test_stopped_scheduler_in_ram_promises_nothing():
    scheduler = TransactionalScheduler()
    sid = scheduler.schedule(show)
    transaction.commit()
    scheduler.stop()
    for schedule in (scheduler.schedule, scheduler.using(title="later").schedule):
        with pytest.raises(RuntimeError, match="stopped"):
            schedule(show)
    transaction.abort()
    assert scheduler.completed(sid) is not None  # what is known can still be asked


def test_persistent_scheduler_takes_named_functions_alone(persistent):
    with pytest.raises(NotSchedulable, match="lambda"):
        persistent.scheduler.schedule(lambda: None)


def test_sql_is_sent_before_the_database_is_locked_where_scheduling_begins_the_transaction(
    persistent,
):
    locked, lock = [], persistent.db.storage._commit_lock
    persistent.scheduler.schedule(show)
    transaction.get().join(SqlSession(lambda: locked.append(lock.locked())))
    transaction.commit()
    assert locked[0] is False


def refused_sql(persistent):
    transaction.get().join(refused_once(ZeroDivisionError()))
    return ZeroDivisionError


def session_out_of_reach(persistent):
    class Lazy(Barrier):
        """Its session connects when it is asked for."""

        @property
        def session(self):
            raise ZeroDivisionError

    transaction.get().join(Lazy(None, None, "~lazy"))
    return ZeroDivisionError


def second_connection(persistent):
    persistent.db.open().root()["second"] = 1
    return TwoConnections


@pytest.mark.parametrize("spoil", [refused_sql, session_out_of_reach, second_connection])
def test_commit_that_we_refuse_is_not_made_by_who_commits_once_more(persistent, spoil):
    sid = persistent.scheduler.schedule(show)
    persistent.root["first"] = 1
    with pytest.raises(spoil(persistent)):
        transaction.commit()
    with pytest.raises(TransactionFailedError):
        transaction.commit()
    transaction.abort()
    assert "first" not in persistent.root
    assert persistent.scheduler.completed(sid) is None


def test_operation_may_open_a_connection_of_its_own(persistent, wait_for):
    sid = persistent.scheduler.schedule(store_through_a_connection_of_its_own, persistent.app, 5)
    transaction.commit()
    persistent.ends(sid, wait_for)
    assert persistent.scheduler.get_result(sid) == (None, None)
    assert persistent.app.x == 5


def test_two_persistent_schedulers_of_one_database_are_apart(persistent, wait_for):
    other = persistent.root["other"] = PersistentTransactionalScheduler()
    transaction.commit()
    sid = persistent.scheduler.schedule(show)
    transaction.commit()
    persistent.ends(sid, wait_for)
    assert other.get_result(sid) is None
    assert persistent.scheduler.get_result(sid) == ("ok", None)
    transaction.abort()
    other.stop()


def test_timeout_of_a_persistent_scheduler_is_kept_with_it(persistent, wait_for):
    scheduler = persistent.root["short"] = PersistentTransactionalScheduler(timeout=0)
    transaction.commit()
    assert PersistentTransactionalScheduler().timeout == 3600
    sid = scheduler.schedule(show)
    transaction.commit()

    def gone():
        transaction.abort()
        return scheduler.completed(sid) is None

    wait_for(gone)
    assert len(SHOWN) == 1
    transaction.abort()
    scheduler.stop()


def test_persistent_scheduler_that_is_nowhere_says_what_to_do():
    with pytest.raises(ValueError, match="not in a database"):
        PersistentTransactionalScheduler().schedule(show)


def test_stopped_persistent_scheduler_starts_again_at_its_next_use(persistent, wait_for):
    transaction.abort()
    persistent.scheduler.stop()
    sid = persistent.scheduler.schedule(give, 1)
    transaction.commit()
    persistent.ends(sid, wait_for)
    assert persistent.scheduler.get_result(sid) == (1, None)


@pytest.mark.parametrize(
    "end", [lambda here: here.scheduler.stop(), lambda here: here.db.close()], ids=["stop", "close"]
)
def test_persistent_scheduler_that_a_job_uses_while_it_stops_stays_stopped(
    persistent, at, wait_for, end
):
    persistent.scheduler.schedule(schedule_when_told_to_stop, at, persistent.scheduler)
    transaction.commit()
    GATES[at].reach()
    end(persistent)
    executor_has_ended(wait_for)


def test_persistent_scheduler_that_stops_is_started_anew_by_whoever_else_uses_it(
    persistent, at, wait_for
):
    def stop():
        with persistent.db.transaction() as connection:
            connection.root()["scheduler"].stop(10)

    persistent.scheduler.schedule(pass_gate, at)
    transaction.commit()
    GATES[at].reach()
    first = persistent.scheduler._scheduler().executor
    stopping = threading.Thread(target=stop)
    stopping.start()
    wait_for(lambda: first.stopped)
    sid = persistent.scheduler.schedule(give, 1)
    transaction.commit()
    persistent.ends(sid, wait_for)
    second = persistent.scheduler._scheduler().executor
    GATES[at].opened.set()
    stopping.join(10)
    assert persistent.scheduler._scheduler().executor is second is not first


def test_persistent_scheduler_whose_stop_fails_starts_again(persistent, monkeypatch, wait_for):
    executor = persistent.scheduler._scheduler().executor
    stop = executor.stop

    def interrupted(timeout):
        stop(timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        persistent.scheduler.stop()
    sid = persistent.scheduler.schedule(give, 1)
    transaction.commit()
    persistent.ends(sid, wait_for)


def test_stops_of_a_persistent_scheduler_leave_no_storages(persistent, wait_for):
    def instances():
        sid = persistent.scheduler.schedule(give, 1)
        transaction.commit()
        persistent.ends(sid, wait_for)
        transaction.abort()
        persistent.scheduler.stop()
        gc.collect()
        return len(persistent.db._mvcc_storage._instances)

    first = max(instances() for _ in range(2))
    assert max(instances() for _ in range(4)) <= first + 1


def test_stopped_persistent_scheduler_keeps_nothing_of_what_ran_its_jobs(persistent, wait_for):
    executor = weakref.ref(persistent.scheduler._scheduler().executor)
    transaction.abort()
    persistent.scheduler.stop()
    wait_for(lambda: gc.collect() is not None and executor() is None)


def test_closed_database_leaves_nothing_of_its_schedulers(wait_for):
    db = ZODB.DB(MappingStorage())
    with db.transaction() as connection:
        connection.root()["scheduler"] = PersistentTransactionalScheduler()
    connection = db.open()
    connection.root()["scheduler"].schedule(give, 1)
    transaction.commit()
    executor = connection.root()["scheduler"]._scheduler().executor
    threads, reference = [*executor.threads, executor.recovery._thread], weakref.ref(db)
    transaction.abort()
    connection.close()
    db.close()
    assert not any(thread.is_alive() for thread in threads)
    del db, connection, executor
    wait_for(lambda: gc.collect() is not None and reference() is None)


def test_database_that_closes_stops_the_schedulers_of_no_other(persistent):
    executor = persistent.scheduler._scheduler().executor
    db = ZODB.DB(MappingStorage())
    with db.transaction() as connection:
        connection.root()["scheduler"] = PersistentTransactionalScheduler()
    connection = db.open()
    connection.root()["scheduler"].completed("0" * 32)
    transaction.abort()
    connection.close()
    db.close()
    assert not executor.stopped
    assert persistent.scheduler._scheduler().executor is executor


def test_whoever_uses_a_persistent_scheduler_while_its_database_closes_starts_nothing(
    persistent, at, wait_for
):
    persistent.scheduler.schedule(pass_gate, at)
    transaction.commit()
    GATES[at].reach()
    first = persistent.scheduler._scheduler().executor
    closing = threading.Thread(target=persistent.db.close)
    closing.start()
    wait_for(lambda: first.stopped)
    with pytest.raises(ValueError, match="closed"):
        persistent.scheduler.completed("00" * 16)
    GATES[at].opened.set()
    closing.join(10)
    with pytest.raises(ValueError, match="closed"):
        persistent.scheduler.completed("00" * 16)
    executor_has_ended(wait_for)


def test_job_that_starts_another_scheduler_while_the_database_closes_is_given_back(
    persistent, at, caplog, wait_for
):
    caplog.set_level("INFO")
    other = persistent.root["other"] = PersistentTransactionalScheduler()
    sid = persistent.scheduler.schedule(schedule_when_told_to_stop, at, other)
    transaction.commit()
    GATES[at].reach()
    persistent.scheduler._p_activate()  # the fixture's end uses it without its database
    closing = threading.Thread(target=persistent.db.close)
    closing.start()
    closing.join(10)
    executor_has_ended(wait_for)
    assert f"job {sid!r} is given back" in caplog.text


def test_database_that_closes_while_a_persistent_scheduler_starts_stops_it(
    persistent, monkeypatch, wait_for
):
    lock, made = CountedLock(), []
    closing = threading.Thread(target=lambda: persistent.db.close())

    def close_meanwhile(*args):
        closing.start()
        wait_for(lambda: lock.asked == 2 or not closing.is_alive())
        made.append(executor_for(*args))
        return made[0]

    monkeypatch.setattr(standalone, "_in_use_locks", {os.getpid(): lock})
    monkeypatch.setattr(standalone, "executor_for", close_meanwhile)
    persistent.scheduler._scheduler()
    closing.join(10)
    assert made[0].stopped
    assert not any(db is persistent.db for db, _ in standalone._in_use)


def test_signal_handler_may_close_the_database_while_a_persistent_scheduler_starts(
    persistent, monkeypatch
):
    """So may a finalizer: both run in the thread that is starting it."""

    def close_and_exit(*args):
        persistent.db.close()
        raise SystemExit

    monkeypatch.setattr(standalone, "_in_use_locks", {})
    monkeypatch.setattr(standalone, "executor_for", close_and_exit)
    persistent.scheduler._p_activate()  # the fixture's end uses it without its database

    def start():
        with suppress(SystemExit):
            persistent.scheduler._scheduler()

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(10)
    assert not starting.is_alive()


def test_database_may_be_closed_again_while_it_closes(persistent, monkeypatch):
    """As a signal handler does; the ZODB allows it."""
    persistent.scheduler._scheduler()
    stop = standalone.stop_together

    def close_again(executors):
        monkeypatch.setattr(standalone, "stop_together", stop)
        persistent.db.close()
        stop(executors)

    monkeypatch.setattr(standalone, "stop_together", close_again)
    persistent.db.close()
    assert not any(db is persistent.db for db, _ in standalone._in_use)


def test_database_whose_close_was_interrupted_is_in_use_again(persistent, monkeypatch, wait_for):
    stop = standalone.stop_together

    def interrupted(executors):
        stop(executors)
        raise KeyboardInterrupt

    persistent.scheduler._scheduler()
    with monkeypatch.context() as patch:
        patch.setattr(standalone, "stop_together", interrupted)
        with pytest.raises(KeyboardInterrupt):
            persistent.db.close()
    sid = persistent.scheduler.schedule(give, 1)
    transaction.commit()
    persistent.ends(sid, wait_for)


def test_two_threads_may_stop_one_persistent_scheduler(persistent, monkeypatch, wait_for):
    persistent.scheduler._scheduler()
    key = standalone._key(persistent.scheduler)
    found = standalone._in_use[key]
    lock, other = CountedLock(), threading.Thread(target=lambda: standalone._forget(key, found))

    class Forgotten(dict):
        def get(self, key):
            value = super().get(key)
            if other.ident is None:
                other.start()
                wait_for(lambda: lock.asked == 2 or not other.is_alive())
            return value

    found.stop(10)
    monkeypatch.setattr(standalone, "_in_use_locks", {os.getpid(): lock})
    monkeypatch.setattr(standalone, "_in_use", Forgotten(standalone._in_use))
    standalone._forget(key, found)
    other.join(10)
    assert key not in standalone._in_use


def test_persistent_scheduler_is_as_durable_as_the_data_beside_it(persistent, wait_for):
    """Schedule and change are one commit."""
    tids = [t.tid for t in persistent.db.storage.iterator()]
    persistent.app.x = 7
    sid = persistent.scheduler.schedule(give, 1)
    transaction.commit()
    added = [t for t in persistent.db.storage.iterator() if t.tid not in tids]
    assert persistent.app._p_oid in {record.oid for record in added[0]}
    assert len(list(added[0])) > 1
    persistent.ends(sid, wait_for)


# -- the typical usage example -------------------------------------------------------------


def test_typical_usage_example(db, wait_for):
    connection = db.open()
    app = connection.root()["app"] = App()
    transaction.commit()
    scheduler = TransactionalScheduler()

    # The first request.
    sid = scheduler.schedule(asynchronous_operation, PersistentContext(app, param=app))
    app.x = 1
    transaction.commit()

    # A follow-up request, which learned the sid.
    wait_for(lambda: scheduler.completed(sid))
    result = scheduler.get_result(sid)
    assert result is not None, "lost schedule"
    assert result is not False, "operation not yet complete"
    value, error = result
    assert error is None
    assert value == (1, 1)
    transaction.commit()
    assert scheduler.get_result(sid) is None

    scheduler.stop()
    transaction.abort()
    connection.close()


def test_typical_usage_example_whose_request_aborts(db):
    connection = db.open()
    app = connection.root()["app"] = App()
    transaction.commit()
    scheduler = TransactionalScheduler()
    sid = scheduler.schedule(asynchronous_operation, PersistentContext(app, param=app))
    app.x = 1
    transaction.abort()
    assert scheduler.get_result(sid) is None
    assert app.x == 0
    scheduler.stop()
    transaction.abort()
    connection.close()
