"""Long JSON of an upload is parsed in a child process first, under limits on memory, CPU and time.

The texts at stake are the header of a safetensors file and the manifest of a canonical pair. What makes the parser
dear dies in the child, or is refused by what the child has counted: values that no header has need of, like 350,000
empty lists, would hold the interpreter's lock for long enough to delay every stream of the gateway. Up to
`SMALL_BYTES` a text is cheap whatever is in it, and no child is started.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from adapters.errors import PayloadTooLarge, Unavailable
from adapters.formats.canonical_pair import MAX_MANIFEST_BYTES
from adapters.formats.files import MAX_HEADER_BYTES, MAX_TENSORS
from adapters.formats.problems import quoted

SMALL_BYTES = 64 * 1024
"""A LoRA of 40 layers has a header of about this size."""
MEMORY_BYTES = 512 << 20
CPU_S = 5
TIMEOUT_S = 30.0
VALUES_PER_MEMBER = 16
"""A tensor's entry is an object of dtype, shape (at most four numbers) and two offsets: 11 values at most."""
VALUES_BESIDE = 4096
"""For metadata, of which the readers use none."""
MAX_MANIFEST_VALUES = 16 * MAX_TENSORS
"""A manifest is a list of ops, not an entry per tensor; no op has more values than that for each of its tensors."""

MANIFEST = "manifest.json"
_CHILD = Path(__file__).with_name("bounded_child.py")
_REMEDY = "Save the adapter again with save_pretrained."


class Sliced(Protocol):
    """Bytes, or a file that gives them like this."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


def check_bounds(files: Mapping[str, Sliced]) -> None:
    """Raises PayloadTooLarge where an upload's JSON is dearer to parse than any adapter's; Unavailable without a child.

    `files`: file name -> content. Starts an interpreter where there is a text to parse (0.1 s on busy
    cores): call it off the event loop.
    """
    texts = {name: text for name, data in files.items() if (text := _long_json(name, data))}
    if not texts:
        return
    sent = b"".join(len(text).to_bytes(8, "little") + text for text in texts.values())
    try:
        done = subprocess.run(  # noqa: S603 - our own file under this interpreter; the upload is its input only
            [sys.executable, "-I", "-S", str(_CHILD), str(MEMORY_BYTES), str(CPU_S)],
            input=sent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise Unavailable("The upload's headers can't be checked now.", remedy="Send it again.") from None
    names = ", ".join(quoted(name) for name in texts)
    if done.returncode != 0:
        raise PayloadTooLarge(
            f"{names}: can't be parsed within {CPU_S} s and {MEMORY_BYTES >> 20} MiB.",
            param="file",
            remedy=_REMEDY,
        )
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for name, (members, values) in zip(texts, counts, strict=True):
        most = VALUES_PER_MEMBER * members + VALUES_BESIDE if _is_tensors(name) else MAX_MANIFEST_VALUES
        if values > most:
            raise PayloadTooLarge(
                f"{quoted(name)}: {values} JSON values in {members} entries, at most {most} are read.",
                param=name,
                remedy=_REMEDY,
            )


def _is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _long_json(name: str, data: Sliced) -> bytes | None:
    """The JSON of a file, where it is so long that it is parsed in a child, and not so long that it never is."""
    if _is_tensors(name):
        begin, length, most = 8, int.from_bytes(data[:8], "little"), MAX_HEADER_BYTES
    elif name == MANIFEST:
        begin, length, most = 0, len(data), MAX_MANIFEST_BYTES
    else:
        return None
    return data[begin : begin + length] if SMALL_BYTES < length <= min(most, len(data) - begin) else None
