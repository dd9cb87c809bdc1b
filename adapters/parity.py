"""The parity record: how far the engine was from the reference library when the uploader compared them.

`deltamux verify` writes it, an upload may carry it, and the version's admission proof keeps it. It is bound to one
delta on one backbone by their digests. Format: JSON, `deltamux-parity/1`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import InvalidRequest

FORMAT: Literal["deltamux-parity/1"] = "deltamux-parity/1"
MAX_RECORD_BYTES = 16 << 10
MAX_PROBES = 64
TOLERANCE = 2e-4
"""Largest logit error relative to max(1, largest reference logit): deltas whose matrices are folded reach no less."""

_Text = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\x21-\x7e]+$")]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=1 << 20)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ParityProbe(_Strict):
    """One prompt. `error`: largest logit error over all positions, relative to max(1, `scale`), the largest logit."""

    source: Literal["random", "file"]
    prompt_tokens: _Count
    new_tokens: _Count
    error: _Error
    scale: _Error
    greedy_equal: bool


class ParityRecord(_Strict):
    """The comparison of one delta. `library`: what the reference ran on; `dtype`: of both sides."""

    format: Literal["deltamux-parity/1"] = FORMAT
    library: _Text
    library_version: _Text
    torch: _Text
    dtype: Literal["float32"] = "float32"
    delta_digest: _Digest
    backbone_digest: _Digest
    probes: Annotated[tuple[ParityProbe, ...], Field(min_length=1, max_length=MAX_PROBES, strict=False)]

    @property
    def error(self) -> float:
        """The largest error of all probes."""
        return max(probe.error for probe in self.probes)

    @property
    def greedy_equal(self) -> bool:
        """Whether every probe's greedy continuation was the reference's."""
        return all(probe.greedy_equal for probe in self.probes)

    @property
    def passes(self) -> bool:
        """Whether the engine's numbers are the reference's, within TOLERANCE."""
        return self.error <= TOLERANCE and self.greedy_equal

    def require_proof_of(self, delta_digest: str, backbone_digest: str) -> None:
        """Raises InvalidRequest unless this record shows parity of that delta on that backbone."""
        for what, got, expected in (
            ("backbone_digest", self.backbone_digest, backbone_digest),
            ("delta_digest", self.delta_digest, delta_digest),
        ):
            if got != expected:
                raise InvalidRequest(
                    f"parity: {what}: the record is of sha256:{got}, the upload is sha256:{expected}.",
                    param="parity",
                    remedy="Run `deltamux verify` on what is uploaded and on the backbone that is served.",
                )
        if not self.passes:
            raise InvalidRequest(
                f"parity: the record says that the engine differs from the reference: error {self.error:.1e} of at "
                f"most {TOLERANCE:.0e}, greedy text {'equal' if self.greedy_equal else 'different'}.",
                param="parity",
                remedy="An upload carries only a record that passes.",
            )


def read_record(data: str | bytes) -> ParityRecord:
    """The record in a JSON text. Raises InvalidRequest naming the field that is wrong."""
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRequest(
            f"parity: {len(data)} bytes, at most {MAX_RECORD_BYTES} are read.", param="parity"
        )
    try:
        return ParityRecord.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "the record"
        raise InvalidRequest(
            f"parity: {where!a}: {first['msg']}.", param="parity", remedy="Send what `deltamux verify` wrote."
        ) from None
