"""Signs of life: the one that this process shows, and what it makes of those of others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from persistent import Persistent

from .jobs import Live
from .process import process_name
from .transactional import transact

log = logging.getLogger(__name__)

# What has run this long is shown to other processes at once, seconds.
SHOWN_AFTER = 1.0


class Sign(Persistent):
    """A process's sign of life: it moves while the process runs jobs, and lists them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.beat = 0
        self.at = 0.0
        self.running: dict[str, Live] = {}


def remove_signs(processes: Iterable[str], table: Any) -> None:
    for process in processes:
        table.remove_sign(process)


class Pulse:
    """Writes this process's sign of life.

    Where none can be written for a lease, it has the executor take no more jobs.
    """

    def __init__(self, executor: Any, lease: float, monotonic: Callable[[], float]) -> None:
        self.executor = executor
        self.worker = executor.worker
        self.store = self.worker.store
        self.lease = lease
        self.monotonic = monotonic
        self._beating = False
        self._listed: set[str | None] = set()  # signatures in our last sign of life
        self._beats = 0
        self._shown = 0.0  # when the last sign of life was written, or the first was due

    def is_due_for(self, job: Any) -> bool:
        """Say whether others are to be told of an attempt now: they might run the job too."""
        known = self.store.exclusive or job.signature in self._listed
        # A clock that was put back must not hide it.
        return not known and abs(self.store.clock() - job.started) >= SHOWN_AFTER

    def beat(self) -> None:
        """Write the sign while this process holds jobs; one small commit.

        Nothing where the records end with this process.
        """
        if not self.store.durable:
            return
        if self.executor.held or self.executor.suspended:
            self._show_life()
        else:
            self._fall_silent()

    def leave(self) -> None:
        """Take the sign away at a stop; without the database it ends by itself."""
        try:
            self._fall_silent()
        except Exception as error:
            log.info("the sign of life stays for a while: %r", error)

    def _fall_silent(self) -> None:
        if self._beating:
            transact(self.store, partial(remove_signs, [self.store.process]))
            self._beating = False

    def _show_life(self) -> None:
        now = self.monotonic()
        if not self._beating:
            self._beating, self._shown = True, now
        try:
            self._listed = transact(self.store, self._beat)
        except Exception:
            # By now others take our jobs: what we do with them could not be committed.
            # The failure itself may have taken long, so the clock is asked again.
            if self.monotonic() - self._shown > self.lease:
                self._suspend(f"no sign of life could be written for {self.lease:g} s")
            raise
        self._shown = now
        self.executor.suspended = False

    def _suspend(self, why: str) -> None:
        if not self.executor.suspended:
            log.error("no jobs are taken: %s", why)
        self.executor.suspended = True
        self.worker.interrupt_all(why)

    def _beat(self, table: Any) -> set[str | None]:
        """Write the sign; return the signatures of the attempts that it shows."""
        sign = table.sign(self.store.process)
        if sign is None:
            sign = Sign(process_name())
            table.show_sign(self.store.process, sign)
        # Never a number that was shown before: it would look like a counter that stands still.
        self._beats += 1
        sign.beat = self._beats
        sign.at = self.store.clock()
        sign.running = {sid: job.live() for sid, job in list(self.worker.running.items())}
        # What had not begun cannot be seen by them.
        begun = (live for live in sign.running.values() if live.revision is not None)
        return {live.signature for live in begun}


class Leases:
    """Tells which other processes are dead: their counters stood still for a lease.

    By our own monotonic clock alone, from when we first saw a counter.
    """

    def __init__(self, lease: float, monotonic: Callable[[], float]) -> None:
        self.lease = lease
        self.monotonic = monotonic
        # Process -> (its beat, when we first saw that beat).
        self.observed: dict[str, tuple[int | None, float]] = {}
        self.viewed = 0.0  # when the transaction began by which processes are judged

    def view(self) -> None:
        """Note that a transaction begins by which processes are judged."""
        self.viewed = self.monotonic()

    def is_over(self, process: str, sign: Sign | None) -> bool:
        """Say whether a process gave no sign for a lease.

        As of the transaction's begin, however long it takes: it sees no later sign.
        """
        beat, now = None if sign is None else sign.beat, self.viewed
        seen, since = self.observed.get(process, (beat, now))
        self.observed[process] = (beat, since if beat == seen else now)
        return beat == seen and now - since > self.lease

    def extend(self, seconds: float) -> None:
        """Let so much time not count."""
        observed = self.observed.items()
        self.observed = {p: (beat, since + seconds) for p, (beat, since) in observed}

    def forget_all_but(self, processes: set[str]) -> None:
        for process in set(self.observed) - processes:
            del self.observed[process]
