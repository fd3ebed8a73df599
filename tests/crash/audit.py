"""Compares what processes were told with what the database holds in the end."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pyramid_async.context import loads
from pyramid_async.jobs import DISMISSED, FAILED, SUCCESSFUL
from pyramid_async.zodb import JobRoot

FINAL = {SUCCESSFUL, FAILED, DISMISSED}


class Testimony:
    """What the logs of the processes say: word -> sids."""

    def __init__(self, directory):
        self.said = defaultdict(set)
        self.errors = Counter()
        for path in Path(directory).glob("*.log"):
            for line in path.read_text().splitlines():
                word, *rest = line.split()
                if word == "error":
                    self.errors[rest[0]] += 1
                else:
                    self.said[word].update(rest)
        self.rescued = {
            sid
            for path in Path(directory).glob("*.err")
            for sid in re.findall(r"job '(\w+)' is taken up: ", path.read_text())
        }

    def __getitem__(self, word):
        return self.said[word]


class Books:
    """What the database says."""

    def __init__(self, connection):
        root = connection.root()
        bank, jobs = root["bank"], root.get("pyramid_async") or JobRoot()
        noted = {sid: request for tree in bank.requests for sid, request in tree.items()}
        self.requests = noted.keys()
        self.carried_out = Counter(noted.values())
        self.entries = {entry: found for tree in bank.ledgers for entry, found in tree.items()}
        self.effects = Counter(sid for sid, _ in self.entries.values())
        self.balances = {pair.number: (pair.giver(), pair.taker()) for pair in bank.pairs}
        self.moved = Counter(number for _, number in self.entries.values())
        # A removed job's record may stay, hidden, as the fence of an attempt that is frozen.
        hidden = {
            sid
            for tree in (*jobs.unfinished, *jobs.finished)
            for sid, record in tree.items()
            if record.removed
        }
        self.unfinished = shown(jobs.unfinished, hidden)
        self.archived = shown(jobs.finished, hidden)
        self.expiring = {sid for _, sid in jobs.expiry} - hidden
        self.records = self.archived | self.unfinished
        self.results = {
            sid: loads(self.records[sid].result, connection) for sid in self.with_status(SUCCESSFUL)
        }

    def with_status(self, status):
        return {sid for sid, record in self.records.items() if record.status == status}


def shown(trees, hidden):
    return {sid: record for tree in trees for sid, record in tree.items() if sid not in hidden}


@dataclass
class Findings:
    """What the audit counted and what it found wrong."""

    counts: dict = field(default_factory=dict)
    violations: dict = field(default_factory=dict)  # sentence -> what it is true of

    def check(self, sentence, wrong):
        """Note what should not be."""
        wrong = sorted(wrong)
        if wrong:
            self.violations[sentence] = wrong
        return len(wrong)


def audit(testimony, books):
    """Return the findings."""
    findings = Findings()
    duplicates = findings.check(
        "took effect more than once", (sid for sid, n in books.effects.items() if n > 1)
    )
    lost = lost_jobs(testimony, books, findings)
    dismissals(testimony, books, findings)
    records(books, findings)
    results(books, findings)
    balances(books, findings)
    findings.counts = {
        "acknowledged": len(testimony["accepted"]),
        "finished": len(books.with_status(SUCCESSFUL)),
        "dismissed": len(books.with_status(DISMISSED)),
        "failed": len(books.with_status(FAILED)),
        "removed": len(books.requests - books.records.keys()),
        "unacknowledged": len(books.requests - testimony["accepted"]),
        "rescued": len(testimony.rescued),
        "duplicates": duplicates,
        "lost": lost,
    }
    return findings


def lost_jobs(testimony, books, findings):
    """Check that what was promised is there, and return how many jobs are lost."""
    # A removal that was asked for counts, though the process may have died with the answer.
    there = books.records.keys() | testimony["forget"]
    return sum(
        (
            findings.check("was acknowledged and is unknown", testimony["accepted"] - there),
            findings.check("was scheduled by a request and is unknown", books.requests - there),
            findings.check(
                "is successful without effect",
                books.with_status(SUCCESSFUL) - books.effects.keys(),
            ),
            findings.check(
                "was reported successful without effect",
                testimony[SUCCESSFUL] - books.effects.keys(),
            ),
            findings.check(
                "is not finished",
                (sid for sid, record in books.records.items() if record.status not in FINAL),
            ),
        )
    )


def dismissals(testimony, books, findings):
    """Check that no dismissal that was acknowledged is without consequence."""
    findings.check(
        "was dismissed and took effect",
        (testimony[DISMISSED] | testimony["prevented"]) & books.effects.keys(),
    )
    findings.check("was removed and is there", testimony["removed"] & books.records.keys())
    findings.check(
        "was dismissed and is something else",
        (
            sid
            for sid in testimony[DISMISSED] & books.records.keys()
            if books.records[sid].status != DISMISSED
        ),
    )


def records(books, findings):
    """Check the records by themselves and against effects and requests."""
    findings.check(
        "took effect and is not successful",
        books.effects.keys() & books.records.keys() - books.with_status(SUCCESSFUL),
    )
    findings.check("exists without its request", books.records.keys() - books.requests)
    findings.check("took effect without its request", books.effects.keys() - books.requests)
    findings.check(
        "is a request that was carried out twice",
        (request for request, n in books.carried_out.items() if n > 1),
    )
    findings.check("is recorded twice", books.unfinished.keys() & books.archived.keys())
    findings.check("is archived and never expires", books.archived.keys() - books.expiring)
    findings.check("expires and is not archived", books.expiring - books.archived.keys())
    findings.check(
        "has facts that do not fit", (sid for sid, r in books.records.items() if odd(sid, r))
    )


def odd(sid, record):
    """Say whether a final record holds what it must not, or lacks what it must have."""
    return (
        record.sid != sid
        or record.holder is not None
        or (record.arguments is not None and record.status != FAILED)
        or record.finished is None
        or (record.status == FAILED) != (record.failure is not None)
        or (record.status == SUCCESSFUL) != (record.result is not None)
        or (record.status == SUCCESSFUL and not record.signature)
    )


def results(books, findings):
    """Check that each result is the ledger entry of the very attempt that took effect."""
    findings.check(
        "has a result that is not its effect",
        (
            sid
            for sid, entry in books.results.items()
            if books.entries.get(entry, (None,))[0] != sid
        ),
    )


def balances(books, findings):
    """Check that each pair's sum is unchanged and its ledger entries explain its balances."""
    findings.check(
        "pair of accounts with wrong balances",
        (
            number
            for number, balance in books.balances.items()
            if balance != (-books.moved[number], books.moved[number])
        ),
    )


def reasons(books):
    """Return why jobs failed, counted."""
    return Counter(
        f"{record.failure.class_name}: {record.failure.message}".splitlines()[0][:100]
        for record in books.records.values()
        if record.status == FAILED
    )
