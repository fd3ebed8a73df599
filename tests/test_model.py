"""Whatever happens to jobs, in whatever order: a small model knows how they stand.

A job is a list of steps.  Besides effects and checkpoints there are accidents, each of which
strikes once; what was not committed before one is done again, and must count once.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import transaction
from bare import together
from BTrees.Length import Length
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from webapp import as_user, browser
from ZODB.POSException import ConflictError

from pyramid_async import JobDismissed, JobStopped, NotRetriable, current_job, manage
from pyramid_async.jobs import FINAL
from pyramid_async.scheduler import Caller
from pyramid_async.testing import conflict, manual, steal

USER = "ann"
PERIODS = (10, 10, 70, 70, 400, 7000)  # seconds
KEPT = (5005, 5005, 95, 0)  # never as long as some periods together
LONG = 200_000.0  # after that nothing is left

short = settings(
    max_examples=14,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)

# -- what jobs do --------------------------------------------------------------------------


def work(world, effects, name, steps):
    """Take the steps; an accident that returns something else than None ends the function."""
    world = WORLDS[world]
    for place in range(current_job().cursor or 0, len(steps)):
        step = steps[place]
        if step == "effect":
            effects.change(1)
        elif step == "checkpoint":
            current_job().checkpoint(place + 1)
        elif (name, place) not in world.struck:
            world.struck.add((name, place))
            if getattr(world, f"be_{step}")(current_job()):
                return None
    return name


class Busy(Exception):
    pass


@dataclass
class Model:
    """A job as it should be."""

    name: int
    steps: list[str]
    key: str | None
    kept: float
    due: float
    status: str = "accepted"
    lost: bool = False  # until recovery has found it
    cursor: int = 0
    struck: int = 0  # place behind the last accident
    ended: float = 0.0
    retried: str | None = None

    @property
    def done(self):
        return self.status in FINAL

    def known(self, now):
        return self.status != "removed" and not (self.done and now >= self.ended + self.kept)

    def end(self, status, now):
        return replace(self, status=status, ended=now)

    def run(self, now):
        """Return how the job stands after a run, and the effects that the run committed."""
        committed = pending = 0
        place = self.cursor
        while place < len(self.steps):
            step = self.steps[place]
            place += 1
            if step == "effect":
                pending += 1
            elif step == "checkpoint":
                committed, pending = committed + pending, 0
                self.cursor, self.status = place, "running"
            elif place > self.struck:
                self.struck = place
                match step:
                    case "conflicting":
                        place, pending = self.cursor, 0
                    case "dismissed" | "removed":
                        return self.end(step, now), committed
                    case "giving_up":
                        return self.end("dismissed", now), committed
                    case "broken":
                        return self.end("failed", now), committed
                    case "busy":
                        return replace(self, status="accepted", due=now + 300), committed
                    case "stopped":
                        return replace(self, status="accepted", lost=True), committed
                    case "stolen" | "stolen_at_a_checkpoint":
                        return replace(self, status="running", lost=True), committed
        return self.end("successful", now), committed + pending


STEPS = [
    *["effect", "effect", "checkpoint", "checkpoint", "seen", "packed"],
    *["conflicting", "busy", "stopped", "broken", "broken", "dismissed", "removed", "giving_up"],
    *["stolen", "stolen_at_a_checkpoint"],
]
WORLDS = {}


# -- the world -----------------------------------------------------------------------------


class World(RuleBasedStateMachine):
    store = ""

    def __init__(self):
        super().__init__()
        WORLDS[self.store] = self
        self.jobs, self.effects, self.struck, self.seen, self.tags = {}, [], set(), {}, {}
        self.open = ExitStack()
        path = tempfile.mkdtemp()
        self.open.callback(shutil.rmtree, path)
        settings = {"async.store": self.store, "async.workers": "0", "async.max_attempts": "99"}
        self.web = self.open.enter_context(browser(settings, zodb=f"file://{path}/data.fs"))
        self.executor = self.open.enter_context(manual(self.web.app.registry))
        self.db = self.web.databases[""]
        self.tm = transaction.TransactionManager()
        self.root = self.db.open(self.tm).root()
        self.root["effects"] = [Length() for _ in range(short.stateful_step_count)]
        self.tm.commit()

    @property
    def now(self):
        return self.executor.clock()

    def transact(self, work):
        return self.web.scheduler.transact(work)

    def bound(self, tm):
        return self.web.scheduler.bind(tm, Caller(owner=USER))

    # -- accidents

    def be_seen(self, job):
        def look():
            assert self.look(job.sid)["status"] == "running"

        together(look)  # a request in the job's own thread would end its transaction

    def be_packed(self, job):
        self.db.pack()

    def be_dismissed(self, job):
        assert self.transact(lambda scheduler: scheduler.cancel(job.sid))

    def be_removed(self, job):
        self.transact(lambda scheduler: scheduler.remove(job.sid))

    def be_stolen(self, job):
        steal(self.web.app.registry, job.sid)
        return "the commit must conflict"

    def be_stolen_at_a_checkpoint(self, job):
        steal(self.web.app.registry, job.sid)
        job.checkpoint(0)

    def be_conflicting(self, job):
        conflict()

    def be_busy(self, job):
        raise Busy

    def be_broken(self, job):
        raise ZeroDivisionError

    def be_stopped(self, job):
        raise JobStopped

    def be_giving_up(self, job):
        raise JobDismissed

    # -- rules

    @rule(
        steps=st.lists(st.sampled_from(STEPS), max_size=7),
        key=st.sampled_from([None, None, "key"]),
        kept=st.sampled_from(KEPT),
        wait=st.sampled_from([None, None, 50]),
        end=st.sampled_from(["commit", "commit", "commit", "abort"]),
        at_once=st.booleans(),
    )
    def schedule(self, steps, key, kept, wait, end, at_once):
        options = dict(key=key, result_timeout=kept, run_after=wait, retry_on=Busy)
        rival = key and self.with_key(key)
        name = len(self.effects)
        scheduler = self.bound(self.tm).using(**options)
        effects = self.root["effects"][name]
        sid = scheduler.schedule(work, self.store, effects, name, steps)
        assert sid == rival if rival else sid not in self.jobs
        getattr(self.tm, end)()
        if end == "commit" and not rival:
            self.effects.append(0)
            self.jobs[sid] = Model(name, steps, key, kept, self.now + (wait or 0))
        if at_once:
            self.run()

    def with_key(self, key):
        unfinished = {sid: job for sid, job in self.jobs.items() if not job.done}
        found = [s for s, job in unfinished.items() if job.key == key and job.known(self.now)]
        assert len(found) <= 1
        return found[0] if found else None

    @rule()
    def run(self):
        due = [s for s, m in self.jobs.items() if not (m.done or m.lost) and m.due <= self.now]
        self.executor.drain()
        for sid in due:
            if self.jobs[sid].known(self.now):
                job, effects = self.jobs[sid].run(self.now)
                self.effects[job.name] += effects
                if job.due > self.now:
                    job.due = manage.show(self.web.scheduler, sid).run_after  # at random
                    assert job.due <= self.now + 300
                self.jobs[sid] = job

    def decide(self, scheduler, sid, what):
        """Do something to a job; return what becomes of the jobs if that is committed."""
        job = self.jobs[sid]
        known = job.known(self.now)
        if what == "cancel":
            assert scheduler.cancel(sid) is (known and not job.done)
            return {sid: job.end("dismissed", self.now)} if known and not job.done else {}
        if what == "remove":
            scheduler.remove(sid)
            return {sid: replace(job, status="removed")} if known else {}
        if what == "collect":
            found = scheduler.get_result(sid)
            if not known or not job.done:
                assert found is (False if known else None)
                return {}
            assert (found[1] is None) is (job.status == "successful")
            return {sid: replace(job, status="removed")}
        try:
            new = scheduler.retry(sid)
        except (LookupError, NotRetriable):
            rival = job.key and self.with_key(job.key)
            assert not known or job.status != "failed" or (rival and not job.retried)
            return {}
        assert (known, job.status) == (True, "failed")
        if job.retried:
            assert new == job.retried
            return {}
        again = replace(job, status="accepted", due=0.0)
        return {sid: replace(job, retried=new), new: again}

    WHAT = st.sampled_from(["cancel", "remove", "collect", "collect", "retry", "retry"])

    def pick(self, data):
        """Draw the sid of one of the youngest jobs, known ones if there are any."""
        known = [sid for sid, job in self.jobs.items() if job.known(self.now)]
        return data.draw(st.sampled_from((known or list(self.jobs))[-3:]))

    @precondition(lambda self: self.jobs)
    @rule(
        data=st.data(),
        what=WHAT,
        undone=st.sampled_from(["cancel", "remove", "retry"]),
        end=st.sampled_from(["commit", "commit", "commit", "abort"]),
    )
    def change(self, data, what, undone, end):
        sid, other = self.pick(data), self.pick(data)
        scheduler = self.bound(self.tm)
        changes = self.decide(scheduler, sid, what)
        if other not in changes:
            savepoint = self.tm.savepoint()
            self.decide(scheduler, other, undone)
            savepoint.rollback()
        getattr(self.tm, end)()
        if end == "commit":
            self.jobs |= changes

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), one=WHAT, other=WHAT)
    def rivals(self, data, one, other):
        """Two decide at the same time about the same job: one of them conflicts."""
        sid = self.pick(data)
        rival = transaction.TransactionManager()
        changes = self.decide(self.bound(self.tm), sid, one)
        others = self.decide(self.bound(rival), sid, other)
        self.tm.commit()
        try:
            rival.commit()
            assert not (changes and others)
            changes |= others
        except ConflictError:
            rival.abort()
            assert all([changes, others])
        self.web.scheduler.store.release(rival)
        self.jobs |= changes

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def delete(self, data):
        sid = self.pick(data)
        job = self.jobs[sid]
        known = job.known(self.now)
        answer = self.web.delete(f"/async/{sid}", headers=as_user(USER), expect_errors=True)
        assert answer.status_code == (200 if known else 404)
        if known:
            assert answer.json["status"] == (job.status if job.done else "dismissed")
            self.jobs[sid] = job.end("removed" if job.done else "dismissed", self.now)

    @rule(seconds=st.sampled_from(PERIODS))
    def let_time_pass(self, seconds):
        self.executor.advance(seconds)
        self.recover()

    def recover(self):
        self.executor.recover()
        for job in self.jobs.values():
            job.lost = False
        assert manage.check(self.web.scheduler) == []

    # -- what must be true at any time

    @invariant()
    def effects_are_those_of_what_was_committed(self):
        self.tm.begin()
        assert [n() for n in self.root["effects"]][: len(self.effects)] == self.effects

    @invariant()
    def lists_tell_the_jobs_that_are_known(self):
        known = {s: m.status for s, m in self.jobs.items() if m.known(self.now)}
        assert {job.sid: job.status for job in self.bound(self.tm).jobs()} == known
        page = self.web.get("/async?limit=100", headers=as_user(USER)).json["jobs"]
        assert {job["jobID"]: job["status"] for job in page} == known
        reports = manage.follow(self.web.scheduler, 100).jobs
        assert {report.sid: report.status for report in reports} == known

    @invariant()
    def documents_change_with_their_tags(self):
        for sid, job in list(self.jobs.items())[-5:]:
            document = self.look(sid)
            assert document["status"] == (job.status if job.known(self.now) else 404)

    def look(self, sid):
        """Return the document, after a comparison with what was seen under its tag."""
        answer = self.web.get(f"/async/{sid}", headers=as_user(USER), expect_errors=True)
        if "ETag" in answer.headers:
            revision = int(answer.headers["ETag"][3:-1])
            assert revision >= self.tags.get(sid, 0)
            self.tags[sid] = revision
            answer.json.pop("retryAfter", None)
            assert self.seen.setdefault((sid, revision), answer.json) == answer.json
        return answer.json

    def teardown(self):
        with self.open:
            while not all(job.done or job.status == "removed" for job in self.jobs.values()):
                self.executor.advance(300)
                self.recover()
                self.run()
            self.effects_are_those_of_what_was_committed()
            self.executor.advance(LONG)
            self.recover()
            left = self.transact(lambda scheduler: list(scheduler._table().records()))
            self.tm.abort()
            assert left == []


@pytest.mark.parametrize("store", ["ram", "zodb"])
def test_jobs_stand_as_the_model_says(store):
    run_state_machine_as_test(type("World", (World,), {"store": store}), settings=short)
