"""What the catalogue keeps in the ZODB: datasets, their rows, and an index of their words."""

from __future__ import annotations

import re
import secrets
import time
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from BTrees.IOBTree import IOBTree
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from ZODB.blob import Blob

from .csvfile import BrokenRow

LISTED_BROKEN_ROWS = 1_000
LONGEST_WORD = 64  # characters
POSTINGS_OF_A_SEGMENT = 250_000  # kept in memory until the segment is written
POSTINGS_OF_A_RECORD = 1_000  # what is longer becomes an object of its own
ROWS_OF_A_SAVEPOINT = 5_000

WORD = re.compile(r"\w+")

Row = tuple[str, ...]


class Catalogue(Persistent):
    """The root of the application's data."""

    def __init__(self) -> None:
        self.datasets = OOBTree()  # id -> Dataset
        self.counter = Length()  # of the slow job; two jobs may change it at once

    def add(self, dataset: Dataset) -> None:
        self.datasets[dataset.id] = dataset

    def newest_first(self) -> list[Dataset]:
        return sorted(self.datasets.values(), key=lambda dataset: dataset.created, reverse=True)


class Dataset(Persistent):
    """An uploaded file, and once it is imported its rows.

    Written by the request that uploads it and then by its import alone, so two imports
    never conflict.
    """

    sid = ""  # of the job that imports it
    complete = False
    encoding = ""
    columns: Row = ()
    segments: tuple[Segment, ...] = ()
    rows_kept = 0
    rows_broken = 0
    broken: tuple[BrokenRow, ...] = ()  # the first of them

    def __init__(self, name: str, upload: Blob) -> None:
        self.id = secrets.token_urlsafe(9)
        self.name = name
        self.created = time.time()
        self.upload: Blob | None = upload
        self.rows = IOBTree()  # 0, 1, 2 ... -> Row

    def page(self, start: int, size: int, query: str = "") -> Page:
        """Return *size* rows from the *start*-th of those that match."""
        found = self.search(query)
        return Page([self.rows[number] for number in found[start : start + size]], len(found))

    def search(self, query: str) -> Sequence[int]:
        """Return the numbers of the rows where each word of the query begins some word.

        Those of all rows where it has no word.
        """
        words = split_words(query)
        if not words:
            return range(self.rows_kept)
        found = array("i")
        for segment in self.segments:
            found.extend(segment.search(words))
        return found

    def matching(self, query: str = "") -> Iterator[Row]:
        """Yield the matching rows, holding few of them in memory."""
        for done, number in enumerate(self.search(query)):
            if done % ROWS_OF_A_SAVEPOINT == 0:
                free_memory(self)
            yield self.rows[number]


class Page(NamedTuple):
    rows: list[Row]
    total: int


class DatasetWriter:
    """Fills a new dataset row by row; memory stays bounded, nothing is committed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._broken: list[BrokenRow] = []
        self._words: dict[str, array[int]] = {}
        self._postings = 0

    def add(self, row: Row) -> None:
        number = self.dataset.rows_kept
        self.dataset.rows[number] = row
        self.dataset.rows_kept += 1
        for word in words_of(row):
            self._words.setdefault(word, array("i")).append(number)
            self._postings += 1
        if self._postings >= POSTINGS_OF_A_SEGMENT:
            self._write_segment()
        if self.dataset.rows_kept % ROWS_OF_A_SAVEPOINT == 0:
            savepoint(self.dataset)

    def leave_out(self, row: BrokenRow) -> None:
        self.dataset.rows_broken += 1
        if len(self._broken) < LISTED_BROKEN_ROWS:
            self._broken.append(row)

    def _write_segment(self) -> None:
        self.dataset.segments += (Segment(self._words),)
        self._words = {}
        self._postings = 0
        savepoint(self.dataset)

    def finish(self) -> None:
        self._write_segment()
        self.dataset.broken = tuple(self._broken)
        self.dataset.upload = None
        self.dataset.complete = True


class Segment(Persistent):
    """Which words occur in which of some consecutive rows; written once.

    A set of rows for every word would be a persistent object for every word, and most words
    are rare: so the row numbers are packed into the tree's own buckets, but for the long ones.
    """

    def __init__(self, words: dict[str, array[int]]) -> None:
        self.words = Words()
        for word in sorted(words):
            rows = words[word]
            self.words[word] = rows if len(rows) <= POSTINGS_OF_A_RECORD else Postings(rows)

    def search(self, words: tuple[str, ...]) -> list[int]:
        """Return the rows where each of the words begins some word."""
        # The longest first: it matches least, and none left means no more to read.
        found: set[int] | None = None
        for word in sorted(words, key=len, reverse=True):
            rows = self._beginning_with(word)
            found = rows if found is None else found & rows
            if not found:
                break
        return sorted(found or ())

    def _beginning_with(self, prefix: str) -> set[int]:
        rows: set[int] = set()
        for found in self.words.values(prefix, prefix + chr(0x10FFFF)):
            rows.update(found.rows if isinstance(found, Postings) else found)
        return rows


class Words(OOBTree):
    """Word -> row numbers, or Postings; with larger buckets, as it is written once."""

    max_leaf_size = 250


class Postings(Persistent):
    """The rows of a frequent word."""

    def __init__(self, rows: array[int]) -> None:
        self.rows = rows


def split_words(text: str) -> tuple[str, ...]:
    """Return the words of a text as they are compared; of a lone sign like "→", the sign."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = WORD.findall(text) or text.split()[:1]
    return tuple(word[:LONGEST_WORD] for word in words)


def words_of(row: Row) -> set[str]:
    words: set[str] = set()
    for cell in row:
        words.update(words_of_short(cell) if len(cell) < 100 else split_words(cell))
    return words


words_of_short = lru_cache(10_000)(split_words)  # short cells repeat


def savepoint(obj: Persistent) -> None:
    """Move the changes made so far out of memory, to a temporary file."""
    if obj._p_jar is not None:
        obj._p_jar.transaction_manager.savepoint(optimistic=True)
        free_memory(obj)


def free_memory(obj: Persistent) -> None:
    """Drop unchanged objects from the connection's cache; they are loaded again when needed."""
    if obj._p_jar is not None:
        obj._p_jar.cacheMinimize()
