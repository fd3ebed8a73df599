"""Explain a conflict: which object, and which other transaction wrote it."""

from __future__ import annotations

import logging
from typing import Any

from ZODB.utils import oid_repr

from .transactional import OwnManager

log = logging.getLogger(__name__)


# What a transaction may tell about its writer, in the history.
WHO = ("description", "user_name", "pyramid_async")


def explain(error: BaseException, db: Any) -> str:
    """Return what a ConflictError of the database tells, or the error's own text.

    Cost: one look into the storage's history, where the storage keeps one.
    """
    oid, serials = getattr(error, "oid", None), getattr(error, "serials", None)
    if oid is None:
        return repr(error)
    what = f"conflict on {getattr(error, 'class_name', None) or 'object'} {oid_repr(oid)}"
    writer = serials and _writer(db, oid, serials[0])
    return f"{what}, written by {describe(writer)}" if writer else what


def _writer(db: Any, oid: bytes, tid: bytes) -> dict[str, Any] | None:
    try:
        # Not `db.history`: RelStorage would ask in one transaction, the first, and never end it.
        connection = db.open(OwnManager())
        try:
            entries = connection._storage.history(oid, size=10)
        finally:
            connection.close()
    except Exception as error:  # no history here, or the storage is out of reach
        log.debug("no history of %s: %r", oid_repr(oid), error)
        return None
    # A RelStorage without history knows of the last transaction nothing but its id.
    return next((e for e in entries if e["tid"] == tid and any(map(e.get, WHO))), None)


def describe(entry: dict[str, Any]) -> str:
    """Return who made a transaction, from its entry in the history."""
    sid = entry.get("pyramid_async")
    who = f"job {_text(sid)!r}" if sid else f"{_text(entry['description'])!r}"
    user = _text(entry["user_name"])
    return f"{who} of user {user!r}" if user else who


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
