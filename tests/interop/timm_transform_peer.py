"""Transform an image as timm evaluates its models, in a separate process.

python timm_transform_peer.py FOLDER_OF_TIMM IMAGE OUT.npz MODEL_FOLDER...
"""

import sys

import numpy as np
from bare_timm import timm
from PIL import Image

_, _, image, out, *folders = sys.argv
arrays = {}
for number, folder in enumerate(folders):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config, is_training=False)
    arrays[str(number)] = transform(Image.open(image)).numpy().transpose(1, 2, 0)
np.savez(out, **arrays)
