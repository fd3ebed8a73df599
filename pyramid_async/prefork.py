"""What Celery tells a process of its prefork pool: to end, and that a time limit has passed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .interfaces import JobInterrupted, JobStopped, JobTimeout

# Seconds after which a signal that met the job in the storage's code is sent once more.
STRIKE_AGAIN = 0.05

# Seconds before Celery's hard time limit at which a job is recorded as failed, at most.
BEFORE_LIMIT = 1.0

# An exception raised in their midst would leave them half-way.
GUARDED = {"BTrees", "ZEO", "ZODB", "persistent", "pyramid_async", "relstorage", "transaction"}

# At which of these a process of the pool ends depends on REMAP_SIGTERM in the environment, and on
# who sends them: the worker alone, or a terminal or a supervisor to all its processes.
ENDS = ("SIGHUP", "SIGQUIT", "SIGTERM")

# Those functions of `tries` that call the job's.
CALLERS = {"call_function", "run_body"}


class Signals:
    """What Celery tells the process while a job runs in its main thread.

    SIGUSR1: the soft time limit has passed, so the job fails.  SIGTERM and its like: the process
    is to end, so the job is given back.  They would otherwise raise an exception wherever the
    program is, in the midst of a commit for one.
    """

    def __init__(self) -> None:
        self.parent: int | None = None  # pid of the worker's main process
        self.soft: float | None = None  # Celery's time limits, seconds
        self.hard: float | None = None
        self._sid: str | None = None
        self._worker: Any = None
        self._default: Any = None  # the pool's handler of those that it heeds
        self._handled: list[str] = []  # their names
        self._ends: int | None = None  # which of them came
        self._repeated: str | None = None  # the job that the next soft limit is for
        self._pid: int | None = None

    def is_child(self) -> bool:
        """Say whether this is a process of the pool."""
        return self.parent is not None and self.parent != os.getpid()

    @contextmanager
    def during(self, worker: Any, sid: str) -> Iterator[None]:
        """Turn signals into interrupts of this job."""
        if not self.is_child():
            yield
            return
        self._install()
        limit = self._limit(worker, sid)
        self._worker, self._sid = worker, sid
        try:
            yield
        finally:
            self._sid = None
            if limit is not None:
                limit.cancel()
                limit.join(BEFORE_LIMIT)  # it may just write that the job failed
            if self._ends is not None:
                self._default(self._ends, None)

    def _install(self) -> None:
        # Not earlier: the pool sets its own handlers after it told us that it starts.
        if self._pid != os.getpid():
            self._pid = os.getpid()
            handlers = {name: signal.getsignal(getattr(signal, name)) for name in ENDS}
            # The others are ignored.
            self._handled = [name for name in ENDS if callable(handlers[name])]
            self._default = handlers[self._handled[0]]
        # Each time: the last job may have set its own, as ``loop.add_signal_handler`` does.
        for name in self._handled:
            signal.signal(getattr(signal, name), self._end)
        signal.signal(signal.SIGUSR1, self._soft_limit)

    def _end(self, signum: int, frame: Any) -> None:
        if self._sid is None:
            self._default(signum, frame)
            return
        self._ends = signum
        self._strike(JobStopped(f"process {os.getpid()} is told to end"), signum, frame)

    def _soft_limit(self, signum: int, frame: Any) -> None:
        repeated, self._repeated = self._repeated, None
        if self._sid is None or repeated not in (None, self._sid):
            return  # it came too late: that job has ended
        reason = JobTimeout(
            f"job {self._sid!r} ran longer than Celery's soft time limit of {self.soft} s"
        )
        self._strike(reason, signum, frame)

    def _strike(self, reason: JobInterrupted, signum: int, frame: Any) -> None:
        """Interrupt the job: at once in its own code, a little later in the storage's."""
        assert self._sid is not None
        self._worker.interrupt(self._sid, reason)
        if in_function(frame):
            self._worker.running[self._sid].check()  # the first reason stays
        timer = threading.Timer(STRIKE_AGAIN, self._strike_again, (self._sid, signum))
        timer.name, timer.daemon = "pyramid_async-strike", True
        timer.start()

    def _strike_again(self, sid: str, signum: int) -> None:
        if self._sid == sid:
            if signum == signal.SIGUSR1:
                self._repeated = sid
            os.kill(os.getpid(), signum)

    # -- the hard limit

    def _limit(self, worker: Any, sid: str) -> threading.Timer | None:
        """Start to watch the hard time limit, at which Celery kills this process.

        A little before, for who is killed gives no reason.
        """
        if not self.hard:
            return None
        timer = threading.Timer(
            self.hard - min(BEFORE_LIMIT, self.hard / 4), self._expire, (worker, sid)
        )
        timer.name, timer.daemon = "pyramid_async-limit", True
        timer.start()
        return timer

    def _expire(self, worker: Any, sid: str) -> None:
        worker.fail(sid, JobTimeout(f"job {sid!r} ran into Celery's time limit of {self.hard} s"))


def in_function(frame: Any) -> bool:
    """Say whether a job's function runs, and no code that must not be interrupted."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "pyramid_async.tries" and frame.f_code.co_name in CALLERS:
            return True
        if module.partition(".")[0] in GUARDED:
            return False
        frame = frame.f_back
    return False
