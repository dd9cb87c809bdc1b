"""GET /v1/models, and which names reach what."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from adapters.registry import AdapterPage, Registry
from tests.unit.serving.http_support import BACKBONE, digest, gateway


async def test_models_are_the_backbone_and_every_ready_delta(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("b", seed=1)
        await g.push("a", seed=2)
        facts = {
            "method": "LORA",
            "backbone_digest": "",
            "task": "",
            "size_bytes": 1,
            "labels": {},
            "proof": {},
        }
        g.registry.publish("default", "failing", "d" * 64, status="failed", **facts)
        g.registry.publish("other-tenant", "hidden", "e" * 64, **facts)
        models = (await g.openai.models.list()).data
        assert [(m.id, m.owned_by, m.parent) for m in models] == [  # type: ignore[attr-defined]
            (BACKBONE, "deltamux", None),
            ("a", "default", BACKBONE),
            ("b", "default", BACKBONE),
        ]
        assert all(model.created > 0 for model in models)


class SmallPages(Registry):
    """A registry that gives two items a page, whatever is asked for."""

    def list_adapters(self, tenant: str, *, limit: int = 100, after: str | None = None) -> AdapterPage:
        return super().list_adapters(tenant, limit=min(limit, 2), after=after)


async def test_the_list_is_whole_however_many_pages_it_has(tmp_path: Path) -> None:
    async with gateway(tmp_path, registry_type=SmallPages) as g:
        for seed in range(5):
            await g.push(f"d{seed}", seed=seed)
        assert len((await g.openai.models.list()).data) == 6


@pytest.mark.parametrize(
    "reference",
    ["delta", "delta:latest", "delta:prod", "delta@v1", f"delta@sha256:{digest()}", "default/delta:prod"],
)
async def test_one_model_by_any_reference(tmp_path: Path, reference: str) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta", alias="prod")
        raw = await g.openai.models.with_raw_response.retrieve(reference)
        model = raw.parse()
        assert (model.id, model.parent) == (reference, BACKBONE)  # type: ignore[attr-defined]
        assert raw.headers["x-adapter-digest"] == f"sha256:{digest()}"


async def test_the_backbone_by_name(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.openai.models.retrieve(BACKBONE)).id == BACKBONE


@pytest.mark.parametrize(
    "reference",
    [
        "unknown",
        "delta:prod",
        "delta@v2",
        f"delta@sha256:{'0' * 64}",
        "other/delta",
        "other/hidden",
        "Delta",
        "delta@v0",
        "delta@sha256:zz",
        "../../etc/passwd",
        "/etc/passwd",
        "tiny:latest",
        "a/b/c",
        " ",
        "\x00",
        "\u202e",
    ],
)
async def test_what_is_not_there_is_404_and_never_the_backbone(tmp_path: Path, reference: str) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        facts = {
            "method": "LORA",
            "backbone_digest": "",
            "task": "",
            "size_bytes": 1,
            "labels": {},
            "proof": {},
        }
        g.registry.publish("other", "hidden", "e" * 64, **facts)
        with pytest.raises(openai.NotFoundError) as caught:
            await g.openai.completions.create(model=reference, prompt="hi")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert g.backend.calls == []
        with pytest.raises(openai.NotFoundError) as caught:
            await g.openai.models.retrieve(reference)
        assert caught.value.code in ("model_not_found", "not_found")


async def test_another_tenants_delta_looks_like_an_unknown_one(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        facts = {
            "method": "LORA",
            "backbone_digest": "",
            "task": "",
            "size_bytes": 1,
            "labels": {},
            "proof": {},
        }
        g.registry.publish("other", "hidden", "e" * 64, **facts)
        texts = []
        for name in ("hidden", "absent"):
            reply = await g.http.get(f"/v1/models/other/{name}")
            assert reply.status_code == 404
            texts.append(reply.text.replace(name, "*"))
        assert texts[0] == texts[1]
