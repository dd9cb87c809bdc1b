"""Text as it becomes certain: characters split over tokens, stop strings split over tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serving.engine.detokenizer import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["hello world, the answer is positive"] * 3, trainer)
    return made


def run(
    tokenizer: Tokenizer, prompt: str, answer: str, stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, tokenizer.encode(prompt).ids, stop)
    pieces = []
    for token in tokenizer.encode(answer).ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces, stream


def test_leading_space_survives(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "the answer is", " positive")
    assert "".join(pieces) == " positive"


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "hello", "漢é🙂")
    assert "".join(pieces) == "漢é🙂"
    assert not any("�" in piece for piece in pieces)
    assert pieces.count("") >= 5


def test_character_that_stays_incomplete_ends_as_in_a_whole_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" ok漢").ids[:-1]
    stream = TextStream(tokenizer, tokenizer.encode("hello").ids, ())
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == tokenizer.decode(ids) == " ok\ufffd"
    assert stream.flush() == ""


def test_special_tokens_make_no_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [5], ())
    assert stream.push(tokenizer.token_to_id("</s>")) == ""


def test_stop_string_over_several_tokens_is_cut_and_never_shown(tokenizer: Tokenizer) -> None:
    pieces, stream = run(tokenizer, "hello", " one STOP two", stop=("STOP",))
    assert stream.stopped
    assert "".join(pieces) == " one "
    assert stream.flush() == ""


def test_what_only_looked_like_a_stop_string_comes_after_all(tokenizer: Tokenizer) -> None:
    pieces, stream = run(tokenizer, "hello", " ST", stop=("STOP",))
    assert "".join(pieces) == " "
    assert stream.flush() == "ST"
    pieces, stream = run(tokenizer, "hello", " STAY", stop=("STOP",))
    assert "".join(pieces) + stream.flush() == " STAY"


def test_earliest_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "hello", " a;b,c", stop=(",", ";"))
    assert "".join(pieces) == " a"
