"""Polls of a finished and of a running job through waitress, against a bare JSON view.

The server runs in a process of its own, with four threads; four clients keep their connections
and ask as fast as they are answered.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles
from typing import Any

import transaction
from waitress.server import create_server

from pyramid_async.interfaces import IScheduler

from .jobs import nothing, wait_at_gate
from .load import THREADS, Client, in_another_process
from .rounds import Ratio, print_ratio, wait_until
from .surroundings import application


def main(quick: bool) -> None:
    rounds, requests = (2, 25) if quick else (7, 150)
    for store in ("ram", "zodb"):
        print(f"{store} store; {rounds} rounds of {THREADS} x {requests} requests")
        with in_another_process(serve, store) as (port, targets):
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
    client = Client(port)
    try:
        return [timed(client, path) for _ in range(requests)]
    finally:
        client.abort()


def timed(client: Client, path: str) -> float:
    latency, status = client.timed(path)
    if status != 200:
        raise RuntimeError(f"{path}: {status}")
    return latency


# -- the server ------------------------------------------------------------------------


def serve(store: str, pipe: Any) -> None:
    """Send the port, and the paths to ask for; then serve."""
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
    def reached() -> bool:
        return scheduler.transact(lambda inside: inside.status(sid)).status == status

    wait_until(reached, f"job {sid!r} is not {status}")
