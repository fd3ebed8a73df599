"""The thread executor: a bounded pool of named daemon threads in this process."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from contextvars import Context
from typing import Any

import transaction
from zope.interface import implementer

from .exits import stop_at_exit, was_stopped
from .interfaces import IExecutor
from .jobs import FRESH
from .tries import end_transaction
from .worker import GIVE_BACK

log = logging.getLogger(__name__)


@implementer(IExecutor)
class ThreadExecutor:
    """See IExecutor.  Threads start with the first job if not before, anew after a fork.

    They are daemons, because the interpreter waits for others without limit; `stop` runs at
    exit and waits for ``shutdown_timeout`` seconds.
    """

    grace = 0.0  # seconds that recovery leaves a job alone which nobody holds

    def __init__(
        self,
        worker: Any,
        workers: int = 2,
        max_pending: int = 10_000,
        shutdown_timeout: float = 5.0,
    ) -> None:
        self.worker = worker
        worker.keeps = workers > 0
        self.workers = workers
        self.max_pending = max_pending
        self.shutdown_timeout = shutdown_timeout
        self.recovery: Any = None  # set once made; started and stopped with the threads
        # One lock a process: a fork may have copied a lock that is held.
        self._locks: dict[int, threading.Lock] = {}
        self._pid: int | None = None
        self.stopped = False
        self.suspended = False  # the database takes nothing from us at the moment
        self._make()

    def _make(self) -> None:
        self.worker.running.clear()
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.held: set[str] = set()  # sids that wait or run here
        self._again: set[str] = set()  # those that were put once more meanwhile
        self.threads: list[threading.Thread] = []

    def wake(self, committed: bool, sid: str, queue: str | None = None) -> None:
        """See IExecutor.  There is one queue."""
        try:
            self.put(sid, FRESH)
        except Exception:
            # No thread can be started at exit, say.  The record tells recovery.
            log.exception("job %r could not be queued; recovery will find it", sid)

    def put(self, sid: str, seen: int, queue: str | None = None) -> None:
        """Queue a job; *seen* as in `Worker.run`."""
        if self._pid != os.getpid():
            self.start()  # nothing, once stopped
        if self._is_held(sid) or self.stopped or self.suspended or not self.room():
            return
        self.held.add(sid)
        self.queue.put((sid, seen))

    def _is_held(self, sid: str) -> bool:
        """Say whether a thread has the job or will have it; then it looks once more at the end.

        The first call may have come from an attempt of the request that did not commit, and a
        worker be about to find nothing.
        """
        if sid in self.held:
            self._again.add(sid)
        return sid in self.held  # by now: who lets go of it looks after that at what is noted

    def room(self) -> int:
        """Return how many more jobs fit into the queue; recovery fetches what did not."""
        # What runs is held too.
        return self.workers and max(0, self.max_pending + self.workers - len(self.held))

    def start(self) -> None:
        """Start the threads of this process, once."""
        # In no context: tools that hand it to new threads (Sentry, OpenTelemetry) would tell of
        # all jobs what they noted of the request that scheduled the first one, its user say.
        Context().run(self._start)
        if self.stopped:
            self.stop(0)  # which found nothing started when it was called, a moment ago

    def _start(self) -> None:
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            if self._pid == os.getpid() or self.stopped:
                return
            self._make()
            self.threads = [
                threading.Thread(
                    target=self._work, name=f"pyramid_async-worker-{number}", daemon=True
                )
                for number in range(1, self.workers + 1)
            ]
            self._start_threads()
            self._pid = os.getpid()
            stop_at_exit(self)

    def _start_threads(self) -> None:
        try:
            for thread in self.threads:
                thread.start()
            if self.workers:
                self.recovery.start()
        except RuntimeError:
            # The system has no more; those before it must not stay at each attempt.
            for _ in self.threads:
                self.queue.put(None)
            raise

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.stopped:
                continue
            try:
                if not self.suspended:
                    self.worker.run(*item)
            except BaseException:
                log.exception("job %r: the worker goes on", item[0])
            finally:
                # Where a job has another manager, what it left in this one would be the next job's.
                end_transaction(transaction.manager)
                self._let_go(item[0])

    def _let_go(self, sid: str) -> None:
        if sid in self.worker.running:
            return  # it was put twice at once, and another thread, which has it, will let it go
        self.held.discard(sid)
        if sid in self._again:
            self._again.discard(sid)
            self.put(sid, FRESH)

    def stop(self, timeout: float | None = None) -> None:
        """See IExecutor.  A durable store keeps the jobs that wait, and those that do not end."""
        self.stopped = True
        self.worker.stops = True  # what is scheduled from now on is anybody's
        was_stopped(self)
        if self._pid != os.getpid():
            return
        self._pid = None
        deadline = time.monotonic() + (self.shutdown_timeout if timeout is None else timeout)
        self.tell()
        for _ in self.threads:
            self.queue.put(None)
        # In recovery's thread: a database that is away must not keep the process from its exit.
        self.recovery.end(lambda: self._wind_up(deadline))
        self._join(deadline)
        self.recovery.stop(max(0.0, deadline - time.monotonic()) + GIVE_BACK)
        # Whoever uses the database next in this very process takes what waited here.
        self.worker.store.identity.end()
        if self.worker.running:
            log.warning("stopped with jobs still running: %s", ", ".join(self.worker.running))

    def tell(self) -> None:
        """Tell the running jobs to stop."""
        self.worker.interrupt_all(f"process {os.getpid()} stops")

    def _join(self, deadline: float) -> None:
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _wind_up(self, deadline: float) -> None:
        """Let other processes have what did not begin, and at the deadline what did not end."""
        try:
            # A copy: a worker that ends its job meanwhile changes the set.
            self.worker.give_back([s for s in list(self.held) if s not in self.worker.running])
            self._join(deadline)
            self.worker.give_back_running()
            self.worker.give_back(self.recovery.timed())
            self.recovery.pulse.leave()
        except Exception:
            # Recovery finds them by the lease.
            log.exception("jobs could not be given back: %s", ", ".join(self.held))
