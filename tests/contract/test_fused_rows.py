"""The fused kernels against the general ones: a module with every row-wise op, each dtype, one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adapters.normal_form import Site
from serving.kernels.cpu import CpuRows
from serving.kernels.ops import AffineWeights, Kernels, LinearMapWeights, LowRankWeights, PlacedModule
from serving.kernels.reference import ReferenceKernels
from serving.model.context import ForwardContext
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs
from tests.contract.executors import FUSED_WITH_DTYPE, FusedExecutor, moved

D_IN, D_OUT, TOKENS = 96, 160, 56
TAP = Site("attn.x", 0)
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def low_rank(rank: int, d_in: int, start: int = 0, stop: int = D_OUT) -> LowRankWeights:
    columns = stop - start
    return LowRankWeights(
        A=torch.randn(rank, d_in) / d_in**0.5, B=torch.randn(rank, columns), scaling=0.7, activation="gelu_new",
        a_bias=torch.randn(rank), b_bias=torch.randn(columns), start=start, stop=stop,
    )  # fmt: skip


def affine(columns: int) -> AffineWeights:
    return AffineWeights(torch.randn(columns), torch.randn(columns), 0, columns)


def rotation(columns: int, block: int, *, shared: bool, ordered: bool) -> LinearMapWeights:
    blocks = torch.randn(2, 1 if shared else columns // block, block, block) / block**0.5
    order = torch.stack([torch.randperm(columns) for _ in range(2)]) if ordered else None
    return LinearMapWeights(blocks.expand(2, columns // block, block, block), order, 0, columns)


def everything(rank: int) -> PlacedModule:
    return PlacedModule(
        inputs=[affine(D_IN)],
        input_maps=[rotation(D_IN, 8, shared=True, ordered=False), rotation(D_IN, 12, shared=False, ordered=True)],
        reflections=[low_rank(2, D_IN, stop=D_IN)],
        parallel=[low_rank(rank, D_IN), low_rank(3, D_IN, 32, 96)],
        remote=[(TAP, low_rank(rank, 40))],
        outputs=[affine(D_OUT)],
        output_maps=[rotation(D_OUT, 16, shared=False, ordered=True)],
        sequential=[low_rank(rank, D_OUT)],
    )  # fmt: skip


def placed(rank: int, kernels: Kernels, device: torch.device = CPU) -> PlacedDelta:
    modules = {1: moved(everything(rank), device)}
    assert kernels.fused is not None
    return PlacedDelta(
        digest=f"{rank}", modules=modules, taps={TAP: 0}, prefix=None, position_offset=0, device_bytes=0,
        encoded=kernels.fused.encode(modules, {TAP: 0}, 2), general_modules=frozenset(),
    )  # fmt: skip


def through(
    kernels: Kernels, segments: list[DeltaSegment], x: Tensor, far: Tensor, weight: Tensor
) -> list[Tensor]:
    """Outputs of module 0, which only passes its input on, and of module 1, a linear layer."""
    programs = compile_programs(2, kernels, segments, [], frozenset())
    context = ForwardContext(programs, attention=None)  # type: ignore[arg-type]
    outputs = []
    for program, value, base in ((programs[0], far, torch.clone), (programs[1], x, lambda z: z @ weight.t())):
        assert program is not None
        outputs.append(program.run(context, base, value[None], (), {})[0])
    return outputs


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("executor", "dtype"), FUSED_WITH_DTYPE)
def test_a_module_with_every_op_equals_the_general_kernels(
    executor: FusedExecutor, dtype: torch.dtype
) -> None:
    torch.manual_seed(11)
    device = executor.device
    fused = Kernels(ReferenceKernels(), executor.make(device), None)
    deltas = [placed(rank, fused, device) for rank in (1, 4, 7, 64)]
    spans = [(0, 1), (1, 9), (12, 13), (13, 56)]  # tokens 9 to 12 are bare
    segments = [DeltaSegment(a, b, delta) for (a, b), delta in zip(spans, deltas, strict=True)]
    x, far = torch.randn(TOKENS, D_IN).to(device, dtype), torch.randn(TOKENS, 40).to(device, dtype)
    weight = torch.randn(D_OUT, D_IN).to(device, dtype) / D_IN**0.5
    general = through(Kernels(ReferenceKernels(), None, None), segments, x.clone(), far, weight)
    compiled = through(fused, segments, x.clone(), far, weight)
    bare = x @ weight.t()
    assert torch.equal(compiled[0], far)
    assert torch.equal(compiled[1][9:12], bare[9:12])
    assert compiled[1].dtype == dtype
    touched = torch.cat([torch.arange(a, b) for a, b in spans])
    assert float((general[1] - bare)[touched].abs().amax(dim=1).min()) > 0.1
    scale = float(general[1].float().abs().max())
    limit = 1e-5 if dtype == torch.float32 else 2**-7  # one rounding of an input may differ in its last bit
    assert float((general[1].float() - compiled[1].float()).abs().max()) <= limit * scale


def test_long_segments_leave_the_fused_kernels_alone() -> None:
    torch.manual_seed(12)
    kernels = Kernels(ReferenceKernels(), CpuRows(), None)
    delta = placed(4, kernels)
    assert kernels.fused is not None
    most = kernels.fused.max_segment_tokens
    short, long = (
        compile_programs(2, kernels, [DeltaSegment(0, n, delta)], [], frozenset()) for n in (most, most + 1)
    )
    assert short[1] is not None
    assert long[1] is not None
    assert (short[1].fused is not None, len(short[1].parallel)) == (True, 0)
    assert (long[1].fused is None, len(long[1].parallel)) == (True, 2)
