"""Charts as plain SVG: the numbers for the templates, in per cent of whatever width there is."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

MOST_BARS = 12
SPAN = 600.0  # seconds before the last moment that a timeline shows
THINNEST = 0.6  # per cent; what is shorter would not be seen


class Bar(NamedTuple):
    label: str
    count: int
    width: float  # per cent of the longest


class Bars:
    """How many there are of each kind; beyond the first dozen the rest is one bar."""

    def __init__(self, counts: list[tuple[str, int]]) -> None:
        shown = list(counts)
        if len(shown) > MOST_BARS:
            rest = sum(count for _, count in shown[MOST_BARS - 1 :])
            shown[MOST_BARS - 1 :] = [("all others", rest)]
        most = max(count for _, count in shown)
        self.bars = [Bar(label, count, max(THINNEST, 100 * count / most)) for label, count in shown]

    @property
    def text(self) -> str:
        """The same for those who do not see it."""
        return "; ".join(f"{bar.label}: {bar.count:,}" for bar in self.bars)


class Span(NamedTuple):
    job: Any
    waited: float  # per cent from the left where it was scheduled
    began: float
    width: float
    seconds: float


class Timeline:
    """When each of some jobs waited and ran, on one axis that ends with the last of them."""

    def __init__(self, jobs: Iterable[Any], now: float | None = None) -> None:
        now = time.time() if now is None else now
        jobs = list(jobs)
        self.end = max((job.finished or now for job in jobs), default=now)
        recent = [job for job in jobs if (job.finished or now) > self.end - SPAN]
        first = min((job.created for job in recent), default=now)
        self.begin = max(first, self.end - SPAN)
        self.spans = [self.span(job, now) for job in recent]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def span(self, job: Any, now: float) -> Span:
        last = job.finished or now
        began = job.started or last
        left = min(self.place(began), 100 - THINNEST)
        width = max(THINNEST, self.place(last) - left)
        return Span(job, self.place(job.created), left, width, last - began)

    def place(self, moment: float) -> float:
        if self.end <= self.begin:
            return 0.0
        return 100 * (min(max(moment, self.begin), self.end) - self.begin) / self.seconds
