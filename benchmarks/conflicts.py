"""Conflicts that scheduling causes: eight threads, each with 10 ms of other work a transaction.

Two workers run the jobs meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import transaction
from ZODB.POSException import ConflictError

from pyramid_async.interfaces import IScheduler
from pyramid_async.scheduler import Caller

from .jobs import nothing
from .surroundings import application, database, fill, zodb_scheduler

THREADS = 8
OTHER_WORK = 0.01  # seconds
LIMIT = 0.5  # percent

# Given a connection, schedules a job in the transaction of its manager.
Schedule = Callable[[Any], Any]


def main(quick: bool) -> None:
    commits, records = (400, 2000) if quick else (4000, 100_000)
    print(f"{commits:,} commits by {THREADS} threads; share of conflicts, aim: under {LIMIT} %")
    for stored in (0, records):
        report(f"application, {stored:,} records before", in_application(stored, commits))
    report("persistent scheduler, 0 records before", in_scheduler(commits))


def report(title: str, measured: tuple[int, int]) -> None:
    commits, conflicts = measured
    print(f"  {title:50} {100 * conflicts / commits:5.2f} %   ({conflicts})", flush=True)


def in_application(stored: int, commits: int) -> tuple[int, int]:
    with application("zodb", max_pending=1_000_000) as app:
        scheduler = app.registry.getUtility(IScheduler)

        def schedule(connection: Any) -> None:
            # Bound as `request.scheduler` is.
            caller = Caller(connect=lambda: connection)
            scheduler.bind(connection.transaction_manager, caller).schedule(nothing)

        # Of the last minute: older ones lie where nothing is scheduled.
        fill(scheduler.store, finished=stored)
        return count(schedule, scheduler.store.db, commits)


def in_scheduler(commits: int) -> tuple[int, int]:
    with database() as db, zodb_scheduler(db) as scheduler:
        oid = scheduler._p_oid
        return count(lambda connection: connection.get(oid).schedule(nothing), db, commits)


def count(schedule: Schedule, db: Any, commits: int) -> tuple[int, int]:
    """Schedule in all threads; return how many commits were tried and how many conflicted."""
    conflicts: list[str] = []
    threads = [
        threading.Thread(target=keep_scheduling, args=(schedule, db, commits // THREADS, conflicts))
        for _ in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return commits, len(conflicts)


def keep_scheduling(schedule: Schedule, db: Any, commits: int, conflicts: list[str]) -> None:
    tm = transaction.TransactionManager()
    connection = db.open(tm)
    for _ in range(commits):
        tm.begin()
        schedule(connection)
        time.sleep(OTHER_WORK)
        try:
            tm.commit()
        except ConflictError as error:
            conflicts.append(str(error))
            tm.abort()
    connection.close()
