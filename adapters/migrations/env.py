"""Run by Alembic, never imported: applies the steps on the connection that `upgrade` put into the settings."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
