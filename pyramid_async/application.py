"""One application object per process: declared once, made when first asked for, closed at the end.

``factory(registry)`` is called once in a process, under a lock.  A child forgets after a fork what
its parent made, and makes its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .interfaces import AsyncError

log = logging.getLogger(__name__)

# Longest time that a thread waits while another one makes or closes an application, seconds.
PATIENCE = 60.0

_DECLARED = "pyramid_async.applications"
_MISSING = object()


class ApplicationNotDeclared(AsyncError, LookupError):
    """No ``config.add_application`` declared an application of this name (name, declared)."""

    def __str__(self) -> str:
        name, declared = self.args
        names = ", ".join(declared) or "none"
        return f"no application {name!r}: config.add_application declared {names}"


class ApplicationAlreadyMade(AsyncError, RuntimeError):
    """This process has an instance already (name, pid)."""

    def __str__(self) -> str:
        name, pid = self.args
        return (
            f"process {pid} has an application {name!r} already;"
            " get_application returns it, close_application makes room for another"
        )


class ApplicationAsksForItself(AsyncError, RuntimeError):
    """A factory asked for what is being made, itself or through others (names, outermost first)."""

    def __str__(self) -> str:
        return f"application {self.args[0][-1]!r} asks for itself: {' -> '.join(self.args[0])}"


class ApplicationBusy(AsyncError, RuntimeError):
    """Another thread made or closed an application for too long (name, seconds, making)."""

    def __str__(self) -> str:
        name, seconds, making = self.args
        doing = f"makes {', '.join(making)}" if making else "closes one"
        return f"application {name!r}: waited {seconds:g} s for another thread that {doing}"


# -- the directive ---------------------------------------------------------------------


def add_application(
    config: Any,
    factory: Callable[[Any], Any] | str,
    name: str = "application",
    eager: bool = False,
) -> None:
    """Declare an application: ``request.<name>`` is what ``factory(registry)`` returned.

    The factory is called when the application is first asked for, in whatever thread asks.
    When it raises, nothing is kept, the asker gets the error, and the next asker tries again.

    With ``eager=True`` it is called when the WSGI application was created, so that a failing
    factory stops the start-up; but never in a process that only forks others.  Pyramid sends
    ApplicationCreated where the application is loaded, and that is such a process under
    ``gunicorn --preload``, uWSGI without ``lazy-apps`` and a Celery worker.  So where one of
    these servers is loaded, it must be known that this process is one of its workers; else, and
    in any child that inherited the loaded application, the process's first request makes it,
    before its view is looked for.  Nothing is made by a hook right after a fork: uWSGI does not
    run Python's, gunicorn changes the user only later, and children of ``multiprocessing``, which
    serve nothing, run it too.

    *factory* may be a dotted name.  Two declarations of one name conflict.
    """
    factory = config.maybe_dotted(factory)
    if not callable(factory):
        raise TypeError(f"application {name!r}: the factory {factory!r} cannot be called")

    def instance(request: Any) -> Any:
        return get_application(request.registry, name)

    def register() -> None:
        declared = config.registry.setdefault(_DECLARED, {})
        # Declared anew after a commit, it keeps its key, and so the instance that may be open.
        declared.setdefault(name, Declaration(name)).factory = factory
        if eager:
            config.add_subscriber(make_at_start, "pyramid.events.ApplicationCreated")
            config.add_subscriber(make_at_request, "pyramid.events.NewRequest")

    def make_at_start(event: Any) -> None:
        if _may_serve():
            get_application(event.app.registry, name)

    def make_at_request(event: Any) -> None:
        get_application(event.request.registry, name)

    config.add_request_method(instance, name, property=True)
    introspectable = config.introspectable(
        "pyramid_async applications", name, config.object_description(factory), "application"
    )
    introspectable.update(name=name, factory=factory, eager=eager)
    config.action(("pyramid_async.application", name), register, introspectables=(introspectable,))


# -- init, get, close ------------------------------------------------------------------


def init_application(registry: Any, name: str = "application") -> Any:
    """Make this process's instance and return it; raise ApplicationAlreadyMade if there is one."""
    declaration, process = _declaration(registry, name), _this_process()
    with process.exclusively(name):
        if declaration in process.instances:
            raise ApplicationAlreadyMade(name, os.getpid())
        return process.make(declaration, registry)


def get_application(registry: Any, name: str = "application") -> Any:
    """Return this process's instance; make it if there is none, or none since it was closed.

    Any number of threads may ask at once.  Raises what the factory raises, ApplicationBusy
    after `PATIENCE` seconds in which another thread was not done, and ApplicationAsksForItself
    in the factory's own thread.
    """
    declaration, process = _declaration(registry, name), _this_process()
    instance = process.instances.get(declaration, _MISSING)
    if instance is not _MISSING:
        return instance
    with process.exclusively(name):
        if declaration in process.instances:
            return process.instances[declaration]
        return process.make(declaration, registry)


def close_application(registry: Any, name: str = "application") -> None:
    """Forget this process's instance and call its ``close()``, if there are such."""
    declaration, process = _declaration(registry, name), _this_process()
    with process.exclusively(name):
        _close(process.instances.pop(declaration, None))


def close_applications() -> None:
    """Close whatever this process made, the last made first; log what their ``close()`` raise.

    Runs at the interpreter's exit.  A process that leaves by ``os._exit``, as Celery's pool
    does, must call it.
    """
    instances = _this_process().instances
    _close_all(instances)
    # What was closed and made anew, because the close() of another one asked for it.
    _close_all(instances)


def _close_all(instances: dict[Declaration, Any]) -> None:
    # Without the lock: a process must be able to leave while some factory hangs.
    for declaration in reversed(list(instances)):
        try:
            _close(instances.pop(declaration, None))
        except Exception:
            log.exception("application %r could not be closed", declaration.name)


# At import, so that it runs after what is registered when work begins: jobs that end while the
# process leaves still have their application.
atexit.register(close_applications)


def _close(instance: Any) -> None:
    close = getattr(instance, "close", None)
    if close is not None:
        close()


class Declaration:
    """A name and its factory; one object for each registry and name."""

    factory: Callable[[Any], Any]

    def __init__(self, name: str) -> None:
        self.name = name


def _declaration(registry: Any, name: str) -> Declaration:
    declared: dict[str, Declaration] = registry.get(_DECLARED, {})
    if name not in declared:
        raise ApplicationNotDeclared(name, tuple(sorted(declared)))
    return declared[name]


class Process:
    """What one process made, in that order.

    One lock for all names and registries, so that factories that ask for one another's
    application from two threads end in an error and not in a deadlock.
    """

    def __init__(self) -> None:
        self.instances: dict[Declaration, Any] = {}
        self._lock = threading.RLock()
        self._making: list[Declaration] = []

    @contextmanager
    def exclusively(self, name: str) -> Iterator[None]:
        """Hold the lock, or raise ApplicationBusy."""
        if not self._lock.acquire(timeout=PATIENCE):
            raise ApplicationBusy(name, PATIENCE, self._names())
        try:
            yield
        finally:
            self._lock.release()

    def make(self, declaration: Declaration, registry: Any) -> Any:
        """Call the factory and keep what it returns.  The caller holds the lock."""
        if declaration in self._making:
            raise ApplicationAsksForItself((*self._names(), declaration.name))
        self._making.append(declaration)
        try:
            instance = self.instances[declaration] = declaration.factory(registry)
        finally:
            self._making.pop()
        return instance

    def _names(self) -> tuple[str, ...]:
        return tuple(declaration.name for declaration in self._making)


# By process id, because uWSGI forks without running Python's fork hooks.  What a parent made stays
# here in its children, unused: to drop it would end connections that the parent goes on using.
_processes: dict[int, Process] = {}


def _this_process() -> Process:
    # setdefault is atomic; a lock around it could be one that was held when the parent forked.
    return _processes.get(os.getpid()) or _processes.setdefault(os.getpid(), Process())


# -- who serves ------------------------------------------------------------------------


def _may_serve() -> bool:
    """Return False in a process that may only fork those that serve."""
    return all(is_worker() for module, is_worker in _WORKERS.items() if module in sys.modules)


def will_fork() -> bool:
    """Return True in a process that only forks those that serve, where its server tells."""
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is None:
        return "gunicorn.arbiter" in sys.modules and not _is_gunicorn_worker()
    return uwsgi.worker_id() == 0 and bool(uwsgi.masterpid() or uwsgi.numproc > 1)


def _is_gunicorn_worker() -> bool:
    # A worker takes this signal before it loads the application, also one that leaves the others
    # to asyncio or uvicorn; the arbiter after it did, and by itself.
    handler = signal.getsignal(signal.SIGUSR1)
    return callable(handler) and not hasattr(getattr(handler, "__self__", None), "spawn_worker")


# Servers that fork after they may have loaded the application, each by a module that only their
# processes have, and how their workers are known.
_WORKERS: dict[str, Callable[[], bool]] = {
    "gunicorn.arbiter": _is_gunicorn_worker,
    "uwsgi": lambda: sys.modules["uwsgi"].worker_id() > 0,
    "celery.bin.worker": lambda: (
        sys.modules["billiard.process"].current_process().name != "MainProcess"
    ),
}
