"""How much memory a server takes for a large upload.

    python -m tests.uploads_memory [--megabytes 600] [--part-mib 64] [--limit 150]

Starts a real server over a small wide backbone, makes a LoRA of that many megabytes, sends it with the unmodified
openai SDK and publishes it. Every process of the server is watched: its peak resident memory (VmHWM,
reset before the upload) and, every 20 ms, its anonymous memory, which unlike mapped files the kernel can't take back.
The backbone's replica then also has the delta itself, in its host tier and on its device (the proof says how many
bytes); those are within `engine.host_cache_bytes` and `engine.memory_bytes` and are counted apart. A small delta is
sent the same way first, so that what the first upload of a server loads is not counted. The total is the sum of
proportional set sizes (memory that processes share counts once), sampled every 50 ms; the last lines add peaks that
need not have been at one time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import openai
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.support import ServerProcess
from tests.integration.world import byte_tokenizer

MB = 1e6
HIDDEN, INNER, LAYERS = 512, 2048, 4
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
SAMPLE_S, TOTAL_SAMPLE_S = 0.02, 0.05


@dataclass
class Memory:
    """One process, in bytes: resident before, its peak since, anonymous before, and the most seen since."""

    role: str
    before: int
    anonymous_before: int
    peak: int = 0
    anonymous_peak: int = 0


@dataclass
class Report:
    """What an upload took. `processes`: by pid."""

    file_bytes: int
    seconds: dict[str, float]
    processes: dict[int, Memory]
    version: dict[str, Any]
    total_before: int
    total_peak: int
    after_parts: dict[int, int] = field(default_factory=dict)

    @property
    def in_delta(self) -> int:
        """Bytes of the delta itself in the replica that admitted it."""
        return int(self.version["proof"]["host_bytes"] + self.version["proof"]["device_bytes"])

    @property
    def total_growth(self) -> int:
        """Growth of the whole server at its peak, the delta itself apart."""
        return self.total_peak - self.total_before - self.in_delta

    def growth(self, *, anonymous: bool) -> int:
        """Growth of all processes together, the delta itself apart; their peaks need not be at one time."""
        if anonymous:
            total = sum(max(0, m.anonymous_peak - m.anonymous_before) for m in self.processes.values())
        else:
            total = sum(max(0, m.peak - m.before) for m in self.processes.values())
        return total - self.in_delta


def make_backbone(directory: Path) -> None:
    """A small Llama of random numbers whose linears are wide."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def make_delta(directory: Path, megabytes: int) -> None:
    """A PEFT LoRA on every linear, of a rank that makes so many megabytes."""
    per_rank = 4 * LAYERS * sum(d_in + d_out for d_in, d_out in WIDTHS.values())
    rank = round(megabytes * MB / per_rank)
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for name, (d_in, d_out) in WIDTHS.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, d_in, generator=draw) * 0.02
            tensors[f"{key}B.weight"] = torch.randn(d_out, rank, generator=draw) * 0.02
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rpartition(".")[2] for name in WIDTHS],
        "base_model_name_or_path": "wide",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")


def status(pid: int) -> dict[str, int]:
    """Sizes of a process in bytes, by the kernel's names; empty where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in sizes}


def role(command: str) -> str:
    """What a process of the server does."""
    for name in ("ServeReplica:deltamux:gateway", "ServeReplica:deltamux:backbone", "ProxyActor"):
        if name in command:
            return name.rpartition(":")[2]
    return command.strip().split(" ")[0].rpartition("/")[2][:40]


def total(pids: Iterable[int]) -> int:
    """Sum of the proportional set sizes."""
    found = 0
    for pid in pids:
        with suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return found


class Watch:
    """Every process of the server: sizes before, and their peaks while the block runs."""

    def __init__(self, server: ServerProcess) -> None:
        self.processes: dict[int, Memory] = {}
        for pid, command in server.processes().items():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
            sizes = status(pid)
            self.processes[pid] = Memory(role(command), sizes["VmRSS"], sizes["RssAnon"])
        self.total_before = self.total_peak = total(self.processes)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._sample, self._sample_total)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for pid, memory in self.processes.items():
            memory.peak = status(pid).get("VmHWM", memory.before)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            for pid, memory in self.processes.items():
                memory.anonymous_peak = max(memory.anonymous_peak, status(pid).get("RssAnon", 0))

    def _sample_total(self) -> None:
        while not self._ended.wait(TOTAL_SAMPLE_S):
            self.total_peak = max(self.total_peak, total(self.processes))


def send(client: openai.OpenAI, delta: Path, part_bytes: int) -> list[str]:
    """Send the two files of a delta as the SDK does; their ids."""
    ids = []
    for path in sorted(delta.iterdir()):
        md5 = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                md5.update(data)
        upload = client.uploads.upload_file_chunked(
            file=path,
            mime_type="application/octet-stream",
            purpose="user_data",
            md5=md5.hexdigest(),
            part_size=part_bytes,
        )
        assert upload.file is not None
        ids.append(upload.file.id)
    return ids


def measure(megabytes: int, part_bytes: int, root: Path) -> Report:
    """Start a server below `root`, upload, and end it."""
    make_backbone(root / "wide")
    make_delta(root / "small", 2)
    make_delta(root / "large", megabytes)
    server = ServerProcess(root / "wide", root / "home")
    server.start()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
            client.put(
                "/adapters/small/versions",
                cast_to=object,
                body={"file_ids": send(client, root / "small", part_bytes)},
            )
            for model in ("wide", "small"):
                client.completions.create(model=model, prompt="warm", max_tokens=4)
            seconds = {}
            with Watch(server) as watch:
                started = time.monotonic()
                ids = send(client, root / "large", part_bytes)
                seconds["parts and completion"] = time.monotonic() - started
                after_parts = {pid: status(pid).get("VmHWM", 0) for pid in watch.processes}
                started = time.monotonic()
                version: Any = client.put("/adapters/large/versions", cast_to=object, body={"file_ids": ids})
                seconds["publication"] = time.monotonic() - started
                answers = [
                    client.completions.create(model=model, prompt="hello", max_tokens=4, temperature=0)
                    for model in ("wide", "large")
                ]
                assert answers[0].choices[0].text != answers[1].choices[0].text, "the delta changes nothing"
        size = (root / "large" / "adapter_model.safetensors").stat().st_size
        return Report(
            size, seconds, watch.processes, version, watch.total_before, watch.total_peak, after_parts
        )
    finally:
        server.kill_all()


def show(report: Report) -> None:
    """Print a table, in megabytes of 10^6 bytes."""
    print(
        f"file {report.file_bytes / MB:.0f} MB; "
        + ", ".join(f"{k} {v:.1f} s" for k, v in report.seconds.items())
    )
    proof = report.version["proof"]
    print(
        f"the delta itself: host {proof['host_bytes'] / MB:.0f} MB, device {proof['device_bytes'] / MB:.0f} MB"
    )
    print(f"{'process':32} {'before':>8} {'VmHWM':>8} {'growth':>8} {'(parts)':>8} {'anon. growth':>13}")
    for pid, memory in sorted(report.processes.items(), key=lambda item: item[1].before - item[1].peak):
        grown, anonymous = memory.peak - memory.before, memory.anonymous_peak - memory.anonymous_before
        if max(grown, anonymous) > MB:
            parts = report.after_parts[pid] - memory.before
            print(
                f"{memory.role:32} {memory.before / MB:8.0f} {memory.peak / MB:8.0f} {grown / MB:8.0f}"
                f" {parts / MB:8.0f} {anonymous / MB:13.0f}"
            )
    print(f"total (PSS) but the delta itself: +{report.total_growth / MB:.0f} MB")
    for anonymous, name in ((False, "VmHWM"), (True, "anonymous")):
        print(
            f"sum of the peaks but the delta itself, {name}: +{report.growth(anonymous=anonymous) / MB:.0f} MB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status: 1 where the peaks have grown by more than the limit."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.uploads_memory", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--part-mib", type=int, default=64)
    parser.add_argument("--limit", type=int, default=150)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="uploads-memory-") as root:
        report = measure(given.megabytes, given.part_mib << 20, Path(root))
    show(report)
    return int(report.total_growth > given.limit * MB)


if __name__ == "__main__":
    raise SystemExit(main())
