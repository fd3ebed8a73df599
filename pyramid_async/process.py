"""What belongs to one process and must not cross a fork: its identity, its locks, its changes."""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from typing import Any
from weakref import WeakSet, WeakValueDictionary

# Pid -> ids that were drawn and not used.  Not emptied by a hook of `os.fork`: a server that
# forks in C (uWSGI) calls none.
_drawn: dict[int, list[str]] = {}


def new_id() -> str:
    """Return 128 bits from `secrets`, in hexadecimal.

    Many are drawn at once, for each call of the system lets other threads run first, which
    costs more than the bits.  Never the same in two processes.
    """
    ids = _drawn.setdefault(os.getpid(), [])
    try:
        return ids.pop()
    except IndexError:
        data = secrets.token_bytes(64 * 16).hex()
        ids.extend(data[start : start + 32] for start in range(32, len(data), 32))
        return data[:32]


_renewed: Any = WeakSet()


def renew_in_children(thing: Any) -> None:
    """Have ``thing.renew()`` called in each child of a fork, as long as the thing lives.

    A lock that a thread of the parent held would stay locked there for ever.
    """
    _renewed.add(thing)


def _renew_all() -> None:
    for thing in list(_renewed):
        thing.renew()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_renew_all)


def at_rest(lock: Any) -> Any:
    """Return a lock once nobody holds it, or so it was a moment ago: ``with at_rest(lock):``.

    For locks that are held for microseconds, by many threads.  Who waits in ``acquire`` is
    handed the lock before the interpreter, and all the others queue up behind; who looks has
    the interpreter when the lock is free.
    """
    while lock.locked():
        time.sleep(0)
    return lock


class Changes:
    """Tells waiting threads that some job of this process changed."""

    def __init__(self) -> None:
        self.count = 0
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        self._lock = threading.Lock()
        self._told = threading.Condition(self._lock)

    def tell(self) -> None:
        with at_rest(self._lock):
            self.count += 1
            self._told.notify_all()

    def wait(self, seen: int, timeout: float) -> None:
        """Return once the count is no longer *seen*, or after *timeout* seconds."""
        # Not the condition's own, which a signal handler that raises would leave locked.
        with at_rest(self._lock):
            self._told.wait_for(lambda: self.count != seen, timeout)


class Identity:
    """A random id, a fresh one for each process.

    Never a host or pod name: a restarted pod must not keep a dead process's jobs alive.
    """

    _living: Any = WeakValueDictionary()  # id -> Identity

    def __init__(self) -> None:
        self._ids: dict[int, str] = {}  # pid -> id

    def __call__(self) -> str:
        known = self._ids.get(os.getpid())
        if known is None:
            # Of two threads that ask first, one wins.
            known = self._ids.setdefault(os.getpid(), new_id())
            self._living[known] = self
        return known

    def was(self, id: str) -> bool:
        """Say whether the id is ours, or was our parent's when it forked."""
        return id in self._ids.values()

    def end(self) -> None:
        """Be dead for others; whoever asks next gets a new id."""
        self._living.pop(self._ids.pop(os.getpid(), ""), None)

    @classmethod
    def lives_here(cls, id: str) -> bool:
        """Say whether the id belongs to somebody in this very process."""
        identity = cls._living.get(id)
        return identity is not None and identity._ids.get(os.getpid()) == id


def process_name() -> str:
    """Return what an operator finds a process by; never its identity."""
    return f"{platform.node()}:{os.getpid()}"
