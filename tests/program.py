"""A program that uses the public names with type hints.  `mypy` checks it; nobody runs it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from persistent import Persistent
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
from pyramid_async.scheduler import (
    PersistentTransactionalScheduler,
    Scheduler,
    TransactionalScheduler,
)
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


class Account(Persistent):
    balance = Decimal(0)

    def book(self, amount: Decimal, *, text: str = "") -> None:
        self.balance += amount
        current_job().progress(0, Decimal("99.5"))
        current_job().progress(self.balance, Decimal("99.5"), text)


async def book_later(account: Account, amount: Decimal) -> None:
    account.book(amount, text="later")


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
    scheduler.schedule(pay, "5")  # type: ignore[arg-type]
    scheduler.schedule(pay, tip=1)  # type: ignore[call-arg]
    scheduler.using(run_after=5, retry_on=(OSError, ValueError), timeout=2.5)
    scheduler.using(titel="Payment")  # type: ignore[call-arg]
    scheduler.using(max_attempts="3")  # type: ignore[arg-type]
    collected = scheduler.get_result(scheduler.schedule(receipt))
    if collected:
        value, error = collected
        print(value, error)
    get_application(registry, "bank").close()
    return [job.status for job in scheduler.jobs(status="failed")]


def book(scheduler: PersistentTransactionalScheduler, account: Account) -> None:
    scheduler.schedule(account.book, Decimal(1), text="now")
    scheduler.schedule(book_later, account, Decimal(2))
    scheduler.schedule(count, numbers=[1, 2])
    # What would fail in a worker is found where it is scheduled.
    scheduler.schedule(book_later, account)  # type: ignore[call-arg]
    scheduler.schedule(book_later, account, "2")  # type: ignore[arg-type]


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
