"""The bodies of the HTTP resource: the status document, problems, JSON."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pyramid.httpexceptions import exception_response

from .interfaces import IScheduler
from .jobs import FAILED, SUCCESSFUL, JobStatus

OGC_PROBLEM = "http://www.opengis.net/def/exceptions/ogcapi-processes-1/1.0/"
OWN_PROBLEM = "urn:pyramid-async:problem:"
RESULTS_REL = "http://www.opengis.net/def/rel/ogc/1.0/results"
JSON = "application/json"
PROBLEM_JSON = "application/problem+json"

# Stands for a sid in URLs while they are made: Pyramid keeps each element that it ever quoted.
ANY_SID = "0" * 32

# No result to show: None is one.
NOTHING = object()
# What a result is nested in by documents and batches, and room for a deeper stack.
_NESTING = 50
_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:; ?[\w.-]+=[\w.+-]+)*", re.ASCII)


def document(request: Any, job: JobStatus, value: Any = NOTHING) -> dict[str, Any]:
    """Return the status document; with the *value* of a successful job where it is small JSON."""
    members = {
        "jobID": job.sid,
        "type": "process",
        "status": job.status,
        "done": job.done,
        "processID": job.process_id,
        "title": job.title,
        "created": timestamp(job.created),
        "updated": timestamp(job.updated),
        "started": timestamp(job.started),
        "finished": timestamp(job.finished),
        "progress": job.progress,
        "message": job.message,
        "expires": timestamp(job.expires) if job.done else None,
        "retryAfter": None if job.done else retry_after(job),
        "error": failure(job) if job.status == FAILED else None,
    }
    shown = known(members)
    if job.status == SUCCESSFUL and is_inline(request, value):
        shown["result"] = value
    shown["links"] = links(request, job)
    return shown


def known(members: dict[str, Any]) -> dict[str, Any]:
    """Return the members without those that are None."""
    return {name: member for name, member in members.items() if member is not None}


def links(request: Any, job: JobStatus) -> list[dict[str, Any]]:
    href = job_url(request.route_url, "async.status", job.sid)
    found: list[dict[str, Any]] = [{"href": href, "rel": "self", "type": JSON}]
    if not job.done:
        found.append({"href": href, "rel": "monitor", "type": JSON})
    if job.status == SUCCESSFUL:
        href = job_url(request.route_url, "async.results", job.sid)
        found.append({"href": href, "rel": RESULTS_REL, "type": JSON})
        if job.media_type is not None:
            # A file may be of JSON too.
            found[-1].update(type=media_type(job.media_type), download=True)
    return found


def job_url(make: Callable[..., str], route: str, sid: str, **options: Any) -> str:
    """Return what a request's method *make*, with its *options*, makes of a job's route."""
    # The last one: where the application is mounted, or its host, may look alike.
    return sid.join(make(route, sid=ANY_SID, **options).rsplit(ANY_SID, 1))


def media_type(text: Any) -> str:
    """Return the media type, or the one that says nothing where it is none."""
    fits = isinstance(text, str) and _MEDIA_TYPE.fullmatch(text)
    return text if fits else "application/octet-stream"


def may_be_inline(request: Any, job: JobStatus) -> bool:
    """Say whether the result is worth a look: JSON is shorter than a pickle, but not that much."""
    limit = request.registry.getUtility(IScheduler).settings["inline_limit"]
    return job.media_type is None and (job.result_size or 0) <= 8 * limit


def is_inline(request: Any, value: Any) -> bool:
    limit = request.registry.getUtility(IScheduler).settings["inline_limit"]
    text = None if value is NOTHING else to_json(value)
    return text is not None and len(text) <= limit


def to_json(value: Any) -> bytes | None:
    """Return the value as JSON, or None when it is not JSON, or nested too deep to be shown."""
    for _ in range(_NESTING):
        value = [value]
    try:
        return dumps(value)[_NESTING:-_NESTING]
    # NaN, and integers of more digits than Python turns into text, are ValueErrors.
    except (TypeError, ValueError, RecursionError):
        return None


def dumps(value: Any) -> bytes:
    """Return strict JSON in UTF-8; raise what `json.dumps` raises."""
    options: dict[str, Any] = dict(allow_nan=False, separators=(",", ":"))
    try:
        return json.dumps(value, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair has no UTF-8; as an escape it is JSON.
        return json.dumps(value, **options).encode()


def timestamp(seconds: float | None) -> str | None:
    """Return seconds since the epoch as RFC 3339 has it, in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def retry_after(job: JobStatus) -> int:
    """Return the seconds after which a look at an unfinished job may be worth it, 1 to 30."""
    guess = (time.time() - job.created) / 10 if job.remaining is None else job.remaining
    return math.ceil(max(1, min(30, guess)))


# -- problems --------------------------------------------------------------------------


def problem(status: int, title: str | None = None, type: str = "about:blank", **more: Any) -> Any:
    """Return a problem (RFC 9457) as a response that may also be raised.

    *more* are further members; those that are None are left out.
    """
    title = title or exception_response(status).title
    return problem_response(problem_members(status, title, type, **more))


def problem_response(members: dict[str, Any]) -> Any:
    response = exception_response(members["status"])
    response.content_type = PROBLEM_JSON
    response.body = dumps(members)
    return response


def no_such_job() -> Any:
    """Return the 404 for an unknown, an expired, a removed and another user's job alike."""
    return problem(404, "There is no such job.", OGC_PROBLEM + "no-such-job")


def busy(title: str, seconds: int) -> Any:
    """Return a 503 that says when to try again."""
    response = problem(503, title)
    response.headers["Retry-After"] = str(seconds)
    return response


def failure(job: JobStatus) -> dict[str, Any]:
    """Return the problem of a failed job: of an unexpected exception no more than its id."""
    told = job.failure
    return problem_members(
        500,
        "The operation failed.",
        OWN_PROBLEM + "operation-failed",
        errorID=told and told.error_id,
        detail=told and told.text,
    )


def problem_members(status: int, title: str, type: str, **more: Any) -> dict[str, Any]:
    return {"type": type, "title": title, "status": status, **known(more)}
