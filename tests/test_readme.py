"""README.rst tells the truth: its examples run, its tables are those of the code."""

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import docutils.core
import pytest
import transaction
from webtest import TestApp

from pyramid_async import OperationFailed
from pyramid_async.interfaces import IScheduler
from pyramid_async.scheduler import TransactionalScheduler
from pyramid_async.settings import SETTINGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.rst").read_text(encoding="utf-8")


def python_blocks():
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README)
    return [textwrap.dedent(block) for block in blocks]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Import the n-th Python example as a module of its own."""

    def load(number):
        name = f"readme_example_{number}"
        (tmp_path / f"{name}.py").write_text(python_blocks()[number], encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    "document",
    [*ROOT.glob("*.rst"), *ROOT.glob("*/*.rst")],
    ids=lambda document: str(document.relative_to(ROOT)),
)
def test_document_is_sound(document):
    docutils.core.publish_doctree(
        document.read_text(encoding="utf-8"),
        source_path=str(document),
        settings_overrides={"halt_level": 2, "report_level": 2, "_disable_config": True},
    )


def test_the_quick_start_runs_as_it_stands(example):
    module = example(0)
    scheduler = module.config.registry.getUtility(IScheduler)
    try:
        app = TestApp(module.app)
        accepted = app.post("/start", status=202)
        document = app.get(accepted.headers["Location"], {"wait": "10"}).json
    finally:
        scheduler.executor.stop()
        for database in module.config.registry._zodb_databases.values():
            database.close()
    assert document["status"] == "successful"
    assert document["result"] == 6


def test_the_quick_start_is_about_fifteen_lines():
    code = [line for line in python_blocks()[0].splitlines() if line.strip()]
    assert len(code) <= 18


def test_the_job_of_the_readme_also_runs_outside_of_a_job(example):
    convert = example(1).convert
    pages = [{"raw": "a"}, {"raw": "b"}]
    assert convert({"pages": pages}) == {"pages": 2}
    assert pages[1]["text"] == "B"
    with pytest.raises(OperationFailed):
        convert({"broken": True, "pages": []})


def test_the_job_of_the_readme_runs_as_one(example, wait_for):
    scheduler = TransactionalScheduler()
    try:
        good = scheduler.schedule(example(1).convert, {"pages": [{"raw": "a"}, {"raw": "b"}]})
        bad = scheduler.schedule(example(1).convert, {"broken": True, "pages": []})
        transaction.commit()
        wait_for(lambda: scheduler.completed(good) and scheduler.completed(bad))
        assert scheduler.get_result(good) == ({"pages": 2}, None)
        assert isinstance(scheduler.get_result(bad)[1], OperationFailed)
    finally:
        transaction.abort()
        scheduler.stop()


def test_the_program_without_pyramid_runs_as_it_stands():
    program = [sys.executable, "-c", python_blocks()[2]]
    run = subprocess.run(program, capture_output=True, text=True, timeout=40)
    assert (run.returncode, run.stdout, run.stderr) == (0, "after the commit\n", "")


def settings_table():
    rows = []
    for setting in SETTINGS:
        shown = setting.default
        if shown is False or shown is True:
            shown = str(shown).lower()
        elif shown == ():
            shown = ""
        elif isinstance(shown, float):
            shown = f"{shown:g}"
        meaning = f"{setting.meaning} ({setting.allowed})".replace("*", r"\*")
        if len(str(shown)) > 13:  # wider than its column
            meaning, shown = f"{meaning} Default: {shown}", "see there"
        rows.append((setting.name, str(shown), meaning))
    rule = "======================== ============= " + "=" * 61
    lines = [rule, f"{'Name':<24} {'Default':<13} Meaning", rule]
    for name, default, meaning in rows:
        first, *rest = textwrap.wrap(meaning, 61)
        lines.append(f"{name:<24} {default:<13} {first}".rstrip())
        lines += [" " * 39 + line for line in rest]
    return "\n".join([*lines, rule])


def test_the_settings_table_is_that_of_the_code():
    written = README.split(".. settings\n\n")[1].split("\n\n.. end of settings")[0]
    assert written == settings_table()


def test_the_picture_of_the_code_names_every_module():
    picture = README.split("The code\n========")[1]
    modules = {path.name for path in (ROOT / "pyramid_async").glob("*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", picture))
    assert named <= modules
    assert modules - named <= {"__init__.py"}
