"""The thread executor: its threads, forks, bounds, and how it leaves."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import transaction
from bare import (
    CALLS,
    ROOT,
    Clock,
    Process,
    Shared,
    check_until_told,
    note,
    process,
    store_of,
    together,
)
from pyramid.config import Configurator
from pyramid_zodbconn import get_connection
from webapp import GATES, Barrier, behind_gate, gate, pool_warnings
from zope.interface.verify import verifyObject

from pyramid_async import IScheduler, JobStopped, current_job
from pyramid_async.exits import Exit, exit_on_sigterm, stop_all, stop_together
from pyramid_async.interfaces import IExecutor
from pyramid_async.jobs import FRESH, UNHELD
from pyramid_async.scheduler import (
    Caller,
    PersistentTransactionalScheduler,
    TransactionalScheduler,
)
from pyramid_async.standalone import executor_for
from pyramid_async.transactional import pending
from pyramid_async.tries import Surroundings
from pyramid_async.worker import Worker
from pyramid_async.zodb import OpenedBeforeFork


def count_at_gate(root, name, key):
    root["n"] = root.get("n", 0) + 1
    CALLS[key].append(current_job().attempt)
    GATES[name].pass_through()


def thread_of_the_job():
    thread = threading.current_thread()
    return thread.name, thread.daemon


def fail_at_gate(name):
    GATES[name].pass_through()
    raise ZeroDivisionError


def fail_with_other(name):
    get_connection(current_job().request, "other").root()
    fail_at_gate(name)


def worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("pyramid_async-worker")]


both_stores = pytest.mark.parametrize("kind", ["ram", "zodb"])


# -- threads -------------------------------------------------------------------------------


def test_executor_provides_its_interface(db):
    assert verifyObject(IExecutor, Process(store_of("ram", db), db).executor)


USER = ContextVar("USER", default=None)


def schedule_as(user, scheduler, key):
    USER.set(user)
    with transaction.manager:
        scheduler.schedule(note, key)


def test_threads_start_without_the_context_of_who_schedules_the_first_job(monkeypatch, key):
    """Tools that report errors hand it to each new thread, and so to the jobs of everybody."""
    inherited, start = [], threading.Thread.start

    def start_and_inherit(thread):
        inherited.append(USER.get())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_and_inherit)
    scheduler = TransactionalScheduler()
    try:
        copy_context().run(schedule_as, "ann", scheduler, key)
    finally:
        scheduler.stop()
    assert set(inherited) == {None}


@both_stores
def test_threads_start_with_the_first_job_and_not_before(db, kind):
    with process(kind, db, workers=2) as one:
        assert worker_threads() == []
        one.wait(one.schedule(note, "x"))
        assert len(worker_threads()) == 2


def test_threads_are_named_daemons(db):
    with process("ram", db, workers=3) as one:
        one.executor.start()
        names = sorted(thread.name for thread in worker_threads())
        assert names == [f"pyramid_async-worker-{number}" for number in (1, 2, 3)]
        assert all(thread.daemon for thread in worker_threads())
        sid = one.schedule(thread_of_the_job)
        one.wait(sid)
        (name, daemon), _ = one.result(sid)
        assert name in names
        assert daemon


def test_starting_twice_starts_once(db):
    with process("ram", db, workers=2) as one:
        together(*[one.executor.start for _ in range(8)])
        assert len(worker_threads()) == 2


def test_recovery_is_started_and_stopped_with_the_threads(db):
    with process("zodb", db, workers=1) as one:
        one.executor.recovery = one.recovery
        one.executor.start()
        assert "pyramid_async-recovery" in {t.name for t in threading.enumerate()}
        one.executor.stop(5)
        assert "pyramid_async-recovery" not in {t.name for t in threading.enumerate()}


def test_as_many_jobs_run_at_a_time_as_there_are_workers(db, key):
    with process("zodb", db, workers=2) as one, gate() as first, gate() as second:
        one.schedule(behind_gate, first)
        one.schedule(behind_gate, second)
        GATES[first].reach()
        GATES[second].reach()
        third = one.schedule(note, key)
        assert CALLS[key] == []
        GATES[first].opened.set()
        one.wait(third)
        assert one.status(third).status == "successful"


def test_process_without_workers_schedules_and_runs_nothing(db, key):
    store = store_of("zodb", db)
    worker = Worker(store)
    executor = executor_for(worker, 0)
    assert (executor.room(), worker.holder) == (0, None)
    executor.wake(True, "00" * 16)
    assert (executor.held, worker_threads()) == (set(), [])
    executor.stop(1)


def test_process_without_workers_looks_for_nothing(db):
    executor = executor_for(Worker(store_of("zodb", db)), 0)
    executor.start()
    assert executor.recovery._thread is None
    executor.stop(1)


def test_whatever_a_job_raises_its_thread_goes_on(db, key, caplog):
    with process("ram", db, workers=1) as one:
        run = one.worker.run

        def leave(sid, seen):
            one.worker.run = run
            raise SystemExit

        one.worker.run = leave
        one.schedule(note, key)
        one.wait(one.schedule(note, key))
        assert "the worker goes on" in caplog.text


def test_executors_are_stopped_at_exit(db):
    with process("ram", db, workers=1) as one:
        one.executor.start()
        assert not one.executor.stopped
        stop_all()
        assert (one.executor.stopped, worker_threads()) == (True, [])


def test_stop_in_a_child_tells_nothing_to_the_jobs_of_its_parent(db, at, key):
    with process("ram", db, workers=1) as one:
        sid = one.schedule(behind_gate, at)
        GATES[at].reach()
        ours, one.executor._pid = one.executor._pid, 0  # as a child finds it
        one.executor.stop(0)
        one.worker.running[sid].check()
        one.executor._pid = ours
        GATES[at].opened.set()


@both_stores
def test_nothing_is_queued_before_the_commit(db, key, kind):
    with process(kind, db, workers=1) as one:
        with one.transaction() as (table, _):
            sid = one.scheduler.using(tm=table.tm).schedule(note, key)
            assert (one.executor.held, worker_threads()) == (set(), [])
        assert worker_threads() != []
        one.wait(sid)


@both_stores
def test_nothing_is_queued_after_an_abort(db, key, kind):
    with process(kind, db, workers=1) as one:
        with one.transaction() as (table, _):
            one.scheduler.using(tm=table.tm).schedule(note, key)
            table.tm.abort()
            table.tm.begin()
        assert (one.executor.held, worker_threads()) == (set(), [])


# -- bounds --------------------------------------------------------------------------------


def test_queue_is_bounded_and_recovery_fetches_what_did_not_fit(db, key, at):
    with process("zodb", db, workers=1) as one:
        one.executor.max_pending = 2
        one.schedule(behind_gate, at)
        GATES[at].reach()
        sids = [one.schedule(note, key, number) for number in range(5)]
        assert len(one.executor.held) == 3  # one runs, two wait
        assert one.executor.room() == 0
        one.recovery.look()
        assert len(one.executor.held) == 3
        GATES[at].opened.set()
        for sid in sids[:2]:
            one.wait(sid)
        for sid in sids[2:]:
            while not one.ended[sid].wait(0.01):
                one.recovery.look()
        assert sorted(CALLS[key]) == [0, 1, 2, 3, 4]


def test_job_is_queued_once_however_often_it_is_woken(db, key, at):
    with process("zodb", db, workers=1) as one:
        one.schedule(behind_gate, at)
        GATES[at].reach()
        sid = one.schedule(note, key)
        for _ in range(5):
            one.executor.wake(True, sid)
        assert one.executor.queue.qsize() == 1
        GATES[at].opened.set()
        one.wait(sid)


def test_hook_puts_an_id_on_the_queue_and_nothing_else(db, key, at):
    with process("zodb", db, workers=1) as one:
        one.schedule(behind_gate, at)
        GATES[at].reach()
        with one.transaction() as (table, _):
            sid = one.scheduler.using(tm=table.tm).schedule(note, key)
        before = db.lastTransaction()
        one.executor.wake(True, sid)
        assert db.lastTransaction() == before
        assert CALLS[key] == []
        GATES[at].opened.set()
        one.wait(sid)


def test_hook_never_raises_when_no_thread_can_be_started(db, key, monkeypatch, caplog):
    """As at the interpreter's exit; recovery finds the job."""
    with process("zodb", db, workers=1) as one:

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            sid = one.schedule(note, key)
        assert "could not be queued; recovery will find it" in caplog.text
        assert one.status(sid).status == "accepted"
        one.recovery.look()
        one.wait(sid)
        assert CALLS[key] == [None]


def test_hook_never_raises_after_the_stop(db, key):
    with process("zodb", db, workers=1) as one:
        one.executor.stop(1)
        sid = one.schedule(note, key)
        assert one.status(sid).status == "accepted"
        assert one.executor.held == set()
        assert one.record(sid).get("holder") is None  # anybody may run it


@both_stores
def test_wake_up_that_comes_while_nothing_is_found_is_not_lost(db, key, kind):
    """The first one came from an attempt of the request that did not commit."""
    looked, go = threading.Event(), threading.Event()
    with process(kind, db, workers=1) as one:
        run = one.worker.run

        def slow(sid, seen):
            found = run(sid, seen)
            if not found:
                looked.set()
                go.wait(20)
            return found

        one.worker.run = slow
        caller = Caller(new_sid=lambda: "ab" * 16)
        for end in ("abort", "commit"):
            tm = transaction.TransactionManager(explicit=True)
            tm.begin()
            one.scheduler.bind(tm, caller).schedule(note, key)
            if end == "abort":
                one.executor.wake(False, "ab" * 16)
                tm.abort()
                assert looked.wait(20)
            else:
                tm.commit()
        go.set()
        one.wait("ab" * 16)
    assert CALLS[key] == [None]


def test_job_that_was_put_twice_at_once_is_held_until_it_ends(db, key, at, wait_for):
    """By the hook and by recovery: neither finds it held.  Else nothing would show that it runs."""
    with process("zodb", db, workers=2) as one:
        sid = one.schedule(behind_gate, at)
        GATES[at].reach()
        one.executor.queue.put((sid, FRESH))
        wait_for(one.executor.queue.empty)
        last = one.schedule(note, key)  # taken by the thread that had the other one
        one.wait(last)
        wait_for(lambda: last not in one.executor.held)
        assert one.executor.held == {sid}
        GATES[at].opened.set()
        wait_for(lambda: one.executor.held == set())


class CannotBeAborted(Barrier):
    def abort(self, txn):
        raise OSError("the server has closed the connection")


def leave_behind(key):
    """Leave a data manager in the thread's own transaction, whichever the job has."""
    transaction.manager.get().join(CannotBeAborted(None, None, "~sql"))
    return note(key)


def test_abort_that_fails_ends_no_thread(db, key):
    with process("ram", db, workers=1, surroundings=InManagerOfItsOwn) as one:
        for _ in range(3):
            one.wait(one.schedule(leave_behind, key))
        [thread] = one.executor.threads
        assert thread.is_alive()
    assert CALLS[key] == [None] * 3


class InManagerOfItsOwn(Surroundings):
    def __init__(self):
        super().__init__(transaction.TransactionManager(explicit=True))


def begin_in_the_threads_manager():
    found = pending(transaction.manager)
    transaction.begin()
    return found


def test_what_a_job_leaves_in_the_threads_transaction_is_not_the_next_ones(db):
    with process("ram", db, workers=1, surroundings=InManagerOfItsOwn) as one:
        for _ in range(2):
            sid = one.schedule(begin_in_the_threads_manager)
            one.wait(sid)
            assert one.result(sid) == (None, None)


@pytest.mark.parametrize("workers", [2, 3])  # the third is recovery's, or a worker's
def test_threads_that_cannot_all_be_started_are_none(db, key, monkeypatch, workers):
    """The system has no more threads; those that were started must not add up."""
    begin, started = threading.Thread.start, []

    def start(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    with process("zodb", db, workers=workers) as one:
        one.executor.recovery = one.recovery
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            sid = one.schedule(note, key)
        for thread in started:
            thread.join(10)
            assert not thread.is_alive()
        one.recovery.look()
        one.wait(sid)


# -- stop ----------------------------------------------------------------------------------


def test_running_job_is_told_and_given_back(db, key, at):
    with process("zodb", db, workers=1) as one:
        sid = one.schedule(check_until_told, at, key)
        GATES[at].reach()
        one.executor.stop(5)
        assert [type(error) for error in CALLS[key]] == [JobStopped]
        record = one.record(sid)
        assert (record["status"], record.get("holder"), record.get("attempts", 0)) == (
            "accepted",
            None,
            0,
        )
        assert one.told == []


def test_job_that_ends_in_time_is_not_disturbed(db, key):
    with process("ram", db, workers=1) as one:
        sid = one.schedule(note, key, 1)
        one.wait(sid)
        one.executor.stop(5)
        assert one.result(sid) == (1, None)


def count_and_swallow_the_word(root, name, key):
    count_at_gate(root, name, key)
    with suppress(BaseException):  # as ``asyncio.gather(…, return_exceptions=True)`` does
        current_job().progress(1, 2)


def stopped_while_it_runs(one, f, at, key):
    """Stop with a job at the gate, which opens once the job is told; return the job's status."""
    sid = one.schedule(f, ROOT, at, key)
    GATES[at].reach()
    tell = one.executor.tell

    def tell_and_let_it_end():
        tell()
        GATES[at].opened.set()

    one.executor.tell = tell_and_let_it_end
    one.executor.stop(10)
    assert CALLS[key] == [1]
    return one.status(sid).status


@both_stores
@pytest.mark.parametrize(
    ("f", "status", "count"),
    [(count_at_gate, "successful", 1), (count_and_swallow_the_word, "accepted", None)],
)
def test_job_that_ends_in_the_time_it_is_given_is_kept_if_it_is_whole(
    db, key, at, kind, f, status, count
):
    with process(kind, db, workers=1) as one:
        assert stopped_while_it_runs(one, f, at, key) == status
        assert one.root(lambda root: root.get("n")) == count


def test_stop_takes_no_longer_than_its_time_when_a_job_never_ends(db, at, caplog):
    with process("zodb", db, workers=2) as one:
        sid = one.schedule(behind_gate, at)
        GATES[at].reach()
        begun = time.monotonic()
        one.executor.stop(0.05)
        assert time.monotonic() - begun < 10  # of the 20 s that the gate is shut
        assert f"stopped with jobs still running: {sid}" in caplog.text
        GATES[at].opened.set()


def test_job_that_does_not_end_in_time_is_given_back_and_has_lost_no_attempt(db, key, at):
    with process("zodb", db, workers=1) as one:
        sid = one.schedule(count_at_gate, ROOT, at, key)
        GATES[at].reach()
        one.recovery.beat()
        one.executor.stop(0.01)
        record = one.record(sid)
        assert (record["status"], record.get("attempts", 0), record["holder"]) == (
            "accepted",
            0,
            None,
        )
        with process("zodb", db, workers=1) as other:
            other.recovery.look()
            while len(CALLS[key]) < 2:
                other.executor.threads[0].join(0.005)
            GATES[at].opened.set()
            other.wait(sid)
            for thread in one.executor.threads:
                thread.join(10)
            assert other.status(sid).attempts == 1
            assert other.root(lambda root: root["n"]) == 1
    assert (CALLS[key], one.told) == ([1, 1], [])


def test_job_in_ram_that_does_not_end_in_time_keeps_what_it_does(db, key, at):
    """Nobody else could run it."""
    with process("ram", db, workers=1) as one:
        sid = one.schedule(count_at_gate, ROOT, at, key)
        GATES[at].reach()
        one.executor.stop(0.01)
        GATES[at].opened.set()
        one.wait(sid)
        assert one.status(sid).status == "successful"
        assert one.root(lambda root: root["n"]) == 1


def test_jobs_that_wait_are_not_begun_any_more_and_left_to_who_is_next(db, key, at):
    with process("zodb", db, workers=1) as one:
        one.schedule(behind_gate, at)
        GATES[at].reach()
        waiting = [one.schedule(note, key) for _ in range(3)]
        records = [one.record(sid) for sid in waiting]
        one.executor.tell = GATES[at].opened.set
        one.executor.stop(10)
        assert CALLS[key] == []
        # Not written for that: one process owns the storage.
        assert [one.record(sid) for sid in waiting] == records
        with process("zodb", db, workers=1) as other:
            other.recovery.look()
            for sid in waiting:
                other.wait(sid)


def test_jobs_that_wait_are_given_back_at_once_and_those_that_run_at_the_end(db, key, at, wait_for):
    store = Shared(db)
    store.install()
    one = Process(store, db, workers=1)
    one.executor.recovery = one.recovery
    later = one.schedule(note, key, run_after=3600)
    wait_for(lambda: one.recovery.timed() == [later])
    running = one.schedule(behind_gate, at)
    GATES[at].reach()
    sid = one.schedule(note, key)
    assert one.record(sid)["holder"] == one.record(later)["holder"] == store.process
    stopping = threading.Thread(target=one.executor.stop, args=[20])
    stopping.start()
    wait_for(lambda: one.record(sid).get("holder") is None, 10)  # and not at the end of its time
    assert one.record(one.schedule(note, key)).get("holder") is None
    GATES[at].opened.set()
    stopping.join(20)
    assert one.status(running).status == "successful"
    assert one.record(sid).get("attempts", 0) == 0
    assert one.record(later).get("holder") is None
    other = Process(Shared(db), db)
    other.worker.run(sid, UNHELD)
    assert CALLS[key] == [None]
    for thread in one.executor.threads:
        thread.join(10)


def test_job_whose_time_comes_while_the_process_stops_is_given_back(db, key, at, wait_for):
    """Recovery's thread may be in the midst of a look then."""

    class Looking(Shared):
        def expire(self, now, goes_on):
            if one.recovery.timed():
                GATES[at].pass_through()
                super().expire(now, goes_on)

    now = Clock()
    store = Looking(db, clock=now)
    store.install()
    one = Process(store, db, workers=1)
    one.executor.recovery = one.recovery
    sid = one.schedule(note, key, run_after=60)
    wait_for(lambda: one.recovery.timed() == [sid])
    one.recovery._next["look"] = 0.0
    one.recovery._wake.set()
    GATES[at].reach()
    stopping = threading.Thread(target=one.executor.stop, args=[20])
    stopping.start()
    wait_for(one.recovery._ended)
    now.now += 60
    GATES[at].opened.set()
    stopping.join(20)
    assert one.record(sid).get("holder") is None


def test_job_that_is_taken_the_moment_the_process_stops_waits_for_nobody(
    db, key, monkeypatch, wait_for
):
    """A thread that has just taken it knows nothing of the stop."""
    with process("zodb", db, workers=1) as one:
        run, taken = one.worker.run, threading.Event()

        def late(sid, seen):
            taken.set()
            wait_for(lambda: one.worker.holder is None)
            return run(sid, seen)

        monkeypatch.setattr(one.worker, "run", late)
        monkeypatch.setattr(one.worker, "give_back", lambda sids: None)  # a moment too late for it
        sid = one.schedule(note, key)
        wait_for(taken)
        one.executor.stop(10)
        assert one.status(sid).status == "successful"


def test_jobs_of_all_executors_are_told_before_one_of_them_is_waited_for(db, at):
    with process("zodb", db, workers=1) as one, process("zodb", db, workers=1) as other:
        sid = one.schedule(behind_gate, at)
        GATES[at].reach()
        other.executor.tell = GATES[at].opened.set
        stop_together([one.executor, other.executor])
        assert one.status(sid).status == "successful"


def test_stop_while_the_threads_are_started_stops_them(db, monkeypatch):
    with process("zodb", db, workers=1) as one:
        one.executor.recovery = one.recovery
        start_threads = one.executor._start_threads

        def slow():
            start_threads()
            one.executor.stop(1)

        monkeypatch.setattr(one.executor, "_start_threads", slow)
        one.executor.start()
        for thread in (*one.executor.threads, one.recovery._thread):
            thread.join(10)
            assert not thread.is_alive()


def test_stop_without_a_start_does_nothing(db):
    with process("ram", db, workers=2) as one:
        one.executor.stop()
        one.executor.stop()
        one.executor.start()
        assert worker_threads() == []


def test_suspended_executor_takes_no_jobs_and_tells_the_running_ones(db, key, at, caplog):
    with process("zodb", db, workers=1) as one:
        sid = one.schedule(check_until_told, at, key)
        GATES[at].reach()
        one.recovery.pulse._suspend("the database is gone")
        while one.worker.running:
            one.executor.threads[0].join(0.005)
        later = one.schedule(note, key, "later")
        assert [type(error) for error in CALLS[key]] == [JobStopped]
        assert "no jobs are taken: the database is gone" in caplog.text
        assert one.cancel(sid) is True  # it was given back
        one.executor.suspended = False
        one.recovery.look()
        one.wait(later)


# -- signals -------------------------------------------------------------------------------


@pytest.fixture
def sigterm(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Exit, "asked", False)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_becomes_system_exit_where_nobody_handles_it(sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_on_sigterm()
    with pytest.raises(SystemExit) as left:
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM
    assert Exit.asked  # for who waits


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda signum, frame: None])
def test_sigterm_is_left_to_whoever_handles_it(sigterm, handler):
    signal.signal(signal.SIGTERM, handler)
    exit_on_sigterm()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_is_left_alone_outside_of_the_main_thread(sigterm):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    together(exit_on_sigterm)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_shutdown_of_mod_wsgi_is_noted(monkeypatch, sigterm):
    """It waits for the requests that are held, and kills the process before the jobs are told."""
    subscribed = []
    module = SimpleNamespace(subscribe_shutdown=subscribed.append)
    monkeypatch.setitem(sys.modules, "mod_wsgi", module)
    with Configurator() as config:
        config.include("pyramid_async")
        config.make_wsgi_app()
    (tell,) = subscribed
    tell("process_stopping", shutdown_reason="")
    assert Exit.asked


# -- processes -----------------------------------------------------------------------------

TESTS = Path(__file__).parent
# WebOb imports cgi; Pyramid pkg_resources, and environments of Python 3.12 or later get a
# setuptools that warns of that to users.
OF_OTHERS = ("ignore::DeprecationWarning", "ignore:pkg_resources is deprecated:UserWarning")


def python(program, *args, **options):
    """Run a program in an interpreter of its own and return what it printed, or fail."""
    run = subprocess.run(
        [
            sys.executable,
            *(part for rule in ("error", *OF_OTHERS) for part in ("-W", rule)),
            "-c",
            textwrap.dedent(program),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        **options,
    )
    assert run.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM), run.stderr
    return run


@pytest.mark.slow
def test_pool_is_made_anew_after_a_fork():
    """The parent's threads do not exist in the child, and its queue has no reader."""
    run = python(
        """
        import os, threading, transaction
        from pyramid_async.scheduler import TransactionalScheduler

        def pid():
            return os.getpid()

        def run(scheduler):
            done = threading.Event()
            scheduler.worker.notify = lambda sid, status: status == "successful" and done.set()
            sid = scheduler.schedule(pid)
            transaction.commit()
            assert done.wait(20)
            value, error = scheduler.get_result(sid)
            transaction.commit()
            return value == os.getpid()

        scheduler = TransactionalScheduler()
        identity = scheduler.store.process
        assert run(scheduler)
        child = os.fork()
        if child == 0:
            ok = scheduler.store.process != identity and run(scheduler)
            names = sorted(t.name for t in threading.enumerate() if "worker" in t.name)
            print(ok, len(names), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(run(scheduler))
        """
    )
    assert run.stdout.split() == ["True", "4", "True"]


@pytest.mark.slow
def test_lock_that_was_held_at_the_fork_does_not_hold_the_child():
    run = python(
        """
        import os, threading, transaction
        from pyramid_async.scheduler import TransactionalScheduler

        scheduler = TransactionalScheduler()
        executor = scheduler.executor
        with executor._locks.setdefault(os.getpid(), threading.Lock()):
            child = os.fork()
            if child == 0:
                done = threading.Event()
                scheduler.worker.notify = lambda sid, status: status == "successful" and done.set()
                scheduler.schedule(os.getpid)
                transaction.commit()
                print(done.wait(20), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        """
    )
    assert run.stdout.split() == ["True"]


@pytest.mark.slow
def test_locks_of_the_store_that_were_held_at_the_fork_do_not_hold_the_child():
    run = python(
        """
        import os, threading, transaction
        from pyramid_async.scheduler import TransactionalScheduler

        scheduler = TransactionalScheduler()
        recovery = scheduler.executor.recovery
        locks = [scheduler.store.lock, scheduler.worker.changes._lock, recovery._timers._lock]
        for lock in locks:
            lock.acquire()
        child = os.fork()
        if child == 0:
            later = scheduler.using(run_after=0.05).schedule(os.getpid)
            sid = scheduler.schedule(os.getpid)
            transaction.commit()
            while not (scheduler.completed(sid) and scheduler.completed(later)):
                transaction.abort()
            results = [scheduler.get_result(sid), scheduler.get_result(later)]
            print(results == [(os.getpid(), None)] * 2, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        for lock in locks:
            lock.release()
        """
    )
    assert run.stdout.split() == ["True"]


@pytest.mark.slow
def test_first_use_of_a_persistent_scheduler_at_the_fork_does_not_hold_the_child():
    run = python(
        """
        import os, signal, threading, transaction, ZODB
        from ZODB.MappingStorage import MappingStorage
        from pyramid_async import standalone
        from pyramid_async.scheduler import PersistentTransactionalScheduler

        def use():
            db = ZODB.DB(MappingStorage())
            connection = db.open()
            scheduler = connection.root()["scheduler"] = PersistentTransactionalScheduler()
            transaction.commit()
            print(scheduler.completed("00"), flush=True)
            transaction.abort()
            connection.close()
            db.close()

        def start_slowly(*args):
            started.set()
            assert forked.wait(20)
            return start(*args)

        start, started, forked = standalone._start, threading.Event(), threading.Event()
        standalone._start = start_slowly
        thread = threading.Thread(target=use)
        thread.start()
        assert started.wait(20)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            standalone._start = start
            use()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("child", status)
        forked.set()
        thread.join()
        """
    )
    assert run.stdout.split() == ["None", "child", "0", "None"]


@pytest.mark.slow
def test_zodb_that_was_opened_before_the_fork_is_refused_with_an_explanation(tmp_path):
    run = python(
        """
        import os, sys, transaction, ZODB
        from ZODB.FileStorage import FileStorage
        from pyramid_async.scheduler import Scheduler
        from pyramid_async.standalone import executor_for
        from pyramid_async.worker import Worker
        from pyramid_async.zodb import OpenedBeforeFork, ZodbStore

        db = ZODB.DB(FileStorage(sys.argv[1]))
        store = ZodbStore(db)
        store.install()
        worker = Worker(store)
        scheduler = Scheduler(worker, executor_for(worker, 1))
        before = db.lastTransaction()
        child = os.fork()
        if child == 0:
            for use in (lambda: scheduler.schedule(os.getpid), lambda: scheduler.status("00")):
                try:
                    use()
                except OpenedBeforeFork as error:
                    print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        assert db.lastTransaction() == before
        db.close()
        """,
        tmp_path / "data.fs",
    )
    first, second = run.stdout.splitlines()
    assert first == second
    assert "the ZODB was opened by process" in first
    assert "make the application after the fork" in first


def test_explanation_survives_pickling():
    error = pickle.loads(pickle.dumps(OpenedBeforeFork(1, 2)))
    assert "opened by process 1 and is used by its child 2" in str(error)


# A program that runs jobs; what it does then is added to it.
PROGRAM = """
    import asyncio, os, signal, sys, threading, time, transaction
    from pyramid_async import current_job
    from pyramid_async.scheduler import TransactionalScheduler
    from pyramid_async.exits import exit_on_sigterm

    begun, never = threading.Event(), threading.Event()  # the second is never set

    def idle():
        begun.set()
        never.wait(60)

    def polite():
        begun.set()
        try:
            while True:
                current_job().check()
                never.wait(0.01)
        except BaseException as error:
            print(type(error).__name__, flush=True)
            raise

    async def polite_in_a_pool():
        await asyncio.to_thread(polite)

    async def pooled():
        begun.set()
        while not scheduler.executor.stopped:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(print, "works", flush=True)

    scheduler = TransactionalScheduler()
    scheduler.executor.shutdown_timeout = 0.5
    scheduler.schedule(globals()[sys.argv[1]])
    transaction.commit()
    assert begun.wait(20)
    print("begun", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "printed"),
    [
        ("idle", ["begun"]),
        ("polite", ["begun", "JobStopped"]),
        ("polite_in_a_pool", ["begun", "JobStopped"]),
    ],
)
def test_interpreter_that_exits_is_not_held_by_jobs(job, printed):
    begun = time.monotonic()
    run = python(PROGRAM, job)
    assert run.stdout.split() == printed
    assert run.returncode == 0
    assert time.monotonic() - begun < 30  # the job itself would take twice as long


@pytest.mark.slow
def test_job_that_ends_while_the_process_stops_has_the_pools_of_python():
    run = python(PROGRAM + "    scheduler.executor.shutdown_timeout = 20", "pooled")
    assert run.stdout.split() == ["begun", "works"]


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["concurrent.futures.process", "pyramid_async.threads"])
def test_job_that_ends_while_the_process_stops_has_the_processes_of_a_pool(imported):
    """Whichever is imported first; the thread that manages them is no daemon."""
    run = python(
        f"""
    import {imported}
    """
        + PROGRAM.replace(
            "    scheduler.schedule(",
            """
    async def in_processes():
        begun.set()
        while not scheduler.executor.stopped:
            await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        print(await loop.run_in_executor(processes, abs, -1), flush=True)

    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    threads = ThreadPoolExecutor(1)  # the application's own: no daemons either
    threads.submit(abs, 1)
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    processes.submit(abs, 1).result(20)
    scheduler.executor.shutdown_timeout = 20
    scheduler.schedule(""",
        ),
        "in_processes",
    )
    assert run.stdout.split() == ["begun", "1"]


@pytest.mark.slow
def test_jobs_are_run_as_long_as_a_thread_of_the_application_goes_on():
    run = python(
        PROGRAM
        + """
    def go_on():
        threading.main_thread().join(20)
        done = threading.Event()
        scheduler.schedule(done.set)
        transaction.commit()
        print("ran" if done.wait(20) else "lost", flush=True)

    threading.Thread(target=go_on).start()
    """,
        "idle",
    )
    assert run.stdout.split() == ["begun", "ran"]


@pytest.mark.slow
def test_exit_does_not_wait_for_a_database_that_hangs():
    """The commit of a job holds its storage's lock for good, so nothing can be given back."""
    run = python(
        """
        import atexit, threading, time, transaction, ZODB
        from ZODB.MappingStorage import MappingStorage
        from pyramid_async.scheduler import PersistentTransactionalScheduler

        class Stuck(MappingStorage):
            def tpc_vote(self, transaction):
                if threading.current_thread().name.startswith("pyramid_async-worker"):
                    votes.set()
                    never.wait(60)
                super().tpc_vote(transaction)

        votes, never = threading.Event(), threading.Event()
        begun = []
        atexit.register(lambda: print(time.monotonic() - begun[0]))
        connection = ZODB.DB(Stuck()).open()
        scheduler = connection.root()["scheduler"] = PersistentTransactionalScheduler()
        transaction.commit()
        scheduler._scheduler().executor.shutdown_timeout = 0.5
        scheduler.schedule(time.time)
        transaction.commit()
        assert votes.wait(20)
        begun.append(time.monotonic())
        """
    )
    assert run.returncode == 0
    assert 0.5 <= float(run.stdout) < 4  # one second more than its time-out, on a busy machine


@pytest.mark.slow
def test_the_exit_waits_for_all_schedulers_at_the_same_time():
    run = python(
        """
        import atexit, threading, time, transaction
        from pyramid_async.scheduler import TransactionalScheduler

        exits = []
        atexit.register(lambda: print(time.monotonic() - exits[0]))
        begun, never = threading.Barrier(4), threading.Event()

        def idle():
            begun.wait(20)
            never.wait(60)

        for _ in range(3):
            scheduler = TransactionalScheduler()
            scheduler.executor.shutdown_timeout = 2
            scheduler.schedule(idle)
        transaction.commit()
        begun.wait(20)
        exits.append(time.monotonic())
        """
    )
    assert run.returncode == 0
    assert 2 <= float(run.stdout) < 6  # one after the other they would take that


@pytest.mark.slow
def test_sigterm_drains_and_leaves_with_its_status():
    run = python(
        PROGRAM
        + """
    exit_on_sigterm()
    signal.raise_signal(signal.SIGTERM)
    """,
        "polite",
    )
    assert run.stdout.split() == ["begun", "JobStopped"]
    assert run.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_sigterm_goes_to_the_handler_of_the_application():
    run = python(
        PROGRAM
        + """
    signal.signal(signal.SIGTERM, lambda *args: print("handled", flush=True))
    exit_on_sigterm()
    signal.raise_signal(signal.SIGTERM)
    """,
        "polite",
    )
    assert run.stdout.split() == ["begun", "handled", "JobStopped"]
    assert run.returncode == 0


@pytest.mark.slow
def test_sigterm_ends_a_child_of_multiprocessing_at_once():
    """That of a pool would take SystemExit for the outcome of a call, and never be gone."""
    run = python(
        """
        import multiprocessing, time
        from pyramid_async.exits import exit_on_sigterm

        def deaf(begun):
            try:
                begun.set()
                time.sleep(60)
            except BaseException as error:
                print("goes on after", repr(error), flush=True)

        exit_on_sigterm()
        context = multiprocessing.get_context("fork")
        begun = context.Event()
        child = context.Process(target=deaf, args=[begun])
        child.start()
        assert begun.wait(20)
        child.terminate()
        child.join(20)
        print(child.exitcode)
        """
    )
    assert run.stdout == f"{-signal.SIGTERM}\n"


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pooled_in_processes", "pooled_in_new_processes"])
def test_sigterm_ends_a_child_of_a_job_whatever_the_server_does(job):
    """With gunicorn's handler, which lets the process go on, ``Pool.terminate`` waits for ever."""
    run = python(
        PROGRAM.replace(
            "    scheduler = ",
            """
    def pooled_in_processes():
        with context.Pool(1) as pool:
            pool.map(abs, [-1])
        begun.set()

    def busy():
        at_work.set()
        time.sleep(60)

    def pooled_in_new_processes():
        with context.Pool(1, maxtasksperchild=1) as pool:
            pool.map(abs, [-1])
            pool.apply_async(busy)  # in the second one, which a thread of the pool makes
            at_work.wait(20)
        begun.set()

    import multiprocessing
    context = multiprocessing.get_context("fork")
    at_work = context.Event()
    signal.signal(signal.SIGTERM, lambda *args: None)
    scheduler = """,
        ),
        job,
    )
    assert run.stdout.split() == ["begun"]


@pytest.mark.slow
def test_idle_pool_does_not_hold_the_exit():
    run = python(
        """
        import threading, time, transaction
        from pyramid_async.scheduler import TransactionalScheduler

        scheduler = TransactionalScheduler()
        scheduler.executor.shutdown_timeout = 50
        done = threading.Event()
        scheduler.worker.notify = lambda sid, status: status == "successful" and done.set()
        scheduler.schedule(time.time)
        transaction.commit()
        assert done.wait(20)
        print("done")
        """
    )
    assert run.stdout == "done\n"
    assert run.stderr == ""


# -- nothing is left -----------------------------------------------------------------------


def test_executor_that_is_gone_keeps_nothing_for_the_exit():
    import gc
    import weakref

    scheduler = TransactionalScheduler()
    reference = weakref.ref(scheduler.executor)
    scheduler.executor.start()
    scheduler.stop()
    del scheduler
    gc.collect()
    assert reference() is None


def record_failures_together(monkeypatch, number):
    """Let so many workers hold the connection of their attempt and that of its failure."""
    barrier = threading.Barrier(number)
    record_failure = Worker._record_failure

    def wait_and_record(*arguments):
        barrier.wait(20)
        return record_failure(*arguments)

    monkeypatch.setattr(Worker, "_record_failure", wait_and_record)


def test_pool_of_connections_never_warns(caplog, monkeypatch):
    """All workers fail at the same time and are asked about meanwhile."""
    settings = {
        name: f"memory://{uuid4().hex}?connection_pool_size=1"
        for name in ("zodbconn.uri", "zodbconn.uri.other")
    }
    with Configurator(settings={**settings, "async.workers": "4"}) as config:
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
    config.make_wsgi_app()
    scheduler = config.registry.getUtility(IScheduler)
    record_failures_together(monkeypatch, 4)
    ended = threading.Semaphore(0)
    scheduler.worker.notify = lambda sid, status: status == "failed" and ended.release()
    for _ in range(3):
        with gate() as name:
            sids = [
                scheduler.transact(lambda s: s.schedule(fail_with_other, name)) for _ in range(4)
            ]
            scheduler.transact(lambda s: s.jobs())
        for _ in sids:
            assert ended.acquire(timeout=20)
    scheduler.executor.stop(5)
    for database in config.registry._zodb_databases.values():
        database.close()
    assert pool_warnings(caplog) == []


def test_pool_of_connections_never_warns_of_a_persistent_scheduler(
    db, caplog, wait_for, monkeypatch
):
    record_failures_together(monkeypatch, PersistentTransactionalScheduler.workers)
    connection = db.open()
    scheduler = connection.root()["scheduler"] = PersistentTransactionalScheduler()
    transaction.commit()
    with gate() as name:
        sids = [scheduler.schedule(fail_at_gate, name) for _ in range(scheduler.workers)]
        transaction.commit()
        running = scheduler._scheduler().worker.running
        wait_for(lambda: sum(job.begun for job in list(running.values())) == len(sids))

        def completed():
            transaction.abort()
            return all(scheduler.completed(sid) for sid in sids)

        GATES[name].opened.set()
        wait_for(completed)
    transaction.abort()
    scheduler.stop()
    connection.close()
    assert pool_warnings(caplog) == []


def test_each_persistent_scheduler_makes_room_for_its_connections_once(db):
    connection, before = db.open(), db.getPoolSize()
    for name in ("first", "second"):
        connection.root()[name] = PersistentTransactionalScheduler()
    transaction.commit()
    for _ in range(3):
        for name in ("first", "second"):
            connection.root()[name].completed("0" * 32)
            connection.root()[name].stop()
    assert db.getPoolSize() == before + 2 * (2 * PersistentTransactionalScheduler.workers + 2)
    connection.close()


def test_a_database_is_watched_once_for_its_end(db):
    connection, scheduler = db.open(), PersistentTransactionalScheduler()
    connection.root()["scheduler"] = scheduler
    transaction.commit()
    for _ in range(2):
        scheduler.completed("0" * 32)
        scheduler.stop()
    assert db.close.__name__ == "stop_and_close"
    [inner] = [c.cell_contents for c in db.close.__closure__ if callable(c.cell_contents)]
    assert inner.__name__ == "close"
    connection.close()


def test_root_of_the_database_is_reached_by_jobs_of_every_thread(db, key):
    with process("zodb", db, workers=4) as one:
        sids = [one.schedule(note_root, ROOT, key) for _ in range(8)]
        for sid in sids:
            one.wait(sid)
    assert len(CALLS[key]) == 8
    assert len({id(jar) for jar in CALLS[key]}) <= 4


def note_root(root, key):
    CALLS[key].append(root._p_jar)


def test_child_does_not_run_the_jobs_that_wait_in_its_parents_ram():
    script = """
        import os, threading, time
        import transaction
        from pyramid_async.scheduler import TransactionalScheduler

        ran, gate = os.pipe(), os.pipe()
        scheduler = TransactionalScheduler()
        scheduler.workers = scheduler.executor.workers = 1
        scheduler.executor.recovery.interval = 0.02

        def hold():
            os.read(gate[0], 1)

        def note(name):
            os.write(ran[1], f"{name} {os.getpid()};".encode())

        scheduler.schedule(hold)
        scheduler.schedule(note, "parents")
        transaction.commit()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            sid = scheduler.schedule(note, "childs")
            transaction.commit()
            while not scheduler.completed(sid):
                time.sleep(0.005)
            for _ in range(3):
                scheduler.executor.recovery.look()
            os._exit(0)
        os.waitpid(child, 0)
        os.write(gate[1], b"x")
        scheduler.stop(5)
        os.close(ran[1])
        said = os.read(ran[0], 1000).decode().split(";")[:-1]
        assert f"parents {child}" not in said, said
        assert f"childs {child}" in said, said
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("child", "status", "logged"),
    [
        ("return 'the child'", 1, True),
        ("os.execv('/no/such/program', ['x'])", 1, True),
        ("sys.exit()", 0, False),
        ("sys.exit(3)", 3, False),
        ("sys.exit('oh')", 1, False),
        ("print('x' * 9, end=''); sys.exit(2 ** 31)", 0, False),
    ],
)
def test_child_that_a_job_forks_does_not_go_on_in_our_code(child, status, logged):
    run = python(
        f"""
        import logging, os, sys
        from pyramid_async.tries import call_function

        logging.basicConfig(stream=sys.stdout, format="%(message)s")

        def fork():
            child = os.fork()
            if child == 0:
                {child}
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        print("the child's status:", call_function(fork, (), {{}}))
        """
    )
    assert run.stdout.endswith(f"the child's status: {status}\n")
    assert ("did not end by os._exit" in run.stdout) == logged
    assert ("Traceback" in run.stdout) == ("execv" in child)
    assert "NoneType" not in run.stdout
    assert ("x" * 9 in run.stdout) == ("print" in child)
    assert ("oh" in run.stderr) == ("oh" in child)
