"""`python -m embtrim` is the command line."""

from embtrim.cli.main import main

main()
