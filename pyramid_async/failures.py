"""What is known of an exception: what is in it, what is kept of it, whether it would come again."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pickle import PicklingError, UnpicklingError
from secrets import token_hex

from transaction.interfaces import DoomedTransaction
from ZODB.POSException import InvalidObjectReference, StateLoadError

from .interfaces import OperationFailed
from .jobs import Failure

# Characters that are kept of an exception: an error may quote a whole document.
TEXT_LIMIT = 8_000
TRACEBACK_LIMIT = 32_000

# Errors that the next try would meet again: of the job's data, not of the storage.
LASTING = (
    AttributeError,
    DoomedTransaction,
    EOFError,
    ImportError,
    InvalidObjectReference,
    LookupError,  # POSKeyError too, which a function may expect; see `Try`
    PicklingError,
    StateLoadError,  # which we expect too, of another version's records and signs of life
    TypeError,
    UnpicklingError,
    ValueError,
)


def members(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and, where it is a group, all that are in it."""
    waiting = [error]
    for one in waiting:
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def text_of(error: BaseException) -> str:
    try:
        return str(error)[:TEXT_LIMIT]
    except BaseException as second:  # whatever it is, the job must end
        return f"(its text raises {type(second).__name__})"


def failure_of(error: BaseException, message: str | None = None) -> Failure:
    """Return what is kept of an exception, for operators and for the user."""
    try:
        lines = traceback.format_exception(error)
    except BaseException as second:  # a SyntaxError with odd facts, say
        lines = [*traceback.format_tb(error.__traceback__), f"(its text raises {second!r})"]
    return Failure(
        type(error).__name__,
        message or text_of(error),
        "".join(part[-TEXT_LIMIT:] for part in lines)[-TRACEBACK_LIMIT:],
        token_hex(6),
        text_of(error) if isinstance(error, OperationFailed) else None,
    )
