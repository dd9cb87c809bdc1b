"""`deltamux convert` and `verify` against PEFT: what is converted gives its logits, the rest is refused with why."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    FourierFTConfig,
    LilyConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    PveraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidDelta, Unavailable
from adapters.formats import read_directory
from adapters.formats.peft_refused import REFUSED_METHODS
from adapters.parity import TOLERANCE, read_record
from serving.cli import app
from serving.engine.runner import Runner
from serving.model.placement import place
from serving.offline import convert as converter
from serving.offline import parity, worker
from serving.offline.convert import convert
from serving.offline.job import Job, Result
from serving.offline.reference import run_job
from tests import fidelity
from tests.cases import quiet, randomise, tiny_backbone
from tests.contract.exactness import EFFECT
from tests.contract.forced import Row, run
from tests.contract.task_models import HeadCase
from tests.integration.world import byte_tokenizer
from tests.method_table import TARGETS, Targets
from tests.unit.serving.http_support import FakeBackend, gateway, listening

CONVERTED = (
    "deft", "fourierft", "frod", "glora", "hira", "osf", "peanut", "psoft", "supertuning", "tinylora", "waveft",
)  # fmt: skip
RUNNER = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1"})
LLAMA = TARGETS["llama"]

Config = Callable[[Targets], PeftConfig]


def on_linears(config: type[PeftConfig], **values: Any) -> Config:
    return lambda targets: config(task_type="CAUSAL_LM", target_modules=targets.linears, **values)


FOURIER = on_linears(FourierFTConfig, n_frequency=40)


def cli(*arguments: str | Path) -> Any:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbone")
    tiny_backbone("llama").save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker's jobs here: its process takes seconds to import what the tests have imported."""

    def here(job: Job, report: Callable[[str], object]) -> Result:
        with quiet():
            return worker.run(job)

    monkeypatch.setattr(converter, "run_job", here)
    monkeypatch.setattr(parity, "run_job", here)


def saved(directory: Path, config: Config, *, pickled: bool = False) -> Path:
    """A trained adapter as PEFT leaves it."""
    with quiet():
        adapted = get_peft_model(tiny_backbone("llama"), config(LLAMA))
        randomise(adapted, seed=1)
        adapted.save_pretrained(directory, safe_serialization=not pickled, save_embedding_layers=False)
    return directory


def peft_outputs(directory: Path, tokens: list[int]) -> torch.Tensor:
    with quiet(), torch.no_grad():
        adapted = PeftModel.from_pretrained(tiny_backbone("llama"), directory).eval()
        return adapted(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def served_logits(directory: Path, backbone: Path, tokens: list[int]) -> torch.Tensor:
    """What the server computes from the pair in `directory`."""
    loaded = parity.load(str(backbone))
    stored = to_canonical(read_directory(directory, loaded.spec))
    delta = place(from_canonical(stored.manifest, stored.tensors), stored.digest, loaded)
    row = Row("converted", tokens, len(tokens) // 2, delta)
    run(Runner(loaded, num_slots=1, max_len=32), [row])
    return torch.cat(row.logits)


def test_the_refusal_of_every_converted_method_names_the_converter() -> None:
    named = {method for method, reason in REFUSED_METHODS.items() if "deltamux convert" in reason}
    assert named == {
        "ADAMSS",
        *(name.upper() for name in CONVERTED),
    }  # ADAMSS: measured with scikit-learn only
    types = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    assert [method for method in REFUSED_METHODS if method not in types and method != "MIXED"] == []


def test_every_converted_method_equals_peft_alone_and_mixed(tmp_path: Path) -> None:
    cells = fidelity.measure("llama", "fp32", CONVERTED, tmp_path)
    found = {cell.method: (cell.status, cell.reason) for cell in cells if cell.method in CONVERTED}
    assert found == dict.fromkeys(CONVERTED, ("inside", ""))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("config", "pickled", "form"),
    [
        pytest.param(FOURIER, False, "dense", id="places drawn from a seed"),
        pytest.param(
            on_linears(VeraConfig, r=6, save_projection=False), False, "low rank", id="no projection"
        ),
        pytest.param(on_linears(MissConfig, r=8, init_weights="bat"), False, "dense", id="from base weights"),
        pytest.param(
            on_linears(LoraConfig, r=4, init_lora_weights="pissa"), False, "low rank", id="altered base"
        ),
        pytest.param(on_linears(LoraConfig, r=4, use_dora=True), True, None, id="pickled"),
        pytest.param(
            on_linears(VeraConfig, r=6, save_projection=False), True, "low rank", id="pickled and seed"
        ),
    ],
)
def test_what_is_converted_gives_pefts_logits(
    config: Config, pickled: bool, form: str | None, backbone: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", config, pickled=pickled)
    conversion = convert(source, str(backbone))
    conversion.write(tmp_path / "out")
    assert set(conversion.forms) == ({form} if form else set())
    assert conversion.record.passes
    assert conversion.needed
    tokens = list(range(3, 24))
    expected = peft_outputs(source, tokens)
    scale = max(1.0, float(expected.abs().max()))
    assert (
        float((served_logits(tmp_path / "out", backbone, tokens) - expected).abs().max()) <= TOLERANCE * scale
    )
    bare = tiny_backbone("llama")(input_ids=torch.tensor([tokens])).logits[0].detach()
    assert float((expected - bare).abs().max()) > EFFECT


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        pytest.param(
            on_linears(LilyConfig, r=4), r"q_proj: a token's output depends on the other", id="routed"
        ),
        pytest.param(
            on_linears(PveraConfig, r=5, sample_at_inference=True),
            r"q_proj: it draws random",
            id="stochastic",
        ),
        pytest.param(
            lambda _: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]),
            "trained copy of the whole",
            id="module",
        ),
        pytest.param(
            lambda _: LoraConfig(r=4, target_modules=["embed_tokens"]),
            "Embedding is no linear",
            id="embedding",
        ),
    ],
)
def test_what_is_not_one_affine_change_is_refused_with_both_reasons(
    config: Config, why: str, backbone: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidDelta, match=why) as caught:
        convert(saved(tmp_path, config), str(backbone))
    assert len(caught.value.problems) >= 2  # the reader's own is listed too
    assert len(caught.value.problems) < 12  # not one for each of the modules


@pytest.mark.usefixtures("in_process")
def test_a_change_that_the_probe_missed_shows_in_the_logits(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = converter._changes
    monkeypatch.setattr(converter, "_changes", lambda file: dict(list(read(file).items())[1:]))
    with pytest.raises(InvalidDelta, match="outside of the modules"):
        convert(saved(tmp_path, FOURIER), str(backbone))


@pytest.mark.usefixtures("in_process")
def test_a_tensor_that_is_missing_or_too_many_is_refused(backbone: Path, tmp_path: Path) -> None:
    file = saved(tmp_path, FOURIER) / "adapter_model.safetensors"
    tensors = load_file(file)
    name, tensor = tensors.popitem()
    save_file({**tensors, "base_model.model.model.stray": tensor.clone()}, file)
    with pytest.raises(InvalidDelta) as caught:
        convert(tmp_path, str(backbone))
    assert any(name in problem and "lacks" in problem for problem in caught.value.problems)
    assert any("stray" in problem and "no place" in problem for problem in caught.value.problems)


@pytest.mark.usefixtures("in_process")
def test_changes_over_the_quota_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidDelta, match="over the quota of 10000"):
        convert(saved(tmp_path, FOURIER), str(backbone), quota_bytes=10_000)


class Evil:
    """Pickled, it makes a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("content", ["evil", "damaged", "list"])
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(
    content: str, backbone: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", FOURIER, pickled=True)
    file = source / "adapter_model.bin"
    if content == "damaged":
        file.write_bytes(file.read_bytes()[:200])
    else:
        torch.save({"a": Evil(tmp_path / "ran")} if content == "evil" else [torch.ones(1)], file)
    with pytest.raises(InvalidDelta, match=r"adapter_model\.bin"):
        convert(source, str(backbone))
    assert not (tmp_path / "ran").exists()


def test_the_command_runs_peft_in_a_process_of_its_own(backbone: Path, tmp_path: Path) -> None:
    source, out = saved(tmp_path / "source", FOURIER), tmp_path / "out"
    result = cli("convert", source, out, "--backbone", backbone)
    assert result.exit_code == 0, result.output
    assert "FOURIERFT" in result.output
    assert "9 modules" in result.output
    assert {path.name for path in out.iterdir()} == {"manifest.json", "tensors.safetensors", "parity.json"}
    assert read_record((out / "parity.json").read_text()).passes
    again = cli("convert", source, out, "--backbone", backbone)
    assert again.exit_code == 1
    assert "not an empty directory" in again.output


@pytest.mark.usefixtures("in_process")
def test_verify_prints_a_row_per_prompt_and_writes_the_record(backbone: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", on_linears(LoraConfig, r=4))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo-and-more\n")
    result = cli("verify", source, "--backbone", backbone, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    record = read_record((source / "parity.json").read_text())
    assert [probe.source for probe in record.probes] == ["random"] * len(parity.LENGTHS) + ["file"] * 2
    assert all(f"{probe.prompt_tokens} + {probe.new_tokens}" in result.output for probe in record.probes)
    assert record.error < 2e-5
    loaded = parity.load(str(backbone))
    delta = read_directory(source, loaded.spec, backbone_digest=loaded.spec.digest)
    assert record.delta_digest == to_canonical(delta).digest
    assert record.backbone_digest == loaded.spec.digest


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("wrong", [1e-3, 1.0], ids=["slightly wrong", "other weights"])
def test_verify_notices_a_wrong_delta_and_ends_with_1(wrong: float, backbone: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", FOURIER)
    out = tmp_path / "out"
    convert(source, str(backbone)).write(out)
    good = cli("verify", out, "--reference", source, "--backbone", backbone, "--json")
    assert good.exit_code == 0, good.output
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * (1 + wrong)}, file)
    bad = cli("verify", out, "--reference", source, "--backbone", backbone, "--json")
    assert bad.exit_code == 1
    printed = json.loads(bad.output[bad.output.index("{") :])
    assert printed["passes"] is False
    assert printed["error"] > TOLERANCE
    shown = cli("verify", out, "--reference", source, "--backbone", backbone)
    assert shown.exit_code == 1
    assert "different" in shown.output


def test_verify_says_what_it_can_not_compare(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    result = cli("verify", tmp_path, "--backbone", backbone)
    assert result.exit_code == 1
    assert "--reference" in result.output


@pytest.mark.parametrize("command", ["verify", "convert"])
def test_a_delta_with_a_task_head_is_uploaded_as_it_is(command: str, backbone: Path, tmp_path: Path) -> None:
    HeadCase("llama", "lora", "SEQ_CLS").save(tmp_path / "mood")
    out = [tmp_path / "out"] if command == "convert" else []
    result = cli(command, tmp_path / "mood", *out, "--backbone", backbone)
    assert result.exit_code == 1
    assert "only deltas of language models are compared" in result.output


def test_without_peft_the_remedy_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.offline.reference.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"deltamux\[convert\]"):
        run_job(Job(str(tmp_path), str(tmp_path)), print)


def test_a_worker_that_crashes_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.offline.reference.WORKER", "serving.offline.nothing_here")
    with pytest.raises(Unavailable, match=r"ended with 1: .*nothing_here"):
        run_job(Job(str(tmp_path), str(tmp_path)), print)


@pytest.mark.usefixtures("in_process")
async def test_push_converts_what_the_server_can_not_read_and_sends_the_record(
    backbone: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", FOURIER)
    spec = parity.load(str(backbone)).spec
    async with gateway(tmp_path, FakeBackend(spec=spec)) as g, listening(g.app) as (host, port):
        url = f"http://{host}:{port}"
        plain = await asyncio.to_thread(cli, "push", source, "fourier", "--server", url)
        assert plain.exit_code == 1
        assert "--backbone" in plain.output
        pushed = await asyncio.to_thread(
            cli, "push", source, "fourier", "--server", url, "--backbone", backbone
        )
        assert pushed.exit_code == 0, pushed.output
        assert "its converted form is sent" in pushed.output
        assert "proof: parity" in pushed.output
        version = (await g.http.get("/v1/adapters/fourier/versions/1")).json()
        assert version["proof"]["parity"]["delta_digest"] == version["digest"].removeprefix("sha256:")
        shown = await asyncio.to_thread(cli, "adapters", "show", "fourier", "--server", url)
        assert "greedy text equal" in re.sub(r"[\s│]+", " ", shown.output)  # a long line is wrapped
        lora = saved(tmp_path / "lora", on_linears(LoraConfig, r=4))
        plain = await asyncio.to_thread(cli, "push", lora, "lora", "--server", url, "--backbone", backbone)
        assert plain.exit_code == 0, plain.output
        assert "converted form" not in plain.output
        assert (await g.http.get("/v1/adapters/lora/versions/1")).json()["proof"]["parity"]
