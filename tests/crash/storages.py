"""The storages that the crash test runs on: how to make, reach, kill and open them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import zodburi
from ZODB import DB

ZEO_SERVER = """
<zeo>
  address 127.0.0.1:{port}
  # No transaction-timeout: with ZEO 6.2 the first one leaves the commit lock held for ever.
  client-conflict-resolution {client_resolves}
</zeo>
<filestorage 1>
  path {directory}/data.fs
</filestorage>
"""

ZEO_CLIENT = """
%import ZEO
<zodb>
  pool-size 10
  <clientstorage>
    server 127.0.0.1:{port}
    # Without it, a process that is told of a commit may not see it yet.
    server-sync true
    wait-timeout 10
  </clientstorage>
</zodb>
"""

RELSTORAGE = """
%import relstorage
<zodb>
  pool-size 10
  <relstorage>
    keep-history {keep_history}
    <postgresql>
      dsn dbname='{database}' user='postgres' host='127.0.0.1'
    </postgresql>
  </relstorage>
</zodb>
"""

# Name of a process -> (worker threads, clients).
ALONE = {"web": (2, 2)}
SHARED = {"web-1": (2, 1), "web-2": (2, 1), "front": (0, 1), "worker": (2, 0)}


class FileStorage:
    """One process owns it; nothing but that process can be killed."""

    processes = ALONE
    faults = ("process",)
    freezes = False
    stalls = False  # whether its server can be frozen

    def __init__(self, directory, control=None):
        self.directory = Path(directory)
        self.uri = f"file://{directory}/data.fs?connection_pool_size=10"

    def start(self):
        pass

    def stop(self):
        pass

    def open(self):
        """Return the database, opened by this process alone."""
        storage, options = zodburi.resolve_uri(self.uri)
        return DB(storage(), **options)


class Zeo(FileStorage):
    """A ZEO server and the processes that share it."""

    processes = SHARED
    faults = ("process", "process", "process", "server")
    freezes = stalls = True

    def __init__(self, directory, control=None):
        super().__init__(directory)
        values = {
            "directory": directory,
            "port": free_port(),
            "client_resolves": "true" if control == "no-fence" else "false",
        }
        self.port = values["port"]
        self.server_file = written(self.directory / "server.conf", ZEO_SERVER, values)
        self.uri = "zconfig://" + written(self.directory / "client.conf", ZEO_CLIENT, values)
        self.server = None

    def start(self):
        with open(self.directory / "server.err", "a") as err:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "ZEO.runzeo", "-C", self.server_file],
                stdout=err,
                stderr=err,
            )
        wait_for_port(self.port)

    def stop(self):
        if self.server is not None:
            self.server.terminate()
            self.server.wait(10)

    def kill_server(self, random):
        """Kill the server and start another."""
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()
        self.start()

    def stall_server(self, seconds):
        """Freeze the server: it answers nobody, and later does what it was told meanwhile."""
        self.server.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:  # else it would outlive who interrupts the test
            self.server.send_signal(signal.SIGCONT)


class RelStorage(FileStorage):
    """PostgreSQL on this machine; keeps the history of objects."""

    processes = SHARED
    faults = ("process", "process", "backend")
    freezes = True
    keep_history = "true"

    def __init__(self, directory, control=None):
        super().__init__(directory)
        self.database = f"crash_{uuid4().hex}"  # a run that was killed leaves its own
        values = {"database": self.database, "keep_history": self.keep_history}
        self.uri = "zconfig://" + written(self.directory / "client.conf", RELSTORAGE, values)

    def start(self):
        self.execute(f"CREATE DATABASE {self.database}")

    def stop(self):
        self.execute(f"DROP DATABASE IF EXISTS {self.database} WITH (FORCE)")

    def kill_backend(self, random):
        """Terminate one of the connections of the processes, whichever it is."""
        backends = self.execute(
            f"SELECT pid FROM pg_stat_activity WHERE datname = '{self.database}'"
        )
        if backends:
            self.execute(f"SELECT pg_terminate_backend({random.choice(backends)[0]})")

    def execute(self, statement):
        """Run a statement in another database than the one under test; return its rows."""
        import psycopg2

        with closing(psycopg2.connect(dbname="postgres", user="postgres", host="127.0.0.1")) as c:
            c.autocommit = True
            with c.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []


class HistoryFree(RelStorage):
    """PostgreSQL; keeps the last state of each object alone."""

    keep_history = "false"


STORAGES = {
    "filestorage": FileStorage,
    "zeo": Zeo,
    "relstorage": RelStorage,
    "relstorage-hf": HistoryFree,
}


def written(path, text, values):
    path.write_text(text.format(**values))
    return str(path)


def free_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def wait_for_port(port, timeout=20.0):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")
