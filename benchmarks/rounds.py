"""Measure contestants in turn, wait for what they do, and print their ratios."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Ratio(NamedTuple):
    """One contestant over another, and the least that is aimed at, if anything is."""

    over: str
    under: str
    aim: float | None = None


def interleaved(contestants: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call each contestant once in every round; return what they measured.

    A machine that others use is slower at one time than at another: contestants of one round
    have about the same conditions, so ratios are taken within rounds.
    """
    measured: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(rounds):
        # Every other round backwards: nobody always comes after the same one.
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            gc.collect()
            measured[name].append(contestants[name]())
    return measured


def wait_until(
    condition: Callable[[], bool], what: str, patience: float = 30.0, look: float = 0.01
) -> None:
    """Return once the condition is true; raise TimeoutError, which tells *what* is missing."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {patience:g} s")
        time.sleep(look)


def print_ratio(measured: dict[str, list[float]], ratio: Ratio) -> None:
    """Print the median of a ratio's values in the rounds, if both were measured."""
    if ratio.over not in measured or ratio.under not in measured:
        return
    pairs = zip(measured[ratio.over], measured[ratio.under], strict=True)
    values = [over / under for over, under in pairs]
    aim = "" if ratio.aim is None else f"   aim: at least {ratio.aim:g}"
    spread = f"({min(values):.2f} to {max(values):.2f})"
    print(f"  {ratio.over} / {ratio.under} = {median(values):.2f} {spread}{aim}")
