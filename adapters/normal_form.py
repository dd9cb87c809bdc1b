"""The normal form: what a delta does, as typed values, whatever method trained it.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022): every method is a
modification of hidden states. A delta is therefore a list of ops at named sites of the backbone. Readers lower
uploads to it, executors run only it.

Sites, in the order in which a pre-LN decoder layer passes them:
`embed` · `embed.sum` (positions added) · `embed.post` (what enters the first layer) · `attn.r` (residual stream
entering attention) · `attn.x` (what q, k, v read) · `q.out` `k.out` `v.out` (`qkv.out` where their columns alternate
head by head) · `kv` (the cache, after rotary) · `ctx` (concatenated heads) · `o.out` · `attn.post` (its norm, where one
follows) · `ffn.r` (residual stream entering the feed-forward block) · `ffn.x` (what it reads) · `gate.out` `up.out` ·
`ffn.a` (activation, input of down) · `down.out` · `ffn.post` (its norm, where one follows) · `layer.out` ·
`final.pre` · `final` · `logits`, or `scores` (what a task head makes of the final hidden states, see `adapters.tasks`).
Encoder-decoders have them twice, as `enc.…` and `dec.…`, and those of the attention to the encoder's output as
`dec.cross.…`; `logits` is theirs alike.

Order at one linear site: input scale -> LinearMap(input) -> base GEMM, or what replaces it or Rows of it
(+ WeightDelta, which reads what the GEMM reads) -> + parallel LowRanks, each reading the untouched input -> output
Affine -> base bias (inside the Affine where it `covers_bias`) -> LinearMap(output), bias included -> sequential
LowRanks.

Shapes: r rank, d_in and d_out widths of the sites, l virtual tokens, H key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import ClassVar, Literal

from torch import Tensor

from adapters.positions import Positions
from adapters.tasks import HeadSpec, Task


class OpKind(StrEnum):
    """The primitives of the normal form: eight core, two structural, two at decode time."""

    LOW_RANK = "low_rank"
    AFFINE = "affine"
    LINEAR_MAP = "linear_map"
    WEIGHT_DELTA = "weight_delta"
    ATTN_PREFIX = "attn_prefix"
    VIRTUAL_TOKENS = "virtual_tokens"
    ROWS = "rows"
    HEAD = "head"
    LAYER_PLAN = "layer_plan"
    COMPOSE = "compose"
    LOGIT_MIX = "logit_mix"
    PROCEDURE = "procedure"


Stack = Literal["", "enc", "dec", "dec.cross"]
_STACKS: tuple[Stack, ...] = ("dec.cross", "enc", "dec")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A named place in the backbone. `layer` is -1 for sites that exist once (`embed`, `final`, `logits`)."""

    name: str
    layer: int = -1

    @property
    def stack(self) -> Stack:
        """Which attention or stack of an encoder-decoder the site belongs to; empty where there is one stack."""
        return next((stack for stack in _STACKS if self.name.startswith(f"{stack}.")), "")

    @property
    def local(self) -> str:
        """The name within the stack, as every architecture has it."""
        return self.name.removeprefix(f"{self.stack}.") if self.stack else self.name

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"{self.layer}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str`. Raises ValueError."""
        head, _, rest = text.partition(".")
        return cls(rest, int(head)) if head.isdigit() else cls(text)


def kv_site(stack: Stack, layer: int) -> Site:
    """The keys and values of one layer's attention."""
    return Site(f"{stack}.kv" if stack else "kv", layer)


Activation = Literal["identity", "relu", "gelu", "gelu_new", "silu", "tanh", "leaky_relu", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """y += scaling * (B @ f(A @ x + a_bias) + b_bias), row vectors x at `read`, y at `write`.

    `read` and `write` differ: parallel, x is the site's untouched value. Equal: sequential, x is y itself. Where
    `write` is what a norm reads and `read` what it puts out, the norm runs again: LN(x + op(LN(x))) (Pfeiffer et al. in
    a model whose norms follow the blocks).
    `positions`: the tokens on which the op acts, None for all.
    Shapes: A [r, d_in], B [d_out, r], a_bias [r], b_bias [d_out].
    Source: He et al. table 1; Hu et al. "LoRA" section 4.1; Houlsby et al. section 2.
    """

    kind: ClassVar[OpKind] = OpKind.LOW_RANK
    read: Site
    write: Site
    A: Tensor
    B: Tensor
    scaling: float = 1.0
    activation: Activation = "identity"
    a_bias: Tensor | None = None
    b_bias: Tensor | None = None
    positions: Positions | None = None

    @property
    def sequential(self) -> bool:
        """True where the op reads what it writes."""
        return self.read == self.write


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """y * scale + shift at a site, before (`side="input"`) or after the base module.

    `covers_bias=False`: the scale leaves the base module's bias alone.
    `weight_normalized`: `scale` is divided, when the delta is placed, by the row norms of W + s·B·A, where W is the
    base weight and s·B·A the delta's own parallel LowRanks there (DoRA: scale is the magnitude vector), with
    `norm_scaling`, where it is given, in the place of each s (AdapterHub's DoRA: 1).
    `bias`: replaces the base module's bias (a difference is formed when the delta is placed). `weight`: replaces the
    weight of a norm, which is then computed anew for the delta's rows: exact also where the base weight is 0.
    Shapes: all [d] of the site. Source: Liu et al. "IA3"; Liu et al. "DoRA" section 4; Ben Zaken et al. "BitFit";
    Zhao et al. "Tuning LayerNorm in Attention".
    """

    kind: ClassVar[OpKind] = OpKind.AFFINE
    site: Site
    side: Literal["input", "output"] = "output"
    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    covers_bias: bool = True
    weight_normalized: bool = False
    norm_scaling: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """x <- x R before (`side="input"`) or y <- y R after the base module, bias included. One of two forms.

    `blocks`: R is a product of stages, the first one applied first. Stage k takes the columns in the order `order[k]`
    (as they come without one), cuts them into n = d / b runs, multiplies run i by blocks[k, i], and puts the columns
    back where they were. A single block is shared by all runs.
    `reflections`, on the input side only: x <- x - 2 (x·u) u for each row u in turn (Householder).
    Shapes: blocks [stages, n or 1, b, b], order [stages, d] int32, reflections [r, d] of unit rows.
    Source: Qiu et al. "OFT"; Liu et al. "BOFT" section 4; Liao and Monz "RoAd"; Yuan et al. "HRA".
    """

    kind: ClassVar[OpKind] = OpKind.LINEAR_MAP
    site: Site
    side: Literal["input", "output"] = "input"
    blocks: Tensor | None = None
    order: Tensor | None = None
    reflections: Tensor | None = None


Layout = Literal["dense", "sparse", "kron", "circulant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDelta:
    """y += scaling * ΔW @ x, with ΔW [d_out, d_in] held in one of four layouts.

    `dense`: values is ΔW. `sparse`: ΔW[indices[0], indices[1]] = values, the values of a repeated place added.
    `kron`: ΔW is the Kronecker product of left and values. `circulant`: blocks of b by b, of which block (m, n) has
    values[m, n, (i - j) mod b] at row j, column i.
    Shapes: values [d_out, d_in] | [nnz] | [d_out / a, d_in / c] | [d_out / b, d_in / b, b]; indices [2, nnz] int32;
    left [a, c]. Source: Bhardwaj et al. "SHiRA"; Yeh et al. "LyCORIS" (LoKr); Chen et al. "C3A".
    """

    kind: ClassVar[OpKind] = OpKind.WEIGHT_DELTA
    site: Site
    layout: Layout
    values: Tensor
    indices: Tensor | None = None
    left: Tensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttnPrefix:
    """Extra keys and values that every token of the layer attends to: never rotated.

    `joint`: in one softmax with the real ones, of which they are the first l: in layers with a sliding window of w
    entries they are seen only until w - 1 others have followed. `separate`: in a softmax of their own, whose result
    times `gate` is added at `ctx`. `projected=False`: key and value are what the layer's k and v projections are given
    when the delta is placed. `stack`: the attention of an encoder-decoder to which it belongs, `layer` its layer there.
    Shapes: key, value [l, H, D], not projected [l, d]; gate [1].
    Source: Li and Liang "Prefix-Tuning"; He et al. equation 4; Zhang et al. "LLaMA-Adapter" section 3.2.
    """

    kind: ClassVar[OpKind] = OpKind.ATTN_PREFIX
    layer: int
    key: Tensor
    value: Tensor
    merge: Literal["joint", "separate"] = "joint"
    gate: Tensor | None = None
    projected: bool = True
    stack: Stack = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTokens:
    """Rows inserted before the first real token at `embed`; real tokens are positioned after them.

    On an encoder-decoder at `enc.embed`, before what the encoder reads; the decoder's tokens are positioned from 0.

    Shapes: embeddings [l, d]. Source: Lester et al. "Prompt tuning" section 2.
    """

    kind: ClassVar[OpKind] = OpKind.VIRTUAL_TOKENS
    embeddings: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of the token embedding (site `embed`) or of the language model head (`logits`) that are replaced.

    At `embed`, token ids[i] is embedded as rows[i]; at `logits`, its logit is x · rows[i]. A delta for a backbone whose
    head is tied to the embedding has both. Shapes: ids [n] int32, distinct, rows [n, d].
    Source: PEFT `TrainableTokensLayer`.
    """

    kind: ClassVar[OpKind] = OpKind.ROWS
    site: Site
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the final hidden states become: norm(f(x · weightᵀ + bias)), in place of the module that writes `site`.

    `site` says what the outputs are. At `logits`: one per token of the vocabulary, the language model head replaced,
    its bias too (there is none without `bias`), also where the base head is tied to the embedding; f is the identity,
    and nothing follows. At `scores`: a stage of the task head, of which several follow one another in the order of
    the ops, fed as `HeadSpec` says; without `activation` f is the identity, without `norm_weight` there is no norm.
    `class_means` and `precision`, of the first stage: what it reads for inputs of each class, on average, and the
    inverse of their shared covariance, for scores of being out of distribution.
    Shapes: weight [n, d], bias, norm_weight and norm_bias [n], class_means [C, d], precision [d, d].
    Source: PEFT `ModulesToSaveWrapper`; Lee et al. "A Simple Unified Framework for Detecting Out-of-Distribution
    Samples and Adversarial Attacks" section 2.
    """

    kind: ClassVar[OpKind] = OpKind.HEAD
    site: Site
    weight: Tensor
    bias: Tensor | None = None
    activation: Activation | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float | None = None
    class_means: Tensor | None = None
    precision: Tensor | None = None


SCORES = Site("scores")

Op = LowRank | Affine | LinearMap | WeightDelta | AttnPrefix | VirtualTokens | Rows | Head

EXECUTED_OPS: Mapping[OpKind, type[Op]] = {
    cls.kind: cls for cls in (LowRank, Affine, LinearMap, WeightDelta, AttnPrefix, VirtualTokens, Rows, Head)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Everything that serving one delta needs, independent of the format it came in.

    `method` is the user's word for it (`LORA`, `double_seq_bn`). `position_offset`: the first real token's position
    id (PEFT prefix tuning: l; AdapterHub: 0), on an encoder-decoder the decoder's. `backbone_digest` binds the delta to the weights it was trained on and
    is filled at admission. `head`: how the final hidden states are read, for every task but causal-lm.
    """

    method: str
    ops: tuple[Op, ...]
    position_offset: int = 0
    task: str = Task.CAUSAL_LM.value
    backbone_digest: str = ""
    head: HeadSpec | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_virtual_tokens(self) -> int:
        """Key-value entries that the delta owns in front of every request."""
        lengths = [op.key.shape[0] for op in self.ops if isinstance(op, AttnPrefix) and op.merge == "joint"]
        lengths += [op.embeddings.shape[0] for op in self.ops if isinstance(op, VirtualTokens)]
        return max(lengths, default=0)

    @property
    def positions(self) -> frozenset[Positions]:
        """On what tokens some of its ops act; empty where all act on every one."""
        found = (op.positions for op in self.ops if isinstance(op, LowRank))
        return frozenset(positions for positions in found if positions is not None)

    @property
    def head_stages(self) -> tuple[Head, ...]:
        """The stages of the task head, in order."""
        return tuple(op for op in self.ops if isinstance(op, Head) and op.site == SCORES)

    @property
    def num_parameters(self) -> int:
        """Distinct tensor elements; a tensor that several ops share counts once."""
        return sum(tensor.numel() for tensor in {id(t): t for _, _, t in self.tensors()}.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the distinct tensors."""
        return sum(tensor.nbytes for tensor in {id(t): t for _, _, t in self.tensors()}.values())

    def tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """(op index, field name, tensor) of every tensor, in op order."""
        for index, op in enumerate(self.ops):
            for item in fields(op):
                value = getattr(op, item.name)
                if isinstance(value, Tensor):
                    yield index, item.name, value
