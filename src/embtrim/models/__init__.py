"""Base models of click-through-rate prediction, one file each."""
