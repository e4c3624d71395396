"""Writing inputs and hashing outputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sha(prefix: str | Path) -> tuple[str, str]:
    """Return the hashes of a dataset's two files."""
    one, two = (hashlib.sha256(Path(f"{prefix}{s}").read_bytes()) for s in (".bin", ".idx"))
    return one.hexdigest(), two.hexdigest()
