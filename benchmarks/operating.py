"""The operator's page, `pasync list` and a user's own jobs beside 100,000 records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

from pyramid_async import manage
from pyramid_async.interfaces import IScheduler
from pyramid_async.jobs import DISMISSED, FAILED, SUCCESSFUL, Failure, JobRecord
from pyramid_async.process import new_id
from pyramid_async.scheduler import Caller
from pyramid_async.transactional import transact

from .surroundings import application, batches, new_ids

NEVER = 1e8  # seconds: no maintenance meanwhile
HOUR = 3600.0
USER = "a user"
FAILURE = Failure("ZeroDivisionError", "division by zero", "Traceback\n" * 20, "0123456789ab")
# Of a hundred jobs one fails and two are dismissed.
STATUSES = [FAILED, DISMISSED, DISMISSED, *97 * [SUCCESSFUL]]


def main(quick: bool) -> None:
    stored = 2000 if quick else 100_000
    print("median and worst of 9 pages, seconds: with empty caches | with warm ones")
    for store in ("zodb", "ram"):
        for finished, unfinished in ((stored, 100), (0, stored)):
            with filled(store, finished, unfinished) as scheduler:
                print(f"  {store}: {finished:,} finished, {unfinished:,} unfinished")
                for name, page in pages(scheduler).items():
                    report(name, page, scheduler)
                print(f"    check of everything: {seconds(partial(manage.check, scheduler)):.1f} s")


def report(name: str, page: Callable[[], Any], scheduler: Any) -> None:
    cold, warm = [], []
    for _ in range(9):
        if scheduler.store.durable:
            scheduler.store.db.cacheMinimize()
        cold.append(seconds(page))
        warm.append(seconds(page))
    numbers = (median(cold), max(cold), median(warm), max(warm))
    print("    {:42} {:6.3f} {:6.3f} | {:6.3f} {:6.3f}".format(name, *numbers), flush=True)


def seconds(page: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    page()
    return time.perf_counter() - begun


def pages(scheduler: Any) -> dict[str, Callable[[], Any]]:
    page = partial(manage.page, scheduler)
    middle = str(manage.Place("8" * 32, round(scheduler.store.clock() - HOUR / 2, 3)))
    return {
        "unfinished, first page": partial(page, manage.UNFINISHED),
        "unfinished, from the middle": partial(page, manage.UNFINISHED, cursor="8" * 32),
        "failed, first page": partial(page, [FAILED]),
        "failed, from the middle": partial(page, [FAILED], cursor=middle),
        "finished, first page": partial(page, manage.FINAL),
        "finished, from the middle": partial(page, manage.FINAL, cursor=middle),
        "all that hold a text that none has": partial(page, text="no such text"),
        "jobs() of a user who has ten": partial(
            transact, scheduler.store, partial(own_jobs, scheduler)
        ),
    }


def own_jobs(scheduler: Any, table: Any) -> None:
    assert len(scheduler.bind(table.tm, Caller(owner=USER)).jobs()) == 10


@contextmanager
def filled(store: str, finished: int, unfinished: int) -> Iterator[Any]:
    with application(store, maintenance_interval=NEVER, max_pending=1_000_000) as app:
        scheduler = app.registry.getUtility(IScheduler)
        scheduler.executor.stopped = True  # nothing runs
        moments = iter(range(finished + 10))
        sids = transact(scheduler.store, partial(add_finished, scheduler, 10, moments, owner=USER))
        scheduler.store.archive(sorted(sids))
        for size in batches(finished):
            sids = transact(scheduler.store, partial(add_finished, scheduler, size, moments))
            scheduler.store.archive(sorted(sids))
        for size in batches(unfinished):
            transact(scheduler.store, partial(add, scheduler, size))
        yield scheduler


def add(scheduler: Any, count: int, table: Any, owner: str = "somebody else") -> list[JobRecord]:
    now = scheduler.store.clock()
    function = scheduler.store.reference(time.sleep)
    records = [JobRecord(sid, now, function, owner=owner, holder="p") for sid in new_ids(count)]
    for record in records:
        table.add(record)
    return records


def add_finished(
    scheduler: Any, count: int, moments: Iterator[int], table: Any, **facts: Any
) -> list[str]:
    """Add jobs that ended in the course of the last hour."""
    now = scheduler.store.clock()
    records = add(scheduler, count, table, **facts)
    for record, number, status in zip(records, moments, cycle(STATUSES), strict=False):
        ended = now - HOUR + HOUR * (number * 7919 % 100_000) / 100_000
        record.claim("p", new_id(), ended)
        record.failure = FAILURE if status == FAILED else None
        record.finish(status, ended, 2 * HOUR)
    return [record.sid for record in records]
