"""`python -m fast_ft`: the command line of cli/main.py, or what to install where its packages are missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

from fast_ft.cli.main import own_process

#: Packages without which no command answers. cli/main.py names any other that is missing when it is needed.
NEEDED = ("packaging", "pyarrow", "pydantic", "rich", "yaml")
ROOT = Path(__file__).resolve().parents[1]


def what_to_install(prefix: str = sys.prefix) -> str | None:
    """Return the message for a Python without the packages; None where they are there."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return None
    ready = ROOT / ".venv" / "run-ready"  # `make` writes it behind the last package
    if ready.is_file() and Path(prefix).resolve() != ready.parent.resolve():
        remedy = f"They are installed in {ready.parent}. Run `source {ready.parent}/bin/activate` first."
    elif not (ROOT / "Makefile").is_file():
        remedy = f"Run `{sys.executable} -m pip install --force-reinstall fast_ft`."
    else:
        remedy = (
            "Run `make .venv/run-ready`, then `source .venv/bin/activate`. Without make, run "
            "`python -m pip install -r requirements-cpu.txt`; with an NVIDIA GPU, `-r requirements.txt`."
        )
    return f"error: {sys.executable} lacks packages that fast_ft needs: {', '.join(missing)}. {remedy}"


def start() -> int:
    """Run the command line, unless packages are missing; the help needs none."""
    words = sys.argv[1:]
    if words and not {"-h", "--help"} & {*words} and (message := what_to_install()):
        print(message, file=sys.stderr)
        return 2
    return own_process()


if __name__ == "__main__":
    sys.exit(start())
