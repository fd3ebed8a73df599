"""The settings: one row for each, with unit and trade-off."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .jobs import OPTIONS

PREFIX = "async."


class Setting(NamedTuple):
    """One row: how a text becomes a value, what is allowed, the default, what it means."""

    name: str
    convert: Callable[[Any], Any]
    allowed: str
    default: Any
    meaning: str


class BadSetting(ValueError):
    """A setting that is unknown or has a value that does not fit."""


def _seconds(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not 0 <= number < 1e9:
        raise ValueError
    return number


def _interval(value: Any) -> float:
    number = _seconds(value)
    if number == 0:
        raise ValueError
    return number


def _count(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool | float) or number < 0:
        raise ValueError
    return number


def _positive(value: Any) -> int:
    number = _count(value)
    if number == 0:
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).strip().lower()]


def _words(value: Any) -> tuple[str, ...]:
    words = value.split() if isinstance(value, str) else value
    return tuple(map(_word, words))


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _choice(*names: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return convert


def _url(value: Any) -> str:
    if "://" not in value:
        raise ValueError
    return str(value)


# Conversion, what is allowed.
SECONDS = (_seconds, "seconds, 0 or more")
INTERVAL = (_interval, "seconds, more than 0")
COUNT = (_count, "a whole number, 0 or more")
POSITIVE = (_positive, "a whole number, 1 or more")

SETTINGS = (
    Setting(
        "store",
        _choice("auto", "zodb", "ram"),
        "auto, zodb or ram",
        "auto",
        "Where records live; auto: in the ZODB where pyramid_zodbconn has one, else in RAM.",
    ),
    Setting(
        "executor",
        _choice("threads", "celery"),
        "threads or celery",
        "threads",
        "Who runs the jobs: threads of this process, or Celery workers on any machine.",
    ),
    Setting(
        "workers",
        *COUNT,
        2,
        "Worker threads in a process; each uses one connection to each database."
        " 0: this process schedules jobs and runs none.",
    ),
    Setting(
        "max_pending",
        *POSITIVE,
        10_000,
        "Jobs that may wait in a process. RAM store: unfinished jobs, more are refused;"
        " ZODB store: those beyond wait in the database and are fetched from there.",
    ),
    Setting(
        "conflict_attempts",
        *POSITIVE,
        10,
        "How often a job that meets a conflict is tried in all, before it fails.",
    ),
    Setting(
        "max_attempts",
        *POSITIVE,
        3,
        "How often a job whose process dies, or that raises what retry_on names, is tried in all,"
        " before it fails.",
    ),
    Setting(
        "heartbeat",
        *INTERVAL,
        10.0,
        "Seconds between two signs of life of a process that runs jobs; one small commit each.",
    ),
    Setting(
        "lease",
        *INTERVAL,
        60.0,
        "Seconds without a sign of life after which a process counts as dead; at least"
        " 3 heartbeats.",
    ),
    Setting(
        "result_timeout",
        *SECONDS,
        3600.0,
        "Seconds that a finished job and its result are kept.",
    ),
    Setting(
        "maintenance_interval",
        *INTERVAL,
        5.0,
        "Seconds between two looks for lost and expired jobs; reads only, unless it finds some.",
    ),
    Setting(
        "shutdown_timeout",
        *SECONDS,
        5.0,
        "Seconds that running jobs get to end when the process stops; those that do not are given"
        " back, for which it takes one more at most.",
    ),
    Setting(
        "wait_max",
        *SECONDS,
        20.0,
        "Longest time that a status request is held, seconds.",
    ),
    Setting(
        "wait_slots",
        *COUNT,
        2,
        "Requests that may be held at one time in a process, each by a thread of the server."
        " 0: none.",
    ),
    Setting(
        "inline_limit",
        _count,
        "bytes, 0 or more",
        64 * 1024,
        "Largest result shown inside the status document, bytes of JSON.",
    ),
    Setting(
        "celery.broker",
        _url,
        "the URL of a broker",
        "amqp://guest:guest@127.0.0.1:5672//",
        "Where the messages for Celery workers go; RabbitMQ or Redis.",
    ),
    Setting(
        "celery.queue",
        *OPTIONS["queue"],
        "pyramid_async",
        "The queue of jobs that were scheduled without using(queue=...).",
    ),
    Setting(
        "cors.origins",
        _words,
        "origins such as https://app.example.org, separated by spaces, or *",
        (),
        "Origins whose pages may use the HTTP resource.",
    ),
    Setting(
        "cors.credentials",
        _flag,
        "true or false",
        False,
        "Whether those pages may send cookies.",
    ),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting by its name without prefix; raise BadSetting, naming what is wrong."""
    values = {setting.name: setting.default for setting in SETTINGS}
    for name, value in given.items():
        if name.startswith(PREFIX):
            setting = _known(name.removeprefix(PREFIX))
            values[setting.name] = _converted(setting, value)
    return _consistent(values)


def _known(name: str) -> Setting:
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
    raise BadSetting(f"unknown setting {PREFIX}{name}{hint}")


def _converted(setting: Setting, value: Any) -> Any:
    try:
        return setting.convert(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise BadSetting(
            f"{PREFIX}{setting.name} is {value!r}; allowed: {setting.allowed}"
        ) from None


def _consistent(values: dict[str, Any]) -> dict[str, Any]:
    if values["lease"] < 3 * values["heartbeat"]:
        raise BadSetting(
            f"async.lease is {values['lease']} and async.heartbeat {values['heartbeat']};"
            " a lease must be at least three heartbeats"
        )
    if values["cors.credentials"] and "*" in values["cors.origins"]:
        raise BadSetting(
            "async.cors.origins is '*' and async.cors.credentials true;"
            " browsers refuse that: list the origins"
        )
    return values
