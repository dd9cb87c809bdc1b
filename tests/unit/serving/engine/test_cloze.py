"""Cloze heads around the engine: what is run for a text, and what comes of a call when one of its rows fails."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from adapters.canonical import from_canonical, to_canonical
from adapters.cloze import Cloze
from adapters.errors import InvalidDelta, InvalidRequest
from adapters.formats import read_directory, read_upload
from adapters.store import LocalBlobStore
from adapters.tasks import HeadSpec, Task
from serving.config import Engine as EngineSettings
from serving.core import Event, FailureEvent, GenerateCall, PoolingParams
from serving.engine.backend import LocalBackend
from serving.engine.cloze import ClozePlan
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.heads import PlacedHead
from serving.offline.fit_ood import features, read_data
from tests.cases import ENCODER_GOLDEN_CASES, GOLDEN_NAME
from tests.unit.serving.test_http_encoder import tokenizer, with_head

CLASSIFY = PoolingParams(task=Task.SEQUENCE_CLASSIFICATION)
TEXT = "the tea was not good at all, the cup was great"


@lru_cache
def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's: a word behind a space is another token than at the start, and the mask takes a space with it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        [TEXT, "great good bad", "good", " good", " great", "great", " bad"] * 9, trainer
    )
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token="<mask>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def plan(made: PreTrainedTokenizerFast, *patterns: str, **words: list[str]) -> ClozePlan:
    cloze = Cloze(patterns=patterns, words=tuple(map(tuple, words.values())))
    spec = HeadSpec(pooling="mask", labels=tuple(words), problem_type="single_label", cloze=cloze)
    return ClozePlan(PlacedHead(Task.SEQUENCE_CLASSIFICATION, spec), made)


def test_a_word_is_behind_a_space_where_its_mask_is() -> None:
    made = byte_level()
    spaced, bare = (made(text, add_special_tokens=False)["input_ids"] for text in (" great", "great"))
    assert (len(spaced), len(bare)) == (1, 1)
    assert spaced != bare
    found = plan(made, "{text} It was {mask}.", "({mask}) {text}", up=["great"], down=["bad"])
    wanted = {tuple(spaced), tuple(bare)}
    behind, inside = (row for row in found.rows(TEXT, CLASSIFY, 99) if wanted & set(row.words))
    assert behind.words[0] == tuple(spaced)
    assert inside.words[0] == tuple(bare)
    for row in (behind, inside):
        assert [row.tokens.ids[at] for at in row.masks] == [made.mask_token_id] * len(row.masks)


@pytest.mark.parametrize("room", [9, 12, 14])
def test_the_text_is_cut_and_neither_pattern_nor_mask(room: int) -> None:
    made, pattern = byte_level(), "{text} It was {mask}."
    asked = replace(CLASSIFY, truncate_prompt_tokens=room)
    (row, *_) = plan(made, pattern, up=["great"], down=["good"]).rows(TEXT, asked, 99)
    whole = made(pattern.replace("{text}", TEXT).replace("{mask}", "<mask>"))["input_ids"]
    tail = made(" It was <mask>.")["input_ids"][1:]
    assert len(row.tokens.ids) == room
    assert list(row.tokens.ids) == whole[: room - len(tail)] + tail
    assert row.tokens.ids[row.masks[0]] == made.mask_token_id
    assert len(
        plan(made, pattern, up=["great"], down=["good"]).rows(TEXT, CLASSIFY, 99)[0].tokens.ids
    ) == len(whole)


def test_masks_of_the_text_are_cut_with_it() -> None:
    asked = replace(CLASSIFY, truncate_prompt_tokens=8)
    (row,) = plan(byte_level(), "{text} {mask}", up=["great"], down=["good"]).rows("<mask> " * 20, asked, 99)
    assert row.tokens.ids.count(byte_level().mask_token_id) == 6
    assert row.masks == (6,)


def test_a_tokenizer_that_knows_no_mask_or_no_places_is_refused() -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    for made in (plain, None):
        with pytest.raises(InvalidDelta, match="no tokenizer that knows a mask"):
            plan(made, "{text} {mask}", up=["great"], down=["good"])  # type: ignore[arg-type]


def test_words_of_two_labels_that_are_the_same_tokens_are_refused() -> None:
    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()), mask_token="<mask>"
    )
    from tokenizers import normalizers  # noqa: PLC0415

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InvalidDelta, match="same tokens as a word of 'up'"):
        plan(lower, "{text} {mask}", up=["good"], down=["Good"])


CLOZE = {"patterns": ["{text} {mask} .", "{mask} , {text}"], "verbalizer": {"y": ["a", "bcd"], "n": ["xy"]}}


def backbone() -> Backbone:
    return adopt_backbone(with_head(), name="tiny", tokenizer=tokenizer(), device="cpu", dtype="float32")


async def events_of(backend: LocalBackend, digest: str, text: str) -> list[Event]:
    call = GenerateCall(request_id="c", prompt=text, adapter_digest=digest, pooling=CLASSIFY)
    return [event async for batch in backend.generate(call) for event in batch]


@pytest.mark.parametrize(
    ("settings", "text", "kind"),
    [
        ({"max_queue": 1, "max_num_seqs": 1}, "a b c", "Overloaded"),
        ({"max_model_len": 8}, "a b c", "ContextLengthExceeded"),
        ({}, "", "InvalidRequest"),
    ],
)
async def test_a_call_of_which_one_row_is_refused_ends_once_and_holds_nothing(
    tmp_path: Path, settings: dict[str, Any], text: str, kind: str
) -> None:
    served = backbone()
    pair = to_canonical(read_upload({"head.json": json.dumps({"cloze": CLOZE}).encode()}, served.spec))
    store = LocalBlobStore(tmp_path)
    store.put(pair.digest, pair.manifest, pair.tensors)
    backend = LocalBackend(served, store, EngineSettings(**settings))
    backend.start()
    try:
        (event,) = await events_of(backend, pair.digest, text)
        assert isinstance(event, FailureEvent)
        assert event.error.kind == kind
        async with asyncio.timeout(20):
            while backend.engine._live or not backend.engine._inbox.empty():
                await asyncio.sleep(0.01)
        assert backend._queues == {}
        assert backend.engine.deltas.residency.leases(pair.digest) == 0
    finally:
        await asyncio.to_thread(backend.stop)


async def test_a_call_that_is_given_up_takes_its_rows_with_it(tmp_path: Path) -> None:
    served = backbone()
    pair = to_canonical(read_upload({"head.json": json.dumps({"cloze": CLOZE}).encode()}, served.spec))
    store = LocalBlobStore(tmp_path)
    store.put(pair.digest, pair.manifest, pair.tensors)
    backend = LocalBackend(
        served, store, EngineSettings()
    )  # its engine does not run: nothing is ever answered
    backend._loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(events_of(backend, pair.digest, "a b"))
    async with asyncio.timeout(20):
        while len(backend._queues) < 6:  # two patterns, words of one to three tokens
            await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert backend._queues == {}
    while not backend.engine._inbox.empty():
        backend.engine._inbox.get()()
    assert backend.engine._live == {}


def test_statistics_are_fitted_of_what_a_cloze_is_told_by(tmp_path: Path) -> None:
    served = backbone()
    (tmp_path / "head.json").write_text(json.dumps({"cloze": CLOZE}))
    (tmp_path / "texts.jsonl").write_text('{"text": "a b", "label": "y"}\n{"text": "c", "label": "n"}\n')
    delta = read_directory(tmp_path, served.spec)
    vectors = list(features(delta, served, list(read_data(tmp_path / "texts.jsonl", ("y", "n")))))
    for vector, text in zip(vectors, ("a b", "c"), strict=True):
        wanted = []
        for pattern in CLOZE["patterns"]:
            for k in (1, 2, 3):
                filled = pattern.replace("{mask}", "[MASK]" * k).replace("{text}", text)  # type: ignore[attr-defined]
                ids = tokenizer()(filled, return_tensors="pt")["input_ids"]
                states = with_head().bert(ids).last_hidden_state[0].detach()
                wanted.append(states[ids[0] == tokenizer().mask_token_id].mean(dim=0))
        mean = sum(wanted) / len(wanted)
        assert float((vector - mean).abs().max()) <= 2e-5 * float(mean.abs().max())


def test_a_cloze_stands_on_an_adapterhub_adapter_and_keeps_its_bytes() -> None:
    case = next(c for c in ENCODER_GOLDEN_CASES if (c.family, c.name) == ("bert", "seq_bn"))
    spec = adopt_backbone(case.backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32").spec
    names = ("adapter_config.json", "adapter.safetensors")
    files = {name: (case.directory / name).read_bytes() for name in names}
    head = {"head.json": json.dumps({"cloze": CLOZE | {"weights": [1, 3]}}).encode()}
    delta, plain = read_upload(files | head, spec), read_upload(files, spec)
    assert len(delta.ops) == len(plain.ops)
    pair = to_canonical(delta)
    again = from_canonical(pair.manifest, pair.tensors)
    assert again.head == delta.head
    assert to_canonical(again).digest == pair.digest != to_canonical(plain).digest


@pytest.mark.parametrize(
    "broken",
    [
        {"patterns": "{text} {mask}", "words": [["a"], ["b"]]},
        {"patterns": [1], "words": [["a"], ["b"]]},
        {"patterns": ["{text} {mask}"], "words": [["a"], [2]]},
        {"patterns": ["{text} {mask}"], "words": [["a"], ["b"]], "weights": ["1"]},
        {"patterns": ["{text} {mask}"], "words": [["a"], ["b"]], "more": 1},
        {"patterns": ["{text} {mask}"], "words": [["a"], "b"]},
        {"patterns": [["{text} {mask}"]], "words": [[["a"]], [{"b": 1}]], "weights": [None]},
        "{text} {mask}",
    ],
)
def test_a_canonical_cloze_of_another_shape_is_refused(broken: Any) -> None:
    spec = backbone().spec
    pair = to_canonical(read_upload({"head.json": json.dumps({"cloze": CLOZE}).encode()}, spec))
    manifest = json.loads(pair.manifest)
    manifest["head"]["cloze"] = broken
    files = {"manifest.json": json.dumps(manifest).encode(), "tensors.safetensors": pair.tensors}
    with pytest.raises(InvalidRequest):
        read_upload(files, spec)
