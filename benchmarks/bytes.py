"""Bytes that a small job adds to a FileStorage over its life: schedule, result, removal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import transaction

from pyramid_async.interfaces import IScheduler

from .jobs import small
from .rounds import wait_until
from .surroundings import application, completed, database, fill, zodb_scheduler

LIMIT = 2000


def main(quick: bool) -> None:
    jobs, records = (50, 1000) if quick else (300, 10_000)
    print(f"mean of {jobs} jobs with a result of 200 bytes; aim: under {LIMIT:,} in all")
    print(f"  {'':46} {'schedule':>9} {'result':>9} {'removal':>9} {'all':>9}")
    for stored in (0, records):
        report(f"application, {stored:,} unfinished records", in_application(stored, jobs))
    for stored in (0, records):
        report(f"persistent scheduler, {stored:,} unfinished", in_scheduler(stored, jobs))


def report(title: str, phases: list[float]) -> None:
    numbers = " ".join(f"{number:9,.0f}" for number in [*phases, sum(phases)])
    print(f"  {title:46} {numbers}", flush=True)


def in_application(stored: int, jobs: int) -> list[float]:
    with application("zodb") as app:
        scheduler = app.registry.getUtility(IScheduler)
        occupy(scheduler, stored)
        return means(scheduler, scheduler.store.db.storage, jobs)


def in_scheduler(stored: int, jobs: int) -> list[float]:
    with database() as db, zodb_scheduler(db) as scheduler:
        occupy(scheduler._scheduler(), stored)
        return means(scheduler, db.storage, jobs)


def occupy(scheduler: Any, stored: int) -> None:
    """Store jobs that wait, and will."""
    scheduler.executor.max_pending += stored
    scheduler.executor.held.update(fill(scheduler.store, unfinished=stored))


def means(scheduler: Any, storage: Any, jobs: int) -> list[float]:
    grown = [0, 0, 0]
    for _ in range(jobs):
        for phase, growth in enumerate(one_life(scheduler, storage.getSize)):
            grown[phase] += growth
    return [total / jobs for total in grown]


def one_life(scheduler: Any, size: Callable[[], int]) -> list[int]:
    """Return by how much scheduling, running and removing a job make the file longer."""
    sizes = [size()]
    transaction.begin()
    # This hook comes before the one that wakes the worker: it has not written its result yet.
    transaction.get().addAfterCommitHook(lambda committed: sizes.append(size()))
    sid = scheduler.schedule(small, "some text ", 20)
    transaction.commit()
    wait_until(partial(completed, scheduler, sid), f"job {sid!r} is not done", look=0.001)
    sizes.append(size())
    scheduler.get_result(sid)
    transaction.commit()
    sizes.append(size())
    return [after - before for before, after in pairwise(sizes)]
