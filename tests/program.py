"""A program that uses the public names with type hints.  `mypy` checks it; nobody runs it."""

from __future__ import annotations

from typing import Any

from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response

from pyramid_async import (
    FileResult,
    IScheduler,
    JobStatus,
    OperationFailed,
    current_job,
    get_application,
)
from pyramid_async.scheduler import Scheduler, TransactionalScheduler
from pyramid_async.testing import inline, manual
from pyramid_async.transactional import transactional


def pay(amount: int) -> int:
    job = current_job()
    job.request.scheduler.schedule(print)
    for number in job.track(range(amount)):
        job.progress(number, amount, "paid")
        job.checkpoint(number)
    if job.attempt > 1:
        raise OperationFailed(f"{job.sid} failed before")
    return amount + (job.cursor or 0)


def receipt() -> FileResult:
    return FileResult(b"paid", "text/plain", "receipt.txt")


def start(request: Request) -> Response:
    scheduler: Scheduler = request.scheduler
    sid: str = scheduler.using(title="Payment", key="payment").schedule(pay, 5)
    status: JobStatus | None = scheduler.status(sid)
    assert status is not None
    answer: Response = scheduler.accepted(status.sid)
    return answer


def script(registry: Any) -> list[str]:
    scheduler: Scheduler = registry.getUtility(IScheduler)
    collected = scheduler.get_result(scheduler.schedule(receipt))
    if collected:
        value, error = collected
        print(value, error)
    get_application(registry, "bank").close()
    return [job.status for job in scheduler.jobs(status="failed")]


@transactional
def count(numbers: list[int]) -> int:
    return sum(numbers)


def tests(registry: Any) -> int:
    with inline(registry) as ended, manual(TransactionalScheduler()) as jobs:
        ended.advance(60.0)
        return len(jobs.drain()) + count([1, 2])


def main() -> Any:
    with Configurator() as config:
        config.include("pyramid_async")
        return config.make_wsgi_app()
