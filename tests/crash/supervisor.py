"""Starts the processes of a crash test, kills them at random, and lets the rest settle."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import transaction

from .bank import Bank
from .child import SETTLE, STOP
from .processes import CeleryWorker

MOST_ENDS = 50  # of processes that nobody killed
FREEZES = 0.2  # for each kill, where processes can be frozen
STALLS = 0.05  # for each kill, where the storage's server can be frozen
STOPS = 0.1  # polite ones, for each kill
BY_ITSELF = "ended by itself"
LOOK = 0.01  # seconds between two looks at the processes


class Stuck(Exception):
    """The run does not get on."""


class Journal:
    """Reads on in the logs of all processes: what is new since the last look."""

    def __init__(self, directory):
        self.directory = directory
        self.read = Counter()

    def news(self):
        for path in self.directory.glob("*.log"):
            with path.open("rb") as file:
                file.seek(self.read[path])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self.read[path] += len(whole)
            yield from (line.split() for line in whole.decode().splitlines())


class Supervisor:
    """One run.  Touches the database before the processes start, and never while they run."""

    def __init__(self, storage, executor, jobs, kills, seed, patience):
        self.storage = storage
        self.executor = executor
        self.jobs = jobs
        self.patience = patience  # seconds without a new job, or until all have settled
        self.random = random.Random(seed)
        self.journal = Journal(storage.directory)
        self.accepted = 0
        self.left = None  # unfinished jobs, as a process counted them last
        self.done = Counter()  # faults by kind
        self.messages = Counter()  # messages that were purged and doubled
        self.plan = self._plan(kills)
        self.processes = executor.processes()

    def _plan(self, kills):
        """Return faults as (number of accepted jobs, kind), spread over the run."""
        faults = self.storage.faults + self.executor.faults
        kinds = [self.random.choice(faults) for _ in range(kills)]
        kinds += ["freeze"] * round(kills * FREEZES * self.storage.freezes)
        kinds += ["stall"] * round(kills * STALLS * self.storage.stalls)
        kinds += ["stop"] * round(kills * STOPS)
        for kind, share in self.executor.disturbances.items():
            kinds += [kind] * round(kills * share)
        self.random.shuffle(kinds)
        step = self.jobs / max(1, len(kinds))
        return [
            (int(step * (number + self.random.random())), kind) for number, kind in enumerate(kinds)
        ]

    def run(self):
        """Run the whole test except for the audit; raise Stuck."""
        self._make_bank()
        for process in self.processes:
            process.start()
        try:
            self._wait(lambda: self.accepted >= self.jobs and not self.plan, self._torment)
            self._settle()
            self._end()
        finally:
            for process in self.processes:
                process.destroy()

    def _make_bank(self):
        db = self.storage.open()
        try:
            with db.transaction() as connection:
                connection.root()["bank"] = Bank()
        finally:
            db.close()
            transaction.abort()

    # -- faults

    def _torment(self):
        while self.plan and self.plan[0][0] <= self.accepted:
            _, kind = self.plan.pop(0)
            # Any moment between two jobs, not the one at which a reply was just given.
            time.sleep(self.random.uniform(0, 0.05))
            getattr(self, f"_{kind}")()
            self.done[kind] += 1

    def _process(self):
        self.random.choice(self.processes).kill()

    def _freeze(self):
        self.random.choice(self.processes).freeze(self.random.uniform(1.5, 3) * self.executor.lease)

    def _stop(self):
        self.random.choice(self.processes).stop()

    def _worker(self):
        self.random.choice(self._workers()).kill()

    def _child(self):
        while not self.random.choice(self._workers()).kill_child(self.random):
            self._look()  # one that was just started has no children yet
            time.sleep(LOOK)

    def _workers(self):
        return [process for process in self.processes if isinstance(process, CeleryWorker)]

    def _purge(self):
        self.messages["purged"] += self.executor.purge()

    def _double(self):
        self.messages["doubled"] += self.executor.double()

    def _server(self):
        self.storage.kill_server(self.random)

    def _stall(self):
        self.storage.stall_server(self.random.uniform(1.5, 3) * self.executor.lease)

    def _backend(self):
        self.storage.kill_backend(self.random)

    # -- progress

    def _wait(self, enough, act=lambda: None):
        """Call *act* again and again until it is *enough*; raise Stuck."""
        deadline = time.monotonic() + self.patience
        while not enough():
            before = self.accepted
            self._look()
            act()
            if self.accepted > before:
                deadline = time.monotonic() + self.patience
            if time.monotonic() > deadline:
                self._ask_where_they_are()
                raise Stuck(f"{self.accepted} jobs accepted, {self.left} left, no progress")
            time.sleep(LOOK)

    def _look(self):
        for word, *rest in self.journal.news():
            if word == "accepted":
                self.accepted += 1
                self.executor.know(rest[0])
            if word == "left":
                self.left = int(rest[0])
        for process in self.processes:
            process.thaw()
            if process.running.poll() is not None:
                if not process.stopping:
                    self.done[BY_ITSELF] += 1
                process.start()
        if self.done[BY_ITSELF] > MOST_ENDS:
            raise Stuck("the processes do not stay alive")

    def _settle(self):
        """Stop the clients and wait until nothing is left to do."""
        for process in self.processes:
            process.thaw(at_once=True)
        (self.storage.directory / SETTLE).touch()
        # Requests under way end, and their jobs are counted.
        quiet = time.monotonic() + 2 * self.executor.lease
        self._wait(lambda: time.monotonic() > quiet)
        self.left = None
        self._wait(lambda: self.left == 0)

    def _end(self):
        (self.storage.directory / STOP).touch()
        for process in self.processes:
            process.end(self.patience)

    def _ask_where_they_are(self):
        for process in self.processes:
            process.running.send_signal(signal.SIGUSR1)
        time.sleep(1)
