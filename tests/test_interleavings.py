"""Several decide about a job at the same time, wherever their threads take turns.

One thread runs at a time, and at any line of the package another one may go on, as a seed says.
"""

import random
import sys
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import transaction
from transaction.interfaces import TransientError

import pyramid_async
from pyramid_async import JobDismissed, current_job
from pyramid_async.ram import RamStore
from pyramid_async.scheduler import Scheduler
from pyramid_async.transactional import transact
from pyramid_async.worker import Worker
from pyramid_async.zodb import ZodbStore

RUNS = 120  # of each store
PACKAGE = str(Path(pyramid_async.__file__).parent)


class Turns:
    """Runs functions in threads of their own, of which one has the turn."""

    def __init__(self, rng, locks):
        self.rng = rng
        self.locks = locks  # who has one keeps the turn
        self.often = rng.choice([0.3, 0.1, 0.03, 0.01])
        self.all_ended = threading.Event()

    def run(self, functions):
        self.waiting = [threading.Semaphore(0) for _ in functions]
        pairs = zip(functions, self.waiting, strict=True)
        threads = [threading.Thread(target=self._run, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        self._pass_on()
        assert self.all_ended.wait(20)
        for thread in threads:
            thread.join()

    def _run(self, function, turn):
        turn.acquire()
        sys.settrace(partial(self._trace, turn))
        try:
            function()
        finally:
            sys.settrace(None)
            self._pass_on()

    def _pass_on(self):
        if self.waiting:
            self.waiting.pop(self.rng.randrange(len(self.waiting))).release()
        else:
            self.all_ended.set()

    def _trace(self, turn, frame, event, arg):
        names = frame.f_code.co_name, frame.f_back.f_code.co_name
        if not frame.f_code.co_filename.startswith(PACKAGE) or "__del__" in names:
            return None  # what goes may go under any lock
        held = any(lock.locked() for lock in self.locks)
        if event == "line" and not held and self.rng.random() < self.often:
            self.waiting.append(turn)
            self._pass_on()
            turn.acquire()
        return partial(self._trace, turn)


def work(checkpoint):
    for _ in range(current_job().cursor or 0, 2):
        transaction.get().addAfterCommitHook(World.present.count)
        if checkpoint and not current_job().cursor:
            current_job().checkpoint(1)


class World:
    """One job, two processes that run it, and two clients; in RAM the processes are one."""

    def __init__(self, stores, seed):
        World.present = self
        self.rng = random.Random(seed)
        self.effects, self.told, self.cancelled, self.collected = 0, [], [], []
        self.workers = [Worker(store, notify=self.notify) for store in stores]
        self.first, self.last = self.workers[0], self.workers[-1]
        self.scheduler = Scheduler(self.first, Mock())  # nobody is woken
        self.checkpoint = self.rng.random() < 0.4
        self.sid = self.scheduler.transact(lambda s: s.schedule(work, self.checkpoint))

    def count(self, committed):
        self.effects += committed

    def notify(self, sid, status):
        if status in ("successful", "failed"):
            self.told.append(status)

    def read(self):
        """Return status and revision as they are committed."""
        return transact(self.first.store, self._state)

    def _state(self, table):
        record = table.get(self.sid)
        return (None, 0) if record is None else (record.status, record.revision)

    def rescue(self):
        self.last.run(self.sid, self.read()[1])

    def decide(self, what):
        tm = transaction.TransactionManager(explicit=True)
        tm.begin()
        inside = self.scheduler.bind(tm)
        try:
            found = getattr(inside, what)(self.sid)
            tm.commit()
        except TransientError:
            tm.abort()
        else:
            self.cancelled += [True] if what == "cancel" and found else []
            self.collected += [found] if what == "get_result" and found else []
        finally:
            self.first.store.release(tm)

    def run(self):
        what = self.rng.choices(["cancel", "remove", "get_result", "get_result"], k=2)
        clients = [partial(self.decide, each) for each in what]
        if self.rng.random() < 0.3:
            self.first.run(self.sid)  # the clients meet at its end
        locks = [worker.changes._lock for worker in self.workers]
        if not self.first.store.durable:
            locks.append(self.first.store.lock)
        Turns(self.rng, locks).run([partial(self.first.run, self.sid), self.rescue, *clients])
        if self.read()[0] in ("accepted", "running"):
            self.rescue()

    def check(self):
        status, _ = self.read()
        assert status in ("successful", "dismissed", None)
        assert self.told in ([], ["successful"])
        done = bool(self.told)
        assert self.effects in ([2] if done else [0, 1] if self.checkpoint else [0])
        assert status in (("successful", None) if done else ("dismissed", None))
        assert len(self.cancelled) <= (not done)
        assert len(self.collected) <= 1
        for _, error in self.collected:
            assert error is None if done else isinstance(error, JobDismissed)


@pytest.fixture(params=["ram", "zodb"])
def stores(request):
    """The stores of two processes; of one, in RAM."""
    with (
        patch("pyramid_async.zodb.SHARDS", 2),
        patch("pyramid_async.ram.VOTE_TIMEOUT", 0),  # for who waits has the turn
        patch("random.uniform", lambda low, high: 0.0),
    ):
        if request.param == "ram":
            yield [RamStore()]
        else:
            db = request.getfixturevalue("db")
            stores = [ZodbStore(db), ZodbStore(db)]
            stores[0].install()
            yield stores


def test_one_of_those_who_decide_at_the_same_time_wins(stores):
    for seed in range(RUNS):
        world = World(stores, seed)
        world.run()
        try:
            world.check()
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
