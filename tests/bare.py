"""The core without Pyramid: the parts of one process or of several, and what their jobs share."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import transaction
from persistent import Persistent
from transaction.interfaces import NoTransaction
from webapp import GATES, Barrier

from pyramid_async import current_job
from pyramid_async.ram import RamStore
from pyramid_async.recovery import Recovery
from pyramid_async.scheduler import Scheduler
from pyramid_async.threads import ThreadExecutor
from pyramid_async.worker import Worker
from pyramid_async.zodb import ZodbStore

ROOT = object()  # stands for the database's root among the arguments of `Process.schedule`


CALLS = defaultdict(list)  # key of a test -> what its jobs noted


def note(key, value=None):
    CALLS[key].append(value)
    return value


def check_until_told(name, key):
    GATES[name].reached.set()
    try:
        while True:
            current_job().check()
            GATES[name].opened.wait(0.005)
    except BaseException as error:
        CALLS[key].append(error)
        raise


class CountedLock:
    """A lock that counts who asked for it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.asked = 0

    def __enter__(self):
        self.asked += 1
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, now=1_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


class LosesReply(Barrier):
    """A data manager that fails once the database has finished, as often as *left* says."""

    def __init__(self, error, left=None):
        super().__init__(None, None, "~~last")
        self.error, self.left = error, left or [math.inf]

    def tpc_finish(self, txn):
        if self.left[0]:
            self.left[0] -= 1
            raise self.error


class Shared(ZodbStore):
    """Of a storage that several processes share, as far as anybody can tell."""

    exclusive = False


def refuse_to_load():
    raise TypeError("Failure() takes one argument less")


class Newer:
    """What a newer version keeps in a record or a sign of life, and this one cannot load."""

    def __reduce__(self):
        return refuse_to_load, ()


class Foreign(Persistent):
    """What is no record."""


class Events(dict):
    """Events by name, made when they are asked for first, by whichever thread."""

    def __missing__(self, name):
        # Atomic, unlike a defaultdict, which may make two.
        return self.setdefault(name, threading.Event())


class Deaf:
    """An executor that nobody can wake."""

    def wake(self, committed, sid, queue=None):
        pass


class Still:
    """A recovery without a thread: its steps are the test's."""

    pulse = SimpleNamespace(leave=lambda: None)

    def start(self):
        pass

    def end(self, last):
        last()

    def stop(self, timeout):
        pass

    def timed(self):
        return []


class Process:
    """The parts of one process.  Recovery takes its steps when the test says so.

    Without *workers* nothing runs but what the test gives to ``worker.run``.
    """

    def __init__(self, store, db, workers=0, *, monotonic=time.monotonic, lease=60.0, **options):
        self.store, self.db = store, db
        self.ended = Events()
        self.told = []
        self.worker = Worker(store, notify=self._notify, **options)
        self.executor = ThreadExecutor(self.worker, workers)
        self.worker.keeps = True
        self.recovery = Recovery(self.executor, lease=lease, monotonic=monotonic)
        self.executor.recovery = Still()
        self.worker.later = self.recovery.later
        self.scheduler = Scheduler(self.worker, self.executor)

    def _notify(self, sid, status):
        if status in ("successful", "failed"):
            self.told.append((sid, status))
            self.ended[sid].set()

    @contextmanager
    def transaction(self):
        """A transaction of our own, committed after the block: (table, root)."""
        tm = transaction.TransactionManager(explicit=True)
        tm.begin()
        try:
            table = self.store.table(tm)
            yield table, table.connection and table.connection.root()
            tm.commit()
        finally:
            with suppress(NoTransaction):
                tm.abort()
            self.store.release(tm)

    def schedule(self, f, *args, **options):
        """Schedule a job in a transaction of its own."""
        with self.transaction() as (table, root):
            args = [root if arg is ROOT else arg for arg in args]
            return self.scheduler.using(tm=table.tm, **options).schedule(f, *args)

    def plant(self, f, *args, **options):
        """Schedule a job whose hook never runs."""
        with self.transaction() as (table, root):
            args = [root if arg is ROOT else arg for arg in args]
            deaf = Scheduler(self.worker, Deaf())
            return deaf.using(tm=table.tm, **options).schedule(f, *args)

    def ask(self, question):
        """Answer ``question(scheduler)`` in a transaction of its own, and commit."""
        return self.scheduler.transact(question)

    def status(self, sid):
        return self.ask(lambda scheduler: scheduler.status(sid))

    def cancel(self, sid):
        return self.ask(lambda scheduler: scheduler.cancel(sid))

    def result(self, sid):
        """Return (value, exception) and remove the job."""
        return self.ask(lambda scheduler: scheduler.get_result(sid))

    def wait(self, sid):
        assert self.ended[sid].wait(20), self.status(sid)

    def run(self, f, *args, **options):
        """Schedule a job, run it in this very thread and return its sid."""
        assert not self.executor.workers  # whoever is first has it
        sid = self.schedule(f, *args, **options)
        self.worker.run(sid)
        return sid

    @contextmanager
    def standing_at(self, name, sid, *seen):
        """Run a job up to its gate in a thread; it goes on at the end of the block."""
        thread = threading.Thread(target=self.worker.run, args=[sid, *seen])
        thread.start()
        GATES[name].reach()
        try:
            yield
        finally:
            GATES[name].opened.set()
            thread.join(10)

    def record(self, sid, **facts):
        """Return what the record says now, after setting *facts* on it."""
        with self.transaction() as (table, _):
            record = table.get(sid)
            for name, value in facts.items():
                setattr(record, name, value)
            return record and dict(record.__getstate__(), status=record.status)

    def die(self, sid, status="running", signature="attempt of the dead", attempts=1):
        """Leave the job as a process leaves it that dies; return the record's revision."""
        facts = dict(status=status, holder="dead", signature=signature, attempts=attempts)
        self.record(sid, **facts)
        return self.revision(sid)

    def revision(self, sid):
        with self.transaction() as (table, _):
            return table.get(sid).revision

    def root(self, read):
        """Return what ``read(root)`` returns, seen by a fresh transaction."""
        with self.db.transaction() as connection:
            return read(connection.root())

    def commits(self):
        """Return the number of transactions that the database holds."""
        return sum(1 for _ in self.db.storage.iterator())

    def stop(self):
        self.executor.stop(5)


def store_of(kind, db, clock=time.time):
    if kind == "ram":
        store = RamStore(clock=clock)
        store.connections.know(db)
        return store
    store = ZodbStore(db, clock=clock)
    store.install()
    return store


@contextmanager
def process(kind, db, **options):
    clock = options.pop("clock", time.time)
    made = Process(store_of(kind, db, clock), db, **options)
    try:
        yield made
    finally:
        made.stop()
        transaction.abort()
        made.store.release(transaction.manager)


def in_thread(f, *args):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(f, *args).result()


def together(*calls):
    """Call functions at the same time, each in a thread; raise what one of them raised."""
    start, errors = threading.Barrier(len(calls)), []

    def run(call):
        start.wait(10)
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    if errors:
        raise errors[0]
