"""The Celery executor: for several machines.

In the web processes ``config.include('pyramid_async.celery')`` (or ``async.executor = celery``)
makes every scheduled job ring a bell: a message with the job's id and nothing else.  On the other
machines ::

    celery -A pyramid_async.celery worker --ini production.ini

makes the same application in each worker process, after the fork, and answers the bells.  The
record decides: a bell that is lost, late, doubled or forged changes nothing that is committed.  It
is acknowledged early, there is no result backend, and remote control is off.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import transaction
from pyramid.config import global_registries
from pyramid.exceptions import ConfigurationError
from pyramid.paster import get_app, get_appsettings, setup_logging
from pyramid.scripts.common import get_config_loader
from zope.interface import implementer

try:
    import click
    from billiard.pool import EX_RECYCLE
    from celery import signals
    from celery.worker import state
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"Celery cannot be used, {error}: pip install 'pyramid_async[celery]'"
    ) from error

from .application import close_applications
from .bells import AGAIN, BELL, Bells, app, transport
from .consumer import listen, take_bells_alone
from .hints import Hints
from .interfaces import IExecutor, IExecutorFactory, IScheduler
from .jobs import FRESH, UNHELD
from .prefork import Signals
from .settings import read_settings
from .transactional import transact
from .tries import end_transaction
from .worker import GIVE_BACK, LEFT_PAUSE

log = logging.getLogger(__name__)

# Longest wait for the record that a bell is about, seconds: a ZEO client may not see it yet.
RECORD_TIMEOUT = 2.0
# The same where the bell is not the first: the job has probably been run and removed.
RECORD_TIMEOUT_AGAIN = 0.2

SID = re.compile("[0-9a-f]{32}")


def includeme(config: Any) -> None:
    """Let Celery run the jobs: ``config.include('pyramid_async.celery')``."""
    executor = config.registry.settings.setdefault("async.executor", "celery")
    if executor != "celery":
        raise ConfigurationError(
            f"async.executor is {executor!r} and pyramid_async.celery is included: remove the one"
            " or the other"
        )
    config.registry.registerUtility(make_executor, IExecutorFactory)
    config.include("pyramid_async")


# -- the executor ----------------------------------------------------------------------


def make_executor(worker: Any, settings: dict[str, Any]) -> CeleryExecutor:
    """See IExecutorFactory."""
    if not worker.store.durable:
        raise ConfigurationError(
            "async.executor is celery and the records are in RAM, where no worker sees them:"
            " include pyramid_zodbconn and set zodbconn.uri to a storage that several processes"
            " share (ZEO, RelStorage), or use async.executor = threads"
        )
    if worker.store.exclusive:
        log.warning(
            "async.executor is celery and the database is one that only this process can open, so"
            " no worker will run its jobs: use ZEO or RelStorage, or async.executor = threads"
        )
    check_broker(settings["celery.broker"])
    bells = (settings["celery.broker"], settings["celery.queue"], settings["max_pending"])
    return CeleryExecutor(worker, lambda: Bells(*bells), settings["shutdown_timeout"])


def check_broker(url: str) -> None:
    """Raise ConfigurationError for what kombu cannot use; the URL may hold a password."""
    if any(each.lower().startswith("sentinel") for each in url.split(";")):
        raise ConfigurationError(
            "async.celery.broker is of no use: Redis Sentinel wants a master_name, which no URL"
            " can give"
        )
    try:
        transport(url)
    except ValueError:  # whose text may be a part of the password
        raise ConfigurationError(
            "async.celery.broker is no URL: write amqp://user:password@host:5672// or"
            " redis://host:6379/0, and in a password %2F for /, %23 for # (%%2F in an ini file)"
        ) from None
    except Exception as error:  # a KeyError, and what a transport's import raises
        raise ConfigurationError(f"async.celery.broker is of no use: {error!r}") from None


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
        self.workers = site.concurrency
        self.recovery: Any = None  # set once made
        self.stopped = False
        self.suspended = False
        self.renewed = False  # this process of a pool ends, for it has had its number of tasks
        self.ends = False  # no more jobs are begun, and the present ones are told
        self.held = worker.running  # nothing waits here
        self.bells = make_bells()
        self.max_pending = self.bells.most
        self._locks: dict[int, threading.Lock] = {}
        self._pid: int | None = None

    def start(self) -> None:
        """See IExecutor."""
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self._pid == os.getpid() or self.stopped:
                return
            self.bells = self.make_bells()
            if self.workers:
                # A worker finds lost jobs by itself; without one nothing could run them.
                self.recovery.hints = site.hints
                self.recovery.start()
            self.bells.start()
            self._pid = os.getpid()
            atexit.register(self.stop)

    def wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        """See IExecutor.

        What did not commit rings no bell, for a worker would wait for its record.  Where only
        the reply was lost, recovery finds the job.
        """
        if not committed:
            return
        try:
            # A request may be repeated after its commit.
            self._ring(sid, queue, AGAIN if self.bells.rung(sid) else BELL)
        except Exception:
            log.exception("the bell for job %r was not rung; recovery will ring it", sid)

    def put(self, sid: str, seen: int, queue: str | None = None) -> None:
        """See IExecutor: free the record of a lost job, and ring for it.

        Several processes may do so at once, so whoever answers claims the job first.
        """
        if seen == UNHELD:
            if not self.bells.rung(sid):
                self._ring(sid, queue, AGAIN, self.recovery.unbegun, self.recovery.leases.viewed)
        elif seen == FRESH:
            self._ring(sid, self._queue_of(sid), AGAIN)
        elif self.worker.free(sid, seen):
            self._ring(sid, queue, AGAIN)

    def _queue_of(self, sid: str) -> str | None:
        def read(table: Any) -> str | None:
            record = table.get(sid)
            return None if record is None else record.option("queue")

        return transact(self.worker.store, read)

    def _ring(self, sid: str, queue: str | None, bell: str, *unless_others_wait: Any) -> None:
        if self._pid != os.getpid():
            self.start()
        self.bells.ring(sid, queue, bell, *unless_others_wait)

    def room(self) -> int:
        """See IExecutor."""
        return self.bells.room()

    def answer(self, sid: str, again: bool) -> None:
        """Run a job that a bell announced, unless somebody has it.  Called by Celery.

        *again*: somebody may have begun it, so it is claimed first.
        """
        if not isinstance(sid, str) or not SID.fullmatch(sid):
            log.warning("a bell for %.60r, which is no job's id", sid)
            return
        if self.suspended:
            time.sleep(LEFT_PAUSE)  # the next bells are for those who reach the database
        timeout = RECORD_TIMEOUT_AGAIN if again else RECORD_TIMEOUT
        pause, deadline = 0.005, time.monotonic() + timeout
        while self._takes_jobs() and not self._run(sid, again) and not self._is_hidden(sid):
            if time.monotonic() + pause > deadline:
                log.info("no job %r for a bell: removed, expired or forged", sid)
                return
            time.sleep(pause)
            pause *= 2

    def _is_hidden(self, sid: str) -> bool:
        """Say whether the record is one of a removed or expired job, and none that came by now."""

        def hidden(table: Any) -> bool:
            return table.knows(sid) and table.get(sid) is None

        return transact(self.worker.store, hidden)

    def _run(self, sid: str, again: bool) -> bool:
        try:
            with signals_of_celery.during(self.worker, sid):
                return self.worker.run(sid, UNHELD if again else FRESH)
        finally:
            # Where a job has another manager, what it left in this one would be the next job's.
            end_transaction(transaction.manager)

    def _takes_jobs(self) -> bool:
        return not (self.suspended or self.ends or self.stopped)

    def stop(self, timeout: float | None = None) -> None:
        """See IExecutor."""
        self.stopped = True
        if self._pid != os.getpid():
            return
        self._pid = None
        atexit.unregister(self.stop)
        deadline = time.monotonic() + (self.shutdown_timeout if timeout is None else timeout)
        self.worker.interrupt_all(f"process {os.getpid()} stops")
        while self.held and time.monotonic() < deadline:
            seen = self.worker.changes.count
            self.worker.changes.wait(seen, 0.1)
        # In its thread: a database that is away must not keep the process from its exit.
        self.recovery.end(self._give_back)
        self.recovery.stop(max(0.0, deadline - time.monotonic()) + GIVE_BACK)
        self.bells.stop(max(0.1, deadline - time.monotonic()))

    def _give_back(self) -> None:
        try:
            self.worker.give_back_running()
            self._pass_on_timers()
            self.recovery.pulse.leave()
        except Exception:
            # Recovery finds them by the lease.
            log.exception("jobs could not be given back: %s", ", ".join(self.held))

    def _pass_on_timers(self) -> None:
        """Let others wake the jobs that wait for their time here: their bells are gone."""
        if self.renewed:
            self.recovery.hand_over()  # a bell would be one of the successor's few tasks
            return
        for sid in self.recovery.timed():
            self.put(sid, FRESH)

    def end_jobs(self, why: str) -> None:
        """Tell the jobs that run here to end, and begin no others."""
        self.ends = True
        self.worker.interrupt_all(why)


# -- worker processes ------------------------------------------------------------------

signals_of_celery = Signals()


class Site:
    """The application of this worker process: made after the fork, once, closed at the end."""

    concurrency = 0  # jobs at one time in one process; none in one that only schedules

    def __init__(self) -> None:
        self.ini: str | None = None
        self.broker_given = False  # on the command line
        # What the pool's processes share.
        self._failed: Any = None  # one byte
        self.hints: Hints | None = None  # of recovery
        self._lock = threading.Lock()
        self._executor: CeleryExecutor | None = None
        self._pid: int | None = None

    def begin(self) -> None:
        """Note that this is the worker's main process."""
        if self.ini is None:
            refuse("give the application: celery -A pyramid_async.celery worker --ini FILE")
        self.concurrency = 1
        signals_of_celery.parent = os.getpid()
        self._failed = mmap.mmap(-1, 1)
        self.hints = Hints()

    def failed(self) -> bool:
        return self._failed is not None and self._failed[0] != 0

    def answer(self, sid: str, again: bool) -> None:
        if not self.failed():
            self.executor().answer(sid, again)

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
        if listens_elsewhere(scheduler.settings):
            raise ConfigurationError(
                "the application has another async.celery.broker or async.celery.queue than its"
                " file, or than CELERY_BROKER_READ_URL or CELERY_BROKER_URL in the environment,"
                " which the worker listens to: set them in the file; unset those; name the"
                " application's section where it is not main (--ini FILE#section); or give the"
                " worker -b and -Q"
            )
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
            if not signals_of_celery.is_child():
                sys.exit(1)
            # This process must go on until the pool ends it: one that leaves is made again.
            assert signals_of_celery.parent is not None
            os.kill(signals_of_celery.parent, signal.SIGTERM)

    def end_jobs(self, why: str) -> None:
        if self._pid == os.getpid() and self._executor is not None:
            self._executor.end_jobs(why)

    def stop(self, renewed: bool = False) -> None:
        if self._pid == os.getpid() and self._executor is not None:
            self._executor.renewed = renewed
            self._executor.stop()
            # Pool children leave by os._exit: no exit handler would do it.
            close_applications()


site = Site()


def listens_elsewhere(settings: dict[str, Any]) -> bool:
    """Say whether the worker hears no bells of the application; its options are believed."""
    queues = [*app.amqp.queues.consume_from]
    broker = app.conf.broker_url if site.broker_given else settings["celery.broker"]
    # Which is broker_url, unless CELERY_BROKER_READ_URL is in the environment.
    return app.conf.broker_read_url != broker or (
        queues == [app.conf.task_default_queue] != [settings["celery.queue"]]
    )


# Shared, they would be tasks of every Celery application in the process.
@app.task(name=BELL, bind=True, shared=False)
def bell(task: Any, sid: str) -> None:
    """Run the job, if there is one and nobody has it.

    A broker that lost the connection to a worker delivers again what that one may have begun.
    """
    site.answer(sid, again=task.request.delivery_info.get("redelivered", False))


@app.task(name=AGAIN, shared=False)
def again(sid: str) -> None:
    """Claim the job, if there is one and nobody has it, and run it."""
    site.answer(sid, again=True)


def refuse(why: str) -> NoReturn:
    # Celery swallows what is an Exception.
    sys.exit(f"pyramid_async: {why}")


app.user_options["preload"].add(
    click.Option(("--ini",), help="The application's ini file, or file#section.")
)


@signals.user_preload_options.connect(weak=False)
def read_ini(options: dict[str, Any], **sent: Any) -> None:
    """In the parent process: read the settings alone; no database is opened before the fork."""
    if sent["app"] is app and options.get("ini"):
        site.ini = options["ini"]
        site.broker_given = broker_given()
        try:
            settings = read_settings(get_appsettings(site.ini))
        except Exception as error:
            refuse(f"{site.ini}: {error}")
        listen(settings["celery.broker"], settings["celery.queue"])
        if "loggers" in get_config_loader(site.ini).get_sections():
            # Who takes this signal does it in Celery's place.
            signals.setup_logging.connect(set_up_logging, weak=False)


def broker_given() -> bool:
    """Say whether the command line has -b, which Celery passes on as an environment variable."""
    command = click.get_current_context().parent
    return command is not None and (
        command.get_parameter_source("broker") is click.core.ParameterSource.COMMANDLINE
    )


def set_up_logging(**_: Any) -> None:
    setup_logging(site.ini)


@signals.worker_init.connect(weak=False)
def begin(sender: Any, **_: Any) -> None:
    if sender.app is not app:
        return  # an application's own Celery, which schedules jobs and runs none
    site.begin()
    sender.consumer_cls = take_bells_alone(sender.consumer_cls)
    # Nobody reads its events; while the broker is away it would wait with them, also for its end.
    sender.options["without_heartbeat"] = True
    signals_of_celery.soft, signals_of_celery.hard = sender.soft_time_limit, sender.time_limit
    if "prefork" in str(sender.pool_cls):
        if sender.options.get("autoscale"):
            most, least = sender.options["autoscale"]
            # Of a pool without processes nobody would look for lost jobs.
            sender.options["autoscale"] = most, max(1, least)
        at_cold_shutdown(sender, end_pool)
        return  # its children send worker_process_init
    tell_at_cold_shutdown(sender)
    if "solo" not in str(sender.pool_cls):  # that pool sends it too
        # Of ``auto`` Celery makes a number later.
        auto = not isinstance(sender.concurrency, int)
        site.concurrency = (os.cpu_count() or 1) if auto else sender.concurrency
        site.make()


def at_cold_shutdown(worker: Any, end: Callable[[Any], None]) -> None:
    """Have a function called before Celery cancels what it runs, in the handler of the signal."""
    wait_first = worker.wait_for_soft_shutdown

    def wait_for_soft_shutdown() -> None:
        wait_first()
        end(worker)

    worker.wait_for_soft_shutdown = wait_for_soft_shutdown


def end_pool(worker: Any) -> None:
    """End those processes of a pool that Celery believes to be idle.

    It ends those whose job it knows to have begun, and waits for the others: for a job whose
    beginning nobody heard of yet until its own end.
    """
    known = {request.worker_pid for request in state.active_requests}
    for pid in worker.pool.info["processes"]:
        if pid not in known:  # a second signal may kill it on the spot
            worker.pool.terminate_job(pid)


def tell_at_cold_shutdown(worker: Any) -> None:
    """Have the jobs of this very process told when Celery does not wait for them.

    Celery knows that in prefork alone.  In the other pools it raises an error, in solo in the
    midst of the job, and begins the next job while it says goodbye to the broker.
    """
    why = f"process {os.getpid()} is told to end"
    at_cold_shutdown(worker, lambda worker: site.end_jobs(why))

    def terminate_job(pool: Any, pid: int, signal: Any = None) -> None:
        site.end_jobs(why)

    pool = worker.pool_cls
    attributes = {"terminate_job": terminate_job, "__module__": pool.__module__}
    worker.pool_cls = type(pool.__name__, (pool,), attributes)


@signals.worker_process_init.connect(weak=False)
def begin_process(**_: Any) -> None:
    if site.concurrency:
        site.make()


@signals.worker_process_shutdown.connect(weak=False)
def end_process(exitcode: Any = None, **_: Any) -> None:
    site.stop(renewed=exitcode == EX_RECYCLE)


@signals.worker_shutdown.connect(weak=False)
def end(sender: Any, **_: Any) -> None:
    site.stop()
    if site.failed():
        sender.exitcode = 1
