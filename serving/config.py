"""Every setting of the server, as one frozen tree; the only reader of the environment.

Sources, from low to high: defaults, YAML file, `DELTAMUX_<GROUP>__<NAME>` variables, flags.
`docs/settings.md` lists all of them; a test keeps both in step.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENV_PREFIX = "DELTAMUX_"
ENV_DELIMITER = "__"
CLIENT_VARIABLES = frozenset({"DELTAMUX_API_KEY"})
"""Variables with our prefix that are not settings: the commands that talk to a server read them."""

MIB = 1 << 20


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return False


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a value can be a secret
    )


class Server(_Group):
    """Where the HTTP server listens."""

    host: str = "127.0.0.1"
    """Address to listen on. Without keys, one other than loopback is refused unless `insecure` is set."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    insecure: bool = False
    """Listen beyond loopback although there are no keys: whoever reaches the port may do everything."""
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Port for `/v1/admin` alone, which `port` then does not have; 0 takes a free one. By default there is none."""
    admin_host: str = "127.0.0.1"
    """Address of `admin_port`; as for `host`, only a loopback one without keys."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the addresses that are listened on."""
        return _is_loopback(self.host) and (self.admin_port is None or _is_loopback(self.admin_host))


class Backbone(_Group):
    """The frozen model."""

    path: str
    """Directory or Hub id of the transformers checkpoint. Required."""
    name: str | None = Field(default=None, min_length=1, max_length=200)
    """What callers write in `model` to reach the bare backbone; by default the last part of `path`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto` takes CUDA where there is a device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; `auto` takes float32 on the CPU and the checkpoint's type on CUDA."""

    @property
    def served_name(self) -> str:
        """The model id of the bare backbone."""
        return self.name or Path(self.path).name or self.path


class Engine(_Group):
    """Sizes of one replica's engine."""

    max_num_seqs: int = Field(default=32, ge=1, le=4096)
    """Requests that run in one batch."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest context in tokens, prompt and output together; by default what the backbone was built for."""
    max_num_batched_tokens: int = Field(default=512, ge=1)
    """Tokens that one step computes; longer prompts are prefilled in chunks."""
    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait for a place in the batch; one more is answered 429."""
    max_queue_s: float = Field(default=120.0, gt=0)
    """Longest wait for a place in the batch; a request that would wait longer, or has, is answered 429."""
    scheduling: Literal["fair", "first_come"] = "fair"
    """Whom to admit next: by service received per tenant, weight and class, or in order of arrival."""
    max_wait_s: float = Field(default=2.0, gt=0)
    """Wait after which a tenant of which nothing was admitted has a turn before all others, whatever its class."""
    max_lead_tokens: int = Field(default=1024, ge=0)
    """How far ahead of others, in weighted tokens, a tenant may get because its delta is on the device already."""
    headroom: float = Field(default=0.25, ge=0, lt=1)
    """Share of the batch that a tenant with more than its own share leaves free while others are active; 0: none."""
    prefix_cache: Literal["tenant", "shared", "off"] = "tenant"
    """Whose computed prompts a new one may reuse: its tenant's, anybody's (which timing can reveal), or nobody's."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Memory of a replica's keys, values and deltas; by default a quarter of the machine's, split among replicas."""
    merge_after_steps: int = Field(default=128, ge=0)
    """Steps in a row of one delta alone after which its weights run merged (fp32 on CPU); 0: never."""
    host_cache_bytes: int = Field(default=1024 * MIB, ge=0)
    """Host memory that loaded deltas may take beside the device."""
    kernels: Literal["auto", "reference", "compiled"] = "auto"
    """Runs the deltas: compiled kernels (C++ on CPU, Triton on CUDA) or plain torch; `auto` takes what it can have."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of one replica's CPU kernels; by default its share of the machine's cores."""


class Store(_Group):
    """Where the deltas' bytes are."""

    path: str = Field(default="deltamux-data/blobs", min_length=1)
    """Directory of the blob store, created if missing; or `s3://`, `gs://` or `az://` with bucket and prefix."""

    grace_s: float = Field(default=86_400.0, ge=0)
    """Seconds for which the bytes of a deleted version are kept: as long it can be undeleted."""
    collect_every_s: float = Field(default=3600.0, ge=0)
    """Seconds between two collections of bytes that nobody needs; 0: only `deltamux adapters gc` collects."""
    spool: Path | None = None
    """Directory of files that are sent in parts, shared by all gateways; by default `uploads` beside the blobs."""

    @property
    def spool_path(self) -> Path:
        """Where the spool is."""
        if self.spool is not None:
            return self.spool
        return Path("deltamux-data/uploads" if "://" in self.path else f"{self.path.rstrip('/')}-uploads")


class Database(_Group):
    """Where the deltas' names, versions and aliases are."""

    url: str = Field(default="sqlite:///deltamux-data/registry.db", min_length=1, repr=False)
    """SQLAlchemy URL of the registry, SQLite or PostgreSQL. Kept out of logs, since it can hold a password."""


class Auth(_Group):
    """How keys are checked. Keys themselves are in the database; see `deltamux keys`."""

    secret_file: Path = Path("deltamux-data/secret")
    """File of the secret that keys are hashed with; made if missing. All gateways of one database need the same."""


class Limits(_Group):
    """Bounds on what one caller can ask for."""

    max_upload_bytes: int = Field(default=64 * MIB, ge=1)
    """Largest upload body, and largest part of a file that is sent in parts; a byte more is answered 413."""
    max_open_uploads: int = Field(default=4, ge=1)
    """Uploads in progress at once: bodies and parts on their way in, files put together, deltas published."""
    max_file_bytes: int = Field(default=4096 * MIB, ge=1)
    """Largest file that is sent in parts; a byte more is answered 413."""
    file_lifetime_s: float = Field(default=3600.0, gt=0)
    """Seconds in which the parts of a file must come; and then again, in which the file must be used."""
    max_files: int = Field(default=16, ge=1)
    """Files sent in parts that a tenant may have, pending or waiting for use, where its own limits say nothing."""
    max_adapters: int | None = Field(default=None, ge=1)
    """Deltas that a tenant may have, where its own limits say nothing; one more is answered 429."""
    max_versions: int | None = Field(default=None, ge=1)
    """Live versions that a tenant may have, of all its deltas, where its own limits say nothing."""
    max_stored_bytes: int | None = Field(default=None, ge=1)
    """Bytes of deltas and files that a tenant may keep, where its own limits say nothing."""
    idempotency_s: float = Field(default=86_400.0, gt=0)
    """Seconds for which an answer is kept for requests that repeat its `Idempotency-Key`."""
    max_body_bytes: int = Field(default=8 * MIB, ge=1)
    """Largest JSON body; a byte more is answered 413."""
    max_body_values: int = Field(default=200_000, ge=1)
    """Most values of a JSON body (its commas are counted); more are answered 413. They are parsed in one go."""
    max_n: int = Field(default=16, ge=1)
    """Largest `n`, and largest `num_beams`, of a request."""
    max_choices: int = Field(default=128, ge=1)
    """Most choices of one request: its prompts times `n` or `num_beams`; most inputs of a task head's."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Longest duration of one request, from its first byte to its last."""
    first_token_timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait for a request's first token, in the queue and in prefill; then it is ended and answered 429."""
    counted_in: Literal["process", "database"] = "process"
    """Where limits are counted. `process`: G gateways let up to G times a limit through. `database`: exact."""
    max_heartbeat_age_s: float = Field(default=30.0, gt=0)
    """Age of the engine's last turn beyond which `/health/ready` answers 503."""


class Ledger(_Group):
    """What is kept of requests."""

    keep_days: float = Field(default=400.0, ge=0)
    """Days for which a request's row is kept, and so how far back usage is known; 0: for ever."""


class Settings(_Group):
    """The whole tree. `load_settings` builds it; built directly it reads neither environment nor file."""

    server: Server = Server()
    """Where the HTTP server listens."""
    backbone: Backbone
    """The frozen model."""
    engine: Engine = Engine()
    """Sizes of one replica's engine."""
    store: Store = Store()
    """Where the deltas' bytes are."""
    database: Database = Database()
    """Where the deltas' names, versions and aliases are."""
    auth: Auth = Auth()
    """How keys are checked."""
    limits: Limits = Limits()
    """Bounds on what one caller can ask for."""
    ledger: Ledger = Ledger()
    """What is kept of requests."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Copies of the backbone, each with its own engine."""
    profile: Literal["laptop", "load"] = "laptop"
    """Ray Serve's shape: `laptop` starts leanest, `load` adds HAProxy and the throughput flags."""

    @model_validator(mode="after")
    def _grace_covers_requests(self) -> Settings:
        if self.store.grace_s < self.limits.request_timeout_s:
            raise ValueError(
                f"store.grace_s: got {self.store.grace_s:g}, expected at least limits.request_timeout_s "
                f"({self.limits.request_timeout_s:g}): a request may load a delta that is deleted after it came."
            )
        return self


HOLD_REQUESTS = 3


def linger_s(settings: Settings) -> float:
    """How long bytes stay that an upload may be at work on: as long as so many longest requests.

    Storing and admitting come behind receiving, and each may take as long as a request. What a killed one leaves is
    collected then.
    """
    return HOLD_REQUESTS * settings.limits.request_timeout_s


def load_settings(config_file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `config_file`, the environment and `flags` (a nested mapping), the later winning.

    Raises ValueError, listing every problem, for a file that can't be read, an unknown key or variable, and a
    value out of range.
    """
    file_values = _read_yaml(config_file) if config_file is not None else {}
    _refuse_unknown_variables(os.environ)

    class Sources(BaseSettings, Settings):
        """`Settings` by source. A class of this call: pydantic-settings asks the class for its sources."""

        model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER)

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (the library's signature)
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=file_values)

    try:
        return Settings.model_validate(Sources(**(flags or {})).model_dump())
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ValueError("Settings: " + " | ".join(problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The configuration file {path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration file {path} is not YAML: {error}") from error
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"The configuration file {path} must hold a mapping of setting groups.")
    return values


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Refuse a misspelt variable: pydantic-settings would ignore it without a word."""
    groups = {name.upper() for name in Settings.model_fields}
    given = [n for n in environ if n.upper().startswith(ENV_PREFIX) and n.upper() not in CLIENT_VARIABLES]
    wrong = [n for n in given if n.upper().removeprefix(ENV_PREFIX).partition(ENV_DELIMITER)[0] not in groups]
    if wrong:
        expected = ", ".join(sorted(ENV_PREFIX + group for group in groups))
        raise ValueError(
            f"Unknown variables: {', '.join(sorted(wrong))}. Expected names begin with: {expected}."
        )
