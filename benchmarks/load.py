"""Many clients at once, through waitress with four threads: ``python -m benchmarks.load``.

Three measurements, each with a server in a process of its own: an unrelated GET beside twenty
waiting pollers; waits that their clients abort; a thousand jobs that fifty clients poll.  What
leaks is counted inside the server, before and after: threads, open files, and connections out of
the pool of the ZODB.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median, quantiles
from typing import Any

import transaction
from waitress.server import create_server

from pyramid_async.interfaces import IScheduler

from .jobs import nothing, wait_at_gate
from .surroundings import application

THREADS = 4
POLLERS = 20
CLIENTS = 50
PATIENCE = 30.0  # seconds
SETTLED = 5.0  # seconds that a server gets to notice that its clients have left


def main(quick: bool = False) -> None:
    for store in ("ram", "zodb"):
        print(f"{store} store, waitress with {THREADS} threads")
        with server(store, 1) as web:
            beside_pollers(web, 10 if quick else 50)
            aborted_waits(web, 20 if quick else 200)
        with server(store, 50 if quick else 1000) as web:
            polled_jobs(web, 2 if quick else 30)


# -- the measurements ------------------------------------------------------------------


def beside_pollers(web: Server, count: int) -> None:
    """Time a GET that has nothing to do with jobs, alone and while others wait for one."""
    alone = latencies(web, count)
    stop = threading.Event()
    pollers = [Client(web.port, stop) for _ in range(POLLERS)]
    target = f"{web.jobs[0]}?wait=20"
    threads = [run(client.poll, lambda: target) for client in pollers]
    web.until(lambda counted: counted["held"] > 0)
    beside = latencies(web, count)
    stop.set()
    for client in pollers:
        client.abort()
    for thread in threads:
        thread.join()
    print(
        f"  a GET beside {POLLERS} waiting pollers: median {median(beside) * 1000:.1f} ms, worst"
        f" {max(beside) * 1000:.1f} ms; alone {median(alone) * 1000:.1f} ms"
    )


def latencies(web: Server, count: int) -> list[float]:
    client = Client(web.port)
    found = [client.timed("/bare")[0] for _ in range(count)]
    client.abort()
    return found


def aborted_waits(web: Server, count: int) -> None:
    """Ask to wait and hang up, many times; then nothing may be held."""
    before = web.until(lambda counted: counted["held"] == 0)
    for _ in range(count):
        client = Client(web.port)
        client.send(f"{web.jobs[0]}?wait=20")
        client.abort()
    begun = time.perf_counter()
    after = web.until(lambda counted: no_more(before, counted))
    seconds = time.perf_counter() - begun
    print(f"  {count} aborted waits; {seconds:.1f} s after the last: {leaked(before, after)}")


def polled_jobs(web: Server, seconds: float) -> None:
    """Let clients poll jobs, each as fast as it is answered."""
    poll_jobs(web, min(2.0, seconds))  # opens what a storage keeps open for its readers
    before = web.count()
    clients = poll_jobs(web, seconds)
    times = [latency for client in clients for latency in client.times]
    errors = [error for client in clients for error in client.errors]
    after = web.until(lambda counted: no_more(before, counted))
    p99 = quantiles(times, n=100)[98] if len(times) > 1 else times[0]
    print(
        f"  {len(web.jobs)} jobs, {len(clients)} clients, {seconds:g} s: {len(times)} answers,"
        f" {len(times) / seconds:,.0f}/s, median {median(times) * 1000:.0f} ms, p99"
        f" {p99 * 1000:.0f} ms, {len(errors)} errors, {leaked(before, after)}"
    )
    for error in errors[:3]:
        print(f"    {error}")


def poll_jobs(web: Server, seconds: float) -> list[Client]:
    stop = threading.Event()
    clients = [Client(web.port, stop) for _ in range(CLIENTS)]
    threads = [
        run(client.poll, web.jobs[number::CLIENTS].__iter__, True)
        for number, client in enumerate(clients)
    ]
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    for client in clients:
        client.abort()
    return clients


def no_more(before: dict[str, int], after: dict[str, int]) -> bool:
    return all(after[name] <= before[name] for name in before)


def leaked(before: dict[str, int], after: dict[str, int]) -> str:
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in before)


# -- clients ---------------------------------------------------------------------------


def run(work: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=args)
    thread.start()
    return thread


class Client:
    """One connection, kept alive, that asks and reads; it obeys no Retry-After."""

    def __init__(self, port: int, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self.times: list[float] = []
        self.errors: list[str] = []
        self.connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def poll(self, targets: Any, again: bool = False) -> None:
        """Ask for one target after the other, and from the beginning, until it is stopped."""
        while not self.stop.is_set():
            for path in targets() if again else [targets()]:
                if self.stop.is_set():
                    return
                self.ask(path)

    def ask(self, path: str) -> None:
        try:
            latency, status = self.timed(path)
        except OSError as error:
            if not self.stop.is_set():
                self.errors.append(repr(error))
            return
        self.times.append(latency)
        if status != 200:
            self.errors.append(f"{path}: {status}")

    def timed(self, path: str) -> tuple[float, int]:
        begun = time.perf_counter()
        self.send(path)
        status, _ = self.receive()
        return time.perf_counter() - begun, status

    def send(self, path: str) -> None:
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

    def receive(self) -> tuple[int, bytes]:
        """Return status and body of an answer."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += self.more()
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        while len(body) < length:
            body += self.more()
        return int(head.split()[1]), body

    def more(self) -> bytes:
        data = self.connection.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def abort(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


# -- the server ------------------------------------------------------------------------


class Server:
    """What the measurements know of the server."""

    def __init__(self, port: int, jobs: list[str]) -> None:
        self.port, self.jobs = port, jobs

    def count(self) -> dict[str, int]:
        """Return what the server counts of itself, by its own page."""
        client = Client(self.port)
        client.send("/counted")
        found: dict[str, int] = json.loads(client.receive()[1])
        client.abort()
        return found

    def until(self, enough: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        """Return what is counted once it is *enough*, or after a while."""
        deadline = time.monotonic() + SETTLED
        while True:
            counted = self.count()
            if enough(counted) or time.monotonic() > deadline:
                return counted
            time.sleep(0.05)


@contextmanager
def server(store: str, jobs: int) -> Iterator[Server]:
    """A server in another process, with jobs: the first runs until the end."""
    with in_another_process(serve, store, jobs) as told:
        yield Server(*told)


@contextmanager
def in_another_process(serve: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Call ``serve(*args, pipe)`` there; yield what it sends first, and end it after the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(*args, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(PATIENCE):
            raise TimeoutError("the server did not start")
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def serve(store: str, count: int, pipe: Any) -> None:
    # There are more clients than threads, and it warns of each that waits for one.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with application(store, wait_max=20) as app:
        scheduler = app.registry.getUtility(IScheduler)
        with transaction.manager:
            sids = [scheduler.schedule(wait_at_gate)]
            sids += [scheduler.schedule(nothing) for _ in range(count - 1)]
        # Lets a request that is held see that its client has gone; as development.ini has it.
        http = create_server(
            counting(app),
            host="127.0.0.1",
            port=0,
            threads=THREADS,
            channel_request_lookahead=1,
            connection_limit=200,
        )
        pipe.send((http.effective_port, [f"/async/{sid}" for sid in sids]))
        http.run()


def counting(app: Any) -> Any:
    """Add a page that tells what is in use; it is answered without the application."""

    def wsgi(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/counted":
            return app(environ, start_response)
        body = json.dumps(counted(app.registry)).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    return wsgi


def counted(registry: Any) -> dict[str, int]:
    databases = getattr(registry, "_zodb_databases", None) or {}
    return {
        "held": registry["pyramid_async.slots"].taken,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "connections": sum(
            info["opened"] is not None
            for db in databases.values()
            for info in db.connectionDebugInfo()
        ),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers: does it run?")
    main(parser.parse_args().quick)
