"""The operator's pages: plain HTML, for whoever has the permission ``async.manage``."""

from __future__ import annotations

import math
from html import escape
from importlib.resources import files
from typing import Any

from pyramid.csrf import (
    CookieCSRFStoragePolicy,
    LegacySessionCSRFStoragePolicy,
    check_csrf_origin,
)
from pyramid.httpexceptions import HTTPSeeOther
from pyramid.interfaces import ICSRFStoragePolicy, ISessionFactory
from pyramid.response import Response

from . import manage
from .documents import job_url, no_such_job, timestamp
from .inputs import form_fields, parameters
from .interfaces import IScheduler, JobNotFound, NotRetriable
from .jobs import FINAL, STATUSES, UNFINISHED
from .manage import BadCursor, Page, Process, Report
from .resources import add_resource
from .views import manages

LIMIT = 50
# Jobs of each list on the first page.
FEW = 10

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'",
    # Not no-referrer: then a form would come from nowhere, and the check refuses that over TLS.
    "Referrer-Policy": "same-origin",
}
_STYLE = "pyramid_async.style"

# Name of a list -> its heading and what is in it.
LISTS = {
    "unfinished": ("Unfinished jobs", UNFINISHED),
    "failed": ("Failed jobs", ("failed",)),
    "finished": ("Recent jobs", FINAL),
    "successful": ("Successful jobs", ("successful",)),
    "dismissed": ("Dismissed jobs", ("dismissed",)),
    "all": ("All jobs", STATUSES),
}

# What a page tells after something was done.
TOLD = {
    "cancelled": "The job is dismissed: none of its effects will be seen.",
    "late": "The job had ended before it could be cancelled.",
    "retried": "The failed job was scheduled again; this is the new one.",
}


def add_pages(config: Any) -> None:
    """Add the routes of the pages and of their style sheet."""
    config.registry[_STYLE] = files(__package__).joinpath("static", "manage.css").read_bytes()
    add_resource(config, "async.manage", "manage", api=False, GET=overview)
    add_resource(config, "async.manage_style", "manage.css", api=False, GET=style)
    add_resource(config, "async.manage_job", "manage/{sid}", api=False, GET=job, POST=act)


def style(request: Any) -> Any:
    """GET, HEAD: the style sheet."""
    return Response(request.registry[_STYLE], content_type="text/css", charset="utf-8")


# -- views -----------------------------------------------------------------------------


def overview(request: Any) -> Any:
    """GET, HEAD: the first page, or the list that is asked for."""
    scheduler = for_operators(request)
    name, text = parameter(request, "status"), parameter(request, "q")
    if name not in {"", *LISTS}:
        return refusal(request, 400, "No such list", f"status must be one of {', '.join(LISTS)}.")
    if not name and not text:
        return html(request, "Jobs", *first_page(request, scheduler))
    try:
        return html(request, *one_list(request, scheduler, name or "all", text))
    except BadCursor:
        return refusal(request, 400, "No such page", "The cursor is none that a page gave.")


def job(request: Any) -> Any:
    """GET, HEAD: all that is known of one job."""
    scheduler = for_operators(request)
    try:
        found = manage.show(scheduler, request.matchdict["sid"])
    except JobNotFound:
        return gone(request)
    told = TOLD.get(parameter(request, "told"))
    return html(request, found.title, told and notice(told), *details(request, found))


def act(request: Any) -> Any:
    """POST: cancel a job, or schedule a failed one again."""
    scheduler = for_operators(request)
    if not is_ours(request):
        return refusal(request, 400, "This form has expired", EXPIRED)
    sid, action = request.matchdict["sid"], field(request, "action")
    who = request.authenticated_userid
    try:
        if action == "cancel":
            return to_job(request, sid, CANCELLED[manage.cancel(scheduler, sid, who)])
        if action == "retry":
            return to_job(request, manage.retry(scheduler, sid, who), "retried")
    except JobNotFound:
        return gone(request)
    except NotRetriable as error:
        return refusal(request, 409, "The job cannot be retried", f"It stays as it is: {error}.")
    return refusal(request, 400, "Nothing was done", "action must be cancel or retry.")


CANCELLED = {True: "cancelled", False: "late"}
EXPIRED = "Go back, reload the page and send it again. The page needs cookies."


def for_operators(request: Any) -> Any:
    """Return the scheduler, or raise the 404 that a stranger gets for everything."""
    if not manages(request):
        raise no_such_job()
    return scheduler_of(request)


def parameter(request: Any, name: str) -> str:
    return "".join(parameters(request, name)[:1]).strip()


def to_job(request: Any, sid: str, told: str) -> Any:
    query = {"told": told}
    return HTTPSeeOther(job_url(request.route_url, "async.manage_job", sid, _query=query))


# -- the check of forms ----------------------------------------------------------------

# For applications that have no sessions.
COOKIE = CookieCSRFStoragePolicy("async_csrf", httponly=True)


def csrf_policy(request: Any) -> Any:
    """Return what keeps the tokens of the application's forms, or else of ours."""
    policy = request.registry.getUtility(ICSRFStoragePolicy)
    sessions = request.registry.queryUtility(ISessionFactory)
    if isinstance(policy, LegacySessionCSRFStoragePolicy) and sessions is None:
        return COOKIE
    return policy


def is_ours(request: Any) -> bool:
    """Say whether one of our forms was sent, whatever the application checks itself."""
    check_csrf_origin(request)
    token = field(request, "csrf_token")
    # Before 2.1 Pyramid fails to compare what has no Latin-1.
    return token.isascii() and csrf_policy(request).check_csrf_token(request, token)


def field(request: Any, name: str) -> str:
    value = form_fields(request).get(name, "")
    return value if isinstance(value, str) else ""


# -- markup ----------------------------------------------------------------------------


class Html(str):
    """Text that is markup already."""


def h(element: str, *content: Any, **attributes: Any) -> Html:
    """Return an element; its content is escaped unless it is Html, and left out where None."""
    given = "".join(
        f' {name.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{element}{given}>{together(*content)}</{element}>")


def together(*content: Any) -> Html:
    shown = (part for part in content if part is not None)
    return Html("".join(p if isinstance(p, Html) else escape(str(p)) for p in shown))


def void(element: str, **attributes: Any) -> Html:
    """Return an element that has no content and no end."""
    return Html(h(element, **attributes).removesuffix(f"</{element}>"))


def html(request: Any, title: str, *content: Any, status: int = 200) -> Any:
    """Return a page as a response."""
    head = h(
        "head",
        void("meta", charset="utf-8"),
        h("title", f"{title} – operator"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        void("link", rel="stylesheet", href=request.route_path("async.manage_style")),
    )
    home = h("a", "Jobs", href=request.route_path("async.manage"), class_="home")
    now = h("span", "as of ", moment(scheduler_of(request).store.clock()), class_="muted")
    body = h(
        "body",
        h("header", h("nav", home, search(request), aria_label="Jobs"), now),
        h("main", h("h1", title), *content),
    )
    text = f"<!doctype html>\n{h('html', head, body, lang='en')}\n"
    response = Response(text.encode("utf-8", "replace"), status, content_type="text/html")
    response.charset = "utf-8"
    response.headers.update(HEADERS)
    return response


def scheduler_of(request: Any) -> Any:
    return request.registry.getUtility(IScheduler)


def refusal(request: Any, status: int, title: str, text: str) -> Any:
    return html(request, title, h("p", text), status=status)


def gone(request: Any) -> Any:
    return refusal(request, 404, "No such job", "It is unknown, has expired or was removed.")


def notice(text: str) -> Html:
    return h("p", text, class_="notice", role="status")


def search(request: Any) -> Html:
    """Return the form that asks for a list."""
    asked = parameter(request, "status") or "all"
    options = (
        h("option", heading, value=name, selected="selected" if name == asked else None)
        for name, (heading, _) in LISTS.items()
    )
    return h(
        "form",
        h("label", "List ", h("select", *options, name="status")),
        h(
            "label",
            "Text ",
            void("input", type="search", name="q", value=parameter(request, "q"), maxlength=200),
        ),
        h("button", "Show"),
        method="get",
        action=request.route_path("async.manage"),
        role="search",
    )


# -- lists -----------------------------------------------------------------------------


def first_page(request: Any, scheduler: Any) -> list[Html]:
    parts = [processes(request, scheduler)]
    for name in ("unfinished", "failed", "finished"):
        heading, statuses = LISTS[name]
        found = manage.page(scheduler, statuses, limit=FEW)
        more = h("p", h("a", "More", href=list_path(request, status=name)))
        parts.append(
            h("section", h("h2", heading), table(request, found), more if found.next else None)
        )
    return parts


def one_list(request: Any, scheduler: Any, name: str, text: str) -> tuple[str, Html, Html | None]:
    heading, statuses = LISTS[name]
    cursor = parameter(request, "cursor")
    found = manage.page(scheduler, statuses, text, cursor, LIMIT)
    if found.next is None:
        return heading, table(request, found), None
    few = len(found.jobs) < LIMIT
    words = f"Looked at {manage.SCAN:,} jobs; look at those that follow" if few else "Next page"
    href = list_path(request, status=name, q=text, cursor=found.next)
    return heading, table(request, found), h("p", h("a", words, href=href, rel="next"))


def list_path(request: Any, **query: str) -> str:
    return request.route_path("async.manage", _query={k: v for k, v in query.items() if v})


def table(request: Any, found: Page) -> Html:
    if not found.jobs:
        return h("p", "None.", class_="muted")
    columns = ("Job", "Status", "User", "When", "What", h("span", "Action", class_="hidden"))
    head = h("tr", *(h("th", c, scope="col", role="columnheader") for c in columns), role="row")
    rows = (row(request, job) for job in found.jobs)
    return h("table", h("thead", head, role="rowgroup"), h("tbody", *rows, role="rowgroup"),
             role="table")  # fmt: skip


def row(request: Any, job: Report) -> Html:
    name = h("a", job.title, href=job_path(request, job.sid))
    return h(
        "tr",
        h("th", name, " ", h("code", job.sid[:8], title=job.sid), scope="row", role="rowheader"),
        cell("Status", pill(job.status)),
        cell("User", job.owner),
        cell("When", when(request, job)),
        cell("What", manage.short(manage.as_text(job))),
        cell("", buttons(request, job)),
        role="row",
    )


def cell(label: str, content: Any) -> Html:
    # The label is shown where the table is too narrow for columns.
    return h("td", content, data_label=label, role="cell")


def pill(status: str) -> Html:
    return h("span", status, class_=f"status {status}")


def job_path(request: Any, sid: str) -> str:
    return job_url(request.route_path, "async.manage_job", sid)


def when(request: Any, job: Report) -> Any:
    seconds = job.when
    if seconds is None:
        return None
    now = scheduler_of(request).store.clock()
    return h("time", ago(now - seconds), datetime=timestamp(seconds), title=timestamp(seconds))


def ago(seconds: float) -> str:
    """Return a time in a few words: how long ago, or in how long."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if abs(seconds) >= 2 * length:
            count = f"{math.floor(abs(seconds) / length)} {unit}"
            return f"{count} ago" if seconds > 0 else f"in {count}"
    return "now"


def moment(seconds: float | None) -> Html | None:
    if seconds is None:
        return None
    iso = timestamp(seconds) or ""
    return h("time", f"{iso[:10]} {iso[11:19]} UTC", datetime=iso)


def buttons(request: Any, job: Report) -> Html | None:
    """Return the form of what can be done to a job, if anything can."""
    if job.may_cancel:
        return form(request, job, "cancel", "Cancel")
    return form(request, job, "retry", "Retry") if job.may_retry else None


def form(request: Any, job: Report, action: str, label: str) -> Html:
    token = csrf_policy(request).get_csrf_token(request)
    return h(
        "form",
        void("input", type="hidden", name="csrf_token", value=token),
        h("button", label, h("span", f" {job.title}", class_="hidden"), name="action",
          value=action, class_=action),
        method="post",
        action=job_path(request, job.sid),
    )  # fmt: skip


# -- processes -------------------------------------------------------------------------


def processes(request: Any, scheduler: Any) -> Html:
    """Return the processes that hold jobs, and what each runs."""
    shown = [process_row(request, scheduler, each) for each in manage.processes(scheduler)]
    if not shown:
        shown = [h("li", "No process holds jobs. An idle one shows no life.", class_="muted")]
    return h("section", h("h2", "Processes"), h("ul", *shown, class_="plain"))


def process_row(request: Any, scheduler: Any, process: Process) -> Html:
    age = ago(scheduler.store.clock() - process.seen)
    jobs = (h("a", sid[:8], href=job_path(request, sid), title=sid) for sid in process.running)
    return h(
        "li",
        h("strong", process.name),
        h("span", f" last sign of life {age}", class_="error" if process.silent else "muted"),
        h("span", "; silent for longer than a lease", class_="error") if process.silent else None,
        "; runs " if process.running else "; runs nothing, jobs wait",
        *(together(" ", link) for link in jobs),
    )


# -- one job ---------------------------------------------------------------------------


def details(request: Any, job: Report) -> list[Any]:
    return [
        h(
            "p",
            pill(job.status),
            " ",
            None if job.status == "failed" else manage.as_text(job),
            class_="summary",
        ),
        buttons(request, job),
        retried(request, job),
        facts(job),
        failure(job),
    ]


def retried(request: Any, job: Report) -> Html | None:
    if job.retried is None:
        return None
    link = h("a", h("code", job.retried), href=job_path(request, job.retried))
    return h("p", "It was scheduled again as ", link, ".")


def facts(job: Report) -> Html:
    told: list[tuple[str, Any]] = [("Id", h("code", job.sid)), ("Function", code(job.function))]
    status = job.job
    if status is not None:
        told += [
            ("Operation", status.process_id),
            ("User", status.owner),
            ("Created", moment(status.created)),
            ("Not before", moment(job.run_after)),
            ("Started", moment(status.started)),
            ("Finished", moment(status.finished)),
            ("Expires", moment(status.expires)),
            ("Progress", None if status.progress is None else f"{status.progress} %"),
            ("Attempts", status.attempts or None),
        ]
    told += [("Held by", job.holder), ("Queue", job.queue), ("Key", job.key)]
    pairs = (together(h("dt", name), h("dd", value)) for name, value in told if value is not None)
    return h("dl", *pairs)


def code(text: str) -> Html | None:
    return h("code", text) if text else None


def failure(job: Report) -> Html | None:
    """Return why a job failed; also why an attempt did that is followed by another."""
    told = job.failure
    if told is None:
        return None
    heading = "Why it failed" if job.status == "failed" else "Why an attempt failed"
    return h(
        "section",
        h("h2", heading),
        h("p", h("strong", told.class_name), f": {told.message}"),
        h("p", "errorID ", h("code", told.error_id), ", as in the log.", class_="muted"),
        h("pre", told.traceback, tabindex="0", aria_label="Traceback", role="region")
        if told.traceback
        else None,
    )
