"""Reading compressed files block by block, refusing truncated and damaged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron.errors import DataError, MissingExtraError

# Small, because a well-compressed block may grow a thousandfold.
_BLOCK = 1 << 16
# What `zstd --long=31` writes; the library's default refuses it.
_MAX_WINDOW = 1 << 31


def read_blocks(path: str, compression: str) -> Iterator[tuple[bytes, int]]:
    """Yield a file's decompressed content in blocks, each with the file bytes read so far.

    Files of several members or frames, as parallel compressors write, are read whole.

    Raises:
        DataError: the file is truncated or damaged.
    """
    new_decompressor = _decompressor(compression, path)
    with open(path, "rb") as file:
        decompressor: Any = None
        for block in _file_blocks(file):
            while block:
                if decompressor is None:
                    if compression == ".gz" and not block.strip(b"\0"):
                        break  # gzip allows padding by zeros behind the last member
                    decompressor = new_decompressor()
                yield from _decompress(decompressor, block, path, file)
                block = b""
                if decompressor.eof:
                    block, decompressor = decompressor.unused_data, None
        if decompressor is not None:
            raise DataError(f"{path}: truncated: the compressed data ends before its end mark")


def _file_blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _decompress(
    decompressor: Any, block: bytes, path: str, file: IO[bytes]
) -> Iterator[tuple[bytes, int]]:
    try:
        content = decompressor.decompress(block)
    except Exception as error:  # every library has its own class
        raise DataError(
            f"{path}: damaged, or not what its name says: {error} (before byte {file.tell()})"
        ) from None
    if content:
        yield content, file.tell()


def _decompressor(compression: str, path: str) -> Callable[[], Any]:
    if compression == ".gz":
        import zlib

        return lambda: zlib.decompressobj(wbits=31)
    if compression == ".xz":
        import lzma

        return lzma.LZMADecompressor
    if compression == ".bz2":
        import bz2

        return bz2.BZ2Decompressor
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", "train", f"reading {path}") from None
    context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    return context.decompressobj
