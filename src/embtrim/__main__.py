"""`python -m embtrim` is the command line."""

from embtrim.cli.commands import main

main()
