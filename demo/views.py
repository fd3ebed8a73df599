"""The pages: a form schedules a job in the request's own transaction and leads to its page."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import IO, Any

from pyramid.config import Configurator
from pyramid.csrf import get_csrf_token
from pyramid.events import BeforeRender, NewRequest
from pyramid.exceptions import BadCSRFToken
from pyramid.httpexceptions import HTTPNotFound, HTTPSeeOther
from pyramid.interfaces import IRoutesMapper
from pyramid.request import Request
from pyramid.response import FileResponse
from pyramid.view import exception_view_config, notfound_view_config, view_config
from ZODB.blob import Blob

from pyramid_async import JobStatus

from . import jobs
from .charts import Timeline
from .csvfile import ENCODINGS, MAX_ROWS, counted
from .elsewhere import elsewhere_url
from .models import Dataset
from .sample import SAMPLE
from .users import is_operator

ROWS_OF_A_PAGE = 50
LISTED_JOBS = 20
DRAWN_JOBS = 12
LONGEST_QUERY = 200  # characters

STATUS_TEXTS = {
    "accepted": "waiting",
    "running": "running",
    "successful": "finished",
    "failed": "failed",
    "dismissed": "cancelled",
}


def includeme(config: Configurator) -> None:
    config.add_static_view("static", "demo:static", cache_max_age=60)
    config.add_route("index", "/")
    config.add_route("sample", "/sample.csv")
    config.add_route("upload", "/upload", request_method="POST")
    config.add_route("start", "/start/{name}", request_method="POST")
    config.add_route("dataset", "/datasets/{id}", factory=find_dataset)
    for name in ("import", "export", "delete"):
        pattern = f"/datasets/{{id}}/{name}"
        config.add_route(name, pattern, factory=find_dataset, request_method="POST")
    config.add_route("jobs", "/jobs")
    config.add_route("job", "/jobs/{sid}")
    config.add_route("cancel", "/jobs/{sid}/cancel", request_method="POST")
    config.add_subscriber(read_form, NewRequest)
    config.add_subscriber(add_names, BeforeRender)
    config.scan(__name__)


class DamagedForm(Exception):
    """A form that cannot be read."""


def read_form(event: NewRequest) -> None:
    """Let what is wrong with a form be found here; WebOb keeps what it read."""
    try:
        token = event.request.POST.get("csrf_token", "")
    # The last is how WebOb refuses what says that it is not UTF-8.
    except (ValueError, LookupError, DeprecationWarning) as error:
        raise DamagedForm from error
    if not isinstance(token, str):
        raise DamagedForm


def text_field(request: Request, name: str) -> str:
    """Return what a field holds, or "" where there is none, or a file."""
    value = request.params.get(name)
    return without_surrogates(value) if isinstance(value, str) else ""


def without_surrogates(text: str) -> str:
    """Return the text with a question mark for each; UTF-8 has none, so no page can."""
    return text.encode("utf-8", "replace").decode()


def add_names(names: BeforeRender) -> None:
    """Give every template what all of them need."""
    request = names["request"]
    names.update(
        counted=counted,
        csrf_token=get_csrf_token(request),
        status_texts=STATUS_TEXTS,
        time_text=lambda seconds: time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)),
        clock_text=lambda seconds: time.strftime("%H:%M:%S", time.localtime(seconds)),
        sees=lambda job: job is not None and sees(request, job),
        operator=is_operator(request),
        manage_url=manage_url(request),
        elsewhere_url=elsewhere_url(request),
    )


def manage_url(request: Request) -> str | None:
    """Return the address of the library's page for operators, for those who may see it."""
    route = request.registry.queryUtility(IRoutesMapper).get_route("async.manage")
    return request.route_path("async.manage") if route and is_operator(request) else None


def sees(request: Request, job: JobStatus) -> bool:
    """Say whether the user may see the job, as the library's own resource decides."""
    return job.owner in (None, request.authenticated_userid) or is_operator(request)


def find_dataset(request: Request) -> Dataset:
    dataset = request.catalogue.datasets.get(request.matchdict["id"])
    if dataset is None:
        raise HTTPNotFound("There is no such dataset; it may have been deleted.")
    return dataset


# -- the first page --------------------------------------------------------------------


@view_config(route_name="index", renderer="templates/index.jinja2")
def index(request: Request) -> dict[str, Any]:
    status = request.scheduler.status
    datasets = request.catalogue.newest_first()
    return {
        "datasets": [(dataset, status(dataset.sid)) for dataset in datasets],
        "encodings": ENCODINGS,
        "max_rows": MAX_ROWS,
        "counter": request.catalogue.counter(),
    }


@view_config(route_name="sample")
def download_sample(request: Request) -> FileResponse:
    response = FileResponse(sample_file(request), request, content_type="text/csv")
    response.content_disposition = f'attachment; filename="{SAMPLE}"'
    return response


def sample_file(request: Request) -> Path:
    return Path(request.registry.settings["demo.data"]) / SAMPLE


# -- imports ---------------------------------------------------------------------------


@view_config(route_name="upload")
def upload(request: Request) -> HTTPSeeOther:
    file = request.POST.get("file")
    # A text has no file, and in a part that is a form by itself it is None.
    if getattr(file, "file", None) is None:
        return to_index(request, "Choose a file first.")
    dataset = add_dataset(request, file.filename, file.file)
    return start_import(request, dataset)


def add_dataset(request: Request, name: str, stream: IO[bytes]) -> Dataset:
    """Keep the file as a blob: it crosses to the job as a reference, whatever its size."""
    blob = Blob()
    stream.seek(0)  # an earlier attempt of pyramid_retry has read it
    with blob.open("w") as target:
        shutil.copyfileobj(stream, target, 1 << 20)
    dataset = Dataset(tidy_name(name), blob)
    request.catalogue.add(dataset)
    return dataset


def tidy_name(name: str) -> str:
    """Return a file name without its folder and without what cannot be seen."""
    name = re.split(r"[/\\]", name)[-1]
    return "".join(filter(str.isprintable, name)).strip()[:100] or "upload.csv"


def start_import(request: Request, dataset: Dataset) -> HTTPSeeOther:
    encoding = request.POST.get("encoding")
    if encoding not in ENCODINGS:
        encoding = None  # to be detected
    scheduler = request.scheduler.using(title=f"Import {dataset.name}")
    dataset.sid = scheduler.schedule(jobs.import_csv, dataset, encoding)
    return to_job(request, dataset.sid)


@view_config(route_name="import")
def import_again(request: Request) -> HTTPSeeOther:
    dataset = request.context
    job = request.scheduler.status(dataset.sid)
    if dataset.complete or (job is not None and not job.done):
        return HTTPSeeOther(request.route_path("dataset", id=dataset.id))
    return start_import(request, dataset)


# -- datasets --------------------------------------------------------------------------


@view_config(route_name="dataset", renderer="templates/dataset.jinja2")
def show_dataset(request: Request) -> dict[str, Any]:
    dataset = request.context
    query = query_of(request)
    number = page_number(request)
    page = dataset.page((number - 1) * ROWS_OF_A_PAGE, ROWS_OF_A_PAGE, query)
    return {
        "dataset": dataset,
        "job": request.scheduler.status(dataset.sid),
        "encodings": ENCODINGS,
        "query": query,
        "page": page,
        "number": number,
        "pages": max(1, -(-page.total // ROWS_OF_A_PAGE)),
        "first": (number - 1) * ROWS_OF_A_PAGE + 1,
    }


def query_of(request: Request) -> str:
    return text_field(request, "q").strip()[:LONGEST_QUERY]


def page_number(request: Request) -> int:
    text = text_field(request, "page")
    return max(1, int(text)) if re.fullmatch("[0-9]{1,6}", text) else 1


@view_config(route_name="export")
def export(request: Request) -> HTTPSeeOther:
    dataset, query = request.context, query_of(request)
    if not dataset.complete:
        return to_index(request, f"{dataset.name} is not imported yet.")
    scheduler = request.scheduler.using(title=f"Export {dataset.name}")
    return to_job(request, scheduler.schedule(jobs.export_csv, dataset, query))


@view_config(route_name="delete")
def delete(request: Request) -> HTTPSeeOther:
    dataset = request.context
    request.scheduler.cancel(dataset.sid)
    del request.catalogue.datasets[dataset.id]
    return to_index(request, f"{dataset.name} was deleted.")


# -- other jobs ------------------------------------------------------------------------


@view_config(route_name="start", match_param="name=sample")
def start_sample(request: Request) -> HTTPSeeOther:
    with sample_file(request).open("rb") as stream:
        return start_import(request, add_dataset(request, SAMPLE, stream))


@view_config(route_name="start", match_param="name=count")
def start_count(request: Request) -> HTTPSeeOther:
    scheduler = request.scheduler.using(title="Count slowly")
    return to_job(request, scheduler.schedule(jobs.count_slowly, request.catalogue.counter))


@view_config(route_name="start", match_param="name=echo")
def start_echo(request: Request) -> HTTPSeeOther:
    text = text_field(request, "text")[: jobs.LONGEST_ECHO]
    return to_job(request, request.scheduler.using(title="Echo").schedule(jobs.echo, text))


@view_config(route_name="start", match_param="name=fail")
def start_failure(request: Request) -> HTTPSeeOther:
    scheduler = request.scheduler.using(title="Fail with a reason")
    return to_job(request, scheduler.schedule(jobs.fail_politely))


@view_config(route_name="start", match_param="name=crash")
def start_crash(request: Request) -> HTTPSeeOther:
    scheduler = request.scheduler.using(title="Fail unexpectedly")
    return to_job(request, scheduler.schedule(jobs.fail_unexpectedly))


# -- jobs ------------------------------------------------------------------------------


@view_config(route_name="jobs", renderer="templates/jobs.jinja2")
def list_jobs(request: Request) -> dict[str, Any]:
    own = request.scheduler.jobs()[:LISTED_JOBS]
    return {
        "jobs": own,
        "timeline": Timeline(own[:DRAWN_JOBS]),
        "limit": LISTED_JOBS,
        "running": any(not job.done for job in own),
    }


@view_config(route_name="job", renderer="templates/job.jinja2")
def show_job(request: Request) -> dict[str, Any]:
    job = find_job(request)
    echoed = job.process_id == "echo" and job.status == "successful"
    return {
        "job": job,
        "dataset": imported_by(request, job),
        "counter": request.catalogue.counter(),
        "answer": without_surrogates(request.scheduler.outcome(job.sid)[1]) if echoed else None,
    }


def find_job(request: Request) -> JobStatus:
    job = request.scheduler.status(request.matchdict["sid"])
    if job is None or not sees(request, job):
        raise HTTPNotFound("There is no such job. Finished jobs are forgotten after an hour.")
    return job


def imported_by(request: Request, job: JobStatus) -> Dataset | None:
    datasets = request.catalogue.datasets.values()
    return next((dataset for dataset in datasets if dataset.sid == job.sid), None)


@view_config(route_name="cancel")
def cancel(request: Request) -> HTTPSeeOther:
    """Cancel a job where there is no JavaScript; script sends DELETE to the job itself."""
    job = find_job(request)
    request.scheduler.cancel(job.sid)
    return to_job(request, job.sid)


def to_job(request: Request, sid: str) -> HTTPSeeOther:
    return HTTPSeeOther(request.route_path("job", sid=sid))


def to_index(request: Request, message: str) -> HTTPSeeOther:
    request.session.flash(message)
    return HTTPSeeOther(request.route_path("index"))


# -- what goes wrong -------------------------------------------------------------------


@notfound_view_config(renderer="templates/message.jinja2")
def not_found(error: HTTPNotFound, request: Request) -> dict[str, str]:
    request.response.status_int = 404
    text = error.detail if request.matched_route else None
    return {"title": "Not found", "text": text or "There is nothing at this address."}


@exception_view_config(BadCSRFToken, renderer="templates/message.jinja2")
def expired_form(error: BadCSRFToken, request: Request) -> dict[str, str]:
    request.response.status_int = 400
    return {
        "title": "This form has expired",
        "text": "Go back, reload the page and send it again. The page needs cookies.",
    }


@exception_view_config(UnicodeDecodeError, renderer="templates/message.jinja2")
def damaged_address(error: UnicodeDecodeError, request: Request) -> dict[str, str]:
    """Answer for a path or a query that is not UTF-8, which WebOb does not read."""
    request.response.status_int = 400
    return {"title": "Damaged address", "text": "The address is not UTF-8."}


@exception_view_config(DamagedForm, renderer="templates/message.jinja2")
def damaged_form(error: DamagedForm, request: Request) -> dict[str, str]:
    request.response.status_int = 400
    return {"title": "Damaged form", "text": "The form cannot be read. Go back and send it again."}
