"""Mean and deviation of ImageNet's images, which many published weights expect of their input.

Of the channels R, G, B in [0, 1].
"""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
