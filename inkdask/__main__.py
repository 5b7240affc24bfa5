"""``python -m inkdask`` is the command line."""

from inkdask.cli import main

main()
