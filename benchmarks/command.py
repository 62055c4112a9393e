"""Commands whose user reads one line, not a traceback, where there is something to act on."""

from __future__ import annotations

import sys
from typing import Any

import click

from ipa.engines.errors import IpaError
from ipa.trainer.errors import missing_library


class Command(click.Command):
    """Turns an `IpaError` into one line and exit code 2; the command's `name` is what the line begins with."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IpaError as error:
            click.echo(f"{self.name}: {error}", err=True)
            sys.exit(2)
        except ModuleNotFoundError as error:  # commands are installed with the runtime alone, too
            click.echo(f"{self.name}: {missing_library(error, 'bench')}", err=True)
            sys.exit(2)


class Group(Command, click.Group):
    """The same of several commands."""
