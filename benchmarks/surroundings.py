"""Databases, applications and schedulers to measure, in temporary directories."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transaction
import ZODB
from pyramid.config import Configurator
from ZODB.FileStorage import FileStorage

from pyramid_async.interfaces import IScheduler
from pyramid_async.jobs import SUCCESSFUL, JobRecord
from pyramid_async.process import new_id
from pyramid_async.scheduler import (
    PersistentTransactionalScheduler,
    TransactionalScheduler,
)
from pyramid_async.transactional import transact

WORKERS = 2
PATIENCE = 30.0  # seconds for threads to end: recovery may just read 100,000 records
BATCH = 10_000  # records of one transaction, where a database is only filled


class RamScheduler(TransactionalScheduler):
    workers = WORKERS


class ZodbScheduler(PersistentTransactionalScheduler):
    workers = WORKERS


@contextmanager
def database() -> Iterator[Any]:
    """A database in a file; every commit calls fsync."""
    with TemporaryDirectory() as directory:
        db = ZODB.DB(FileStorage(str(Path(directory, "data.fs"))), pool_size=100)
        try:
            yield db
        finally:
            transaction.abort()
            db.close()


@contextmanager
def ram_scheduler() -> Iterator[RamScheduler]:
    scheduler = RamScheduler()
    try:
        yield scheduler
    finally:
        scheduler.stop(PATIENCE)


@contextmanager
def zodb_scheduler(db: Any) -> Iterator[ZodbScheduler]:
    """A scheduler in the database, and as the thread's own connection sees it."""
    connection = db.open()
    scheduler = connection.root()["scheduler"] = ZodbScheduler()
    transaction.commit()
    try:
        yield scheduler
    finally:
        transaction.abort()
        scheduler.stop(PATIENCE)
        connection.close()


@contextmanager
def application(store: str, **settings: Any) -> Iterator[Any]:
    """A Pyramid application; the ZODB store brings a database in a file."""
    with TemporaryDirectory() as directory:
        app = make_application(store, directory, settings)
        scheduler = app.registry.getUtility(IScheduler)
        try:
            yield app
        finally:
            transaction.abort()
            scheduler.executor.stop(PATIENCE)
            for db in getattr(app.registry, "_zodb_databases", {}).values():
                db.close()


def make_application(store: str, directory: str, settings: dict[str, Any]) -> Any:
    settings = {f"async.{name}": value for name, value in settings.items()}
    with Configurator(
        settings={"async.store": store, "async.workers": WORKERS, **settings}
    ) as config:
        if store == "zodb":
            uri = f"file://{directory}/data.fs?connection_pool_size=30"
            config.add_settings({"zodbconn.uri": uri})
            config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.add_route("bare", "/bare")
        config.add_view(bare, route_name="bare", renderer="json")
        return config.make_wsgi_app()


def bare(request: Any) -> Any:
    """A JSON view of the size of a status document, to compare it with."""
    return {
        "jobID": "0123456789abcdef0123456789abcdef",
        "status": "successful",
        "links": [{"href": request.route_url("bare"), "rel": "self"}],
        "text": "x" * 400,
    }


# -- jobs in transactions of their own -------------------------------------------------


def schedule_and_commit(scheduler: Any, f: Callable[[], None]) -> str:
    transaction.begin()
    sid: str = scheduler.schedule(f)
    transaction.commit()
    return sid


def completed(scheduler: Any, sid: str) -> bool:
    transaction.begin()
    return bool(scheduler.completed(sid))


# -- records that are only there -------------------------------------------------------


def fill(store: Any, finished: int = 0, archived: int = 0, unfinished: int = 0) -> list[str]:
    """Add records of small jobs to a store in the ZODB; return the sids of the unfinished ones.

    *finished*: as they lie for the first minute; *archived*: where they lie afterwards.
    """
    for size in batches(finished):
        transact(store, partial(add, store, size, done=True))
    for size in batches(archived):
        transact(store, partial(add_archived, store, size))
    waiting = []
    for size in batches(unfinished):
        waiting += transact(store, partial(add, store, size))
    return waiting


def batches(count: int) -> list[int]:
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]


def add_archived(store: Any, count: int, table: Any) -> None:
    for sid in add(store, count, table, done=True):
        table.archive(sid)


def new_ids(count: int) -> list[str]:
    # By tree, so that each is written once.
    return sorted(new_id() for _ in range(count))


def add(store: Any, count: int, table: Any, done: bool = False) -> list[str]:
    sids = new_ids(count)
    for sid in sids:
        table.add(record(store, sid, done))
    return sids


def record(store: Any, sid: str, done: bool) -> JobRecord:
    now = time.time()
    job = JobRecord(sid, now, "benchmarks.jobs:nothing", holder=store.process)
    if done:
        job.claim(store.process, new_id(), now)
        job.finish(SUCCESSFUL, now, 3600)
    return job
