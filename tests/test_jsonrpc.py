"""JSON-RPC 2.0, through the front door; the numbered examples are its specification's."""

from __future__ import annotations

import json
import pickle
import sys
import weakref
from uuid import uuid4

import pytest
from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.events import NewRequest
from pyramid.httpexceptions import HTTPUnauthorized
from test_http import STATUS_INFO
from transaction.interfaces import TransientError
from webapp import (
    GATES,
    KINDS,
    ORIGIN,
    as_user,
    behind_gate,
    browser,
    echo,
    fail,
    fail_publicly,
    gate,
    kind,
    make_file,
    nested,
    repeat,
    special,
    validate,
)
from webob.request import BaseRequest

from pyramid_async.scheduler import Scheduler
from pyramid_async.testing import manual


def subtract(minuend, subtrahend):
    return minuend - subtrahend


def add_all(*numbers):
    return sum(numbers)


def get_data():
    return ["hello", 5]


def update(*args):
    pass


OPERATIONS = {
    "subtract": subtract,
    "sum": add_all,
    "get_data": get_data,
    "update": update,
    "notify_hello": update,
    "notify_sum": update,
    "echo": echo,
    "behind_gate": behind_gate,
    "fail": fail,
    "fail_publicly": fail_publicly,
    "make_file": make_file,
    "repeat": repeat,
    "special": special,
}


def operations(config):
    for name, f in OPERATIONS.items():
        config.add_operation(name, f, title=f"The operation {name}")
    config.add_operation("restricted", get_data, permission="async.manage")
    config.add_operation("alone", echo, key="alone")
    config.add_operation("forgotten", behind_gate, result_timeout=0)


@pytest.fixture(params=KINDS)
def web(request):
    with kind(request.param, routes=operations) as client:
        yield client


def post(web, body, status=200, headers=None, user=None):
    body = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json", **(headers or {}), **as_user(user)}
    return web.post("/async/rpc", body, headers=headers, status=status)


def call(web, method, *args, user=None, **kw):
    """Call one method; return its result, or its error."""
    request = {"jsonrpc": "2.0", "method": method, "params": kw or args, "id": 1}
    answer = post(web, request, user=user).json
    assert answer.keys() in ({"jsonrpc", "id", "result"}, {"jsonrpc", "id", "error"})
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", 1)
    return answer.get("result", answer.get("error"))


def value_of(web, document):
    """Return the value of a job that an answer told of."""
    validate(document, STATUS_INFO)
    return web.done(document["links"][0]["href"])["result"]


# -- the fifteen examples of the specification ---------------------------------------------


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', 19),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}', -19),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42},'
         ' "id": 3}', 19),
        ('{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23},'
         ' "id": 4}', 19),
    ],
)  # fmt: skip
def test_examples_1_to_4_positional_and_named_parameters(web, request_, value):
    response = post(web, request_)
    assert response.content_type == "application/json"
    assert response.json.keys() == {"jsonrpc", "result", "id"}
    assert response.json["id"] == json.loads(request_)["id"]
    assert response.json["result"]["processID"] == "subtract"
    assert response.json["result"]["title"] == "The operation subtract"
    assert value_of(web, response.json["result"]) == value


@pytest.mark.parametrize(
    ("request_", "jobs"),
    [
        ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', 1),
        ('{"jsonrpc": "2.0", "method": "foobar"}', 0),
    ],
)
def test_examples_5_and_6_notifications(web, request_, jobs):
    response = post(web, request_, status=204)
    assert response.body == b""
    assert web.number_of_jobs() == jobs


NOT_FOUND = {"code": -32601, "message": "Method not found"}
PARSE_ERROR = {"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": None}
INVALID = {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": None}


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
         {"jsonrpc": "2.0", "error": NOT_FOUND, "id": "1"}),
        ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', PARSE_ERROR),
        ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', INVALID),
        ('[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
         '{"jsonrpc": "2.0", "method"]', PARSE_ERROR),
        ("[]", INVALID),
        ("[1]", [INVALID]),
        ("[1,2,3]", [INVALID, INVALID, INVALID]),
    ],
)  # fmt: skip
def test_examples_7_to_13_errors(web, request_, answer):
    assert post(web, request_).json == answer
    assert web.number_of_jobs() == 0


def test_example_14_batch(web):
    answers = post(
        web,
        """[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
        ]""",
    ).json
    assert [answer["id"] for answer in answers] == ["1", "2", None, "5", "9"]
    values = [value_of(web, answers[i]["result"]) for i in (0, 1, 4)]
    assert values == [7, 19, ["hello", 5]]
    assert answers[2] == INVALID
    assert answers[3]["error"] == NOT_FOUND
    assert web.number_of_jobs() == 4


def test_example_15_batch_of_notifications(web):
    response = post(
        web,
        """[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
        ]""",
        status=204,
    )
    assert response.body == b""
    assert web.number_of_jobs() == 2


# -- requests that are none ------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"\xef\xbb\xbf{}",
        '{"jsonrpc": "2.0"}'.encode("utf-16"),
        b"nan",
        b'{"jsonrpc": "2.0", "method": "echo", "params": [NaN], "id": 1}',
        b'{"jsonrpc": "2.0", "method": "echo", "params": [-Infinity], "id": 1}',
        b'{"jsonrpc": "2.0", "method": "echo", "params": [1e999], "id": 1}',
        b'{"jsonrpc": "2.0", "method": "echo", "params": [' + b"9" * 5000 + b'], "id": 1}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_a_parse_error(body):
    with browser(routes=operations) as web:
        assert post(web, body).json == PARSE_ERROR


@pytest.mark.parametrize(
    "request_",
    [
        1,
        '"text"',
        None,
        {},
        {"method": "echo", "id": 1},
        {"jsonrpc": 2.0, "method": "echo", "id": 1},
        {"jsonrpc": "1.0", "method": "echo", "id": 1},
        {"jsonrpc": "2.0", "id": 1},
        {"jsonrpc": "2.0", "method": None, "id": 1},
        {"jsonrpc": "2.0", "method": ["echo"], "id": 1},
        {"jsonrpc": "2.0", "method": "echo", "params": None, "id": 1},
        {"jsonrpc": "2.0", "method": "echo", "params": 1, "id": 1},
        {"jsonrpc": "2.0", "method": "echo", "id": True},
        {"jsonrpc": "2.0", "method": "echo", "id": [1]},
        {"jsonrpc": "2.0", "method": "echo", "id": {}},
    ],
)
def test_what_is_no_request_object_is_invalid(request_):
    with browser(routes=operations) as web:
        assert post(web, request_).json == INVALID
        assert web.number_of_jobs() == 0


@pytest.mark.parametrize("id_", [0, -1, 1.5, "", "\ud800", 10**400, None])
def test_id_comes_back_as_it_was(id_):
    with browser(routes=operations) as web:
        answer = post(web, {"jsonrpc": "2.0", "method": "foobar", "id": id_}).json
        assert answer == {"jsonrpc": "2.0", "error": NOT_FOUND, "id": id_}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("subtract", []),
        ("subtract", [1, 2, 3]),
        ("subtract", {"minuend": 1}),
        ("subtract", {"minuend": 1, "subtrahend": 1, "x": 1}),
        ("async.status", []),
        ("async.status", [1]),
        ("async.status", [["x"]]),
        ("async.status", {"sid": "x"}),
        ("async.result", {"jobID": None}),
        ("async.cancel", ["x", "y"]),
    ],
)
def test_parameters_that_do_not_fit_are_invalid(method, params):
    with browser(routes=operations) as web:
        answer = post(web, {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).json
        assert answer["error"] == {"code": -32602, "message": "Invalid params"}
        assert web.number_of_jobs() == 0


def too_deep():
    """Return what JSON can hold and a pickle cannot; how deep that is differs between Pythons."""
    for depth in (600, 1_000, 5_500, 50_000):
        try:
            pickle.dumps(nested(depth))
        except RecursionError:
            return nested(depth)
    raise AssertionError("this Python pickles anything")


def test_parameters_that_cannot_be_stored_are_invalid(web, monkeypatch):
    # A longer body goes to a file that WebOb does not close.
    monkeypatch.setattr(BaseRequest, "request_body_tempfile_limit", 1_000_000)
    assert call(web, "echo", too_deep())["code"] == -32602
    assert web.number_of_jobs() == 0


@pytest.mark.parametrize(
    "name", ["", "__init__", "rpc.discover", "async", "async.jobs", "schedule", "webapp:echo"]
)
def test_only_what_is_registered_can_be_called(name):
    with browser(routes=operations) as web:
        assert call(web, name) == NOT_FOUND


def test_functions_that_are_positional_only_or_tell_no_signature_can_be_operations():
    def routes(config):
        operations(config)
        config.add_operation("dict", dict)

    with browser({"async.store": "ram"}, routes=routes) as web:
        assert value_of(web, call(web, "dict", a=1)) == {"a": 1}


@pytest.mark.skipif(sys.version_info < (3, 14), reason="evaluates annotations at once")
def test_annotations_of_an_operation_may_name_what_only_type_checkers_import():
    names = {}
    source = "def double(amount: OnlyForTypeCheckers): return 2 * amount"
    exec(compile(source, "operations", "exec", dont_inherit=True), names)

    def routes(config):
        config.add_operation("double", names["double"])

    with browser({"async.store": "ram"}, routes=routes) as web:
        assert value_of(web, call(web, "double", amount=21)) == 42
        assert call(web, "double")["code"] == -32602


# -- HTTP --------------------------------------------------------------------------------------


def test_request_of_another_media_type_is_415():
    with browser(routes=operations) as web:
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "text/json", ""):
            response = post(web, "{}", status=415, headers={"Content-Type": media_type})
            assert response.content_type == "application/problem+json"
        for media_type in ("application/json; charset=utf-8", "Application/JSON-RPC"):
            post(web, "{}", headers={"Content-Type": media_type})


def test_other_methods_are_405(web):
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        response = web.request("/async/rpc", method=method, status=405)
        assert response.headers["Allow"] == "POST, OPTIONS"


def test_large_body_is_413():
    with browser(routes=operations) as web:
        largest = "1".rjust(1024 * 1024)
        assert post(web, largest).json == INVALID
        response = post(web, largest + " ", status=413)
        assert response.content_type == "application/problem+json"


def test_body_of_unknown_length_is_413_when_it_is_large():
    with browser(routes=operations) as web:
        environ = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
        request = web.app.request_factory.blank(
            "/async/rpc", method="POST", content_type="application/json"
        )
        request.body = b" " * (1024 * 1024 + 1)
        request.environ.update(environ)
        assert request.get_response(web.app).status_code == 413


def test_batch_has_fifty_calls_at_most():
    with browser(routes=operations) as web:
        one = {"jsonrpc": "2.0", "method": "foobar", "id": 1}
        assert len(post(web, [one] * 50).json) == 50
        assert post(web, [one] * 51).json == INVALID


def test_answers_are_kept_out_of_caches_and_readable_by_listed_origins(web):
    headers = {"Origin": ORIGIN}
    for response in (
        post(web, [], headers=headers),
        post(web, {"jsonrpc": "2.0", "method": "x"}, status=204, headers=headers),
        web.get("/async/rpc", status=405, headers=headers),
    ):
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_csrf_is_checked_as_the_application_has_it():
    def routes(config):
        operations(config)
        config.set_csrf_storage_policy(CookieCSRFStoragePolicy())
        config.set_default_csrf_options(require_csrf=True)

    with browser(routes=routes) as web:
        response = post(web, {"jsonrpc": "2.0", "method": "echo"}, status=400)
        assert response.content_type == "application/problem+json"
        assert web.number_of_jobs() == 0


def leave_rpc_out(request):
    return request.path != "/async/rpc"


@pytest.mark.parametrize("name", KINDS)
def test_without_a_transaction_it_is_a_500_and_no_job_is_promised(name, caplog):
    hook = {"tm.activate_hook": "test_jsonrpc.leave_rpc_out"}
    with kind(name, hook, routes=operations) as web:
        response = post(web, {"jsonrpc": "2.0", "method": "echo", "id": 1}, status=500)
        assert response.content_type == "application/problem+json"
        assert response.json["errorID"] in caplog.text
        assert "tm.activate_hook" in caplog.text
        assert web.number_of_jobs() == 0


# -- jobs ----------------------------------------------------------------------------------------


def test_status_is_the_document_in_every_state(web, at_gate):
    started = call(web, "behind_gate", at_gate, "x")
    assert started["status"] == "accepted"
    GATES[at_gate].reach()
    sid = started["jobID"]
    assert call(web, "async.status", jobID=sid)["status"] == "running"
    GATES[at_gate].opened.set()
    url = started["links"][0]["href"]
    web.done(url)
    document = call(web, "async.status", sid)
    assert document["result"] == "x"
    assert document == web.get(url).json
    failed = call(web, "fail", "secret")
    web.done(failed["links"][0]["href"])
    document = call(web, "async.status", failed["jobID"])
    assert document["status"] == "failed"
    assert "secret" not in json.dumps(document)
    validate(document, STATUS_INFO)


def test_result_is_the_bare_value(web):
    for value in ({"a": [1, None]}, None, "x"):
        started = call(web, "echo", value)
        assert value_of(web, started) == value
        assert call(web, "async.result", started["jobID"]) == value
        # It is kept.
        assert call(web, "async.result", started["jobID"]) == value


def test_result_that_is_not_there_is_an_error_that_says_why(web, at_gate):
    started = call(web, "behind_gate", at_gate)
    GATES[at_gate].reach()
    error = call(web, "async.result", started["jobID"])
    assert error == {
        "code": -32003,
        "message": "No result",
        "data": {"status": "running", "retryAfter": 1},
    }
    call(web, "async.cancel", started["jobID"])
    error = call(web, "async.result", started["jobID"])
    assert error["data"] == {"status": "dismissed"}
    failed = call(web, "fail_publicly", "No table.")
    web.done(failed["links"][0]["href"])
    error = call(web, "async.result", failed["jobID"])
    assert error["code"] == -32003
    assert error["data"]["detail"] == "No table."


@pytest.mark.parametrize(("method", "params"), [("make_file", ["x"]), ("special", ["nan"])])
def test_result_that_is_not_json_is_linked(web, method, params):
    started = call(web, method, *params)
    url = started["links"][0]["href"]
    web.done(url)
    error = call(web, "async.result", started["jobID"])
    assert error["code"] == -32003
    assert error["data"]["links"][-1]["href"] == url + "/results"


def test_batch_does_not_multiply_a_large_result(web):
    """One request of 4 KB could make an answer of 50 times any result, all of it in memory."""
    large = call(web, "repeat", "x", 700_000)["jobID"]
    small = call(web, "echo", 1)
    value_of(web, small)
    web.done(f"/async/{large}")
    batch = [
        {"jsonrpc": "2.0", "method": "async.result", "params": [jobID], "id": 1}
        for jobID in [large] * 4 + [small["jobID"]]
    ]
    *given, third, fourth, last = post(web, batch).json
    assert [len(each["result"]) for each in given] == [700_000] * 2
    for answer, jobID in ((third, large), (fourth, large), (last, small["jobID"])):
        assert answer["error"]["code"] == -32003
        assert answer["error"]["data"]["links"][-1]["href"].endswith(f"/async/{jobID}/results")
    assert call(web, "async.result", small["jobID"]) == 1


def test_batch_does_not_read_a_large_result_again_that_is_no_json(web):
    """It takes as long as if it were, and longer for each call."""
    large = call(web, "special", "large")["jobID"]
    small = call(web, "echo", 1)
    value_of(web, small)
    web.done(f"/async/{large}")
    batch = [
        {"jsonrpc": "2.0", "method": "async.result", "params": [jobID], "id": 1}
        for jobID in (large, small["jobID"])
    ]
    for answer, call_ in zip(post(web, batch).json, batch, strict=True):
        assert answer["error"]["code"] == -32003
        [jobID] = call_["params"]
        assert answer["error"]["data"]["links"][-1]["href"].endswith(f"/async/{jobID}/results")


def test_cancel_dismisses_the_job_and_leaves_a_finished_one_alone(web, at_gate):
    started = call(web, "behind_gate", at_gate)
    GATES[at_gate].reach()
    assert call(web, "async.cancel", jobID=started["jobID"])["status"] == "dismissed"
    assert web.get(started["links"][0]["href"]).json["status"] == "dismissed"
    started = call(web, "echo", 1)
    value_of(web, started)
    assert call(web, "async.cancel", started["jobID"])["status"] == "successful"
    assert call(web, "async.status", started["jobID"])["result"] == 1


def test_cancel_dismisses_a_job_that_is_kept_for_no_time(web, at_gate):
    GATES[at_gate].opened.set()
    with manual(web.app.registry) as executor:
        sid = call(web, "forgotten", at_gate)["jobID"]
        document = call(web, "async.cancel", sid)
        validate(document, STATUS_INFO)
        assert (document["jobID"], document["status"]) == (sid, "dismissed")
        executor.drain()
    assert not GATES[at_gate].reached.is_set()
    assert call(web, "async.status", sid)["code"] == -32001


def test_no_such_job_is_the_same_for_an_unknown_and_a_foreign_one(web):
    started = call(web, "echo", 1, user="alice")
    web.done(started["links"][0]["href"], "alice")
    for method in ("async.status", "async.result", "async.cancel"):
        errors = [
            call(web, method, sid, user=user)
            for sid, user in [
                (started["jobID"], "bob"),
                (started["jobID"], None),
                (uuid4().hex, "bob"),
                ("", "bob"),
            ]
        ]
        assert errors == [{"code": -32001, "message": "No such job"}] * 4
        for user in ("alice", "admin"):
            assert "code" not in json.dumps(call(web, method, started["jobID"], user=user))


def test_nobody_cancels_the_job_of_another(web, at_gate):
    started = call(web, "behind_gate", at_gate, user="alice")
    GATES[at_gate].reach()
    for user in ("bob", None):
        assert call(web, "async.cancel", started["jobID"], user=user)["code"] == -32001
    GATES[at_gate].opened.set()
    document = web.done(started["links"][0]["href"], "alice")
    assert document["status"] == "successful"


def test_operations_of_one_function_are_told_by_the_name_that_was_called(web):
    for name in ("update", "notify_hello", "notify_sum"):
        started = call(web, name)
        assert started["processID"] == name
        assert web.done(started["links"][0]["href"])["processID"] == name


def test_job_belongs_to_who_started_it(web):
    started = call(web, "echo", 1, user="alice")
    web.get(started["links"][0]["href"], status=404)
    web.get(started["links"][0]["href"], headers=as_user("alice"), status=200)


def test_operation_with_a_permission_is_started_by_its_holders_alone(web):
    for user in (None, "alice"):
        assert call(web, "restricted", user=user) == {"code": -32004, "message": "Forbidden"}
    assert web.number_of_jobs() == 0
    assert call(web, "restricted", user="admin")["status"] == "accepted"


class Expired:
    """A policy whose ticket runs out between two questions."""

    def authenticated_userid(self, request):
        return "alice"

    def permits(self, request, context, permission):
        raise HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"})

    identity = remember = forget = None


def test_what_the_policy_raises_is_the_answer_to_the_whole_request():
    def routes(config):
        operations(config)
        config.set_security_policy(Expired())

    with browser(routes=routes, policy=False) as web:
        call = {"jsonrpc": "2.0", "method": "restricted", "id": 1}
        response = post(web, [call, call], status=401)
        assert response.content_type == "application/problem+json"
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_key_of_an_operation_shows_nobody_the_job_of_another(web, at_gate, monkeypatch):
    with gate() as blocker:
        busy = [call(web, "behind_gate", blocker) for _ in range(2)]
        assert len(busy) == 2
        mine = call(web, "alone", 1, user="alice")
        assert call(web, "alone", 1, user="alice")["jobID"] == mine["jobID"]
        error = call(web, "alone", 1, user="bob")
        assert (error["code"], error["data"]) == (-32002, {"retryAfter": 5})
        GATES[blocker].opened.set()


# -- all or none ---------------------------------------------------------------------------------


def batch(*methods):
    calls = [
        {"jsonrpc": "2.0", "method": method, "params": params, "id": number}
        for number, (method, *params) in enumerate(methods)
    ]
    return [*calls, {"jsonrpc": "2.0", "method": "update"}, 1]


def test_full_store_undoes_the_whole_batch():
    with browser({"async.store": "ram", "async.max_pending": "2"}, routes=operations) as web:
        answers = post(web, batch(*[("echo", 1)] * 3)).json
        assert len(answers) == 4
        for number, answer in enumerate(answers[:3]):
            assert answer["id"] == number
            assert answer["error"]["code"] == -32002
            assert answer["error"]["data"] == {"retryAfter": 5}
        assert answers[3] == INVALID
        assert web.number_of_jobs() == 0
        assert value_of(web, call(web, "echo", 1)) == 1


def test_defect_undoes_the_whole_batch_and_tells_an_id_alone(web, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("the secret")

    monkeypatch.setattr(Scheduler, "dismiss", broken)
    started = call(web, "echo", 1)
    value_of(web, started)
    response = post(web, batch(("echo", 1), ("async.cancel", started["jobID"])))
    monkeypatch.undo()
    assert "secret" not in response.text
    for answer in response.json[:2]:
        assert answer["error"]["code"] == -32603
        assert answer["error"]["data"]["errorID"] in caplog.text
    assert web.number_of_jobs() == 1


def test_conflict_makes_all_jobs_of_a_batch_once_or_none(web, monkeypatch):
    dismiss, attempts = Scheduler.dismiss, []

    def conflict_once(scheduler, sid):
        attempts.append(sid)
        if len(attempts) == 1:
            raise TransientError("conflict")
        return dismiss(scheduler, sid)

    started = call(web, "echo", 1)
    value_of(web, started)
    monkeypatch.setattr(Scheduler, "dismiss", conflict_once)
    answer = post(web, batch(("echo", 1), ("async.cancel", started["jobID"])), status="*")
    if answer.status_code == 503:
        assert answer.headers["Retry-After"] == "1"
        assert web.number_of_jobs() == 1
    else:  # pyramid_retry ran the request again
        assert len(attempts) == 2
        assert answer.json[0]["result"]["processID"] == "echo"
        assert web.number_of_jobs() == 3


def test_jobs_of_a_batch_start_after_its_commit(web):
    answers = post(web, batch(*[("echo", number) for number in range(20)])).json
    values = [value_of(web, answer["result"]) for answer in answers[:20]]
    assert values == list(range(20))


# -- memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ask", [lambda web: web.start(echo), lambda web: call(web, "echo", 1)])
def test_request_that_starts_a_job_goes_without_the_garbage_collector(name, ask, uncollected):
    requests = []

    def note(event):
        requests.append(weakref.ref(event.request))

    def routes(config):
        operations(config)
        config.add_subscriber(note, NewRequest)

    with kind(name, routes=routes) as web:
        ask(web)
        assert [request() for request in requests] == [None]
