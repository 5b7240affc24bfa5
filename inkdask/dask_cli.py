"""``dask ink ...``: the command line of inkdask as a command of Dask.

Nothing of inkdask is imported before the command runs, because every ``dask`` command imports this
file.
"""

from __future__ import annotations

import click


@click.command(
    "ink",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ink(arguments: tuple[str, ...]) -> None:
    """Read ink on Herculaneum surface volumes (see ``dask ink --help``)."""
    from inkdask.cli import main

    main(list(arguments), name="dask ink")
