"""The example application of docs/deployment.rst: a shop that counts its receipts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from BTrees.OOBTree import OOBTree
from pyramid.config import Configurator
from pyramid_zodbconn import get_connection

from pyramid_async import current_job


def sell(receipts, goods):
    """Note one more receipt of this job; it is wrong unless there is exactly one."""
    job = current_job()
    receipts[job.sid] = receipts.get(job.sid, 0) + 1
    return {"goods": goods, "process": os.getpid()}


def sell_slowly(receipts, goods, directory):
    """The same, once there is a file `go`; tells where it runs in a file named by its sid."""
    job = current_job()
    sold = sell(receipts, goods)
    (Path(directory) / f"{job.sid}.{job.attempt}").write_text(str(os.getpid()))
    while not (Path(directory) / "go").exists():
        time.sleep(0.01)
        if goods != "never checks":
            job.check()
    return sold


def start(request):
    """Schedule the job of the JSON body."""
    call = request.json_body
    scheduler = request.scheduler.using(**call.get("options", {}))
    function = sell_slowly if "directory" in call else sell
    arguments = [call[name] for name in ("goods", "directory") if name in call]
    return request.scheduler.accepted(scheduler.schedule(function, receipts(request), *arguments))


def count(request):
    """A page that reads the database and has nothing to do with jobs."""
    return len(receipts(request))


def receipts(request):
    """Return the tree of receipts; two requests that make it conflict, and one is run again."""
    if "zodbconn.uri" not in request.registry.settings:
        return {}
    root = get_connection(request).root()
    if "receipts" not in root:
        root["receipts"] = OOBTree()
    return root["receipts"]


def main(global_config, **settings):
    with Configurator(settings=settings) as config:
        config.include("pyramid_retry")
        if "zodbconn.uri" in settings:
            config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.add_route("start", "/start")
        config.add_view(start, route_name="start", request_method="POST")
        config.add_route("count", "/count")
        config.add_view(count, route_name="count", renderer="json")
        return config.make_wsgi_app()
