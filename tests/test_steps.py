"""Every step of a job's life goes wrong in every way, and its effect is there exactly once.

The processes that are killed are real: a helper, which has imported everything, forks one for
each crash.  What it leaves in its FileStorage is taken up by an application in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing, contextmanager, suppress
from itertools import product
from pathlib import Path
from signal import SIGKILL

import pytest
import transaction
from BTrees.Length import Length
from pyramid.config import Configurator
from pyramid_zodbconn import get_connection
from webtest import TestApp
from ZODB import DB
from ZODB.FileStorage import FileStorage

from pyramid_async import IScheduler, JobStopped, current_job
from pyramid_async.testing import STEPS, conflict, faults, kill, lose_reply, manual, steal
from pyramid_async.transactional import transact
from pyramid_async.worker import Worker
from pyramid_async.zodb import ZodbStore

ROUNDS = 5  # looks for lost jobs after which every job must have ended


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Who could not reach the database makes room for others, and there are none."""
    monkeypatch.setattr("pyramid_async.worker.LEFT_PAUSE", 0.0)


# -- what jobs do --------------------------------------------------------------------------


MIDDLE = []  # a fault between the two changes of an effect
STOPS = []  # whether the process stops while a job runs


def move():
    """Change both accounts: the effect of a job, or of one part of it."""
    root = get_connection(current_job().request).root()
    root["giver"].change(-1)
    if MIDDLE:
        MIDDLE.pop()()
    root["taker"].change(1)


def plain():
    move()


def in_two_parts():
    job = current_job()
    if job.cursor is None:
        move()
        job.checkpoint("half")
    move()


def broken():
    move()
    raise ZeroDivisionError


def stopped_once():
    move()
    if STOPS:
        STOPS.pop()
        current_job().interrupt(JobStopped("the process stops"))
        current_job().check()


# The job that passes a step; for all others it is the plain one.
JOBS = {
    "claim": in_two_parts,
    "checkpoint": in_two_parts,
    "fail": broken,
    "release": stopped_once,
}
EFFECTS = {plain: 1, in_two_parts: 2, broken: 0, stopped_once: 1}


# -- the application -----------------------------------------------------------------------


def start(request):
    request.scheduler.schedule(JOBS.get(request.matchdict["step"], plain))
    return request.response


@contextmanager
def application(store, uri="memory://"):
    settings = {
        "zodbconn.uri": uri,
        "async.store": store,
        "async.max_attempts": 10,  # no job fails for the number of workers that it lost
        "tm.manager_hook": "pyramid_tm.explicit_manager",
    }
    with Configurator(settings=settings) as config:
        config.include("pyramid_retry")
        config.include("pyramid_zodbconn")
        config.include("pyramid_async")
        config.add_route("start", "/start/{step}")
        config.add_view(start, route_name="start")
        app = TestApp(config.make_wsgi_app())
    try:
        yield app
    finally:
        scheduler_of(app).executor.stop()
        database_of(app).close()


def scheduler_of(app):
    return app.app.registry.getUtility(IScheduler)


def database_of(app):
    return app.app.registry._zodb_databases[""]


@contextmanager
def root_of(database):
    tm = transaction.TransactionManager()
    with closing(database.open(tm)) as connection:
        yield connection.root()
        tm.commit()


def open_accounts(app):
    with root_of(database_of(app)) as root:
        # Changes of these never conflict: nothing but its record keeps a job from two effects.
        root["giver"], root["taker"] = Length(), Length()


def effects(app):
    return effects_in(database_of(app))


def effects_in(database):
    """Return how many effects there are; there are no halves."""
    with root_of(database) as root:
        assert root["giver"]() == -root["taker"]()
        return root["taker"]()


def jobs_of(app):
    return scheduler_of(app).transact(lambda inside: inside.jobs())


# -- a life --------------------------------------------------------------------------------


def abandon():
    """Raise what leaves a job as it is where its failure is to be recorded."""
    raise ConnectionError("the database is out of reach")


def live(app, executor, plan, step, moment, fault):
    """Let a job live, and the fault strike on its way; return when all has ended."""
    if step == "middle":
        MIDDLE[:] = [fault]
    if step == "release":
        STOPS[:] = [True]
    if step == "claim":
        # Lost after its checkpoint: whoever runs it next must claim it.
        MIDDLE[:] = [abandon, lambda: None]
        plan.at("fail", before=abandon)
    if step != "middle":
        plan.at(step, **{moment: fault})
    # What happens to the request itself, its client is told.
    with suppress(ValueError, ConnectionError):
        app.get(f"/start/{step}")
    settle(executor)
    assert MIDDLE == STOPS == []


def settle(executor):
    """Do what the recovery and the worker threads do, until nothing is left to do."""
    for _ in range(ROUNDS):
        executor.drain()
        executor.recover()


def places(*, kinds="bda"):
    """Return all places where something can go wrong, as (step, moment)."""
    moments = {"b": "before", "d": "during", "a": "after"}
    found = [
        (step, moments[kind]) for step, kind in product(STEPS, kinds) if STEPS[step] or kind != "d"
    ]
    return [("middle", "before"), *found]


def commits(moment):
    return [(step, moment) for step, commits in STEPS.items() if commits]


# -- faults that are raised ----------------------------------------------------------------


def lose_connection():
    """Raise what PostgreSQL's driver does when it loses its server: nothing transient."""
    raise ConnectionError("the server closed the connection")


def error():
    raise ValueError("a fault of the test")


RAISED = [
    *((conflict, *place) for place in places() if place not in commits("after")),
    *((lose_reply, *place) for place in commits("after")),
    *((lose_connection, *place) for place in commits("during") + commits("after")),
    *((error, *place) for place in places()),
]

# Where an error is the job's own: it fails, and keeps what a checkpoint committed.
OWN = {
    *product(("begin", "prepare", "call", "succeed"), ("before", "after")),
    *product(("checkpoint",), ("before", "during", "after")),
    *product(("middle", "commit"), ("before",)),
    ("commit", "during"),
}


def outcome(fault, step, moment):
    """Return how a life ends, as (statuses of the jobs, effects)."""
    job = JOBS.get(step, plain)
    if step == "schedule" and moment != "after" and fault is not conflict:
        return [], 0  # the request failed
    if fault is error and (step, moment) in OWN:
        return ["failed"], int((step, moment) == ("checkpoint", "after"))
    return ["failed" if job is broken else "successful"], EFFECTS[job]


@pytest.fixture(scope="module", params=["ram", "zodb"])
def shared_app(request, tmp_path_factory):
    # In a file, for a database in memory resolves no conflicts: there the fence would hold anyhow.
    path = tmp_path_factory.mktemp("shared") / "data.fs"
    with application(request.param, f"file://{path}") as app:
        yield app


@pytest.fixture
def app(shared_app):
    open_accounts(shared_app)
    for job in jobs_of(shared_app):
        scheduler_of(shared_app).transact(lambda inside, sid=job.sid: inside.remove(sid))
    return shared_app


@pytest.fixture
def executor(app):
    with manual(app.app.registry) as executor:
        yield executor


@pytest.fixture
def plan(app, executor):
    with faults(app.app.registry) as plan:
        yield plan


def named(variants):
    return [
        pytest.param(*variant, id="-".join(getattr(part, "__name__", part) for part in variant))
        for variant in variants
    ]


@pytest.mark.parametrize(("fault", "step", "moment"), named(RAISED))
def test_job_has_its_effect_once_whatever_is_raised(app, executor, plan, fault, step, moment):
    live(app, executor, plan, step, moment, fault)
    assert ([job.status for job in jobs_of(app)], effects(app)) == outcome(fault, step, moment)


def test_claim_whose_reply_was_lost_counts_once(app, executor, plan):
    live(app, executor, plan, "claim", "after", lose_reply)
    (job,) = jobs_of(app)
    assert job.attempts == 2  # with the one that was lost after its checkpoint


LOOKS = []  # what the attempts at a job see of it from outside


def look():
    """Tell of progress, the later the less, and fail at first."""
    job = current_job()
    attempt = len(LOOKS) + 1
    job.progress(1, 2 * attempt, f"attempt {attempt}")
    scheduler = job.request.registry.getUtility(IScheduler)
    LOOKS.append(scheduler.transact(lambda inside: inside.status(job.sid)))
    if attempt == 1:
        raise ValueError


def test_attempts_whose_end_is_not_recorded_never_show_two_documents_under_one_tag(
    app, executor, plan
):
    LOOKS.clear()
    plan.at("fail", before=abandon)
    scheduler_of(app).transact(lambda inside: inside.schedule(look))
    settle(executor)
    first, second = LOOKS
    assert (first.message, second.message) == ("attempt 1", "attempt 2")
    assert second.revision > first.revision
    assert second.progress >= first.progress == 50


# -- rivals --------------------------------------------------------------------------------


class Rival:
    """Does something to the job at a step of its life, in a transaction of its own."""

    def __init__(self, app):
        self.app = app
        self.won = None  # whether it came early enough

    @property
    def job(self):
        (job,) = jobs_of(self.app)
        return job

    def dismiss(self):
        self.won = scheduler_of(self.app).transact(lambda inside: inside.cancel(self.job.sid))

    def steal(self):
        self.won = not self.job.done
        if self.won:
            steal(self.app.app.registry, self.job.sid)

    def overtake(self):
        """Take the job up and run it, as another process does with what it rescues."""
        self.won = not self.job.done
        ours = scheduler_of(self.app).worker
        theirs = Worker(ZodbStore(database_of(self.app)), surroundings=ours.surroundings)
        seen = transact(theirs.store, lambda table: table.get(self.job.sid).signature)
        theirs.run(self.job.sid, seen)


# Before the first commit there is no job; between two phases the commit lock is taken.
RIVALRY = [place for place in places(kinds="ba") if place != ("schedule", "before")]

# Where the job has ended.
LATE = {("commit", "after"), ("end", "before"), ("end", "after"), ("fail", "after")}


@pytest.fixture
def rival(app):
    return Rival(app)


@pytest.mark.parametrize(("step", "moment"), RIVALRY)
def test_job_that_was_dismissed_has_no_effect_from_then_on(
    app, executor, plan, rival, step, moment
):
    live(app, executor, plan, step, moment, rival.dismiss)
    assert rival.won is ((step, moment) not in LATE)
    if rival.won:
        checkpoints = step == "claim" or (step, moment) == ("checkpoint", "after")
        assert (rival.job.status, effects(app)) == ("dismissed", int(checkpoints))
    else:
        assert ([rival.job.status], effects(app)) == outcome(rival.dismiss, step, moment)


@pytest.mark.parametrize(("step", "moment"), RIVALRY)
def test_job_that_was_stolen_by_a_dead_process_has_its_effect_once(
    app, executor, plan, rival, step, moment
):
    live(app, executor, plan, step, moment, rival.steal)
    assert rival.won is ((step, moment) not in LATE)
    assert ([rival.job.status], effects(app)) == outcome(rival.steal, step, moment)


@pytest.mark.parametrize("shared_app", ["zodb"], indirect=True)  # RAM is not shared
@pytest.mark.parametrize(("step", "moment"), RIVALRY)
def test_job_that_another_process_ran_meanwhile_has_its_effect_once(
    app, executor, plan, rival, step, moment
):
    live(app, executor, plan, step, moment, rival.overtake)
    assert rival.won is ((step, moment) not in LATE)
    assert ([rival.job.status], effects(app)) == outcome(rival.overtake, step, moment)


# -- wake-ups ------------------------------------------------------------------------------


def all_have_ended(app):
    return all(job.done for job in jobs_of(app))


@pytest.fixture(params=["ram", "zodb"])
def threaded_app(request):
    with application(request.param) as app:
        open_accounts(app)
        yield app


def test_jobs_have_their_effect_once_when_all_wake_ups_are_doubled(threaded_app, wait_for):
    with faults(threaded_app.app.registry) as plan:
        plan.double_wakeups()
        for _ in range(20):
            threaded_app.get("/start/plain")
        wait_for(lambda: all_have_ended(threaded_app))
    assert len(jobs_of(threaded_app)) == effects(threaded_app) == 20


def test_jobs_have_their_effect_once_when_all_wake_ups_are_lost(threaded_app, wait_for):
    with faults(threaded_app.app.registry) as plan:
        plan.lose_wakeups()
        for _ in range(20):
            threaded_app.get("/start/plain")
    threads = scheduler_of(threaded_app).executor
    threads.start()
    threads.recovery.look()
    wait_for(lambda: all_have_ended(threaded_app))
    assert len(jobs_of(threaded_app)) == effects(threaded_app) == 20


# -- crashes -------------------------------------------------------------------------------


class Helper:
    """A process that forks another one for each crash."""

    def __init__(self):
        here = Path(__file__).parent
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_steps; test_steps.serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def crash(self, *facts):
        """Let a process die as `die` says; return how it ended."""
        self.process.stdin.write(json.dumps(facts) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


def serve():
    """Be the helper: fork for each line, and answer with the child's exit status."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                die(*json.loads(line))
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def die(path, store, step, moment):
    """Open the database, and die at a step in the life of a job."""
    with application(store, f"file://{path}") as app:
        registry = app.app.registry
        with manual(registry) as executor, faults(registry) as plan:
            live(app, executor, plan, step, moment, kill)


@pytest.fixture(scope="module")
def helper():
    helper = Helper()
    yield helper
    helper.stop()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database as it is before a job."""
    path = tmp_path_factory.mktemp("template") / "data.fs"
    with application("zodb", f"file://{path}") as app:
        open_accounts(app)
    return path


@pytest.fixture
def path(template, tmp_path):
    return str(shutil.copy(template, tmp_path))


@pytest.mark.parametrize(("step", "moment"), places())
def test_job_has_its_effect_once_when_its_process_is_killed(helper, path, wait_for, step, moment):
    assert helper.crash(path, "zodb", step, moment) == -SIGKILL
    with application("zodb", f"file://{path}") as app:
        wait_for(lambda: all_have_ended(app))
        assert ([job.status for job in jobs_of(app)], effects(app)) == outcome(kill, step, moment)


@pytest.mark.parametrize(
    ("step", "moment"),
    [place for place in places() if place[0] in ("middle", "checkpoint", "commit", "end")],
)
def test_job_in_ram_has_its_effect_once_or_never_when_its_process_is_killed(
    helper, path, step, moment
):
    assert helper.crash(path, "ram", step, moment) == -SIGKILL
    durable = step == "end" or (moment == "after" and step != "middle")
    with closing(DB(FileStorage(path))) as database:
        assert effects_in(database) == int(durable)
