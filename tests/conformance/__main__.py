"""Everything that `/openapi.json` describes, called tens of thousands of times: does any call break the server?

    python -m tests.conformance [--calls 50000] [--seed N]

schemathesis makes the calls, in all its phases: the documented examples, each boundary of each parameter (coverage),
random valid and invalid input (fuzzing), and chains that follow the documented links (stateful). No answer may be a
5xx; each has a documented status, a body of the documented shape and content type; invalid input is refused, a
request without its key too; a method that a path does not take is a 405 that names those it takes; what was deleted is
gone, what was created is there. After each round the server must answer as before.

Left out is schemathesis's wish that whatever fits the schema be accepted: a name's grammar, a delta's bytes and the
ranges of sampling parameters are not in it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from schemathesis import GenerationMode, engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events
from schemathesis.engine.recorder import ScenarioRecorder

from serving.http.openapi import EXAMPLES
from tests.conformance.server import CALLER, CONTEXT, Server, running
from tests.unit.serving.engine_gateway import make_backbone
from tests.unit.serving.http_support import BACKBONE

PHASES = ("examples", "coverage", "fuzzing", "stateful")
MAX_RESPONSE_S = 30.0
UPLOAD = "/v1/adapters/{name}/versions"
POLICY = "/v1/signature_policy"
GENERATE = ("/v1/completions", "/v1/chat/completions")
KNOWN: Mapping[str, Sequence[object]] = {
    **{f"path.{name}": [value] for name, value in EXAMPLES.items()},
    "body.model": [EXAMPLES["name"], EXAMPLES["model"], BACKBONE],
    "body.tenant": [CALLER],
    "body.version": [1, 2],
    "body.max_tokens": [1, 3],
    "body.max_completion_tokens": [1, 3],
    "body.n": [1, 2],
    "body.temperature": [0, 0.7],
    "body.top_p": [0.5, 1],
    "body.min_p": [0, 0.1],
    "body.repetition_penalty": [1, 1.2],
    "body.presence_penalty": [0, 1],
    "body.frequency_penalty": [0, 1],
}
"""Parameters -> values that exist or that are in range; half of the calls have them."""


class Broken(AssertionError):
    """A promise does not hold; the text has the calls that show it."""


@dataclass
class Tally:
    """What has been called so far, and what was answered."""

    calls: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    called: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, phase: str, recorder: ScenarioRecorder) -> None:
        """Count the calls of a scenario and keep the first failure of each kind."""
        for case_id, interaction in recorder.interactions.items():
            self.calls[phase] += 1
            label = recorder.cases[case_id].value.operation.label
            self.called.add(label)
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
                if interaction.response.status_code < 300:
                    self.accepted.add(label)
        for case_id, checks in recorder.checks.items():
            for check in checks:
                if (info := check.failure_info) is not None:
                    self.failures.setdefault(
                        (check.name, recorder.cases[case_id].value.operation.label),
                        f"{info.failure.title}: {info.failure.message}\n{info.code_sample}",
                    )


def round_of_calls(
    server: Server, seed: int, num_examples: int, tally: Tally, phases: Sequence[str] = PHASES
) -> None:
    """Every phase once, with `num_examples` random calls of each operation, and as many chains."""
    document = httpx.get(f"{server.url}/openapi.json").raise_for_status().json()
    known = {**KNOWN, "path.key_id": [server.other_key_id]}
    generation = {"max-examples": num_examples, "database": "none", "with-security-parameters": False}
    config = SchemathesisConfig.from_dict(
        {
            "base-url": server.url,
            "auth": {"openapi": {"API key": {"bearer": server.key}}},
            "seed": seed,
            "request-timeout": MAX_RESPONSE_S,
            "continue-on-failure": True,
            "generation": generation,
            "checks": {"positive_data_acceptance": {"enabled": False}},
            "phases": {phase: {"enabled": phase in phases} for phase in PHASES},
            "dictionaries": {name: {"values": list(values)} for name, values in known.items()},
            "parameters": {name: {"dictionary": name, "probability": 0.5} for name in known},
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    with calls_made_useful(server, seed):
        for event in engine.from_schema(schema).execute():
            match event:
                case events.ScenarioFinished():
                    tally.add(event.phase.value, event.recorder)
                case events.NonFatalError() | events.FatalError():
                    raise Broken(f"schemathesis: {event}")


@contextmanager
def calls_made_useful(server: Server, seed: int) -> Iterator[None]:
    """Half of the uploads carry a delta that can be served; a quarter of what generates streams; and none of the calls
    shuts their own caller out.
    """
    chooser = random.Random(seed)
    own = {CALLER, server.key_id}

    def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
        positive = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
        if case.operation.path == UPLOAD and case.method == "PUT" and positive and chooser.random() < 0.5:
            kwargs["files"] = chooser.choice(server.uploads)
        if (
            case.operation.path in GENERATE
            and isinstance(case.body, dict)
            and positive
            and chooser.random() < 0.25
        ):
            kwargs["json"] = case.body = case.body | {"stream": True}
        if case.operation.path == POLICY and isinstance(case.body, dict):
            kwargs["json"] = case.body = case.body | {"require_signature": False}
        if case.operation.path.startswith("/v1/admin") and own & set(map(str, case.path_parameters.values())):
            case.path_parameters = dict.fromkeys(case.path_parameters, "0")

    schemathesis.hook(before_call)
    try:
        yield
    finally:
        schemathesis.hooks.unregister(before_call)


def run(
    calls: int,
    *,
    seed: int = 0,
    phases: Sequence[str] = PHASES,
    report: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Rounds, each with a server of its own, until there were so many calls. Raises Broken."""
    tally, backbone = Tally(), make_backbone(CONTEXT)
    num_examples = min(calls // 60, 100)
    while (done := tally.calls.total()) < calls:
        with (
            tempfile.TemporaryDirectory(prefix="conformance-") as home,
            running(Path(home), backbone) as server,
        ):
            before = server.answer()
            round_of_calls(server, seed, num_examples, tally, phases)
            if tally.failures:
                raise Broken("\n\n".join(f"{key}: {text}" for key, text in tally.failures.items()))
            if (after := server.answer()) != before:
                raise Broken(f"after round {seed} the server answers {after}, before it {before}")
        seed += 1
        report(tally.calls.total())
        if tally.calls.total() == done:
            raise Broken("a round without calls")
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    tally = run(
        given.calls,
        seed=given.seed,
        report=lambda done: print(f"{done} calls, {time.monotonic() - began:.0f} s", flush=True),
    )
    print("calls by phase:", dict(tally.calls))
    print("answers by status:", dict(sorted(tally.statuses.items())))
    print("never accepted:", ", ".join(sorted(tally.called - tally.accepted)) or "none")
    print(
        f"{tally.calls.total()} calls of {len(tally.called)} operations: 0 answers of 5xx, 0 undocumented "
        f"({time.monotonic() - began:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
