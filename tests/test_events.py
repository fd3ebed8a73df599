"""The events of a job's life: which are sent, when, and what a failing subscriber costs."""

from __future__ import annotations

import asyncio
import threading

import pytest
import transaction
from webapp import (
    GATES,
    KINDS,
    behind_gate,
    browser,
    echo,
    fail,
    gate,
    kind,
)

from pyramid_async import (
    IJobAccepted,
    IJobCancelled,
    IJobFinished,
    IJobStarted,
    current_job,
)
from pyramid_async.interfaces import IJobEvent


@pytest.fixture(params=KINDS)
def web(request):
    """A client of an application of every kind."""
    with kind(request.param) as client:
        yield client


@pytest.fixture
def told(web):
    """What was told of each job: sid -> [(kind of event, status, thread)]."""
    seen = {}

    def subscribe(interface):
        def hear(event):
            assert event.registry is web.app.registry
            found = (interface, event.status, threading.current_thread())
            seen.setdefault(event.sid, []).append(found)

        web.app.registry.registerHandler(hear, [interface])

    for interface in (IJobAccepted, IJobStarted, IJobFinished, IJobCancelled):
        subscribe(interface)
    return seen


def sid_of(url):
    return url[-32:]


def kinds(told, url):
    return sorted(interface.__name__ for interface, _, _ in told.get(sid_of(url), ()))


@pytest.mark.parametrize(("job", "status"), [(echo, "successful"), (fail, "failed")])
def test_life_of_a_job_is_told_in_three_events(web, told, wait_for, job, status):
    url, _ = web.finished(job, "x")
    wait_for(lambda: len(kinds(told, url)) == 3)
    assert kinds(told, url) == ["IJobAccepted", "IJobFinished", "IJobStarted"]
    by_kind = {interface: (said, thread) for interface, said, thread in told[sid_of(url)]}
    assert by_kind[IJobAccepted] == ("accepted", threading.current_thread())
    assert by_kind[IJobStarted][0] == "running"
    assert by_kind[IJobFinished][0] == status
    assert by_kind[IJobStarted][1] is by_kind[IJobFinished][1]
    assert by_kind[IJobStarted][1].name.startswith("pyramid_async-worker")
    web.finished(echo)
    web.finished(echo)
    assert len(kinds(told, url)) == 3


def test_start_is_told_before_the_function_is_called(web, told, at_gate):
    url = web.url(behind_gate, at_gate)
    GATES[at_gate].reach()
    assert kinds(told, url) == ["IJobAccepted", "IJobStarted"]


def test_cancelled_job_is_told_once_and_not_as_finished(web, told, at_gate):
    url = web.url(behind_gate, at_gate)
    GATES[at_gate].reach()
    web.delete(url)
    assert (IJobCancelled, "dismissed", threading.current_thread()) in told[sid_of(url)]
    web.delete(url)
    GATES[at_gate].opened.set()
    web.finished(echo)
    web.finished(echo)
    assert kinds(told, url) == ["IJobAccepted", "IJobCancelled", "IJobStarted"]


def test_removal_of_an_unfinished_job_is_told_as_its_cancellation(web, told, at_gate):
    url = web.url(behind_gate, at_gate)
    GATES[at_gate].reach()
    web.scheduler.transact(lambda scheduler: scheduler.remove(sid_of(url)))
    assert "IJobCancelled" in kinds(told, url)


def test_a_job_whose_commit_fails_is_told_of_no_further(web, told):
    with pytest.raises(Exception, match="the vote failed"):
        web.start(echo, query="?conflict=9")
    url, _ = web.finished(echo)
    assert "IJobStarted" in kinds(told, url)
    lost = [sid for sid in told if sid != sid_of(url)]
    assert {interface for sid in lost for interface, *_ in told[sid]} == {IJobAccepted}


def test_request_that_is_run_again_tells_the_same_job():
    with kind("zodb-explicit-retry") as web:
        seen = set()
        web.app.registry.registerHandler(lambda event: seen.add(event.sid), [IJobAccepted])
        url = web.start(echo, query="?conflict=2").location
        assert seen == {sid_of(url)}


def test_subscriber_that_refuses_a_job_prevents_it(web):
    def refuse(event):
        raise ZeroDivisionError("not this one")

    web.app.registry.registerHandler(refuse, [IJobAccepted])
    with pytest.raises(ZeroDivisionError):
        web.start(echo)


def test_job_is_not_told_of_a_dismissal_that_a_savepoint_took_back(web, told, at_gate):
    url = web.url(behind_gate, at_gate)
    GATES[at_gate].reach()
    tm = transaction.TransactionManager()
    scheduler = web.scheduler.using(tm=tm)
    tm.begin()
    savepoint = tm.savepoint()
    scheduler.cancel(sid_of(url))
    savepoint.rollback()
    tm.commit()
    GATES[at_gate].opened.set()
    assert web.done(url)["status"] == "successful"


def test_key_that_finds_its_job_tells_nothing_new(web, told, at_gate):
    url = web.url(behind_gate, at_gate, key="one")
    assert web.url(behind_gate, at_gate, key="one") == url
    assert kinds(told, url).count("IJobAccepted") == 1


def test_start_is_told_once_in_spite_of_conflicts(wait_for):
    with kind("zodb-explicit-retry") as web:
        seen = []
        web.app.registry.registerHandler(lambda event: seen.append(event.status), [IJobStarted])
        web.scheduler.worker.conflict_attempts = 3
        conflicts = iter([True, True, False])
        original = type(web.scheduler.worker).make_try

        class Conflicting(original):
            def _commit(self):
                if next(conflicts):
                    raise transaction.interfaces.TransientError("a rival")
                super()._commit()

        web.scheduler.worker.make_try = Conflicting
        assert web.finished(echo, "x")[1]["result"] == "x"
        assert seen == ["running"]


def test_job_that_has_no_attempt_left_is_told_as_failed(wait_for):
    with kind("zodb-explicit-retry", {"async.workers": "1"}) as web, gate() as name:
        seen = []
        web.app.registry.registerHandler(lambda event: seen.append(event.sid), [IJobFinished])
        url = web.url(behind_gate, name, max_attempts=1)
        GATES[name].reach()
        worker = web.scheduler.worker

        def die(scheduler):
            record = scheduler._table().get(sid_of(url))
            record.claim("a process that is gone", "lost", scheduler.store.clock())
            return record.revision

        lost = web.scheduler.transact(die)
        GATES[name].opened.set()
        wait_for(lambda: sid_of(url) not in worker.running)
        worker.run(sid_of(url), lost)
        assert web.get(url).json["status"] == "failed"
        assert seen == [sid_of(url)]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, asyncio.CancelledError])
def test_failing_subscribers_of_a_worker_cost_no_job_and_are_logged(web, caplog, error, wait_for):
    def subscriber(event):
        raise error("of the subscriber")

    for interface in (IJobStarted, IJobFinished):
        web.app.registry.registerHandler(subscriber, [interface])
    _, document = web.finished(echo, "x")
    assert document["result"] == "x"
    threads = web.scheduler.executor.threads
    for _ in threads:
        web.finished(echo)

    def logged(status):
        told = [record.getMessage() for record in caplog.records]
        return any("subscriber failed" in text and status in text for text in told)

    wait_for(lambda: logged("running") and logged("successful"))
    assert all(thread.is_alive() for thread in threads)


def test_event_of_the_start_is_sent_outside_of_the_jobs_function():
    with browser() as web:
        seen = []
        web.app.registry.registerHandler(lambda event: seen.append(current_job().sid), [IJobEvent])
        web.finished(echo)
        assert set(seen) == {None}
