"""A process of the crash test: the application and its clients, which log what they were told.

A line is written before or after the call that it tells of, with one system call, so that it
outlives SIGKILL.  The supervisor and the audit read these logs.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex

from webob import Request

from pyramid_async.interfaces import IScheduler

from . import faults
from .web import application

log = logging.getLogger("client")

SETTLE = "settle"  # files in the directory of the run, made by the supervisor
STOP = "stop"

DISMISS = 0.15  # shares of the moves that are followed by a dismissal and by a removal
FORGET = 0.1
BACKLOG = 30  # a client waits while so many jobs wait in its process
THINK = 0.02  # longest pause between two requests of a client, seconds


@dataclass(frozen=True)
class Part:
    """What a process is to do."""

    name: str
    directory: str
    uri: str
    workers: int
    clients: int
    seed: str
    control: str | None = None
    settings: dict = field(default_factory=dict)

    def command(self):
        return [sys.executable, "-m", __name__, json.dumps(asdict(self))]


class Log:
    """Lines that outlive the process."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, *words):
        os.write(self.fd, (" ".join(map(str, words)) + "\n").encode())


class Client:
    """Starts moves, dismisses and forgets some, until it is told to let things settle."""

    def __init__(self, part, app, tell):
        self.directory = Path(part.directory)
        self.app = app
        self.tell = tell
        self.executor = app.registry.getUtility(IScheduler).executor
        self.recent = []
        self.running = []

    def run(self):
        while not (self.directory / SETTLE).exists():
            if self.look() < BACKLOG:
                self.move()
                self.maybe(DISMISS, self.dismiss)
                self.maybe(FORGET, self.forget)
            time.sleep(random.uniform(0, THINK))

    def look(self):
        """Note which jobs run; return how many wait."""
        self.running = list(self.executor.worker.running)
        return len(self.executor.held)

    def maybe(self, chance, act):
        """Do something to a job that was just scheduled or that runs, with some chance."""
        sids = [*self.recent, *self.running]
        if sids and random.random() < chance:
            act(random.choice(sids))

    def move(self):
        response = self.ask("POST", f"/move?request={token_hex(8)}")
        if response is not None and response.status_code == 202:
            sid = response.json["jobID"]
            self.tell("accepted", sid)
            self.recent = [*self.recent[-2:], sid]

    def dismiss(self, sid):
        response = self.ask("DELETE", f"/async/{sid}?only=cancel")
        if response is not None and response.status_code in (200, 409):
            self.tell(response.json["status"], sid)

    def forget(self, sid):
        self.tell("forget", sid)
        response = self.ask("POST", f"/forget/{sid}")
        if response is not None and response.status_code == 200:
            status = response.json["status"]
            self.tell("removed", sid)
            self.tell("prevented" if status in ("accepted", "running") else status, sid)

    def ask(self, method, path):
        """Return the application's response, or None where it had none."""
        try:
            response = Request.blank(path, method=method).get_response(self.app)
        except Exception as error:
            log.exception("%s %s", method, path)
            self.tell("error", type(error).__name__)
            return None
        if response.status_code >= 500:
            self.tell("error", response.status_code)
        return response


class FarClient(Client):
    """A client of jobs that run in other processes."""

    def look(self):
        response = self.ask("GET", "/left")
        if response is None or response.status_code != 200:
            return BACKLOG
        self.running = response.json["oldest"]
        return response.json["left"]


def main(part):
    """Run until told to stop, or killed."""
    random.seed(part.seed)
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks a process that hangs where it is
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s: %(message)s"
    )
    settings = {"zodbconn.uri": part.uri, "async.workers": part.workers, **part.settings}
    app = application(settings, part.control)
    faults.spoil_wake_ups(app.registry.getUtility(IScheduler).executor)
    tell = Log(Path(part.directory, f"{part.name}.log"))
    kind = FarClient if "async.executor" in part.settings else Client
    for _ in range(part.clients):
        threading.Thread(target=kind(part, app, tell).run, daemon=True).start()
    wait_for_the_end(Path(part.directory), app, tell)
    app.registry.getUtility(IScheduler).executor.stop()


def wait_for_the_end(directory, app, tell):
    """Return when the supervisor says so; tell meanwhile how many jobs are left."""
    while not (directory / STOP).exists():
        if (directory / SETTLE).exists():
            tell_what_is_left(app, tell)
        time.sleep(0.2)


def tell_what_is_left(app, tell):
    try:
        tell("left", Request.blank("/left").get_response(app).json["left"])
    except Exception as error:
        tell("error", type(error).__name__)


if __name__ == "__main__":
    main(Part(**json.loads(sys.argv[1])))
