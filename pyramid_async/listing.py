"""The list of a user's own jobs, page by page."""

from __future__ import annotations

import base64
import json
from typing import Any

from .documents import JSON, document, problem
from .inputs import digits, parameters
from .jobs import STATUSES, JobStatus

LIMIT = 10
MOST = 100


def page(request: Any) -> dict[str, Any]:
    """Return the page of the list that the request asks for, newest job first."""
    limit, after, wanted = limit_of(request), cursor_of(request), statuses_of(request)
    if request.authenticated_userid is None:
        raise problem(404)
    jobs = [job for job in request.scheduler.jobs(wanted) if after is None or place(job) < after]
    links = [link(request, "self")]
    if len(jobs) > limit:
        links.append(link(request, "next", cursor=encoded(jobs[limit - 1])))
    return {"jobs": [document(request, job) for job in jobs[:limit]], "links": links}


def limit_of(request: Any) -> int:
    """Return how many jobs a page has, or raise a 400."""
    try:
        limits = [digits(text) for text in parameters(request, "limit")] or [LIMIT]
    except ValueError:
        limits = [0]
    if not all(limits):
        raise problem(400, detail=f"limit must be a whole number from 1 to {MOST}")
    return min(MOST, limits[0])


def statuses_of(request: Any) -> list[str]:
    """Return the statuses to show, all where none is given, or raise a 400."""
    wanted = parameters(request, "status")
    if set(wanted) - set(STATUSES):
        raise problem(400, detail=f"status must be one of {', '.join(STATUSES)}")
    return wanted


# -- the cursor: where the page before ended -----------------------------------------------


def place(job: JobStatus) -> tuple[float, str]:
    """Return the job's place in the list."""
    return job.created, job.sid


def encoded(job: JobStatus) -> str:
    return base64.urlsafe_b64encode(json.dumps(place(job)).encode()).decode()


def cursor_of(request: Any) -> tuple[float, str] | None:
    """Return the place after which the page begins, or raise a 400."""
    given = parameters(request, "cursor")
    if not given:
        return None
    try:
        created, sid = json.loads(base64.b64decode(given[0], b"-_", validate=True))
        return float(created), str(sid)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise problem(400, detail="the cursor is none that was given") from None


def link(request: Any, rel: str, **changed: str) -> dict[str, str]:
    """Return a link to the list with the same parameters, but those *changed*."""
    kept = [pair for pair in request.GET.items() if pair[0] not in changed]
    href = request.route_url("async.jobs", _query=[*kept, *changed.items()])
    return {"href": href, "rel": rel, "type": JSON}
