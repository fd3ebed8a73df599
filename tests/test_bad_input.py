"""Bad input is a clear error for that request or job alone; nothing else is lost or stopped."""

from __future__ import annotations

import sys
import threading
import types
from uuid import uuid4

import pytest
from bare import CALLS, ROOT, Foreign, Newer, Process
from persistent import Persistent
from transaction.interfaces import TransientError
from webapp import browser, echo
from ZODB.Connection import Connection, resetCaches
from ZODB.POSException import StorageError

from pyramid_async import manage
from pyramid_async.context import ObjectGone, PersistentContext
from pyramid_async.interfaces import (
    BadRecord,
    InvalidTransition,
    JobDismissed,
    JobFailed,
    JobStopped,
    JobTaken,
    JobTimeout,
    NotSchedulable,
    OperationFailed,
)
from pyramid_async.jobs import FINAL, UNHELD, JobRecord
from pyramid_async.zodb import Large

MALFORMED = [
    "",
    " ",
    "0",
    "zz",
    "0" * 31,
    "0" * 10_000,
    "../../etc/passwd",
    "0123\n4567",
    "\x00",
    "ä" * 32,
    "\ud800",
    "%00",
    "0x" + "0" * 30,
    "-1" + "0" * 30,
    "１２" * 16,
]
NO_TEXT = [None, 0, 1.5, b"00" * 16, (), Ellipsis]


def note(key, *values):
    CALLS[key].append(values)
    return values


def give(value):
    return value


class Thing(Persistent):
    name = "thing"


def name_of(thing):
    return thing.name


def make_argument(root):
    root["thing"] = Thing()
    return root["thing"]


class Temporary:
    """A class that a later version of the application has not."""


class TemporaryError(Exception):
    pass


def raise_temporary():
    raise TemporaryError("of a class that goes")


class Changing(Exception):
    def __init__(self, one):
        super().__init__(one)


def raise_changing(text):
    raise Changing(text)


def still_works(one, key):
    """Tell whether a job runs from schedule to result."""
    sid = one.run(note, key, "neighbour")
    return one.result(sid) == (("neighbour",), None)


def lines_about(caplog, text):
    return [r for r in caplog.records if text in r.getMessage()]


# -- ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sid", MALFORMED, ids=repr)
def test_malformed_sid_is_an_unknown_one(one, sid):
    one.run(give, 1)

    def ask(scheduler):
        return (
            scheduler.completed(sid),
            scheduler.get_result(sid),
            scheduler.status(sid),
            scheduler.cancel(sid),
            scheduler.remove(sid),
        )

    assert one.ask(ask) == (None, None, None, False, None)


@pytest.mark.parametrize("sid", NO_TEXT, ids=repr)
def test_sid_that_is_no_text_is_an_unknown_one(one, sid):
    assert one.ask(lambda scheduler: scheduler.status(sid)) is None


@pytest.mark.parametrize("sid", MALFORMED, ids=repr)
def test_wake_up_with_a_malformed_sid_is_dropped(one, sid, key):
    before = one.db.lastTransaction()
    one.executor.wake(True, sid)
    one.worker.run(sid)
    one.worker.run(sid, 1)
    one.worker.run(sid, UNHELD)
    assert one.db.lastTransaction() == before
    assert still_works(one, key)


# -- arguments -----------------------------------------------------------------------------


class Explosive:
    def __reduce__(self):
        raise ZeroDivisionError("cannot be pickled")


@pytest.mark.parametrize(
    "value",
    [lambda: None, threading.Lock(), (n for n in range(2)), Explosive(), sys],
    ids=["lambda", "lock", "generator", "explosive", "module"],
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [{"a": (v,)}]], ids=["bare", "deep"])
def test_argument_that_cannot_be_kept_is_refused_at_schedule(durable, key, value, wrap):
    with pytest.raises(NotSchedulable, match="cannot be stored"):
        durable.schedule(note, key, wrap(value))
    assert durable.ask(lambda scheduler: scheduler.jobs()) == []
    assert still_works(durable, key)


def test_refused_argument_does_not_spoil_the_callers_transaction(durable, key):
    with durable.transaction() as (table, root):
        root["before"] = True
        bound = durable.scheduler.using(tm=table.tm)
        with pytest.raises(NotSchedulable):
            bound.schedule(note, key, threading.Lock())
        sid = bound.schedule(note, key)
    assert durable.root(lambda root: root["before"])
    durable.worker.run(sid)
    assert CALLS[key] == [()]


def test_object_outside_of_every_database_is_refused_or_stored(one):
    """The ZODB store keeps it with the record; RAM has no place for it but the database."""
    sid = one.run(name_of, Thing())
    assert one.result(sid) == ("thing", None)


def test_argument_that_is_gone_fails_its_job_alone(durable, key):
    with durable.transaction() as (_, root):
        make_argument(root)
    sid = durable_schedule_with_thing(durable)
    with durable.transaction() as (table, root):
        del root["thing"]
        record = table.get(sid)
        # As when another application removed the object in spite of the record's reference.
        record.arguments = record.arguments[0] if isinstance(record.arguments, tuple) else None
    durable.db.pack()
    durable.db.cacheMinimize()
    durable.worker.run(sid)
    status = durable.status(sid)
    assert (status.status, status.failure.class_name) == ("failed", "ObjectGone")
    assert "is gone" in status.failure.message
    _, error = durable.result(sid)
    assert type(error) is ObjectGone
    assert still_works(durable, key)


def durable_schedule_with_thing(one):
    with one.transaction() as (table, root):
        return one.scheduler.using(tm=table.tm).schedule(name_of, root["thing"])


def test_wrong_number_of_arguments_fails_the_job_alone(one, key):
    sid = one.run(give, 1, 2, 3)
    assert one.status(sid).failure.class_name == "TypeError"
    assert still_works(one, key)


# -- functions -----------------------------------------------------------------------------


@pytest.fixture
def module():
    """A module of the application whose functions the test moves and removes."""
    name = f"moving_{uuid4().hex}"
    module = sys.modules[name] = types.ModuleType(name)
    exec(
        "def work(): return 'worked'\nclass Home:\n    @staticmethod\n    def work(): return 1\n",
        module.__dict__,
    )
    yield module
    sys.modules.pop(name, None)


@pytest.mark.parametrize("gone", ["function", "module", "no function any more"])
def test_function_that_moved_fails_its_job_alone(durable, key, module, gone, caplog):
    sid = durable.schedule(module.work)
    if gone == "function":
        del module.work
    elif gone == "module":
        del sys.modules[module.__name__]
    else:
        module.work = "a text"
    durable.worker.run(sid)
    failure = durable.status(sid).failure
    expected = {"function": "AttributeError", "module": "ModuleNotFoundError"}
    assert failure.class_name == expected.get(gone, "TypeError")
    assert len(lines_about(caplog, repr(sid))) == 1
    assert isinstance(durable.result(sid)[1], AttributeError | ImportError | TypeError)
    assert still_works(durable, key)


def test_function_of_a_class_that_moved_fails_its_job_alone(durable, key, module):
    sid = durable.schedule(module.Home.work)
    del module.Home
    durable.worker.run(sid)
    assert durable.status(sid).failure.class_name == "AttributeError"
    assert still_works(durable, key)


def test_module_that_fails_at_import_fails_the_job_alone(
    durable, key, module, tmp_path, monkeypatch
):
    sid = durable.schedule(module.work)
    del sys.modules[module.__name__]
    (tmp_path / f"{module.__name__}.py").write_text("1/0\n")
    monkeypatch.syspath_prepend(tmp_path)
    durable.worker.run(sid)
    assert durable.status(sid).failure.class_name == "ZeroDivisionError"
    assert still_works(durable, key)


@pytest.mark.parametrize(
    "function", ["", ":", "os", "no such name", "os:path:join", None, 7, "a..b"]
)
def test_record_with_a_function_that_is_none_fails_alone(durable, key, function):
    sid = durable.schedule(give, 1)
    durable.record(sid, function=function)
    durable.worker.run(sid)
    assert durable.status(sid).status == "failed"
    assert still_works(durable, key)


# -- results -------------------------------------------------------------------------------


def give_temporary():
    return sys.modules[__name__].Temporary()


def read_all(scheduler, sid):
    scheduler.completed(sid)
    scheduler.status(sid)
    scheduler.jobs()


def test_result_whose_class_is_gone_is_an_error_for_whoever_asks_alone(durable, key, monkeypatch):
    sid = durable.run(give_temporary)
    other = durable.run(give, 1)
    monkeypatch.delattr(f"{__name__}.Temporary")
    durable.ask(lambda scheduler: read_all(scheduler, sid))
    with pytest.raises(AttributeError, match="Temporary"):
        durable.result(sid)
    durable.recovery.look()
    assert durable.status(sid).status == "successful"
    assert durable.result(other) == (1, None)
    durable.ask(lambda scheduler: scheduler.remove(sid))
    assert durable.status(sid) is None


def test_exception_whose_class_is_gone_can_still_be_told(durable, key, monkeypatch):
    sid = durable.run(raise_temporary)
    monkeypatch.delattr(f"{__name__}.TemporaryError")
    failure = durable.status(sid).failure
    assert (failure.class_name, failure.message) == ("TemporaryError", "of a class that goes")
    value, error = durable.result(sid)
    assert value is None
    assert type(error) is JobFailed
    assert str(error) == "TemporaryError: of a class that goes"


def test_exception_that_is_made_in_another_way_by_now_can_still_be_told(durable, monkeypatch):
    sid = durable.run(raise_changing, "what it was")

    def take_two(self, one, two):
        """As an upgrade of the application leaves it."""

    monkeypatch.setattr(Changing, "__init__", take_two)
    assert durable.result(sid)[1].args == ("Changing", "what it was")


def test_argument_whose_class_is_gone_fails_its_job_alone(durable, key, monkeypatch):
    sid = durable.schedule(give, Temporary())
    monkeypatch.delattr(f"{__name__}.Temporary")
    durable.worker.run(sid)
    assert durable.status(sid).failure.class_name == "AttributeError"
    assert still_works(durable, key)


class Leaving(Persistent):
    """A class that a later version of the application has not, or an older one had not."""


@pytest.mark.parametrize("wrap", [lambda obj: [obj], PersistentContext], ids=["list", "context"])
def test_persistent_argument_whose_class_is_gone_fails_its_job_alone(
    durable, key, monkeypatch, wrap
):
    """The ZODB puts an object without any behaviour in its place."""
    with durable.transaction() as (table, root):
        root["leaving"] = leaving = Leaving()
        root._p_jar.add(leaving)
        sid = durable.scheduler.using(tm=table.tm).schedule(keep_first, root, wrap(leaving))
    monkeypatch.delattr(f"{__name__}.Leaving")
    resetCaches()  # ghosts keep their class
    durable.db.cacheMinimize()
    durable.worker.run(sid)
    failure = durable.status(sid).failure
    assert failure.class_name == "ClassGone"
    assert failure.message.startswith(f"the class of {__name__}.Leaving 0x")
    assert durable.root(lambda root: "first" not in root)
    assert still_works(durable, key)


def keep_first(root, things):
    root["first"] = things[0]


def test_arguments_that_are_damaged_fail_their_job_alone(durable, key):
    for damaged in (b"", b"garbage", b"\x80\x04.", 7, (b"", 1)):
        sid = durable.schedule(give, 1)
        durable.record(sid, arguments=damaged)
        durable.worker.run(sid)
        assert durable.status(sid).status == "failed", damaged
    assert still_works(durable, key)


# -- records -------------------------------------------------------------------------------


class Vanishing(JobRecord):
    """A kind of record that a later version has not."""


@pytest.mark.parametrize("bad", ["foreign", "gone", "text", "status", "newer"])
def test_bad_record_is_an_error_for_its_own_id_alone(durable, key, bad, monkeypatch, caplog):
    good = durable.run(give, 1)
    sid = "ab" * 16
    with durable.transaction() as (table, _):
        if bad == "text":
            record = "a text"
        elif bad == "foreign":
            record = Foreign()
        else:
            record = Vanishing(sid, 1.0, f"{__name__}:give")
            if bad == "status":
                record.status = "confused"
            elif bad == "newer":
                record.failure = Newer()
        table.root.unfinished[table.root.shard(sid)][sid] = record
    if bad == "gone":
        monkeypatch.delattr(f"{__name__}.Vanishing")
    resetCaches()  # ghosts keep their class
    durable.db.cacheMinimize()
    for _ in range(3):
        durable.recovery.look()
    assert len(lines_about(caplog, f"{sid!r} cannot be read")) == 1
    durable.worker.run(sid)
    durable.worker.run(sid, UNHELD)
    durable.recovery.tell()
    listed = [job.sid for job in durable.ask(lambda scheduler: scheduler.jobs())]
    assert good in listed
    assert durable.result(good) == (1, None)
    assert still_works(durable, key)
    if bad != "status":
        what = "record that this version cannot load" if bad == "newer" else ".*"
        for question in ("completed", "get_result", "status", "cancel"):
            with pytest.raises(BadRecord, match=f"{sid}.* it is a {what}; .*remove"):
                durable.ask(lambda scheduler, question=question: getattr(scheduler, question)(sid))
        durable.ask(lambda scheduler: scheduler.remove(sid))
        assert durable.ask(lambda scheduler: scheduler.completed(sid)) is None
        assert durable.record(sid) is None


class Away:
    """Lets some loads of a class fail, as those of a ZEO client that lost its server."""

    def __init__(self, db, monkeypatch):
        self.db, self.left, self.kind = db, 0, None
        load = Connection.setstate

        def setstate(connection, obj):
            if self.left and isinstance(obj, self.kind):
                self.left -= 1
                raise StorageAway("no server")
            load(connection, obj)

        monkeypatch.setattr(Connection, "setstate", setstate)

    def loads(self, kind, count):
        self.db.cacheMinimize()
        self.left, self.kind = count, kind


class StorageAway(StorageError, TransientError):
    pass


@pytest.fixture
def away(durable, monkeypatch):
    return Away(durable.db, monkeypatch)


def test_storage_that_is_away_makes_no_record_a_bad_one(durable, away, caplog, monkeypatch):
    monkeypatch.setattr(durable.executor, "recovery", durable.recovery)
    sid = durable.run(give, 1)
    questions = (
        lambda: [job.sid for job in durable.ask(lambda s: s.jobs())],
        lambda: [job.sid for job in manage.page(durable.scheduler).jobs],
        lambda: [job.sid for job in manage.page(durable.scheduler, FINAL).jobs],
        lambda: manage.check(durable.scheduler),
        durable.recovery.look,
    )
    for ask in questions:
        right = ask()
        away.loads(JobRecord, 1)
        assert ask() == right  # asked again, as after a conflict
        away.loads(JobRecord, 100)
        with pytest.raises(StorageAway):
            ask()
        away.loads(JobRecord, 0)
    assert lines_about(caplog, sid) == []


def test_storage_that_is_away_takes_no_exception_from_its_reader(durable, away):
    sid = durable.run(raise_changing, "x" * 100_000)
    away.loads(Large, 1)
    assert isinstance(durable.result(sid)[1], Changing)


def test_impossible_transition_says_what_is_allowed(one):
    record = JobRecord("ab12", 1.0, "f")
    with pytest.raises(InvalidTransition) as refused:
        record.move("successful", 2.0)
    assert str(refused.value) == (
        "job 'ab12' is accepted and cannot become successful; allowed: running, dismissed"
    )


# -- the log -------------------------------------------------------------------------------

FORGED = "x\nERROR root: the database is on fire"


class ForgedText(Exception):
    pass


def raise_forged():
    raise ForgedText(FORGED)


def headlines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_message_of_an_exception_forges_no_line_of_the_log(one, caplog):
    caplog.set_level("DEBUG")
    one.run(raise_forged)
    assert headlines(caplog)
    assert not any("\n" in line for line in headlines(caplog))


def raise_forged_as(kind):
    raise kind(FORGED)


@pytest.mark.parametrize(
    "kind", [JobDismissed, JobTaken, JobStopped, JobTimeout, TransientError, OperationFailed]
)
def test_what_ends_a_job_forges_no_line_of_the_log(one, kind, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    monkeypatch.setattr("pyramid_async.worker.time.sleep", lambda seconds: None)
    sid = one.run(raise_forged_as, kind)
    assert any(repr(sid) in line and "on fire" in line for line in headlines(caplog))
    assert not any("\n" in line for line in headlines(caplog))


@pytest.mark.parametrize("sid", [FORGED, "00\r\n" + FORGED, "ab" * 15 + "\n1"])
def test_sid_forges_no_line_of_the_log(one, sid, caplog):
    caplog.set_level("DEBUG")
    one.executor.wake(True, sid)
    one.worker.run(sid, UNHELD)
    one.worker.run(sid, 1)
    one.ask(lambda scheduler: scheduler.cancel(sid))
    assert not any("\n" in line for line in headlines(caplog))


def test_failure_is_logged_once_with_sid_and_error_id(one, caplog):
    sid = one.run(give)
    error_id = one.status(sid).failure.error_id
    [line] = [line for line in headlines(caplog) if repr(sid) in line]
    assert error_id in line
    assert "TypeError" in caplog.text
    assert "Traceback" in caplog.text


def test_conflict_with_a_forged_description_forges_no_line_of_the_log(durable, caplog, monkeypatch):
    """Who wrote the other side of a conflict chose the note of its transaction."""
    caplog.set_level("DEBUG")
    monkeypatch.setattr("pyramid_async.worker.time.sleep", lambda seconds: None)
    durable.worker.conflict_attempts = 2
    sid = durable.run(meet_forger, ROOT, ForgerOf(durable).name)
    assert durable.status(sid).status == "failed"
    assert any("conflict on" in line for line in headlines(caplog))
    assert not any("\n" in line for line in headlines(caplog))


class ForgerOf:
    """A rival of a job that notes a line break on its transactions."""

    known = {}

    def __init__(self, one: Process) -> None:
        self.one, self.name = one, uuid4().hex
        self.known[self.name] = self

    def __call__(self):
        with self.one.transaction() as (table, root):
            root["n"] = root.get("n", 0) + 1
            table.tm.get().note(FORGED)
            table.tm.get().user = FORGED


def meet_forger(root, name):
    root["mine"] = root.get("mine", 0) + 1
    ForgerOf.known[name]()


# -- over HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["ram", "zodb"])
def test_malformed_ids_in_urls_are_not_found_and_the_rest_goes_on(store, caplog):
    zodb = f"memory://{uuid4().hex}" if store == "zodb" else None
    with browser({"async.store": store}, zodb=zodb) as client:
        url = client.url(echo, 1)
        client.done(url)
        base = url.rpartition("/")[0]
        for bad in ("0" * 32, "zz", "%0a", "..%2f..", "%C3%A9", "0" * 5000, "%00", "a b"):
            client.get(f"{base}/{bad}", status=[400, 404])
            client.delete(f"{base}/{bad}", status=[400, 404])
        assert client.done(url)["result"] == 1
    assert not any("\n" in line for line in headlines(caplog))
