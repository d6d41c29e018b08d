"""`python -m tools.pocket [FOLDER]`: write the pocket world's data files again and print their digests."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.pocket.dataset import HERE, write

if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
