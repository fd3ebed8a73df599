"""The demo's tour: own jobs, the index that goes on, the echo from another origin, the operator."""

# ruff: noqa: F401, F811 - fixtures of other modules

from __future__ import annotations

import faulthandler
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from test_client import outcome, workshop
from test_demo import EVIL, PEOPLE, Client, client, folder, sample, text_of

from demo import characters, jobs
from demo.charts import MOST_BARS, SPAN, Bars, Timeline
from demo.sample import characters as named_characters
from pyramid_async.interfaces import IScheduler

CHECKOUT = Path(__file__).resolve().parent.parent
PROGRAMS = CHECKOUT / "tests" / "browser" / "demo.test.mjs"
MAIN, OTHER = "localhost:6543", "localhost:6544"


@pytest.fixture
def held(monkeypatch):
    """Echo and the slow count wait until they are let go."""
    go = threading.Event()
    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=lambda _: go.wait(20)))
    yield go
    go.set()


@pytest.fixture
def quick(monkeypatch):
    """Nothing rests."""
    for module in (jobs, characters):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))


# -- the user's own jobs ---------------------------------------------------------------


def test_own_jobs_are_listed_newest_first_with_what_became_of_them(client, quick):
    client.finished(client.press(client.get("/"), "/start/fail"))
    client.finished(client.press(client.get("/"), "/start/count"))
    items = [" ".join(item.text.split()) for item in client.get("/jobs").html.select("#jobs li")]
    assert re.fullmatch(r"Count slowly finished \S+, \d+\.\d s", items[0])
    assert items[1].startswith("Fail with a reason failed")
    assert items[1].endswith("The oracle is closed on weekends. Come back on Monday.")


def test_jobs_are_shown_to_their_own_browser_alone(client, held):
    page = client.press(client.get("/"), "/start/count")
    status, sid = client.url_of(page), page.request.path.rpartition("/")[2]
    assert [job["jobID"] for job in client.get("/async").json["jobs"]] == [sid]
    client.reset()
    assert "You have not started a job" in text_of(client.get("/jobs"))
    assert client.get("/async").json["jobs"] == []
    for address in (status, page.request.path):
        client.get(address, status=404)
    token = client.get("/").html.find("input", {"name": "csrf_token"})["value"]
    client.post(f"/jobs/{sid}/cancel", {"csrf_token": token}, status=404)


def test_list_refreshes_itself_without_script_as_long_as_a_job_runs(client, held):
    page = client.press(client.get("/"), "/start/count")
    shown = client.get("/jobs")
    assert 'http-equiv="refresh"' in str(shown.html.find("noscript"))
    assert shown.html.select_one("#jobs progress")["max"] == "100"
    cancelled = client.press(shown, page.request.path + "/cancel")
    assert "was cancelled" in text_of(cancelled)
    held.set()
    assert not client.get("/jobs").html.find("noscript")


def test_list_escapes_what_a_title_holds(client):
    client.upload(f"{EVIL}.csv", PEOPLE)
    page = client.get("/jobs")
    assert not page.html.find("b")
    assert EVIL in page.html.find("svg").text


# -- the echo --------------------------------------------------------------------------


def test_echo_answers_on_a_page(client, quick):
    page = client.finished(client.press(client.get("/"), "/start/echo", text=EVIL))
    assert page.html.find("q").text == EVIL
    assert not page.html.find("b")


def call(client, method, params, origin=f"http://{OTHER}"):
    body = {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}
    headers = {"Origin": origin, "Host": MAIN}
    return client.post_json("/async/rpc", body, headers=headers)


def test_page_of_another_origin_calls_by_json_rpc_without_cookie_or_token(client, quick):
    page = client.get("/elsewhere", headers={"Host": OTHER})
    assert page.html.find("main")["data-rpc"] == f"http://{MAIN}/async/rpc"
    assert f"connect-src http://{MAIN};" in page.headers["Content-Security-Policy"]
    client.reset()
    asked = {"Origin": f"http://{OTHER}", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/async/rpc", headers=asked)
    assert preflight.headers["Access-Control-Allow-Origin"] == f"http://{OTHER}"
    answer = call(client, "echo", {"text": "Hello"})
    assert answer.headers["Access-Control-Allow-Origin"] == f"http://{OTHER}"
    address = f"/async/{answer.json['result']['jobID']}?wait=20"
    job = client.get(address, headers={"Origin": f"http://{OTHER}"})
    assert job.headers["Access-Control-Allow-Origin"] == f"http://{OTHER}"
    assert job.json["result"] == "Hello"


@pytest.mark.parametrize("text", ["x" * (jobs.LONGEST_ECHO + 1), ["x"], 5, None])
def test_what_is_no_text_or_a_long_one_is_not_echoed(client, quick, text):
    job = call(client, "echo", {"text": text}).json["result"]
    outcome = client.get(f"/async/{job['jobID']}?wait=20").json
    assert outcome["status"] == "failed"
    assert "up to 1,000 characters" in str(outcome)


def test_nobody_says_how_long_an_echo_takes(client):
    answer = call(client, "echo", {"text": "x", "seconds": 1e9})
    assert answer.json["error"]["message"] == "Invalid params"


def test_echo_of_what_utf_8_has_not_is_shown_without_it(client, quick):
    client.reset()
    sid = call(client, "echo", {"text": "a\ud800b"}).json["result"]["jobID"]
    client.get(f"/async/{sid}?wait=20")
    assert client.get(f"/jobs/{sid}").html.find("q").text == "a?b"


def test_other_origins_and_other_operations_are_refused(client):
    answer = call(client, "echo", {"text": ""}, "http://evil.example")
    assert "Access-Control-Allow-Origin" not in answer.headers
    for name in ("import", "export", "count", "characters"):
        refused = call(client, name, [] if name == "echo" else {})
        assert refused.json["error"]["code"] == -32004


def test_first_port_leads_to_the_page_on_the_second(client):
    link = client.get("/", headers={"Host": MAIN}).html.find("a", string="Another origin")["href"]
    assert link == f"http://{OTHER}/elsewhere"
    answer = client.get("/elsewhere", headers={"Host": MAIN}, status=303)
    assert answer.headers["Location"] == link


def test_host_that_is_no_listed_origin_gets_no_such_page(client):
    headers = {"Host": "evil.example"}
    assert not client.get("/", headers=headers).html.find("a", string="Another origin")
    client.get("/elsewhere", headers=headers, status=404)


# -- the index of characters -----------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """The job that builds the index stops after its third part, until it is let go."""
    reached, go, parts = threading.Event(), threading.Event(), itertools.count(1)

    def rest(_):
        if next(parts) == 3:
            reached.set()
            assert go.wait(20)

    monkeypatch.setattr(characters, "time", SimpleNamespace(sleep=rest))
    yield reached, go
    go.set()


def test_index_goes_on_after_a_restart_and_has_every_character_once(
    client,
    folder,
    interrupted,
    wait_for,
):
    reached, go = interrupted
    client.press(client.get("/characters"), "/characters/index")
    wait_for(reached)
    shown = client.get("/characters", {"q": "latin small letter a"})
    assert "U+0061" in shown.text  # what is committed can be found already
    threading.Timer(0.2, go.set).start()  # while the scheduler stops
    client.close()
    client = Client(folder)
    try:
        wait_for(lambda: "It is complete" in client.get("/characters").text, 60)
        text = text_of(client.get("/characters"))
        total = sum(1 for _ in named_characters())
        assert f"It is complete: {total:,} characters." in text
        assert f"went on: 1,500 + {total - 1500:,} characters." in text
        with client.databases[""].transaction() as connection:
            codes = connection.root()["characters"].search("latin")
        assert len(codes) == len(set(codes))
        assert len(codes) == sum(1 for _, name in named_characters() if re.search(r"\bLATIN", name))
    finally:
        client.close()


def test_index_is_searched_by_the_beginnings_of_words_and_drawn(client, quick):
    page = client.finished(client.press(client.get("/characters"), "/characters/index"))
    assert "All characters can be found." in text_of(page)
    page = client.get("/characters", {"q": "arro rightw heavy"})
    names = [cell.text for cell in page.html.select("td.name")]
    assert "HEAVY ROUND-TIPPED RIGHTWARDS ARROW" in names
    assert all(re.search(r"RIGHTW.*\bARRO", name) and "HEAVY" in name for name in names)
    chart = page.html.find("svg", {"role": "img"})
    assert "symbol, other: " in chart.find("desc").text
    assert page.html.find(id=chart["aria-labelledby"]).text == "What they are"
    assert "No name has it." in text_of(client.get("/characters", {"q": "no such name"}))


def test_index_is_built_by_one_job_at_a_time(client, interrupted, wait_for):
    reached, _ = interrupted
    form = client.get("/characters")
    page = client.press(form, "/characters/index")
    wait_for(reached)
    assert client.press(form, "/characters/index").request.path == page.request.path
    client.reset()
    assert "Somebody else builds it now." in text_of(client.get("/characters"))
    token = client.get("/").html.find("input", {"name": "csrf_token"})["value"]
    answer = client.post("/characters/index", {"csrf_token": token}).follow()
    assert "Somebody else builds it already." in text_of(answer)


# -- charts ----------------------------------------------------------------------------


def test_bars_are_drawn_to_scale_and_the_rest_is_one_bar():
    counts = [(f"kind {number}", 100 - number) for number in range(20)]
    bars = Bars(counts).bars
    assert len(bars) == MOST_BARS
    assert bars[-1] == ("all others", 765, 100)
    assert bars[0] == ("kind 0", 100, pytest.approx(100 * 100 / 765))
    assert sum(bar.count for bar in bars) == sum(count for _, count in counts)
    assert Bars([("a", 1), ("b", 0)]).text == "a: 1; b: 0"


def job(created, started=None, finished=None):
    return SimpleNamespace(created=created, started=started, finished=finished)


def test_timeline_shows_when_jobs_waited_and_ran():
    line = Timeline([job(10, 20, 110), job(60, 70), job(100)], now=110)
    assert (line.begin, line.end) == (10, 110)
    ended, running, waiting = line.spans
    assert (ended.waited, ended.began, ended.width, ended.seconds) == (0, 10, 90, 90)
    assert (running.began, running.width, running.seconds) == (60, 40, 40)
    assert (waiting.waited, waiting.seconds) == (90, 0)
    assert all(span.began + span.width <= 100.01 for span in line.spans)


def test_timeline_leaves_out_what_is_long_ago():
    line = Timeline([job(5000, 5000, 5001), job(1, 1, 2)])
    assert (len(line.spans), line.seconds) == (1, 1)
    line = Timeline([job(1, 1, 5000)])
    assert (line.spans[0].width, line.seconds) == (100, SPAN)
    assert Timeline([]).spans == []


# -- the operator ----------------------------------------------------------------------


def test_operator_sees_jobs_of_others_until_he_stops_being_one(client, held):
    job = client.press(client.get("/"), "/start/count").request.path
    client.reset()
    client.get(job, status=404)
    page = client.press(client.get("/"), "/operator")
    assert "You are the operator." in text_of(page)
    assert "Count slowly" in text_of(client.get(job))
    client.get(job.replace("jobs", "async"), status=200)
    client.press(page, "/operator")
    client.get(job, status=404)


def test_page_for_operators_is_linked_for_them_alone(client):
    def link():
        found = client.get("/").html.find("a", string="All jobs")
        return found and found["href"]

    assert link() is None
    client.press(client.get("/"), "/operator")
    assert link() == "/async/manage"
    client.get(link(), status=200)


def test_import_that_is_retried_leads_to_its_dataset(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "CsvFile", None)
        failed = client.finished(client.upload("people.csv", PEOPLE))
    assert "Something went wrong." in text_of(failed)
    assert "2 rows are stored." in text_of(retried(client, failed))


def test_import_that_is_retried_after_another_one_is_refused(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "CsvFile", None)
        failed = client.finished(client.upload("people.csv", PEOPLE))
    dataset = failed.click("To the dataset")
    client.finished(client.press(dataset, dataset.request.path + "/import"))
    assert "It was imported meanwhile." in text_of(retried(client, failed))
    assert "2 rows" in text_of(client.get(dataset.request.path))


def test_index_whose_job_is_retried_is_shown_as_it_is_built(
    client,
    interrupted,
    monkeypatch,
    wait_for,
):
    reached, _ = interrupted
    with monkeypatch.context() as patch:
        patch.setattr(characters, "parts_from", None)
        failed = client.finished(client.press(client.get("/characters"), "/characters/index"))
    again = retry(client, failed)
    wait_for(reached)
    assert client.get("/characters").html.find("async-job")["src"] == f"/async/{again}"


def retried(client, page):
    """Let an operator retry the job of a page; return the page of the new one in the end."""
    again = retry(client, page)
    assert client.get(f"/async/{again}?wait=20").json["done"]
    return client.get(f"/jobs/{again}")


def retry(client, page):
    """Let an operator retry the job of a page; return the sid of the new one."""
    sid = client.url_of(page).rpartition("/")[2]
    scheduler = client.app.registry.getUtility(IScheduler)
    again = scheduler.transact(lambda own: own.retry(sid))
    scheduler.executor.wake(True, again)
    return again


def test_role_cannot_be_forged(client):
    client.get("/")
    client.set_cookie("user", client.cookies["user"].replace("!", "!operator!"))
    assert "Be the operator" in client.get("/").text


# -- in the browser --------------------------------------------------------------------


def titles():
    return re.findall(r'^test\("(.+?)"', PROGRAMS.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(workshop):
    """What became of the tests in Chromium: title → text."""
    faulthandler.cancel_dump_traceback_later()  # they take a minute together
    report = workshop / "demo.xml"
    reporter = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
    subprocess.run(
        ["node", "--test", *reporter, PROGRAMS.name],
        cwd=workshop,
        env={**os.environ, "CHECKOUT": str(CHECKOUT), "PYTHON": sys.executable},
        timeout=600,
        check=False,
    )
    # The colours of a terminal are no XML.
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", "", report.read_text("utf-8"))
    return dict(map(outcome, ElementTree.fromstring(text).iter("testcase")))


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("title", titles())
def test_in_chromium(outcomes, title):
    assert outcomes.get(title, "it did not run") == ""


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pictures_of_every_page_can_be_made(tmp_path):
    faulthandler.cancel_dump_traceback_later()  # it takes a minute
    command = [sys.executable, CHECKOUT / "docs" / "screenshots.py", tmp_path]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "too wide" not in made
    assert len(list(tmp_path.glob("*.png"))) == len(made.splitlines()) > 40
