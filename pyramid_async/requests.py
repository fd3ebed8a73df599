"""The request that a job runs with: the application's own kind, in the job's transaction."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import pyramid_tm
from pyramid.interfaces import VH_ROOT_KEY, IRequestExtensions, IRequestFactory, IRootFactory
from pyramid.request import Request
from pyramid.threadlocal import manager as threadlocals
from pyramid.traversal import DefaultRootFactory

from .jobs import JobRecord
from .tries import Surroundings

log = logging.getLogger(__name__)


# Key of the user in a job's environ.
OWNER = "pyramid_async.owner"
# What a job's environ has of the request that scheduled it; the last one where it is used.
ORIGIN = ("wsgi.url_scheme", "HTTP_HOST", "SCRIPT_NAME", VH_ROOT_KEY)


@lru_cache(maxsize=8)
def with_owner(kind: type, properties: tuple[tuple[str, Any], ...]) -> type:
    """Return a class of requests with the application's properties, whose user is the job's owner.

    The security policy would look for credentials, and a job has none.  Pyramid would make such a
    class for each job: a quarter of what a short one costs.
    """
    owner = property(lambda request: request.environ[OWNER])
    return type(kind.__name__, (kind,), {"authenticated_userid": owner, **dict(properties)})


def origin_of(request: Any) -> tuple[str, ...]:
    """Return what a job needs to make the URLs of its request: the values of `ORIGIN`."""
    # As the environ has it: the attribute is decoded, and a DummyRequest has no scheme.
    environ = request.environ
    origin = getattr(request, "scheme", "http"), request.host, environ.get("SCRIPT_NAME", "")
    return (*origin, environ[VH_ROOT_KEY]) if environ.get(VH_ROOT_KEY) else origin


class RequestSurroundings(Surroundings):
    """What a try runs in, in a Pyramid application.

    ``request.tm`` is made as pyramid_tm makes it, so ``tm.manager_hook`` is honoured; the
    transaction begins before the application's code sees the request.
    """

    def __init__(self, registry: Any, connector: Any, tm: Any = None) -> None:
        factory = registry.queryUtility(IRequestFactory, default=Request)
        self.request = factory.blank("/")
        self.request.registry = registry
        super().__init__(pyramid_tm.create_tm(self.request) if tm is None else tm)
        self.request.environ.update({"tm.manager": self.tm, "tm.active": True})
        self.request.tm = self.tm
        self.connect = connector(self.request)
        self._depth = len(threadlocals.stack)

    def prepare(self, record: JobRecord) -> Any:
        """Complete the request with what the scheduling request was: its host and its user."""
        request = self.request
        request.environ.update(zip(ORIGIN, record.origin or (), strict=False))
        # Set before the root factory asks; the record is a ghost when the callbacks are called.
        request.environ[OWNER] = record.owner
        # As `pyramid.scripting.prepare`, but for the class.
        registry = request.registry
        threadlocals.push({"registry": registry, "request": request})
        extensions = registry.getUtility(IRequestExtensions)  # `scheduler` is one
        for name, method in extensions.methods.items():
            setattr(request, name, method.__get__(request, type(request)))
        properties = tuple(extensions.descriptors.items())
        request.__class__ = with_owner(type(request), properties)  # type: ignore[arg-type]
        root = registry.queryUtility(IRootFactory, default=DefaultRootFactory)(request)
        request.__dict__["root"] = root  # as the router does
        if getattr(request, "context", None) is None:
            request.context = root
        return request

    def end(self) -> None:
        # Before the connection goes back to its pool.
        super().end()
        try:
            self.request._process_finished_callbacks()
        except Exception:
            # The job has its outcome already.
            log.exception("a finished callback of a job's request failed")
        finally:
            # What `prepare` pushed, even where the root factory failed.
            del threadlocals.stack[self._depth :]
