"""Run the fast tests, and the checks of style and types; ``python3 tests -k cancel``: some tests.

Makes ``.venv`` in the checkout and installs into it what is missing, so that a bare Python will do.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
EXTRAS = "test,demo,lint"
CHECKS = (
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["mypy"],
    ["coverage", "erase"],
    ["coverage", "run", "-m", "pytest", "-n", "auto", "-m", "not services and not slow"],
    ["coverage", "combine", "--quiet"],
    ["coverage", "report"],
)
# An outer environment must not leak into this one.
FOREIGN = {"PIP_PREFIX", "PIP_TARGET", "PIP_USER", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"}


def main(pytest_args):
    """Return the exit status: 0 when every check passed."""
    prepare()
    if pytest_args:
        return run(["pytest", *pytest_args])
    failed = [" ".join(check) for check in CHECKS if run(check)]
    print("==> failed: " + "; ".join(failed) if failed else "==> all checks passed", flush=True)
    return 1 if failed else 0


def prepare():
    """Make the environment, and install into it unless that was done for this pyproject.toml."""
    if sys.version_info < (3, 11):  # noqa: UP036 - it may be started by any Python
        sys.exit("pyramid_async needs Python 3.11 or newer, this is " + sys.version.split()[0])
    stamp = VENV / "installed-for-tests"
    if not has_pip():
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit("This Python cannot make virtual environments; try: apt install python3-venv")
        # Nothing will be installed in it: neither for the tests, nor for the demo.
        for old in VENV.glob("*installed*"):
            old.unlink()
        # What is left of a Python that is gone must go too.
        clear = [] if PYTHON.exists() else ["--clear"]
        step([sys.executable, "-m", "venv", *clear, VENV], "making .venv")
    wanted = f"{ROOT}\n{EXTRAS}\n{(ROOT / 'pyproject.toml').read_text('utf-8')}"
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        step([*pip, "-e", f".[{EXTRAS}]"], f"installing pyramid_async[{EXTRAS}] into .venv")
        stamp.write_text(wanted, "utf-8")


def has_pip():
    """Say whether the environment is there, and of a Python that was not replaced since."""
    look = [PYTHON, "-I", "-c", "import pip"]
    try:
        return subprocess.run(look, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def step(command, title):
    """Run a command that the rest depends on, or leave with its status."""
    print("==> " + title, flush=True)
    status = subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if status:
        sys.exit(status)


def run(arguments):
    """Run a tool of the environment and return its status."""
    print("==> " + " ".join(arguments), flush=True)
    return subprocess.run([PYTHON, "-m", *arguments], cwd=ROOT, env=environment()).returncode


def environment():
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
