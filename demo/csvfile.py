"""Read a CSV file of unknown encoding and dialect, row by row, broken rows included."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, count, product
from typing import IO, Any, NamedTuple

MAX_ROWS = 200_000
MAX_COLUMNS = 500
MAX_LINE = 1_000_000  # characters; a file without line ends must not be read at once
MAX_LINES_OF_A_ROW = 1_000  # a quoted cell has line ends, an unclosed one must not eat the file
LINES_OF_A_REPORT = 200

DELIMITERS = ",;\t|"
QUOTES = "\"'"
NO_AGREEMENT = (0.0, 0, 1)
ONE_COLUMN = {"delimiter": "\x1f"}  # the unit separator, which no text has
ENCODINGS = {
    "utf-8": "UTF-8",
    "utf-16": "UTF-16",
    "cp1252": "Western European (Windows-1252)",
    "iso-8859-1": "Western European (ISO 8859-1)",
    "cp1250": "Central European (Windows-1250)",
    "cp1251": "Cyrillic (Windows-1251)",
    "koi8-r": "Cyrillic (KOI8-R)",
    "cp1253": "Greek (Windows-1253)",
    "cp1254": "Turkish (Windows-1254)",
    "shift_jis": "Japanese (Shift JIS)",
    "gb18030": "Chinese (GB 18030)",
    "big5": "Chinese (Big5)",
    "euc-kr": "Korean (EUC-KR)",
}

# The longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FORMATS = (
    (b"PK\x03\x04", "an Excel workbook or a zip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"SQLite format 3", "an SQLite database"),
)

# Stands for bytes that are no text. No decoder makes this character by itself.
UNDECODABLE = "\udcff"
codecs.register_error("demo.undecodable", lambda error: (UNDECODABLE, error.end))


class NotCsv(Exception):
    """The file cannot be read as CSV; the text is for the person who uploaded it."""


class BrokenRow(NamedTuple):
    """A row that was left out. Rows count from the header, which is row 1."""

    row: int
    line: int
    reason: str


class CsvFile:
    """The columns and rows of a CSV file, read from a binary file as one iterates.

    *report* is called every some lines, the empty ones too; what it raises ends the reading.
    """

    def __init__(
        self,
        stream: IO[bytes],
        encoding: str | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        refuse_other_formats(stream)
        codec = codec_of(stream, encoding) if encoding else detect_encoding(stream)
        self.encoding = codec.removesuffix("-sig")
        self._lines = Lines(stream, codec, report)
        sample = self._lines.peek()
        self.dialect = separator_line(sample) or detect_dialect(sample)
        if separator_line(sample):
            next(self._lines)
        self._reader = csv.reader(self._lines, **self.dialect)
        self.columns = self._header()

    def _header(self) -> list[str]:
        """Return the first row that is not empty, every name made present and unique."""
        names: list[str] | None = []
        try:
            while names == []:
                self._lines.start_row()
                names = next(self._reader, None)
        except csv.Error as error:
            raise NotCsv(f"The header cannot be read: {error}.") from error
        if names is None:
            raise NotCsv("The file is empty.")
        if self._misquoted():
            raise NotCsv("The header has a quote that is not closed.")
        if len(names) > MAX_COLUMNS:
            raise NotCsv(f"The file has {len(names):,} columns; at most {MAX_COLUMNS} are read.")
        return unique_names(names)

    def __iter__(self) -> Iterator[list[str] | BrokenRow]:
        """Yield every row below the header: its cells, or what is wrong with it."""
        row = 1
        while True:
            line, fault = self._lines.start_row(), None
            try:
                cells = next(self._reader, None)
            except csv.Error as error:
                cells, fault = [], str(error)
            if cells is None:
                return
            if not cells and not fault:
                continue  # an empty line
            row += 1
            if row > MAX_ROWS + 1:
                raise NotCsv(f"The file has more than {MAX_ROWS:,} rows; split it.")
            if self._lines.taken > 1 and (fault or self._misquoted()):
                # The lines below it are good rows.
                self._lines.put_back()
                fault = "a quoted cell that does not end where it should"
            fault = fault or self._misshapen(cells) or self._unreadable(cells)
            yield BrokenRow(row, line, fault) if fault else cells

    def _misquoted(self) -> bool:
        """Say whether the quote of the row is never closed, or was by the quote of another row."""
        if self._lines.cut_short or self._lines.taken == 1:
            return self._lines.cut_short
        try:
            next(csv.reader(self._lines.row, **self.dialect, strict=True))
        except csv.Error:
            return True
        return False

    def _misshapen(self, cells: list[str]) -> str | None:
        if self._lines.cut_short:
            return "the file ends inside of a quoted cell"
        if len(cells) != len(self.columns):
            return f"{counted(len(cells), 'column')} instead of {len(self.columns)}"
        return None

    def _unreadable(self, cells: list[str]) -> str | None:
        text = "".join(cells)
        if UNDECODABLE in text:
            return f"bytes that are not {self.encoding}"
        if "\0" in text:
            return "a NUL byte"
        return None


class Lines:
    """The lines of a text, counted; those taken for a row can be put back.

    What csv.reader iterates over: it takes as many lines as a row needs.
    """

    def __init__(self, stream: IO[bytes], encoding: str, report: Callable[[], None]) -> None:
        stream.seek(0)
        self._report = report
        self._text = io.TextIOWrapper(stream, encoding, errors="demo.undecodable", newline="")
        self._waiting: deque[str] = deque()
        self.row: list[str] = []
        self._number = self._read_lines = 0
        self.cut_short = False

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        if len(self.row) >= MAX_LINES_OF_A_ROW:
            raise csv.Error(f"it goes on for {MAX_LINES_OF_A_ROW:,} lines")
        line = self._waiting.popleft() if self._waiting else self._read()
        if not line:
            self.cut_short = bool(self.row)
            raise StopIteration
        self._number += 1
        self.row.append(line)
        return line

    def _read(self) -> str:
        line = self._text.readline(MAX_LINE + 1)
        self._read_lines += 1
        if len(line) > MAX_LINE:
            raise NotCsv(f"Line {self._read_lines:,} has more than {MAX_LINE:,} characters.")
        if self._read_lines % LINES_OF_A_REPORT == 0:
            self._report()
        return line

    def start_row(self) -> int:
        """Forget the lines of the last row; return the number of the next line."""
        self.row = []
        self.cut_short = False
        return self._number + 1

    @property
    def taken(self) -> int:
        return len(self.row)

    def put_back(self) -> None:
        """Give all lines of this row but the first back, to be read again as rows."""
        lines = self.row[1:]
        self._waiting.extendleft(reversed(lines))
        self._number -= len(lines)

    def peek(self, limit: int = 100) -> list[str]:
        """Return the first lines without taking them."""
        size = 0
        while len(self._waiting) < limit and size < MAX_LINE and (line := self._read()):
            self._waiting.append(line)
            size += len(line)
        return list(self._waiting)


def refuse_other_formats(stream: IO[bytes]) -> None:
    """Raise NotCsv for a file that is plainly something else."""
    stream.seek(0)
    head = stream.read(16)
    for magic, what in OTHER_FORMATS:
        if head.startswith(magic):
            raise NotCsv(f"This is {what}, not a CSV file; save it as CSV first.")


def codec_of(stream: IO[bytes], encoding: str) -> str:
    """Return the codec for an encoding that was chosen: with or without its mark."""
    stream.seek(0)
    head = stream.read(4096)
    if encoding == "utf-16" and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return utf16_without_mark(head) or "utf-16-le"
    return "utf-8-sig" if encoding == "utf-8" else encoding


def detect_encoding(stream: IO[bytes]) -> str:
    """Return the encoding of a file: by its mark, by its zeros, or by what decodes it best."""
    stream.seek(0)
    head = stream.read(4096)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    return utf16_without_mark(head) or utf8_or_western(stream)


def utf16_without_mark(head: bytes) -> str | None:
    """Western text in UTF-16 has a zero in every second byte, other text at its line ends."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 10 > len(head) and min(even, odd) * 10 < max(even, odd):
        return "utf-16-be" if even > odd else "utf-16-le"
    return None


def utf8_or_western(stream: IO[bytes]) -> str:
    """Return "utf-8" when most of what is not ASCII is valid in it, else "cp1252".

    A few broken bytes in an UTF-8 file break their rows; in a single-byte encoding
    hardly any sequence is valid UTF-8 by chance.
    """
    stream.seek(0)
    decode = codecs.getincrementaldecoder("utf-8")("demo.undecodable").decode
    good = bad = 0
    while chunk := stream.read(1 << 20):
        if not chunk.isascii():
            text = decode(chunk)
            wrong = text.count(UNDECODABLE)
            bad += wrong
            good += len(text) - len(text.encode("ascii", "ignore")) - wrong
    if bad <= good:
        return "utf-8"
    return "cp1252" if decodes(stream, "cp1252") else "iso-8859-1"


def decodes(stream: IO[bytes], encoding: str) -> bool:
    stream.seek(0)
    decode = codecs.getincrementaldecoder(encoding)().decode
    try:
        while chunk := stream.read(1 << 20):
            decode(chunk)
    except UnicodeDecodeError:
        return False
    return True


def separator_line(lines: list[str]) -> dict[str, Any]:
    """Return the dialect of a first line like "sep=;", which Excel writes and reads."""
    match = re.fullmatch(r'"?sep=(.)"?\s*', lines[0] if lines else "", re.IGNORECASE)
    return {"delimiter": match[1]} if match else {}


def detect_dialect(lines: list[str]) -> dict[str, Any]:
    """Return the dialect in which the rows agree best."""
    dialects = (
        dict(zip(("skipinitialspace", "quotechar", "delimiter"), values, strict=True))
        for values in product((False, True), quotes_of(lines), DELIMITERS)
    )
    best = max(dialects, key=lambda dialect: agreement(lines, dialect))
    return best if agreement(lines, best) > NO_AGREEMENT else ONE_COLUMN


def quotes_of(lines: list[str]) -> str:
    """Return what may be the quote: the usual one, if any cell begins with it.

    Agreement cannot tell: where it is not closed, rows agree better without it.
    """
    start = re.compile(rf'(?:^|[{DELIMITERS}]) *"')
    return '"' if any(map(start.search, lines)) else QUOTES


def agreement(lines: list[str], dialect: dict[str, Any]) -> tuple[float, int, int]:
    """Return the share of rows that are as wide as the header; of equals, the better is greater.

    The better cuts fewer quoted cells in two, which leaves half a pair of quotes in each part;
    of equals again, it has more columns.
    """
    rows = list(rows_of(lines, dialect))
    if not rows or len(rows[0]) < 2:
        return NO_AGREEMENT
    width = len(rows[0])
    share = sum(len(row) == width for row in rows) / len(rows)
    cut = sum(cell.count(dialect["quotechar"]) % 2 for row in rows for cell in row)
    return share, -cut, width


def rows_of(lines: list[str], dialect: dict[str, Any]) -> Iterator[list[str]]:
    reader = csv.reader(lines, **dialect)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            yield []
            continue
        if cells is None:
            return
        if cells:
            yield cells


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def unique_names(names: list[str]) -> list[str]:
    """Return the names tidied: none is empty, none comes twice."""
    unique: dict[str, None] = {}
    for number, name in enumerate(names, 1):
        name = " ".join(name.replace("\0", "").replace(UNDECODABLE, "?").split())
        name = name[:100] or f"column {number}"
        choices = chain([name], (f"{name} ({n})" for n in count(2)))
        unique[next(choice for choice in choices if choice not in unique)] = None
    return list(unique)
