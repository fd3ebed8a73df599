"""The operator's shell: ``pasync development.ini list|show|cancel|retry|purge|check|processes``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from io import StringIO
from typing import Any

from pyramid.config import Configurator, global_registries
from pyramid.paster import get_app, setup_logging
from zc.lockfile import LockError  # type: ignore[import-untyped]

from . import manage
from .config import databases, idle
from .documents import timestamp
from .interfaces import AsyncError, IScheduler
from .jobs import FINAL, STATUSES
from .manage import Page, Report

# Jobs that one transaction looks at: nobody else waits for it.
SCAN = 10_000
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

EPILOG = "Exit status: 0; 1 when something was found or not done; 2 when the command cannot run."


class CannotRun(Exception):
    """Why the command cannot be carried out at all."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    args = parse(argv)
    with suppress(AttributeError):  # whoever replaced it may have another kind
        # A title may have letters that the terminal has not.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    said = StringIO()  # its status counts, whoever reads it to its end
    try:
        with application(args.ini) as scheduler, redirect_stdout(said):
            status = int(args.command(scheduler, args))
        write(said.getvalue())
        return status
    except CannotRun as error:
        print(f"pasync: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own status would be 1, which says that something was found.
        traceback.print_exc()
        discard_output()
        return 2


def write(text: str) -> None:
    if sys.stdout is None:  # it was closed
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough.
        discard_output()


def discard_output() -> None:
    """Write what is still buffered; let it go nowhere, where that fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- arguments -------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pasync", description=__doc__, epilog=EPILOG)
    parser.add_argument("ini", help="the application's ini file, or file#section")
    add = partial(add_command, parser.add_subparsers(required=True, metavar="COMMAND"))

    command = add("list", list_jobs, "List jobs: unfinished ones, then the last finished first.")
    add_statuses(command, STATUSES)
    command.add_argument("--text", default="", help="a part of title, user, function, error, ...")
    command.add_argument("--limit", type=count, default=50, help="how many at most (50)")
    command.add_argument("--cursor", help="where the list before ended")

    command = add("show", show, "Show all that is known of a job.")
    command.add_argument("sid", metavar="SID")

    command = add("cancel", cancel, "Dismiss jobs: none of their effects will be seen.")
    command.add_argument("sids", nargs="+", metavar="SID")

    command = add("retry", retry, "Schedule failed jobs again, as new jobs.")
    command.add_argument("sids", nargs="+", metavar="SID")

    command = add("purge", purge, "Remove finished jobs before they expire.")
    command.add_argument(
        "--older-than",
        type=duration,
        required=True,
        metavar="TIME",
        help="since they finished: seconds, or a number with s, m, h or d",
    )
    add_statuses(command, FINAL)

    add("check", check, "Tell what is inconsistent or stuck.")
    add("processes", processes, "List the processes that hold jobs.")
    return parser.parse_args(argv)


def add_command(commands: Any, name: str, command: Callable[..., int], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(command=command)
    return parser


def add_statuses(parser: Any, statuses: tuple[str, ...]) -> None:
    parser.add_argument(
        "--status",
        action="append",
        choices=statuses,
        help="only these; may be repeated",
    )


def count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def duration(text: str) -> float:
    """Return seconds."""
    fits = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    if fits is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; 90, 90s, 30m, 12h or 7d are")
    return float(fits[1]) * UNITS[fits[2] or "s"]


# -- the application -------------------------------------------------------------------


@contextmanager
def application(ini: str) -> Iterator[Any]:
    """The scheduler of the application; it runs no jobs in this process."""
    token = idle.set(True)
    try:
        registry = loaded(ini)
    finally:
        idle.reset(token)
    config = Configurator(registry=registry)
    config.begin()  # for subscribers that ask for the current registry
    try:
        yield usable(registry.queryUtility(IScheduler), ini)
    finally:
        config.end()
        for database in databases(registry).values():
            database.close()


def loaded(ini: str) -> Any:
    """Make the application and return its registry.

    Without a request: a root factory may want a host, or a transaction to write in.
    """
    try:
        setup_logging(ini)  # who did what is told at level INFO
        get_app(ini)
        return global_registries.last
    except LockError as error:
        raise CannotRun(
            f"{ini}: another process has the database open ({error}); on a FileStorage stop it"
            " first, or use the operator's page"
        ) from None
    except AsyncError as error:
        raise CannotRun(f"{ini}: the application cannot be made: {error}") from error
    except Exception as error:
        raise CannotRun(f"{ini}: the application cannot be made: {error!r}") from error


def usable(scheduler: Any, ini: str) -> Any:
    if scheduler is None:
        raise CannotRun(f"{ini}: the application does not include pyramid_async")
    if not scheduler.store.durable:
        raise CannotRun(
            f"{ini}: the jobs are in the RAM of the server (async.store); use the operator's page"
        )
    return scheduler


# -- commands --------------------------------------------------------------------------


def list_jobs(scheduler: Any, args: argparse.Namespace) -> int:
    statuses = args.status or STATUSES
    try:
        found = manage.follow(
            scheduler, args.limit, args.cursor, statuses=statuses, text=args.text, scan=SCAN
        )
    except AsyncError as error:
        raise CannotRun(str(error)) from None
    if args.json:
        jobs = [manage.as_json(job) for job in found.jobs]
        return put_json({"jobs": jobs, "next": found.next})
    print_jobs(found)
    return 0


def print_jobs(found: Page) -> None:
    for job in found.jobs:
        print(line(job))
    if found.next is not None:
        print(f"there are more: --cursor {found.next}")


def line(job: Report) -> str:
    """Return a job in one line."""
    when, owner = timestamp(job.when) or "-", job.owner or "-"
    words = f"{job.sid} {job.status:<10} {when:<24} {owner} {job.title}"
    text = manage.as_text(job)
    return one_line(f"{words}: {text}" if text else words)


def one_line(text: str) -> str:
    """Return the text without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def show(scheduler: Any, args: argparse.Namespace) -> int:
    try:
        job = manage.as_json(manage.show(scheduler, args.sid))
    except AsyncError as error:
        return not_done(args, {args.sid: str(error)})
    if args.json:
        return put_json(job)
    failure = job.pop("failure", {})
    for name, value in [*job.items(), *failure.items()]:
        if name != "traceback":
            print(f"{name:<12} {one_line(str(value))}")
    for each in failure.get("traceback", "").splitlines():
        print(f"  {one_line(each)}")
    return 0


def cancel(scheduler: Any, args: argparse.Namespace) -> int:
    def each(sid: str) -> str:
        if not manage.cancel(scheduler, sid, WHO):
            raise AsyncError(f"job {sid!r} had ended before")
        return "dismissed"

    return for_each(args, each)


def retry(scheduler: Any, args: argparse.Namespace) -> int:
    return for_each(args, lambda sid: f"retried as {manage.retry(scheduler, sid, WHO)}")


# As whom the log names whoever uses the shell.
WHO = "pasync"


def for_each(args: argparse.Namespace, work: Callable[[str], str]) -> int:
    """Do something to each job, whatever becomes of the others."""
    done: dict[str, str] = {}
    errors: dict[str, str] = {}
    for sid in args.sids:
        try:
            done[sid] = work(sid)
        except AsyncError as error:
            errors[sid] = str(error)
        except Exception as error:
            # What was done before is done, and is told.
            traceback.print_exc()
            errors[sid] = f"job {sid!r}: {error!r}"
    if not args.json:
        for sid, words in done.items():
            print(f"{sid} {words}")
    return not_done(args, errors, done=done)


def not_done(args: argparse.Namespace, errors: dict[str, str], **told: Any) -> int:
    """Tell the errors, in JSON with what else is *told*; return the exit status."""
    if args.json:
        put_json({**told, "errors": errors})
    else:
        for error in errors.values():
            print(f"pasync: {error}", file=sys.stderr)
    return bool(errors)


def purge(scheduler: Any, args: argparse.Namespace) -> int:
    removed = manage.purge(scheduler, args.older_than, args.status or FINAL)
    if args.json:
        return put_json({"removed": removed})
    print(f"{removed} removed")
    return 0


def check(scheduler: Any, args: argparse.Namespace) -> int:
    findings = manage.check(scheduler)
    if args.json:
        put_json({"findings": [{"jobID": sid, "text": text} for sid, text in findings]})
        return bool(findings)
    for sid, text in findings:
        print(one_line(f"{sid} {text}"))
    print(f"{len(findings)} findings")
    return bool(findings)


def processes(scheduler: Any, args: argparse.Namespace) -> int:
    shown = manage.processes(scheduler)
    if args.json:
        return put_json({"processes": [process_json(process) for process in shown]})
    for process in shown:
        words = "silent since" if process.silent else "last sign of life"
        jobs = " ".join(process.running) or "nothing"
        print(one_line(f"{process.name} {words} {timestamp(process.seen)}; runs {jobs}"))
    return 0


def process_json(process: manage.Process) -> dict[str, Any]:
    return {**process._asdict(), "seen": timestamp(process.seen)}


def put_json(value: Any) -> int:
    # A user's id may be of any kind.
    print(json.dumps(value, indent=2, default=str))
    return 0
