"""The jobs of a process that wait for their time."""

from __future__ import annotations

import heapq
import math
import threading

from .process import renew_in_children


class Timers:
    """When to wake which job, each once; thread-safe.  Times in seconds since the epoch."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []  # (when, sid)
        self._sids: set[str] = set()  # those on it
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        self._lock = threading.Lock()

    def add(self, when: float, sid: str, most: int) -> None:
        """Set the job's timer, unless it has one, or there are *most* timers already."""
        with self._lock:
            if sid not in self._sids and len(self._sids) < most:
                self._sids.add(sid)
                heapq.heappush(self._heap, (when, sid))

    def waiting(self) -> list[tuple[float, str]]:
        """Return what waits, as (when, sid)."""
        with self._lock:
            return list(self._heap)

    def pop(self, now: float) -> list[str]:
        """Take out the jobs whose time has come, and return them in its order."""
        with self._lock:
            due: list[str] = []
            while self._heap and self._heap[0][0] <= now:
                due.append(heapq.heappop(self._heap)[1])
            self._sids.difference_update(due)
            return due

    def next_due(self) -> float:
        """Return when the next one is due."""
        with self._lock:
            return self._heap[0][0] if self._heap else math.inf

    def forget(self, sids: set[str], after: float) -> None:
        """Take out those of the jobs that are due *after* a moment."""
        with self._lock:
            self._heap = [(w, sid) for w, sid in self._heap if w <= after or sid not in sids]
            heapq.heapify(self._heap)
            self._sids = {sid for _, sid in self._heap}
