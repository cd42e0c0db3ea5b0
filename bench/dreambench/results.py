"""Results as one JSON line a cell, appended by one process: what is there after a crash is whole or ignored."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

DONE, FAILED = "done", "failed"


class Results:
    """A file of records, each with "key", "fingerprint" and "status"; made on the first append.

    A last line without its end was torn by a crash: it is not read, and the next append takes it away.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """All whole records in their order; ValueError for a line that is no record."""
        if not self.path.is_file():
            return []
        whole = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line is empty or torn
        found = []
        for number, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                record["key"], record["fingerprint"], record["status"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number}, is damaged: take that line out.") from None
            found.append(record)
        return found

    def append(self, record: Mapping) -> None:
        """Write one record, on disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.path.open("r+b" if self.path.is_file() else "w+b") as file:
            end = file.read().rfind(b"\n") + 1
            file.seek(end)
            file.truncate()
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def done(self, wanted: Mapping[str, str] | None = None) -> dict[str, dict]:
        """The records of finished cells by key; the first one counts, should there be more.

        Args:
            wanted: fingerprints by key: only these cells.

        Raises:
            ValueError: a wanted cell was made with other settings.
        """
        found: dict[str, dict] = {}
        for record in self.read():
            key = record["key"]
            if record["status"] != DONE or (wanted is not None and key not in wanted):
                continue
            if wanted is not None and record["fingerprint"] != wanted[key]:
                raise ValueError(
                    f"{self.path} has {key} as other settings, prompts or another checkpoint made it: give another "
                    "--output, or the settings of then."
                )
            found.setdefault(key, record)
        return found

    def failures(self) -> dict[str, list[str]]:
        """What was said each time a cell failed that is not done yet, by key."""
        found: dict[str, list[str]] = {}
        for record in self.read():
            if record["status"] == FAILED:
                found.setdefault(record["key"], []).append(record.get("error", ""))
        done = self.done()
        return {key: said for key, said in found.items() if key not in done}
