"""Safe reading: caps before parsing, foreign files recognised, JSON without duplicates, names escaped."""

from __future__ import annotations

import json
import math
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters.errors import InvalidDelta, PayloadTooLarge
from adapters.formats import FORMATS, detect, read_directory, read_upload
from adapters.formats.files import (
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_JSON_DEPTH,
    MAX_TENSORS,
    read_json,
    read_safetensors,
)
from adapters.formats.problems import MAX_LISTED, Problems, quoted
from tests.cases import spec_of, tiny_backbone

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def packed(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], dtype: str = "F32", end: int | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 4 * math.prod(shape) if end is None else end]}


def problem_of(data: bytes) -> str:
    problems = Problems()
    assert read_safetensors(TENSORS, data, problems) is None or problems.texts
    return " | ".join(problems.texts)


def json_problem(text: bytes | str) -> str:
    problems = Problems()
    assert read_json(CONFIG, text.encode() if isinstance(text, str) else text, problems) is None
    (problem,) = problems.texts
    return problem


# ---- safetensors --------------------------------------------------------------------------------------------------


def test_tensors_are_read_and_metadata_is_dropped() -> None:
    problems = Problems()
    stored = {"a": torch.randn(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(1).half()}
    found = read_safetensors(TENSORS, save(stored, metadata={"format": "pt"}), problems)
    assert not problems.texts
    assert found is not None
    assert found.keys() == stored.keys()
    assert all(
        found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in stored.items()
    )


def zipped() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def torch_saved(**options: bool) -> bytes:
    buffer = BytesIO()
    torch.save({"lora_A.weight": torch.ones(8, 8)}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (zipped(), "zip archive"),
        (torch_saved(), "zip archive"),
        (torch_saved(_use_new_zipfile_serialization=False), "a pickle"),
        *[
            (pickle.dumps({"weights": list(range(99))}, protocol=number), "a pickle")
            for number in (2, 3, 4, 5)
        ],
        (b"\x1f\x8b\x08" + bytes(range(99)), "gzip"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 99, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ],
)
def test_foreign_files_are_recognised_and_never_opened(data: bytes, what: str) -> None:
    problem = problem_of(data)
    assert what in problem
    assert "deltamux convert" in problem


def test_a_length_that_looks_like_a_pickle_is_still_a_length() -> None:
    header = (
        json.dumps({"a": entry([1])}).encode().ljust(0x0280)
    )  # bytes 80 02 00 ..., a protocol-2 pickle's start
    assert packed(header).startswith(b"\x80\x02")
    problems = Problems()
    assert read_safetensors(TENSORS, packed(header, b"\0" * 4), problems) is not None
    assert not problems.texts


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"\x00" * 7, struct.pack("<Q", 100) + b"{}", b"plain text, no tensors"]
)
def test_truncated_files(data: bytes) -> None:
    assert "truncated, or not a safetensors file" in problem_of(data)


def test_every_truncation_is_a_problem_not_a_crash() -> None:
    whole = save({"a": torch.ones(3), "b": torch.ones(2)})
    for length in range(len(whole)):
        assert TENSORS in problem_of(whole[:length])


def test_a_header_over_the_cap_is_refused_from_its_length_alone() -> None:
    for data in (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", packed(b" " * (MAX_HEADER_BYTES + 1))):
        with pytest.raises(PayloadTooLarge, match="header"):
            read_safetensors(TENSORS, data, Problems())


def test_a_bomb_of_empty_tensors_is_refused_fast() -> None:
    one = b'"t000000":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    bomb = packed(b"{" + one * 600_000 + b'"last":0}')
    start = time.monotonic()
    with pytest.raises(PayloadTooLarge):
        read_safetensors(TENSORS, bomb, Problems())
    assert time.monotonic() - start < 0.2


def test_too_many_tensors() -> None:
    with pytest.raises(PayloadTooLarge, match=f"{MAX_TENSORS + 1} tensors"):
        read_safetensors(TENSORS, packed({f"{i}": 0 for i in range(MAX_TENSORS + 1)}), Problems())


@pytest.mark.parametrize(
    ("header", "data", "fragment"),
    [
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}', 4, "'a' appears twice"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}',
            4,
            "'shape' appears twice",
        ),
        (b"[]", 0, "expected an object"),
        (b'{"a": NaN}', 0, "NaN"),
        (b"\xff\xff", 0, "not UTF-8"),
        ({"a": {"shape": [1]}}, 0, "no dtype"),
        ({"a": 7}, 0, "no dtype"),
        ({"a": entry([1] * 5)}, 4, "5 dimensions"),
        ({"a": entry([1], "F8_E4M3", 1)}, 1, "unknown dtype"),
        ({"a": entry([1], "F64", 8)}, 8, "'F64' is not served"),
        ({"a": entry([1], "I64", 8)}, 8, "'I64' is not served"),
        ({"": entry([1])}, 4, "printable ASCII"),
        ({"a\n": entry([1])}, 4, "'a\\n'"),
        ({"a\x00b": entry([1])}, 4, "'a\\x00b'"),
        ({"pé": entry([1])}, 4, "'p\\xe9'"),
        ({"n" * 513: entry([1])}, 4, "1 to 512"),
        ({"a": entry([2])}, 4, "do not agree"),
        ({"a": entry([1])}, 8, "do not agree"),
        ({"a": entry([1]), "b": entry([1])}, 4, "do not agree"),
        ({"a": entry([-1])}, 4, "do not agree"),
        ({"a": entry(["1"], end=4)}, 4, "do not agree"),
        ({"a": entry([2**62, 4], end=0)}, 0, "do not agree"),
        ({"a": entry([1]), "__metadata__": {"k": 1}}, 4, "do not agree"),
    ],
)
def test_bad_headers(header: object, data: int, fragment: str) -> None:
    problem = problem_of(packed(header, b"\0" * data))
    assert fragment in problem
    assert problem.isascii()
    assert problem.isprintable()


def test_non_finite_values_are_counted_and_named_not_shown() -> None:
    tensor = torch.tensor([1.25, math.nan, math.inf, -math.inf])
    problem = problem_of(save({"good": torch.ones(1), "bad": tensor}))
    assert "tensor 'bad' has 3 non-finite values" in problem
    assert "1.25" not in problem


def test_an_overflowing_half_is_found() -> None:
    assert "1 non-finite value." in problem_of(save({"a": torch.tensor([1e6]).half()}))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300))
@example(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
def test_random_bytes_never_crash(data: bytes) -> None:
    problems = Problems()
    try:
        found = read_safetensors(TENSORS, data, problems)
    except PayloadTooLarge:
        return
    assert (found is None) == bool(problems.texts)


# ---- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"r": 8, "r": 4}', "'r' appears twice"),
        ('{"a": {"b\\u202e": 1, "b\\u202e": 2}}', "'b\\u202e' appears twice"),
        ('{"lora_alpha": NaN}', "NaN is not a JSON number"),
        ('{"lora_alpha": -Infinity}', "-Infinity is not a JSON number"),
        ('{"lora_alpha": 1e999}', "not finite"),
        ('{"r": ' + "9" * 5000 + "}", "too long"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ('{"\\udfff": 1}', "not valid Unicode"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        ("", "line 1, column 1"),
        ("{'r': 8}", "not valid JSON"),
        ('{"r": 8,}', "not valid JSON"),
        ("[1]", "got a list, expected an object"),
        ("[" * 50_000, "nested deeper"),
        ('{"a":' * 17 + "1" + "}" * 17, f"nested deeper than {MAX_JSON_DEPTH}"),
    ],
)
def test_bad_json(text: bytes | str, fragment: str) -> None:
    problem = json_problem(text)
    assert fragment in problem
    assert f"'{CONFIG}'" in problem
    assert problem.isascii()


def test_json_depth_and_size_at_their_limits() -> None:
    problems = Problems()
    assert read_json(CONFIG, b'{"a":' * MAX_JSON_DEPTH + b"1" + b"}" * MAX_JSON_DEPTH, problems)
    assert read_json(CONFIG, b"{}".ljust(MAX_CONFIG_BYTES), problems) == {}
    assert not problems.texts
    with pytest.raises(PayloadTooLarge):
        read_json(CONFIG, b"{}".ljust(MAX_CONFIG_BYTES + 1), problems)


# ---- names and lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain.name", "'plain.name'"),
        ("a\nb\x1b[31m", "'a\\nb\\x1b[31m'"),
        ("\u202egnp.exe", "'\\u202egnp.exe'"),
        ("x" * 400, "'" + "x" * 80 + "..." + "x" * 80 + "'"),
        ("\ud800", "'\\ud800'"),
    ],
)
def test_quoted(name: str, shown: str) -> None:
    assert quoted(name) == shown


def test_a_long_list_of_problems_is_cut_and_counted() -> None:
    problems = Problems()
    problems.extend(f"problem {index}" for index in range(MAX_LISTED + 7))
    with pytest.raises(InvalidDelta) as caught:
        problems.raise_if_any()
    assert len(caught.value.problems) == MAX_LISTED + 1
    assert caught.value.problems[-1] == "... and 7 more problems."


# ---- which files --------------------------------------------------------------------------------------------------


def test_detect_knows_each_pair() -> None:
    assert [detect([form.config, form.tensors]).name for form in FORMATS] == [
        "PEFT",
        "AdapterHub",
        "canonical",
    ]
    assert detect([CONFIG, TENSORS, "README.md"]).name == "PEFT"


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        ([], ["Got none of them"]),
        ([CONFIG], ["Got adapter_config.json"]),
        ([TENSORS], ["Got adapter_model.safetensors"]),
        (
            [CONFIG, "adapter_model.bin"],
            ["'adapter_model.bin'", "deltamux convert", "safe_serialization=True"],
        ),
        ([CONFIG, TENSORS, "optimizer.pt"], ["'optimizer.pt'", "deltamux convert"]),
        ([CONFIG, TENSORS, "../../etc/passwd"], ["'../../etc/passwd'"]),
        ([CONFIG, TENSORS, "chat_template.jinja"], ["'chat_template.jinja'"]),
        ([CONFIG, TENSORS, "readme.md"], ["'readme.md'"]),
        ([CONFIG, TENSORS, "a\r\nb"], ["'a\\r\\nb'"]),
        ([CONFIG, TENSORS, "adapter.safetensors"], ["different formats"]),
        ([CONFIG, TENSORS, "manifest.json"], ["different formats"]),
        ([CONFIG, "tensors.safetensors"], ["Got adapter_config.json, tensors.safetensors"]),
        (["Adapter_Config.json", TENSORS], ["'Adapter_Config.json'"]),
    ],
)
def test_other_file_sets_are_refused_by_name(names: list[str], fragments: list[str]) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read_upload(dict.fromkeys(names, b""), spec_of(tiny_backbone("llama")))
    assert caught.value.param == "file"
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_problems_of_both_files_come_together() -> None:
    with pytest.raises(InvalidDelta) as caught:
        read_upload({CONFIG: b"{", TENSORS: b"PK\x03\x04" + b"\xff" * 9}, spec_of(tiny_backbone("llama")))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "prepare",
    [
        lambda path: (path / "adapter_model.bin").write_bytes(b"\x80\x02"),
        lambda path: (path / TENSORS).mkdir(),
        lambda path: None,
    ],
)
def test_directories_without_tensors(prepare: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    prepare(tmp_path)
    with pytest.raises(InvalidDelta) as caught:
        read_directory(tmp_path, spec_of(tiny_backbone("llama")))
    assert str(tmp_path) not in str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InvalidDelta, match="directory"):
            read_directory(path, spec_of(tiny_backbone("llama")))
