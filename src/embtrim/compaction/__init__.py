"""From a plan to a smaller model, and the proof that the two are equal."""
