"""One application object per process: threads, forks, exits, real servers, a real application."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError
from pyramid.response import Response
from webtest import TestApp

from pyramid_async import application as module
from pyramid_async.application import (
    ApplicationAlreadyMade,
    ApplicationAsksForItself,
    ApplicationBusy,
    ApplicationNotDeclared,
    close_application,
    close_applications,
    get_application,
    init_application,
)

ROOT = Path(__file__).parent.parent


class Shop:
    """An application that remembers what happens to it."""

    def __init__(self, registry=None):
        self.registry = registry
        self.closed = 0

    def close(self):
        self.closed += 1


class Made(list):
    """A factory that keeps what it made."""

    def __call__(self, registry):
        self.append(Shop(registry))
        return self[-1]


@pytest.fixture
def made():
    return Made()


@pytest.fixture(autouse=True)
def nothing_is_left_open(monkeypatch):
    # Other tests of the same run may have imported a server, which then counts as loaded.
    for name in module._WORKERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    close_applications()


def configurator(**kw):
    config = Configurator(**kw)
    config.include("pyramid_async")
    return config


def registry_with(**factories):
    config = configurator()
    for name, factory in factories.items():
        config.add_application(factory, name=name)
    config.commit()
    return config.registry


def at_once(function, times):
    """Call the function in that many threads at once; return what they returned or raised."""
    outcomes = []
    barrier = threading.Barrier(times)

    def call():
        barrier.wait(10)
        try:
            outcomes.append(function())
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return outcomes


# -- one instance --------------------------------------------------------------------------


def test_64_threads_that_ask_at_once_get_the_one_instance():
    asked, seen = threading.Semaphore(0), Made()

    def factory(registry):
        for _ in range(64):
            assert asked.acquire(timeout=10)
        return seen(registry)

    registry = registry_with(application=factory)

    def ask():
        asked.release()
        return get_application(registry)

    outcomes = at_once(ask, 64)
    assert len(seen) == 1
    assert outcomes == seen * 64


def test_factory_is_not_called_before_somebody_asks(made):
    registry = registry_with(application=made)
    assert made == []
    assert get_application(registry) is made[0]
    assert made[0].registry is registry


def test_request_has_each_application_under_its_name(made):
    other = Made()
    config = configurator()
    config.add_application(made)
    config.add_application(other, name="stock")
    config.add_route("home", "/")
    config.add_view(
        lambda request: Response(f"{id(request.application)} {id(request.stock)}"),
        route_name="home",
    )
    wsgi = TestApp(config.make_wsgi_app())
    bodies = {wsgi.get("/").text for _ in range(3)}
    assert bodies == {f"{id(made[0])} {id(other[0])}"}
    assert (len(made), len(other)) == (1, 1)


def test_request_sees_the_new_instance_after_close(made):
    config = configurator()
    config.add_application(made)
    config.add_route("home", "/")
    config.add_view(lambda request: Response(str(request.application.closed)), route_name="home")
    wsgi = TestApp(config.make_wsgi_app())
    assert wsgi.get("/").text == "0"
    close_application(wsgi.app.registry)
    assert wsgi.get("/").text == "0"
    assert [shop.closed for shop in made] == [1, 0]


def test_two_registries_have_an_instance_each(made):
    first, second = registry_with(application=made), registry_with(application=made)
    assert get_application(first) is not get_application(second)
    close_application(first)
    assert [shop.closed for shop in made] == [1, 0]


def test_factory_may_return_none():
    calls = []
    registry = registry_with(application=calls.append)
    assert get_application(registry) is None
    assert get_application(registry) is None
    assert calls == [registry]


# -- init and close ------------------------------------------------------------------------


def test_init_makes_the_instance_that_get_returns(made):
    registry = registry_with(application=made)
    assert init_application(registry) is made[0]
    assert get_application(registry) is made[0]


@pytest.mark.parametrize("first", [init_application, get_application])
def test_initialising_twice_is_an_error(made, first):
    registry = registry_with(stock=made)
    first(registry, "stock")
    with pytest.raises(ApplicationAlreadyMade, match=rf"process {os.getpid()} .*'stock' already"):
        init_application(registry, "stock")
    assert len(made) == 1


def test_one_of_many_threads_that_initialise_succeeds(made):
    registry = registry_with(application=made)
    outcomes = at_once(lambda: init_application(registry), 16)
    assert Counter(map(type, outcomes)) == {Shop: 1, ApplicationAlreadyMade: 15}


def test_after_close_there_is_a_new_instance_and_never_a_closed_one(made):
    registry = registry_with(application=made)
    first = get_application(registry)
    close_application(registry)
    assert first.closed == 1
    second = get_application(registry)
    assert second is not first
    assert second.closed == 0
    close_application(registry)
    assert init_application(registry) is made[2]


def test_closing_twice_or_before_anybody_asked_is_harmless(made):
    registry = registry_with(application=made)
    close_application(registry)
    assert made == []
    get_application(registry)
    close_application(registry)
    close_application(registry)
    assert made[0].closed == 1


def test_application_without_close_is_only_forgotten():
    registry = registry_with(application=lambda registry: object())
    first = get_application(registry)
    close_application(registry)
    assert get_application(registry) is not first


def test_application_that_fails_to_close_is_forgotten_all_the_same():
    class Stubborn:
        def close(self):
            raise OSError("no")

    registry = registry_with(application=lambda registry: Stubborn())
    first = get_application(registry)
    with pytest.raises(OSError, match="no"):
        close_application(registry)
    assert get_application(registry) is not first


def test_who_asks_while_it_is_closed_waits_and_gets_a_new_one(wait_for):
    closing, may_close, made = threading.Event(), threading.Event(), []

    class Slow(Shop):
        def close(self):
            closing.set()
            assert may_close.wait(10)
            super().close()

    def factory(registry):
        # What the old instance holds, a port say, is free before the new one is made.
        assert [shop.closed for shop in made] == [1] * len(made)
        made.append(Slow())
        return made[-1]

    registry = registry_with(application=factory)
    get_application(registry)
    closer = threading.Thread(target=close_application, args=[registry])
    closer.start()
    wait_for(closing)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(get_application(registry)))
    asker.start()
    asker.join(0.1)
    assert asker.is_alive()
    may_close.set()
    closer.join(10)
    asker.join(10)
    assert answers == [made[1]]
    assert made[1].closed == 0


def test_all_that_a_process_made_is_closed_the_last_made_first(caplog):
    closed = []

    class Named(Shop):
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            if self.name == "second":
                raise OSError("no")

    names = ["first", "second", "third"]
    registry = registry_with(**{name: lambda r, name=name: Named(name) for name in names})
    for name in names:
        get_application(registry, name)
    close_applications()
    assert closed == ["third", "second", "first"]
    assert caplog.messages == ["application 'second' could not be closed"]
    close_applications()
    assert len(closed) == 3


def test_application_that_another_one_asks_for_when_it_is_closed_is_closed_once_more(made):
    class Asking:
        def close(self):
            get_application(registry, "shop").close_log = True

    registry = registry_with(asking=lambda r: Asking(), shop=made)
    get_application(registry, "asking")
    get_application(registry, "shop")  # later, and so closed before
    close_applications()
    assert [shop.closed for shop in made] == [1, 1]


def test_process_may_close_while_a_factory_hangs(made, wait_for):
    begun, may_end = threading.Event(), threading.Event()

    def hangs(registry):
        begun.set()
        may_end.wait(10)

    registry = registry_with(application=made, hangs=hangs)
    get_application(registry)
    thread = threading.Thread(target=get_application, args=[registry, "hangs"])
    thread.start()
    wait_for(begun)
    close_applications()
    assert made[0].closed == 1
    may_end.set()
    thread.join(10)


# -- factories that fail or ask ------------------------------------------------------------


def test_factory_that_raises_leaves_nothing_and_the_next_asker_tries_again(made):
    errors = [OSError("first"), OSError("second")]

    def factory(registry):
        if errors:
            raise errors.pop(0)
        return made(registry)

    registry = registry_with(application=factory)
    with pytest.raises(OSError, match="first"):
        get_application(registry)
    with pytest.raises(OSError, match="second"):
        init_application(registry)
    assert get_application(registry) is made[0]
    assert len(made) == 1


def test_each_of_many_threads_gets_the_error_of_the_factory():
    def factory(registry):
        raise OSError("no database")

    registry = registry_with(application=factory)
    outcomes = at_once(lambda: get_application(registry), 16)
    assert [str(error) for error in outcomes] == ["no database"] * 16


def test_factory_that_asks_for_itself_gets_an_error_and_no_deadlock():
    registry = registry_with(application=get_application)
    with pytest.raises(ApplicationAsksForItself, match="'application' asks for itself: "):
        get_application(registry)


def test_factories_that_ask_in_a_circle_get_an_error_that_shows_it():
    registry = registry_with(
        orders=lambda registry: get_application(registry, "stock"),
        stock=lambda registry: get_application(registry, "orders"),
    )
    with pytest.raises(ApplicationAsksForItself) as caught:
        get_application(registry, "orders")
    assert str(caught.value) == "application 'orders' asks for itself: orders -> stock -> orders"


def test_circle_that_two_threads_enter_from_both_ends_is_no_deadlock(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 5.0)
    both = threading.Barrier(2)

    def asks_for(name):
        def factory(registry):
            # Under one lock the other thread cannot come here; under two locks it does.
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return get_application(registry, name)

        return factory

    registry = registry_with(orders=asks_for("stock"), stock=asks_for("orders"))
    names = iter(["orders", "stock"])
    outcomes = at_once(lambda: get_application(registry, next(names)), 2)
    assert [type(outcome) for outcome in outcomes] == [ApplicationAsksForItself] * 2


def test_factory_may_ask_for_another_application(made):
    registry = registry_with(
        orders=lambda registry: [get_application(registry, "stock")], stock=made
    )
    assert get_application(registry, "orders") == made
    assert get_application(registry, "stock") is made[0]


def test_factory_may_ask_for_itself_in_another_try(made):
    tries = []

    def factory(registry):
        tries.append(1)
        return get_application(registry) if len(tries) == 1 else made(registry)

    registry = registry_with(application=factory)
    with pytest.raises(ApplicationAsksForItself):
        get_application(registry)
    assert get_application(registry) is made[0]


def test_wait_for_a_factory_that_hangs_ends_with_an_error(monkeypatch, wait_for):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    begun, may_end = threading.Event(), threading.Event()

    def hangs(registry):
        begun.set()
        may_end.wait(10)

    registry = registry_with(stock=hangs, orders=Shop)
    thread = threading.Thread(target=get_application, args=[registry, "stock"])
    thread.start()
    wait_for(begun)
    with pytest.raises(ApplicationBusy) as caught:
        get_application(registry, "orders")
    may_end.set()
    thread.join(10)
    assert str(caught.value) == (
        "application 'orders': waited 0.05 s for another thread that makes stock"
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ApplicationNotDeclared("a", ()), "'a': config.add_application declared none"),
        (ApplicationNotDeclared("a", ("b", "c")), "declared b, c"),
        (ApplicationAlreadyMade("a", 7), "process 7 has an application 'a' already"),
        (ApplicationAsksForItself(("a", "b", "a")), "a -> b -> a"),
        (ApplicationBusy("a", 60.0, ("b",)), "waited 60 s for another thread that makes b"),
        (ApplicationBusy("a", 60.0, ()), "waited 60 s for another thread that closes one"),
    ],
)
def test_errors_survive_pickling_and_say_what_is_wrong(error, text):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert text in str(copy)


@pytest.mark.parametrize("ask", [init_application, get_application, close_application])
def test_name_that_nobody_declared_is_an_error_that_tells_the_names(made, ask):
    with pytest.raises(ApplicationNotDeclared, match=r"'aplication': .* declared application"):
        ask(registry_with(application=made), "aplication")


# -- the directive -------------------------------------------------------------------------


def test_dotted_name_is_resolved(made):
    registry = registry_with(application="collections.Counter")
    assert isinstance(get_application(registry), Counter)


def test_dotted_name_that_does_not_exist_fails_at_once():
    with pytest.raises(ImportError):
        configurator().add_application("collections.nowhere.to_be_found")


def test_factory_that_cannot_be_called_is_refused_at_once():
    with pytest.raises(TypeError, match=r"application 'stock': the factory .* cannot be called"):
        configurator().add_application("collections.__doc__", name="stock")


def test_second_declaration_of_a_name_conflicts_with_file_and_line(made):
    config = configurator()
    config.add_application(made)
    config.add_application(made)
    with pytest.raises(ConfigurationConflictError) as caught:
        config.commit()
    text = str(caught.value)
    assert "For: ('pyramid_async.application', 'application')" in text
    line = test_second_declaration_of_a_name_conflicts_with_file_and_line.__code__.co_firstlineno
    assert f"Line {line + 2} of file {__file__}" in text
    assert f"Line {line + 3} of file {__file__}" in text


def test_application_overrides_what_an_included_package_declared(made):
    def package(config):
        config.add_application(lambda registry: "theirs", eager=True)

    config = configurator()
    config.include(package)
    config.add_application(made)
    wsgi = config.make_wsgi_app()
    assert made == []  # that the package's was eager does not count
    assert get_application(wsgi.registry) is made[0]


def test_application_declared_anew_keeps_the_open_instance_until_it_is_closed(made):
    config = configurator(autocommit=True)
    config.add_application(made)
    first = get_application(config.registry)
    config.add_application(lambda registry: "new")
    assert get_application(config.registry) is first
    close_application(config.registry)
    assert get_application(config.registry) == "new"


def test_declaration_is_an_introspectable(made):
    config = configurator()
    config.add_application(made, name="stock", eager=True)
    config.commit()
    found = config.introspector.get("pyramid_async applications", "stock")
    assert found.type_name == "application"
    assert dict(found) == {"name": "stock", "factory": made, "eager": True}


# -- eager ---------------------------------------------------------------------------------


def test_eager_application_is_made_at_start_up(made):
    config = configurator()
    config.add_application(made, eager=True)
    config.commit()
    assert made == []
    wsgi = config.make_wsgi_app()
    assert get_application(wsgi.registry) is made[0]
    assert len(made) == 1


def test_eager_factory_that_raises_stops_the_start_up():
    def factory(registry):
        raise OSError("no database")

    config = configurator()
    config.add_application(factory, eager=True)
    with pytest.raises(OSError, match="no database"):
        config.make_wsgi_app()


class GunicornArbiter:
    def spawn_worker(self):
        """The method that tells the arbiter from a worker."""

    def signal(self, *signal):
        """What it does at any signal."""


def billiard(name):
    return SimpleNamespace(current_process=lambda: SimpleNamespace(name=name))


@pytest.mark.parametrize(
    ("loaded", "handler", "at_start"),
    [
        ({"uwsgi": SimpleNamespace(worker_id=lambda: 0)}, None, 0),
        ({"uwsgi": SimpleNamespace(worker_id=lambda: 2)}, None, 1),
        ({"gunicorn.arbiter": None}, signal.SIG_DFL, 0),
        ({"gunicorn.arbiter": None}, GunicornArbiter().signal, 0),
        ({"gunicorn.arbiter": None}, SimpleNamespace().__eq__, 1),
        ({"celery.bin.worker": None, "billiard.process": billiard("MainProcess")}, None, 0),
        ({"celery.bin.worker": None, "billiard.process": billiard("ForkPoolWorker-1")}, None, 1),
    ],
)
def test_eager_application_waits_for_a_request_where_the_process_may_only_fork(
    made, monkeypatch, loaded, handler, at_start
):
    for name, server in loaded.items():
        monkeypatch.setitem(sys.modules, name, server)
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    config = configurator()
    config.add_application(made, eager=True)
    wsgi = TestApp(config.make_wsgi_app())
    assert len(made) == at_start
    wsgi.get("/", status=404)
    wsgi.get("/", status=404)
    assert len(made) == 1


# -- forks and exits -----------------------------------------------------------------------

SCRIPT = """
import atexit, os, sys, threading
from pyramid.config import Configurator
from pyramid_async import application
from pyramid_async.application import *

role = "parent"

def log(*words):
    os.write(1, (" ".join((role, *words)) + "\\n").encode())

class Shop:
    def __init__(self, registry):
        self.maker = role
        log("made")

    def close(self):
        log("closed what", self.maker, "made")

def fork(function):
    global role
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    role = "child"
    function()
    sys.exit()

def declare(factory=Shop, **kw):
    config = Configurator()
    config.include("pyramid_async")
    config.add_application(factory, **kw)
    config.commit()
    return config

def get():
    return application.get_application(registry)
"""


def run(script):
    """Run a script after SCRIPT in an interpreter of its own; return the lines it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script],
        # Others' warnings (pkg_resources, a fork beside threads) are not this test's subject.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_child_forgets_after_a_fork_and_makes_its_own():
    lines = run("""
registry = declare().registry
first = get()
fork(lambda: log("has another one" if get() is not first else "has its parent's"))
log("has the same" if get() is first else "has another one")
""")
    assert lines == [
        "parent made",
        "child made",
        "child has another one",
        "child closed what child made",
        "parent has the same",
        "parent closed what parent made",
    ]


def test_child_that_asks_for_nothing_closes_nothing():
    lines = run("""
registry = declare().registry
get()
fork(lambda: application.close_application(registry))
""")
    assert lines == ["parent made", "parent closed what parent made"]


def test_what_the_parent_made_is_not_dropped_by_its_child():
    lines = run("""
class Connected(Shop):
    def __del__(self):
        if role == "child":
            os.write(1, b"child ended the parent's connection\\n")

registry = declare(Connected).registry
get()

def child():
    application.close_application(registry)
    import gc
    gc.collect()
    log("works")
    os._exit(0)

fork(child)
""")
    assert lines == ["parent made", "child works", "parent closed what parent made"]


def test_grandchild_makes_its_own():
    lines = run("""
registry = declare().registry
get()

def child():
    get()
    fork(get)

fork(child)
""")
    assert lines.count("child made") == 2
    assert lines.count("child closed what child made") == 2
    assert lines[-1] == "parent closed what parent made"


def test_child_is_not_held_up_by_a_lock_that_was_held_when_its_parent_forked():
    lines = run("""
application.PATIENCE = 2
begun, may_end = threading.Event(), threading.Event()

def factory(registry):
    if role == "parent":
        begun.set()
        may_end.wait(20)
    return Shop(registry)

registry = declare(factory).registry
thread = threading.Thread(target=get)
thread.start()
begun.wait(20)
fork(get)
may_end.set()
thread.join(20)
""")
    assert lines == [
        "child made",
        "child closed what child made",
        "parent made",
        "parent closed what parent made",
    ]


def test_eager_application_is_made_anew_by_the_first_request_in_a_child():
    lines = run("""
from webtest import TestApp

config = declare(eager=True)
config.add_route("home", "/")
config.add_view(lambda request: log("views") or {}, route_name="home", renderer="json")
wsgi = TestApp(config.make_wsgi_app())
fork(lambda: [wsgi.get("/") for _ in range(2)])
""")
    assert lines == [
        "parent made",
        "child made",
        "child views",
        "child views",
        "child closed what child made",
        "parent closed what parent made",
    ]


@pytest.mark.parametrize("leave", ["", "sys.exit()", "raise SystemExit(0)"])
def test_application_is_closed_at_the_exit(leave):
    lines = run(f"""
registry = declare().registry
threading.Thread(target=get).start()
{leave}
""")
    assert lines == ["parent made", "parent closed what parent made"]


def test_work_that_ends_while_the_process_leaves_still_has_its_application():
    lines = run("""
registry = declare().registry
atexit.register(lambda: log("drains with what", get().maker, "made"))
get()
""")
    assert lines == [
        "parent made",
        "parent drains with what parent made",
        "parent closed what parent made",
    ]


# -- real servers --------------------------------------------------------------------------

PATIENCE = 45.0  # seconds, on a busy machine

SERVED = """
import os, time
from pyramid.config import Configurator
from pyramid.response import Response

def log(event):
    with open("log", "a") as file:
        file.write(f"{event} {os.getpid()}\\n")

class Shop:
    def __init__(self, registry):
        time.sleep(0.05)  # others ask meanwhile
        log("made")

    def close(self):
        log("closed")

def home(request):
    request.application
    time.sleep(0.02)  # the other workers get requests, too
    log("served")
    return Response()

log("loaded")
with Configurator() as config:
    config.include("pyramid_async")
    config.add_application(Shop, eager="EAGER" in os.environ)
    config.add_route("home", "/")
    config.add_view(home, route_name="home")
app = config.make_wsgi_app()
log("ready")
"""

GUNICORN = "-m gunicorn served:app --bind unix:socket --workers 2 --no-control-socket"
UWSGI = (
    f"{Path(sys.executable).with_name('uwsgi')} --http-socket socket --module served:app"
    f" --virtualenv {sys.prefix} --enable-threads --threads 4 --die-on-term"
)
# A uWSGI worker that is told to end while it is busy leaves without running any exit handler.
GRACEFUL = "--hook-master-start 'unix_signal:15 gracefully_kill_them_all'"
MASTER = f"{UWSGI} --master --processes 2 {GRACEFUL}"
CELERY = "-m celery -A tasks worker --pool prefork --concurrency 2"


class Directory:
    """Where a server runs: its modules, its socket, and the log that its processes write."""

    def __init__(self, path):
        self.path = path
        self.server = None

    def start(self, command, **environment):
        interpreter = [sys.executable] if command.startswith("-m") else []
        with (self.path / "output").open("w") as output:
            self.server = subprocess.Popen(
                [*interpreter, *shlex.split(command)],
                cwd=self.path,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{self.path}", **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, script):
        """Run a script that may import the server's modules; return what it wrote."""
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{self.path}"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=50,
            check=True,
        )
        return done.stdout

    def stop(self, number=signal.SIGTERM):
        self.server.send_signal(number)
        self.server.wait(PATIENCE)

    def kill(self):
        if self.server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait(PATIENCE)

    def pids(self, event):
        """Return the ids of the processes that logged the event, one for each time."""
        log = self.path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(pid) for word, pid in map(str.split, lines) if word == event]

    def serving(self):
        """Return the ids of the processes that served something."""
        return sorted(set(self.pids("served")))

    def get(self):
        """Answer a request over the server's socket with its status."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        with contextlib.closing(connection):
            connection.sock.connect(str(self.path / "socket"))
            connection.request("GET", "/")
            return connection.getresponse().status


@pytest.fixture
def directory(tmp_path_factory):
    # The name of a socket must be short.
    directory = Directory(tmp_path_factory.mktemp("s"))
    (directory.path / "served.py").write_text(SERVED)
    yield directory
    directory.kill()


def requests_reach(workers, directory, status=200):
    """Make 64 requests at once; return True when so many processes have served some."""
    assert at_once(directory.get, 64) == [status] * 64
    return len(directory.serving()) == workers


def tasks_reach(workers, directory, wait_for):
    """Send 32 messages; return True when so many processes have served some."""
    before = len(directory.pids("served"))
    directory.run(SEND_32)
    # The worker would read a message while it is written.
    for message in (directory.path / "written").iterdir():
        message.rename(directory.path / "queue" / message.name)
    wait_for(lambda: len(directory.pids("served")) == before + 32, PATIENCE)
    return len(directory.serving()) == workers


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.mark.services
@pytest.mark.parametrize("eager", [{}, {"EAGER": "1"}], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    ("command", "workers", "forks"),
    [
        pytest.param(command, workers, forks, id=name, marks=needs(package))
        for package, name, command, workers, forks in [
            ("gunicorn", "gunicorn", GUNICORN, 2, False),
            ("gunicorn", "preload", f"{GUNICORN} --preload", 2, True),
            ("gunicorn", "threads", f"{GUNICORN} --threads 4", 2, False),
            ("gunicorn", "threads-preload", f"{GUNICORN} --threads 4 --preload", 2, True),
            ("pyuwsgi", "uwsgi", MASTER, 2, True),
            ("pyuwsgi", "uwsgi-hooks", f"{MASTER} --py-call-uwsgi-fork-hooks", 2, True),
            ("pyuwsgi", "uwsgi-lazy-apps", f"{MASTER} --lazy-apps", 2, False),
            ("pyuwsgi", "uwsgi-alone", UWSGI, 1, True),
        ]
    ],
)
def test_server_has_one_application_in_each_process_that_serves_and_closes_it(
    directory, wait_for, command, workers, forks, eager
):
    directory.start(command, **eager)
    wait_for(lambda: len(directory.pids("ready")) == (1 if forks else workers), PATIENCE)
    wait_for((directory.path / "socket").exists)
    # At the start, where the loading process is known to serve; in a master never.
    assert len(directory.pids("made")) == (workers if eager and not forks else 0)
    wait_for(lambda: requests_reach(workers, directory), PATIENCE)
    assert sorted(directory.pids("made")) == directory.serving()
    directory.stop(signal.SIGHUP if command == UWSGI else signal.SIGTERM)
    assert sorted(directory.pids("closed")) == directory.serving()
    assert len(directory.pids("loaded")) == (1 if forks else workers)


@pytest.mark.services
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(f"{GUNICORN} --preload", id="preload", marks=needs("gunicorn")),
        pytest.param(MASTER, id="uwsgi", marks=needs("pyuwsgi")),
    ],
)
def test_worker_does_not_use_what_its_master_asked_for_before_the_fork(
    directory, wait_for, command
):
    asks = "from pyramid_async import get_application\nget_application(app.registry)\n"
    (directory.path / "served.py").write_text(SERVED + asks)
    directory.start(command)
    wait_for((directory.path / "socket").exists, PATIENCE)
    wait_for(lambda: requests_reach(2, directory), PATIENCE)
    master = directory.server.pid
    assert sorted(directory.pids("made")) == sorted([master, *directory.serving()])
    directory.stop()
    # gunicorn's master closes what it made, uWSGI's runs no exit handlers.
    assert sorted({*directory.pids("closed")} - {master}) == directory.serving()


# Hooks by which an eager application is made at the start in spite of the fork, as documented.
GUNICORN_HOOK = """
from pyramid_async.application import get_application

def post_worker_init(worker):
    get_application(worker.wsgi.registry)
"""
UWSGI_HOOK = """
from uwsgidecorators import postfork
from pyramid_async.application import get_application

@postfork
def make():
    get_application(app.registry)
"""


@pytest.mark.services
@pytest.mark.parametrize(
    ("command", "module", "hook"),
    [
        pytest.param(
            f"{GUNICORN} --preload", "gunicorn.conf.py", GUNICORN_HOOK, marks=needs("gunicorn")
        ),
        pytest.param(GUNICORN, "gunicorn.conf.py", GUNICORN_HOOK, marks=needs("gunicorn")),
        pytest.param(MASTER, "served.py", SERVED + UWSGI_HOOK, marks=needs("pyuwsgi")),
    ],
    ids=["preload", "gunicorn", "uwsgi"],
)
def test_hook_of_the_server_makes_the_application_right_after_the_fork(
    directory, wait_for, command, module, hook
):
    (directory.path / module).write_text(hook)
    directory.start(command, EAGER="1")
    wait_for(lambda: len(directory.pids("made")) == 2, PATIENCE)
    wait_for((directory.path / "socket").exists)
    assert at_once(directory.get, 32) == [200] * 32
    directory.stop()
    assert len(set(directory.pids("made"))) == len(directory.pids("made")) == 2
    assert sorted(directory.pids("closed")) == sorted(directory.pids("made"))


# -- Celery --------------------------------------------------------------------------------

CELERY_SETTINGS = """
broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": "queue",
    "data_folder_out": "written",
    "control_folder": "control",
    "polling_interval": 0.02,
}
task_ignore_result = True
worker_enable_remote_control = False
"""

TASKS = """
import os, time
from celery import Celery, signals
from pyramid_async.application import close_applications, get_application

celery = Celery()
celery.config_from_object("celeryconfig")

if "IN_CHILD" in os.environ:
    @signals.worker_process_init.connect
    def load(**kw):
        import served
else:
    import served

@signals.worker_process_shutdown.connect
def close(**kw):
    close_applications()

@celery.task
def use():
    import served
    get_application(served.app.registry)
    time.sleep(0.02)
    served.log("served")
"""

SEND_32 = """
from celery import Celery
celery = Celery()
celery.config_from_object("celeryconfig")
for _ in range(32):
    celery.send_task("tasks.use")
"""


@pytest.fixture
def celery_directory(directory):
    for name in ("written", "queue", "control"):
        (directory.path / name).mkdir()
    (directory.path / "celeryconfig.py").write_text(CELERY_SETTINGS)
    (directory.path / "tasks.py").write_text(TASKS)
    return directory


@pytest.mark.services
@needs("celery")
@pytest.mark.parametrize("eager", [{}, {"EAGER": "1"}], ids=["lazy", "eager"])
@pytest.mark.parametrize("where", [{}, {"IN_CHILD": "1"}], ids=["in-master", "in-child"])
def test_celery_worker_has_one_application_in_each_pool_process_and_closes_it(
    celery_directory, wait_for, where, eager
):
    directory = celery_directory
    directory.start(CELERY, **where, **eager)
    wait_for(lambda: len(directory.pids("ready")) == (2 if where else 1), PATIENCE)
    if where and eager:
        wait_for(lambda: len(directory.pids("made")) == 2)
    else:
        assert directory.pids("made") == []
    wait_for(lambda: tasks_reach(2, directory, wait_for), PATIENCE)
    assert directory.server.pid not in directory.serving()
    assert sorted(directory.pids("made")) == directory.serving()
    directory.stop()
    assert sorted(directory.pids("closed")) == directory.serving()


# -- a real application --------------------------------------------------------------------

# The example of the documents.
KENNEL = (ROOT / "docs" / "examples" / "kennel.py").read_text("utf-8")

COUNT_EVENTS = """
import kennel
application = kennel.kennel(None)
log = application.notification_log
total = last = 0
while events := log.select(start=last + 1, limit=10):
    total, last = total + len(events), events[-1].id
print(total)
"""


@pytest.mark.services
@needs("eventsourcing")
@needs("gunicorn")
def test_eventsourcing_application_stores_each_event_once_from_views_and_jobs(directory, wait_for):
    (directory.path / "kennel.py").write_text(KENNEL)
    directory.start(f"{GUNICORN} --threads 16 --preload".replace("served:app", "'kennel:main()'"))
    wait_for((directory.path / "socket").exists, PATIENCE)
    wait_for(lambda: requests_reach(2, directory, 202), PATIENCE)
    wait_for(lambda: len(directory.pids("taught")) == len(directory.pids("served")), PATIENCE)
    assert (
        sorted(directory.pids("made")) == directory.serving() == sorted({*directory.pids("taught")})
    )
    directory.stop()
    assert sorted(directory.pids("closed")) == directory.serving()
    # Each dog was registered and learned a trick.
    assert int(directory.run(COUNT_EVENTS)) == 2 * len(directory.pids("served"))
