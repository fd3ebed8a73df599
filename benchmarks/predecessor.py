"""dm.zodb.asynchronous 2.3.1, as its README has it used; where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transaction

from .jobs import nothing
from .surroundings import completed, schedule_and_commit

try:
    from dm.zodb.asynchronous.context import PersistentContext
    from dm.zodb.asynchronous.scheduler import (
        PersistentTransactionalScheduler,
        TransactionalScheduler,
    )
    from dm.zodb.asynchronous.transactional import transactional
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

    class Context(PersistentContext):
        database: Any = None

        def _get_root_database(self) -> Any:
            return self.database

    class Scheduler(PersistentTransactionalScheduler):
        PERSISTENT_CONTEXT_FACTORY = Context

    transactional_nothing = transactional(nothing)


def in_ram() -> tuple[Any, Any]:
    """Return functions: schedule and commit; say whether a job is done."""
    scheduler = TransactionalScheduler()
    # As in its README: the scheduler itself begins no transaction for the job.
    return lambda: schedule_and_commit(scheduler, transactional_nothing), scheduler.completed


@contextmanager
def in_zodb(db: Any) -> Iterator[tuple[Any, Any]]:
    Context.database = db
    connection = db.open()
    scheduler = connection.root()["predecessor"] = Scheduler()
    transaction.commit()
    try:
        yield (
            lambda: schedule_and_commit(scheduler, nothing),
            lambda sid: completed(scheduler, sid),
        )
    finally:
        transaction.abort()
        connection.close()
