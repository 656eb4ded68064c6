"""Training: settings, the one loop, fit, evaluate, metrics and checkpoints."""
