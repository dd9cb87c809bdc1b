"""Ray's switches, which it reads from the environment when it is imported. No Ray here.

All of Ray's processes inherit them from the one that starts it, so they are set once, before the first import.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from serving.config import Settings

WAITING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How OpenMP's threads wait for the next layer: 1,000 turns (25 us where this was measured), then they sleep.

Between two layers there are some 15 us of Python, and waking a thread takes longer than that. A thread that spins on
takes the core from the gateway and the proxy, and the step waits for whoever they push out. On two cores with more
processes than that, processor time of a decode step against threads that sleep at once: 1.2 at 1,000 turns, 1.65 at
3,000, and without bound where they never sleep (OMP_WAIT_POLICY=ACTIVE).
"""


def ray_environment(settings: Settings, session: Path) -> dict[str, str]:
    """The variables for Ray itself, by profile. `session` is this server's private directory."""
    variables = {
        # Every replica listens on all interfaces and unpickles what it gets there from whoever has the token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # This is one machine, whatever Ray makes of the name: its node address becomes 127.0.0.1, and all but the
        # replicas' own ports then listen there only. Ray replaces a 127.0.0.1 given in any other way.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.deployments.proxy.middlewares",
        "RAY_SERVE_LOG_TO_STDERR": "0",  # the same lines are in the session's log files
    }
    if settings.profile == "load":
        variables |= {
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # how long a replica lingers after its last request; 30 s is for proxies on other machines
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(session / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(session / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(session),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(session / "server-state"),
        }
    return variables


def kernel_environment(settings: Settings) -> dict[str, str]:
    """The variables for a replica's CPU kernels, to be set before torch is imported.

    Without them Ray allows an actor that reserves no CPU one thread.
    """
    threads = settings.engine.num_threads or max(1, _usable_cpus() // settings.replicas)
    return {"OMP_NUM_THREADS": str(threads), **WAITING_THREADS}


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: also respects taskset and cpusets
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
