"""Faults inside a process: wake-ups lost and doubled; and the controls, which break the library.

A control must be found out by the audit, else the crash test proves nothing.
"""

from __future__ import annotations

import random
import time

from pyramid_async.jobs import JobRecord
from pyramid_async.recovery import Recovery
from pyramid_async.tries import Try

DROPPED = 0.05
DOUBLED = 0.05
LONGEST_GAP = 0.05  # seconds between the two commits of a control


def spoil_wake_ups(executor):
    """Make the executor lose and double some of its wake-ups."""
    wake = executor.wake

    def spoiled(*what):
        chance = random.random()
        if chance >= DROPPED:
            wake(*what)
        if chance >= 1 - DOUBLED:
            wake(*what)

    executor.wake = spoiled


def take_the_fence_out():
    """Let the last writer of a record win: a commit of an attempt that lost its job counts."""
    JobRecord._p_resolveConflict = lambda self, old, committed, new: new


def commit_twice():
    """Commit a job's effects first and its status in a second transaction."""
    succeed = Try._succeed

    def effects_then_status(self, value):
        self._commit()
        time.sleep(random.uniform(0, LONGEST_GAP))
        self._begin()
        succeed(self, value)

    Try._succeed = effects_then_status


def rescue_nothing():
    """Leave jobs where a kill or a lost wake-up left them."""
    Recovery._rescue = lambda self, record, table: None


CONTROLS = {
    "no-fence": take_the_fence_out,
    "two-commits": commit_twice,
    "no-recovery": rescue_nothing,
}
