"""What the worker process is asked and what it answers; both sides import it, so nothing heavy is here."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGE = "@ "
RESULT, LOGITS, CHANGES, UNPICKLED = "result.json", "logits.safetensors", "changes.safetensors", "adapter"


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with the adapter in `source`, in this order: unpickle it, run it on `prompts`, probe its modules.

    `prompts`: token ids; each is run with `new_tokens` more, chosen greedily. `quota_bytes` bounds what probing finds.
    """

    source: str
    directory: str
    backbone: str = ""
    unpickle: bool = False
    prompts: list[list[int]] = field(default_factory=list)
    new_tokens: int = 0
    probe: bool = False
    quota_bytes: int = 0


@dataclass(slots=True)
class Result:
    """What was found, or why not (`problems`). `sequences`: each prompt with its new tokens."""

    torch: str = ""
    library_version: str = ""
    method: str = ""
    notes: list[str] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remedy: str | None = None
