"""The HTTP resource of jobs, through the front door."""

from __future__ import annotations

import re
import sqlite3
import time
from base64 import b64encode
from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
import webapp
import ZODB
from pyramid.exceptions import ConfigurationError, URLDecodeError
from pyramid.httpexceptions import (
    HTTPClientError,
    HTTPNotFound,
    HTTPServiceUnavailable,
    HTTPUnauthorized,
)
from pyramid.request import Request
from pyramid.response import Response
from pyramid.security import forget
from pyramid.traversal import _segment_cache, find_resource, find_root
from transaction.interfaces import TransientError
from webapp import (
    GATES,
    KINDS,
    ORIGIN,
    Policy,
    Root,
    application,
    as_user,
    behind_gate,
    browser,
    checking_csrf,
    commit_slowly,
    echo,
    fail,
    fail_publicly,
    gate,
    kind,
    leave_a_mark,
    make_blob,
    make_file,
    nested,
    repeat,
    special,
    tell,
    tell_later,
    validate,
)

from pyramid_async import JobFailed, JobStopped
from pyramid_async.cors import EXPOSED
from pyramid_async.documents import to_json
from pyramid_async.jobs import status_of
from pyramid_async.scheduler import Caller, Scheduler
from pyramid_async.testing import manual

NO_SUCH_JOB = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0/no-such-job"
NOT_READY = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0/result-not-ready"
RESULTS = "http://www.opengis.net/def/rel/ogc/1.0/results"
LISTED = {"Origin": ORIGIN}

# statusInfo of OGC API - Processes 1.0, and what the README promises beyond it.
DATE_TIME = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
}
LINK = {
    "type": "object",
    "required": ["href", "rel", "type"],
    "properties": {
        "href": {"type": "string", "format": "uri", "pattern": "^http://localhost/"},
        "rel": {"enum": ["self", "monitor", RESULTS]},
        "type": {"type": "string"},
    },
}
PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errorID": {"type": "string"},
    },
    "additionalProperties": False,
}
STATUS_INFO = {
    "type": "object",
    "required": ["jobID", "status", "type", "done", "created", "updated", "links"],
    "properties": {
        "processID": {"type": "string"},
        "type": {"enum": ["process"]},
        "jobID": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "status": {"enum": ["accepted", "running", "successful", "failed", "dismissed"]},
        "done": {"type": "boolean"},
        "title": {"type": "string"},
        "message": {"type": "string"},
        "created": DATE_TIME,
        "started": DATE_TIME,
        "finished": DATE_TIME,
        "updated": DATE_TIME,
        "expires": DATE_TIME,
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "retryAfter": {"type": "integer", "minimum": 1, "maximum": 30},
        "result": {},
        "error": PROBLEM,
        "links": {"type": "array", "items": LINK, "minItems": 1},
    },
    "additionalProperties": False,
}


@pytest.fixture(params=KINDS)
def web(request):
    """A client of an application of every kind."""
    with kind(request.param) as client:
        yield client


@pytest.fixture
def ram():
    """A client of an application without any database."""
    with browser({"async.store": "ram"}) as client:
        yield client


@pytest.fixture
def durable():
    with kind("zodb-explicit-retry") as client:
        yield client


def valid(document):
    validate(document, STATUS_INFO)
    rels = [link["rel"] for link in document["links"]]
    done = document["status"] not in {"accepted", "running"}
    assert document["done"] is done
    assert ("retryAfter" in document) is not done
    assert ("monitor" in rels) is not done
    assert ("expires" in document) is done
    assert ("finished" in document) is done
    assert (RESULTS in rels) is (document["status"] == "successful")
    assert ("error" in document) is (document["status"] == "failed")
    assert rels[0] == "self"
    return document


def is_problem(response, type="about:blank"):
    assert response.content_type == "application/problem+json"
    validate(response.json, PROBLEM)
    assert response.json["status"] == response.status_code
    assert response.json["type"] == type
    return response.json


def running(web, url, name):
    """Wait until the job stands at its gate."""
    GATES[name].reach()
    assert web.get(url).json["status"] == "running"
    return url


# -- start -----------------------------------------------------------------------------


def test_start_answers_202_with_the_document_and_where_to_look(web, at_gate):
    response = web.start(behind_gate, at_gate, title="Nightly report")
    url = response.headers["Location"]
    assert re.fullmatch("http://localhost/async/[0-9a-f]{32}", url)
    assert response.headers["Content-Location"] == url
    assert response.headers["Link"] == f'<{url}>; rel="monitor"'
    assert response.headers["Retry-After"] == "1"
    document = valid(response.json)
    assert document["status"] == "accepted"
    assert document["title"] == "Nightly report"
    assert document["retryAfter"] == 1
    assert url.endswith(document["jobID"])


def test_job_is_found_as_soon_as_the_start_was_answered(web):
    for _ in range(20):
        web.get(web.url(echo), status=200)


def test_job_does_not_exist_when_the_commit_fails(web):
    with pytest.raises(Exception, match="the vote failed"):
        web.start(leave_a_mark, "mark", query="?conflict=9")
    assert web.number_of_jobs() == 0


def test_conflict_at_the_start_makes_one_job_and_no_other():
    with kind("zodb-explicit-retry") as web:
        url = web.start(echo, "once", query="?conflict=2").location
        assert web.done(url)["result"] == "once"
        assert web.number_of_jobs() == 1


def test_full_store_refuses_with_503(at_gate):
    with browser({"async.store": "ram", "async.max_pending": "1"}) as web:
        web.start(behind_gate, at_gate)
        response = web.post_json("/start/echo", {}, status=503)
        assert int(response.headers["Retry-After"]) >= 1
        assert response.headers["Cache-Control"] == "no-store"
        is_problem(response)
        GATES[at_gate].opened.set()


# -- status ----------------------------------------------------------------------------


def test_status_is_200_and_valid_in_every_state(web, at_gate):
    with gate() as blocker:
        # Both workers are busy, so the next job stays accepted.
        busy = [web.url(behind_gate, blocker) for _ in range(2)]
        url = web.url(behind_gate, at_gate, "value")
        assert valid(web.get(url).json)["status"] == "accepted"
        GATES[blocker].opened.set()
        for other in busy:
            web.done(other)
    running(web, url, at_gate)
    document = valid(web.get(url).json)
    assert document["started"] >= document["created"]
    GATES[at_gate].opened.set()
    document = valid(web.done(url))
    assert (document["status"], document["progress"]) == ("successful", 100)
    assert document["result"] == "value"
    assert valid(web.finished(fail, "secret")[1])["status"] == "failed"
    with gate() as other:
        url = running(web, web.url(behind_gate, other), other)
        assert valid(web.delete(url).json)["status"] == "dismissed"
        document = valid(web.get(url).json)
        assert document["status"] == "dismissed"
        assert document["started"] >= document["created"]


def next_millisecond():
    """Wait until the clock shows another time than before."""
    begun = time.time()
    while time.time() < begun + 0.002:
        pass


def test_updated_is_the_time_of_the_last_change(web):
    with gate() as first, gate() as second:
        url = web.url(tell_later, first, second)
        GATES[first].reach()
        before = web.get(url).json
        next_millisecond()
        GATES[first].opened.set()
        GATES[second].reach()
        during = web.get(url).json
        next_millisecond()
        GATES[second].opened.set()
        after = web.done(url)
    assert before["created"] <= before["updated"] < during["updated"] < after["updated"]
    assert after["updated"] == after["finished"]


def test_progress_and_message_are_shown_while_the_job_runs(web, at_gate):
    url = running(web, web.url(tell, at_gate, 1, 3, "<b>one</b> of three"), at_gate)
    document = valid(web.get(url).json)
    assert document["progress"] == 33
    assert document["message"] == "<b>one</b> of three"


def test_estimate_of_the_job_is_the_time_to_come_again(web, at_gate):
    # A hundredth of a millionth is done: the estimate is long, and so cut to half a minute.
    url = web.url(tell, at_gate, 1e-8, 100)
    response = web.get(running(web, url, at_gate))
    assert response.headers["Retry-After"] == "30"
    assert response.json["retryAfter"] == 30


def test_time_to_come_again_grows_with_the_age_of_the_job(web, at_gate, monkeypatch):
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    created = web.scheduler.transact(lambda s: s.status(url[-32:])).created
    for age, expected in [(0, "1"), (11, "2"), (95, "10"), (9999, "30"), (-50, "1")]:
        monkeypatch.setattr("pyramid_async.documents.time.time", lambda age=age: created + age)
        assert web.get(url).headers["Retry-After"] == expected


def test_finished_job_has_no_time_to_come_again(web):
    url, document = web.finished(echo)
    assert "Retry-After" not in web.get(url).headers
    assert "retryAfter" not in document


def test_head_is_get_without_a_body(web):
    url, _ = web.finished(echo)
    get, head = web.get(url), web.head(url)
    assert head.body == b""
    for header in ("ETag", "Content-Type", "Content-Length", "Cache-Control"):
        assert head.headers[header] == get.headers[header]


def test_tag_is_weak_and_changes_with_every_visible_change(web, at_gate):
    with gate() as blocker:
        busy = [web.url(behind_gate, blocker) for _ in range(2)]
        url = web.url(tell, at_gate, 1, 2)
        tags = [web.get(url).headers["ETag"]]
        GATES[blocker].opened.set()
        for other in busy:
            web.done(other)
    running(web, url, at_gate)
    tags.append(web.get(url).headers["ETag"])
    assert web.get(url).headers["ETag"] == tags[-1]
    GATES[at_gate].opened.set()
    web.done(url)
    tags.append(web.get(url).headers["ETag"])
    numbers = [int(re.fullmatch(r'W/"(\d+)"', tag)[1]) for tag in tags]
    assert numbers == sorted(set(numbers))


def test_known_document_is_answered_with_304(web, at_gate):
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    tag = web.get(url).headers["ETag"]
    for header in (tag, tag.removeprefix("W/"), f'"other", {tag}', f'{tag},"x"', "*", " * "):
        response = web.get(url, headers={"If-None-Match": header}, status=304)
        assert response.body == b""
        assert response.headers["ETag"] == tag
        assert response.headers["Retry-After"] == "1"
        assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("suffix", ["-gzip", "-br"])
def test_tag_is_known_with_what_apache_adds_for_compression(ram, at_gate, suffix):
    url = running(ram, ram.url(behind_gate, at_gate), at_gate)
    tag = ram.get(url).headers["ETag"]
    known = {"If-None-Match": f'{tag[:-1]}{suffix}"'}
    ram.get(url, headers=known, status=304)
    answer = ram.get(url + "?wait=1", headers=known, status=304)
    assert answer.headers["Preference-Applied"] == "wait=1"


def test_304_of_a_finished_job_has_no_time_to_come_again(web):
    url, _ = web.finished(echo)
    tag = web.get(url).headers["ETag"]
    response = web.get(url, headers={"If-None-Match": tag}, status=304)
    assert "Retry-After" not in response.headers


@pytest.mark.parametrize("header", ['"other"', 'W/"1"', "nonsense", '"*"', "", "W/1048576"])
def test_other_tags_are_answered_with_200(ram, header):
    url, _ = ram.finished(echo)
    ram.get(url, headers={"If-None-Match": header}, status=200)


def test_tag_of_the_process_that_runs_the_job_is_newer_and_not_another(web, at_gate):
    """Of several processes the others know less of the job, until it changes hands or ends."""
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    tag = web.get(url).headers["ETag"]
    newer = f'W/"{int(tag[3:-1]) + 5}"'
    web.get(url, headers={"If-None-Match": newer}, status=304)
    web.scheduler.settings["wait_max"] = 0.1
    answer = web.get(url + "?wait=1", headers={"If-None-Match": newer}, status=304)
    assert answer.headers["Preference-Applied"] == "wait=1"
    older = f'W/"{int(tag[3:-1]) - 1}"'
    web.get(url, headers={"If-None-Match": older}, status=200)
    GATES[at_gate].opened.set()
    web.done(url)
    web.get(url, headers={"If-None-Match": newer}, status=200)


# -- the result inside the document -----------------------------------------------------


@pytest.mark.parametrize("job", [(repeat, "x", 600_000), (make_file, "x")])
def test_result_that_no_document_shows_is_not_loaded_for_one(durable, monkeypatch, job):
    url, _ = durable.finished(*job)
    loaded = []
    unpack = durable.scheduler.store.unpack
    monkeypatch.setattr(
        durable.scheduler.store, "unpack", lambda *args: loaded.append(1) or unpack(*args)
    )
    document = durable.get(url).json
    assert "result" not in document
    assert durable.head(url).status_code == 200
    call = {"jsonrpc": "2.0", "id": 1, "method": "async.status", "params": [url.rpartition("/")[2]]}
    assert durable.post_json("/async/rpc", call).json["result"] == document
    assert durable.delete(url + "?only=cancel", status=409).json == document
    assert loaded == []
    assert b"x" in durable.get(url + "/results").body
    assert loaded == [1]


@pytest.mark.parametrize("value", [None, 0, False, "", "käse €", [], {"a": [1, 2.5, None, True]}])
def test_small_json_is_shown_inside_the_document(web, value):
    url, document = web.finished(echo, value)
    assert document["result"] == value
    assert valid(web.get(url).json)["result"] == value


@pytest.mark.parametrize(("text", "times"), [("x", 65534), ("é", 32767)])
def test_largest_json_is_shown_inside_the_document(web, text, times):
    assert web.finished(repeat, text, times)[1]["result"] == text * times


@pytest.mark.parametrize(("text", "times"), [("x", 65535), ("é", 32768)])
def test_larger_json_is_only_linked(web, text, times):
    url, document = web.finished(repeat, text, times)
    assert "result" not in document
    assert web.get(url + "/results").json == text * times


@pytest.mark.parametrize("part", ["x", [0]])
def test_much_larger_result_is_not_looked_at_for_the_document(web, part, monkeypatch):
    """To write 20 MB of JSON, and only see that it is too long, took half a second each time."""
    url = web.url(repeat, part, 600_000)
    monkeypatch.setattr("pyramid_async.views.outcome", None)
    assert "result" not in web.done(url)


def test_finished_job_is_looked_at_for_who_may_see_it_and_for_its_result(web, monkeypatch):
    url, _ = web.finished(echo, 1)
    looks = []

    def noted(*args):
        looks.append(args)
        return status_of(*args)

    monkeypatch.setattr("pyramid_async.scheduler.status_of", noted)
    assert web.get(url).json["result"] == 1
    assert len(looks) == 2


def test_limit_of_what_is_shown_inside_is_a_setting():
    with browser({"async.inline_limit": "4"}) as web:
        assert web.finished(echo, "é")[1]["result"] == "é"
        assert "result" not in web.finished(echo, "éé")[1]


@pytest.mark.parametrize("what", ["nan", "huge integer", "bytes", "set", "key", "class"])
def test_what_is_not_json_is_not_shown(web, what):
    url, document = web.finished(special, what)
    assert document["status"] == "successful"
    assert "result" not in document
    assert web.get(url + "/results", status=204).body == b""


def test_result_nested_deeper_than_python_can_write_is_not_json():
    assert to_json(nested(100_000)) is None


def test_result_nested_less_deep_is_shown(web):
    assert str(web.finished(special, "rather deep")[1]["result"]).count("[") == 101


def test_half_a_surrogate_pair_is_shown_as_an_escape(web):
    url, document = web.finished(special, "half a surrogate pair")
    assert document["result"] == "\ud800"
    assert web.get(url + "/results").body == b'"\\ud800"'


def test_document_of_a_strange_title_and_message_is_still_json(web, at_gate):
    text = "\ud800 \x00 \u2028 \"' </script>"
    url = running(web, web.url(tell, at_gate, 1, 2, text, title=text), at_gate)
    document = valid(web.get(url).json)
    assert document["title"] == document["message"] == text


# -- results ---------------------------------------------------------------------------


def test_results_are_the_bare_json(web):
    url, document = web.finished(echo, {"a": "é"})
    response = web.get(url + "/results", status=200)
    assert response.headers["Content-Type"] == "application/json"
    assert response.body == '{"a":"é"}'.encode()
    link = document["links"][-1]
    assert (link["href"], link["type"]) == (url + "/results", "application/json")


def test_nothing_to_give_is_204(web):
    url, document = web.finished(echo, None)
    assert document["result"] is None
    response = web.get(url + "/results", status=204)
    assert response.headers["Cache-Control"] == "no-store"


def test_bytes_are_served_as_an_attachment(web):
    url, document = web.finished(make_file, "a;b\n")
    assert "result" not in document
    assert document["links"][-1]["type"] == "text/csv"
    response = web.get(url + "/results", status=200)
    assert response.body == b"a;b\n"
    assert response.headers["Content-Type"] == "text/csv"
    assert response.headers["Content-Disposition"] == 'attachment; filename="table.csv"'
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    head = web.head(url + "/results", status=200)
    assert (head.headers["Content-Length"], head.body) == ("4", b"")


def test_blob_is_streamed_as_an_attachment(tmp_path):
    uri = f"file://{tmp_path}/data.fs?blobstorage_dir={tmp_path}/blobs"
    with browser(zodb=uri) as web:
        url, document = web.finished(make_blob, "a;b\n", 100_000, "text/csv; charset=utf-8")
        assert document["links"][-1]["type"] == "text/csv; charset=utf-8"
        response = web.get(url + "/results", status=200)
        assert response.body == b"a;b\n" * 100_000
        assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
        head = web.head(url + "/results", status=200)
        assert head.body == b""
        # WebTest counts a body where there is one.
        assert head.headers["Content-Length"] == "400000"
        web.delete(url)
        web.get(url + "/results", status=404)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        (None, "attachment"),
        ("", "attachment"),
        ("a b.txt", 'attachment; filename="a b.txt"'),
        ("naïve €.txt", "attachment; filename=\"na_ve _.txt\"; filename*=UTF-8''"
         "na%C3%AFve%20%E2%82%AC.txt"),
        ('x"; filename="evil.exe', "attachment; filename=\"x_; filename=_evil.exe\"; filename*="
         "UTF-8''x%22%3B%20filename%3D%22evil.exe"),
        ("a\r\nSet-Cookie: x=1", 'attachment; filename="aSet-Cookie: x=1"'),
        ("../../etc/passwd", 'attachment; filename="passwd"'),
        ("C:\\temp\\x.txt", 'attachment; filename="x.txt"'),
        ("50%.txt", "attachment; filename=\"50_.txt\"; filename*=UTF-8''50%25.txt"),
        ("..", "attachment"),
        ("\ud800x", 'attachment; filename="x"'),
    ],
)  # fmt: skip
def test_file_name_cannot_break_out_of_its_header(ram, name, header):
    url, _ = ram.finished(make_file, "x", "text/plain", name)
    assert ram.get(url + "/results").headers["Content-Disposition"] == header


@pytest.mark.parametrize(
    "media_type", ["text/html\r\nX-Evil: 1", "text", "", None, 7, "text/plain;\n", "é/x", "a/b; c"]
)
def test_media_type_that_is_none_becomes_the_one_that_says_nothing(ram, media_type):
    url, document = ram.finished(make_file, "x", media_type)
    response = ram.get(url + "/results")
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert "X-Evil" not in response.headers
    assert document["links"][-1]["type"] == "application/octet-stream"


def test_results_of_an_unfinished_job_are_a_404_that_says_when(web, at_gate):
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    response = web.get(url + "/results", status=404)
    is_problem(response, NOT_READY)
    assert response.headers["Retry-After"] == "1"


def test_results_of_a_failed_job_are_its_problem(web):
    url, document = web.finished(fail, "secret")
    response = web.get(url + "/results", status=500)
    assert is_problem(response, document["error"]["type"]) == document["error"]


def test_results_link_says_whether_the_result_is_a_file(web):
    for job, said in (make_file, True), (echo, None):
        _, document = web.finished(job, "x")
        (link,) = [link for link in document["links"] if link["rel"] == RESULTS]
        assert link.get("download") is said


def test_results_of_a_dismissed_job_never_come(web, at_gate):
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    web.delete(url)
    response = web.get(url + "/results", status=404)
    is_problem(response, "urn:pyramid-async:problem:dismissed")
    assert "Retry-After" not in response.headers


def test_job_whose_result_cannot_be_loaded_is_seen_and_removed_still(monkeypatch, caplog):
    with kind("zodb-explicit-retry") as web:
        url, _ = web.finished(special, "of a class that goes")
        monkeypatch.delattr(webapp, "Leaving")
        document = valid(web.get(url, status=200).json)
        assert document["status"] == "successful"
        response = web.get(url + "/results", status=500)
        lost = is_problem(response, "urn:pyramid-async:problem:result-lost")
        assert lost["title"] == "The result cannot be read any more."
        assert "Leaving" not in response.text
        assert url[-32:] in caplog.text
        assert web.delete(url, status=200).json == document
        web.get(url, status=404)


# -- errors ----------------------------------------------------------------------------


def test_failure_shows_an_id_that_is_in_the_log_and_nothing_else(web, caplog, wait_for):
    url, document = web.finished(fail, "the secret")
    error = document["error"]
    assert set(error) == {"type", "title", "status", "errorID"}
    assert error["title"] == "The operation failed."
    wait_for(lambda: error["errorID"] in caplog.text)  # it is logged after its commit
    for response in (web.get(url), web.get(url + "/results", status=500)):
        for leak in ("secret", "ZeroDivision", "Traceback", "webapp"):
            assert leak not in response.text


def test_text_of_a_public_failure_is_shown(web):
    _, document = web.finished(fail_publicly, "The file is not a table.")
    assert document["error"]["detail"] == "The file is not a table."
    assert "errorID" in document["error"]


def requests_for(web, sid):
    """Yield a response of each kind for a job that the asker cannot have."""
    yield web.get(f"/async/{sid}", status=404)
    yield web.get(f"/async/{sid}?wait=5", status=404)
    yield web.get(f"/async/{sid}", headers={"Prefer": "wait=5"}, status=404)
    yield web.get(f"/async/{sid}", headers={"If-None-Match": "*"}, status=404)
    yield web.get(f"/async/{sid}/results", status=404)
    yield web.delete(f"/async/{sid}", status=404)
    yield web.delete(f"/async/{sid}?only=cancel", status=404)
    yield web.get(f"/async/{sid}", headers={"X-User": "mallory"}, status=404)


def test_every_404_is_the_same_to_the_byte(web, at_gate):
    removed, _ = web.finished(echo)
    web.delete(removed)
    expired = web.url(echo, result_timeout=0)
    web.get(expired + "?wait=5", status=404)
    foreign = web.url(behind_gate, at_gate, user="alice")
    foreign_done, _ = web.finished(fail, "secret", user="alice")
    sids = [url[-32:] for url in (removed, expired, foreign, foreign_done)]
    sids += [uuid4().hex, "x", "%00", "-1", "a" * 5000, "%C3%A9", "%0d%0aX:1", "rpcx", ".."]
    seen = {
        (response.status, tuple(response.headerlist), response.body)
        for sid in sids
        for response in requests_for(web, sid)
    }
    assert len(seen) == 1
    assert set(is_problem(web.get(removed, status=404), NO_SUCH_JOB)) == {"type", "title", "status"}
    assert web.get(foreign, headers=as_user("alice")).json["status"] in {"accepted", "running"}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", ["/async/x", "/async/x/results"])
def test_other_methods_are_405_and_told_what_is_allowed(web, method, path):
    response = web.request(path, method=method, status=405)
    allowed = "GET, HEAD, OPTIONS" if "results" in path else "GET, HEAD, DELETE, OPTIONS"
    assert response.headers["Allow"] == allowed
    is_problem(response)


@pytest.mark.parametrize(
    "query", ["wait=", "wait=x", "wait=-1", "wait=1.5", "wait=%D9%A3", "wait=%ff"]
)
def test_malformed_wait_is_400_whether_the_job_exists_or_not(ram, query):
    url, _ = ram.finished(echo)
    for target in (url, url + "/results", "/async/unknown"):
        response = ram.get(f"{target}?{query}", status="*")
        if target == "/async/unknown":
            assert response.status_code == 404
            is_problem(response, response.json["type"])
            continue
        assert response.status_code == 400
        told = is_problem(response)["detail"]
        assert told == (
            "the query is not UTF-8" if "%ff" in query else "wait must be a whole number of seconds"
        )


def test_malformed_only_is_400_whether_the_job_exists_or_not(web):
    url, _ = web.finished(echo)
    for target in (url, "/async/unknown"):
        for query in ("only=", "only=remove", "only=cancel&only=x", "only=%ff"):
            told = is_problem(web.delete(f"{target}?{query}", status=400))["detail"]
            assert told == "only must be cancel" or query == "only=%ff"
    web.get(url, status=200)


# -- cancel and remove -------------------------------------------------------------------


def test_delete_dismisses_a_running_job_and_its_effects_never_come(tmp_path, at_gate):
    for name in KINDS:
        with kind(name) as web, gate() as barrier:
            url = web.url(commit_slowly, barrier, "tpc_begin", "mark")
            GATES[barrier].reach()
            document = valid(web.delete(url, status=200).json)
            assert document["status"] == "dismissed"
            GATES[barrier].opened.set()
            web.finished(echo)  # by the other worker
            assert web.get(url).json["status"] == "dismissed"
            web.scheduler.executor.stop(5)
            with web.databases[""].transaction() as connection:
                assert "mark" not in connection.root()


def test_delete_dismisses_an_accepted_job_which_never_starts(web, at_gate):
    with gate() as blocker:
        busy = [web.url(behind_gate, blocker) for _ in range(2)]
        url = web.url(behind_gate, at_gate)
        assert web.delete(url).json["status"] == "dismissed"
        GATES[blocker].opened.set()
        for other in busy:
            web.done(other)
    web.finished(echo)
    assert not GATES[at_gate].reached.is_set()


def test_delete_dismisses_a_job_that_is_kept_for_no_time(web, at_gate):
    GATES[at_gate].opened.set()
    with manual(web.app.registry) as executor:
        url = web.url(behind_gate, at_gate, result_timeout=0)
        assert valid(web.delete(url, status=200).json)["status"] == "dismissed"
        executor.drain()
    assert not GATES[at_gate].reached.is_set()
    web.get(url, status=404)


@pytest.mark.parametrize(("job", "status"), [(echo, "successful"), (fail, "failed")])
def test_delete_removes_a_finished_job_and_shows_its_last_document(web, job, status):
    url, last = web.finished(job, "value")
    document = valid(web.delete(url, status=200).json)
    assert document == last
    assert document["status"] == status
    web.get(url, status=404)
    web.delete(url, status=404)


def test_delete_removes_a_dismissed_job(web, at_gate):
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    web.delete(url)
    assert valid(web.delete(url).json)["status"] == "dismissed"
    web.get(url, status=404)


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match"])
def test_delete_whose_condition_is_false_leaves_the_job_alone(web, name):
    url, last = web.finished(echo, "value")
    tag = web.get(url).headers["ETag"]
    # Tags are weak, and a weak one matches nothing in If-Match.
    for value in {"If-Match": ['"old"', tag], "If-None-Match": ["*", tag]}[name]:
        problem = web.delete(url, headers={name: value}, status=412)
        assert problem.content_type == "application/problem+json"
        assert web.get(url, status=200).json == last
    true = {"If-Match": "*", "If-None-Match": '"old"'}[name]
    web.delete(url, headers={name: true}, status=200)


def test_only_cancel_leaves_a_finished_job_alone(web, at_gate):
    url, last = web.finished(echo, "value")
    assert valid(web.delete(url + "?only=cancel", status=409).json) == last
    assert web.get(url, status=200).json == last
    url = running(web, web.url(behind_gate, at_gate), at_gate)
    assert web.delete(url + "?only=cancel", status=200).json["status"] == "dismissed"
    assert web.delete(url + "?only=cancel", status=409).json["status"] == "dismissed"


def test_job_that_vanishes_between_two_looks_is_404(web, monkeypatch):
    url, _ = web.finished(echo)
    monkeypatch.setattr(Scheduler, "outcome", lambda scheduler, sid: None)
    for answer in (
        web.get(url, status=404),
        web.get(url + "/results", status=404),
        web.delete(url, status=404),
    ):
        is_problem(answer, NO_SUCH_JOB)


def test_job_that_vanishes_before_its_removal_is_404(web, monkeypatch):
    url, _ = web.finished(echo)
    status = Scheduler.status

    def remove_after(scheduler, sid):
        found = status(scheduler, sid)
        if found is not None:
            scheduler.remove(sid)
        return found

    monkeypatch.setattr(Scheduler, "status", remove_after)
    is_problem(web.delete(url, status=404), NO_SUCH_JOB)


# -- who may see a job -----------------------------------------------------------------


def test_policy_that_raises_does_not_tell_which_jobs_exist():
    """Where pyramid_tm does not ask it first."""
    with browser({"tm.annotate_user": "false"}) as web:
        url, _ = web.finished(echo, user="alice")
        for asked in (url, "/async/" + "0" * 32):
            web.get(asked, headers=as_user("expired"), status=401)


def test_default_permission_of_the_application_does_not_count():
    with browser(routes=lambda config: config.set_default_permission("nobody has it")) as web:
        url, _ = web.finished(echo)
        web.get(url, status=200)
        web.post(url, status=405)
        web.get("/async/unknown", status=404)
        web.delete(url, status=200)


def test_virtual_root_of_the_application_does_not_count(web):
    url, _ = web.finished(echo)
    below = {"X-Vhm-Root": "/customers/acme"}
    web.get(url, headers=below, status=200)
    web.post(url, headers=below, status=405)
    web.get("/async/client.js", headers=below, status=200)
    web.get(url, headers={"X-Vhm-Root": "/\xff"}, status=200)
    web.delete(url, headers=below, status=200)


def test_virtual_root_counts_for_the_applications_own_routes():
    def routes(config):
        config.add_route("shop", "/shop/*traverse", factory=lambda request: {"acme": "Acme"})
        config.add_view(lambda request: Response(request.virtual_root), route_name="shop")

    with browser(routes=routes) as web:
        assert web.get("/shop/", headers={"X-Vhm-Root": "/acme"}).text == "Acme"


@pytest.mark.parametrize(
    "find",
    [lambda root: root["users"]["mallory"], lambda root: find_resource(root, "/users/mallory")],
)
def test_policy_finds_no_user_in_the_context(web, monkeypatch, find):
    """In the application's own root there would be none of this name."""
    url, _ = web.finished(echo)

    def known(self, request):
        root = getattr(request, "root", None)  # not yet, when pyramid_tm asks
        return root and find(root)

    monkeypatch.setattr(Policy, "authenticated_userid", known)
    web.get(url, status=500)


@pytest.mark.parametrize(
    "users",
    [
        lambda request: find_root(request.context).users,
        lambda request: request.root.users,
        lambda request: request.root["users"],
        lambda request: {"alice"} if "users" in request.root else set(),
    ],
)
def test_policy_finds_its_users_in_the_root_of_the_application(web, monkeypatch, users):
    """As the group finders of traversal do."""
    items = {"users": {"alice"}}
    monkeypatch.setattr(Root, "users", items["users"], raising=False)
    monkeypatch.setattr(Root, "__getitem__", lambda self, name: items[name], raising=False)
    monkeypatch.setattr(Root, "__contains__", lambda self, name: name in items, raising=False)

    def known(self, request):
        user = request.headers.get("X-User")
        # Not yet, when pyramid_tm asks.
        return user if hasattr(request, "context") and user in users(request) else None

    monkeypatch.setattr(Policy, "authenticated_userid", known)
    url, _ = web.finished(echo, user="alice")
    made = Root.made
    web.get(url, headers=as_user("alice"), status=200)
    assert Root.made == made + 1
    assert sids(listed(web)) == [url[-32:]]
    web.get(url, headers=as_user("bob"), status=404)
    web.delete(url, headers=as_user("alice"), status=200)


def test_root_of_the_application_is_made_for_strangers_alone(web):
    url, _ = web.finished(echo, user="alice")
    made = Root.made
    web.get(url, headers=as_user("alice"))
    web.get("/async/unknown", headers=as_user("bob"), status=404)
    assert Root.made == made
    web.get(url, headers=as_user("bob"), status=404)
    assert Root.made == made + 1


def test_root_that_fails_is_a_no_and_is_logged(web, caplog):
    url, _ = web.finished(echo, user="alice")
    known = web.get(url, headers={"X-User": "bob", "X-Root": "broken"}, status=404)
    unknown = web.get("/async/x", headers={"X-User": "bob", "X-Root": "broken"}, status=404)
    assert known.body == unknown.body
    assert "the root of all evil" in caplog.text


def test_without_a_security_policy_an_owned_job_is_nobodys():
    with browser(policy=False) as web:
        sid = web.scheduler.transact(lambda s: s.bind(s._tm, Caller(owner="a")).schedule(echo))
        web.get(f"/async/{sid}", status=404)
        web.get(web.url(echo), status=200)


# -- the list ------------------------------------------------------------------------------


def listed(web, query="", user="alice", status=200):
    return web.get(f"/async{query}", headers=as_user(user), status=status)


def sids(response):
    return [job["jobID"] for job in response.json["jobs"]]


def test_list_has_the_own_jobs_newest_first_and_without_results(web):
    urls = [web.finished(echo, number, user="alice")[0] for number in range(3)]
    web.finished(echo, user="bob")
    web.finished(echo)
    response = listed(web)
    assert sids(response) == [url[-32:] for url in reversed(urls)]
    for job in response.json["jobs"]:
        assert "result" not in valid(job)
    href = "http://localhost/async"
    assert response.json["links"] == [{"href": href, "rel": "self", "type": "application/json"}]
    assert len(listed(web, "?limit=3").json["links"]) == 1  # there is no next page
    assert response.headers["Cache-Control"] == "no-store"
    assert web.head("/async", headers=as_user("alice"), status=200).body == b""


def test_list_tells_the_kind_of_a_file_as_its_document_does(web):
    web.finished(make_file, "a;b", user="alice")
    [job] = listed(web).json["jobs"]
    assert job["links"][-1]["type"] == "text/csv"


def test_list_of_nobody_is_404(web):
    web.finished(echo)
    is_problem(listed(web, user=None, status=404))
    assert sids(listed(web, user="admin")) == []


def test_list_comes_in_pages(web):
    everything = [web.finished(echo, user="alice")[0][-32:] for _ in range(12)][::-1]
    first = listed(web)
    assert sids(first) == everything[:10]
    href = first.json["links"][1]["href"]
    assert first.json["links"][1]["rel"] == "next"
    second = web.get(href, headers=as_user("alice"))
    assert sids(second) == everything[10:]
    assert second.json["links"] == [{**first.json["links"][1], "rel": "self"}]
    found, href = [], "http://localhost/async?limit=5&status=successful&status=failed"
    while href:
        response = web.get(href, headers=as_user("alice"))
        found += sids(response)
        href = next((x["href"] for x in response.json["links"] if x["rel"] == "next"), None)
    assert found == everything


def test_pages_neither_repeat_nor_miss_a_job_when_others_come_and_go(web):
    everything = [web.finished(echo, user="alice")[0][-32:] for _ in range(4)][::-1]
    first = listed(web, "?limit=2")
    web.finished(echo, user="alice")
    web.delete(f"/async/{everything[1]}", headers=as_user("alice"))
    second = web.get(first.json["links"][1]["href"], headers=as_user("alice"))
    assert sids(second) == everything[2:]


def test_list_shows_the_wanted_statuses(web, at_gate):
    good, bad = (web.finished(job, "x", user="alice")[0][-32:] for job in (echo, fail))
    url = web.url(behind_gate, at_gate, user="alice")
    GATES[at_gate].reach()
    assert sids(listed(web, "?status=failed")) == [bad]
    assert sids(listed(web, "?status=failed&status=successful")) == [bad, good]
    assert sids(listed(web, "?status=running")) == [url[-32:]]
    assert sids(listed(web, "?status=dismissed")) == []


def test_list_has_a_hundred_jobs_a_page_at_most():
    with browser({"async.store": "ram", "async.workers": "0"}) as web:
        for _ in range(101):
            web.start(echo, user="alice")
        for limit, number in [("1", 1), ("99", 99), ("101", 100), ("9" * 5000, 100)]:
            assert len(sids(listed(web, f"?limit={limit}"))) == number


@pytest.mark.parametrize(
    "query",
    ["limit=", "limit=0", "limit=-1", "limit=x", "limit=1&limit=x", "limit=1.5", "status=",
     "status=done", "status=running&status=x", "cursor=", "cursor=x", "cursor=W10=",
     "cursor=WzEsMl0", "cursor=bnVsbA==", "cursor=W251bGwsICJ4Il0=", "cursor=%ff", "cursor=%C3%A9",
     "cursor=" + b64encode(b"[1" + b"0" * 400 + b',"a"]').decode()],
)  # fmt: skip
def test_malformed_parameters_of_the_list_are_400(ram, query):
    told = is_problem(listed(ram, f"?{query}", status=400))["detail"]
    assert (
        told
        == {
            "limit": "limit must be a whole number from 1 to 100",
            "status": "status must be one of accepted, running, successful, failed, dismissed",
            "cursor": "the cursor is none that was given",
        }[query.partition("=")[0]]
        or "%ff" in query
    )


# -- every answer ------------------------------------------------------------------------


def test_defect_is_a_500_that_tells_an_id_alone(web, caplog):
    response = web.get("/async/x", headers=as_user("broken"), status=500)
    assert is_problem(response)["errorID"] in caplog.text
    assert "secret" not in response.text
    assert "secret of the policy" in caplog.text


def test_refusal_of_the_policy_keeps_its_challenge(web):
    response = web.get("/async/x", headers=as_user("expired"), status=401)
    assert "secret" not in response.text
    is_problem(response)
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="x"'


class LegalReasons(HTTPClientError):
    code, title = 451, "Unavailable For Legal Reasons"


class LoginTimeout(HTTPClientError):
    """Of a status that is nobody's standard."""

    code, title = 440, "Login Time-out"


class Refusing(Policy):
    def __init__(self, error, *headers):
        self.error, self.headers = error, headers

    def forget(self, request):
        return self.headers

    def authenticated_userid(self, request):
        raise self.error("secret of the policy", headers=forget(request))


def test_refusal_leaves_the_exception_as_it_is():
    refusal = HTTPUnauthorized("for the application's own pages")

    class Same(Policy):
        def authenticated_userid(self, request):
            raise refusal

    with browser(routes=lambda config: config.set_security_policy(Same()), policy=False) as web:
        is_problem(web.get("/async/x", status=401))
        assert refusal.content_type == "text/html"
        assert not refusal.has_body


@pytest.mark.parametrize(
    ("error", "name", "values"),
    [
        (LegalReasons, "Link", ['<https://example.org/law>; rel="blocked-by"']),
        (LoginTimeout, "Retry-After", ["7"]),
        (HTTPUnauthorized, "WWW-Authenticate", ['Basic realm="x"', "Bearer"]),
        (HTTPUnauthorized, "Set-Cookie", ["ticket=; Max-Age=0", "old=; Max-Age=0"]),
    ],
)
def test_refusal_keeps_its_status_and_headers_and_tells_nothing_else(error, name, values):
    policy = Refusing(error, *((name, value) for value in values))
    with browser(routes=lambda config: config.set_security_policy(policy), policy=False) as web:
        response = web.get("/async/x", status=error.code)
        assert response.headers.getall(name) == values
        assert is_problem(response)["title"] == error.title
        assert "secret" not in response.text


def take(request):
    """Raise what a job raised, in the midst of something else."""
    request.scheduler.schedule(echo)
    raise request.scheduler.get_result(request.matchdict["sid"])[1]


@pytest.mark.parametrize("context", [JobFailed, Exception])
@pytest.mark.parametrize("name", KINDS)
def test_interrupt_of_a_job_that_a_view_raises_is_answered_and_nothing_committed(name, context):
    def routes(config):
        config.add_route("take", "/take/{sid}")
        config.add_view(take, route_name="take")
        config.add_exception_view(lambda error, _: Response(str(error)), context=context)

    with kind(name, routes=routes) as web:
        late, _ = web.finished(echo, timeout=0)
        dismissed = web.url(echo, run_after=9999)
        web.delete(dismissed)
        for url, text in [(late, "JobTimeout: "), (dismissed, "JobDismissed")]:
            assert web.get(f"/take/{url[-32:]}").text.startswith(text)
            web.get(url, status=200)
        assert web.number_of_jobs() == 2


def ask_ourselves(name):
    return Request.blank("/told").get_response(APPLICATIONS[name]).text


def told_to_stop(request):
    raise JobStopped("the process stops")


APPLICATIONS = {}


@pytest.mark.parametrize("name", KINDS)
def test_interrupt_of_the_job_that_asks_its_own_application_stays_one(name, monkeypatch):
    def routes(config):
        config.add_route("told", "/told")
        config.add_view(told_to_stop, route_name="told")

    with kind(name, routes=routes) as web, manual(web.app.registry) as jobs:
        monkeypatch.setitem(APPLICATIONS, name, web.app)
        monkeypatch.setattr(webapp, "JOBS", [ask_ourselves])
        url = web.url(ask_ourselves, name)
        assert [job.status for job in jobs.drain()] == ["accepted"]
        assert not web.get(url).json["done"]


def test_defect_behind_the_router_is_a_500_too(web, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("the secret")

    url = web.url(echo)
    monkeypatch.setattr(web.scheduler.store, "table", broken)
    response = web.get(url, headers=LISTED, status=500)
    monkeypatch.undo()
    assert is_problem(response)["errorID"] in caplog.text
    assert "secret" not in response.text
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.parametrize("error", [TransientError, sqlite3.OperationalError])
def test_database_out_of_reach_is_a_503_that_says_when(web, monkeypatch, error, caplog):
    def out_of_reach(*args):
        raise error("disconnected")

    url, _ = web.finished(echo)
    for owner, name in [(web.scheduler.store, "table"), (Scheduler, "outcome")]:
        monkeypatch.setattr(owner, name, out_of_reach)
        response = web.get(url, status=503)
        monkeypatch.undo()
        is_problem(response)
        assert response.headers["Retry-After"] == "1"
        assert "disconnected" in caplog.text
        caplog.clear()


class OperationalError(Exception):
    """As drivers of MySQL have it, and SQLAlchemy for any driver."""


class InterfaceError(Exception):
    """As drivers of PostgreSQL have it."""


def no_such_table():
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("select * from nowhere")


def no_such_table_in_sqlalchemy():
    try:
        no_such_table()
    except sqlite3.OperationalError as error:
        raise OperationalError(f"(sqlite3.OperationalError) {error}") from error


def no_such_column_in_mysql():
    raise OperationalError(1054, "Unknown column 'nothing' in 'SELECT'")


def no_database():
    sqlite3.connect("/nowhere/nothing.sqlite")


def no_server():
    raise OperationalError(2003, "Can't connect to MySQL server on '127.0.0.1'")


def lost_connection():
    raise InterfaceError("connection already closed")


@pytest.mark.parametrize(
    ("fail", "status"),
    [
        (no_such_table, 500),
        (no_such_table_in_sqlalchemy, 500),
        (no_such_column_in_mysql, 500),
        (no_database, 503),
        (no_server, 503),
        (lost_connection, 503),
    ],
)
def test_statement_that_is_wrong_is_no_outage(web, monkeypatch, fail, status):
    url = web.url(echo)
    monkeypatch.setattr(web.scheduler.store, "table", lambda *args: fail())
    response = web.get(url, status=status)
    monkeypatch.undo()
    assert ("errorID" in is_problem(response)) == (status == 500)


def test_answer_of_a_tween_above_the_router_is_marked_too():
    def routes(config):
        config.add_tween("test_http.turn_away_factory", under="pyramid_async.cors.Tween")

    with browser(routes=routes) as web:
        response = web.get("/async/x", headers={**LISTED, "X-Turn-Away": "1"}, status=503)
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        response = web.get("/hello", headers={**LISTED, "X-Turn-Away": "1"}, status=503)
        assert "Access-Control-Allow-Origin" not in response.headers


def turn_away_factory(handler, registry):
    def tween(request):
        if "X-Turn-Away" in request.headers:
            return HTTPServiceUnavailable()
        return handler(request)

    return tween


def test_other_routes_of_the_application_are_left_alone(web):
    for path, status in [("/hello", 200), ("/nowhere", 404)]:
        headers = web.get(path, headers=LISTED, status=status).headers
        assert not {"Cache-Control", "Vary", "Access-Control-Allow-Origin"} & set(headers)
    with pytest.raises(RuntimeError, match="secret of the policy"):
        web.get("/hello", headers=as_user("broken"))


# -- CSRF ------------------------------------------------------------------------------


def test_csrf_is_checked_as_the_application_has_it():
    with browser(routes=checking_csrf) as web:
        sid = web.scheduler.transact(lambda s: s.schedule(echo))
        web.get(f"/async/{sid}?wait=5", status=200)
        response = web.delete(f"/async/{sid}", headers=LISTED, status=400)
        is_problem(response)
        assert response.json["detail"] == "the CSRF token is missing or wrong"
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert response.headers["Cache-Control"] == "no-store"
        web.get(f"/async/{sid}", status=200)
        token = web.cookies["csrf_token"]
        web.delete(f"/async/{sid}", headers={"X-CSRF-Token": token}, status=200)
        # Says what is wrong, rather than that a token is missing.
        web.post(f"/async/{sid}", status=405)


def test_origin_that_the_csrf_check_refuses_is_told_so():
    with browser(routes=checking_csrf) as web:
        headers = {"Origin": "https://other.example"}
        https = {"wsgi.url_scheme": "https"}
        response = web.delete("/async/x", headers=headers, extra_environ=https, status=400)
        assert response.json["detail"] == "the CSRF check refuses the origin"


@pytest.mark.parametrize("method", ["DELETE", "POST"])
@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded; charset=latin-1", "multipart/form-data"]
)
def test_form_that_is_none_is_the_fault_of_the_client(method, content_type, caplog):
    with browser({"async.store": "ram"}, routes=checking_csrf) as web:
        sid = web.scheduler.transact(lambda s: s.schedule(echo))
        path = {"DELETE": f"/async/{sid}", "POST": "/async/rpc"}[method]
        headers = {"Content-Type": content_type}
        response = web.request(path, method=method, body=b"a=%ff", headers=headers, status=400)
        assert is_problem(response)["detail"] == "the body is no form in UTF-8"
        assert "errorID" not in caplog.text
        web.get(f"/async/{sid}", status=200)


# -- CORS ------------------------------------------------------------------------------


def preflight(web, path, method="GET", origin=ORIGIN, headers=None, status=204):
    asked = {"Access-Control-Request-Method": method}
    if origin:
        asked["Origin"] = origin
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    return web.options(path, headers=asked, status=status)


def cors(response):
    prefix = "Access-Control-"
    found = {name: value for name, value in response.headers.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def test_preflight_allows_a_listed_origin(web):
    response = preflight(web, "/async/x", "DELETE", headers="prefer, if-none-match")
    assert response.headers["Allow"] == "GET, HEAD, DELETE, OPTIONS"
    assert response.headers["Vary"] == "Origin"
    assert response.headers["Cache-Control"] == "no-store"
    assert cors(response) == {
        "Allow-Origin": ORIGIN,
        "Allow-Methods": "GET, HEAD, DELETE, OPTIONS",
        "Allow-Headers": "prefer, if-none-match",
        "Expose-Headers": EXPOSED,  # a page that asks for the options itself reads Allow
        "Max-Age": "7200",
    }


@pytest.mark.parametrize("names", [None, "a b", "x\x00y", ",,", "é"])
def test_preflight_without_proper_header_names_allows_the_usual_ones(ram, names):
    response = preflight(ram, "/async/x", headers=names)
    assert "If-None-Match" in cors(response)["Allow-Headers"]


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.org", "http://app.example.org", "https://app.example.org:8443",
     "https://app.example.org.evil.com", "HTTPS://APP.EXAMPLE.ORG", "null", "*", None],
)  # fmt: skip
def test_unlisted_origin_gets_no_cors_header(web, origin):
    response = preflight(web, "/async/x", origin=origin)
    assert response.headers["Allow"] == "GET, HEAD, DELETE, OPTIONS"
    assert cors(response) == {}
    assert response.headers["Vary"] == "Origin"
    answer = web.get("/async/x", headers={"Origin": origin} if origin else {}, status=404)
    assert cors(answer) == {}
    assert answer.headers["Vary"] == "Origin"


def test_preflight_asks_neither_policy_nor_database_nor_for_the_job(web, at_gate, monkeypatch):
    url = web.url(behind_gate, at_gate, user="alice")
    asked, made = Policy.asked, Root.made
    monkeypatch.setattr(ZODB.DB, "open", None)
    monkeypatch.setattr(web.scheduler.store, "table", None)
    answers = [preflight(web, target, "DELETE") for target in (url, "/async/unknown")]
    monkeypatch.undo()
    assert answers[0].headerlist == answers[1].headerlist
    assert (Policy.asked, Root.made) == (asked, made)


class HasTenant:
    """A route predicate that asks for what the application has added to its requests."""

    def __init__(self, name, config):
        self.name = name

    def text(self):
        return f"has_tenant = {self.name}"

    phash = text

    def __call__(self, info, request):
        return request.tenant() == self.name


def test_predicates_that_ask_for_methods_of_the_request_are_asked_by_options_too():
    def routes(config):
        config.add_request_method(lambda request: "ann", "tenant")
        config.add_route_predicate("has_tenant", HasTenant)
        config.add_route("thing", "/thing", has_tenant="ann")
        config.add_view(lambda request: {"a": 1}, route_name="thing", renderer="json")
        config.add_async_cors("thing", ["GET"])

    with browser(routes=routes) as web:
        assert web.options("/thing", status=200).json == web.get("/thing").json
        assert preflight(web, "/thing", "GET").headers["Allow"] == "GET, OPTIONS"


class Raises(HasTenant):
    def __call__(self, info, request):
        raise self.name("secret of the predicate")


@pytest.mark.parametrize("error", [HTTPNotFound, HTTPUnauthorized])
def test_what_a_predicate_raises_is_left_to_the_exception_views_of_the_application(error):
    def routes(config):
        config.add_route_predicate("raises", Raises)
        config.add_route("thing", "/thing", raises=error)
        config.add_exception_view(lambda _, request: Response("ours", error.code), context=error)
        config.add_async_cors("thing", ["GET"])

    with browser(routes=routes) as web:
        for ask in (web.get, web.options, partial(preflight, web)):
            assert ask("/thing", status=error.code).text == "ours"


class Fallback(Request):
    """A request that has whatever its environ has."""

    def __getattr__(self, name):
        try:
            return self.environ[name]
        except KeyError:
            raise AttributeError(name) from None


def test_preflight_for_an_application_with_requests_of_its_own_kind():
    with browser(routes=lambda config: config.set_request_factory(Fallback)) as web:
        assert cors(preflight(web, "/async/x", "DELETE"))["Allow-Origin"] == ORIGIN


def test_plain_options_says_what_is_allowed(web):
    response = web.options("/async/x/results", status=204)
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert cors(response) == {}


def test_credentials_are_allowed_where_they_are_configured():
    settings = {"async.cors.credentials": "true", "async.cors.origins": f"{ORIGIN} null"}
    with browser(settings) as web:
        for origin in (ORIGIN, "null"):
            answers = [preflight(web, "/async/x", origin=origin)]
            answers.append(web.get("/async/x", headers={"Origin": origin}, status=404))
            for response in answers:
                assert cors(response)["Allow-Origin"] == origin
                assert cors(response)["Allow-Credentials"] == "true"
        assert cors(web.get("/async/x", headers={"Origin": "http://x"}, status=404)) == {}


def test_star_allows_every_origin_but_null():
    with browser({"async.cors.origins": "*"}) as web:
        response = web.get("/async/x", headers={"Origin": "http://anything"}, status=404)
        assert cors(response)["Allow-Origin"] == "*"
        assert response.headers["Vary"] == "Origin"
        assert cors(web.get("/async/x", headers={"Origin": "null"}, status=404)) == {}
        assert cors(web.get("/async/x", status=404)) == {}


def test_without_configured_origins_nothing_varies():
    with browser({"async.cors.origins": ""}) as web:
        response = web.get("/async/x", headers=LISTED, status=404)
        assert "Vary" not in response.headers
        assert cors(response) == {}
        assert preflight(web, "/async/x").headers["Allow"]


@pytest.mark.parametrize(
    "origins",
    ["https://a.org/", "https://a.org/path", "a.org", "HTTPS://a.org", "https://*.a.org",
     "https://App.Example.org", "https://app.example.org:443", "http://x:80",
     "https://app.example.org:", "https://user:pw@host", "https://bücher.de", "https://a:b:c"],
)  # fmt: skip
def test_origin_that_no_browser_sends_stops_the_start(origins):
    with pytest.raises(ConfigurationError, match=r"async\.cors\.origins"):
        application({"async.cors.origins": origins})


@pytest.mark.parametrize(
    "origin",
    ["https://[2001:db8::1]", "http://[::1]:8080", "chrome-extension://abcdefghijklmnop",
     "https://x:80", "http://x:443", "http://x:8080", "https://xn--bcher-kva.de"],
)  # fmt: skip
def test_origin_that_a_browser_sends_can_be_listed(origin):
    with browser({"async.cors.origins": origin}) as web:
        answer = web.get("/async/x", headers={"Origin": origin}, status=404)
        assert cors(answer)["Allow-Origin"] == origin


def test_star_with_credentials_stops_the_start():
    with pytest.raises(ConfigurationError, match=r"async\.cors\.origins"):
        application({"async.cors.origins": "*", "async.cors.credentials": "true"})


def with_cors(config):
    config.add_async_cors("start")
    config.add_route("only_post", "/only-post", request_method="POST")
    config.add_view(lambda request: {}, route_name="only_post", renderer="json")
    config.add_async_cors("only_post", methods=("POST", "PUT"))
    checking_csrf(config)


def test_start_route_of_the_application_is_served_by_the_same_helper():
    with browser(routes=with_cors) as web:
        response = preflight(web, "/start/echo", "POST", headers="content-type")
        assert cors(response)["Allow-Methods"] == response.headers["Allow"] == "POST, OPTIONS"
        response = preflight(web, "/only-post", "POST")
        assert response.headers["Allow"] == "POST, PUT, OPTIONS"
        answer = web.post_json("/start/echo", {}, headers=LISTED, status=400)
        assert cors(answer)["Allow-Origin"] == ORIGIN
        assert "Retry-After" in cors(answer)["Expose-Headers"]
        # Not a preflight, and no job route: the application's own business.
        web.options("/start/echo", status=404)


def test_one_method_may_be_given_as_a_text():
    with browser(routes=lambda config: config.add_async_cors("hello", methods="PUT")) as web:
        assert preflight(web, "/hello", "PUT").headers["Allow"] == "PUT, OPTIONS"


def test_cors_for_a_route_that_is_missing_stops_the_start():
    with pytest.raises(ConfigurationError, match="missing"):
        application(routes=lambda config: config.add_async_cors("missing"))


def test_cors_twice_for_a_route_is_a_conflict():
    def routes(config):
        config.add_async_cors("hello")
        config.add_async_cors("hello", methods=("PUT",))

    with pytest.raises(ConfigurationError, match="hello"):
        application(routes=routes)


# -- routes ----------------------------------------------------------------------------


def test_prefix_of_the_include_takes_the_place_of_async():
    with browser(prefix="/api/jobs") as web:
        url = web.url(echo, "x")
        assert url.startswith("http://localhost/api/jobs/")
        assert web.done(url)["result"] == "x"
        assert web.get("/async/x", status=404).content_type != "application/problem+json"


@pytest.mark.parametrize("name", ["rpc", "client.js", "openapi.json"])
def test_names_below_the_prefix_are_no_sids(ram, name):
    route = ram.app.routes_mapper(ram.app.request_factory.blank(f"/async/{name}"))["route"]
    assert route is None or route.name != "async.status"
    ram.get(f"/async/{name}x", status=404).json  # noqa: B018 - an unknown job


def test_path_that_is_not_utf8_is_left_to_pyramid(ram):
    for ask in (ram.get, ram.options):
        with pytest.raises(URLDecodeError):
            ask("/async/%ff")


def test_script_name_and_host_are_in_the_links():
    with browser() as web:
        environ = {"SCRIPT_NAME": "/app", "HTTP_HOST": "example.org", "wsgi.url_scheme": "https"}
        response = web.post_json("/start/echo", {}, extra_environ=environ)
        assert response.location.startswith("https://example.org/app/async/")


def test_application_may_be_mounted_below_a_name_of_zeros():
    """As of a tenant with the nil UUID."""
    with browser() as web:
        zeros = "/" + "0" * 32
        response = web.post_json("/start/echo", {}, extra_environ={"SCRIPT_NAME": zeros})
        assert response.location.startswith(f"http://localhost{zeros}/async/")


def test_urls_of_jobs_leave_nothing_in_the_memory():
    # Pyramid keeps each element of a path that it ever quoted.
    with browser() as web:
        url = web.url(echo, "x")
        web.done(url)
        web.get(url + "/results")
        sid = url.rpartition("/")[2]
        assert not [kept for kept, _ in _segment_cache if sid in kept]
