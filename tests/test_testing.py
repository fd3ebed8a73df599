"""What applications test their jobs with: inline, manual, faults; and its document."""

from __future__ import annotations

import importlib
import logging
import re
import textwrap
import threading
from asyncio import CancelledError
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import transaction
from persistent import Persistent
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPBadRequest
from pyramid_zodbconn import get_connection
from transaction.interfaces import TransientError
from webtest import TestApp
from zope.interface.verify import verifyObject

from pyramid_async import IJobFinished, IScheduler, JobNotFound, current_job
from pyramid_async.interfaces import IExecutor, InvalidTransition, JobTimeout
from pyramid_async.scheduler import TransactionalScheduler
from pyramid_async.testing import (
    Pause,
    conflict,
    faults,
    inline,
    lose_reply,
    manual,
    steal,
)
from pyramid_async.zodb import ZodbStore

DOCUMENT = Path(__file__).parent.parent / "docs" / "testing.rst"
EXPLICIT = {"tm.manager_hook": "pyramid_tm.explicit_manager"}


# -- an application ------------------------------------------------------------------------


class Folder(Persistent):
    """An object of the application."""

    def __init__(self, name):
        self.name = name


THREADS = []  # in which `deposit` was called


def root():
    return get_connection(current_job().request).root()


def deposit(amount):
    THREADS.append(threading.get_ident())
    root()["balance"] = root().get("balance", 0) + amount
    return root()["balance"]


def deposit_twice(amount):
    """Commit by itself between the two, as `checkpoint` would."""
    deposit(amount)
    current_job().request.tm.commit()
    return deposit(amount)


def break_down(amount):
    deposit(amount)
    raise ZeroDivisionError


def break_down_at_first(amount):
    deposit(amount)
    if current_job().attempt == 1:
        raise ConnectionError


def rename(folder, name):
    folder.name = name


def interrupt():
    raise KeyboardInterrupt


def leave():
    raise SystemExit


def give_up():
    raise CancelledError


def run_out_of_time():
    raise JobTimeout


def count_down(number):
    """Schedule itself again until it is at zero; note when it ends."""
    job = current_job()
    if number:
        job.request.scheduler.schedule(count_down, number - 1)
    root()["seen"] = [*root().get("seen", []), number]


def call_drain():
    return EXECUTORS[-1].drain()


EXECUTORS = []  # for `call_drain`


class Sql:
    """A data manager as zope.sqlalchemy's, whose vote is a commit."""

    votes = 0

    def sortKey(self):
        return "~sqlalchemy:1"

    def tpc_vote(self, txn):
        Sql.votes += 1

    def nothing(self, txn):
        pass

    abort = commit = tpc_begin = tpc_finish = tpc_abort = nothing


def deposit_in_sql():
    current_job().request.tm.get().join(Sql())


def deposit_in_sql_of_the_thread():
    transaction.get().join(Sql())


JOBS = (
    deposit,
    deposit_twice,
    interrupt,
    leave,
    give_up,
    run_out_of_time,
    break_down,
    break_down_at_first,
    count_down,
    deposit_in_sql,
    deposit_in_sql_of_the_thread,
)
FUNCTIONS = {f.__name__: f for f in JOBS}


def start(request):
    """Schedule the function that the URL names with the numbers of the body."""
    scheduler = request.scheduler.using(**request.json_body.get("options", {}))
    args = request.json_body.get("args", [])
    sid = scheduler.schedule(FUNCTIONS[request.matchdict["name"]], *args)
    if request.json_body.get("refuse"):
        raise HTTPBadRequest
    return request.scheduler.accepted(sid)


@contextmanager
def application(store, **settings):
    """An application with its data in the ZODB and its jobs in the given store."""
    settings = {"zodbconn.uri": "memory://", "async.store": store, **settings}
    with Configurator(settings=settings) as config:
        config.include("pyramid_retry")
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.testing_securitypolicy(userid="ada")
        config.add_operation("deposit", deposit)
        config.add_route("start", "/start/{name}")
        config.add_view(start, route_name="start", request_method="POST")
    app = TestApp(config.make_wsgi_app())
    try:
        yield app
    finally:
        transaction.abort()
        app.app.registry.getUtility(IScheduler).executor.stop()
        app.app.registry._zodb_databases[""].close()


@pytest.fixture(params=["ram", "zodb"])
def store(request):
    return request.param


@pytest.fixture
def app(store):
    with application(store, **EXPLICIT) as app:
        yield app


@pytest.fixture
def registry(app):
    return app.app.registry


@pytest.fixture
def scheduler(registry):
    return registry.getUtility(IScheduler)


def post(app, name, *args, **body):
    """Start a job and return the URL of its status."""
    accepted = app.post_json(f"/start/{name}", {"args": args, **body}, status=202)
    return accepted.headers["Location"]


def data(app, name="balance"):
    """Return what the database holds under a name."""
    database = app.app.registry._zodb_databases[""]
    tm = transaction.TransactionManager()
    with closing(database.open(tm)) as connection:
        return connection.root().get(name)


def statuses(jobs):
    return [job.status for job in jobs]


# -- inline --------------------------------------------------------------------------------


def test_one_executor_stands_in_place_of_another(app, registry):
    with manual(registry) as outer:
        with inline(registry):
            assert app.get(post(app, "deposit", 5)).json["status"] == "successful"
        url = post(app, "deposit", 2)
        assert app.get(url).json["status"] == "accepted"
        outer.drain()
        assert app.get(url).json["status"] == "successful"
    assert data(app) == 7


def test_recovery_has_the_times_of_the_application(registry):
    usual = registry.getUtility(IScheduler).executor.recovery
    usual.lease = 300.0
    with manual(registry) as jobs:
        assert jobs.recovery.lease == 300.0
        assert jobs.recovery.heartbeat == usual.heartbeat
        assert jobs.recovery.interval == usual.interval


def test_inline_job_has_ended_when_the_request_has(app, registry):
    with inline(registry):
        url = post(app, "deposit", 5)
        assert data(app) == 5
        document = app.get(url).json
    assert (document["status"], document["result"]) == ("successful", 5)


def test_inline_job_runs_in_the_thread_of_the_request(app, registry):
    with inline(registry):
        post(app, "deposit", 5)
    assert THREADS[-1] == threading.get_ident()


def test_inline_job_runs_where_the_request_has_the_transaction_of_the_thread(store):
    with application(store) as app, inline(app.app.registry):
        url = post(app, "deposit", 5)
        assert app.get(url).json["status"] == "successful"


@pytest.mark.parametrize("executor", [nullcontext, inline])
@pytest.mark.parametrize("settings", [{}, EXPLICIT])
def test_inline_job_that_commits_by_itself_ends_as_with_threads(
    store, executor, settings, wait_for
):
    with application(store, **settings) as app:
        with executor(app.app.registry):
            url = post(app, "deposit_twice", 5)
            wait_for(lambda: app.get(url).json["done"])
        assert app.get(url).json["status"] == ("failed" if settings else "successful")


@pytest.mark.parametrize("executor", [nullcontext, inline, manual])
@pytest.mark.parametrize("settings", [{}, EXPLICIT])
def test_what_joins_the_transaction_of_the_thread_ends_as_with_threads(
    store, executor, settings, wait_for
):
    before = Sql.votes
    with application(store, **settings) as app, executor(app.app.registry) as jobs:
        url = post(app, "deposit_in_sql_of_the_thread")
        if executor is manual:
            jobs.drain()
        wait_for(lambda: app.get(url).json["done"])
        assert app.get(url).json["status"] == "successful"
    assert Sql.votes == before + (0 if settings else 1)


def test_inline_job_that_fails_leaves_no_effect_and_does_not_disturb_the_request(app, registry):
    with inline(registry):
        url = post(app, "break_down", 5)
        assert app.get(url).json["status"] == "failed"
    assert data(app) is None


def test_inline_job_is_not_started_when_the_request_fails(app, registry):
    with inline(registry) as jobs:
        app.post_json("/start/deposit", {"args": [5], "refuse": True}, status=400)
    assert data(app) is None
    assert jobs.scheduled == []


def test_inline_jobs_that_jobs_schedule_run_one_after_the_other(app, registry):
    with inline(registry):
        post(app, "count_down", 300)
    assert data(app, "seen") == list(range(300, -1, -1))


def test_inline_job_of_a_script_runs_at_the_commit_of_the_thread(app, registry, scheduler):
    with inline(registry):
        sid = scheduler.schedule(deposit, 5)
        assert scheduler.completed(sid) is False
        transaction.commit()
        transaction.begin()  # the ZODB shows what was committed before a transaction began
        assert scheduler.get_result(sid) == (5, None)


def test_inline_job_that_waits_for_its_time_runs_when_the_clock_is_put_forward(app, registry):
    with inline(registry) as jobs:
        url = post(app, "deposit", 5, options={"run_after": 60})
        assert app.get(url).json["status"] == "accepted"
        jobs.advance(61)
        assert app.get(url).json["status"] == "successful"


def test_inline_job_whose_wake_up_was_lost_runs_when_recovery_looks(app, registry):
    with inline(registry) as jobs, faults(registry) as plan:
        plan.lose_wakeups()
        post(app, "deposit", 5)
        assert data(app) is None
        jobs.recover()
    assert data(app) == 5


def test_inline_jobs_of_several_threads_run_one_at_a_time(app, registry):
    seen = []

    def client():
        seen.append(app.get(post(app, "deposit", 1)).json["status"])

    with inline(registry), faults(registry) as plan:
        stop = Pause()
        plan.at("call", after=stop)
        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        with stop:
            assert len(registry.getUtility(IScheduler).worker.running) == 1
        for thread in threads:
            thread.join(20)
    assert seen == ["successful"] * 3
    assert data(app) == 3


def test_what_interrupts_an_inline_job_ends_the_test(app, registry):
    with pytest.raises(KeyboardInterrupt), inline(registry):
        url = post(app, "interrupt")
        post(app, "deposit", 5)
    assert app.get(url).json["status"] == "failed"
    assert data(app) is None


def test_what_interrupts_the_pause_after_a_conflict_ends_the_test(app, registry, monkeypatch):
    """A job that always conflicts stands there most of the time."""
    with pytest.raises(KeyboardInterrupt), inline(registry), faults(registry) as plan:
        plan.at("commit", before=conflict)
        monkeypatch.setattr("pyramid_async.worker.time.sleep", lambda seconds: interrupt())
        post(app, "deposit", 5)
        monkeypatch.undo()
    assert data(app) is None


def test_what_interrupts_an_inline_job_does_not_hide_the_test_s_own_error(app, registry):
    with pytest.raises(ZeroDivisionError), inline(registry):
        post(app, "interrupt")
        raise ZeroDivisionError


# -- manual --------------------------------------------------------------------------------


def test_manual_job_runs_when_it_is_told_to(app, registry):
    with manual(registry) as jobs:
        url = post(app, "deposit", 5)
        assert app.get(url).json["status"] == "accepted"
        assert data(app) is None
        assert statuses(jobs.drain()) == ["successful"]
        assert app.get(url).json["result"] == 5
        assert data(app) == 5


def test_drain_runs_what_jobs_schedule_and_tells_of_all_in_their_order(app, registry):
    with manual(registry) as jobs:
        post(app, "count_down", 2)
        post(app, "deposit", 5)
        ended = jobs.drain()
        assert [job.sid for job in ended] == [job.sid for job in jobs.scheduled]
    assert statuses(ended) == ["successful"] * 4
    assert data(app, "seen") == [2, 1, 0]


def test_drain_tells_why_a_job_failed(app, registry):
    with manual(registry) as jobs:
        post(app, "break_down", 5)
        (job,) = jobs.drain()
    assert (job.status, job.failure.class_name) == ("failed", "ZeroDivisionError")


def test_what_interrupts_a_job_ends_drain(app, registry):
    with manual(registry) as jobs:
        url = post(app, "interrupt")
        post(app, "deposit", 5)
        with pytest.raises(KeyboardInterrupt):
            jobs.drain()
        assert app.get(url).json["status"] == "failed"
        assert statuses(jobs.drain()) == ["successful"]


@pytest.mark.parametrize("name", ["leave", "give_up", "run_out_of_time"])
def test_job_that_exits_fails_as_with_threads(app, registry, name):
    with manual(registry) as jobs:
        post(app, name)
        assert statuses(jobs.drain()) == ["failed"]


def test_drain_has_nothing_to_tell_of_a_job_that_was_removed(app, registry, scheduler):
    with manual(registry) as jobs:
        sid = scheduler.schedule(deposit, 5)
        transaction.commit()
        scheduler.remove(sid)
        transaction.commit()
        assert jobs.drain() == []
    assert data(app) is None


def test_drain_leaves_the_transaction_of_the_thread_alone(store):
    # Without the explicit manager requests and jobs have that of the thread.
    with application(store) as app, manual(app.app.registry) as jobs:
        scheduler = app.app.registry.getUtility(IScheduler)
        post(app, "deposit", 5)
        sid = scheduler.schedule(deposit, 7)
        assert statuses(jobs.drain()) == ["successful"]
        assert scheduler.completed(sid) is False  # still of this transaction alone
        transaction.commit()
        assert statuses(jobs.drain()) == ["successful"]
        assert data(app) == 12


def test_drain_called_by_a_job_does_nothing(app, registry, scheduler):
    with manual(registry) as jobs:
        EXECUTORS.append(jobs)
        sid = scheduler.schedule(call_drain)
        transaction.commit()
        assert statuses(jobs.drain()) == ["successful"]
        transaction.begin()
        assert scheduler.get_result(sid) == ([], None)


def test_job_that_waits_for_its_time_is_run_once_the_clock_is_put_forward(app, registry):
    with manual(registry) as jobs:
        post(app, "deposit", 5, options={"run_after": 3600})
        assert jobs.scheduled[0].delay == pytest.approx(3600, abs=0.001)
        assert jobs.drain() == []
        jobs.advance(3599)
        assert jobs.drain() == []
        jobs.advance(2)
        assert statuses(jobs.drain()) == ["successful"]


def test_jobs_whose_time_has_come_run_in_the_order_of_their_times(app, registry):
    with manual(registry) as jobs:
        for seconds in (30, 10, 20):
            post(app, "deposit", seconds, options={"run_after": seconds})
        jobs.advance(60)
        delays = {job.sid: round(job.delay) for job in jobs.scheduled}
        assert [delays[status.sid] for status in jobs.drain()] == [10, 20, 30]


def test_job_that_is_to_be_tried_again_is_run_once_the_clock_is_put_forward(
    app, registry, scheduler
):
    with manual(registry) as jobs:
        scheduler.using(retry_on=ConnectionError).schedule(break_down_at_first, 5)
        transaction.commit()
        assert statuses(jobs.drain()) == ["accepted"]
        assert jobs.drain() == []
        jobs.advance(300)
        assert statuses(jobs.drain()) == ["successful"]
    assert data(app) == 5


def test_clock_that_is_put_forward_lets_results_expire(app, registry, scheduler):
    with manual(registry) as jobs:
        sid = scheduler.using(result_timeout=60).schedule(deposit, 5)
        transaction.commit()
        jobs.drain()
        transaction.begin()
        assert scheduler.status(sid).status == "successful"
        jobs.advance(61)
        assert scheduler.status(sid) is None


def test_jobs_of_manual_are_left_alone_by_the_threads_and_their_recovery(app, registry, scheduler):
    previous = scheduler.executor
    previous.start()
    with manual(registry) as jobs:
        post(app, "deposit", 5)
        previous.recovery.look()
        assert not previous.held
        assert statuses(jobs.drain()) == ["successful"]
    assert THREADS[-1] == threading.get_ident()


def test_lost_wake_up_is_found_by_recovery_alone(app, registry):
    with manual(registry) as jobs:
        with faults(registry) as plan:
            plan.lose_wakeups()
            post(app, "deposit", 5)
        assert jobs.drain() == []
        jobs.recover()
        assert statuses(jobs.drain()) == ["successful"]
    assert data(app) == 5


def test_doubled_wake_up_arrives_twice(app, registry, monkeypatch):
    woken = []
    with manual(registry) as jobs:
        monkeypatch.setattr(jobs, "wake", lambda *wake: woken.append(wake))
        with faults(registry) as plan:
            plan.double_wakeups()
            post(app, "deposit", 5)
    assert len(woken) == 2
    assert woken[0] == woken[1]


def test_doubled_wake_up_runs_a_job_once(app, registry):
    with manual(registry) as jobs, faults(registry) as plan:
        plan.double_wakeups()
        post(app, "deposit", 5)
        jobs.drain()
        plan.double_wakeups()
        jobs.wake(True, jobs.scheduled[0].sid)
        assert statuses(jobs.drain()) == ["successful"]
        assert len(jobs.scheduled) == 1
    assert data(app) == 5


def test_wake_up_of_an_unknown_job_changes_nothing(registry):
    with manual(registry) as jobs:
        jobs.wake(True, "0" * 32)
        assert jobs.scheduled == []
        assert jobs.drain() == []


# -- what was scheduled --------------------------------------------------------------------


def test_what_was_scheduled_is_told_with_its_arguments_and_options(app, registry):
    with manual(registry) as jobs:
        post(app, "deposit", 5, options={"title": "A deposit", "key": "k"})
        (job,) = jobs.scheduled
    assert (job.function, job.args, job.kwargs) == (deposit, (5,), {})
    assert job.options == {"title": "A deposit", "key": "k"}
    assert (job.owner, job.process_id, job.delay) == ("ada", "deposit", 0)


def test_persistent_argument_can_be_read_before_and_after_its_job(app, registry, scheduler):
    with manual(registry) as jobs:
        connection = registry._zodb_databases[""].open(transaction.manager)
        folder = connection.root()["folder"] = Folder("old")
        scheduler.schedule(rename, folder, name="new")
        transaction.commit()
        (job,) = jobs.scheduled
        assert job.args[0].name == "old"
        assert job.args[0]._p_oid == folder._p_oid
        assert job.kwargs == {"name": "new"}
        jobs.drain()
        transaction.begin()
        assert folder.name == "new"
        connection.close()


# -- in and out ----------------------------------------------------------------------------


def test_everything_is_as_it_was_after_the_block(registry, scheduler):
    def parts():
        executor, worker, store = scheduler.executor, scheduler.worker, scheduler.store
        names = {name: set(vars(owner)) for name, owner in (("worker", worker), ("store", store))}
        return (
            *(executor, executor.room(), executor.wake, worker.later, worker.make_try),
            *(worker.surroundings, store.clock, store.table, names),
        )

    before = parts()
    with inline(registry), faults(registry), manual(registry):
        assert scheduler.executor is not before[0]
    assert parts() == before


def test_scheduler_that_was_bound_before_is_in_the_test_s_hands_too(app, registry, scheduler):
    """A module may keep what `using` made; ``faults`` see its steps too."""
    bound = scheduler.using(title="kept")
    with manual(registry) as outer, inline(registry) as jobs, faults(registry) as plan:
        plan.double_wakeups()
        sid = bound.schedule(abs, 1)
        transaction.commit()
        transaction.begin()
        assert bound.status(sid).status == "successful"
        assert [job.sid for job in jobs.scheduled] == [sid]
        assert outer.scheduled == []
    transaction.abort()


def test_executor_stays_until_it_is_restored(app, registry, wait_for):
    jobs = manual(registry)
    post(app, "deposit", 5)
    assert statuses(jobs.drain()) == ["successful"]
    jobs.restore()
    url = post(app, "deposit", 5)
    wait_for(lambda: app.get(url).json["status"] == "successful")
    assert THREADS[-1] != threading.get_ident()


def test_jobs_left_behind_are_run_by_the_threads_after_recovery_looked(
    app, registry, scheduler, wait_for
):
    with manual(registry):
        url = post(app, "deposit", 5)
    scheduler.executor.recovery.look()
    wait_for(lambda: app.get(url).json["status"] == "successful")


def test_stop_stops_the_executor_that_was_replaced(registry, scheduler):
    previous = scheduler.executor
    previous.start()
    manual(registry)
    scheduler.executor.stop(5)
    assert scheduler.executor is previous
    assert previous.stopped


def test_manual_before_the_application_is_made_starts_no_thread(store):
    with Configurator(settings={"zodbconn.uri": "memory://", "async.store": store}) as config:
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.commit()
        with manual(config.registry):
            config.make_wsgi_app()
    scheduler = config.registry.getUtility(IScheduler)
    assert scheduler.executor.threads == []
    config.registry._zodb_databases[""].close()


def test_executors_of_tests_keep_the_contract(registry):
    for replace in (inline, manual):
        with replace(registry) as jobs:
            assert verifyObject(IExecutor, jobs)


def test_manual_runs_the_jobs_of_a_process_that_runs_none_itself(store):
    with application(store, **{"async.workers": 0}) as app, manual(app.app.registry) as jobs:
        post(app, "deposit", 5)
        assert statuses(jobs.drain()) == ["successful"]


def test_application_over_celery_is_tested_without_a_broker():
    pytest.importorskip("celery")
    nobody = {"async.executor": "celery", "async.celery.broker": "amqp://127.0.0.1:1//"}
    with application("zodb", **nobody) as app, inline(app.app.registry):
        url = post(app, "deposit", 5, options={"queue": "slow"})
        assert app.get(url).json["result"] == 5


def test_scheduler_without_pyramid_can_be_inline_and_manual():
    scheduler = TransactionalScheduler()
    calls = []
    with inline(scheduler):
        sid = scheduler.schedule(calls.append, 1)
        transaction.commit()
        assert scheduler.completed(sid)
    with manual(scheduler) as jobs:
        scheduler.schedule(calls.append, 2)
        transaction.commit()
        assert calls == [1]
        assert [(job.args, job.owner) for job in jobs.scheduled] == [((2,), None)]
        assert statuses(jobs.drain()) == ["successful"]
    assert calls == [1, 2]
    assert scheduler.executor.threads == []


# -- faults --------------------------------------------------------------------------------


def test_conflict_at_a_job_s_commit_makes_another_attempt(app, registry):
    with manual(registry) as jobs, faults(registry) as plan:
        post(app, "deposit", 5)
        plan.at("commit", during=conflict, times=2)
        assert statuses(jobs.drain()) == ["successful"]
        assert plan.struck == [("commit", "during")] * 2
    assert data(app) == 5


def test_fault_during_a_commit_strikes_before_what_commits_when_it_votes(app, registry):
    with manual(registry) as jobs, faults(registry) as plan:
        before = Sql.votes
        post(app, "deposit_in_sql")
        plan.at("commit", during=conflict)
        assert statuses(jobs.drain()) == ["successful"]
    assert Sql.votes == before + 1


def test_conflict_at_the_request_s_commit_makes_one_job(app, registry):
    with manual(registry) as jobs, faults(registry) as plan:
        plan.at("schedule", during=conflict)
        post(app, "deposit", 5)
        assert len(jobs.scheduled) == 1
        jobs.drain()
    assert data(app) == 5


def test_lost_reply_to_the_request_s_commit_makes_one_job(app, registry):
    with manual(registry) as jobs, faults(registry) as plan:
        plan.at("schedule", after=lose_reply)
        post(app, "deposit", 5)
        assert len(jobs.scheduled) == 1
        jobs.drain()
    assert data(app) == 5


def test_job_that_was_cancelled_just_before_its_commit_has_no_effect(app, registry, wait_for):
    finished = []
    with faults(registry) as plan:
        stop = Pause()
        plan.at("commit", before=stop)
        plan.at("end", after=lambda: finished.append(True))
        url = post(app, "deposit", 5)
        with stop:
            assert app.delete(url).json["status"] == "dismissed"
        wait_for(lambda: finished)
    assert data(app) is None


def test_job_that_was_stolen_just_before_its_commit_has_its_effect_once(registry, app):
    with manual(registry) as jobs, faults(registry) as plan:
        url = post(app, "deposit", 5)
        plan.at("commit", before=lambda: steal(registry, jobs.scheduled[0].sid))
        assert statuses(jobs.drain()) == ["running"]  # in a process that is gone
        assert data(app) is None
        assert app.get(url).json["status"] == "running"


@pytest.mark.parametrize("store", ["zodb"], indirect=True)
def test_stolen_job_is_lost_a_lease_later_where_several_processes_share_the_storage(
    app, registry, monkeypatch
):
    monkeypatch.setattr(ZodbStore, "exclusive", False)
    with manual(registry) as jobs:
        post(app, "deposit", 5)
        steal(registry, jobs.scheduled[0].sid)
        jobs.drain()
        jobs.recover()
        assert jobs.drain() == []
        jobs.advance(61)
        jobs.recover()
        assert statuses(jobs.drain()) == ["successful"]
    assert data(app) == 5


def test_finished_or_unknown_job_cannot_be_stolen(registry, app):
    with inline(registry) as jobs:
        post(app, "deposit", 5)
    with pytest.raises(InvalidTransition):
        steal(registry, jobs.scheduled[0].sid)
    with pytest.raises(JobNotFound):
        steal(registry, "0" * 32)


@pytest.mark.parametrize("executor", [nullcontext, inline])
def test_fault_that_makes_a_request_leaves_the_transaction_of_its_step_alone(
    store, executor, wait_for
):
    # Without the explicit manager requests and jobs have that of the thread.
    with application(store) as app, executor(app.app.registry), faults(app.app.registry) as plan:
        for step in ("schedule", "succeed", "commit"):
            plan.at(step, before=lambda: app.get("/async/unknown", status=404))
        url = post(app, "deposit", 5)
        wait_for(lambda: app.get(url).json["done"])
        assert data(app) == 5


def test_fault_at_an_unknown_step_is_refused_with_the_nearest_name(registry):
    with faults(registry) as plan:
        with pytest.raises(ValueError, match="no step 'comit'; did you mean 'commit'"):
            plan.at("comit", before=conflict)
        with pytest.raises(ValueError, match="no step 'x'; known: schedule, wake, claim"):
            plan.at("x", before=conflict)


def test_fault_during_a_step_without_a_commit_is_refused(registry):
    with faults(registry) as plan, pytest.raises(ValueError, match="'call' commits nothing"):
        plan.at("call", during=conflict)


def test_fault_that_never_struck_is_an_error(registry):
    missed = pytest.raises(AssertionError, match=r"never struck: fail/before, wake/lost$")
    with missed, faults(registry) as plan:
        plan.at("fail", before=conflict)
        plan.lose_wakeups()


def test_fault_that_never_struck_does_not_hide_the_test_s_own_error(registry):
    with pytest.raises(ZeroDivisionError), faults(registry) as plan:
        plan.at("fail", before=conflict)
        raise ZeroDivisionError


def test_fault_strikes_no_more_after_its_block(app, registry, wait_for):
    struck = []
    with faults(registry) as plan:
        stop = Pause()
        plan.at("call", before=stop)
        url = post(app, "deposit", 5)
        assert stop.reached.wait(10)
        plan.at("commit", during=lambda: struck.append(True))
        plan.struck.append(("commit", "during"))  # so that nothing is missed
    stop.opened.set()
    wait_for(lambda: app.get(url).json["status"] == "successful")
    assert struck == []


def test_pause_of_a_test_that_failed_holds_no_job_any_more(app, registry, wait_for):
    def fail():
        with faults(registry) as plan:
            stop = Pause()
            plan.at("commit", before=stop)
            urls.append(post(app, "deposit", 5))
            assert stop.reached.wait(5)
            raise ZeroDivisionError  # before it opened the pause

    urls = []
    with pytest.raises(ZeroDivisionError):
        fail()
    wait_for(lambda: app.get(urls[0]).json["done"], 10)


def test_faults_let_a_transaction_have_savepoints(app, registry, scheduler):
    with manual(registry) as jobs, faults(registry):
        scheduler.schedule(deposit, 5)
        savepoint = transaction.savepoint()
        scheduler.schedule(deposit, 7)
        savepoint.rollback()
        transaction.commit()
        assert statuses(jobs.drain()) == ["successful"]
    assert data(app) == 5


def test_lost_reply_says_that_it_is_a_test_s():
    with pytest.raises(TransientError, match="a fault of the test"):
        lose_reply()


def test_pause_that_nobody_opens_gives_up():
    with pytest.raises(TimeoutError, match="nobody opened a pause"):
        Pause(0.01)()


def test_pause_that_nobody_reaches_gives_up():
    with pytest.raises(TimeoutError, match="nobody reached a pause"), Pause(0.01):
        pass


def test_hook_that_dies_loses_no_job(app, registry, caplog):
    caplog.set_level(logging.CRITICAL)
    with manual(registry) as jobs, faults(registry) as plan:
        plan.at("wake", before=lose_reply)
        post(app, "deposit", 5)
        jobs.recover()
        assert statuses(jobs.drain()) == ["successful"]


# -- the document --------------------------------------------------------------------------


def blocks():
    found = re.findall(
        r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", DOCUMENT.read_text("utf-8")
    )
    return "\n\n".join(textwrap.dedent(block) for block in found)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """The examples of the document, one after the other, as a module."""
    directory = tmp_path_factory.mktemp("document")
    (directory / "testing_example.py").write_text(blocks(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        yield importlib.import_module("testing_example")


def test_job_that_ended_is_told_of_in_the_same_thread(app, registry):
    told = []
    registry.registerHandler(lambda event: told.append(event.status), (IJobFinished,))
    with inline(registry):
        post(app, "deposit", 5)
        assert told == ["successful"]


@pytest.mark.parametrize("name", re.findall(r"^def (test_\w+)", blocks(), re.MULTILINE))
def test_example_of_the_document(document, name):
    getattr(document, name)()
