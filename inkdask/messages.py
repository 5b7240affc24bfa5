"""Messages of the command line: what is shown, and how; ``-v`` before or after a command."""

from __future__ import annotations

import logging
from typing import Any

import click

from inkdask.progress import printable, say


def show(verbose: bool = False) -> None:
    """Show messages on standard error: ours and warnings, or all."""
    handler = Handler()
    handler.setFormatter(Printable("%(message)s"))
    handler.addFilter(is_for_everybody)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("inkdask").setLevel(logging.INFO)
    if verbose:
        show_more()


def show_more() -> None:
    """Show all messages from now on."""
    for handler in logging.getLogger().handlers:
        handler.removeFilter(is_for_everybody)
    logging.getLogger("inkdask").setLevel(logging.DEBUG)


class Handler(logging.Handler):
    """Say messages where the progress of a job is shown too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a message; a terminal that is gone stops no job."""
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


class Printable(logging.Formatter):
    """Format messages, and keep the lines of tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message with characters escaped that a terminal would obey."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def is_for_everybody(record: logging.LogRecord) -> bool:
    """Keep our own messages and warnings; distributed logs every connection, and tracebacks."""
    if record.name.startswith("huggingface_hub"):  # has a handler of its own
        return False
    if record.name.startswith("inkdask"):
        return True
    return record.levelno >= logging.WARNING and not record.exc_info


class Command(click.Command):
    """A command that takes ``-v`` too, and whose summary is its whole first sentence."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)

        def more(_: Any, __: Any, verbose: bool) -> None:
            if verbose:
                show_more()

        self.params.append(
            click.Option(
                ["-v", "--verbose"], is_flag=True, expose_value=False, callback=more,
                help="Show more messages.",
            )
        )  # fmt: skip

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first paragraph of the help, for the list of commands."""
        return " ".join((self.help or "").split("\n\n")[0].split())


class Group(click.Group):
    """Commands that are of `Command`."""

    command_class = Command
