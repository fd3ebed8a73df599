"""One look of recovery: its cost grows with the unfinished jobs, not with the stored ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from ZODB.ActivityMonitor import ActivityMonitor

from pyramid_async.interfaces import IScheduler

from .rounds import Ratio, interleaved, print_ratio
from .surroundings import application, fill

# The application's own thread does not look meanwhile.
NEVER = 1e8  # seconds


def main(quick: bool) -> None:
    unfinished, stored = (100, 2000) if quick else (1000, 100_000)
    print("median seconds of a look with empty caches; objects loaded")
    with ExitStack() as stack:
        measures = {
            name: stack.enter_context(filled(*records))
            for name, records in {
                "few": (0, unfinished),
                "stored": (stored, unfinished),
                "more": (0, 5 * unfinished),
            }.items()
        }
        times = interleaved({name: look.seconds for name, look in measures.items()}, 5)
    for name, look in measures.items():
        title = f"{look.archived:,} finished, {look.unfinished:,} unfinished"
        print(f"  {name:7} {title:35} {median(times[name]):7.4f} s {look.loads:8,} loads")
    print_ratio(times, Ratio("stored", "few"))
    print_ratio(times, Ratio("more", "few"))


@contextmanager
def filled(archived: int, unfinished: int) -> Iterator[Look]:
    """An application whose database holds so many records."""
    with application("zodb", maintenance_interval=NEVER, max_pending=1_000_000) as app:
        scheduler = app.registry.getUtility(IScheduler)
        waiting = fill(scheduler.store, archived=archived, unfinished=unfinished)
        scheduler.executor.held.update(waiting)  # as if they were in the queue
        yield Look(scheduler, archived, unfinished)


class Look:
    """Recovery of one database."""

    def __init__(self, scheduler: Any, archived: int, unfinished: int) -> None:
        self.recovery = scheduler.executor.recovery
        self.db = scheduler.store.db
        self.archived = archived
        self.unfinished = unfinished
        self.loads = 0

    def seconds(self) -> float:
        self.db.cacheMinimize()
        self.db.setActivityMonitor(ActivityMonitor())
        begun = time.perf_counter()
        self.recovery.look()
        seconds = time.perf_counter() - begun
        self.loads = sum(
            part["loads"] for part in self.db.getActivityMonitor().getActivityAnalysis()
        )
        return seconds
