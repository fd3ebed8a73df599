"""The OpenAPI document: it is one, it tells all routes, and a live server keeps what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import waitress.server
import webapp
from waitress import wasyncore
from webapp import GATES, as_user, behind_gate, browser, echo, fail, gate, make_file, tell, validate

from pyramid_async.openapi import OPERATIONS
from pyramid_async.resources import resources

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
STATELESS = "examples,coverage,fuzzing"
HOOKS = Path(__file__).with_name("live_sids.py")


@pytest.fixture
def web():
    """A client of an application whose operations are those of the document's examples."""
    with browser(routes=operations) as client:
        yield client


def operations(config):
    config.add_operation("echo", echo)


def document(web, path="/async/openapi.json"):
    return web.get(path, status=200).json


# -- the document ------------------------------------------------------------------------


def test_document_is_served_as_json_and_kept_out_of_caches(web):
    response = web.get("/async/openapi.json", status=200)
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert web.head("/async/openapi.json", status=200).body == b""
    assert web.post("/async/openapi.json", status=405).headers["Allow"] == "GET, HEAD, OPTIONS"


def nodes(node):
    """Yield every object of a document."""
    children = list(node.values()) if isinstance(node, dict) else node
    if isinstance(node, dict):
        yield node
    for child in children if isinstance(children, list) else ():
        yield from nodes(child)


def test_document_says_nothing_that_generators_of_clients_make_wrong_code_of(web):
    """Clients of openapi-python-client could not be imported, or those of openapi-generator refused
    every answer to a call."""
    for node in nodes(document(web)):
        assert isinstance(node.get("const", ""), str)
        assert not isinstance(node.get("type"), list)
        assert "oneOf" not in node


def test_document_tells_every_route_with_every_method(web):
    told = {
        (path, method.upper())
        for path, item in document(web)["paths"].items()
        for method in item
        if method != "parameters"
    }
    names = {
        "async.jobs": "/async",
        "async.status": "/async/{sid}",
        "async.results": "/async/{sid}/results",
        "async.rpc": "/async/rpc",
        "async.client": "/async/client.js",
        "async.openapi": "/async/openapi.json",
    }
    there = {
        (names[name], method)
        for name, methods in resources(web.app.registry).items()
        for method in methods
    }
    assert told == there
    for path, method in told:
        allowed = web.options(path.replace("{sid}", "x"), status=204).headers["Allow"]
        assert method in allowed.split(", ")


def test_every_description_is_of_a_route_that_may_be_there(web):
    described = {name for name, _ in OPERATIONS} - {"async.client"}
    assert described <= set(resources(web.app.registry))


def test_conditions_of_a_delete_are_told(web):
    """A client that was generated can send no header that the document does not have."""
    parameters = document(web)["paths"]["/async/{sid}"]["delete"]["parameters"]
    told = [each["name"] for each in parameters if each["in"] == "header"]
    assert told == ["If-Match", "If-None-Match"]


def test_operations_have_names_of_their_own(web):
    ids = [
        operation["operationId"]
        for item in document(web)["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    ]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere(web):
    whole = document(web)
    references = set(find_references(whole))
    assert references
    for reference in references:
        part = whole
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]


def find_references(part):
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        for value in part.values():
            yield from find_references(value)
    elif isinstance(part, list):
        for value in part:
            yield from find_references(value)


def test_prefix_and_script_name_are_in_the_paths():
    with browser(prefix="/api/jobs") as web:
        found = web.get("/api/jobs/openapi.json", extra_environ={"SCRIPT_NAME": "/app"}).json
        assert "/api/jobs/{sid}/results" in found["paths"]
        assert found["servers"] == [{"url": "/app"}]


def test_host_of_the_request_is_not_believed(web):
    response = web.get("/async/openapi.json", extra_environ={"HTTP_HOST": "evil.example.org"})
    assert "evil" not in response.text


def schema(web, name):
    whole = document(web)
    return {"$ref": f"#/components/schemas/{name}", "components": whole["components"]}


@pytest.mark.parametrize(
    ("name", "member", "value"),
    [
        ("statusInfo", "created", "2026-13-01T00:00:00Z"),
        ("statusInfo", "links", [{"href": "not a URI", "rel": "self", "type": "text/plain"}]),
        ("problem", "type", "a b"),
    ],
)
def test_formats_are_checked(web, name, member, value):
    _, last = web.finished(echo, "x", user="alice")
    good = last if name == "statusInfo" else web.get("/async/x", status=404).json
    validate(good, schema(web, name))
    with pytest.raises(jsonschema.ValidationError):
        validate({**good, member: value}, schema(web, name))


def test_documents_and_problems_are_valid_in_every_state(web):
    described = schema(web, "statusInfo")
    for job in (echo, fail, make_file):
        url, last = web.finished(job, "x", user="alice")
        validate(last, described)
        results = web.get(url + "/results", headers=as_user("alice"), status="*")
        if results.status_code >= 400:
            validate(results.json, schema(web, "problem"))
    with gate() as name:
        url = web.url(behind_gate, name, user="alice", title="A title")
        validate(web.get(url, headers=as_user("alice")).json, described)
        validate(web.delete(url, headers=as_user("alice")).json, described)
    page = web.get("/async?limit=2", headers=as_user("alice")).json
    validate(page, schema(web, "jobs"))
    validate(web.get("/async/x", status=404).json, schema(web, "problem"))


# -- a live server -----------------------------------------------------------------------


@contextmanager
def served(app):
    """The application behind waitress: its URL."""
    sockets = {}
    server = waitress.server.create_server(
        app, host="127.0.0.1", port=0, threads=4, map=sockets, clear_untrusted_proxy_headers=True
    )
    ended = threading.Event()

    def run():
        while not ended.is_set():
            wasyncore.loop(timeout=0.05, map=sockets, count=1)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        ended.set()
        thread.join(5)
        server.close()
        server.task_dispatcher.shutdown()
        wasyncore.close_all(sockets)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed")
@pytest.mark.parametrize("user", [None, "alice"])
def test_live_server_keeps_what_its_document_says(tmp_path, monkeypatch, user):
    monkeypatch.setattr(webapp, "PATIENCE", 280.0)  # its jobs stand at their gate all the time
    # Two workers stand at the gate, and what the document's example starts has to end.
    settings = {"async.wait_max": "1", "async.workers": "4"}
    with browser(settings, routes=operations) as web, gate() as name:
        jobs = [echo, make_file] * 9
        done = [web.finished(job, "x", user=user)[0][-32:] for job in jobs]
        more = [web.url(job, *args)[-32:] for job, *args in unfinished(name)]
        GATES[name].reach()
        shutil.copy(HOOKS, tmp_path / "live_sids.py")
        with served(web.app) as url:
            schemathesis(f"{url}/async/openapi.json", tmp_path, user, STATELESS, more + done)
            # A job that was dismissed can be seen, which looks like a removal that failed.
            schemathesis(f"{url}/async/openapi.json", tmp_path, user, "stateful", done)


def unfinished(name):
    return (tell, name, 1, 3, "x"), (behind_gate, name)


# Beside those of its default: a condition that is false is no defect of the request.
CONDITIONS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 304, 401, 403, 404, 409, 412, "5xx"]
"""


def schemathesis(url, directory, user, phases, sids):
    """Run it with all checks; what it generates may be one of the *sids*."""
    (directory / "sids.json").write_text(json.dumps(sids))
    (directory / "schemathesis.toml").write_text(CONDITIONS)
    headers = ["--header", f"X-User:{user}"] if user else []
    said = subprocess.run(
        [SCHEMATHESIS, "run", url, "--checks=all", "--mode=all", "--seed=1", "--no-color",
         "--max-examples=50", "--max-response-time=5", "--continue-on-failure",
         f"--phases={phases}", "--generation-database=none", *headers],
        cwd=directory,
        env={"PATH": os.defpath, "SCHEMATHESIS_HOOKS": "live_sids", "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=140,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout[-8000:] + said.stderr[-2000:]
    assert re.search(r"(\d+) generated, \1 passed", said.stdout), said.stdout[-4000:]
