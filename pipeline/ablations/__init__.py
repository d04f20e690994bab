"""The papers' ablations: what they vary, how they run as DVC experiments, and their results."""
