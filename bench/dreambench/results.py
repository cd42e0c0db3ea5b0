"""Results as one JSON line a cell (`bench.records`): which cells are done, which failed."""

from collections.abc import Mapping
from pathlib import Path

from bench import records

DONE, FAILED = "done", "failed"


class Results:
    """A file of records, each with "key", "fingerprint" and "status"; made on the first append."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict]:
        """All whole records in their order; ValueError for a line that is no record."""
        found = records.read(self.path)
        for number, record in enumerate(found, 1):
            if not {"key", "fingerprint", "status"} <= record.keys():
                raise ValueError(f"{self.path}, line {number}, is damaged: take that line out.")
        return found

    def append(self, record: Mapping) -> None:
        """Write one record, on disk before this returns."""
        records.append(self.path, record)

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
