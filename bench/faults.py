"""`python dev.py bench faults`: the faults of tests/faults.py, all of them, with the figures the README shows."""

import sys
from pathlib import Path

from tests.faults import main

if __name__ == "__main__":
    results = Path(__file__).parent / "results" / "faults.json"
    sys.exit(main(["--json", str(results), *sys.argv[1:]]))
