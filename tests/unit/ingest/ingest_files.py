"""Writing inputs and hashing outputs."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import zstandard

ROOT = Path(__file__).resolve().parents[3]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sha(prefix: str | Path) -> tuple[str, str]:
    """Return the hashes of a dataset's two files."""
    one, two = (hashlib.sha256(Path(f"{prefix}{s}").read_bytes()) for s in (".bin", ".idx"))
    return one.hexdigest(), two.hexdigest()


FORMATS = ["jsonl", "json", "jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "parquet", "dataset"]


def written(folder, name, docs):
    """Write documents in a format; return the path."""
    records = "".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(docs)).encode()
    path = folder / f"c.{name}"
    pack = {
        "gz": lambda b: gzip.compress(b[:900]) + gzip.compress(b[900:]),
        "zst": lambda b: zstandard.compress(b[:900]) + zstandard.compress(b[900:]),
        "xz": lzma.compress,
        "bz2": bz2.compress,
    }.get(name.rpartition(".")[2], bytes)
    if name == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": range(len(docs)), "text": docs}), path, row_group_size=7)
    elif name == "dataset":
        import datasets

        datasets.Dataset.from_dict({"id": range(len(docs)), "text": docs}).save_to_disk(path)
    else:
        path.write_bytes(pack(records))
    return path
