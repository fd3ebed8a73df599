"""Every contract of pyramid_async: interfaces, events and exceptions.

Read this module as the manual.  Each method says who calls it, in which thread and
transaction, and what it raises.
"""

from __future__ import annotations

from typing import Any

from zope.interface import Attribute, Interface, implementer

# -- exceptions ------------------------------------------------------------------------


class AsyncError(Exception):
    """Base of the library's own errors: facts as arguments, text made in ``__str__``.

    All facts are in ``args``, so that every error survives pickling.
    """


class NotSchedulable(AsyncError, ValueError):
    """A function, an argument or an option that a job cannot be made of (what, why)."""

    def __str__(self) -> str:
        what, why = self.args
        return f"{what} cannot be scheduled: {why}"


class SchedulerFull(AsyncError):
    """The RAM store holds as many unfinished jobs as ``async.max_pending`` allows (limit)."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]} jobs are waiting or running, the most that async.max_pending allows;"
            " try again later or raise the setting"
        )


class JobNotFound(AsyncError, LookupError):
    """No job has this sid, or it expired, or it was removed (sid)."""

    def __str__(self) -> str:
        return f"no job {self.args[0]!r}: unknown, expired or removed"


class BadRecord(AsyncError):
    """What is stored as a job's record is none: its class is gone, say (sid, what it is)."""

    def __str__(self) -> str:
        sid, what = self.args
        return f"the record of job {sid!r} cannot be read, it is a {what}; remove() removes it"


class InvalidTransition(AsyncError):
    """A job cannot go from one status to another (sid, status, wanted, allowed)."""

    def __str__(self) -> str:
        sid, status, wanted, allowed = self.args
        names = ", ".join(allowed) or "none, it is final"
        return f"job {sid!r} is {status} and cannot become {wanted}; allowed: {names}"


class NotRetriable(AsyncError):
    """A job that cannot be scheduled again (sid, why)."""

    def __str__(self) -> str:
        sid, why = self.args
        return f"job {sid!r} cannot be retried: {why}"


class OperationFailed(AsyncError):
    """Raised by a job to fail with a text that its user may read (text).

    The text is shown as ``detail`` of the job's error on the wire.  Any other exception
    shows nothing but an ``errorID`` that is found in the log.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "The operation failed."


class JobFailed(AsyncError):
    """What `get_result` returns for an exception that could not be kept (class, message)."""

    def __str__(self) -> str:
        name, message = self.args
        return f"{name}: {message}" if message else name


class JobInterrupted(BaseException):
    """Raised by ``job.check()``.  Not an ``Exception``: ``except Exception`` lets it pass."""


class JobDismissed(JobInterrupted):
    """The job was cancelled, or belongs to another worker by now: nothing it did will count.

    What its checkpoints committed stays in any case.  A job that raises it, or cancels itself,
    ends ``dismissed``.
    """


class JobTaken(JobDismissed):
    """Others decide what becomes of the job, and may have given it to another worker."""


class JobTimeout(JobInterrupted):
    """The job ran longer than its ``timeout`` allows; it ends ``failed``."""


class JobStopped(JobInterrupted):
    """The process stops: the job is given back and will run again elsewhere or later."""


# -- the scheduler ---------------------------------------------------------------------


class IScheduler(Interface):
    """Schedules functions and answers for them, inside one caller's transaction.

    ``request.scheduler`` is bound to ``request.tm``, the request's ZODB connection and its
    user.  ``registry.getUtility(IScheduler)`` is bound to nothing: it uses the thread's
    transaction manager, or the one given by ``using(tm=...)``.

    Every method may be called from any thread that owns the transaction; none commits.  A
    method that reads a job's record raises `BadRecord` where what is stored is no record.
    `remove` removes that too, and `jobs` leaves it out.
    """

    def using(**options: Any) -> IScheduler:
        """Return this scheduler with other options for the jobs it schedules.

        ``tm``             transaction manager to work in
        ``title``          text for people, shown in the status document
        ``result_timeout`` seconds that a finished job is kept
        ``key``            while a job with this key is unfinished, `schedule` returns its sid
                           and schedules nothing; one key space for all users
        ``run_after``      seconds from now, or a datetime with a time zone: not before then
        ``retry_on``       exception classes after which the job is tried again, with growing
                           random delays (at most 2 s, 4 s, ... 300 s), ``max_attempts`` times in
                           all
        ``timeout``        seconds after which ``job.check()`` raises `JobTimeout`
        ``max_attempts``   attempts after which a job that kills its process ends ``failed``
        ``queue``          name of the queue, for executors that have several

        Raises `NotSchedulable` for an unknown option or a value that does not fit.
        """

    def schedule(f: Any, *args: Any, **kw: Any) -> str:
        """Promise ``f(*args, **kw)`` and return its sid at once.

        ``f`` starts after the commit of the caller's transaction, in another thread and
        transaction; after an abort it never existed.  Persistent objects in the arguments
        arrive as the same objects, loaded by the job's own connection.

        Cost: no commit of its own; one record joins the caller's commit.
        Raises `NotSchedulable`, or `SchedulerFull` (RAM store), before anything is promised.
        """

    def completed(sid: str) -> bool | None:
        """Return None for an unknown job, False for an unfinished one, else True."""

    def get_result(sid: str) -> Any:
        """Return None for an unknown job, False for an unfinished one, else (value, exception).

        The exception is None where the job was successful, else the value is.  A dismissed job
        gives ``(None, JobDismissed())``.

        The job is removed when the caller's transaction commits, and kept when it aborts.  To
        roll back to a savepoint that was taken before the call does not keep it.
        """

    def remove(sid: str) -> None:
        """Remove the job when the caller's transaction commits; dismiss it if unfinished."""

    def cancel(sid: str) -> bool:
        """Dismiss the job; return True if this call did it, False if it was final or unknown.

        From the caller's commit on, no effect of the job can be committed.  When the job's
        own commit comes first, the caller's commit raises a ConflictError.
        """

    def retry(sid: str) -> str:
        """Schedule a failed job's call once more, as a new job; return the new sid.

        The new job has the owner, options and arguments of the failed one.  It begins with a
        first attempt, which goes on from the last checkpoint.  The failed job stays what it is.
        Asked again for the same job this returns the same sid.

        Objects that have noted the old sid do not learn of the new one, unless the function
        writes its own sid there.

        Raises JobNotFound, `SchedulerFull`, and `NotRetriable` for a job that has not failed, or
        whose key another unfinished job has.
        """

    def status(sid: str) -> Any:
        """Return the job's `~pyramid_async.jobs.JobStatus`, or None for an unknown job."""

    def outcome(sid: str) -> Any:
        """Return (`~pyramid_async.jobs.JobStatus`, value), or None for an unknown job.

        For pages that show a result: nothing is removed.  The value is None unless the job was
        successful.
        """

    def jobs(status: Any = None) -> Any:
        """Return a `~pyramid_async.jobs.JobStatus` of each of the user's own jobs, newest first.

        *status* is a status or several, of those to return.  Without a user there are no jobs;
        without a request they are everybody's.  Raises ValueError for a status that does not
        exist.
        Cost: reads every unfinished record, the list of the finished ones, and of those the
        user's own.
        """

    def accepted(sid: str) -> Any:
        """Return the ``202 Accepted`` response for a job of this request.

        Raises JobNotFound.  Raises a 503 response where the job is another user's, which `schedule`
        may return for a key.  Raises TypeError without a request: there is nothing to answer.
        """


class IJobStore(Interface):
    """Where job records live.

    A store is made once a process and called from many threads.  Each of its tables belongs to
    one transaction: what is written there is committed or aborted with it.  Where another
    transaction has written the same record meanwhile, the commit raises a ConflictError.
    """

    process = Attribute("Fresh random id of this process: the holder of what it schedules.")
    exclusive = Attribute("True when no other process can share the records.")
    durable = Attribute("True when the records outlive the process.")
    clock = Attribute("Returns the time, in seconds since the epoch.")
    identity = Attribute("Makes ``process``; its ``end()`` makes this process dead for others.")

    def alive_here(process: str) -> bool:
        """Say whether a process id belongs to somebody in this very process."""

    def table(tm: Any, connect: Any = None) -> Any:
        """Return the `IJobTable` of *tm*'s current transaction.

        *connect* returns the ZODB connection to use.  Without *connect* it is the one that the
        manager's transaction has open, or else one that is opened and kept for the manager.
        """

    def pack(value: Any, table: Any) -> Any:
        """Return *value* as a payload for a record; raise `NotSchedulable` where it cannot be."""

    def size(payload: Any) -> int | None:
        """Return about how many bytes a payload has, if that is more than 64 KiB, else None."""

    def unpack(payload: Any, table: Any) -> Any:
        """Return the value of a payload, its persistent objects loaded by *table*'s connection."""

    def reference(f: Any) -> Any:
        """Return what the record keeps of a function; raise `NotSchedulable`."""

    def resolve(function: Any) -> Any:
        """Return the function; raise ImportError or AttributeError where it is gone."""

    def explain(error: BaseException) -> str:
        """Say which object a conflict was about and who wrote it, for operators."""

    def archive(sids: list[str], goes_on: Any = ...) -> None:
        """Put finished records away, so that looking for lost jobs does not meet them.

        Many records may take minutes: ``goes_on()`` is called after each transaction, and says
        whether to begin another one.
        """

    def expire(now: float, goes_on: Any = ...) -> None:
        """Forget the records that expired; *goes_on* as in `archive`."""

    def release(tm: Any) -> None:
        """Close the connection that `table` opened for a manager; its transaction has ended."""


class IJobTable(Interface):
    """The records as one transaction sees them.

    In the ZODB that is one snapshot; in RAM each record as it was last committed.
    """

    connection = Attribute("The ZODB connection of this transaction, or None.")
    tm = Attribute("The manager of this transaction.")

    def get(sid: str) -> Any:
        """Return the `~pyramid_async.jobs.JobRecord`, or None when unknown or expired.

        Raises `BadRecord`.
        """

    def drop(sid: str) -> None:
        """Delete what is stored as the record of a job, if anything is, without reading it."""

    def knows(sid: str) -> bool:
        """Say whether the job was scheduled, though it may have expired by now."""

    def add(record: Any) -> None:
        """Insert a new record; two inserts of one sid conflict at commit.

        Raises `SchedulerFull`.
        """

    def remove(record: Any) -> None:
        """Delete the record, and write it: the attempt that runs it must conflict."""

    def is_removed(record: Any) -> bool:
        """Say whether this transaction has removed the record, or it has expired."""

    def forget(record: Any) -> None:
        """Delete a finished record and all that lists it.

        For maintenance, in a transaction of its own: it writes what others write too.
        """

    def records() -> Any:
        """Iterate over (sid, record) of all records; cost grows with what is stored.

        The records are not loaded and not checked: expired and broken ones are among them.
        """

    def unfinished(after: str | None = None) -> Any:
        """Iterate over (sid, record) of the unfinished jobs, and of a few finished ones.

        *after*: only those that come after this sid, in an order that stays; ``""`` for all in
        that order.
        """

    def all_unfinished() -> Any:
        """Iterate over all of `unfinished`, loading many at once where there is a server."""

    def ended(statuses: Any, before: tuple[float, str] | None = None) -> Any:
        """Iterate over (time of the end, sid) of finished jobs, the last first; loads no record.

        *statuses* are final ones; *before* is a pair to begin after.  The finished jobs that
        `unfinished` gives are missing here.  Removed ones may be among these.
        """

    def owned(owner: str, statuses: Any) -> Any:
        """Iterate over the sids of those jobs of `ended` that are a user's, in no order."""

    def findings() -> Any:
        """Iterate over (sid, sentence) of what does not fit in the lists of records.

        Cost: reads all lists, and few records.
        """

    def keyed(key: str) -> str | None:
        """Return the sid that last took the key; its job may be finished or gone."""

    def take_key(key: str, sid: str) -> None:
        """Give the key to a job that was added; two that take one key conflict at commit."""

    def sign(process: str | None) -> Any:
        """Return the last sign of life of a process, or None: there is none that can be read."""

    def signs() -> Any:
        """Iterate over (process, sign of life, or None where that cannot be read)."""

    def show_sign(process: str, sign: Any) -> None:
        """Store the first sign of life of a process."""

    def remove_sign(process: str) -> None:
        """Forget a process."""

    def last_seen(process: str | None) -> str:
        """Describe a process and its last sign of life, for operators."""

    def runner(record: Any) -> str | None:
        """Return the process that shows that it runs the job, or None.

        Cost: where nobody holds the job, reads the sign of every process.
        """

    def live(record: Any) -> Any:
        """Return what another process showed of the attempt it runs, or None."""


class IExecutor(Interface):
    """Runs jobs somewhere else."""

    worker = Attribute("The `~pyramid_async.worker.Worker` that runs the jobs.")
    recovery = Attribute("The `~pyramid_async.recovery.Recovery` of this process, set once made.")
    held = Attribute("The sids that wait or run in this process.")
    grace = Attribute("Seconds that recovery leaves a job alone which nobody holds.")
    stopped = Attribute("True once it was told to stop.")
    suspended = Attribute("True while no jobs are to be taken; set by recovery.")
    workers = Attribute("How many jobs may run in this process at one time.")
    max_pending = Attribute("How many jobs may wait in this process, for a worker or their time.")

    def wake(committed: bool, sid: str, queue: str | None = None) -> None:
        """After-commit hook: pass the sid on.

        Called in the thread of the scheduling transaction.  Puts an id on a local queue and
        does nothing else: it never writes, never blocks and never raises.  *committed* only
        tells whether to hurry.  After a lost reply it is False although the job exists.
        """

    def put(sid: str, seen: int, queue: str | None = None) -> None:
        """Have the job run; called by recovery, *seen* as in `~.worker.Worker.run`."""

    def room() -> int:
        """Return how many more jobs may be put."""

    def start() -> None:
        """Start this process's threads, if they do not run."""

    def stop(timeout: float | None = None) -> None:
        """Take no more jobs, tell the running ones, and wait *timeout* seconds at most.

        Without *timeout* waits as long as ``async.shutdown_timeout`` says.  Takes up to a second
        more where the database is away, so that jobs cannot be given back.
        """


class IExecutorFactory(Interface):
    """A utility that makes an application's executor, where that is not one of threads."""

    def __call__(worker: Any, settings: dict[str, Any]) -> Any:
        """Return an `IExecutor` for the worker's jobs.  Starts nothing."""


# -- events ----------------------------------------------------------------------------


class IJobEvent(Interface):
    """Something happened to a job; sent through ``registry.notify``.

    A subscriber keeps a thread from other work: let it be quick, and leave to a job what takes
    long.
    """

    sid = Attribute("The job's id.")
    status = Attribute("What the job has become, as on the wire.")
    registry = Attribute("The application registry.")


class IJobAccepted(IJobEvent):
    """A job was scheduled: it exists if the present transaction commits.

    Sent in the thread and transaction of whoever schedules.  What a subscriber writes there,
    through the connection of `get_current_request`, is committed with the job.  What it raises
    reaches the caller of ``schedule``.  Not sent for a ``key`` that an unfinished job has.  When
    an operator retries, the transaction is the library's own, as for `IJobCancelled`.
    """


class IJobStarted(IJobEvent):
    """A worker is about to call the job's function; once a claim, not again after a conflict.

    Sent in the worker's thread, inside the job's transaction, which nobody but the worker may
    end.  What is written there shares its fate, and is gone after a conflict.  What a subscriber
    raises is logged.
    """


class IJobFinished(IJobEvent):
    """A job's effects, result and status were committed, or its failure was.

    ``status`` is ``successful`` or ``failed``.  Sent in the worker's thread, outside of any
    transaction, at most once: a crash may swallow it.  What a subscriber raises is logged.
    """


class IJobCancelled(IJobEvent):
    """A job was dismissed: it can have no effect once the present transaction commits.

    Sent in the thread and transaction of whoever cancels.  What a subscriber raises reaches the
    caller of ``cancel``.

    ``DELETE`` and operators cancel in a transaction of the library's own, where no subscriber can
    write.  A conflict repeats that transaction, and then the event is sent again.  It may also
    have told of what did not happen.  For a job that dismisses itself a worker sends the event,
    and what a subscriber raises is logged.
    """


class JobEvent:
    """See `IJobEvent`."""

    def __init__(self, sid: str, status: str, registry: Any) -> None:
        self.sid, self.status, self.registry = sid, status, registry


@implementer(IJobAccepted)
class JobAccepted(JobEvent):
    """See `IJobAccepted`."""


@implementer(IJobStarted)
class JobStarted(JobEvent):
    """See `IJobStarted`."""


@implementer(IJobFinished)
class JobFinished(JobEvent):
    """See `IJobFinished`."""


@implementer(IJobCancelled)
class JobCancelled(JobEvent):
    """See `IJobCancelled`."""
