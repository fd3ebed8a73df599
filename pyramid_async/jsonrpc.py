"""The same operations as JSON-RPC 2.0: start by name, ask, cancel."""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
from collections.abc import Callable
from secrets import token_hex
from typing import Any, ClassVar

from pyramid.httpexceptions import HTTPException
from pyramid.response import Response

from .documents import JSON, NOTHING, document, dumps, failure, problem, retry_after, to_json
from .interfaces import NotSchedulable, SchedulerFull
from .jobs import DISMISSED, FAILED, JobStatus
from .resources import FULL_RETRY, add_resource, is_outage, root_of
from .views import brief_outcome, outcome, visible

log = logging.getLogger(__name__)

MEDIA_TYPES = (JSON, "application/json-rpc")
BODY_LIMIT = 1024 * 1024  # bytes
BATCH_LIMIT = 50
# Bytes of results after which the others of a batch are linked: each may be of any size.
RESULTS_LIMIT = 1024 * 1024

PARSE_ERROR = (-32700, "Parse error")
INVALID_REQUEST = (-32600, "Invalid Request")
METHOD_NOT_FOUND = (-32601, "Method not found")
INVALID_PARAMS = (-32602, "Invalid params")
INTERNAL_ERROR = (-32603, "Internal error")
NO_SUCH_JOB = (-32001, "No such job")
BUSY = (-32002, "Busy")
NO_RESULT = (-32003, "No result")
FORBIDDEN = (-32004, "Forbidden")


def add_rpc(config: Any) -> None:
    """Add the route."""
    add_resource(config, "async.rpc", "rpc", POST=rpc)


def rpc(request: Any) -> Any:
    """POST: answer a request or a batch; all in the request's transaction."""
    if request.content_type.lower() not in MEDIA_TYPES:
        raise problem(415)
    if not {"tm.active", "repoze.tm.active"} & set(request.environ):
        raise RuntimeError("JSON-RPC needs a transaction; tm.activate_hook leaves it out")
    answer = Dispatcher(request).answer(body_of(request))
    if answer is None:
        return Response(status=204)
    return Response(dumps(answer), content_type=JSON)


def body_of(request: Any) -> bytes:
    """Return the body, or raise a 413 before more of it than allowed is read."""
    if request.is_body_seekable:
        request.body_file_raw.seek(0)  # an earlier attempt of pyramid_retry has read it
    body: bytes = request.body_file.read(BODY_LIMIT + 1)
    if len(body) > BODY_LIMIT:
        raise problem(413)
    return body


# -- the protocol ------------------------------------------------------------------------


class RpcError(Exception):
    """What a call is answered with in place of a result: (code, message), data."""

    def __init__(self, kind: tuple[int, str], data: Any = None) -> None:
        super().__init__(kind, data)
        self.error: dict[str, Any] = {"code": kind[0], "message": kind[1]}
        if data is not None:
            self.error["data"] = data


class Undone(RpcError):
    """A call failed in a way that may have left half of its work: the whole batch is undone."""


class Dispatcher:
    """Answers the calls of one HTTP request."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.methods = Methods(request)

    def answer(self, body: bytes) -> Any:
        """Return what is to be sent: a response, a list of them, or None for nothing."""
        try:
            calls = parse(body)
        except RpcError as error:
            return response(None, error=error.error)
        if not isinstance(calls, list):
            return next(iter(self.answers([calls])), None)
        if not 0 < len(calls) <= BATCH_LIMIT:
            return response(None, error=RpcError(INVALID_REQUEST).error)
        return self.answers(calls) or None

    def answers(self, calls: list[Any]) -> list[dict[str, Any]]:
        try:
            answers = [respond(call, self.result_or_error) for call in calls]
        except Undone as error:
            # All jobs of a batch exist or none.
            self.request.tm.doom()
            undone = dict(error=error.error)
            answers = [respond(call, lambda _: undone) for call in calls]
        return [answer for answer in answers if answer is not None]

    def result_or_error(self, call: dict[str, Any]) -> dict[str, Any]:
        name = call["method"]
        try:
            return dict(result=self.methods.call(name, call.get("params", [])))
        except RpcError as error:
            return dict(error=error.error)
        except HTTPException:
            raise
        except SchedulerFull:
            raise Undone(BUSY, {"retryAfter": FULL_RETRY}) from None
        except Exception as error:
            if is_outage(error):
                raise
            error_id = token_hex(6)
            log.error("RPC method %r failed, errorID %s", name, error_id, exc_info=error)
            raise Undone(INTERNAL_ERROR, {"errorID": error_id}) from None


def parse(body: bytes) -> Any:
    """Return strict JSON as Python objects, or raise the parse error."""
    try:
        return json.loads(body.decode(), parse_constant=no_number, parse_float=finite)
    except (ValueError, RecursionError):
        raise RpcError(PARSE_ERROR) from None


def no_number(text: str) -> Any:
    raise ValueError(text)


def finite(text: str) -> float:
    """Return the number, unless it is too large to be one when it is written again."""
    number = float(text)
    return number if math.isfinite(number) else no_number(text)


def is_call(call: Any) -> bool:
    """Say whether it is a request object of JSON-RPC 2.0."""
    return (
        isinstance(call, dict)
        and call.get("jsonrpc") == "2.0"
        and isinstance(call.get("method"), str)
        and isinstance(call.get("params", []), list | dict)
        and isinstance(call.get("id"), str | int | float | None)
        and not isinstance(call.get("id"), bool)
    )


def response(id: Any, **answer: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", **answer, "id": id}


def respond(call: Any, result_or_error: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    """Return the response of one call, or None for a notification."""
    if not is_call(call):
        return response(None, error=RpcError(INVALID_REQUEST).error)
    answer = result_or_error(call)
    return response(call["id"], **answer) if "id" in call else None


# -- the methods -------------------------------------------------------------------------


class Methods:
    """What can be called: the registered operations, and three methods about jobs.

    All work in the request's transaction.
    """

    own: ClassVar = {
        "async.status": "status",
        "async.result": "job_result",
        "async.cancel": "cancel",
    }

    def __init__(self, request: Any) -> None:
        self.request = request
        self.scheduler = request.scheduler
        self.read = 0  # bytes of results

    def call(self, name: str, params: Any) -> Any:
        if name in self.own:
            # Not bound in `__init__`: each would keep us, and the request, for the collector.
            method = getattr(self, self.own[name])
            args, kw = arguments(method, params)
            return method(*args, **kw)
        if name in self.scheduler.operations:
            return self.start(name, params)
        raise RpcError(METHOD_NOT_FOUND)

    def start(self, name: str, params: Any) -> dict[str, Any]:
        """Schedule an operation; return the document of its job."""
        operation = self.scheduler.operations[name]
        permission = operation.permission
        if permission and not self.request.has_permission(permission, root_of(self.request)):
            raise RpcError(FORBIDDEN)
        args, kw = arguments(operation.function, params)
        scheduler = self.scheduler.using(**operation.options).named(name)
        try:
            sid = scheduler.schedule(operation.function, *args, **kw)
        except NotSchedulable:
            raise RpcError(INVALID_PARAMS) from None
        job = visible(self.request, sid, scheduler)
        if job is None:  # it has the operation's key, and is another user's
            raise RpcError(BUSY, {"retryAfter": FULL_RETRY})
        return document(self.request, job)

    def status(self, jobID: Any) -> dict[str, Any]:
        self.find(jobID)
        return document(self.request, *brief_outcome(self.request, self.scheduler, jobID))

    def job_result(self, jobID: Any) -> Any:
        """Return the result where it is JSON; else say where it is, or why there is none."""
        job, value = self.find(jobID), NOTHING
        if self.read < RESULTS_LIMIT:
            job, value = outcome(self.scheduler, jobID)
        if job.status == FAILED:
            raise RpcError(NO_RESULT, failure(job))
        if not job.done:
            raise RpcError(NO_RESULT, {"status": job.status, "retryAfter": retry_after(job)})
        if job.status == DISMISSED:
            raise RpcError(NO_RESULT, {"status": job.status})
        text = to_json(value)
        if text is None:  # nor are a file and NOTHING
            self.read += job.result_size or 0  # which took as long
            raise RpcError(NO_RESULT, {"links": document(self.request, job)["links"]})
        self.read += len(text)
        return value

    def cancel(self, jobID: Any) -> dict[str, Any]:
        """Dismiss the job unless it is finished; return its document."""
        self.find(jobID)
        last = self.scheduler.dismiss(jobID)
        return self.status(jobID) if last is None else document(self.request, last)

    def find(self, sid: Any) -> JobStatus:
        if not isinstance(sid, str):
            raise RpcError(INVALID_PARAMS)
        job = visible(self.request, sid, self.scheduler)
        if job is None:
            raise RpcError(NO_SUCH_JOB)
        return job


# From Python 3.14 on annotations are evaluated when they are asked for, and may name what is
# imported for type checkers alone.
UNEVALUATED: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    UNEVALUATED["annotation_format"] = Format.FORWARDREF


def arguments(f: Callable[..., Any], params: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return (args, kw) of the parameters, or raise the error where they do not fit."""
    args, kw = (params, {}) if isinstance(params, list) else ([], params)
    try:
        inspect.signature(f, **UNEVALUATED).bind(*args, **kw)
    except TypeError:
        raise RpcError(INVALID_PARAMS) from None
    except ValueError:
        pass  # a function in C that tells no signature: its job will tell
    return args, kw
