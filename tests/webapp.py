"""The application that the HTTP tests talk to, and the functions that its jobs run."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from uuid import uuid4

import jsonschema
import transaction
from pyramid.authorization import Allow, Everyone
from pyramid.config import Configurator
from pyramid.csrf import CookieCSRFStoragePolicy
from pyramid.httpexceptions import HTTPUnauthorized
from pyramid.security import NO_PERMISSION_REQUIRED
from pyramid_zodbconn import get_connection
from webtest import TestApp
from ZODB.blob import Blob

from pyramid_async import FileResult, OperationFailed, current_job
from pyramid_async.interfaces import IScheduler

ORIGIN = "https://app.example.org"
PATIENCE = 20.0  # seconds after which a gate opens by itself: no test may wait so long


def validate(document, schema):
    """Hold a document against a schema, with its formats: dates, URIs."""
    jsonschema.validate(document, schema, format_checker=jsonschema.FormatChecker())


# -- gates: a job waits at its gate, a test waits for the job to reach it ------------------


class Gate:
    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_through(self):
        self.reached.set()
        assert self.opened.wait(PATIENCE), "nobody opened the gate"

    def reach(self):
        assert self.reached.wait(PATIENCE), "nobody reached the gate"


GATES: dict[str, Gate] = {}


@contextmanager
def gate():
    """A name and its gate, which is open after the block whatever happens."""
    name = uuid4().hex
    GATES[name] = Gate()
    try:
        yield name
    finally:
        # It stays: a job may come to it later.
        GATES[name].opened.set()


# -- what jobs do --------------------------------------------------------------------------


def echo(value=None):
    return value


def behind_gate(name, value=None):
    GATES[name].pass_through()
    return value


def tell(name, done, total, message=None):
    """Tell progress, then stand at the gate."""
    current_job().progress(done, total, message)
    GATES[name].pass_through()


def tell_later(first, second):
    """Tell progress after the first gate, then stand at the second."""
    GATES[first].pass_through()
    tell(second, 1, 2)


def fail(text):
    raise ZeroDivisionError(text)


def fail_publicly(text):
    raise OperationFailed(text)


def repeat(text, times):
    """Return a large text; a large request would be another test."""
    return text * times


def special(kind):
    """Return a result that cannot be written in the JSON of a request."""
    if kind == "nan":
        return [float("nan")]
    if kind == "large":
        return ["x" * 1024 * 1024, float("nan")]
    if kind == "huge integer":
        return 10**5000
    if kind == "half a surrogate pair":
        return "\ud800"
    if kind == "rather deep":
        return nested(100)
    if kind == "of a class that goes":
        return Leaving()
    return {"bytes": b"\xff", "set": {1}, "key": {(1, 2): 3}, "class": {"it": Gate}}[kind]


class Leaving:
    """A class that a later version of the application has not."""


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def make_file(text, media_type="text/csv", filename="table.csv"):
    return FileResult(text.encode(), media_type, filename)


def make_blob(text, times, media_type="text/csv", filename="table.csv"):
    blob = Blob()
    with blob.open("w") as file:
        file.write(text.encode() * times)
    return FileResult(blob, media_type, filename)


def leave_a_mark(mark):
    get_connection(current_job().request).root()[mark] = True


class Barrier:
    """A data manager that stands at a gate in one phase of its transaction's commit."""

    def __init__(self, name, phase, sort_key):
        self.name, self.phase, self.sort_key = name, phase, sort_key

    def sortKey(self):
        return self.sort_key

    def __getattr__(self, attribute):
        if attribute not in {"abort", "commit", "tpc_begin", "tpc_vote", "tpc_finish", "tpc_abort"}:
            raise AttributeError(attribute)
        here = attribute == self.phase
        return lambda txn: GATES[self.name].pass_through() if here else None


class SqlSession(Barrier):
    """A data manager as zope.sqlalchemy's: its session sends what it holds as the commit begins."""

    def __init__(self, flush):
        super().__init__(None, None, "~sqlalchemy:1")
        self.session = SimpleNamespace(flush=flush)

    def tpc_begin(self, txn):
        self.session.flush()


def refused_once(error):
    """A session that cannot send what it holds, the first time."""
    errors = [error]

    def flush():
        if errors:
            raise errors.pop()

    return SqlSession(flush)


def commit_slowly(name, phase, mark, sort_key="!first"):
    leave_a_mark(mark)
    current_job().request.tm.get().join(Barrier(name, phase, sort_key))
    return "done"


JOBS = (
    echo,
    behind_gate,
    tell,
    tell_later,
    fail,
    fail_publicly,
    special,
    make_file,
    make_blob,
    repeat,
    leave_a_mark,
    commit_slowly,
)


# -- the application -----------------------------------------------------------------------


class Root:
    __acl__ = [(Allow, "admin", "async.manage")]
    __name__ = __parent__ = None
    made = 0

    def __init__(self, request):
        type(self).made += 1
        if request.headers.get("X-Root") == "broken":
            raise RuntimeError("the root of all evil")


class Policy:
    """The user is who the header X-User names; asked how often is counted."""

    asked = 0

    def authenticated_userid(self, request):
        type(self).asked += 1
        user = request.headers.get("X-User")
        if user == "expired":
            bearer = {"WWW-Authenticate": 'Bearer realm="x"'}
            raise HTTPUnauthorized("secret of the policy", headers=bearer)
        if user == "broken":
            raise RuntimeError("secret of the policy")
        if user == "from the database":
            return get_connection(request).root()["user"]
        return user

    def permits(self, request, context, permission):
        return any(
            principal in (Everyone, request.headers.get("X-User")) and permission == name
            for _, principal, name in getattr(context, "__acl__", ())
        )

    identity = remember = forget = None


def start(request):
    """Schedule the function of the query with the arguments of the body."""
    function = {job.__name__: job for job in JOBS}[request.matchdict["job"]]
    call = request.json_body if request.body else {}
    scheduler = request.scheduler.using(**call.get("options", {}))
    sid = scheduler.schedule(function, *call.get("args", ()), **call.get("kw", {}))
    if "conflict" in request.GET:
        request.tm.get().join(FailingVote(request))
    return request.scheduler.accepted(sid)


class FailingVote(Barrier):
    """A data manager whose vote fails in the first attempts at the request, or in all."""

    def __init__(self, request):
        super().__init__(None, None, "~~last")
        self.left = request.environ.setdefault("test.failures", [int(request.GET["conflict"])])

    def tpc_vote(self, txn):
        if self.left[0]:
            self.left[0] -= 1
            raise transaction.interfaces.TransientError("the vote failed")


def hello(request):
    return {"hello": "world"}


def application(
    settings=(), *, zodb=None, retry=False, policy=True, routes=lambda config: None, prefix=None
):
    """Return a WSGI application; *zodb* is the database's URI."""
    settings = {
        "async.cors.origins": ORIGIN,
        "async.maintenance_interval": "60",
        "retry.attempts": 3,
        **dict(settings),
    }
    if zodb:
        settings["zodbconn.uri"] = zodb
    with Configurator(settings=settings) as config:
        if policy:
            config.set_security_policy(Policy())
        config.set_root_factory(Root)
        if retry:
            config.include("pyramid_retry")
        if zodb:
            config.include("pyramid_zodbconn")
        config.include("pyramid_async", route_prefix=prefix)
        config.add_route("start", "/start/{job}")
        config.add_view(
            start, route_name="start", request_method="POST", permission=NO_PERMISSION_REQUIRED
        )
        config.add_route("hello", "/hello")
        config.add_view(hello, route_name="hello", renderer="json")
        routes(config)
    return config.make_wsgi_app()


class Browser(TestApp):
    """A WebTest client that knows how to start jobs."""

    @property
    def scheduler(self):
        return self.app.registry.getUtility(IScheduler)

    @property
    def databases(self):
        return getattr(self.app.registry, "_zodb_databases", None) or {}

    def number_of_jobs(self):
        return len(self.scheduler.transact(lambda scheduler: scheduler.jobs()))

    def start(self, job, *args, user=None, query="", **options):
        """Start a job and return the 202."""
        return self.post_json(
            f"/start/{job.__name__}{query}",
            {"args": args, "options": options},
            headers=as_user(user),
            status=202,
        )

    def url(self, job, *args, **options):
        """Start a job and return its URL."""
        return self.start(job, *args, **options).location

    def finished(self, job, *args, user=None, **options):
        """Run a job and return its URL and its last document."""
        url = self.url(job, *args, user=user, **options)
        return url, self.done(url, user)

    def done(self, url, user=None):
        """Return the document of a job that is about to finish."""
        document = self.get(url + "?wait=10", headers=as_user(user)).json
        assert document["done"], document
        return document

    def close(self):
        for gate in list(GATES.values()):
            gate.opened.set()
        self.scheduler.executor.stop(2)
        for database in self.databases.values():
            database.close()


def checking_csrf(config):
    """Let an application check all forms."""
    config.set_csrf_storage_policy(CookieCSRFStoragePolicy())
    config.set_default_csrf_options(require_csrf=True)


def as_user(user):
    return {} if user is None else {"X-User": user}


@contextmanager
def browser(*args, **options):
    """A client of a new application, which is closed after the block."""
    client = Browser(application(*args, **options))
    try:
        yield client
    finally:
        client.close()
        transaction.abort()


def pool_warnings(caplog):
    """Return what the ZODB logged of pools that are too small."""
    return [r.getMessage() for r in caplog.records if "open connections" in r.getMessage()]


# Every store, transaction manager and number of attempts meets each other in some row.
EXPLICIT = {"tm.manager_hook": "pyramid_tm.explicit_manager"}
KINDS = {
    "zodb-explicit-retry": ("zodb", EXPLICIT, True),
    "zodb-default-once": ("zodb", {}, False),
    "ram-explicit-once": ("ram", EXPLICIT, False),
    "ram-default-retry": ("ram", {}, True),
}


def kind(name, settings=(), **options):
    """A client of an application of one of the KINDS, with a database in memory."""
    store, own, retry = KINDS[name]
    settings = {"async.store": store, **own, **dict(settings)}
    return browser(settings, **{"zodb": f"memory://{uuid4().hex}", "retry": retry, **options})
