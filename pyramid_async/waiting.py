"""Hold a request until its job is worth an answer, without a transaction or connection."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .documents import problem
from .exits import Exit
from .inputs import digits, parameters
from .interfaces import IScheduler
from .jobs import JobStatus

# Seconds after which a waiter looks again: other processes tell nothing, and clients leave.
LOOK = 0.5

_KEY = "pyramid_async.slots"
# Key of the environ: the id of the request whose transaction it is.
_OWNER = "pyramid_async.transaction"
# A comma inside of quotes ends no preference.
_PREFER_WAIT = re.compile(
    r'(?:(?:[^",]|"(?:[^"\\]|\\.)*")*,)*?\s*wait\s*=\s*("?)([0-9]+)\1\s*(?=[;,]|$)',
    re.IGNORECASE,
)


class Slots:
    """How many requests of this process are held; taking a slot never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    @contextmanager
    def take(self, limit: int) -> Iterator[bool]:
        """Say whether one of *limit* slots was free, and hold it for the time of the block."""
        with self._lock:
            free = self.taken < limit
            self.taken += free
        try:
            yield free
        finally:
            with self._lock:
                self.taken -= free


def add_slots(config: Any) -> None:
    config.registry[_KEY] = Slots()


def wanted(request: Any) -> int:
    """Return the seconds for which the client wants to be held; the header wins.

    A malformed header is ignored, as RFC 7240 has it; a malformed parameter is refused.
    """
    try:
        asked = [digits(text) for text in parameters(request, "wait")]
    except ValueError:
        raise problem(400, detail="wait must be a whole number of seconds") from None
    preferred = _PREFER_WAIT.match(request.headers.get("Prefer", ""))
    return digits(preferred[2]) if preferred else (asked or [0])[0]


def hold(
    request: Any, job: JobStatus, enough: Callable[[JobStatus], bool]
) -> tuple[JobStatus | None, int | None]:
    """Wait as the client wants, until the job is *enough*; return its status then.

    Also return the seconds of the wait that was granted, or None.
    """
    settings = request.registry.getUtility(IScheduler).settings
    seconds = min(wanted(request), settings["wait_max"])
    if not seconds or enough(job) or request.method == "HEAD":
        return job, None
    # The only thread of a process, held, would keep everybody else waiting; in WebTest nobody.
    shared = request.environ.get("wsgi.multithread") or "paste.testing" in request.environ
    with request.registry[_KEY].take(settings["wait_slots"] if shared else 0) as free:
        if not free:
            return job, None
        with transaction_released(request):
            return watch(request, job.sid, enough, seconds), math.ceil(seconds)


def note_transaction(request: Any) -> None:
    """Note whether the request's transaction will be its own; to be called above pyramid_tm.

    A subrequest has a copy of the environ.
    """
    request.environ[_OWNER] = None if "tm.active" in request.environ else id(request)


@contextmanager
def transaction_released(request: Any) -> Iterator[None]:
    """End the request's transaction for a while: who the user is may have been read in it.

    What the application wrote in it is committed, as it would be at the end of the request.  That
    of another request, or of a test, is left alone.
    """
    if not request.environ.get("tm.active") or request.environ.get(_OWNER) != id(request):
        yield
        return
    (request.tm.abort if request.tm.isDoomed() else request.tm.commit)()
    try:
        yield
    finally:
        request.tm.begin()


def watch(
    request: Any, sid: str, enough: Callable[[JobStatus], bool], seconds: float
) -> JobStatus | None:
    """Return the job's status once it is *enough*, the time is over or somebody leaves.

    That is the client, or this process: a server waits for its threads when it ends, for long.
    """
    scheduler = request.registry.getUtility(IScheduler)
    changes = scheduler.worker.changes
    gone = request.environ.get("waitress.client_disconnected", lambda: False)
    deadline = time.monotonic() + seconds
    while True:
        seen = changes.count  # before the look: no change between both is missed
        job = scheduler.transact(lambda inside: inside.status(sid))
        left = deadline - time.monotonic()
        if job is None or enough(job) or left <= 0 or gone() or Exit.asked:
            return job
        changes.wait(seen, min(left, LOOK))
