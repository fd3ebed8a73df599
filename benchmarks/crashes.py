"""What the contestants of `peers` lose and do twice when their processes are killed.

The same requests and the same job as there.  A round sends a few requests to a process that serves
the application; while they are answered and their jobs run, that process or one of the workers is
killed with SIGKILL, and started again.  In the end there should be one change by a job for each
request that has committed its own.  `python -m benchmarks.crashes NAME PORT` is the process that
serves.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import waitress

from . import peers
from .rounds import wait_until

BURST = 12  # requests of a round; the first is waited for
LONGEST = 0.06  # seconds from the second to the kill
PATIENCE = 4.0  # seconds for the jobs of a round; then its lost ones wait for the end
SETTLED = 30.0  # seconds without a job's change after which the rest is lost
UNATTENDED = 5.0  # seconds without one after which the operator does what the manual says

# Workers that are killed are missed sooner than by default, and no job is given up for its crashes.
INI = """async.heartbeat = 0.5
async.lease = 2
async.maintenance_interval = 1
async.max_attempts = 1000
"""


def main(quick: bool) -> None:
    rounds = 4 if quick else 80
    print(
        f"{rounds} rounds of {BURST} requests; every other one kills the process that serves them,"
    )
    print("the others one of a worker's; a request counts if its own change was committed")
    for name, peer in peers.PEERS.items():
        if peer.processes and peers.can_run(name, peer):
            with peers.surroundings(rounds * BURST, settings=INI) as site:
                print(f"  {name:14}{torment(site, name, rounds)}", flush=True)


def torment(site: peers.Site, name: str, rounds: int) -> str:
    """Return what is found in the end."""
    port = peers.unused_port()
    acknowledged: set[int] = set()
    with ExitStack() as stack:
        stack.enter_context(peers.PEERS[name].prepared(site, name))
        web = stack.enter_context(running(site, "-m", __name__, name, str(port)))
        workers = [
            stack.enter_context(running(site, *command))
            for command in peers.PEERS[name].commands(site, name)
        ]
        alive = partial(revived, port, web, *workers)
        for number in range(rounds):
            mine = range(number * BURST, (number + 1) * BURST)
            kill = random.choice(workers).kill_one if number % 2 else web.kill
            acknowledged |= burst(site, port, mine, alive, kill)
        settle(site, name, alive)
        return audit(site, acknowledged)


Alive = Callable[[], bool]


def burst(
    site: peers.Site, port: int, numbers: range, alive: Alive, kill: Callable[[], None]
) -> set[int]:
    """Send requests and kill meanwhile; return the numbers of those that were answered."""
    first, *others = numbers
    wait_until(alive, "nobody serves")
    answered = {first} if ask(port, first) else set()
    wait_for(site, [first], alive)  # all have begun to work
    with ThreadPoolExecutor(peers.REQUESTS) as threads:
        asked = {number: threads.submit(ask, port, number) for number in others}
        time.sleep(random.uniform(0, LONGEST))
        kill()
    wait_for(site, others, alive)
    return answered | {number for number, answer in asked.items() if answer.result()}


def ask(port: int, number: int) -> bool:
    """Return whether the request was answered."""
    url = f"http://127.0.0.1:{port}/start?number={number}&token=x"
    with suppress(OSError), urlopen(url, timeout=30) as answer:
        return bool(answer.status == 200)
    return False


def wait_for(site: peers.Site, numbers: list[int], alive: Alive) -> None:
    """Wait until the jobs of these requests are done, but not for ever."""
    with suppress(TimeoutError):
        wait_until(lambda: alive() and not unfinished(site, numbers), "jobs wait", PATIENCE)


def settle(site: peers.Site, name: str, alive: Alive) -> None:
    """Wait until all jobs are done, or until nothing happens any more."""
    left, since, attended = unfinished(site), time.monotonic(), False
    while left and time.monotonic() < since + SETTLED:
        alive()
        time.sleep(0.1)
        if len(now := unfinished(site)) < len(left):
            left, since, attended = now, time.monotonic(), False
        elif time.monotonic() > since + UNATTENDED and not attended:
            attended = True
            REMEDIES.get(name, lambda prefix: None)(site.name)
    time.sleep(1)  # what is done twice may be late


def slots(site: peers.Site) -> list[peers.Slot]:
    with site.connection.transaction_manager:
        found = list(site.connection.root()["slots"])
        for slot in found:
            slot._p_activate()  # while the transaction lasts
        return found


def unfinished(site: peers.Site, numbers: list[int] | None = None) -> list[int]:
    """Return those whose request has committed and whose job has not."""
    found = slots(site)
    mine = range(len(found)) if numbers is None else numbers
    return [number for number in mine if found[number].requested and not found[number].times]


def audit(site: peers.Site, acknowledged: set[int]) -> str:
    found = slots(site)
    lost = unfinished(site)
    counts = {
        "requests": sum(bool(slot.requested) for slot in found),
        "jobs lost": len(lost),
        "of requests that were answered": len(acknowledged.intersection(lost)),
        "done twice": sum(slot.times > 1 for slot in found),
        "without request": sum(slot.times > 0 and not slot.requested for slot in found),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items())


# -- what an operator does about jobs whose worker is gone ---------------------------------


def requeue_rq(prefix: str) -> None:
    """Let RQ see now what it would see after the longest time of a job."""
    from rq.registry import StartedJobRegistry

    StartedJobRegistry(queue=peers.rq_queue(prefix)).cleanup(time.time() + 3600)


def retry_procrastinate(prefix: str) -> None:
    """Retry the jobs whose worker gives no sign of life, as its manual shows."""
    app = peers.procrastinate_task("PsycopgConnector", prefix)[0]

    async def retry() -> None:
        async with app.open_async():
            manager = app.job_manager
            for job in await manager.get_stalled_jobs(seconds_since_heartbeat=UNATTENDED / 2):
                await manager.retry_job(job)

    asyncio.run(retry())


REMEDIES: dict[str, Callable[[str], None]] = {
    "rq": requeue_rq,
    "procrastinate": retry_procrastinate,
}


# -- processes -----------------------------------------------------------------------------


class Program:
    """A program that is started again when it ends; it leads a group of processes."""

    def __init__(self, site: peers.Site, arguments: tuple[str, ...]) -> None:
        self.log = Path(site.directory, "log")
        self.arguments = arguments
        self.groups: list[int] = []
        self.start()

    def start(self) -> None:
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], stdout=file, stderr=file, start_new_session=True
            )
        self.groups.append(self.process.pid)

    def revive(self) -> None:
        if self.process.poll() is not None:
            self.start()

    def kill(self) -> None:
        self.process.kill()

    def kill_one(self) -> None:
        """Kill the program's first process or one of those that it has started."""
        group = str(self.process.pid)
        found = subprocess.run(["pgrep", "-g", group], capture_output=True, text=True)
        with suppress(ProcessLookupError):
            os.kill(int(random.choice(found.stdout.split())), signal.SIGKILL)

    def end(self) -> None:
        """End it, and what outlived its first processes."""
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(site: peers.Site, *arguments: str) -> Iterator[Program]:
    program = Program(site, arguments)
    try:
        yield program
    finally:
        program.end()


def revived(port: int, *programs: Program) -> bool:
    """Start again what has ended; say whether requests would be answered."""
    for program in programs:
        program.revive()
    return peers.listens(port)


def serve(name: str, port: str) -> None:
    # The site of the process that has started this one.
    site: Any = peers.Site(os.environ[peers.PLACE], os.environ[peers.NAME], None)
    with peers.serving(site, name, {}) as app:
        waitress.serve(app, host="127.0.0.1", port=int(port), threads=peers.REQUESTS, _quiet=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
