"""The HTTP resource of a job: its routes, its views, and who may see it."""

from __future__ import annotations

import logging
import re
from typing import Any

from pyramid.interfaces import ISecurityPolicy
from pyramid.response import Response

from .cors import add_cors, protect
from .documents import (
    JSON,
    NOTHING,
    busy,
    document,
    dumps,
    job_url,
    may_be_inline,
    no_such_job,
    problem,
    retry_after,
)
from .inputs import parameters
from .interfaces import IScheduler
from .jobs import DISMISSED, SUCCESSFUL, TICKS, JobStatus
from .listing import page
from .resources import (
    FULL_RETRY,
    Outside,
    Staying,
    add_refusals,
    add_resource,
    is_outage,
    root_of,
)
from .results import response_of
from .waiting import add_slots, hold

log = logging.getLogger(__name__)

# Whoever has it on the application's root sees everybody's jobs.
MANAGE = "async.manage"
# Names below the prefix that are no sids.
SID = r"{sid:(?!(?:rpc|client\.js|openapi\.json|manage|manage\.css)$)[^/]+}"


# -- configuration ---------------------------------------------------------------------


def add_routes(config: Any) -> None:
    """Add the routes of jobs and what all routes of the package need."""
    add_cors(config)
    add_slots(config)
    add_refusals(config)
    config.add_traverser(Staying, Outside)
    add_resource(config, "async.jobs", "", GET=jobs)
    add_resource(config, "async.status", SID, GET=status, DELETE=dismiss)
    add_resource(config, "async.results", SID + "/results", GET=results)


# -- who may see a job -----------------------------------------------------------------


def visible(request: Any, sid: str, scheduler: Any = None) -> JobStatus | None:
    """Return the job's status, or None where the user must not learn whether it exists.

    This function decides for every route and every RPC method.  It looks through
    *scheduler*, or in a transaction of its own.
    """
    # Asked for every sid: a policy that raises must not tell which ones exist.
    user = request.authenticated_userid
    job = scheduler.status(sid) if scheduler else transact(request, lambda own: own.status(sid))
    return job if job is not None and sees(request, job, user) else None


def sees(request: Any, job: JobStatus, user: str | None) -> bool:
    return job.owner is None or job.owner == user or manages(request)


def manages(request: Any) -> bool:
    """Say whether the user has the permission to see everybody's jobs."""
    if request.registry.queryUtility(ISecurityPolicy) is None:
        return False  # without a policy Pyramid allows everything
    try:
        return bool(request.has_permission(MANAGE, root_of(request)))
    except Exception:
        # It is asked for jobs that exist alone, so its failure must look like a no.
        log.exception("no %s: the root or the security policy failed", MANAGE)
        return False


def find(request: Any) -> JobStatus:
    """Return the status of the request's job, or raise the 404."""
    job = visible(request, request.matchdict["sid"])
    if job is None:
        raise no_such_job()
    return job


def transact(request: Any, work: Any) -> Any:
    """Call ``work(scheduler)`` in a transaction of its own, repeated after conflicts."""
    return request.registry.getUtility(IScheduler).transact(work)


# -- views -----------------------------------------------------------------------------


def accepted(request: Any, job: JobStatus) -> Any:
    """Return the 202 for a job that the request has just scheduled, or that has its key."""
    if not sees(request, job, request.authenticated_userid):
        refusal = busy("Another job of the same kind is not finished; try again.", FULL_RETRY)
        protect(refusal)
        raise refusal
    response = json_response(document(request, job), status=202)
    href = job_url(request.route_url, "async.status", job.sid)
    response.headers.update(
        {"Location": href, "Content-Location": href, "Link": f'<{href}>; rel="monitor"'}
    )
    response.headers["Retry-After"] = str(retry_after(job))
    protect(response)
    return response


def status(request: Any) -> Any:
    """GET, HEAD: the status document."""
    tags = known_tags(request)
    job, waited = awaited(request, lambda job: job.done or tags.outdated(job))
    fresh = tags.match(job)
    response = Response(status=304) if fresh else json_response(described(request, job))
    response.headers["ETag"] = etag(job)
    return with_hints(response, job, waited)


def results(request: Any) -> Any:
    """GET, HEAD: the bare result."""
    job, waited = awaited(request, lambda job: job.done)

    def respond(scheduler: Any) -> Any:
        # A file is opened while its connection is open, and streamed afterwards.
        last, value = outcome(scheduler, job.sid)
        return with_hints(response_of(request, last, value), last, waited)

    return transact(request, respond)


def jobs(request: Any) -> Any:
    """GET, HEAD: the list of the user's own jobs."""
    return json_response(page(request))


def dismiss(request: Any) -> Any:
    """DELETE: cancel what is not finished, remove what is."""
    only = parameters(request, "only")
    if set(only) - {"cancel"}:
        raise problem(400, detail="only must be cancel")
    job = find(request)
    # Entity tags here are weak, and If-Match takes no weak ones (RFC 9110, 13.1.1).
    if request.headers.get("If-Match", "*").strip() != "*" or known_tags(request).match(job):
        raise problem(412)
    status, last = transact(request, Dismissal(request, job.sid, bool(only)))
    return json_response(last, status)


class Dismissal:
    """One DELETE, over all attempts at its transaction: after a conflict it is decided anew.

    It remembers what it did, for a commit whose reply was lost is repeated too.
    """

    def __init__(self, request: Any, sid: str, only_cancel: bool) -> None:
        self.request, self.sid, self.only_cancel = request, sid, only_cancel
        self.cancelled = False
        self.removed: dict[str, Any] | None = None

    def __call__(self, scheduler: Any) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the job's last document."""
        last = scheduler.dismiss(self.sid)
        if last is not None:
            self.cancelled = True
            return 200, document(self.request, last)
        if self.removed is not None and scheduler.status(self.sid) is None:
            return 200, self.removed
        return self.finished(scheduler, *brief_outcome(self.request, scheduler, self.sid))

    def finished(self, scheduler: Any, job: JobStatus, value: Any) -> tuple[int, dict[str, Any]]:
        last = document(self.request, job, value)
        if self.cancelled and job.status == DISMISSED:
            return 200, last
        if self.only_cancel:
            return 409, last
        scheduler.remove(self.sid)
        self.removed = last
        return 200, last


def awaited(request: Any, enough: Any) -> tuple[JobStatus, int | None]:
    """Return the status of the request's job after the wait, and the wait's seconds, if any."""
    job, waited = hold(request, find(request), enough)
    if job is None:
        raise no_such_job()
    return job, waited


def described(request: Any, job: JobStatus) -> dict[str, Any]:
    """Return the status document, with the result of a successful job."""
    if job.status != SUCCESSFUL or not may_be_inline(request, job):
        return document(request, job)

    def describe(scheduler: Any) -> Any:
        # The value is read while its connection is open.
        return document(request, *outcome(scheduler, job.sid))

    return transact(request, describe)


def outcome(scheduler: Any, sid: str) -> tuple[JobStatus, Any]:
    """Return the status and the value, NOTHING where it cannot be loaded; or raise the 404."""
    try:
        found = scheduler.outcome(sid)
    except Exception as error:
        if is_outage(error):
            raise
        # A class or an object that it refers to is gone; the job can be seen and removed still.
        log.exception("the result of job %r cannot be loaded", sid)
        job = scheduler.status(sid)
        found = job and (job, NOTHING)
    if found is None:
        raise no_such_job()
    return found


def brief_outcome(request: Any, scheduler: Any, sid: str) -> tuple[JobStatus, Any]:
    """Return the same, but NOTHING for a value that no document shows: it is not loaded."""
    job = scheduler.status(sid)
    if job is None or may_be_inline(request, job):
        return outcome(scheduler, sid)
    return job, NOTHING


def json_response(body: Any, status: int = 200) -> Any:
    return Response(dumps(body), status=status, content_type=JSON)


def with_hints(response: Any, job: JobStatus, waited: int | None) -> Any:
    """Add when to come again, and whether the wish to wait was granted."""
    if not job.done:
        response.headers["Retry-After"] = str(retry_after(job))
    if waited is not None:
        response.headers["Preference-Applied"] = f"wait={waited}"
    return response


# -- entity tags -----------------------------------------------------------------------


# Apache's mod_deflate says by a suffix that it compressed, and leaves it to us to take it back.
_REVISION = re.compile("([0-9]{1,30})(?:-[a-z]+)?")


def etag(job: JobStatus) -> str:
    return f'W/"{job.revision}"'


def known_tags(request: Any) -> Tags:
    return Tags(request.headers.get("If-None-Match", ""))


class Tags:
    """The header If-None-Match; WebOb takes no ``*``."""

    def __init__(self, header: str) -> None:
        self.any = header.strip() == "*"
        self.opaque = set(re.findall(r'"([^"]*)"', header))
        found = map(_REVISION.fullmatch, self.opaque)
        self.revisions = {int(match[1]) for match in found if match}

    def match(self, job: JobStatus) -> bool:
        return self.any or any(self._is_known(job, revision) for revision in self.revisions)

    def _is_known(self, job: JobStatus, revision: int) -> bool:
        """Say whether who has seen the revision knows all that is known of the job here.

        Of a running job the process that runs it knows more than the others.
        """
        return revision >= job.revision and revision // TICKS == job.revision // TICKS

    def outdated(self, job: JobStatus) -> bool:
        """Say whether the client knows the job, as it was at another time."""
        return bool(self.opaque) and not self.match(job)
