"""Run one job: claim, try, try again, record a failure; the same for every executor."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from secrets import token_hex
from typing import Any

from transaction.interfaces import TransientError

from .current import Job
from .failures import LASTING, failure_of, members
from .interfaces import JobDismissed, JobInterrupted, JobStopped, JobTaken
from .jobs import (
    ACCEPTED,
    DISMISSED,
    FAILED,
    FRESH,
    RUNNING,
    SUCCESSFUL,
    UNHELD,
    Failure,
    JobRecord,
    Live,
    class_name,
)
from .process import Changes
from .transactional import transact
from .tries import Gone, NotDue, NotOurs, Passing, Surroundings, Try, Unreliable

log = logging.getLogger(__name__)

# Longest time that a stop takes beyond its deadline, to give back what still runs, seconds.
GIVE_BACK = 1.0

# Longest pause between two tries at a conflicting commit, seconds.
LONGEST_PAUSE = 5.0

# Pause of who cannot reach the database before the next job, seconds: it would take one after the
# other from those who can, and fill the log.
LEFT_PAUSE = 1.0

# Longest delay before a job is tried again by `retry_on`, seconds.
LONGEST_DELAY = 300.0

# At least so many attempts are remembered after their end.
REMEMBERED = 100


class Worker:
    """Runs the jobs of one store: `run` is an attempt at one, of as many tries as conflicts take.

    Thread-safe.

    ``running`` tells what is being run by this process: sid -> `~pyramid_async.current.Job`.
    ``later(when, sid)`` is called for a job that must wait, and wakes it.
    """

    make_try: Callable[..., Try] = Try  # replaced by tests that inject faults

    def __init__(
        self,
        store: Any,
        *,
        surroundings: Callable[..., Any] = Surroundings,
        conflict_attempts: int = 10,
        max_attempts: int = 3,
        result_timeout: float = 3600.0,
        notify: Callable[[str, str], None] = lambda sid, status: None,
    ) -> None:
        self.store = store
        self.surroundings = surroundings
        self.conflict_attempts = conflict_attempts
        self.max_attempts = max_attempts
        self.result_timeout = result_timeout
        self.notify = notify  # called with (sid, status) for every change that is told
        self.keeps = True  # jobs wait in a queue of this process, and need no claim from there
        self.stops = False  # nothing more enters that queue
        self.later: Callable[[float, str], None] = lambda when, sid: None
        self.running: dict[str, Job] = {}
        self.ended: dict[str, Live] = {}  # what the last attempts showed at their end
        self.changes = Changes()

    @property
    def holder(self) -> str | None:
        """In whose queue waits what is scheduled here: this process's, or anybody's (None)."""
        return None if self.stops else self._queue

    @property
    def _queue(self) -> str | None:
        """From whose queue jobs are run without a claim."""
        return self.store.process if self.keeps else None

    def run(self, sid: str, seen: int = FRESH) -> bool:
        """Run the job if it is ours to run; never raise.

        *seen*: the revision that its record had when it was judged lost, or FRESH, or UNHELD.
        Unless it is FRESH the job is claimed first.

        Returns False when the storage knows no such job.
        """
        job = Job(sid, self._queue, self.store.clock)
        last = self.ended.get(sid)
        if last is not None:
            # Its end may have been recorded nowhere, and the revision still be the same.
            job.percent, job.ticks = last.percent, last.ticks + 1
        if self.running.setdefault(sid, job) is not job:
            return True  # another thread has it: a doubled wake-up
        try:
            if seen == FRESH or self._claim(job, seen):
                # What the job sets in its thread (decimal's precision, what is bound for the log)
                # would be the next job's; a subscriber's is there until the end is told.
                copy_context().run(self._run, job)
        except NotOurs:
            return False
        except Exception:
            # The database is out of reach, or this is a defect: recovery finds the job later.
            log.exception("job %r was left as it is", sid)
            time.sleep(LEFT_PAUSE)
        finally:
            self._remember(job)
            del self.running[sid]
            self.changes.tell()
        return True

    def _remember(self, job: Job) -> None:
        if job.begun:
            self.ended.pop(job.sid, None)  # else it would keep the place of an earlier attempt
            self.ended[job.sid] = job.live()
        if len(self.ended) > 2 * REMEMBERED:
            for sid in list(self.ended)[:REMEMBERED]:
                self.ended.pop(sid, None)

    def live(self, sid: str) -> Live | None:
        """Return what an attempt of this process shows, or showed at its end a moment ago.

        For who reads the record as it was before that end.
        """
        job = self.running.get(sid)
        return job.live() if job is not None and job.begun else self.ended.get(sid)

    def free(self, sid: str, seen: int) -> bool:
        """Let any process claim a job that was judged lost, with the revision *seen*.

        Returns False when there is nothing to claim any more.
        """

        def lose(table: Any) -> Failure | bool:
            record = table.get(sid)
            if record is None or record.done:
                return False
            if record.revision == seen:
                failure = self._give_up(record, table)
                if failure is not None:
                    return failure
                record.lose(self.store.clock())
            return record.status == ACCEPTED

        free = transact(self.store, lose)
        if isinstance(free, Failure):
            self._tell_lost(sid, free)
        return free is True

    def interrupt(self, sid: str, reason: JobInterrupted) -> None:
        """Tell the job, if it runs here."""
        job = self.running.get(sid)
        if job is not None:
            job.interrupt(reason)

    def interrupt_all(self, why: str) -> None:
        """Tell the jobs that run here to stop; they are given back."""
        for sid in list(self.running):
            self.interrupt(sid, JobStopped(why))

    def fail(self, sid: str, reason: JobInterrupted) -> None:
        """End the job if it runs here, for it is about to be killed; its attempt conflicts."""
        job = self.running.get(sid)
        if job is None:
            return
        job.interrupt(reason)
        with job.ending:
            if not job.over:
                self._fail(job, reason)
                job.over = True

    # -- claim

    def _claim(self, job: Job, seen: int) -> bool:
        """Take over a job by writing its record; return False when somebody else has it."""

        def claim(table: Any) -> float | Failure | bool:
            record = table.get(job.sid)
            if record is None:
                raise NotOurs(None)
            if record.signature == job.signature:
                return True  # the reply to an earlier commit was lost
            if not self._may_claim(record, seen, table):
                return False
            if record.run_after is not None and record.run_after > self.store.clock():
                return float(record.run_after)
            return self._take(record, job, table)

        taken = transact(self.store, claim)
        if isinstance(taken, float):
            self.later(taken, job.sid)
        elif isinstance(taken, Failure):
            self._tell_lost(job.sid, taken)
        return taken is True

    def _may_claim(self, record: JobRecord, seen: int, table: Any) -> bool:
        if seen != UNHELD:
            return not record.done and record.revision == seen
        waits = record.status == ACCEPTED and record.holder in (None, self.store.process)
        # Whom it is seen to run by may be dead, but a lease decides about that.
        return waits and table.runner(record) is None

    def _take(self, record: JobRecord, job: Job, table: Any) -> Failure | bool:
        """Claim the job and return True, or end it and return why."""
        failure = self._give_up(record, table)
        if failure is not None:
            return failure
        if self.holder is None:
            record.contested = True  # who answered an earlier bell may only be frozen
        record.claim(self.store.process, job.signature, self.store.clock())
        return True

    def _give_up(self, record: JobRecord, table: Any) -> Failure | None:
        """Note what was seen of the last attempt; fail a job whose runners died too often.

        Returns the reason of the failure, or None.
        """
        live = table.live(record)
        record.reach(live and live.percent)
        runner = table.runner(record)
        if record.signature is None and runner is not None:
            record.attempts += 1  # it needed no claim, but it was seen to run
        if record.attempts < record.option("max_attempts", self.max_attempts):
            return None
        reason = (
            f"{record.attempts} attempts ended without a word; the last worker was"
            f" {table.last_seen(record.holder or runner)}"
        )
        now = self.store.clock()
        if record.status == ACCEPTED:
            record.move(RUNNING, now)
        record.contested = True  # who last ran it may only be frozen
        record.signature = None  # else it would tell of the end once more
        record.failure = failure = Failure("JobLost", reason, "", token_hex(6))
        record.finish(FAILED, now, self.result_timeout)
        return failure

    def _tell_lost(self, sid: str, failure: Failure) -> None:
        log.error("job %r failed, errorID %s: %s", sid, failure.error_id, failure.message)
        self.tell(sid, FAILED)

    # -- run

    def _run(self, job: Job) -> None:
        conflicts = Conflicts(self.conflict_attempts)
        while (pause := self._try(job, conflicts)) is not None:
            time.sleep(pause)

    def _try(self, job: Job, conflicts: Conflicts) -> float | None:
        """Try once; return the seconds until the next try, or None: there is none."""
        this = self.make_try(job, self.store, self.result_timeout, self.tell)
        try:
            if conflicts.tried:
                job.check()  # first: a database that is away keeps each try waiting
            this.run(self.surroundings())
        except BaseException as error:
            return self._end(this, error, conflicts)
        return self._end(this, None, conflicts)

    def _end(self, this: Try, error: BaseException | None, conflicts: Conflicts) -> float | None:
        job = this.job
        with job.ending:
            if job.over:
                return None  # `fail` has recorded and told it
            pause = self._conclude(this, error, conflicts)
            job.over = pause is None
        return pause

    def _conclude(
        self, this: Try, error: BaseException | None, conflicts: Conflicts
    ) -> float | None:
        """Record and tell how the attempt ended, or return the seconds until its next try."""
        job = this.job
        match error:
            case None:
                self.tell(job.sid, SUCCESSFUL)
            case NotOurs():
                self._not_ours(job, error.args[0])
            case NotDue():
                self.later(error.args[0], job.sid)
            case TransientError():
                elapsed = time.monotonic() - this.since
                pause = conflicts.pause(job.checkpoints, elapsed, error)
                if pause is None:
                    self._after_last(this, error)
                else:
                    why = self.store.explain(error)
                    log.info("job %r: again in %.2f s after %s", job.sid, pause, why)
                return pause
            case JobTaken():
                log.info("job %r ends: %r", job.sid, error)
            case JobDismissed():
                log.info("job %r ends: %r", job.sid, error)
                transact(self.store, lambda table: self._dismiss(job, table))
            case JobStopped():
                self._give_back(job, error)
            case _:
                self._fail(job, error, this.failure)
        return None

    def _after_last(self, this: Try, error: TransientError) -> None:
        """Fail a job that met too many conflicts."""
        if not this.record_read:
            # No fault of the job, which the storage did not even let begin.
            self._give_back(this.job, error)
        elif isinstance(error, Passing):
            self._fail(this.job, error.__cause__ or error)
        else:
            self._fail(this.job, error, failure_of(error, self.store.explain(error)))

    def _give_back(self, job: Job, why: Any) -> None:
        log.info("job %r is given back: %r", job.sid, why)
        transact(self.store, lambda table: self._release(job, table))

    def _not_ours(self, job: Job, record: JobRecord | None) -> None:
        """Tell what an earlier commit of ours, whose reply was lost, made of the job."""
        if record is None and not job.begun:
            raise NotOurs(None)
        if record is not None and record.signature == job.signature:
            self._tell_end(job.sid, record.status)

    # -- after a failure

    def _fail(self, job: Job, error: BaseException, failure: Failure | None = None) -> None:
        """Record the failure in a transaction of its own; the job's effects are gone."""
        failure = failure or failure_of(error)
        # Logged before the commit, for whoever sees the errorID may look for it at once.
        with suppress(Exception):  # a handler may fail at an odd exception, and the job must end
            self._log_failure(job, error, failure)
        record = partial(self._record_failure, job, error, failure)
        try:
            status, again = transact(self.store, partial(record, True))
        except LASTING:
            log.exception("the exception of job %r cannot be stored", job.sid)
            status, again = transact(self.store, partial(record, False))
        if status != FAILED:
            log.info("job %r is %s", job.sid, status)
        if again is not None:
            self.later(again, job.sid)
        self._tell_end(job.sid, status)

    def _log_failure(self, job: Job, error: BaseException, failure: Failure) -> None:
        if failure.text is not None:  # meant for the user: nothing is wrong with the program
            log.warning("job %r failed, errorID %s: %r", job.sid, failure.error_id, failure.text)
            return
        log.error(
            "job %r raised %s, errorID %s: %r",
            job.sid,
            failure.class_name,
            failure.error_id,
            failure.message,
            exc_info=error,
        )

    def _record_failure(
        self, job: Job, error: BaseException, failure: Failure, keep: bool, table: Any
    ) -> tuple[str, float | None]:
        """Return the status that the job has now, and when it is to be tried again.

        *keep*: store the exception, where that can be done; else `failure` alone tells of it.
        """
        record = table.get(job.sid)
        if record is None:
            return "removed", None
        if record.failure is not None and record.failure.error_id == failure.error_id:
            return record.status, record.run_after  # only the reply to our commit was lost
        if not record.belongs_to(job.holder, job.signature):
            # Ours where only the reply to its commit was lost; else others have told.
            ours = record.signature == job.signature
            return record.status if ours else f"another attempt's by now, {record.status}", None
        now = self.store.clock()
        if record.status == ACCEPTED:
            record.claim(self.store.process, job.signature, job.started)
        record.failure = failure
        record.reach(job.percent)
        if self._may_retry(record, error):
            again = now + random.uniform(0, min(doubled(record.attempts), LONGEST_DELAY))
            record.postpone(now, again, self.holder)
            return ACCEPTED, again
        if keep:
            record.exception = self._storable(error, table)
        record.finish(FAILED, now, self.result_timeout)
        return FAILED, None

    def _may_retry(self, record: JobRecord, error: BaseException) -> bool:
        chosen = record.option("retry_on", ())
        return record.attempts < record.option("max_attempts", self.max_attempts) and any(
            class_name(kind) in chosen for one in members(error) for kind in type(one).__mro__
        )

    def _storable(self, error: BaseException, table: Any) -> Any:
        try:
            return self.store.pack(error, table)
        except TransientError:
            raise
        except BaseException:
            return None

    # -- give back

    def give_back(self, sids: list[str]) -> None:
        """Let any process run the jobs that wait here; called when this one stops."""
        if not self.store.exclusive:
            self._release_all([Job(sid, self.store.process) for sid in sids])

    def give_back_running(self) -> None:
        """Let any process run what still runs here; those attempts can commit no more."""
        if self.store.durable:
            self._release_all(list(self.running.values()))

    def _release_all(self, jobs: list[Job]) -> None:
        def release(table: Any) -> None:
            for job in jobs:
                self._release(job, table)

        if jobs:
            transact(self.store, release)

    def _release(self, job: Job, table: Any) -> None:
        record = table.get(job.sid)
        if record is not None and record.belongs_to(job.holder, job.signature):
            record.reach(job.percent)
            record.release(self.store.clock())

    # -- dismiss

    def _dismiss(self, job: Job, table: Any) -> None:
        """Dismiss a job that did so itself, for that went with its effects."""
        record = table.get(job.sid)
        if record is not None and record.belongs_to(job.holder, job.signature):
            record.reach(job.percent, job.started)
            record.finish(DISMISSED, self.store.clock(), self.result_timeout)
            self.tell(job.sid, DISMISSED)

    # -- tell

    def _tell_end(self, sid: str, status: str) -> None:
        if status in (SUCCESSFUL, FAILED):
            self.tell(sid, status)

    def tell(self, sid: str, status: str) -> None:
        """Send the event that a job has become *status*; never raise."""
        try:
            self.notify(sid, status)
        except BaseException:  # asyncio.CancelledError, SystemExit: the thread goes on
            log.exception("a subscriber failed for job %r, which is %s", sid, status)


def doubled(times: int) -> float:
    """Return 2 to a power within what a float can hold, for jobs may be tried for years."""
    return 2.0 ** min(times, 64)


class Conflicts:
    """How often a job may still be tried; anew after each checkpoint.

    *limit*: tries that end in conflicts.  Of those that a storage spoils there are 3.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried = self.spoilt = self.gone = 0
        self.checkpoints = 0

    def pause(self, checkpoints: int, elapsed: float, error: TransientError) -> float | None:
        """Return the seconds to wait before the next try, or None after the last.

        Full jitter.  The longer a try takes, the more likely the next one meets the same
        rival again; so its duration is the unit of the pauses.
        """
        if checkpoints != self.checkpoints:
            self.checkpoints, self.tried, self.spoilt = checkpoints, 0, 0
        self.spoilt += isinstance(error, Unreliable)
        self.gone += isinstance(error, Gone)  # which no checkpoint brings back
        self.tried += 1
        if max(self.spoilt, self.gone) >= 3 or self.tried - self.spoilt >= self.limit:
            return None
        return random.uniform(0, min(max(0.01, elapsed) * doubled(self.tried), LONGEST_PAUSE))
