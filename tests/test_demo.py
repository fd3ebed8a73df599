"""The demo: CSV files as they are found in the world, and the pages from upload to download."""

from __future__ import annotations

import csv
import io
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pyramid.session
import pytest
import transaction
from crash.storages import free_port
from pyramid.paster import get_app
from webob import Request
from webtest import TestApp, Upload
from ZODB.POSException import ConflictError

from demo import jobs, models
from demo.csvfile import MAX_ROWS, BrokenRow, CsvFile, NotCsv
from demo.models import Catalogue, split_words
from demo.sample import SAMPLE, write_sample
from pyramid_async.interfaces import IScheduler

# WebOb leaves the temporary files of large bodies to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:unclosed file <_io.(BufferedRandom|FileIO .* mode='rb\+'):ResourceWarning"
)

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / SAMPLE
    write_sample(path)
    return path


# -- reading CSV -----------------------------------------------------------------------


def read(content, encoding=None):
    """Return (columns, good rows, broken rows)."""
    file = CsvFile(io.BytesIO(content), encoding)
    rows = list(file)
    broken = [row for row in rows if isinstance(row, BrokenRow)]
    return file.columns, [row for row in rows if not isinstance(row, BrokenRow)], broken


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
def test_encoding_is_detected(encoding):
    text = "name;city\r\nJosé;Malmö\r\nZoë;Besançon\r\n" * 3
    columns, rows, broken = read(text.encode(encoding))
    assert columns == ["name", "city"]
    assert rows[:2] == [["José", "Malmö"], ["Zoë", "Besançon"]]
    assert not broken


def test_bytes_that_windows_does_not_know_are_read_as_latin_1():
    _columns, rows, broken = read("a,b\né\x81,2\n".encode("latin-1"))
    assert (rows, broken) == ([["é\x81", "2"]], [])


@pytest.mark.parametrize(
    ("encoding", "word"), [("cp1251", "Привет"), ("shift_jis", "日本語"), ("gb18030", "中文")]
)
def test_encoding_may_be_chosen(encoding, word):
    assert read(f"a,b\n{word},2\n".encode(encoding), encoding)[1] == [[word, "2"]]


@pytest.mark.parametrize(
    ("codec", "chosen"),
    [
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16"),
        ("utf-16-be", "utf-16"),
    ],
)
def test_chosen_encoding_may_have_its_mark_or_not(codec, chosen):
    assert read("a,b\n1,2\n".encode(codec), chosen)[:2] == (["a", "b"], [["1", "2"]])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quote", ['"', "'"])
def test_delimiter_and_quote_are_detected(delimiter, quote):
    lines = [["name", "note"], ["a", f"x{delimiter}y, z; u"], ["b", "it"], ["c", "d"]]
    text = "\n".join(delimiter.join(quote + cell + quote for cell in line) for line in lines)
    columns, rows, broken = read(text.encode())
    assert ([columns, *rows], broken) == (lines, [])


def test_commas_in_numbers_do_not_hide_the_semicolon():
    assert read(b"item;price;vat\nx;1,50;0,30\ny;2,75;0,50\n")[0] == ["item", "price", "vat"]


def test_delimiter_within_quotes_does_not_hide_the_one_between_them():
    content = b'Artikel;"Preis, netto"\nSchraube;"1,50"\nMutter;"2,30"\n'
    columns, rows, _broken = read(content)
    assert (columns, rows[0]) == (["Artikel", "Preis, netto"], ["Schraube", "1,50"])
    assert read(b'"name","note;"\n"x","y;"\n')[:2] == (["name", "note;"], [["x", "y;"]])


def test_quote_left_open_near_the_top_is_still_the_quote():
    _columns, rows, broken = read(b'a;b;c\n1;"open;3\n4;5;"6\n7"\n8;9;"0"\n')
    assert rows == [["4", "5", "6\n7"], ["8", "9", "0"]]
    assert [row.row for row in broken] == [2]


def test_blanks_before_a_quote_are_skipped():
    assert read(b'a, b\n1, "x, y"\n2, "z"\n')[1] == [["1", "x, y"], ["2", "z"]]


def test_separator_line_of_excel_is_obeyed():
    assert read(b"sep=|\na,b|c\n1|2\n")[:2] == (["a,b", "c"], [["1", "2"]])


def test_text_of_one_column_keeps_its_commas():
    columns, rows, broken = read(b"sentence\nWell, yes\nNo\n\nOh, well, maybe\n")
    assert columns == ["sentence"]
    assert rows == [["Well, yes"], ["No"], ["Oh, well, maybe"]]
    assert not broken


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind_and_in_cells_are_kept(end):
    _columns, rows, broken = read(f'a,b{end}1,"two{end}lines"{end}3,4'.encode())
    assert (rows, broken) == ([["1", f"two{end}lines"], ["3", "4"]], [])


def test_header_names_become_unique_and_none_is_empty():
    assert read(b" id ,,id,a\0b\n1,2,3,4\n")[0] == ["id", "column 2", "id (2)", "ab"]
    assert read(b"a,a,a (2),a\n1,2,3,4\n")[0] == ["a", "a (2)", "a (2) (2)", "a (3)"]
    assert read(b"{b},{b}\n1,2\n")[0] == ["{b}", "{b} (2)"]


def test_broken_rows_are_told_by_number_and_the_rest_is_kept():
    content = b"a,b,c\n1,2,3\n1,2\n4,5,6\n1,2,3,4\n7,\0,9\n\n\xc3\xa4,\xff,x\n\xc3\xa4,\xc3\xb6,y\n"
    _columns, rows, broken = read(content)
    assert rows == [["1", "2", "3"], ["4", "5", "6"], ["ä", "ö", "y"]]
    assert broken == [
        BrokenRow(3, 3, "2 columns instead of 3"),
        BrokenRow(5, 5, "4 columns instead of 3"),
        BrokenRow(6, 6, "a NUL byte"),
        BrokenRow(7, 8, "bytes that are not utf-8"),
    ]


def test_half_a_character_of_utf_16_breaks_its_row_alone():
    content = "a,b\n1,2\n3,".encode("utf-16") + b"\x00\xd8" + "\n5,6\n".encode("utf-16-le")
    _columns, rows, broken = read(content)
    assert rows == [["1", "2"], ["5", "6"]]
    assert broken == [BrokenRow(3, 3, "bytes that are not utf-16")]


@pytest.mark.parametrize("after", [1, 10, 3_000])
def test_quote_that_is_never_closed_breaks_one_row_alone(after):
    good = "".join(f"{number},x\n" for number in range(after))
    _columns, rows, broken = read(f'a,b\n0,ok\n1,"open\n{good}'.encode())
    assert len(rows) == 1 + after
    assert [row[:2] for row in broken] == [(3, 3)]


def test_row_of_several_lines_that_is_too_wide_is_one_broken_row():
    _columns, rows, broken = read(b'a,b\n1,"Dear all,\nyes,no\nbye",x\n2,ok\n')
    assert rows == [["2", "ok"]]
    assert broken == [BrokenRow(2, 2, "3 columns instead of 2")]


@pytest.mark.parametrize("text", ['n;"name\n1;a\n2;b\n', 'n,"name\n1,Ann\n2,"Bob"\n3,Cid\n'])
def test_quote_of_the_header_that_is_never_closed_loses_no_row_in_silence(text):
    with pytest.raises(NotCsv, match="a quote that is not closed"):
        read(text.encode())


def test_header_of_several_lines_below_empty_ones_is_read():
    columns, rows, broken = read(b'\n\nn,"the\nname"\n1,Ann\n')
    assert (columns, rows, broken) == (["n", "the name"], [["1", "Ann"]], [])


def test_quotes_of_two_rows_are_no_pair():
    _columns, rows, broken = read(b'a,b\n1,"open\n2,"closed"\n3,"also"\n')
    assert rows == [["2", "closed"], ["3", "also"]]
    assert [row.row for row in broken] == [2]


def test_cell_that_is_too_large_breaks_its_row_alone():
    _columns, rows, broken = read(b"a,b\n1," + b"x" * 200_000 + b"\n3,4\n")
    assert rows == [["3", "4"]]
    assert broken[0][:2] == (2, 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"\n\n\n", "empty"),
        (b"PK\x03\x04 and so on", "Excel"),
        (b"x" * 1_100_000, "Line 1 has more than"),
        (b"a,b\n" + b"x" * 1_100_000, "Line 2 has more than"),
        (",".join(f"c{n}" for n in range(600)).encode(), "600 columns"),
    ],
)
def test_what_is_no_csv_file_is_refused_with_a_reason(content, text):
    with pytest.raises(NotCsv, match=text):
        read(content)


def test_more_rows_than_allowed_are_refused():
    assert len(read(b"a\n" + b"1\n" * MAX_ROWS)[1]) == MAX_ROWS
    with pytest.raises(NotCsv, match="more than 200,000 rows"):
        read(b"a\n" + b"1\n" * (MAX_ROWS + 1))


def test_sample_is_real_data_of_many_rows(sample):
    _columns, rows, broken = read(sample.read_bytes())
    assert len(rows) > 20_000
    assert not broken
    assert ["U+20AC", "€", "EURO SIGN", "symbol, currency", "ET", "ambiguous", "", ""] in rows


def test_first_command_needs_nothing_but_python():
    command = [sys.executable, "-I", "-S", str(CHECKOUT / "demo"), "--help"]
    assert b"--port" in subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_first_command_serves_what_was_only_cloned(tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", "var")
    shutil.copytree(CHECKOUT, tmp_path / "clone", ignore=ignored)
    port = free_ports()
    command = [sys.executable, "demo", "--port", str(port)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path / "clone", env=environment) as demo:
        try:
            assert b"catalogue" in first_page(port, demo).lower()
        finally:
            demo.terminate()


def free_ports():
    """Return the first of two, as the demo uses them; the next may be a connection's."""
    while True:
        port = free_port()
        with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


def first_page(port, demo):
    """Return the start page, as soon as the demo serves it."""
    deadline = time.monotonic() + 300
    while demo.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/") as answer:
            return answer.read()
        time.sleep(0.2)
    raise AssertionError(f"nobody serves port {port}; the demo's exit status: {demo.poll()}")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("python", ["gone", "of another version"])
@pytest.mark.parametrize("command", ["demo", "tests"])
def test_first_commands_notice_that_the_python_of_their_environment_was_replaced(
    tmp_path, command, python
):
    for file in ("demo/__main__.py", "tests/__main__.py", "pyproject.toml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / file, tmp_path / file)
    # Another version looks for its packages, and so for pip, in another folder.
    venv.create(tmp_path / ".venv", symlinks=True, with_pip=False)
    own = tmp_path / ".venv" / "bin" / "python"
    if python == "gone":
        own.unlink()
        own.symlink_to("no-python")
    installed = f"{tmp_path}\ntest,demo,lint\n{(CHECKOUT / 'pyproject.toml').read_text('utf-8')}"
    for stamp in ("demo-installed", "installed-for-tests"):
        (tmp_path / ".venv" / stamp).write_text(installed, "utf-8")
    # Whichever comes next finds nothing installed either.
    for name in (command, "demo", "tests"):
        run = try_to_install(tmp_path / name)
        assert run.returncode == 1
        assert "installing" in run.stdout.lower()
        assert "Traceback" not in run.stderr
        assert subprocess.run([own, "-I", "-c", "import pip"]).returncode == 0


def try_to_install(folder):
    """Start a first command, and let it fetch nothing: that it tries to is enough."""
    command = [sys.executable, folder]
    if folder.name == "demo":
        command += ["--port", str(free_ports())]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# -- searching -------------------------------------------------------------------------


def test_words_are_compared_without_case_and_a_lone_sign_is_one():
    assert split_words("Straße ΑΒΓ ﬁn-2") == ("strasse", "αβγ", "fin", "2")
    assert split_words(" → ") == ("→",)
    assert split_words("") == ()


# -- the pages -------------------------------------------------------------------------


class Client(TestApp):
    """A browser on an application of its own, made from development.ini in a new folder."""

    def __init__(self, folder):
        super().__init__(get_app(str(folder / "development.ini")))
        self.databases = self.app.registry._zodb_databases

    closed = False

    def close(self):
        """Stop the workers first: what they run either commits before or never."""
        if self.closed:
            return
        self.closed = True
        self.app.registry.getUtility(IScheduler).executor.stop(10)
        for database in self.databases.values():
            database.close()
        transaction.abort()

    def press(self, page, action, **fields):
        """Send the form that leads to *action* and return the page it leads to."""
        forms = {form.action.partition("?")[0]: form for form in page.forms.values()}
        form = forms[action]
        for name, value in fields.items():
            form[name] = value
        response = form.submit()
        assert response.status_int == 303, response
        return response.follow()

    def upload(self, name, content, **fields):
        return self.press(self.get("/"), "/upload", file=Upload(name, content), **fields)

    @contextmanager
    def stored(self, address):
        """The dataset of an address, as the database has it."""
        with self.databases[""].transaction() as connection:
            yield connection.root()["demo"].datasets[address.rpartition("/")[2]]

    def url_of(self, page):
        return "/async/" + page.request.path.rpartition("/")[2]

    def finished(self, page):
        """Wait for the job of a page and return the page that shows its end."""
        url = self.url_of(page) + "?wait=20"
        assert any(self.get(url).json["done"] for _ in range(3))
        return self.get(page.request.path_qs)

    def imported(self, name, content, **fields):
        """Upload a file and return the address of its dataset."""
        page = self.finished(self.upload(name, content, **fields))
        return page.click("Search the rows").request.path

    def search(self, dataset, query):
        """Return the rows shown."""
        rows = self.get(dataset, {"q": query}).html.select("tbody tr")
        return [[cell.text for cell in row.select("td")] for row in rows]


@pytest.fixture
def folder(tmp_path, sample):
    shutil.copy(CHECKOUT / "development.ini", tmp_path)
    (tmp_path / "var").mkdir()
    shutil.copy(sample, tmp_path / "var")
    return tmp_path


@pytest.fixture
def client(folder):
    client = Client(folder)
    yield client
    client.close()


PEOPLE = "name;city\r\nJosé;Malmö\r\nbroken\r\nZoë;Besançon\r\n".encode("cp1252")


def text_of(page):
    return " ".join(page.html.find("main").text.split())


def test_file_is_uploaded_imported_searched_exported_and_read_again(client):
    page = client.finished(client.upload("people.csv", PEOPLE))
    assert "2 rows are stored" in text_of(page)
    assert "Row 3: 1 column instead of 2" in text_of(page)
    dataset = page.click("Search the rows").request.path
    assert client.search(dataset, "malm") == [["José", "Malmö"]]
    assert client.search(dataset, "") == [["José", "Malmö"], ["Zoë", "Besançon"]]
    page = client.finished(client.press(client.get(dataset), dataset + "/export"))
    file = page.click("Download it")
    assert file.headers["Content-Disposition"] == 'attachment; filename="people-export.csv"'
    assert read(file.body) == (["name", "city"], [["José", "Malmö"], ["Zoë", "Besançon"]], [])


def test_search_result_alone_is_exported(client):
    dataset = client.imported("people.csv", PEOPLE)
    page = client.get(dataset, {"q": "zo"})
    file = client.finished(client.press(page, dataset + "/export")).click("Download it")
    assert read(file.body)[1] == [["Zoë", "Besançon"]]


def test_sample_is_imported_and_searched_by_words_and_signs(client):
    page = client.finished(client.press(client.get("/"), "/start/sample"))
    dataset = page.click("Search the rows").request.path
    assert client.search(dataset, "EURO currency")[-1][:3] == ["U+20AC", "€", "EURO SIGN"]
    assert client.search(dataset, "→")[0][2] == "RIGHTWARDS ARROW"
    assert client.search(dataset, "no such word") == []
    assert next(row[2] for row in client.search(dataset, "alpha small greek")) == (
        "GREEK SMALL LETTER ALPHA WITH TONOS"
    )


def test_rows_are_shown_page_by_page(client):
    dataset = client.imported("n.csv", b"n,word\n" + b"".join(b"%d,w\n" % n for n in range(120)))
    page = client.get(dataset)
    assert "Rows 1 to 50 of 120." in text_of(page)
    page = page.click("Next").click("Next")
    assert "Rows 101 to 120 of 120." in text_of(page)
    assert "Next" not in text_of(page)
    assert "There are only 3 pages." in text_of(client.get(dataset, {"page": "9"}))
    assert "Rows 1 to 50" in text_of(client.get(dataset, {"page": "x", "q": "w"}))


def test_data_outlives_the_process(client, folder):
    dataset = client.imported("people.csv", PEOPLE)
    client.close()
    client = Client(folder)
    try:
        assert client.search(dataset, "jos") == [["José", "Malmö"]]
    finally:
        client.close()


def test_two_imports_at_once_both_end_well(client):
    content = b"n,word\n" + b"".join(b"%d,w%d\n" % (n, n) for n in range(5_000))
    first, second = client.upload("a.csv", content), client.upload("b.csv", content)
    for page in (first, second):
        assert "5,000 rows are stored" in text_of(client.finished(page))


def test_file_that_is_no_csv_fails_with_a_reason_and_may_be_tried_again(client):
    page = client.finished(client.upload("book.xlsx", b"PK\x03\x04..."))
    assert "Excel workbook" in text_of(page)
    page = page.click("To the dataset")
    assert "import failed" in text_of(page)
    again = client.press(page, page.request.path + "/import", encoding="cp1252")
    assert "Excel workbook" in text_of(client.finished(again))


def test_file_without_a_good_row_fails_and_names_the_first(client):
    page = client.finished(client.upload("x.csv", b"a,b\n1\n2\n"))
    assert "Row 2: 1 column instead of 2" in text_of(page)


def test_upload_without_a_file_is_asked_for_one(client):
    form = client.get("/").forms[0]
    assert "Choose a file first." in text_of(form.submit().follow())


def test_upload_that_meets_a_conflict_is_stored_by_the_next_attempt(client, monkeypatch):
    attempts = []

    def add(catalogue, dataset, add=Catalogue.add):
        add(catalogue, dataset)
        attempts.append(dataset)
        if len(attempts) == 1:
            raise ConflictError

    monkeypatch.setattr(Catalogue, "add", add)
    page = client.finished(client.upload("people.csv", PEOPLE))
    assert "2 rows are stored" in text_of(page)
    assert len(attempts) == 2


def test_dataset_without_rows_is_not_exported(client):
    page = client.finished(client.upload("book.xlsx", b"PK\x03\x04...")).click("To the dataset")
    fields = {"csrf_token": page.forms[0]["csrf_token"].value}
    answer = client.post(page.request.path + "/export", fields, status=303).follow()
    assert "book.xlsx is not imported yet." in text_of(answer)
    assert len(client.get("/async").json["jobs"]) == 1


@pytest.mark.parametrize("place", ["above the header", "below the header"])
def test_import_of_empty_lines_reports_and_ends_when_it_is_cancelled(
    client,
    monkeypatch,
    wait_for,
    place,
):
    reached, go, messages = threading.Event(), threading.Event(), []

    def message(dataset):
        messages.append(dataset.rows_kept)
        reached.set()
        assert go.wait(20)
        return "some"

    monkeypatch.setattr(jobs, "progress_message", message)
    lines = [b"\n" * 10_000, b"a,b\n"]
    page = client.upload(
        "empty.csv", b"".join(lines if place == "above the header" else lines[::-1])
    )
    wait_for(reached)
    sid = client.url_of(page).rpartition("/")[2]
    client.press(client.get(page.request.path_qs), f"/jobs/{sid}/cancel")
    go.set()
    executor = client.app.registry.getUtility(IScheduler).executor
    wait_for(lambda: not executor.held)
    assert messages == [0]


@pytest.fixture
def half_way(monkeypatch):
    """Imports stop after their first savepoint, until they are let go."""
    reached, go = threading.Event(), threading.Event()

    def savepoint_and_stand(obj, savepoint=models.savepoint):
        savepoint(obj)
        reached.set()
        assert go.wait(20)

    monkeypatch.setattr(models, "savepoint", savepoint_and_stand)
    yield reached, go
    go.set()


@pytest.mark.parametrize("how", ["the form", "script"])
def test_import_cancelled_half_way_leaves_no_rows(client, folder, half_way, wait_for, how):
    reached, go = half_way
    page = client.press(client.get("/"), "/start/sample")
    wait_for(reached)
    page = client.get(page.request.path_qs)
    assert "rows read" in text_of(page)
    if how == "the form":
        sid = client.url_of(page).rpartition("/")[2]
        page = client.press(page, f"/jobs/{sid}/cancel")
    else:
        token = page.html.find("async-job")["token"]
        answer = client.delete(
            client.url_of(page) + "?only=cancel", headers={"X-CSRF-Token": token}
        )
        assert answer.json["status"] == "dismissed"
        page = client.get(page.request.path_qs)
    assert "was cancelled" in text_of(page)
    dataset = page.html.find("a", string="To the dataset")["href"]
    go.set()
    client.close()
    client = Client(folder)
    try:
        assert "import cancelled" in text_of(client.get("/"))
        assert "This dataset has no rows" in text_of(client.get(dataset))
        with client.stored(dataset) as stored:
            assert (len(stored.rows), stored.segments, stored.columns) == (0, (), ())
    finally:
        client.close()


def test_deleting_a_dataset_cancels_its_import(client, half_way, wait_for):
    reached, go = half_way
    page = client.press(client.get("/"), "/start/sample")
    wait_for(reached)
    dataset = client.get("/").click(href="^/datasets/").request.path
    assert "was deleted" in text_of(client.press(client.get(dataset), dataset + "/delete"))
    go.set()
    assert client.get(client.url_of(page)).json["status"] == "dismissed"
    assert "There is no such dataset" in text_of(client.get(dataset, status=404))


def test_cancelled_count_does_not_move_the_counter(client, wait_for):
    page = client.press(client.get("/"), "/start/count")
    url = client.url_of(page)
    wait_for(lambda: client.get(url).json.get("progress"))
    sid = url.rpartition("/")[2]
    client.press(client.get(page.request.path_qs), f"/jobs/{sid}/cancel")
    client.app.registry.getUtility(IScheduler).executor.stop(10)
    assert "The counter stands at 0" in text_of(client.get("/"))


def test_count_that_ends_adds_to_the_counter(db):
    connection = db.open()
    connection.root()["demo"] = catalogue = Catalogue()
    assert jobs.count_slowly(catalogue.counter, steps=3, pause=0) == 3


def test_failure_with_a_reason_is_shown(client):
    page = client.finished(client.press(client.get("/"), "/start/fail"))
    assert "The oracle is closed on weekends." in text_of(page)


def test_unexpected_failure_shows_a_number_that_is_in_the_log(client, caplog):
    page = client.finished(client.press(client.get("/"), "/start/crash"))
    number = page.html.find("code").text
    assert "division" not in page.text
    assert number in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_forms_without_their_token_are_refused(client):
    assert "expired" in text_of(client.post("/start/count", status=400))
    page = client.press(client.get("/"), "/start/count")
    client.delete(client.url_of(page), status=400)
    client.delete(client.url_of(page), headers={"X-CSRF-Token": "x" * 40}, status=400)
    assert not client.get(client.url_of(page)).json["done"]


def test_forms_of_a_page_that_was_open_for_a_day_are_taken(client, monkeypatch):
    page = client.get("/")
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(pyramid.session, "time", SimpleNamespace(time=lambda: tomorrow))
    assert "Fail with a reason" in text_of(client.press(page, "/start/fail"))


@pytest.mark.parametrize(
    "address",
    ["/nothing", "/jobs/unknown", "/datasets/unknown", "/jobs/%00", "/datasets/%F0%9F%92%A9"],
)
def test_unknown_addresses_are_answered_with_a_page(client, address):
    assert "Not found" in text_of(client.get(address, status=404))


@pytest.mark.parametrize("address", ["/jobs/%ff", "/characters?q=%ff"])
def test_address_that_is_not_utf_8_is_refused(client, address):
    response = Request.blank(address).get_response(client.app)  # TestApp cannot send a path
    assert response.status_int == 400
    assert "The address is not UTF-8" in response.text


def part(name, text="x", head="", filename=""):
    """Return one part of a form that a program made."""
    named = f'; filename="{filename}"' if filename else ""
    return (
        f'--limit\r\nContent-Disposition: form-data; name="{name}"{named}\r\n{head}\r\n{text}\r\n'
    )


def post_parts(client, address, *parts, token=None, **kw):
    token = token or client.get("/").forms[0]["csrf_token"].value
    body = part("csrf_token", token) + "".join(parts) + "--limit--\r\n"
    return client.post(address, body, {"Content-Type": "multipart/form-data; boundary=limit"}, **kw)


def test_file_in_place_of_a_text_is_no_text(client):
    dataset = client.imported("people.csv", PEOPLE)
    for field in ("q", "page"):
        page = post_parts(client, dataset, part(field, filename="x.txt"), status=200)
        assert "Rows 1 to 2 of 2." in text_of(page)
    query = part("q", filename="x.txt")
    post_parts(client, "/characters", query, status=200)
    post_parts(client, dataset + "/export", query, status=303)
    post_parts(client, "/start/echo", part("text", filename="x.txt"), status=303)


def test_text_that_utf_8_has_not_is_searched_without_it(client):
    dataset = client.imported("people.csv", PEOPLE)
    query = part("q", r"\ud800", "Content-Type: text/plain; charset=unicode-escape\r\n")
    assert "No row matches." in text_of(post_parts(client, dataset, query))


def test_form_within_a_form_is_no_file(client):
    head = "Content-Type: multipart/mixed; boundary=inner\r\n"
    file = part("file", "--inner--", head, filename="x.csv")
    assert "Choose a file first." in text_of(post_parts(client, "/upload", file).follow())


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "application/x-www-form-urlencoded; charset=foo",
        "application/x-www-form-urlencoded; charset=utf-16",
    ],
)
@pytest.mark.parametrize("address", ["/start/echo", "/upload", "/nothing"])
def test_form_that_cannot_be_read_is_refused_with_a_page(client, content_type, address):
    token = client.get("/").forms[0]["csrf_token"].value
    headers = {"Content-Type": content_type}
    page = client.post(address, f"csrf_token={token}&text=x", headers, status=400)
    assert "cannot be read" in text_of(page)
    # This one is looked at before the form is.
    client.post(address, "text=x", {**headers, "X-CSRF-Token": token}, status=400)


@pytest.mark.parametrize(
    "odd",
    [
        part("csrf_token", filename="x.txt"),
        part("text", head="Content-Type: text/plain; charset=foo\r\n"),
        part("text", "x", "Content-Type: text/plain; charset=utf-16\r\n"),
    ],
)
def test_part_of_a_form_that_cannot_be_read_is_refused_with_a_page(client, odd):
    assert "cannot be read" in text_of(post_parts(client, "/start/echo", odd, status=400))


EVIL = '<b onclick="x">&amp;"\'{{7*7}}'


def test_everything_from_a_file_is_escaped(client):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([[EVIL, "b"], [EVIL, "1"], [EVIL]])
    page = client.finished(client.upload(f"..\\x/{EVIL}\x00\u202e.csv", buffer.getvalue().encode()))
    assert page.html.find("h1").text == f"Import {EVIL}.csv"
    dataset = page.click("Search the rows").request.path
    for shown in (page, client.get(dataset), client.get(dataset, {"q": EVIL}), client.get("/")):
        assert not shown.html.find("b")
        assert EVIL in shown.html.text
    page = client.finished(client.press(client.get(dataset), dataset + "/export"))
    headers = page.click("Download it").headers
    assert headers["Content-Disposition"] == 'attachment; filename="b_onclick_x_amp_7_7-export.csv"'


def test_pages_forbid_foreign_script_and_do_not_tell_their_address(client):
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "same-origin"


def test_pages_work_without_script(client):
    page = client.press(client.get("/"), "/start/count")
    assert 'http-equiv="refresh"' in str(page.html.find("noscript"))
    assert page.html.find("progress")


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from test_demo import Client
client = Client(Path(sys.argv[1]))
page = client.press(client.get("/"), "/start/echo")
while client.get(client.url_of(page)).json["status"] != "running":
    time.sleep(0.01)
print(client.url_of(page).rpartition("/")[2], flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


@pytest.mark.slow
def test_server_that_is_stopped_gives_its_jobs_back(folder):
    path = os.pathsep.join(map(str, (CHECKOUT, CHECKOUT / "tests")))
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED, folder],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in ended.stderr
    settings = folder / "development.ini"
    text = settings.read_text("utf-8").replace("[app:main]", "[app:main]\nasync.workers = 0")
    settings.write_text(text, "utf-8")
    client = Client(folder)
    try:
        scheduler = client.app.registry.getUtility(IScheduler)
        job = scheduler.transact(lambda own: own.status(ended.stdout.strip()))
        assert (job.status, job.attempts) == ("accepted", 0)
    finally:
        client.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_largest_file_is_imported_in_bounded_memory(client, folder):
    content = b"n,hash,word\n" + b"".join(
        b"%d,%d,word%d\n" % (n, n * 2654435761 % 2**32, n % 1000) for n in range(MAX_ROWS)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = client.upload("large.csv", content)
    url = client.url_of(page)
    while not client.get(url + "?wait=20").json["done"]:
        pass
    page = client.get(page.request.path_qs)
    assert "200,000 rows are stored" in text_of(page)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150_000 * (1 if sys.platform == "linux" else 1024)  # KiB, elsewhere bytes
    dataset = page.click("Search the rows").request.path
    assert client.search(dataset, "199999")[-1][0] == "199999"
    assert "of 200 that match" in text_of(client.get(dataset, {"q": "word777"}))


def test_servers_of_the_demo_see_a_client_that_leaves():
    """By waitress's default they do not; see `pyramid_async.waiting`."""
    ini = ConfigParser(interpolation=None)
    ini.read(CHECKOUT / "development.ini", "utf-8")
    assert ini["server:main"]["use"] == "egg:waitress#main"
    assert ini["server:main"]["channel_request_lookahead"] == "1"
    assert ini["server:port"]["use"] == "main"


def test_checkout_that_no_ini_file_can_name_is_refused(tmp_path):
    place = tmp_path / "50%" / "demo"
    place.mkdir(parents=True)
    shutil.copy(CHECKOUT / "demo" / "__main__.py", place)
    run = subprocess.run([sys.executable, place], capture_output=True, text=True, timeout=20)
    assert run.returncode == 1
    assert "move the checkout to a path without %" in run.stderr
