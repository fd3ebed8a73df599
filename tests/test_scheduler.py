"""Schedule, ask, cancel: through a Pyramid application with real worker threads."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import threading
import time
import weakref
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from itertools import product
from urllib.parse import quote
from uuid import uuid4

import pyramid_tm
import pytest
import transaction
import webapp
import ZODB
from bare import CALLS, Events, LosesReply, note
from persistent import GHOST, Persistent
from persistent.mapping import PersistentMapping
from pyramid import testing
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError
from pyramid.request import Request
from pyramid.response import Response
from pyramid.threadlocal import get_current_registry, get_current_request
from pyramid.threadlocal import manager as threadlocals
from pyramid_zodbconn import get_connection
from transaction.interfaces import DoomedTransaction, NoTransaction, TransientError
from webapp import EXPLICIT, GATES, Barrier, Policy, SqlSession, behind_gate, gate, special
from webtest import TestApp
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, ReadConflictError
from zope.interface.verify import verifyObject

from pyramid_async import (
    IJobFinished,
    IScheduler,
    JobDismissed,
    JobFailed,
    JobNotFound,
    JobStatus,
    JobTimeout,
    NotSchedulable,
    OperationFailed,
    SchedulerFull,
    current_job,
)
from pyramid_async.connections import TwoConnections
from pyramid_async.context import ObjectGone, PersistentContext
from pyramid_async.jobs import FINAL, name_of
from pyramid_async.scheduler import Caller, TransactionalScheduler
from pyramid_async.transactional import transactional

# -- what jobs do --------------------------------------------------------------------------


class Thing(Persistent):
    """An object of the application."""

    count = 0

    def __init__(self, name=""):
        self.name = name

    def method(self):
        return self.name


def add(a, b=0):
    return a + b


def give(value):
    return value


def fail(*args):
    raise ZeroDivisionError(*args)


def count_up(thing):
    thing.count += 1
    return thing.count


def own_connection():
    return get_connection(current_job().request)


def has_come_home(obj):
    """Tell whether the object came through this job's own connection."""
    home = own_connection().get_connection(obj._p_jar.db().database_name)
    return obj._p_jar is home


def arrived(value, path):
    """Follow a path into a value, and tell name and home of the object at its end."""
    for step in path:
        value = next(iter(value)) if step == "first" else value[step]
    return value.name, has_come_home(value)


def from_context(context):
    thing, named = context[0], context["named"]
    named.count += 1
    return len(context), thing is named, has_come_home(thing)


def new_thing(name):
    thing = own_connection().root()[name] = Thing(name)
    return [thing]


def mark_then(name, key):
    """Change the database, then stand at a gate."""
    own_connection().root()["marked"] = key
    GATES[name].pass_through()
    return key


def mark_with(barrier, key):
    """Change the database in a transaction whose commit stands at a gate."""
    name, phase, sort_key = barrier
    if own_connection_or_none() is not None:
        own_connection().root()["marked"] = key
    current_job().request.tm.get().join(Barrier(name, phase, sort_key))
    return key


def own_connection_or_none():
    request = current_job().request
    return own_connection() if getattr(request.registry, "_zodb_databases", None) else None


def wait_until_told(name, key):
    """Swallow every exception, check, and note what ended the job."""
    gate_of_job = GATES[name]
    gate_of_job.reached.set()
    job = current_job()
    try:
        while True:
            try:
                job.check()
                gate_of_job.opened.wait(0.005)
            except Exception:  # pragma: no cover - must not see the interruption
                note(key, "swallowed")
    except BaseException as error:
        note(key, error)
        raise


def look_around(*names):
    """Return attributes of the job's request."""
    request = current_job().request
    return [functools.reduce(getattr, name.split("."), request) for name in names]


def look_at_transaction():
    job, txn = current_job(), current_job().request.tm.get()
    return txn.user, txn.description, txn.extension["pyramid_async"], job.sid


def look_at_a_copy():
    request = current_job().request
    copy = request.copy()
    copy.registry = request.registry
    return pyramid_tm.is_tm_active(copy), pyramid_tm.create_tm(copy) is request.tm


def look_from_a_virtual_root():
    root = testing.DummyResource()
    shop = testing.DummyResource("shop", root)
    return current_job().request.resource_url(testing.DummyResource("ann", shop))


def has_root():
    request = current_job().request
    return type(request.root).__name__, request.root is request.context


def is_surrounded():
    job = current_job()
    request = job.request
    return (
        get_current_request() is request,
        get_current_registry() is request.registry,
        len(threadlocals.stack),
    )


def abort_and_fail():
    current_job().request.tm.abort()
    raise ZeroDivisionError


def schedule_another(*args):
    return current_job().request.scheduler.schedule(note, *args)


async def add_slowly(a, b):
    await asyncio.sleep(0)
    return a + b, current_job().sid


async def count_up_in_a_thread(thing):
    return await asyncio.to_thread(count_up, thing)


async def checkpoint_in_a_thread(thing):
    count_up(thing)
    await asyncio.to_thread(current_job().checkpoint, 1)
    raise ZeroDivisionError


async def fail_slowly():
    await asyncio.sleep(0)
    raise ZeroDivisionError("slowly")


@transactional
def count_transactionally(thing):
    thing.count += 1


class Toolbox:
    @staticmethod
    def static(value):
        return "static", value

    @classmethod
    def of_class(cls, value):
        return cls.__name__, value

    def method(self):  # pragma: no cover - refused
        pass

    def __call__(self):
        return "called"


# -- the application -----------------------------------------------------------------------


class Root:
    __name__ = __parent__ = None

    def __init__(self, request):
        request.registry.roots_made_for.append(request.authenticated_userid)

    def __getitem__(self, name):
        raise KeyError(name)


def run_action(request):
    """Do what the test wants; answer with its response, if it returned one."""
    key = request.headers["X-Action"]
    outcome = request.registry.outcomes[key] = request.registry.actions[key](request)
    return outcome if isinstance(outcome, Response) else Response("ok")


class Site(TestApp):
    """A WebTest client of an application whose views are whatever a test wants."""

    def __init__(self, settings=(), *, zodb=(), retry=False, configure=lambda config: None):
        settings = {
            "async.workers": "2",
            "async.maintenance_interval": "60",
            "retry.attempts": "3",
            **{f"zodbconn.uri{name and '.'}{name}": f"memory://{uuid4().hex}" for name in zodb},
            **dict(settings),
        }
        with Configurator(settings=settings) as config:
            config.set_security_policy(Policy())
            config.set_root_factory(Root)
            if retry:
                config.include("pyramid_retry")
            config.include("pyramid_async")
            if zodb:
                config.include("pyramid_zodbconn")
            config.add_route("do", "/do")
            config.add_view(run_action, route_name="do")
            config.add_view(run_action, context=Root, name="traversed")
            config.add_subscriber(self._finished, IJobFinished)
            configure(config)
        self.events = Events()
        self.told = []
        self.registry = config.registry
        self.registry.actions, self.registry.outcomes = {}, {}
        self.registry.roots_made_for = []
        super().__init__(config.make_wsgi_app())

    def _finished(self, event):
        self.told.append((event.sid, event.status))
        self.events[event.sid].set()

    @property
    def scheduler(self):
        return self.registry.getUtility(IScheduler)

    @property
    def executor(self):
        return self.scheduler.executor

    @property
    def databases(self):
        return getattr(self.registry, "_zodb_databases", None) or {}

    def do(self, action, *, user=None, path="/do", **environ):
        """Run ``action(request)`` as a view and return what it returned."""
        key = uuid4().hex
        self.registry.actions[key] = action
        headers = {"X-Action": key} | ({"X-User": user} if user else {})
        self.get(path, headers=headers, extra_environ=environ)
        return self.registry.outcomes[key]

    def schedule(self, *args, user=None, **options):
        """Schedule a job in a request of its own."""
        return self.do(lambda r: r.scheduler.using(**options).schedule(*args), user=user)

    def ask(self, question):
        """Answer ``question(scheduler)`` outside of all requests."""
        return self.scheduler.transact(question)

    def status(self, sid):
        return self.ask(lambda scheduler: scheduler.status(sid))

    def wait(self, sid):
        assert self.events[sid].wait(10), self.status(sid)

    def outcome(self, sid):
        """Wait for the job and return (value, exception); the job stays."""
        self.wait(sid)

        def collect(request):
            pair = request.scheduler.get_result(sid)
            request.tm.doom()
            return pair

        return self.do(collect)

    def run(self, *args, **options):
        """Schedule a job, wait for it and return its value."""
        value, error = self.outcome(self.schedule(*args, **options))
        assert error is None, error
        return value

    def fails(self, *args, **options):
        """Schedule a job, wait for it and return its exception."""
        value, error = self.outcome(self.schedule(*args, **options))
        assert value is None
        return error

    def make(self, name="thing", database=""):
        """Put a new thing into a database."""
        with self.databases[database].transaction() as connection:
            connection.root()[name] = Thing(name)

    def read(self, read, database=""):
        """Return what ``read(root)`` returns, seen by a fresh transaction."""
        with self.databases[database].transaction() as connection:
            return read(connection.root())

    def close(self):
        self.executor.stop(2)
        for database in self.databases.values():
            database.close()


@contextmanager
def manager_of(web):
    """A transaction manager of our own; its connection is closed afterwards."""
    tm = transaction.TransactionManager(explicit=True)
    try:
        yield tm
    finally:
        web.scheduler.store.release(tm)


@contextmanager
def site(*args, **options):
    client = Site(*args, **options)
    try:
        yield client
    finally:
        client.close()
        transaction.abort()


# Name of a kind -> settings and options of its site.
STORES = {
    "no ZODB": dict(),
    "ZODB": dict(zodb=[""]),
    "two ZODBs": dict(zodb=["", "other"]),
    "RAM beside ZODB": dict(zodb=[""], settings={"async.store": "ram"}),
}
ALL = {
    f"{store}, {manager}, {'retry' if retry else 'once'}": dict(
        options, settings={**options.get("settings", {}), **settings}, retry=retry
    )
    for (store, options), (manager, settings), retry in product(
        STORES.items(), {"default": {}, "explicit": EXPLICIT}.items(), [False, True]
    )
}
# Each store, manager and number of attempts in one row or two.
SOME = [
    "no ZODB, explicit, once",
    "ZODB, default, once",
    "two ZODBs, explicit, retry",
    "RAM beside ZODB, default, retry",
]
WITH_ZODB = [name for name in SOME if not name.startswith("no ZODB")]
BOTH = ["no ZODB, explicit, once", "ZODB, explicit, retry"]


@pytest.fixture
def web(request):
    with site(**ALL[request.param]) as client:
        yield client


@pytest.fixture
def zodb():
    with site(EXPLICIT, zodb=[""]) as client:
        yield client


def everywhere(*names):
    return pytest.mark.parametrize("web", names, indirect=True)


everywhere_of_all = everywhere(*ALL)
everywhere_of_some = everywhere(*SOME)
with_zodb = everywhere(*WITH_ZODB)
in_both_stores = everywhere(*BOTH)


# -- schedule, commit, run, poll -----------------------------------------------------------


@everywhere_of_all
def test_job_runs_after_the_commit_and_its_result_is_collected_once(web):
    sid = web.do(lambda request: request.scheduler.schedule(add, 1, b=2))
    web.wait(sid)
    assert web.do(lambda request: request.scheduler.completed(sid)) is True
    assert web.do(lambda request: request.scheduler.get_result(sid)) == (3, None)
    assert web.do(lambda request: request.scheduler.get_result(sid)) is None
    assert web.do(lambda request: request.scheduler.completed(sid)) is None


@everywhere_of_all
def test_failure_is_polled_like_a_result(web):
    sid = web.do(lambda request: request.scheduler.schedule(fail, "why"))
    web.wait(sid)
    value, error = web.do(lambda request: request.scheduler.get_result(sid))
    assert (value, type(error), error.args) == (None, ZeroDivisionError, ("why",))


@everywhere_of_all
def test_nothing_starts_before_the_commit(web, key):
    def schedule_and_wait(request):
        sid = request.scheduler.schedule(note, key)
        assert request.scheduler.completed(sid) is False
        assert request.scheduler.get_result(sid) is False
        assert not web.events[sid].wait(0.03)
        assert web.status(sid) is None
        assert CALLS[key] == []
        return sid

    web.wait(web.do(schedule_and_wait))
    assert CALLS[key] == [None]


@everywhere_of_some
def test_traversal_schedules_as_url_dispatch_does(web):
    sid = web.do(lambda request: request.scheduler.schedule(add, 1, 2), path="/traversed")
    assert web.outcome(sid) == (3, None)


@in_both_stores
def test_function_and_options_share_no_namespace(web):
    def schedule(request):
        return request.scheduler.schedule(dict, f=1, self=2, title=3, timeout=4, tm=5)

    value, error = web.outcome(web.do(schedule))
    assert (value, error) == (dict(f=1, self=2, title=3, timeout=4, tm=5), None)


@in_both_stores
def test_sid_is_a_text_of_128_random_bits(web):
    sids = web.do(lambda request: [request.scheduler.schedule(give, n) for n in range(20)])
    assert len(set(sids)) == 20
    assert all(len(bytes.fromhex(sid)) == 16 for sid in sids)
    for sid in sids:
        web.wait(sid)


@in_both_stores
def test_jobs_of_one_request_all_run(web, key):
    sids = web.do(lambda request: [request.scheduler.schedule(note, key, n) for n in range(20)])
    for sid in sids:
        web.wait(sid)
    assert sorted(CALLS[key]) == list(range(20))


@in_both_stores
def test_jobs_of_many_threads_run_once_each(web, key):
    def schedule(numbers):
        for number in numbers:
            # Repeated where two threads happen to write one shard at the same time.
            sids.append(web.scheduler.transact(lambda s, n=number: s.schedule(note, key, n)))

    sids = []
    threads = [threading.Thread(target=schedule, args=[range(n, 40, 4)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for sid in sids:
        web.wait(sid)
    assert sorted(CALLS[key]) == list(range(40))


@in_both_stores
def test_unknown_sid_is_none_for_every_question(web):
    def ask(request):
        scheduler = request.scheduler
        sid = uuid4().hex
        return (
            scheduler.completed(sid),
            scheduler.get_result(sid),
            scheduler.status(sid),
            scheduler.outcome(sid),
            scheduler.remove(sid),
            scheduler.cancel(sid),
        )

    assert web.do(ask) == (None, None, None, None, None, False)


# -- no commit, no job ---------------------------------------------------------------------


class Refused(Exception):
    pass


def refuse_vote(request):
    class Resource(Barrier):
        def tpc_vote(self, txn):
            raise Refused

    request.tm.get().join(Resource("", "", "~~last"))


def raise_refused(request):
    raise Refused


NO_COMMIT = {
    "the view raises": raise_refused,
    "the transaction is doomed": lambda request: request.tm.doom(),
    "the vote fails": refuse_vote,
}


@pytest.mark.parametrize("end", NO_COMMIT)
@everywhere_of_some
def test_job_never_existed_when(web, key, end):
    sids = []

    def schedule(request):
        sids.append(request.scheduler.schedule(note, key, "dropped"))
        NO_COMMIT[end](request)

    with suppress(Refused):
        web.do(schedule)
    # Threads take jobs in their order, so each of two has been at the queue after this.
    web.run(give, 1)
    web.run(give, 1)
    assert web.status(sids[0]) is None
    assert CALLS[key] == []
    assert len(web.ask(lambda scheduler: scheduler.jobs())) == 2


@pytest.mark.parametrize("options", [STORES["no ZODB"], STORES["ZODB"]])
def test_commit_veto_drops_the_job(options, key):
    with site({"tm.commit_veto": "pyramid_tm.default_commit_veto"}, **options) as web:

        def schedule(request):
            sids.append(request.scheduler.schedule(note, key))
            return Response("vetoed", headers={"X-Tm": "abort"})

        sids = []
        assert web.do(schedule).text == "vetoed"
        web.run(give, 1)
        web.run(give, 1)
        assert web.status(sids[0]) is None
        assert CALLS[key] == []


@in_both_stores
def test_job_scheduled_inside_a_savepoint_that_is_rolled_back_never_existed(web, key):
    def schedule(request):
        kept = request.scheduler.schedule(note, key, "kept")
        savepoint = request.tm.savepoint()
        dropped = request.scheduler.schedule(note, key, "dropped")
        savepoint.rollback()
        return kept, dropped, request.scheduler.schedule(note, key, "kept too")

    kept, dropped, kept_too = web.do(schedule)
    web.wait(kept)
    web.wait(kept_too)
    assert web.status(dropped) is None
    assert sorted(CALLS[key]) == ["kept", "kept too"]


@in_both_stores
def test_job_removed_by_the_request_that_scheduled_it_never_runs(web, key):
    def schedule(request):
        sid = request.scheduler.schedule(note, key)
        request.scheduler.remove(sid)
        return sid

    sid = web.do(schedule)
    web.run(give, 1)
    web.run(give, 1)
    assert web.status(sid) is None
    assert CALLS[key] == []


@in_both_stores
def test_job_cancelled_by_the_request_that_scheduled_it_never_runs(web, key):
    def schedule(request):
        sid = request.scheduler.schedule(note, key)
        assert request.scheduler.cancel(sid)
        return sid

    sid = web.do(schedule)
    web.run(give, 1)
    web.run(give, 1)
    assert web.status(sid).status == "dismissed"
    assert CALLS[key] == []


@pytest.mark.parametrize("zodb", [(), [""]], ids=["ram", "zodb"])
@pytest.mark.parametrize("workers", [0, 1])
def test_jobs_that_nobody_will_run_are_told_at_the_start(zodb, workers, caplog):
    with site({"async.workers": str(workers)}, zodb=zodb):
        assert ("nobody will run them" in caplog.text) == (workers == 0)


def test_process_without_workers_beside_others_is_told_nothing(monkeypatch, caplog):
    monkeypatch.setattr("pyramid_async.zodb.ZodbStore.exclusive", False)
    with site({"async.workers": "0"}, zodb=[""]):
        assert "nobody will run them" not in caplog.text


# -- the hook ------------------------------------------------------------------------------


def transactions(database):
    return [t.tid for t in database.storage.iterator()]


def test_commit_of_the_request_is_the_only_one_that_scheduling_costs():
    with site({"async.workers": "0"}, zodb=[""]) as web:
        before = len(transactions(web.databases[""]))
        web.schedule(give, 1)
        assert len(transactions(web.databases[""])) == before + 1


@in_both_stores
def test_commit_returns_normally_when_the_executor_has_stopped(web):
    web.executor.stop(2)
    sid = web.schedule(give, 1)
    assert web.status(sid).status == "accepted"


@in_both_stores
def test_hook_leaves_the_connection_and_the_transaction_of_the_request_alone(web):
    """What a hook writes can stay dirty in a pooled connection; a transaction it begins stays."""
    seen = []

    def schedule(request):
        sid = request.scheduler.schedule(give, 1)
        txn = request.tm.get()
        connection = get_connection(request) if web.databases else None

        def look(committed):
            dirty = connection is not None and (connection._registered_objects or connection._added)
            seen.append((committed, bool(dirty), txn._resources))

        txn.addAfterCommitHook(look)
        return sid

    web.wait(web.do(schedule))
    assert seen == [(True, False, [])]


# -- requests that are run again -----------------------------------------------------------


class ReplyLost(TransientError):
    pass


RETRIED = [name for name in ALL if name.endswith("retry")]


class NotesTheBegin(Barrier):
    """A data manager whose commit begins first, as that of a storage which takes its lock then."""

    def __init__(self, key):
        super().__init__(None, None, "!first")
        self.key = key

    def tpc_begin(self, txn):
        CALLS[self.key].append("commit begins")


def leave_it_to_a_session(key):
    txn = current_job().request.tm.get()
    txn.join(NotesTheBegin(key))
    txn.join(SqlSession(lambda: CALLS[key].append("sent")))


@everywhere("RAM beside ZODB, default, retry", "ZODB, explicit, retry")
def test_session_of_a_job_sends_what_it_holds_before_the_commit_begins(web, key):
    """It may wait for a row of a transaction that waits for the storage."""
    web.wait(web.schedule(leave_it_to_a_session, key))
    assert CALLS[key][0] == "sent"


@everywhere(*RETRIED)
def test_commit_whose_reply_is_lost_makes_one_job(web, key):
    left, sids = [2], []

    def schedule(request):
        sids.append([request.scheduler.schedule(note, key, number) for number in range(3)])
        request.tm.get().join(LosesReply(ReplyLost(), left))
        return sids[-1]

    for sid in web.do(schedule):
        web.wait(sid)
    assert len(sids) == 3
    assert sids[0] == sids[1] == sids[2]
    web.run(give, 1)
    web.run(give, 1)
    assert sorted(CALLS[key]) == [0, 1, 2]
    assert len(web.ask(lambda scheduler: scheduler.jobs())) == 5


@everywhere(*RETRIED)
def test_job_of_a_commit_whose_reply_is_lost_is_woken_by_the_next_one(web, key, monkeypatch):
    """An executor may wake nobody for what did not commit, as far as was heard."""
    left, woken = [1], []

    def schedule(request):
        request.tm.get().join(LosesReply(ReplyLost(), left))
        return request.scheduler.schedule(note, key)

    with monkeypatch.context() as patch:
        patch.setattr(web.executor, "wake", lambda *hook: woken.append(hook))
        sid = web.do(schedule)
    assert woken == [(False, sid, None), (True, sid, None)]


@everywhere(*RETRIED)
def test_job_beside_a_retry_is_one_job_when_the_reply_to_their_commit_is_lost(web, key):
    failed = web.schedule(fail)
    web.wait(failed)
    left, sids = [1], []

    def retry_and_schedule(request):
        sids.append((request.scheduler.retry(failed), request.scheduler.schedule(note, key)))
        request.tm.get().join(LosesReply(ReplyLost(), left))

    web.do(retry_and_schedule)
    assert sids[0] == sids[1]
    web.wait(sids[0][1])
    assert CALLS[key] == [None]


@everywhere("ZODB, default, retry", "ZODB, explicit, retry")
def test_commit_whose_reply_is_lost_makes_one_job_even_if_that_expired_meanwhile(web, key):
    left = [1]

    def schedule(request):
        while web.executor.held:
            web.executor.threads[0].join(0.005)
        request.scheduler.using(result_timeout=0).schedule(note, key)
        request.tm.get().join(LosesReply(ReplyLost(), left))

    web.do(schedule)
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == [None]


def test_key_of_a_job_that_is_tried_again_without_a_transaction_is_in_no_later_one(zodb):
    """As where a view that ``tm.activate_hook`` leaves out does so with an explicit manager."""
    failed = zodb.schedule(fail, key="k")
    zodb.wait(failed)
    tm = transaction.TransactionManager(explicit=True)
    with closing(zodb.databases[""].open(tm)) as connection:
        scheduler = zodb.scheduler.bind(tm, Caller(connect=lambda: connection))
        with pytest.raises(NoTransaction):
            scheduler.retry(failed)
        tm.begin()
        assert scheduler._table().keyed("k") == failed
        tm.abort()


@everywhere("ZODB, default, retry", "ZODB, explicit, retry")
def test_request_that_is_not_repeated_reads_nothing_of_finished_jobs(web):
    """Other processes write there, so it would have to be fetched again and again."""

    def schedule(request):
        table = request.scheduler._table()
        table.connection.cacheMinimize()
        request.scheduler.schedule(give, 1)
        return [tree for tree in table.root.finished if tree._p_state != GHOST]

    assert web.do(schedule) == []


@in_both_stores
def test_job_runs_although_the_reply_to_its_commit_was_lost_for_good(web, key):
    """The hook is told False; it is not believed."""
    sids = []

    def schedule(request):
        sids.append(request.scheduler.schedule(note, key, "ran"))
        request.tm.get().join(LosesReply(OSError("connection reset"), [1]))

    with pytest.raises(OSError, match="connection reset"):
        web.do(schedule)
    web.wait(sids[0])
    assert CALLS[key] == ["ran"]


@everywhere(*RETRIED)
def test_conflict_of_the_request_makes_one_job(web, key):
    left = [2]

    def schedule(request):
        sid = request.scheduler.schedule(note, key, left[0])
        if left[0]:
            left[0] -= 1
            raise ConflictError
        return sid

    web.wait(web.do(schedule))
    web.run(give, 1)
    assert CALLS[key] == [0]


@everywhere(*RETRIED)
def test_repeat_of_a_request_finds_its_job_finished_and_leaves_it(web, key):
    sids, left = [], [1]

    def schedule(request):
        sids.append(request.scheduler.schedule(note, key))
        if len(sids) == 2:
            web.wait(sids[0])
        request.tm.get().join(LosesReply(ReplyLost(), left))
        return sids[-1]

    sid = web.do(schedule)
    assert sids == [sid, sid]
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == [None]
    assert web.status(sid).status == "successful"


@in_both_stores
def test_requests_make_jobs_of_their_own(web):
    one, two = (web.schedule(give, 1) for _ in range(2))
    assert one != two
    web.wait(one)
    web.wait(two)


@in_both_stores
def test_subrequest_that_copies_the_environ_makes_a_job_of_its_own(web, key):
    def child(request):
        return request.scheduler.schedule(note, key, "child")

    def parent(request):
        sid = request.scheduler.schedule(note, key, "parent")
        web.registry.actions["child"] = child
        copy = request.copy()
        copy.headers["X-Action"] = "child"
        for name in ("tm.active", "tm.manager"):
            del copy.environ[name]  # so that it has a transaction of its own
        request.invoke_subrequest(copy, use_tweens=True)
        return sid, web.registry.outcomes["child"]

    one, two = web.do(parent)
    assert one != two
    web.wait(one)
    web.wait(two)
    assert sorted(CALLS[key]) == ["child", "parent"]


@in_both_stores
def test_environ_that_is_used_twice_makes_two_jobs(web, key):
    """As middleware does that calls the application again, for an error page perhaps."""
    sids = []
    web.registry.actions["again"] = lambda r: sids.append(r.scheduler.schedule(note, key))
    environ = Request.blank("/do", headers={"X-Action": "again"}).environ
    for _ in range(2):
        Request(environ).get_response(web.app)
    assert len(set(sids)) == 2
    for sid in sids:
        web.wait(sid)
    assert CALLS[key] == [None, None]


# -- arguments -----------------------------------------------------------------------------


PATHS = {
    "itself": (lambda obj: obj, []),
    "list": (lambda obj: [0, obj], [1]),
    "tuple": (lambda obj: (obj,), [0]),
    "dict": (lambda obj: {"a": obj}, ["a"]),
    "dict key": (lambda obj: {obj: 1}, ["first"]),
    "set": (lambda obj: {obj}, ["first"]),
    "frozenset": (lambda obj: frozenset([obj]), ["first"]),
    "deep": (lambda obj: [{"a": ({"b": [{obj}]},)}], [0, "a", 0, "b", 0, "first"]),
}


@pytest.mark.parametrize("depth", PATHS)
@with_zodb
def test_persistent_argument_arrives_through_the_jobs_own_connection(web, depth):
    wrap, path = PATHS[depth]
    web.make()

    def schedule(request):
        thing = get_connection(request).root()["thing"]
        return request.scheduler.schedule(arrived, wrap(thing), path=path)

    assert web.outcome(web.do(schedule)) == (("thing", True), None)


@with_zodb
def test_job_sees_what_its_request_changed_after_it_was_scheduled(web):
    web.make()

    def schedule(request):
        thing = get_connection(request).root()["thing"]
        sid = request.scheduler.schedule(count_up, thing)
        thing.count = 41
        return sid

    assert web.outcome(web.do(schedule)) == (42, None)
    assert web.read(lambda root: root["thing"].count) == 42


@with_zodb
def test_new_object_is_an_argument_too(web):
    def schedule(request):
        thing = get_connection(request).root()["new"] = Thing("new")
        return request.scheduler.schedule(arrived, thing, [])

    assert web.outcome(web.do(schedule)) == (("new", True), None)


@with_zodb
def test_object_that_nothing_else_refers_to_is_an_argument_too(web):
    def schedule(request):
        return request.scheduler.schedule(arrived, [Thing("alone")], [0])

    assert web.outcome(web.do(schedule)) == (("alone", True), None)


@everywhere("two ZODBs, explicit, retry", "two ZODBs, default, once")
def test_argument_from_a_named_database_arrives_and_is_changed(web):
    web.make("here")
    web.make("there", "other")

    def schedule(request):
        there = get_connection(request, "other").root()["there"]
        here = get_connection(request).root()["here"]
        return request.scheduler.schedule(count_up, there), request.scheduler.schedule(
            arrived, [here, there], [1]
        )

    one, two = web.do(schedule)
    assert web.outcome(one) == (1, None)
    assert web.outcome(two) == (("there", True), None)
    assert web.read(lambda root: root["there"].count, "other") == 1


@with_zodb
def test_persistent_context_arrives_bound_to_the_jobs_connection(web):
    web.make()

    def schedule(request):
        thing = get_connection(request).root()["thing"]
        return request.scheduler.schedule(from_context, PersistentContext(thing, named=thing))

    assert web.outcome(web.do(schedule)) == ((1, True, True), None)
    assert web.read(lambda root: root["thing"].count) == 1


@with_zodb
def test_object_that_is_gone_fails_its_job_alone(web):
    web.make()

    def schedule(request):
        root = get_connection(request).root()
        return request.scheduler.schedule(arrived, root["thing"], [])

    with gate() as name:
        # Both workers wait, so that the object can go before the third job begins.
        others = [web.schedule(behind_gate, name) for _ in range(2)]
        third = web.do(schedule)
        with web.databases[""].transaction() as connection:
            del connection.root()["thing"]
        pack_hard(web.databases[""])
        GATES[name].opened.set()
        for sid in others:
            web.wait(sid)
    value, error = web.outcome(third)
    if error is None:  # the record keeps its arguments, where it is in the same database
        assert value == ("thing", True)
    else:
        assert type(error) is ObjectGone
    assert web.run(add, 1, 2) == 3


def pack_hard(database):
    database.pack()
    database.cacheMinimize()  # under the lock of those that open connections


def test_foreign_object_is_refused_at_schedule(zodb):
    with site(zodb=[""]) as stranger:
        stranger.make()
        with stranger.databases[""].transaction() as connection:
            foreign = connection.root()["thing"]

            def schedule(request):
                with pytest.raises(NotSchedulable):
                    request.scheduler.schedule(arrived, foreign, [])
                return len(request.scheduler.jobs())

            assert zodb.do(schedule) == 0


# -- results -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, False, 0, (), [1, {"a": {2}}], b"\xff" * 100_000])
@in_both_stores
def test_result_comes_back_as_it_was(web, value):
    assert web.run(give, value) == value


@with_zodb
def test_persistent_result_belongs_to_the_readers_connection(web):
    sid = web.schedule(new_thing, "new")
    web.wait(sid)

    def collect(request):
        [thing], _ = request.scheduler.get_result(sid)
        return thing is get_connection(request).root()["new"], thing.name

    assert web.do(collect) == (True, "new")


@in_both_stores
def test_result_stays_when_the_reader_aborts(web):
    sid = web.schedule(give, 1)
    web.wait(sid)

    def collect_and_fail(request):
        assert request.scheduler.get_result(sid) == (1, None)
        raise Refused

    with pytest.raises(Refused):
        web.do(collect_and_fail)
    assert web.do(lambda request: request.scheduler.get_result(sid)) == (1, None)


@in_both_stores
def test_result_can_be_read_twice_by_one_request(web):
    sid = web.schedule(give, 1)
    web.wait(sid)

    def collect(request):
        scheduler = request.scheduler
        return scheduler.get_result(sid), scheduler.get_result(sid), scheduler.completed(sid)

    assert web.do(collect) == ((1, None), (1, None), True)
    assert web.status(sid) is None


@in_both_stores
def test_result_that_expires_before_its_reader_commits_costs_the_reader_nothing(web, monkeypatch):
    sid = web.schedule(give, 1)
    web.wait(sid)

    def collect(request):
        assert request.scheduler.get_result(sid) == (1, None)
        later = store.clock() + 3601
        monkeypatch.setattr(store, "clock", lambda: later)
        store.archive([sid])
        store.expire(later)
        return "committed"

    store = web.scheduler.store
    assert web.do(collect) == "committed"
    assert web.status(sid) is None


@in_both_stores
def test_collected_job_goes_although_a_savepoint_took_its_removal_back(web):
    sid = web.schedule(give, 1)
    web.wait(sid)

    def collect_and_hesitate(request):
        scheduler = request.scheduler
        assert scheduler.get_result(sid) == (1, None)
        savepoint = request.tm.savepoint()
        scheduler.remove(sid)
        savepoint.rollback()

    web.do(collect_and_hesitate)
    assert web.status(sid) is None


@in_both_stores
def test_job_whose_dismissal_was_collected_goes_on_when_a_savepoint_took_that_back(web, key):
    sid = web.schedule(note, key, run_after=3600)

    def cancel_and_hesitate(request):
        savepoint = request.tm.savepoint()
        assert request.scheduler.cancel(sid)
        assert request.scheduler.get_result(sid)
        savepoint.rollback()

    web.do(cancel_and_hesitate)
    assert web.status(sid).status == "accepted"


def test_result_that_could_not_be_loaded_stays_although_the_reader_commits(zodb, monkeypatch):
    sid = zodb.schedule(special, "of a class that goes")
    zodb.wait(sid)

    def try_to_collect(request):
        with pytest.raises(AttributeError):
            request.scheduler.get_result(sid)

    with monkeypatch.context() as other_code:
        other_code.delattr(webapp, "Leaving")
        zodb.do(try_to_collect)
    value, _ = zodb.do(lambda request: request.scheduler.get_result(sid))
    assert type(value) is webapp.Leaving


@in_both_stores
def test_one_of_two_readers_at_once_gets_the_result(web):
    sid = web.schedule(give, 1)
    web.wait(sid)
    with manager_of(web) as one, manager_of(web) as two:
        for tm in (one, two):
            tm.begin()
            assert web.scheduler.using(tm=tm).get_result(sid) == (1, None)
        one.commit()
        with pytest.raises(ConflictError):
            two.commit()
        two.abort()


@in_both_stores
def test_dismissed_job_has_its_dismissal_for_a_result(web, at):
    sid = web.schedule(behind_gate, at)
    assert web.do(lambda request: request.scheduler.cancel(sid))
    value, error = web.do(lambda request: request.scheduler.get_result(sid))
    assert (value, type(error)) == (None, JobDismissed)
    assert web.status(sid) is None


@in_both_stores
def test_outcome_shows_status_and_value_and_removes_nothing(web):
    sid = web.schedule(give, 1)
    web.wait(sid)
    for _ in range(2):
        status, value = web.do(lambda request: request.scheduler.outcome(sid))
        assert (status.status, value) == ("successful", 1)


# -- functions -----------------------------------------------------------------------------


def closure():
    value = 1

    def inner():
        return value

    return inner


REFUSED = {
    "lambda": (lambda: 1, "lambda"),
    "closure": (closure(), "inside a function"),
    "bound method": (Thing("bound").method, "pass the object as its argument"),
    "partial": (functools.partial(add, 1), "function of a module"),
    "method in C": ("".upper, "function of a module"),
    "callable object": (Toolbox(), "function of a module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_function_without_a_name_is_refused_where_jobs_outlive_the_process(zodb, name):
    f, why = REFUSED[name]

    def schedule(request):
        with pytest.raises(NotSchedulable, match=why) as info:
            request.scheduler.schedule(f)
        assert str(info.value).startswith(f"{name_of(f)} cannot be scheduled")
        return request.scheduler.schedule(add, 1, 2)

    assert zodb.outcome(zodb.do(schedule)) == (3, None)
    assert len(zodb.ask(lambda scheduler: scheduler.jobs())) == 1


class Folder(PersistentMapping):
    """An object whose repr is that of all that it holds."""

    def __repr__(self):
        raise AssertionError("loads half of the database")

    def __call__(self):  # pragma: no cover - refused
        pass


@pytest.mark.parametrize(
    "f", [Folder().keys, Folder(), functools.partial(add, Folder()), str.upper]
)
def test_refusal_of_a_method_does_not_tell_its_object(zodb, f):
    def schedule(request):
        with pytest.raises(NotSchedulable, match=r"^[\w.:]+ cannot be scheduled"):
            request.scheduler.schedule(f)

    zodb.do(schedule)


@pytest.mark.parametrize("name", REFUSED)
def test_ram_accepts_any_callable(name):
    with site() as web:
        f, _why = REFUSED[name]
        assert web.run(f) == f()


@functools.wraps(add)
def disguised(*args):  # pragma: no cover - refused
    return "another function than its name says"


def test_function_whose_name_is_anothers_is_refused(zodb):
    def schedule(request):
        with pytest.raises(NotSchedulable, match="another object has this name"):
            request.scheduler.schedule(disguised, 1)

    zodb.do(schedule)


@pytest.mark.parametrize("f", [None, 1, "test_scheduler:add", ["add"]])
@in_both_stores
def test_what_is_no_function_is_refused(web, f):
    def schedule(request):
        with pytest.raises(NotSchedulable):
            request.scheduler.schedule(f)
        return len(request.scheduler.jobs())

    assert web.do(schedule) == 0


@pytest.mark.parametrize(
    ("f", "value"),
    [
        (len, 3),
        (tuple, (1, 2, 3)),
        (Toolbox.static, ("static", [1, 2, 3])),
        (Toolbox.of_class, ("Toolbox", [1, 2, 3])),
    ],
)
@in_both_stores
def test_whatever_has_a_name_can_be_scheduled(web, f, value):
    assert web.run(f, [1, 2, 3]) == value


@with_zodb
def test_transactional_function_joins_the_jobs_transaction(web):
    web.make()

    def schedule(request):
        thing = get_connection(request).root()["thing"]
        return request.scheduler.schedule(count_transactionally, thing)

    assert web.outcome(web.do(schedule)) == (None, None)
    assert web.read(lambda root: root["thing"].count) == 1


@in_both_stores
def test_async_function_runs_to_its_end_in_the_jobs_thread(web):
    sid = web.schedule(add_slowly, 1, 2)
    assert web.outcome(sid) == ((3, sid), None)
    assert str(web.fails(fail_slowly)) == "slowly"


@with_zodb
@pytest.mark.parametrize(
    ("f", "error"),
    [(count_up_in_a_thread, type(None)), (checkpoint_in_a_thread, ZeroDivisionError)],
)
def test_what_a_job_does_in_other_threads_is_committed_with_it(web, f, error):
    web.make()

    def schedule(request):
        return request.scheduler.schedule(f, get_connection(request).root()["thing"])

    assert type(web.outcome(web.do(schedule))[1]) is error
    assert web.read(lambda root: root["thing"].count) == 1


# -- options -------------------------------------------------------------------------------


@in_both_stores
def test_title_is_shown_and_chained_options_add_up(web):
    def schedule(request):
        plain = request.scheduler
        titled = plain.using(title="First", result_timeout=5)
        return [s.schedule(give, 1) for s in (plain, titled, titled.using(title="Second"))]

    sids = web.do(schedule)
    for sid in sids:
        web.wait(sid)
    plain, first, second = map(web.status, sids)
    assert [status.title for status in (plain, first, second)] == [None, "First", "Second"]
    assert round(first.expires - first.finished) == round(second.expires - second.finished) == 5
    assert round(plain.expires - plain.finished) == 3600


@in_both_stores
def test_option_that_is_none_is_the_default(web):
    sid = web.schedule(give, 1, title=None, timeout=None, result_timeout=None, max_attempts=None)
    assert web.outcome(sid) == (1, None)
    assert web.status(sid).title is None


BAD_OPTIONS = [
    dict(titel="T"),
    dict(title=1),
    dict(timeout=-1),
    dict(timeout="1"),
    dict(timeout=float("nan")),
    dict(timeout=float("inf")),
    dict(timeout=True),
    dict(result_timeout=-1),
    dict(result_timeout=2**62),  # no time could be made of the end
    dict(run_after=-1),
    dict(run_after=10**30),
    dict(run_after=datetime(2030, 1, 1)),  # of which time zone?
    dict(run_after=datetime.min.replace(tzinfo=UTC)),
    dict(run_after=datetime.max.replace(tzinfo=UTC)),
    dict(key=""),
    dict(key=3),
    dict(key="\ud800"),  # half of a pair, of which no UTF-8 can be made
    dict(retry_on="ValueError"),
    dict(retry_on=()),
    dict(max_attempts=0),
    dict(max_attempts=1.5),
    dict(max_attempts=True),
    dict(queue=""),
    dict(queue="amq.reports"),  # RabbitMQ keeps these to itself
    dict(queue="ä" * 128),
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
@in_both_stores
def test_bad_option_is_refused_by_its_name(web, options):
    def schedule(request):
        [(name, value)] = options.items()
        with pytest.raises(NotSchedulable, match=name) as info:
            request.scheduler.using(**options)
        assert name == "titel" or repr(value) in str(info.value)

    web.do(schedule)


@pytest.mark.parametrize(
    "options",
    [dict(queue="ä" * 127 + "x"), dict(timeout=0), dict(result_timeout=1e10), dict(max_attempts=1)],
    ids=repr,
)
def test_option_at_its_bound_is_taken(zodb, options):
    assert zodb.scheduler.using(**options)._options == options


@pytest.mark.parametrize("name", ["title", "key"])
def test_empty_text_is_refused_as_empty(zodb, name):
    with pytest.raises(NotSchedulable, match=f"{name} is ''; allowed: a text that is not empty"):
        zodb.scheduler.using(**{name: ""})


def test_unknown_option_names_the_known_ones(zodb):
    with pytest.raises(NotSchedulable, match=r"no option 'colour'; known: .*title.*max_attempts"):
        zodb.scheduler.using(colour="red")


@in_both_stores
def test_timeout_ends_the_job_as_failed_at_its_next_check(web, key, at):
    sid = web.schedule(wait_until_told, at, key, timeout=0.01)
    web.wait(sid)
    assert web.status(sid).status == "failed"
    assert web.status(sid).failure.class_name == "JobTimeout"
    assert [type(error) for error in (*CALLS[key], web.outcome(sid)[1])] == [JobTimeout] * 2


# -- jobs that do something with their transaction -------------------------------------------


def half_read(key, database, by_oid, fails):
    """Swallow an error of the first load, and commit what came of it, or fail over it."""
    request = current_job().request
    primary = get_connection(request)
    connection = primary.get_connection(database)
    thing = connection.root()["thing"]
    oid = thing._p_oid
    thing._p_deactivate()
    if by_oid:
        del thing  # a ghost that nobody refers to leaves the cache
    if not CALLS[key]:
        connection._storage.load = partial(refuse_to_load, key)
    note(key, "called")
    try:
        read = connection.get(oid).name if by_oid else thing.name
    except ReadConflictError:
        read = "half of the truth"
    finally:
        vars(connection._storage).pop("load", None)
    if fails and read != "thing":
        raise ValueError(read)
    primary.root()["read"] = read


def refuse_to_load(key, oid):
    note(key, "refused")
    raise ReadConflictError


@pytest.mark.parametrize("fails", [False, True], ids=["commits", "fails"])
@pytest.mark.parametrize("by_oid", [False, True], ids=["state", "oid"])
@pytest.mark.parametrize("database", ["", "other"])
@everywhere("two ZODBs, explicit, retry", "two ZODBs, default, once")
def test_job_that_swallowed_a_failed_load_is_repeated(web, key, database, by_oid, fails):
    web.make(database=database)
    web.run(half_read, key, database, by_oid, fails)
    assert CALLS[key] == ["called", "refused", "called"]
    assert web.read(lambda root: root["read"]) == "thing"


def end_transaction(how, begins):
    request = current_job().request
    get_connection(request).root()["before"] = True
    getattr(request.tm, how)()
    if begins:
        request.tm.begin()
        get_connection(request).root()["after"] = True
    return how


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("how", ["commit", "abort"])
@with_zodb
def test_job_that_ends_its_transaction_by_itself_succeeds(web, how, begins):
    assert web.run(end_transaction, how, begins) == how
    assert web.read(lambda root: ("before" in root, "after" in root)) == (how == "commit", begins)


def write_without_transaction():
    request = current_job().request
    root = get_connection(request).root()
    request.tm.commit()
    root["after"] = True


def test_job_that_fails_for_want_of_a_transaction_leaves_no_effect(zodb):
    """Not in the cache of its connection either, which a later request gets from the pool."""
    assert isinstance(zodb.fails(write_without_transaction), NoTransaction)
    assert zodb.read(lambda root: "after" not in root)


def ruin_commit(key, how):
    note(key, how)
    txn = current_job().request.tm.get()
    if how == "doom":
        txn.doom()
    else:
        txn.addBeforeCommitHook(fail, ("in the hook",))


@in_both_stores
def test_job_that_dooms_its_transaction_fails_at_once(web, key):
    assert isinstance(web.fails(ruin_commit, key, "doom"), DoomedTransaction)
    assert CALLS[key] == ["doom"]


@in_both_stores
def test_error_of_the_commit_is_told_as_it_was_raised(web, key):
    """It could have been the storage's, so the attempt is repeated a few times."""
    assert isinstance(web.fails(ruin_commit, key, "hook"), ZeroDivisionError)
    assert CALLS[key] == ["hook"] * 3


def leave_something_behind(key):
    transaction.get().addAfterCommitHook(lambda committed: note(key, "a later job committed it"))
    raise ZeroDivisionError


def commit_thread():
    transaction.commit()


@in_both_stores
def test_what_a_job_leaves_in_the_threads_own_transaction_is_gone(web, key):
    for _ in web.executor.threads or [None]:
        web.fails(leave_something_behind, key)
    for _ in range(4):
        web.run(commit_thread)
    assert CALLS[key] == []


def never_check(thing):
    thing.count += 1
    time.sleep(0.05)


@with_zodb
def test_job_that_never_checks_and_took_too_long_fails_and_has_no_effects(web):
    web.make()

    def schedule(request):
        thing = get_connection(request).root()["thing"]
        return request.scheduler.using(timeout=0.01).schedule(never_check, thing)

    sid = web.do(schedule)
    web.wait(sid)
    assert web.status(sid).failure.class_name == "JobTimeout"
    assert web.read(lambda root: root["thing"].count) == 0


@in_both_stores
def test_job_of_another_manager_does_not_wait_for_the_commit_of_the_request(web):
    def schedule(request):
        tm = transaction.TransactionManager(explicit=True)
        tm.begin()
        sid = request.scheduler.using(tm=tm).schedule(give, 1)
        tm.commit()
        web.scheduler.store.release(tm)
        return sid, web.status(sid)

    sid, status = web.do(schedule)
    assert status is not None
    assert web.outcome(sid) == (1, None)


@in_both_stores
def test_key_makes_one_job_until_it_is_finished(web, at):
    def schedule(request):
        return request.scheduler.using(key="report").schedule(behind_gate, at)

    first = web.do(schedule)
    assert web.do(schedule) == first
    GATES[at].opened.set()
    web.wait(first)
    second = web.do(schedule)
    assert second != first
    web.wait(second)


@in_both_stores
def test_key_makes_one_job_within_one_request(web):
    def schedule(request):
        scheduler = request.scheduler.using(key="k")
        return [scheduler.schedule(give, n) for n in range(3)]

    sids = web.do(schedule)
    assert len(set(sids)) == 1
    assert web.outcome(sids[0]) == (0, None)


def fail_first(key):
    note(key)
    if len(CALLS[key]) < 2:
        raise FileNotFoundError("not yet")
    return current_job().attempt


# -- status and jobs -----------------------------------------------------------------------


@in_both_stores
def test_status_tells_a_jobs_life(web, at):
    sid = web.schedule(behind_gate, at, 1, user="ann", title="T")
    GATES[at].reach()
    running = web.status(sid)
    GATES[at].opened.set()
    web.wait(sid)
    done = web.status(sid)
    assert (running.status, running.done, done.status, done.done) == (
        "running",
        False,
        "successful",
        True,
    )
    assert (done.sid, done.owner, done.title, done.progress) == (sid, "ann", "T", 100)
    assert done.created <= done.started <= done.finished < done.expires
    assert done.started == running.started
    assert done.revision > running.revision
    assert isinstance(done, JobStatus)
    with pytest.raises(AttributeError):
        done.status = "failed"


@in_both_stores
def test_status_of_a_failure_tells_operators_everything(web):
    sid = web.schedule(fail, "why")
    web.wait(sid)
    failure = web.status(sid).failure
    assert (failure.class_name, failure.message, failure.text) == ("ZeroDivisionError", "why", None)
    assert "in fail" in failure.traceback


@in_both_stores
def test_jobs_are_the_users_own_newest_first(web):
    sids = []
    for user in ("ann", "bob", "ann", None):
        sids.append(web.schedule(give, 1, user=user))
        web.wait(sids[-1])

    def own(user):
        return web.do(lambda r: [job.sid for job in r.scheduler.jobs()], user=user)

    assert own("ann") == [sids[2], sids[0]]
    assert own("bob") == [sids[1]]
    assert own("eve") == []


@in_both_stores
def test_jobs_that_ended_long_ago_are_listed_for_their_user_alone(web):
    users = ["ann", "bob", "ann", None]
    sids = [web.schedule(fail if user == "bob" else give, 1, user=user) for user in users]
    for sid in sids:
        web.wait(sid)
    web.scheduler.store.archive(sids)
    young = web.schedule(give, 1, user="ann")
    web.wait(young)

    def own(user, *statuses):
        return {job.sid for job in web.do(lambda r: r.scheduler.jobs(*statuses), user=user)}

    assert own("ann") == own("ann", "successful") == {sids[0], sids[2], young}
    assert own("bob") == own("bob", ["failed", "running"]) == {sids[1]}
    assert own("bob", "successful") == own("bob", "running") == own("eve") == own(None) == set()
    assert {job.sid for job in web.ask(lambda s: s.jobs())} == {*sids, young}
    assert {job.sid for job in web.ask(lambda s: s.jobs("failed"))} == {sids[1]}
    with pytest.raises(ValueError, match="status is 'finished'; allowed: accepted, running"):
        web.ask(lambda s: s.jobs("finished"))


def test_list_reads_no_record_of_other_users_that_was_put_away(zodb):
    sids = {user: zodb.schedule(give, 1, user=user) for user in ("ann", "bob")}
    for sid in sids.values():
        zodb.wait(sid)
    zodb.scheduler.store.archive([*sids.values()])

    def loaded(user, *statuses):
        def look(request):
            connection = get_connection(request)
            connection.cacheMinimize()
            request.scheduler.jobs(*statuses)
            finished = connection.root()["pyramid_async"].finished
            records = {sid: tree[sid] for tree in finished for sid in tree}
            return {sid for sid, record in records.items() if record._p_changed is not None}

        return zodb.do(look, user=user)

    assert loaded("ann") == {sids["ann"]}
    assert loaded("ann", "failed") == loaded("eve") == loaded(None) == set()


def test_list_behind_a_savepoint_leaves_the_connection_able_to_prefetch(zodb):
    zodb.wait(zodb.schedule(give, 1, user="ann"))

    def look(request):
        connection = get_connection(request)
        connection.root()["written"] = True
        request.tm.savepoint()
        connection.root()["pyramid_async"].unfinished[0]._p_deactivate()
        assert len(request.scheduler.jobs()) == 1
        return vars(connection).get("prefetch")

    assert zodb.do(look, user="ann") is None


@in_both_stores
def test_job_that_ends_while_the_list_is_made_is_told_once(web, at, monkeypatch):
    sid = web.schedule(behind_gate, at)
    GATES[at].reach()

    def listed(scheduler):
        table = type(scheduler._table())
        unfinished = list(scheduler._table().all_unfinished())
        monkeypatch.setattr(table, "all_unfinished", lambda self: iter(unfinished))
        GATES[at].opened.set()
        web.wait(sid)
        return [job.sid for job in scheduler.jobs()]

    assert web.ask(listed) == [sid]


@in_both_stores
def test_jobs_are_chosen_by_status(web, at):
    done = web.schedule(give, 1)
    failed = web.schedule(fail)
    web.wait(done)
    web.wait(failed)
    running = web.schedule(behind_gate, at)
    GATES[at].reach()

    def chosen(status):
        return [job.sid for job in web.ask(lambda scheduler: scheduler.jobs(status))]

    assert chosen("successful") == [done]
    assert chosen("running") == [running]
    assert set(chosen(("running", "failed"))) == {running, failed}
    assert set(chosen(None)) == {done, failed, running}
    assert chosen("dismissed") == []


@in_both_stores
def test_jobs_scheduled_by_this_very_transaction_are_listed(web):
    def schedule(request):
        sid = request.scheduler.schedule(give, 1)
        [job] = request.scheduler.jobs()
        assert (job.sid, job.status) == (sid, "accepted")
        return sid

    web.wait(web.do(schedule, user="ann"))


@in_both_stores
def test_whoever_is_not_known_lists_no_jobs(web):
    def schedule(request):
        request.scheduler.schedule(give, 1)
        assert request.scheduler.jobs() == []

    web.do(schedule)


@in_both_stores
def test_without_a_request_everybodys_jobs_are_listed(web):
    sids = {web.schedule(give, 1, user="ann"), web.schedule(give, 1)}
    unbound = web.registry.getUtility(IScheduler)
    assert {job.sid for job in unbound.transact(lambda s: s.jobs())} == sids
    for sid in sids:
        web.wait(sid)


def test_job_that_ends_its_transaction_and_fails_tells_its_own_error(zodb):
    _value, error = zodb.outcome(zodb.schedule(abort_and_fail))
    assert type(error) is ZeroDivisionError


@in_both_stores
def test_jobs_that_were_removed_are_neither_listed_nor_complained_of(web, caplog):
    sid = web.schedule(give, 1, user="ann", run_after=3600)
    unbound = web.registry.getUtility(IScheduler)
    assert unbound.transact(lambda s: s.cancel(sid))
    unbound.transact(lambda s: s.remove(sid))
    assert unbound.transact(lambda s: s.jobs()) == []
    assert [r for r in caplog.records if sid in r.getMessage()] == []


@in_both_stores
def test_accepted_answers_for_jobs_of_requests_alone(web):
    with pytest.raises(JobNotFound, match="unknown"):
        web.do(lambda request: request.scheduler.accepted("00"))
    sid = web.schedule(give, 1)
    web.wait(sid)
    with pytest.raises(TypeError, match=r"request\.scheduler"):
        web.ask(lambda scheduler: scheduler.accepted(sid))


def test_full_ram_store_refuses_and_the_request_goes_on(at):
    with site({"async.max_pending": "1"}) as web:
        first = web.schedule(behind_gate, at)

        def schedule(request):
            with pytest.raises(SchedulerFull):
                request.scheduler.schedule(give, 1)
            return "went on"

        assert web.do(schedule) == "went on"
        GATES[at].opened.set()
        web.wait(first)


def test_retry_that_a_full_ram_store_refuses_can_be_asked_for_again(key, at):
    with site({"async.max_pending": "1"}) as web:
        failed = web.schedule(fail_first, key)
        web.wait(failed)
        busy = web.schedule(behind_gate, at)

        def retry_in_vain(request):
            with pytest.raises(SchedulerFull):
                request.scheduler.retry(failed)

        web.do(retry_in_vain)
        web.do(lambda request: request.scheduler.remove(busy))
        GATES[at].opened.set()
        new = web.do(lambda request: request.scheduler.retry(failed))
        assert web.status(new) is not None
        assert web.outcome(new) == (1, None)


def test_job_accepted_while_the_one_before_has_not_quite_ended_runs(at):
    """A finished job leaves its place in the store before it leaves its thread."""
    with site({"async.max_pending": "1", "async.workers": "1"}) as web, gate() as ending:

        def linger(event):
            if event.sid == first:
                GATES[ending].pass_through()

        web.registry.registerHandler(linger, [IJobFinished])
        first = web.schedule(behind_gate, at)
        GATES[at].opened.set()
        GATES[ending].reach()
        second = web.schedule(give, 2)
        assert web.executor.held == {first, second}
        GATES[ending].opened.set()
        assert web.outcome(second) == (2, None)


# -- cancel and remove ---------------------------------------------------------------------


@with_zodb
def test_effects_of_a_job_cancelled_while_it_runs_never_come(web, key, at):
    sid = web.schedule(mark_then, at, key)
    GATES[at].reach()
    assert web.do(lambda request: request.scheduler.cancel(sid)) is True
    GATES[at].opened.set()
    web.run(give, 1)
    web.run(give, 1)
    assert web.status(sid).status == "dismissed"
    assert web.read(lambda root: root.get("marked")) is None


@with_zodb
def test_effects_of_a_job_removed_while_it_runs_never_come(web, key, at):
    sid = web.schedule(mark_then, at, key)
    GATES[at].reach()
    web.do(lambda request: request.scheduler.remove(sid))
    assert web.status(sid) is None
    GATES[at].opened.set()
    web.run(give, 1)
    web.run(give, 1)
    assert web.read(lambda root: root.get("marked")) is None


@in_both_stores
def test_job_cancelled_before_it_began_never_runs(web, key, at):
    blocking = [web.schedule(behind_gate, at) for _ in range(2)]
    sid = web.schedule(note, key)
    assert web.do(lambda request: request.scheduler.cancel(sid)) is True
    GATES[at].opened.set()
    for blocked in blocking:
        web.wait(blocked)
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == []
    assert web.status(sid).status == "dismissed"


@in_both_stores
def test_running_job_is_told_of_its_dismissal_at_its_next_check(web, key, at, wait_for):
    sid = web.schedule(wait_until_told, at, key)
    GATES[at].reach()
    web.do(lambda request: request.scheduler.cancel(sid))
    [told] = wait_for(lambda: CALLS[key])
    assert type(told) is JobDismissed
    assert web.told == []


@in_both_stores
def test_cancel_says_whether_this_call_did_it(web, at):
    sid = web.schedule(behind_gate, at)
    GATES[at].reach()

    def cancel(request):
        return [request.scheduler.cancel(sid) for _ in range(2)]

    assert web.do(cancel) == [True, False]
    assert web.do(cancel) == [False, False]
    done = web.schedule(give, 1)
    web.wait(done)
    assert web.do(lambda request: request.scheduler.cancel(done)) is False
    assert web.status(done).status == "successful"


@in_both_stores
def test_cancel_that_is_aborted_cancels_nothing(web, at):
    sid = web.schedule(behind_gate, at, 1)
    GATES[at].reach()

    def cancel(request):
        assert request.scheduler.cancel(sid)
        request.tm.doom()

    web.do(cancel)
    GATES[at].opened.set()
    assert web.outcome(sid) == (1, None)


@in_both_stores
def test_removing_a_finished_job_forgets_it(web):
    sid = web.schedule(give, 1)
    web.wait(sid)
    web.do(lambda request: request.scheduler.remove(sid))
    assert web.status(sid) is None
    web.do(lambda request: request.scheduler.remove(sid))


@in_both_stores
def test_dismissal_that_comes_before_the_jobs_commit_wins(web, key, at):
    """The job has called its function and begins to commit; the dismissal commits first."""
    sid = web.schedule(mark_with, (at, "tpc_begin", "!first"), key)
    GATES[at].reach()
    assert web.do(lambda request: request.scheduler.cancel(sid)) is True
    GATES[at].opened.set()
    web.run(give, 1)
    web.run(give, 1)
    assert web.status(sid).status == "dismissed"
    if web.databases:
        assert web.read(lambda root: root.get("marked")) is None


@in_both_stores
def test_dismissal_that_comes_after_the_jobs_vote_conflicts(web, key, at):
    """The job's commit can no longer fail; the dismissal must."""
    sid = web.schedule(mark_with, (at, "tpc_vote", "~~last"), key)
    GATES[at].reach()
    outcome = []

    def commit():
        # Refused at once by one store, held until the job has finished by the other.
        try:
            tm.commit()
        except ConflictError as error:
            outcome.append(error)
            tm.abort()

    with manager_of(web) as tm:
        tm.begin()
        assert web.scheduler.using(tm=tm).cancel(sid) is True
        thread = threading.Thread(target=commit)
        thread.start()
        GATES[at].opened.set()
        thread.join(10)
    assert web.outcome(sid) == (key, None)
    assert len(outcome) == 1
    assert web.status(sid).status == "successful"
    if web.databases:
        assert web.read(lambda root: root["marked"]) == key


@everywhere(*[name for name in ALL if name.endswith("retry")])
def test_cancel_that_conflicts_is_decided_anew(web, at):
    sid = web.schedule(behind_gate, at, 1)
    GATES[at].reach()
    said = []

    def cancel(request):
        said.append(request.scheduler.cancel(sid))
        if len(said) == 1:
            GATES[at].opened.set()
            web.wait(sid)
        return said

    assert web.do(cancel) == [True, False]
    assert web.status(sid).status == "successful"


# -- the job's request ---------------------------------------------------------------------


def add_ons(config):
    config.add_request_method(lambda request, name: f"hello {name}", "greet")
    config.add_request_method(lambda request: f"lang of {request.host}", "lang", reify=True)
    config.add_request_method(lambda request: request.tm, "session_like", property=True)
    config.add_request_method(Decorated(), "decorated")
    config.add_request_method(lambda request: "of an add-on", "tenant")
    config.commit()
    config.add_request_method(property(lambda request: "ours"), "tenant", property=True)


class Decorated:
    """What the class of a decorator makes of a function: it wants to know the owner too."""

    def __call__(self, request):
        return request.host

    def __get__(self, request, owner):
        return partial(self, request)


def use_odd_methods():
    request = current_job().request
    return [request.decorated(), request.tenant]


def greet_from_job(name):
    return current_job().request.greet(name)


@pytest.mark.parametrize("kind", SOME)
def test_request_methods_of_other_add_ons_work_in_a_job(kind):
    with site(**{**ALL[kind], "configure": add_ons}) as web:
        assert web.run(greet_from_job, "ann") == "hello ann"
        assert web.run(look_around, "lang") == ["lang of localhost:80"]
        assert web.run(tm_is_shared) is True
        assert web.run(use_odd_methods) == ["localhost:80", "ours"]


def tm_is_shared():
    request = current_job().request
    connection = own_connection_or_none()
    return request.session_like is request.tm and (
        connection is None
        or connection.transaction_manager is getattr(request.tm, "manager", request.tm)
        or connection.transaction_manager is request.tm
    )


def note_request():
    REQUESTS.append(weakref.ref(current_job().request))


def note_request_and_fail():
    note_request()
    raise OperationFailed("which is logged without its traceback")


def note_request_and_use_scheduler():
    note_request()
    current_job().request.scheduler.status(current_job().sid)


@pytest.mark.parametrize(
    "note", [note_request, note_request_and_fail, note_request_and_use_scheduler]
)
@pytest.mark.parametrize("kind", SOME)
def test_request_of_a_job_goes_without_the_garbage_collector(kind, note, wait_for, uncollected):
    REQUESTS.clear()
    with site(**ALL[kind]) as web:
        web.outcome(web.schedule(note))
        wait_for(lambda: [request() for request in REQUESTS] == [None])


REQUESTS = []


@pytest.mark.parametrize("kind", SOME)
def test_requests_of_all_jobs_are_of_one_class_in_each_application(kind):
    KINDS.clear()
    with site(**{**ALL[kind], "configure": add_ons}) as web:
        assert [web.run(note_kind) for _ in range(2)] == [True, True]
    with site(**ALL[kind]) as web:
        assert web.run(note_kind) is False
    assert KINDS[0] is KINDS[1]
    assert KINDS[0] is not KINDS[2]


KINDS = []


def note_kind():
    """Say whether the job's request has what other add-ons give it."""
    request = current_job().request
    KINDS.append(type(request))
    return hasattr(request, "lang")


class OwnRequest(Request):
    shape = "of the application"


@in_both_stores
def test_job_gets_a_request_of_the_applications_own_kind(web):
    def configure(config):
        config.set_request_factory(OwnRequest)

    with site(configure=configure) as own:
        assert own.run(look_around, "shape") == ["of the application"]


@in_both_stores
def test_manager_of_the_job_is_made_as_the_application_has_it(web):
    [kind] = web.run(kind_of_manager)
    assert kind is True


def kind_of_manager():
    tm = current_job().request.tm
    return [isinstance(tm, transaction.TransactionManager) and tm.explicit]


def test_manager_hook_is_asked_for_the_jobs_request(key):
    with site({"tm.manager_hook": manager_hook}, zodb=[""]) as web:
        HOOKED.clear()
        assert web.run(is_hooked) is True


HOOKED = []


def is_hooked():
    """Say whether the hook was asked for the request of this very job."""
    return any(request is current_job().request for request in HOOKED)


def manager_hook(request):
    HOOKED.append(request)
    return pyramid_tm.explicit_manager(request)


@everywhere_of_some
def test_user_and_host_are_those_of_the_scheduling_request(web):
    def schedule(request):
        names = ("authenticated_userid", "scheme", "host", "script_name", "application_url")
        return request.scheduler.schedule(look_around, *names)

    sid = web.do(
        schedule,
        user="ann",
        HTTP_HOST="shop.example.org:8443",
        SCRIPT_NAME="/app",
        **{"wsgi.url_scheme": "https"},
    )
    assert web.outcome(sid)[0] == [
        "ann",
        "https",
        "shop.example.org:8443",
        "/app",
        "https://shop.example.org:8443/app",
    ]


@in_both_stores
def test_urls_of_a_virtual_root_are_those_of_the_scheduling_request(web):
    def schedule(request):
        request.environ["HTTP_X_VHM_ROOT"] = "/shop"  # not before: this root has no such child
        return request.scheduler.schedule(look_from_a_virtual_root)

    assert web.outcome(web.do(schedule))[0] == "http://localhost/ann/"


@in_both_stores
@pytest.mark.parametrize("path", ["/größe", "/日本"])
def test_script_name_of_the_scheduling_request_may_be_of_any_script(web, path):
    def schedule(request):
        return request.scheduler.schedule(look_around, "script_name", "application_url")

    sid = web.do(schedule, SCRIPT_NAME=path.encode().decode("latin-1"))
    assert web.outcome(sid)[0] == [path, "http://localhost" + quote(path)]


@in_both_stores
def test_script_name_that_the_environ_has_not_is_empty(web):
    """As in a DummyRequest."""

    def schedule(request):
        del request.environ["SCRIPT_NAME"]
        return request.scheduler.schedule(look_around, "script_name", "application_url")

    assert web.outcome(web.do(schedule))[0] == ["", "http://localhost"]


@in_both_stores
def test_copy_of_the_jobs_request_is_in_its_transaction(web):
    """So pyramid_tm begins no other for a subrequest of it."""
    assert web.run(look_at_a_copy) == (True, True)


@in_both_stores
def test_job_of_nobody_has_no_user(web):
    assert web.run(look_around, "authenticated_userid") == [None]


@in_both_stores
def test_root_factory_sees_the_jobs_user(web):
    web.registry.roots_made_for.clear()
    sid = web.schedule(give, 1, user="ann")
    web.wait(sid)
    assert set(web.registry.roots_made_for) <= {"ann"}
    assert "ann" in web.registry.roots_made_for


@in_both_stores
def test_request_has_the_root_as_in_a_view(web):
    assert tuple(web.run(has_root)) == ("Root", True)


@in_both_stores
def test_request_is_the_current_one_of_its_thread_and_leaves_nothing_behind(web):
    for _ in range(3):
        assert web.run(is_surrounded) == (True, True, 1)


def test_root_factory_that_fails_fails_the_job_and_leaves_nothing_behind():
    def configure(config):
        config.commit()
        config.set_root_factory(BreakableRoot)

    with site({"async.workers": "1"}, configure=configure) as web:
        BreakableRoot.broken = True
        try:
            errors = [web.fails(give, 1) for _ in range(2)]
        finally:
            BreakableRoot.broken = False
        assert [str(error) for error in errors] == ["the root of all evil"] * 2
        assert web.run(is_surrounded) == (True, True, 1)


class BreakableRoot(Root):
    broken = False

    def __init__(self, request):
        super().__init__(request)
        if self.broken and request.path_info != "/do":
            raise ZeroDivisionError("the root of all evil")


@everywhere_of_some
def test_finished_callbacks_of_the_jobs_request_are_called(web, key):
    assert web.run(add_callback, key, "ran") == "ran"
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == [("ran", "user", None)]


def add_callback(key, value):
    current_job().request.add_finished_callback(
        lambda request: note(key, (value, "user", request.authenticated_userid))
    )
    return value


@in_both_stores
def test_finished_callback_may_ask_for_the_user_when_the_job_failed(web, key):
    """The connection is closed and the job's record a ghost by then."""
    sid = web.schedule(add_callback_and_fail, key, user="ann")
    web.wait(sid)
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == [(None, "user", "ann")]


def add_callback_and_fail(key):
    add_callback(key, None)
    raise ZeroDivisionError


@pytest.mark.parametrize("options", [STORES["no ZODB"], STORES["ZODB"]])
def test_finished_callback_that_fails_spoils_nothing(options, caplog):
    with site({"async.workers": "1"}, **options) as web:
        sid = web.schedule(add_failing_callback)
        assert web.outcome(sid) == ("done", None)
        assert web.status(sid).status == "successful"
        assert web.run(is_surrounded) == (True, True, 1)
        assert (sid, "successful") in web.told
    assert not [r for r in caplog.records if "failed, errorID" in r.getMessage()]


def add_failing_callback():
    current_job().request.add_finished_callback(lambda request: 1 / 0)
    return "done"


@in_both_stores
def test_job_schedules_a_job(web, key):
    sid = web.run(schedule_another, key, "second", user="ann")
    web.wait(sid)
    assert CALLS[key] == ["second"]
    assert web.status(sid).owner == "ann"


@in_both_stores
def test_job_that_fails_schedules_nothing(web, key):
    web.fails(schedule_another_and_fail, key)
    web.run(give, 1)
    web.run(give, 1)
    assert CALLS[key] == []


def schedule_another_and_fail(key):
    schedule_another(key)
    raise ZeroDivisionError


@in_both_stores
def test_transaction_tells_whose_job_it_is(web):
    sid = web.schedule(look_at_transaction, user="ann")
    (user, description, extended, own), _ = web.outcome(sid)
    assert user.strip() == "ann"
    assert sid in description
    assert (extended, own) == (sid, sid)


def test_undo_log_tells_the_sid(file_db, tmp_path):
    uri = f"file://{tmp_path}/own.fs"
    with site({**EXPLICIT, "zodbconn.uri": uri}, zodb=[""]) as web:
        pass
    with site(EXPLICIT | {"zodbconn.uri": uri}, zodb=[""]) as web:
        sid = web.schedule(give, 1, user="ann")
        web.wait(sid)
        found = [e for e in web.databases[""].undoLog(0, 20) if e.get("pyramid_async") == sid]
        assert len(found) == 1


# -- events --------------------------------------------------------------------------------


@in_both_stores
def test_subscriber_sees_the_committed_job(web):
    seen = []
    web.registry.registerHandler(lambda event: seen.append(web.status(event.sid)), [IJobFinished])
    sid = web.schedule(give, 1)
    web.run(give, 1)
    web.wait(sid)
    assert {status.status for status in seen} == {"successful"}


# -- without a request ---------------------------------------------------------------------


def test_scheduler_provides_its_interface(zodb):
    assert verifyObject(IScheduler, zodb.scheduler, tentative=True)


@in_both_stores
def test_unbound_scheduler_works_in_the_threads_own_transaction(web):
    scheduler = web.scheduler
    transaction.begin()
    sid = scheduler.schedule(add, 1, 2)
    assert scheduler.completed(sid) is False
    transaction.commit()
    web.wait(sid)
    transaction.begin()
    assert scheduler.get_result(sid) == (3, None)
    transaction.commit()
    assert scheduler.get_result(sid) is None
    transaction.abort()


@in_both_stores
def test_unbound_scheduler_takes_a_transaction_manager(web):
    with manager_of(web) as tm:
        with tm:
            sid = web.scheduler.using(tm=tm).schedule(add, 1, 2)
        web.wait(sid)
        with tm:
            assert web.scheduler.using(tm=tm, title="T").get_result(sid) == (3, None)
        with tm:
            assert web.scheduler.using(tm=tm).get_result(sid) is None


@in_both_stores
def test_requests_scheduler_can_work_in_another_transaction(web):
    """As for a job that must run although the request fails."""
    sids = []

    def schedule(request):
        with manager_of(web) as tm, tm:
            sids.append(request.scheduler.using(tm=tm).schedule(add, 1, 2))
        raise Refused

    with pytest.raises(Refused):
        web.do(schedule)
    assert web.outcome(sids[0]) == (3, None)


def keeps_nothing(web, use):
    """Check that connections go with their users, and storages that are told of every commit."""

    def kept():
        database = web.databases[""]
        opened = sum(1 for connection in database.pool.all if connection.opened)
        return opened, len(database._mvcc_storage._instances)

    before = kept()
    for _ in range(10):
        use()
    gc.collect()
    use()  # who comes next releases what was left
    # One is the last user's; recovery and two workers may have come meanwhile.
    assert max(now - then for now, then in zip(kept(), before, strict=True)) <= 4


@with_zodb
def test_unbound_scheduler_keeps_no_connection_of_managers_that_are_gone(web):
    def use():
        tm = transaction.TransactionManager()
        assert web.scheduler.using(tm=tm).completed(uuid4().hex) is None
        tm.abort()

    keeps_nothing(web, use)


@with_zodb
def test_transactions_of_our_own_are_not_searched_for_a_second_connection(web):
    def hooks(scheduler):
        scheduler.completed(uuid4().hex)
        return [*scheduler._tm.get().getBeforeCommitHooks()]

    assert web.scheduler.transact(hooks) == []


@with_zodb
def test_unbound_scheduler_keeps_no_connection_of_threads_that_have_ended(web):
    def use():
        assert web.scheduler.completed(uuid4().hex) is None
        transaction.abort()

    def use_in_a_thread():
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(10)

    keeps_nothing(web, use_in_a_thread)


@everywhere("ZODB, default, retry", "ZODB, explicit, retry")
def test_a_second_connection_that_writes_is_an_error_and_no_deadlock(web, key):
    """The commit of one connection would wait for the other's to end."""
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    sid = web.scheduler.using(tm=tm).schedule(note, key)
    second = web.databases[""].open(tm)
    second.root()["written"] = True
    with pytest.raises(TwoConnections, match="open yours before you use the scheduler"):
        tm.commit()
    tm.abort()
    second.close()
    assert web.ask(lambda scheduler: scheduler.completed(sid)) is None


def is_refused_with_a_second_connection(web, tm):
    second = web.databases[""].open(tm)
    second.root()["written"] = True
    with pytest.raises(TwoConnections):
        tm.commit()
    tm.abort()
    second.close()


@everywhere("ZODB, default, retry", "ZODB, explicit, retry")
def test_a_second_connection_is_told_from_one_that_takes_part_at_the_end_alone(web, key):
    """Who fetches a result writes when the transaction commits."""
    sid = web.schedule(note, key)
    web.wait(sid)
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    assert web.scheduler.using(tm=tm).get_result(sid)
    is_refused_with_a_second_connection(web, tm)
    assert web.ask(lambda scheduler: scheduler.completed(sid))


@everywhere("RAM beside ZODB, default, retry")
def test_a_second_connection_is_told_from_that_of_a_result_in_ram(web):
    web.make()
    sid = web.do(lambda r: r.scheduler.schedule(give, get_connection(r).root()["thing"]))
    web.wait(sid)
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    thing, _ = web.scheduler.using(tm=tm).get_result(sid)
    thing.name = "changed"
    is_refused_with_a_second_connection(web, tm)
    assert web.read(lambda root: root["thing"].name) == "thing"


def write_beside(request, key):
    """Write as a script does, through a connection that joins the request's transaction."""
    second = get_connection(request).db().open(request.tm)
    request.add_finished_callback(lambda request: second.close())
    second.root()["beside"] = key


def write_beside_the_record(key):
    job = current_job()
    write_beside(job.request, key)
    if job.cursor is None and key == "checkpoint":
        job.checkpoint(1)


@pytest.mark.parametrize("key", ["end", "checkpoint"])
@everywhere("ZODB, default, once", "two ZODBs, explicit, retry")
def test_job_that_writes_through_a_second_connection_fails_and_blocks_nobody(web, key):
    """It would hang in its commit, which writes the record too, and with it all that write."""
    assert isinstance(web.fails(write_beside_the_record, key), TwoConnections)
    assert web.read(lambda root: "beside" not in root)
    assert web.run(add, 1, 2) == 3


@everywhere("ZODB, default, once", "two ZODBs, explicit, retry")
def test_view_that_writes_through_a_second_connection_and_schedules_fails(web, key):
    def view(request):
        write_beside(request, key)
        return request.scheduler.schedule(note, key)

    with pytest.raises(TwoConnections):
        web.do(view)
    assert web.read(lambda root: "beside" not in root)
    assert web.run(add, 1, 2) == 3


@everywhere("ZODB, default, once", "two ZODBs, explicit, retry")
def test_sql_of_a_view_that_schedules_is_sent_before_the_commit_locks_the_database(web, key):
    locked, lock = [], web.databases[""].storage._commit_lock

    def view(request):
        request.tm.get().join(SqlSession(lambda: locked.append(lock.locked())))
        return request.scheduler.schedule(note, key)

    web.wait(web.do(view))
    assert locked[0] is False


@with_zodb
def test_a_second_connection_that_reads_harms_nothing(web, key):
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    sid = web.scheduler.using(tm=tm).schedule(note, key)
    second = web.databases[""].open(tm)
    dict(second.root())
    tm.commit()
    second.close()
    web.wait(sid)


@with_zodb
def test_a_connection_that_was_open_before_is_used(web, key):
    tm = transaction.TransactionManager(explicit=True)
    connection = web.databases[""].open(tm)
    tm.begin()
    connection.root()["written"] = True
    sid = web.scheduler.using(tm=tm).schedule(note, key)
    tm.commit()
    connection.close()
    web.wait(sid)


@with_zodb
def test_a_historical_connection_that_was_open_before_is_not_used(web, key):
    """It knows nothing of later jobs, and stores none."""
    database = web.databases[""]
    with database.transaction() as connection:
        connection.root()["later"] = True
    tm = transaction.TransactionManager(explicit=True)
    past = database.open(tm, before=database.lastTransaction())
    with tm:
        sid = web.scheduler.using(tm=tm).schedule(note, key)
        assert "later" not in past.root()
    past.close()
    web.wait(sid)


@with_zodb
def test_database_closes_after_an_explicit_manager_was_used(web):
    tm = transaction.TransactionManager(explicit=True)
    with tm:
        web.scheduler.using(tm=tm).completed("0" * 32)
    web.executor.stop(2)
    web.databases[""].close()


@pytest.fixture
def run_in_ram():
    """A function that runs a job without Pyramid, in RAM, and returns its value."""
    scheduler, ended = TransactionalScheduler(), Events()
    scheduler.worker.notify = lambda sid, status: status in FINAL and ended[sid].set()

    def run(*args):
        sid = scheduler.schedule(*args)
        transaction.commit()
        assert ended[sid].wait(10), scheduler.status(sid)
        value, _ = scheduler.get_result(sid)
        transaction.commit()
        return value

    yield run
    transaction.abort()
    scheduler.stop()


@contextmanager
def thing_of_a_database(name):
    database = ZODB.DB(MappingStorage())
    connection = database.open()
    thing = connection.root()["thing"] = Thing(name)
    transaction.commit()
    yield thing
    connection.close()
    database.close()


def test_scheduler_in_ram_goes_on_without_a_database_that_was_closed(run_in_ram):
    with thing_of_a_database("first") as thing:
        assert run_in_ram(Thing.method, thing) == "first"
    assert run_in_ram(give, 1) == 1


bare_and_in_a_context = pytest.mark.parametrize(
    ("f", "wrap"),
    [(Thing.method, lambda thing: thing), (lambda context: context[0].name, PersistentContext)],
    ids=["object", "context"],
)


@bare_and_in_a_context
def test_scheduler_in_ram_goes_from_a_closed_database_to_another(run_in_ram, f, wrap):
    for name in ("first", "second"):
        with thing_of_a_database(name) as thing:
            assert run_in_ram(f, wrap(thing)) == name


@bare_and_in_a_context
def test_scheduler_in_ram_refuses_another_database_beside_its_own(run_in_ram, f, wrap):
    with thing_of_a_database("first") as thing, thing_of_a_database("second") as foreign:
        assert run_in_ram(f, wrap(thing)) == "first"
        with pytest.raises(NotSchedulable, match=r"other databases|none of those"):
            run_in_ram(f, wrap(foreign))
        transaction.abort()
        assert run_in_ram(f, wrap(thing)) == "first"


def test_work_of_transact_is_repeated_after_a_conflict(zodb):
    left = [2]

    def work(scheduler):
        if left[0]:
            left[0] -= 1
            raise ConflictError
        return scheduler.schedule(add, 1, 2)

    assert zodb.outcome(zodb.scheduler.transact(work)) == (3, None)


# -- configuration -------------------------------------------------------------------------


def configured(settings=(), *includes):
    with Configurator(settings=dict(settings)) as config:
        for name in includes:
            config.include(name)
    return config.registry.getUtility(IScheduler)


MEMORY = {"zodbconn.uri": "memory://configured"}


@pytest.mark.parametrize(
    "includes",
    [("pyramid_zodbconn", "pyramid_async"), ("pyramid_async", "pyramid_zodbconn")],
)
def test_store_is_the_zodb_where_there_is_one(includes):
    scheduler = configured(MEMORY, *includes)
    assert type(scheduler.store).__name__ == "ZodbStore"
    scheduler.store.db.close()


def test_store_is_ram_where_there_is_no_zodb():
    assert type(configured((), "pyramid_async").store).__name__ == "RamStore"
    assert type(configured({}, "pyramid_zodbconn", "pyramid_async").store).__name__ == "RamStore"


def test_store_that_is_missing_stops_the_start():
    with pytest.raises(ConfigurationError, match=r"async\.store is zodb.*zodbconn\.uri"):
        configured({"async.store": "zodb"}, "pyramid_async")


def test_executor_that_is_set_too_late_stops_the_start():
    with (
        pytest.raises(ConfigurationError, match=r"async\.executor became celery after"),
        Configurator(settings={}) as config,
    ):
        config.include("pyramid_async")
        config.add_settings({"async.executor": "celery"})


def test_configuring_starts_nothing():
    before = threading.active_count()
    configured((), "pyramid_async")
    assert threading.active_count() == before


def test_application_without_the_zodb_starts_no_thread_before_the_first_job():
    with site() as web:
        assert web.executor.threads == []
        web.run(give, 1)
        assert [thread.name for thread in web.executor.threads] == [
            "pyramid_async-worker-1",
            "pyramid_async-worker-2",
        ]


def test_nothing_warns_in_a_life_of_many_jobs(caplog):
    """Pools are sized for all connections that requests, workers and recovery open."""
    with caplog.at_level(logging.WARNING), site(zodb=[""]) as web:
        with gate() as name:
            blocking = [web.schedule(behind_gate, name) for _ in range(2)]
            for _ in range(20):
                web.schedule(fail)
            GATES[name].reach()
        for sid in blocking:
            web.wait(sid)
        web.run(give, 1)
        web.run(give, 1)
    assert [r for r in caplog.records if r.name.startswith("ZODB")] == []


def test_exceptions_of_the_library_survive_the_store(zodb):
    error = zodb.fails(raise_job_failed)
    assert (type(error), str(error)) == (JobFailed, "Name: message")


def raise_job_failed():
    raise JobFailed("Name", "message")
