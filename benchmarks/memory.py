"""Memory of a waiting job: resident bytes of a process that has 100,000 of them."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transaction

from pyramid_async.interfaces import IScheduler

from .jobs import GATE, nothing, wait_at_gate
from .surroundings import WORKERS, application

BATCH = 100  # jobs of one transaction


def main(quick: bool) -> None:
    count = 10_000 if quick else 100_000
    print(f"{count:,} waiting jobs; resident bytes for each")
    for title, measure in MEASURES.items():
        print(f"  {title:30} {in_new_process(measure, count):7,.0f}", flush=True)


def in_new_process(measure: Callable[[int], float], count: int) -> float:
    """Return what the function measures where nothing was allocated and freed before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, count).result()


def resident() -> int:
    """Return this process's resident memory in bytes; its peak, where Linux does not tell."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pool(count: int) -> float:
    """Measure what a ThreadPoolExecutor needs: futures that wait in its queue."""
    with ThreadPoolExecutor(WORKERS) as executor:
        for _ in range(WORKERS):
            executor.submit(wait_at_gate)
        before = resident()
        futures = [executor.submit(nothing) for _ in range(count)]
        after = resident()
        executor.shutdown(wait=False, cancel_futures=True)
        GATE.set()
    return (after - before) / len(futures)


def ram(count: int) -> float:
    return waiting("ram", count, count + BATCH + WORKERS)


def zodb(count: int) -> float:
    # As by default: those beyond wait in the database alone.
    return waiting("zodb", count, 10_000)


def waiting(store: str, count: int, max_pending: int) -> float:
    with application(store, max_pending=max_pending, shutdown_timeout=1) as app:
        scheduler = app.registry.getUtility(IScheduler)
        schedule(scheduler, wait_at_gate, WORKERS)
        schedule(scheduler, nothing, BATCH)  # what is allocated once is not counted
        before = resident()
        for _ in range(count // BATCH):
            schedule(scheduler, nothing, BATCH)
        after = resident()
        scheduler.executor.stopped = True  # what waits is not run any more
        GATE.set()
    return (after - before) / count


def schedule(scheduler: Any, f: Callable[[], None], count: int) -> None:
    transaction.begin()
    for _ in range(count):
        scheduler.schedule(f)
    transaction.commit()


MEASURES = {
    "ThreadPoolExecutor.submit": pool,
    "RAM store": ram,
    "ZODB store": zodb,
}
