"""This library over Celery against other queues, on the same work: latency and rate.

A request commits a change in the ZODB and schedules a job that commits another one; it is done
when another connection sees the job's change.  ZEO holds the ZODB, and then RelStorage; each
contestant has two worker processes with one job at a time each.  `python -m benchmarks.peers NAME`
is such a worker.  Beside them, without an aim: this library's own threads, two of them in the
process of the requests.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import transaction
import ZODB.config
from persistent import Persistent
from persistent.list import PersistentList
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response

from .rounds import Ratio, interleaved, print_ratio, wait_until

AMQP = "amqp://guest:guest@127.0.0.1:5672/%2F"
REDIS = "redis://127.0.0.1:6379/0"
POSTGRESQL = "host=127.0.0.1 dbname=test"
SERVICES = {"RabbitMQ": 5672, "Redis": 6379, "PostgreSQL": 5432}

REQUESTS = 2  # threads that send requests
LOOK = 0.001  # seconds between two looks for a job's change
PATIENCE = 20.0
NAME = "PEERS_NAME"  # of queues and databases, in the environment of workers
PLACE = "PEERS_DIRECTORY"
OURS = "ours"
THREADS = "threads"  # ours as well

ZEO_CONF = """%import ZEO
<zodb>
  pool-size 10
  <clientstorage>
    server 127.0.0.1:{port}
    server-sync true
  </clientstorage>
</zodb>
"""
RELSTORAGE_CONF = """%import relstorage
<zodb>
  pool-size 10
  <relstorage>
    keep-history false
    <postgresql>
      dsn host='127.0.0.1' dbname='{name}'
    </postgresql>
  </relstorage>
</zodb>
"""
INI = """[app:main]
use = call:benchmarks.peers:application
contestant = ours
zodbconn.uri = zconfig://{directory}/zodb.conf
tm.manager_hook = pyramid_tm.explicit_manager
async.executor = celery
async.celery.broker = {broker}
async.celery.queue = {queue}
{settings}[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys =
[logger_root]
level = WARNING
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
"""


class Slot(Persistent):
    """What one request and its job change; no two jobs share one, so nothing conflicts."""

    requested = done = ""
    times = 0


def main(quick: bool) -> None:
    present = {name: peer for name, peer in PEERS.items() if can_run(name, peer)}
    for title, storage in STORAGES.items():
        if storage is zeo or is_there(title, "relstorage", "PostgreSQL"):
            print(f"{title}:")
            compare(present, storage, quick)


def compare(present: dict[str, Peer], storage: Storage, quick: bool) -> None:
    count, rounds = (30, 2) if quick else (300, 7)
    with surroundings(count, storage) as site, ExitStack() as stack:
        for name, peer in present.items():
            stack.enter_context(peer.working(site, name))
        print(f"{count} jobs, {rounds} rounds: median jobs/s; median latency of single jobs, ms")
        measures = {name: partial(pace, site, name, count) for name in present}
        measured = interleaved(measures, rounds)
    for name, paces in measured.items():
        rate, latency = (median(values) for values in zip(*paces, strict=True))
        print(f"  {name:12} {rate:7,.0f} jobs/s {latency * 1000:8.1f} ms")
    rates = {name: [p.rate for p in paces] for name, paces in measured.items()}
    for name in [*present][1:]:
        print_ratio(rates, Ratio(OURS, name, None if name == THREADS else 0.9))
    print("Latency, the greater the slower:")
    latencies = {name: [p.latency for p in paces] for name, paces in measured.items()}
    for name in [*present][1:]:
        print_ratio(latencies, Ratio(OURS, name))


# -- what is measured ------------------------------------------------------------------


class Pace(NamedTuple):
    rate: float  # jobs per second
    latency: float  # seconds from a request to the change of its job, nothing else to do


class Site(NamedTuple):
    directory: str
    name: str
    connection: Any  # that looks for the jobs' changes


def pace(site: Site, name: str, count: int) -> Pace:
    # One application at a time: each has a client of ZEO, which hears of every commit.
    with serving(site, name, PEERS[name].settings) as app:
        many(site, app, count)  # warm: a process of requests lives long
        latency = median(many(site, app, 1) for _ in range(min(count, 20)))
        return Pace(count / many(site, app, count), latency)


def many(site: Site, app: Any, count: int) -> float:
    """Send requests; return the seconds until the changes of all their jobs are visible."""
    token = uuid4().hex
    begun = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(partial(send, app, token), range(count)))
    deadline = begun + PATIENCE
    for number in reversed(range(count)):
        while not done(site.connection, number, token):
            if time.perf_counter() > deadline:
                raise TimeoutError(f"job {number} of {count} is not done after {PATIENCE:g} s")
            time.sleep(LOOK)
    return time.perf_counter() - begun


def send(app: Any, token: str, number: int) -> None:
    answer = Request.blank(f"/start?number={number}&token={token}").get_response(app)
    if answer.status_int != 200:
        raise RuntimeError(f"the request was answered with {answer.status}")


def done(connection: Any, number: int, token: str) -> bool:
    with connection.transaction_manager:
        return bool(connection.root()["slots"][number].done == token)


# -- the application -------------------------------------------------------------------


def application(global_config: Any, contestant: str, **settings: Any) -> Any:
    """The Pyramid application of all contestants; they differ in how a job is scheduled."""
    with Configurator(settings=settings) as config:
        config.include("pyramid_tm")
        config.include("pyramid_retry")
        config.include("pyramid_zodbconn")
        if contestant in (OURS, THREADS):
            config.include("pyramid_async")
        config.registry.schedule = PEERS[contestant].schedule
        config.add_route("start", "/start")
        config.add_view(start, route_name="start")
        return config.make_wsgi_app()


def start(request: Any) -> Response:
    from pyramid_zodbconn import get_connection

    number, token = int(request.params["number"]), request.params["token"]
    slot = get_connection(request).root()["slots"][number]
    slot.requested = token
    request.registry.schedule(request, slot, number, token)
    return Response("scheduled")


def fulfil(slot: Slot, token: str) -> None:
    """What all jobs do: this library's have a transaction already."""
    slot.done = token
    slot.times += 1


def work(number: int, token: str) -> None:
    """The job of the others: the same in a transaction of its own, with the process's ZODB."""
    with database(os.environ[PLACE]).transaction() as connection:
        fulfil(connection.root()["slots"][number], token)


@cache
def database(directory: str) -> Any:
    return ZODB.config.databaseFromURL(str(Path(directory, "zodb.conf")))


def schedule_ours(request: Any, slot: Slot, number: int, token: str) -> None:
    request.scheduler.schedule(fulfil, slot, token)


def after_commit_of(enqueue: Callable[[str], Callable[[int, str], Any]]) -> Callable[..., None]:
    def schedule(request: Any, slot: Slot, number: int, token: str) -> None:
        call = enqueue(os.environ[NAME])
        request.tm.get().addAfterCommitHook(lambda ok: ok and call(number, token))

    return schedule


# -- the contestants: how each is fed, and what its worker is -----------------------------


@cache
def celery_task(prefix: str) -> Any:
    from celery import Celery

    app = Celery("peers", broker=AMQP, set_as_current=False)
    app.conf.update(
        task_default_queue=prefix + "-celery",
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        broker_connection_retry_on_startup=True,
    )
    return app.task(name="peers.work")(work)


def work_celery() -> None:
    app = celery_task(os.environ[NAME]).app
    app.worker_main(["worker", "-c2", "--without-gossip", "--without-mingle", "-lWARNING"])


@cache
def dramatiq_actor(prefix: str) -> Any:
    import dramatiq
    from dramatiq.brokers.rabbitmq import RabbitmqBroker

    broker = RabbitmqBroker(url=AMQP)
    dramatiq.set_broker(broker)
    queue = prefix + "-dramatiq"
    return dramatiq.actor(work, broker=broker, queue_name=queue, actor_name="work")


def dramatiq_broker() -> Any:
    """For the program of Dramatiq, which calls it in each worker process."""
    return dramatiq_actor(os.environ[NAME]).broker


def work_dramatiq() -> None:
    from dramatiq.cli import main, make_argument_parser

    sys.exit(
        main(
            make_argument_parser().parse_args(
                ["benchmarks.peers:dramatiq_broker", "-p2", "-t1", "--skip-logging"]
            )
        )
    )


@cache
def rq_queue(prefix: str) -> Any:
    from redis import Redis
    from rq import Queue

    return Queue(prefix, connection=Redis.from_url(REDIS))


def rq_enqueue(prefix: str) -> Callable[[int, str], Any]:
    from rq import Retry

    return partial(rq_queue(prefix).enqueue, work, retry=Retry(max=1000))


def work_rq() -> None:
    # The other worker forks for each job: each would open the ZODB anew.
    from rq import SimpleWorker

    queue = rq_queue(os.environ[NAME])
    SimpleWorker([queue], connection=queue.connection).work(logging_level="WARNING")


@cache
def procrastinate_task(connector: str, database: str) -> Any:
    """The task and its application, open where it is only fed."""
    import procrastinate

    conninfo = POSTGRESQL.replace("dbname=test", f"dbname={database}")
    app = procrastinate.App(connector=getattr(procrastinate, connector)(conninfo=conninfo))
    return app, app.task(work, name="peers.work")


@cache
def procrastinate_defer(database: str) -> Callable[[int, str], Any]:
    app, task = procrastinate_task("SyncPsycopgConnector", database)
    app.open()
    return lambda number, token: task.defer(number=number, token=token)


def work_procrastinate() -> None:
    app = procrastinate_task("PsycopgConnector", os.environ[NAME])[0]
    app.run_worker(concurrency=1, update_heartbeat_interval=1, stalled_worker_timeout=3)


class Peer(NamedTuple):
    schedule: Callable[..., None]
    package: str
    service: str | None
    worker: Callable[[], None] | None
    processes: int  # to start; those of Celery and Dramatiq make two by themselves
    settings: dict[str, Any] = {}

    @contextmanager
    def working(self, site: Site, name: str) -> Iterator[None]:
        """Workers that run."""
        with ExitStack() as stack:
            stack.enter_context(self.prepared(site, name))
            for command in self.commands(site, name):
                stack.enter_context(program(site, *command))
            yield

    @contextmanager
    def prepared(self, site: Site, name: str) -> Iterator[None]:
        """What workers and feeders need and make at the services; it is removed again."""
        with ExitStack() as stack:
            if name == "procrastinate":
                stack.enter_context(procrastinate_database(site.name))
            stack.callback(remove_queues, name, site.name)
            yield

    def commands(self, site: Site, name: str) -> list[list[str]]:
        """The workers, as arguments of Python."""
        options = "worker -c2 --without-gossip --without-mingle -lWARNING --ini"
        ini = str(Path(site.directory, "ours.ini"))
        ours = ["-m", "celery", "-A", "pyramid_async.celery", *options.split(), ini]
        return [["-m", "benchmarks.peers", name] if self.worker else ours] * self.processes


PEERS = {
    OURS: Peer(schedule_ours, "celery", "RabbitMQ", None, 1),
    "celery": Peer(
        after_commit_of(lambda name: celery_task(name).delay), "celery", "RabbitMQ", work_celery, 1
    ),
    "dramatiq": Peer(
        after_commit_of(lambda name: dramatiq_actor(name).send),
        "dramatiq",
        "RabbitMQ",
        work_dramatiq,
        1,
    ),
    "rq": Peer(
        after_commit_of(rq_enqueue),
        "rq",
        "Redis",
        work_rq,
        2,
    ),
    "procrastinate": Peer(
        after_commit_of(procrastinate_defer),
        "procrastinate",
        "PostgreSQL",
        work_procrastinate,
        2,
    ),
    # It is not to look for lost jobs: it would run those that wait for our Celery workers.
    THREADS: Peer(
        schedule_ours,
        "ZEO",
        None,
        None,
        0,
        {"async.executor": "threads", "async.maintenance_interval": 3600},
    ),
}


def can_run(name: str, peer: Peer) -> bool:
    return is_there(name, peer.package, peer.service)


def is_there(name: str, package: str, service: str | None) -> bool:
    """Return False, and print what is missing, where anything is."""
    try:
        import_module(package)
    except ImportError as error:
        print(f"  {name}: left out, {error}; pip install -e '.[bench]'")
        return False
    if service is not None and not listens(SERVICES[service]):
        print(f"  {name}: left out, no {service} on port {SERVICES[service]}")
        return False
    return True


# -- servers ---------------------------------------------------------------------------


Storage = Callable[[str, str], AbstractContextManager[str]]


@contextmanager
def zeo(directory: str, name: str) -> Iterator[str]:
    """A server; gives the configuration of its clients."""
    port = unused_port()
    file = str(Path(directory, "data.fs"))
    server = ["-m", "ZEO.runzeo", "-a", f"127.0.0.1:{port}", "-f", file]
    with program(Site(directory, name, None), *server):
        wait_until(lambda: listens(port), "ZEO does not answer", PATIENCE)
        yield ZEO_CONF.format(port=port)


@contextmanager
def relstorage(directory: str, name: str) -> Iterator[str]:
    """A database of PostgreSQL."""
    with postgresql_database(f"{name}-zodb"):
        yield RELSTORAGE_CONF.format(name=f"{name}-zodb")


STORAGES: dict[str, Storage] = {"ZEO": zeo, "RelStorage": relstorage}


@contextmanager
def surroundings(count: int, storage: Storage = zeo, settings: str = "") -> Iterator[Site]:
    """A storage with slots, and the files that name it, with more settings of ours."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        name = "peers" + uuid4().hex[:8]
        os.environ[NAME], os.environ[PLACE] = name, directory
        configuration = stack.enter_context(storage(directory, name))
        Path(directory, "zodb.conf").write_text(configuration)
        Path(directory, "ours.ini").write_text(
            INI.format(
                directory=directory,
                broker=AMQP.replace("%", "%%"),
                queue=f"{name}-ours",
                settings=settings,
            )
        )
        db = database(directory)
        stack.callback(db.close)
        yield Site(directory, name, stack.enter_context(slots(db, count)))


@contextmanager
def slots(db: Any, count: int) -> Iterator[Any]:
    """Slots in a database, and a connection that looks at them."""
    with db.transaction() as connection:
        connection.root()["slots"] = PersistentList(Slot() for _ in range(count))
    connection = db.open(transaction.TransactionManager())
    try:
        yield connection
    finally:
        connection.transaction_manager.abort()
        connection.close()


@contextmanager
def program(site: Site, *arguments: str) -> Iterator[None]:
    log = Path(site.directory, "log")
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, *arguments], stdout=file, stderr=file)
    try:
        yield
    except TimeoutError:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def serving(site: Site, name: str, more: dict[str, Any]) -> Iterator[Any]:
    """The application with the settings of the ini file and some more."""
    from pyramid.paster import get_appsettings

    settings = get_appsettings(str(Path(site.directory, "ours.ini")))
    app = application({}, **{**settings, "contestant": name, **more})
    try:
        yield app
    finally:
        if name in (OURS, THREADS):
            from pyramid_async.interfaces import IScheduler

            app.registry.getUtility(IScheduler).executor.stop(PATIENCE)
        for db in app.registry._zodb_databases.values():
            db.close()


@contextmanager
def postgresql_database(name: str) -> Iterator[None]:
    import psycopg
    from psycopg import sql

    def run(command: str) -> None:
        with psycopg.connect(POSTGRESQL, autocommit=True) as connection:
            connection.execute(sql.SQL(command).format(sql.Identifier(name)))

    run("CREATE DATABASE {}")
    try:
        yield
    finally:
        run("DROP DATABASE {} WITH (FORCE)")


@contextmanager
def procrastinate_database(name: str) -> Iterator[None]:
    import procrastinate

    with postgresql_database(name):
        conninfo = POSTGRESQL.replace("dbname=test", f"dbname={name}")
        app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=conninfo))
        with app.open():
            app.schema_manager.apply_schema()
        yield


def remove_queues(name: str, prefix: str) -> None:
    if name == "procrastinate" and procrastinate_defer.cache_info().currsize:
        procrastinate_task("SyncPsycopgConnector", prefix)[0].close()
    elif name == "rq":
        queue = rq_queue(prefix)
        for sid in queue.finished_job_registry.get_job_ids():
            with suppress(ValueError):  # it cannot remove all that was killed, which expires
                queue.finished_job_registry.remove(sid, delete_job=True)
        queue.delete(delete_jobs=True)
    elif name in {OURS, "celery", "dramatiq"}:
        from kombu import Connection

        with Connection(AMQP) as connection:
            for suffix in ("", ".DQ", ".XQ"):
                connection.default_channel.queue_delete(f"{prefix}-{name}{suffix}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    # Under its own name: tasks are named by the module that has them.
    peers = import_module("benchmarks.peers")
    peers.PEERS[sys.argv[1]].worker()
