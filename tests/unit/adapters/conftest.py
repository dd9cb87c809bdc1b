"""An S3 server for the tests of stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3 import S3Server
from tests.s3 import running as s3_running


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server of this run."""
    with s3_running() as server:
        yield server
