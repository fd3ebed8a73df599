"""Run the measurements: ``python -m benchmarks [--quick] [--only NAME ...]``."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
from importlib import import_module
from importlib.metadata import version

MEASUREMENTS = (
    "throughput",
    "memory",
    "polls",
    "conflicts",
    "bytes",
    "recovery",
    "operating",
    "peers",
    "crashes",
    "rates",
)
PACKAGES = ("transaction", "ZODB", "pyramid", "waitress")


def main() -> None:
    args = parse()
    # The predecessor logs a traceback for each conflict; that would be measured too.
    logging.getLogger("dm").addHandler(logging.NullHandler())
    logging.getLogger("dm").propagate = False
    print(surroundings())
    for name in args.only or MEASUREMENTS:
        begun = time.perf_counter()
        print(f"\n{name}\n{'=' * len(name)}", flush=True)
        import_module(f"benchmarks.{name}").main(args.quick)
        print(f"[{time.perf_counter() - begun:.0f} s]", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it run?")
    return parser.parse_args()


def surroundings() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"Python {platform.python_version()}, {packages}\n"
        f"{os.cpu_count()} cores; one fsync in {tempfile.gettempdir()}: {fsync_time() * 1e6:.0f} µs"
    )


def fsync_time(count: int = 200) -> float:
    """Return the seconds that an fsync of 500 new bytes takes."""
    with tempfile.TemporaryFile() as file:
        begun = time.perf_counter()
        for _ in range(count):
            file.write(bytes(500))
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - begun) / count


if __name__ == "__main__":
    main()
