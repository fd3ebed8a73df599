"""What takes longer than a request should; every function here runs as a job.

A job's changes are committed together with its success. A job that fails or is cancelled
half-way leaves nothing behind, so none of them needs to clean up.
"""

from __future__ import annotations

import csv
import io
import re
import time

from BTrees.Length import Length
from ZODB.blob import Blob

from pyramid_async import FileResult, OperationFailed, current_job

from .csvfile import BrokenRow, CsvFile, NotCsv, counted
from .models import Dataset, DatasetWriter

LONGEST_ECHO = 1000  # characters
ECHO_SECONDS = 5.0


def import_csv(dataset: Dataset, encoding: str | None = None) -> dict[str, int]:
    """Read the dataset's upload into its rows; broken rows are left out and listed."""
    if dataset.upload is None:
        raise OperationFailed("It was imported meanwhile.")
    # When an operator has a failed import run again, that is another job than the request knew.
    dataset.sid = current_job().sid or dataset.sid
    try:
        read_upload(dataset, encoding)
    except NotCsv as error:
        raise OperationFailed(str(error)) from error
    if dataset.rows_broken and not dataset.rows_kept:
        first = dataset.broken[0]
        raise OperationFailed(f"No row could be read. Row {first.row}: {first.reason}.")
    return {"rows": dataset.rows_kept, "broken": dataset.rows_broken}


def read_upload(dataset: Dataset, encoding: str | None) -> None:
    job, writer = current_job(), DatasetWriter(dataset)
    # Mode c is the committed file itself, which no transaction has to look after.
    with dataset.upload.open("c") as stream:
        size = stream.seek(0, io.SEEK_END)

        def report() -> None:
            job.progress(stream.tell(), size, progress_message(dataset))

        file = CsvFile(stream, encoding, report)
        dataset.columns, dataset.encoding = tuple(file.columns), file.encoding
        for row in file:
            if isinstance(row, BrokenRow):
                writer.leave_out(row)
            else:
                writer.add(tuple(row))
    writer.finish()


def progress_message(dataset: Dataset) -> str:
    message = f"{counted(dataset.rows_kept, 'row')} read"
    if dataset.rows_broken:
        message += f", {counted(dataset.rows_broken, 'broken row')} left out"
    return message


def export_csv(dataset: Dataset, query: str = "") -> FileResult:
    """Write the rows that match into a file to download."""
    blob = Blob()
    total = dataset.page(0, 0, query).total
    # With its mark, so that spreadsheets take it for UTF-8.
    with io.TextIOWrapper(blob.open("w"), "utf-8-sig", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(dataset.columns)
        for row in current_job().track(dataset.matching(query), total, "Writing the file"):
            writer.writerow(row)
    return FileResult(blob, "text/csv; charset=utf-8", export_name(dataset.name))


def export_name(name: str) -> str:
    stem = re.sub(r"[^\w.-]+", "_", name.removesuffix(".csv")).strip("._") or "dataset"
    return f"{stem}-export.csv"


def count_slowly(counter: Length, steps: int = 60, pause: float = 0.5) -> int:
    """Add one to the counter at every step, with a rest after each."""
    for step in range(steps):
        current_job().progress(step, steps, f"Step {step + 1} of {steps}")
        counter.change(1)
        time.sleep(pause)
    return counter()


def echo(text: str) -> str:
    """Return the text, after a while. Anybody may call it, with anything that is JSON."""
    if not isinstance(text, str) or len(text) > LONGEST_ECHO:
        raise OperationFailed(f"What is echoed is a text of up to {LONGEST_ECHO:,} characters.")
    steps = 50
    for _ in current_job().track(range(steps), message="Thinking it over"):
        time.sleep(ECHO_SECONDS / steps)
    return text


def fail_politely() -> None:
    """Fail with a text for the user."""
    current_job().progress(1, 2, "Asking the oracle")
    time.sleep(1)
    raise OperationFailed("The oracle is closed on weekends. Come back on Monday.")


def fail_unexpectedly() -> None:
    """Fail as a faulty program does: the user sees a number that is found in the log."""
    current_job().progress(1, 2, "Dividing by zero")
    time.sleep(1)
    1 / 0  # noqa: B018
