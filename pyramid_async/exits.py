"""How a process ends: it hears that it is to, and its executors are stopped while they can work."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from concurrent.futures import process as process_pools
from concurrent.futures import thread as pools
from contextlib import suppress
from multiprocessing.util import register_after_fork
from typing import Any

from .current import running


class Exit:
    """Whether the process was told to exit; no Event, for a signal handler must take no lock."""

    asked = False


# -- the executors ---------------------------------------------------------------------


# The executors that this process started and did not stop, or its parent before a fork.
_started: set[Any] = set()


def stop_at_exit(executor: Any) -> None:
    """Have a thread executor stopped, unless `was_stopped` is called before."""
    _started.add(executor)
    # Before what others registered until now, and may rely on.
    atexit.unregister(stop_all)
    atexit.register(stop_all)


def was_stopped(executor: Any) -> None:
    _started.discard(executor)


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


def stop_together(executors: list[Any]) -> None:
    """Stop executors in the time of the one that takes longest, if the database is there."""
    begun = time.monotonic()
    for executor in executors:
        executor.tell()
    for executor in executors:
        executor.stop(max(0.0, executor.shutdown_timeout - (time.monotonic() - begun)))


# -- who tells the process -------------------------------------------------------------


def exit_on_sigterm() -> None:
    """Let SIGTERM end the process like ``sys.exit``, so that `stop_all` runs.

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

    It waits for them before `stop_all` can run, and is killed after seconds.
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
