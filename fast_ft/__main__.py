"""`python -m fast_ft`: the command line of cli/main.py."""

import sys

from fast_ft.cli.main import main
from fast_ft.common.redaction import redact_tracebacks

if __name__ == "__main__":
    redact_tracebacks()
    sys.exit(main())
