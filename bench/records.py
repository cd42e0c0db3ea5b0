"""Results as one JSON line each, appended by one process: what is there after a crash is whole or ignored."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def read(path: Path) -> list[dict]:
    """All whole records in their order, none without a file; a last line without its end was torn and is left out.

    Raises ValueError for a line that is no record.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is damaged: take that line out.")
        found.append(record)
    return found


def append(path: Path, record: Mapping) -> None:
    """Write one record, on disk before this returns; a torn last line goes away, folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with path.open("r+b" if path.is_file() else "w+b") as file:
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
