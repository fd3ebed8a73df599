"""The Celery executor: for several machines.

In the web processes ``config.include('pyramid_async.celery')`` (or ``async.executor = celery``)
makes every scheduled job ring a bell: a message with the job's id and nothing else.  On the other
machines ::

    celery -A pyramid_async.celery worker --ini production.ini

makes the same application in each worker process, after the fork, and answers the bells.  The
record decides: a bell that is lost, late, doubled or forged changes nothing.  It is acknowledged
early, there is no result backend, and remote control is off.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import queue
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import click
from celery import Celery, signals
from pyramid.config import global_registries
from pyramid.exceptions import ConfigurationError
from pyramid.paster import get_app, get_appsettings, setup_logging
from zope.interface import implementer

from .application import close_applications
from .interfaces import (
    IExecutor,
    IExecutorFactory,
    IScheduler,
    JobInterrupted,
    JobStopped,
    JobTimeout,
)
from .settings import read_settings
from .transactional import transact

log = logging.getLogger(__name__)

# Longest time that publishing may wait for a broker, seconds.
BROKER_TIMEOUT = 1.0

# Seconds after which a process rings again for a job that nobody began.
AGAIN = 30.0

# Seconds that a job may be passed over because other bells still wait in its queue.
PASSED_OVER = 300.0

# Seconds for which the length of a queue is taken as known.
LENGTH_KNOWN = 1.0

# Longest wait for the record that a bell is about, seconds: a ZEO client may not see it yet.
RECORD_TIMEOUT = 2.0

# Seconds after which a signal that met the job in the storage's code is sent once more.
STRIKE_AGAIN = 0.05

SID = re.compile("[0-9a-f]{32}")


def includeme(config: Any) -> None:
    """Let Celery run the jobs: ``config.include('pyramid_async.celery')``."""
    config.registry.settings["async.executor"] = "celery"
    config.registry.registerUtility(make_executor, IExecutorFactory)
    config.include("pyramid_async")


# -- the Celery application ------------------------------------------------------------

app = Celery("pyramid_async", set_as_current=False)
app.user_options["preload"].add(
    click.Option(("--ini",), help="The application's ini file, or file#section.")
)
# Nothing but an id passes, one way.
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_proc_alive_timeout=60.0,  # making the application takes longer than 4 s
    broker_connection_retry_on_startup=True,
)


@app.task(name="pyramid_async.bell", ignore_result=True)
def bell(sid: str) -> None:
    """Run the job, if there is one and nobody has it."""
    site.answer(sid)


@app.on_after_finalize.connect(weak=False)
def leave_the_bell_alone(**_: Any) -> None:
    """Take out Celery's own tasks, which whoever can write to the broker could call."""
    for name in list(app.tasks):
        if name != bell.name:
            app.tasks.unregister(name)


# -- bells -----------------------------------------------------------------------------


class Ring(NamedTuple):
    """One message to be sent; *again* when another may still wait in the queue."""

    sid: str
    queue: str
    again: bool


class Bells:
    """Publishes: a thread of its own, a bounded queue and short time-outs.

    It drops what it cannot pass on: recovery rings again for jobs that nobody began.
    """

    def __init__(self, url: str, default_queue: str, most: int) -> None:
        self.url = url
        self.default_queue = default_queue
        self.most = most
        self.stopped = threading.Event()
        self._waiting: queue.Queue[Ring | None] = queue.Queue(most)
        self._rung: dict[str, float] = {}  # sid -> when, monotonic
        self._passed_over: dict[str, float] = {}  # sid -> since when, monotonic
        self._lengths: dict[str, tuple[float, int]] = {}  # queue -> (when, messages in it)
        self._connection: Any = None
        self._thread = threading.Thread(target=self._work, name="pyramid_async-bells", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def room(self) -> int:
        return self.most - self._waiting.qsize()

    def rung(self, sid: str) -> bool:
        """Say whether we rang for the job a moment ago."""
        return time.monotonic() - self._rung.get(sid, -AGAIN) < AGAIN

    def ring(self, sid: str, queue_name: str | None, again: bool = False) -> None:
        """Have a message sent; never wait."""
        try:
            self._waiting.put_nowait(Ring(sid, queue_name or self.default_queue, again))
        except queue.Full:
            return  # recovery rings later
        self._note(sid)

    def stop(self, timeout: float) -> None:
        """Send what waits, for *timeout* seconds at most."""
        self.stopped.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes the thread
        self._thread.join(timeout)

    def _note(self, sid: str) -> None:
        now = time.monotonic()
        if len(self._rung) > self.most:
            self._rung = {s: when for s, when in list(self._rung.items()) if now - when < AGAIN}
        self._rung[sid] = now

    def _work(self) -> None:
        while self._next():
            pass
        self._disconnect()

    def _next(self) -> bool:
        """Take one bell from the queue; return False at the end."""
        try:
            ring = self._waiting.get(timeout=0.05 if self.stopped.is_set() else 0.5)
        except queue.Empty:
            return not self.stopped.is_set()
        return ring is None or self._try_to_pass_on(ring)

    def _try_to_pass_on(self, ring: Ring) -> bool:
        """Pass on a bell or drop it; return False when no more are to be tried."""
        try:
            self._pass_on(ring)
        except Exception as error:
            log.warning(
                "the bell for job %r was dropped, recovery will ring it: %r", ring.sid, error
            )
            self._rung.pop(ring.sid, None)
            return not self.stopped.wait(BROKER_TIMEOUT)
        return True

    def _pass_on(self, ring: Ring) -> None:
        used_before = self._connection is not None
        try:
            self._send(ring)
        except Exception:
            self._disconnect()
            if not used_before:
                raise
            # A broker that was restarted, or a firewall, had closed it: no reason to drop a bell.
            self._send(ring)

    def _send(self, ring: Ring) -> None:
        if ring.again and self._others_wait(ring):
            self._rung.pop(ring.sid, None)
            return
        self._passed_over.pop(ring.sid, None)
        bell.apply_async(
            (ring.sid,),
            queue=ring.queue,
            connection=self._connected(),
            retry=False,
            confirm_timeout=BROKER_TIMEOUT,
        )

    def _others_wait(self, ring: Ring) -> bool:
        """Say whether the queue is still being worked off, the job's own bell in it.

        Every process looks for jobs that nobody began: while the workers are behind or down,
        they would fill the queue with copies.
        """
        if not self._length(ring.queue):
            return False
        if len(self._passed_over) > self.most:
            self._passed_over.clear()
        now = time.monotonic()
        return now - self._passed_over.setdefault(ring.sid, now) < PASSED_OVER

    def _length(self, queue_name: str) -> int:
        when, length = self._lengths.get(queue_name, (-LENGTH_KNOWN, 0))
        if time.monotonic() - when >= LENGTH_KNOWN:
            length = self._ask_length(queue_name)
            self._lengths[queue_name] = time.monotonic(), length
        return length

    def _ask_length(self, queue_name: str) -> int:
        connection = self._connected()
        try:
            declared = connection.default_channel.queue_declare(queue=queue_name, passive=True)
        except connection.channel_errors:
            self._disconnect()  # there is no such queue, and the channel is closed by that
            return 0
        return int(declared.message_count)

    def _connected(self) -> Any:
        if self._connection is None:
            self._connection = connect(self.url)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.release()
            except Exception as error:
                log.debug("the broker's connection did not close: %r", error)


def connect(url: str) -> Any:
    """Return a connection to the broker on which nothing waits longer than BROKER_TIMEOUT."""
    options: dict[str, Any] = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    if url.startswith(("redis", "sentinel")):
        options.update(socket_timeout=BROKER_TIMEOUT, socket_connect_timeout=BROKER_TIMEOUT)
    else:
        options.update(
            read_timeout=BROKER_TIMEOUT, write_timeout=BROKER_TIMEOUT, confirm_publish=True
        )
    # No heartbeat: nobody would send it while there is nothing to publish.
    return app.connection_for_write(
        url, connect_timeout=BROKER_TIMEOUT, heartbeat=0, transport_options=options
    )


# -- the executor ----------------------------------------------------------------------


def make_executor(worker: Any, settings: dict[str, Any]) -> CeleryExecutor:
    """See IExecutorFactory."""
    if not worker.store.durable:
        raise ConfigurationError(
            "async.executor is celery and the records are in RAM, where no worker sees them:"
            " include pyramid_zodbconn and set zodbconn.uri to a storage that several processes"
            " share (ZEO, RelStorage), or use async.executor = threads"
        )
    bells = (settings["celery.broker"], settings["celery.queue"], settings["max_pending"])
    return CeleryExecutor(worker, lambda: Bells(*bells), settings["shutdown_timeout"])


@implementer(IExecutor)
class CeleryExecutor:
    """See IExecutor.  Web and worker processes have one alike; only the latter get bells."""

    grace = 5.0

    def __init__(
        self, worker: Any, make_bells: Callable[[], Bells], shutdown_timeout: float
    ) -> None:
        worker.keeps = False
        self.worker = worker
        self.make_bells = make_bells
        self.shutdown_timeout = shutdown_timeout
        self.workers = site.concurrency  # connections to make room for
        self.recovery: Any = None
        self.stopped = threading.Event()
        self.suspended = False
        self.ends = False  # no more jobs are begun, and the present ones are told
        self.held = worker.running  # nothing waits here
        self.bells = make_bells()
        self.max_pending = self.bells.most
        self._locks: dict[int, threading.Lock] = {}
        self._pid: int | None = None

    def start(self) -> None:
        """See IExecutor."""
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self._pid == os.getpid() or self.stopped.is_set():
                return
            self.bells = self.make_bells()
            self.bells.start()
            if self.recovery is not None:
                self.recovery.start()
            self._pid = os.getpid()
            at_exit(self)

    def wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        """See IExecutor.

        What did not commit rings no bell, for a worker would wait for its record.  Where only
        the reply was lost, recovery finds the job.
        """
        if not committed:
            return
        try:
            self._ring(sid, queue)
        except Exception:
            log.exception("the bell for job %r was not rung; recovery will ring it", sid)

    def put(self, sid: str, seen: str | None, queue: str | None = None) -> None:
        """See IExecutor: free the record of a lost job, and ring for it."""
        if seen is None:
            if not self.bells.rung(sid):
                self._ring(sid, queue, again=True)
            return
        if seen:
            self.worker.free(sid, seen)
        self._ring(sid, queue or self._queue_of(sid))

    def _queue_of(self, sid: str) -> str | None:
        def read(table: Any) -> str | None:
            record = table.get(sid)
            name: str | None = None if record is None else record.option("queue")
            return name

        name: str | None = transact(self.worker.store, read)
        return name

    def _ring(self, sid: str, queue: str | None, again: bool = False) -> None:
        if self._pid != os.getpid():
            self.start()
        self.bells.ring(sid, queue, again)

    def room(self) -> int:
        """See IExecutor."""
        return self.bells.room()

    def answer(self, sid: str) -> None:
        """Run a job that a bell announced, unless somebody has it.  Called by Celery."""
        if not self._takes_jobs() or not self._exists(sid):
            return
        with signals_of_celery.during(self.worker, sid):
            self.worker.answer(sid)

    def _takes_jobs(self) -> bool:
        return not (self.suspended or self.ends or self.stopped.is_set())

    def _exists(self, sid: Any) -> bool:
        """Say whether there is such a job, once the storage had the time to show it."""
        if not isinstance(sid, str) or not SID.fullmatch(sid):
            log.warning("a bell for %.60r, which is no job's id", sid)
            return False
        pause, deadline = 0.005, time.monotonic() + RECORD_TIMEOUT
        while transact(self.worker.store, lambda table: table.get(sid)) is None:
            if time.monotonic() + pause > deadline:
                log.info("no job %r for a bell: removed, expired or forged", sid)
                return False
            time.sleep(pause)
            pause *= 2
        return True

    def suspend(self, why: str) -> None:
        """See IExecutor."""
        if not self.suspended:
            log.error("no jobs are taken: %s", why)
        self.suspended = True
        self._interrupt_all(why)

    def stop(self, timeout: float | None = None) -> None:
        """See IExecutor."""
        self.stopped.set()
        if self._pid != os.getpid():
            return
        self._pid = None
        deadline = time.monotonic() + (self.shutdown_timeout if timeout is None else timeout)
        self._interrupt_all(f"process {os.getpid()} stops")
        while self.held and time.monotonic() < deadline:
            seen = self.worker.changes.count
            self.worker.changes.wait(seen, 0.1)
        self.bells.stop(max(0.1, deadline - time.monotonic()))
        if self.recovery is not None:
            self.recovery.stop(max(0.1, deadline - time.monotonic()))

    def end_jobs(self, why: str) -> None:
        """Tell the jobs that run here to end, and begin no others."""
        self.ends = True
        self._interrupt_all(why)

    def _interrupt_all(self, why: str) -> None:
        for sid in list(self.worker.running):
            self.worker.interrupt(sid, JobStopped(why))


def at_exit(executor: CeleryExecutor) -> None:
    """Stop the executor when the interpreter exits, unless it is gone by then."""
    reference: Callable[[], CeleryExecutor | None] = weakref.ref(executor)

    def drain() -> None:
        executor = reference()
        if executor is not None:
            executor.stop()

    atexit.register(drain)
    weakref.finalize(executor, atexit.unregister, drain)


# -- signals to a pool process ---------------------------------------------------------

# An exception raised in their midst would leave them half-way.
GUARDED = {"BTrees", "ZEO", "ZODB", "persistent", "pyramid_async", "relstorage", "transaction"}


class Signals:
    """What Celery tells a process of its prefork pool, while a job runs in its main thread.

    SIGUSR1: the soft time limit has passed, so the job fails.  SIGTERM: the process is to end,
    so the job is given back.  Both would otherwise raise an exception wherever the program is,
    in the midst of a commit for one.
    """

    def __init__(self) -> None:
        self.soft: float | None = None  # Celery's time limits, seconds
        self.hard: float | None = None
        self._sid: str | None = None
        self._worker: Any = None
        self._default: Any = None  # the pool's handler of SIGTERM
        self._ends = False  # SIGTERM came
        self._repeated: tuple[str, JobInterrupted] | None = None
        self._pid: int | None = None

    @contextmanager
    def during(self, worker: Any, sid: str) -> Iterator[None]:
        """Turn signals into interrupts of this job."""
        if not site.is_child() or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._install()
        limit = self._limit(worker, sid)
        self._worker, self._sid = worker, sid
        try:
            yield
        finally:
            self._sid = None
            if limit is not None:
                limit.cancel()
            if self._ends:
                self._default(signal.SIGTERM, None)

    def _install(self) -> None:
        # Not earlier: the pool sets its own handlers after it told us that it starts.
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._default = signal.signal(signal.SIGTERM, self._end)
            signal.signal(signal.SIGUSR1, self._soft_limit)

    def _end(self, signum: int, frame: Any) -> None:
        if self._sid is None:
            self._default(signum, frame)
            return
        self._ends = True
        self._strike(JobStopped(f"process {os.getpid()} is told to end"), signum, frame)

    def _soft_limit(self, signum: int, frame: Any) -> None:
        repeated, self._repeated = self._repeated, None
        if self._sid is None or (repeated is not None and repeated[0] != self._sid):
            return  # it came too late: that job has ended
        reason = JobTimeout(
            f"job {self._sid!r} ran longer than Celery's soft time limit of {self.soft} s"
        )
        self._strike(reason, signum, frame)

    def _strike(self, reason: JobInterrupted, signum: int, frame: Any) -> None:
        """Interrupt the job: at once in its own code, a little later in the storage's."""
        assert self._sid is not None
        self._worker.interrupt(self._sid, reason)
        if in_function(frame):
            raise reason
        timer = threading.Timer(STRIKE_AGAIN, self._strike_again, (self._sid, reason, signum))
        timer.name, timer.daemon = "pyramid_async-strike", True
        timer.start()

    def _strike_again(self, sid: str, reason: JobInterrupted, signum: int) -> None:
        if self._sid == sid:
            if signum == signal.SIGUSR1:
                self._repeated = sid, reason
            os.kill(os.getpid(), signum)

    # -- the hard limit

    def _limit(self, worker: Any, sid: str) -> threading.Timer | None:
        """Start to watch the hard time limit, at which Celery kills this process.

        A little before, for who is killed gives no reason.
        """
        if not self.hard:
            return None
        timer = threading.Timer(self.hard - min(1.0, self.hard / 4), self._expire, (worker, sid))
        timer.name, timer.daemon = "pyramid_async-limit", True
        timer.start()
        return timer

    def _expire(self, worker: Any, sid: str) -> None:
        worker.fail(sid, JobTimeout(f"job {sid!r} ran into Celery's time limit of {self.hard} s"))


def in_function(frame: Any) -> bool:
    """Say whether a job's function runs, and no code that must not be interrupted."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "pyramid_async.attempt" and frame.f_code.co_name == "_call":
            return True
        if module.partition(".")[0] in GUARDED:
            return False
        frame = frame.f_back
    return False


signals_of_celery = Signals()


# -- worker processes ------------------------------------------------------------------


class Site:
    """The application of this worker process: made after the fork, once, closed at the end."""

    concurrency = 1  # jobs at one time in one process

    def __init__(self) -> None:
        self.ini: str | None = None
        self.parent: int | None = None  # pid of the worker's main process
        self._failed: Any = None  # one byte that the pool's processes share
        self._lock = threading.Lock()
        self._executor: CeleryExecutor | None = None
        self._pid: int | None = None

    def is_child(self) -> bool:
        return self.parent is not None and self.parent != os.getpid()

    def begin(self) -> None:
        """Note that this is the worker's main process."""
        if self.ini is None:
            refuse("give the application: celery -A pyramid_async.celery worker --ini FILE")
        self.parent = os.getpid()
        self._failed = mmap.mmap(-1, 1)

    def failed(self) -> bool:
        return self._failed is not None and self._failed[0] != 0

    def answer(self, sid: str) -> None:
        if not self.failed():
            self.executor().answer(sid)

    def executor(self) -> CeleryExecutor:
        with self._lock:
            if self._pid != os.getpid():
                self._executor, self._pid = self._make(), os.getpid()
            assert self._executor is not None
            return self._executor

    def _make(self) -> CeleryExecutor:
        get_app(self.ini)
        scheduler = global_registries.last.queryUtility(IScheduler)
        if scheduler is None:
            raise ConfigurationError("the application does not include pyramid_async")
        if not isinstance(scheduler.executor, CeleryExecutor):
            raise ConfigurationError("the application's async.executor is not celery")
        return scheduler.executor

    def make(self) -> None:
        """Make the application, or end the worker and say why."""
        try:
            self.executor()
        except Exception as error:
            log.critical(
                "the worker stops, for %s gives no application: %r", self.ini, error, exc_info=True
            )
            self._failed[0] = 1
            if not self.is_child():
                sys.exit(1)
            # This process must go on until the pool ends it: one that leaves is made again.
            assert self.parent is not None
            os.kill(self.parent, signal.SIGTERM)

    def end_jobs(self, why: str) -> None:
        if self._pid == os.getpid() and self._executor is not None:
            self._executor.end_jobs(why)

    def stop(self) -> None:
        if self._pid == os.getpid() and self._executor is not None:
            self._executor.stop()
            # Pool children leave by os._exit: no exit handler would do it.
            close_applications()


site = Site()


def refuse(why: str) -> NoReturn:
    # Celery swallows what is an Exception.
    sys.exit(f"pyramid_async: {why}")


@signals.user_preload_options.connect(weak=False)
def read_ini(options: dict[str, Any], **_: Any) -> None:
    """In the parent process: read the settings alone; no database is opened before the fork."""
    if options.get("ini"):
        site.ini = options["ini"]
        try:
            settings = read_settings(get_appsettings(site.ini))
        except Exception as error:
            refuse(f"{site.ini}: {error}")
        app.conf.update(
            broker_url=settings["celery.broker"], task_default_queue=settings["celery.queue"]
        )


@signals.setup_logging.connect(weak=False)
def set_up_logging(**_: Any) -> None:
    if site.ini is not None:
        setup_logging(site.ini)


@signals.worker_init.connect(weak=False)
def begin(sender: Any, **_: Any) -> None:
    site.begin()
    signals_of_celery.soft, signals_of_celery.hard = sender.soft_time_limit, sender.time_limit
    if "prefork" in str(sender.pool_cls):
        return  # its children send worker_process_init
    tell_at_cold_shutdown(sender)
    if "solo" not in str(sender.pool_cls):  # that pool sends it too
        site.concurrency = sender.concurrency
        site.make()


def tell_at_cold_shutdown(worker: Any) -> None:
    """Have the jobs of this very process told when Celery does not wait for them.

    Celery knows that in prefork alone.  In the other pools it raises an error, in solo in the
    midst of the job, and begins the next job while it says goodbye to the broker.
    """
    why = f"process {os.getpid()} is told to end"
    wait_first = getattr(worker, "wait_for_soft_shutdown", lambda: None)

    def wait_for_soft_shutdown() -> None:
        wait_first()
        site.end_jobs(why)

    def terminate_job(pool: Any, pid: int, signal: Any = None) -> None:
        site.end_jobs(why)

    worker.wait_for_soft_shutdown = wait_for_soft_shutdown
    pool = worker.pool_cls
    attributes = {"terminate_job": terminate_job, "__module__": pool.__module__}
    worker.pool_cls = type(pool.__name__, (pool,), attributes)


@signals.worker_process_init.connect(weak=False)
def begin_process(**_: Any) -> None:
    site.make()


@signals.worker_process_shutdown.connect(weak=False)
def end_process(**_: Any) -> None:
    site.stop()


@signals.worker_shutdown.connect(weak=False)
def end(sender: Any, **_: Any) -> None:
    site.stop()
    if site.failed():
        sender.exitcode = 1
