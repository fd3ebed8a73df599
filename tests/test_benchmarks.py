"""The benchmarks run: small numbers, and no opinion about their figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("throughput", ["b / a =", "d / c ="]),
        ("memory", ["RAM store", "ZODB store"]),
        ("polls", ["finished / bare =", "running / bare ="]),
    ],
)
def test_one_command_prints_the_figures(name, rows):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert [row for row in rows if row not in run.stdout] == []
