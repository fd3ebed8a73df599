"""An OpenAPI 3.1 document of the HTTP resource, made from the routes that were added."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from pyramid.interfaces import IRoutesMapper
from pyramid.response import Response

from .client import JAVASCRIPT
from .documents import JSON, OGC_PROBLEM, OWN_PROBLEM, PROBLEM_JSON, RESULTS_REL, dumps
from .jobs import STATUSES
from .jsonrpc import BATCH_LIMIT, BODY_LIMIT, MEDIA_TYPES
from .listing import LIMIT, MOST
from .resources import add_resource, resources

TEXT = {"type": "string"}


def add_openapi(config: Any) -> None:
    """Add the route."""
    add_resource(config, "async.openapi", "openapi.json", GET=openapi)


def openapi(request: Any) -> Any:
    """GET, HEAD: the document."""
    return Response(dumps(description(request)), content_type=JSON)


def description(request: Any) -> dict[str, Any]:
    """Return the OpenAPI document of the routes that this application has."""
    mapper = request.registry.getUtility(IRoutesMapper)
    paths = {
        template(mapper.get_route(name).pattern): path_item(name, methods)
        for name, methods in resources(request.registry).items()
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Asynchronous jobs",
            "version": version("pyramid_async"),
            "description": "Follow, cancel and remove operations that outlast their request.",
        },
        # Relative to where the document was found: the host header is the client's to choose.
        "servers": [{"url": request.script_name or "/"}],
        "paths": paths,
        "components": COMPONENTS,
    }


def template(pattern: str) -> str:
    """Return a route's pattern as a path template: without its regular expressions."""
    return re.sub(r"{(\w+):(?:[^{}]|{[^{}]*})*}", r"{\1}", "/" + pattern.lstrip("/"))


def path_item(name: str, methods: list[str]) -> dict[str, Any]:
    """Describe a route: each of its methods; HEAD as GET without a body."""
    item: dict[str, Any] = {}
    for method in methods:
        described = OPERATIONS[name, "GET" if method == "HEAD" else method]
        responses = {**USUAL, **described["responses"]}
        whole = {"operationId": f"{method.lower()}_{name}", **described, "responses": responses}
        item[method.lower()] = as_head(whole) if method == "HEAD" else whole
    if name in PATH_PARAMETERS:
        item["parameters"] = PATH_PARAMETERS[name]
    return item


def as_head(get: dict[str, Any]) -> dict[str, Any]:
    responses = {
        status: {member: value for member, value in described.items() if member != "content"}
        for status, described in get["responses"].items()
    }
    return {**get, "summary": f"{get['summary']}: the headers alone", "responses": responses}


# -- parts -----------------------------------------------------------------------------


def ref(name: str, kind: str = "schemas") -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


def headers(*names: str) -> dict[str, Any]:
    return {
        name: ref(name, "headers") for name in ("Cache-Control", "X-Content-Type-Options", *names)
    }


def answer(text: str, schema: Any, *names: str, media_type: str = JSON) -> dict[str, Any]:
    return {
        "description": text,
        "headers": headers(*names),
        "content": {media_type: {"schema": schema}},
    }


def nothing(text: str, *names: str) -> dict[str, Any]:
    return {"description": text, "headers": headers(*names)}


def refusal(text: str, *names: str) -> dict[str, Any]:
    return answer(text, ref("problem"), *names, media_type=PROBLEM_JSON)


def query(name: str, text: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": schema, **more}


def header(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": text, "schema": TEXT}


# What every route may answer: by the application's policy, or when something is broken.
USUAL = {
    "401": refusal("The application's security policy refuses the credentials."),
    "403": refusal("The application's security policy refuses the request."),
    "500": refusal("A defect; `errorID` is found in the log."),
    "503": refusal("The database is out of reach.", "Retry-After"),
}

WAIT = [
    query(
        "wait",
        "Hold the answer for this many seconds at most, until there is news: without"
        " `If-None-Match` until the job is done, with it until the document is another one."
        " Cut to the server's limit; not granted to HEAD, nor when too many wait.",
        {"type": "integer", "minimum": 0},
    ),
    header("Prefer", "`wait=N`, as the parameter `wait`; wins over it."),
]
MISSING = refusal("Unknown, expired, removed, or somebody else's: byte for byte the same answer.")
BAD = refusal("A malformed parameter.")
FOLLOW = {
    name: {
        "operationId": f"get_async.{name}",
        "parameters": {"sid": "$response.body#/result/jobID"},
    }
    for name in ("status", "results")
}

# What the routes' methods do; HEAD is derived.
OPERATIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("async.jobs", "GET"): {
        "summary": "The user's own jobs, newest first",
        "description": "The next page is where the link `next` leads.",
        "parameters": [
            query(
                "limit",
                f"How many; {MOST} at most.",
                {"type": "integer", "minimum": 1, "default": LIMIT},
            ),
            query(
                "status",
                "Only these; may be repeated.",
                {"type": "array", "items": {"enum": list(STATUSES)}},
                explode=True,
            ),
        ],
        "responses": {
            "200": answer("A page of the list.", ref("jobs")),
            "400": BAD,
            "404": refusal("Nobody is logged in."),
        },
    },
    ("async.status", "GET"): {
        "summary": "The status document, in every state",
        "parameters": [
            *WAIT,
            header("If-None-Match", "The `ETag` of the document that the client has."),
        ],
        "responses": {
            "200": answer(
                "The document.", ref("statusInfo"), "ETag", "Retry-After", "Preference-Applied"
            ),
            "304": nothing(
                "The client has it already.", "ETag", "Retry-After", "Preference-Applied"
            ),
            "400": BAD,
            "404": MISSING,
        },
    },
    ("async.status", "DELETE"): {
        "summary": "Cancel an unfinished job, remove a finished one",
        "parameters": [
            query("only", "`cancel` leaves a finished job alone.", {"enum": ["cancel"]}),
            header("If-Match", "`*` alone is ever true: all tags are weak."),
            header("If-None-Match", "An `ETag`: only if the document is another one by now."),
        ],
        "responses": {
            "200": answer("The last document.", ref("statusInfo")),
            "400": BAD,
            "404": MISSING,
            "409": answer("`only=cancel`, and the job is finished.", ref("statusInfo")),
            "412": refusal("If-Match or If-None-Match does not let it be done."),
        },
    },
    ("async.results", "GET"): {
        "summary": "The bare result",
        "parameters": WAIT,
        "responses": {
            "200": {
                "description": "The result: JSON, or a file as an attachment.",
                "headers": headers("Preference-Applied", "Content-Disposition"),
                "content": {JSON: {}, "*/*": {}},
            },
            "204": nothing(
                "The job succeeded and gave nothing, or nothing that JSON can say.",
                "Preference-Applied",
            ),
            "400": BAD,
            "404": refusal(
                "No such job; or its result is not ready, then with `Retry-After`; or the job"
                " was dismissed.",
                "Retry-After",
                "Preference-Applied",
            ),
            "500": refusal("The job failed, and this is why; or a defect.", "Preference-Applied"),
        },
    },
    ("async.rpc", "POST"): {
        "summary": "The same operations as JSON-RPC 2.0",
        "requestBody": {
            "required": True,
            # Whatever JSON it is, a response object tells what is wrong with it.
            "description": f"A request object of JSON-RPC 2.0 or a batch of at most {BATCH_LIMIT}."
            " Methods: the operations of the application, `async.status`, `async.result` and"
            f" `async.cancel`. {BODY_LIMIT:,} bytes at most.",
            "content": {
                media_type: {
                    "schema": {},
                    "examples": {
                        "start": {
                            "value": {"jsonrpc": "2.0", "method": "echo", "params": ["x"], "id": 1}
                        },
                        "ask": {
                            "value": {
                                "jsonrpc": "2.0",
                                "method": "async.status",
                                "params": {"jobID": "0123456789abcdef0123456789abcdef"},
                                "id": 2,
                            }
                        },
                    },
                }
                for media_type in MEDIA_TYPES
            },
        },
        "responses": {
            "200": {**answer("What the calls are answered with.", ref("rpc")), "links": FOLLOW},
            "204": nothing("Notifications alone: nothing to answer."),
            "400": refusal("A failed CSRF check, where the application has one."),
            "413": refusal(f"A body of more than {BODY_LIMIT:,} bytes."),
            "415": refusal("Another media type."),
        },
    },
    ("async.client", "GET"): {
        "summary": "The browser client, an ES module; the one answer that may be kept",
        "parameters": [query("v", "The version, as the application links it.", TEXT)],
        "responses": {
            "200": {
                "description": "The module.",
                "content": {JAVASCRIPT: {"schema": TEXT}},
            },
            "304": {"description": "The client has it already."},
            "400": BAD,
        },
    },
    ("async.openapi", "GET"): {
        "summary": "This document",
        "responses": {"200": answer("The document.", {"type": "object"})},
    },
}

SID = {
    "name": "sid",
    "in": "path",
    "required": True,
    "description": "The job's id.",
    "schema": {"type": "string", "minLength": 1},
}
PATH_PARAMETERS = {"async.status": [SID], "async.results": [SID]}


# -- components ------------------------------------------------------------------------

DATE_TIME = {"type": "string", "format": "date-time"}
LINK = {
    "type": "object",
    "required": ["href", "rel", "type"],
    "properties": {
        "href": {"type": "string", "format": "uri"},
        "rel": {"enum": ["self", "monitor", "next", RESULTS_REL]},
        "type": TEXT,
        "download": {"type": "boolean", "description": "The result is a file."},
    },
}
LINKS = {"type": "array", "items": LINK, "minItems": 1}
STATUS_INFO = {
    "description": "statusInfo of OGC API - Processes 1.0 and more; ignore unknown members.",
    "type": "object",
    "required": ["jobID", "type", "status", "done", "created", "updated", "links"],
    "properties": {
        "jobID": TEXT,
        "type": {"const": "process"},
        "status": {"enum": list(STATUSES)},
        "done": {"type": "boolean", "description": "The status will not change any more."},
        "processID": {"type": "string", "description": "The operation's public name."},
        "title": TEXT,
        "created": DATE_TIME,
        "updated": DATE_TIME,
        "started": DATE_TIME,
        "finished": DATE_TIME,
        "expires": {**DATE_TIME, "description": "When a finished job is forgotten."},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "message": TEXT,
        "retryAfter": {
            "type": "integer",
            "minimum": 1,
            "description": "Seconds after which a look at an unfinished job may be worth it.",
        },
        "result": {"description": "Of a successful job, where it is small JSON."},
        "error": ref("problem"),
        "links": LINKS,
    },
}
PROBLEM = {
    "description": f"A problem of RFC 9457. Types: about:blank, {OGC_PROBLEM}no-such-job, "
    f"{OGC_PROBLEM}result-not-ready, {OWN_PROBLEM}…",
    "type": "object",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": TEXT,
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "A text that the user may read."},
        "errorID": {"type": "string", "description": "Found in the server's log."},
    },
}
RPC_RESPONSE = {
    "type": "object",
    "required": ["jsonrpc", "id"],
    "properties": {
        "jsonrpc": {"const": "2.0"},
        "id": {"description": "That of the call: a string, a number, or null."},
        "result": {},
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "integer"}, "message": TEXT, "data": {}},
        },
    },
}
COMPONENTS = {
    "schemas": {
        "statusInfo": STATUS_INFO,
        "problem": PROBLEM,
        "jobs": {
            "type": "object",
            "required": ["jobs", "links"],
            "properties": {
                "jobs": {"type": "array", "items": ref("statusInfo"), "maxItems": MOST},
                "links": LINKS,
            },
        },
        "rpc": {
            "anyOf": [
                RPC_RESPONSE,
                {"type": "array", "items": RPC_RESPONSE, "minItems": 1, "maxItems": BATCH_LIMIT},
            ]
        },
    },
    "headers": {
        "Cache-Control": {"required": True, "schema": {"const": "no-store"}},
        "X-Content-Type-Options": {"required": True, "schema": {"const": "nosniff"}},
        "ETag": {"required": True, "schema": {"type": "string", "pattern": '^W/"[0-9]+"$'}},
        "Retry-After": {"schema": {"type": "integer", "minimum": 1}},
        "Preference-Applied": {"schema": {"type": "string", "pattern": "^wait=[0-9]+$"}},
        "Content-Disposition": {"schema": {"type": "string", "pattern": "^attachment"}},
    },
}
