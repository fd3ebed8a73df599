"""Write a sample CSV file of real data: the characters that have a name in Unicode."""

from __future__ import annotations

import csv
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

SAMPLE = "unicode-names.csv"
COLUMNS = ("codepoint", "character", "name", "category", "direction", "width", "number", "made of")
# The names of these are counted, not given, and there are more than a hundred thousand.
COUNTED = ("CJK UNIFIED IDEOGRAPH-", "HANGUL SYLLABLE ", "TANGUT IDEOGRAPH-", "NUSHU CHARACTER-")

CATEGORIES = {
    "Lu": "letter, uppercase",
    "Ll": "letter, lowercase",
    "Lt": "letter, titlecase",
    "Lm": "letter, modifier",
    "Lo": "letter, other",
    "Mn": "mark, nonspacing",
    "Mc": "mark, spacing",
    "Me": "mark, enclosing",
    "Nd": "number, decimal digit",
    "Nl": "number, letter",
    "No": "number, other",
    "Pc": "punctuation, connector",
    "Pd": "punctuation, dash",
    "Ps": "punctuation, open",
    "Pe": "punctuation, close",
    "Pi": "punctuation, initial quote",
    "Pf": "punctuation, final quote",
    "Po": "punctuation, other",
    "Sm": "symbol, math",
    "Sc": "symbol, currency",
    "Sk": "symbol, modifier",
    "So": "symbol, other",
    "Zs": "separator, space",
    "Zl": "separator, line",
    "Zp": "separator, paragraph",
    "Cf": "other, format",
}
WIDTHS = {"F": "full", "H": "half", "W": "wide", "Na": "narrow", "A": "ambiguous", "N": "neutral"}


def characters(first: int = 0) -> Iterator[tuple[str, str]]:
    """Yield every named character from the code point *first* on, and its name."""
    for code in range(first, sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(COUNTED):
            yield chr(code), name


def row(character: str, name: str) -> tuple[str, ...]:
    number = unicodedata.numeric(character, None)
    return (
        f"U+{ord(character):04X}",
        character,
        name,
        CATEGORIES[unicodedata.category(character)],
        unicodedata.bidirectional(character),
        WIDTHS[unicodedata.east_asian_width(character)],
        "" if number is None else f"{number:g}",
        unicodedata.decomposition(character),
    )


def write_sample(path: Path) -> None:
    """Make the file unless it is there; it is never seen half-written."""
    if path.exists():
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(row(*pair) for pair in characters())
    unfinished.replace(path)
