"""Polls of a finished and of a running job through waitress, against a bare JSON view.

The server runs in a process of its own, with four threads; four clients keep their connections
and ask as fast as they are answered.
"""

from __future__ import annotations

import logging
import multiprocessing
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import transaction
from waitress.server import create_server

from pyramid_async.interfaces import IScheduler

from .jobs import nothing, wait_at_gate
from .rounds import Ratio, print_ratio
from .surroundings import application

THREADS = 4
PATIENCE = 30.0  # seconds


def main(quick: bool) -> None:
    rounds, requests = (2, 25) if quick else (7, 150)
    for store in ("ram", "zodb"):
        print(f"{store} store; {rounds} rounds of {THREADS} x {requests} requests")
        with server(store) as (port, targets):
            compare(port, targets, rounds, requests)


def compare(port: int, targets: dict[str, str], rounds: int, requests: int) -> None:
    for path in targets.values():
        latencies(port, path, 20)  # the first requests make what the others use
    measured: dict[str, list[list[float]]] = {name: [] for name in targets}
    for _ in range(rounds):
        for name, path in targets.items():
            measured[name].append(latencies(port, path, requests))
    rates = {name: [rate(round) for round in found] for name, found in measured.items()}
    for name, found in measured.items():
        p99 = median(quantiles(round, n=100)[98] for round in found) * 1000
        print(f"  {name:10} {median(rates[name]):8,.0f} requests/s   p99 {p99:6.1f} ms")
    for name in ("finished", "running"):
        print_ratio(rates, Ratio(name, "bare"))


# -- clients ---------------------------------------------------------------------------


def latencies(port: int, path: str, requests: int) -> list[float]:
    """Return the seconds that each request of all clients took."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda _: one_client(port, path, requests), range(THREADS))
        return [latency for client in found for latency in client]


def rate(latencies: list[float]) -> float:
    """Return the answers per second: every client asks again as soon as it is answered."""
    return THREADS * len(latencies) / sum(latencies)


def one_client(port: int, path: str, requests: int) -> list[float]:
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [timed(connection, request) for _ in range(requests)]


def timed(connection: socket.socket, request: bytes) -> float:
    begun = time.perf_counter()
    connection.sendall(request)
    read_response(connection)
    return time.perf_counter() - begun


def read_response(connection: socket.socket) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        received += receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    missing = int(head.lower().partition(b"content-length:")[2].split()[0]) - len(body)
    while missing > 0:
        missing -= len(receive(connection))


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


# -- the server ------------------------------------------------------------------------


@contextmanager
def server(store: str) -> Iterator[tuple[int, dict[str, str]]]:
    """A server in another process: its port, and the paths to ask for."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(store, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(PATIENCE):
            raise TimeoutError("the server did not start")
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def serve(store: str, pipe: Any) -> None:
    # There are as many clients as threads, and it warns of each that waits for one.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with application(store) as app:
        finished, running = start_jobs(app.registry.getUtility(IScheduler))
        http = create_server(app, host="127.0.0.1", port=0, threads=THREADS)
        targets = {
            "bare": "/bare",
            "finished": f"/async/{finished}",
            "running": f"/async/{running}",
        }
        pipe.send((http.effective_port, targets))
        http.run()


def start_jobs(scheduler: Any) -> tuple[str, str]:
    with transaction.manager:
        finished, running = scheduler.schedule(nothing), scheduler.schedule(wait_at_gate)
    wait_for(scheduler, finished, "successful")
    wait_for(scheduler, running, "running")
    return finished, running


def wait_for(scheduler: Any, sid: str, status: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while scheduler.transact(lambda inside: inside.status(sid)).status != status:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {sid!r} is not {status}")
        time.sleep(0.01)
