"""Predictions and pseudo-labels in the files that other tools read."""
