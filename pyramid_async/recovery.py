"""Find the jobs that nobody runs or nobody received; let the finished ones expire."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transaction.interfaces import TransientError
from ZODB.POSException import ConflictError

from .interfaces import JobTaken
from .jobs import ACCEPTED, FRESH, UNHELD, JobRecord
from .process import renew_in_children
from .signs import Leases, Pulse, Sign, remove_signs
from .timers import Timers
from .transactional import transact

log = logging.getLogger(__name__)

# A finished record stays this long among the unfinished ones, seconds: a result that is
# fetched at once never costs the move.
ARCHIVE_AFTER = 60.0
# Then those go with it that have stayed this long: a move of many writes less for each.
ARCHIVE_TOGETHER = 20.0

# Records that are looked at without a thought of the other steps.
AT_ONCE = 1000

# What the thread's steps do, for the log.
STEPS = {
    "tell": "interrupt the jobs that are no longer ours",
    "beat": "show a sign of life",
    "look": "look for lost jobs",
}


@dataclass
class Notes:
    """What a look through the unfinished records notes; the next one compares."""

    stray: set[str]  # jobs with a timer here, until the look finds that they wait
    holders: set[str] = field(default_factory=set)  # other processes that jobs name
    # Sid -> (signature, beat of the holder) of running jobs that their holder does not list.
    unlisted: dict[str, tuple[str | None, int]] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)  # sids whose record could not be read


class Recovery:
    """One thread in each process that runs jobs.

    Every second it tells running jobs that were dismissed elsewhere; every heartbeat it
    writes a sign of life, while jobs wait or run here; every ``maintenance_interval`` it
    looks for lost jobs.  An idle process writes nothing.
    """

    def __init__(
        self,
        executor: Any,
        *,
        heartbeat: float = 10.0,
        lease: float = 60.0,
        interval: float = 5.0,
        monotonic: Any = time.monotonic,
    ) -> None:
        self.executor = executor
        self.worker = executor.worker
        self.store = self.worker.store
        self.heartbeat = heartbeat
        self.lease = lease
        self.interval = interval
        self.monotonic = monotonic
        self._ended = threading.Event()
        self._next = dict.fromkeys(STEPS, 0.0)  # when a step is next taken, monotonic
        self._last: Callable[[], None] | None = None
        self._pid: int | None = None
        self._thread: threading.Thread | None = None
        self.pulse = Pulse(executor, lease, monotonic)
        self.leases = Leases(lease, monotonic)
        # Where processes of a pool tell each other what they observed; see `hints.Hints`.
        self.hints: Any = None
        self._notes = self._notes_before = Notes(set())  # of this look and of the one before
        self.unbegun = 0  # jobs that were due and nobody's in the last look
        self._unbegun = 0  # in this look
        self.renew()
        renew_in_children(self)
        self._timers = Timers()

    def renew(self) -> None:
        self._wake = threading.Event()

    # -- the thread

    def start(self) -> None:
        if self._pid == os.getpid():
            return
        thread = threading.Thread(target=self._loop, name="pyramid_async-recovery", daemon=True)
        thread.start()  # which may fail, and be tried again
        self._thread, self._pid = thread, os.getpid()

    def end(self, last: Callable[[], None]) -> None:
        """Let the thread end, after it called *last*; without a thread call it here."""
        if self._pid != os.getpid():
            last()
        self._last = last
        self._ended.set()
        self._wake.set()

    def stop(self, timeout: float) -> None:
        """Wait for the end of the thread, *timeout* seconds at most."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _loop(self) -> None:
        while not self._ended.is_set():
            self._take(*STEPS)
            pause = min(self._next.values()) - self.monotonic()
            self._rest(max(0.01, min(pause, self._fire())))
            self._wake.clear()
        if self._last is not None:
            self._last()

    def _rest(self, pause: float) -> None:
        """Wait.  If we were stopped meanwhile, others may have been: that time does not count."""
        end = self.monotonic() + pause
        self._wake.wait(pause)
        late = self.monotonic() - end
        if late > self.heartbeat:  # what jobs that keep the interpreter cost delays no rescue
            self.leases.extend(late)

    def _take(self, *names: str) -> None:
        """Take those steps whose time has come."""
        every = {"tell": 1.0, "beat": self.heartbeat, "look": self.interval}
        for name in names:
            if self.monotonic() >= self._next[name]:
                pause = self._turn(getattr(self, name), every[name])
                self._next[name] = self.monotonic() + pause

    def _goes_on(self) -> bool:
        """Take the other steps in the midst of a look, which may take longer than a lease.

        Returns False when the thread is to end.
        """
        self._take("tell", "beat")
        self._fire()
        return not self._ended.is_set()

    def _turn(self, step: Any, every: float) -> float:
        """Do a step and return the seconds until its next turn."""
        begun = self.monotonic()
        if self._safely(step) and step == self.look:
            # A tenth of the time at most, however many jobs there are to look through; but a dead
            # process is not known by one look, and the next must not be far.
            return max(every, min(9 * (self.monotonic() - begun), self.lease))
        # Never put off: who falls silent is taken for dead, and what failed may have waited
        # long for a database that is back by now.
        return every

    def _safely(self, step: Any) -> bool:
        """Do a step; return False, and log it, when it failed."""
        try:
            step()
        except ConflictError as error:
            # With another process that puts the same records away, say.
            log.info("recovery will %s at another time: %s", STEPS[step.__name__], error)
            return False
        except Exception:
            log.exception("recovery could not %s; it goes on", STEPS[step.__name__])
            return False
        return True

    # -- jobs that wait for their time

    def later(self, when: float, sid: str) -> None:
        """Wake the job at *when*, seconds since the epoch.  Called from any thread.

        What finds no room is found by `look` once it is due.
        """
        self._timers.add(when, sid, self.executor.max_pending)
        self._wake.set()

    def timed(self) -> list[str]:
        """Return the jobs that wait for their time here."""
        return [sid for _, sid in self._timers.waiting()]

    def _fire(self) -> float:
        """Wake the jobs that are due; return the seconds until the next one is."""
        now = self.store.clock()
        # Once we are to end the executor takes nothing more, and gives back what waits here.
        for sid in () if self._ended.is_set() else self._timers.pop(now):
            try:
                self._put(sid, now)
            except Exception:
                log.exception("job %r is due and was not put; the next look finds it", sid)
        return self._timers.next_due() - now

    def _put(self, sid: str, now: float) -> None:
        if sid in self.executor.held:
            self.later(now + 0.05, sid)  # its last attempt has not quite ended
        else:
            self.executor.put(sid, FRESH)

    # -- jobs that run here

    def tell(self) -> None:
        """Interrupt the jobs running here that are no longer ours: dismissed, or rescued.

        Those that have run for a while are shown to other processes.
        """
        # Listed before the transaction begins: what it does not see is gone, not too young.
        jobs = {sid: job for sid, job in list(self.worker.running.items()) if job.begun}
        if jobs:
            transact(self.store, partial(self._tell, jobs))
            if any(map(self.pulse.is_due_for, jobs.values())):
                self.beat()

    def _tell(self, jobs: dict[str, Any], table: Any) -> None:
        for sid, job in jobs.items():
            record = table.get(sid)
            if record is None or record.done or record.signature not in (None, job.signature):
                job.interrupt(JobTaken(f"job {sid!r} was dismissed or is another worker's"))

    def beat(self) -> None:
        """Write this process's sign of life while it holds jobs."""
        self.pulse.beat()

    # -- hints: a process that is renewed every few jobs lives no lease, nor until a job is due

    def _take_hints(self) -> None:
        hints = self.hints.read()
        # A process that had no sign then may have had other jobs since.
        if hints and self.monotonic() - hints["at"] <= self.lease:
            self.leases.observed = {**hints["observed"], **self.leases.observed}

    def _give_hints(self) -> None:
        for when, sid in self.hints.read().get("timers", ()):
            self.later(when, sid)  # ours from now on
        self._write_hints([])

    def hand_over(self) -> None:
        """Let another process of the pool wake the jobs that wait for their time here."""
        self._write_hints([*self.hints.read().get("timers", []), *self._timers.waiting()])

    def _write_hints(self, timers: list[Any]) -> None:
        hints = {"at": self.monotonic(), "observed": self.leases.observed, "timers": timers}
        self.hints.write(hints)

    # -- lost jobs

    def look(self) -> None:
        """Look through the unfinished records once: rescue, archive, expire.

        Cost: reads every unfinished record and those that finished since the last move.
        """
        if self.hints is not None:
            self._take_hints()
        self._notes_before, self._notes = self._notes, Notes(set(self.timed()))
        ended = transact(self.store, self._look)
        # To make room; what is due by the next look goes by itself.
        self._timers.forget(self._notes.stray, self.store.clock() + self.interval)
        self._archive(ended)
        self.store.expire(self.store.clock(), self._goes_on)
        self._bury()
        if self.hints is not None:
            self._give_hints()

    def _archive(self, ended: dict[str, float]) -> None:
        """Put finished records away, many at once; *ended*: sid -> seconds since the job's end."""
        if max(ended.values(), default=0.0) >= ARCHIVE_AFTER:
            sids = [sid for sid, age in ended.items() if age >= ARCHIVE_TOGETHER]
            self.store.archive(sids, self._goes_on)

    def _look(self, table: Any) -> dict[str, float]:
        """Rescue what is lost; return what ended: sid -> seconds since then."""
        now = self.store.clock()
        self.leases.view()
        self._unbegun = 0
        ended = {}
        for number, (sid, record) in enumerate(table.all_unfinished(), 1):
            age = self._inspect(sid, record, table, now)
            if age is not None:
                ended[sid] = age
            if number % AT_ONCE == 0:
                self._goes_on()
        self.unbegun = self._unbegun
        return ended

    def _inspect(self, sid: str, record: Any, table: Any, now: float) -> float | None:
        """Rescue the job if it is lost; return the seconds since its end, if it ended."""
        try:
            if record.done:
                return now - record.finished
            if record.run_after is None or record.run_after <= now:
                self._rescue(record, table)
            else:
                self._notes.stray.discard(sid)
                if record.holder == self.store.process:
                    self.later(record.run_after, sid)
        except TransientError:
            raise  # the database is away: it is no fault of the record
        except Exception:
            # One bad record must not stop the others.
            if sid not in self._notes_before.bad:
                log.exception("the record of job %r cannot be read", sid)
            self._notes.bad.add(sid)
        return None

    def _rescue(self, record: JobRecord, table: Any) -> None:
        sid, queue = record.sid, record.option("queue")
        holder = record.holder or table.runner(record)
        if holder is None:
            self._unbegun += 1
        elif holder != self.store.process:
            self._notes.holders.add(holder)
        if sid in self.executor.held or not self.executor.room():
            return
        if record.holder == self.store.process and record.signature is None:
            # Our own, and not in our queue: its hook died or the queue was full.
            self.executor.put(sid, FRESH, queue)
        elif self._lost(record, holder, table):
            # Not what waits for a worker, look after look, nor what we let go a moment ago.
            if holder not in (None, self.store.process):
                log.info("job %r is taken up: %s", sid, table.last_seen(holder))
            self.executor.put(sid, UNHELD if holder is None else record.revision, queue)

    def _lost(self, record: JobRecord, holder: str | None, table: Any) -> bool:
        if holder is None:
            # Clocks of other machines are believed in this alone: whether to wait a little.
            since = max(record.updated, record.run_after or 0.0)
            # One that is ahead by more than that is wrong.
            return abs(self.store.clock() - since) >= self.executor.grace
        if holder == self.store.process:
            return True  # an attempt of ours ended without a word
        if self.store.exclusive:
            return not self.store.alive_here(holder)
        sign = table.sign(holder)
        return self.leases.is_over(holder, sign) or self._is_unlisted(record, sign)

    def _is_unlisted(self, record: JobRecord, sign: Sign | None) -> bool:
        """Say whether a living process does not know that it runs the job.

        The reply to its claim was lost.  Two further beats must pass it over, for the claim
        may be younger than the list.
        """
        if record.status == ACCEPTED or sign is None or record.sid in sign.running:
            return False
        now = (record.signature, sign.beat)
        seen = self._notes_before.unlisted.get(record.sid, now)
        self._notes.unlisted[record.sid] = seen = seen if seen[0] == record.signature else now
        return sign.beat >= seen[1] + 2

    def _bury(self) -> None:
        """Forget the dead processes that no unfinished job names any more."""
        shown = transact(self.store, self._processes)
        dead = [process for process, is_dead in shown.items() if is_dead]
        if dead:
            transact(self.store, partial(remove_signs, dead))
        self.leases.forget_all_but(self._notes.holders.union(shown))

    def _processes(self, table: Any) -> dict[str, bool]:
        """Return the processes that have a sign of life, and whether it is to go."""
        self.leases.view()
        held = self._notes.holders
        return {p: p not in held and self.leases.is_over(p, sign) for p, sign in table.signs()}


def add_recovery(executor: Any, **times: float) -> None:
    """Give an executor its recovery, which also wakes the jobs that its worker puts off."""
    executor.recovery = Recovery(executor, **times)
    executor.worker.later = executor.recovery.later
