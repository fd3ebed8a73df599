"""Run the demo from a fresh checkout: python3 demo [--port N]. Needs nothing but Python."""

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
VENV = HOME / ".venv"
PYTHON = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
STAMP = VENV / "demo-installed"
# An active virtual environment must not reach into the one made here.
FOREIGN = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in FOREIGN}
# Pyramid still imports it, and on the first screen that looks like a fault.
ENVIRONMENT.setdefault("PYTHONWARNINGS", "ignore:pkg_resources is deprecated")


def main():
    parser = argparse.ArgumentParser(prog="python3 demo", description="Run the demo.")
    parser.add_argument("--port", type=int, default=6543, help="this one and the next are used")
    port = parser.parse_args().port
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("The demo needs Python 3.11 or later.")
    if "%" in str(HOME):
        sys.exit(f"An ini file cannot name {HOME}: move the checkout to a path without %.")
    check_port(port)
    check_port(port + 1)  # another origin, for the page that calls from there
    if not installed():
        install()
    print(f"Open http://localhost:{port}/ (Ctrl-C ends the server.)", flush=True)
    os.chdir(HOME)
    serve(
        "-m pyramid.scripts.pserve --app-name port --server-name port development.ini"
        f" http_port={port} other_port={port + 1}".split()
    )


def check_port(port):
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"Port {port} cannot be used: {error}. Choose others: python3 demo --port 8080")


def installed():
    fresh = STAMP.exists() and STAMP.stat().st_mtime >= (HOME / "pyproject.toml").stat().st_mtime
    return fresh and has_pip()


def has_pip():
    """Say whether the environment is there, and of a Python that was not replaced since."""
    look = [str(PYTHON), "-I", "-c", "import pip"]
    try:
        return subprocess.run(look, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def install():
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("This Python cannot make virtual environments. Try: apt install python3-venv")
    print(f"Installing the demo into {VENV} (once, about a minute) ...", flush=True)
    if not has_pip():
        # Nothing will be installed in it: neither for the demo, nor for the tests.
        for stamp in VENV.glob("*installed*"):
            stamp.unlink()
        # What is left of a Python that is gone must go too.
        run(sys.executable, "-m", "venv", *([] if PYTHON.exists() else ["--clear"]), VENV)
    pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    run(*pip, "--editable", f"{HOME}[demo]")
    STAMP.touch()


def run(*command):
    result = subprocess.run([str(part) for part in command], env=ENVIRONMENT)
    if result.returncode:
        sys.exit(f"Failed: {' '.join(map(str, command))}")


def serve(arguments):
    python = str(PYTHON)
    if os.name == "nt":
        sys.exit(subprocess.call([python, *arguments], env=ENVIRONMENT))
    os.execve(python, [python, *arguments], ENVIRONMENT)


if __name__ == "__main__":
    main()
