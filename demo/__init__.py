"""A small catalogue: upload CSV files, search their rows, export them; long work runs as jobs."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from pyramid.config import Configurator
from pyramid.events import NewResponse
from pyramid.request import Request
from pyramid.scripting import prepare
from pyramid.session import SignedCookieSessionFactory
from pyramid_zodbconn import get_connection

from . import characters, jobs
from .models import Catalogue
from .sample import SAMPLE, write_sample
from .users import Users

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # A job's address is the key to it.
    "Referrer-Policy": "same-origin",
}


def main(global_config: dict[str, str], **settings: Any) -> Any:
    """Return the WSGI application."""
    data = Path(settings["demo.data"])
    data.mkdir(parents=True, exist_ok=True)
    write_sample(data / SAMPLE)
    with Configurator(settings=settings) as config:
        config.include("pyramid_jinja2")
        config.include("pyramid_retry")
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.set_session_factory(
            # Without a timeout: a page may be left open for long, and its forms need their token.
            SignedCookieSessionFactory(
                settings["demo.secret"], httponly=True, samesite="Lax", timeout=None
            )
        )
        config.set_security_policy(Users(settings["demo.secret"]))
        config.set_default_csrf_options(require_csrf=True, callback=needs_token)
        config.add_request_method(catalogue, reify=True)
        config.add_subscriber(add_headers, NewResponse)
        add_operations(config)
        for module in ("users", "views", "characters", "elsewhere"):
            config.include(f".{module}")
    # At exit the last comes first: the library, which registers below, still gives jobs back.
    atexit.register(close_databases, config.registry)
    app = config.make_wsgi_app()
    prepare_database(app.registry)
    return app


def add_operations(config: Configurator) -> None:
    """Name the functions: the pages ask for the name, and the first can be called by JSON-RPC."""
    config.add_operation("echo", jobs.echo, title="Echo")
    for name, job in (
        ("import", jobs.import_csv),
        ("export", jobs.export_csv),
        ("count", jobs.count_slowly),
        ("characters", characters.index_characters),
    ):
        config.add_operation(name, job, permission="nobody")


def needs_token(request: Request) -> bool:
    """Say whether a form's token is asked for.

    A page of another origin has none. JSON-RPC takes nothing but JSON, for which a browser asks
    first, and only listed origins are told yes.
    """
    return request.matched_route is None or request.matched_route.name != "async.rpc"


def prepare_database(registry: Any) -> None:
    """Make the root object before requests can race for it."""
    with prepare(registry=registry) as environment:
        request = environment["request"]
        with request.tm:
            connection = get_connection(request)
            connection.root().setdefault("demo", Catalogue())
            connection.root().setdefault(characters.KEY, characters.Characters())


def close_databases(registry: Any) -> None:
    for database in registry._zodb_databases.values():
        database.close()  # closed before, it does nothing


def catalogue(request: Request) -> Catalogue:
    return get_connection(request).root()["demo"]


def add_headers(event: NewResponse) -> None:
    for name, value in HEADERS.items():
        event.response.headers.setdefault(name, value)
