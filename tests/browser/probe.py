"""What the browser tests add to the demo: jobs of any length, users, and pages without style."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

from pyramid.csrf import get_csrf_token
from pyramid.interfaces import ISecurityPolicy
from pyramid.response import Response

from pyramid_async import FileResult, OperationFailed, current_job


def includeme(config):
    config.include("pyramid_async")
    # In place of the demo's own policy, which this comes after.
    config.action(None, config.registry.registerUtility, (Users(), ISecurityPolicy))
    config.add_route("probe_page", "/probe")
    config.add_view(page, route_name="probe_page")
    config.add_route("probe_start", "/probe/{job}")
    config.add_view(start, route_name="probe_start", request_method="POST", require_csrf=False)
    config.add_async_cors("probe_start")
    config.add_route("preflights", "/preflights")
    config.add_view(lambda request: PREFLIGHTS, route_name="preflights", renderer="json")
    config.add_tween(f"{__name__}.count_preflights", over="pyramid_async.cors.Tween")


PREFLIGHTS = []


def count_preflights(handler, registry):
    def tween(request):
        if request.method == "OPTIONS":
            PREFLIGHTS.append(request.path)
        return handler(request)

    return tween


class Users:
    """The user is who the cookie names."""

    def authenticated_userid(self, request):
        return request.cookies.get("user")

    def permits(self, request, context, permission):
        return False

    def remember(self, request, userid, **kw):
        return []

    identity = forget = None


# -- jobs ------------------------------------------------------------------------------


def work(seconds=1.0, steps=10, result="done", gate=None):
    for step in current_job().track(range(steps), message="Working"):
        if step == steps - 1:
            stand_at(gate)
        time.sleep(seconds / steps)
    return {"result": result, "steps": steps}


def still(seconds=1.0, gate=None):
    """Tell nothing."""
    time.sleep(seconds)
    stand_at(gate)


def stand_at(gate):
    """Wait until there is a file of that name, where one is given."""
    while gate and not Path(gate).exists():
        current_job().check()
        time.sleep(0.02)


def large(size=200_000):
    return "x" * size


def file():
    return FileResult(b"a,b\n1,2\n", "text/csv", "table.csv")


def json_lines():
    return FileResult(b'{"a":1}\n{"a":2}\n', "application/json", "lines.json")


def refuse(text):
    raise OperationFailed(text)


def crash():
    raise ZeroDivisionError("secret")


JOBS = {job.__name__: job for job in (work, still, large, file, json_lines, refuse, crash)}


def start(request):
    job = JOBS[request.matchdict["job"]]
    scheduler = request.scheduler.using(title=request.GET.get("title", "A probe"))
    sid = scheduler.schedule(job, **(request.json_body if request.body else {}))
    return request.scheduler.accepted(sid)


# -- pages -----------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head><title>Jobs</title><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<script type="module" src="{client}"></script></head>
<body><main data-token="{token}"><h1>Jobs</h1>
{elements}
</main></body></html>"""
ELEMENT = '<async-job src="{src}" token="{token}" credentials="include">A job</async-job>'


def page(request):
    """Show jobs, here or at another origin, under a policy that forbids inline style and script."""
    other = request.GET.get("origin", "")
    client = request.async_client_url(_app_url=other) if other else request.async_client_url()
    token = get_csrf_token(request)
    sources = request.GET.getall("src")
    elements = "\n".join(ELEMENT.format(src=escape(src), token=token) for src in sources)
    response = Response(PAGE.format(client=escape(client), elements=elements, token=token))
    response.headers["Content-Security-Policy"] = f"default-src 'self' {other}"
    return response
