"""What operators see and do: lists, retry, purge, check, and the pages that show it."""

from __future__ import annotations

import re
import threading
from html import unescape
from urllib.parse import quote

import pytest
import transaction
from persistent import Persistent
from persistent.mapping import PersistentMapping
from pyramid.csrf import SessionCSRFStoragePolicy
from pyramid.session import SignedCookieSessionFactory
from pyramid.traversal import _segment_cache
from pyramid_zodbconn import get_connection
from webapp import (
    GATES,
    ORIGIN,
    as_user,
    behind_gate,
    browser,
    echo,
    fail,
    fail_publicly,
    gate,
    kind,
    tell,
)
from ZODB.Connection import resetCaches

from pyramid_async import JobNotFound, JobStatus, current_job, manage
from pyramid_async.interfaces import NotRetriable
from pyramid_async.jobs import Live
from pyramid_async.manage import FINAL, UNFINISHED, BadCursor
from pyramid_async.scheduler import Caller
from pyramid_async.signs import Sign
from pyramid_async.transactional import transact
from pyramid_async.zodb import HAUNTED, OVERDUE

ADMIN = as_user("admin")
STORES = ["zodb-explicit-retry", "ram-default-retry"]


@pytest.fixture(params=STORES)
def web(request):
    with kind(request.param) as client:
        yield client


@pytest.fixture
def durable():
    with kind("zodb-explicit-retry") as client:
        yield client


def put(web, f, *args, **options):
    """Schedule and return the sid."""
    return web.scheduler.transact(lambda bound: bound.using(**options).schedule(f, *args))


def ended(web, f, *args, **options):
    """Run a job to its end and return the sid."""
    sid = put(web, f, *args, **options)
    web.done(f"/async/{sid}")
    return sid


@pytest.fixture
def set_clock(monkeypatch, wait_for):
    """Set the clock of a store, once workers and recovery rest: they would act on it too."""

    def set_to(web, moment):
        executor = web.scheduler.executor
        running = executor.worker.running
        wait_for(lambda: executor.held <= {s for s, job in list(running.items()) if job.begun})
        executor.recovery.stop(10)
        monkeypatch.setattr(web.scheduler.store, "clock", lambda: moment)

    return set_to


def archived(web, *calls):
    """Run jobs one after the other and put their records away; return the sids."""
    sids = [ended(web, *call) for call in calls]
    web.scheduler.store.archive(sids)
    return sids


def sids(page):
    return [job.sid for job in page.jobs]


def page(web, *args, **options):
    return manage.page(web.scheduler, *args, **options)


def all_pages(web, **options):
    """Follow the cursors, with a bound, and return the sids of each page."""
    pages, cursor = [], None
    for _ in range(200):
        found = page(web, cursor=cursor, **options)
        pages.append(sids(found))
        cursor = found.next
        if cursor is None:
            return pages
    pytest.fail("the pages have no end")


# -- lists ---------------------------------------------------------------------------------


def test_unfinished_jobs_come_first_and_then_the_last_that_finished(web):
    old = archived(web, (echo,), (fail, "x"))
    young = [ended(web, echo) for _ in range(2)]
    with gate() as name:
        waiting = [put(web, behind_gate, name) for _ in range(3)]
        found = page(web)
        assert sids(found) == waiting[::-1] + young[::-1] + old[::-1]
        assert found.next is None
        assert [job.status for job in found.jobs[3:]] == ["successful"] * 2 + [
            "failed",
            "successful",
        ]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_hold_every_job_once_and_keep_the_order_of_the_end(web, limit):
    old = archived(web, *[(echo,), (fail, "x")] * 4)
    young = [ended(web, echo) for _ in range(3)]
    with gate() as name:
        waiting = {put(web, behind_gate, name) for _ in range(4)}
        pages = all_pages(web, limit=limit)
        assert all(len(each) == limit for each in pages[:-1])
        listed = [sid for each in pages for sid in each]
        assert set(listed[:4]) == waiting
        assert listed[4:] == young[::-1] + old[::-1]


def test_jobs_that_ended_long_ago_come_after_those_of_today(durable):
    moments = [1_000_000.0, 1_000_009.9, 1_000_010.0, 1_500_000.0]
    store = durable.scheduler.store
    old = []
    for moment in moments:
        store.clock, clock = (lambda moment=moment: moment), store.clock
        old.append(put(durable, echo, result_timeout=1e10))
        durable.scheduler.transact(lambda bound: bound.cancel(old[-1]))
        store.clock = clock
    store.archive(sorted(old))
    new = ended(durable, fail, "x")
    assert sids(page(durable, FINAL)) == [new, *old[::-1]]
    assert all_pages(durable, statuses=FINAL, limit=1) == [[sid] for sid in (new, *old[::-1])]


def test_status_chooses_jobs(web):
    good, bad = archived(web, (echo,), (fail, "x"))
    with gate() as name:
        running = put(web, behind_gate, name)
        GATES[name].reach()
        assert sids(page(web, ["failed"])) == [bad]
        assert sids(page(web, ["successful"])) == [good]
        assert sids(page(web, FINAL)) == [bad, good]
        assert sids(page(web, UNFINISHED)) == sids(page(web, ["running"])) == [running]
        assert sids(page(web, ["accepted"])) == sids(page(web, ["dismissed"])) == []


@pytest.mark.parametrize(
    "text", ["Große", "GROSSE", "alice", "webapp:fail", "a queue", "KEY 7", "ZeroDiv", "by naught"]
)
def test_text_is_found_in_all_that_names_a_job(web, text):
    options = {"title": "Die große Liste", "key": "key 7", "queue": "a queue"}
    url = web.finished(fail, "divided by naught", user="admin alice", **options)[0]
    ended(web, echo)
    assert sids(page(web, text=text)) == [url[-32:]]
    assert sids(page(web, text=url[-32:])) == [url[-32:]]


def test_page_looks_at_no_more_jobs_than_it_may(web):
    wanted, *_ = archived(web, (fail, "needle"), *[(echo,)] * 7)
    pages = all_pages(web, text="needle", scan=3)
    assert pages == [[], [], [wanted]]
    assert sids(manage.follow(web.scheduler, 10, text="needle", scan=3)) == [wanted]


def test_following_stops_at_its_limit_and_goes_on_from_there(web):
    expected = archived(web, *[(echo,)] * 7)[::-1]
    first = manage.follow(web.scheduler, 5, scan=2)
    assert sids(first) == expected[:5]
    assert sids(manage.follow(web.scheduler, 5, first.next)) == expected[5:]


def test_removed_jobs_are_not_listed(web):
    gone, kept = archived(web, (fail, "x"), (fail, "y"))
    web.scheduler.transact(lambda bound: bound.remove(gone))
    assert sids(page(web)) == [kept]


@pytest.mark.parametrize(("age", "moved"), [(59, []), (60, [60, 40, 20])])
def test_records_are_put_away_many_at_once(durable, set_clock, age, moved):
    """Once one has waited for a minute those of its neighbourhood go too: that writes less."""
    store = durable.scheduler.store
    start, expected = store.clock(), []
    for passed in (0, 20, 40, 41):
        set_clock(durable, start + passed)
        sid = put(durable, echo, run_after=1000)
        durable.scheduler.transact(lambda bound, sid=sid: bound.cancel(sid))
        if age - passed in moved:
            expected.append(sid)
    set_clock(durable, start + age)
    durable.scheduler.executor.recovery.look()

    def put_away(table):
        return {sid for tree in table.root.finished for sid in tree}

    assert transact(store, put_away) == set(expected)


def test_expired_jobs_leave_the_lists(durable):
    sid = ended(durable, fail, "x", result_timeout=1)
    store = durable.scheduler.store
    store.archive([sid])
    assert lists(durable) == (1, 1)
    now = store.clock()
    store.expire(now + 100)
    assert lists(durable) == (0, 0)


def lists(web):
    """Return how long the lists of expiring and of ended jobs are."""

    def count(table):
        return len(table.root.expiry), sum(map(len, table.root.ended.values()))

    return transact(web.scheduler.store, count)


@pytest.mark.parametrize(
    "cursor", ["x", "-1", "ab@", "@", "@nan", "@inf", "ab@-1", "ab@1e9", "é", "a" * 65, "ab@1@1"]
)
def test_cursor_that_no_page_gave_is_refused(web, cursor):
    with pytest.raises(BadCursor, match=re.escape(repr(cursor))):
        page(web, cursor=cursor)


@pytest.mark.parametrize("cursor", ["", "0", "ff", "zz"[:0] + "00", "@0", "ff@99999999999.5"])
def test_cursor_of_jobs_that_are_gone_shows_what_follows(web, cursor):
    archived(web, (echo,))
    assert len(page(web, cursor=cursor).jobs) <= 1


def test_record_that_cannot_be_read_is_shown_and_hides_no_other(durable):
    good = ended(durable, echo)
    spoil(durable, "5" * 32, PersistentMapping())
    [bad] = [job for job in page(durable).jobs if job.sid != good]
    assert (bad.sid, bad.status, bad.job) == ("5" * 32, "unreadable", None)
    assert "cannot be read" in bad.fault
    assert sids(page(durable, ["failed"])) == []  # it is among the unfinished ones
    assert "5" * 32 in sids(page(durable, UNFINISHED))
    assert manage.show(durable.scheduler, "5" * 32).status == "unreadable"
    text = durable.get("/async/manage", headers=ADMIN).text
    assert "An unreadable record" in text


class Row:
    """As of an ORM, whose session is closed."""

    def __repr__(self):
        raise AssertionError("its session is closed")

    def __call__(self):
        return "called"


def test_callable_whose_repr_fails_is_named_by_its_class():
    with kind("ram-default-retry") as web:
        sid = ended(web, Row())
        assert manage.show(web.scheduler, sid).function == "test_manage:Row"


def spoil(web, sid, record, trees="unfinished"):
    def store(table):
        getattr(table.root, trees)[table.root.shard(sid)][sid] = record

    transact(web.scheduler.store, store)


# -- one job -------------------------------------------------------------------------------


def test_show_tells_the_whole_failure(web):
    sid = ended(web, fail, "secret", key="k", queue="q")
    job = manage.show(web.scheduler, sid)
    shown = manage.as_json(job)
    assert shown["failure"]["class"] == "ZeroDivisionError"
    assert "in fail" in shown["failure"]["traceback"]
    assert shown["failure"]["message"] == "secret"
    assert (shown["key"], shown["queue"], shown["function"]) == ("k", "q", "webapp:fail")
    assert "detail" not in shown["failure"]
    assert isinstance(job.job, JobStatus)


def test_show_tells_who_has_a_job(web):
    with gate() as name:
        sid = put(web, behind_gate, name)
        job = manage.show(web.scheduler, sid)
        assert job.holder.startswith(f"process {web.scheduler.store.process}")
        assert job.may_cancel
        assert not job.may_retry


def test_show_tells_who_runs_a_job_that_nobody_claimed(durable):
    sid = put(durable, echo, run_after=1000)

    def list_attempt(table):
        table.get(sid).holder = None
        sign = Sign("host:1")
        sign.running = {sid: Live(1.0, 1.0, 1, revision=1)}
        table.show_sign("somebody", sign)

    transact(durable.scheduler.store, list_attempt)
    job = manage.show(durable.scheduler, sid)
    assert (job.status, job.holder[:25]) == ("running", "process somebody (host:1,")


def test_unknown_job_is_not_shown(web):
    with pytest.raises(JobNotFound):
        manage.show(web.scheduler, "0" * 32)


def test_callable_without_a_name_has_one_for_operators():
    with kind("ram-default-retry") as web:
        sid = ended(web, lambda: 1)
        assert "<lambda>" in manage.show(web.scheduler, sid).function


def collide():
    """Change what another transaction changes meanwhile."""
    root = get_connection(current_job().request).root()
    root["rival"] = 1
    manager = transaction.TransactionManager()
    connection = get_connection(current_job().request).db().open(manager)
    connection.root()["rival"] = 2
    manager.get().note("the rival")
    manager.commit()
    connection.close()


def test_conflict_is_explained_to_operators():
    with browser({"async.conflict_attempts": "1"}, zodb="memory://conflicts") as web:
        sid = ended(web, collide)
        told = manage.show(web.scheduler, sid).failure.message
        assert "conflict on persistent.mapping.PersistentMapping 0x00" in told
        text = web.get(f"/async/manage/{sid}", headers=ADMIN).text
        assert "conflict on persistent.mapping.PersistentMapping 0x00" in text
        assert "conflict on" not in web.get(f"/async/{sid}", headers=ADMIN).text


# -- processes -----------------------------------------------------------------------------


def test_process_that_runs_jobs_is_shown_with_them(web):
    assert manage.processes(web.scheduler) == []
    with gate() as name:
        sid = put(web, behind_gate, name)
        GATES[name].reach()
        [process] = manage.processes(web.scheduler)
        assert process.running == (sid,)
        assert not process.silent
        text = web.get("/async/manage", headers=ADMIN).text
        assert process.name in text
        assert f"/async/manage/{sid}" in text


def show_sign(web, process, age, running=()):
    def store(table):
        sign = Sign("far:1")
        sign.at = web.scheduler.store.clock() - age
        sign.running = dict.fromkeys(running)
        table.show_sign(process, sign)

    transact(web.scheduler.store, store)


def test_process_that_fell_silent_is_told(durable):
    show_sign(durable, "p1", 59)
    show_sign(durable, "p2", 61)
    assert {p.id: p.silent for p in manage.processes(durable.scheduler)} == {
        "p1": False,
        "p2": True,
    }
    text = durable.get("/async/manage", headers=ADMIN).text
    assert text.count("silent for longer than a lease") == 1


# -- cancel and retry ----------------------------------------------------------------------


TRIES = {}


def fail_once(key, *args, **kw):
    TRIES.setdefault(key, []).append((args, kw, current_job().sid))
    if len(TRIES[key]) == 1:
        raise ZeroDivisionError
    return "well"


@pytest.fixture
def key(request):
    yield request.node.name
    TRIES.pop(request.node.name, None)


def test_retried_job_is_a_new_one_with_the_same_call(web, key):
    sid = web.scheduler.transact(
        lambda b: b.using(title="A title", result_timeout=77).schedule(fail_once, key, 1, two=2)
    )
    web.done(f"/async/{sid}")
    before = manage.show(web.scheduler, sid)
    assert before.may_retry
    new = manage.retry(web.scheduler, sid)
    assert web.done(f"/async/{new}")["result"] == "well"
    assert TRIES[key] == [((1,), {"two": 2}, sid), ((1,), {"two": 2}, new)]
    after = manage.show(web.scheduler, sid)
    assert (after.status, after.retried, after.may_retry) == ("failed", new, False)
    assert after.job == before.job
    again = manage.show(web.scheduler, new)
    assert (again.job.title, again.job.attempts) == ("A title", 1)
    assert again.job.expires - again.job.finished == 77


def test_retried_job_belongs_to_the_same_user(web):
    url, _ = web.finished(fail, "x", user="alice")
    new = manage.retry(web.scheduler, url[-32:])
    web.get(f"/async/{new}", status=404)
    assert web.done(f"/async/{new}", "alice")["status"] == "failed"


def fail_once_and_tell_the_url(key):
    fail_once(key)
    return current_job().request.application_url


def test_retried_job_has_the_operation_and_the_urls_of_the_failed_one(web, key):
    caller = Caller(origin=("https", "shop.example", "/x"), operation="import")

    def schedule(table):
        return web.scheduler.bind(table.tm, caller).schedule(fail_once_and_tell_the_url, key)

    sid = transact(web.scheduler.store, schedule)
    web.done(f"/async/{sid}")
    document = web.done(f"/async/{manage.retry(web.scheduler, sid)}")
    assert (document["processID"], document["result"]) == ("import", "https://shop.example/x")


def test_retried_job_goes_to_the_queue_of_the_failed_one_alone(web, key, monkeypatch):
    sid, rung = ended(web, fail_once, key), []
    wake = web.scheduler.executor.wake
    monkeypatch.setattr(
        web.scheduler.executor, "wake", lambda *what: rung.append(what) or wake(*what)
    )
    new = web.scheduler.transact(lambda bound: bound.using(queue="another").retry(sid))
    assert rung == [(True, new, None)]
    assert web.done(f"/async/{new}")["result"] == "well"


def test_retry_of_one_job_is_one_job_however_often_it_is_asked_for(web, key):
    sid = ended(web, fail_once, key)
    start, found = threading.Barrier(4), []

    def ask():
        start.wait(10)
        found.append(manage.retry(web.scheduler, sid))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len({*found, manage.retry(web.scheduler, sid)}) == 1
    web.done(f"/async/{found[0]}")
    assert len(TRIES[key]) == 2


def test_retry_that_is_aborted_leaves_no_trace(web, key):
    sid = ended(web, fail_once, key)

    def think_better_of_it(bound):
        bound.retry(sid)
        raise KeyError

    with pytest.raises(KeyError):
        web.scheduler.transact(think_better_of_it)
    assert manage.show(web.scheduler, sid).may_retry
    assert len(page(web).jobs) == 1


def in_two_parts(key):
    job = current_job()
    TRIES.setdefault(key, []).append(job.cursor)
    if job.cursor is None:
        job.checkpoint("half")
        raise ZeroDivisionError


def test_retried_job_goes_on_from_the_last_checkpoint(web, key):
    """What was committed there stays, and must not be done twice."""
    sid = ended(web, in_two_parts, key)
    new = manage.retry(web.scheduler, sid)
    assert web.done(f"/async/{new}")["status"] == "successful"
    assert TRIES[key] == [None, "half"]


def test_retry_gives_the_arguments_of_the_failed_job_away(durable, key):
    sid = ended(durable, fail_once, key, "x" * 100_000)

    def kept(table):
        return table.get(sid).arguments

    assert transact(durable.scheduler.store, kept) is not None
    manage.retry(durable.scheduler, sid)
    assert transact(durable.scheduler.store, kept) is None


@pytest.mark.parametrize("job", [(echo,), (behind_gate, None)], ids=["successful", "dismissed"])
def test_only_failed_jobs_can_be_retried(web, job):
    with gate() as name:
        f, *args = job
        sid = put(web, f, *([name] if args else []))
        if args:
            with pytest.raises(NotRetriable, match=r"it is (accepted|running); only a failed job"):
                manage.retry(web.scheduler, sid)
            assert manage.cancel(web.scheduler, sid)
        web.done(f"/async/{sid}")
        with pytest.raises(NotRetriable, match="only a failed job"):
            manage.retry(web.scheduler, sid)
    with pytest.raises(JobNotFound):
        manage.retry(web.scheduler, "0" * 32)


def test_retry_waits_for_the_key_that_another_job_has(web, key):
    sid = ended(web, fail_once, key, key="one at a time")
    with gate() as name:
        rival = put(web, behind_gate, name, key="one at a time")
        with pytest.raises(NotRetriable, match=f"job '{rival}' has its key 'one at a time'"):
            manage.retry(web.scheduler, sid)
    web.done(f"/async/{rival}")
    new = manage.retry(web.scheduler, sid)
    assert web.done(f"/async/{new}")["result"] == "well"


def test_retry_takes_the_key(web):
    sid = ended(web, fail, "x", key="k")
    with gate() as name:
        blockers = [put(web, behind_gate, name) for _ in range(2)]
        GATES[name].reach()
        new = manage.retry(web.scheduler, sid)
        assert put(web, echo, key="k") == new
    for each in [*blockers, new]:
        web.done(f"/async/{each}")


def test_cancelling_too_late_is_told(web):
    sid = ended(web, echo)
    assert manage.cancel(web.scheduler, sid) is False
    with pytest.raises(JobNotFound):
        manage.cancel(web.scheduler, "0" * 32)


# -- purge ---------------------------------------------------------------------------------


def test_purge_removes_what_finished_before_and_nothing_else(web, set_clock):
    old = archived(web, (echo,), (fail, "x"))
    middle = web.scheduler.store.clock()
    young = [ended(web, echo), ended(web, fail, "y")]
    with gate() as name:
        waiting = put(web, behind_gate, name)
        set_clock(web, middle + 100)
        assert manage.purge(web.scheduler, 100, ["failed"]) == 1
        assert sids(page(web)) == [waiting, *young[::-1], old[0]]
        assert manage.purge(web.scheduler, 100) == 1
        assert manage.purge(web.scheduler, 0, ["failed"]) == 1
        assert sids(page(web)) == [waiting, young[0]]
        assert manage.purge(web.scheduler, 0) == 1
        assert sids(page(web)) == [waiting]
        assert manage.purge(web.scheduler, 0) == 0


def test_purge_keeps_to_the_moment_among_jobs_of_one_second(web, set_clock):
    [old] = archived(web, (echo,))
    moment = web.scheduler.store.clock()
    [young] = archived(web, (echo,))
    set_clock(web, moment)
    assert manage.purge(web.scheduler, 0) == 1
    assert sids(page(web)) == [young] != [old]


def test_purge_leaves_nothing_in_the_lists(durable, monkeypatch):
    monkeypatch.setattr(manage, "BATCH", 2)
    archived(durable, *[(echo,), (fail, "x")] * 3)
    assert lists(durable) == (6, 6)
    assert manage.purge(durable.scheduler, 0) == 6
    assert lists(durable) == (0, 0)
    assert manage.check(durable.scheduler) == []


def test_purged_job_that_was_dismissed_stays_hidden_as_long_as_a_fence(durable):
    with gate() as name:
        sid = put(durable, behind_gate, name)
        manage.cancel(durable.scheduler, sid)
    store = durable.scheduler.store
    store.archive([sid])
    assert manage.purge(durable.scheduler, 0) == 1
    assert sids(page(durable)) == []
    assert lists(durable) == (1, 0)
    assert manage.check(durable.scheduler) == []
    store.expire(store.clock() + HAUNTED + 120)
    assert lists(durable) == (0, 0)


# -- check ---------------------------------------------------------------------------------


def findings(web):
    """Return what a check finds: sid -> sentences."""
    found = {}
    for sid, text in manage.check(web.scheduler):
        found[sid] = f"{found.get(sid, '')}{text}. "
    return found


def test_check_finds_nothing_in_a_store_that_is_used(web):
    one, *_ = archived(web, (echo,), (fail, "x"), (echo, "y"))
    ended(web, echo)
    web.scheduler.transact(lambda bound: bound.remove(one))
    with gate() as name:
        put(web, behind_gate, name, key="k")
        put(web, behind_gate, name, run_after=1000)
        assert findings(web) == {}


def change(web, work):
    transact(web.scheduler.store, lambda table: work(table.root))


def lose_expiry(root):
    root.expiry.clear()


def lose_list(root):
    for tree in root.ended.values():
        tree.clear()


def copy_to_unfinished(root):
    for source, target in zip(root.finished, root.unfinished, strict=True):
        target.update(source)


def keep_a_key(root):
    root.key_tree("lost")["lost"] = "f" * 32


def rename(root):
    [(tree, sid)] = [(tree, sid) for tree in root.finished for sid in tree]
    record = tree.pop(sid)
    tree["0" * 32] = record


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lose_expiry, "will never expire"),
        (lose_list, "is finished and not listed"),
        (copy_to_unfinished, "among the unfinished records and the finished ones"),
        (keep_a_key, "its key 'lost' is not"),
        (rename, "is the record of job"),
    ],
)
def test_check_finds_what_does_not_fit(durable, harm, text):
    archived(durable, (echo,))
    change(durable, harm)
    assert any(text in found for found in findings(durable).values())


def test_check_finds_records_that_cannot_be_read(durable):
    spoil(durable, "5" * 32, PersistentMapping())
    assert "cannot be read" in findings(durable)["5" * 32]


def test_check_finds_unfinished_jobs_where_nobody_looks(durable):
    with gate() as name:
        sid = put(durable, behind_gate, name)
        GATES[name].reach()

        def hide(root):
            tree = root.unfinished[root.shard(sid)]
            root.finished[root.shard(sid)][sid] = tree.pop(sid)

        change(durable, hide)
        assert "no worker looks for it" in str(manage.check(durable.scheduler))


def going():
    """A function that a later version of the application has not."""


def test_check_finds_functions_that_are_gone(durable, monkeypatch):
    """After an upgrade, before the job is run and fails."""
    sid = put(durable, going, run_after=1000)
    monkeypatch.delattr("test_manage.going")
    assert "its function 'test_manage:going' is gone" in findings(durable)[sid]


def test_check_finds_arguments_that_cannot_be_loaded(durable):
    sid = put(durable, echo, 1, run_after=1000)
    transact(durable.scheduler.store, lambda table: setattr(table.get(sid), "arguments", b"\x80no"))
    assert "its arguments cannot be loaded" in findings(durable)[sid]


class Leaving(Persistent):
    """A class that a later version of the application has not."""


def test_check_finds_persistent_arguments_whose_class_is_gone(durable, monkeypatch):
    sid = put(durable, echo, Leaving(), run_after=1000)
    monkeypatch.delattr("test_manage.Leaving")
    resetCaches()  # ghosts keep their class
    durable.scheduler.store.db.cacheMinimize()
    told = "its arguments cannot be loaded: the class of test_manage.Leaving 0x"
    assert findings(durable)[sid].startswith(told)


def test_check_finds_maintenance_that_nobody_does(durable, set_clock):
    archived(durable, (echo,), (echo,))
    expired = durable.scheduler.store.clock() + 3600
    set_clock(durable, expired + OVERDUE - 60)
    assert findings(durable) == {}
    set_clock(durable, expired + OVERDUE + 120)
    [text] = findings(durable).values()
    assert "nobody removed it" in text


def test_check_finds_jobs_that_nobody_has(durable, monkeypatch, set_clock):
    """Not on a storage of one process: whoever opens it next takes them up."""
    due = durable.scheduler.store.clock() + 1000
    free = put(durable, echo, run_after=1000, queue="reports")
    transact(durable.scheduler.store, lambda table: setattr(table.get(free), "holder", None))
    with gate() as name:
        held = put(durable, behind_gate, name)
        GATES[name].reach()
        set_clock(durable, due + 110)
        assert findings(durable) == {}
        monkeypatch.setattr(type(durable.scheduler.store), "exclusive", False)
        assert "nobody took it over" in findings(durable)[held]
        assert free not in findings(durable)
        set_clock(durable, due + 130)
        waits = "waits in the queue 'reports', and no process shows a sign of life"
        assert waits in findings(durable)[free]
        show_sign(durable, "somebody", 1)
        assert findings(durable).keys() == {held}
        show_sign(durable, durable.scheduler.store.process, 1)
        assert findings(durable) == {}


# -- the pages: who may see them -----------------------------------------------------------

PAGES = ["/async/manage", "/async/manage?status=failed", "/async/manage/" + "0" * 32]


@pytest.mark.parametrize("user", [None, "alice"])
@pytest.mark.parametrize("path", PAGES)
def test_stranger_gets_the_404_of_an_unknown_job(web, path, user):
    unknown = web.get("/async/" + "0" * 32, status=404)
    for method in ("GET", "HEAD"):
        response = web.request(path, method=method, headers=as_user(user), status=404)
        # No other origin may read these pages, so nothing varies by it.
        assert {**response.headers, "Vary": "Origin"} == dict(unknown.headers)
    assert web.get(path, headers=as_user(user), status=404).body == unknown.body


def test_without_a_security_policy_there_is_no_operator():
    with browser(policy=False) as web:
        web.get("/async/manage", headers=ADMIN, status=404)


def test_stranger_can_do_nothing(web):
    sid = ended(web, fail, "x")
    token = token_of(web.get(f"/async/manage/{sid}", headers=ADMIN))
    for user in (None, "alice"):
        post(web, sid, "retry", token, as_user(user), status=404)
    assert manage.show(web.scheduler, sid).may_retry


def test_page_is_not_kept_and_loads_nothing_of_others(web):
    for path in PAGES:
        response = web.get(path, headers={**ADMIN, "Origin": ORIGIN}, status="*")
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["Content-Security-Policy"].startswith(
            "default-src 'none'; style-src 'self'; form-action 'self'"
        )
        assert not {name for name in response.headers if name.startswith("Access-Control")}
        assert "style=" not in response.text
        assert "<script" not in response.text


def test_style_sheet_is_served(web):
    response = web.get("/async/manage.css")
    assert response.content_type == "text/css"
    assert "/async/manage.css" in web.get("/async/manage", headers=ADMIN).text


def test_pages_are_no_part_of_the_interface_for_programs(web):
    assert "manage" not in web.get("/async/openapi.json").text
    assert web.delete("/async/manage", headers=ADMIN, status=405).headers["Allow"] == "GET, HEAD"
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    response = web.options("/async/manage", headers=preflight, status=405)
    assert "Access-Control-Allow-Origin" not in response.headers


def test_prefix_and_script_name_are_in_the_links():
    with browser(prefix="/api/jobs") as web:
        sid = ended_at(web, "/api/jobs", fail, "x")
        text = web.get(
            "/api/jobs/manage", headers=ADMIN, extra_environ={"SCRIPT_NAME": "/app"}
        ).text
        for path in ("manage.css", f"manage/{sid}"):
            assert f'="/app/api/jobs/{path}"' in text
        assert "http://" not in text


def ended_at(web, prefix, f, *args):
    sid = put(web, f, *args)
    web.done(f"{prefix}/{sid}")
    return sid


# -- the pages: what they show -------------------------------------------------------------


def test_first_page_shows_unfinished_failed_and_recent_jobs(web):
    good, bad = archived(web, (echo,), (fail, "x"))
    with gate() as name:
        running = put(web, tell, name, 1, 4, "a quarter")
        GATES[name].reach()
        text = web.get("/async/manage", headers=ADMIN).text
        parts = re.split("<h2>", text)
        assert [part.partition("<")[0] for part in parts[1:]] == [
            "Processes",
            "Unfinished jobs",
            "Failed jobs",
            "Recent jobs",
        ]
        assert running in parts[2]
        assert "25 % a quarter" in parts[2]
        assert bad in parts[3]
        assert good not in parts[3]
        assert good in parts[4]


def test_list_leads_from_page_to_page(web, monkeypatch):
    monkeypatch.setattr("pyramid_async.pages.LIMIT", 2)
    expected = archived(web, *[(fail, "x")] * 5)[::-1]
    ended(web, echo)
    response = web.get("/async/manage?status=failed&q=zero", headers=ADMIN)
    seen = []
    while True:
        seen += re.findall(r'<code title="(\w+)">', response.text)
        if "Next page" not in response:
            break
        response = web.get(following(response), headers=ADMIN)
    assert seen == expected


def test_overview_leads_to_the_whole_of_a_list(web, monkeypatch):
    monkeypatch.setattr("pyramid_async.pages.FEW", 1)
    failed = archived(web, (echo,), *[(fail, "x")] * 2)[1:]
    text = web.get("/async/manage", headers=ADMIN).text
    # That of the unfinished jobs is shown whole.
    of_failed, _ = re.findall(r'href="([^"]+)">More', text)
    whole = web.get(unescape(of_failed), headers=ADMIN)
    assert re.findall(r'<code title="(\w+)">', whole.text) == failed[::-1]
    assert whole.forms[0]["status"].value == "failed"


def following(response):
    """Return where the link to the next page leads."""
    return unescape(re.search(r'href="([^"]+)" rel="next"', response.text)[1])


def test_list_that_looked_in_vain_says_so(web, monkeypatch):
    monkeypatch.setattr(manage.page, "__defaults__", (*manage.page.__defaults__[:-1], 2))
    archived(web, *[(echo,)] * 3)
    response = web.get("/async/manage?q=nothing", headers=ADMIN)
    assert "look at those that follow" in response
    response = web.get(following(response), headers=ADMIN)
    assert "Looked at" not in response


def test_page_of_a_job_tells_what_is_known_of_it_and_no_more(web):
    with gate() as name:
        sid = put(web, tell, name, 1, 4)
        GATES[name].reach()
        text = web.get(f"/async/manage/{sid}", headers=ADMIN).text
    told = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert told["Progress"] == "25 %"
    assert {"Created", "Started", "Held by"} <= told.keys()
    assert not {"User", "Not before", "Finished", "Key"} & told.keys()


def test_texts_of_jobs_are_no_markup(web):
    evil = "<script>alert(1)</script>&\"'"
    sid = ended(web, fail, evil, title=evil, key=evil)
    for path in ("/async/manage", f"/async/manage/{sid}", f"/async/manage?q={quote(evil)}"):
        text = web.get(path, headers=ADMIN).text
        assert "<script" not in text
        assert "&\"'" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;" in text


def test_long_title_does_not_make_a_long_page(web):
    put(web, echo, title="<" * 100_000, run_after=1000)
    for path in ("/async/manage", "/async/manage?status=unfinished"):
        assert len(web.get(path, headers=ADMIN).text) < 10_000


def test_half_a_surrogate_pair_breaks_no_page(web):
    sid = ended(web, fail_publicly, "\ud800")
    assert "OperationFailed: ?" in web.get(f"/async/manage/{sid}", headers=ADMIN).text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("status=x", "status must be one of unfinished, failed"),
        ("status=all&cursor=x", "The cursor is none that a page gave"),
        ("q=%ff", "the query is not UTF-8"),
        ("status=all&cursor=%00", "The cursor is none that a page gave"),
    ],
)
def test_bad_query_is_a_400_that_says_what_is_wrong(web, query, text):
    assert text in web.get(f"/async/manage?{query}", headers=ADMIN, status=400).text


@pytest.mark.parametrize("sid", ["x", "%00", "%F0%9F%98%80", "a" * 2000])
def test_id_that_is_none_is_a_404_for_the_operator_too(web, sid):
    assert "No such job" in web.get(f"/async/manage/{sid}", headers=ADMIN, status=404)


# -- the pages: buttons --------------------------------------------------------------------


def token_of(response):
    return re.search(r'name="csrf_token" value="(\w+)"', response.text)[1]


def post(web, sid, action, token, headers=ADMIN, **expected):
    body = {"action": action, "csrf_token": token}
    return web.post(f"/async/manage/{sid}", body, headers=headers, **expected)


def press(web, sid, **expected):
    """Press the button of a job's page."""
    form = web.get(f"/async/manage/{sid}", headers=ADMIN).forms[1]
    action = form.fields["action"][0]
    return form.submit("action", value=action._value, headers=ADMIN, **expected)


def test_button_cancels_a_job(web):
    with gate() as name:
        sid = put(web, behind_gate, name)
        response = press(web, sid, status=303).follow(headers=ADMIN)
        assert "None of its effects" in response or "none of its effects" in response
        assert web.get(f"/async/{sid}").json["status"] == "dismissed"


def test_urls_of_jobs_on_the_pages_leave_nothing_in_the_memory(web):
    sid = ended(web, fail, "x")
    web.get("/async/manage", headers=ADMIN)
    press(web, sid, status=303).follow(headers=ADMIN)
    assert not [kept for kept, _ in _segment_cache if sid in kept]


def test_button_retries_a_job(web, key):
    sid = ended(web, fail_once, key)
    response = press(web, sid, status=303)
    new = re.search(r"manage/(\w{32})", response.location)[1]
    assert web.done(f"/async/{new}")["result"] == "well"
    assert "was scheduled again" in response.follow(headers=ADMIN)
    old = web.get(f"/async/manage/{sid}", headers=ADMIN)
    assert new in old
    assert len(old.forms) == 1  # nothing to press any more


def test_button_that_retries_into_a_full_store_is_a_503():
    with browser({"async.store": "ram", "async.max_pending": "1"}) as web, gate() as name:
        sid = ended(web, fail, "x")
        put(web, behind_gate, name)
        response = press(web, sid, status=503)
        assert int(response.headers["Retry-After"]) >= 1
        assert response.content_type == "application/problem+json"
        assert manage.show(web.scheduler, sid).may_retry


def test_button_leads_back_below_a_script_name_that_is_not_ascii(web):
    with gate() as name:
        sid = put(web, behind_gate, name)
        token = token_of(web.get(f"/async/manage/{sid}", headers=ADMIN))
        below = {"SCRIPT_NAME": "/日本".encode().decode("latin-1")}
        response = post(web, sid, "cancel", token, extra_environ=below, status=303)
    path = f"/%E6%97%A5%E6%9C%AC/async/manage/{sid}"
    assert response.headers["Location"] == f"http://localhost{path}?told=cancelled"


def test_button_that_comes_too_late_says_so(web):
    with gate() as name:
        sid = put(web, behind_gate, name)
        GATES[name].reach()
        token = token_of(web.get(f"/async/manage/{sid}", headers=ADMIN))
    web.done(f"/async/{sid}")
    response = post(web, sid, "cancel", token, status=303)
    assert "had ended before" in response.follow(headers=ADMIN)
    assert "only a failed job can be" in post(web, sid, "retry", token, status=409)
    assert "action must be" in post(web, sid, "burn", token, status=400)
    assert "No such job" in post(web, "0" * 32, "cancel", token, status=404)
    assert "No such job" in post(web, "0" * 32, "retry", token, status=404)


def without_check(config):
    """The application checks no form."""


def with_sessions(config):
    config.set_session_factory(SignedCookieSessionFactory("secret"))


def with_check(config):
    with_sessions(config)
    config.set_csrf_storage_policy(SessionCSRFStoragePolicy())
    config.set_default_csrf_options(require_csrf=True, token="another_name")


@pytest.mark.parametrize("routes", [without_check, with_sessions, with_check])
def test_form_that_is_not_ours_does_nothing_whatever_the_application_checks(routes):
    with browser(routes=routes) as web:
        sid = ended(web, fail, "x")
        assert "expired" in post(web, sid, "retry", "", status=400)
        token = token_of(web.get(f"/async/manage/{sid}", headers=ADMIN))
        for wrong in ("", "x" * len(token), "é\ud83d"[:1]):
            assert "expired" in post(web, sid, "retry", wrong, status=400)
        path = f"/async/manage/{sid}"
        web.post(path, {"action": "retry"}, headers=ADMIN, status=400)
        uploads = [("csrf_token", "x.txt", token.encode())]
        web.post(path, {"action": "retry"}, upload_files=uploads, headers=ADMIN, status=400)
        assert manage.show(web.scheduler, sid).may_retry
        post(web, sid, "retry", token, status=303)


def test_form_of_another_site_does_nothing_over_tls(web):
    sid = ended(web, fail, "x")
    secure = {"wsgi.url_scheme": "https", "HTTP_HOST": "app.example.com"}
    page = web.get(f"/async/manage/{sid}", headers=ADMIN, extra_environ=secure)
    body = {"action": "retry", "csrf_token": token_of(page)}
    for headers, status in (
        ({}, 400),
        ({"Origin": "https://evil.example.org"}, 400),
        ({"Origin": "https://app.example.com"}, 303),
    ):
        web.post(
            f"/async/manage/{sid}",
            body,
            headers={**ADMIN, **headers},
            extra_environ=secure,
            status=status,
        )


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-www-form-urlencoded",
        "application/x-www-form-urlencoded; charset=unheard-of",
        "multipart/form-data",
        "text/plain",
    ],
)
@pytest.mark.parametrize("body", [b"", b"\xff=\xff&csrf_token=%ff", b"--x", b"%" * 1000])
def test_body_that_is_no_form_is_a_400(web, body, content_type):
    web.post("/async/manage/x", body, headers={**ADMIN, "Content-Type": content_type}, status=400)
