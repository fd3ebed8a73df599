"""What a client says in a query or a form; a 400 where that cannot be read."""

from __future__ import annotations

from typing import Any

from .documents import problem

# What WebOb raises for a body that is no form, or one in another charset.
NO_FORM = (ValueError, DeprecationWarning)


def parameters(request: Any, name: str) -> list[str]:
    """Return all values of a query parameter."""
    try:
        return list(request.GET.getall(name))
    except UnicodeDecodeError:
        raise problem(400, detail="the query is not UTF-8") from None


def form_fields(request: Any) -> Any:
    """Return the fields of a form."""
    try:
        return request.POST
    except NO_FORM:
        raise problem(400, detail="the body is no form in UTF-8") from None


def digits(text: str) -> int:
    """Return a whole number of any length, but none over a billion; or raise ValueError."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no whole number")
    return min(10**9, int(text.lstrip("0")[:10] or "0"))
