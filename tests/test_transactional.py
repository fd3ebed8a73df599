"""`transactional`: one transaction for a call and what it calls, retried where that may help."""

from __future__ import annotations

import inspect
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import transaction
from bare import Clock, in_thread
from persistent.mapping import PersistentMapping
from transaction.interfaces import NoTransaction, TransientError
from webapp import SqlSession
from ZODB import DB
from ZODB.DemoStorage import DemoStorage
from ZODB.POSException import ConflictError, ReadConflictError

import pyramid_async.transactional
from pyramid_async.transactional import (
    PATIENCE,
    OwnManager,
    TransactionManager,
    backoff,
    is_managed,
    mark,
    transact,
    transactional,
)


class Closing(DemoStorage):
    closed = False

    def close(self):
        super().close()
        self.closed = True


LOGGER = "pyramid_async.transactional"

at_once = TransactionManager(retry_initial_delay=0)


@pytest.fixture(autouse=True)
def clean_thread():
    transaction.abort()
    yield
    transaction.abort()


@pytest.fixture
def ended():
    """What ended, in its order: names given to `watch` with "commit" or "abort"."""
    return []


@pytest.fixture
def watch(ended):
    def watch(name, tm=transaction.manager):
        txn = tm.get()
        txn.addAfterCommitHook(lambda done: ended.append((name, "commit" if done else "failed")))
        txn.addAfterAbortHook(lambda: ended.append((name, "abort")))

    return watch


@pytest.fixture
def slept(monkeypatch):
    """The pauses made, none of which takes any time."""
    pauses = []
    monkeypatch.setattr(pyramid_async.transactional, "sleep", pauses.append)
    return pauses


def explicit():
    return transaction.TransactionManager(explicit=True)


class Fails:
    """Raises the exceptions one after the other, then returns the number of its calls."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


# -- one transaction -------------------------------------------------------------------


def test_call_is_committed_and_its_value_returned(watch, ended):
    @transactional
    def f(a=1, b=2):
        watch("f")
        return a + b

    assert f() == 3
    assert ended == [("f", "commit")]
    assert f(b=5) == 6


def test_nested_call_joins_and_is_committed_with_the_outer_one(watch, ended):
    @transactional
    def g():
        watch("g")

    @transactional
    def f():
        watch("f")
        g()
        assert ended == []

    f()
    assert ended == [("f", "commit"), ("g", "commit")]


def test_the_same_function_alone_has_a_transaction_of_its_own(watch, ended):
    @transactional
    def g():
        watch("g")

    g()
    g()
    assert ended == [("g", "commit"), ("g", "commit")]


def test_nested_call_of_another_instance_joins_too(watch, ended):
    @at_once
    def g():
        watch("g")
        assert ended == []

    @transactional
    def f():
        g()
        assert ended == []

    f()
    assert ended == [("g", "commit")]


def test_exception_aborts_and_is_propagated(watch, ended):
    @transactional
    def f():
        watch("f")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        f()
    assert ended == [("f", "abort")]


def test_exception_of_a_nested_call_aborts_everything(watch, ended):
    @transactional
    def g():
        raise ValueError

    @transactional
    def f():
        watch("f")
        g()

    with pytest.raises(ValueError):
        f()
    assert ended == [("f", "abort")]


def test_interrupt_aborts_and_is_not_retried(watch, ended, slept):
    calls = []

    @transactional
    def f():
        calls.append(1)
        watch("f")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        f()
    assert ended == [("f", "abort")]
    assert len(calls) == 1


def test_pending_transaction_is_aborted_before_the_call(watch, ended):
    watch("pending")

    @transactional
    def f():
        assert ended == [("pending", "abort")]

    f()
    assert ended == [("pending", "abort")]


def test_transaction_of_somebody_else_is_not_recognised(watch, ended):
    transaction.begin()
    watch("theirs")

    transactional(watch)("ours")

    assert ended == [("theirs", "abort"), ("ours", "commit")]


def test_doomed_transaction_is_aborted(watch, ended):
    @transactional
    def f():
        watch("f")
        transaction.doom()

    with pytest.raises(transaction.interfaces.DoomedTransaction):
        f()
    assert ended == [("f", "abort")]


def test_effects_are_in_the_database_after_the_call_and_not_after_an_exception(db):
    @transactional
    def put(key, error=None):
        db.open().root()[key] = 1
        transaction.get().addAfterAbortHook(lambda: None)
        if error:
            raise error

    put("kept")
    with pytest.raises(ValueError):
        put("lost", ValueError())

    with db.transaction() as connection:
        assert list(connection.root()) == ["kept"]


# -- the decorator ---------------------------------------------------------------------


class Folder:
    @transactional
    def rename(self, name: str, *, force: bool = False) -> str:
        """Rename."""
        return f"{type(self).__name__} {name} {force}"


def test_methods_can_be_decorated():
    assert Folder().rename("a", force=True) == "Folder a True"


def test_decorated_function_keeps_name_text_and_signature():
    assert Folder.rename.__name__ == "rename"
    assert Folder.rename.__doc__ == "Rename."
    assert list(inspect.signature(Folder.rename).parameters) == ["self", "name", "force"]


def test_keyword_arguments_named_like_the_decorators_own_pass_through():
    assert transactional(lambda **kw: kw)(f=1, self=2, args=3, kw=4) == dict(
        f=1, self=2, args=3, kw=4
    )


async def coroutine():
    """Return before the body runs."""


def generator():
    yield


async def asynchronous_generator():
    yield


@pytest.mark.parametrize("f", [coroutine, generator, asynchronous_generator])
def test_function_whose_call_returns_before_its_body_runs_is_refused(f):
    with pytest.raises(TypeError, match=f"{f.__name__}.* cannot be transactional"):
        transactional(f)


# -- metadata --------------------------------------------------------------------------


def test_description_is_the_functions_name():
    @transactional
    def f():
        return transaction.get().description, transaction.get().user

    assert f() == ("f", "")


def test_a_callable_without_a_name_is_described_all_the_same():
    assert transactional(Fails())() == 1


class Annotated(TransactionManager):
    def get_user_info(self):
        return "ann", "/people"

    def get_description(self, f, args, kw):
        return f"{f.__name__}{args}{kw}"


def test_user_and_description_can_be_overridden_and_are_stored(file_db):
    @Annotated()
    def put(number, key="k"):
        file_db.open().root()[key] = number

    put(7, key="seven")

    newest = file_db.undoLog(0, 1)[0]
    assert newest["user_name"] == "/people ann"
    assert newest["description"] == "put(7,){'key': 'seven'}"


def test_failing_description_aborts(watch, ended):
    class Nosy(TransactionManager):
        def get_description(self, f, args, kw):
            watch("f")
            raise ValueError

    with pytest.raises(ValueError):
        Nosy()(Fails())()
    assert ended == [("f", "abort")]


# -- retries ---------------------------------------------------------------------------


class ConflictRaiser:
    raised = False

    @at_once
    def __call__(self, watch):
        watch("conflict raiser")
        if not self.raised:
            self.raised = True
            raise ConflictError()
        return "done"


def test_conflict_is_retried_in_a_new_transaction_and_logged(watch, ended, caplog):
    assert ConflictRaiser()(watch) == "done"

    assert ended == [("conflict raiser", "abort"), ("conflict raiser", "commit")]
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.ERROR)
    assert record.getMessage() == "retrying __call__"
    assert record.exc_info[0] is ConflictError


@pytest.mark.parametrize("error", [TransientError, ConflictError, ReadConflictError])
def test_every_transient_error_is_retried(error):
    assert at_once(Fails(error()))() == 2


def test_other_errors_are_not_retried():
    f = Fails(ValueError())
    with pytest.raises(ValueError):
        at_once(f)()
    assert f.calls == 1


@pytest.mark.parametrize("number", [0, 1, 5])
def test_number_of_retries_can_be_set(number, slept):
    f = Fails(*[ConflictError() for _ in range(number + 1)])
    with pytest.raises(ConflictError):
        TransactionManager(retry_number=number)(f)()
    assert f.calls == 1 + number == 1 + len(slept)


def test_three_retries_by_default(slept):
    assert transactional(Fails(*[ConflictError() for _ in range(3)]))() == 4
    assert len(slept) == 3


def test_last_conflict_is_propagated_and_aborts(watch, ended, slept, caplog):
    @TransactionManager(retry_number=1)
    def f():
        watch("f")
        raise ConflictError

    with pytest.raises(ConflictError):
        f()
    assert ended == [("f", "abort"), ("f", "abort")]
    assert len(caplog.records) == 1


def bounds_of_delays(manager, monkeypatch, slept):
    """Return the upper bounds of the delays of a function that never succeeds."""
    bounds = []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append((low, high)) or high)
    with pytest.raises(ConflictError):
        manager(Fails(*[ConflictError() for _ in range(9)]))()
    assert slept == [high for _, high in bounds]
    return bounds


def test_delays_are_chosen_between_zero_and_a_doubling_bound(monkeypatch, slept):
    bounds = bounds_of_delays(transactional, monkeypatch, slept)
    assert bounds == [(0, 1), (0, 2), (0, 4)]


def test_delays_can_be_set(monkeypatch, slept):
    manager = TransactionManager(retry_initial_delay=0.5, retry_delay_factor=3)
    assert bounds_of_delays(manager, monkeypatch, slept) == [(0, 0.5), (0, 1.5), (0, 4.5)]


def test_subclass_sets_defaults(monkeypatch, slept):
    class Patient(TransactionManager):
        retry_number = 2
        retry_initial_delay = 10
        retry_delay_factor = 1

    assert bounds_of_delays(Patient(), monkeypatch, slept) == [(0, 10), (0, 10)]


def test_no_transaction_is_open_while_waiting(monkeypatch):
    tm = explicit()
    seen = []

    def sleep(delay):
        with pytest.raises(NoTransaction):
            tm.get()
        seen.append(delay)

    monkeypatch.setattr(pyramid_async.transactional, "sleep", sleep)
    assert TransactionManager(manager=tm)(Fails(ConflictError()))() == 2
    assert len(seen) == 1


class Resource:
    """Data manager that raises in one of its phases, as often as it is told."""

    transaction_manager = None

    def __init__(self, *errors):
        self.errors = list(errors)

    def tpc_vote(self, txn):
        if self.errors:
            raise self.errors.pop(0)

    def should_retry(self, error):
        return "deadlock" in str(error)

    def sortKey(self):
        return "resource"

    def nothing(self, txn):
        """Do nothing."""

    abort = commit = tpc_begin = tpc_finish = tpc_abort = nothing


def test_conflict_at_commit_is_retried():
    resource = Resource(ConflictError())
    f = Fails()
    assert at_once(lambda: transaction.get().join(resource) or f())() == 2


def test_data_managers_are_asked_whether_an_error_is_transient():
    resource = Resource(RuntimeError("deadlock detected"))
    f = Fails()
    assert at_once(lambda: transaction.get().join(resource) or f())() == 2


def test_data_managers_are_not_asked_about_an_interrupt():
    calls = []

    @at_once
    def f():
        calls.append(1)
        transaction.get().join(Resource())
        raise KeyboardInterrupt("deadlock")

    with pytest.raises(KeyboardInterrupt):
        f()
    assert len(calls) == 1


class Synchronizer:
    """Synchronizer that loses its server once when a transaction begins."""

    def __init__(self, error):
        self.errors = [error]

    def newTransaction(self, txn):
        if self.errors:
            raise self.errors.pop()

    def beforeCompletion(self, txn):
        """Do nothing."""

    afterCompletion = beforeCompletion


def test_transient_error_at_the_beginning_is_retried(caplog):
    tm = transaction.TransactionManager()
    synchronizer = Synchronizer(TransientError())
    tm.registerSynch(synchronizer)

    assert TransactionManager(retry_initial_delay=0, manager=tm)(Fails())() == 1
    assert caplog.records[-1].getMessage().startswith("retrying <")


def test_call_that_conflicts_with_another_commit_sees_it_when_retried(db):
    with db.transaction() as connection:
        connection.root()["counter"] = PersistentMapping(n=0)
    connection = db.open()
    seen = []

    @at_once
    def increment():
        counter = connection.root()["counter"]
        seen.append(counter["n"])
        counter["n"] += 1
        if len(seen) == 1:
            with db.transaction() as other:
                other.root()["counter"]["n"] += 10

    increment()
    assert seen == [0, 10]
    with db.transaction() as other:
        assert other.root()["counter"]["n"] == 11


def test_conflicting_threads_lose_no_update(db):
    threads, turns = 4, 5
    with db.transaction() as connection:
        connection.root()["counter"] = PersistentMapping(n=0)
    start = threading.Barrier(threads)

    @TransactionManager(retry_number=200, retry_initial_delay=0.001, retry_delay_factor=1)
    def increment():
        db.open().root()["counter"]["n"] += 1

    def work():
        start.wait(10)
        for _ in range(turns):
            increment()

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()

    with db.transaction() as connection:
        assert connection.root()["counter"]["n"] == threads * turns


# -- debug -----------------------------------------------------------------------------


def test_debug_sees_the_modifications_before_they_are_undone(db, ended, watch):
    connection = db.open()
    seen = []

    def debug():
        seen.append((dict(connection.root()), list(ended)))

    @TransactionManager(debug=debug)
    def f():
        watch("f")
        connection.root()["x"] = 1
        raise ValueError

    with pytest.raises(ValueError):
        f()
    assert seen == [({"x": 1}, [])]
    assert ended == [("f", "abort")]
    assert "x" not in connection.root()


def test_debug_is_not_called_for_success_or_before_a_retry():
    calls = []
    manager = TransactionManager(retry_initial_delay=0, debug=lambda: calls.append(1))
    assert manager(Fails(ConflictError()))() == 2
    assert calls == []


def test_debug_is_called_for_the_last_conflict():
    calls = []
    manager = TransactionManager(retry_number=0, debug=lambda: calls.append(1))
    with pytest.raises(ConflictError):
        manager(Fails(ConflictError()))()
    assert calls == [1]


def test_transaction_is_aborted_when_debug_fails(watch, ended):
    def debug():
        raise RuntimeError("left the debugger")

    @TransactionManager(debug=debug)
    def f():
        watch("f")
        raise ValueError

    with pytest.raises(RuntimeError) as caught:
        f()
    assert isinstance(caught.value.__context__, ValueError)
    assert ended == [("f", "abort")]


# -- functions that end their transaction ----------------------------------------------


@transactional
def nested(watch):
    watch("nested")


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_function_may_end_its_transaction_and_the_rest_is_committed(end, watch, ended):
    @transactional
    def f():
        watch("first")
        getattr(transaction, end)()
        watch("second")

    f()
    assert ended == [("first", end), ("second", "commit")]


def test_nested_call_does_not_join_after_the_function_committed(watch, ended):
    @transactional
    def f():
        transaction.commit()
        watch("second")
        nested(watch)

    f()
    assert ended == [("second", "abort"), ("nested", "commit")]


@pytest.mark.parametrize("begin", [TransactionManager.begin, transactional.begin])
def test_nested_call_joins_again_after_begin(begin, watch, ended):
    @transactional
    def f():
        transaction.commit()
        begin()
        watch("second")
        nested(watch)
        assert ended == []

    f()
    assert ended == [("second", "commit"), ("nested", "commit")]


def test_script_may_begin_and_commit_around_several_calls(watch, ended):
    assert TransactionManager.begin() is transaction.get()
    nested(watch)
    nested(watch)
    assert ended == []
    transaction.commit()
    assert ended == [("nested", "commit")] * 2


def test_begin_aborts_a_pending_transaction(watch, ended):
    watch("pending")
    TransactionManager.begin()
    assert ended == [("pending", "abort")]


def test_begin_of_a_subclass_uses_its_manager():
    tm = explicit()

    class Ours(TransactionManager):
        manager = tm

    assert Ours.begin() is tm.get()
    assert is_managed(tm.get())


# -- explicit managers -----------------------------------------------------------------


def test_explicit_manager_is_used_where_given(watch, ended):
    tm = explicit()

    @TransactionManager(manager=tm)
    def f():
        watch("f", tm)

    f()
    assert ended == [("f", "commit")]
    with pytest.raises(NoTransaction):
        tm.get()


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_function_may_end_the_transaction_of_an_explicit_manager(end, watch, ended):
    tm = explicit()

    @TransactionManager(manager=tm)
    def f(error=None):
        watch("f", tm)
        getattr(tm, end)()
        if error:
            raise error

    f()
    with pytest.raises(ValueError):
        f(ValueError())
    assert ended == [("f", end)] * 2


def test_conflict_after_the_function_ended_an_explicit_transaction_is_retried():
    tm = explicit()
    fails = Fails(ConflictError())

    @TransactionManager(retry_initial_delay=0, manager=tm)
    def f():
        tm.commit()
        return fails()

    assert f() == 2


def test_pending_transaction_of_an_explicit_manager_is_aborted(watch, ended):
    tm = explicit()
    tm.begin()
    watch("pending", tm)

    TransactionManager(manager=tm)(watch)("f", tm)

    assert ended == [("pending", "abort"), ("f", "commit")]


def test_nested_call_on_the_same_explicit_manager_joins(watch, ended):
    tm = explicit()
    ours = TransactionManager(manager=tm)

    @ours
    def f():
        watch("f", tm)
        ours(watch)("g", tm)
        assert ended == []

    f()
    assert ended == [("f", "commit"), ("g", "commit")]


def test_calls_on_different_managers_have_transactions_of_their_own(watch, ended):
    tm = explicit()

    @TransactionManager(manager=tm)
    def f():
        watch("f", tm)
        nested(watch)
        assert ended == [("nested", "commit")]

    f()
    assert ended == [("nested", "commit"), ("f", "commit")]


@pytest.fixture
def explicit_thread(monkeypatch):
    """Make the thread's own manager explicit, as some applications do."""
    monkeypatch.setattr(transaction.manager, "explicit", True)


def test_threads_own_manager_may_be_explicit(explicit_thread, watch, ended):
    @transactional
    def f():
        nested(watch)
        transaction.commit()

    f()
    assert ended == [("nested", "commit")]
    transaction.begin()


# -- marked transactions ---------------------------------------------------------------


def test_marked_transaction_of_the_thread_is_joined(watch, ended):
    assert mark(transaction.begin()) is transaction.get()
    nested(watch)
    assert ended == []
    transaction.commit()
    assert ended == [("nested", "commit")]


def test_marked_transaction_of_any_manager_is_joined(explicit_thread):
    tm = explicit()
    mark(tm.begin())

    @transactional
    def f():
        with pytest.raises(NoTransaction):
            transaction.get()

    f()
    tm.abort()


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_marked_transaction_is_not_joined_after_its_end(end, watch, ended):
    tm = explicit()
    txn = mark(tm.begin())
    assert is_managed(txn)
    getattr(tm, end)()
    assert not is_managed(txn)

    nested(watch)

    assert ended == [("nested", "commit")]


def test_marked_transaction_is_not_joined_by_a_manager_of_its_own(watch, ended):
    tm, other = explicit(), explicit()
    mark(tm.begin())

    TransactionManager(manager=other)(watch)("other", other)
    assert ended == [("other", "commit")]

    TransactionManager(manager=tm)(watch)("joined", tm)
    assert ended == [("other", "commit")]
    tm.abort()


def test_marked_transaction_of_another_thread_is_not_joined(watch, ended):
    tm = explicit()
    txn = mark(tm.begin())
    in_thread(nested, watch)
    assert ended == [("nested", "commit")]
    assert is_managed(txn)
    tm.abort()


class Unstorable(PersistentMapping):
    def __getstate__(self):
        raise ValueError("no state")


def test_nested_call_in_a_transaction_that_failed_cannot_save_a_part_of_it(db):
    """The function swallows a failed savepoint; what it calls must not commit alone."""

    @transactional
    def put(key):
        connection.root()[key] = 1

    @transactional
    def f():
        connection.root()["bad"] = Unstorable()
        with pytest.raises(ValueError):
            transaction.savepoint()
        with pytest.raises(transaction.interfaces.TransactionFailedError):
            put("part")

    connection = db.open()
    with pytest.raises(transaction.interfaces.TransactionFailedError):
        f()
    with db.transaction() as other:
        assert list(other.root()) == []


# -- transactions of our own -------------------------------------------------------------


class Tableless:
    """A store that counts the transactions which have ended."""

    released = 0

    def table(self, tm):
        return tm

    def release(self, tm):
        self.released += 1


@pytest.fixture
def conflicting(monkeypatch, slept):
    """Transact until it succeeds: number of conflicts, seconds each -> number of calls."""
    clock = Clock()
    monkeypatch.setattr(pyramid_async.transactional, "monotonic", clock)

    def conflicting(conflicts, seconds):
        fails = Fails(*[ConflictError() for _ in range(conflicts)])
        store = Tableless()

        def work(table):
            clock.now += seconds
            return fails()

        try:
            return transact(store, work)
        finally:
            assert store.released == fails.calls == 1 + len(slept)

    return conflicting


@pytest.mark.parametrize("seconds", [0, PATIENCE / 4])
def test_conflicts_of_our_own_transactions_are_tried_again_five_times_in_all(
    seconds, conflicting, slept
):
    assert conflicting(4, seconds) == 5
    slept.clear()
    with pytest.raises(ConflictError):
        conflicting(5, 0)
    assert len(slept) == 4


@pytest.mark.parametrize(
    ("seconds", "pauses"), [(PATIENCE + 0.1, 0), (60, 0), (PATIENCE / 2 + 0.1, 1)]
)
def test_transaction_of_our_own_that_waited_for_a_server_is_not_repeated(
    seconds, pauses, conflicting, slept
):
    with pytest.raises(ConflictError):
        conflicting(1 + pauses, seconds)
    assert len(slept) == pauses


# -- backoff ---------------------------------------------------------------------------


def test_backoff_yields_as_many_delays_as_asked_for():
    assert len(list(backoff(7, 1))) == 7
    assert list(backoff(0, 1)) == []


def test_backoff_grows(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: (low, high))
    assert list(backoff(4, 1, 3)) == [(0, 1), (0, 3), (0, 9), (0, 27)]


def test_backoff_is_spread_over_the_whole_range():
    firsts = [next(backoff(1, 1)) for _ in range(500)]
    assert min(firsts) < 0.1
    assert max(firsts) > 0.9
    assert max(firsts) <= 1


@pytest.mark.parametrize("through", [0, 1])
def test_sql_is_sent_before_the_commit_locks_the_database(db, through):
    """Also what a session writes through another one, as an audit does."""
    locked, lock = [], db.storage._commit_lock
    note = SqlSession(lambda: locked.append(lock.locked()))

    @transactional
    def write():
        db.open().root()["n"] = 1
        audit = SqlSession(lambda: transaction.get().join(note) if not locked else None)
        transaction.get().join((note, audit)[through])

    write()
    assert locked[0] is False


def test_a_database_closes_while_a_manager_of_ours_has_no_transaction():
    storage = Closing()
    db = DB(storage)
    db.open(OwnManager())

    db.close()

    assert storage.closed
