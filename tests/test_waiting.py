"""Held requests, what they do not hold meanwhile, and dismissal at the last moment."""

from __future__ import annotations

import http.client
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import waitress.server
from pyramid.events import NewRequest
from pyramid.httpexceptions import HTTPServiceUnavailable
from pyramid.request import Request
from pyramid_zodbconn import get_connection
from transaction import TransactionManager
from transaction.interfaces import NoTransaction, TransientError
from waitress import wasyncore
from webapp import (
    EXPLICIT,
    GATES,
    KINDS,
    Barrier,
    Browser,
    Policy,
    as_user,
    behind_gate,
    browser,
    commit_slowly,
    echo,
    gate,
    kind,
    pool_warnings,
    tell_later,
)

from pyramid_async.exits import Exit
from pyramid_async.scheduler import Scheduler
from pyramid_async.zodb import ZodbTable

LONG = "10"  # seconds that no test really waits
BRIEF = {"async.wait_max": "0.1"}


@pytest.fixture(params=KINDS)
def web(request):
    """A client of an application of every kind."""
    with kind(request.param) as client:
        yield client


@pytest.fixture
def elsewhere():
    """Run a function in another thread: a future."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def taken(web):
    return web.app.registry["pyramid_async.slots"].taken


@pytest.fixture
def hold(elsewhere, wait_for):
    """Begin a request that is held, in a thread of its own: a future of its answer."""

    def begin(web, url, headers=None, user=None, **options):
        before = taken(web)
        client = Browser(web.app)
        future = elsewhere(
            client.get, url, headers={**(headers or {}), **as_user(user)}, status="*", **options
        )
        wait_for(lambda: future.done() or taken(web) > before)
        assert not future.done(), future.result()
        return future

    return begin


def at_work(web, name, job=behind_gate, *args):
    """Start a job that stands at its gate now; return its URL."""
    url = web.url(job, name, *args)
    GATES[name].reach()
    return url


def tag_of(web, url):
    return {"If-None-Match": web.get(url).headers["ETag"]}


# -- what ends the wait ------------------------------------------------------------------


def test_process_that_is_told_to_exit_holds_nobody(web, hold, at_gate, monkeypatch):
    """A server waits for its threads; the jobs would be told so much later."""
    monkeypatch.setattr(Exit, "asked", False)
    answer = hold(web, at_work(web, at_gate) + f"?wait={LONG}")
    monkeypatch.setattr(Exit, "asked", True)
    assert answer.result(8).json["status"] == "running"


def visits(config):
    """Count the requests in the database, in the transaction of each."""

    def count(event):
        root = get_connection(event.request).root()
        root["visits"] = root.get("visits", 0) + 1

    config.add_subscriber(count, NewRequest)
    config.add_route("visits", "/visits")
    config.add_view(
        lambda request: get_connection(request).root()["visits"],
        route_name="visits",
        renderer="json",
    )


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("zodb")])
def test_what_the_application_writes_in_a_held_request_stays(name, at_gate):
    with kind(name, BRIEF, routes=visits) as web:
        url = at_work(web, at_gate)
        before = web.get("/visits").json
        for _ in range(3):
            answer = web.get(url + "?wait=1")
            assert answer.headers["Preference-Applied"] == "wait=1"
        assert web.get("/visits").json == before + 4


def nested(config):
    def look(request):
        """Write, look at a job in a subrequest with the same transaction, and fail."""
        get_connection(request).root()["half"] = True
        facts = {name: request.environ[name] for name in ("tm.active", "tm.manager")}
        inner = Request.blank(request.params["path"] + "?wait=1", environ=facts)
        assert request.invoke_subrequest(inner, use_tweens=request.params["tweens"] == "1").json
        raise HTTPServiceUnavailable

    config.add_route("look", "/look")
    config.add_view(look, route_name="look")


@pytest.mark.parametrize("tweens", ["0", "1"])
def test_transaction_of_another_request_is_left_alone(at_gate, tweens):
    with kind("zodb-explicit-retry", BRIEF, routes=nested) as web:
        path = urlsplit(at_work(web, at_gate)).path
        web.get("/look", {"path": path, "tweens": tweens}, status=503)
        [database] = set(web.databases.values())
        with database.transaction() as connection:
            assert "half" not in connection.root()


def test_transaction_of_a_test_is_left_alone(at_gate):
    with kind("zodb-explicit-retry", BRIEF, routes=visits) as web:
        url = at_work(web, at_gate)
        before = web.get("/visits").json
        tm = TransactionManager(explicit=True)
        tm.begin()
        web.get(url + "?wait=1", extra_environ={"tm.active": True, "tm.manager": tm})
        assert web.get("/visits").json == before + 1


def doomed(config):
    visits(config)

    def doom(event):
        if event.request.params.get("doom"):
            event.request.tm.doom()

    config.add_subscriber(doom, NewRequest)


def test_what_is_doomed_in_a_held_request_goes(at_gate):
    with kind("zodb-explicit-retry", BRIEF, routes=doomed) as web:
        url = at_work(web, at_gate)
        before = web.get("/visits").json
        web.get(url + "?wait=1&doom=1", status=200)
        assert web.get("/visits").json == before + 1


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        (f"?wait={LONG}", {}),
        ("", {"Prefer": f"wait={LONG}"}),
        ("", {"Prefer": f'respond-async, WAIT = "{LONG}"; x=y, foo'}),
        ("?wait=1", {"Prefer": f"wait={LONG}"}),
        (f"?wait={LONG}", {"Prefer": "wait=x"}),
        (f"?wait={LONG}", {"Prefer": "wait=-5, waiting=1, await=2"}),
    ],
)
@pytest.mark.parametrize("path", ["", "/results"])
def test_request_is_held_until_the_job_is_done(hold, at_gate, path, query, headers):
    with browser() as web:
        url = at_work(web, at_gate, behind_gate, "value")
        answer = hold(web, url + path + query, headers)
        GATES[at_gate].opened.set()
        response = answer.result()
        assert response.status_code == 200
        assert response.headers["Preference-Applied"] == f"wait={LONG}"
        assert "Retry-After" not in response.headers
        assert (response.json if path else response.json["result"]) == "value"
        assert taken(web) == 0


def test_request_is_held_on_every_kind_of_application(web, hold, at_gate):
    url = at_work(web, at_gate)
    answer = hold(web, f"{url}?wait={LONG}")
    GATES[at_gate].opened.set()
    assert answer.result().json["status"] == "successful"


@pytest.mark.parametrize("manager", [{}, EXPLICIT])
def test_request_is_held_where_pyramid_tm_is_not_active(hold, at_gate, manager):
    hook = {"tm.activate_hook": "test_waiting.activate_tm_to_start"}
    with browser(hook | manager) as web:
        url = at_work(web, at_gate)
        answer = hold(web, f"{url}?wait={LONG}")
        GATES[at_gate].opened.set()
        assert answer.result().json["status"] == "successful"


def activate_tm_to_start(request):
    return request.method == "POST"


def test_with_the_tag_of_the_document_progress_ends_the_wait(web, hold, at_gate):
    with gate() as second:
        url = at_work(web, at_gate, tell_later, second)
        answer = hold(web, f"{url}?wait={LONG}", tag_of(web, url))
        GATES[at_gate].opened.set()
        response = answer.result()
        assert response.status_code == 200
        assert (response.json["status"], response.json["progress"]) == ("running", 50)
        assert response.headers["Preference-Applied"] == f"wait={LONG}"
        assert response.headers["Retry-After"] == "1"


def test_with_another_tag_the_request_is_not_held(web, at_gate):
    url = at_work(web, at_gate)
    response = web.get(f"{url}?wait={LONG}", headers={"If-None-Match": 'W/"1"'}, status=200)
    assert response.json["status"] == "running"
    assert "Preference-Applied" not in response.headers


def test_dismissal_ends_the_wait(web, hold, at_gate):
    url = at_work(web, at_gate)
    answer = hold(web, f"{url}?wait={LONG}", tag_of(web, url))
    web.delete(url)
    assert answer.result().json["status"] == "dismissed"


def test_removal_ends_the_wait_with_404(web, hold, at_gate):
    url = at_work(web, at_gate)
    answers = [hold(web, f"{url}{path}?wait={LONG}") for path in ("", "/results")]
    web.scheduler.transact(lambda scheduler: scheduler.remove(url[-32:]))
    for answer in answers:
        response = answer.result()
        assert response.status_code == 404
        assert "Preference-Applied" not in response.headers


@pytest.mark.parametrize("path", ["", "/results"])
def test_time_ends_the_wait_which_is_cut_to_the_longest_allowed(at_gate, path):
    with browser({"async.wait_max": "1"}) as web:
        url = at_work(web, at_gate)
        begun = time.monotonic()
        response = web.get(f"{url}{path}?wait={'9' * 5000}", status="*")
        assert 1 <= time.monotonic() - begun < 15  # of the 20 s that the gate is shut
        assert response.status_code == (404 if path else 200)
        assert response.headers["Preference-Applied"] == "wait=1"
        assert response.headers["Retry-After"] == "1"


def test_waiter_looks_twice_a_second_while_nothing_happens(at_gate, monkeypatch):
    looks, transact = [], Scheduler.transact

    def counted(scheduler, work):
        looks.append(work)
        return transact(scheduler, work)

    with browser({"async.wait_max": "1"}) as web:
        url = at_work(web, at_gate)
        monkeypatch.setattr(Scheduler, "transact", counted)
        web.get(f"{url}?wait={LONG}")
        assert 3 <= len(looks) <= 5


@pytest.mark.parametrize("header", [None, "*"])
def test_time_ends_the_wait_for_another_document_with_304(at_gate, header):
    with browser(BRIEF) as web:
        url = at_work(web, at_gate)
        headers = {"If-None-Match": header} if header else tag_of(web, url)
        response = web.get(f"{url}?wait={LONG}", headers=headers, status=304)
        assert response.headers["Preference-Applied"] == "wait=1"
        assert response.headers["Retry-After"] == "1"


# -- what is not held ----------------------------------------------------------------------


def test_head_is_not_held(web, at_gate):
    url = at_work(web, at_gate)
    for target in (url, url + "/results"):
        response = web.head(f"{target}?wait={LONG}", status="*")
        assert "Preference-Applied" not in response.headers
        assert response.headers["Retry-After"] == "1"


def test_finished_and_unknown_jobs_are_not_waited_for(web):
    url, _ = web.finished(echo)
    tag = tag_of(web, url)
    slots = web.app.registry["pyramid_async.slots"]
    slots.taken = 99  # whoever would be held is told so by the missing header
    assert web.get(f"{url}?wait={LONG}").json["status"] == "successful"
    web.get(f"{url}?wait={LONG}", headers=tag, status=304)
    web.get(f"/async/unknown?wait={LONG}", status=404)
    slots.taken = 0


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("", {}),
        ("?wait=0", {}),
        ("?wait=000", {}),
        (f"?wait={LONG}", {"Prefer": "wait=0"}),
        ("", {"Prefer": "wait"}),
        ("", {"Prefer": "wait=10.5"}),
        ("", {"Prefer": "nowait=10"}),
        ("", {"Prefer": "x; wait=10"}),
        ("", {"Prefer": 'wait="10'}),
        ("", {"Prefer": 'x="a, wait=10, b"'}),
        ("", {"Prefer": r'x="a\", wait=10, b"'}),
    ],
)
def test_who_does_not_ask_to_wait_is_not_held(at_gate, query, headers):
    with browser() as web:
        url = at_work(web, at_gate)
        assert "Preference-Applied" not in web.get(url + query, headers=headers).headers


def test_who_finds_no_slot_is_answered_at_once(web, hold, at_gate):
    url = at_work(web, at_gate)
    held = [hold(web, f"{url}?wait={LONG}") for _ in range(2)]
    assert taken(web) == 2
    response = web.get(f"{url}?wait={LONG}")
    assert response.json["status"] == "running"
    assert "Preference-Applied" not in response.headers
    assert int(response.headers["Retry-After"]) >= 1
    GATES[at_gate].opened.set()
    assert [answer.result().json["status"] for answer in held] == ["successful"] * 2
    assert taken(web) == 0


def test_without_slots_nobody_is_held(at_gate):
    with browser({"async.wait_slots": "0"}) as web:
        url = at_work(web, at_gate)
        assert "Preference-Applied" not in web.get(f"{url}?wait={LONG}").headers


def test_only_thread_of_a_process_is_not_held(at_gate):
    with browser() as web:
        path = urlsplit(at_work(web, at_gate)).path
        alone = Request.blank(f"{path}?wait={LONG}", {"wsgi.multithread": False})
        answer = alone.get_response(web.app)
        assert "Preference-Applied" not in answer.headers
        assert int(answer.headers["Retry-After"]) >= 1


def test_slot_is_free_again_after_a_failure(web, hold, at_gate, monkeypatch):
    url = at_work(web, at_gate)
    answer = hold(web, f"{url}?wait={LONG}")

    def broken(*args):
        raise RuntimeError("the database is gone")

    monkeypatch.setattr(web.scheduler.store, "table", broken)
    assert answer.result().status_code == 500
    monkeypatch.undo()
    assert taken(web) == 0


# -- what a held request does not hold ---------------------------------------------------


def opened_connections(web):
    """Return how many connections to the database are open."""
    infos = web.databases[""].connectionDebugInfo()
    return sum(info["opened"] is not None for info in infos)


def test_no_connection_is_held_while_waiting(hold, at_gate, wait_for):
    with kind("zodb-explicit-retry") as web:
        url = at_work(web, at_gate)
        working = opened_connections(web)  # the job's own
        hold(web, f"{url}?wait={LONG}", tag_of(web, url))
        hold(web, f"{url}?wait={LONG}")
        # The waiters look twice a second, for less than a millisecond.
        wait_for(lambda: opened_connections(web) == working)
        GATES[at_gate].opened.set()


def has_ended(tm):
    try:
        tm.get()
    except NoTransaction:
        return True


def test_transaction_of_the_security_policy_is_ended_while_waiting(
    hold, at_gate, monkeypatch, wait_for
):
    transactions = []

    def authenticated_userid(policy, request):
        transactions.append(request.tm)
        return as_before(policy, request)

    as_before = Policy.authenticated_userid
    with kind("zodb-explicit-retry") as web:
        with web.databases[""].transaction() as connection:
            connection.root()["user"] = "alice"
        url = web.url(behind_gate, at_gate, user="alice")
        GATES[at_gate].reach()
        monkeypatch.setattr(Policy, "authenticated_userid", authenticated_userid)
        answer = hold(web, f"{url}?wait={LONG}", user="from the database")
        wait_for(lambda: has_ended(transactions[-1]))
        GATES[at_gate].opened.set()
        assert answer.result().json["status"] == "successful"


def test_pool_of_connections_has_room_for_two_of_each_request(caplog, monkeypatch):
    threads = 8
    uri = f"memory://{uuid4().hex}?connection_pool_size={threads}"
    with browser({"async.workers": "0"}, zodb=uri) as web:
        with web.databases[""].transaction() as connection:
            connection.root()["user"] = "alice"
        url, together = web.url(echo, user="alice"), threading.Barrier(threads, timeout=20)
        get = ZodbTable.get
        monkeypatch.setattr(ZodbTable, "get", lambda *what: (together.wait(), get(*what))[1])
        with ThreadPoolExecutor(threads) as pool:
            headers = as_user("from the database")
            asked = [pool.submit(web.get, url, headers=headers) for _ in range(threads)]
        assert {one.result().json["status"] for one in asked} == {"accepted"}
    assert pool_warnings(caplog) == []


# -- clients that leave --------------------------------------------------------------------


def test_wait_ends_when_the_client_has_left(web, hold, at_gate, wait_for):
    url = at_work(web, at_gate)
    left = threading.Event()
    environ = {"waitress.client_disconnected": left.is_set}
    answer = hold(web, f"{url}?wait={LONG}", extra_environ=environ)
    left.set()
    begun = time.monotonic()
    assert answer.result().json["status"] == "running"
    assert time.monotonic() - begun < 8  # of LONG
    assert taken(web) == 0


@contextmanager
def served(web, **options):
    """A real server in a thread: a function that sends a GET and returns the connection."""
    server = waitress.server.create_server(web.app, host="127.0.0.1", port=0, **options)
    thread = threading.Thread(target=server.run, name="waitress")
    thread.start()
    connections = []

    def ask(path):
        connection = http.client.HTTPConnection("127.0.0.1", server.effective_port, timeout=20)
        connections.append(connection)
        connection.request("GET", path)
        return connection

    try:
        yield ask
    finally:
        for connection in connections:
            connection.close()
        server.task_dispatcher.shutdown()
        # In the server's own thread, which would else select from closed sockets.
        server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map))
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_client_that_leaves_a_real_server_frees_its_slot(at_gate, wait_for):
    with kind("zodb-explicit-retry") as web:
        path = at_work(web, at_gate).removeprefix("http://localhost")
        with served(web, threads=3, channel_request_lookahead=1) as ask:
            held = [ask(f"{path}?wait=20") for _ in range(2)]
            wait_for(lambda: taken(web) == 2)
            for connection in held:
                connection.close()
            wait_for(lambda: taken(web) == 0, timeout=15)  # before the 20 s are over


@pytest.mark.slow
def test_other_requests_are_not_delayed_by_held_ones(at_gate, wait_for):
    with kind("zodb-explicit-retry") as web:
        path = at_work(web, at_gate).removeprefix("http://localhost")
        with served(web, threads=4, channel_request_lookahead=1) as ask:
            held = [ask(f"{path}?wait=20") for _ in range(2)]
            wait_for(lambda: taken(web) == 2)
            for _ in range(4):
                answer = ask(f"{path}?wait=20").getresponse()
                assert answer.headers["Preference-Applied"] is None
            answer = ask("/hello").getresponse()
            assert answer.status == 200
            assert taken(web) == 2  # they are still held: nobody waited for them
            GATES[at_gate].opened.set()
            for connection in held:
                assert b'"successful"' in connection.getresponse().read()


# -- dismissal at the last moment ----------------------------------------------------------

# (query, answer when the job was first, answer when the dismissal was first)
QUERIES = [("", 200, 200), ("?only=cancel", 409, 200)]


@pytest.mark.parametrize(("query", "late", "early"), QUERIES)
def test_dismissal_before_the_commit_of_the_job_wins(web, at_gate, query, late, early):
    url = at_work(web, at_gate, commit_slowly, "tpc_begin", "mark")
    response = web.delete(url + query, status=early)
    assert response.json["status"] == "dismissed"
    GATES[at_gate].opened.set()
    web.finished(echo)
    assert web.get(url).json["status"] == "dismissed"
    assert not committed(web, url, "mark")


@pytest.mark.parametrize(("query", "late", "early"), QUERIES)
def test_dismissal_during_the_commit_of_the_job_waits_and_loses(
    web, at_gate, elsewhere, monkeypatch, query, late, early
):
    decided = watch_cancel(monkeypatch)
    # Every storage has voted: nothing can stop this commit any more.
    url = at_work(web, at_gate, commit_slowly, "tpc_vote", "mark", "~~last")
    answer = elsewhere(Browser(web.app).delete, url + query, status="*")
    assert decided.wait(10)
    GATES[at_gate].opened.set()
    response = answer.result()
    assert (response.status_code, response.json["status"]) == (late, "successful")
    assert committed(web, url, "mark")


@pytest.mark.parametrize(("query", "late", "early"), QUERIES)
def test_commit_of_the_job_before_that_of_the_dismissal_wins(
    web, at_gate, monkeypatch, query, late, early
):
    url = at_work(web, at_gate, commit_slowly, "tpc_begin", "mark")

    def let_the_job_commit():
        GATES[at_gate].opened.set()
        web.done(url)

    watch_cancel(monkeypatch, let_the_job_commit)
    response = web.delete(url + query, status=late)
    assert response.json["status"] == "successful"
    assert response.json["result"] == "done"
    assert committed(web, url, "mark")
    web.get(url, status=200 if query else 404)


def watch_cancel(monkeypatch, then=lambda: None):
    """Call *then* after the first cancellation, before its commit; return an event of it."""
    dismiss, happened = Scheduler.dismiss, threading.Event()

    def watched(scheduler, sid):
        done = dismiss(scheduler, sid)
        if not happened.is_set():
            happened.set()
            then()
        return done

    monkeypatch.setattr(Scheduler, "dismiss", watched)
    return happened


def committed(web, url, mark):
    with web.databases[""].transaction() as connection:
        return mark in connection.root()


# -- a commit whose reply is lost ----------------------------------------------------------


@pytest.fixture
def lose_a_reply(monkeypatch):
    """Let the next commit of a view be durable and look failed."""

    def lose(web):
        transact, lost = Scheduler.transact, []

        def unlucky(scheduler, work):
            if getattr(work, "__class__", None).__name__ == "Dismissal" and not lost:
                lost.append(transact(scheduler, work))
            return transact(scheduler, work)

        monkeypatch.setattr(Scheduler, "transact", unlucky)

    return lose


def test_dismissal_whose_reply_was_lost_finds_its_own_work_done(web, at_gate, lose_a_reply):
    url = at_work(web, at_gate)
    lose_a_reply(web)
    assert web.delete(url, status=200).json["status"] == "dismissed"
    assert web.get(url, status=200).json["status"] == "dismissed"


def test_removal_whose_reply_was_lost_finds_its_own_work_done(web, lose_a_reply):
    url, last = web.finished(echo, "value")
    lose_a_reply(web)
    assert web.delete(url, status=200).json == last
    web.get(url, status=404)


def test_removal_that_meets_a_conflict_is_done_again(web, monkeypatch):
    url, last = web.finished(echo, "value")
    remove, met = Scheduler.remove, []

    def remove_and_conflict_once(scheduler, sid):
        remove(scheduler, sid)
        if not met:
            met.append(sid)
            scheduler._tm_in_use().get().join(ConflictAtVote(None, None, "~~last"))

    monkeypatch.setattr(Scheduler, "remove", remove_and_conflict_once)
    assert web.delete(url, status=200).json == last
    assert met == [url[-32:]]
    web.get(url, status=404)


class ConflictAtVote(Barrier):
    def tpc_vote(self, txn):
        raise TransientError("conflict")


def test_conflicts_without_end_are_a_503(web, at_gate, monkeypatch):
    def conflict(scheduler, sid):
        raise TransientError("conflict")

    url = at_work(web, at_gate)
    monkeypatch.setattr(Scheduler, "dismiss", conflict)
    assert web.delete(url, status=503).headers["Retry-After"] == "1"
