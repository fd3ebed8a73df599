"""The web application under test: it starts moves and forgets them."""

from __future__ import annotations

import random
from operator import attrgetter

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPNotFound
from pyramid.response import Response
from pyramid_zodbconn import get_connection

from . import faults
from .bank import bank_of, move

HEARTBEAT = 0.2
LEASE = 1.0
OLDEST = 8  # twice what runs at a time

SETTINGS = {
    "tm.manager_hook": "pyramid_tm.explicit_manager",
    "retry.attempts": 3,
    "async.store": "zodb",
    "async.heartbeat": HEARTBEAT,
    "async.lease": LEASE,
    "async.maintenance_interval": 0.2,
    "async.shutdown_timeout": 2,
    # Records are kept for the audit, and no job fails for the number of kills it met.
    "async.result_timeout": 24 * 3600,
    "async.max_attempts": 1000,
    "async.conflict_attempts": 100,
}


def main(global_config, **settings):
    """Return the application of a Celery worker, whose ini file holds the settings."""
    control = settings.pop("crash.control")
    return application(settings, control)


def application(settings, control=None):
    """Return the WSGI application, or what a control makes of it."""
    if control:
        faults.CONTROLS[control]()
    settings = {**SETTINGS, **settings}
    with Configurator(settings=settings) as config:
        config.include("pyramid_retry")
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        for name, pattern in (("move", "/move"), ("forget", "/forget/{sid}"), ("left", "/left")):
            config.add_route(name, pattern)
        config.add_view(start_move, route_name="move", request_method="POST")
        config.add_view(forget, route_name="forget", request_method="POST", renderer="json")
        config.add_view(left, route_name="left", renderer="json")
    return config.make_wsgi_app()


def start_move(request):
    bank = bank_of(request)
    sid = request.scheduler.schedule(move, random.choice(bank.pairs))
    bank.note(sid, request.params["request"])
    return request.scheduler.accepted(sid)


def forget(request):
    """Remove a job, finished or not, in the request's own transaction; say what it was."""
    status = request.scheduler.status(request.matchdict["sid"])
    if status is None:
        return HTTPNotFound()
    request.scheduler.remove(status.sid)
    return Response(json_body={"status": status.status})


def left(request):
    """Count the jobs that are not finished, whoever owns them, and list the oldest.

    Over Celery the first attempt needs no claim, so no record says that it runs; an old one may.
    """
    trees = get_connection(request).root()["pyramid_async"].unfinished
    records = [record for tree in trees for record in tree.values() if not record.done]
    oldest = sorted(records, key=attrgetter("created"))[:OLDEST]
    return {"left": len(records), "oldest": [record.sid for record in oldest]}
