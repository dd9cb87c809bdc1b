"""Spoilt uploads by the million: nothing may crash, nothing invalid be accepted, memory stays bounded.

    python -m tests.hostile [--cases 1000000] [--seed N] [--processes N]
    python -m tests.hostile --beside-requests          the dearest uploads, and how long others wait (`beside.py`)

A case is a valid upload with one mutation (`mutations.py`). What must be refused is known for half of the
mutations. For the others an oracle of its own, which parses with `json` and NumPy alone, looks at what was accepted:
the tensors are those of the original by name and shape, finite, and they and the scale are what the delta computes
with. A case passes if the reader accepts or refuses with an error of ours; every other exception is a crash.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidDelta, PayloadTooLarge
from adapters.formats import read_upload
from adapters.normal_form import Delta, LowRank
from tests.hostile import beside
from tests.hostile.mutations import ANY, INVALID, Files, split
from tests.hostile.seeds import Seed, seeds
from tests.unit.serving.http_support import SPEC

MAX_GROWTH_BYTES = 256 << 20
NUMPY = {"F32": np.float32, "F16": np.float16}


class Broken(AssertionError):
    """A promise does not hold; the text says which, and how to repeat the case."""


@dataclass
class Tally:
    """What became of the cases."""

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    growth_bytes: int = 0
    slowest_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Add another process's."""
        self.refused += other.refused
        self.accepted += other.accepted
        self.growth_bytes = max(self.growth_bytes, other.growth_bytes)
        self.slowest_s = max(self.slowest_s, other.slowest_s)


def run(first: int, cases: int, seed: int) -> Tally:
    """Cases `first` to `first + cases`, each from a generator of its own. Raises Broken."""
    tally, originals = Tally(), seeds()
    names = [*INVALID, *ANY]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + cases):
        chooser = random.Random(f"{seed}:{number}")
        original, name = chooser.choice(originals), chooser.choice(names)
        files = {**INVALID, **ANY}[name](original, chooser)
        began = time.perf_counter()
        case = f"case {number} of seed {seed}: {original.name}, {name}"
        try:
            delta = read_upload(files, SPEC)
        except (InvalidDelta, PayloadTooLarge) as error:
            if not (str(error).isascii() and str(error).isprintable()):
                raise Broken(f"{case}: the message holds what the upload sent: {error!r}") from error
            tally.refused[name] += 1
        except Exception as error:
            raise Broken(f"{case}: crashed with {type(error).__name__}: {error}") from error
        else:
            if name in INVALID:
                raise Broken(f"{case}: accepted")
            try:
                check_accepted(original, files, delta)
            except Exception as error:
                raise Broken(f"{case}: accepted, but {type(error).__name__}: {error}") from error
            tally.accepted[name] += 1
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
    tally.growth_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if tally.growth_bytes > MAX_GROWTH_BYTES:
        raise Broken(
            f"memory grew by {tally.growth_bytes >> 20} MiB, at most {MAX_GROWTH_BYTES >> 20} are allowed"
        )
    return tally


def check_accepted(original: Seed, files: Files, delta: Delta) -> None:
    """Raises AssertionError where an accepted upload is not a valid one by the oracle's own reading."""
    assert set(files) == set(original.files), "a file more or less"
    header, data = split(files[original.tensors])
    expected, _ = split(original.files[original.tensors])
    header.pop("__metadata__", None)
    expected.pop("__metadata__", None)
    assert header.keys() == expected.keys(), "other tensors"
    arrays: dict[str, np.ndarray] = {}
    covered = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        assert start == covered, "a hole or an overlap"
        covered = end
        arrays[name] = np.frombuffer(data[start:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        assert entry["shape"] == expected[name]["shape"], "another shape"
        assert np.isfinite(arrays[name].astype(np.float64)).all(), "not finite"
    assert covered == len(data), "bytes after the last tensor"
    again = to_canonical(delta)
    assert to_canonical(from_canonical(again.manifest, again.tensors)).digest == again.digest, "no round trip"
    if original.name == "lora":
        _check_lora(json.loads(files[original.config]), arrays, delta)


def _check_lora(config: dict[str, object], arrays: dict[str, np.ndarray], delta: Delta) -> None:
    """Each op computes with the file's own matrices and the config's own scale: alpha / r, or alpha / sqrt(r)."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    ops = [op for op in delta.ops if isinstance(op, LowRank)]
    found = sorted(float((op.scaling * op.B.double() @ op.A.double()).abs().sum()) for op in ops)
    modules = {name.rpartition(".lora_")[0] for name in arrays}
    matrices = [
        arrays[f"{module}.lora_B.weight"].astype(np.float64) @ arrays[f"{module}.lora_A.weight"]
        for module in modules
    ]
    expected = sorted(float(np.abs(scale * matrix).sum()) for matrix in matrices)
    assert len(found) == len(delta.ops) == len(expected), "another number of ops"
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--beside-requests", action="store_true")
    given = parser.parse_args(arguments)
    if given.beside_requests:
        return beside.main()
    began, tally = time.monotonic(), Tally()
    share = -(-given.cases // given.processes)
    starts = range(0, given.cases, share)
    sizes = [min(share, given.cases - start) for start in starts]
    if given.processes == 1:
        tally = run(0, given.cases, given.seed)
    else:
        with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
            for part in pool.map(run, starts, sizes, [given.seed] * len(sizes)):
                tally.add(part)
    print("refused  accepted  mutation")
    for name in [*INVALID, *ANY]:
        print(f"{tally.refused[name]:7d}  {tally.accepted[name]:8d}  {name}")
    print(
        f"{given.cases} cases in {time.monotonic() - began:.0f} s: 0 crashes, 0 accepted invalid; memory grew by "
        f"{tally.growth_bytes / 2**20:.0f} MiB, slowest case {tally.slowest_s * 1000:.0f} ms"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
