"""Tensors as views of one buffer: a safetensors file in memory, or one that is mapped and let go of bit by bit.

Format: safetensors 0.x (8-byte little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH_BYTES = 8
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 1 << 18  # elements looked at in one go: what a check takes in memory does not grow with the tensor


class MappedFile:
    """A file whose bytes are read when they are looked at. `let_go` takes the pages out of the process again.

    Nothing may write to its tensors: `let_go` would undo it without a word. A disk that fails under a mapping ends
    the process, so map only a file that has just been read to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            # private and writable, because torch warns of buffers that are not
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self.buffer)

    def __getitem__(self, part: slice) -> bytes:
        return self.buffer[part]

    def let_go(self) -> None:
        """Take every page out of this process; what is looked at again is read again."""
        self.buffer.madvise(mmap.MADV_DONTNEED)


def let_go_of(files: Mapping[str, bytes | MappedFile]) -> None:
    """Take the pages of every mapped one out of this process."""
    for file in files.values():
        if isinstance(file, MappedFile):
            file.let_go()


def views(buffer: bytearray | mmap.mmap, header: Mapping[str, Any], start: int) -> dict[str, Tensor]:
    """The tensors that `header` lists in `buffer`, whose data begins at `start`; nothing is copied.

    Raises KeyError, TypeError or ValueError where the header does not fit the buffer.
    """
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        count = prod(shape)
        if end - begin != count * dtype.itemsize or min([begin, *shape]) < 0 or start + end > len(buffer):
            raise ValueError(f"tensor {name[:40]!a}: its offsets do not fit")
        if count == 0:
            found[name] = torch.empty(shape, dtype=dtype)
        else:
            flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin)
            found[name] = flat.view(shape)
    return found


def views_of_file(data: bytes | bytearray) -> dict[str, Tensor]:
    """The tensors of a whole file in memory, which they share. Raises as `views`.

    Bytes that can't be written to are copied first.
    """
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    length = int.from_bytes(buffer[:LENGTH_BYTES], "little")
    header = json.loads(bytes(buffer[LENGTH_BYTES : LENGTH_BYTES + length]))
    return views(buffer, header, LENGTH_BYTES + length)


def file_head(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """What stands before the data in a file of `tensors`, and the order in which their data follows.

    The same bytes as the safetensors library writes: wider dtypes first, then by name; the header padded to 8.
    """
    order = sorted(tensors, key=lambda name: (-_rank(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order


def _rank(dtype: torch.dtype) -> int:
    """Place of a dtype in the library's own order, in which data is laid out from the highest down."""
    return ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64").index(_NAMES[dtype])


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` flat, in pieces of bounded size."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE].contiguous()


def bytes_of(piece: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied where it is on the CPU."""
    # a single element counts as contiguous whatever its stride says
    data: Any = piece.cpu().as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy()
    return memoryview(data)


def num_non_finite(tensor: Tensor) -> int:
    """How many values of `tensor` are NaN or infinite, counted in bounded memory."""
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces(tensor))
