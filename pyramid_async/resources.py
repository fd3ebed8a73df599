"""A route whose every answer is what HTTP wants: 405 with Allow, and problems for exceptions."""

from __future__ import annotations

import logging
from secrets import token_hex
from typing import Any
from weakref import ref

from pyramid.decorator import reify
from pyramid.exceptions import BadCSRFOrigin, BadCSRFToken
from pyramid.httpexceptions import HTTPException
from pyramid.interfaces import IRootFactory
from pyramid.response import Response
from pyramid.security import NO_PERMISSION_REQUIRED
from pyramid.traversal import DefaultRootFactory, ResourceTreeTraverser
from transaction.interfaces import TransientError

from .cors import add_async_cors, protect
from .documents import PROBLEM_JSON, busy, dumps, problem, problem_members
from .inputs import NO_FORM, form_fields
from .interfaces import SchedulerFull

log = logging.getLogger(__name__)

DEFAULT_PREFIX = "/async"
OF_THE_BODY = {"content-encoding", "content-length", "content-type"}
_KEY = "pyramid_async.resources"
# What drivers of SQL databases raise when theirs is away (PEP 249); they have no base in common.
OUTAGES = {"OperationalError", "InterfaceError"}
# What tells a statement that is wrong from these: codes of SQLite, and of MySQL for a column.
SQLITE_ERROR, BAD_FIELD = 1, 1054
# What a program that is refused may do about it; their own titles are "Bad Request".
CSRF = {
    BadCSRFToken: "the CSRF token is missing or wrong",
    BadCSRFOrigin: "the CSRF check refuses the origin",
}
# Seconds after which a full store may have room.
FULL_RETRY = 5


def add_refusals(config: Any) -> None:
    """Add the views of exceptions that the application's own routes raise too."""
    config.add_exception_view(full, context=SchedulerFull)


def add_resource(config: Any, name: str, pattern: str, api: bool = True, **views: Any) -> None:
    """Add a route, a view for each method, and what answers everything else.

    The route is below the prefix of the include, or else ``/async``.  Pages for people are no
    part of the *api*: no other origin may read them, no document tells of them, and they check
    their forms themselves.
    """
    with config.route_prefix_context(None if config.route_prefix else DEFAULT_PREFIX):
        config.add_route(name, pattern, factory=Outside, inherit_slash=not pattern)
    for method, view in views.items():
        # Who may see a job is decided job by job; CSRF checks are the application's choice.
        config.add_view(
            view,
            route_name=name,
            request_method=method,
            permission=NO_PERMISSION_REQUIRED,
            require_csrf=None if api else False,
        )
    methods = [*views]
    if "GET" in views:
        methods.insert(methods.index("GET") + 1, "HEAD")
    if api:
        config.registry.setdefault(_KEY, {})[name] = methods
        add_async_cors(config, name, methods)
        methods = [*methods, "OPTIONS"]
    config.add_view(
        NotAllowed(methods),
        route_name=name,
        permission=NO_PERMISSION_REQUIRED,
        require_csrf=False,  # it does nothing, and a 400 would hide what is wrong
    )
    config.add_exception_view(answer, context=Exception, route_name=name)


def resources(registry: Any) -> dict[str, list[str]]:
    """Return what `add_resource` added: route names and their methods."""
    return registry[_KEY]


class Outside:
    """The context of these routes: the application's own root would open its database.

    So that is made when something of it is asked for, as by a policy that has its users there.
    """

    __name__ = ""

    def __init__(self, request: Any) -> None:
        self._request = ref(request)  # which has us: both would wait for the collector

    @reify
    def __parent__(self) -> Any:
        return root_of(self._request())

    def __getitem__(self, name: Any) -> Any:
        return self.__parent__[name]

    def __contains__(self, name: Any) -> bool:
        return name in self.__parent__

    def __getattr__(self, name: str) -> Any:
        # The framework looks at each context for what has such names.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__parent__, name)


def root_of(request: Any) -> Any:
    """Return the root that the application's own routes have."""
    return request.registry.queryUtility(IRootFactory, default=DefaultRootFactory)(request)


class Staying(ResourceTreeTraverser):
    """The traverser of these routes: a virtual root is one of the application's resources.

    If the context had it, and so any item, a policy would find in it whatever user it looks for.
    """

    VH_ROOT_KEY = None


class NotAllowed:
    """The view for all other methods: Pyramid alone would say 404."""

    def __init__(self, methods: list[str]) -> None:
        self.allow = ", ".join(methods)

    def __call__(self, request: Any) -> Any:
        response = problem(405)
        response.headers["Allow"] = self.allow
        return response


# -- exceptions ------------------------------------------------------------------------


def answer(error: Exception, request: Any) -> Any:
    """Answer for whatever is raised on these routes."""
    match error:
        case SchedulerFull():
            return full(error, request)
        case HTTPException():
            return refused(error)
        case TransientError():
            return unavailable(error, request)
    return broken(error, request)


def full(error: SchedulerFull, request: Any) -> Any:
    """Answer for a full store, on the application's own routes too."""
    response = busy("Too many jobs are waiting; try again later.", FULL_RETRY)
    protect(response)
    return response


def refused(error: Any) -> Any:
    """Return an HTTP exception as a problem, without what its body might tell."""
    if error.content_type == PROBLEM_JSON or error.status_code < 400:
        return error
    detail = CSRF.get(type(error))
    body = dumps(problem_members(error.status_code, error.title, "about:blank", detail=detail))
    response = Response(body, status=error.status, content_type=PROBLEM_JSON)
    # For the client: a cookie to forget, several challenges.
    response.headerlist += [h for h in error.headerlist if h[0].lower() not in OF_THE_BODY]
    return response


def unavailable(error: TransientError, request: Any) -> Any:
    """Answer for a database that is out of reach, or conflicts without end."""
    log.warning("request %r was not answered: %r", request.path_info, error)
    return out_of_reach()


def out_of_reach() -> Any:
    return busy("The service is busy; try again.", 1)


def broken(error: Exception, request: Any) -> Any:
    """Answer for a defect: with an id that is found in the log, and nothing else."""
    if isinstance(error, NO_FORM):
        try:
            form_fields(request)  # as a check of the CSRF token did
        except HTTPException as refusal:
            return refusal
    error_id = token_hex(6)
    log.error("request %r failed, errorID %s", request.path_info, error_id, exc_info=error)
    if is_outage(error):
        return out_of_reach()
    return problem(500, errorID=error_id)


def is_outage(error: Exception) -> bool:
    """Say whether a database is away; of RelStorage's only the driver tells."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, TransientError) or bool(OUTAGES & names and not is_mistake(error))


def is_mistake(error: BaseException) -> bool:
    """Say whether a statement names what is not there, or cannot be understood."""
    error = error.__cause__ or error  # SQLAlchemy's has the driver's as its cause
    return getattr(error, "sqlite_errorcode", 0) == SQLITE_ERROR or error.args[:1] == (BAD_FIELD,)
