"""The designs of the deployment guide at 10, 1,000 and 100,000 jobs an hour, and at their limit.

Requests and jobs are those of `peers`.  At 10 an hour as at 1,000 a job finds nothing else to do:
single jobs stand for both.  100,000 an hour are 28 requests a second, each sent when it is due,
whether or not the jobs before it are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from uuid import uuid4

from .peers import (
    LOOK,
    OURS,
    PATIENCE,
    PEERS,
    REQUESTS,
    THREADS,
    Site,
    done,
    many,
    send,
    serving,
    slots,
    surroundings,
)
from .rounds import wait_until

RATE = 100_000 / 3600  # jobs per second
WARM = 20
# Seconds.  Records are put away after the usual minute; how long they lie there costs nothing.
RESULT_TIMEOUT = 90
GONE = 240.0  # after so many all of them must be


class Place(NamedTuple):
    """A design at work."""

    site: Site
    app: Any
    file: Path  # that holds the database
    size: int  # of the file, before there were any jobs


def main(quick: bool) -> None:
    single, steady, flood = (20, 60, 30) if quick else (200, 850, 300)
    print(f"{single} jobs one by one, {steady} at 28 a second, {flood} at once: milliseconds from")
    print("request to visible effect, median and p99; jobs per second")
    print(f"  {'':33} {'one by one':>15} {'28 a second':>15} {'at once':>12}")
    with ExitStack() as stack:
        places = {}
        for title, design in DESIGNS.items():
            place = places[title] = stack.enter_context(design(max(steady, flood)))
            many(place.site, place.app, WARM)
            alone = [many(place.site, place.app, 1) for _ in range(single)]
            together = latencies(place.site, place.app, steady)
            rate = flood / many(place.site, place.app, flood)
            print(f"  {title:33} {ms(alone)} {ms(together)} {rate:7,.0f} /s", flush=True)
        if not quick:
            print("Bytes that a job adds to the database's file until its record is removed:")
            for title, place in places.items():
                removed = partial(all_removed, place.site.connection)
                wait_until(removed, "records are still there", GONE, look=1)
                grown = place.file.stat().st_size - place.size
                print(f"  {title:33} {grown / (WARM + single + steady + flood):7,.0f}")


def ms(seconds: list[float]) -> str:
    p99 = sorted(seconds)[ceil(len(seconds) * 0.99) - 1]
    return f"{median(seconds) * 1000:7.1f} {p99 * 1000:7.1f}"


# -- what is measured ------------------------------------------------------------------


def latencies(site: Site, app: Any, count: int) -> list[float]:
    """Send requests at RATE; return the seconds from when each was due to its job's effect."""
    token, begun = uuid4().hex, time.perf_counter()
    due = [begun + number / RATE for number in range(count)]
    with ThreadPoolExecutor(REQUESTS) as threads:
        sent = threads.map(partial(send_when_due, app, token, due), range(count))
        seen = ends(site.connection, token, due)
        list(sent)  # raises what a request raised
    return [seen[number] - when for number, when in enumerate(due)]


def send_when_due(app: Any, token: str, due: list[float], number: int) -> None:
    time.sleep(max(0.0, due[number] - time.perf_counter()))
    send(app, token, number)


def ends(connection: Any, token: str, due: list[float]) -> dict[int, float]:
    """Look until the last effect is visible; return when each was seen."""
    seen: dict[int, float] = {}
    while len(seen) < len(due):
        now = time.perf_counter()
        if now > due[-1] + PATIENCE:
            raise TimeoutError(f"{len(due) - len(seen)} of {len(due)} jobs are not done")
        for number in [n for n, when in enumerate(due) if when <= now and n not in seen]:
            if done(connection, number, token):
                seen[number] = time.perf_counter()
        time.sleep(LOOK)
    return seen


def all_removed(connection: Any) -> bool:
    with connection.transaction_manager:
        jobs = connection.root()["pyramid_async"]
        return not (any(jobs.unfinished) or any(jobs.finished))


# -- the designs -----------------------------------------------------------------------


@contextmanager
def filestorage_threads(count: int) -> Iterator[Place]:
    with surroundings(count) as site:  # its server has nothing to do
        file = Path(site.directory, "alone.fs")
        uri = f"file://{file}?connection_pool_size=10"
        with (
            serving(site, THREADS, {**IN_THREADS, "zodbconn.uri": uri}) as app,
            slots(app.registry._zodb_databases[""], count) as connection,
        ):
            yield Place(site._replace(connection=connection), app, file, file.stat().st_size)


@contextmanager
def zeo_threads(count: int) -> Iterator[Place]:
    with surroundings(count) as site, serving(site, THREADS, IN_THREADS) as app:
        yield on_zeo(site, app)


@contextmanager
def zeo_celery(count: int) -> Iterator[Place]:
    with surroundings(count) as site:
        ini = Path(site.directory, "ours.ini")
        short_life = f"async.result_timeout = {RESULT_TIMEOUT}\n[loggers]"
        ini.write_text(ini.read_text().replace("[loggers]", short_life))
        with PEERS[OURS].working(site, OURS), serving(site, OURS, {}) as app:
            yield on_zeo(site, app)


def on_zeo(site: Site, app: Any) -> Place:
    file = Path(site.directory, "data.fs")
    return Place(site, app, file, file.stat().st_size)


IN_THREADS = {"async.executor": "threads", "async.result_timeout": RESULT_TIMEOUT}
DESIGNS: dict[str, Callable[[int], AbstractContextManager[Place]]] = {
    "one process, FileStorage, threads": filestorage_threads,
    "ZEO, threads": zeo_threads,
    "ZEO, Celery on RabbitMQ": zeo_celery,
}
