"""agft makes CLIP robust to adversarial images and keeps its image-text alignment.

It fine-tunes the image encoder on adversarial pictures towards the calibrated, soft answers of the original model
instead of hard labels, and measures what that does to zero-shot accuracy, clean and attacked. The package is exported
from the notebooks in `nbs/`: read those, one chapter a module.
"""
__version__ = "0.0.1"

from agft import core # first of all: it makes torchvision importable beside a CPU build of torch
