"""The thread executor: a bounded pool of named daemon threads in this process."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import process as process_pools
from concurrent.futures import thread as pools
from contextlib import suppress
from contextvars import Context
from multiprocessing.util import register_after_fork
from typing import Any

import transaction
from zope.interface import implementer

from .current import running
from .interfaces import IExecutor
from .jobs import FRESH
from .process import Exit
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
            _started.add(self)
            # Before what others registered until now, and may rely on.
            atexit.unregister(stop_all)
            atexit.register(stop_all)

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
        _started.discard(self)
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
            self.recovery.leave()
        except Exception:
            # Recovery finds them by the lease.
            log.exception("jobs could not be given back: %s", ", ".join(self.held))


# The executors that this process started and did not stop, or its parent before a fork.
_started: set[ThreadExecutor] = set()


def stop_all() -> None:
    """Stop all executors, at exit."""
    stop_together(list(_started))


def stop_before_pools() -> None:
    """Stop all executors at exit, while Python's pools of threads and processes still work.

    ``asyncio.to_thread`` raises after that, and would fail running jobs; and the exit waits for the
    calls that are in it, which nobody would have told to stop.
    """
    # Where threads of the application outlive the main one jobs go on; `stop_all` comes after them.
    if not any(map(_goes_on, threading.enumerate())):
        stop_all()


def _goes_on(thread: threading.Thread) -> bool:
    pooled = any(thread in threads for threads in _pooled)  # is told to end right after us
    return not (thread.daemon or pooled or thread is threading.main_thread())


# The threads of Python's pools: those that work, and those that manage processes.
_pooled: list[Any] = [
    getattr(pools, "_threads_queues", ()),
    getattr(process_pools, "_threads_wakeups", ()),
]


# What is public, `atexit`, comes too late.  The last one registered is called first, and those of
# the pools are registered by the imports above.
with suppress(RuntimeError):  # the process is about to end
    getattr(threading, "_register_atexit", atexit.register)(stop_before_pools)


def stop_together(executors: list[ThreadExecutor]) -> None:
    """Stop executors in the time of the one that takes longest, if the database is there."""
    begun = time.monotonic()
    for executor in executors:
        executor.tell()
    for executor in executors:
        executor.stop(max(0.0, executor.shutdown_timeout - (time.monotonic() - begun)))


def exit_on_sigterm() -> None:
    """Let SIGTERM end the process like ``sys.exit``, so that `stop` runs.

    Only in the main thread, and only where nobody else handles the signal: waitress does not,
    and would die at once.
    """
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, _exit)


def _exit(signum: int, frame: Any) -> None:
    Exit.asked = True
    sys.exit(128 + signum)


def heed_mod_wsgi() -> None:
    """Let requests be held no longer once a process of mod_wsgi is told to end.

    It waits for them before `stop` can run, and is killed after seconds.
    """
    subscribe = getattr(sys.modules.get("mod_wsgi"), "subscribe_shutdown", None)
    if subscribe:
        subscribe(_note_exit)


def _note_exit(event: str, **details: Any) -> None:
    Exit.asked = True


def _forget(handler: Any) -> None:
    """Let SIGTERM end a child of ``multiprocessing`` at once again.

    Who sends it there, such as ``Pool.terminate``, means to kill and then waits for the end.  Our
    handler has no place there, and in a child of a job neither has the server's or Celery's.
    """
    # Of any job: a pool replaces its processes from a thread of its own, which is outside of it.
    if running.jobs or signal.getsignal(signal.SIGTERM) is handler:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


register_after_fork(_exit, _forget)
