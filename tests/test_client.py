"""The browser client: its route here; its behaviour in Chromium, in tests/browser."""

from __future__ import annotations

import faulthandler
import gzip
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from xml.etree import ElementTree

import pytest
import webapp
from pyramid.response import Response

CHECKOUT = Path(__file__).resolve().parent.parent
STATIC = CHECKOUT / "pyramid_async" / "static"
BROWSER = CHECKOUT / "tests" / "browser"
PROGRAMS = BROWSER / "client.test.mjs"
# What stands in titles for several tests.
VALUES = {"${signal}": ["SIGTERM", "SIGKILL"], "${colorScheme}": ["light", "dark"]}
LIMIT = 8 * 1024  # bytes, minified and compressed

# -- the route -------------------------------------------------------------------------


def address(request):
    """Answer with the address that templates get."""
    REQUESTS.append(weakref.ref(request))
    options = {"_app_url": request.GET["app_url"]} if "app_url" in request.GET else {}
    return Response(request.async_client_url(**options))


REQUESTS = []


def add_address(config):
    config.add_route("address", "/address")
    config.add_view(address, route_name="address")


@pytest.fixture
def client():
    with webapp.browser(routes=add_address) as client:
        yield client


@pytest.fixture
def versioned(client):
    """The address that names the version."""
    return client.get("/address").text


def test_request_goes_without_the_garbage_collector(client, uncollected):
    REQUESTS.clear()
    client.get("/address")
    assert [request() for request in REQUESTS] == [None]


def test_address_that_names_the_version_may_be_kept_for_ever(client, versioned):
    assert re.fullmatch(r"/async/client\.js\?v=[0-9a-f]{16}", versioned)
    response = client.get(versioned)
    assert response.body == (STATIC / "client.js").read_bytes()
    assert response.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert response.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("query", ["", "?v=old", "?v="])
def test_address_without_the_version_is_asked_for_again(client, query):
    response = client.get("/async/client.js" + query)
    assert response.headers["Cache-Control"] == "private, no-cache"


def test_query_that_is_not_utf_8_is_refused_and_never_stored(client):
    response = client.get("/async/client.js?v=%ff", status=400)
    assert response.content_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("named", [True, False])
def test_client_that_has_it_gets_304(client, versioned, named):
    address = versioned if named else "/async/client.js"
    first = client.get(address)
    tagged = {"If-None-Match": first.headers["ETag"], "Origin": webapp.ORIGIN}
    again = client.get(address, headers=tagged, status=304)
    assert again.body == b""
    assert again.headers["Cache-Control"] == first.headers["Cache-Control"]
    assert again.headers["Access-Control-Allow-Origin"] == webapp.ORIGIN
    client.get(address, headers={"If-None-Match": "*"}, status=304)
    client.get(address, headers={"If-None-Match": '"another"'}, status=200)


@pytest.mark.parametrize("part", ["bytes=0-9", "bytes=99999999-"])
def test_there_are_no_parts_of_it_nor_errors_to_keep_for_ever(client, versioned, part):
    response = client.get(versioned, headers={"Range": part}, status=200)
    assert response.body == (STATIC / "client.js").read_bytes()


def test_pages_of_listed_origins_may_import_it(client, versioned):
    response = client.get(versioned, headers={"Origin": webapp.ORIGIN})
    assert response.headers["Access-Control-Allow-Origin"] == webapp.ORIGIN
    assert "Origin" in response.headers["Vary"]
    response = client.get(versioned, headers={"Origin": "https://evil.example.org"})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_other_methods_are_refused_and_never_stored(client, versioned):
    response = client.post(versioned, status=405)
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert response.headers["Cache-Control"] == "no-store"
    assert client.head(versioned).body == b""


def test_address_knows_prefix_mount_point_and_other_hosts():
    with webapp.browser(routes=add_address, prefix="/jobs/async") as client:
        path = client.get("/address", extra_environ={"SCRIPT_NAME": "/app"}).text
        assert path.startswith("/app/jobs/async/client.js?v=")
        assert client.get(path.removeprefix("/app")).status_int == 200
        full = client.get("/address?app_url=https://api.example.org").text
        assert full.startswith("https://api.example.org/jobs/async/client.js?v=")


# -- the files -------------------------------------------------------------------------


def exports(text):
    return set(re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", text, re.MULTILINE))


def test_declarations_name_what_the_module_exports():
    module, declared = ((STATIC / name).read_text("utf-8") for name in ("client.js", "client.d.ts"))
    assert exports(module) == exports(declared)
    assert "import " not in re.sub(r"/\*.*?\*/|//.*", "", module, flags=re.DOTALL)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with the programs of tests/browser, what they need, and the client."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(BROWSER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py"))
    for file in STATIC.glob("client.*"):
        shutil.copy(file, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


def tool(workshop, name, *arguments):
    command = [workshop / "node_modules" / ".bin" / name, *arguments]
    result = subprocess.run(command, cwd=workshop, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stdout.decode() + result.stderr.decode()
    return result.stdout


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_client_is_small(workshop):
    minified = tool(workshop, "terser", "client.js", "--compress", "--mangle", "--module")
    assert len(gzip.compress(minified)) < LIMIT


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_declarations_fit_a_program(workshop):
    tool(workshop, "tsc", "--project", "tsconfig.json")


# -- in the browser --------------------------------------------------------------------


def titles():
    """Return the titles of the tests in Chromium, as they are reported."""
    source = PROGRAMS.read_text("utf-8")
    found = re.findall(r'^ *test\(["`](.+?)["`],', source, re.MULTILINE)
    return [title for template in found for title in filled(template)]


def filled(template):
    for place, values in VALUES.items():
        if place in template:
            return [template.replace(place, value) for value in values]
    return [template]


@pytest.fixture(scope="session")
def outcomes(request, workshop):
    """What became of the tests in Chromium that were asked for, all in one run: title → text."""
    faulthandler.cancel_dump_traceback_later()  # they take minutes together
    wanted = [
        re.escape(item.callspec.params["title"])
        for item in request.session.items
        if item.name.startswith("test_in_chromium[")
    ]
    report = workshop / "report.xml"
    command = ["node", "--test"]
    reporter = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
    patterns = [f"--test-name-pattern=^{title}$" for title in wanted]
    environment = {"CHECKOUT": str(CHECKOUT), "PYTHON": sys.executable}
    subprocess.run(
        [*command, *reporter, *patterns, "client.test.mjs"],
        cwd=workshop,
        env={**os.environ, **environment},
        timeout=900,
        check=False,
    )
    return dict(map(outcome, ElementTree.parse(report).iter("testcase")))


def outcome(case):
    """Return a test's title and what went wrong: nothing, for one that went well."""
    wrong = [child for child in case if child.tag != "skipped"]
    return case.get("name"), "\n".join(child.text or child.tag for child in wrong)


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("title", titles())
def test_in_chromium(outcomes, title):
    assert outcomes.get(title, "it did not run") == ""
