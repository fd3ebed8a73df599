"""Run the crash test and print one summary; exit status 1 when anything was violated."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time

import transaction

from .audit import Books, Testimony, audit, reasons
from .executors import BROKERS, EXECUTORS
from .faults import CONTROLS
from .storages import STORAGES
from .supervisor import Stuck, Supervisor


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--storage", choices=STORAGES, default="filestorage")
    parser.add_argument("--executor", choices=EXECUTORS, default="threads")
    parser.add_argument("--broker", choices=BROKERS, default="amqp", help="for Celery")
    parser.add_argument("--jobs", type=int, default=500, help="acknowledged jobs")
    parser.add_argument("--kills", type=int, default=20, help="kills, spread over the run")
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of a run")
    parser.add_argument("--patience", type=float, default=90, help="seconds without progress")
    parser.add_argument("--control", choices=CONTROLS, help="break the library; must fail")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the run")
    given = parser.parse_args()
    if given.executor == "celery" and given.storage == "filestorage":
        parser.error("Celery needs a storage that several processes share, not filestorage")
    if given.seed is None:
        given.seed = random.randrange(1_000_000)
    return given


def main(given):
    """Return the exit status."""
    directory = tempfile.mkdtemp(prefix="crash-")
    begun = time.monotonic()
    storage = STORAGES[given.storage](directory, given.control)
    executor = EXECUTORS[given.executor](storage, given.broker, given.control, given.seed)
    supervisor = Supervisor(storage, executor, given.jobs, given.kills, given.seed, given.patience)
    try:
        storage.start()
        executor.start()
        broken = run(supervisor)
        testimony, findings, why = inspect(storage)
    finally:
        executor.stop()
        storage.stop()
    findings.check("what kept the run from its end", broken)
    report(given, supervisor, testimony, findings, why, time.monotonic() - begun)
    # A control is meant to be broken.
    if given.keep or (findings.violations and not given.control):
        print(f"logs are in {directory}")
    else:
        shutil.rmtree(directory)
    return 1 if findings.violations else 0


def run(supervisor):
    """Run the test; return what kept it from its end, if anything did."""
    try:
        supervisor.run()
    except Stuck as error:
        return [str(error)]
    return []


def inspect(storage):
    """Open the storage alone and return what the logs and the database say."""
    db = storage.open()
    try:
        testimony = Testimony(storage.directory)
        with db.transaction() as connection:
            books = Books(connection)
            return testimony, audit(testimony, books), reasons(books)
    finally:
        transaction.abort()
        db.close()


def report(given, supervisor, testimony, findings, why, seconds):
    """Print the summary."""
    executor = f"celery on {given.broker}" if given.executor == "celery" else given.executor
    print(
        f"storage {given.storage}, executor {executor}, seed {given.seed},"
        f" control {given.control or 'none'}"
    )
    for name, count in findings.counts.items():
        print(f"  {name:15} {count:7}")
    print(f"  {'seconds':15} {seconds:7.1f}")
    print("  kills           " + listed(supervisor.done))
    if supervisor.messages:
        print("  messages        " + listed(supervisor.messages))
    print("  request errors  " + listed(testimony.errors))
    if why:
        print("  failed because  " + listed(why))
    for sentence, wrong in findings.violations.items():
        print(f"VIOLATION {len(wrong)}: {sentence}: {', '.join(map(str, wrong[:5]))}")
    print("broken" if findings.violations else "nothing lost, nothing doubled")


def listed(counter):
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"


if __name__ == "__main__":
    sys.exit(main(arguments()))
