"""What the measured jobs do."""

from __future__ import annotations

import threading

GATE = threading.Event()


def nothing() -> None:
    """Do nothing: what is measured is all around it."""


def small(text: str, number: int) -> str:
    """Return about 200 bytes."""
    return (text * number)[:200]


def wait_at_gate() -> None:
    """Occupy a worker until the gate opens."""
    GATE.wait()
