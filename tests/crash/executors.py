"""Who runs the jobs of a crash test: threads, or Celery workers behind a real broker."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from uuid import uuid4

from . import web
from .child import Part
from .processes import CeleryWorker, Process

BROKERS = {
    "amqp": "amqp://guest:guest@127.0.0.1:5672//",
    "redis": "redis://127.0.0.1:6379/0",
}

# Name of a process -> how many clients it has.
WEBS = {"web-1": 1, "web-2": 1, "web-3": 1}
# Name of a Celery worker -> processes of its pool.
WORKERS = {"worker-1": 2, "worker-2": 2}

INI = """
[app:main]
use = call:tests.crash.web:main
zodbconn.uri = {uri}
crash.control = {control}
{settings}

[loggers]
keys = root

[handlers]
keys = console

[formatters]
keys = plain

[logger_root]
level = INFO
handlers = console

[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain

[formatter_plain]
format = %(asctime)s [%(process)d] %(threadName)s %(name)s: %(message)s
"""


class Threads:
    """Each process runs jobs in threads, and those of dead ones."""

    lease = web.LEASE
    faults = ()  # kinds of kills
    disturbances = {}  # other faults -> their share, for each kill

    def __init__(self, storage, broker, control, seed):
        self.storage = storage
        self.control = control
        self.seed = seed

    def start(self):
        pass

    def stop(self):
        pass

    def know(self, sid):
        """Note a job that was accepted."""

    def processes(self):
        """Return the processes of the run."""
        return [
            Process(self._part(name, workers, clients))
            for name, (workers, clients) in self.storage.processes.items()
        ]

    def _part(self, name, workers, clients, **more):
        return Part(
            name=name,
            directory=str(self.storage.directory),
            uri=self.storage.uri,
            workers=workers,
            clients=clients,
            seed=f"{self.seed}-{name}",
            control=self.control,
            **more,
        )


class Celery(Threads):
    """Web processes schedule; Celery workers run.  The queue is this run's alone."""

    lease = 2.0
    faults = ("child", "child", "worker", "worker")
    disturbances = {"purge": 0.2, "double": 0.4}

    def __init__(self, storage, broker, control, seed):
        super().__init__(storage, broker, control, seed)
        self.url = BROKERS[broker]
        self.queue = f"crash-{uuid4().hex}"
        self.recent = deque(maxlen=20)
        self.settings = {
            "async.executor": "celery",
            "async.celery.broker": self.url,
            "async.celery.queue": self.queue,
            "async.heartbeat": 0.5,
            "async.lease": self.lease,
        }

    def processes(self):
        webs = [
            Process(self._part(name, 0, clients, settings=self.settings))
            for name, clients in WEBS.items()
        ]
        ini = self._ini()
        return webs + [
            CeleryWorker(self._part(name, workers, 0), ini) for name, workers in WORKERS.items()
        ]

    def _ini(self):
        settings = "\n".join(f"{name} = {value}" for name, value in self.settings.items())
        path = self.storage.directory / "worker.ini"
        path.write_text(
            INI.replace("{uri}", self.storage.uri)
            .replace("{control}", self.control or "")
            .replace("{settings}", settings)
        )
        return str(path)

    def start(self):
        os.environ["C_FORCE_ROOT"] = "1"  # to be run in a container too

    def know(self, sid):
        self.recent.append(sid)

    def purge(self):
        """Take every message from the queue; return how many there were."""
        with self._connected() as connection, suppress(*connection.channel_errors):
            return connection.default_channel.queue_purge(self.queue)
        return 0  # there is no queue yet

    def double(self):
        """Send the messages of recent jobs once more; return how many."""
        from pyramid_async.celery import bell

        with self._connected() as connection:
            for sid in self.recent:
                bell.apply_async((sid,), queue=self.queue, connection=connection)
        return len(self.recent)

    def stop(self):
        """Remove the queue."""
        remove_queue(self.queue, self.url)

    def _connected(self):
        from pyramid_async.bells import connect

        return connect(self.url)


def remove_queue(name, url):
    """Leave nothing of a queue at the broker."""
    from pyramid_async.bells import connect

    with connect(url) as connection, suppress(*connection.channel_errors):
        channel = connection.default_channel
        channel.queue_delete(name)
        if url.startswith("amqp"):
            channel.exchange_delete(name)
        else:
            # Only the connection that bound the queue would remove these.
            channel.client.delete(f"_kombu.binding.{name}", f"_kombu.binding_permanent.{name}")


EXECUTORS = {"threads": Threads, "celery": Celery}
