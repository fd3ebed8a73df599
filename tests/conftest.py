"""Fixtures for all tests: closed databases, waits with a deadline, no thread left."""

from __future__ import annotations

import gc
import threading
import time
from uuid import uuid4

import pytest
import transaction
import ZODB
from bare import CALLS, process
from webapp import gate
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

THREAD_PREFIX = "pyramid_async-"
THREAD_GRACE = 10.0  # seconds that a test's threads get to end after it, on a busy machine
SLOW_TIMEOUT = 300  # seconds for a test that starts servers; each of its waits has its own limit


def pytest_collection_modifyitems(items):
    """Give tests that start servers more time than the others, unless they say how much."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"services", "slow"} and "timeout" not in marks:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


def pytest_collection_finish():
    """Spare the garbage collector what lives as long as the tests: modules and the tests."""
    gc.collect()
    gc.freeze()


def ours_alive() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith(THREAD_PREFIX)}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """Fail a test that leaves threads of the package running."""
    before = ours_alive()
    yield
    deadline = time.monotonic() + THREAD_GRACE
    for thread in ours_alive() - before:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = sorted(thread.name for thread in ours_alive() - before)
    if left:
        pytest.fail(f"threads left running: {', '.join(left)}", pytrace=False)


@pytest.fixture
def db():
    """A database in memory."""
    yield from closed_afterwards(ZODB.DB(MappingStorage()))


@pytest.fixture
def file_db(tmp_path):
    """A database in a file."""
    yield from closed_afterwards(ZODB.DB(FileStorage(str(tmp_path / "data.fs"))))
    # Files left open are reported here, by the test that left them, and not by a later one.
    gc.collect()


def closed_afterwards(database):
    yield database
    # A test that failed half-way may have left connections in the thread's transaction.
    transaction.abort()
    database.close()


@pytest.fixture
def uncollected():
    """The garbage collector rests: what is in a cycle stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["ram", "zodb"])
def one(request, db):
    """One process; the test runs its jobs by hand."""
    with process(request.param, db) as made:
        yield made


@pytest.fixture
def durable(db):
    """The same, with the ZODB alone."""
    with process("zodb", db) as made:
        yield made


@pytest.fixture
def at():
    """The name of a gate, which opens at the end of the test."""
    with gate() as name:
        yield name


@pytest.fixture
def at_gate(at):
    """The same, where that says more."""
    return at


@pytest.fixture
def key():
    """What a test's jobs note under, in CALLS."""
    name = uuid4().hex
    yield name
    CALLS.pop(name, None)


@pytest.fixture
def wait_for():
    """A function that waits for an event or a predicate and fails at a deadline."""
    return wait


def wait(what, timeout=30.0):
    """Return what the predicate returned, or True for an event."""
    if hasattr(what, "wait"):
        if what.wait(timeout):
            return True
    else:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if value := what():
                return value
            time.sleep(0.005)
    pytest.fail(f"waited {timeout} s in vain for {what!r}")
