"""The command line: `embtrim COMMAND`, or `python -m embtrim COMMAND`."""
