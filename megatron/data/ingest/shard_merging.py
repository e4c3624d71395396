"""Joining what the shards of a preprocessing run have written into what one run writes."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron.data.ingest.journal import (
    Journal,
    KeyProgress,
    journal_path,
    output_lock,
    read_journal,
    settings_difference,
    write_journal,
)
from megatron.data.ingest.merging import merge_datasets
from megatron.data.ingest.settings import dataset_prefix, shard_prefix
from megatron.data.shards import Shard
from megatron.errors import DataError

_SHOWN = 8


def merge_shards(
    output_prefix: str,
    say: Callable[[str], None] = lambda line: None,
    *,
    overwrite: bool = False,
) -> dict[str, str]:
    """Join the shards of ``output_prefix``: to the byte what a run without ``--shard`` writes.

    What was joined already is left alone; an interrupted call may be repeated.

    Args:
        output_prefix: as the shards were given it.
        say: takes lines for the user.
        overwrite: replace what the prefix holds.

    Returns:
        Dataset prefix by key.

    Raises:
        DataError: a shard is missing, unfinished or of other settings; the prefix holds something
            else; or there is no document in any shard.
        RunError: the disk is full, or another run writes the prefix.
    """
    journals = _finished_shards(output_prefix)
    count = len(journals)
    prefixes = [shard_prefix(output_prefix, Shard(index=i, count=count)) for i in range(count)]
    whole = _joined(journals)
    outputs = {key: dataset_prefix(output_prefix, key) for key in whole.keys}
    with output_lock(output_prefix):
        if not overwrite and _is_there(output_prefix, outputs, whole):
            say("already complete: nothing to do (--overwrite joins them again)")
            return outputs
        for key in outputs:
            if not whole.keys[key].documents:
                raise DataError(
                    f"{output_prefix}: none of the {count} shards has a document for the key "
                    f"'{key}'; give an input that holds text"
                )
        journal_path(output_prefix).unlink(missing_ok=True)
        for key, output in outputs.items():
            parts = [dataset_prefix(prefix, key) for prefix in prefixes]
            for note in merge_datasets(parts, output, overwrite=True):
                say(f"note: {note}")
            found = whole.keys[key]
            say(f"{output}.bin: {found.documents:,} documents, {found.tokens:,} tokens")
        write_journal(output_prefix, whole)
    return outputs


def _finished_shards(output_prefix: str) -> list[Journal]:
    """Return the journals of all shards, in order."""
    pattern = re.compile(re.escape(os.path.basename(output_prefix)) + r"-(\d{5,})-of-(\d{5,})")
    found: dict[int, set[int]] = {}
    for path in glob.glob(f"{glob.escape(output_prefix)}-*-of-*.preprocess.json"):
        match = pattern.fullmatch(os.path.basename(path).removesuffix(".preprocess.json"))
        if match:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        raise DataError(f"--shards {output_prefix}: none; run preprocess_data.py --shard I/N first")
    if len(found) > 1:
        raise DataError(
            f"--shards {output_prefix}: shards of {', '.join(map(str, sorted(found)))} lie beside "
            "each other; delete those of the other number"
        )
    ((count, indices),) = found.items()
    missing = [index for index in range(count) if index not in indices]
    journals = []
    for index in sorted(indices):
        journal = read_journal(shard_prefix(output_prefix, Shard(index=index, count=count)))
        assert journal is not None
        if journal.state != "done":
            missing.append(index)
        journals.append(journal)
    if missing:
        shown = ", ".join(f"{index}/{count}" for index in sorted(missing)[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"--shards {output_prefix}: not finished: {shown}{more}; run preprocess_data.py "
            "--shard for them, which goes on where it stopped"
        )
    return journals


def _joined(journals: Sequence[Journal]) -> Journal:
    """Return the journal that one run of everything leaves."""
    first = journals[0]
    for number, journal in enumerate(journals):
        same = {**journal.settings, "shard": first.settings["shard"]}
        difference = settings_difference(first.settings, same)
        if difference is not None:
            count = len(journals)
            raise DataError(
                f"shard {number}/{count} was made otherwise than 0/{count} ({difference}); make it "
                "again with --overwrite"
            )
    last = next((one for one in reversed(journals) if one.position), journals[-1])
    whole = replace(
        last,
        settings={**first.settings, "shard": None},
        fast=all(journal.fast for journal in journals),
        bad=sum(journal.bad for journal in journals),
        seconds=sum(journal.seconds for journal in journals),
        keys={},
    )
    for key in first.keys:
        parts = [journal.keys[key] for journal in journals]
        whole.keys[key] = KeyProgress(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            text_bytes=sum(part.text_bytes for part in parts),
            empty=sum(part.empty for part in parts),
        )
    return whole


def _is_there(output_prefix: str, outputs: dict[str, str], whole: Journal) -> bool:
    """Tell whether the prefix holds the result already.

    Raises:
        DataError: it holds something else.
    """
    journal = read_journal(output_prefix)
    existing = [path for path in outputs.values() if os.path.exists(path + ".idx")]
    if journal is None or journal.state != "done":
        own = journal is None and all(Path(f"{path}.meta.json").exists() for path in existing)
        if existing and not own:
            raise DataError(f"{existing[0]}.idx exists; give --overwrite to replace it")
        return False
    difference = settings_difference(whole.settings, journal.settings)
    if difference is not None:
        raise DataError(
            f"{output_prefix}: holds a run with other settings ({difference}); give --overwrite to "
            "replace it"
        )
    return len(existing) == len(outputs)
