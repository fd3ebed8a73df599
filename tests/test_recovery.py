"""Jobs that nobody runs or nobody received; signs of life; expiry; bad records."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
from bare import (
    CALLS,
    ROOT,
    Clock,
    Foreign,
    Newer,
    Process,
    Shared,
    check_until_told,
    process,
    store_of,
    together,
)
from persistent import Persistent
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from webapp import GATES, Barrier, gate
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ConflictError

from pyramid_async import current_job, manage, recovery
from pyramid_async.current import Job
from pyramid_async.hints import Hints
from pyramid_async.interfaces import JobTaken
from pyramid_async.jobs import FRESH, Live
from pyramid_async.recovery import ARCHIVE_AFTER
from pyramid_async.scheduler import Scheduler
from pyramid_async.signs import Sign
from pyramid_async.standalone import executor_for
from pyramid_async.transactional import transact
from pyramid_async.tries import Try
from pyramid_async.worker import Worker
from pyramid_async.zodb import BATCH, HAUNTED, ZodbStore, ZodbTable

LEASE = 60.0


def note(key, value=None):
    CALLS[key].append(current_job().attempt)
    return value


def count_behind_gate(root, key, name):
    CALLS[key].append(current_job().attempt)
    root["n"] = root.get("n", 0) + 1
    GATES[name].pass_through()


def tell_and_wait(name, percent):
    current_job().progress(percent, 100, "half way")
    GATES[name].pass_through()


class Machines:
    """Several processes on one database, which share a clock that the test moves."""

    def __init__(self, db):
        self.db = db
        self.monotonic = Clock(0.0)
        self.clock = Clock()
        self.made = []

    def process(self, workers=1):
        store = Shared(self.db, clock=self.clock)
        store.install()
        made = Process(store, self.db, workers, monotonic=self.monotonic, lease=LEASE)
        made.executor.start()
        self.made.append(made)
        return made

    def pass_time(self, seconds):
        self.monotonic.now += seconds
        self.clock.now += seconds

    def close(self):
        for made in self.made:
            made.stop()
        for made in self.made:
            for thread in made.executor.threads:
                thread.join(10)


@pytest.fixture
def machines(db):
    made = Machines(db)
    yield made
    for each in list(GATES.values()):
        each.opened.set()
    made.close()


@contextmanager
def frozen(process, key, at, f=count_behind_gate):
    """A job of a process that stands still: it shows no more signs of life."""
    sid = process.schedule(f, ROOT, key, at)
    GATES[at].reach()
    process.recovery.beat()
    yield sid
    GATES[at].opened.set()


def read_signs(process):
    """Return what the signs of life say: process -> (beat, sids that it lists)."""
    with process.transaction() as (table, _):
        return {name: s and (s.beat, set(s.running)) for name, s in table.signs()}


# -- jobs that nobody received -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_job_whose_hook_never_ran_is_found(db, key, kind):
    """The process had no thread left, or the reply to the commit killed the request's thread."""
    with process(kind, db, workers=1) as one:
        sid = one.plant(note, key)
        assert one.executor.held == set()
        one.recovery.look()
        one.wait(sid)
        assert CALLS[key] == [1]


def test_job_that_nobody_holds_is_taken_up(machines, key):
    one = machines.process()
    sid = one.plant(note, key, run_after=10)
    one.record(sid, holder=None)
    one.recovery.look()
    assert one.executor.held == set()
    machines.pass_time(11)
    one.recovery.look()
    one.wait(sid)
    assert CALLS[key] == [1]


def test_job_that_nobody_holds_is_left_alone_for_a_while_where_bells_are_under_way(machines, key):
    one = machines.process()
    one.executor.grace = 5.0
    sid = one.plant(note, key)
    one.record(sid, holder=None)
    machines.pass_time(4.9)
    one.recovery.look()
    assert one.executor.held == set()
    machines.pass_time(0.1)
    one.recovery.look()
    one.wait(sid)
    assert CALLS[key] == [1]


def test_job_whose_time_has_come_is_left_alone_for_a_while_too(machines, key):
    one = machines.process()
    one.executor.grace = 5.0
    sid = one.plant(note, key, run_after=100)
    one.record(sid, holder=None)
    machines.pass_time(104.9)
    one.recovery.look()
    assert one.executor.held == set()
    machines.pass_time(0.1)
    one.recovery.look()
    one.wait(sid)


@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_job_of_a_machine_whose_clock_is_ahead_waits_for_the_grace_alone(machines, key, grace):
    one = machines.process()
    one.executor.grace = grace
    sid = plant_ahead(machines, 3600, key)
    machines.pass_time(grace)
    one.recovery.look()
    one.wait(sid)
    assert CALLS[key] == [1]


def test_job_of_a_machine_whose_clock_is_a_little_ahead_waits_a_little_longer(machines, key):
    one = machines.process()
    one.executor.grace = 5.0
    sid = plant_ahead(machines, 2, key)
    for seconds in (0, 5, 1.9):
        machines.pass_time(seconds)
        one.recovery.look()
        assert one.executor.held == set()
    machines.pass_time(0.1)
    one.recovery.look()
    one.wait(sid)


def plant_ahead(machines, seconds, key):
    """Schedule a job for whoever takes it, on a machine whose clock is ahead."""
    other = machines.process(workers=0)
    other.store.clock = Clock(machines.clock.now + seconds)
    other.worker.keeps = False
    return other.plant(note, key)


def test_look_counts_the_due_jobs_that_are_nobodys(machines, key, at):
    one, other = machines.process(workers=0), machines.process()
    one.executor.grace = 5.0
    with unclaimed(other, key, at):  # it is nobody's until it is shown
        one.recovery.look()
        assert one.recovery.unbegun == 1
        other.recovery.beat()
        one.recovery.look()
        assert one.recovery.unbegun == 0
        waiting = [other.plant(note, key) for _ in range(3)]  # in the broker's queue
        other.plant(note, key, run_after=60)
        other.cancel(other.plant(note, key))
        other.die(other.plant(note, key))
        one.plant(note, key)  # in its own queue
        one.recovery.look()
        assert one.recovery.unbegun == len(waiting)
        machines.pass_time(60)
        other.recovery.beat()
        one.recovery.look()
        assert one.recovery.unbegun == len(waiting) + 1


def test_job_of_this_process_that_is_to_wait_gets_a_timer(machines, key):
    one = machines.process()
    sid = one.plant(note, key, run_after=100)
    one.recovery.look()
    assert one.recovery.timed() == [sid]


def test_job_that_waits_in_this_process_is_not_taken_twice(db, key, at):
    with process("zodb", db, workers=1) as one:
        blocking = one.schedule(count_behind_gate, ROOT, key, at)
        GATES[at].reach()
        sid = one.schedule(note, key)
        for _ in range(3):
            one.recovery.look()
        assert one.executor.queue.qsize() == 1
        GATES[at].opened.set()
        one.wait(blocking)
        one.wait(sid)
        assert CALLS[key] == [1, 1]


def test_attempt_of_this_process_that_ended_without_a_word_is_repeated(db, key):
    with process("zodb", db, workers=1) as one:
        sid = one.plant(note, key)
        one.record(
            sid,
            status="running",
            holder=one.store.process,
            signature="lost",
            attempts=1,
        )
        one.recovery.look()
        one.wait(sid)
        assert CALLS[key] == [2]


@pytest.mark.parametrize(("took", "pause"), [(0.1, 5.0), (2.0, 18.0), (60.0, LEASE)])
def test_looks_take_a_tenth_of_the_time_but_are_never_further_apart_than_a_lease(
    machines, took, pause
):
    recovery = machines.process().recovery
    recovery.look = lambda: machines.pass_time(took)
    assert recovery._turn(recovery.look, 5.0) == pytest.approx(pause)


@pytest.mark.parametrize("error", [ConflictError, OSError])
def test_a_look_that_failed_is_not_put_off_however_long_it_took(machines, error):
    recovery = machines.process().recovery

    def look():
        machines.pass_time(10)
        raise error

    recovery.look = look
    assert recovery._turn(recovery.look, 5.0) == 5.0


@pytest.mark.parametrize("step", ["tell", "beat"])
def test_no_other_step_is_put_off_however_long_it_took(machines, step):
    recovery = machines.process().recovery
    setattr(recovery, step, lambda: machines.pass_time(10))
    assert recovery._turn(getattr(recovery, step), 1.0) == 1.0


@pytest.mark.parametrize(("step", "since"), [("archive_all", 0), ("expire_batch", HAUNTED + 200)])
def test_look_with_much_to_put_away_is_no_silence(machines, key, at, monkeypatch, step, since):
    one, other = machines.process(), machines.process()
    with one.transaction() as (table, _):
        bound = one.scheduler.using(tm=table.tm)
        for _ in range(4 * BATCH):
            bound.cancel(bound.schedule(note, key))
    machines.pass_time(ARCHIVE_AFTER)
    if since:
        one.recovery.look()
        machines.pass_time(since)
    take = getattr(ZodbTable, step)

    def take_long(*args, **kw):
        machines.pass_time(LEASE / 2)
        transact(other.store, other.recovery._look)
        return take(*args, **kw)

    with frozen(one, key, at) as sid:
        monkeypatch.setattr(ZodbTable, step, take_long)
        one.recovery.look()
        assert not other.executor.held
        assert one.status(sid).attempts == 0


def test_look_with_much_to_put_away_ends_with_the_process(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock) as one:
        with one.transaction() as (table, _):
            bound = one.scheduler.using(tm=table.tm)
            for _ in range(2 * BATCH):
                bound.cancel(bound.schedule(note, key))
        clock.now += ARCHIVE_AFTER
        one.recovery._ended.set()
        one.recovery.look()
        assert trees(one) == (BATCH, BATCH, BATCH)


def test_look_at_many_jobs_is_no_silence(machines, key, at, monkeypatch):
    monkeypatch.setattr("pyramid_async.recovery.AT_ONCE", 1)
    one, other = machines.process(), machines.process()
    inspect = one.recovery._inspect

    def take_long(*args):
        machines.pass_time(LEASE / 2)
        transact(other.store, other.recovery._look)
        return inspect(*args)

    with frozen(one, key, at) as sid:
        for _ in range(4):
            one.cancel(one.plant(note, key))
        one.recovery._inspect = take_long
        one.recovery.look()
        assert not other.executor.held
        assert one.status(sid).attempts == 0


def test_look_at_many_jobs_puts_nothing_else_off(machines, key, at, monkeypatch):
    monkeypatch.setattr("pyramid_async.recovery.AT_ONCE", 1)
    one, other = machines.process(), machines.process()
    due = one.plant(note, key, run_after=10.0)
    one.recovery.look()
    inspect = one.recovery._inspect

    def take_long(*args):
        machines.pass_time(11)
        return inspect(*args)

    monkeypatch.setattr(one.recovery, "_inspect", take_long)
    with frozen(one, key, at) as sid:
        other.cancel(sid)
        job = one.worker.running[sid]
        one.recovery.look()
        with pytest.raises(JobTaken):
            job.check()
        assert due in one.executor.held


def test_processes_that_beat_in_the_midst_of_a_long_look_are_not_taken_for_dead(
    machines, key, monkeypatch
):
    """As where our own sign of life waits for a server that the others do reach."""
    monkeypatch.setattr("pyramid_async.recovery.AT_ONCE", 1)
    one, other, dead = (machines.process() for _ in range(3))
    for _ in range(4):
        other.plant(note, key)
    lost = dead.plant(note, key)
    other.executor.held.add("a job")  # so it shows signs of life

    def wait_for_server():
        machines.pass_time(LEASE + 1)
        other.recovery.beat()

    other.recovery.beat()
    monkeypatch.setattr(one.recovery, "beat", wait_for_server)
    monkeypatch.setattr(one.executor, "put", lambda sid, *args: CALLS[key].append(sid))
    one.recovery.look()
    assert CALLS[key] == []
    one.recovery.look()
    assert CALLS[key] == [lost]


# -- jobs that a process runs without a claim ------------------------------------------------


@contextmanager
def unclaimed(process, key, at):
    """A job that the process runs from a broker's queue."""
    process.worker.keeps = False
    process.executor.held = process.worker.running
    sid = process.plant(count_behind_gate, ROOT, key, at)
    with process.standing_at(at, sid):
        yield sid


def test_what_has_run_for_a_second_is_shown_at_once_and_only_once(machines, key, at):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        one.recovery.tell()
        assert (read_signs(other), other.status(sid).status) == ({}, "accepted")
        machines.pass_time(1)
        for _ in range(3):
            one.recovery.tell()
        assert read_signs(other) == {one.store.process: (1, {sid})}
        assert other.status(sid).status == "running"
    assert one.told == [(sid, "successful")]


def test_what_has_run_for_a_second_is_shown_beside_what_was_shown_before(machines, key, at):
    one = machines.process()
    with unclaimed(one, key, at), gate() as second:
        machines.pass_time(1)
        one.recovery.tell()
        with unclaimed(one, key, second) as sid:
            machines.pass_time(1)
            one.recovery.tell()
            assert sid in read_signs(one)[one.store.process][1]


def test_a_clock_that_was_put_back_does_not_hide_what_runs(machines, key, at):
    one = machines.process()
    with unclaimed(one, key, at) as sid:
        machines.clock.now -= 3600
        one.recovery.tell()
        assert read_signs(one) == {one.store.process: (1, {sid})}


def test_what_had_not_begun_when_it_was_listed_is_shown_later(machines, key, at):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        job = one.worker.running[sid]
        read, job.revision = job.revision, None
        one.recovery.beat()
        assert other.status(sid).status == "accepted"
        job.revision = read
        machines.pass_time(1)
        one.recovery.tell()
        assert other.status(sid).status == "running"


class Refuses(Barrier):
    """A data manager whose server is gone when it comes to the vote."""

    def tpc_vote(self, txn):
        raise OSError("the backend was terminated")


def test_what_was_in_a_sign_that_did_not_commit_is_shown_by_the_next_one(
    machines, key, at, monkeypatch
):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        machines.pass_time(1)
        table = one.store.table

        def refusing(tm, *connect):
            tm.get().join(Refuses(None, None, "~~last"))
            return table(tm, *connect)

        with monkeypatch.context() as patch:
            patch.setattr(one.store, "table", refusing)
            with pytest.raises(OSError, match="the backend was terminated"):
                one.recovery.beat()
        assert other.status(sid).status == "accepted"
        one.recovery.tell()
        assert other.status(sid).status == "running"
        assert read_signs(other)[one.store.process][1] == {sid}


def test_nothing_is_shown_where_nobody_could_see_it(db, key, at):
    clock = Clock()
    with process("zodb", db, clock=clock) as one, unclaimed(one, key, at):
        clock.now += 5
        one.recovery.tell()
        assert read_signs(one) == {}


def test_what_a_living_process_shows_is_left_alone(machines, key, at):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        for _ in range(10):
            machines.pass_time(10)
            one.recovery.tell()
            one.recovery.beat()
            other.recovery.look()
        assert other.executor.held == set()
    assert (CALLS[key], one.told) == ([1], [(sid, "successful")])


def test_what_a_silent_process_showed_is_rescued(machines, key, at, wait_for):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        one.recovery.beat()
        other.recovery.look()
        machines.pass_time(LEASE)
        other.recovery.look()
        assert other.executor.held == set()
        machines.pass_time(1)
        other.recovery.look()
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)
    assert CALLS[key] == [1, 2]
    assert (one.told, other.told) == ([], [(sid, "successful")])
    assert other.root(lambda root: root["n"]) == 1


def test_sign_of_an_attempt_is_kept_by_a_process_that_has_no_room_for_its_job(machines, key, at):
    one, other = machines.process(), machines.process()
    with unclaimed(one, key, at) as sid:
        one.recovery.beat()
        other.executor.room = lambda: 0
        for _ in range(3):
            other.recovery.look()
            machines.pass_time(LEASE + 1)
        assert read_signs(other) == {one.store.process: (1, {sid})}


def test_no_sign_is_read_for_a_job_that_has_ended(machines, key, monkeypatch):
    """Nobody holds it, so each list of ended jobs would read those of all processes."""
    one, other = machines.process(), machines.process()
    sid = one.schedule(note, key)
    one.wait(sid)
    asked = []
    monkeypatch.setattr(ZodbTable, "signs", lambda table: asked.append(sid) or iter(()))
    assert other.status(sid).status == "successful"
    assert asked == []


def test_what_was_given_back_waits_for_no_sign_to_age(machines, key):
    one, other = machines.process(), machines.process()
    sid = one.plant(note, key)
    one.record(sid, holder=None)
    with one.transaction() as (table, _):
        one.recovery.pulse._beat(table)
        table.sign(one.store.process).running = {sid: Live(1.0, 1.0, 1, revision=1)}
    other.recovery.look()
    assert other.executor.held == set()
    with one.transaction() as (table, _):
        table.get(sid).release(machines.clock())
    other.recovery.look()
    other.wait(sid)


# -- jobs whose record could not be read -----------------------------------------------------


# The error, and how many attempts of four are made: of those that the storage spoils three.
OUTAGES = {
    "disconnected": (ClientDisconnected, 4),
    "a conflict": (TransientError, 4),
    "an error": (OSError, 3),
}


@pytest.fixture(params=OUTAGES)
def outage(request):
    """A kind of attempt that cannot read the record; it counts how often it tries."""
    error, most = OUTAGES[request.param]

    class Away(Try):
        tried, expected = 0, most

        def _read(self):
            Away.tried += 1
            raise error("the storage is away")

    return Away


@pytest.mark.parametrize("claimed", [False, True])
def test_job_that_an_outage_kept_from_its_beginning_is_given_back(
    machines, key, outage, claimed, caplog
):
    caplog.set_level("INFO")
    one = machines.process()
    one.worker.conflict_attempts = 4
    sid = one.plant(note, key)
    seen = one.die(sid) if claimed else FRESH
    before = one.status(sid).attempts
    one.worker.make_try = outage
    one.worker.run(sid, seen)
    assert outage.tried == outage.expected
    status = one.status(sid)
    assert (status.status, status.attempts, status.failure) == ("accepted", before, None)
    assert (one.told, "errorID" in caplog.text) == ([], False)
    assert f"job {sid!r} is given back" in caplog.text
    one.worker.make_try = Try
    one.recovery.look()
    one.wait(sid)
    assert (CALLS[key], one.told) == ([before + 1], [(sid, "successful")])


def test_job_whose_last_attempts_met_an_outage_is_given_back_too(machines, key, outage):
    one = machines.process()
    one.worker.conflict_attempts = 4
    sid = one.plant(conflict_before_an_outage, key)
    tries = iter([Try])
    one.worker.make_try = lambda *args: next(tries, outage)(*args)
    one.worker.run(sid)
    assert (CALLS[key], one.status(sid).status, one.told) == ([1], "accepted", [])


def test_job_that_is_told_to_stop_in_an_outage_is_not_tried_again(machines, key, outage, caplog):
    caplog.set_level("INFO")
    one = machines.process()
    sid = one.plant(note, key)

    class Stopped(outage):
        def _read(self):
            one.worker.interrupt_all("the process stops")
            super()._read()

    one.worker.make_try = Stopped
    one.worker.run(sid)
    assert (Stopped.tried, one.status(sid).status, one.told) == (1, "accepted", [])
    assert f"job {sid!r} is given back" in caplog.text


def conflict_before_an_outage(key):
    note(key)
    raise ConflictError


# -- processes that died -------------------------------------------------------------------


def test_job_of_a_process_that_is_gone_is_rescued_at_once_where_one_process_owns_the_storage(
    db, key
):
    with process("zodb", db, workers=1) as one:
        assert one.store.exclusive
        sid = one.plant(note, key)
        one.die(sid)
        one.recovery.look()
        one.wait(sid)
        assert CALLS[key] == [2]


def test_storage_of_one_process_is_one_in_a_storage_that_transforms_its_records_too(db):
    """As zc.zlibstorage does; a job would wait for a lease after each crash."""
    transforming = SimpleNamespace(base=db.storage)
    assert ZodbStore(SimpleNamespace(storage=transforming, databases={"": db})).exclusive


def test_job_of_another_store_of_this_very_process_is_not_rescued(db, key, at):
    """Two applications, or an application and a script, on one database."""
    with process("zodb", db, workers=1) as one, process("zodb", db, workers=1) as other:
        sid = one.schedule(count_behind_gate, ROOT, key, at)
        GATES[at].reach()
        other.recovery.look()
        assert other.executor.held == set()
        GATES[at].opened.set()
        one.wait(sid)
        assert CALLS[key] == [1]


def test_silent_process_is_rescued_after_a_lease_and_not_before(machines, key, at, wait_for):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        other.recovery.look()
        for _ in range(6):
            machines.pass_time(10)
            other.recovery.look()
            assert other.executor.held == set()
        machines.pass_time(0.1)
        other.recovery.look()
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)
    # The first attempt needed no claim; it counts, because a sign of life has shown it.
    assert CALLS[key] == [1, 2]
    assert one.told == []
    assert other.root(lambda root: root["n"]) == 1


def test_the_time_that_the_observer_stood_still_does_not_count(machines, key, at, wait_for):
    """All were stopped together, and the others have had no time yet to show life."""
    one, other = machines.process(), machines.process()
    wake = SimpleNamespace(wait=lambda pause: machines.pass_time(pause + 10 * LEASE))
    with frozen(one, key, at) as sid:
        other.recovery.look()
        other.recovery._wake = wake
        other.recovery._rest(1.0)
        other.recovery.look()
        assert other.executor.held == set()
        machines.pass_time(LEASE)
        other.recovery.look()
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)


def test_the_time_that_its_own_jobs_take_from_the_observer_does_count(machines, key, at, wait_for):
    """Those that keep the interpreter for seconds, say."""
    one, other = machines.process(), machines.process()
    wake = SimpleNamespace(wait=lambda pause: machines.pass_time(pause + 9))
    with frozen(one, key, at) as sid:
        other.recovery.look()
        other.recovery._wake = wake
        for _ in range(7):
            other.recovery._rest(1.0)
        other.recovery.look()
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)


def test_processes_of_a_pool_know_together_who_is_silent(machines, key, at, wait_for):
    """One that is renewed every few jobs lives no lease itself."""
    one, hints = machines.process(), Hints()
    with frozen(one, key, at) as sid:
        for seconds in (LEASE / 2, LEASE / 2, 1, 0):
            assert CALLS[key] == [1]
            other = machines.process()
            other.recovery.hints = hints
            other.recovery.look()
            machines.pass_time(seconds)
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)


def test_a_process_of_a_pool_wakes_what_its_predecessor_was_to_wake(machines, key):
    hints, one = Hints(), machines.process()
    one.recovery.hints = hints
    sid = one.plant(note, key, run_after=10)
    one.record(sid, holder=None)
    one.recovery.later(one.store.clock() + 10, sid)
    one.recovery.hand_over()
    two, three = machines.process(), machines.process()
    for other in (two, three):
        other.recovery.hints = hints
        other.recovery.look()
    assert (two.recovery.timed(), three.recovery.timed()) == ([sid], [])


def test_what_a_pool_observed_long_ago_counts_for_nothing(machines, key, at):
    """The process had no sign of life then, and has a job again."""
    one, hints = machines.process(), Hints()
    hints.write({"at": 0.0, "observed": {one.store.process: (None, 0.0)}})
    machines.pass_time(LEASE + 1)
    sid = one.schedule(count_behind_gate, ROOT, key, at)
    GATES[at].reach()
    other = machines.process()
    other.recovery.hints = hints
    one.record(sid, holder=one.store.process)
    other.recovery.look()
    assert other.executor.held == set()
    GATES[at].opened.set()


def test_hints_that_are_half_written_are_none():
    hints = Hints(64)
    assert hints.read() == {}
    hints.write({"process": (1, 2.5)})
    hints.write({"process": "too long for the room that there is" * 2})
    assert hints.read() == {"process": [1, 2.5]}
    hints._bytes[12:13] = b"#"
    assert hints.read() == {}


def test_process_that_shows_life_keeps_its_job_as_long_as_it_takes(machines, key, at):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        for _ in range(30):
            machines.pass_time(10)
            one.recovery.beat()
            other.recovery.look()
        assert other.executor.held == set()
    one.wait(sid)
    assert CALLS[key] == [1]


def test_clocks_of_other_machines_are_not_believed(machines, key, at, wait_for):
    """A wall clock that is years off, in either direction, kills nobody and saves nobody."""
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        other.recovery.look()
        for now in (0.0, 1e12):
            machines.clock.now = now
            other.recovery.look()
            assert other.executor.held == set()
        machines.clock.now = 1_000_000.0
        machines.monotonic.now += LEASE + 1
        other.recovery.look()
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)


def test_process_without_any_sign_of_life_is_given_a_lease(machines, key):
    other = machines.process()
    sid = other.plant(note, key)
    other.die(sid)
    other.recovery.look()
    machines.pass_time(LEASE)
    other.recovery.look()
    assert other.executor.held == set()
    machines.pass_time(1)
    other.recovery.look()
    other.wait(sid)
    assert CALLS[key] == [2]


def test_frozen_process_that_wakes_after_its_lease_leaves_no_effects(machines, key, at):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        other.recovery.look()
        machines.pass_time(LEASE + 1)
        with other.transaction() as (table, _):
            record = table.get(sid)
            assert record.holder == one.store.process
            revision = record.revision
        rescue = threading.Thread(target=other.worker.run, args=[sid, revision])
        rescue.start()
        while len(CALLS[key]) < 2:
            rescue.join(0.005)
        GATES[at].opened.set()
        rescue.join(10)
    for thread in one.executor.threads:
        thread.join(0.01)
    other.wait(sid)
    assert other.root(lambda root: root["n"]) == 1
    assert (one.told, other.told) == ([], [(sid, "successful")])


def test_rescue_by_many_processes_at_once_is_one_rescue(machines, key, at):
    dead = machines.process()
    others = [machines.process() for _ in range(4)]
    sid = dead.plant(note, key)
    dead.die(sid)
    for other in others:
        other.recovery.look()
    machines.pass_time(LEASE + 1)
    together(*[other.recovery.look for other in others])
    while dead.status(sid).status != "successful":
        for other in others:
            other.ended[sid].wait(0.005)
    for other in others:
        other.stop()
    assert CALLS[key] == [2]
    assert len([told for other in others for told in other.told]) == 1


def test_job_that_its_living_process_does_not_list_is_rescued(machines, key, at):
    """The reply to its claim was lost: the record says running and nobody runs it."""
    with gate() as busy:
        one, other = machines.process(), machines.process()
        one.schedule(count_behind_gate, ROOT, key, busy)
        GATES[busy].reach()
        sid = one.plant(note, key)
        one.record(
            sid,
            status="running",
            holder=one.store.process,
            signature="lost",
            attempts=1,
        )
        for _ in range(2):
            one.recovery.beat()
            other.recovery.look()
            assert other.executor.held == set()
        one.recovery.beat()
        other.recovery.look()
        other.wait(sid)
        assert CALLS[key] == [1, 2]


def test_newer_attempt_at_an_unlisted_job_is_given_its_two_beats_too(machines, key):
    with gate() as busy:
        one, other = machines.process(), machines.process()
        one.schedule(count_behind_gate, ROOT, key, busy)
        GATES[busy].reach()
        sid = one.plant(note, key)
        for signature in ("lost", "newer", "newer"):
            one.record(sid, status="running", holder=one.store.process, signature=signature)
            one.recovery.beat()
            other.recovery.look()
            assert other.executor.held == set()
        one.recovery.beat()
        other.recovery.look()
        other.wait(sid)


def test_job_that_waits_in_a_living_process_is_not_unlisted(machines, key, at):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at):
        sid = one.schedule(note, key)
        for _ in range(5):
            one.recovery.beat()
            other.recovery.look()
        assert other.executor.held == set()
    one.wait(sid)


def test_unlisted_job_that_is_listed_again_is_left_alone(machines, key, at):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        job = one.worker.running.pop(sid)
        one.record(sid, status="running", signature=job.signature)
        one.recovery.beat()
        other.recovery.look()
        one.worker.running[sid] = job
        for _ in range(4):
            one.recovery.beat()
            other.recovery.look()
        assert other.executor.held == set()


def test_job_of_a_process_that_never_gave_a_sign_is_waited_for_quietly(machines, key, caplog):
    one = machines.process()
    sid = one.plant(note, key)
    one.die(sid)
    one.recovery.look()
    machines.pass_time(LEASE)
    one.recovery.look()
    assert (one.executor.held, caplog.messages) == (set(), [])
    machines.pass_time(1)
    one.recovery.look()
    one.wait(sid)
    assert CALLS[key] == [2]


# -- signs of life -------------------------------------------------------------------------


def test_sign_lists_what_runs_and_shows_its_progress_to_others(machines, key, at):
    one, other = machines.process(), machines.process()
    sid = one.schedule(tell_and_wait, at, 50)
    GATES[at].reach()
    assert other.status(sid).status == "accepted"
    one.recovery.beat()
    status = other.status(sid)
    assert (status.status, status.progress, status.message) == ("running", 50, "half way")
    assert read_signs(other) == {one.store.process: (1, {sid})}
    with other.transaction() as (table, _):
        assert table.sign(one.store.process).at == machines.clock.now
    GATES[at].opened.set()
    one.wait(sid)


def test_sign_does_not_write_the_record(machines, key, at):
    """A heartbeat on the record would doom the job."""
    one = machines.process()
    with frozen(one, key, at) as sid:
        for _ in range(3):
            one.recovery.beat()
    one.wait(sid)
    assert CALLS[key] == [1]
    assert one.status(sid).status == "successful"


def test_one_commit_for_each_sign(machines, key, at):
    one = machines.process()
    with frozen(one, key, at):
        before = one.commits()
        one.recovery.beat()
        assert one.commits() == before + 1
        [*_, last] = one.db.storage.iterator()
        assert len(list(last)) == 1


def test_process_that_has_nothing_to_do_falls_silent_and_then_writes_nothing(machines, key, at):
    one = machines.process()
    with frozen(one, key, at) as sid:
        assert set(read_signs(one)) == {one.store.process}
    one.wait(sid)
    while one.executor.held:
        one.executor.threads[0].join(0.005)
    one.recovery.beat()
    assert read_signs(one) == {}
    before = one.db.lastTransaction()
    one.recovery.beat()
    assert one.db.lastTransaction() == before


def test_process_that_stops_leaves_no_sign_of_life(machines, key, at):
    """It would be shown as one that hangs, with the jobs that it gave back."""
    one, other = machines.process(), machines.process(workers=0)
    one.executor.recovery = one.recovery
    with frozen(one, key, at) as sid:
        one.executor.stop(0)
        assert read_signs(other) == {}
        assert other.status(sid).status == "accepted"


def test_process_that_stops_after_its_database_makes_no_fuss_about_its_sign(
    machines, key, at, caplog
):
    one = machines.process()
    one.executor.recovery = one.recovery
    with frozen(one, key, at) as sid:
        pass
    one.wait(sid)
    one.db.close()
    one.executor.stop(5)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_sign_that_is_shown_again_after_a_silence_counts_on(machines):
    """To who last saw it before that silence the same number would mean that it stood still."""
    one = machines.process()
    beats = []
    for held in ({"job"}, set(), {"job"}, set()):
        one.executor.held = held
        one.recovery.beat()
        beats += [beat for beat, _ in read_signs(one).values()]
    assert beats == [1, 2]


def test_no_sign_is_written_where_the_records_end_with_the_process(db, key):
    with process("ram", db, workers=1) as one, gate() as at:
        one.schedule(count_behind_gate, ROOT, key, at)
        GATES[at].reach()
        before = db.lastTransaction()
        one.recovery.beat()
        assert db.lastTransaction() == before


@pytest.mark.parametrize("shared", [False, True])
def test_idle_system_writes_nothing(machines, db, key, shared):
    if shared:
        one = machines.process()
    else:
        one = Process(store_of("zodb", db), db, monotonic=machines.monotonic)
        one.store.clock = machines.clock
    sid = one.schedule(note, key)
    if shared:
        one.wait(sid)
    else:
        one.worker.run(sid)
    while one.executor.held:
        one.executor.threads[0].join(0.005)
    for step in (one.recovery.beat, one.recovery.look):
        step()
    before = db.lastTransaction()
    for _ in range(5):
        machines.pass_time(1)
        for step in (one.recovery.tell, one.recovery.beat, one.recovery.look):
            step()
    assert db.lastTransaction() == before
    one.stop()


def test_process_that_cannot_write_its_sign_for_a_lease_takes_no_more_jobs(
    machines, key, at, monkeypatch
):
    one, other = machines.process(), machines.process()
    told = one.schedule(check_until_told, at, key)
    GATES[at].reach()
    one.recovery.beat()

    def unreachable(tm, connect=None):
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(one.store, "table", unreachable)
        for _ in range(6):
            machines.pass_time(10)
            with pytest.raises(ConnectionError):
                one.recovery.beat()
            assert not one.executor.suspended
        machines.pass_time(1)
        with pytest.raises(ConnectionError):
            one.recovery.beat()
        assert one.executor.suspended
        while one.executor.held:
            one.executor.threads[0].join(0.005)
        assert type(CALLS[key][0]).__name__ == "JobStopped"
    assert one.executor.suspended
    one.recovery.beat()  # though nothing is held
    assert not one.executor.suspended
    other.cancel(told)
    sid = one.schedule(note, key)
    one.wait(sid)


def test_the_time_that_the_failure_of_a_sign_takes_counts(machines, key, at, monkeypatch):
    one = machines.process()

    def hang_and_fail(tm, connect=None):
        machines.pass_time(LEASE + 1)
        raise ConnectionError("no answer")

    with frozen(one, key, at):
        monkeypatch.setattr(one.store, "table", hang_and_fail)
        with pytest.raises(ConnectionError):
            one.recovery.beat()
        assert one.executor.suspended
        monkeypatch.undo()


def test_job_that_waits_while_no_sign_can_be_written_is_not_begun(machines, key, at):
    one = machines.process()
    blocking = one.schedule(count_behind_gate, ROOT, key, at)
    GATES[at].reach()
    sid = one.schedule(note, key)
    one.executor.suspended = True
    GATES[at].opened.set()
    one.wait(blocking)
    while one.executor.held:
        one.executor.threads[0].join(0.005)
    assert (one.status(sid).status, CALLS[key]) == ("accepted", [1])


@pytest.mark.parametrize("idle", [False, True])
def test_process_waits_a_lease_from_its_last_sign_or_since_it_has_jobs(
    idle, machines, key, at, monkeypatch
):
    one = machines.process()
    one.recovery.beat()
    with frozen(one, key, at):
        machines.pass_time(2 * LEASE)
        one.recovery.beat()
        if idle:
            GATES[at].opened.set()
            while one.executor.held:
                one.executor.threads[0].join(0.005)
            one.recovery.beat()
            machines.pass_time(2 * LEASE)
            one.executor.held.add("a" * 32)
        with monkeypatch.context() as patch:
            patch.setattr(one.store, "table", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one.recovery.beat()
        assert not one.executor.suspended
        one.executor.held.discard("a" * 32)


def test_signs_of_the_dead_are_buried_when_no_job_names_them(machines, key, at, wait_for):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        other.recovery.look()
        machines.pass_time(LEASE + 1)
        other.recovery.look()
        assert one.store.process in read_signs(other)
        wait_for(lambda: len(CALLS[key]) == 2)
        GATES[at].opened.set()
        other.wait(sid)
    machines.pass_time(LEASE + 1)
    other.recovery.look()
    other.recovery.look()
    assert one.store.process not in read_signs(other)
    before = other.db.lastTransaction()
    other.recovery.look()
    assert other.db.lastTransaction() == before
    assert set(other.recovery.leases.observed) <= {other.store.process}


def test_sign_that_a_process_left_which_died_without_a_job_is_buried(machines):
    one, other = machines.process(), machines.process()
    transact(one.store, one.recovery.pulse._beat)
    other.recovery.look()
    assert list(read_signs(other)) == [one.store.process]
    machines.pass_time(LEASE + 1)
    other.recovery.look()
    assert read_signs(other) == {}


def test_sign_of_a_living_process_is_left_alone_although_no_job_names_it(machines, key, at):
    one, other = machines.process(), machines.process()
    with frozen(one, key, at) as sid:
        GATES[at].opened.set()
        one.wait(sid)
    for _ in range(3):
        other.recovery.look()
    assert one.store.process in read_signs(other)


def test_dismissal_by_another_process_reaches_the_running_job(machines, key, at):
    one, other = machines.process(), machines.process()
    sid = one.schedule(check_until_told, at, key)
    GATES[at].reach()
    assert other.cancel(sid) is True
    assert CALLS[key] == []
    one.recovery.tell()
    while not CALLS[key]:
        one.executor.threads[0].join(0.005)
    assert type(CALLS[key][0]) is JobTaken


def test_job_that_has_not_begun_is_not_taken_for_one_that_was_removed(db):
    """Its record may be younger than what is seen."""
    with process("zodb", db) as one:
        one.worker.running["0" * 32] = job = Job("0" * 32)
        one.recovery.tell()
        job.check()
        job.begun = True
        one.recovery.tell()
        with pytest.raises(JobTaken):
            job.check()
        one.worker.running.clear()


def test_process_without_jobs_asks_for_none(machines, monkeypatch):
    one = machines.process()
    monkeypatch.setattr(recovery, "transact", pytest.fail)
    one.recovery.tell()
    one.recovery.beat()


def test_removal_by_another_process_reaches_the_running_job(machines, key, at):
    one, other = machines.process(), machines.process()
    sid = one.schedule(check_until_told, at, key)
    GATES[at].reach()
    other.ask(lambda scheduler: scheduler.remove(sid))
    one.recovery.tell()
    while not CALLS[key]:
        one.executor.threads[0].join(0.005)
    assert type(CALLS[key][0]) is JobTaken


@pytest.mark.parametrize(("signature", "told"), [(None, False), ("ours", False), ("theirs", True)])
def test_job_is_told_that_another_worker_has_claimed_it(signature, told, durable):
    """And not where nobody claimed it, nor of its own claim."""
    one = durable
    sid = one.plant(note, "key")
    one.record(sid, status="running", signature=signature)
    one.worker.running[sid] = job = Job(sid)
    job.signature, job.begun = "ours", True
    one.recovery.tell()
    one.worker.running.clear()
    with pytest.raises(JobTaken) if told else nullcontext():
        job.check()


def test_sign_that_cannot_be_read_keeps_nothing_else_from_being_done(machines, key):
    """The application went back to an older version of this library, say."""
    one, other = machines.process(), machines.process(workers=0)
    sign = Sign("a newer process")
    sign.running["5" * 32] = Newer()
    with other.transaction() as (table, _):
        table.show_sign("dead", sign)
    machines.db.cacheMinimize()
    nobodys, of_the_dead = other.plant(note, key), other.plant(note, key)
    other.record(nobodys, holder=None)
    other.die(of_the_dead)
    assert one.status(nobodys).status == "accepted"
    running = one.ask(lambda scheduler: scheduler.jobs("running"))
    assert [job.sid for job in running] == [of_the_dead]
    assert manage.processes(other.scheduler) == []
    one.recovery.look()
    one.wait(nobodys)
    assert read_signs(one).keys() == {"dead"}
    machines.pass_time(LEASE + 1)
    one.recovery.look()
    one.wait(of_the_dead)
    machines.pass_time(LEASE + 1)
    one.recovery.look()
    assert read_signs(one).keys() == set()


def ask_for_jobs(name):
    return [job.sid for job in ASKED[name].jobs("accepted")]


ASKED = {}


def test_job_may_ask_for_others_where_a_sign_cannot_be_read(machines, key):
    one = machines.process()
    sign = Sign("a newer process")
    sign.running["5" * 32] = Newer()
    with one.transaction() as (table, _):
        table.show_sign("dead", sign)
    machines.db.cacheMinimize()
    nobodys = one.plant(note, key)
    one.record(nobodys, holder=None)
    ASKED[key] = one.scheduler
    sid = one.schedule(ask_for_jobs, key)
    one.wait(sid)
    assert one.result(sid) == ([nobodys], None)


# -- archive and expiry --------------------------------------------------------------------


def trees(process):
    """Return how many records are among the unfinished ones, and the finished ones."""
    with process.transaction() as (table, _):
        count = [sum(map(len, kind)) for kind in (table.root.unfinished, table.root.finished)]
        return (*count, len(table.root.expiry))


def test_finished_record_is_archived_a_minute_later_and_expires_in_its_time(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock, result_timeout=3600.0) as one:
        sid = one.run(note, key, "value")
        one.recovery.look()
        assert trees(one) == (1, 0, 0)
        clock.now += ARCHIVE_AFTER - 1
        one.recovery.look()
        assert trees(one) == (1, 0, 0)
        clock.now += 1
        one.recovery.look()
        assert trees(one) == (0, 1, 1)
        assert one.status(sid).status == "successful"
        clock.now += 3600 - ARCHIVE_AFTER - 1
        one.recovery.look()
        assert one.status(sid).status == "successful"
        clock.now += 1
        assert one.status(sid) is None
        clock.now += 60
        one.recovery.look()
        assert trees(one) == (0, 0, 0)


def test_finished_record_is_archived_although_other_jobs_go_on_to_finish(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock) as one:
        one.run(note, key)
        clock.now += ARCHIVE_AFTER
        one.run(note, key)
        one.recovery.look()
        assert trees(one) == (1, 1, 1)


def test_forgotten_record_is_removed_in_ram_too(db, key):
    clock = Clock()
    with process("ram", db, clock=clock, result_timeout=10.0) as one:
        sid = one.run(note, key)
        clock.now += 9
        one.recovery.look()
        assert one.status(sid).status == "successful"
        clock.now += 1
        one.recovery.look()
        assert one.store.states == {}


def test_many_records_are_archived_and_expire_in_batches(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock, result_timeout=100.0) as one:
        with one.transaction() as (table, _):
            bound = one.scheduler.using(tm=table.tm)
            sids = [bound.schedule(note, key) for _ in range(BATCH + 5)]
            for sid in sids:
                bound.cancel(sid)
        clock.now += ARCHIVE_AFTER
        before = one.commits()
        one.recovery.look()
        assert trees(one) == (0, BATCH + 5, BATCH + 5)
        assert one.commits() == before + 2
        clock.now += HAUNTED + 200
        one.recovery.look()
        assert trees(one) == (0, 0, 0)
        assert one.commits() == before + 4


def test_collected_result_never_costs_a_move(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock) as one:
        one.result(one.run(note, key))
        clock.now += ARCHIVE_AFTER
        before = db.lastTransaction()
        one.recovery.look()
        assert db.lastTransaction() == before


# -- bad records ---------------------------------------------------------------------------


class Vanishing(Persistent):
    """Its class is gone when it is read."""


def put(one, sid, record):
    with one.transaction() as (table, _):
        table.root.unfinished[table.root.shard(sid)][sid] = record


def forge(one, sid, pickle):
    """Store a record with a pickle that cannot be read."""
    put(one, sid, Foreign())
    with one.transaction() as (table, _):
        oid = table.root.unfinished[table.root.shard(sid)][sid]._p_oid
    storage = one.db.storage
    serial = storage.loadBefore(oid, b"\x7f" + b"\xff" * 7)[1]
    txn = transaction.TransactionManager(explicit=True).begin()
    txn.user = txn.description = ""
    from ZODB.Connection import TransactionMetaData

    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(oid, serial, pickle, "", meta)
    storage.tpc_vote(meta)
    storage.tpc_finish(meta)
    one.db.cacheMinimize()


def vanish(one, sid):
    put(one, sid, Vanishing())
    one.db.cacheMinimize()


BAD = {
    "a truncated record": lambda one, sid: forge(one, sid, b"\x80\x03ctest_recovery\nFor"),
    "an empty record": lambda one, sid: forge(one, sid, b""),
    "a foreign object": lambda one, sid: put(one, sid, Foreign()),
    "a mapping": lambda one, sid: put(one, sid, PersistentMapping(status="running")),
    "no object at all": lambda one, sid: put(one, sid, "text"),
    "None": lambda one, sid: put(one, sid, None),
    "a class that is gone": vanish,
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_record_stops_neither_the_sweep_nor_its_neighbours(
    tmp_path, db, key, bad, caplog, monkeypatch
):
    clock = Clock()
    with process("zodb", db, workers=1, clock=clock) as one:
        lost = [one.plant(note, key) for _ in range(3)]
        done = one.plant(note, key)
        one.cancel(done)
        for sid in lost:
            one.die(sid)
        shards = {int(sid[:2], 16) for sid in lost}
        # Before, among and after its neighbours.
        bad_sids = [f"{shard:02x}" + end * 30 for shard in shards for end in "0f"]
        for sid in bad_sids:
            BAD[bad](one, sid)
        if bad == "a class that is gone":
            monkeypatch.delattr("test_recovery.Vanishing")
        clock.now += ARCHIVE_AFTER
        caplog.clear()
        one.recovery.look()
        for sid in lost:
            one.wait(sid)
        assert len(CALLS[key]) == 3
        assert trees(one)[1] == 1  # archived all the same
        for sid in bad_sids:
            assert f"the record of job {sid!r} cannot be read" in caplog.text
        assert len(one.ask(lambda scheduler: scheduler.jobs())) == 4


def test_expired_record_that_is_gone_already_stops_nothing(db, key):
    clock = Clock()
    with process("zodb", db, clock=clock, result_timeout=1000.0) as one:
        sids = [one.run(note, key) for _ in range(2)]
        clock.now += ARCHIVE_AFTER
        one.recovery.look()
        with one.transaction() as (table, _):
            del table.root.finished[table.root.shard(sids[0])][sids[0]]
        clock.now += 1000
        one.recovery.look()
        assert trees(one) == (0, 0, 0)


def test_step_that_fails_is_logged_and_the_next_one_is_taken(db, caplog):
    with process("zodb", db) as one:

        def look():
            raise ZeroDivisionError

        one.recovery._safely(look)
        assert "recovery could not look for lost jobs; it goes on" in caplog.text


def test_conflict_of_recovery_with_another_process_is_no_error(db, key, caplog, monkeypatch):
    caplog.set_level("INFO", logger="pyramid_async.recovery")
    clock = Clock()
    with process("zodb", db, clock=clock) as one, process("zodb", db, clock=clock) as other:
        sid = one.run(note, key)
        clock.now += ARCHIVE_AFTER
        archive = ZodbTable.archive_all

        def archive_after_the_other(table, sids):
            archive(table, sids)
            monkeypatch.setattr(ZodbTable, "archive_all", archive)
            other.recovery.look()

        monkeypatch.setattr(ZodbTable, "archive_all", archive_after_the_other)
        monkeypatch.setattr("pyramid_async.transactional.ATTEMPTS", 1)
        assert not one.recovery._safely(one.recovery.look)
        assert trees(one) == (0, 1, 1)
        assert one.status(sid).status == "successful"
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert "recovery will look for lost jobs at another time: " in record.getMessage()


# -- the thread ----------------------------------------------------------------------------


def test_thread_goes_on_after_a_conflict(db, caplog):
    again = threading.Event()
    errors = [ConflictError()]

    def look():
        if errors:
            raise errors.pop()
        again.set()

    with process("zodb", db) as one:
        one.recovery.look, one.recovery.interval = look, 0.0
        one.recovery.start()
        assert again.wait(10)
        one.recovery.stop(5)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_thread_looks_by_itself(db, key):
    store = store_of("zodb", db)
    worker = Worker(store)
    executor = executor_for(worker, 1)
    ended = threading.Event()
    worker.notify = lambda sid, status: status == "successful" and ended.set()
    one = Process(store, db)
    sid = one.schedule(note, key)
    one.die(sid)
    executor.start()  # and looks at once
    assert ended.wait(10)
    assert Scheduler(worker, executor).transact(lambda s: s.completed(sid))
    executor.stop(5)


def test_job_runs_when_its_time_has_come(db, key):
    store = store_of("zodb", db)
    worker = Worker(store)
    executor = executor_for(worker, 1)
    ended = threading.Event()
    worker.notify = lambda sid, status: status == "successful" and ended.set()
    scheduler = Scheduler(worker, executor)
    scheduler.transact(lambda s: s.using(run_after=0.05).schedule(note, key))
    assert ended.wait(10)
    executor.stop(5)


def test_thread_that_sleeps_is_woken_for_a_new_timer(db, key):
    with process("zodb", db) as one:
        one.recovery._wake.clear()
        one.recovery.later(1e12, "0" * 32)
        assert one.recovery._wake.is_set()


def test_timer_that_fails_stops_no_other(db, key, caplog):
    with process("zodb", db) as one:
        put = []

        def refuse(sid, seen):
            put.append(sid)
            raise RuntimeError("no room")

        one.executor.put = refuse
        for number in range(2):
            one.recovery.later(0.0, f"{number:032x}")
        one.recovery._fire()
        assert len(put) == caplog.text.count("is due and was not put") == 2


def test_timer_of_a_job_whose_last_attempt_has_not_quite_ended_is_set_again(db):
    clock, sid, put = Clock(), "0" * 32, []
    with process("zodb", db, clock=clock) as one:
        one.executor.put = lambda sid, seen: put.append(sid)
        one.executor.held.add(sid)
        one.recovery.later(0.0, sid)
        assert one.recovery._fire() == pytest.approx(0.05)
        assert put == []
        one.executor.held.clear()
        clock.now += 0.1
        one.recovery._fire()
        assert put == [sid]


def test_thread_that_was_woken_sleeps_again(db):
    with process("zodb", db, monotonic=Clock(0.0)) as one:
        recovery, waits = one.recovery, []

        class Wake(threading.Event):
            def wait(self, timeout=None):
                waits.append((self.is_set(), timeout))
                if len(waits) == 2:
                    recovery._ended.set()

        recovery._wake = Wake()
        recovery._wake.set()
        recovery._loop()
        assert waits == [(True, 1.0), (False, 1.0)]


def test_thread_sleeps_until_the_next_timer_and_no_longer(db):
    clock, waits = Clock(), []
    with process("zodb", db, clock=clock, monotonic=Clock(0.0)) as one:
        recovery = one.recovery

        def wait(timeout):
            waits.append(timeout)
            recovery._ended.set()

        recovery.later(clock.now + 0.25, "0" * 32)
        recovery._wake = SimpleNamespace(wait=wait, clear=lambda: None, set=lambda: None)
        recovery._loop()
        assert waits == [0.25]


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_timers_of_dismissed_jobs_leave_room_for_others(kind, db, key):
    with process(kind, db) as one:
        one.executor.max_pending = 2
        kept, dismissed, other = (one.schedule(note, key, run_after=3600.0) for _ in range(3))
        for sid in (kept, dismissed):
            one.worker.run(sid)
        one.cancel(dismissed)
        one.recovery.look()
        one.worker.run(other)
        assert sorted(one.recovery.timed()) == sorted([kept, other])


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_look_remembers_no_job_that_has_no_timer(kind, db, key):
    with process(kind, db) as one:
        for _ in range(5):
            one.schedule(note, key, run_after=3600.0)
        one.executor.max_pending = 2
        one.recovery.look()
        assert {len(kept) for kept in vars(one.recovery._notes).values()} == {0}
        assert len(one.recovery.timed()) == 2


def test_timers_outlive_a_look_as_long_as_their_jobs_wait(db, key, monkeypatch):
    """Whosever they are, and also where the look does not know of them yet."""
    with process("zodb", db) as one:
        nobodys, dismissed = (one.plant(note, key, run_after=3600.0) for _ in range(2))
        one.record(nobodys, holder=None)  # of a broker's
        for sid in (nobodys, dismissed):
            one.recovery.later(1e12, sid)
        one.recovery.look()
        assert sorted(one.recovery.timed()) == sorted([nobodys, dismissed])
        one.cancel(dismissed)
        look = one.recovery._look

        def look_and_fail(table):
            ended = look(table)
            one.recovery.later(1e12, "a retry")
            return ended

        monkeypatch.setattr(one.recovery, "_look", look_and_fail)
        one.recovery.look()
        assert sorted(one.recovery.timed()) == sorted([nobodys, "a retry"])


def test_timer_of_a_job_whose_last_attempt_has_not_quite_ended_outlives_a_look(db, key):
    with process("zodb", db) as one:
        sid = one.plant(note, key)
        one.executor.held.add(sid)
        one.recovery.later(one.store.clock(), sid)
        one.recovery._fire()
        one.recovery.look()
        assert one.recovery.timed() == [sid]


def test_timers_are_bounded(db, key):
    with process("zodb", db) as one:
        one.executor.max_pending = 3
        for number in range(5):
            one.recovery.later(1e12, f"{number:032x}")
            one.recovery.later(1e12, f"{number:032x}")
        assert len(one.recovery.timed()) == len(set(one.recovery.timed())) == 3


# -- a process that is killed --------------------------------------------------------------

TESTS = Path(__file__).parent

VICTIM = """
    import os, sys, threading, transaction, ZODB
    from BTrees.OOBTree import OOBTree
    from ZODB.FileStorage import FileStorage
    from pyramid_async.scheduler import Scheduler
    from pyramid_async.standalone import executor_for
    from pyramid_async.worker import Worker
    from pyramid_async.zodb import ZodbStore
    from test_recovery import killed_once

    db = ZODB.DB(FileStorage(sys.argv[1]))
    store = ZodbStore(db)
    store.install()
    worker = Worker(store)
    ended = threading.Semaphore(0)
    worker.notify = lambda sid, status: status == "successful" and ended.release()
    executor = executor_for(worker, 1)
    scheduler = Scheduler(worker, executor)
    connection = db.open()
    root = connection.root()
    if "log" not in root:
        root["log"] = OOBTree()
        transaction.commit()
        for number in range(3):
            scheduler.schedule(killed_once, root["log"], number, sys.argv[2], int(sys.argv[3]))
        transaction.commit()
    executor.start()
    while len(root["log"]) < 3:
        assert ended.acquire(timeout=30)
        transaction.abort()
    executor.stop(5)
    print(dict(root["log"]), flush=True)
    db.close()
"""


def killed_once(log, number, marker, phase):
    """Change the database; the first attempt at job 1 is killed before or within its commit."""
    log[number] = log.get(number, 0) + 1
    if number == 1 and not os.path.exists(marker):
        with open(marker, "w"):
            pass
        if phase:
            kill_in_commit()
        else:
            os.kill(os.getpid(), 9)


def kill_in_commit():
    from webapp import Barrier

    class Kills(Barrier):
        def tpc_vote(self, txn):
            os.kill(os.getpid(), 9)

    transaction.get().join(Kills(None, None, "~~last"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", [0, 1], ids=["in the function", "in the commit"])
def test_jobs_of_a_killed_process_run_once_in_the_next_one(tmp_path, phase):
    path, marker = tmp_path / "data.fs", tmp_path / "killed"

    def start():
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(VICTIM), path, marker, str(phase)],
            capture_output=True,
            text=True,
            timeout=50,
            env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        )

    killed = start()
    assert killed.returncode == -9, killed.stderr
    again = start()
    assert again.stdout == "{0: 1, 1: 1, 2: 1}\n", again.stderr
