"""The fidelity matrix: method x family x {alone, mixed, shuffled} x {prefill, decode, chunked} x {fp32, bf16}.

    python -m tests.fidelity --report [--json FILE] [--family NAME ...] [--method SUBSTRING ...] [--dtype fp32 bf16]

A cell is the largest error of its rows over the limit (1.0 is the tolerance; `contract/exactness.py`), or the reason
why it can't exist in PEFT's words or our reader's. Methods without a reader go through the probe of `deltamux convert`.
All methods of a family share one batch, bare rows among them, in the order of the table and shuffled. Exit status 1
where a cell is outside its tolerance, or failed otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from adapters.errors import InvalidDelta
from serving.engine.runner import Runner
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.programs import PlacedDelta
from tests.cases import Case
from tests.contract.bottleneck import Bottleneck
from tests.contract.exactness import (
    BARE,
    BOTTLENECKS,
    EFFECT,
    PROMPTS,
    RMS_RATIO,
    UNROUNDED,
    Expected,
    Method,
    bare_outputs,
    base_model,
    bottleneck_logits,
    converted,
    expected,
    peft_outputs,
    rms,
    rows_for,
    served,
    shuffled,
    worst,
)
from tests.contract.forced import Row, run
from tests.families import ENCODERS, FAMILIES, SEQ2SEQ, AnyFamily
from tests.method_table import METHODS

Status = Literal["inside", "outside", "impossible", "failed"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = ("alone", "mixed", "shuffled")
PHASES = ("prefill", "decode", "chunked")
COLUMNS = tuple((batch, phase) for batch in BATCHES for phase in PHASES)
ALL_FAMILIES: tuple[AnyFamily, ...] = (*FAMILIES, *ENCODERS, *SEQ2SEQ)
CHUNKS = {"whole": 1 << 30, "chunked": 4}
BF16_EXPERTS = "rounded, a mixture of experts is not one function: a token near a tie goes to another expert"


@dataclass(frozen=True)
class Cell:
    """One measurement. `relative`: error over limit; `reason` where there is none."""

    family: str
    dtype: str
    method: str
    batch: str
    phase: str
    status: Status
    relative: float | None = None
    reason: str = ""


class Blocked(Exception):
    """A method that has no numbers on a family: PEFT or a reader refuses it, or something failed."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def first_line(error: Exception) -> str:
    """The error's class and the first line of its message that is not empty."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].strip()}"


def columns_of(family: AnyFamily) -> tuple[tuple[str, str], ...]:
    """(batch, phase) of a family's cells: an encoder sees rows whole."""
    return tuple((b, p) for b, p in COLUMNS if p == PHASES[0] or family not in ENCODERS)


def candidates(family: AnyFamily, wanted: Sequence[str]) -> list[Case | Bottleneck]:
    """All methods whose names contain one of `wanted`; all of them if it is empty."""
    bottlenecks = BOTTLENECKS if family in FAMILIES else ()  # their formula is that of decoders
    found: list[Case | Bottleneck] = [*(row.case(family) for row in METHODS), *bottlenecks]
    return [c for c in found if not wanted or any(part in c.name for part in wanted)]


def prepare(
    source: Case | Bottleneck,
    family: AnyFamily,
    dtype: torch.dtype,
    backbone: Backbone,
    directory: Path,
) -> Method:
    """Trained, saved, read and placed. Raises Blocked where PEFT or our reader refuses."""
    if isinstance(source, Bottleneck):
        source.save(directory, family, backbone.model)
        tolerance, reference = "T1", partial(bottleneck_logits, source, directory, family, dtype)
    else:
        tolerance, reference = source.tolerance, partial(peft_outputs, source, directory, dtype)
        try:
            source.save(directory, base_model(family, dtype).float())
        except Exception as error:
            raise Blocked("impossible", f"PEFT: {first_line(error)}") from error
    try:
        delta = read_or_convert(directory, family, dtype, backbone)
    except InvalidDelta as error:
        raise Blocked("impossible", f"refused: {error.problems[0]}") from error
    except Exception as error:
        raise Blocked("failed", first_line(error)) from error
    return Method(source.name, tolerance, reference, delta)


def read_or_convert(
    directory: Path, family: AnyFamily, dtype: torch.dtype, backbone: Backbone
) -> PlacedDelta:
    """The delta as an upload, or as `deltamux convert` makes one of it. Raises InvalidDelta with both reasons."""
    try:
        return served(directory, backbone)
    except InvalidDelta as refusal:
        try:
            return converted(directory, family, dtype, backbone)
        except InvalidDelta as error:
            raise InvalidDelta([f"{refusal.problems[0]} Not convertible: {error.problems[0]}"]) from error


def reference_of(method: Method, family: AnyFamily, dtype: torch.dtype, rows: list[Row]) -> Expected:
    """What the rows must be. Raises Blocked where PEFT can't compute it, or the delta changes nothing."""
    prompts = [row.given for row in rows]
    try:
        target = expected(method, dtype, prompts)
    except Exception as error:
        raise Blocked("impossible", f"PEFT can't run it: {first_line(error)}") from error
    if not all(bool(logits.isfinite().all()) for logits in target.logits):
        raise Blocked("failed", "the reference's logits are not finite")
    if method.delta is not None:
        bare = bare_outputs(family, dtype, torch.float32, prompts)
        changed = max(float((r - b).abs().max()) for r, b in zip(target.logits, bare, strict=True))
        if not changed > EFFECT:
            raise Blocked("failed", f"the delta changes no logit by more than {changed:.1e}")
    return target


def relative_errors(rows: list[Row], target: Expected) -> tuple[float, float]:
    """Error over limit of (prefill, decode); in bf16 at least the rms over what it may be."""
    prefill, decode = (error / target.limit for error in worst(rows, target.logits))
    floor = 0.0 if target.own_rms is None else rms(rows, target.logits) / target.own_rms / RMS_RATIO
    return max(prefill, floor), max(decode, floor)


def measured_columns(
    runner: Runner, family: AnyFamily, methods: list[Method], targets: dict[str, Expected]
) -> Iterator[tuple[str, str, str, float]]:
    """(method, batch, phase, relative error) of every method that has a target."""
    for batch in BATCHES:
        for size, chunk in CHUNKS.items():
            if size != "whole" and family in ENCODERS:
                continue
            rows = [mine for mine in rows_for(methods, chunk, family=family) if mine[0].name in targets]
            order = shuffled(rows) if batch == "shuffled" else [row for mine in rows for row in mine]
            for group in [[row] for row in order] if batch == "alone" else [order]:
                run(runner, group)
            for mine in rows:
                prefill, decode = relative_errors(mine, targets[mine[0].name])
                if size == "whole":
                    yield mine[0].name, batch, "prefill", prefill
                    if family not in ENCODERS:
                        yield mine[0].name, batch, "decode", decode
                else:
                    yield mine[0].name, batch, "chunked", max(prefill, decode)


def measure(family: AnyFamily, label: str, wanted: Sequence[str], directory: Path) -> list[Cell]:
    """All cells of one family in one dtype."""
    dtype, sources = DTYPES[label], candidates(family, wanted)
    blocked: dict[str, Blocked] = {}
    relative: list[tuple[str, str, str, float]] = []
    if dtype == torch.bfloat16 and family in UNROUNDED:
        blocked = {name: Blocked("impossible", BF16_EXPERTS) for name in (BARE, *(s.name for s in sources))}
    else:
        served_dtype = str(dtype).removeprefix("torch.")
        backbone = adopt_backbone(base_model(family, dtype), name="tiny", device="cpu", dtype=served_dtype)
        methods = [Method(BARE, "T1", partial(bare_outputs, family, dtype), None)]
        for source in sources:
            try:
                methods.append(prepare(source, family, dtype, backbone, directory / source.name))
            except Blocked as why:
                blocked[source.name] = why
        targets: dict[str, Expected] = {}
        for method, rows in zip(methods, rows_for(methods, family=family), strict=True):
            try:
                targets[method.name] = reference_of(method, family, dtype, rows)
            except Blocked as why:
                blocked[method.name] = why
        runner = Runner(backbone, num_slots=len(methods) * PROMPTS, max_len=64)
        relative = list(measured_columns(runner, family, methods, targets))
    return [
        *(
            Cell(family, label, name, batch, phase, "inside" if value <= 1.0 else "outside", value)
            for name, batch, phase, value in relative
        ),
        *(
            Cell(family, label, name, batch, phase, why.status, None, why.reason)
            for name, why in blocked.items()
            for batch, phase in columns_of(family)
        ),
    ]


def measure_or_fail(task: tuple[AnyFamily, str, tuple[str, ...]]) -> list[Cell]:
    """The cells of one family and dtype; if the engine breaks, all of them failed, and the matrix goes on."""
    family, label, wanted = task
    torch.set_num_threads(1)
    with TemporaryDirectory() as directory:
        try:
            return measure(family, label, wanted, Path(directory))
        except Exception as error:
            names = (BARE, *(source.name for source in candidates(family, wanted)))
            reason = first_line(error)
            return [
                Cell(family, label, n, *column, "failed", None, reason)
                for n in names
                for column in columns_of(family)
            ]


def print_table(cells: list[Cell]) -> None:
    """One family in one dtype: a line per method."""
    print(f"\n{cells[0].family} {cells[0].dtype}: largest error over the limit")
    columns = [column for column in COLUMNS if any((c.batch, c.phase) == column for c in cells)]
    print(f"{'method':26}" + "".join(f"{f'{batch} {phase}':>16}" for batch, phase in columns))
    for name, group in groupby(sorted(cells, key=lambda cell: cell.method), key=lambda cell: cell.method):
        by_column = {(cell.batch, cell.phase): cell for cell in group}
        first = by_column[COLUMNS[0]]
        if first.relative is None:
            print(f"{name:26}{first.status}: {first.reason[:150]}")
        else:
            print(f"{name:26}" + "".join(f"{by_column[column].relative:16.3f}" for column in columns))


def print_summary(cells: list[Cell]) -> None:
    """Counts, the worst cell, the reasons, and what is measured nowhere."""
    count = Counter(cell.status for cell in cells)
    measured = [cell for cell in cells if cell.relative is not None]
    reasons = Counter((cell.status, cell.reason) for cell in cells if cell.reason)
    if reasons:
        print("\ncells without numbers, by reason")
    for (status, reason), number in reasons.most_common():
        print(f"{number:6}  {status}: {reason[:200]}")
    for cell in (cell for cell in cells if cell.status == "outside"):
        print(
            f"outside: {cell.family} {cell.dtype} {cell.method} {cell.batch} {cell.phase}: {cell.relative:.3f}"
        )
    nowhere = {cell.method for cell in cells} - {cell.method for cell in measured}
    print(f"\nmethods measured: {len({cell.method for cell in measured})}; on no family: {sorted(nowhere)}")
    if measured:
        worst_cell = max(measured, key=lambda cell: cell.relative or 0.0)
        where = f"{worst_cell.family} {worst_cell.dtype} {worst_cell.method} {worst_cell.batch} {worst_cell.phase}"
        print(f"worst cell: {worst_cell.relative:.3f} of its limit, {where}")
    print(
        f"cells: {len(cells)}; measured {len(measured)}; inside tolerance {count['inside']}; "
        f"outside {count['outside']}; impossible with reason {count['impossible']}; failed {count['failed']}"
    )


def measure_all(tasks: Sequence[tuple[AnyFamily, str, tuple[str, ...]]], jobs: int) -> Iterable[list[Cell]]:
    """The cells of each task in order, from `jobs` processes."""
    if min(jobs, len(tasks)) == 1:
        yield from map(measure_or_fail, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure_or_fail, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--report", action="store_true", help="print every family's table, not only the summary"
    )
    parser.add_argument("--json", type=Path, help="write every cell here")
    parser.add_argument("--family", nargs="+", choices=ALL_FAMILIES, default=ALL_FAMILIES)
    parser.add_argument("--method", nargs="+", default=[], metavar="SUBSTRING")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    options = parser.parse_args(arguments)
    wanted = tuple(options.method)
    if not candidates(options.family[0], wanted):
        parser.error(f"--method: no method's name contains {' or '.join(wanted)}")
    cells: list[Cell] = []
    for found in measure_all([(f, d, wanted) for d in options.dtype for f in options.family], options.jobs):
        cells += found
        if options.report:
            print_table(found)
            sys.stdout.flush()
    print_summary(cells)
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    return int(any(cell.status in {"outside", "failed"} for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
