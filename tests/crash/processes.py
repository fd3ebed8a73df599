"""The processes of a run: started again whenever they end, killed, stopped and frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .child import Part

ROOT = Path(__file__).parent.parent.parent


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
        with open(Path(self.part.directory, f"{self.part.name}.err"), "a") as err:
            self.running = subprocess.Popen(
                self.command(),
                cwd=ROOT,
                stdout=err,
                stderr=err,
                start_new_session=True,  # a group of its own: freezing means its children too
            )

    def command(self):
        seed = f"{self.part.seed}-{self.generation}"
        return Part(**{**vars(self.part), "seed": seed}).command()

    def kill(self):
        self.running.send_signal(signal.SIGKILL)
        self.thaw(at_once=True)  # the children of one that was frozen
        self.running.wait()
        self.start()

    def stop(self):
        """Ask the process to end; it is started again once it did."""
        self.thaw(at_once=True)
        self.stopping = True
        self.running.send_signal(signal.SIGTERM)

    def freeze(self, seconds):
        os.killpg(self.running.pid, signal.SIGSTOP)
        self.frozen_until = time.monotonic() + seconds

    def thaw(self, at_once=False):
        if self.frozen_until and (at_once or time.monotonic() > self.frozen_until):
            os.killpg(self.running.pid, signal.SIGCONT)
            self.frozen_until = None

    def end(self, patience):
        """Wait until the process ends, as the supervisor told all of them to."""
        self.running.wait(patience)

    def destroy(self):
        """Leave nothing of it behind."""
        if self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()


class CeleryWorker(Process):
    """A Celery worker of the prefork pool, as the deployment guide starts it.

    The pool of one that is killed ends by itself, after the jobs that it runs.
    """

    def __init__(self, part, ini):
        super().__init__(part)
        self.ini = ini

    def command(self):
        name = f"{self.part.name}-{self.generation}"
        return [
            *(sys.executable, "-m", "celery", "-A", "pyramid_async.celery"),
            *("worker", "--ini", self.ini, "-P", "prefork", "-c", str(self.part.workers)),
            *("-n", name, "--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]

    def kill_child(self, random):
        """Kill one of the processes of the pool; return False if there was none."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.running.pid)], capture_output=True, text=True
        )
        children = found.stdout.split()
        if not children:
            return False
        try:
            os.kill(int(random.choice(children)), signal.SIGKILL)
        except ProcessLookupError:
            return False  # it ended just now
        return True

    def end(self, patience):
        self.running.send_signal(signal.SIGTERM)  # a warm shutdown
        super().end(patience)
