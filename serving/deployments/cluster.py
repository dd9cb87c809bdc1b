"""Ray and Serve, started for one server and ended with it. Import it when the environment is set, not before."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from adapters.errors import DeltamuxError, ErrorInfo, InvalidRequest, from_info
from serving.config import Settings
from serving.deployments.environment import kernel_environment
from serving.deployments.ingress import Gateway
from serving.deployments.replica import BackboneReplica

APP = "deltamux"
OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB; nothing of ours goes through it, messages are small and travel inline."""
GRACE_S = 30.0
"""How long requests may take to end when their replica is stopped."""
SPILL_GAP = 6
"""Requests that a delta's home may have more than the idlest replica before others help out."""
_CONTROL_CALLS = 64
"""Calls beside requests (health, metrics, admissions) that a replica takes at once."""


_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Refused|Unavailable)\b.*: ")


class StartFailed(RuntimeError):
    """Ray, Serve or a replica did not start, for a reason that is not one of ours; the text says it in a line."""


def start(settings: Settings, session: Path, host: str, port: int) -> None:
    """Start Ray on this machine and Serve's HTTP proxy on `host`:`port`.

    Call it from the main thread: the kernel ends Ray's processes with the thread that started them, and so with
    this process, however it ends. Raises StartFailed.
    """
    try:
        _start(settings, session, HTTPOptions(host=host, port=port, keep_alive_timeout_s=90))
    except (RayError, RuntimeError, OSError, TimeoutError) as error:
        raise StartFailed(_gist(str(error))) from error


def _start(settings: Settings, session: Path, http: HTTPOptions) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        address="local",  # never a cluster that an environment variable or a file points at
        num_gpus=0 if settings.backbone.device == "cpu" else None,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(session),
    )
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_logging())


def deploy(settings: Settings) -> None:
    """Deploy backbone and gateway, and return when both are ready.

    Raises the DeltamuxError that stopped a replica's start, or StartFailed.
    """
    replicas = settings.replicas
    backbone = serve.deployment(
        BackboneReplica,
        name="backbone",
        num_replicas=replicas,
        # no CPU is reserved: on a small machine all processes share what there is
        ray_actor_options={
            "num_cpus": 0,
            "num_gpus": _gpu_share(settings),
            "runtime_env": {"env_vars": kernel_environment(settings)},
        },
        # The engine's own queue is the bound, and refuses with a proper error: Serve must not queue before it.
        max_ongoing_requests=settings.engine.max_num_seqs + settings.engine.max_queue + _CONTROL_CALLS,
        max_constructor_retry_count=1,
        health_check_period_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=GRACE_S,
        request_router_config=RequestRouterConfig(
            request_router_class="serving.deployments.router:DeltaRouter",
            request_router_kwargs={"max_gap": SPILL_GAP},
        ),
        logging_config=_logging(),
    )
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,  # bounded behind it, by the engine's queue and the upload limit
        max_constructor_retry_count=1,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=GRACE_S,
        logging_config=_logging(),
    )
    try:
        serve.run(gateway.bind(settings, backbone.bind(settings)), name=APP, route_prefix="/")
    except RuntimeError:
        raise _cause() from None


def stop() -> None:
    """End the application, letting requests finish for a while, then Ray."""
    try:
        # not serve.shutdown(): it fights its own controller, and Ray's end takes that away anyway
        serve.delete(APP)
    finally:
        kill()


def kill() -> None:
    """End all of Ray at once."""
    ray.shutdown(wait_for_processes=True)


def _logging() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _gpu_share(settings: Settings) -> float:
    """GPUs of one replica. Raises InvalidRequest where CUDA is asked for and Ray sees no GPU."""
    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    if settings.backbone.device == "cuda" and not num_gpus:
        raise InvalidRequest(
            "backbone.device: got 'cuda', but no GPU is visible on this machine.",
            param="device",
            remedy="Use --device cpu or auto, or make the GPU visible.",
        )
    return float(min(1.0, num_gpus / settings.replicas))


def _cause() -> Exception:
    """Our own error, or StartFailed, from Serve's account of a failed start, which holds a traceback as text."""
    app = serve.status().applications[APP]
    accounts = [deployment.message for deployment in app.deployments.values()] + [app.message]
    kinds = "|".join(_kinds(DeltamuxError))
    for account in accounts:
        if found := re.findall(rf"^\s*adapters\.errors\.({kinds}): (.+)$", account, re.MULTILINE):
            kind, text = found[-1]
            return from_info(ErrorInfo(kind, text, problems=(text,)))
    return StartFailed(_gist("\n".join(accounts)))


def _gist(text: str) -> str:
    """The line of a traceback that says what happened: the last that begins with an exception's name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1] if lines else "unknown"
    )


def _kinds(root: type[DeltamuxError]) -> set[str]:
    return {root.__name__}.union(*(_kinds(child) for child in root.__subclasses__()))
