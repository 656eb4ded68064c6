"""What a trained model becomes: bundles, predictions, model cards, exports, updates."""
