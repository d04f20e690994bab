"""Name categories, point at unlabelled images, get a segmenter."""

__version__ = "0.1.0"
