"""Every state of a job × every method × whoever asks: the whole answer, with all its headers."""

from __future__ import annotations

import re
from itertools import product

import pytest
from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.httpexceptions import HTTPForbidden, HTTPFound
from webapp import (
    GATES,
    ORIGIN,
    as_user,
    behind_gate,
    browser,
    checking_csrf,
    echo,
    fail,
    gate,
    kind,
    make_file,
    tell,
)

LISTED = {"Origin": ORIGIN}
EXPOSED = (
    "Location, Content-Location, Retry-After, ETag, Link, Preference-Applied, Allow,"
    " WWW-Authenticate"
)
# What every answer carries, to a page of a listed origin.
ALWAYS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Origin",
    "Access-Control-Allow-Origin": ORIGIN,
    "Access-Control-Expose-Headers": EXPOSED,
}
JSON = {"Content-Type": "application/json"}
PROBLEM = {"Content-Type": "application/problem+json"}
TAG = {"ETag": 'W/"n"'}
LATER = {"Retry-After": "1"}
FILE = {"Content-Type": "text/csv", "Content-Disposition": 'attachment; filename="table.csv"'}
ALLOW = {"Allow": "GET, HEAD, DELETE, OPTIONS"}
ALLOW_READING = {"Allow": "GET, HEAD, OPTIONS"}
FOUND = (200, JSON | TAG)
UNFINISHED = (200, JSON | TAG | LATER)
MISSING = (404, PROBLEM)
NOT_READY = (404, PROBLEM | LATER)

STATES = {
    "accepted": "accepted",
    "running": "running",
    "successful": "successful",
    "a file": "successful",
    "nothing": "successful",
    "failed": "failed",
    "dismissed": "dismissed",
    "removed": None,
    "unknown": None,
}
UNDONE = {"accepted", "running"}


def document_of(state):
    if STATES[state] is None:
        return MISSING
    return UNFINISHED if state in UNDONE else FOUND


def known_of(state):
    if STATES[state] is None:
        return MISSING
    return (304, TAG | LATER) if state in UNDONE else (304, TAG)


def results_of(state):
    return {
        "accepted": NOT_READY,
        "running": NOT_READY,
        "successful": (200, JSON),
        "a file": (200, FILE),
        "nothing": (204, {}),
        "failed": (500, PROBLEM),
    }.get(state, MISSING)


def dismissal_of(state):
    return MISSING if STATES[state] is None else (200, JSON)


def cancellation_of(state):
    if STATES[state] is None:
        return MISSING
    return (200, JSON) if state in UNDONE else (409, JSON)


# Method, what follows the job's URL, request headers, and the answer to who may see the job.
# Those that change something come last.
QUESTIONS = {
    "document": ("GET", "", {}, document_of),
    "headers of the document": ("HEAD", "", {}, document_of),
    "known document": ("GET", "", {"If-None-Match": "*"}, known_of),
    "headers of the known document": ("HEAD", "", {"If-None-Match": "*"}, known_of),
    "results": ("GET", "/results", {}, results_of),
    "headers of the results": ("HEAD", "/results", {}, results_of),
    "cancel": ("DELETE", "?only=cancel", {}, cancellation_of),
    "dismiss or remove": ("DELETE", "", {}, dismissal_of),
}
# Whoever asks: the user, the job's owner, whether he may see it.
ASKERS = {
    "owner": ("alice", "alice", True),
    "manager": ("admin", "alice", True),
    "stranger": ("mallory", "alice", False),
    "anonymous": (None, "alice", False),
    "anonymous for nobody's job": (None, None, True),
    "somebody for nobody's job": ("mallory", None, True),
}


def preflight(allow):
    return {
        **allow,
        "Access-Control-Allow-Methods": allow["Allow"],
        "Access-Control-Allow-Headers": (
            "Authorization, Content-Type, If-None-Match, Prefer, X-CSRF-Token"
        ),
        "Access-Control-Max-Age": "7200",
    }


# To everybody, and for every state.
SAME_FOR_ALL = {
    "malformed wait": ("GET", "?wait=x", {}, lambda state: (400, PROBLEM)),
    "malformed only": ("DELETE", "?only=x", {}, lambda state: (400, PROBLEM)),
    "another method": ("PUT", "", {}, lambda state: (405, PROBLEM | ALLOW)),
    "another method for the results": (
        "DELETE", "/results", {}, lambda state: (405, PROBLEM | ALLOW_READING)),
    "options": ("OPTIONS", "", {}, lambda state: (204, preflight(ALLOW))),
    "options of the results": (
        "OPTIONS", "/results", {}, lambda state: (204, preflight(ALLOW_READING))),
}  # fmt: skip


@pytest.fixture(scope="module", params=["zodb-explicit-retry", "ram-default-retry"])
def web(request):
    """A client of an application with either store, for all tests of the module."""
    with kind(request.param) as client:
        client.finished(echo)  # its threads are there before the first test
        yield client


@pytest.fixture
def gates():
    """The names of two gates, which open at the end of the test."""
    with gate() as first, gate() as second:
        yield [first, second]


def job_in(web, state, owner, gates):
    """Bring a job into a state and return its URL."""
    if state == "unknown":
        return "http://localhost/async/0123456789abcdef0123456789abcdef"
    if state == "accepted":
        for name in gates:  # both workers are busy
            web.start(behind_gate, name)
        return web.url(echo, user=owner)
    if state in {"running", "dismissed"}:
        url = web.url(behind_gate, gates[0], user=owner)
        GATES[gates[0]].reach()
        if state == "dismissed":
            web.delete(url, headers=as_user(owner))
        return url
    job, value = {"a file": (make_file, "x"), "failed": (fail, "x"), "nothing": (echo, None)}.get(
        state, (echo, "x")
    )
    url, _ = web.finished(job, value, user=owner)
    if state == "removed":
        web.delete(url, headers=as_user(owner))
    return url


def answer_to(web, url, question, user, origin=ORIGIN):
    method, suffix, headers, _ = {**QUESTIONS, **SAME_FOR_ALL}[question]
    headers = {**headers, **as_user(user), **({"Origin": origin} if origin else {})}
    return web.request(url + suffix, method=method, headers=headers, expect_errors=True)


def headers_of(response):
    """Return all headers, but the numbers that differ from job to job."""
    headers = dict(response.headers)
    assert len(headers) == len(response.headerlist), "a header is there twice"
    headers.pop("Content-Length", None)
    if "ETag" in headers:
        headers["ETag"] = re.sub(r"\d+", "n", headers["ETag"])
    return headers


def check(response, expected):
    status, headers = expected
    assert response.status_code == status
    if response.request.method == "HEAD" or status in {204, 304}:
        assert response.body == b""
    if status == 304 or (status == 204 and "Allow" not in headers):
        assert "Content-Type" not in response.headers
    assert headers_of(response) == ALWAYS | headers


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("state", STATES)
def test_answer_to_every_question_in_every_state(web, gates, state, asker):
    user, owner, may_see = ASKERS[asker]
    url = job_in(web, state, owner, gates)
    for question, (*_, answer) in SAME_FOR_ALL.items():
        expected = answer(state)
        if question == "malformed wait" and not (may_see and STATES[state]):
            expected = MISSING  # before anything else is said of the job
        check(answer_to(web, url, question, user), expected)
    for question, (*_, answer) in QUESTIONS.items():
        if question == "dismiss or remove" and state in UNDONE and may_see:
            state = "dismissed"  # by the question before
        check(answer_to(web, url, question, user), answer(state) if may_see else MISSING)


ORIGINS = (ORIGIN, "https://evil.example.org", None)


def test_not_yours_is_unknown_to_the_byte_in_every_state(web):
    answers = {}
    for state in STATES:
        with gate() as first, gate() as second:
            url = job_in(web, state, "alice", [first, second])
            for user, question, origin in product(("mallory", None), QUESTIONS, ORIGINS):
                response = answer_to(web, url, question, user, origin)
                found = (response.status, tuple(response.headerlist), response.body)
                answers.setdefault((question, origin), set()).add(found)
    assert len(answers) == len(QUESTIONS) * len(ORIGINS)
    for found in answers.values():
        assert [status for status, *_ in found] == ["404 Not Found"]


# -- what answers before the views --------------------------------------------------------


def denying(config):
    """A default permission that nobody has, CSRF checks, and a policy that forbids."""
    config.set_default_permission("nobody has it")
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy())
    config.set_default_csrf_options(require_csrf=True)
    config.add_async_cors("start")
    config.add_async_cors("hello", methods=("GET",))


REFUSALS = [
    ("router: method", "PATCH", "/async/x", 405),
    ("router: method of the list", "DELETE", "/async", 405),
    ("router: method of the calls", "GET", "/async/rpc", 405),
    ("csrf check", "DELETE", "/async/x", 400),
    ("csrf check of the calls", "POST", "/async/rpc", 400),
    ("anonymous list", "GET", "/async", 404),
    ("malformed list", "GET", "/async?limit=x", 400),
    ("unknown", "GET", "/async/x", 404),
    ("a policy that refuses", "GET", "/async/x", 401),
    ("a policy that fails", "GET", "/async/x", 500),
]


@pytest.mark.parametrize("origin", [ORIGIN, "https://evil.example.org", "null", None])
@pytest.mark.parametrize(("why", "method", "path", "status"), REFUSALS)
def test_every_refusal_carries_the_headers_of_its_origin(why, method, path, status, origin):
    user = {401: "expired", 500: "broken"}.get(status)
    headers = {**as_user(user), **({"Origin": origin} if origin else {})}
    with browser(routes=denying) as web:
        response = web.request(path, method=method, headers=headers, status=status)
        assert response.content_type == "application/problem+json", why
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Vary"].split(", ").count("Origin") == 1
        readable = response.headers.get("Access-Control-Allow-Origin")
        assert readable == (ORIGIN if origin == ORIGIN else None)
        exposed = response.headers.get("Access-Control-Expose-Headers")
        assert exposed == (EXPOSED if origin == ORIGIN else None)


@pytest.mark.parametrize("origin", [ORIGIN, None])
def test_refusals_of_the_applications_own_routes_vary_by_origin_too(origin):
    """Where the application has asked for it; its bodies and caches stay its own."""
    headers = {"Origin": origin} if origin else {}
    with browser(routes=denying) as web:
        for path, method, status in [("/hello", "GET", 403), ("/start/echo", "POST", 400)]:
            response = web.request(path, method=method, headers=headers, status=status)
            assert response.headers["Vary"] == "Origin"
            assert response.headers.get("Access-Control-Allow-Origin") == origin
            assert "Cache-Control" not in response.headers


def test_log_in_page_of_the_application_is_not_sent_to_a_client_of_jobs():
    """A forbidden view that redirects is the application's; the job routes stay problems."""

    def routes(config):
        config.add_forbidden_view(lambda request: HTTPFound("/login"))
        config.set_security_policy(Forbidding())

    with browser(routes=routes, policy=False) as web:
        response = web.get("/async/x", headers=LISTED, status=403)
        assert response.content_type == "application/problem+json"
        assert headers_of(response) == ALWAYS | PROBLEM


def test_redirection_by_the_policy_is_left_as_it_is():
    """To the log-in of another server, say: it is the application's, and no error."""

    def routes(config):
        config.set_security_policy(Redirecting())

    with browser(routes=routes, policy=False) as web:
        response = web.get("/async/x", headers=LISTED, status=302)
        assert response.location == "http://localhost/login"
        assert headers_of(response)["Cache-Control"] == "no-store"


class Redirecting:
    """A policy that sends who is not known to a log-in page."""

    def authenticated_userid(self, request):
        raise HTTPFound("/login")

    def permits(self, request, context, permission):
        return True

    identity = remember = forget = None


class Forbidding:
    """A policy that raises what Pyramid would turn into the application's log-in page."""

    def authenticated_userid(self, request):
        raise HTTPForbidden

    def permits(self, request, context, permission):
        raise HTTPForbidden

    identity = remember = forget = None


# -- start, list and calls: who asks ------------------------------------------------------


@pytest.mark.parametrize("user", [None, "alice"])
def test_start_carries_every_header(web, user):
    response = web.post_json("/start/echo", {}, headers=as_user(user), status=202)
    url = response.json["links"][0]["href"]
    expected = (
        JSON
        | LATER
        | {
            "Location": url,
            "Content-Location": url,
            "Link": f'<{url}>; rel="monitor"',
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
    )
    assert headers_of(response) == expected


def test_key_of_a_job_shows_nobody_the_job_of_another(web, gates):
    url = web.url(behind_gate, gates[0], user="alice", key="one", title="secret")
    body = {"args": [gates[0]], "options": {"key": "one"}}
    for user in ("mallory", None):
        response = web.post_json("/start/behind_gate", body, headers=as_user(user), status=503)
        assert int(response.headers["Retry-After"]) >= 1
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert url[-32:] not in response
        assert "secret" not in response
    for user in ("alice", "admin"):
        again = web.post_json("/start/behind_gate", body, headers=as_user(user), status=202)
        assert again.location == url


@pytest.mark.parametrize(
    ("user", "status"), [("alice", 200), ("admin", 200), ("mallory", 200), (None, 404)]
)
def test_list_is_the_askers_own(web, user, status):
    url, _ = web.finished(echo, user="alice")
    for method in ("GET", "HEAD"):
        headers = {**LISTED, **as_user(user)}
        response = web.request("/async", method=method, headers=headers, status=status)
        assert headers_of(response) == ALWAYS | (JSON if status == 200 else PROBLEM)
    if status == 200:
        found = web.get("/async?limit=100", headers=as_user(user)).json["jobs"]
        assert (url[-32:] in {job["jobID"] for job in found}) is (user == "alice")


def call(web, method, sid, user):
    body = {"jsonrpc": "2.0", "method": f"async.{method}", "params": [sid], "id": 1}
    headers = {**LISTED, **as_user(user)}
    return web.post_json("/async/rpc", body, headers=headers, status=200)


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize("state", ["running", "successful", "failed", "dismissed", "removed"])
def test_calls_tell_whoever_may_see_the_job_and_nobody_else(web, gates, state, asker):
    user, owner, may_see = ASKERS[asker]
    url = job_in(web, state, owner, gates)
    for method in ("status", "result", "cancel"):
        response = call(web, method, url[-32:], user)
        assert headers_of(response) == ALWAYS | JSON
        if may_see and STATES[state]:
            assert response.json.get("error", {}).get("code") != -32001
        else:
            assert response.json["error"] == {"code": -32001, "message": "No such job"}
            assert response.body == call(web, method, "0" * 32, user).body


# -- what a stranger may try --------------------------------------------------------------


@pytest.mark.parametrize("place", ["header", "body"])
@pytest.mark.parametrize("token", ["right", "wrong", None])
def test_removal_wants_the_csrf_token_in_a_header_or_the_body(place, token):
    with browser(routes=checking_csrf) as web:
        sid = web.scheduler.transact(lambda scheduler: scheduler.schedule(echo))
        web.delete(f"/async/{sid}", status=400)  # sets the cookie
        web.get(f"/async/{sid}?wait=5")
        sent = {"right": web.cookies.get("csrf_token"), "wrong": "x" * 40, None: ""}[token]
        more = {"headers": {"X-CSRF-Token": sent}} if place == "header" else {}
        if place == "body":
            more["params"] = {"csrf_token": sent}
        response = web.delete(f"/async/{sid}", **more, status=200 if token == "right" else 400)
        assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "application/xhtml+xml"])
def test_file_that_a_browser_would_run_is_neither_shown_nor_guessed_at(web, media_type):
    url, _ = web.finished(make_file, "<script>alert(1)</script>", media_type, "x.html")
    response = web.get(url + "/results", status=200)
    assert response.headers["Content-Type"].startswith(media_type)
    assert response.headers["Content-Disposition"].startswith("attachment")
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_result_that_is_markup_stays_json(web):
    url, _ = web.finished(echo, "<script>alert(1)</script>")
    for target in (url, url + "/results"):
        response = web.get(target)
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_line_breaks_of_a_job_reach_no_header(web, gates):
    text = "x\r\nSet-Cookie: evil=1\r\n\r\n<script>"
    url = web.url(tell, gates[0], 1, 2, text, title=text)
    GATES[gates[0]].reach()
    for response in (web.get(url), web.delete(url), web.get(url + "/results", status=404)):
        assert not any("evil" in value for value in response.headers.values())
        assert "Set-Cookie" not in response.headers


def test_line_breaks_of_a_path_forge_no_line_of_the_log(web, caplog):
    web.get("/async/x%0AERROR%20forged", headers=as_user("broken"), status=500)
    assert caplog.records
    for record in caplog.records:
        assert "\n" not in record.getMessage()


def test_host_of_the_request_is_in_no_header_of_a_refusal(web):
    for path in ("/async/x", "/async/x/results"):
        response = web.get(path, extra_environ={"HTTP_HOST": "evil.example.org"}, status=404)
        assert "evil" not in str(response)
