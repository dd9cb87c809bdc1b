"""Beam search against `generate` of transformers and PEFT, each request alone there and all in one batch here."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType
from transformers import PreTrainedModel

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidRequest
from adapters.formats import read_directory
from adapters.normal_form import AttnPrefix, Delta
from serving.core import BeamParams, FinishReason, PromptEvent, TokenEvent
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import Case, quiet, tiny_backbone
from tests.families import Family
from tests.unit.serving.engine.engine_support import BLOCK_BYTES, Bench, low_rank, tiny

ENDS = tuple(range(2, 97, 8))
CASES = (
    Case(
        "lora",
        "llama",
        lambda: LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    ),
    Case(
        "lora on all",
        "llama",
        lambda: LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules="all-linear"),
        seed=2,
    ),
    Case("prefix", "llama", lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)),
)
DIGESTS = (None, *(case.name for case in CASES))


def peaked(family: Family) -> PreTrainedModel:
    """A tiny model whose distributions are far from even, so that no two hypotheses are almost worth the same."""
    model = tiny_backbone(family)
    head = model.get_output_embeddings()
    draw = torch.Generator().manual_seed(8)
    head.weight = torch.nn.Parameter(
        0.6 * torch.randn(head.weight.shape, generator=draw)
    )  # not tied any more
    model.config.tie_word_embeddings = False
    model.generation_config.eos_token_id = None  # the tests choose
    return model


@cache
def served(family: Family) -> Backbone:
    return adopt_backbone(peaked(family), name="tiny", device="cpu", dtype="float32")


def ragged(count: int, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    draw = random.Random(5)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [[draw.randrange(97) for _ in range(length)] for length in lengths]


def generated(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], ends: Sequence[int], **options: Any
) -> list[list[int]]:
    """The hypotheses of the reference, without prompt and padding."""
    ids = torch.tensor([prompt])
    with torch.no_grad(), quiet():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=96,
            **options,
        )
    answers = []
    for row in found[:, len(prompt) :].tolist():
        stop = next((at for at, token in enumerate(row) if token in ends), len(row))
        answers.append(row[: stop + 1])
    return answers


def ask(
    bench: Bench,
    name: str,
    prompt: Sequence[int],
    digest: str | None = None,
    *,
    ends: Sequence[int] = (),
    **beams: Any,
) -> None:
    """Submit a search of four beams that gives all of them, unless `beams` say otherwise."""
    tokens = beams.pop("max_tokens", 12)
    params = BeamParams(**{"width": 4, "num_returned": 4} | beams)
    bench.submit(name, prompt, digest, beams=params, stop_token_ids=tuple(ends), max_tokens=tokens)


def found(bench: Bench, name: str) -> list[list[int]]:
    end = bench.terminal(name)
    assert end.hypotheses, end.error
    assert end.finish_reason is end.hypotheses[0].finish_reason
    return [list(hypothesis.token_ids) for hypothesis in end.hypotheses]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hypotheses_are_those_of_transformers(family: Family, early_stopping: bool | str) -> None:
    model, bench = peaked(family), Bench(served(family), {})
    settings = [(penalty, ends) for penalty in (-1.0, 0.0, 1.0, 2.5) for ends in ((), ENDS)]
    calls = {
        f"{penalty} {ends} {place}": (prompt, penalty, ends)
        for place, prompt in enumerate(ragged(6, 3)[4:])  # of which every setting finds something else
        for penalty, ends in settings
    }
    for name, (prompt, penalty, ends) in calls.items():
        ask(
            bench,
            name,
            prompt,
            ends=ends,
            max_tokens=20,
            length_penalty=penalty,
            early_stopping=early_stopping,
        )
    bench.run()
    lengths = set()
    for name, (prompt, penalty, ends) in calls.items():
        expected = generated(
            model,
            prompt,
            ends,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=penalty,
            early_stopping=early_stopping,
            max_new_tokens=20,
        )
        assert found(bench, name) == expected, name
        for hypothesis in bench.terminal(name).hypotheses:
            ended = hypothesis.token_ids[-1] in ends
            assert hypothesis.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            lengths.add(len(hypothesis.token_ids))
    assert len(lengths) > 2, "hardly anything ended early"
    bench.assert_nothing_held()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Delta], Mapping[str | None, Any]]:
    """Deltas as uploads, and the reference's models."""
    deltas, models = {}, {None: peaked("llama")}
    for case in CASES:
        directory = tmp_path_factory.mktemp(case.name.replace(" ", "-"))
        models[case.name] = case.save(directory, peaked("llama"))
        pair = to_canonical(read_directory(directory, served("llama").spec))
        deltas[case.name] = from_canonical(pair.manifest, pair.tensors)
    return deltas, models


def test_ragged_prompts_with_mixed_deltas_in_one_batch_equal_each_alone_under_peft(
    adapted: tuple[dict[str, Delta], Mapping[str | None, Any]],
) -> None:
    deltas, models = adapted
    bench = Bench(served("llama"), deltas, max_num_seqs=128, max_num_batched_tokens=300)
    calls = [(str(at), prompt, DIGESTS[at % len(DIGESTS)]) for at, prompt in enumerate(ragged(32))]
    for name, prompt, digest in calls:
        ask(bench, name, prompt, digest, ends=ENDS, num_returned=2)
    bench.run(until=lambda: len(bench.engine.scheduler.running) == 128)
    bench.run()
    for name, prompt, digest in calls:
        expected = generated(
            models[digest], prompt, ENDS, num_beams=4, num_return_sequences=2, max_new_tokens=12
        )
        assert found(bench, name) == expected, (name, digest)
    bare = [generated(models[None], prompt, ENDS, num_beams=4, max_new_tokens=12) for _, prompt, _ in calls]
    changed = [found(bench, name)[:1] != bare[at] for at, (name, _, digest) in enumerate(calls) if digest]
    assert sum(changed) > 20, "the deltas hardly matter"
    bench.assert_nothing_held(*deltas)


def test_searches_and_draws_in_one_batch_do_not_see_one_another(
    adapted: tuple[dict[str, Delta], Mapping[str | None, Any]],
) -> None:
    deltas, _ = adapted
    calls = [(str(at), prompt, DIGESTS[at % len(DIGESTS)]) for at, prompt in enumerate(ragged(12))]

    def submit(bench: Bench, at: int) -> None:
        name, prompt, digest = calls[at]
        if at % 2:
            ask(bench, name, prompt, digest, ends=ENDS)
        else:
            bench.submit(name, prompt, digest, temperature=1.0, seed=at, max_tokens=12)

    def answer(bench: Bench, at: int) -> list[Any]:
        return found(bench, str(at)) if at % 2 else bench.tokens(str(at))

    alone = []
    for at in range(12):
        bench = Bench(served("llama"), deltas)
        submit(bench, at)
        bench.run()
        alone.append(answer(bench, at))
    for settings in ({}, {"max_num_batched_tokens": 9, "max_num_seqs": 7}):
        together = Bench(served("llama"), deltas, **settings)
        for at in range(12):
            submit(together, at)
        together.run()
        assert [answer(together, at) for at in range(12)] == alone


def test_a_preempted_search_goes_on_from_its_beams(
    adapted: tuple[dict[str, Delta], Mapping[str | None, Any]],
) -> None:
    deltas, _ = adapted
    calls = [(str(at), prompt, DIGESTS[at % len(DIGESTS)]) for at, prompt in enumerate(ragged(8, 14, 17))]

    def answers(**settings: Any) -> tuple[Bench, list[list[list[int]]]]:
        bench = Bench(served("llama"), deltas, **settings)
        for name, prompt, digest in calls:
            ask(bench, name, prompt, digest, max_tokens=40)
        bench.run()
        bench.assert_nothing_held(*deltas)
        return bench, [found(bench, name) for name, _, _ in calls]

    _, expected = answers(max_num_seqs=32, prefix_cache="off")
    room = 26 * BLOCK_BYTES + 4 * max(delta.size_bytes for delta in deltas.values())
    for settings in ({"prefix_cache": "off"}, {"max_num_batched_tokens": 11}):
        bench, got = answers(max_num_seqs=32, memory_bytes=room, **settings)
        assert bench.engine.scheduler.num_preemptions > 0
        assert got == expected


def test_prompts_are_shared_with_searches_and_by_them(backbone: Backbone) -> None:
    prompt = [(5 * at + at * at) % 97 for at in range(3 * BLOCK_TOKENS + 1)]
    bench, alone = Bench(backbone, {}), Bench(backbone, {}, prefix_cache="off")
    for at, cut in enumerate((0, 0, 5, 17)):
        asked = prompt[: len(prompt) - cut]
        for each in (bench, alone):
            ask(each, str(at), asked)
            each.run()
            each.submit(f"greedy {at}", asked)
            each.run()
        assert found(bench, str(at)) == found(alone, str(at))
        assert bench.tokens(f"greedy {at}") == alone.tokens(f"greedy {at}")
    cached = [event.num_cached_tokens for _, event in bench.events if isinstance(event, PromptEvent)]
    assert cached == [0, *[3 * BLOCK_TOKENS] * 3, *[2 * BLOCK_TOKENS] * 2, *[BLOCK_TOKENS] * 2]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


def test_beams_that_changed_places_are_never_taken_for_a_prefix(backbone: Backbone) -> None:
    """What follows the prompt in a row's slot is another beam's from one step to the next."""
    bench, alone = Bench(backbone, {}), Bench(backbone, {}, prefix_cache="off")
    prompt = list(range(BLOCK_TOKENS))
    ask(bench, "search", prompt, max_tokens=40)
    bench.run()
    for at, beam in enumerate(found(bench, "search")):
        turn = [*prompt, *beam, 5]
        for each in (bench, alone):
            each.submit(str(at), turn)
            ask(each, f"search {at}", turn)
            each.run()
        assert bench.tokens(str(at)) == alone.tokens(str(at))
        assert found(bench, f"search {at}") == found(alone, f"search {at}")


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_cancelling_frees_all_rows(backbone: Backbone, steps: int) -> None:
    bench = Bench(backbone, {"d": low_rank(backbone, 1)}, max_num_batched_tokens=8)
    bench.engine.deltas.prefetch("d")
    ask(bench, "a", range(20), "d", max_tokens=100)
    bench.run(until=lambda: len(bench.engine.scheduler.running) == 4)
    for _ in range(steps):
        bench.engine.step()
    bench.engine.cancel("a")
    bench.engine.step()
    assert bench.terminal("a").finish_reason is FinishReason.CANCELLED
    assert bench.engine.scheduler.kv.num_free_slots == bench.engine.runner.cache.num_slots
    bench.assert_nothing_held("d")


def test_a_search_waits_until_there_is_room_for_all_its_rows(backbone: Backbone) -> None:
    bench = Bench(backbone, {}, max_num_seqs=4)
    bench.submit("single", [1, 2], max_tokens=5)
    bench.engine.step()
    ask(bench, "search", [3, 4])
    bench.submit("later", [5, 6])
    bench.run(until=lambda: bool(bench.tokens("single")) and not bench.engine._live.get("single"))
    assert not bench.tokens("later"), "it went before the search"
    bench.run()
    assert len(found(bench, "search")) == 4
    assert len(bench.tokens("later")) == 6


def test_memory_and_context_bound_the_length_of_every_row(backbone: Backbone) -> None:
    bench = Bench(backbone, {}, memory_bytes=4 * 2 * BLOCK_BYTES)
    ask(bench, "a", range(20), max_tokens=None)
    bench.run()
    assert [len(beam) for beam in found(bench, "a")] == [2 * BLOCK_TOKENS - 20] * 4
    assert {h.finish_reason for h in bench.terminal("a").hypotheses} == {FinishReason.LENGTH}
    assert bench.engine.scheduler.num_preemptions == 0
    ask(bench, "b", range(20), max_tokens=13)
    bench.run()
    error = bench.terminal("b").error
    assert error is not None
    assert error.kind == "ContextLengthExceeded"


def test_more_beams_than_the_batch_has_rows_are_refused(backbone: Backbone) -> None:
    for settings in ({"max_num_seqs": 3}, {"max_num_batched_tokens": 3}):
        bench = Bench(backbone, {}, **settings)
        with pytest.raises(InvalidRequest, match="room for 3"):
            ask(bench, "a", [1, 2])


def test_numbers_that_are_not_finite_end_the_search_and_wipe_its_slots(backbone: Backbone) -> None:
    poison = Delta(
        method="PREFIX_TUNING",
        ops=tuple(
            AttnPrefix(layer=i, key=torch.zeros(20, 2, 8), value=torch.full((20, 2, 8), torch.nan))
            for i in range(3)
        ),
        backbone_digest=backbone.spec.digest,
    )
    bench, healthy = Bench(backbone, {"bad": poison}), Bench(backbone, {})
    ask(bench, "bad", [1, 2], "bad")
    bench.run()
    assert bench.terminal("bad").finish_reason is FinishReason.ERROR
    for each in (bench, healthy):
        ask(each, "next", range(25))
        each.run()
    assert found(bench, "next") == found(healthy, "next")


def test_text_prompt_logprobs_and_work_are_reported(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    beams = BeamParams(width=4, num_returned=3)
    bench.submit("a", range(20), beams=beams, prompt_logprobs=2, max_tokens=7)
    bench.submit("b", range(20), prompt_logprobs=2, max_tokens=7)
    bench.run()
    prompts = {name: event for name, event in bench.events if isinstance(event, PromptEvent)}
    assert prompts["a"].logprobs is not None
    assert prompts["b"].logprobs is not None
    for ours, plain in zip(prompts["a"].logprobs[1:], prompts["b"].logprobs[1:], strict=True):
        assert ours is not None
        assert plain is not None
        assert ours.chosen.logprob == pytest.approx(plain.chosen.logprob, abs=1e-4)
    searched = [e.num_searched for name, e in bench.events if name == "a" and isinstance(e, TokenEvent)]
    assert searched == [4] * 7
    assert bench.engine.metrics.generated_tokens._value.get() == 4 * 7 + 7
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    for hypothesis in bench.terminal("a").hypotheses:
        assert hypothesis.text == tokenizer.decode(hypothesis.token_ids)
