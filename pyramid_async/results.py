"""The result of a job as a response: JSON, a file, nothing, or a problem."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import quote

from pyramid.response import FileIter, Response

from .documents import (
    JSON,
    NOTHING,
    OGC_PROBLEM,
    OWN_PROBLEM,
    failure,
    media_type,
    problem,
    problem_response,
    to_json,
)
from .jobs import DISMISSED, FAILED, FileResult, JobStatus

_BLOCK = 64 * 1024


def response_of(request: Any, job: JobStatus, value: Any) -> Any:
    """Return the response that a job's result is, or the problem that there is none."""
    if job.status == FAILED:
        return problem_response(failure(job))
    if job.status == DISMISSED:
        return problem(404, "The job was dismissed: it has no result.", OWN_PROBLEM + "dismissed")
    if not job.done:
        return problem(404, "The result is not ready.", OGC_PROBLEM + "result-not-ready")
    if value is NOTHING:
        return problem(500, "The result cannot be read any more.", OWN_PROBLEM + "result-lost")
    if isinstance(value, FileResult):
        return file_response(request, value)
    return value_response(value)


def value_response(value: Any) -> Any:
    text = None if value is None else to_json(value)
    if text is None:
        return Response(status=204)
    return Response(text, content_type=JSON)


def file_response(request: Any, result: FileResult) -> Any:
    """Return the attachment, streamed where it is a blob."""
    response = Response(headerlist=[])
    response.headers["Content-Type"] = media_type(result.media_type)
    response.headers["Content-Disposition"] = disposition(result.filename)
    if isinstance(result.content, bytes):
        response.body = result.content
        return response
    file = result.content.open("c")
    wrap = request.environ.get("wsgi.file_wrapper", FileIter)
    response.app_iter = wrap(file, _BLOCK)
    response.content_length = os.fstat(file.fileno()).st_size
    return response


def disposition(filename: Any) -> str:
    """Return the header of an attachment: a name in ASCII, and the real one (RFC 6266)."""
    # Clients must not be led to other directories, nor the header to other lines.
    name = "".join(c for c in str(filename or "") if c.isprintable()).replace("\\", "/")
    name = name.rpartition("/")[2].strip(". ")
    if not name:
        return "attachment"
    plain = re.sub(r"[^ !#-$&-\[\]-~]", "_", name)
    real = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'attachment; filename="{plain}"{real}'
