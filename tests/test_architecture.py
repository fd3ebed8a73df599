"""The modules of the package, what each may import, and that importing them starts nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from zope.interface.verify import verifyObject

from pyramid_async.interfaces import IExecutor, IJobStore, IJobTable
from pyramid_async.ram import RamStore
from pyramid_async.transactional import OwnManager
from pyramid_async.zodb import ZodbStore

PACKAGE = "pyramid_async"
HERE = Path(__file__).parent.parent / PACKAGE

# module: the modules of ours (*: all that stand before it) and the packages of others that it may
# import; lower ones first.
MAP = {
    "interfaces": ("", "zope"),
    "jobs": ("interfaces", "persistent"),
    "transactional": ("", "transaction"),
    "conflicts": ("transactional", "ZODB"),
    "context": ("interfaces transactional", "persistent transaction ZODB"),
    "connections": ("interfaces transactional", "transaction ZODB"),
    "process": ("", ""),
    "application": ("interfaces", ""),
    "current": ("interfaces jobs process", ""),
    "exits": ("current", ""),
    "ram": ("interfaces jobs process conflicts connections context", "persistent ZODB zope"),
    "zeo": ("", ""),
    "zodb": (
        "interfaces jobs process conflicts connections context transactional zeo",
        "BTrees persistent ZODB zope",
    ),
    "failures": ("interfaces jobs", "transaction ZODB"),
    "watch": ("failures", ""),
    "tries": ("interfaces jobs transactional current failures watch", "transaction ZODB"),
    "worker": ("interfaces jobs process transactional current failures tries", "transaction"),
    "threads": ("interfaces jobs exits tries worker", "transaction zope"),
    "timers": ("process", ""),
    "signs": ("jobs process transactional", "persistent"),
    "recovery": ("interfaces jobs process signs timers transactional", "transaction ZODB"),
    "standalone": ("current exits zodb worker threads recovery", ""),
    "scheduler": (
        "interfaces jobs process transactional ram zodb worker standalone",
        "persistent transaction zope",
    ),
    # From here on Pyramid is known.
    "requests": ("jobs tries", "pyramid pyramid_tm"),
    "documents": ("interfaces jobs", "pyramid"),
    "cors": ("interfaces", "pyramid"),
    "inputs": ("documents", ""),
    "resources": ("interfaces documents inputs cors", "pyramid transaction"),
    "waiting": ("interfaces jobs exits documents inputs", ""),
    "results": ("jobs documents", "pyramid"),
    "listing": ("jobs documents inputs", ""),
    "views": (
        "interfaces jobs documents inputs cors resources waiting results listing",
        "pyramid",
    ),
    "manage": ("interfaces jobs process transactional documents", "transaction"),
    "pages": ("interfaces jobs documents inputs resources views manage", "pyramid"),
    "client": ("inputs resources", "pyramid"),
    "jsonrpc": ("interfaces jobs documents resources views", "pyramid"),
    "openapi": ("jobs documents resources listing client jsonrpc", "pyramid"),
    "settings": ("jobs", ""),
    "config": ("*", "pyramid pyramid_zodbconn"),
    "__init__": ("interfaces jobs application current config", ""),
    "bells": ("", "celery kombu"),
    "consumer": ("bells", "celery kombu"),
    "hints": ("", ""),
    "prefork": ("interfaces", ""),
    # Nobody imports these.
    "celery": (
        "interfaces jobs application transactional tries worker settings bells consumer hints"
        " prefork",
        "billiard celery click pyramid transaction zope",
    ),
    "cli": ("interfaces jobs documents manage config", "pyramid zc"),
    "testing": (
        "interfaces jobs transactional tries recovery scheduler",
        "transaction ZODB zope",
    ),
}
LEAVES = {"celery", "cli", "testing", "__init__"}
NAMELESS = {"base", "common", "helpers", "misc", "util", "utilities", "utils"}


def modules():
    """Return the package's modules that exist, by their dotted names below the package."""
    paths = sorted(HERE.rglob("*.py"))
    return {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in paths}


def imported(source):
    """Return the dotted names that a module of the package imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            names.update(f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"__import__", "import_module"}:
            names.update(imported_by_call(node))
    return names


def called(node):
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def imported_by_call(node):
    """Return the name given to ``import_module``; one that is computed cannot be judged."""
    first = node.args[0] if node.args else None
    if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
        return set()
    return {f"{PACKAGE}{first.value}" if first.value.startswith(".") else first.value}


def ours_and_others(source):
    """Split a module's imports into modules of ours and top-level packages of others."""
    ours, others = set(), set()
    for name in imported(source):
        top, *below = name.split(".")
        if top != PACKAGE:
            others.add(top)
        else:
            known = below and (below[0] in MAP or below[0] in modules())
            ours.add(below[0] if known else "__init__")
    return ours, others - sys.stdlib_module_names - {"annotationlib"}  # which 3.14 brings


def violations(module, source):
    """Return a sentence for each import of the module that is not on the map."""
    ours, others = ours_and_others(source)
    wrong = (ours - allowed_of_ours(module)) | (others - set(MAP[module][1].split()))
    return [f"{module} imports {name}" for name in sorted(wrong)]


def allowed_of_ours(module):
    names = MAP[module][0]
    return set(list(MAP)[: list(MAP).index(module)]) if names == "*" else set(names.split())


def test_the_map_shows_every_module_and_no_other():
    assert set(modules()) == set(MAP)


@pytest.mark.parametrize("module", sorted(set(modules()) & set(MAP)))
def test_module_imports_what_the_map_shows_and_nothing_else(module):
    source = modules()[module].read_text("utf-8")
    assert violations(module, source) == []
    if MAP[module][0] != "*":
        ours, others = ours_and_others(source)
        assert (ours, others) == (allowed_of_ours(module), set(MAP[module][1].split()))


def test_the_map_points_one_way():
    seen = set()
    for module in MAP:
        assert allowed_of_ours(module) <= seen, f"{module} may import a module that stands after it"
        seen.add(module)


def test_nobody_may_import_a_leaf():
    assert [module for module in MAP if LEAVES & allowed_of_ours(module)] == []


def test_no_module_has_a_name_that_says_nothing():
    assert {part for name in modules() for part in name.split(".")} & NAMELESS == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pyramid_async.views",
        "import pyramid_async.views as v",
        "from pyramid_async import views",
        "from pyramid_async.views import status",
        "from . import views",
        "from .views import status",
        "def f():\n    from .views import status",
        "if TYPE_CHECKING:\n    from . import views",
        "try:\n    import pyramid_async.views\nexcept ImportError:\n    pass",
        "import importlib\nimportlib.import_module('.views', 'pyramid_async')",
        "__import__('pyramid_async.views')",
    ],
)
def test_the_check_sees_every_way_to_import(source):
    assert violations("jobs", source) == ["jobs imports views"]


@pytest.mark.parametrize(
    ("source", "culprit"),
    [
        ("from pyramid_async import current_job", "__init__"),
        ("import pyramid_async", "__init__"),
        ("def f():\n    import pyramid.request", "pyramid"),
        ("from zope.interface import implementer", "zope"),
    ],
)
def test_the_check_sees_the_package_itself_and_other_packages(source, culprit):
    assert violations("jobs", source) == [f"jobs imports {culprit}"]


def test_package_exports_only_the_names_it_promises():
    import pyramid_async

    promised = set(pyramid_async.__all__)
    given = {name for name in vars(pyramid_async) if not name.startswith("_")}
    # An import sets the module on its package, and hints need some names.
    assert given - set(modules()) - {"annotations", "Any"} == promised


# Run in an interpreter of its own: the arguments are the modules to import.
WATCH = """
import importlib, os, signal, sys, threading

STARTED = {
    "os.fork", "os.posix_spawn", "subprocess.Popen", "sqlite3.connect",
    "socket.bind", "socket.connect", "socket.getaddrinfo",
}
seen = []
watching = True

def watch(event, args):
    if watching and event in STARTED:
        seen.append(event)
    elif watching and event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"open for writing: {args[0]}")

def watched_start(thread, start=threading.Thread.start):
    # Python 3.11 raises no audit event for a thread.
    seen.append(f"thread {thread.name}")
    start(thread)

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

threading.Thread.start = watched_start
before = handlers()
sys.addaudithook(watch)
for module in sys.argv[1:]:
    importlib.import_module(module)
watching = False
if handlers() != before:
    seen.append("signal handler")
print(*seen, sep="\\n", end="")
"""


def side_effects(*modules, cwd):
    # Coverage would write its own files and PYTHONPATH is the tests' business.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, *modules],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_starts_nothing():
    names = [PACKAGE, *(f"{PACKAGE}.{module}" for module in modules() if module != "__init__")]
    assert side_effects(*names, cwd=HERE.parent) == []


@pytest.mark.parametrize(
    ("source", "effect"),
    [
        ("open('left', 'w').close()", "open for writing: left"),
        ("import threading; threading.Thread(target=int).start()", "thread "),
        ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", "socket.connect"),
        ("import signal; signal.signal(signal.SIGTERM, print)", "signal handler"),
    ],
)
def test_the_check_sees_what_an_import_starts(tmp_path, source, effect):
    (tmp_path / "culprit.py").write_text(source)
    assert any(line.startswith(effect) for line in side_effects("culprit", cwd=tmp_path))


# -- the contracts are whole ---------------------------------------------------------------

# These know their stores and executors: they define, make, imitate or stop one.
KNOW_STORES = {"ram", "zodb", "config", "testing"}
KNOW_EXECUTORS = {"threads", "exits", "celery"}


@pytest.mark.parametrize("kind", ["ram", "zodb"])
def test_stores_and_tables_keep_their_interfaces(db, kind):
    store = RamStore() if kind == "ram" else ZodbStore(db)
    if kind == "zodb":
        store.install()
    tm = OwnManager()
    tm.begin()
    try:
        assert verifyObject(IJobStore, store)
        assert verifyObject(IJobTable, store.table(tm))
    finally:
        tm.abort()
        store.release(tm)


@pytest.mark.parametrize(
    ("word", "interface", "who_know_it"),
    [
        ("store", IJobStore, KNOW_STORES),
        ("table", IJobTable, KNOW_STORES),
        ("executor", IExecutor, KNOW_EXECUTORS),
    ],
)
def test_what_is_asked_of_a_store_or_an_executor_stands_in_its_interface(
    word, interface, who_know_it
):
    asked = {
        f"{name}: {word}.{attribute}"
        for name, path in modules().items()
        if name not in who_know_it
        for attribute in re.findall(rf"\b{word}\.([a-z]\w*)", path.read_text("utf-8"))
        if attribute not in interface.names(all=True)
    }
    assert asked == set()
