"""Which backbone an upload says it was trained on, against the one that serves it."""

from __future__ import annotations

import re

from adapters.backbone_spec import BackboneSpec
from adapters.formats.problems import Problems, quoted

UNSTATED = {"base": "unstated"}


def check_base(
    claimed: str | None,
    revision: str | None,
    spec: BackboneSpec,
    backbone_digest: str | None,
    problems: Problems,
    *,
    param: str = "base_model_name_or_path",
) -> dict[str, str]:
    """Compare the upload's claim with `spec`; returns the lineage entry, `{"base": "unstated"}` where it has none.

    An explicit digest decides alone. Otherwise the claimed name must be one of the backbone's, whole or by its
    last path component. A name says nothing of a revision, so a revision other than `main` needs the digest.
    """
    if backbone_digest is not None:
        if backbone_digest != spec.digest:
            problems.add(
                f"backbone_digest: the adapter names another backbone; this server has {spec.digest}.",
                param="backbone_digest",
            )
        return {}
    if not claimed:
        return dict(UNSTATED)
    last = re.split(r"[/\\]", claimed.rstrip("/\\"))[-1]
    if not {claimed, last} & set(spec.names):
        accepted = ", ".join(quoted(name) for name in spec.names) or "none by name"
        problems.add(
            f"{param}: the adapter was trained on another base model than this server's {quoted(spec.name)}; "
            f"accepted names: {accepted}. If it is the same checkpoint, send `backbone_digest` {spec.digest}.",
            param=param,
        )
    elif revision not in (None, "", "main"):
        problems.add(
            "revision: the adapter was trained on a named revision of the base model, which its name can't confirm. "
            f"If it is this server's checkpoint, send `backbone_digest` {spec.digest}.",
            param="revision",
        )
    return {}
