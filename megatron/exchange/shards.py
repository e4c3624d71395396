"""Safetensors in shards: written one at a time, read one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.vet import vet_file
from megatron.errors import CheckpointError, ConfigError
from megatron.exchange.pieces import Piece
from megatron.exchange.weights import Weights, load_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_BIN_NAME, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size as transformers writes it: ``5GB``, ``200MiB``, ``1000``.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it as 5GB, 200MB or a number of bytes")
    size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size < 1:
        raise ConfigError(f"a shard of {text!r} holds nothing; write a size as 5GB or 200MB")
    return size


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of weights.

    Attributes:
        pieces: what it holds.
        size: bytes of its tensors.
    """

    pieces: tuple[Piece, ...]
    size: int


def plan_shards(
    pieces: Sequence[Piece],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    max_size: int,
) -> list[Shard]:
    """Deal pieces out to files of at most ``max_size`` bytes (more only for one large piece).

    Args:
        pieces: in order.
        shapes: of our parameters, without padding.
        dtype: in which they are written.
        max_size: bytes.
    """
    shards: list[Shard] = []
    for piece in pieces:
        shape = piece.shape if piece.ours is None else shapes[piece.ours]
        parts = piece.split(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        size = sum(part.numel() for part in parts) * dtype.itemsize
        if shards and shards[-1].size + size <= max_size:
            last = shards.pop()
            shards.append(Shard(pieces=(*last.pieces, piece), size=last.size + size))
        else:
            shards.append(Shard(pieces=(piece,), size=size))
    return shards


def write_shards(
    folder: Path, shards: Sequence[Shard], weights: Weights, dtype: torch.dtype
) -> None:
    """Write a model's weights; one shard is in memory at a time.

    Args:
        folder: where.
        shards: of :func:`plan_shards`.
        weights: the model's.
        dtype: in which they are written.

    Raises:
        CheckpointError: a weight is not finite, or is too large for the format.
    """
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for piece in shard.pieces:
            tensors |= dict(_theirs(piece, weights, dtype))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = {"total_size": sum(shard.size for shard in shards)}
        index = {"metadata": total, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _theirs(
    piece: Piece, weights: Weights, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    if piece.ours is None:
        yield piece.theirs[0], torch.zeros(piece.shape, dtype=dtype)
        return
    tensor = weights.read(piece.ours)
    written = tensor.to(dtype)
    if not written.isfinite().all():
        reason = "is not finite" if not tensor.isfinite().all() else f"does not fit {dtype}"
        raise CheckpointError(
            f"parameter {piece.ours} {reason}; "
            + ("the checkpoint is of no use" if "not finite" in reason else "use --precision bf16")
        )
    for name, part in zip(piece.theirs, piece.split(written), strict=True):
        # A file of its own memory: parts of a mapped file, and views, are copied.
        yield name, part.clone(memory_format=torch.contiguous_format)


class FolderTensors:
    """The tensors of a Hugging Face folder: safetensors, or vetted files of ``torch.save``."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds what.

        Raises:
            CheckpointError: there are no weights, a file is missing, damaged, or holds more
                than tensors.
        """
        self._folder = folder
        self._safe = (folder / WEIGHTS_NAME).exists() or (folder / INDEX_NAME).exists()
        self._held: tuple[str, Any] | None = None
        whole, index = (WEIGHTS_NAME, INDEX_NAME) if self._safe else (_BIN_NAME, _BIN_INDEX)
        self._where: dict[str, str] = {}
        if (folder / index).exists():
            self._where = self._read_index(folder / index)
        elif (folder / whole).exists():
            self._where = dict.fromkeys(self._names(whole), whole)
        else:
            raise CheckpointError(
                f"{folder} holds no weights: none of {WEIGHTS_NAME}, {INDEX_NAME}, {_BIN_NAME} "
                f"and {_BIN_INDEX} is there"
            )
        if missing := sorted({f for f in self._where.values() if not (folder / f).is_file()}):
            raise CheckpointError(f"{folder}: shards are missing: {', '.join(missing)}")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU.

        Raises:
            CheckpointError: it is not there, or its file is damaged.
        """
        if name not in self._where:
            raise CheckpointError(f"{self._folder} holds no tensor {name}")
        file = self._open(self._where[name])
        try:
            tensor: torch.Tensor = file.get_tensor(name) if self._safe else file[name]
        except Exception as error:  # the library's own kinds, where a shard lacks what is promised
            raise CheckpointError(f"{self._folder / self._where[name]}: {error}") from error
        return tensor

    def _names(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def _open(self, file: str) -> Any:
        if self._held is None or self._held[0] != file:
            path = self._folder / file
            if self._safe:
                from safetensors import safe_open

                try:
                    self._held = (file, safe_open(path, framework="pt", device="cpu"))
                except Exception as error:
                    raise CheckpointError(f"cannot read {path}: {error}") from error
            else:
                vet_file(path, allowed=())
                self._held = (file, load_file(path))
        return self._held[1]

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        for file in found.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path} names {file!r}, which is no file beside it")
        return found


class FolderWeights:
    """A Hugging Face folder's weights as those of a model of ours."""

    def __init__(
        self, tensors: FolderTensors, pieces: Sequence[Piece], shapes: Mapping[str, Sequence[int]]
    ) -> None:
        """Check that the folder holds just these parameters.

        Args:
            tensors: the folder's.
            pieces: which is which.
            shapes: of our parameters, without padding.

        Raises:
            CheckpointError: tensors are missing, or there are some that no parameter takes.
        """
        self._tensors = tensors
        self._pieces = {piece.ours: piece for piece in pieces if piece.ours is not None}
        self._shapes = shapes
        self._names = _spelling(tensors.names, pieces)
        for piece in pieces:
            if piece.ours is None and self._theirs(piece.theirs[0]).any():
                raise CheckpointError(
                    f"{piece.theirs[0]} is not zero any more, and the model that was exported has "
                    "no such bias; remove neomix.json from the folder to read it as it is"
                )

    def read(self, name: str) -> torch.Tensor:
        """See :class:`~megatron.exchange.weights.Weights`."""
        piece = self._pieces[name]
        parts = [self._theirs(one) for one in piece.theirs]
        wanted = tuple(self._shapes[name])
        try:
            tensor = piece.join(parts)
        except RuntimeError:
            tensor = None
        if tensor is None or tensor.shape != wanted:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise CheckpointError(
                f"{', '.join(piece.theirs)}: shape {shapes} does not make up {wanted}; config.json "
                "is of another model"
            )
        return tensor

    def _theirs(self, name: str) -> torch.Tensor:
        return self._tensors.read(self._names[name])


_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$")


def _spelling(held: Sequence[str], pieces: Sequence[Piece]) -> dict[str, str]:
    """Return how a folder spells each wanted name (transformers 5 knows two for the output)."""
    there, names = set(held), {}
    wanted = [name for piece in pieces for name in piece.theirs]
    for name in wanted:
        other = name.replace("embed_out.", "lm_head.")
        names[name] = name if name in there else other
    missing = [name for name, spelt in names.items() if spelt not in there]
    # A tied output may be written once more; what is no parameter at all is left out.
    left = there - set(names.values()) - {"embed_out.weight", "lm_head.weight"}
    left = {name for name in left if not _BUFFERS.search(name)}
    if missing or left:
        parts = [
            f"{what}: {', '.join(sorted(some)[:5])}{' …' if len(some) > 5 else ''}"
            for what, some in (("missing", missing), ("unknown", left))
            if some
        ]
        raise CheckpointError(
            f"the folder's tensors are not those of its config.json ({'; '.join(parts)})"
        )
    return names
