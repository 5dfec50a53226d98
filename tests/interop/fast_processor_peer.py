"""Process an image with the torchvision backend of transformers, in a separate process.

python fast_processor_peer.py FOLDER_OF_TORCHVISION IMAGE OUT.npz PREPROCESSOR_FOLDER...
"""

import sys

import numpy as np
from bare_timm import timm  # noqa: F401  makes torchvision importable
from PIL import Image
from transformers import AutoImageProcessor

_, _, image, out, *folders = sys.argv
arrays = {}
for number, folder in enumerate(folders):
    processor = AutoImageProcessor.from_pretrained(folder, backend="torchvision")
    values = processor(images=Image.open(image), return_tensors="np")["pixel_values"]
    arrays[str(number)] = values[0].transpose(1, 2, 0)
np.savez(out, **arrays)
