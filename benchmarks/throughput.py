"""Jobs per second, from the first `schedule` to the last result, against what can be had at most.

Jobs do nothing.  One thread schedules them, each in a transaction of its own, as requests do;
two workers run them.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import transaction
from BTrees.OOBTree import OOBTree
from persistent import Persistent

from pyramid_async.interfaces import IScheduler

from . import predecessor
from .jobs import nothing
from .rounds import Ratio, interleaved, print_ratio
from .surroundings import (
    WORKERS,
    application,
    completed,
    database,
    ram_scheduler,
    schedule_and_commit,
    zodb_scheduler,
)

WARM_UP = 20
LOOK = 0.002  # seconds between two looks for the last result
PATIENCE = 60.0  # seconds after which jobs count as lost

# Schedules one job and commits, and returns what tells the job.
Schedule = Callable[[], Any]
# Says of such a job whether its result can be read.
Done = Callable[[Any], Any]
Contestant = Callable[[], AbstractContextManager[tuple[Schedule, Done]]]


def main(quick: bool) -> None:
    rounds = 2 if quick else 7
    compare(RAM, 300 if quick else 2000, rounds, RAM_RATIOS)
    print()
    compare(ZODB, 100 if quick else 400, rounds, ZODB_RATIOS)


def compare(
    contestants: dict[str, tuple[str, Contestant]], count: int, rounds: int, ratios: list[Ratio]
) -> None:
    print(f"{count} jobs, {rounds} rounds: median (least to most); processor time of a job")
    measures = {name: partial(pace, enter, count) for name, (_, enter) in contestants.items()}
    measured = interleaved(measures, rounds)
    for name, paces in measured.items():
        report(name, contestants[name][0], paces)
    rates = {name: [pace.rate for pace in paces] for name, paces in measured.items()}
    for ratio in ratios:
        print_ratio(rates, ratio)


def report(name: str, title: str, paces: list[Pace]) -> None:
    rates = [pace.rate for pace in paces]
    spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
    cpu = median(pace.cpu for pace in paces) * 1e6
    print(f"  {name:2} {title:46} {median(rates):7,.0f} jobs/s {spread:20} {cpu:6,.0f} µs")


class Pace(NamedTuple):
    rate: float  # jobs per second
    cpu: float  # seconds of processor time that a job takes, of all threads


def pace(enter: Contestant, count: int) -> Pace:
    with enter() as (schedule, done):
        seconds(schedule, done, WARM_UP)
        begun = time.process_time()
        rate = count / seconds(schedule, done, count)
        return Pace(rate, (time.process_time() - begun) / count)


def seconds(schedule: Schedule, done: Done, count: int) -> float:
    begun = time.perf_counter()
    jobs = [schedule() for _ in range(count)]
    return last_end(done, jobs) - begun


def last_end(done: Done, jobs: list[Any]) -> float:
    """Wait for all jobs; return when the last of them was seen to be done.

    The last one first: to look at what was done before it is no part of the time.
    """
    ended = time.perf_counter()
    deadline = ended + PATIENCE
    for job in reversed(jobs):
        while not done(job):
            time.sleep(LOOK)
            ended = time.perf_counter()
            if ended > deadline:
                raise TimeoutError(f"job {job!r} is not done after {PATIENCE:g} s")
    return ended


# -- RAM -------------------------------------------------------------------------------


@contextmanager
def limit_in_ram() -> Iterator[tuple[Schedule, Done]]:
    with ThreadPoolExecutor(WORKERS) as pool:
        yield lambda: submit_after_commit(pool, work_in_transaction), Future.done


def submit_after_commit(pool: ThreadPoolExecutor, work: Callable[[], None]) -> Future[None]:
    futures: list[Future[None]] = []
    txn = transaction.begin()
    txn.addAfterCommitHook(lambda committed: futures.append(pool.submit(work)))
    transaction.commit()
    return futures[0]


def work_in_transaction() -> None:
    transaction.begin()
    nothing()
    transaction.commit()


def functions(scheduler: Any) -> tuple[Schedule, Done]:
    return partial(schedule_and_commit, scheduler, nothing), partial(completed, scheduler)


@contextmanager
def library_in_ram() -> Iterator[tuple[Schedule, Done]]:
    with ram_scheduler() as scheduler:
        yield functions(scheduler)


@contextmanager
def application_in(store: str) -> Iterator[tuple[Schedule, Done]]:
    with application(store) as app:
        scheduler = app.registry.getUtility(IScheduler)
        yield functions(scheduler)


@contextmanager
def predecessor_in_ram() -> Iterator[tuple[Schedule, Done]]:
    yield predecessor.in_ram()


RAM: dict[str, tuple[str, Contestant]] = {
    "a": ("the limit: ThreadPoolExecutor", limit_in_ram),
    "b": ("TransactionalScheduler", library_in_ram),
    "b'": ("the same in Pyramid: each job has a request", lambda: application_in("ram")),
}
RAM_RATIOS = [Ratio("b", "a", 0.5), Ratio("b", "e", 4), Ratio("b'", "a"), Ratio("b'", "e")]

# -- ZODB ------------------------------------------------------------------------------


class Record(Persistent):
    """As much as a durable job needs: what to do, and what came of it."""

    status = "accepted"
    result = None

    def __init__(self, function: str) -> None:
        self.function = function


class Limit:
    """Two commits a job: one inserts a record, the other writes its result.

    Records are spread over trees, and each thread keeps its connection, as is quickest.
    """

    def __init__(self, db: Any) -> None:
        self.db = db
        self.local = threading.local()
        transaction.begin()
        self.connection().root()["trees"] = tuple(OOBTree() for _ in range(256))
        transaction.commit()

    def connection(self) -> Any:
        if not hasattr(self.local, "connection"):
            self.local.connection = self.db.open()
        return self.local.connection

    def tree(self, sid: str) -> Any:
        return self.connection().root()["trees"][int(sid[:2], 16)]

    def schedule(self, pool: ThreadPoolExecutor) -> Future[None]:
        sid = secrets.token_hex(16)
        futures: list[Future[None]] = []
        txn = transaction.begin()
        self.tree(sid)[sid] = Record("benchmarks.jobs:nothing")
        txn.addAfterCommitHook(lambda committed: futures.append(pool.submit(self.work, sid)))
        transaction.commit()
        return futures[0]

    def work(self, sid: str) -> None:
        transaction.begin()
        record = self.tree(sid)[sid]
        record.result = nothing()
        record.status = "successful"
        transaction.commit()


@contextmanager
def limit_in_zodb() -> Iterator[tuple[Schedule, Done]]:
    with database() as db:
        limit = Limit(db)
        with ThreadPoolExecutor(WORKERS) as pool:
            yield lambda: limit.schedule(pool), Future.done


@contextmanager
def library_in_zodb() -> Iterator[tuple[Schedule, Done]]:
    with database() as db, zodb_scheduler(db) as scheduler:
        yield functions(scheduler)


@contextmanager
def predecessor_in_zodb() -> Iterator[tuple[Schedule, Done]]:
    with database() as db, predecessor.in_zodb(db) as found:
        yield found


ZODB: dict[str, tuple[str, Contestant]] = {
    "c": ("the limit: two commits a job", limit_in_zodb),
    "d": ("PersistentTransactionalScheduler", library_in_zodb),
    "d'": ("the same in Pyramid: each job has a request", lambda: application_in("zodb")),
}
ZODB_RATIOS = [Ratio("d", "c", 0.9), Ratio("d", "e", 2), Ratio("d'", "c"), Ratio("d'", "e")]

if predecessor.INSTALLED:
    RAM["e"] = ("dm.zodb.asynchronous", predecessor_in_ram)
    ZODB["e"] = ("dm.zodb.asynchronous, persistent", predecessor_in_zodb)
