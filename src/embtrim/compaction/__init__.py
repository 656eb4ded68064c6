"""From a plan to a smaller model, and the proof that it equals the masked full model."""
