"""What belongs to one process: its ids, its locks, its changes."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace

from pyramid_async import process
from pyramid_async.process import Changes


def test_ids_are_drawn_from_the_source_for_secrets(monkeypatch):
    """Whoever holds the id of an anonymous job sees the job."""
    drawn = bytes(range(256)) * 4
    monkeypatch.setattr(process, "_drawn", {})
    monkeypatch.setattr(process.secrets, "token_bytes", lambda count: drawn[:count])
    assert process.new_id() == drawn[:16].hex()


def test_nobody_waits_in_a_lock_that_another_thread_holds():
    held = [True, True, False]
    lock = SimpleNamespace(locked=lambda: held.pop(0))
    assert process.at_rest(lock) is lock
    assert not held


def test_whoever_waits_for_changes_is_told():
    changes = Changes()
    waiting = threading.Event()
    told = []

    def wait():
        seen = changes.count
        waiting.set()
        changes.wait(seen, 20)
        told.append(changes.count)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    changes.tell()
    thread.join(10)
    assert told == [1]


def test_change_that_came_before_the_wait_is_not_missed():
    changes = Changes()
    seen = changes.count
    changes.tell()
    changes.wait(seen, 600)  # at once: a test may not take so long


def test_wait_for_changes_ends():
    changes = Changes()
    changes.wait(changes.count, 0)
    assert changes.count == 0


class Interrupted(threading.Condition):
    """A condition that a signal meets when it has its lock."""

    def __enter__(self):
        super().__enter__()
        raise KeyboardInterrupt


def test_wait_that_is_interrupted_at_its_begin_locks_nobody_out():
    changes = Changes()
    changes._told = Interrupted(changes._lock)
    with suppress(KeyboardInterrupt):
        changes.wait(changes.count, 0)
    assert not changes._lock.locked()
