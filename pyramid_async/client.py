"""The browser client: one file, at ``{prefix}/client.js``."""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.resources import files
from typing import Any

from pyramid.response import Response

from .inputs import parameters
from .resources import add_resource

ROUTE = "async.client"
FILE = "client.js"
# The media type that every browser takes for a module.
JAVASCRIPT = "text/javascript"
# The address names the version, so what is stored under it never changes.
# Private: a security policy or session may add its cookie to this answer, as to any other.
FOR_EVER = "private, max-age=31536000, immutable"
ASK_AGAIN = "private, no-cache"
_KEY = "pyramid_async.client"


class Client:
    """The file, and the version that its content is."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.version = hashlib.sha256(content).hexdigest()[:16]


def add_client(config: Any) -> None:
    """Add the route of the client, and ``request.async_client_url()``."""
    config.registry[_KEY] = Client(files(__package__).joinpath("static", FILE).read_bytes())
    add_resource(config, ROUTE, FILE, GET=client)
    # No method: Pyramid would keep that on each request, which only the garbage collector frees.
    config.add_request_method(lambda r: partial(client_url, r), "async_client_url", property=True)


def client(request: Any) -> Any:
    """GET, HEAD: the module."""
    file = request.registry[_KEY]
    named = parameters(request, "v") == [file.version]
    # Not left to WebOb: for a range that is none it would have an error kept for ever.
    if file.version in request.if_none_match:
        response = Response(status=304)
    else:
        response = Response(file.content, content_type=JAVASCRIPT, charset="utf-8")
    response.etag = file.version
    response.headers["Cache-Control"] = FOR_EVER if named else ASK_AGAIN
    return response


def client_url(request: Any, **options: Any) -> str:
    """Return the path of the client's version at hand; *options* are those of `route_url`.

    ``_app_url="https://api.example.org"`` makes it an address for pages of other hosts.
    """
    options = {"_app_url": request.script_name, **options}
    return request.route_url(ROUTE, _query={"v": request.registry[_KEY].version}, **options)
