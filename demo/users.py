"""Who is who: every browser is a user of its own, and may be the operator for the asking."""

from __future__ import annotations

import secrets
from typing import Any

from pyramid.authentication import AuthTktCookieHelper
from pyramid.config import Configurator
from pyramid.events import BeforeRender
from pyramid.httpexceptions import HTTPSeeOther
from pyramid.request import Request
from pyramid.security import remember
from pyramid.view import view_config

OPERATOR = "operator"
MANAGE = "async.manage"  # the permission to see everybody's jobs


def includeme(config: Configurator) -> None:
    config.add_route("operator", "/operator", request_method="POST")
    config.add_subscriber(welcome, BeforeRender)
    config.scan(__name__)


class Users:
    """The security policy: a signed cookie holds the user's name and, for an operator, the role.

    An application has a login here; nothing else of it would be different.
    """

    def __init__(self, secret: str) -> None:
        self.cookie = AuthTktCookieHelper(
            secret,
            cookie_name="user",
            hashalg="sha512",
            http_only=True,
            samesite="Lax",
            wild_domain=False,
        )

    def identity(self, request: Request) -> dict[str, Any] | None:
        return self.cookie.identify(request)

    def authenticated_userid(self, request: Request) -> str | None:
        identity = self.identity(request)
        return identity["userid"] if identity else None

    def permits(self, request: Request, context: Any, permission: str) -> bool:
        identity = self.identity(request)
        return permission == MANAGE and identity is not None and OPERATOR in identity["tokens"]

    def remember(self, request: Request, userid: str, **kw: Any) -> Any:
        return self.cookie.remember(request, userid, **kw)

    def forget(self, request: Request, **kw: Any) -> Any:
        return self.cookie.forget(request)


def welcome(names: BeforeRender) -> None:
    """Name whoever gets a first page; a program that gets none stays anonymous."""
    if names["request"].authenticated_userid is None:
        names["request"].add_response_callback(name_user)


def name_user(request: Request, response: Any) -> None:
    response.headerlist.extend(remember(request, new_name()))


def new_name() -> str:
    return f"guest-{secrets.token_hex(4)}"


@view_config(route_name="operator")
def switch(request: Request) -> HTTPSeeOther:
    """Make the user an operator, or an ordinary user again."""
    tokens = () if is_operator(request) else (OPERATOR,)
    response = HTTPSeeOther(request.route_path("index"))
    user = request.authenticated_userid or new_name()
    response.headerlist.extend(remember(request, user, tokens=tokens))
    request.session.flash("You are the operator." if tokens else "You are a user like others.")
    return response


def is_operator(request: Request) -> bool:
    # It is the same everywhere; and a page for an error has no context.
    return bool(request.has_permission(MANAGE, request.registry))
