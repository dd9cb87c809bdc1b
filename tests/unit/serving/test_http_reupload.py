"""Re-upload under one name while requests run: every answer is one version's, token for token.

The deltas change the values of every layer, so keys and values of one version under another would change its tokens:
each version's greedy answers, computed by a server that knows no other version and shares no prefix, are its
signature. The prompts are long and the same for all, which is what a prefix cache that crossed would show on.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from serving.engine.prefix_cache import BLOCK_TOKENS, PrefixKeys
from serving.model.backbone import Backbone
from tests.unit.serving.engine_gateway import complete, engine_gateway, make_backbone, token_ids, upload_of
from tests.unit.serving.http_support import Gateway, sse_events

NUM_VERSIONS = 6
PROMPTS = [[2 + (7 * token + start) % 250 for token in range(5 * BLOCK_TOKENS + 3)] for start in range(2)]
LENGTH = 24

Signatures = dict[str, list[list[int]]]
"""Content digest -> the answer to each prompt."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone()


async def signatures(home: Path, backbone: Backbone) -> Signatures:
    """What each version answers where it is alone."""
    found: Signatures = {}
    async with engine_gateway(home, backbone, engine={"prefix_cache": "off"}) as g:
        for seed in range(NUM_VERSIONS):
            pushed = await g.http.put(f"/v1/adapters/alone{seed}/versions", files=upload_of(backbone, seed))
            answers = [await complete(g, f"alone{seed}", prompt, max_tokens=LENGTH) for prompt in PROMPTS]
            found[pushed.json()["digest"]] = [token_ids(answer) for answer in answers]
    assert len({json.dumps(answers) for answers in found.values()}) == NUM_VERSIONS
    return found


async def ask(g: Gateway, model: str, prompt: list[int], *, stream: bool) -> tuple[str, list[int], int]:
    """The digest that an answer names, its tokens, and how many of its prompt's were shared."""
    options = {"include_usage": True} if stream else None
    reply = await complete(g, model, prompt, max_tokens=LENGTH, stream=stream, stream_options=options)
    assert reply.status_code == 200, reply.text
    parts: list[Any] = (
        [part for part in sse_events(reply.text) if part != "[DONE]"] if stream else [reply.json()]
    )
    tokens = [token for part in parts for choice in part["choices"] for token in choice.get("token_ids", ())]
    usage = parts[-1]["usage"]
    return reply.headers["x-adapter-digest"], tokens, usage["prompt_tokens_details"]["cached_tokens"]


async def reuploads(home: Path, backbone: Backbone, known: Signatures) -> Counter[str]:
    """Six versions of one name, one after the other, under requests; how many answers each gave, and `shared`."""
    seen: Counter[str] = Counter()
    ended = asyncio.Event()

    async def caller(g: Gateway, number: int) -> None:
        turn = number
        while not ended.is_set():
            turn += 1
            prompt = turn % len(PROMPTS)
            model = ("delta", "delta:live")[turn // 2 % 2]
            digest, tokens, shared = await ask(g, model, PROMPTS[prompt], stream=bool(turn % 3))
            assert tokens == known[digest][prompt], f"{digest} answered as another version"
            seen[digest] += 1
            seen["shared"] += shared > 0

    async with engine_gateway(home, backbone) as g, asyncio.TaskGroup() as callers:
        for seed in range(NUM_VERSIONS):
            fields = {"alias": "live"}
            pushed = await g.http.put(
                "/v1/adapters/delta/versions", files=upload_of(backbone, seed), data=fields
            )
            assert pushed.json()["version"] == seed + 1, pushed.text
            if seed == 0:
                for number in range(6):
                    callers.create_task(caller(g, number))
            digest = pushed.json()["digest"]
            async with asyncio.timeout(30):
                while seen[digest] < 8:
                    await asyncio.sleep(0.01)
        await g.http.delete("/v1/adapters/delta/versions/1")
        ended.set()
    return seen


async def test_no_answer_mixes_versions_and_no_prefix_crosses(backbone: Backbone, tmp_path: Path) -> None:
    known = await signatures(tmp_path / "alone", backbone)
    seen = await reuploads(tmp_path / "together", backbone, known)
    assert set(seen) == {*known, "shared"}
    assert seen["shared"] >= NUM_VERSIONS, "the prefix cache was hardly used"


async def test_a_prefix_that_crosses_is_seen(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = await signatures(tmp_path / "alone", backbone)
    right = PrefixKeys.root
    monkeypatch.setattr(
        PrefixKeys, "root", lambda self, **fields: right(self, **fields | {"adapter_digest": "by name"})
    )
    with pytest.raises(ExceptionGroup) as caught:
        await reuploads(tmp_path / "together", backbone, known)
    assert caught.group_contains(AssertionError, match="answered as another version")
