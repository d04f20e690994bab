"""The embedded default: a drawn world, and the two tiny networks pre-trained in it."""
