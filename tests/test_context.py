"""References, pickles and PersistentContext: persistent objects that cross a transaction."""

from __future__ import annotations

import copy
import pickle
import threading
import time
import traceback
from collections import Counter, OrderedDict, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import transaction
import ZODB
from bare import in_thread
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from transaction.interfaces import NoTransaction
from webapp import nested
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from pyramid_async.context import (
    DatabaseMissing,
    NoRootConnection,
    NotStorable,
    ObjectGone,
    PersistentContext,
    Reference,
    dumps,
    loads,
    map_references,
    refer,
    resolve_references,
)
from pyramid_async.interfaces import NotSchedulable
from pyramid_async.transactional import transactional


class Thing(Persistent):
    def __init__(self, x=0):
        self.x = x


class Plain:
    def __init__(self, value):
        self.value = value


class TwoArguments(Exception):
    """Pickles, and cannot be loaded."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Conflicting:
    def __reduce__(self):
        raise ConflictError


Point = namedtuple("Point", "x y")


@pytest.fixture(autouse=True)
def clean_thread():
    transaction.abort()
    yield
    transaction.abort()


@pytest.fixture
def tm():
    """A manager as pyramid_tm's explicit one, in a transaction."""
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    yield manager
    with suppress(NoTransaction):
        manager.abort()


@pytest.fixture
def conn(db, tm):
    """A connection in an explicit transaction, as a request has it; `root()['thing']` exists."""
    with db.transaction() as connection:
        connection.root()["thing"] = Thing(1)
    tm.abort()
    tm.begin()
    connection = db.open(tm)
    yield connection
    with suppress(NoTransaction):
        tm.abort()
    connection.close()


@pytest.fixture
def thing(conn):
    return conn.root()["thing"]


@pytest.fixture
def databases():
    """A multi-database: main and side, both with a root()['thing']."""
    databases = {}
    for name in ("main", "side"):
        db = ZODB.DB(MappingStorage(), databases=databases, database_name=name)
        with db.transaction() as connection:
            connection.root()["thing"] = Thing(name)
    yield databases
    transaction.abort()
    for db in databases.values():
        db.close()


@pytest.fixture
def foreign():
    """A database that has a name in common with `db`, and nothing else."""
    db = ZODB.DB(MappingStorage())
    with db.transaction() as connection:
        connection.root()["thing"] = Thing("foreign")
    yield db
    transaction.abort()
    db.close()


def begin_again(tm):
    tm.commit()
    tm.begin()


def opened(db):
    """Return how many connections of the database are out of the pool."""
    return sum(info["opened"] is not None for info in db.connectionDebugInfo())


def reader(db, f):
    """Return what *f* returns for another connection, in a thread and transaction of its own."""

    def read():
        with db.transaction() as connection:
            return f(connection)

    return in_thread(read)


# -- references ------------------------------------------------------------------------


def test_reference_names_database_and_oid_and_resolves_to_the_readers_object(conn, thing, db):
    reference = refer(thing)
    assert reference == Reference(conn.db().database_name, thing._p_oid)
    assert reference.kind.endswith("test_context.Thing")

    def read(connection):
        obj = reference.resolve(connection)
        return obj is not thing, obj._p_jar is connection, obj.x

    assert reader(db, read) == (True, True, 1)


def test_reference_resolves_to_the_very_object_of_its_own_connection(conn, thing):
    assert refer(thing).resolve(conn) is thing


def test_reference_is_an_immutable_value_that_pickles(thing):
    reference = refer(thing)
    assert pickle.loads(pickle.dumps(reference)) == reference
    assert pickle.loads(pickle.dumps(reference)).kind == reference.kind
    assert {reference: 1}[refer(thing)] == 1
    with pytest.raises(AttributeError):
        reference.oid = b""


def test_resolved_object_has_its_state(conn, thing):
    reference = refer(thing)
    thing._p_deactivate()
    assert reference.load(conn)._p_changed is False


@pytest.mark.parametrize("make", [Thing, OOBTree, PersistentList, PersistentMapping])
def test_new_object_of_the_graph_gets_its_oid_by_a_savepoint(make, conn, tm):
    new = conn.root()["new"] = make()
    assert new._p_oid is None
    assert refer(new, tm).oid == new._p_oid
    assert new._p_jar is conn


def test_new_object_of_the_graph_is_reachable_afterwards(conn, tm, db):
    new = conn.root()["new"] = Thing(5)
    reference = refer(new, tm)
    tm.commit()
    assert reader(db, lambda connection: reference.resolve(connection).x) == 5
    assert reader(db, lambda connection: refer(connection.root()["new"])) == reference


def test_new_object_is_found_by_the_threads_own_manager_by_default(db):
    connection = db.open()
    new = connection.root()["new"] = Thing()
    assert refer(new).oid == new._p_oid


def test_new_object_is_found_by_the_connections_manager(conn):
    new = conn.root()["new"] = Thing()
    assert refer(new, connection=conn).oid == new._p_oid
    assert new._p_jar is conn


def test_new_object_outside_of_the_graph_is_added_to_the_connection(conn, tm, db):
    reference = refer(Thing(7), tm, conn)
    tm.commit()
    assert reader(db, lambda connection: reference.resolve(connection).x) == 7


def test_new_object_outside_of_the_graph_without_a_connection_is_refused(tm):
    with pytest.raises(
        NotStorable, match=r"test_context\.Thing cannot be stored: .* graph"
    ) as info:
        refer(Thing(), tm)
    assert isinstance(info.value, NotSchedulable)
    assert isinstance(info.value, ValueError)


def test_new_object_is_refused_where_an_explicit_manager_has_no_transaction():
    with pytest.raises(NotStorable):
        refer(Thing(), transaction.TransactionManager(explicit=True))


def test_new_object_keeps_its_state_when_it_is_resolved_in_its_own_transaction(conn, tm):
    new = Thing(3)
    assert refer(new, tm, conn).resolve(conn).x == 3
    tm.savepoint()
    new.x = 4
    assert refer(new, tm, conn).resolve(conn).x == 4


def test_changes_are_kept_when_an_object_is_resolved(conn, thing):
    thing.x = 2
    assert refer(thing).resolve(conn).x == 2


def test_object_of_another_multi_database_is_refused(conn, foreign):
    other = foreign.open().root()["thing"]
    with pytest.raises(NotStorable, match="'unnamed' is none of those of 'unnamed'"):
        refer(other, connection=conn)


def test_object_of_another_database_is_loaded_through_the_multi_database(databases):
    thing = databases["side"].open().root()["thing"]
    reference = refer(thing)
    assert reference.database == "side"

    def read(connection):
        obj = reference.resolve(connection)
        return obj.x, obj._p_jar is connection.get_connection("side")

    assert reader(databases["main"], read) == ("side", True)


def test_reference_into_a_database_unknown_here_says_so(conn):
    reference = Reference("elsewhere", b"\0" * 7 + b"\5", "a.Folder")
    with pytest.raises(DatabaseMissing, match=r"a\.Folder 0x05 is in database 'elsewhere'") as info:
        reference.resolve(conn)
    assert isinstance(info.value, LookupError)
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


@pytest.fixture
def removed(file_db):
    """A connection that has the object in its cache, and the reference of the packed object."""
    manager = transaction.TransactionManager()
    connection = file_db.open(manager)
    connection.root()["thing"] = Thing(1)
    manager.commit()
    reference = refer(connection.root()["thing"])
    kept = connection.root()["thing"]
    del connection.root()["thing"]
    manager.commit()
    file_db.pack()
    manager.begin()
    assert kept.x == 1
    yield connection, reference
    manager.abort()
    connection.close()


def test_new_object_of_another_database_is_stored_there(databases):
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    connection = databases["main"].open(manager)
    new = connection.get_connection("side").root()["new"] = Thing(6)
    reference = refer(new, connection=connection)
    assert reference.database == "side"
    manager.commit()
    connection.close()
    assert reader(databases["main"], lambda c: reference.resolve(c).x) == 6


def test_object_removed_by_a_pack_is_gone_for_a_new_connection(removed, file_db):
    _, reference = removed

    def read(connection):
        with pytest.raises(ObjectGone) as info:
            reference.resolve(connection)
        return info.value

    error = reader(file_db, read)
    assert str(error).endswith("test_context.Thing 0x01 of database 'unnamed' is gone")
    assert isinstance(error, LookupError)
    assert not isinstance(error, IndexError | KeyError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_object_removed_by_a_pack_is_gone_though_it_is_in_the_cache(removed):
    connection, reference = removed
    assert reference.load(connection).x == 1
    with pytest.raises(ObjectGone):
        reference.resolve(connection)


def test_ghost_of_an_object_removed_by_a_pack_is_gone(removed):
    connection, reference = removed
    connection.get(reference.oid)._p_deactivate()
    with pytest.raises(ObjectGone):
        reference.load(connection)


# -- containers ------------------------------------------------------------------------


def there_and_back(value, connection):
    references = map_references(value, lambda obj: refer(obj, connection=connection))
    assert not holds_persistent(references)
    return references, resolve_references(references, lambda: connection)


def holds_persistent(value):
    found = []
    map_references(value, found.append)
    return bool(found)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda thing: thing,
        lambda thing: [1, [thing]],
        lambda thing: (1, (thing, thing)),
        lambda thing: {"a": {"b": thing}},
        lambda thing: {thing: 1},
        lambda thing: {(1, thing): [thing]},
        lambda thing: {1, thing},
        lambda thing: frozenset({thing}),
        lambda thing: Point(1, [thing]),
        lambda thing: ((1, {"k": [{thing}]}), {}),
    ],
)
def test_persistent_objects_cross_at_any_depth(wrap, conn, thing):
    value = wrap(thing)
    _, back = there_and_back(value, conn)
    assert back == value
    assert type(back) is type(value)


def test_subclasses_of_containers_keep_their_class_and_order(conn, thing):
    value = [
        OrderedDict([("b", thing), ("a", 1)]),
        defaultdict(list, {"a": thing}),
        Counter({thing: 3}),
        type("Tuple", (tuple,), {})([thing]),
        type("List", (list,), {})([thing]),
        type("Set", (set,), {})([thing]),
    ]
    references, back = there_and_back(value, conn)
    assert [type(item) for item in references] == [type(item) for item in value]
    assert back == value
    assert list(back[0]) == ["b", "a"]
    assert back[1]["new"] == []
    assert list(references[2].values()) == [3]


def test_the_containers_given_are_not_changed(conn, thing):
    value = {"a": [thing]}
    there_and_back(value, conn)
    assert value == {"a": [thing]}


def test_all_other_objects_are_left_alone(conn, thing):
    plain, lock = Plain(thing), threading.Lock()
    references = map_references([plain, lock, thing], refer)
    assert references[0] is plain
    assert references[1] is lock


def test_what_holds_no_persistent_object_is_passed_without_a_copy():
    value = ([1, "a", b"", None, 2.5, True], {"k": {1, 2}, (1,): frozenset()}, Point(1, [Plain(1)]))
    assert map_references(value, refer) is value


def test_container_met_twice_stays_one(conn, thing):
    inner = [thing]
    references = map_references([inner, {"again": inner}], refer)
    assert references[0] is references[1]["again"]


@pytest.mark.parametrize("kind", [list, dict])
def test_container_that_contains_itself_is_refused(kind):
    cycle = kind([("a", 1)])
    if kind is dict:
        cycle["self"] = (cycle,)
    else:
        cycle.append([cycle])
    with pytest.raises(NotStorable, match=f"builtins.{kind.__name__} cannot be .* contains itself"):
        map_references([cycle], refer)


def test_container_nested_too_deeply_is_refused():
    with pytest.raises(NotStorable, match="nested too deeply"):
        map_references(nested(100_000), refer)


def test_connection_is_not_asked_for_unless_there_is_a_reference(conn, thing):
    asked = []
    resolve_references([1, [2]], lambda: asked.append(1))
    assert asked == []
    assert resolve_references([refer(thing)], lambda: asked.append(1) or conn) == [thing]
    assert asked == [1]


def test_persistent_context_crosses_as_it_is_and_arrives_bound(conn, thing, db):
    context = PersistentContext(thing)
    (crossed,) = map_references([context], refer)
    assert crossed is context

    def read(connection):
        (arrived,) = resolve_references([crossed], lambda: connection)
        return arrived[0].x, arrived[0]._p_jar is connection, arrived.get_root_connection()

    x, own, root = reader(db, read)
    assert (x, own) == (1, True)
    assert root is not conn


# -- pickles ---------------------------------------------------------------------------


def crossing(value, connection):
    """Return dumps' data after the commit, and the objects that it lists."""
    data, objects = dumps(value, connection)
    begin_again(connection.transaction_manager)
    return data, objects


def test_value_without_persistent_objects_comes_back_equal(conn):
    value = {"a": [1, {2}, (3.5, None)], "b": Point(1, b"2")}
    data, objects = dumps(value, conn)
    assert type(data) is bytes
    assert objects == []
    assert loads(data, conn) == value


def test_persistent_objects_are_loaded_by_the_readers_connection(conn, thing, db):
    tree = conn.root()["tree"] = OOBTree({"k": thing})
    data, objects = crossing([thing, {"plain": Plain((thing, tree))}], conn)
    assert objects == [thing, tree]

    def read(connection):
        first, rest = loads(data, connection)
        assert rest["plain"].value[0] is first
        assert rest["plain"].value[1]["k"] is first
        return first.x, first._p_jar is connection

    assert reader(db, read) == (1, True)


def test_pickle_holds_no_state_of_persistent_objects(conn, thing):
    thing.x = "secret state"
    data, _ = dumps([thing], conn)
    assert b"secret state" not in data


def test_changes_of_the_writing_transaction_are_seen_after_its_commit(conn, thing, db):
    data, _ = dumps(thing, conn)
    thing.x = 99
    conn.transaction_manager.commit()
    assert reader(db, lambda connection: loads(data, connection).x) == 99


def test_new_objects_are_stored_whether_anything_refers_to_them_or_not(conn, db):
    reachable, loose = Thing("reachable"), Thing("loose")
    conn.root()["new"] = reachable
    data, objects = crossing([reachable, loose], conn)
    assert objects == [reachable, loose]
    assert reader(db, lambda c: [obj.x for obj in loads(data, c)]) == ["reachable", "loose"]


def test_objects_listed_keep_loose_ones_alive_through_a_pack(file_db):
    with file_db.transaction() as connection:
        data, objects = dumps([Thing("loose")], connection)
        connection.root()["record"] = PersistentMapping(data=data, objects=tuple(objects))
    file_db.pack()
    assert reader(file_db, lambda connection: loads(data, connection)[0].x) == "loose"


def test_savepoint_is_made_by_the_manager_given(conn, tm):
    tm.abort()  # the connection's own manager is the same; another one is as good
    other = transaction.TransactionManager()
    other_conn = conn.db().open(other)
    new = other_conn.root()["new"] = Thing()
    tm.begin()
    _, objects = dumps(new, conn, other)
    assert new._p_jar is other_conn
    assert objects == []  # a record of `conn` could not hold it
    other.abort()
    other_conn.close()


def test_classes_of_persistent_objects_are_pickled_by_name(conn):
    data, objects = dumps([Thing, OOBTree], conn)
    assert objects == []
    assert loads(data, conn) == [Thing, OOBTree]


def test_objects_of_another_database_cross_but_cannot_be_kept_alive(databases):
    connection = databases["main"].open()
    ours, theirs = connection.root()["thing"], connection.get_connection("side").root()["thing"]
    data, objects = dumps([ours, theirs], connection)
    assert objects == [ours]
    assert reader(databases["main"], lambda c: [obj.x for obj in loads(data, c)]) == [
        "main",
        "side",
    ]


def test_objects_of_a_database_that_readers_do_not_reach_are_refused(conn, foreign):
    with pytest.raises(NotStorable, match="none of those"):
        dumps([foreign.open().root()["thing"]], conn)


def test_object_gone_since_then_is_named_when_the_pickle_is_loaded(removed):
    connection, _ = removed
    new = connection.root()["new"] = Thing()
    data, _ = dumps([new], connection)
    connection.transaction_manager.abort()
    with pytest.raises(ObjectGone, match="Thing 0x"):
        loads(data, connection)


def test_ordinary_exception_crosses(conn):
    error = loads(dumps(ValueError("no", 1), conn)[0], conn)
    assert (type(error), error.args) == (ValueError, ("no", 1))


@pytest.mark.parametrize(
    ("wrap", "kind", "why"),
    [
        (lambda bad: bad, r"test_context\.TwoArguments", "TypeError: .*'second'"),
        (lambda bad: ((1, [bad]), {}), r"test_context\.TwoArguments", "TypeError"),
        (lambda bad: {"k": {"l": bad}}, r"test_context\.TwoArguments", "TypeError"),
        (lambda bad: Plain(bad), r"test_context\.Plain", "TypeError"),
    ],
)
def test_what_pickles_and_cannot_be_loaded_is_refused_by_name(wrap, kind, why, conn):
    with pytest.raises(NotStorable, match=rf"{kind} cannot be stored: {why}") as info:
        dumps(wrap(TwoArguments(1, 2)), conn)
    assert type(info.value.__cause__) is TypeError


@pytest.mark.parametrize("bad", [lambda: 0, threading.Lock(), (n for n in ())])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: [1, {"k": (bad,)}]])
def test_what_cannot_be_pickled_is_refused_by_name(wrap, bad, conn):
    with pytest.raises(NotStorable) as info:
        dumps(wrap(bad), conn)
    assert info.value.args[0] == f"{type(bad).__module__}.{type(bad).__qualname__}"
    assert info.value.__cause__ is not None
    assert isinstance(info.value, NotSchedulable)


class Knot:
    """Refers to all the others, as the nodes of a tree do through their parent."""

    def __init__(self, knots):
        self.knots = knots


def test_culprit_among_many_that_refer_to_one_another_is_told_soon(conn):
    knots = []
    knots += [Knot(knots) for _ in range(3000)]
    knots[-1].lock = threading.Lock()
    begun = time.monotonic()
    with pytest.raises(NotStorable, match="Knot cannot be stored"):
        dumps(knots, conn)
    assert time.monotonic() - begun < 2


def test_search_for_the_culprit_ends(conn, monkeypatch):
    """What the innocent parts share would be tried with each of them."""
    monkeypatch.setattr("pyramid_async.context.SEARCH", 0.1)
    shared = {number: str(number) for number in range(20_000)}
    rows = [*({"row": row, "shared": shared} for row in range(1000)), threading.Lock()]
    begun = time.monotonic()
    with pytest.raises(NotStorable, match="list cannot be stored: TypeError: cannot pickle"):
        dumps(rows, conn)
    assert time.monotonic() - begun < 2


class FrozenDict(dict):
    """As frozendict, SQLAlchemy's immutabledict and werkzeug's immutable classes are."""

    def __reduce_ex__(self, protocol):
        return type(self), (dict(self),)

    def clear(self):
        raise TypeError("this is immutable")


class FrozenList(list):
    def __reduce_ex__(self, protocol):
        return type(self), (list(self),)

    def clear(self):
        raise TypeError("this is immutable")


@pytest.mark.parametrize("value", [FrozenDict(a=[1]), FrozenList([[1]])])
def test_containers_that_cannot_be_changed_are_copied_with_what_is_in_them(value):
    mapped = map_references(value, None, copies=True)
    assert (mapped, type(mapped)) == (value, type(value))
    inner = value["a"] if isinstance(value, dict) else value[0]
    assert all(
        each is not inner for each in (mapped.values() if isinstance(mapped, dict) else mapped)
    )


def test_culprit_in_a_cyclic_container_is_found(conn):
    cycle = [1]
    cycle += [cycle, [cycle], lambda: 0]
    with pytest.raises(NotStorable, match=r"builtins\.\w+ cannot be stored"):
        dumps([cycle], conn)


def test_cyclic_container_crosses_in_a_pickle(conn):
    cycle = [1]
    cycle.append(cycle)
    back = loads(dumps(cycle, conn)[0], conn)
    assert back[1] is back


def test_value_nested_too_deeply_is_refused(conn):
    with pytest.raises(NotStorable, match="nested too deeply") as refused:
        dumps(nested(100_000), conn)
    # Python 3.14 adds a note for each level.
    assert len("".join(traceback.format_exception(refused.value))) < 10_000


def test_conflict_while_pickling_is_passed_on_for_a_retry(conn):
    with pytest.raises(ConflictError):
        dumps([Conflicting()], conn)


def test_persistent_context_in_a_pickle_arrives_bound_to_the_readers_connection(conn, thing, db):
    context = PersistentContext(thing, name=thing)
    data, objects = crossing([context, {"again": context}], conn)
    assert objects == []

    def read(connection):
        first, rest = loads(data, connection)
        assert rest["again"] is first
        assert first.get_root_connection() is connection
        return first[0].x, first["name"] is first[0]

    assert reader(db, read) == (1, True)


# -- PersistentContext: access ---------------------------------------------------------


def test_objects_are_reached_by_position_and_by_name(conn, thing):
    context = PersistentContext(thing, conn.root(), name=thing, self=conn.root())
    context.set_root_connection(conn)
    assert context[0] is thing
    assert context[1] is conn.root()
    assert context[-1] is conn.root()
    assert context["name"] is thing
    assert context["self"] is conn.root()
    assert len(context) == 2
    assert set(context.keys()) == {"name", "self"}
    assert context.get("name") is thing
    assert context.get("other") is None
    assert context.get("other", 5) == 5
    assert list(context) == [thing, conn.root()]


def test_unknown_position_and_name_raise_without_a_connection(thing):
    context = pickle.loads(pickle.dumps(PersistentContext(thing)))
    with pytest.raises(IndexError):
        context[1]
    with pytest.raises(KeyError):
        context["name"]
    assert context.get("name") is None


def test_text_of_a_context_names_its_objects(thing):
    text = repr(PersistentContext(thing, name=thing))
    assert text.startswith("PersistentContext(Reference(database='unnamed'")
    assert "name=Reference(" in text


def test_new_object_of_the_graph_is_identified_by_a_savepoint(conn, thing):
    new = conn.root()["new"] = Thing(8)
    context = PersistentContext(thing, new, again=new)
    assert new._p_jar is conn
    context.set_root_connection(conn)
    assert context[1] is context["again"] is new


def test_new_object_alone_is_found_by_the_threads_own_manager(db):
    connection = db.open()
    new = connection.root()["new"] = Thing()
    context = PersistentContext(new)
    context.set_root_connection(connection)
    assert context[0] is new


def test_new_object_alone_is_found_by_the_connection_given(conn):
    new = conn.root()["new"] = Thing()
    context = PersistentContext(conn, new)
    assert len(context) == 1
    assert context.database is conn.db()


def test_object_outside_of_the_graph_is_a_value_error(conn, thing):
    with pytest.raises(ValueError, match="not part of the graph of persistent objects"):
        PersistentContext(thing, Thing())
    with pytest.raises(ValueError, match="not part of the graph of persistent objects"):
        PersistentContext(conn, name=Thing())


@pytest.mark.parametrize("obj", ["text", None, Thing, Plain(1)])
def test_object_that_is_not_persistent_is_an_attribute_error(obj, thing):
    with pytest.raises(AttributeError, match="is not persistent"):
        PersistentContext(thing, obj)
    with pytest.raises(AttributeError, match="is not persistent"):
        PersistentContext(name=obj)


def test_object_of_a_database_unknown_to_the_root_database_is_refused(thing, foreign):
    with pytest.raises(ValueError, match="none of those"):
        PersistentContext(foreign, thing)
    with pytest.raises(ValueError, match="none of those"):
        PersistentContext(foreign.open().root(), thing)


def test_object_gone_is_named(removed, file_db):
    _, reference = removed
    context = PersistentContext(file_db)
    context._objs = (reference,)
    with pytest.raises(ObjectGone, match="is gone"):
        in_thread(lambda: [*context])


# -- PersistentContext: in another thread ----------------------------------------------


def test_objects_are_reloaded_in_another_thread_and_changes_committed(conn, thing, db):
    context = PersistentContext(thing)
    thing.x = "changed before the commit"
    conn.transaction_manager.commit()

    @transactional
    def work():
        obj = context[0]
        seen = obj is not thing, obj.x, obj._p_jar is context.get_root_connection()
        obj.x = "changed by the job"
        return seen

    assert in_thread(work) == (True, "changed before the commit", True)
    assert reader(db, lambda connection: connection.root()["thing"].x) == "changed by the job"
    conn.transaction_manager.begin()


def test_changes_not_committed_are_not_seen(conn, thing):
    context = PersistentContext(thing)
    thing.x = 2
    assert in_thread(lambda: context[0].x) == 1


def test_one_context_is_used_by_many_threads_each_with_its_own_connection(thing):
    context = PersistentContext(thing)
    together = threading.Barrier(4)

    @transactional
    def work():
        obj = context[0]
        together.wait(10)
        assert context[0] is obj
        return id(context.get_root_connection())

    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(work) for _ in range(4)]
        assert len({future.result() for future in futures}) == 4


def test_several_contexts_share_one_connection_in_a_transaction(conn, thing, db):
    contexts = [PersistentContext(thing), PersistentContext(conn.root(), name=thing)]

    @transactional
    def work():
        first, second = (context.get_root_connection() for context in contexts)
        return first is second, contexts[0][0] is contexts[1]["name"], opened(db)

    before = opened(db)
    assert in_thread(work) == (True, True, before + 1)


def test_contexts_with_roots_in_one_multi_database_share_its_connections(databases):
    def make(name):
        return PersistentContext(databases[name].open().root()["thing"])

    main, side = make("main"), make("side")

    @transactional
    def work():
        root = main.get_root_connection()
        assert main[0]._p_jar is root
        assert side[0]._p_jar is root.get_connection("side")
        return opened(databases["main"]), opened(databases["side"])

    before = opened(databases["main"]), opened(databases["side"])
    assert in_thread(work) == (before[0] + 1, before[1] + 1)
    assert (opened(databases["main"]), opened(databases["side"])) == before


def test_contexts_of_unrelated_databases_have_a_connection_each(thing, foreign):
    ours = PersistentContext(thing)
    theirs = PersistentContext(foreign.open().root()["thing"])

    @transactional
    def work():
        return ours[0].x, theirs[0].x

    assert in_thread(work) == (1, "foreign")


def test_root_database_may_be_given_before_the_objects(databases):
    thing = databases["side"].open().root()["thing"]
    context = PersistentContext(databases["main"], thing)
    assert len(context) == 1

    @transactional
    def work():
        return context.get_root_connection().db().database_name, context[0].x

    assert in_thread(work) == ("main", "side")


def test_derived_class_may_know_the_root_database(db, thing):
    class Ours(PersistentContext):
        def _get_root_database(self):
            return db

    context = Ours(thing)
    context._database = None  # as in another process
    assert in_thread(lambda: context[0].x) == 1


def test_context_without_objects_has_no_root_database():
    context = PersistentContext()
    assert (len(context), list(context.keys()), context.database) == (0, [], None)
    with pytest.raises(NoRootConnection, match="set_root_connection"):
        context.get_root_connection()


# -- PersistentContext: the connections it opens ---------------------------------------


class Veto:
    """Data manager that makes the commit fail at its vote."""

    transaction_manager = None

    def tpc_vote(self, txn):
        raise ValueError("vetoed")

    def sortKey(self):
        return "~veto"

    def nothing(self, txn):
        """Do nothing."""

    abort = commit = tpc_begin = tpc_finish = tpc_abort = nothing


@pytest.fixture
def context(db):
    """A context that was made in a transaction that has ended, and has no connection open."""
    with db.transaction() as connection:
        connection.root()["thing"] = Thing(1)
    with db.transaction() as connection:
        return PersistentContext(connection.root()["thing"])


def commit_fails():
    with pytest.raises(ValueError, match="vetoed"):
        transaction.commit()


def commit_fails_and_is_aborted():
    commit_fails()
    transaction.abort()


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize(
    ("end", "veto"),
    [
        (transaction.commit, False),
        (transaction.abort, False),
        (transaction.begin, False),
        (commit_fails_and_is_aborted, True),
        (commit_fails, True),
    ],
)
def test_connection_is_closed_at_the_end_of_the_transaction(end, veto, change, context, db):
    for _ in range(3):
        context[0].x += change
        assert opened(db) == 1
        if veto:
            transaction.get().join(Veto())
        end()
        assert opened(db) == 0
        transaction.abort()
    assert len(db.pool.all) == 1


class NextUser:
    """Takes a connection from the pool as soon as it is there, and changes something."""

    def __init__(self, db, other):
        self.tm = transaction.TransactionManager()
        self.db = db
        self.other = other
        self.connections = []

    def __call__(self, *_):
        self.tm.begin()
        connection = self.db.open(self.tm)
        changed = connection.get_connection(self.other) if self.other else connection
        changed.root()["precious"] = 1
        self.connections.append(connection)

    def commit(self):
        self.tm.commit()
        for connection in self.connections:
            connection.close()
        return self.connections


def next_user(db, other=None):
    """Return what uses the database, or another one by it, after the hooks registered so far."""
    user = NextUser(db, other)
    transaction.get().addAfterCommitHook(user)
    transaction.get().addAfterAbortHook(user)
    return user


@pytest.fixture
def both(databases):
    """A context with an object of either database and main as root; nothing is open."""
    with databases["main"].transaction() as connection:
        side = connection.get_connection("side")
        return PersistentContext(connection.root()["thing"], side.root()["thing"])


@pytest.mark.parametrize("end", [transaction.commit, transaction.abort])
def test_connection_to_each_database_is_closed(end, both, databases):
    both[0].x = both[1].x = 1
    assert [opened(db) for db in databases.values()] == [1, 1]
    end()
    assert [opened(db) for db in databases.values()] == [0, 0]


def test_root_connection_that_is_replaced_among_its_own_is_closed(databases):
    """Connection.get_connection does that with a connection that has a history."""
    with databases["main"].transaction() as connection:
        context = PersistentContext(connection.get_connection("side").root()["thing"])

    root = context.get_root_connection()
    main = root.get_connection("main")
    assert root.get_connection("side") is not root
    root.root()["x"] = main.root()["x"] = 1
    user = next_user(databases["side"])
    transaction.commit()

    assert user.commit() == [root]
    assert [opened(db) for db in databases.values()] == [0, 0]
    assert reader(databases["side"], lambda connection: "precious" in connection.root())


def test_connection_that_did_not_get_over_a_failed_commit_is_closed(context, db, monkeypatch):
    connection = context.get_root_connection()

    def tpc_abort(txn):
        raise RuntimeError("no")

    monkeypatch.setattr(connection, "tpc_abort", tpc_abort)
    context[0].x = 2
    transaction.get().join(Veto())
    commit_fails()
    assert opened(db) == 0
    transaction.abort()
    monkeypatch.undo()
    connection._normal_storage.tpc_abort(None)


def test_connection_opened_after_a_failed_commit_is_closed_by_the_abort(context, db):
    context[0].x = 2
    transaction.get().join(Veto())
    commit_fails()
    assert context[0].x == 1
    assert opened(db) == 1
    transaction.abort()
    assert opened(db) == 0


def test_connection_opened_by_a_hook_is_closed(context, db):
    seen = []
    transaction.get().addAfterCommitHook(lambda _: seen.append(context[0].x))
    transaction.commit()
    assert seen == [1]
    assert opened(db) == 0


def test_new_transaction_opens_anew_and_sees_what_was_committed(context, db):
    assert context[0].x == 1
    transaction.commit()
    with db.transaction() as connection:
        connection.root()["thing"].x = 2
    assert context[0].x == 2


@pytest.mark.parametrize("other", [None, "side"])
@pytest.mark.parametrize("end", [transaction.commit, transaction.abort])
def test_changes_of_the_next_user_of_the_connection_are_not_lost(end, other, both, databases):
    """After its hooks a transaction aborts its resources again.

    By then the connection has been closed by a hook, and somebody else may have it from the pool.
    """
    both[0].x = both[1].x = 2
    mine = both.get_root_connection()
    user = next_user(databases["main"], other)
    end()

    assert user.commit() == [mine]
    assert reader(databases[other or "main"], lambda connection: "precious" in connection.root())


def test_connection_that_cannot_be_closed_is_logged_and_breaks_nothing(
    context, caplog, monkeypatch
):
    connection = context.get_root_connection()

    def close(primary=True):
        raise RuntimeError("no")

    ended = []
    with monkeypatch.context() as patch:
        patch.setattr(connection, "close", close)
        transaction.get().addAfterAbortHook(ended.append, (1,))
        transaction.abort()
    assert ended == [1]
    assert "is not returned to its pool" in caplog.text
    connection.close()


def test_explicit_manager_of_the_thread_needs_a_transaction(context, monkeypatch, db):
    monkeypatch.setattr(transaction.manager, "explicit", True)
    with pytest.raises(NoTransaction):
        context[0]
    assert opened(db) == 0
    transaction.begin()
    assert context[0].x == 1
    transaction.commit()
    assert opened(db) == 0
    transaction.begin()


# -- PersistentContext: root connections given -----------------------------------------


def test_root_connection_given_is_used_and_not_closed(conn, thing, db):
    context = PersistentContext(thing)
    context.set_root_connection(conn)
    assert context.get_root_connection() is conn
    assert context[0] is thing
    begin_again(conn.transaction_manager)
    assert conn.opened


def test_root_connection_given_may_be_closed_at_the_end(context, db):
    connection = db.open()
    context.set_root_connection(connection, close=True)
    assert context[0]._p_jar is connection
    transaction.commit()
    assert connection.opened is None


def test_same_root_connection_may_be_set_again(context, db):
    connection = db.open()
    context.set_root_connection(connection)
    context.set_root_connection(connection)
    assert context.get_root_connection() is connection


def test_another_root_connection_is_a_value_error(context, db):
    first, second = db.open(), db.open()
    context.set_root_connection(first)
    with pytest.raises(ValueError, match="already set up"):
        context.set_root_connection(second)
    assert context.get_root_connection() is first


def test_another_root_connection_than_the_one_opened_is_a_value_error(context, db):
    opened_by_itself = context.get_root_connection()
    with pytest.raises(ValueError, match="already set up"):
        context.set_root_connection(db.open())
    assert context.get_root_connection() is opened_by_itself


def test_root_connection_set_on_one_context_is_shared_by_others(context, db):
    with db.transaction() as connection:
        other = PersistentContext(connection.root())
    connection = db.open()
    context.set_root_connection(connection)
    assert other.get_root_connection() is connection
    with pytest.raises(ValueError, match="already set up"):
        other.set_root_connection(db.open())


def test_root_connection_is_forgotten_at_the_end_of_the_transaction(context, db):
    first, second = db.open(), db.open()
    context.set_root_connection(first)
    transaction.commit()
    context.set_root_connection(second)
    assert context.get_root_connection() is second
    transaction.commit()
    assert context.get_root_connection() not in (None, first, second)


def test_connection_of_an_explicit_manager_is_forgotten_at_the_end_of_its_transaction(conn, thing):
    context = PersistentContext(thing)
    context.set_root_connection(conn)
    begin_again(conn.transaction_manager)
    assert context.get_root_connection() is not conn
    conn.transaction_manager.commit()
    assert context.get_root_connection() is not conn
    conn.transaction_manager.begin()


def test_root_connection_given_in_one_thread_is_not_used_by_another(conn, thing):
    context = PersistentContext(thing)
    context.set_root_connection(conn)
    assert in_thread(context.get_root_connection) is not conn
    assert context.get_root_connection() is conn


def test_closed_root_connection_is_refused(context, db):
    connection = db.open()
    connection.close()
    with pytest.raises(ValueError, match="is closed"):
        context.set_root_connection(connection)


def test_root_connection_to_another_database_is_refused(context, foreign):
    with pytest.raises(ValueError, match="other databases"):
        context.set_root_connection(foreign.open())


def test_connection_to_any_database_of_the_multi_database_will_do(databases):
    context = PersistentContext(databases["side"].open().root()["thing"])
    transaction.abort()
    main = databases["main"].open()
    context.set_root_connection(main)
    assert context[0]._p_jar is main.get_connection("side")
    context.set_root_connection(main.get_connection("side"))
    assert context.get_root_connection() is main


# -- PersistentContext: pickled by anything --------------------------------------------


def test_pickle_holds_references_only(context):
    unpickled = pickle.loads(pickle.dumps(context))
    assert unpickled.database is None
    assert repr(unpickled) == repr(context)


def test_unpickled_context_says_that_it_needs_a_root_connection(context, db):
    unpickled = pickle.loads(pickle.dumps(context))
    with pytest.raises(NoRootConnection, match=r"call its set_root_connection\(connection\)"):
        unpickled[0]
    connection = db.open()
    unpickled.set_root_connection(connection)
    assert unpickled[0]._p_jar is connection


def test_root_connection_that_lacks_a_database_of_an_unpickled_context_is_refused(databases, db):
    context = PersistentContext(databases["side"].open().root()["thing"])
    unpickled = pickle.loads(pickle.dumps(context))
    with pytest.raises(ValueError, match="reaches no database 'side'"):
        unpickled.set_root_connection(db.open())


def test_context_can_be_stored_in_the_database(conn, thing, db):
    conn.root()["context"] = PersistentContext(thing, name=thing)
    begin_again(conn.transaction_manager)

    def read(connection):
        context = connection.root()["context"]
        context.set_root_connection(connection)
        return context[0].x, context["name"]._p_jar is connection

    assert reader(db, read) == (1, True)


def test_copied_context_opens_a_connection_only_when_told(context, db):
    copied = copy.copy(context.resolve(db.open()))
    with pytest.raises(NoRootConnection):
        copied[0]


# -- PersistentContext: bound ----------------------------------------------------------


def test_bound_context_keeps_its_connection_across_transactions(conn, thing):
    context = PersistentContext(thing).resolve(conn)
    for _ in range(2):
        assert context.get_root_connection() is conn
        assert context[0] is thing
        begin_again(conn.transaction_manager)


def test_binding_makes_a_copy_and_leaves_the_context_as_it_was(conn, thing):
    class Ours(PersistentContext):
        label = "class"

    context = Ours(thing)
    context.label = "instance"
    bound = context.resolve(conn)
    assert (type(bound), bound.label) == (Ours, "instance")
    assert context.get_root_connection() is not conn


def test_bound_context_refuses_another_root_connection(conn, thing, db):
    context = PersistentContext(thing).resolve(conn)
    context.set_root_connection(conn)
    with pytest.raises(ValueError, match="already set up"):
        context.set_root_connection(db.open())


def test_bound_context_can_be_unbound_and_bound_again(context, db):
    first, second = db.open(), db.open()
    bound = context.resolve(first)
    assert bound.resolve(second).get_root_connection() is second
    unbound = bound.resolve(None)
    assert unbound.get_root_connection() not in (first, second)
    assert unbound[0].x == 1


def test_unpickled_context_knows_the_database_once_it_was_bound(context, db):
    connection = db.open()
    unbound = loads(dumps(context, connection)[0], connection).resolve(None)
    assert unbound.get_root_connection() is not connection
    assert unbound[0].x == 1


def test_context_is_not_bound_to_a_connection_that_does_not_reach_its_objects(context, foreign):
    with pytest.raises(ValueError, match="other databases"):
        context.resolve(foreign.open())
    with pytest.raises(NotStorable, match=r"PersistentContext cannot be stored: ValueError"):
        dumps(context, foreign.open())
