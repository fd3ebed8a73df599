"""A page on another origin, which calls this application by JSON-RPC.

The server listens on two ports. To a browser these are two origins, as different as two hosts:
the page comes from one, and `async.cors.origins` allows it to call the other.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPNotFound, HTTPSeeOther
from pyramid.request import Request
from pyramid.view import view_config

PATH = "/elsewhere"


def includeme(config: Configurator) -> None:
    config.add_route("elsewhere", PATH)
    config.scan(__name__)


@view_config(route_name="elsewhere", renderer="templates/elsewhere.jinja2")
def elsewhere(request: Request) -> Any:
    other = other_origin(request)
    if other is None:
        raise HTTPNotFound("async.cors.origins lists no other origin of this host.")
    if request.host_url != other:
        return HTTPSeeOther(other + PATH)
    api = f"http://{request.domain}:{request.registry.settings['demo.port']}"
    request.response.headers["Content-Security-Policy"] = (
        f"default-src 'self'; script-src 'self' {api}; connect-src {api}; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    return {"api": api, "client": request.async_client_url(_app_url=api)}


def other_origin(request: Request) -> str | None:
    """Return the listed origin that is another port of the same host."""
    listed = request.registry.settings.get("async.cors.origins", "").split()
    return next((origin for origin in listed if urlsplit(origin).hostname == request.domain), None)


def elsewhere_url(request: Request) -> str | None:
    """Return the address of the page, where there is one for this host."""
    other = other_origin(request)
    return other and other + PATH
