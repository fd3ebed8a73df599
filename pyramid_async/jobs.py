"""The job record, its states and what may follow what; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, datetime
from typing import Any, NamedTuple, TypedDict

from persistent import Persistent

from .interfaces import InvalidTransition, NotSchedulable

ACCEPTED = "accepted"
RUNNING = "running"
SUCCESSFUL = "successful"
FAILED = "failed"
DISMISSED = "dismissed"

# Status -> what it may become.  The words are those of the wire (OGC API - Processes 1.0).
TRANSITIONS: dict[str, tuple[str, ...]] = {
    ACCEPTED: (RUNNING, DISMISSED),
    RUNNING: (SUCCESSFUL, FAILED, DISMISSED, ACCEPTED),
    SUCCESSFUL: (),
    FAILED: (),
    DISMISSED: (),
}
STATUSES = tuple(TRANSITIONS)
FINAL = tuple(status for status in STATUSES if not TRANSITIONS[status])
UNFINISHED = tuple(status for status in STATUSES if TRANSITIONS[status])


# How a job is taken, in place of the revision that its record had when it was judged lost.
FRESH = 0  # without a claim: nobody can have begun it
UNHELD = -1  # by a claim, unless somebody has it


class Failure(NamedTuple):
    """Why a job failed: the first three are for operators, the last two for the user."""

    class_name: str
    message: str
    traceback: str
    error_id: str
    text: str | None = None  # of an OperationFailed


@dataclass(frozen=True)
class FileResult:
    """A result that is a file: a ZODB blob or bytes, served as an attachment.

    A job that returns one whose content is anything else fails with TypeError.
    """

    content: Any
    media_type: str = "application/octet-stream"
    filename: str | None = None


# More seconds than anybody waits, and few enough for every time that is made of them.
LONGEST = 1e10


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _key(value: Any) -> str:
    _text(value).encode()  # UnicodeEncodeError is a ValueError
    return value


def _queue(value: Any) -> str:
    # Celery's RabbitMQ takes no others.
    if len(_text(value).encode()) > 255 or value.startswith("amq."):
        raise ValueError
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _moment(value: Any) -> datetime | float:
    if isinstance(value, datetime):
        # The outermost years are others in other time zones, where there may be none.
        if value.tzinfo is None or not MINYEAR < value.year < MAXYEAR:
            raise ValueError
        return value
    return _seconds(value)


def _exceptions(value: Any) -> tuple[str, ...]:
    classes = value if isinstance(value, tuple | list) else (value,)
    if not classes or not all(map(_is_exception, classes)):
        raise ValueError
    return tuple(map(class_name, classes))


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def name_of(f: Any) -> str:
    """Return the name of a function, of another object its class's.

    Its repr may load half of a database, and tell it; or raise.
    """
    return class_name(f if hasattr(f, "__qualname__") and hasattr(f, "__module__") else type(f))


class Options(TypedDict, total=False):
    """The options of `using`, for type checkers; None is as good as none."""

    title: str | None
    queue: str | None
    key: str | None
    run_after: datetime | float | None
    timeout: float | None
    result_timeout: float | None
    max_attempts: int | None
    retry_on: type[BaseException] | Sequence[type[BaseException]] | None


# Option of `using` -> (conversion, what is allowed).
OPTIONS: dict[str, tuple[Any, str]] = {
    "title": (_text, "a text that is not empty"),
    "queue": (_queue, "a name of at most 255 bytes in UTF-8 that does not begin with amq."),
    "key": (_key, "a text that is not empty and can be encoded in UTF-8"),
    "run_after": (
        _moment,
        "seconds from now, 0 to 1e10, or a datetime with a time zone, of the years 2 to 9998",
    ),
    "timeout": (_seconds, "seconds, 0 to 1e10"),
    "result_timeout": (_seconds, "seconds, 0 to 1e10"),
    "max_attempts": (_count, "a whole number from 1"),
    "retry_on": (_exceptions, "an exception class or several"),
}


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None, or raise NotSchedulable for one that does not fit."""
    return {name: _option(name, value) for name, value in options.items() if value is not None}


def _option(name: str, value: Any) -> Any:
    if name not in OPTIONS:
        raise NotSchedulable("the job", f"no option {name!r}; known: {', '.join(OPTIONS)}")
    convert, allowed = OPTIONS[name]
    try:
        return convert(value)
    except ValueError:
        raise NotSchedulable("the job", f"option {name} is {value!r}; allowed: {allowed}") from None


# What may be large in a record.
LARGE = ("arguments", "cursor", "result", "result_size", "failure", "exception")


class JobRecord(Persistent):
    """One job, as it is stored.

    The same class serves both stores: the ZODB's connection or the RAM store's transaction
    is its ``_p_jar`` and notes the first write.  Defaults stand on the class, so a small job
    is a small record.

    The record is the fence: whoever changes a job writes its record, so that of two changes
    one conflicts and vanishes.  It must never get a ``_p_resolveConflict``.
    """

    status = ACCEPTED
    revision = 1  # grows with every change that a client can see
    owner: str | None = None  # authenticated user id of the scheduling request
    origin: tuple[str, ...] | None = None  # see `requests.ORIGIN`
    process_id: str | None = None  # public name of a registered operation
    options: dict[str, Any] | None = None
    run_after: float | None = None  # not before this moment, seconds since the epoch
    holder: str | None = None  # the process that has it in its queue, or runs it
    signature: str | None = None  # of the attempt that claimed or finished it
    attempts = 0  # that are known to have begun; a new try after a conflict is none
    cursor: Any = None  # payload of the last checkpoint
    started: float | None = None
    finished: float | None = None
    expires: float | None = None
    contested = False  # an attempt that lost the job may still be alive
    removed = False  # hidden; see `clear`
    retried: str | None = None  # sid of the job that this failed one was scheduled again as
    reached = 0  # percent that an earlier attempt showed: progress never falls
    arguments: Any = None  # payload of (args, kw); None: there are none
    result: Any = None
    result_size: int | None = None  # about how many bytes, of a large one
    media_type: Any = None  # of a result that is a file
    failure: Failure | None = None
    exception: Any = None

    def __init__(self, sid: str, now: float, function: Any, **facts: Any) -> None:
        self.sid = sid
        self.created = self.updated = now  # seconds since the epoch
        self.function = function
        for name, value in facts.items():
            if value is not None:
                setattr(self, name, value)

    def __repr__(self) -> str:
        return f"<job {self.sid!r} {self.status}>"

    @property
    def done(self) -> bool:
        return not TRANSITIONS[self.status]

    def option(self, name: str, default: Any = None) -> Any:
        return default if self.options is None else self.options.get(name, default)

    def move(self, status: str, now: float) -> None:
        """Change the status, or raise InvalidTransition."""
        allowed = TRANSITIONS[self.status]
        if status not in allowed:
            raise InvalidTransition(self.sid, self.status, status, allowed)
        self.status = status
        self.revision += 1
        self.updated = now

    def belongs_to(self, holder: str | None, signature: str) -> bool:
        """Say whether an attempt may run the job: it has claimed the job, or nobody has.

        An unclaimed job is run from the queue of its *holder*: a process, or None for a broker.
        """
        if self.status == RUNNING:
            return self.signature == signature
        return self.status == ACCEPTED and self.signature is None and self.holder == holder

    def claim(self, process: str, signature: str, now: float) -> None:
        """Give the job to one attempt; from now on whatever another one does conflicts."""
        if self.holder is not None and (self.holder, self.signature) != (process, None):
            self.contested = True
        if self.status == RUNNING:
            self.move(ACCEPTED, now)
        self.move(RUNNING, now)
        self.started = now
        self.holder, self.signature = process, signature
        self.attempts += 1

    def lose(self, now: float) -> None:
        """Let any process claim the job; the attempt that ended without a word counts."""
        self.contested = True
        self._open(now)

    def _open(self, now: float) -> None:
        if self.status == RUNNING:
            self.move(ACCEPTED, now)
        else:
            self.revision += 1  # an attempt that claimed nothing may have been seen
            self.updated = now
        self.holder = self.signature = None

    def release(self, now: float) -> None:
        """Let any process claim the job; the attempt that gives it back does not count."""
        if self.status == RUNNING:
            self.attempts -= 1
        self._open(now)

    def reach(self, percent: int | None, started: float | None = None) -> None:
        """Remember how far an attempt came, since a job's progress never falls.

        *started*: when the attempt began; given where no claim has noted it.
        """
        if percent is not None and percent > self.reached:
            self.reached = percent
        if started is not None:
            self.started = started

    def postpone(self, now: float, run_after: float, holder: str | None) -> None:
        """Let *holder*, or any process, run the job again, later."""
        self._open(now)
        self.run_after = run_after
        self.holder = holder

    def finish(self, status: str, now: float, keep: float) -> None:
        """Move to a final status; the record is kept for *keep* more seconds."""
        self.move(status, now)
        self.finished = now
        self.expires = now + self.option("result_timeout", keep)
        self._drop("holder")
        if status != FAILED:  # which may be scheduled again
            # What the job was called with may be large, and nobody asks for it again.
            self._drop("arguments", "cursor")

    def again(self, sid: str, now: float, holder: str | None) -> JobRecord:
        """Return a new job with the call of this failed one; see `give_away`.

        It goes on from the last checkpoint, for what was committed there stays.
        """
        return JobRecord(
            sid,
            now,
            self.function,
            arguments=self.arguments,
            cursor=self.cursor,
            owner=self.owner,
            origin=self.origin,
            process_id=self.process_id,
            options=self.options,
            holder=holder,
        )

    def give_away(self, sid: str) -> None:
        """Note the job that `again` made, which has the arguments from now on."""
        self.retried = sid
        self._drop("arguments", "cursor")

    @property
    def haunted(self) -> bool:
        """Say whether an attempt that must not commit may still be alive, frozen perhaps."""
        return self.contested or self.status == DISMISSED

    def clear(self) -> None:
        """Hide a removed or expired record and take out what is large; the record is written."""
        self.removed = True
        self._drop(*LARGE)

    @property
    def empty(self) -> bool:
        """Say whether there is nothing in the record that `clear` would take out."""
        return not any(name in self.__dict__ for name in LARGE)

    def _drop(self, *names: str) -> None:
        """Go back to the defaults, which take no room."""
        for name in names:
            if name in self.__dict__:
                delattr(self, name)

    def expired(self, now: float) -> bool:
        return self.removed or (self.expires is not None and self.expires <= now)


class Live(NamedTuple):
    """What an attempt shows while it runs; times in seconds since the epoch."""

    started: float
    changed: float
    ticks: int  # visible changes so far; to run is one
    percent: int | None = None
    message: str | None = None
    remaining: float | None = None
    signature: str | None = None
    revision: int | None = None  # of the record that the attempt read

    def shows(self, record: JobRecord) -> bool:
        """Say whether this attempt is the one that the record knows, or the first, unclaimed."""
        if record.signature is None:
            return self.revision == record.revision
        return self.signature == record.signature


@dataclass(frozen=True)
class JobStatus:
    """What is known of a job at one moment; times in seconds since the epoch."""

    sid: str
    status: str
    done: bool
    revision: int
    created: float
    updated: float
    owner: str | None = None
    process_id: str | None = None
    title: str | None = None
    started: float | None = None
    finished: float | None = None
    expires: float | None = None
    progress: int | None = None  # 0..100; 100 only when successful
    message: str | None = None
    remaining: float | None = None  # the job's own estimate, seconds
    attempts: int = 0
    failure: Failure | None = None
    media_type: str | None = None  # of a result that is a file
    result_size: int | None = None  # about how many bytes, where that is more than 64 KiB


# Visible changes of one attempt that a revision leaves room for.
TICKS = 1 << 40


def status_of(record: JobRecord, live: Live | None = None) -> JobStatus:
    """Return the status of a record, with what is known of the attempt that runs it."""
    facts: dict[str, Any] = dict(
        sid=record.sid,
        status=record.status,
        done=record.done,
        revision=record.revision * TICKS,
        created=record.created,
        updated=record.updated,
        owner=record.owner,
        process_id=record.process_id,
        title=record.option("title"),
        started=record.started,
        finished=record.finished,
        expires=record.expires,
        attempts=record.attempts,
        failure=record.failure,
        media_type=record.media_type,
        result_size=record.result_size,
        progress=record.reached or None,
    )
    if record.status == SUCCESSFUL:
        facts.update(progress=100)
    elif live is not None and not record.done:
        facts.update(_running(record, live))
    return JobStatus(**facts)


def _running(record: JobRecord, live: Live) -> dict[str, Any]:
    percent = record.reached or None
    return dict(
        status=RUNNING,
        started=live.started,
        updated=max(record.updated, live.changed),
        revision=record.revision * TICKS + min(live.ticks, TICKS - 1),
        progress=percent if live.percent is None else max(live.percent, record.reached),
        message=live.message,
        remaining=live.remaining,
    )
