"""One training loop: settings, fit, evaluate, metrics, checkpoints."""
