"""What operators ask and do, for their pages and for the shell."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from heapq import merge
from itertools import chain, islice
from typing import Any, NamedTuple

from transaction.interfaces import TransientError

from .documents import known, timestamp
from .interfaces import AsyncError, JobNotFound
from .jobs import FINAL, STATUSES, UNFINISHED, Failure, JobRecord, JobStatus, name_of
from .process import process_name
from .transactional import transact

log = logging.getLogger(__name__)

# Jobs that one page looks at, at most: its time has a bound, however few of them fit.
SCAN = 1000
# Records that one transaction removes.
BATCH = 200
# Longest text of a job in a list, characters: an application may have made it of anything.
SHORT = 240

_CURSOR = re.compile("([0-9a-f]{0,64})(?:@([0-9]{1,15}(?:[.][0-9]{1,20})?))?")


class BadCursor(AsyncError, ValueError):
    """A cursor that no page gave (cursor)."""

    def __str__(self) -> str:
        return f"the cursor {self.args[0]!r} is none that was given"


@dataclass(frozen=True)
class Report:
    """What operators see of a job; times in seconds since the epoch."""

    sid: str
    job: JobStatus | None = None  # None: the record cannot be read, and `fault` tells why
    function: str = ""
    queue: str | None = None
    key: str | None = None
    run_after: float | None = None
    holder: str | None = None  # the process that has it, and its last sign of life
    retried: str | None = None  # sid of the job that a failed one was scheduled again as
    fault: str | None = None

    @property
    def status(self) -> str:
        return "unreadable" if self.job is None else self.job.status

    @property
    def failure(self) -> Failure | None:
        return None if self.job is None else self.job.failure

    @property
    def title(self) -> str:
        if self.job is None:
            return "An unreadable record"
        return short(self.job.title or self.job.process_id or self.function.rpartition(":")[2])

    @property
    def owner(self) -> str | None:
        return None if self.job is None else self.job.owner

    @property
    def when(self) -> float | None:
        """When it finished, or else when it was created."""
        return None if self.job is None else self.job.finished or self.job.created

    @property
    def may_retry(self) -> bool:
        return self.status == "failed" and self.retried is None

    @property
    def may_cancel(self) -> bool:
        return self.status in UNFINISHED


class Page(NamedTuple):
    """Some jobs, and the cursor of those that follow; None: there are no more."""

    jobs: list[Report]
    next: str | None


class Process(NamedTuple):
    """A process that holds jobs, as its last sign of life shows it."""

    id: str
    name: str  # host and process id
    seen: float  # seconds since the epoch, by its own clock
    silent: bool  # for longer than a lease
    running: tuple[str, ...]


def look(scheduler: Any, work: Callable[[Inside], Any]) -> Any:
    """Call ``work(inside)`` in a transaction of its own."""
    return transact(
        scheduler.store, lambda table: work(Inside(table, scheduler.bind(table.tm), scheduler))
    )


class Inside(NamedTuple):
    """One transaction of an operator: the table, the scheduler bound to it, and the unbound one."""

    table: Any
    bound: Any
    scheduler: Any

    @property
    def now(self) -> float:
        return self.scheduler.store.clock()


# -- list ------------------------------------------------------------------------------


def page(
    scheduler: Any,
    statuses: Iterable[str] = STATUSES,
    text: str = "",
    cursor: str | None = None,
    limit: int = 50,
    scan: int = SCAN,
) -> Page:
    """Return a page of jobs: the unfinished ones, then the finished ones, the last first.

    *text* is looked for in all that names a job.  The page looks at *scan* jobs at most, so it
    may hold fewer than *limit* though more follow.  Raises `BadCursor`.

    Unfinished jobs come in the order of their ids, for no index may be written when a job is
    scheduled; those of one page in that of their creation.
    """
    place = Place.of(cursor)
    search = Search(frozenset(statuses), text.casefold(), place, limit, scan)
    return look(scheduler, search.run)


def follow(scheduler: Any, limit: int, cursor: str | None = None, **wanted: Any) -> Page:
    """Return a page as `page` does, but with all of *limit* jobs, if there are so many."""
    jobs: list[Report] = []
    while True:
        found = page(scheduler, cursor=cursor, limit=limit - len(jobs), **wanted)
        jobs += found.jobs
        cursor = found.next
        if cursor is None or len(jobs) >= limit:
            return Page(jobs, cursor)


class Place(NamedTuple):
    """Where a job stands: among the unfinished by its sid, among the finished by its end too."""

    sid: str = ""
    ended: float | None = None

    def __str__(self) -> str:
        return self.sid if self.ended is None else f"{self.sid}@{self.ended!r}"

    @classmethod
    def of(cls, cursor: str | None) -> Place:
        """Return the place that a page ended at."""
        fits = _CURSOR.fullmatch(cursor or "")
        if fits is None:
            raise BadCursor(cursor)
        return cls(fits[1], None if fits[2] is None else float(fits[2]))


class Search(NamedTuple):
    """What one page is to hold."""

    statuses: frozenset[str]
    text: str
    after: Place
    limit: int
    scan: int

    def run(self, inside: Inside) -> Page:
        places = self.places(inside)
        jobs: list[Report] = []
        last = self.after
        for place in islice(places, self.scan):
            job = report(inside, place.sid)
            if job is not None and self.wants(job, place):
                if len(jobs) == self.limit:
                    return Page(in_order(jobs), str(last))
                jobs.append(job)
            last = place
        more = next(places, None)
        return Page(in_order(jobs), more and str(last))

    def wants(self, job: Report, place: Place) -> bool:
        if job.status in FINAL and place.ended is None:
            return False  # it has a place among the finished jobs
        # What cannot be read is shown with everything: nobody else tells of it.
        fits = job.status in self.statuses or job.job is None
        return fits and (not self.text or self.text in names(job).casefold())

    def places(self, inside: Inside) -> Iterator[Place]:
        """Yield where jobs stand that may be wanted, in the order of pages."""
        if self.after.ended is None and not self.statuses.isdisjoint(UNFINISHED):
            for sid, _ in inside.table.unfinished(self.after.sid):
                yield Place(sid)
        final = self.statuses.intersection(FINAL)
        if final:
            yield from self.finished(inside, final)

    def finished(self, inside: Inside, final: frozenset[str]) -> Iterator[Place]:
        before = None if self.after.ended is None else (self.after.ended, self.after.sid)
        recent = sorted(young(inside, final, max(SCAN, self.scan)), reverse=True)
        listed = inside.table.ended(final, before)
        for ended, sid in merge(recent, listed, reverse=True):
            if before is None or (ended, sid) < before:
                yield Place(sid, ended)


def young(
    inside: Inside, final: frozenset[str], most: int | None = None
) -> Iterator[tuple[float, str]]:
    """Yield what ended a moment ago and is among the unfinished jobs still."""
    for sid, record in islice(inside.table.unfinished(), most):
        if is_done(record) and record.status in final:
            yield record.finished, sid


def is_done(record: Any) -> bool:
    """Say whether a record is one that ended; what cannot be read is none."""
    try:
        return record.done
    except TransientError:
        raise
    except Exception:
        return False


def in_order(jobs: list[Report]) -> list[Report]:
    """Sort the unfinished jobs, the youngest first; they come before the finished ones."""
    unfinished = [job for job in jobs if job.status not in FINAL]
    unfinished.sort(key=lambda job: job.when or 0.0, reverse=True)
    return unfinished + [job for job in jobs if job.status in FINAL]


def names(job: Report) -> str:
    """Return all that names a job, in lines."""
    words = [job.sid, job.function, job.queue, job.key, job.fault, job.owner]
    if job.job is not None:
        words += [job.job.title, job.job.process_id]
    if job.failure is not None:
        words += (*job.failure[:2], job.failure.error_id)
    return "\n".join(str(word) for word in words if word)


# -- one job ---------------------------------------------------------------------------


def show(scheduler: Any, sid: str) -> Report:
    """Return what there is to be seen of a job; raise JobNotFound."""

    def read(inside: Inside) -> Report | None:
        found = report(inside, sid)
        if found is None or found.holder is None:
            return found
        return replace(found, holder=inside.table.last_seen(found.holder))

    found: Report | None = look(scheduler, read)
    if found is None:
        raise JobNotFound(sid)
    return found


def report(inside: Inside, sid: str) -> Report | None:
    """Return what the record of a job tells, or None where there is none."""
    try:
        record = inside.table.get(sid)
        if record is None:
            return None
        holder = record.holder or inside.table.runner(record)
        return described(record, inside.bound.status(sid), holder)
    except TransientError:
        raise
    except Exception as error:
        return Report(sid, fault=f"the record cannot be read: {error!r}")


def described(record: JobRecord, job: JobStatus, holder: str | None) -> Report:
    return Report(
        job.sid,
        job,
        function=reference_of(record.function),
        queue=record.option("queue"),
        key=record.option("key"),
        run_after=None if job.done else record.run_after,
        holder=holder,
        retried=record.retried,
    )


def reference_of(function: Any) -> str:
    """Return the dotted name of a function, as the ZODB store keeps it."""
    return function if isinstance(function, str) else name_of(function)


def short(text: str) -> str:
    return text if len(text) <= SHORT else text[:SHORT] + "…"


def as_text(report: Report) -> str:
    """Return in a few words why a job failed, or how far it is."""
    if report.fault or report.job is None:
        return report.fault or ""
    if report.failure is not None and report.job.done:
        return f"{report.failure.class_name}: {report.failure.message}"
    percent = f"{report.job.progress} % " if report.job.progress and not report.job.done else ""
    return percent + (report.job.message or "")


def as_json(report: Report) -> dict[str, Any]:
    """Return a job for programs; what is not known is left out."""
    job = report.job
    members: dict[str, Any] = {
        "jobID": report.sid,
        "status": report.status,
        "function": report.function or None,
        "queue": report.queue,
        "key": report.key,
        "runAfter": timestamp(report.run_after),
        "holder": report.holder,
        "retriedAs": report.retried,
        "fault": report.fault,
    }
    if job is not None:
        members |= {
            "processID": job.process_id,
            "title": job.title,
            "owner": job.owner,
            "attempts": job.attempts,
            "created": timestamp(job.created),
            "updated": timestamp(job.updated),
            "started": timestamp(job.started),
            "finished": timestamp(job.finished),
            "expires": timestamp(job.expires),
            "progress": job.progress,
            "message": job.message,
        }
    if report.failure is not None:
        members["failure"] = failure_as_json(report.failure)
    return known(members)


def failure_as_json(failure: Failure) -> dict[str, Any]:
    return known(
        {
            "class": failure.class_name,
            "message": failure.message,
            "traceback": failure.traceback or None,
            "errorID": failure.error_id,
            "detail": failure.text,
        }
    )


# -- processes -------------------------------------------------------------------------


def processes(scheduler: Any) -> list[Process]:
    """Return the processes that hold jobs, and this one if it runs any; by name."""
    shown: list[Process] = look(scheduler, shown_processes)
    worker = scheduler.worker
    others = [process for process in shown if process.id != scheduler.store.process]
    if scheduler.executor.held or worker.running:
        now, running = scheduler.store.clock(), tuple(sorted(worker.running))
        others.append(Process(scheduler.store.process, process_name(), now, False, running))
    return sorted(others, key=lambda process: (process.name, process.id))


def shown_processes(inside: Inside) -> list[Process]:
    return [
        Process(id, sign.name, sign.at, is_silent(inside, sign.at), tuple(sorted(sign.running)))
        for id, sign in inside.table.signs()
        if sign is not None
    ]


def is_silent(inside: Inside, seen: float) -> bool:
    """Say whether a process should have shown life; clocks may differ, so it decides nothing."""
    return inside.now - seen > inside.scheduler.executor.recovery.lease


# -- cancel, retry, purge --------------------------------------------------------------


def cancel(scheduler: Any, sid: str, who: str | None = None) -> bool:
    """Dismiss a job; return False where it ended before.  Raises JobNotFound."""
    done = scheduler.transact(lambda bound: bound.cancel(sid))
    if done:
        log.info("job %r was dismissed by operator %r", sid, who)
    # Asked again: the reply to a commit of ours may have been lost.
    return done or show(scheduler, sid).status == "dismissed"


def retry(scheduler: Any, sid: str, who: str | None = None) -> str:
    """Schedule a failed job again and return the new job's sid; see IScheduler."""
    new: str = scheduler.transact(lambda bound: bound.retry(sid))
    log.info("operator %r had job %r scheduled again: it is %r", who, sid, new)
    return new


def purge(scheduler: Any, older_than: float, statuses: Iterable[str] = FINAL) -> int:
    """Remove what finished more than *older_than* seconds ago; return how many jobs.

    A short transaction for each 200 of them.
    """
    before = (scheduler.store.clock() - older_than, "")
    sids = look(scheduler, lambda inside: ended_before(inside, before, frozenset(statuses)))
    batches = [sids[start : start + BATCH] for start in range(0, len(sids), BATCH)]
    return sum(look(scheduler, partial(remove_all, batch)) for batch in batches)


def ended_before(inside: Inside, before: tuple[float, str], statuses: frozenset[str]) -> list[str]:
    recent = (place for place in young(inside, statuses) if place < before)
    # By sid: a batch writes few of the shards.
    return sorted({sid for _, sid in chain(recent, inside.table.ended(statuses, before))})


def remove_all(sids: list[str], inside: Inside) -> int:
    there = [record for sid in sids if (record := ended_record(inside, sid)) is not None]
    for record in there:
        inside.table.forget(record)
    return len(there)


def ended_record(inside: Inside, sid: str) -> JobRecord | None:
    """Return the record of a finished job; one that cannot be read must not keep the others."""
    try:
        record: JobRecord | None = inside.table.get(sid)
        return record if record is not None and record.done else None
    except TransientError:
        raise
    except Exception:
        log.exception("job %r is not removed: its record cannot be read", sid)
        return None


# -- check -----------------------------------------------------------------------------


def check(scheduler: Any) -> list[tuple[str, str]]:
    """Return (sid, sentence) of what is not as it should be.  Cost: loads every record, once."""
    return look(scheduler, lambda inside: list(Check(inside).findings()))


class Check:
    """A look at everything, in one transaction."""

    def __init__(self, inside: Inside) -> None:
        self.inside = inside
        self.lease = inside.scheduler.executor.recovery.lease
        self.signs = dict(inside.table.signs())
        self.unfinished = {sid for sid, _ in inside.table.unfinished()}

    def findings(self) -> Iterator[tuple[str, str]]:
        yield from self.inside.table.findings()
        for number, (sid, record) in enumerate(self.inside.table.records()):
            yield from ((sid, text) for text in self.safely(sid, record))
            if number % SCAN == 0 and self.inside.table.connection is not None:
                self.inside.table.connection.cacheGC()  # there may be more than fits into memory

    def safely(self, sid: str, record: Any) -> list[str]:
        try:
            return [text for text in self.faults(sid, record) if text]
        except TransientError:
            raise
        except Exception as error:
            return [f"cannot be read: {error!r}"]

    def faults(self, sid: str, record: Any) -> Iterator[str | None]:
        if record.sid != sid:
            yield f"is the record of job {record.sid!r}"
        if record.done:
            return
        if sid not in self.unfinished:
            yield "is not finished, and where it is no worker looks for it"
        yield self.lost(record)
        yield self.uncallable(record)

    def lost(self, record: JobRecord) -> str | None:
        """Tell of a job that somebody should have by now."""
        if self.inside.scheduler.store.exclusive:
            return None  # whoever opens the storage next takes it up
        holder = record.holder or self.inside.table.runner(record)
        sign = self.signs.get(holder)
        moved = max(record.updated, record.run_after or 0.0, sign.at if sign else 0.0)
        if self.inside.now - moved <= 2 * self.lease:
            return None
        if holder is not None:
            return f"is held by {self.inside.table.last_seen(holder)}; nobody took it over"
        if self.somebody_works():
            return None
        queue = record.option("queue")
        where = "" if queue is None else f" in the queue {queue!r}"
        return f"waits{where}, and no process shows a sign of life"

    def somebody_works(self) -> bool:
        signs = filter(None, self.signs.values())
        return any(self.inside.now - sign.at <= 2 * self.lease for sign in signs)

    def uncallable(self, record: JobRecord) -> str | None:
        """Tell of a call that cannot be made: after an upgrade, say."""
        store, table = self.inside.scheduler.store, self.inside.table
        try:
            store.resolve(record.function)
        except Exception as error:
            return f"its function {record.function!r} is gone: {error}"
        try:
            if record.arguments is not None:
                store.unpack(record.arguments, table)
        except AsyncError as error:
            return f"its arguments cannot be loaded: {error}"
        except Exception as error:
            return f"its arguments cannot be loaded: {error!r}"
        return None
