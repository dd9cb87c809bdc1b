"""What tenants own, as the isolation soak knows it from outside: what a name may stand for, and who may see it.

A change (an alias moves, a grant ends) holds at some moment between its sending and its acknowledgement. So what a
request may meet is every value that held at some moment between the request's sending and its answer, and no other.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from loadtest.signed import FIRST_WORD, TRIGGER
from loadtest.workload import VOCAB_SIZE

T = TypeVar("T")

ABSENT = "absent"
"""In place of a digest: nothing that the caller may know of."""
BARE = "base"
"""In place of a digest: the bare backbone, as `x-adapter-digest` has it."""
NUM_PROMPTS = 64


class Timeline(Generic[T]):
    """A value over time, as far as it can be known from outside. `clock` times are any that only grow."""

    def __init__(self, value: T) -> None:
        self._spans: list[tuple[T, float, float]] = [(value, -math.inf, math.inf)]

    @property
    def value(self) -> T:
        """The last value that was sent."""
        return self._spans[-1][0]

    def send(self, value: T, now: float) -> None:
        """A change is on its way: from now on either value may hold. One change at a time."""
        self._spans.append((value, now, math.inf))

    def acknowledge(self, now: float) -> None:
        """The change holds: what was before does not, from now on."""
        value, since, until = self._spans[-2]
        assert until == math.inf
        self._spans[-2] = (value, since, now)

    def refuse(self) -> None:
        """The change did not happen."""
        self._spans.pop()

    def during(self, start: float, end: float) -> set[T]:
        """Every value that may have held at some moment from `start` to `end`."""
        return {value for value, since, until in self._spans if since <= end and start <= until}


@dataclass(eq=False)
class Adapter:
    """One name of one tenant: digests by version, what `latest` and `prod` stand for, and who else may use it."""

    owner: str
    name: str
    versions: list[str]
    latest: Timeline[str]
    prod: Timeline[str] | None = None
    prod_revision: int = 0
    grants: dict[str, Timeline[bool]] = field(default_factory=dict)
    changing: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """One request before it is sent: who asks for what. `kind` is a word for the table."""

    kind: str
    tenant: str
    model: str
    adapter: Adapter | None
    pinned: str | None
    by_alias: bool
    prompt: tuple[int, ...]
    output_tokens: int
    streamed: bool
    abandoned: bool

    def allowed(self, start: float, end: float) -> set[str]:
        """The digests that it may have met between these times, ABSENT and BARE among them."""
        if self.adapter is None:
            return {BARE}
        visible = {True}
        if self.adapter.owner != self.tenant:
            grant = self.adapter.grants.get(self.tenant)
            visible = grant.during(start, end) if grant else {False}
        found = {ABSENT} if False in visible else set()
        if True in visible:
            found |= self._contents(start, end)
        return found

    def _contents(self, start: float, end: float) -> set[str]:
        assert self.adapter is not None
        if self.pinned is not None:
            return {self.pinned}
        timeline = self.adapter.prod if self.by_alias else self.adapter.latest
        assert timeline is not None
        return timeline.during(start, end)


class Estate:
    """Every tenant's adapters, and questions about them. `signatures`: digest -> token, also of withdrawn contents."""

    def __init__(self, tenants: list[str], *, output_tokens: int, seed: int) -> None:
        self.tenants = tenants
        self.adapters: dict[str, list[Adapter]] = {tenant: [] for tenant in tenants}
        self.signatures: dict[str, int] = {}
        self.bare: dict[tuple[int, ...], list[int]] = {}
        self.draw = random.Random(seed)  # noqa: S311
        self._output_tokens = output_tokens
        # the same prompts for everybody: a prefix cache that mixed two callers up would show
        self._prompts = [self._prompt() for _ in range(NUM_PROMPTS)]
        self._of_signature: set[int] = set()

    def sign(self, digest: str, token: int) -> None:
        """Content `digest` signs with `token`."""
        self.signatures[digest] = token
        self._of_signature.add(token)

    def is_signature(self, token: int) -> bool:
        """Whether some content signs with `token`."""
        return token in self._of_signature

    def all_adapters(self) -> list[Adapter]:
        """Of every tenant."""
        return [adapter for own in self.adapters.values() for adapter in own]

    def question(self, tenant: str) -> Question:
        """A random request of `tenant`: its own deltas by every kind of reference, others' granted and private ones."""
        draw = self.draw
        adapter: Adapter | None
        pinned, by_alias = None, False
        chance = draw.random()
        if chance < 0.08 and self.bare:
            prompt, answer = draw.choice(list(self.bare.items()))
            length = draw.randint(1, len(answer))
            return Question("bare", tenant, BARE, None, None, False, prompt, length, False, False)
        if chance < 0.14:
            owner = draw.choice([other for other in self.tenants if other != tenant])
            adapter = draw.choice([a for a in self.adapters[owner] if tenant not in a.grants])
            kind, model = "private", f"{owner}/{adapter.name}"
        elif chance < 0.26 and (granted := [a for a in self.all_adapters() if tenant in a.grants]):
            adapter = draw.choice(granted)
            kind, model = "granted", f"{adapter.owner}/{adapter.name}"
        else:
            adapter = draw.choice(self.adapters[tenant])
            kind, model = "own", adapter.name
        way = draw.random()
        if way < 0.1:
            pinned = draw.choice(adapter.versions)
            model += f"@sha256:{pinned}"
        elif way < 0.2:
            version = draw.randrange(len(adapter.versions))
            pinned = adapter.versions[version]
            model += f"@v{version + 1}"
        elif way < 0.5 and adapter.prod is not None:
            by_alias = True
            model += ":prod"
        streamed = draw.random() < 0.25
        return Question(
            kind=kind,
            tenant=tenant,
            model=model,
            adapter=adapter,
            pinned=pinned,
            by_alias=by_alias,
            prompt=draw.choice(self._prompts),
            output_tokens=draw.randint(self._output_tokens // 2, self._output_tokens),
            streamed=streamed,
            abandoned=streamed and draw.random() < 0.1,
        )

    def _prompt(self) -> tuple[int, ...]:
        words = (self.draw.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(self.draw.randint(1, 64)))
        return (*words, TRIGGER)
