"""``tools/inspect_checkpoints.py``: what a checkpoint's files hold, and where two differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.files import walk_files
from megatron.checkpoint.vet import UNIVERSAL_GLOBALS, vet_file
from megatron.errors import CheckpointError
from megatron.exchange.neox_files import NEOX_GLOBALS
from megatron.exchange.weights import load_file

_PICKLED = (".pt", ".bin", ".pth")


def read_folder(folder: Path) -> dict[str, Any]:
    """Return what a folder's files hold, by their names; tensors stay on the disk.

    Files of ``torch.save`` are vetted before they are read.

    Raises:
        CheckpointError: there are none, or one is damaged or holds more than a checkpoint's types.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a checkpoint's")
    found: dict[str, Any] = {}
    for name, _ in walk_files(folder):
        path = folder / name
        if path.suffix in _PICKLED:
            vet_file(path, allowed=NEOX_GLOBALS | UNIVERSAL_GLOBALS)
            found[name] = load_file(path, vetted=True)
        elif path.suffix == ".safetensors":
            found[name] = _safetensors(path)
        elif path.suffix == ".json":
            found[name] = _json(path)
    if not found:
        raise CheckpointError(
            f"{folder} holds no files of a checkpoint (*.pt, *.bin, *.safetensors, *.json)"
        )
    return found


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no folder, mapping or list, by its path with ``/``."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{place}/{key}" if place else str(key))
    elif isinstance(value, list | tuple) and any(torch.is_tensor(one) for one in value):
        for index, one in enumerate(value):
            yield from leaves(one, f"{place}/{index}")
    else:
        yield place, value


def describe_value(value: Any, width: int = 80) -> str:
    """Return a line about a value: of a tensor its form and range, of others what they are."""
    if not torch.is_tensor(value):
        text = " ".join(repr(value).split())
        return text if len(text) <= width else text[: width - 1] + "…"
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.numel() == 0 or value.dtype == torch.bool:
        return kind
    wide = value.double()
    spread = f", std {wide.std().item():.4g}" if value.numel() > 1 else ""
    return f"{kind} mean {wide.mean().item():.4g}{spread}, min {wide.min().item():.4g}, max " + (
        f"{wide.max().item():.4g}"
    )


def select(content: dict[str, Any], attributes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves under each of the given paths; all of them where none is given.

    A path is a file's name and keys in it with ``/``, or a part of a longer one; a dot in a
    parameter's name divides like ``/``.

    Raises:
        CheckpointError: nothing lies under a path.
    """
    every = dict(leaves(content))
    if not attributes:
        yield from every.items()
        return
    for wanted in attributes:
        path = _parts(wanted.strip("/"))
        matches = {name: value for name, value in every.items() if path in _parts(name)}
        if not matches:
            raise CheckpointError(f"nothing is called {wanted}; leave --attributes out to see all")
        yield from matches.items()


def _parts(path: str) -> str:
    return f"/{path.replace('.', '/')}/"


def differences(
    one: dict[str, Any], other: dict[str, Any], attributes: Sequence[str], *, values: bool
) -> Iterator[str]:
    """Yield a line for every leaf in which two checkpoints differ.

    Args:
        one: of :func:`read_folder`.
        other: likewise.
        attributes: see :func:`select`.
        values: compare values; otherwise only names, types and shapes.
    """
    first, second = dict(select(one, attributes)), dict(select(other, attributes))
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in second:
            yield f"- {name}: {describe_value(first[name])}"
        elif name not in first:
            yield f"+ {name}: {describe_value(second[name])}"
        elif (told := _difference(first[name], second[name], values=values)) is not None:
            yield f"! {name}: {told}"


def _difference(one: Any, other: Any, *, values: bool) -> str | None:
    if torch.is_tensor(one) and torch.is_tensor(other):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"{_form(one)} and {_form(other)}"
        if not values or torch.equal(one, other):
            return None
        gap = (one.double() - other.double()).abs()
        return (
            f"differ in {int((gap != 0).sum())} of {gap.numel()}, by {gap.max().item():.3g} at most"
        )
    if type(one) is not type(other):
        return f"{describe_value(one)} and {describe_value(other)}"
    if not values or str(one) == str(other):
        return None
    return f"{describe_value(one)} and {describe_value(other)}"


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
