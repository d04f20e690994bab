"""A segmenter behind HTTP: an image in, COCO JSON out."""
