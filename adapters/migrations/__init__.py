"""The registry's database: how it is opened (`database`), its tables (`schema`) and the steps that lead to them.

A new step is a file in `versions/` (`v0002_what_it_does.py`, `down_revision` naming the one before) and the same
change in `schema`; a test compares the two. Steps only go forward.
"""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

_ALEMBIC = threading.Lock()  # Alembic keeps the step that runs in module globals: one at a time per process


def _config() -> Config:
    """Alembic's settings made in code, so that an installed package needs no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def is_current(connection: Connection) -> bool:
    """Whether the tables are those of this release. Only reads."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    return MigrationContext.configure(connection).get_current_revision() == head


def upgrade(connection: Connection) -> None:
    """Bring the tables to this release inside the caller's transaction; does nothing where they are.

    Raises alembic's CommandError where the database is of a newer release.
    """
    config = _config()
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, "head")
