"""The isolation soak: tenants that ask, deltas that change, replicas that die, and a judge of every answer."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from adapters.canonical import to_canonical
from loadtest.estate import ABSENT, BARE, Adapter, Estate, Question, Timeline
from loadtest.http import chunks
from loadtest.signed import HEAD_METHOD, delta_of_any_method, head_of, method_of, signature_of
from loadtest.workload import random_prompts
from serving.model.backbone import Backbone

NAME = "frozen"
"""The backbone's, as callers write it."""
SAFE_GAP = 1e-3
"""Between the log-probabilities of the best two tokens; rounding differs by about 1e-6 between batches."""
BARE_PROMPTS, BARE_TOKENS = 8, 32
UPLOADS_AT_ONCE = 4
SECOND_VERSION_EVERY = 4
"""Each so-manieth delta of a tenant is a second version of the one before it."""
SHARED = 0.25
"""Share of the names that are granted to one other tenant."""
CHANGE_EVERY_S = 0.3
WATCH_EVERY_S = 1.0
REPORT_EVERY_S = 60.0
BREAKS_FOR_S = 180.0
"""How long after a kill an error may come of it: a busy machine takes its time to start a replica."""
UNAVAILABLE = "unavailable"
MAX_PROBLEMS = 20


@dataclass(slots=True)
class Tally:
    """What the soak has seen; `foreign`, `base` and `bare` are wrong tokens."""

    tokens: int = 0
    foreign: int = 0
    base: int = 0
    bare: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    evictions: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Note what must not be, at once and for the end; only the first ones are kept."""
        if len(self.problems) < MAX_PROBLEMS:
            sys.stderr.write(f"{text}\n")
            self.problems.append(text)

    @property
    def wrong(self) -> int:
        """Tokens that should not have come."""
        return self.foreign + self.base + self.bare


@dataclass(frozen=True, slots=True)
class Target:
    """A server: clients for it by key, an administrator's key, and its replicas' processes (None: it has none)."""

    client: Callable[[str], httpx.AsyncClient]
    admin_key: str
    replicas: Callable[[], list[int]] | None = None


@dataclass(slots=True)
class Answer:
    """What came back. `code`: of the error that ended it; `whole`: it ended as a complete answer."""

    status: int
    digest: str
    known_at: float
    token_ids: list[int] = field(default_factory=list)
    code: str | None = None
    whole: bool = False

    def take(self, content: dict[str, Any]) -> None:
        """Add a reply, or one chunk of it."""
        if "error" in content:
            self.code = str(content["error"]["code"])
            return
        for choice in content["choices"]:
            self.token_ids += choice.get("token_ids", ())  # a chunk may be about the prompt alone
            self.whole = self.whole or choice["finish_reason"] == "length"


async def ask(client: httpx.AsyncClient, question: Question) -> Answer:
    """Send one request. Raises httpx.HTTPError where the connection breaks off."""
    body = {
        "model": NAME if question.model == BARE else question.model,
        "prompt": list(question.prompt),
        "max_tokens": question.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": question.streamed,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        digest = response.headers.get("x-adapter-digest", "").removeprefix("sha256:")
        answer = Answer(response.status_code, digest, time.monotonic())
        if response.status_code != 200 or not question.streamed:
            await response.aread()
            answer.take(response.json())
            return answer
        async for chunk in chunks(response):
            answer.take(chunk)
            if question.abandoned and answer.token_ids:
                break
        return answer


class Soak:
    """One server, its tenants' clients and what is known of their deltas."""

    def __init__(self, target: Target, backbone: Backbone, estate: Estate, *, seed: int) -> None:
        self.target = target
        self.backbone = backbone
        self.estate = estate
        self.tally = Tally()
        self._head = head_of(backbone)
        self._draw = random.Random(seed)  # noqa: S311
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._next_index = 0
        self._kill_times: list[float] = []
        self._counters: dict[str, float] = {}
        self._reporting = 0

    # -- before -------------------------------------------------------------------------------------------------

    async def prepare(self, stack: AsyncExitStack, num_deltas: int) -> None:
        """Make tenants and keys, learn the bare answers, upload `num_deltas` deltas, grant some names."""
        admin = await stack.enter_async_context(self.target.client(self.target.admin_key))
        tenants = self.estate.tenants
        for tenant in tenants:
            (await admin.post("/v1/admin/tenants", json={"name": tenant})).raise_for_status()
            body = {"tenant": tenant, "scopes": ["infer", "upload", "manage"]}
            made = (await admin.post("/v1/admin/keys", json=body)).raise_for_status().json()
            self._clients[tenant] = await stack.enter_async_context(self.target.client(made["key"]))
        await self._learn_bare_answers(self._clients[tenants[0]])
        gate = asyncio.Semaphore(UPLOADS_AT_ONCE)
        bounds = [place * num_deltas // len(tenants) for place in range(len(tenants) + 1)]

        async def fill(tenant: str, indices: Sequence[int]) -> None:
            for place, index in enumerate(indices):
                async with gate:
                    if place % SECOND_VERSION_EVERY == SECOND_VERSION_EVERY - 1:
                        await self._upload(self.estate.adapters[tenant][-1], index)
                    else:
                        await self._upload_first(tenant, index)

        ranges = [range(low, high) for low, high in pairwise(bounds)]
        await asyncio.gather(*(fill(t, indices) for t, indices in zip(tenants, ranges, strict=True)))
        self._next_index = num_deltas
        for adapter in self.estate.all_adapters():
            if self._draw.random() < SHARED:
                other = self._draw.choice([tenant for tenant in tenants if tenant != adapter.owner])
                adapter.grants[other] = Timeline(False)
                await self._toggle_grant(adapter)

    async def _learn_bare_answers(self, client: httpx.AsyncClient) -> None:
        """Prompts and what each gives before there is any delta, where the best two tokens are never close."""
        for prompt in random_prompts(20 * BARE_PROMPTS, shortest=8, longest=48):
            body = {
                "model": NAME, "prompt": prompt, "max_tokens": BARE_TOKENS, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, "logprobs": 2,
            }  # fmt: skip
            reply = (await client.post("/v1/completions", json=body)).raise_for_status().json()
            choice = reply["choices"][0]
            tops = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
            if min(top[-1] - top[-2] for top in tops) >= SAFE_GAP:
                self.estate.bare[tuple(prompt)] = choice["token_ids"]
            if len(self.estate.bare) == BARE_PROMPTS:
                return
        raise RuntimeError("almost every bare prompt has close logits")

    # -- the run ------------------------------------------------------------------------------------------------

    async def run(self, tokens: int, *, in_flight: int, kills: int) -> None:
        """Ask, change and kill until `tokens` have come and `kills` replicas have died, then let all end."""
        started = time.monotonic()
        due = sorted(self._draw.uniform(0.05, 0.9) * tokens for _ in range(kills))
        stop = asyncio.Event()

        async def work(tenant: str) -> None:
            while self.tally.tokens < tokens or self.tally.kills < kills:
                await self._one(tenant)

        async def until_stopped(turn: Callable[[], Any], every_s: float) -> None:
            while not stop.is_set():
                await asyncio.sleep(every_s)
                await turn()

        async def watch() -> None:
            await self._watch()
            if self.tally.kills < kills and self.tally.tokens >= due[self.tally.kills]:
                await self._kill_one()

        async def report() -> None:
            took = time.monotonic() - started
            speed = self.tally.tokens / max(took, 1e-9)
            wrong = f"{self.tally.wrong} wrong, {len(self.tally.problems)} problems, {self.tally.kills} kills"
            sys.stderr.write(
                f"{took:.0f} s: {self.tally.tokens} of {tokens} tokens, {speed:.0f} tok/s, {wrong}\n"
            )

        tenants = self.estate.tenants
        beside = [
            asyncio.create_task(until_stopped(turn, every_s))
            for turn, every_s in (
                (self._change, CHANGE_EVERY_S), (watch, WATCH_EVERY_S), (report, REPORT_EVERY_S),
            )
        ]  # fmt: skip
        try:
            async with asyncio.TaskGroup() as group:
                for place in range(in_flight):
                    group.create_task(work(tenants[place % len(tenants)]))
            self.tally.seconds = time.monotonic() - started
        finally:
            stop.set()
            for task in beside[2:]:  # it only sleeps; the others may be in the middle of a change
                task.cancel()
            done = await asyncio.gather(*beside, return_exceptions=True)
        for error in done:
            if isinstance(error, Exception):
                raise error
        await self._watch()

    async def _one(self, tenant: str) -> None:
        """Ask one question and judge its answer."""
        question = self.estate.question(tenant)
        self.tally.kinds[question.kind] += 1
        started = time.monotonic()
        try:
            answer = await ask(self._clients[tenant], question)
        except httpx.HTTPError as error:
            self.tally.problem(f"{tenant}, {question.model}: the answer broke off: {type(error).__name__}")
            return
        self.tally.ends[self._judge(question, answer, started)] += 1

    def _judge(self, question: Question, answer: Answer, started: float) -> str:
        """How the request ended, in a word for the table; what was wrong goes to the tally."""
        tally, who = self.tally, f"{question.tenant}, {question.model}"
        allowed = question.allowed(started, answer.known_at)
        tally.tokens += len(answer.token_ids)
        if answer.status == 404 and ABSENT in allowed:
            return "denied"
        if answer.status == 404 or (answer.status == 200 and answer.digest not in allowed):
            tally.problem(
                f"{who}: {answer.status}, digest {answer.digest[:12] or '-'}, not among the allowed"
            )
        self._count_wrong(question, answer)
        if answer.code is not None:
            if answer.code != UNAVAILABLE or not self._after_kill(started):
                tally.problem(f"{who}: {answer.status} {answer.code} without a kill")
            return "broken before its first token" if answer.status != 200 else "broken in mid-stream"
        if question.abandoned and answer.token_ids:
            return "abandoned"
        if not answer.whole or len(answer.token_ids) != question.output_tokens:
            tally.problem(f"{who}: {len(answer.token_ids)} tokens of {question.output_tokens} and no error")
        return "complete"

    def _count_wrong(self, question: Question, answer: Answer) -> None:
        got = answer.token_ids
        if question.adapter is None:
            wrong = [
                t for t, right in zip(got, self.estate.bare[question.prompt], strict=False) if t != right
            ]
            self.tally.bare += len(wrong)
        else:
            # a digest that this soak knows nothing of is a problem already, and signs with nothing
            right = self.estate.signatures.get(answer.digest, -1)
            wrong = [token for token in got if token != right]
            foreign = sum(map(self.estate.is_signature, wrong))
            self.tally.foreign += foreign
            self.tally.base += len(wrong) - foreign
        if wrong:
            self.tally.problem(f"{question.tenant}, {question.model}: {len(wrong)} wrong tokens, {wrong[:3]}")

    # -- what goes on beside -----------------------------------------------------------------------------------

    async def _change(self) -> None:
        """Move an alias, upload a version, or end or renew a grant."""
        draw = self._draw
        idle = [adapter for adapter in self.estate.all_adapters() if not adapter.changing]
        adapter, chance = draw.choice(idle), draw.random()
        adapter.changing = True
        try:
            if chance < 0.2:
                await self._upload(adapter, self._new_index())
            elif chance < 0.5 and adapter.grants:
                await self._toggle_grant(adapter)
            else:
                await self._move_alias(adapter)
        finally:
            adapter.changing = False

    def _new_index(self) -> int:
        """The next delta that is not one of the large ones."""
        while method_of(self._next_index) == HEAD_METHOD:
            self._next_index += 1
        self._next_index += 1
        return self._next_index - 1

    async def _upload_first(self, tenant: str, index: int) -> None:
        adapter = Adapter(tenant, f"delta-{len(self.estate.adapters[tenant])}", [], Timeline(ABSENT))
        await self._upload(adapter, index)
        self.estate.adapters[tenant].append(adapter)

    async def _upload(self, adapter: Adapter, index: int) -> None:
        """Publish delta `index` as the next version."""
        canonical = await asyncio.to_thread(
            lambda: to_canonical(delta_of_any_method(self.backbone, self._head, index))
        )
        self.estate.sign(canonical.digest, signature_of(index))
        files = {"manifest.json": canonical.manifest, "tensors.safetensors": canonical.tensors}
        adapter.latest.send(canonical.digest, started := time.monotonic())
        reply = await self._clients[adapter.owner].put(
            f"/v1/adapters/{adapter.name}/versions", files=[("file", part) for part in files.items()]
        )
        if reply.status_code == 201 and reply.json()["status"] == "ready":
            adapter.latest.acknowledge(time.monotonic())
            adapter.versions.append(canonical.digest)
            self.tally.changes["uploads"] += 1
        elif reply.status_code == 429 or (reply.status_code == 503 and self._after_kill(started)):
            # no room for the admission probe beside what is in use, or nobody to run it
            adapter.latest.refuse()
            self.tally.changes["uploads refused"] += 1
        else:
            self.tally.problem(
                f"upload of {adapter.owner}/{adapter.name}: {reply.status_code} {reply.text[:200]}"
            )

    async def _move_alias(self, adapter: Adapter) -> None:
        version = self._draw.randrange(len(adapter.versions))
        first = adapter.prod is None
        prod = Timeline(ABSENT) if adapter.prod is None else adapter.prod
        prod.send(adapter.versions[version], time.monotonic())
        body = {"version": version + 1, "expected_revision": adapter.prod_revision}
        reply = await self._clients[adapter.owner].put(f"/v1/adapters/{adapter.name}/aliases/prod", json=body)
        adapter.prod_revision = reply.raise_for_status().json()["revision"]
        prod.acknowledge(time.monotonic())
        if first:
            adapter.prod = prod
        self.tally.changes["alias moves"] += 1

    async def _toggle_grant(self, adapter: Adapter) -> None:
        grantee = self._draw.choice(list(adapter.grants))
        timeline = adapter.grants[grantee]
        method = "DELETE" if timeline.value else "PUT"
        timeline.send(not timeline.value, time.monotonic())
        path = f"/v1/adapters/{adapter.name}/grants/{grantee}"
        (await self._clients[adapter.owner].request(method, path)).raise_for_status()
        timeline.acknowledge(time.monotonic())
        self.tally.changes["grants"] += 1

    async def _kill_one(self) -> None:
        """Kill a replica, once all of them serve: the last one's death is another test."""
        assert self.target.replicas is not None
        pids = await asyncio.to_thread(self.target.replicas)
        if len(pids) > 1 and self._reporting == len(pids):
            self._kill_times.append(time.monotonic())
            os.kill(self._draw.choice(pids), signal.SIGKILL)
            self.tally.kills += 1

    def _after_kill(self, started: float) -> bool:
        """Whether a kill may have broken what began at `started` and has just ended."""
        return any(started - BREAKS_FOR_S <= at for at in self._kill_times)

    async def _watch(self) -> None:
        """Add up the replicas' evictions, whose counters die with them."""
        page = (await self._clients[self.estate.tenants[0]].get("/metrics")).raise_for_status().text
        found = re.findall(r"^deltamux_adapter_evictions_total(\{.*\})? (\S+)$", page, re.MULTILINE)
        self._reporting = len(found)
        for labels, text in found:
            before, now = self._counters.get(labels, 0.0), float(text)
            self.tally.evictions += now - before if now >= before else now
            self._counters[labels] = now
