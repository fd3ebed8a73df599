"""The crash test, short runs; see `tests/crash`."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 540  # seconds for a run, on a busy machine

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(PATIENCE + 60)]


@pytest.fixture(autouse=True)
def long_by_nature():
    """Keep pytest from reporting where a test hangs that does not."""
    faulthandler.cancel_dump_traceback_later()


def crash(*arguments, jobs=500, kills=20):
    """Run the crash test; return its exit status and its summary."""
    size = ("--jobs", str(jobs), "--kills", str(kills))
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash", *size, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    print(done.stdout)
    return done.returncode, done.stdout


@pytest.mark.parametrize("storage", ["filestorage", "zeo", "relstorage", "relstorage-hf"])
def test_nothing_is_lost_or_doubled_by_twenty_kills(storage):
    status, summary = crash("--storage", storage)
    assert "nothing lost, nothing doubled" in summary
    assert status == 0


def test_taking_the_fence_out_lets_dismissed_jobs_take_effect():
    status, summary = crash("--control", "no-fence")
    assert "was dismissed and took effect" in summary
    assert status == 1


def test_committing_status_and_effects_apart_doubles_effects():
    status, summary = crash("--control", "two-commits", jobs=200, kills=8)
    assert "took effect more than once" in summary
    assert status == 1


def test_without_recovery_jobs_are_never_finished():
    status, summary = crash("--control", "no-recovery", "--patience", "10", jobs=60, kills=3)
    assert "is not finished" in summary
    assert status == 1


@pytest.mark.parametrize(("storage", "broker"), [("zeo", "amqp"), ("relstorage", "redis")])
def test_nothing_is_lost_or_doubled_over_celery(storage, broker):
    over_celery = ("--executor", "celery", "--broker", broker)
    status, summary = crash("--storage", storage, *over_celery, jobs=200, kills=8)
    assert "nothing lost, nothing doubled" in summary
    assert status == 0


def test_taking_the_fence_out_is_found_out_over_celery_too():
    over_celery = ("--executor", "celery", "--storage", "zeo")
    status, summary = crash("--control", "no-fence", *over_celery, jobs=300, kills=12)
    assert "took effect" in summary
    assert status == 1


def test_committing_status_and_effects_apart_is_found_out_over_celery_too():
    over_celery = ("--executor", "celery", "--storage", "zeo")
    status, summary = crash("--control", "two-commits", *over_celery, jobs=200, kills=8)
    assert "took effect" in summary
    assert status == 1
