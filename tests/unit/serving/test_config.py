"""The settings tree: sources and their order, refusals, and its documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from serving.config import Backbone, Engine, Server, Settings, load_settings

DOCUMENT = Path(__file__).parents[3] / "docs" / "settings.md"
FLAGS = {"backbone": {"path": "model"}}


def settings_of(group: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting below `group`."""
    for name, field in group.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def row(name: str, field: FieldInfo) -> str:
    """The line of the table that documents one setting."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is not Literal else (field.annotation,)
    kinds = tuple(kind for kind in kinds or (field.annotation,) if kind is not NoneType)
    values = ", ".join(f"`{item}`" for item in get_args(kinds[0])) or kinds[0].__name__.replace(
        "Path", "path"
    )
    default = (
        "required" if field.is_required() else "unset" if field.default is None else f"`{field.default}`"
    )
    variable = f"DELTAMUX_{name.upper().replace('.', '__')}"
    return f"| `{name}` | `{variable}` | {values} | {default} | {field.description} |"


def test_every_setting_is_documented_and_nothing_else() -> None:
    documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert documented == [row(name, field) for name, field in settings_of(Settings)]


def test_every_setting_and_group_has_a_description() -> None:
    fields = [*settings_of(Settings), *Settings.model_fields.items()]
    assert [name for name, field in fields if not field.description] == []


def test_the_order_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "backbone: {path: from-file}\nserver: {port: 1}\nengine: {max_num_seqs: 1, max_queue: 1}\n"
    )
    monkeypatch.setenv("DELTAMUX_SERVER__PORT", "2")
    monkeypatch.setenv("DELTAMUX_ENGINE__MAX_QUEUE", "2")
    settings = load_settings(file, {"engine": {"max_queue": 3}})
    assert settings.engine.max_num_batched_tokens == 512  # the default
    assert settings.engine.max_num_seqs == 1  # the file
    assert settings.backbone.path == "from-file"
    assert settings.server.port == 2  # the environment over the file
    assert settings.engine.max_queue == 3  # flags over the environment
    assert type(settings) is Settings


def test_built_directly_it_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMUX_SERVER__PORT", "2")
    assert Settings(backbone=Backbone(path="x")).server.port == 8000


def test_it_is_frozen() -> None:
    settings = load_settings(flags=FLAGS)
    with pytest.raises(ValidationError):
        settings.replicas = 2
    with pytest.raises(ValidationError):
        settings.server.port = 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "backbone: Field required"),
        ({**FLAGS, "surprise": 1}, "surprise: Extra inputs"),
        ({**FLAGS, "server": {"prot": 1}}, "server.prot: Extra inputs"),
        ({**FLAGS, "server": {"port": 70000}}, "server.port: "),
        ({**FLAGS, "backbone": {"path": "x", "device": "tpu"}}, "backbone.device: "),
        ({**FLAGS, "limits": {"request_timeout_s": float("nan")}}, "limits.request_timeout_s: "),
        ({**FLAGS, "engine": {"max_num_seqs": 0}, "replicas": 0}, "replicas: "),
    ],
)
def test_wrong_values_are_refused_by_name(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        load_settings(flags=flags)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"engine.max_num_seqs.*\| replicas"):
        load_settings(flags={**FLAGS, "engine": {"max_num_seqs": 0}, "replicas": 0})


@pytest.mark.parametrize("name", ["DELTAMUX_SREVER__PORT", "DELTAMUX_API_KEYS"])
def test_misspelt_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=name):
        load_settings(flags=FLAGS)


def test_misspelt_variables_of_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMUX_SERVER__PROT", "1")
    with pytest.raises(ValueError, match=r"server\.prot"):
        load_settings(flags=FLAGS)


@pytest.mark.parametrize("text", ["a: [", "- a", "1: 2", "\x00"])
def test_files_that_are_no_settings(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="configuration file"):
        load_settings(file, FLAGS)


def test_a_missing_file_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        load_settings(tmp_path / "absent.yaml", FLAGS)
    (tmp_path / "empty.yaml").write_text("")
    assert load_settings(tmp_path / "empty.yaml", FLAGS).engine == Engine()


def test_the_commands_key_is_not_a_misspelt_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMUX_API_KEY", "dmx_...")
    assert load_settings(flags=FLAGS) == Settings(backbone=Backbone(path="model"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert Server(host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])  # noqa: S104
def test_other_addresses_are_not_loopback(host: str) -> None:
    assert not Server(host=host).is_loopback


def test_secrets_stay_out_of_texts() -> None:
    url = "postgresql://user:hunter2@db/x"
    settings = load_settings(flags={**FLAGS, "database": {"url": url}})
    assert settings.database.url == url
    assert "hunter2" not in repr(settings)
    with pytest.raises(ValueError, match="database") as caught:
        load_settings(flags={**FLAGS, "database": {"url": url, "extra": "hunter2"}})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "name", "served"),
    [
        ("/models/tiny", None, "tiny"),
        ("org/model", None, "model"),
        ("/models/tiny/", None, "tiny"),
        ("x", "y", "y"),
    ],
)
def test_served_name(path: str, name: str | None, served: str) -> None:
    assert Backbone(path=path, name=name).served_name == served
