"""`python -m fast_ft`: the command line of cli/main.py, as the whole of a process."""

import sys

from fast_ft.cli.main import own_process

if __name__ == "__main__":
    sys.exit(own_process())
