"""What a delta kernel computes: the contract that every executor meets and that the contract tests state.

Legend: T tokens, I input width, O output width, r rank. Tokens of one delta are contiguous: a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from adapters.normal_form import Activation, Site

Parameters = tuple[Tensor, Tensor]
"""Weight and bias."""


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """What a placed LowRank has around it, where it has anything: LayerNorms [I] and [columns], a gate [I] and [1]."""

    in_norm: Parameters | None
    out_norm: Parameters | None
    eps: float
    gate: Parameters | None


@dataclass(frozen=True, slots=True, eq=False)
class LowRankWeights:
    """A placed LowRank: A [r, I], B [r, columns], a_bias [r], b_bias [columns], all fp32 on the device.

    Columns [start, stop) of the module's output are written. B is the transpose of what files hold, so that both
    factors are rows of a rank that a kernel streams through.
    """

    A: Tensor
    B: Tensor
    scaling: float
    activation: Activation
    a_bias: Tensor | None
    b_bias: Tensor | None
    start: int
    stop: int
    around: Surroundings | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AffineWeights:
    """A placed Affine: scale and shift [columns] or None; columns [start, stop) are touched."""

    scale: Tensor | None
    shift: Tensor | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeights:
    """A placed dense WeightDelta: matrix [columns, I]; columns [start, stop) are written."""

    matrix: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class SparseWeights:
    """A placed sparse WeightDelta: matrix [columns, I], coalesced COO; columns [start, stop) are written."""

    matrix: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class KronWeights:
    """A placed Kronecker product: left [a, c], right [b, d], c·d = I; the a·b columns [start, stop) are written."""

    left: Tensor
    right: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class CirculantWeights:
    """A placed block-circulant WeightDelta of blocks of b.

    spectrum [columns / b, I / b, b // 2 + 1] complex64 is the conjugated real Fourier transform of the kernels.
    """

    spectrum: Tensor
    size: int
    start: int
    stop: int


WeightDeltaWeights = DenseWeights | SparseWeights | KronWeights | CirculantWeights


@dataclass(frozen=True, slots=True, eq=False)
class LinearMapWeights:
    """A placed LinearMap of stages over columns [start, stop).

    Shapes: blocks [stages, n, b, b] fp32 (n may be a broadcast view), order [stages, columns] int64 or None.
    """

    blocks: Tensor
    order: Tensor | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class RowsWeights:
    """Placed Rows: ids [n] int64, ascending, rows [n, d] fp32; bias [n] fp32 that the base head adds to theirs."""

    ids: Tensor
    rows: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptWeights:
    """A placed separate AttnPrefix: key, value [kv_heads, l, D] fp32, value times the gate.

    `activation` acts on each score; None: softmax.
    """

    key: Tensor
    value: Tensor
    activation: Activation | None = None


Replacement = Callable[[Tensor], Tensor]
"""A module's forward with a delta's own parameters, rows [t, I] -> [t, O]."""


@dataclass(slots=True)
class PlacedModule:
    """One delta's ops at one module. `remote` LowRanks read a site that another module sees.

    `prompts` are attended to by the attention whose heads (`ctx`) the module reads. `reflections` are LowRanks that act
    on the module's input, in place. `replacement` takes the place of the base module's own forward. `again` LowRanks
    read the output of a norm; it runs again on its input with their results added. `prefix_gate` [2, I] and [2]: what
    the row's prefix is multiplied by in the attention that the module's output goes to.
    """

    prompts: list[PromptWeights] = field(default_factory=list)
    inputs: list[AffineWeights] = field(default_factory=list)
    input_maps: list[LinearMapWeights] = field(default_factory=list)
    reflections: list[LowRankWeights] = field(default_factory=list)
    replacement: Replacement | None = None
    again: list[LowRankWeights] = field(default_factory=list)
    embeddings: list[RowsWeights] = field(default_factory=list)
    logits: list[RowsWeights] = field(default_factory=list)
    weight_deltas: list[WeightDeltaWeights] = field(default_factory=list)
    parallel: list[LowRankWeights] = field(default_factory=list)
    remote: list[tuple[Site, LowRankWeights]] = field(default_factory=list)
    outputs: list[AffineWeights] = field(default_factory=list)
    output_maps: list[LinearMapWeights] = field(default_factory=list)
    sequential: list[LowRankWeights] = field(default_factory=list)
    prefix_gate: Parameters | None = None

    @property
    def is_row_wise(self) -> bool:
        """True where all ops are plain LowRank, Affine or LinearMap, which `FusedRows` runs."""
        others = (self.prompts, self.again, self.embeddings, self.logits, self.weight_deltas)
        return self.replacement is None and self.prefix_gate is None and self.is_plain and not any(others)

    @property
    def is_plain(self) -> bool:
        """True where no LowRank has norms or a gate."""
        remote = (w for _, w in self.remote)
        return all(w.around is None for w in (*self.again, *self.parallel, *remote, *self.sequential))


class PromptSegment(NamedTuple):
    """Tokens [start, stop) attend to `weights`."""

    start: int
    stop: int
    weights: PromptWeights


class RowsSegment(NamedTuple):
    """Tokens [start, stop) have `weights` in place of rows of the base weight."""

    start: int
    stop: int
    weights: RowsWeights


class LowRankSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: LowRankWeights


class AffineSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: AffineWeights


class WeightDeltaSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: WeightDeltaWeights


class LinearMapSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: LinearMapWeights


class DeltaKernels(Protocol):
    """Executors of the normal form's row-wise ops. Chosen once, when the backbone is loaded."""

    def add_low_rank(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[LowRankSegment]) -> None:
        """Add each segment's low-rank delta in place.

        Semantics: y[t, cols] += scaling * (f(x[t] @ A.T + a_bias) @ B + b_bias) for t in the segment. All x are
        read before any y of the same segment is written, so y and x may be the same storage (sequential adapters).
        With `Surroundings` x is normed first, and what is added is multiplied by the mean over the segment of
        sigmoid(x @ gate), then normed; a segment with a gate is one row.
        Shapes: y [T, O] fp32, x [T, I] fp32. Source: LoRA section 4.1; Houlsby et al. section 2.
        """
        ...

    def apply_affine(self, y_TO: Tensor, segments: Sequence[AffineSegment]) -> None:
        """Scale and shift each segment's columns in place.

        Semantics: y[t, cols] = y[t, cols] * scale + shift. Shapes: y [T, O] fp32. Source: IA3 section 3.3.
        """
        ...

    def add_weight_delta(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[WeightDeltaSegment]) -> None:
        """Add each segment's ΔW x in place.

        Semantics: y[t, cols] += x[t] @ ΔW.T, with ΔW as the weights' class says; a Kronecker product is never formed:
        with x[t] as X [c, d], ΔW x = left X right.T. Shapes: y [T, O] fp32, x [T, I] fp32.
        Source: SHiRA; LyCORIS (LoKr); C3A, where ΔW is a product in the Fourier domain.
        """
        ...

    def apply_linear_map(self, y_TO: Tensor, segments: Sequence[LinearMapSegment]) -> None:
        """Multiply each segment's columns by its stages in place, the first stage first.

        Semantics per stage k: z = y[t, cols][order[k]] cut into n runs; z[i] = z[i] @ blocks[k, i];
        y[t, cols][order[k]] = z. Shapes: y [T, O] fp32. Source: OFT; BOFT section 4; RoAd.
        """
        ...

    def replace_embeddings(self, y_TO: Tensor, ids_T: Tensor, segments: Sequence[RowsSegment]) -> None:
        """Overwrite the embeddings of the tokens that each segment replaces.

        Semantics: y[t] = rows[i] where ids_T[t] == ids[i]. Shapes: y [T, d] fp32, ids_T [T] integers.
        """
        ...

    def replace_logits(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[RowsSegment]) -> None:
        """Overwrite the logits of the tokens that each segment replaces.

        Semantics: y[t, ids[i]] = x[t] · rows[i]. Shapes: y [T, V] fp32, x [T, d] fp32.
        """
        ...

    def add_prompt_attention(
        self, y_TO: Tensor, query_HTD: Tensor, scaling: float, segments: Sequence[PromptSegment]
    ) -> None:
        """Add each segment's attention to a prompt of its own, in its own softmax or without one, in place.

        Semantics: y[t, h] += f(scaling * query[h, t] @ key[g].T) @ value[g], g the key head of h, f the softmax or
        `activation`. Shapes: y [T, H * D] fp32, query [H, T, D] after rotary.
        Source: LLaMA-Adapter section 3.2; He et al., "multi-head parallel adapter".
        """
        ...


class FusedSegment(NamedTuple):
    """Tokens [start, stop) belong to the delta that was encoded as `encoded`."""

    start: int
    stop: int
    encoded: Any


class FusedBatch(Protocol):
    """Encoded deltas over the tokens of one batch. Lists and sets go by module index."""

    changes_input: Sequence[bool]
    changes_output: Sequence[bool]
    taps: frozenset[int]

    def capture(self, module: int, x_TI: Tensor) -> None:
        """Keep the input of a module in `taps` for the modules that read it from afar."""
        ...

    def run_input(self, module: int, x_TI: Tensor) -> None:
        """Apply what acts on the module's input, in place on a contiguous copy, fp32 or the backbone's dtype."""
        ...

    def run_output(self, module: int, y_TO: Tensor, x_TI: Tensor) -> None:
        """Apply what acts after the base module, in place. x is the module's own input, before `run_input`."""
        ...


class FusedRows(Protocol):
    """Executor of LowRank, Affine and LinearMap ops of short segments, all ops of a module in one call.

    Semantics: per segment and module what `DeltaKernels` computes in the order of `PlacedModule`'s fields, in fp32,
    rounded once to the dtype of y.
    """

    max_segment_tokens: int

    def encode(self, modules: Mapping[int, PlacedModule], taps: Mapping[Site, int], num_modules: int) -> Any:
        """A delta's row-wise modules in the executor's own form; `taps` names the module that sees a site."""
        ...

    def bind(self, segments: Sequence[FusedSegment]) -> FusedBatch:
        """A batch of encoded deltas; segments do not overlap."""
        ...


class TokenHeads(NamedTuple):
    """Heads of a batch's tokens: query [H, T, D], key and value [K, T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


class ScoreRule(NamedTuple):
    """How scores are made: scaling * q·k, bounded by softcap * tanh(s / softcap), over the last `window` entries."""

    scaling: float
    softcap: float | None
    window: int | None


class DecodeAttention(Protocol):
    """Attention of rows with one new token each over contiguous KV slots."""

    def attend(
        self,
        out_THD: Tensor,
        heads: TokenHeads,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        rule: ScoreRule,
    ) -> None:
        """Append each row's key and value to its slot and write its attention to `out`.

        Semantics per row (t, s, p) of `rows` [3, B] int64 (token, slot, entries before it), g the key head of h:
        keys[s, g, p] = key[g, t]; likewise values; out[t, h] = softmax(scores of query[h, t]) @ values[s, g] over what
        `rule` shows of the slot's p + 1 entries. fp32 inside; no other entry is read. Shapes: out [T, H, D], keys and
        values [slots, K, L, D].
        """
        ...


class Kernels(NamedTuple):
    """The executors of one replica: any op on segments of any length, and what takes the short ones, if anything.

    `decode` is None where attention of single tokens is torch's.
    """

    general: DeltaKernels
    fused: FusedRows | None
    decode: DecodeAttention | None
