"""The table of settings: what each row takes, refuses and says."""

from __future__ import annotations

import inspect
import math

import pytest
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError, ConfigurationExecutionError

from pyramid_async.config import databases
from pyramid_async.interfaces import IScheduler, NotSchedulable
from pyramid_async.ram import RamStore
from pyramid_async.recovery import Recovery
from pyramid_async.settings import SETTINGS, BadSetting, read_settings
from pyramid_async.threads import ThreadExecutor
from pyramid_async.worker import Worker

# Name -> (text, value), and texts that are refused.
SECONDS_OR_NONE = ["-1", "x", "", "nan", "inf", "-inf", "1e9", "1,5", None, True]
SECONDS = ["0", "-0.0", *SECONDS_OR_NONE]
WHOLE = ["-1", "1.5", "x", "", "1e3", "inf", None, True, 1.0, 2.7]
ROWS = {
    "store": ([("auto", "auto"), ("zodb", "zodb"), ("ram", "ram")], ["", "ZODB", "sql", None]),
    "executor": ([("threads", "threads"), ("celery", "celery")], ["", "thread", None]),
    "workers": ([("0", 0), ("7", 7), (3, 3)], WHOLE),
    "max_pending": ([("1", 1), ("100", 100)], ["0", *WHOLE]),
    "conflict_attempts": ([("1", 1)], ["0", *WHOLE]),
    "max_attempts": ([("1", 1)], ["0", *WHOLE]),
    "heartbeat": ([("0.5", 0.5), (1, 1.0)], SECONDS),
    "lease": ([("30", 30.0), ("1000", 1000.0)], SECONDS),
    "result_timeout": ([("0", 0.0), ("86400", 86400.0)], SECONDS_OR_NONE),
    "maintenance_interval": ([("0.1", 0.1)], SECONDS),
    "shutdown_timeout": ([("0", 0.0), ("2.5", 2.5)], SECONDS_OR_NONE),
    "wait_max": ([("0", 0.0), ("60", 60.0)], SECONDS_OR_NONE),
    "wait_slots": ([("0", 0), ("10", 10)], WHOLE),
    "inline_limit": ([("0", 0), ("1048576", 1048576)], WHOLE),
    "celery.broker": (
        [("redis://localhost", "redis://localhost")],
        ["", "localhost", "amqp//localhost", "redis:/localhost", None],
    ),
    "celery.queue": ([("slow", "slow")], ["", "amq.slow", "x" * 256, None]),
    "cors.origins": (
        [
            ("", ()),
            ("*", ("*",)),
            (" https://a.example\n https://b.example ", ("https://a.example", "https://b.example")),
            (["https://a.example"], ("https://a.example",)),
        ],
        [None, 1, [1], b"https://a.example"],
    ),
    "cors.credentials": (
        [("true", True), ("FALSE", False), (" True ", True), (True, True), (False, False)],
        ["yes", "1", "", None],
    ),
}
GOOD = [(name, text, value) for name, (good, _) in ROWS.items() for text, value in good]
BAD = [(name, text) for name, (_, bad) in ROWS.items() for text in bad]


def read(**settings):
    return read_settings({f"async.{name}": value for name, value in settings.items()})


def test_every_row_is_tested_here():
    assert set(ROWS) == {setting.name for setting in SETTINGS}


def test_no_two_rows_have_one_name():
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_value_is_converted(name, text, value):
    assert read_settings({f"async.{name}": text})[name] == value
    assert type(read_settings({f"async.{name}": text})[name]) is type(value)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_bad_value_names_itself_its_setting_and_what_is_allowed(name, text):
    allowed = next(setting.allowed for setting in SETTINGS if setting.name == name)
    with pytest.raises(BadSetting) as refused:
        read_settings({f"async.{name}": text})
    assert str(refused.value) == f"async.{name} is {text!r}; allowed: {allowed}"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_default_is_a_value_that_its_own_row_allows(setting):
    assert setting.convert(setting.default) == setting.default


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_row_says_what_it_means_in_a_sentence(setting):
    assert setting.meaning.endswith(".")
    assert setting.meaning[0].isupper()
    assert setting.allowed


def test_defaults_fit_each_other():
    values = read_settings({})
    assert values == {setting.name: setting.default for setting in SETTINGS}
    assert values["lease"] >= 3 * values["heartbeat"]
    assert not any(isinstance(v, float) and math.isinf(v) for v in values.values())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("worker", "workers"),
        ("result_timout", "result_timeout"),
        ("max_attempt", "max_attempts"),
        ("cors.origin", "cors.origins"),
        ("Lease", "lease"),
        ("celery.brokers", "celery.broker"),
    ],
)
def test_unknown_name_suggests_the_nearest(given, meant):
    with pytest.raises(BadSetting) as refused:
        read_settings({f"async.{given}": "1"})
    assert str(refused.value) == f"unknown setting async.{given}; did you mean async.{meant}?"


@pytest.mark.parametrize("given", ["", "xyzzy", "async.workers"])
def test_unknown_name_that_is_like_no_other_suggests_nothing_wrong(given):
    with pytest.raises(BadSetting, match=r"unknown setting async\."):
        read_settings({f"async.{given}": "1"})


def test_settings_of_others_are_left_alone():
    given = {"asynchronous": "1", "zodbconn.uri": "x", "async": "1", "pyramid.async.workers": "x"}
    assert read_settings(given) == read_settings({})


def test_lease_is_at_least_three_heartbeats():
    assert read(lease="30", heartbeat="10")["lease"] == 30
    with pytest.raises(BadSetting, match=r"lease is 29\.0 and async\.heartbeat 10\.0"):
        read(lease="29", heartbeat="10")
    with pytest.raises(BadSetting, match="three heartbeats"):
        read(heartbeat="21")


def test_every_origin_and_credentials_exclude_each_other():
    with pytest.raises(BadSetting, match="list the origins"):
        read_settings({"async.cors.origins": "*", "async.cors.credentials": "true"})
    assert read_settings({"async.cors.origins": "*"})["cors.origins"] == ("*",)


@pytest.mark.parametrize("settings", [{"async.workers": "many"}, {"async.worker": "2"}])
def test_bad_setting_stops_the_start_of_an_application(settings):
    [name] = settings
    config = Configurator(settings=settings)
    config.include("pyramid_async")
    with pytest.raises(ConfigurationError, match=name):
        config.commit()


def test_settings_of_jobs_reach_those_who_run_them():
    given = {
        "workers": 3,
        "max_pending": 17,
        "conflict_attempts": 5,
        "max_attempts": 6,
        "heartbeat": 2.0,
        "lease": 50.0,
        "maintenance_interval": 4.0,
        "result_timeout": 70.0,
        "shutdown_timeout": 8.0,
    }
    config = Configurator(settings={f"async.{name}": value for name, value in given.items()})
    config.include("pyramid_async")
    config.commit()
    executor = config.registry.getUtility(IScheduler).executor
    assert executor.worker.store.max_pending == given["max_pending"]
    assert given == {
        "workers": executor.workers,
        "max_pending": executor.max_pending,
        "conflict_attempts": executor.worker.conflict_attempts,
        "max_attempts": executor.worker.max_attempts,
        "heartbeat": executor.recovery.heartbeat,
        "lease": executor.recovery.lease,
        "maintenance_interval": executor.recovery.interval,
        "result_timeout": executor.worker.result_timeout,
        "shutdown_timeout": executor.shutdown_timeout,
    }


@pytest.fixture(params=["commit", "autocommit"])
def config(request):
    """A configurator that has carried out what it was told, with the jobs in RAM."""
    config = Configurator(settings={"zodbconn.uri": "memory://"})
    config.autocommit = request.param == "autocommit"
    config.include("pyramid_async")
    config.commit()
    yield config
    close_databases(config.registry)


def close_databases(registry):
    for database in databases(registry).values():
        database.close()


LATE = {
    "async.workers": lambda config: config.add_settings({"async.workers": "5"}),
    "async.wrokers": lambda config: config.add_settings({"async.wrokers": "5"}),
    "async.executor": lambda config: config.include("pyramid_async.celery"),
    "pyramid_zodbconn": lambda config: config.include("pyramid_zodbconn"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_is_configured_too_late_stops_the_start(config, name):
    LATE[name](config)
    with pytest.raises(ConfigurationError, match=name) as caught:
        config.make_wsgi_app()
    assert ("pyramid_async.celery" in str(caught.value)) == (name == "async.executor")


def test_zodb_that_is_included_late_may_stand_beside_jobs_that_are_meant_for_ram():
    config = Configurator(settings={"zodbconn.uri": "memory://", "async.store": "ram"})
    config.include("pyramid_async")
    config.commit()
    config.include("pyramid_zodbconn")
    close_databases(config.make_wsgi_app().registry)


def test_package_that_includes_it_again_takes_no_operations_away(config):
    def package(config):
        config.include("pyramid_async")

    config.add_operation("sqrt", math.sqrt)
    config.commit()
    config.include(package)
    registry = config.make_wsgi_app().registry
    assert list(registry.getUtility(IScheduler).operations) == ["sqrt"]


@pytest.mark.parametrize("name", ["", None, 7, "async.status", "rpc.discover"])
def test_operation_whose_name_is_empty_or_reserved_stops_the_start(config, name):
    with pytest.raises(ConfigurationError, match="allowed: a text that is not empty and does not"):
        config.add_operation(name, math.sqrt)


def test_operation_whose_options_do_not_fit_stops_the_start(config):
    with pytest.raises(NotSchedulable, match="option timeout is -1"):
        config.add_operation("sqrt", math.sqrt, timeout=-1)


def test_operation_that_no_worker_could_find_stops_the_start():
    config = Configurator(settings={"zodbconn.uri": "memory://"})
    config.include("pyramid_zodbconn")
    config.include("pyramid_async")
    config.add_operation("nameless", lambda: None)
    with pytest.raises(ConfigurationExecutionError, match="a lambda"):
        config.make_wsgi_app()
    close_databases(config.registry)


@pytest.mark.parametrize("prefix", ["/{tenant}/jobs", "/:tenant/jobs", "/jobs*rest"])
def test_prefix_with_a_placeholder_is_refused(prefix):
    """Every URL of a job would be missing a value, each time a job is told."""
    with pytest.raises(ConfigurationError, match="placeholder"):
        Configurator().include("pyramid_async", route_prefix=prefix)


@pytest.mark.parametrize("kind", [Worker, Recovery, ThreadExecutor, RamStore])
def test_without_settings_the_defaults_are_the_same(kind):
    defaults = {setting.name: setting.default for setting in SETTINGS}
    defaults["interval"] = defaults["maintenance_interval"]
    parameters = inspect.signature(kind).parameters.items()
    own = {name: p.default for name, p in parameters if p.default is not p.empty}
    shared = own.keys() & defaults.keys()
    assert {name: own[name] for name in shared} == {name: defaults[name] for name in shared} != {}
