"""Who may import whom: the layers of ARCHITECTURE.md, parsed from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALLOWED = {
    "adapters": {"adapters"},
    "serving.core": {"adapters.errors", "adapters.tasks"},
    "serving.config": set(),
    "serving.metrics": {"serving.core"},
    "serving.kernels": {"adapters.activations", "adapters.errors", "adapters.normal_form", "serving.kernels"},
    "serving.memory": {"adapters", "serving.core", "serving.memory"},
    "serving.model": {"adapters", "serving.core", "serving.kernels", "serving.model"},
    "serving.engine": {
        "adapters", "serving.core", "serving.config", "serving.metrics", "serving.kernels", "serving.memory",
        "serving.model", "serving.engine",
    },
    "serving.tenancy": {"adapters", "serving.core", "serving.config", "serving.metrics", "serving.tenancy"},
    "serving.http": {
        "adapters", "serving.core", "serving.config", "serving.metrics", "serving.tenancy", "serving.http",
    },
    "serving.offline": {
        "adapters", "serving.core", "serving.kernels", "serving.model", "serving.engine", "serving.offline",
    },
    "serving.deployments": {"adapters", "serving"},
    "serving.cli": {"adapters", "serving"},
}  # fmt: skip

FORBIDDEN_LIBRARIES = {
    "adapters": {"ray", "fastapi", "transformers", "peft"},
    "serving.engine": {"ray", "fastapi"},
    "serving.model": {"ray", "fastapi", "peft"},
    "serving.tenancy": {"ray", "torch", "transformers", "fastapi", "starlette"},
    "serving.http": {"ray", "torch", "transformers"},
    "serving.offline": {"ray", "fastapi"},
    "serving.cli": {"ray", "peft"},
}

TORCH_FREE = (
    "serving/core.py",
    "serving/config.py",
    "serving/metrics.py",
    "serving/engine/scheduler.py",
    "serving/engine/leases.py",
    "serving/engine/step.py",
    "serving/engine/kv_manager.py",
    "serving/engine/prefix_cache.py",
    "serving/engine/fair_queue.py",
    "serving/engine/waiting.py",
    "serving/engine/sequence.py",
    "serving/memory/budget.py",
    "serving/memory/residency.py",
)


def imports_of(path: Path) -> set[str]:
    """Absolute dotted names that the module imports, `from a import b` as `a.b` and `a`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
    return names


def sources(package: str) -> Iterator[Path]:
    base = ROOT / package.replace(".", "/")
    yield from [base.with_suffix(".py")] if base.with_suffix(".py").exists() else sorted(base.rglob("*.py"))


def upward_edges(package: str, path: Path) -> list[str]:
    ours = {
        name
        for name in imports_of(path)
        if name.split(".")[0] in ("adapters", "serving", "loadtest", "tests")
    }
    allowed = ALLOWED[package]
    return sorted(n for n in ours if not any(n == a or n.startswith(a + ".") for a in allowed))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_upward_edge(package: str) -> None:
    edges = {str(p.relative_to(ROOT)): e for p in sources(package) if (e := upward_edges(package, p))}
    assert edges == {}


@pytest.mark.parametrize("package", sorted(FORBIDDEN_LIBRARIES))
def test_layer_does_not_use_library(package: str) -> None:
    banned = FORBIDDEN_LIBRARIES[package]
    found = {
        str(path.relative_to(ROOT)): hits
        for path in sources(package)
        if (hits := {name for name in imports_of(path) if name.split(".")[0] in banned})
    }
    assert found == {}


def test_only_deployments_import_ray() -> None:
    users = {p.relative_to(ROOT).parts[:2] for p in sources("serving") if any(
        name.split(".")[0] == "ray" for name in imports_of(p)
    )}  # fmt: skip
    assert users == {("serving", "deployments")}


@pytest.mark.parametrize("path", TORCH_FREE)
def test_policy_modules_do_not_import_torch(path: str) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imports_of(ROOT / path))


OFFLINE = frozenset(sources("serving.offline"))
"""What only the uploader's own command line runs."""


def test_only_the_command_line_imports_the_offline_tools() -> None:
    users = {p.relative_to(ROOT).parts[:2] for p in {*sources("adapters"), *sources("serving")} - OFFLINE if any(
        name.startswith("serving.offline") for name in imports_of(p)
    )}  # fmt: skip
    assert users == {("serving", "cli")}


def test_only_one_offline_module_imports_peft() -> None:
    users = {p.relative_to(ROOT).as_posix() for k in ("adapters", "serving") for p in sources(k) if any(
        name.split(".")[0] == "peft" for name in imports_of(p)
    )}  # fmt: skip
    assert users == {"serving/offline/peft_source.py"}


def unpickling_calls(path: Path) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "torch.load"]


@pytest.mark.parametrize("path", [p for k in ("adapters", "serving") for p in sources(k)], ids=str)
def test_server_never_unpickles(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "joblib", "dill"} & imports_of(path)
    assert path in OFFLINE or not unpickling_calls(path)


def test_offline_tools_unpickle_tensors_only() -> None:
    calls = [call for path in OFFLINE for call in unpickling_calls(path)]
    assert len(calls) == 1
    arguments = {keyword.arg: keyword.value for keyword in calls[0].keywords}
    assert ast.unparse(arguments["weights_only"]) == "True"


def test_the_rule_sees_an_upward_edge(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import serving.engine.engine\nfrom adapters.errors import NotFound\n")
    assert upward_edges("adapters", bad) == ["serving.engine.engine"]
