"""Starts the processes of a crash test, kills them at random, and lets the rest settle."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import transaction

from .bank import Bank
from .child import SETTLE, STOP, Part
from .web import LEASE

MOST_ENDS = 50  # of processes that nobody killed
FREEZES = 0.2  # for each kill, where processes can be frozen
STOPS = 0.1  # polite ones, for each kill
PATIENCE = 90.0  # seconds without a new job, or until all have settled
BY_ITSELF = "ended by itself"
LOOK = 0.01  # seconds between two looks at the processes


class Stuck(Exception):
    """The run does not get on."""


class Process:
    """A process of the run, started again whenever it ends."""

    def __init__(self, part):
        self.part = part
        self.generation = 0
        self.running = None
        self.frozen_until = None
        self.stopping = False

    def start(self):
        self.generation += 1
        self.frozen_until = None
        self.stopping = False
        part = Part(**{**vars(self.part), "seed": f"{self.part.seed}-{self.generation}"})
        with open(Path(part.directory, f"{part.name}.err"), "a") as err:
            self.running = subprocess.Popen(part.command(), stdout=err, stderr=err)

    def kill(self):
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()
        self.start()

    def stop(self):
        """Ask the process to end; it is started again once it did."""
        self.thaw(at_once=True)
        self.stopping = True
        self.running.send_signal(signal.SIGTERM)

    def freeze(self, seconds):
        self.running.send_signal(signal.SIGSTOP)
        self.frozen_until = time.monotonic() + seconds

    def thaw(self, at_once=False):
        if self.frozen_until and (at_once or time.monotonic() > self.frozen_until):
            self.running.send_signal(signal.SIGCONT)
            self.frozen_until = None


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

    def __init__(self, storage, jobs, kills, seed, control):
        self.storage = storage
        self.jobs = jobs
        self.random = random.Random(seed)
        self.journal = Journal(storage.directory)
        self.accepted = 0
        self.left = None  # unfinished jobs, as a process counted them last
        self.done = Counter()  # faults by kind
        self.plan = self._plan(kills)
        self.processes = [
            Process(
                Part(
                    name=name,
                    directory=str(storage.directory),
                    uri=storage.uri,
                    workers=workers,
                    clients=clients,
                    seed=f"{seed}-{name}",
                    control=control,
                )
            )
            for name, (workers, clients) in storage.processes.items()
        ]

    def _plan(self, kills):
        """Return faults as (number of accepted jobs, kind), spread over the run."""
        kinds = [self.random.choice(self.storage.faults) for _ in range(kills)]
        kinds += ["freeze"] * round(kills * FREEZES * self.storage.freezes)
        kinds += ["stop"] * round(kills * STOPS)
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
                process.running.kill()
                process.running.wait()

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
        self.random.choice(self.processes).freeze(self.random.uniform(1.5, 3) * LEASE)

    def _stop(self):
        self.random.choice(self.processes).stop()

    def _server(self):
        self.storage.kill_server(self.random)

    def _backend(self):
        self.storage.kill_backend(self.random)

    # -- progress

    def _wait(self, enough, act=lambda: None):
        """Call *act* again and again until it is *enough*; raise Stuck."""
        deadline = time.monotonic() + PATIENCE
        while not enough():
            before = self.accepted
            self._look()
            act()
            if self.accepted > before:
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                self._ask_where_they_are()
                raise Stuck(f"{self.accepted} jobs accepted, {self.left} left, no progress")
            time.sleep(LOOK)

    def _look(self):
        for word, *rest in self.journal.news():
            self.accepted += word == "accepted"
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
        quiet = time.monotonic() + 2 * LEASE
        self._wait(lambda: time.monotonic() > quiet)
        self.left = None
        self._wait(lambda: self.left == 0)

    def _end(self):
        (self.storage.directory / STOP).touch()
        for process in self.processes:
            process.running.wait(PATIENCE)

    def _ask_where_they_are(self):
        for process in self.processes:
            process.running.send_signal(signal.SIGUSR1)
        time.sleep(1)
