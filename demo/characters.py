"""An index of the names of all characters, built by a job that goes on where it was stopped."""

from __future__ import annotations

import sys
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from persistent import Persistent
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPSeeOther
from pyramid.request import Request
from pyramid.view import view_config
from pyramid_zodbconn import get_connection

from pyramid_async import current_job

from .charts import Bars
from .models import Segment, split_words, words_of_short
from .sample import CATEGORIES, characters
from .users import is_operator
from .views import query_of

KEY = "characters"  # at most one of these jobs is unfinished
CHARACTERS_OF_A_PART = 500
SHOWN = 40


class Part(NamedTuple):
    """What was committed at one checkpoint."""

    segment: Segment  # word -> code points
    count: int
    run: int  # of its job, which began with 1 and was interrupted in between


class Characters(Persistent):
    """The index; written by its one job alone, apart from the sid of that job."""

    sid = ""
    complete = False
    parts: tuple[Part, ...] = ()

    def clear(self) -> None:
        self.parts, self.complete = (), False

    def add(self, named: list[tuple[str, str]], run: int) -> None:
        words: dict[str, array[int]] = {}
        for character, name in named:
            for word in words_of_short(name):
                words.setdefault(word, array("i")).append(ord(character))
        self.parts += (Part(Segment(words), len(named), run),)

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def runs(self) -> list[int]:
        """Return how many characters each run of the job indexed."""
        counts: Counter[int] = Counter()
        for part in self.parts:
            counts[part.run] += part.count
        return [counts[run] for run in sorted(counts)]

    def search(self, query: str) -> list[int]:
        """Return the code points in whose names each word of the query begins some word."""
        words = split_words(query)
        return [code for part in self.parts for code in part.segment.search(words)]


# -- the job ---------------------------------------------------------------------------


def index_characters(index: Characters, pause: float = 0.2) -> dict[str, int]:
    """Build the index part by part, with a rest after each that leaves time to stop the server.

    Each part is committed with the place after it. After a restart the job goes on from there,
    and what is committed can be searched meanwhile.
    """
    job = current_job()
    # When an operator has a failed job run again, that is another one than the request knew.
    index.sid = job.sid or index.sid
    if job.cursor is None:
        index.clear()
    run = index.parts[-1].run + 1 if index.parts else 1
    total = sum(1 for _ in characters())
    for named in parts_from(job.cursor or 0):
        index.add(named, run)
        job.progress(index.count, total, f"{index.count:,} of {total:,} characters")
        job.checkpoint(ord(named[-1][0]) + 1)
        time.sleep(pause)
    index.complete = True
    return {"characters": index.count, "runs": run}


def parts_from(code: int) -> Iterator[list[tuple[str, str]]]:
    """Yield the characters from a code point on, some at a time."""
    named = characters(code)
    while part := list(islice(named, CHARACTERS_OF_A_PART)):
        yield part


# -- the pages -------------------------------------------------------------------------


def includeme(config: Configurator) -> None:
    config.add_route("characters", "/characters")
    config.add_route("index_characters", "/characters/index", request_method="POST")
    config.add_request_method(lambda request: get_connection(request).root()[KEY], KEY, reify=True)
    config.scan(__name__)


@view_config(route_name="characters", renderer="templates/characters.jinja2")
def show_characters(request: Request) -> dict[str, Any]:
    index = request.characters
    query = query_of(request)
    found = index.search(query)
    return {
        "index": index,
        "job": request.scheduler.status(index.sid),
        "query": query,
        "total": len(found),
        "rows": [described(code) for code in found[:SHOWN]],
        "chart": Bars(counted_by_category(found)) if found else None,
        "part": CHARACTERS_OF_A_PART,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version": unicodedata.unidata_version,
    }


def described(code: int) -> tuple[str, str, str, str]:
    character = chr(code)
    return character, f"U+{code:04X}", unicodedata.name(character), category(code)


def category(code: int) -> str:
    return CATEGORIES[unicodedata.category(chr(code))]


def counted_by_category(codes: list[int]) -> list[tuple[str, int]]:
    return Counter(map(category, codes)).most_common()


@view_config(route_name="index_characters")
def start_index(request: Request) -> HTTPSeeOther:
    """Begin to build, or lead to the job that does it already."""
    index = request.characters
    scheduler = request.scheduler.using(key=KEY, title="Index all characters")
    sid = scheduler.schedule(index_characters, index)
    if index.sid != sid:
        index.sid = sid
    job = request.scheduler.status(sid)
    if job.owner == request.authenticated_userid or is_operator(request):
        return HTTPSeeOther(request.route_path("job", sid=sid))
    request.session.flash("Somebody else builds it already.")
    return HTTPSeeOther(request.route_path("characters"))
