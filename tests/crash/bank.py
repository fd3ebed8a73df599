"""The data that the crash test watches over, and the job that changes it."""

from __future__ import annotations

import random
import time
from secrets import token_hex

from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from pyramid_zodbconn import get_connection

from pyramid_async import current_job

PLAIN_PAIRS = 4
COUNTER_PAIRS = 20
SHARDS = 16
LONGEST_WORK = 0.02  # seconds that a job spends between reading and writing
LONGEST_PAUSE = 0.01  # seconds between a job's last check and its commit


class Account(Persistent):
    """A balance whose changes conflict; `BTrees.Length` is one whose changes do not."""

    value = 0

    def __call__(self):
        return self.value

    def change(self, delta):
        self.value += delta


class Pair(Persistent):
    """Two accounts and the number by which a ledger entry names them."""

    def __init__(self, number, account):
        self.number = number
        self.giver = account()
        self.taker = account()


class Bank(Persistent):
    """Pairs of accounts, the ledgers of what was moved, and what requests noted of themselves.

    Most accounts merge changes made at the same time, so that nothing but its record keeps a
    job from taking effect twice.  Ledger keys are fresh, so that a second effect is a second
    entry.
    """

    def __init__(self):
        kinds = [Account] * PLAIN_PAIRS + [Length] * COUNTER_PAIRS
        self.pairs = tuple(Pair(number, kind) for number, kind in enumerate(kinds))
        self.ledgers = tuple(OOBTree() for _ in range(SHARDS))  # entry -> (sid, pair number)
        self.requests = tuple(OOBTree() for _ in range(SHARDS))  # sid -> request

    def note(self, sid, request):
        """Note a job and its request's id in the very transaction that schedules it."""
        self.requests[shard(sid)][sid] = request

    def enter(self, sid, pair):
        """Write a ledger entry and return its key."""
        entry = token_hex(8)
        self.ledgers[shard(entry)][entry] = (sid, pair.number)
        return entry


def shard(key):
    return int(key[:2], 16) % SHARDS


def bank_of(request):
    return get_connection(request).root()["bank"]


def move(pair):
    """The job: move one unit and enter it; the entry's key is the result."""
    job = current_job()
    before = pair.giver() + pair.taker()
    time.sleep(random.uniform(0, LONGEST_WORK))
    job.progress(1, 2)
    pair.giver.change(-1)
    pair.taker.change(1)
    assert pair.giver() + pair.taker() == before
    # Here the record alone can stop it.
    job.request.tm.get().addBeforeCommitHook(time.sleep, (random.uniform(0, LONGEST_PAUSE),))
    return bank_of(job.request).enter(job.sid, pair)
