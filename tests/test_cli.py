"""``pasync``: what operators ask and do from the shell, in a process that runs no jobs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime

import pytest
import transaction
from persistent.mapping import PersistentMapping
from pyramid.config import Configurator
from pyramid.paster import get_app
from pyramid_zodbconn import get_connection
from ZODB import DB
from ZODB.FileStorage import FileStorage

from pyramid_async import OperationFailed, current_job
from pyramid_async.cli import main
from pyramid_async.config import databases
from pyramid_async.interfaces import IScheduler
from pyramid_async.jobs import Live
from pyramid_async.signs import Sign

INI = """
[app:main]
use = call:test_cli:make_application
zodbconn.uri = {uri}
async.maintenance_interval = 0.2
{more}
"""
UNKNOWN = "0" * 32


def make_application(global_config, **settings):
    with Configurator(settings=settings) as config:
        config.include("pyramid_zodbconn")
        if settings.pop("test.bare", None) is None:
            config.include("pyramid_async")
        if "test.root" in settings:
            config.set_root_factory(ROOTS[settings["test.root"]])
        return config.make_wsgi_app()


RUNS = []


def well(*args):
    RUNS.append(current_job().sid)
    return "well"


def badly(text="a secret"):
    RUNS.append(current_job().sid)
    raise ZeroDivisionError(text)


def politely(text):
    raise OperationFailed(text)


@pytest.fixture(autouse=True)
def forget_runs():
    yield
    RUNS.clear()


@pytest.fixture
def ini(tmp_path):
    return write_ini(tmp_path)


def write_ini(directory, uri=None, more=""):
    path = directory / "app.ini"
    uri = uri or f"file://{directory}/data.fs"
    path.write_text(INI.format(uri=uri, more=more))
    return str(path)


@contextmanager
def serving(ini):
    """The scheduler of the application, as a server makes it."""
    registry = get_app(ini).registry
    scheduler = registry.getUtility(IScheduler)
    try:
        yield scheduler
    finally:
        scheduler.executor.stop(5)
        transaction.abort()
        for database in databases(registry).values():
            database.close()


def put(scheduler, f, *args, **options):
    return scheduler.transact(lambda bound: bound.using(**options).schedule(f, *args))


def status(scheduler, sid):
    job = scheduler.transact(lambda bound: bound.status(sid))
    return job and job.status


def run(ini, wait_for, *calls):
    """Run jobs to their end, in an application that is closed then; return their sids."""
    with serving(ini) as scheduler:
        sids = []
        for f, *args in calls:
            sids.append(put(scheduler, f, *args))
            wait_for(lambda: status(scheduler, sids[-1]) in {"successful", "failed"})
        return sids


@pytest.fixture
def pasync(ini, capsys):
    """Run a command and return (exit status, output, errors)."""
    return lambda *arguments: pasync_with(ini, capsys, *arguments)


def pasync_with(ini, capsys, *arguments):
    capsys.readouterr()
    try:
        code = main([ini, *arguments])
    except SystemExit as error:  # of argparse
        code = error.code
    said = capsys.readouterr()
    return code, said.out, said.err


# -- list and show -------------------------------------------------------------------------


def test_list_shows_jobs_line_by_line(ini, pasync, wait_for):
    good, bad = run(ini, wait_for, (well,), (badly,))
    code, out, err = pasync("list")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.startswith(f"{bad} failed ")
    assert first.endswith("- badly: ZeroDivisionError: a secret")
    assert second.startswith(f"{good} successful ")
    assert pasync("list", "--status", "failed")[1] == first + "\n"
    assert pasync("list", "--text", "WELL")[1] == second + "\n"
    assert pasync("list", "--status", "running", "--status", "dismissed") == (0, "", "")


def test_list_goes_on_where_it_ended(ini, pasync, wait_for):
    sids = run(ini, wait_for, *[(well,)] * 5)[::-1]
    seen, more = [], []
    while True:
        lines = pasync("list", "--limit", "2", *more)[1].splitlines()
        seen += [line.split()[0] for line in lines if line[:32] in sids]
        if "--cursor" not in lines[-1]:
            break
        more = lines[-1].partition(": ")[2].split()
    assert seen == sids


def test_list_for_programs(ini, pasync, wait_for):
    good, bad = run(ini, wait_for, (well,), (badly,))
    found = json.loads(pasync("list", "--json", "--limit", "1")[1])
    [job] = found["jobs"]
    assert job["jobID"] == bad
    assert job["function"] == "test_cli:badly"
    assert job["failure"].keys() == {"class", "message", "traceback", "errorID"}
    assert datetime.fromisoformat(job["created"]) <= datetime.fromisoformat(job["finished"])
    found = json.loads(pasync("list", "--json", "--cursor", found["next"])[1])
    assert [job["jobID"] for job in found["jobs"]] == [good]
    assert found["next"] is None


def test_show_tells_all(ini, pasync, wait_for):
    [bad] = run(ini, wait_for, (badly,))
    code, out, _ = pasync("show", bad)
    assert code == 0
    facts = dict(line.split(None, 1) for line in out.splitlines() if line[0] != " ")
    assert facts["jobID"] == bad
    assert facts["class"] == "ZeroDivisionError"
    assert "in badly" in out
    shown = json.loads(pasync("show", bad, "--json")[1])
    assert shown == json.loads(pasync("list", "--json")[1])["jobs"][0]


def test_what_a_terminal_would_obey_is_not_printed(ini, pasync, wait_for):
    [bad] = run(ini, wait_for, (politely, "red \x1b[31m\r\nforged line \u202e"))
    for command in (["list"], ["show", bad]):
        out = pasync(*command)[1]
        assert "\x1b" not in out
        assert "\r" not in out
        assert "\u202e" not in out
        assert not any(line.startswith("forged") for line in out.splitlines())


def test_nothing_is_found_in_a_new_database(pasync):
    assert pasync("list") == (0, "", "")
    assert pasync("check") == (0, "0 findings\n", "")
    assert pasync("processes") == (0, "", "")
    assert json.loads(pasync("check", "--json")[1]) == {"findings": []}


ROOTS = {
    # As Pyramid's cookiecutter for the ZODB has it.
    "writes": lambda request: get_connection(request).root().setdefault("app", PersistentMapping()),
    "wants a host": lambda request: request.environ["shop.tenant"],
}


@pytest.mark.parametrize("kind", ROOTS)
def test_root_factory_is_not_called(kind, tmp_path, capsys):
    ini = write_ini(
        tmp_path, more=f"test.root = {kind}\ntm.manager_hook = pyramid_tm.explicit_manager"
    )
    assert pasync_with(ini, capsys, "check") == (0, "0 findings\n", "")


# -- it runs nothing -----------------------------------------------------------------------


def waiting(ini, f=well, **options):
    """Schedule a job that nobody runs yet."""
    with serving(ini) as scheduler:
        scheduler.executor.stop(5)
        return put(scheduler, f, **options)


def test_shell_takes_up_no_job_and_starts_no_thread(ini, pasync):
    sid = waiting(ini)
    before = threading.active_count()
    for _ in range(2):
        assert f"{sid} accepted" in pasync("list")[1]
        assert threading.active_count() == before
    assert RUNS == []


def test_application_that_is_made_afterwards_runs_jobs_again(ini, pasync, wait_for):
    sid = waiting(ini)
    pasync("list")
    with serving(ini) as scheduler:
        wait_for(lambda: status(scheduler, sid) == "successful")


def test_shell_rings_no_bell_where_celery_runs_the_jobs(tmp_path, ini, capsys, wait_for):
    """The workers look for jobs that nobody began; a broker need not be there."""
    [bad] = run(ini, wait_for, (badly,))
    ini = write_ini(tmp_path, more="async.executor = celery")
    before = threading.active_count()
    code, out, _ = pasync_with(ini, capsys, "retry", bad)
    assert code == 0
    assert f"{out.split()[-1]} accepted" in pasync_with(ini, capsys, "list")[1]
    assert threading.active_count() == before


# -- cancel, retry, purge, check -----------------------------------------------------------


def test_cancelled_job_is_never_run(ini, pasync, wait_for):
    sid = waiting(ini)
    assert pasync("cancel", sid) == (0, f"{sid} dismissed\n", "")
    run(ini, wait_for, (well,))
    assert sid not in RUNS


def test_retried_job_is_run_by_the_next_process(ini, pasync, wait_for):
    [bad] = run(ini, wait_for, (badly,))
    code, out, _ = pasync("retry", bad)
    assert code == 0
    new = out.split()[-1]
    assert list(RUNS) == [bad]
    assert pasync("retry", bad)[1] == out  # not a second time
    with serving(ini) as scheduler:
        wait_for(lambda: status(scheduler, new) == "failed")
    assert list(RUNS) == [bad, new]


@pytest.mark.parametrize("command", ["cancel", "retry"])
def test_each_job_is_done_whatever_becomes_of_the_others(ini, pasync, wait_for, command):
    good, bad = run(ini, wait_for, (well,), (badly,))
    able = bad if command == "retry" else waiting(ini)
    code, out, err = pasync(command, UNKNOWN, good, able)
    assert code == 1
    assert out.startswith(able)
    assert f"no job '{UNKNOWN}': unknown, expired or removed" in err
    assert f"job '{good}'" in err
    code, out, err = pasync(command, UNKNOWN, good, "--json")
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert found["done"] == {}
    assert found["errors"].keys() == {UNKNOWN, good}


def test_job_that_is_not_there_is_not_shown(pasync):
    code, out, err = pasync("show", UNKNOWN)
    assert (code, out) == (1, "")
    assert f"no job '{UNKNOWN}'" in err
    code, out, err = pasync("show", "é\n", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["errors"].keys() == {"é\n"}


def test_purge_removes_and_counts(ini, pasync, wait_for):
    _, bad = run(ini, wait_for, (well,), (badly,))
    assert pasync("purge", "--older-than", "1h") == (0, "0 removed\n", "")
    assert pasync("purge", "--older-than", "0", "--status", "successful")[1] == "1 removed\n"
    assert pasync("list")[1].startswith(bad)
    assert json.loads(pasync("purge", "--older-than", "0s", "--json")[1]) == {"removed": 1}
    assert pasync("list")[1] == ""


def test_check_finds_and_says_so_by_its_exit_status(ini, pasync, tmp_path):
    sid = waiting(ini, run_after=1000)
    spoil(tmp_path, sid)
    code, out, _ = pasync("check")
    assert code == 1
    assert out.startswith(f"{sid} its function 'test_cli:gone' is gone: ")
    assert out.endswith("\n1 findings\n")
    code, out, _ = pasync("check", "--json")
    [finding] = json.loads(out)["findings"]
    assert (code, finding["jobID"]) == (1, sid)


def spoil(directory, sid):
    """Let a job's function be one that is gone."""
    with opened(directory) as root:
        root.unfinished[root.shard(sid)][sid].function = "test_cli:gone"


@contextmanager
def opened(directory):
    """The records in the database, which is open for this block alone."""
    database = DB(FileStorage(str(directory / "data.fs")))
    with database.transaction() as connection:
        yield connection.root()["pyramid_async"]
    database.close()


def test_processes_are_told_with_their_last_sign_of_life(ini, pasync, tmp_path):
    sid = waiting(ini)
    show_sign(tmp_path, "p1", "far:1", running=[sid])
    show_sign(tmp_path, "p2", "far:2", age=1000)
    _, out, _ = pasync("processes")
    first, second = out.splitlines()
    assert first.startswith("far:1 last sign of life ")
    assert first.endswith(f"; runs {sid}")
    assert second.startswith("far:2 silent since ")
    assert second.endswith("; runs nothing")
    found = json.loads(pasync("processes", "--json")[1])["processes"]
    assert [(each["id"], each["silent"], each["running"]) for each in found] == [
        ("p1", False, [sid]),
        ("p2", True, []),
    ]


def show_sign(directory, process, name, age=0, running=()):
    with opened(directory) as root:
        sign = root.signs[process] = Sign(name)
        sign.at = time.time() - age
        sign.running = dict.fromkeys(running, Live(sign.at, sign.at, 1))


def test_record_that_cannot_be_read_is_told(ini, pasync, tmp_path):
    waiting(ini)
    with opened(tmp_path) as root:
        root.unfinished[0]["00"] = PersistentMapping()
    assert any(line.startswith("00 unreadable ") for line in pasync("list")[1].splitlines())
    shown = json.loads(pasync("show", "00", "--json")[1])
    assert shown.keys() == {"jobID", "status", "fault"}
    assert "00 cannot be read" in pasync("check")[1]


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["burn"], "invalid choice: 'burn'"),
        (["list", "--status", "done"], "invalid choice: 'done'"),
        (["list", "--limit", "0"], "'0' is no whole number from 1"),
        (["list", "--limit", "-1"], "'-1' is no whole number from 1"),
        (["list", "--limit", "9" * 5000], "is no whole number from 1"),
        (["list", "--cursor", "x"], "the cursor 'x' is none that was given"),
        (["purge"], "the following arguments are required: --older-than"),
        (["purge", "--older-than", "nan"], "'nan' is no time; 90, 90s, 30m, 12h or 7d are"),
        (["purge", "--older-than", "1w"], "'1w' is no time"),
        (["purge", "--older-than", ""], "'' is no time"),
        (["purge", "--older-than", "1", "--status", "running"], "invalid choice: 'running'"),
        (["show"], "the following arguments are required: SID"),
        (["cancel"], "the following arguments are required: SID"),
    ],
)
def test_bad_argument_is_refused_by_name(pasync, arguments, text):
    code, out, err = pasync(*arguments)
    assert (code, out) == (2, "")
    assert text in err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "the application cannot be made"),
        ("[app:main]\nuse = call:test_cli:missing\n", "the application cannot be made"),
        ("no ini file", "the application cannot be made"),
        (
            INI.format(uri="memory://x", more="async.wrokers = 1"),
            "unknown setting async.wrokers; did you mean async.workers?",
        ),
        (INI.format(uri="memory://x", more="test.bare = 1"), "does not include pyramid_async"),
        (
            INI.format(uri="memory://x", more="async.store = ram"),
            "the jobs are in the RAM of the server (async.store); use the operator's page",
        ),
    ],
    ids=["missing", "no factory", "no ini", "bad setting", "without the package", "ram"],
)
def test_application_that_cannot_be_used_is_told(tmp_path, capsys, content, text):
    path = tmp_path / "other.ini"
    if content is not None:
        path.write_text(content)
    code, out, err = pasync_with(str(path), capsys, "list")
    assert (code, out) == (2, "")
    assert err.startswith(f"pasync: {path}: ")
    assert text in err
    assert "Traceback" not in err


def test_records_of_a_newer_format_are_told_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pyramid_async.zodb.FORMAT", 0)
    ini = write_ini(tmp_path, uri="memory://x")
    code, _, err = pasync_with(ini, capsys, "list")
    assert code == 2
    assert ": the jobs of this database are in format 1, and this version" in err


def test_database_of_a_running_server_is_left_alone(ini, pasync):
    with serving(ini):
        code, _, err = pasync("list")
        assert code == 2
        assert "another process has the database open" in err
        assert "use the operator's page" in err


def shell(command, **environ):
    """Run a line of the shell in which PASYNC is the command."""
    program = "import sys; from pyramid_async.cli import main; sys.exit(main())"
    return subprocess.run(
        ["bash", "-c", command.replace("PASYNC", f"{sys.executable} -c '{program}'")],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "ignore", **environ},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_reader_that_has_seen_enough_causes_no_traceback(ini, wait_for):
    run(ini, wait_for, (well,))
    said = shell(f"PASYNC '{ini}' list --json --limit 1000 | true; exit ${{PIPESTATUS[0]}}")
    assert (said.returncode, said.stderr) == (0, "")


def test_letters_that_the_terminal_has_not_are_escaped(ini, wait_for):
    with serving(ini) as scheduler:
        put(scheduler, well, title="日本", run_after=3600)
    said = shell(f"PASYNC '{ini}' list", PYTHONIOENCODING="latin-1")
    assert (said.returncode, said.stderr) == (0, "")
    assert r"\u65e5\u672c" in said.stdout


def test_output_that_cannot_be_written_is_no_finding(ini, wait_for):
    run(ini, wait_for, (well,))
    said = shell(f"PASYNC '{ini}' list >/dev/full")
    assert said.returncode == 2
    assert "No space left on device" in said.stderr


def test_command_is_installed():
    from importlib.metadata import entry_points

    [script] = entry_points(group="console_scripts", name="pasync")
    assert script.load() is main


# -- beside a running server ---------------------------------------------------------------


ZEO_CLIENT = """
%import ZEO
<zodb>
  <clientstorage>
    server {}:{}
    server-sync true
    wait-timeout 5
  </clientstorage>
</zodb>
"""


@pytest.mark.services
def test_shell_works_beside_a_server_on_zeo(tmp_path, capsys, wait_for):
    import ZEO

    address, stop = ZEO.server(str(tmp_path / "data.fs"), threaded=False)
    try:
        (tmp_path / "zodb.conf").write_text(ZEO_CLIENT.format(*address))
        ini = write_ini(tmp_path, f"zconfig://{tmp_path}/zodb.conf")
        with serving(ini) as scheduler:
            bad = put(scheduler, badly)
            wait_for(lambda: status(scheduler, bad) == "failed")
            assert bad in pasync_with(ini, capsys, "list")[1]
            new = pasync_with(ini, capsys, "retry", bad)[1].split()[-1]
            wait_for(lambda: status(scheduler, new) == "failed")
            later = put(scheduler, well, run_after=3600)
            assert pasync_with(ini, capsys, "cancel", later)[0] == 0
            assert status(scheduler, later) == "dismissed"
            assert pasync_with(ini, capsys, "purge", "--older-than", "0")[1] == "3 removed\n"
            assert status(scheduler, bad) is None
            assert pasync_with(ini, capsys, "check") == (0, "0 findings\n", "")
    finally:
        stop()


# -- what one bad job, or a reader that leaves, must not hide ------------------------------


def lose(directory, sid, tree):
    """Leave a reference to a record that the storage has not, as a bad pack does."""
    from pyramid_async.jobs import JobRecord

    with opened(directory) as root:
        bucket = getattr(root, tree)[root.shard(sid)]
        record = JobRecord.__new__(JobRecord)
        record._p_oid, record._p_jar = b"\0" * 6 + b"\xde\xad", bucket._p_jar
        record._p_deactivate()
        bucket[sid] = record


def archive(ini):
    with serving(ini) as scheduler:
        scheduler.executor.stop(5)
        sids = scheduler.transact(lambda bound: [job.sid for job in bound.jobs()])
        scheduler.store.archive(sids)


def test_lost_record_does_not_keep_the_other_jobs_from_the_command(ini, pasync, tmp_path):
    first, lost, last = (waiting(ini) for _ in range(3))
    lose(tmp_path, lost, "unfinished")
    code, out, _ = pasync("cancel", first, lost, last, "--json")
    found = json.loads(out)
    assert (code, found["done"]) == (1, {first: "dismissed", last: "dismissed"})
    assert "it is a lost object; remove() removes it" in found["errors"][lost]


def test_lost_record_can_be_removed(ini, pasync, tmp_path):
    lost = waiting(ini)
    lose(tmp_path, lost, "unfinished")
    with serving(ini) as scheduler:
        scheduler.transact(lambda bound: bound.remove(lost))
    assert pasync("check")[:2] == (0, "0 findings\n")


def test_whatever_goes_wrong_with_one_job_the_others_are_told(ini, pasync, tmp_path):
    first, bad, last = (waiting(ini) for _ in range(3))
    with opened(tmp_path) as root:
        root.unfinished[root.shard(bad)][bad].status = "of a later version"
    code, out, _ = pasync("cancel", first, bad, last, "--json")
    found = json.loads(out)
    assert (code, found["done"]) == (1, {first: "dismissed", last: "dismissed"})
    assert "KeyError" in found["errors"][bad]


def test_lost_record_does_not_keep_the_other_jobs_from_the_purge(ini, pasync, tmp_path, wait_for):
    sids = run(ini, wait_for, *[(well,)] * 3)
    archive(ini)
    lose(tmp_path, sids[0], "finished")
    assert pasync("purge", "--older-than", "0")[:2] == (0, "2 removed\n")


def test_check_tells_of_a_lost_record_that_no_list_has(ini, pasync, tmp_path):
    waiting(ini)
    lose(tmp_path, "00" * 16, "finished")
    code, out, _ = pasync("check")
    assert code == 1
    assert f"{'00' * 16} cannot be read" in out


def test_jobs_that_ended_just_before_the_server_are_listed(ini, pasync):
    with serving(ini) as scheduler:
        scheduler.executor.stop(5)
        sids = scheduler.transact(
            lambda bound: [bound.using(run_after=999).schedule(well) for _ in range(3000)]
        )
        scheduler.transact(lambda bound: [bound.cancel(sid) for sid in sids[:50]])
    found = json.loads(pasync("list", "--status", "dismissed", "--json")[1])
    assert {job["jobID"] for job in found["jobs"]} == set(sids[:50])


def test_id_of_a_user_may_be_no_json(ini, pasync):
    from uuid import UUID

    from pyramid_async.scheduler import Caller

    with serving(ini) as scheduler:
        caller = Caller(owner=UUID(int=1))
        scheduler.transact(lambda bound: bound.bind(bound._tm, caller).schedule(well))
    [job] = json.loads(pasync("list", "--json")[1])["jobs"]
    assert job["owner"] == str(UUID(int=1))


LOGGING = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys =
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ('{}',)
"""


def test_who_did_it_is_in_the_log(tmp_path, ini):
    sid = waiting(ini)
    log = tmp_path / "app.log"
    write_ini(tmp_path, more=LOGGING.format(log))
    assert shell(f"PASYNC '{ini}' cancel {sid}").returncode == 0
    assert f"job '{sid}' was dismissed by operator 'pasync'" in log.read_text()


@pytest.mark.parametrize("end", ["| true; exit ${PIPESTATUS[0]}", ">&-"])
@pytest.mark.parametrize(("line", "code"), [("check", 1), ("cancel x --json", 1), ("list", 0)])
def test_status_tells_what_was_found_whoever_reads_it(ini, tmp_path, end, line, code):
    spoil(tmp_path, waiting(ini, run_after=1000))
    said = shell(f"PASYNC '{ini}' {line} {end}")
    assert (said.returncode, said.stdout) == (code, "")
    assert "Traceback" not in said.stderr
