"""Settings of every test run, made before torch is imported."""

from __future__ import annotations

import os

# A spinning OpenMP worker next to a busy core makes small kernels 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
