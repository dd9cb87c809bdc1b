"""What the Triton kernels promise beyond the kernel contract: reserved batches, fixed grids, no trace of neighbours.

Runs on a CUDA device with `-m gpu`, and under Triton's interpreter in the process that `test_triton_interpreted.py`
starts. Only the former shows that a CUDA graph replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.normal_form import Site
from serving.kernels.ops import FusedSegment, LowRankSegment, LowRankWeights, PlacedModule
from serving.kernels.reference import ReferenceKernels
from tests.contract.executors import FUSED, INTERPRETED, ON_GPU, moved
from tests.contract.test_fused_rows import affine, low_rank, rotation

EXECUTOR = FUSED["triton interpreted" if INTERPRETED else "triton"]
DEVICE = EXECUTOR.device
pytestmark = [] if INTERPRETED else [*ON_GPU]

D_IN, D_OUT, TOKENS, MODULES = 24, 40, 32, 2
SPLIT_WIDTH = 512
FAR = Site("attn.x", 0)
MIXES = {
    "lora": lambda rank: PlacedModule(parallel=[low_rank(rank, D_IN, stop=D_OUT)]),
    "dora": lambda rank: PlacedModule(parallel=[low_rank(rank, D_IN, stop=D_OUT)], outputs=[affine(D_OUT)]),
    "ia3": lambda rank: PlacedModule(outputs=[affine(D_OUT)]),
    "oft": lambda rank: PlacedModule(output_maps=[rotation(D_OUT, 8, shared=False, ordered=True)]),
    "houlsby": lambda rank: PlacedModule(sequential=[low_rank(rank, D_OUT, stop=D_OUT)]),
    "parallel adapter": lambda rank: PlacedModule(remote=[(FAR, low_rank(rank, 16, stop=D_OUT))]),
}


class Delta:
    """A delta that acts on module 1 only, encoded and for the reference."""

    def __init__(self, mix: str, rank: int) -> None:
        self.ops: PlacedModule = moved(MIXES[mix](rank), DEVICE)
        self.encoded: Any = rows().encode({1: self.ops}, {FAR: 0}, MODULES)


def rows() -> Any:
    return EXECUTOR.make(DEVICE)


def deltas(count: int) -> list[Delta]:
    """Of every kind and of different ranks."""
    kinds = sorted(MIXES)
    return [Delta(kinds[i % len(kinds)], (1, 4, 18, 7)[i % 4]) for i in range(count)]


def segments_of(spans: Sequence[tuple[int, int]], chosen: Sequence[Delta]) -> list[FusedSegment]:
    return [FusedSegment(a, b, delta.encoded) for (a, b), delta in zip(spans, chosen, strict=True)]


def expected(
    y: Tensor, x: Tensor, far: Tensor, spans: Sequence[tuple[int, int]], chosen: Sequence[Delta]
) -> Tensor:
    """What `ReferenceKernels` make of it."""
    out, kernels = y.clone(), ReferenceKernels()
    for (start, stop), delta in zip(spans, chosen, strict=True):
        part, ops = out[start:stop], delta.ops
        kernels.add_low_rank(part, x[start:stop], [_whole(part, w) for w in ops.parallel])
        kernels.add_low_rank(part, far[start:stop], [_whole(part, w) for _, w in ops.remote])
        kernels.apply_affine(part, [_whole(part, w) for w in ops.outputs])
        kernels.apply_linear_map(part, [_whole(part, w) for w in ops.output_maps])
        kernels.add_low_rank(part, part, [_whole(part, w) for w in ops.sequential])
    return out


def _whole(part: Tensor, weights: Any) -> Any:
    return 0, len(part), weights


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """y, x, and the input of module 0."""
    return tuple(torch.randn(TOKENS, width).to(DEVICE) for width in (D_OUT, D_IN, 16))  # type: ignore[return-value]


def run(batch: Any, y: Tensor, x: Tensor, far: Tensor) -> Tensor:
    """Through garbage: whatever is read before it is written shows."""
    batch._hidden.fill_(float("nan"))
    out = y.clone()
    batch.capture(0, far)
    batch.run_output(1, out, x)
    return out


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool(torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())))


FEW, FEW_SPANS = 2, [(0, 3), (20, 21)]
MANY_SPANS = [(0, 1), (1, 2), (2, 3), (3, 7), (8, 9), (9, 10), (10, 28), (28, 31)]  # 7 and 31 are bare


def test_reserved_launches_serve_more_deltas_than_they_were_made_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serving.kernels import triton_kernels  # noqa: PLC0415  (optional)

    torch.manual_seed(21)
    chosen = deltas(len(MANY_SPANS))
    batch = rows().reserve([delta.encoded for delta in deltas(2 * len(MIXES))], TOKENS, TOKENS)
    y, x, far = inputs()
    launches: list[tuple[str, Any]] = []
    for name in ("shrink", "expand", "affine", "turn"):
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, Recorder(name, kernel, launches))
    made = []
    for count, spans in ((FEW, FEW_SPANS), (0, []), (len(MANY_SPANS), MANY_SPANS)):
        launches.clear()
        batch.fill(segments_of(spans, chosen[:count]))
        got = run(batch, y, x, far)
        wanted = expected(y, x, far, spans, chosen[:count])
        assert close(got, wanted)
        bare = torch.ones(TOKENS, dtype=torch.bool)
        for a, b in spans:
            assert not torch.equal(got[a:b], y[a:b])
            bare[a:b] = False
        assert torch.equal(got[bare], y[bare])
        made.append(list(launches))
    assert made[0] == made[1] == made[2]  # kernels, grids and addresses
    assert [name for name, _ in made[0]] == ["shrink", "expand", "turn", "turn", "shrink", "expand"]


class Recorder:
    """A kernel that notes its grid, its scalars and the addresses of the batch's own buffers before it starts."""

    def __init__(self, name: str, kernel: Any, launches: list[tuple[str, Any]]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(plan: Tensor, *args: Any, **options: Any) -> None:
            scalars = [arg for arg in args if not isinstance(arg, Tensor)]
            self.launches.append((self.name, (grid, plan.data_ptr(), scalars, options)))
            self.kernel[grid](plan, *args, **options)

        return launch


def test_two_launches_run_the_lora_and_dora_of_any_number_of_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.kernels import triton_kernels  # noqa: PLC0415  (optional)

    torch.manual_seed(22)
    y, x, far = inputs()
    launches: list[tuple[str, Any]] = []
    for name in ("shrink", "expand", "affine", "turn"):
        monkeypatch.setattr(triton_kernels, name, Recorder(name, getattr(triton_kernels, name), launches))
    for count in (1, 16):
        chosen = [Delta(("lora", "dora")[i % 2], (18, 1, 4)[i % 3]) for i in range(count, 2 * count)]
        spans = [(2 * i, 2 * i + 2) for i in range(count)]
        launches.clear()
        batch = rows().bind(segments_of(spans, chosen))
        out = y.clone()
        batch.run_output(1, out, x)
        assert close(out, expected(y, x, far, spans, chosen))
        assert [name for name, _ in launches] == ["shrink", "expand"]


HALF = (
    torch.float16 if INTERPRETED else torch.bfloat16
)  # the interpreter cuts bf16 off instead of rounding it


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_delta_alone_gives_the_bits_that_it_gives_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(23)
    chosen = deltas(len(MANY_SPANS))
    y, x, far = (tensor.to(dtype) for tensor in inputs())
    together = run(rows().bind(segments_of(MANY_SPANS, chosen)), y, x, far)
    for (start, stop), delta in zip(MANY_SPANS, chosen, strict=True):
        batch = rows().bind(segments_of([(start, stop)], [delta]))
        out = y.clone()
        if batch.taps:
            batch.capture(0, far)
        batch.run_output(1, out, x)
        assert torch.equal(out[start:stop], together[start:stop]), delta.ops


def test_wide_inputs_are_summed_in_parts() -> None:
    torch.manual_seed(26)
    wide, count = 3 * SPLIT_WIDTH - 100, 5
    y, x, far = torch.randn(count, D_OUT), torch.randn(count, wide), torch.randn(count, 16)
    ops = PlacedModule(
        parallel=[low_rank(18, wide, stop=D_OUT), low_rank(1, wide, 8, 16)],
        remote=[(FAR, low_rank(4, 16, stop=D_OUT))],  # narrower than one part
    )
    wanted, kernels = y.double(), ReferenceKernels()
    for source, w in [(x, w) for w in ops.parallel] + [(far, w) for _, w in ops.remote]:
        kernels.add_low_rank(wanted, source.double(), [LowRankSegment(1, 4, doubled(w))])
    encoded = rows().encode({1: moved(ops, DEVICE)}, {FAR: 0}, MODULES)
    tensors = [tensor.to(DEVICE) for tensor in (y, x, far)]
    got = run(rows().bind([FusedSegment(1, 4, encoded)]), *tensors)
    assert torch.allclose(got.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    spans = [(0, 1), (1, 4), (4, 5)]
    among = run(rows().bind([FusedSegment(a, b, encoded) for a, b in spans]), *tensors)
    assert torch.equal(among[1:4], got[1:4])


def doubled(w: LowRankWeights) -> LowRankWeights:
    tensors = {n: getattr(w, n).double() for n in ("A", "B", "a_bias", "b_bias")}
    return replace(w, **tensors)


def test_a_batch_that_does_not_fit_is_not_run() -> None:
    torch.manual_seed(24)
    lora, wide, map_ = Delta("lora", 4), Delta("lora", 17), Delta("oft", 4)
    batch = rows().reserve([lora.encoded], max_tokens=20, max_segments=2)
    assert batch.fits(segments_of([(0, 17), (18, 19)], [lora, lora]))
    refused = {
        "chunks": segments_of([(i, i + 1) for i in range(4)], [lora] * 4),
        "tokens": segments_of([(20, 21)], [lora]),
        "rank": segments_of([(0, 1)], [wide]),
        "kind": segments_of([(0, 1)], [map_]),
    }
    for name, segments in refused.items():
        assert not batch.fits(segments), name
        with pytest.raises(AssertionError):
            batch.fill(segments)


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_captured_graph_replays_more_deltas_than_at_capture(dtype: torch.dtype) -> None:
    torch.manual_seed(25)
    chosen = deltas(len(MANY_SPANS))
    batch = rows().reserve([delta.encoded for delta in deltas(2 * len(MIXES))], TOKENS, TOKENS)
    y, x, far = (tensor.to(dtype) for tensor in inputs())
    out = y.clone()

    def step() -> None:
        out.copy_(y)
        moved_far = far + 0  # lies in the graph's own memory, as a module's input does
        batch.capture(0, moved_far)
        batch.run_output(1, out, x)

    batch.fill(segments_of(FEW_SPANS, chosen[:FEW]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles what is captured below
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for count, spans in ((len(MANY_SPANS), MANY_SPANS), (0, []), (FEW, FEW_SPANS)):
        batch.fill(segments_of(spans, chosen[:count]))
        batch._hidden.fill_(float("nan"))
        graph.replay()
        wanted = expected(y.float(), x.float(), far.float(), spans, chosen[:count])
        limit = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert float((out.float() - wanted).abs().max()) <= limit * float(wanted.abs().max())
        if spans == MANY_SPANS:
            eager = rows().bind(segments_of(spans, chosen))
            assert torch.equal(out, run(eager, y, x, far))
