"""The headers that every answer of the job routes carries, errors included, and preflight.

One tween over everything does it, because a 405, a failed CSRF check or a 500 without the
CORS headers reaches the page as nothing but "Failed to fetch".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pyramid.exceptions import ConfigurationError
from pyramid.interfaces import IRouteRequest, IRoutesMapper
from pyramid.response import Response
from pyramid.tweens import EXCVIEW

from .interfaces import IScheduler

# Prefix of the names of the routes whose answers are never to be stored or sniffed.
OWN = "async."
# The one of them whose good answers are for everybody, and say themselves how long they last.
PUBLIC = "async.client"
EXPOSED = (
    "Location, Content-Location, Retry-After, ETag, Link, Preference-Applied, Allow,"
    " WWW-Authenticate"
)
# Request headers that a client of the job routes may need, where the preflight names none.
REQUEST_HEADERS = "Authorization, Content-Type, If-None-Match, Prefer, X-CSRF-Token"
MAX_AGE = "7200"  # seconds; the longest that Chromium honours

_KEY = "pyramid_async.cors"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER_NAMES = re.compile(rf"{_TOKEN}(?:[ \t]*,[ \t]*{_TOKEN})*")
# As a browser writes it: the host in lower case or Punycode, no port that goes without saying.
_ORIGIN = re.compile(
    r"\*|null|(?!http:.*:80$|https:.*:443$)"
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)


def add_cors(config: Any) -> None:
    """Add the directive ``add_async_cors`` and the tween."""
    config.add_directive("add_async_cors", add_async_cors)
    # pyramid_tm's tween asks for the user, and what that raises must be marked too.
    config.add_tween(f"{__name__}.Tween", over=["pyramid_tm.tm_tween_factory", EXCVIEW])


def add_async_cors(config: Any, route_name: str, methods: Iterable[str] = ("POST",)) -> None:
    """Let pages of the origins in ``async.cors.origins`` call a route with *methods*."""
    methods = (methods,) if isinstance(methods, str) else methods
    allow = ", ".join([*dict.fromkeys(methods), "OPTIONS"])

    def register() -> None:
        if config.get_routes_mapper().get_route(route_name) is None:
            raise ConfigurationError(f"add_async_cors: there is no route {route_name!r}")
        config.registry.setdefault(_KEY, {})[route_name] = allow

    intr = config.introspectable("async cors", route_name, f"{route_name}: {allow}", "cors route")
    intr.update(route_name=route_name, allow=allow)
    config.action((_KEY, route_name), register, introspectables=(intr,))


class Policy:
    """Which pages may read the answers."""

    def __init__(self, origins: Iterable[str], credentials: bool) -> None:
        self.origins = frozenset(origins)
        self.credentials = credentials
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigurationError(
                    f"async.cors.origins: {origin!r} is no origin; allowed: scheme://host[:port]"
                    " in lower case and without a path, null, or *"
                )

    def allows(self, origin: str | None) -> bool:
        return origin in self.origins or ("*" in self.origins and origin not in (None, "null"))

    def mark(self, response: Any, origin: str | None) -> bool:
        """Set the headers of every answer; return True if a page of *origin* may read it."""
        if not self.origins:
            return False
        response.vary = [*dict.fromkeys([*(response.vary or ()), "Origin"])]
        if not self.allows(origin):
            return False
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in self.origins else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED
        if self.credentials:
            response.headers["Access-Control-Allow-Credentials"] = "true"
        return True


class Tween:
    """Answers preflights, and marks what the routes answer."""

    def __init__(self, handler: Any, registry: Any) -> None:
        self.handler = handler
        self.registry = registry
        settings = registry.getUtility(IScheduler).settings
        self.policy = Policy(settings["cors.origins"], settings["cors.credentials"])
        self.routes: dict[str, str] = registry.get(_KEY, {})

    def __call__(self, request: Any) -> Any:
        if request.method == "OPTIONS":
            allow = self.preflighted(request)
            if allow is not None:
                return self.preflight(request, allow)
        try:
            response = self.handler(request)
        except Exception as error:
            response = self.rescue(request, error)
        self.mark(request, response)
        return response

    def preflighted(self, request: Any) -> str | None:
        """Return the methods of the route that is asked for, or None when it is not known."""
        wanted = request.headers.get("Access-Control-Request-Method")
        route = self.match(request, wanted or request.method)
        # The application may have an OPTIONS view of its own: only preflights are taken from it.
        if route is None or not (wanted or route.name.startswith(OWN)):
            return None
        return self.routes.get(route.name)

    def match(self, request: Any, method: str) -> Any:
        """Return the route that the router would find for *method*, or None."""
        mapper = self.registry.queryUtility(IRoutesMapper)
        # With what other tweens and the application's request methods gave it: predicates ask.
        probe = object.__new__(type(request))
        environ = {**request.environ, "REQUEST_METHOD": method}
        vars(probe).update(vars(request), environ=environ)
        try:
            return mapper(probe)["route"]
        except Exception:
            # The path, or a predicate of the application: the router's own look tells of it.
            return None

    def preflight(self, request: Any, allow: str) -> Any:
        """Answer without authentication, CSRF check or database, whether the job exists or not."""
        response = Response(status=204, headerlist=[("Allow", allow)])
        if self.policy.mark(response, request.headers.get("Origin")):
            names = request.headers.get("Access-Control-Request-Headers", "").strip()
            response.headers.update(
                {
                    "Access-Control-Allow-Methods": allow,
                    "Access-Control-Allow-Headers": (
                        names if _HEADER_NAMES.fullmatch(names) else REQUEST_HEADERS
                    ),
                    "Access-Control-Max-Age": MAX_AGE,
                }
            )
        protect(response)
        return response

    def rescue(self, request: Any, error: Exception) -> Any:
        """Answer what was raised above the router as the route would have answered it."""
        route = self.route(request)
        if request.matched_route is not None or route is None or not route.name.startswith(OWN):
            raise error
        request.request_iface = self.registry.getUtility(IRouteRequest, name=route.name)
        return request.invoke_exception_view(reraise=True)

    def route(self, request: Any) -> Any:
        """Return the request's route, also when another tween kept it from the router."""
        routed = "root" in vars(request)
        return request.matched_route if routed else self.match(request, request.method)

    def mark(self, request: Any, response: Any) -> None:
        route = self.route(request)
        if route is None:
            return
        if route.name.startswith(OWN):
            protect(response, store=route.name == PUBLIC and response.status_code in (200, 304))
        if route.name in self.routes:
            self.policy.mark(response, request.headers.get("Origin"))


def protect(response: Any, store: bool = False) -> None:
    """Keep the answer out of caches unless it is one to *store*; its media type is what it says."""
    if not store:
        # Also for 404 and 405, which may be cached by rules of thumb.
        response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
