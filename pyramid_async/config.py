"""Settings become a scheduler with its store and executor; the directives."""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from functools import partial
from typing import Any

from pyramid.config import PHASE1_CONFIG
from pyramid.events import ApplicationCreated
from pyramid.exceptions import ConfigurationError
from pyramid.tweens import EXCVIEW

from . import client, jsonrpc, openapi, pages, views
from .application import add_application, will_fork
from .current import current_job
from .exits import exit_on_sigterm, heed_mod_wsgi
from .interfaces import (
    IExecutorFactory,
    IScheduler,
    JobAccepted,
    JobCancelled,
    JobFailed,
    JobFinished,
    JobInterrupted,
    JobStarted,
)
from .jobs import ACCEPTED, DISMISSED, FAILED, RUNNING, SUCCESSFUL, check_options
from .ram import RamStore
from .recovery import add_recovery
from .requests import RequestSurroundings, origin_of
from .scheduler import Caller, Operation, RequestIds, Scheduler
from .settings import BadSetting, read_settings
from .threads import ThreadExecutor
from .waiting import note_transaction
from .worker import Worker
from .zodb import AFTER_FORK, OpenedBeforeFork, ZodbStore

log = logging.getLogger(__name__)

# What a job has become -> the event that tells it.
EVENTS = {
    ACCEPTED: JobAccepted,
    RUNNING: JobStarted,
    SUCCESSFUL: JobFinished,
    FAILED: JobFinished,
    DISMISSED: JobCancelled,
}


def setup(config: Any) -> None:
    """Register the scheduler, ``request.scheduler``, the directives and the routes."""
    if config.registry.queryUtility(IScheduler) is not None:
        return  # included again after `config.commit`: another would not know the operations
    if not set("{:*").isdisjoint(config.route_prefix or ""):
        raise ConfigurationError(
            f"the route_prefix {config.route_prefix!r} has a placeholder, whose value the links to"
            " jobs could not know: include pyramid_async with a fixed prefix, or none"
        )
    config.include("pyramid_tm")
    if config.registry.settings.get("async.executor") == "celery":
        config.include("pyramid_async.celery")
    # Above Pyramid's exception views, pyramid_tm and what else may open the ZODB.
    config.add_tween("pyramid_async.config.outer_tween_factory")
    config.add_tween("pyramid_async.config.inner_tween_factory", under=EXCVIEW)
    config.add_directive("add_operation", add_operation)
    config.add_directive("add_application", add_application)
    config.add_request_method(request_scheduler, "scheduler", reify=True)
    views.add_routes(config)
    jsonrpc.add_rpc(config)
    client.add_client(config)
    pages.add_pages(config)
    openapi.add_openapi(config)
    add_scheduler(config)
    config.add_subscriber(start, ApplicationCreated)


def add_scheduler(config: Any) -> None:
    def register() -> None:
        config.registry.registerUtility(make_scheduler(config.registry), IScheduler)

    introspectable = config.introspectable(
        "pyramid_async", "scheduler", "scheduler of asynchronous jobs", "scheduler"
    )
    config.action(
        "pyramid_async.scheduler",
        register,
        order=PHASE1_CONFIG,
        introspectables=(introspectable,),
    )


# -- the scheduler of an application ---------------------------------------------------


def make_scheduler(registry: Any) -> Scheduler:
    """Return the scheduler that the registry's settings describe.  Starts nothing."""
    settings = settings_of(registry)

    def notify(sid: str, status: str) -> None:
        registry.notify(EVENTS[status](sid, status, registry))

    worker = Worker(
        make_store(registry, settings),
        surroundings=lambda tm=None: RequestSurroundings(registry, connector, tm),
        conflict_attempts=settings["conflict_attempts"],
        max_attempts=settings["max_attempts"],
        result_timeout=settings["result_timeout"],
        notify=notify,
    )
    return Scheduler(worker, make_executor(registry, worker, settings), settings)


def settings_of(registry: Any) -> dict[str, Any]:
    try:
        return read_settings(registry.settings)
    except BadSetting as error:
        raise ConfigurationError(str(error)) from None


def make_executor(registry: Any, worker: Worker, settings: dict[str, Any]) -> Any:
    make = registry.queryUtility(IExecutorFactory)
    if make is None and settings["executor"] == "celery":
        raise ConfigurationError(
            "async.executor became celery after config.include('pyramid_async'): set it before, or"
            " include 'pyramid_async.celery'"
        )
    executor = (make or thread_executor)(worker, settings)
    add_recovery(
        executor,
        heartbeat=settings["heartbeat"],
        lease=settings["lease"],
        interval=settings["maintenance_interval"],
    )
    return executor


def thread_executor(worker: Worker, settings: dict[str, Any]) -> ThreadExecutor:
    return ThreadExecutor(
        worker,
        workers=settings["workers"],
        max_pending=settings["max_pending"],
        shutdown_timeout=settings["shutdown_timeout"],
    )


def databases(registry: Any) -> dict[str, Any]:
    """Return pyramid_zodbconn's databases by name; the primary one is ``''``."""
    return getattr(registry, "_zodb_databases", None) or {}


def connector(request: Any) -> Any:
    """Return what gives the request's ZODB connection, or None where there is no ZODB."""
    if not databases(request.registry):
        return None
    from pyramid_zodbconn import get_connection

    return partial(get_connection, request)


def make_store(registry: Any, settings: dict[str, Any]) -> Any:
    database = databases(registry).get("")
    if settings["store"] == "zodb" and database is None:
        raise ConfigurationError(
            "async.store is zodb and there is no ZODB: include pyramid_zodbconn and set"
            " zodbconn.uri"
        )
    if settings["store"] == "ram" or database is None:
        return RamStore(max_pending=settings["max_pending"])
    return ZodbStore(database)


# True while an application is made that is to run no jobs: that of `pasync`.
idle: ContextVar[bool] = ContextVar("pyramid_async.idle", default=False)


def start(event: Any) -> None:
    """Make the records' place in the database and look for jobs that an earlier process left."""
    registry = event.app.registry
    scheduler = registry.getUtility(IScheduler)
    refuse_late(registry, scheduler)
    executor = scheduler.executor
    if idle.get():
        executor.stop(0)  # never started, and never to be
    elif scheduler.store.exclusive and scheduler.settings["workers"] == 0:
        log.warning(
            "async.workers is 0 and no other process can see the jobs, in RAM or in a database that"
            " has one owner: nobody will run them"
        )
    enlarge_pools(registry, executor.workers)
    exit_on_sigterm()
    heed_mod_wsgi()
    if databases(registry) and will_fork():
        # A request of a child could hang on a forked ZEO client before it meets our own check.
        raise ConfigurationError(f"this server would open the ZODB and then fork: {AFTER_FORK}")
    if isinstance(scheduler.store, ZodbStore):
        scheduler.store.install()
        executor.start()


def refuse_late(registry: Any, scheduler: Scheduler) -> None:
    """Refuse what was configured when the scheduler had been made: it would go unheeded."""
    for name, value in settings_of(registry).items():
        if value != scheduler.settings[name]:
            hint = ", or include 'pyramid_async.celery' first" if name == "executor" else ""
            raise ConfigurationError(
                f"async.{name} was set after config.include('pyramid_async') was carried out: set"
                f" it before{hint}"
            )
    late = not scheduler.store.durable and databases(registry)
    if late and scheduler.settings["store"] == "auto":
        raise ConfigurationError(
            "pyramid_zodbconn came after config.include('pyramid_async') was carried out, so the"
            " jobs would be in RAM: include it before, or set async.store = ram"
        )


def outer_tween_factory(handler: Any, registry: Any) -> Any:
    """Refuse every request of a child whose parent opened the ZODB, before its code uses it.

    For servers that `will_fork` does not know.  Also note whose the transaction is.
    """
    opened_by = os.getpid() if databases(registry) else None

    def outer_tween(request: Any) -> Any:
        if opened_by not in (None, os.getpid()):
            raise OpenedBeforeFork(opened_by, os.getpid())
        note_transaction(request)
        return handler(request)

    return outer_tween


def inner_tween_factory(handler: Any, registry: Any) -> Any:
    """Turn a job's interrupt that a view raises, as `get_result` gave it, into an error.

    It is no Exception: no exception view sees it, pyramid_tm does not abort, and a server may
    leave the client without an answer.
    """

    def inner_tween(request: Any) -> Any:
        try:
            return handler(request)
        except JobInterrupted as error:
            if current_job().sid is not None:
                raise  # a job has the application answer a request, and is itself told to end
            raise JobFailed(type(error).__name__, str(error)) from error

    return inner_tween


def enlarge_pools(registry: Any, workers: int) -> None:
    """Make room in the pools for our connections, so that the ZODB never warns.

    One for each worker and one that it opens for a claim or a failure; two for recovery, which
    shows signs of life in the midst of a look; and for each thread of the server, which has a
    connection for its request, one for a view's own transaction.
    """
    for database in databases(registry).values():
        database.setPoolSize(2 * database.getPoolSize() + 2 * workers + 2)


# -- request.scheduler -----------------------------------------------------------------


def request_scheduler(request: Any) -> Scheduler:
    """Return the scheduler bound to the request's transaction, connection and user."""
    ids = RequestIds(request.environ)
    caller = Caller(
        connect=connector(request),
        owner=request.authenticated_userid,
        origin=origin_of(request),
        new_sid=ids,
        repeated=ids.repeated,
        respond=lambda status: views.accepted(request, status),
    )
    scheduler: Scheduler = request.registry.getUtility(IScheduler)
    # It refers to the request, which would wait for the collector, with all that was uploaded.
    request.add_finished_callback(lambda request: request.__dict__.pop("scheduler", None))
    return scheduler.bind(request.tm, caller)


# -- operations ------------------------------------------------------------------------


def add_operation(
    config: Any, name: str, f: Any, permission: str | None = None, **options: Any
) -> None:
    """Give a function a public name: its ``processID`` and JSON-RPC method.

    *f* may be a dotted name.  *permission*, on the root, is asked of whoever starts it by that
    name; without one anybody may.  *options* are those of `using`.  Two operations of one name
    are a configuration conflict.
    Raises ConfigurationError for a name that is empty or reserved, and NotSchedulable for an
    option, at once; NotSchedulable for a function when the action is carried out.
    """
    if not isinstance(name, str) or not name or name.startswith(("async.", "rpc.")):
        # The first prefix is that of our own methods; JSON-RPC 2.0, section 4, keeps the second.
        raise ConfigurationError(
            f"add_operation: the name is {name!r}; allowed: a text that is not empty and does not"
            " begin with async. or rpc."
        )
    f = config.maybe_dotted(f)
    check_options(options)  # refused now rather than at the first request
    operation = Operation(f, permission, options)

    def register() -> None:
        scheduler = config.registry.getUtility(IScheduler)
        scheduler.store.reference(f)  # refused now rather than at the first request
        scheduler.operations[name] = operation

    introspectable = config.introspectable("pyramid_async operations", name, name, "operation")
    introspectable["operation"] = operation
    config.action(("pyramid_async.operation", name), register, introspectables=(introspectable,))
