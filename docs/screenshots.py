"""Make the README's pictures from the running demo: ``.venv/bin/python docs/screenshots.py``.

With a folder as its argument it puts pictures of all pages there instead, light and dark, wide and
narrow, to be looked at. Needs Chromium; nothing is installed for it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
CHROMIUM = os.environ.get("CHROMIUM", "chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --remote-debugging-pipe"
)
WIDE, NARROW = 900, 360  # pixels
LIMIT = 60_000  # bytes of a picture in the README
PATIENCE = 60.0  # seconds


# -- the demo --------------------------------------------------------------------------


@contextmanager
def demo(folder: Path) -> Iterator[tuple[int, int]]:
    """Run the demo with its data in a folder; yield its two ports."""
    shutil.copy(ROOT / "development.ini", folder)
    ports = free_port(), free_port()
    pserve = ["-W", "ignore", "-m", "pyramid.scripts.pserve"]
    names = ["--app-name", "port", "--server-name", "port"]
    variables = [f"http_port={ports[0]}", f"other_port={ports[1]}"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, *pserve, *names, folder / "development.ini", *variables],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        wait(lambda: answers(ports[0]), "the demo to start")
        yield ports
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(port: int) -> bool:
    with suppress(OSError):
        return bool(urllib.request.urlopen(f"http://localhost:{port}/").status == 200)
    return False


def wait(what: Any, name: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := what():
            return value
        time.sleep(0.05)
    sys.exit(f"waited {PATIENCE:g} s in vain for {name}")


# -- the browser -----------------------------------------------------------------------


class Browser:
    """A page of Chromium, driven through two pipes by the DevTools protocol."""

    def __init__(self, process: Any, orders: Any, answers: Any) -> None:
        self.process, self.orders, self.answers = process, orders, answers
        self.sent = 0
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        order = {"id": self.sent, "method": method, "params": params, **self.session}
        self.orders.write(json.dumps(order).encode() + b"\0")
        self.orders.flush()
        while True:
            answer = json.loads(self.message())
            if answer.get("id") == self.sent:
                if "error" in answer:
                    sys.exit(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def message(self) -> bytes:
        read = bytearray()
        while byte := self.answers.read(1):
            if byte == b"\0":
                return bytes(read)
            read += byte
        sys.exit("Chromium has gone")

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def go(self, url: str, until: str = "true") -> None:
        """Open an address and wait until it is there and a script says true."""
        self.call("Page.navigate", url=url)
        path = json.dumps(url.partition("?")[0].partition("//")[2].partition("/")[2])
        self.until(f"location.pathname === '/' + {path} && {until}")

    def until(self, script: str) -> None:
        wait(lambda: self.run(f"document.readyState === 'complete' && !!({script})"), script)

    def press(self, action: str) -> None:
        """Send a form of the first page, and wait for the page it leads to."""
        self.run(f"document.querySelector('form[action=\"{action}\"] button').click()")
        self.until("location.pathname !== '/'")

    def look(self, width: int, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = dict(width=width, height=700, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def shot(self, file: Path, first: str = "body", last: str = "body") -> None:
        """Write a picture of the page, or of its part from one element to another."""
        top = self.run(f"document.querySelector('{first}').getBoundingClientRect().top")
        bottom = self.run(f"document.querySelector('{last}').getBoundingClientRect().bottom")
        top, bottom = (0, bottom) if first == "body" else (top - 16, bottom + 16)
        width = self.run("innerWidth")
        clip = dict(x=0, y=top, width=width, height=bottom - top, scale=1)
        options = dict(format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    # Chromium reads orders from its descriptor 3 and writes answers to 4.
    (orders_out, orders_in), (answers_out, answers_in) = os.pipe(), os.pipe()
    redirected = f'exec "$0" "$@" 3<&{orders_out} 4>&{answers_in}'
    profile = f"--user-data-dir={folder / 'profile'}"
    process = subprocess.Popen(
        ["sh", "-c", redirected, CHROMIUM, *FLAGS.split(), profile, "about:blank"],
        pass_fds=(orders_out, answers_in),
        stderr=subprocess.DEVNULL,
    )
    os.close(orders_out)
    os.close(answers_in)
    with open(orders_in, "wb") as orders, open(answers_out, "rb") as answers:
        try:
            yield Browser(process, orders, answers)
        finally:
            process.terminate()
            process.wait()


# -- the pictures ----------------------------------------------------------------------

BAR = "document.querySelector('async-job')?.shadowRoot.querySelector('[aria-valuenow]')"
HALF_WAY = f"{BAR}?.ariaValueNow > 40"
ENDED = "document.querySelector('#job[data-done]')"


def prepare(page: Browser, home: str) -> None:
    """Start some jobs and let them end; leave the index of characters complete."""
    page.go(f"{home}/")
    for action in ("/start/sample", "/start/fail", "/start/echo"):
        page.go(f"{home}/")
        page.press(action)
        page.until(ENDED)
    page.go(f"{home}/characters")
    page.run("document.querySelector('form[action=\"/characters/index\"] button').click()")
    page.until(f"location.pathname.startsWith('/jobs/') && {ENDED}")
    page.go(f"{home}/")
    page.press("/start/count")


def for_readme(page: Browser, home: str) -> None:
    page.look(WIDE, dark=False)
    page.go(f"{home}/jobs", HALF_WAY)
    page.go(f"{home}/jobs?", f"{HALF_WAY} && document.querySelector('#timeline svg')")
    page.shot(DOCS / "jobs.png", "h1", "#jobs li")
    page.look(WIDE, dark=True)
    page.go(f"{home}/characters?q=arrow")
    page.shot(DOCS / "characters.png", "form[role=search]", "figure")
    for file in (DOCS / "jobs.png", DOCS / "characters.png"):
        size = file.stat().st_size
        print(f"{file.relative_to(ROOT)}: {size:,} bytes")
        if size > LIMIT:
            sys.exit(f"{file.name} is larger than {LIMIT:,} bytes; show less")


def every_page(page: Browser, home: str, other: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page.go(f"{home}/")
    dataset = page.run("document.querySelector('a[href^=\"/datasets/\"]').pathname")
    page.go(f"{home}/jobs", "document.querySelector('#jobs a')")
    addresses = page.run("[...document.querySelectorAll('#jobs a')].map((link) => link.pathname)")
    pages = {
        "index": f"{home}/",
        "dataset": f"{home}{dataset}?q=euro",
        "characters": f"{home}/characters?q=greek+small",
        "jobs": f"{home}/jobs",
        "elsewhere": f"{other}/elsewhere",
        "nothing": f"{home}/nothing",
        **{f"job-{number}": home + path for number, path in enumerate(addresses)},
    }
    for (name, url), width, dark in product(pages.items(), (WIDE, NARROW), (False, True)):
        page.look(width, dark)
        page.go(url)
        if name == "elsewhere":
            page.until("!document.querySelector('#call').hidden")
            page.run("document.querySelector('#call button').click()")
            page.until(HALF_WAY)
        time.sleep(0.5)  # what scripts draw
        file = folder / f"{name}-{width}-{'dark' if dark else 'light'}.png"
        page.shot(file)
        wider = page.run("document.documentElement.scrollWidth - innerWidth")
        print(file.name, f"is {wider} pixels too wide" if wider > 0 else "")


def main(folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with demo(work) as (port, other), browser(work) as page:
            home = f"http://localhost:{port}"
            prepare(page, home)
            if folder is None:
                for_readme(page, home)
            else:
                every_page(page, home, f"http://localhost:{other}", Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:2])
