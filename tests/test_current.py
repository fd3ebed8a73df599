"""What a function sees of its job."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from bare import Clock, together

import pyramid_async.current
from pyramid_async import JobDismissed, JobStopped, JobTimeout, current_job
from pyramid_async.current import MESSAGE_LIMIT, Job, running
from pyramid_async.jobs import JobRecord, status_of

SID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def job(clock):
    return Job(SID, clock=clock)


# -- outside of a job ----------------------------------------------------------------------


def test_outside_of_a_job_there_is_a_stand_in():
    job = current_job()
    assert (job.sid, job.request, job.attempt, job.cursor) == (None, None, 0, None)


def test_calls_of_the_stand_in_do_nothing():
    job = current_job()
    assert job.progress(1, 2, message="x") is None
    assert job.progress(1) is None
    assert job.check() is None
    assert job.checkpoint("cursor") is None
    assert job.cursor is None
    assert list(job.track([1, 2], total=2, message="x")) == [1, 2]
    assert list(job.track(iter("ab"))) == ["a", "b"]


@pytest.mark.parametrize("name", [n for n in vars(Job) if not n.startswith("_")])
def test_stand_in_has_what_functions_use_of_a_job(name):
    internal = {"live", "interrupt"}
    assert name in internal or hasattr(current_job(), name)


# -- which job is current ------------------------------------------------------------------


def test_job_is_current_inside_and_not_after(job):
    with running(job) as entered:
        assert entered is job
        assert current_job() is job
    assert current_job().sid is None


def test_job_is_current_no_more_when_the_function_raises(job):
    with pytest.raises(ZeroDivisionError), running(job):
        raise ZeroDivisionError
    assert current_job().sid is None


def test_job_inside_of_a_job_hides_it_for_a_while(job):
    """As with an executor for tests, which runs a job at the commit of another."""
    inner = Job("inner")
    with running(job):
        with running(inner):
            assert current_job() is inner
        assert current_job() is job


def test_threads_have_jobs_of_their_own():
    seen = {}
    both = threading.Barrier(2)

    def run(sid):
        with running(Job(sid)):
            both.wait(10)
            seen[sid] = current_job().sid

    together(lambda: run("a"), lambda: run("b"))
    assert seen == {"a": "a", "b": "b"}
    assert current_job().sid is None


def test_thread_that_a_job_starts_has_no_job_unless_it_is_handed_over(job):
    with running(job), ThreadPoolExecutor(1) as pool:
        assert pool.submit(current_job).result(10).sid is None
        assert pool.submit(contextvars.copy_context().run, current_job).result(10) is job


def test_coroutines_of_a_job_see_it(job):
    async def look():
        await asyncio.sleep(0)
        return current_job()

    async def both():
        return await asyncio.gather(
            look(), asyncio.create_task(look()), asyncio.to_thread(current_job)
        )

    with running(job):
        assert asyncio.run(both()) == [job, job, job]


# -- progress ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "total", "percent"),
    [
        (0, 10, 0),
        (5, 10, 50),
        (1, 3, 33),
        (10, 10, 99),  # 100 is for successful jobs
        (50, 10, 99),
        (-5, 10, 0),
        (2.5, 5.0, 50),
        (1, 0, None),
        (1, None, None),
    ],
)
def test_progress_is_a_percentage_below_100(job, done, total, percent):
    job.progress(done, total)
    assert job.percent == percent


def test_progress_never_falls(job):
    for done in (5, 3, 7, 1):
        job.progress(done, 10)
    assert job.percent == 70


def test_message_alone_leaves_the_percentage(job):
    job.progress(5, 10)
    job.progress(0, message="thinking")
    assert (job.percent, job.message) == (50, "thinking")
    job.progress(6, 10)
    assert (job.percent, job.message) == (60, "thinking")


@pytest.mark.parametrize(
    ("done", "total", "percent"),
    [(Decimal(29), 100.0, 29), (math.nan, 3, None), (1, math.nan, None), (5, math.inf, 0)],
)
def test_odd_numbers_fail_no_job(job, done, total, percent):
    job.progress(done, total, "odd")
    assert (job.percent, job.message) == (percent, "odd")
    assert job.remaining is None or isinstance(job.remaining, float)


def test_long_message_is_cut_and_anything_becomes_a_text(job):
    job.progress(1, message="ä" * 10_000)
    assert job.message == "ä" * MESSAGE_LIMIT
    job.progress(1, message=42)
    assert job.message == "42"


def test_estimate_grows_from_the_time_that_the_done_part_took(job, clock):
    job.progress(0, 10)
    assert job.remaining is None
    clock.now += 8
    job.progress(2, 10)
    assert job.remaining == 32
    clock.now += 8
    job.progress(8, 10)
    assert job.remaining == 4


def test_estimate_of_more_than_all_is_nothing(job, clock):
    clock.now += 8
    job.progress(20, 10)
    assert (job.percent, job.remaining) == (99, 0)


def test_no_number_of_visible_changes_is_like_that_of_a_change_of_the_record(job, clock):
    record = JobRecord(SID, clock(), "module:function")
    record.move("running", clock())
    before = status_of(record, job.live()).revision
    job.ticks += 100_000_000_000  # ten a millisecond for half a year
    during = status_of(record, job.live()).revision
    job.progress(1, 2)
    assert before < during < status_of(record, job.live()).revision
    record.finish("successful", clock(), 60)
    assert status_of(record).revision > during


def test_visible_changes_are_counted_and_dated(job, clock):
    clock.now += 1
    job.progress(1, 1000)
    assert (job.ticks, job.changed) == (2, clock.now)
    clock.now += 1
    job.progress(2, 1000)  # still 0 percent
    assert (job.ticks, job.changed) == (2, clock.now - 1)
    job.progress(2, 1000, "new")
    assert (job.ticks, job.changed) == (3, clock.now)


def test_track_tells_the_progress_after_each_item(job):
    seen = []
    for item in job.track("abcd", message="letters"):
        seen.append((item, job.percent, job.message))
    assert seen == [
        ("a", 0, "letters"),
        ("b", 25, "letters"),
        ("c", 50, "letters"),
        ("d", 75, "letters"),
    ]
    assert job.percent == 99


def test_track_of_what_has_no_length_takes_a_total_or_does_without(job):
    assert list(job.track(iter("ab"))) == ["a", "b"]
    assert job.percent is None
    assert list(job.track(iter("ab"), total=4)) == ["a", "b"]
    assert job.percent == 50


def test_track_of_nothing_is_nothing(job):
    assert list(job.track([])) == []
    assert job.percent is None


def test_what_is_shown_outside_is_what_the_job_told(job, clock):
    job.progress(1, 2, "half")
    live = job.live()
    assert (live.percent, live.message, live.ticks) == (50, "half", 2)
    assert (live.started, live.signature) == (job.started, job.signature)


def test_each_attempt_has_a_signature_of_its_own():
    assert len({Job(SID).signature for _ in range(100)}) == 100


# -- interruptions -------------------------------------------------------------------------

REASONS = [JobDismissed("gone"), JobTimeout("late"), JobStopped("stops")]


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: type(reason).__name__)
@pytest.mark.parametrize(
    "call",
    [
        lambda job: job.check(),
        lambda job: job.progress(1),
        lambda job: list(job.track([1])),
        lambda job: job.checkpoint(1),
    ],
    ids=["check", "progress", "track", "checkpoint"],
)
def test_interrupted_job_is_told_at_its_next_call(job, reason, call):
    job.interrupt(reason)
    for _ in range(2):
        with pytest.raises(type(reason)):
            call(job)
    assert (job.ticks, job.checkpoints) == (1, 0)


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: type(reason).__name__)
def test_interruption_is_no_exception_that_a_function_swallows(reason):
    assert not isinstance(reason, Exception)


def test_first_reason_stays(job):
    for reason in REASONS:
        job.interrupt(reason)
    with pytest.raises(JobDismissed, match="gone"):
        job.check()


def test_tracking_ends_at_the_item_where_the_job_is_told(job):
    seen = []
    with pytest.raises(JobDismissed):
        for item in job.track([1, 2, 3]):
            seen.append(item)
            if item == 2:
                job.interrupt(JobDismissed("gone"))
    assert seen == [1, 2]


def test_job_is_told_when_its_time_is_over(job, monkeypatch):
    now = Clock(100.0)
    monkeypatch.setattr(pyramid_async.current.time, "monotonic", now)
    job.deadline = 110.0
    job.check()
    now.now = 110.0
    job.check()
    now.now = 110.1
    with pytest.raises(JobTimeout, match=SID):
        job.check()


# -- checkpoints ---------------------------------------------------------------------------


def test_checkpoint_commits_before_it_moves_the_cursor(job):
    seen = []
    job.commit_checkpoint = lambda cursor: seen.append((cursor, job.cursor, job.checkpoints))
    job.checkpoint("a")
    job.checkpoint("b")
    assert seen == [("a", None, 0), ("b", "a", 1)]
    assert (job.cursor, job.checkpoints) == ("b", 2)


def test_checkpoint_that_fails_leaves_the_cursor(job):
    def refuse(cursor):
        raise ZeroDivisionError

    job.commit_checkpoint = refuse
    with pytest.raises(ZeroDivisionError):
        job.checkpoint("a")
    assert (job.cursor, job.checkpoints) == (None, 0)
