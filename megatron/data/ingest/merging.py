"""Joining datasets, with their sidecars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron.data.ingest.stamps import stamp
from megatron.data.reader import TokenReader
from megatron.data.sidecar import Sidecar, write_sidecar
from megatron.data.writer import merge
from megatron.errors import DataError

LABEL_SUFFIX = "label_document"


def find_prefixes(folder: str, *, labels: bool = False) -> list[str]:
    """Return the prefixes of all datasets directly in a folder, sorted by name.

    Args:
        folder: to look into.
        labels: take the datasets of labels (``…label_document``) instead of the others; both in
            one order, so that merged labels fit merged tokens.

    Raises:
        DataError: no such folder, none in it, or a file lacks its partner.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"--input {folder}: no such folder")
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    stems = {name[:-4] for name in names if name.endswith((".bin", ".idx"))}
    if not stems:
        raise DataError(f"--input {folder}: no .bin/.idx pair in it")
    for stem in sorted(stems):
        for suffix in (".bin", ".idx"):
            if stem + suffix not in names:
                raise DataError(f"{path / stem}{suffix}: missing beside its partner")
    kept = [stem for stem in sorted(stems) if stem.endswith(LABEL_SUFFIX) == labels]
    if not kept:
        what = "labels (…label_document)" if labels else "tokens; --labels joins the labels in it"
        raise DataError(f"--input {folder}: no dataset of {what}")
    return [str(path / stem) for stem in sorted(kept, key=_order)]


def _order(stem: str) -> str:
    """Return what datasets of tokens and their labels are sorted alike by."""
    if not stem.endswith(LABEL_SUFFIX):
        return stem.removesuffix("_text_document").removesuffix("_document")
    return stem.removesuffix(LABEL_SUFFIX).rstrip("_")


def merge_datasets(prefixes: Sequence[str], output: str, *, overwrite: bool = False) -> list[str]:
    """Join datasets in the order given into one, and their sidecars if all have one.

    Args:
        prefixes: the inputs.
        output: prefix to write.
        overwrite: replace what ``output`` holds.

    Returns:
        Notes for the user.

    Raises:
        DataError: an input is unsound, the token types or tokenizers differ, or the output
            exists.
        RunError: the disk is full.
    """
    if not overwrite and os.path.exists(output + ".idx"):
        raise DataError(f"{output}.idx exists; give --overwrite to replace it")
    sidecars: list[tuple[str, Sidecar | None]] = []
    dtype: tuple[str, str] | None = None
    for prefix in prefixes:
        with TokenReader(prefix) as reader:
            if dtype is not None and reader.dtype.name != dtype[1]:
                raise DataError(
                    f"{prefix}: tokens are {reader.dtype.name}, {dtype[0]} holds {dtype[1]}; "
                    "datasets are merged only if tokenised alike"
                )
            dtype = dtype or (prefix, reader.dtype.name)
            sidecars.append((prefix, reader.sidecar))
    known = [(prefix, sidecar) for prefix, sidecar in sidecars if sidecar is not None]
    _check_alike(known)
    merge(prefixes, output)
    if len(known) < len(sidecars):
        lacking = next(prefix for prefix, sidecar in sidecars if sidecar is None)
        return [f"no sidecar written, because {lacking} has none"]
    return _write_merged(output, [sidecar for _, sidecar in known])


def _check_alike(known: Sequence[tuple[str, Sidecar]]) -> None:
    for prefix, sidecar in known[1:]:
        first_prefix, first = known[0]
        if dict(sidecar.tokenizer) != dict(first.tokenizer):
            raise DataError(
                f"{first_prefix} and {prefix} were tokenised by different tokenizers "
                f"({first.tokenizer.get('type')} {str(first.tokenizer.get('sha256'))[:12]}…, "
                f"{sidecar.tokenizer.get('type')} {str(sidecar.tokenizer.get('sha256'))[:12]}…); "
                "preprocess both with one"
            )


def _write_merged(output: str, parts: Sequence[Sidecar]) -> list[str]:
    notes = []
    if len({part.append_eod for part in parts}) > 1:
        notes.append("some inputs were written with --append-eod and some without")
    write_sidecar(
        output,
        Sidecar(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            bytes=sum(part.bytes for part in parts),
            dtype=parts[0].dtype,
            vocab_size=parts[0].vocab_size,
            append_eod=all(part.append_eod for part in parts),
            eod_id=parts[0].eod_id,
            tokenizer=parts[0].tokenizer,
            bin=stamp(output + ".bin"),
            idx=stamp(output + ".idx"),
        ),
    )
    return notes
