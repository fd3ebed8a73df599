"""Celery workers, brokers that fail, servers that fork: the set-ups of docs/deployment.rst.

The first half needs no broker.  The second one starts the application of `tests/deployment` from
the very files that the guide shows, on RabbitMQ, Redis, ZEO and PostgreSQL.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import click
import pytest
import redis
import transaction
import webapp
from amqp.basic_message import Message
from amqp.exceptions import (
    AccessRefused,
    AMQPNotImplementedError,
    NotFound,
    PreconditionFailed,
)
from bare import Clock, CountedLock
from celery.bin.celery import celery as celery_command
from crash.executors import BROKERS, remove_queue
from crash.storages import free_port
from kombu import Queue
from kombu.serialization import registry
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError
from pyramid.paster import get_app
from webapp import EXPLICIT, GATES, browser, echo, gate
from webtest import TestApp
from ZODB.config import databaseFromURL
from zope.interface.verify import verifyObject

from pyramid_async import IJobFinished, IScheduler, JobStopped, JobTimeout, bells, current_job
from pyramid_async import celery as module
from pyramid_async.bells import AGAIN, BELL, Bells, Ring, connect
from pyramid_async.celery import bell
from pyramid_async.consumer import Unreadable, purge, take_bells_alone
from pyramid_async.hints import Hints
from pyramid_async.interfaces import IExecutor
from pyramid_async.jobs import FRESH, UNHELD
from pyramid_async.manage import look, shown_processes
from pyramid_async.prefork import Signals, in_function
from pyramid_async.settings import read_settings
from pyramid_async.transactional import pending
from pyramid_async.tries import storage_at_work
from pyramid_async.worker import GIVE_BACK, LEFT_PAUSE

DEPLOYMENT = Path(__file__).parent / "deployment"
ROOT = DEPLOYMENT.parent.parent
KENNEL = ROOT / "docs" / "examples" / "kennel.py"
GUIDE = ROOT / "docs" / "deployment.rst"
RABBITMQ, REDIS = BROKERS["amqp"], BROKERS["redis"]
PATIENCE = 45.0  # on a busy machine; less than a lease, so that nobody takes up what is lost


def until(question, timeout=PATIENCE, what=""):
    """Return the first true answer."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.02)
    pytest.fail(f"waited {timeout} s in vain: {what or question}")


# -- without a broker ----------------------------------------------------------------------


@pytest.fixture
def black_hole():
    """The port of somebody who accepts and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@pytest.fixture
def broker():
    """A broker in memory, one for each test."""
    return f"memory://{uuid4().hex}"


@contextmanager
def client(url, **settings):
    """A web process whose broker is at *url*, with its own database in memory."""
    settings = {
        "async.executor": "celery",
        "async.celery.broker": url,
        "async.celery.queue": uuid4().hex,
        **EXPLICIT,
        **settings,
    }
    with browser(settings, zodb=f"memory://{uuid4().hex}", retry=True) as made:
        yield made


def sid_of(response):
    return response.location.rpartition("/")[2]


def messages(queue, url):
    """Take the messages from a queue: (body, content type, task) of each."""
    with connect(url) as connection:
        # Asked for, not waited for: no pause tells an empty queue from a slow broker.
        box, found = bells.app.amqp.queues.new_missing(queue)(connection.default_channel), []
        box.queue_declare()
        while message := box.get(no_ack=True):
            found.append((message.body, message.content_type, message.headers["task"]))
        return found


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
@pytest.mark.parametrize("kind", ["closed", "black hole"])
def test_no_request_waits_for_a_broker_that_is_away(scheme, kind, black_hole, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 60.0)
    port = black_hole if kind == "black hole" else free_port()
    with client(f"{scheme}://127.0.0.1:{port}//") as web:
        for _ in range(5):
            begun = time.monotonic()
            web.start(echo)
            assert time.monotonic() - begun < 30


def quickest(call, times=5):
    """Return the seconds of the quickest call: a busy machine delays one or the other."""
    seconds = []
    for _ in range(times):
        begun = time.monotonic()
        call()
        seconds.append(time.monotonic() - begun)
    return min(seconds)


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_publishing_gives_a_black_hole_up_in_about_a_second(scheme, black_hole):
    ringer = Bells(f"{scheme}://127.0.0.1:{black_hole}//", "queue", 10)

    def give_up():
        with pytest.raises(Exception, match=r"(?i)time"):
            ringer._pass_on([Ring("0" * 32, "queue", BELL)])

    # The first time, the client's modules are imported too.
    assert any(quickest(give_up, times=1) < 2 for _ in range(3))


def test_leaving_does_not_wait_for_a_black_hole(black_hole, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 60.0)
    with client(f"amqp://127.0.0.1:{black_hole}//") as web:
        web.start(echo)
        begun = time.monotonic()
        web.scheduler.executor.stop(0.5)
        assert time.monotonic() - begun < 30


def test_a_stop_takes_the_time_of_the_setting(broker, monkeypatch):
    waits = []
    with client(broker, **{"async.shutdown_timeout": "700"}) as web:
        executor = web.scheduler.executor
        monkeypatch.setattr(executor.recovery, "stop", waits.append)
        executor.stop()
    assert 600 < waits[0] <= 700 + GIVE_BACK


def test_bells_that_find_no_room_are_left_to_recovery(black_hole, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 60.0)
    settings = {"async.max_pending": "2"}
    with client(f"amqp://127.0.0.1:{black_hole}//", **settings) as web:
        sids = [sid_of(web.start(echo))]
        until(lambda: web.scheduler.executor.room() == 2)  # the thread has taken it, and hangs
        sids += [sid_of(web.start(echo)) for _ in range(4)]
        assert web.scheduler.executor.room() == 0
        assert web.scheduler.executor.bells._waiting.qsize() <= 2
        assert all(web.scheduler.transact(lambda s, sid=sid: s.status(sid)) for sid in sids)


def test_requests_that_ring_for_the_last_room_at_once_make_no_more(broker):
    ringer = Bells(broker, "queue", 1)
    for _ in range(2):
        ringer._waiting.put(Ring("a" * 32, "queue", BELL))  # each saw the room that was left
    ringer.ring("b" * 32, None, BELL)
    assert (ringer.room(), ringer._waiting.qsize()) == (0, 2)


def test_the_message_carries_the_sid_alone(broker):
    with client(broker) as web:
        sid = sid_of(web.start(echo, "a secret"))
        web.scheduler.executor.stop(5)
        queue = web.scheduler.settings["celery.queue"]
        [(body, content_type, task)] = messages(queue, broker)
    assert (content_type, task) == ("application/json", BELL)
    args, kw, embedded = json.loads(body)
    assert (args, kw) == ([sid], {})
    assert not any(embedded.values())


def test_an_aborted_request_rings_no_bell(broker):
    with client(broker) as web:
        with pytest.raises(transaction.interfaces.TransientError):
            web.post_json("/start/echo?conflict=9", {})
        web.scheduler.executor.stop(5)
        assert messages(web.scheduler.settings["celery.queue"], broker) == []


def test_using_chooses_the_queue(broker):
    other = uuid4().hex
    with client(broker) as web:
        web.start(echo, queue=other)
        web.scheduler.executor.stop(5)
        assert len(messages(other, broker)) == 1


def test_a_job_whose_time_has_come_goes_to_its_own_queue(broker):
    other = uuid4().hex
    with client(broker) as web:
        sid = sid_of(web.start(echo, queue=other, run_after=0.01))
        web.scheduler.executor.put(sid, FRESH)
        web.scheduler.executor.stop(5)
        assert len(messages(other, broker)) == 2


def test_a_bell_of_a_request_that_is_repeated_after_its_commit_is_another(broker):
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        executor.wake(True, sid_of(web.start(echo)))
        executor.stop(5)
        assert [task for _, _, task in messages(queue, broker)] == [BELL, AGAIN]


def test_a_job_is_run_once_however_often_its_bell_rings(broker):
    with client(broker) as web, gate() as at:
        url = web.url(webapp.behind_gate, at, "done")
        answers = [
            threading.Thread(
                target=web.scheduler.executor.answer, args=(url.rpartition("/")[2], again)
            )
            for again in (False, True, False, True)
        ]
        for thread in answers:
            thread.start()
        GATES[at].reach()
        GATES[at].opened.set()
        for thread in answers:
            thread.join(PATIENCE)
        assert web.done(url)["result"] == "done"
        record = web.scheduler.transact(lambda s: s.status(url.rpartition("/")[2]))
        assert record.attempts == 1


@contextmanager
def running_behind_gate(web):
    """A job that a thread of its own runs up to a gate; the gate opens at the end.  Its sid."""
    with gate() as at:
        sid = web.url(webapp.behind_gate, at, "done").rpartition("/")[2]
        thread = threading.Thread(target=web.scheduler.executor.answer, args=(sid, True))
        thread.start()
        GATES[at].reach()
        try:
            yield sid
        finally:
            GATES[at].opened.set()
            thread.join(PATIENCE)


def test_a_look_leaves_alone_what_runs_in_its_own_process(broker):
    with client(broker) as web:
        with running_behind_gate(web) as sid:
            web.scheduler.executor.recovery.look()
        status = web.scheduler.transact(lambda s: s.status(sid))
    assert (status.status, status.attempts) == ("successful", 1)


def begin_in_the_threads_manager():
    transaction.begin()


def test_what_a_job_leaves_in_the_threads_transaction_is_not_the_next_ones(broker):
    with client(broker) as web:
        sid = web.scheduler.transact(lambda s: s.schedule(begin_in_the_threads_manager))
        web.scheduler.executor.answer(sid, again=False)
        assert pending(transaction.manager) is None


def test_a_stop_gives_back_what_still_runs(broker):
    with client(broker) as web:
        executor = web.scheduler.executor
        with running_behind_gate(web) as sid:
            assert web.scheduler.transact(lambda s: s.status(sid).attempts) == 1
            executor.stop(0.05)
            status = web.scheduler.transact(lambda s: s.status(sid))
        assert web.scheduler.transact(lambda s: s.completed(sid)) is False
    assert (status.attempts, executor.suspended) == (0, False)


def test_a_stop_waits_for_a_job_that_ends_in_time(broker, monkeypatch):
    with client(broker) as web:
        executor, given_back = web.scheduler.executor, []

        def open_and_wait(*args, wait=executor.worker.changes.wait):
            for each in GATES.values():
                each.opened.set()
            wait(*args)

        def give_back():
            given_back.append([*executor.held])

        monkeypatch.setattr(executor.worker.changes, "wait", open_and_wait)
        monkeypatch.setattr(executor.worker, "give_back_running", give_back)
        with running_behind_gate(web):
            executor.stop(5)
    assert given_back == [[]]


def test_bells_are_sent_although_the_jobs_could_not_be_given_back(broker, caplog, monkeypatch):
    def give_back():
        raise OSError("the database is away")

    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        monkeypatch.setattr(executor.worker, "give_back_running", give_back)
        web.start(echo)
        executor.stop(5)
        assert not executor.bells._thread.is_alive()
        assert len(messages(queue, broker)) == 1
    assert "jobs could not be given back" in caplog.text


def test_a_running_job_is_told_that_its_process_ends(broker):
    with client(broker) as web, running_behind_gate(web) as sid:
        web.scheduler.executor.end_jobs("the process is told to end")
        with pytest.raises(JobStopped, match="told to end"):
            web.scheduler.executor.worker.running[sid].check()


def test_a_stop_takes_the_sign_of_life_away(broker):
    with client(broker) as web, running_behind_gate(web) as sid:
        executor = web.scheduler.executor
        executor.recovery.beat()
        [process] = look(web.scheduler, shown_processes)
        assert process.running == (sid,)
        executor.stop(0)
        assert look(web.scheduler, shown_processes) == []


@pytest.mark.parametrize("renewed", [False, True])
def test_a_stop_passes_on_what_waits_for_its_time(renewed, broker):
    sid, others = "a" * 32, [[1e11, "b" * 32]]
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        executor.recovery.hints, executor.renewed = Hints(4096), renewed
        executor.recovery.hints.write({"timers": others})
        executor.recovery.later(1e12, sid)
        executor.stop(5)
        timers = executor.recovery.hints.read().get("timers", [])
        rung = [(json.loads(body)[0], task) for body, _, task in messages(queue, broker)]
    # A bell would be one of the few tasks of the process that takes the place.
    ours = ([[1e12, sid]], []) if renewed else ([], [([sid], AGAIN)])
    assert (timers, rung) == (others + ours[0], ours[1])


@pytest.mark.parametrize(("timeout", "least"), [(0, 0.1), (5, 4)])
def test_a_stop_leaves_to_the_bells_what_is_left_of_its_time(timeout, least, broker, monkeypatch):
    with client(broker) as web:
        executor, times = web.scheduler.executor, []
        web.start(echo)
        stop = executor.bells.stop
        monkeypatch.setattr(executor.bells, "stop", times.append)
        executor.stop(timeout)
        stop(5)
    assert least <= times[0] <= max(least, timeout)


def test_a_stopped_executor_waits_for_no_exit(broker, monkeypatch):
    left = []
    calls = SimpleNamespace(register=left.append, unregister=left.remove)
    monkeypatch.setattr(module, "atexit", calls)
    with client(broker) as web:
        assert left == [web.scheduler.executor.stop]
        web.scheduler.executor.stop(5)
    assert left == []


def test_a_stop_does_not_wait_where_nothing_runs(broker, monkeypatch):
    with client(broker) as web:
        executor = web.scheduler.executor
        web.start(echo)
        monkeypatch.setattr(executor.worker.changes, "wait", pytest.fail)
        executor.stop()


def test_a_stop_waits_until_the_jobs_are_given_back(broker, monkeypatch):
    with client(broker) as web:
        executor, given = web.scheduler.executor, []

        def give_back():
            time.sleep(0.2)
            given.append("back")

        monkeypatch.setattr(executor.worker, "give_back_running", give_back)
        executor.recovery.start()
        executor.stop(0)
        assert given == ["back"]


def test_a_stop_in_a_child_touches_nothing_of_its_parent(broker, monkeypatch):
    with client(broker) as web:
        executor = web.scheduler.executor
        with monkeypatch.context() as patch:
            patch.setattr(executor, "_pid", os.getppid())
            patch.setattr(executor.worker, "interrupt_all", pytest.fail)
            executor.stop()


def test_what_rings_for_jobs_is_an_executor(broker):
    with client(broker) as web:
        assert verifyObject(IExecutor, web.scheduler.executor)


def test_threads_that_ring_first_at_once_start_one_that_sends(broker, monkeypatch):
    with client(broker) as web:
        executor, made, lock = web.scheduler.executor, [], CountedLock()
        executor.stop(5)
        executor.stopped = False
        make, other = executor.make_bells, threading.Thread(target=executor.start)

        def make_bells():
            made.append(make())
            if len(made) == 1:
                other.start()
                until(lambda: lock.asked == 2 or len(made) == 2)
            return made[-1]

        monkeypatch.setattr(executor, "_locks", {os.getpid(): lock})
        monkeypatch.setattr(executor, "make_bells", make_bells)
        executor.start()
        other.join(5)
        executor.stop(5)
        assert len(made) == 1


def test_a_process_without_room_for_a_thread_rings_once_there_is(broker, caplog, monkeypatch):
    def refuse(bells):
        raise RuntimeError("can't start new thread")

    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        executor.bells.stop(5)
        executor.workers, executor._pid = 1, None  # as in a child of whoever made it
        with monkeypatch.context() as patch:
            patch.setattr(Bells, "start", refuse)
            sid = sid_of(web.start(echo))
        assert f"the bell for job '{sid}' was not rung; recovery will ring it" in caplog.text
        web.start(echo)
        executor.start()
        # Python would wait for others before it calls what is registered for the exit.
        threads = Counter(thread.name for thread in threading.enumerate() if thread.daemon)
        assert threads["pyramid_async-bells"] == threads["pyramid_async-recovery"] == 1
        executor.stop(5)
        assert len(messages(queue, broker)) == 1


def test_a_cold_shutdown_ends_those_processes_alone_that_celery_does_not_end(monkeypatch):
    monkeypatch.setattr(module.state, "active_requests", [SimpleNamespace(worker_pid=2)])
    ended = []
    pool = SimpleNamespace(info={"processes": [1, 2, 3]}, terminate_job=ended.append)
    module.end_pool(SimpleNamespace(pool=pool))
    assert ended == [1, 3]


def test_a_cold_shutdown_comes_after_celerys_soft_one():
    done = []
    worker = SimpleNamespace(wait_for_soft_shutdown=lambda: done.append("waited"))
    module.at_cold_shutdown(worker, lambda worker: done.append("told"))
    worker.wait_for_soft_shutdown()
    assert done == ["waited", "told"]


def test_who_signals_again_while_celerys_soft_shutdown_waits_has_the_jobs_told(monkeypatch):
    class Pool:
        """One without processes, in which Celery can end no job."""

    told = []
    monkeypatch.setattr(module.site, "end_jobs", told.append)
    worker = SimpleNamespace(pool_cls=Pool, wait_for_soft_shutdown=None)
    module.tell_at_cold_shutdown(worker)
    worker.pool_cls().terminate_job(os.getpid(), "SIGTERM")
    assert told == [f"process {os.getpid()} is told to end"]
    # Celery's banner names the pool by it.
    assert worker.pool_cls.__module__ == Pool.__module__


def test_a_result_backend_of_the_environment_gets_no_results():
    assert bell.ignore_result
    assert module.again.ignore_result


@pytest.mark.parametrize(("given", "kept"), [((4, 0), (4, 1)), ((4, 2), (4, 2))])
def test_a_pool_that_shrinks_keeps_one_process_or_as_many_as_it_is_told(given, kept, monkeypatch):
    monkeypatch.setattr(module, "site", module.Site())
    monkeypatch.setattr(module, "signals_of_celery", Signals())
    module.site.ini = "production.ini"
    worker = SimpleNamespace(
        app=module.app,
        consumer_cls=Consumer,
        options={"autoscale": given},
        soft_time_limit=None,
        time_limit=None,
        pool_cls="prefork",
        wait_for_soft_shutdown=None,
    )
    module.begin(worker)
    assert worker.options["autoscale"] == kept


@pytest.mark.parametrize("forged", [None, 7, "", "no sid", ["a" * 32], {"sid": 1}, "A" * 32])
def test_a_bell_without_an_id_is_refused_at_once(forged, broker, caplog, monkeypatch):
    monkeypatch.setattr(module, "RECORD_TIMEOUT", 3600)
    with client(broker) as web:
        web.scheduler.executor.answer(forged, again=False)
    assert "which is no job's id" in caplog.text


@pytest.mark.parametrize("again", [False, True])
def test_a_bell_for_an_unknown_job_changes_nothing(again, broker, caplog):
    caplog.set_level("INFO")
    with client(broker) as web:
        web.scheduler.executor.answer("0" * 32, again)
    assert f"no job '{'0' * 32}' for a bell" in caplog.text


@pytest.mark.parametrize("again", [False, True])
def test_the_first_bell_needs_no_claim(again, broker, monkeypatch):
    with client(broker) as web:
        executor, claims = web.scheduler.executor, []
        sid = web.scheduler.transact(lambda s: s.schedule(echo))
        claim = executor.worker._claim
        monkeypatch.setattr(executor.worker, "_claim", lambda *a: claims.append(a) or claim(*a))
        executor.answer(sid, again)
        assert web.scheduler.transact(lambda s: s.completed(sid))
    assert len(claims) == again


@pytest.mark.parametrize("again", [False, True])
def test_a_record_that_shows_up_late_is_waited_for(again, broker, monkeypatch):
    for name in ("RECORD_TIMEOUT", "RECORD_TIMEOUT_AGAIN"):
        monkeypatch.setattr(module, name, 20.0)
    with client(broker) as web:
        sid = "ab" * 16
        late = threading.Timer(0.1, schedule_as, (web, sid))
        late.start()
        web.scheduler.executor.answer(sid, again)
        late.join()
        assert web.scheduler.transact(lambda s: s.completed(sid))


@pytest.mark.parametrize("again", [False, True])
def test_the_bell_of_a_job_that_was_dismissed_and_removed_keeps_no_worker_waiting(
    again, broker, caplog, monkeypatch
):
    caplog.set_level("INFO")
    pauses = []
    fake = SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    with client(broker) as web:
        sid = sid_of(web.start(echo))
        web.delete(f"/async/{sid}")
        web.scheduler.transact(lambda s: s.remove(sid))
        assert web.scheduler.transact(lambda s: s.status(sid)) is None
        monkeypatch.setattr(module, "time", fake)
        web.scheduler.executor.answer(sid, again)
    assert pauses == []
    assert "for a bell" not in caplog.text


def test_a_record_is_looked_for_ever_less_often(broker, monkeypatch):
    clock, pauses = Clock(), []

    def sleep(seconds):
        pauses.append(seconds)
        clock.now += seconds

    with client(broker) as web:
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
        web.scheduler.executor.answer("0" * 32, again=False)
    assert pauses == [0.005 * 2**n for n in range(8)]
    assert sum(pauses) < module.RECORD_TIMEOUT


def test_a_record_that_comes_after_the_look_for_it_is_waited_for(broker, monkeypatch):
    with client(broker) as web:
        executor, sid = web.scheduler.executor, "ab" * 16

        def run_too_early(*args, run=executor.worker.run):
            found = run(*args)
            monkeypatch.setattr(executor.worker, "run", run)
            schedule_as(web, sid)
            return found

        monkeypatch.setattr(executor.worker, "run", run_too_early)
        executor.answer(sid, again=False)
        assert web.scheduler.transact(lambda s: s.completed(sid))


def schedule_as(web, sid):
    def schedule(scheduler):
        caller = scheduler._caller._replace(new_sid=lambda: sid)
        scheduler.bind(scheduler._tm, caller).schedule(echo)

    web.scheduler.transact(schedule)


def test_recovery_rings_again_where_the_queue_is_empty_and_not_where_bells_wait(broker):
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        sid = sid_of(web.start(echo))
        until(lambda: executor.bells._waiting.empty() and executor.bells._connection)
        executor.bells._rung.clear()
        executor.put(sid, UNHELD)  # its bell still waits
        executor.stop(5)
        assert len(messages(queue, broker)) == 1
        late = Bells(broker, queue, 10)
        late.start()
        late.ring(sid, None, AGAIN, most_waiting=1)
        late.stop(5)
        assert len(messages(queue, broker)) == 1


def test_a_job_that_is_passed_over_for_long_is_rung_for_all_the_same(broker, monkeypatch):
    monkeypatch.setattr(bells, "PASSED_OVER", -1.0)
    with client(broker) as web:
        executor = web.scheduler.executor
        sid = sid_of(web.start(echo))
        executor.bells.ring(sid, None, AGAIN, most_waiting=1)
        executor.stop(5)
        assert len(messages(web.scheduler.settings["celery.queue"], broker)) == 2


def test_a_job_that_was_passed_over_may_be_rung_for_again(broker):
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    ringer.ring("b" * 32, queue, AGAIN, most_waiting=1)
    assert ringer.rung("b" * 32)
    ringer._next()
    assert not ringer.rung("b" * 32)
    ringer._disconnect()
    assert len(messages(queue, broker)) == 1


def test_copies_of_bells_do_not_pile_up_while_workers_are_behind(broker, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    jobs = [f"{number:032}" for number in range(3)]
    ringer._pass_on([Ring(job, queue, BELL) for job in jobs])

    def pass_time(seconds, jobs):
        for _ in range(0, seconds, 10):
            clock.now += 10
            for job in jobs:
                ringer._pass_on([Ring(job, queue, AGAIN, len(jobs))])

    pass_time(3600, jobs)
    assert set(ringer._passed_over) == set(jobs)
    pass_time(400, jobs[:1])
    assert set(ringer._passed_over) == set(jobs[:1])
    assert len(messages(queue, broker)) == 4


def test_a_lost_bell_is_rung_again_on_a_queue_that_is_never_empty(broker, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    young, lost = ["0" * 32, "1" * 32], "f" * 32
    ringer._pass_on([Ring(job, queue, BELL) for job in (*young, *young)])

    def look(times=1):
        """Let recovery ask; return how many messages the queue has afterwards."""
        for _ in range(times):
            clock.now += 10
            ringer._pass_on([Ring(lost, queue, AGAIN, len([*young, lost]))])
        return ringer._declare(queue)

    assert look(360) == 4  # copies are among them
    with connect(broker) as connection, closing(connection.SimpleQueue(queue)) as box:
        box.get().ack()
    assert look() == 4
    assert [json.loads(body)[0] for body, _, _ in messages(queue, broker)][-1] == [lost]


def test_a_lost_bell_is_not_rung_again_before_other_jobs_had_their_time(broker, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._pass_on([Ring("0" * 32, queue, BELL)])
    lengths = []
    for _ in range(0, 2 * int(bells.PASSED_OVER), 10):
        ringer._pass_on([Ring("f" * 32, queue, AGAIN, 9)])
        lengths.append(ringer._declare(queue))
        clock.now += 10
    half = len(lengths) // 2
    assert lengths == [1] * half + [2] * half


def test_where_all_bells_were_lost_one_look_rings_for_as_many_jobs_as_it_found(broker, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    viewed = clock.now

    def ring(job, viewed):
        ringer._pass_on([Ring(f"{job:032}", queue, AGAIN, 3, viewed)])
        clock.now += bells.LENGTH_KNOWN
        return ringer._declare(queue)

    assert ring(0, viewed) == 1
    assert ring(1, clock.now) == 1  # its own bell may be the one that waits
    assert [ring(job, viewed) for job in range(2, 6)] == [2, 3, 4, 4]


def test_one_look_makes_no_more_copies_than_there_are_jobs_that_nobody_began(broker, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    jobs = [f"{number:032}" for number in range(5)]
    ringer._pass_on([Ring(job, queue, BELL) for job in jobs[:3]])
    for _ in range(2):
        ringer._pass_on([Ring(job, queue, AGAIN, len(jobs)) for job in jobs])
        clock.now += bells.PASSED_OVER
    assert ringer._declare(queue) == len(jobs) + 1


def test_recovery_rings_for_a_lost_job_with_the_number_of_those_that_nobody_began(
    broker, monkeypatch
):
    with client(broker) as web:
        executor = web.scheduler.executor
        sids = {sid_of(web.start(echo)) for _ in range(3)}
        web.start(echo, run_after=3600)  # not due
        rings = []
        monkeypatch.setattr(executor.bells, "ring", lambda *ring: rings.append(ring))
        executor.bells._rung.clear()
        executor.grace = -1.0  # they have waited long enough
        executor.recovery.look()
        rings.clear()
        begun = time.monotonic()
        executor.recovery.look()
        assert {ring[:-1] for ring in rings} == {(sid, None, AGAIN, 3) for sid in sids}
        assert begun <= rings[0][-1] <= time.monotonic()


def test_recovery_does_not_ring_again_a_moment_later(broker):
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        sid = sid_of(web.start(echo))
        until(lambda: messages(queue, broker))
        executor.put(sid, UNHELD)
        executor.stop(5)
        assert messages(queue, broker) == []


def test_recovery_rings_in_the_queue_that_a_job_was_scheduled_with(broker):
    other = uuid4().hex
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        web.start(echo, queue=other)
        until(lambda: messages(other, broker))
        executor.bells._rung.clear()
        executor.grace = -1.0  # it has waited long enough
        executor.recovery.look()
        executor.stop(5)
        assert [task for _, _, task in messages(other, broker)] == [AGAIN]
        assert messages(queue, broker) == []


def test_who_runs_no_jobs_looks_for_none(broker):
    with client(broker) as web:
        web.start(echo)
        names = {thread.name for thread in threading.enumerate()}
        assert "pyramid_async-bells" in names
        assert "pyramid_async-recovery" not in names


@pytest.mark.parametrize(
    ("reason", "pauses"), [("suspended", [LEFT_PAUSE]), ("ends", []), ("stopped", [])]
)
def test_who_takes_no_jobs_leaves_a_job_to_others(reason, pauses, broker, monkeypatch):
    """And the next bells, too, where it would answer them all in no time and in vain."""
    slept = []
    clock = SimpleNamespace(monotonic=Clock(), sleep=slept.append)
    with client(broker) as web:
        executor = web.scheduler.executor
        executor.recovery.stop(5)  # it would notice that all is well
        if reason == "ends":
            executor.end_jobs("the process is told to end")
        else:
            setattr(executor, reason, True)
        sid = sid_of(web.start(echo))
        monkeypatch.setattr(module, "time", clock)
        executor.answer(sid, again=False)
        assert slept == pauses
        assert web.scheduler.transact(lambda s: s.status(sid)).status == "accepted"


class Closed:
    """A connection that was closed behind our back."""

    def __getattr__(self, name):
        raise OSError(f"closed, there is no {name}")


def test_a_bell_outlives_a_connection_that_was_closed(broker):
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._connection = ringer._producer = Closed()
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    # The broker may have got both, for all that is known.
    assert [task for _, _, task in messages(queue, broker)] == [AGAIN]


def test_all_bells_that_a_closed_connection_may_have_lost_are_sent_again(broker, monkeypatch):
    monkeypatch.setattr(bells, "CONFIRM", 60)
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._confirmed = time.monotonic()
    for number in range(3):
        ringer._pass_on([Ring(f"{number:032}", queue, BELL)])
    assert len(messages(queue, broker)) == 3
    ringer._connection = ringer._producer = Closed()
    ringer._pass_on([])
    assert [task for _, _, task in messages(queue, broker)] == [AGAIN] * 3


def test_what_was_sent_is_asked_for_when_no_other_bell_comes(broker):
    ringer = Bells(broker, uuid4().hex, 10)
    ringer._confirmed = time.monotonic() + 60  # nothing is asked for while bells come
    ringer.start()
    ringer.ring("a" * 32, None, BELL)
    until(lambda: ringer._connection and ringer._waiting.empty() and not ringer._unconfirmed)
    assert ringer._confirmed < time.monotonic() + 1
    ringer.stop(5)


def test_what_was_sent_is_asked_for_while_bells_come(broker, monkeypatch):
    monkeypatch.setattr(bells, "CONFIRM", 0)
    ringer = Bells(broker, uuid4().hex, 10)
    ringer._pass_on([Ring("a" * 32, "queue", BELL)])
    assert ringer._unconfirmed == []


def test_a_queue_is_made_once_for_each_connection(broker):
    ringer, queue, made = Bells(broker, "queue", 10), uuid4().hex, []
    declare = ringer._declare
    ringer._declare = lambda name: made.append(name) or declare(name)
    for _ in range(2):
        ringer._pass_on([Ring("a" * 32, queue, BELL)])
    assert made == [queue]
    connection = ringer._connection
    ringer._disconnect()
    assert not connection.connected
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    assert made == [queue] * 2


def test_who_has_rung_for_nothing_leaves_without_asking_the_broker(caplog):
    ringer = Bells(f"amqp://127.0.0.1:{free_port()}//", "queue", 10)
    ringer.start()
    ringer.stop(5)
    assert not ringer._thread.is_alive()
    assert caplog.text == ""


def test_bells_are_json_whatever_the_process_does_with_kombu(broker, monkeypatch):
    monkeypatch.setattr(registry, "_default_encode", registry._encoders["pickle"].encoder)
    monkeypatch.setattr(registry, "_default_content_type", "application/x-python-serialize")
    monkeypatch.setattr(registry, "_default_content_encoding", "binary")
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    [(body, kind, _)] = messages(queue, broker)
    assert (kind, json.loads(body)[0]) == ("application/json", ["a" * 32])


def test_what_is_rung_while_the_broker_is_asked_is_sent_before_the_end(broker):
    ringer, queue = Bells(broker, uuid4().hex, 100), uuid4().hex
    ringer._confirmed = time.monotonic() + 60  # nothing is asked for while bells come
    confirm = ringer._confirm

    def ring_and_stop():
        del ringer._confirm
        confirm()
        for number in range(10):
            ringer.ring(f"{number:032}", queue, BELL)
        ringer.stopped.set()
        ringer._waiting.put(None)

    ringer._confirm = ring_and_stop
    ringer.ring("a" * 32, queue, BELL)
    ringer.start()
    ringer._thread.join(10)
    assert len(messages(queue, broker)) == 11


def test_who_is_rung_for_once_more_does_not_wait_long_for_the_record(broker, monkeypatch):
    monkeypatch.setattr(module, "RECORD_TIMEOUT", 3600)
    with client(broker) as web:
        web.scheduler.executor.answer("f" * 32, again=True)


def test_a_bell_is_sent_to_the_last_of_a_list_of_brokers_if_no_other_is_there(broker):
    closed = [f"amqp://127.0.0.1:{free_port()}//" for _ in range(3)]
    ringer, queue = Bells(";".join([*closed, broker]), "queue", 10), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    ringer._disconnect()
    assert len(messages(queue, broker)) == 1


def test_a_bell_that_was_dropped_may_be_rung_again(caplog, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 0.01)
    ringer = Bells(f"amqp://127.0.0.1:{free_port()}//", "queue", 10)
    for task in (BELL, AGAIN):
        ringer.ring("a" * 32, None, task)
    assert ringer.rung("a" * 32)
    ringer.start()
    until(lambda: caplog.text.count("bells were dropped") == 2)
    assert not ringer.rung("a" * 32)
    ringer.stop(5)


def test_a_bell_that_the_thread_drops_at_once_may_be_rung_again(monkeypatch):
    def drop(ring):
        ringer._unconfirmed.append(ring)
        ringer._drop(OSError("away"))

    ringer = Bells("amqp://", "queue", 10)
    monkeypatch.setattr(ringer, "_waiting", SimpleNamespace(qsize=lambda: 0, put=drop))
    ringer.ring("a" * 32, None, BELL)
    assert not ringer.rung("a" * 32)


def test_bells_are_sent_again_once_the_broker_is_back(broker, caplog, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 0.01)
    ringer, queue = Bells(broker, uuid4().hex, 10), uuid4().hex
    connected, away = ringer._connected, ["once", "twice"]

    def connect():
        if away:
            raise OSError(f"refused {away.pop()}")
        return connected()

    ringer._connected = connect
    ringer.start()
    for sid in ("a" * 32, "b" * 32):
        ringer.ring(sid, queue, BELL)
        until(lambda: f"bells were dropped, 1, the first for job {sid!r}" in caplog.text)  # noqa: B023
    ringer.ring("c" * 32, queue, BELL)
    until(ringer._waiting.empty)  # who is stopped in the pause after a failure tries no more
    ringer.stop(5)
    assert [json.loads(body)[0] for body, _, _ in messages(queue, broker)] == [["c" * 32]]
    assert ringer._connection is None


def test_what_is_wrong_with_a_whole_broker_is_no_refusal_of_a_queue():
    assert isinstance(AccessRefused(), bells.REFUSALS)
    # To the client these are errors of the channel; another connection may be better.
    for error in (redis.exceptions.ReadOnlyError(), redis.exceptions.OutOfMemoryError()):
        assert not isinstance(error, bells.REFUSALS)


def test_a_queue_that_the_broker_refuses_keeps_no_other_bell_waiting(broker, caplog, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, asked = Bells(broker, uuid4().hex, 2), []
    declare = ringer._declare

    def refuse(name):
        count = declare(name)
        if "refused" in name:
            asked.append(name)
            raise struct.error("too long")
        return count

    ringer._declare = refuse

    def ring(*names):
        for name in names:
            ringer.ring(f"{name:f>32}", name, AGAIN, most_waiting=1)
            assert ringer._next()

    ring("refused", "refused too", "refused", "refused too", ringer.default_queue)
    assert asked == ["refused", "refused too"]
    assert len(messages(ringer.default_queue, broker)) == 1
    assert ringer.rung(f"{'refused':f>32}")  # so recovery asks later
    assert caplog.text.count("the broker refuses the queue 'refused' of job ") == 1
    clock.now += bells.PAUSE
    ring("refused", *(f"refused {number}" for number in range(9)))
    assert asked[:3] == ["refused", "refused too", "refused"]
    assert 0 < len(ringer._refused) <= 3


@pytest.mark.parametrize("found", ["unheard of", "due", "lost"])
def test_who_answers_may_skip_the_claim_of_none_but_a_new_job(found, broker):
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        sid = web.scheduler.transact(lambda s: s.using(run_after=3600).schedule(echo))
        seen = {"unheard of": UNHELD, "due": FRESH, "lost": 1}[found]
        until(lambda: messages(queue, broker))  # which takes it away
        executor.bells._rung.clear()
        executor.put(sid, seen)
        executor.stop(5)
        assert [task for _, _, task in messages(queue, broker)] == [AGAIN]


def test_a_lost_job_without_attempts_left_is_not_rung_for(broker):
    with client(broker, **{"async.max_attempts": "1"}) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        sid = web.scheduler.transact(lambda s: s.schedule(echo))
        web.scheduler.transact(lambda s: s._table().get(sid).claim("dead", "signature", 0.0))
        until(executor.bells._waiting.empty)
        executor.put(sid, web.scheduler.transact(lambda s: s._table().get(sid).revision))
        executor.stop(5)
        assert len(messages(queue, broker)) == 1
        failure = web.scheduler.transact(lambda s: s.status(sid)).failure
    assert "the last worker was process dead" in failure.message


@pytest.mark.parametrize("info", [{"redelivered": True}, {"redelivered": False}, {}])
def test_what_a_broker_delivers_again_is_claimed_first(info, monkeypatch):
    answers = []
    monkeypatch.setattr(module.site, "answer", lambda sid, again: answers.append((sid, again)))
    bell.push_request(delivery_info=info)
    try:
        bell.run("a" * 32)
    finally:
        bell.pop_request()
    assert answers == [("a" * 32, info.get("redelivered", False))]


def test_what_recovery_rings_for_is_claimed_first(monkeypatch):
    answers = []
    monkeypatch.setattr(module.site, "answer", lambda sid, again: answers.append((sid, again)))
    module.again.run("a" * 32)
    assert answers == [("a" * 32, True)]


def test_a_bell_is_rung_again_where_there_is_no_queue_yet(broker):
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, AGAIN, 1)])
    assert len(messages(queue, broker)) == 1


def test_the_length_of_a_queue_is_asked_for_once_a_second(broker, monkeypatch):
    clock, asked = Clock(), []
    monkeypatch.setattr(bells, "time", SimpleNamespace(monotonic=clock))
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    declare = ringer._declare
    ringer._declare = lambda name: asked.append(name) or declare(name)
    for number in range(3):
        ringer._others_wait(Ring(f"{number:032}", queue, AGAIN, 1), 1)
    assert asked == [queue]
    clock.now += 1
    ringer._others_wait(Ring("a" * 32, queue, AGAIN, 1), 1)
    assert asked == [queue] * 2


def test_what_is_remembered_of_bells_has_a_bound(broker):
    ringer, queue = Bells(broker, uuid4().hex, 3), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    for number in range(20):
        ringer.ring(f"{number:032}", queue, BELL)
        ringer._waiting.get_nowait()
    assert 0 < len(ringer._rung) <= 4
    for number in range(20):
        ringer._send([Ring(f"{number:032}", queue, AGAIN, 1)])  # passed over: another waits
    assert 0 < len(ringer._passed_over) <= 4
    assert len(messages(queue, broker)) == 1


LEAVE = """
import sys, webapp
from pyramid_async.bells import Bells

def stop(bells, timeout, stop=Bells.stop):
    stop(bells, timeout)
    print("said what waited")

Bells.stop = stop
settings = {"async.executor": "celery", "async.celery.broker": "memory://", **webapp.EXPLICIT}
web = webapp.Browser(webapp.application(settings, zodb="memory://", retry=True))
web.start(webapp.echo)
"""


@pytest.mark.slow
def test_a_process_that_exits_sends_what_waits():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-c", LEAVE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stdout) == (0, "said what waited\n"), run.stderr


def test_records_in_ram_are_refused():
    settings = {"async.executor": "celery", "async.store": "ram"}
    with pytest.raises(ConfigurationError, match="records are in RAM"), browser(settings):
        pass


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("rabbit://u:secret@localhost", "of no use: .*No such transport: rabbit"),
        ("redis://localhost;Sentinel://:secret@localhost:26379/0", "of no use: .*master_name"),
        ("amqp://u:secret/word@localhost//", "no URL"),
        ("redis://u:se#cret@localhost:port/0", "no URL"),
    ],
)
def test_broker_that_kombu_does_not_know_stops_the_start(url, why):
    settings = {"async.executor": "celery", "async.celery.broker": url}
    refused = pytest.raises(ConfigurationError, match=rf"async\.celery\.broker is {why}")
    with refused as error, browser(settings, zodb="memory://"):
        pass
    assert "sec" not in str(error.value)  # the start is logged


def test_a_database_that_no_worker_can_open_is_told(caplog):
    with browser({"async.executor": "celery"}, zodb="memory://"):
        assert "no worker will run its jobs: use ZEO or RelStorage" in caplog.text


def test_of_a_database_that_workers_can_open_nothing_is_told(broker, caplog):
    store = SimpleNamespace(durable=True, exclusive=False)
    settings = {"celery.broker": broker, "celery.queue": "q", "max_pending": 1}
    worker = SimpleNamespace(store=store, running={})
    module.make_executor(worker, {**settings, "shutdown_timeout": 1.0})
    assert caplog.text == ""


@pytest.mark.parametrize("included", ["pyramid_async", "pyramid_async.celery"])
@pytest.mark.parametrize("missing", ["billiard.pool", "celery"])
def test_a_missing_celery_is_told_by_its_name(included, missing, monkeypatch):
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delattr(module.__name__)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pyramid_async\[celery\]'"):
        Configurator(settings={"async.executor": "celery"}).include(included)


def test_including_the_module_is_enough(broker):
    def include(config):
        config.include("pyramid_async.celery")

    # As an application does that keeps its own settings free of it.
    settings = {"async.celery.broker": broker, "async.celery.queue": uuid4().hex}
    with browser(settings, zodb=f"memory://{uuid4().hex}", routes=include) as web:
        assert isinstance(web.scheduler.executor, module.CeleryExecutor)
        assert web.scheduler.settings["executor"] == "celery"


def test_including_the_module_includes_the_library():
    config = Configurator()
    config.include("pyramid_async.celery")
    assert config.add_operation


def test_including_the_module_contradicts_another_executor():
    config = Configurator(settings={"async.executor": "threads"})
    with pytest.raises(ConfigurationError, match=r"async\.executor is 'threads' and .* included"):
        config.include("pyramid_async.celery")


def test_whoever_can_write_to_the_broker_reaches_the_bells():
    module.app.finalize()
    assert sorted(module.app.tasks) == ["pyramid_async.again", "pyramid_async.bell"]
    assert not module.app.conf.worker_enable_remote_control
    assert module.app.conf.accept_content == ["json"]
    assert module.app.conf.task_ignore_result
    assert module.app.conf.result_backend is None
    assert not module.app.conf.task_acks_late


# Messages that are no bells: body and headers, None where these are a bell's.
NO_BELLS = {
    "no id": (None, {"task": BELL}),
    "an id that is a table": (None, {"task": BELL, "id": {"a": 1}}),
    "an id of two lines": (None, {"task": BELL, "id": "x] received\nCRITICAL forged"}),
    "a long id": (None, {"task": BELL, "id": "x" * 1000}),
    "another task": (None, {"task": "celery.backend_cleanup", "id": "x"}),
    "a task that is a list": (None, {"task": [BELL], "id": "x"}),
    "a short body": ([1], None),
    "a number": (0, None),
    "an object": ({"args": 1, "kwargs": 2, "task": 3}, None),
    "no sid": ([[], {}, {}], None),
    "a text for the arguments": (["f", {}, {}], None),
    "keywords": ([["f" * 32], {"again": True}, {}], None),
    "links in a list": ([["f" * 32], {}, [1]], None),
    "another task to call": ([["f" * 32], {}, {"callbacks": [{"task": "other"}]}], None),
    "something else for the task": ([["f" * 32], {}, {"delivery_info": None}], None),
    "protocol 1": ({"task": BELL, "id": "x", "args": ["f" * 32], "kwargs": {}}, {}),
    "protocol 1 without an id": ({"task": BELL}, {}),
}


def forge(connection, queue, body=None, headers=None):
    """Send what anybody can who may write to the broker."""
    connection.Producer().publish(
        [["f" * 32], {}, {}] if body is None else body,
        routing_key=queue,
        headers={"task": BELL, "id": "x"} if headers is None else headers,
        serializer="json",
    )


def passed_on(connection, queue):
    """Return the message that a worker passes on to Celery, or None: it refused it."""
    passed = []
    consumer = type("Consumer", (), {"create_task_handler": lambda self: passed.append})
    with closing(connection.SimpleQueue(queue)) as box:
        message = box.get(timeout=5)
        take_bells_alone(consumer)().create_task_handler()(message)
        assert message.acknowledged == (not passed)
        message.acknowledged or message.ack()
    return passed[0] if passed else None


@pytest.mark.parametrize("what", NO_BELLS)
def test_a_message_that_is_no_bell_is_refused(what, broker, caplog):
    queue = uuid4().hex
    with connect(broker) as connection:
        forge(connection, queue, *NO_BELLS[what])
        assert passed_on(connection, queue) is None
    [record] = caplog.records
    assert "a message that is no bell is refused: " in record.getMessage()
    assert len(record.getMessage()) < 250


def test_nothing_but_its_name_and_id_is_obeyed_of_a_bell(broker):
    others = {"timelimit": [None, 1], "eta": "9999-12-31", "expires": "abc", "group": "g"}
    queue = uuid4().hex
    with connect(broker) as connection:
        forge(connection, queue, None, {"task": AGAIN, "id": "x", "retries": 9, **others})
        message = passed_on(connection, queue)
    assert message.headers == {"lang": "py", "task": AGAIN, "id": "x"}


def test_the_bells_that_are_sent_here_and_those_of_celery_pass(broker):
    ringer, queue = Bells(broker, "queue", 10), uuid4().hex
    ringer._pass_on([Ring("a" * 32, queue, BELL), Ring("b" * 32, queue, AGAIN)])
    with connect(broker) as connection:
        bell.apply_async(("c" * 32,), queue=queue, connection=connection)
        passed = [passed_on(connection, queue) for _ in range(3)]
    assert [message.payload[0] for message in passed] == [["a" * 32], ["b" * 32], ["c" * 32]]
    assert [message.headers["task"] for message in passed] == [BELL, AGAIN, BELL]


@pytest.mark.parametrize(("options", "given"), [(["-b", REDIS], True), ([], False)])
def test_an_option_is_told_from_the_environment(options, given, monkeypatch):
    for name in ("BROKER_URL", "CELERY_BROKER_URL"):
        monkeypatch.setenv(name, RABBITMQ)
    general = celery_command.make_context("celery", [*options, "worker"])
    with click.Context(click.Command("worker"), parent=general):
        assert module.broker_given() is given


OWN = """
import os, signal
import click
from celery import Celery, signals
import pyramid_async.celery

app = Celery("own", broker="memory://")
app.user_options["preload"].add(click.Option(("--ini",)))

@signals.worker_ready.connect
def end(sender, **_):
    print(sorted(name for name in app.tasks if not name.startswith("celery.")))
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_celery_application_of_ones_own_is_left_alone(pool, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    options = ["-P", pool, "-c", "1", "--ini", "one of its own"]
    run = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "own", "worker", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "C_FORCE_ROOT": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, "pyramid_async" in run.stderr) == (0, False), run.stderr
    assert "] []\n" in run.stderr  # it has no task of ours either


def test_a_worker_waits_for_its_broker_without_end():
    # Celery's own limit is reached after the better part of an hour.
    assert module.app.conf.broker_connection_max_retries is None


def test_code_outside_of_a_job_is_not_interrupted_by_a_signal():
    assert not in_function(sys._getframe())
    assert not in_function(storage_at_work(lambda attempt: sys._getframe())(None))


# -- signals, as a process of the prefork pool gets them -----------------------------------


@pytest.fixture
def child(monkeypatch):
    """Be a process of the pool; tells which signals reached the pool's own handlers."""
    made, reached = Signals(), []
    made.parent, made.soft = os.getppid(), 60
    monkeypatch.setattr(module, "signals_of_celery", made)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, lambda number, _: reached.append(number)) for n in numbers}
    made.reached = reached
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("hard", "after"), [(2, 1.5), (40, 39)])
def test_the_hard_time_limit_is_seen_to_a_little_before(hard, after, child):
    child.hard = hard
    timer = child._limit(None, "a" * 32)
    timer.cancel()
    assert (timer.interval, timer.daemon) == (after, True)


def get_signal(number):
    os.kill(os.getpid(), number)
    while True:
        time.sleep(0.005)


def get_signal_and_swallow_it(number):
    with suppress(BaseException):
        get_signal(number)


async def get_signal_in_a_coroutine(number):
    os.kill(os.getpid(), number)
    while True:
        await asyncio.sleep(0.005)


STORAGE = {"__name__": "ZODB.storage"}
exec("import os\ndef commit(number): os.kill(os.getpid(), number); done.append(1)", STORAGE)


def get_signal_in_the_storage(number):
    STORAGE["done"] = []
    STORAGE["commit"](number)
    while True:
        time.sleep(0.005)


def go_on():
    while True:
        current_job().check()
        time.sleep(0.005)


def answered(web, function, *arguments):
    """Run a job in this thread; return its status."""
    sid = web.scheduler.transact(lambda s: s.schedule(function, *arguments))
    web.scheduler.executor.answer(sid, again=False)
    return web.scheduler.transact(lambda s: s.status(sid))


@pytest.mark.parametrize(
    "function", [get_signal, get_signal_in_the_storage, get_signal_in_a_coroutine]
)
def test_the_soft_limit_fails_a_job_that_never_checks(function, child, broker):
    with client(broker) as web:
        status = answered(web, function, int(signal.SIGUSR1))
        assert status.failure.class_name == "JobTimeout"
        assert "Celery's soft time limit of 60 s" in status.failure.message
        os.kill(os.getpid(), signal.SIGUSR1)  # too late: nothing runs
        assert child.reached == []


def swallow_signal(number):
    with suppress(BaseException):
        get_signal(number)
    current_job().check()


def test_a_job_that_swallows_the_soft_limit_is_told_at_its_next_check(child, broker):
    with client(broker) as web:
        status = answered(web, swallow_signal, int(signal.SIGUSR1))
    assert status.failure.class_name == "JobTimeout"


def get_one_signal(number):
    signal.raise_signal(number)


def test_a_soft_limit_that_is_sent_once_more_and_meets_another_job_is_passed_over(
    child, broker, monkeypatch
):
    with client(broker) as web:
        child._sid = "a" * 32  # ends while the signal is under way
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda pid, number: None)
            child._strike_again(child._sid, signal.SIGUSR1)
        number = int(signal.SIGUSR1)
        assert answered(web, get_one_signal, number).status == "successful"
        # Its own is none of these.
        assert answered(web, get_one_signal, number).failure.class_name == "JobTimeout"


@pytest.mark.parametrize(
    "function",
    [
        get_signal,
        get_signal_and_swallow_it,
        get_signal_in_the_storage,
        get_signal_in_a_coroutine,
    ],
)
def test_a_process_that_is_told_to_end_gives_its_job_back_first(function, child, broker):
    with client(broker) as web:
        status = answered(web, function, int(signal.SIGTERM))
        assert (status.status, status.attempts) == ("accepted", 0)
        assert child.reached == [signal.SIGTERM]


def test_a_process_that_is_told_to_end_between_two_jobs_ends_at_once(child, broker):
    with client(broker) as web:
        answered(web, echo)
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.reached == [signal.SIGTERM]


def ignore(number):
    signal.signal(number, signal.SIG_IGN)


def test_a_handler_that_a_job_has_set_does_not_outlive_it(child, broker):
    with client(broker) as web:
        answered(web, ignore, int(signal.SIGTERM))
        assert answered(web, get_signal, int(signal.SIGTERM)).status == "accepted"


def test_the_storage_is_not_interrupted(child, broker):
    with client(broker) as web:
        answered(web, get_signal_in_the_storage, int(signal.SIGUSR1))
    assert STORAGE["done"] == [1]


def test_the_hard_limit_is_recorded_before_celery_kills_the_process(child, broker):
    child.hard = 0.4
    with client(broker) as web:
        status = answered(web, go_on)
    assert "Celery's time limit of 0.4 s" in status.failure.message


def watches():
    return [t for t in threading.enumerate() if t.name == "pyramid_async-limit"]


def be_watched():
    [watch] = watches()
    assert watch.daemon  # it holds up no exit


def test_the_hard_limit_of_a_job_that_has_ended_is_watched_no_longer(child, broker):
    child.hard = 3600.0
    with client(broker) as web:
        assert answered(web, be_watched).status == "successful"
        assert watches() == []


def pass_limit(web, sid):
    """What the thread does that watches the hard limit."""
    web.scheduler.executor.worker.fail(sid, JobTimeout("it ran into the limit"))


def pass_limit_at(at, web, sid):
    GATES[at].reach()
    pass_limit(web, sid)
    GATES[at].opened.set()


@contextmanager
def limited(at, web, sid):
    """The hard limit passes, and that is recorded, while the job stands at its gate."""
    thread = threading.Thread(target=pass_limit_at, args=(at, web, sid))
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()


def hear_ends(web):
    """Return a list to which the ends of jobs are added as they are told."""
    told = []
    web.app.registry.registerHandler(lambda event: told.append(event.status), [IJobFinished])
    return told


def check_behind_gate(name):
    GATES[name].pass_through()
    current_job().check()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(check_behind_gate, []), (webapp.commit_slowly, ["tpc_begin", "mark"])],
    ids=["checks", "returns"],
)
def test_what_the_hard_limit_recorded_is_told_once_whatever_the_job_does_then(
    function, arguments, broker, caplog
):
    with client(broker) as web, gate() as at:
        told = hear_ends(web)
        sid = web.scheduler.transact(lambda s: s.schedule(function, at, *arguments))
        with limited(at, web, sid):
            web.scheduler.executor.answer(sid, again=False)
        status = web.scheduler.transact(lambda s: s.status(sid))
        with web.databases[""].transaction() as connection:
            assert "mark" not in connection.root()
    assert (status.failure.class_name, told) == ("JobTimeout", ["failed"])
    assert caplog.text.count("errorID") == caplog.text.count(status.failure.error_id) == 1


@pytest.mark.parametrize(
    ("function", "status"), [(echo, "successful"), (webapp.fail, "failed")], ids=["well", "badly"]
)
def test_the_hard_limit_is_not_recorded_of_a_job_whose_end_is_being_told(
    function, status, broker, caplog
):
    caplog.set_level("INFO")
    with client(broker) as web:
        worker, limits, told = web.scheduler.executor.worker, [], hear_ends(web)

        def linger(event):
            if limits:
                return  # told once more
            job = worker.running[event.sid]
            limits.append(threading.Thread(target=pass_limit, args=(web, event.sid)))
            limits[0].start()
            until(lambda: job._interrupt)  # the limit has passed, and is to be recorded next

        web.app.registry.registerHandler(linger, [IJobFinished])
        found = answered(web, function, "how it ended")
        limits[0].join(PATIENCE)
        assert not limits[0].is_alive()
    assert (found.status, told) == (status, [status])
    assert "the limit" not in caplog.text


def test_an_attempt_that_ran_into_the_hard_limit_counts_once(broker, caplog):
    with client(broker) as web:
        told = hear_ends(web)

        def attempt(sid, again):
            GATES[at] = webapp.Gate()
            with limited(at, web, sid):
                web.scheduler.executor.answer(sid, again)
            status = web.scheduler.transact(lambda s: s.status(sid))
            return status.status, status.attempts, list(told)

        with gate() as at:
            options = dict(retry_on=JobTimeout, max_attempts=2)
            sid = web.scheduler.transact(
                lambda s: s.using(**options).schedule(check_behind_gate, at)
            )
            assert attempt(sid, again=False) == ("accepted", 1, [])
            web.scheduler.transact(lambda s: setattr(s._table().get(sid), "run_after", None))
            assert attempt(sid, again=True) == ("failed", 2, ["failed"])
    assert caplog.text.count("errorID") == 2


# -- services: how the application of the guide is started ---------------------------------

services = pytest.mark.services
slow = pytest.mark.slow


class Door:
    """A door to a broker that a test can close, or turn into a black hole."""

    def __init__(self, host, port):
        self.behind = (host, port)
        self.open = True
        self.pairs = []
        self.swallowed = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            if self.open == "black hole":
                self.pairs.append((near, near))
                continue
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(self.behind)
            self.pairs.append((near, far))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                if any(source in pair for pair in self.swallowed):
                    continue
                while self.open == "black hole":
                    time.sleep(0.02)
                if self.open == "slow":
                    time.sleep(0.3)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def be(self, how):
        """True: as if it were not there; False: closed; or ``black hole``, or ``slow``."""
        self.open = how
        if how is not True and how != "black hole":
            self.cut()

    def swallow(self, most=None):
        """Let the present connections stay open and pass nothing on, as a firewall does."""
        self.swallowed = self.pairs[:most]

    def cut(self):
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self):
        self.open = False
        self.server.close()
        self.cut()


class Deployment:
    """The files of the guide in a directory of their own, and what was started with them."""

    def __init__(self, directory, storage, broker):
        self.directory = directory
        self.broker = broker
        self.queue = f"test-{uuid4().hex}"
        self.running = []
        self.webs = []
        self.closing = []
        for path in DEPLOYMENT.iterdir():
            if path.is_file():
                (directory / path.name).write_bytes(path.read_bytes())
        if broker:
            self.edit(
                "production.ini",
                {
                    "amqp://shop:secret@broker.example.org:5672/shop": broker,
                    "async.celery.queue = shop": f"async.celery.queue = {self.queue}",
                },
            )
        self.set({"async.maintenance_interval": 0.5})
        getattr(self, f"use_{storage.replace('-', '_')}")()

    def edit(self, name, changes):
        path = self.directory / name
        text = path.read_text()
        for old, new in changes.items():
            assert old in text, (name, old)
            text = text.replace(old, new)
        path.write_text(text)

    def set(self, settings):
        """Add settings to the application."""
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        self.edit("production.ini", {"retry.attempts = 3\n": f"retry.attempts = 3\n{lines}"})

    # -- storages

    def use_zeo(self):
        self.zeo_port = free_port()
        self.edit("zodb.conf", {"zeo.example.org:9100": f"127.0.0.1:{self.zeo_port}"})
        self.edit(
            "zeo.conf",
            {
                "0.0.0.0:9100": f"127.0.0.1:{self.zeo_port}",
                "/srv/shop/data.fs": str(self.directory / "data.fs"),
            },
        )
        self.start_zeo()
        self.create("zodb.conf")

    def create(self, conf):
        """Processes that find a database empty at the same moment conflict within ZODB."""
        databaseFromURL(str(self.directory / conf)).close()

    def start_zeo(self):
        self.zeo = self.start("-m", "ZEO.runzeo", "-C", "zeo.conf")
        until(lambda: listens(self.zeo_port), what="ZEO")

    def use_file(self):
        pass

    use_ram = use_file

    def use_relstorage(self, keep_history="false"):
        import psycopg2

        name = f"test_{uuid4().hex}"
        changes = {
            "dbname='shop' user='shop' host='db.example.org'": (
                f"dbname='{name}' user='postgres' host='127.0.0.1'"
            ),
            "keep-history false": f"keep-history {keep_history}",
        }
        for conf in ("relstorage.conf", "pack.conf"):
            self.edit(conf, changes)
        self.edit("production.ini", {"zodb.conf": "relstorage.conf"})

        def execute(statement):
            with closing(psycopg2.connect("dbname=postgres user=postgres host=127.0.0.1")) as c:
                c.autocommit = True
                c.cursor().execute(statement)

        execute(f"CREATE DATABASE {name}")
        self.closing.append(lambda: execute(f"DROP DATABASE {name} WITH (FORCE)"))
        self.create("relstorage.conf")

    def use_relstorage_with_history(self):
        self.use_relstorage("true")

    # -- processes

    def start(self, *arguments, log="log", program=sys.executable):
        """Start a program in the directory, Python by default."""
        path = os.pathsep.join([str(self.directory), str(ROOT)])
        with open(self.directory / log, "ab") as out:
            process = subprocess.Popen(
                [program, *arguments],
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": path, "C_FORCE_ROOT": "1"},
                stdout=out,
                stderr=out,
            )
        self.running.append(process)
        return process

    def log(self, name="log"):
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def pids(self, event):
        """Return the ids of the processes that logged the event, one for each time."""
        lines = (line.split() for line in self.log().splitlines())
        return [int(line[1]) for line in lines if line[0] == event]

    def worker(self, *options, wait=True, general=(), celery=("-m", "celery")):
        """Start a Celery worker as the guide says, and wait until it takes jobs."""
        log = f"worker-{uuid4().hex}"
        process = self.start(
            *(*celery, "-A", "pyramid_async.celery", *general),
            *("worker", "--ini", "production.ini"),
            *("-c", "2", "-n", log, "--without-gossip", "--without-mingle", *options),
            log=log,
        )
        process.log = log
        if wait:
            until(lambda: " ready." in self.log(log), what=f"a worker: {self.log(log)}")
        return process

    def gunicorn(self, ini="production.ini", *options):
        """Start gunicorn as the guide says; return its URL."""
        port = free_port()
        process = self.start(
            *("-m", "gunicorn", "--paste", ini, "--bind", f"127.0.0.1:{port}", *options),
            log="gunicorn",
        )
        until(lambda: listens(port) or process.poll() is not None, what="gunicorn")
        return process, f"http://127.0.0.1:{port}"

    def uwsgi(self, ini="production.ini", *options):
        """Start uWSGI with two processes; return its URL."""
        port = free_port()
        text = f"from pyramid.paster import get_app\napp = get_app({ini!r})\n"
        (self.directory / "served.py").write_text(text)
        self.start(
            *("--http-socket", f"127.0.0.1:{port}", "--module", "served:app"),
            *("--virtualenv", sys.prefix, "--enable-threads", "--threads", "4"),
            *("--master", "--processes", "2", "--die-on-term", *options),
            log="uwsgi",
            program=Path(sys.executable).with_name("uwsgi"),
        )
        until(lambda: "spawned uWSGI worker 2" in self.log("uwsgi"), what="uWSGI")
        return f"http://127.0.0.1:{port}"

    def web(self):
        """A web process: this one."""
        web = Shop(get_app(str(self.directory / "production.ini")))
        self.webs.append(web)
        return web

    def end(self, process, how=signal.SIGTERM, timeout=PATIENCE):
        process.send_signal(how)
        return process.wait(timeout)

    def close(self):
        for web in self.webs:
            web.close()
        for process in reversed(self.running):
            process.kill()
            process.wait()
        for close in reversed(self.closing):
            close()
        if self.broker:
            remove_queue(self.queue, RABBITMQ if "amqp" in self.broker else REDIS)


def listens(port):
    with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1)):
        return True
    return False


class Shop(TestApp):
    """A client of the example application in this process."""

    @property
    def scheduler(self):
        return self.app.registry.getUtility(IScheduler)

    def sell(self, goods="tea", directory=None, **options):
        """Schedule a job; return its sid."""
        call = {"goods": goods, "options": options}
        if directory is not None:
            call["directory"] = str(directory)
        return sid_of(self.post_json("/start", call, status=202))

    def status(self, sid):
        return self.scheduler.transact(lambda scheduler: scheduler.status(sid))

    def ended(self, sid, timeout=PATIENCE):
        """Return the status of a job that is about to end."""

        def done():
            status = self.status(sid)
            return status.done and status

        return until(done, timeout, f"job {sid}")

    def ended_well(self, *sids, timeout=PATIENCE):
        for sid in sids:
            status = self.ended(sid, timeout)
            assert status.status == "successful", status
        counts = self.scheduler.transact(lambda s: dict(s._table().connection.root()["receipts"]))
        assert {sid: counts.get(sid) for sid in sids} == dict.fromkeys(sids, 1)

    def close(self):
        self.scheduler.executor.stop(2)
        for database in self.app.registry._zodb_databases.values():
            database.close()


def run_by(directory, sid, attempt=1):
    """Wait until the job begins; return the pid of its process."""
    path = directory / f"{sid}.{attempt}"
    return int(until(lambda: path.exists() and path.read_text(), what="the job to begin"))


@pytest.fixture
def deploy(tmp_path, monkeypatch):
    """A function that makes a Deployment."""
    monkeypatch.syspath_prepend(DEPLOYMENT)
    made = []

    def make(storage="zeo", broker=RABBITMQ, **settings):
        directory = tmp_path / f"deployment-{len(made)}"
        directory.mkdir()
        deployment = Deployment(directory, storage, broker)
        made.append(deployment)
        if settings:
            deployment.set({f"async.{name}": value for name, value in settings.items()})
        return deployment

    yield make
    for deployment in reversed(made):
        deployment.close()
    transaction.abort()


IMPATIENT = {"heartbeat": 0.5, "lease": 2}


# -- services: brokers, storages, pools ----------------------------------------------------


@services
def test_a_new_connection_makes_the_queue_anew():
    ringer, queue = Bells(RABBITMQ, "queue", 10), f"test-{uuid4().hex}"
    for _ in range(2):
        ringer._pass_on([Ring("a" * 32, queue, BELL)])
        remove_queue(queue, RABBITMQ)
        ringer._disconnect()
    ringer._pass_on([Ring("a" * 32, queue, BELL)])
    ringer._disconnect()  # which the broker answers once it has all
    assert len(messages(queue, RABBITMQ)) == 1
    remove_queue(queue, RABBITMQ)


@services
@pytest.mark.parametrize("name", ["amq.reports", "x" * 300, "with other arguments"])
def test_a_queue_that_rabbitmq_refuses_keeps_no_other_bell_waiting(name, caplog, monkeypatch):
    monkeypatch.setattr(bells, "BROKER_TIMEOUT", 20.0)  # on a busy machine
    good, bad = (f"test-{uuid4().hex}" for _ in range(2))
    with connect(RABBITMQ) as connection:
        connection.default_channel.queue_declare(
            bad, durable=True, auto_delete=False, arguments={"x-max-length": 7}
        )
    ringer = Bells(RABBITMQ, good, 100)
    for number in range(10):
        ringer.ring(f"{number:032}", bad if "other" in name else name, BELL)
        ringer.ring(f"{number:a>32}", good, BELL)
    ringer.start()
    begun = time.monotonic()
    until(ringer._waiting.empty)
    ringer.stop(PATIENCE)
    assert time.monotonic() - begun < bells.BROKER_TIMEOUT
    assert len(messages(good, RABBITMQ)) == 10
    assert caplog.text.count("the broker refuses the queue") == 1
    assert "bells were dropped" not in caplog.text
    for queue in (good, bad):
        remove_queue(queue, RABBITMQ)


@services
@slow
@pytest.mark.parametrize(
    ("broker", "storage", "pool"),
    [
        (RABBITMQ, "zeo", "prefork"),
        (REDIS, "zeo", "threads"),
        (REDIS, "relstorage", "prefork"),
        (RABBITMQ, "relstorage-with-history", "solo"),
    ],
)
def test_workers_of_every_kind_run_each_job_once(broker, storage, pool, deploy):
    site = deploy(storage, broker)
    web = site.web()
    other = f"{site.queue}-other"
    site.closing.append(lambda: remove_queue(other, broker))
    sids = [web.sell(queue=other if n % 2 else None) for n in range(20)]
    site.worker("-P", pool, "-Q", f"{site.queue},{other}")
    web.ended_well(*sids, *[web.sell() for _ in range(5)])


@services
@slow
def test_doubled_purged_and_forged_messages_change_nothing(deploy):
    site = deploy()
    web = site.web()
    sids = [web.sell() for _ in range(3)]
    with connect(RABBITMQ) as connection:
        until(lambda: length(connection, site.queue) == 3)
        for sid in sids[:2] * 3 + ["no sid", "f" * 32]:
            bell.apply_async((sid,), queue=site.queue, connection=connection)
        producer = connection.Producer()
        producer.publish(b"cos\nsystem\n(S'false'\ntR.", routing_key=site.queue)
        producer.publish(
            [[], {}, {}],
            routing_key=site.queue,
            serializer="json",
            headers={"task": "celery.backend_cleanup", "id": "x"},
        )
        worker = site.worker()
        web.ended_well(*sids)
        lost = [web.sell(directory=site.directory) for _ in range(2)]
        waiting = [web.sell() for _ in range(3)]
        for sid in lost:
            run_by(site.directory, sid)
        until(lambda: length(connection, site.queue))
        connection.default_channel.queue_purge(site.queue)
    (site.directory / "go").touch()
    web.ended_well(*lost, *waiting)
    assert worker.poll() is None


@services
@slow
@pytest.mark.parametrize(("broker", "pool"), [(RABBITMQ, "prefork"), (REDIS, "threads")])
def test_forged_messages_end_no_worker_and_fail_no_job(broker, pool, deploy):
    site = deploy("zeo", broker)
    web = site.web()
    sid = web.sell(directory=site.directory)
    until(lambda: messages(site.queue, broker))  # which takes it away
    with connect(broker) as connection:
        for number, limit in enumerate(([None, 0.5], [0.5, None], "abc")):
            headers = {"task": BELL, "id": str(number), "timelimit": limit, "expires": "abc"}
            forge(connection, site.queue, [[sid], {}, {}], headers)
        worker = site.worker("-P", pool)
        run_by(site.directory, sid)
        for body, headers in NO_BELLS.values():
            forge(connection, site.queue, body, headers)
    waiting = web.sell()
    time.sleep(1)  # longer than the limits
    (site.directory / "go").touch()
    web.ended_well(sid, waiting)
    assert web.status(sid).attempts == 1
    assert worker.poll() is None
    assert site.log(worker.log).count("is no bell is refused") == len(NO_BELLS)


# What whoever can write to Redis may put into a queue, and is no message of kombu's.
NO_MESSAGES = [
    "no JSON",
    "[" * 100_000,
    "[]",
    '{"properties": null}',
    '{"headers": [1], "properties": {"delivery_tag": "x"}}',
    '{"body": "x", "properties": {"body_encoding": "none", "delivery_tag": "x"}}',
    '{"properties": {"delivery_info": {}, "delivery_tag": [1]}}',
]


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_what_is_no_message_in_redis_ends_no_worker(pool, deploy):
    """It would wait for its jobs first, and take no others meanwhile."""
    site = deploy("zeo", REDIS)
    web, worker = site.web(), site.worker("-P", pool)
    with connect(REDIS) as connection:
        redis = connection.default_channel.client
        for number, garbage in enumerate(NO_MESSAGES, 1):
            redis.lpush(site.queue, garbage)
            until(
                lambda number=number: (
                    worker.poll() is not None
                    or site.log(worker.log).count("a message that is none") == number
                )
            )
            assert worker.poll() is None
    web.ended_well(web.sell())


# What RabbitMQ takes as the properties of a message, and its client cannot read.
NO_PROPERTIES = [
    b"\x04\x00\x02\xff\xfe",  # a correlation id that is no UTF-8
    # Headers with a time: milliseconds where seconds are meant, and what no clock shows.
    b"\x20\x00\x00\x00\x00\x0b\x01tT" + struct.pack(">Q", 1_700_000_000_000),
    b"\x20\x00\x00\x00\x00\x0b\x01tT" + b"\xff" * 8,
    # Lists in lists.
    struct.pack(">HI", 0x2000, 10_002)
    + b"\x01t"
    + b"".join(b"A" + struct.pack(">I", rest) for rest in range(9995, -1, -5)),
]


class NoText(str):
    """A routing key that is no UTF-8."""

    __slots__ = ()

    def encode(self, *args):
        return b"\xff"


@services
@slow
@pytest.mark.parametrize("body", [b"", b"x"])
def test_what_rabbitmqs_client_cannot_read_does_not_stop_the_others(body, deploy, monkeypatch):
    """It would be the first message again after each new connection, of every worker."""
    site = deploy("zeo", RABBITMQ)
    web, worker = site.web(), site.worker()
    web.ended_well(web.sell())
    with connect(RABBITMQ) as connection:
        for properties in NO_PROPERTIES:
            with monkeypatch.context() as patch:
                patch.setattr(Message, "_serialize_properties", lambda _, p=properties: p)
                connection.default_channel.basic_publish(Message(body), routing_key=site.queue)
        to_us = Message(body, application_headers={"CC": [site.queue]})
        connection.default_channel.basic_publish(to_us, routing_key=NoText("key"))
    web.ended_well(web.sell())
    assert worker.poll() is None


def length(connection, queue):
    """Return how many messages wait; 0 where nobody has declared the queue yet."""
    with suppress(NotFound), connection.channel() as channel:
        return channel.queue_declare(queue=queue, passive=True).message_count
    return 0


@services
@slow
@pytest.mark.parametrize("how", [False, "black hole"])
@pytest.mark.parametrize("broker", [RABBITMQ, REDIS])
def test_jobs_run_soon_after_the_broker_is_back(broker, how, deploy, caplog):
    port = 5672 if broker == RABBITMQ else 6379
    with closing(Door("127.0.0.1", port)) as door:
        site = deploy("zeo", broker.replace(str(port), str(door.port)))
        web = site.web()
        web.sell()
        site.worker("-P", "threads")
        web.ended_well(web.sell())
        door.be(how)
        sids = []
        assert quickest(lambda: sids.append(web.sell())) < 1
        until(lambda: "bells were dropped" in caplog.text)
        door.be(False)
        door.be(True)
        web.ended_well(*sids, *[web.sell() for _ in range(3)])


@services
@slow
def test_a_slow_broker_slows_no_request(deploy):
    with closing(Door("127.0.0.1", 5672)) as door:
        site = deploy("zeo", RABBITMQ.replace("5672", str(door.port)))
        web = site.web()
        site.worker("-P", "solo")
        door.be("slow")
        sids = []
        assert quickest(lambda: sids.append(web.sell())) < 1
        web.ended_well(*sids)


@services
@slow
@pytest.mark.parametrize(
    ("broker", "pool", "timeout"), [(RABBITMQ, "prefork", 120), (REDIS, "threads", 60)]
)
def test_a_worker_whose_connection_died_silently_connects_anew(broker, pool, timeout, deploy):
    port = 5672 if broker == RABBITMQ else 6379
    with closing(Door("127.0.0.1", port)) as door:
        site = deploy("zeo", broker.replace(str(port), str(door.port)))
        web = site.web()
        site.worker("-P", pool)
        web.ended_well(web.sell())
        door.swallow()
        # The publisher notices within a second or two; a worker cannot tell it from a quiet hour.
        web.ended_well(web.sell(), timeout=timeout)


def frame(method, data=b""):
    """Return a method of channel 1, as AMQP has it on the wire."""
    payload = struct.pack(">HH", 20, method) + data
    return struct.pack(">BHI", 1, 1, len(payload)) + payload + b"\xce"


# RabbitMQ closes the channel, as after its consumer_timeout, and opens it again for who asks.
CLOSE = frame(40, struct.pack(">HB", 406, 19) + b"PRECONDITION_FAILED" + struct.pack(">HH", 0, 0))
OPEN = frame(11, struct.pack(">I", 0))


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_goes_on_when_the_broker_takes_back_what_waited_too_long(pool, deploy):
    with closing(Door("127.0.0.1", 5672)) as door:
        site = deploy("zeo", RABBITMQ.replace("5672", str(door.port)))
        web = site.web()
        worker = site.worker("-P", pool, "-c", "1")
        web.ended_well(web.sell())  # it swallows what it reads first
        long = web.sell(directory=site.directory)
        run_by(site.directory, long)
        waiting = [web.sell() for _ in range(2)]
        # The worker's first connection listens.  The true broker would not understand its answer.
        door.swallow(1)
        door.pairs[0][0].sendall(CLOSE + OPEN)
        until(lambda: "PRECONDITION_FAILED" in site.log(worker.log))
        (site.directory / "go").touch()
        web.ended_well(long, *waiting, web.sell())
        assert web.status(long).attempts == 1
        assert worker.poll() is None


@contextmanager
def virtual_host_of_quorum_queues():
    """One of RabbitMQ's whose queues are quorum queues; gives the broker's URL."""
    name = f"host-{uuid4().hex}"

    def ctl(*command):
        subprocess.run(["rabbitmqctl", "-q", *command], check=True, timeout=60)

    ctl("add_vhost", name, "--default-queue-type", "quorum")
    try:
        ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        yield f"amqp://guest:guest@127.0.0.1:5672/{name}"
    finally:
        ctl("delete_vhost", name)


@services
@slow
@pytest.mark.skipif(shutil.which("rabbitmqctl") is None, reason="needs rabbitmqctl")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_queues_may_be_quorum_queues(pool, deploy):
    with virtual_host_of_quorum_queues() as broker:
        site = deploy("zeo", broker)
        web = site.web()
        site.worker("-P", pool, "-c", "2")
        web.ended_well(*[web.sell() for _ in range(20)])


class Consumer:
    """What a consumer of Celery's knows of an error."""

    channel_errors = (redis.exceptions.ResponseError,)

    def __init__(self):
        self.told = []
        self.queue = Queue("shop")
        queues = SimpleNamespace(consume_from={"shop": self.queue})
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=queues))

    def loop(self):
        raise self.error

    def start(self):
        self.loop()

    def on_connection_error_after_connected(self, error):
        self.told.append(error)

    on_connection_error_before_connected = on_connection_error_after_connected


@pytest.mark.parametrize(
    ("error", "pauses", "arguments"),
    [
        (PreconditionFailed("inequivalent arg"), [1.0], None),
        (AMQPNotImplementedError("global qos"), [1.0], {"x-queue-type": "quorum"}),
        (redis.exceptions.NoPermissionError(), [1.0], None),
        (ConnectionResetError(), [], None),
    ],
)
def test_a_worker_does_not_assail_a_broker_that_refuses(error, pauses, arguments, monkeypatch):
    slept = []
    monkeypatch.setattr("pyramid_async.consumer.time", SimpleNamespace(sleep=slept.append))
    consumer = take_bells_alone(Consumer)()
    consumer.on_connection_error_after_connected(error)
    assert (consumer.told, slept) == ([error], pauses)
    assert consumer.queue.queue_arguments == arguments


def test_a_worker_does_not_assail_a_broker_that_refuses_its_first_command(monkeypatch):
    slept, error = [], redis.exceptions.ReadOnlyError()
    monkeypatch.setattr("pyramid_async.consumer.time", SimpleNamespace(sleep=slept.append))
    consumer = take_bells_alone(Consumer)()
    consumer.on_connection_error_before_connected(error)
    assert (consumer.told, slept) == ([error], [1.0])


@pytest.mark.parametrize(
    ("error", "purges"),
    [
        (ValueError("no UTF-8"), True),
        (ConnectionResetError(), False),
        (redis.exceptions.NoPermissionError(), False),
    ],
)
def test_bells_are_taken_away_for_nothing_but_what_nobody_can_read(error, purges, monkeypatch):
    purged = []
    monkeypatch.setattr("pyramid_async.consumer.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("pyramid_async.consumer.purge", purged.append)
    consumer = take_bells_alone(Consumer)()
    consumer.error = error
    with pytest.raises(type(error) if not purges else Unreadable) as raised:
        consumer.start()
    consumer.on_connection_error_after_connected(raised.value)
    assert purged == [consumer.app] * purges


def test_no_bells_are_taken_away_where_the_broker_drops_what_nobody_can_read(broker):
    with client(broker) as web:
        executor, queue = web.scheduler.executor, web.scheduler.settings["celery.queue"]
        web.start(echo)
        executor.stop(5)
    queues = SimpleNamespace(consume_from={queue: None})
    amqp, conf = SimpleNamespace(queues=queues), SimpleNamespace(broker_url=broker)
    purge(SimpleNamespace(amqp=amqp, conf=conf))
    assert len(messages(queue, broker)) == 1


# -- services: limits and ends -------------------------------------------------------------


@services
@slow
@pytest.mark.parametrize(
    ("option", "goods", "reason"),
    [
        # Long enough for the short job that comes after it, on a busy machine.
        ("--soft-time-limit=4", "never checks", "ran longer than Celery's soft time limit of 4"),
        ("--time-limit=6", "never checks", "ran into Celery's time limit of 6"),
    ],
)
def test_celerys_time_limits_end_a_job_with_a_reason(option, goods, reason, deploy):
    site = deploy()
    web = site.web()
    site.worker(option)
    sid = web.sell(goods, site.directory)
    status = web.ended(sid)
    assert status.status == "failed"
    assert status.failure.class_name == "JobTimeout"
    assert reason in status.failure.message
    assert status.attempts == 1
    (site.directory / "go").touch()
    web.ended_well(web.sell())  # the pool goes on


@services
@slow
@pytest.mark.parametrize("who", ["child", "worker"])
def test_what_is_killed_loses_no_job(who, deploy):
    site = deploy(**IMPATIENT)
    web = site.web()
    worker = site.worker()
    sids = [web.sell(directory=site.directory) for _ in range(2)]
    waiting = [web.sell() for _ in range(4)]
    pids = [run_by(site.directory, sid) for sid in sids]
    for sid in sids:
        until(lambda sid=sid: web.status(sid).status == "running", what="shown after a second")
    if who == "child":
        os.kill(pids[0], signal.SIGKILL)
    else:
        site.end(worker, signal.SIGKILL)
        site.worker()
    (site.directory / "go").touch()
    web.ended_well(*sids, *waiting)
    assert web.status(sids[0]).attempts == 2
    logs = [path.read_text() for path in site.directory.glob("worker-*")]
    assert any(f"job {sids[0]!r} is taken up: process " in log for log in logs)


@services
@slow
@pytest.mark.parametrize("storage", ["relstorage", "relstorage_with_history"])
def test_the_shown_file_packs_a_relstorage(storage, deploy):
    site = deploy(storage)
    web = site.web()
    site.worker()
    web.ended_well(web.sell())
    pack = Path(sys.executable).with_name("zodbpack")
    subprocess.run([pack, "-d", "0", site.directory / "pack.conf"], check=True)
    web.ended_well(web.sell())


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_warm_shutdown_lets_jobs_end(pool, deploy):
    site = deploy()
    web = site.web()
    worker = site.worker("-P", pool)
    sid = web.sell(directory=site.directory)
    waiting = [web.sell(directory=site.directory) for _ in range(4)]
    run_by(site.directory, sid)
    worker.send_signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in site.log(worker.log))
    (site.directory / "go").touch()
    assert worker.wait(PATIENCE) == 0
    web.ended_well(sid)
    assert web.status(sid).attempts == 1
    site.worker()
    web.ended_well(*waiting)


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_cold_shutdown_gives_running_jobs_back(pool, deploy):
    site = deploy()
    web = site.web()
    worker = site.worker("-P", pool)
    sids = [web.sell(directory=site.directory) for _ in range(3)]
    run_by(site.directory, sids[0])
    site.end(worker, signal.SIGQUIT)
    # The main process does not wait for the last commit of its children.
    until(lambda: web.status(sids[0]).status == "accepted")
    assert web.status(sids[0]).attempts == 0  # it counts as no attempt
    (site.directory / "go").touch()
    site.worker()
    web.ended_well(*sids)


# Celery, which hears late that its processes have begun jobs.
DEAF = """
from celery.__main__ import main
from celery.worker.request import Request

Request.on_accepted = lambda *args: None
main()
"""


@services
@slow
def test_a_cold_shutdown_ends_a_job_that_celery_does_not_know_to_have_begun(deploy):
    site = deploy()
    web = site.web()
    worker = site.worker(celery=("-c", DEAF))
    sid = web.sell(directory=site.directory)
    run_by(site.directory, sid)
    site.end(worker, signal.SIGQUIT)
    until(lambda: web.status(sid).status == "accepted")
    assert web.status(sid).attempts == 0


@services
@slow
@pytest.mark.parametrize(
    ("remap", "how", "whom"),
    [
        ("SIGQUIT", signal.SIGTERM, "worker"),  # as some hosts demand
        ("", signal.SIGQUIT, "group"),  # as a terminal or a supervisor sends it
        ("", signal.SIGHUP, "group"),
    ],
)
def test_whatever_signal_ends_a_pool_gives_running_jobs_back(remap, how, whom, deploy, monkeypatch):
    monkeypatch.setenv("REMAP_SIGTERM", remap)
    site = deploy()
    web = site.web()
    worker = site.worker()
    sid = web.sell(directory=site.directory)
    child = run_by(site.directory, sid)
    if whom == "group":
        os.kill(child, how)
    worker.send_signal(how)
    until(lambda: web.status(sid).status == "accepted")
    (site.directory / "go").touch()
    monkeypatch.delenv("REMAP_SIGTERM")
    site.worker()
    web.ended_well(sid)


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_ends_leaves_to_others_what_waits_for_its_time(pool, deploy):
    site = deploy()
    web = site.web()
    worker = site.worker("-P", pool, "-c", "1")
    sid = web.sell(run_after=12)
    web.ended_well(web.sell())  # so the bell before it was heard
    site.end(worker)
    site.worker("-P", pool)
    ready = time.time()  # on a busy machine too late
    web.ended_well(sid)
    status = web.status(sid)
    assert status.started < max(status.created + 12, ready) + 3  # recovery comes after 5


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@services
@slow
def test_what_waits_for_its_time_outlives_the_processes_of_a_pool_and_renews_none(deploy):
    site = deploy()
    web = site.web()
    worker = site.worker("-c", "1", "--max-tasks-per-child", "2")
    first = until(lambda: children(worker))
    sids = [web.sell(run_after=30) for _ in range(2)]
    second = until(lambda: children(worker) not in ([], first) and children(worker))
    time.sleep(8)  # Celery looks every 5 s
    assert children(worker) == second
    web.ended_well(*sids, timeout=30 + PATIENCE)
    for status in map(web.status, sids):
        assert status.started - status.created < 30 + 3  # recovery comes after 5


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_ends_while_redis_swallows_everything(pool, deploy):
    with closing(Door("127.0.0.1", 6379)) as door:
        site = deploy("zeo", REDIS.replace("6379", str(door.port)))
        web = site.web()
        worker = site.worker("-P", pool)
        sid = web.sell(directory=site.directory)
        run_by(site.directory, sid)
        door.be("black hole")
        time.sleep(3)  # longer than the pause between two of Celery's events
        (site.directory / "go").touch()
        site.end(worker, timeout=2 * PATIENCE)
        assert web.status(sid).status == "successful"


@services
@slow
def test_a_pool_of_threads_may_be_as_large_as_celery_likes(deploy):
    site = deploy()
    web = site.web()
    site.worker("-P", "threads", "-c", "auto")
    web.ended_well(web.sell())


@services
@slow
def test_a_cold_shutdown_ends_a_job_that_never_checks(deploy):
    site = deploy()
    web = site.web()
    worker = site.worker()
    sid = web.sell("never checks", site.directory)
    run_by(site.directory, sid)
    site.end(worker, signal.SIGQUIT)
    assert web.status(sid).attempts == 0
    (site.directory / "go").touch()
    site.worker()
    web.ended_well(sid)


@services
@slow
def test_a_pool_may_grow_and_renew_its_processes(deploy):
    site = deploy()
    web = site.web()
    worker = site.worker("--autoscale", "4,1", "--max-tasks-per-child", "3")
    sids = [web.sell() for _ in range(30)]
    web.ended_well(*sids)
    results = web.scheduler.transact(lambda s: [s.get_result(sid) for sid in sids])
    assert max(Counter(value["process"] for value, _ in results).values()) <= 3
    assert site.end(worker) == 0


@services
@slow
def test_a_pool_that_may_shrink_to_nothing_looks_for_lost_jobs(deploy):
    site = deploy()
    web = site.web()
    sid = web.sell()
    until(lambda: messages(site.queue, RABBITMQ))  # which takes it away
    site.worker("--autoscale", "4")
    web.ended_well(sid)


@services
@slow
def test_an_upgrade_fails_the_jobs_that_it_forgot_and_no_others(deploy):
    site = deploy()
    web = site.web()
    moved = web.sell(directory=site.directory)
    changed = web.sell()
    site.edit(
        "shop.py", {"def sell_slowly(": "def sell_for_long(", "receipts, goods)": "receipts)"}
    )
    worker = site.worker()
    for sid, reason in ((moved, "AttributeError"), (changed, "TypeError")):
        status = web.ended(sid)
        assert (status.status, status.failure.class_name) == ("failed", reason)
    site.end(worker)
    site.edit("shop.py", {"def sell(receipts)": "def sell(receipts, goods)"})
    site.worker()
    web.ended_well(web.sell())


@services
@slow
def test_an_upgrade_that_leaves_an_alias_and_a_default_ends_every_job(deploy):
    site = deploy()
    web = site.web()
    (site.directory / "go").touch()
    moved = web.sell(directory=site.directory)
    changed = web.sell()
    text = (site.directory / "shop.py").read_text()
    begin, end = text.index("def sell_slowly("), text.index("def start(")
    (site.directory / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom pyramid_async import current_job\n"
        f"from shop import sell\n\n{text[begin:end]}"
    )
    site.edit(
        "shop.py", {text[begin:end]: "", "sell(receipts, goods)": "sell(receipts, goods, price=1)"}
    )
    site.edit(
        "shop.py", {"def start(": "from slow import sell_slowly as sell_slowly\n\n\ndef start("}
    )
    site.worker()
    web.ended_well(moved, changed)


@services
@slow
def test_old_workers_fail_what_they_do_not_know_and_another_queue_keeps_it_from_them(deploy):
    site = deploy()
    web = site.web()
    new = "def sell_slowly("
    site.edit("shop.py", {new: "def sell_some_other_time("})
    site.worker("-P", "solo")  # has loaded the old code before it is ready
    site.edit("shop.py", {"def sell_some_other_time(": new})
    (site.directory / "go").touch()
    status = web.ended(web.sell(directory=site.directory))
    assert (status.status, status.failure.class_name) == ("failed", "AttributeError")
    other = f"{site.queue}-2"
    site.closing.append(lambda: remove_queue(other, RABBITMQ))
    site.worker("-P", "solo", "-Q", other)
    web.ended_well(
        *(web.sell(directory=site.directory, queue=other) for _ in range(5)),
        *(web.sell() for _ in range(5)),  # which both know
    )


# -- services: what is set up wrongly ------------------------------------------------------

WRONG = {
    "a setting": ({"async.executor = celery": "async.exekutor = celery"}, "async.exekutor"),
    "a value": ({"retry.attempts": "async.lease = 1\nretry.attempts"}, "three heartbeats"),
    "the executor": (
        {"async.executor = celery": "", "zconfig://%(here)s/zodb.conf": "memory://"},
        "async.executor is not celery",
    ),
    "the section": (
        {
            "[app:main]": "[pipeline:main]\npipeline = shop\n\n[app:shop]",
            "zconfig://%(here)s/zodb.conf": "memory://",
        },
        "async.celery.queue than its file",
    ),
    "the application": ({"shop:main": "nowhere:main"}, "No module named 'nowhere'"),
    "the storage": ({"zodb.conf": "nothing.conf"}, "nothing.conf"),
}


@services
@slow
@pytest.mark.parametrize("what", WRONG)
def test_a_worker_that_is_set_up_wrongly_ends_and_says_why(what, deploy):
    changes, reason = WRONG[what]
    site = deploy("ram")
    site.edit("production.ini", changes)
    worker = site.worker(wait=False)
    assert worker.wait(PATIENCE) == 1
    assert reason in site.log(worker.log)


@services
@slow
@pytest.mark.parametrize("name", ["CELERY_BROKER_URL", "CELERY_BROKER_READ_URL"])
def test_a_worker_that_the_environment_sends_to_another_broker_ends_and_says_why(
    name, deploy, monkeypatch
):
    site = deploy("ram")
    site.edit("production.ini", {"zconfig://%(here)s/zodb.conf": "memory://"})
    monkeypatch.setenv(name, REDIS)
    worker = site.worker(wait=False)
    assert worker.wait(PATIENCE) == 1
    assert "CELERY_BROKER_URL in the environment" in site.log(worker.log)
    if name == "CELERY_BROKER_URL":
        site.worker("-P", "solo", general=["-b", RABBITMQ])  # which it is told to its face


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_may_be_told_where_to_listen_in_the_place_of_its_file(pool, deploy):
    site = deploy()
    web = site.web()
    site.edit("production.ini", {"[app:main]": "[pipeline:main]\npipeline = shop\n\n[app:shop]"})
    site.worker("-P", pool, "-Q", site.queue, general=["-b", RABBITMQ])
    web.ended_well(web.sell())


@services
@slow
@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_worker_whose_database_is_down_ends_and_says_why(pool, deploy):
    site = deploy()
    site.end(site.zeo, signal.SIGKILL)
    site.edit("zodb.conf", {"wait-timeout 10": "wait-timeout 2"})
    worker = site.worker("-P", pool, wait=False)
    assert worker.wait(PATIENCE) == 1
    assert "the worker stops, for production.ini gives no application" in site.log(worker.log)
    assert "ClientDisconnected" in site.log(worker.log)


@services
@slow
def test_an_ini_file_without_loggers_leaves_logging_to_celery(deploy):
    site = deploy()
    text = (site.directory / "production.ini").read_text()
    (site.directory / "production.ini").write_text(text.partition("[loggers]")[0])
    site.worker("-l", "info", "--logfile", "celery.log", wait=False)
    until(lambda: " ready." in site.log("celery.log"))


@services
@slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "--ini FILE"),
        (("--ini", "missing.ini"), "missing.ini"),
    ],
)
def test_a_worker_without_an_ini_file_says_so(options, reason, deploy):
    site = deploy("ram")
    worker = site.start(
        "-m", "celery", "-A", "pyramid_async.celery", "worker", *options, log="worker"
    )
    assert worker.wait(PATIENCE) == 1
    assert reason in site.log("worker")


@services
@slow
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_pools_without_processes_end_too(pool, deploy):
    site = deploy("ram")
    site.edit("production.ini", {"zodb.conf": "nothing.conf"})
    worker = site.worker("-P", pool, wait=False)
    assert worker.wait(PATIENCE) == 1
    assert "nothing.conf" in site.log(worker.log)


# -- services: gunicorn --------------------------------------------------------------------


def ask(url, body=None):
    """Return (status, Location, JSON)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers["Location"], json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, None, error.read().decode()


def finished(url):
    def done():
        _, _, document = ask(url)
        return document["done"] and document

    return until(done, what=url)


# Jobs run in the web processes themselves.
THREADS = {
    "async.executor = celery\n": "",
    "async.celery.broker = amqp://shop:secret@broker.example.org:5672/shop\n": "",
}


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@services
@slow
@pytest.mark.parametrize(("storage", "broker"), [("zeo", RABBITMQ), ("relstorage", REDIS)])
def test_several_web_processes_and_workers_share_the_jobs(storage, broker, deploy):
    site = deploy(storage, broker)
    _, url = site.gunicorn("production.ini", "--workers", "2", "--threads", "4")
    for _ in range(2):
        site.worker()
    locations = [ask(f"{url}/start", {"goods": n})[1] for n in range(20)]
    documents = [finished(location) for location in locations]
    assert {document["status"] for document in documents} == {"successful"}
    assert sorted(document["result"]["goods"] for document in documents) == list(range(20))


@services
@slow
def test_one_process_on_a_file_runs_its_jobs_itself(deploy):
    site = deploy("file", None)
    _, url = site.gunicorn("alone.ini")
    _, location, _ = ask(f"{url}/start", {"goods": "tea"})
    assert finished(location)["result"]["goods"] == "tea"


# The application in a server of asyncio; what calls it there is not the matter.
ASGI = """
from pyramid.paster import get_app

get_app("alone.ini")

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"0"})
"""


@services
@slow
def test_a_worker_of_gunicorn_that_is_no_wsgi_server_opens_the_database(deploy):
    site = deploy("file", None)
    (site.directory / "served.py").write_text(ASGI)
    port = free_port()
    options = ("--bind", f"127.0.0.1:{port}", "--worker-class", "asgi")
    gunicorn = site.start("-m", "gunicorn", "served:app", *options, log="gunicorn")
    until(lambda: listens(port) or gunicorn.poll() is not None, what="gunicorn")
    assert ask(f"http://127.0.0.1:{port}/")[0] == 200


@services
@slow
def test_preloaded_ram_jobs_run_in_every_child(deploy):
    site = deploy("file", None)
    site.edit("alone.ini", {"zodbconn.uri": "# zodbconn.uri", "tm.manager_hook": "# tm."})
    _, url = site.gunicorn("alone.ini", "--preload", "--workers", "2", "--threads", "4")
    address = url.removeprefix("http://")
    processes = set()
    until(lambda: processes.add(process_of_a_job(address)) or len(processes) == 2)


def process_of_a_job(address):
    """Run a job in whichever child answers, and stay with that child."""
    with closing(http.client.HTTPConnection(address, timeout=PATIENCE)) as connection:

        def ask(method, path, body=None):
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, body and json.dumps(body), headers)
            with connection.getresponse() as answer:
                return answer.headers["Location"], json.load(answer)

        # Only the recovery thread wakes a job that waits for its time.
        call = {"goods": "tea", "options": {"run_after": 0.1}}
        location, _ = ask("POST", "/start", call)
        path = location.partition(address)[2]
        document = until(lambda: (found := ask("GET", path)[1])["done"] and found)
        return document["result"]["process"]


@services
@slow
@pytest.mark.parametrize(
    ("storage", "records"), [("zeo", "auto"), ("file", "auto"), ("file", "ram")]
)
def test_a_database_opened_before_the_fork_is_refused(storage, records, deploy):
    site = deploy(storage, RABBITMQ if storage == "zeo" else None)
    site.edit("alone.ini", {"async.workers": f"async.store = {records}\nasync.workers"})
    ini = "production.ini" if storage == "zeo" else "alone.ini"
    gunicorn, _ = site.gunicorn(ini, "--preload")
    assert gunicorn.wait(PATIENCE) == 1
    assert "make the application after the fork" in site.log("gunicorn")


# A server of one's own, which tells nobody that it will fork.
FORKS = """
import os, signal, sys
from wsgiref.simple_server import make_server
from pyramid.paster import get_app

server = make_server("127.0.0.1", int(sys.argv[2]), get_app(sys.argv[1]))
if os.fork() == 0:
    signal.alarm(120)
    print("listens", flush=True)
    server.handle_request()
    os._exit(0)
os.wait()
"""


@services
@slow
@pytest.mark.parametrize(
    ("storage", "records"), [("zeo", "auto"), ("file", "auto"), ("file", "ram")]
)
def test_a_view_that_schedules_nothing_uses_no_database_opened_before_the_fork(
    storage, records, deploy
):
    site = deploy(storage, None)
    site.edit("alone.ini", {"async.workers": f"async.store = {records}\nasync.workers"})
    site.edit("production.ini", THREADS)
    name, port = "production.ini" if storage == "zeo" else "alone.ini", free_port()
    site.start("-c", FORKS, name, str(port))
    until(lambda: "listens" in site.log())
    assert ask(f"http://127.0.0.1:{port}/count")[0] == 500
    assert "make the application after the fork" in site.log()


@services
@slow
@needs("pyuwsgi")
@pytest.mark.parametrize("storage", ["zeo", "file"])
def test_uwsgi_starts_no_application_whose_database_it_opened_before_the_fork(storage, deploy):
    site = deploy(storage, None)
    site.edit("production.ini", THREADS)
    url = site.uwsgi("production.ini" if storage == "zeo" else "alone.ini")
    assert ask(f"{url}/count")[0] == 500
    assert "make the application after the fork" in site.log("uwsgi")


@services
@slow
@needs("pyuwsgi")
def test_uwsgi_makes_the_application_after_the_fork(deploy):
    site = deploy("zeo", None)
    site.edit("production.ini", THREADS)
    url = site.uwsgi("production.ini", "--lazy-apps")
    processes = set()

    def sell():
        document = finished(ask(f"{url}/start", {"goods": "tea"})[1])
        assert document["status"] == "successful"
        processes.add(document["result"]["process"])

    until(lambda: sell() or len(processes) == 2)


@services
@slow
@needs("eventsourcing")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_eventsourcing_application_is_one_in_each_process_of_web_and_workers(pool, deploy):
    site = deploy()
    (site.directory / "kennel.py").write_text(KENNEL.read_text())
    site.edit("kennel.py", {"    with Configurator(": "    log('loaded')\n    with Configurator("})
    includes = "pyramid.includes = pyramid_retry pyramid_zodbconn"
    site.edit("production.ini", {"call:shop:main": f"call:kennel:main\n{includes}"})
    gunicorn, url = site.gunicorn("production.ini", "--workers", "2", "--threads", "4")
    worker = site.worker("-P", pool)
    locations = [ask(url, {})[1] for _ in range(20)]
    assert {finished(location)["status"] for location in locations} == {"successful"}
    site.end(worker)
    site.end(gunicorn)
    made, closed, served, taught = (
        site.pids(what) for what in ("made", "closed", "served", "taught")
    )
    assert len(served) == len(taught) == 20
    assert sorted(made) == sorted(closed) == sorted({*served, *taught})
    assert gunicorn.pid not in made
    assert (worker.pid in made) == (pool == "threads")
    # No main process that forks loads what opens the database.
    assert gunicorn.pid not in site.pids("loaded")
    assert (worker.pid in site.pids("loaded")) == (pool == "threads")
    with closing(sqlite3.connect(site.directory / "kennel.sqlite")) as events:
        [[number]] = events.execute("SELECT COUNT(*) FROM stored_events")
    assert number == 2 * 20  # each dog was registered and learned a trick


# -- the guide -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sorted(p.name for p in DEPLOYMENT.iterdir() if p.suffix in {".ini", ".conf"})
)
def test_the_guide_shows_the_files_that_are_tested(name):
    indented = "".join(
        f"    {line}".rstrip() + "\n" for line in (DEPLOYMENT / name).read_text().splitlines()
    )
    assert indented in GUIDE.read_text()


def test_the_guide_tells_the_times_of_the_code():
    text = " ".join(GUIDE.read_text().split())
    grace = module.CeleryExecutor.grace
    look = read_settings({})["maintenance_interval"]
    assert f"{grace:.0f} to {grace + look:.0f} s after their commit" in text
    assert f"every {bells.PAUSE:.0f} s by each worker process" in text
    assert f"every {bells.PASSED_OVER / 60:.0f} minutes" in text
    assert "Prefetching is one message" in text
    assert bells.app.conf.worker_prefetch_multiplier == 1
    assert module.RECORD_TIMEOUT == 2.0  # a ZEO client was seen to be late by half a second
