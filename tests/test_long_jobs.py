"""Jobs that outlive what a storage does meanwhile: a server restarted, backends terminated."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import suppress
from uuid import uuid4

import pytest
from BTrees.OOBTree import OOBTree
from ZEO.Exceptions import ClientDisconnected
from ZODB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from zope.interface import directlyProvides, providedBy

from pyramid_async import current_job
from pyramid_async.scheduler import Scheduler
from pyramid_async.standalone import executor_for
from pyramid_async.transactional import transact
from pyramid_async.worker import Worker
from pyramid_async.zodb import ZodbStore

pytestmark = pytest.mark.services

POSTGRES = "host=127.0.0.1 port=5432 user=postgres"


class Stage:
    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()
        self.calls = 0


stage = Stage()


@pytest.fixture(autouse=True)
def fresh_stage():
    global stage
    stage = Stage()
    yield
    stage.go.set()


class System:
    """A scheduler on a storage."""

    def __init__(self, db):
        self.store = ZodbStore(db)
        self.store.install()
        self.worker = Worker(self.store)
        self.executor = executor_for(self.worker, 1)
        self.scheduler = Scheduler(self.worker, self.executor)
        self.change(lambda root: root.update(log=OOBTree()))

    def change(self, work):
        def in_root(table):
            return work(table.connection.root())

        return transact(self.store, in_root)

    def start(self, f):
        sid = self.change(
            lambda root: self.scheduler.using(tm=root._p_jar.transaction_manager).schedule(
                f, root["log"]
            )
        )
        assert stage.reached.wait(10)
        return sid

    def status(self, sid):
        return self.scheduler.transact(lambda scheduler: scheduler.status(sid))

    def finished(self, sid, wait):
        wait(lambda: self.status(sid).done, 30)
        return self.status(sid)


def interrupted(log):
    """Write, wait while the storage is disturbed, write again."""
    stage.calls += 1
    log["before"] = log.get("before", 0) + 1
    stage.reached.set()
    assert stage.go.wait(20)
    log["after"] = log.get("after", 0) + 1
    return stage.calls


def interrupted_after_a_checkpoint(log):
    job = current_job()
    stage.calls += 1
    if job.cursor is None:
        log["first"] = log.get("first", 0) + 1
        job.checkpoint("first")
    log["second"] = log.get("second", 0) + 1
    stage.reached.set()
    assert stage.go.wait(20)
    log._p_jar.cacheMinimize()
    log["third"] = len(log)
    return job.cursor


# -- ZEO


class Zeo:
    """A ZEO server, a process of its own, that can be restarted on its port."""

    def __init__(self, path, wait):
        self.path, self.wait = str(path), wait
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        self.start()

    def start(self):
        host, port = self.address
        command = [sys.executable, "-m", "ZEO.runzeo", "-a", f"{host}:{port}", "-f", self.path]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.wait(self.answers, 20)

    def answers(self):
        with suppress(OSError), socket.create_connection(self.address, 1):
            return True

    def stop(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.stop()
        self.start()


@pytest.fixture
def zeo(tmp_path, wait_for):
    server = Zeo(tmp_path / "zeo.fs", wait_for)
    yield server
    server.stop()


@pytest.fixture
def on_zeo(zeo):
    import ZEO

    db = ZEO.DB(zeo.address, server_sync=True, wait_timeout=10)
    system = System(db)
    yield system
    stage.go.set()
    system.executor.stop(5)
    db.close()


@pytest.mark.parametrize("job", [interrupted, interrupted_after_a_checkpoint])
def test_a_job_survives_a_restart_of_its_zeo_server(on_zeo, zeo, wait_for, job):
    sid = on_zeo.start(job)
    zeo.restart()
    stage.go.set()
    assert on_zeo.finished(sid, wait_for).status == "successful"
    log = on_zeo.change(lambda root: dict(root["log"]))
    assert set(log.values()) <= {1, 2}  # nothing was done twice
    assert log.get("before", 1) == log.get("first", 1) == 1


class Transforming:
    """A storage that transforms the records of another one, as zc.zlibstorage does."""

    def __init__(self, base):
        self.base = base
        directlyProvides(self, providedBy(base))
        base.registerDB(self)

    def registerDB(self, db):
        self.invalidate, self.invalidateCache = db.invalidate, db.invalidateCache
        self.references = db.references

    def transform_record_data(self, data):
        return data

    untransform_record_data = transform_record_data

    def __getattr__(self, name):
        return getattr(self.base, name)


@pytest.mark.parametrize("wrap", [lambda storage: storage, Transforming])
@pytest.mark.parametrize("own", ["on ZEO", "beside it"])
def test_oids_fetched_before_a_restart_are_used_in_no_database(zeo, wait_for, own, wrap):
    """The server hands them out again, in those that are named beside the store's own too."""
    import ZEO

    client, databases = ZEO.client(zeo.address, wait_timeout=10), {}
    DB(wrap(client), databases=databases, database_name="on ZEO")
    DB(MappingStorage(), databases=databases, database_name="beside it")
    ZodbStore(databases[own])
    client.new_oid()
    zeo.restart()

    def connected_anew():
        with suppress(ClientDisconnected):
            client.ping()
            return True

    wait_for(connected_anew)
    rival = ZEO.client(zeo.address)
    handed_out_again = {rival.new_oid() for _ in range(100)}
    assert client.new_oid() not in handed_out_again
    for each in (rival, *databases.values()):
        each.close()


# -- RelStorage


@pytest.fixture(params=[True, False], ids=["history", "history-free"])
def on_relstorage(request, tmp_path):
    import psycopg2
    from relstorage.adapters.postgresql import PostgreSQLAdapter
    from relstorage.options import Options
    from relstorage.storage import RelStorage

    name = f"pyramid_async_{uuid4().hex[:12]}"
    admin = psycopg2.connect(f"{POSTGRES} dbname=postgres")
    admin.autocommit = True
    admin.cursor().execute(f"create database {name}")
    options = Options(keep_history=request.param, cache_local_mb=1)
    adapter = PostgreSQLAdapter(dsn=f"{POSTGRES} dbname={name}", options=options)
    db = DB(RelStorage(adapter, options=options))
    system = System(db)
    system.admin, system.name = admin, name
    yield system
    stage.go.set()
    system.executor.stop(5)
    db.close()
    terminate(system)
    admin.cursor().execute(f"drop database {name}")
    admin.close()


def terminate(system):
    """Kill every backend of the test's database."""
    system.admin.cursor().execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (system.name,)
    )


def conflict(system, rival):
    """Return the conflict that a write meets when its rival wrote first."""

    def write(table):
        table.connection.root()["n"] = "loser"

        def write_first(root):
            root["n"] = rival
            root._p_jar.transaction_manager.get().note(rival)

        system.change(write_first)

    with pytest.raises(ConflictError) as caught:
        transact(system.store, write)
    return caught.value


def test_explaining_conflicts_sees_the_last_of_them_and_leaves_no_transaction(on_relstorage):
    explain, history = on_relstorage.store.explain, on_relstorage.store.db.supportsUndo()
    for rival in ("the first", "the second"):
        told = explain(conflict(on_relstorage, rival))
        assert told.endswith(f", written by {rival!r}" if history else " 0x00")
    cursor = on_relstorage.admin.cursor()
    cursor.execute(
        "select count(*) from pg_stat_activity where datname = %s and xact_start is not null"
        " and backend_type = 'client backend'",  # an autovacuum may be there too
        (on_relstorage.name,),
    )
    assert cursor.fetchone() == (0,)


@pytest.mark.parametrize("job", [interrupted, interrupted_after_a_checkpoint])
def test_a_job_survives_the_end_of_its_backends(on_relstorage, wait_for, job):
    sid = on_relstorage.start(job)
    terminate(on_relstorage)
    stage.go.set()
    assert on_relstorage.finished(sid, wait_for).status == "successful"
    log = on_relstorage.change(lambda root: dict(root["log"]))
    assert set(log.values()) <= {1, 2}
    assert log.get("before", 1) == log.get("first", 1) == 1
    assert stage.calls <= 4
