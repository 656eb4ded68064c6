"""Whole runs and grids of runs, one record a trained model."""
