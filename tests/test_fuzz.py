"""Input that nobody foresaw: no 500, no slow answer, no growth."""

from __future__ import annotations

import gc
import json
import os
import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pyramid.exceptions import ConfigurationError
from webapp import GATES, ORIGIN, as_user, behind_gate, browser, echo, gate
from webtest import TestRequest

from pyramid_async.cors import Policy
from pyramid_async.jsonrpc import BATCH_LIMIT

# Of a long input that fails: an error of its own would stand in the place of what went wrong.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

SLOW = 1.0  # seconds; no answer may take longer
LONG = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
GROWTH = 16 * 1024  # bytes that 2,400 requests may leave each time; a leak leaves more

# Both runs test the same; the short one is repeatable, the long one is another one every time.
short = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
long = settings(short, max_examples=LONG, derandomize=False, phases=tuple(Phase))


@pytest.fixture(scope="module")
def web():
    """A client of an application whose only wait is a short one, with a job in every place."""

    def routes(config):
        config.add_operation("echo", echo)
        config.add_operation("forbidden", behind_gate, permission="nobody has it")

    # No worker: what is started by accident stays, and is refused when there is too much of it.
    with browser({"async.workers": "0", "async.wait_max": "0.02"}, routes=routes) as client:
        client.running = client.url(echo)[-32:]
        client.mine = client.url(echo, user="alice")[-32:]
        client.tag = client.get(f"/async/{client.running}").headers["ETag"]
        yield client


def ask(web, path, method="GET", **more):
    """Send a request; a 500 or a slow answer fails."""

    def answer():
        request = TestRequest.blank(path, method=method, **more)
        return web.do_request(request, expect_errors=True)

    response = quickly(answer)
    assert response.status_code < 500, response
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    if response.status_code >= 400 and method != "HEAD":
        assert response.content_type == "application/problem+json"
        assert response.json["status"] == response.status_code
    return response


def quickly(call):
    """Return what the call returns.  A busy machine makes one slow, and a bad input each."""
    for _ in range(3):
        begun = time.perf_counter()
        returned = call()
        if time.perf_counter() - begun < SLOW:
            return returned
    pytest.fail(f"slower than {SLOW} s, three times")


# -- what is sent --------------------------------------------------------------------------

# What a server may hand on: header values in Latin-1, without line breaks.
latin = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=60)
numbers = st.one_of(
    st.integers().map(str),
    st.sampled_from(
        ["9" * 5000, "0" * 5000, "-0", "+1", "1e3", "0x1", "٣", "³", " 1", "1_0", "nan", ""]
    ),
)
prefer = st.one_of(
    latin,
    st.builds(
        lambda parts, joint: joint.join(parts),
        st.lists(
            st.one_of(
                latin,
                st.sampled_from(["wait=", 'wait="', "respond-async", ";", ",", "wait", '"', " "]),
                numbers.map("wait={}".format),
            ),
            max_size=9,
        ),
        st.sampled_from(["", ",", ";", ", ", "=", '"']),
    ),
    # Long ones, for expressions that go back and forth.
    st.builds(
        lambda part, times: part * times,
        st.sampled_from(["wait=1,", 'wait="1', "wait = ", " ", ",", "wait=1;", "1", '""', "\t"]),
        st.integers(1, 9000),
    ),
)
texts = st.text(max_size=40)
json_values = scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
for _ in range(3):
    lists = st.lists(json_values, max_size=3)
    json_values = scalars | lists | st.dictionaries(texts, json_values, max_size=3)
methods = st.one_of(
    st.sampled_from(["async.status", "async.result", "async.cancel", "nothing", "rpc.discover"]),
    texts,
)
calls = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2.0, None]),
        "method": methods | json_values,
        "params": json_values | st.fixed_dictionaries({"jobID": json_values}),
        "id": json_values,
    },
)
valid_calls = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": methods, "id": st.integers() | texts},
    optional={"params": json_values | st.fixed_dictionaries({"jobID": texts})},
)
bodies = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    (calls | valid_calls).map(lambda call: json.dumps(call).encode()),
    st.lists(calls | valid_calls, max_size=BATCH_LIMIT + 3).map(lambda b: json.dumps(b).encode()),
    st.builds(
        lambda part, times: part * times,
        st.sampled_from([b"[", b'{"a":', b"1", b'"', b"\\u", b" ", b"[[],", b"-", b"1e", b"\xff"]),
        st.integers(1, 100_000),
    ),
)
queries = st.dictionaries(
    st.sampled_from(["wait", "limit", "cursor", "status", "only", "x"]),
    st.lists(numbers | texts, max_size=3),
    max_size=4,
)
raw_queries = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)
# Without a slash and what ends a path; any byte, percent-encoded.
sids = st.one_of(
    st.binary(min_size=1, max_size=80).filter(lambda sid: is_utf8(sid) and b"/" not in sid),
    st.text(min_size=1, max_size=60).filter(lambda sid: "/" not in sid and "\ud800" not in sid),
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.builds(lambda part, times: part * times, st.sampled_from("a.%é"), st.integers(1, 9000)),
)


def is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def quoted(text):
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return "".join(f"%{byte:02X}" for byte in data)


def query_of(parameters):
    pairs = [(name, value) for name, values in parameters.items() for value in values]
    return "&".join(f"{name}={quoted(value)}" for name, value in pairs)


def environ(value, name):
    """A header as a server hands it on."""
    return {"environ": {name: value}}


# -- the checks --------------------------------------------------------------------------


def check_prefer(web, value):
    response = ask(web, f"/async/{web.running}", **environ(value, "HTTP_PREFER"))
    assert response.status_code == 200


def check_tag(web, value):
    response = ask(web, f"/async/{web.running}", **environ(value, "HTTP_IF_NONE_MATCH"))
    assert response.status_code == (304 if is_tag(web, value) else 200)


def is_tag(web, value):
    return value.strip() == "*" or web.tag.removeprefix("W/") in value


def check_query(web, query):
    for method, path in [
        ("GET", f"/async/{web.running}"),
        ("GET", f"/async/{web.running}/results"),
        ("DELETE", "/async/unknown"),
        ("HEAD", f"/async/{web.running}"),
        ("GET", "/async"),
    ]:
        ask(web, f"{path}?{query}", method, headers=as_user("alice"))


def check_sid(web, sid):
    assume(sid not in {"rpc", "client.js", "openapi.json", "manage", "manage.css"})
    path = f"/async/{quoted(sid)}"
    for method, suffix in [("GET", ""), ("DELETE", ""), ("GET", "/results"), ("HEAD", "")]:
        assert ask(web, path + suffix, method).status_code == 404


def check_body(web, body):
    response = ask(web, "/async/rpc", "POST", body=body, headers=as_json())
    assert response.status_code in {200, 204, 413}
    if response.status_code == 200:
        answers = response.json if isinstance(response.json, list) else [response.json]
        for answer in answers:
            assert answer["jsonrpc"] == "2.0"
            assert ("result" in answer) is not ("error" in answer)
            assert answer.get("error", {}).get("code") != -32603, answer


def as_json():
    return {"Content-Type": "application/json"}


def check_origin(web, origin):
    for method in ("GET", "OPTIONS"):
        asked = {"HTTP_ORIGIN": origin, "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "GET"}
        response = ask(web, f"/async/{web.running}", method, environ=asked)
        allowed = response.headers.get("Access-Control-Allow-Origin")
        assert allowed == (ORIGIN if origin == ORIGIN else None)


def check_preflight(web, names):
    asked = {
        "HTTP_ORIGIN": ORIGIN,
        "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "GET",
        "HTTP_ACCESS_CONTROL_REQUEST_HEADERS": names,
    }
    response = ask(web, f"/async/{web.running}", "OPTIONS", environ=asked)
    assert response.status_code == 204


def check_origins_setting(web, origins):
    """The list of origins: it stops the start, or it means what it says."""
    try:
        policy = quickly(lambda: Policy(origins, credentials=True))
    except ConfigurationError:
        return
    assert not policy.allows(None)
    for origin in origins:
        assert policy.allows(origin)


near_origins = st.one_of(
    latin,
    st.sampled_from([ORIGIN, ORIGIN + "/", ORIGIN.upper(), ORIGIN + ".evil.org", "null", "*", ""]),
    st.builds(lambda part, times: part * times, st.sampled_from("a:/.h"), st.integers(1, 9000)),
)
CHECKS = {
    "prefer": (check_prefer, prefer),
    "if-none-match": (check_tag, prefer),
    "query": (check_query, queries.map(query_of) | raw_queries.map(lambda q: q.replace("#", ""))),
    "sid": (check_sid, sids),
    "body": (check_body, bodies),
    "origin": (check_origin, near_origins),
    "preflight": (check_preflight, prefer),
    "origins": (check_origins_setting, st.lists(near_origins | texts, max_size=4)),
}

# What broke other programs, and is seldom generated.
KNOWN = {
    "query": ["wait=%C2%B3", "wait=%D9%A3", "limit=%C2%B2", "wait=" + "9" * 5000, "cursor=%ff"],
    "body": [b"[" * 100_000, b"1" * 5000, b"1e999", b"NaN", b'"\\ud800"', b"\xff", b"[]"],
}


def fuzz(web, name, how):
    check, values = CHECKS[name]
    for value in KNOWN.get(name, ()):
        check(web, value)

    @how
    @given(value=values)
    def run(value):
        check(web, value)

    run()


@pytest.mark.parametrize("name", CHECKS)
def test_no_input_makes_a_500_or_a_slow_answer(web, name):
    fuzz(web, name, short)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CHECKS)
def test_no_input_makes_a_500_or_a_slow_answer_in_a_long_run(web, name):
    fuzz(web, name, long)


# -- memory ------------------------------------------------------------------------------

# One of a kind, and different every time: what is remembered of each would be seen to grow.
REQUESTS = (
    lambda web, n: ask(web, f"/async/{n:032x}"),
    lambda web, n: ask(web, f"/async/{n:032x}", "DELETE"),
    lambda web, n: ask(web, f"/async/{web.running}?wait=x{n}"),
    lambda web, n: ask(web, f"/async?cursor=x{n}&limit={n}", headers=as_user(f"user {n}")),
    lambda web, n: check_prefer(web, f"wait={n}x, x{n}=y"),
    lambda web, n: check_origin(web, f"https://{n}.example.org"),
    lambda web, n: check_body(web, b'{"jsonrpc":"2.0","method":"x%d","id":%d}' % (n, n)),
    lambda web, n: check_body(web, b"[%d" % n),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_requests_that_come_to_nothing_leave_nothing(web):
    def send(numbers):
        for number in numbers:
            for request in REQUESTS:
                request(web, number)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        used = [send(range(start, start + 300)) for start in range(0, 1500, 300)]
    finally:
        tracemalloc.stop()
    # What fills a cache comes once, a leak every time.
    growth = [after - before for before, after in pairwise(used)]
    assert min(growth) < GROWTH, growth


def test_a_held_request_gives_its_slot_back_whatever_its_header_says():
    with browser({"async.wait_max": "0.01"}) as web, gate() as name:
        url = web.url(behind_gate, name)
        GATES[name].reach()
        for value in ("wait=1", 'wait="1"', "wait=9999999999999", "wait=1, wait=x", "wait=00001"):
            for _ in range(3):
                response = ask(web, url, **environ(value, "HTTP_PREFER"))
                assert response.headers["Preference-Applied"] == "wait=1"
        assert web.app.registry["pyramid_async.slots"].taken == 0
