"""timm's RandAugment operations, in a process of their own as in timm_peer.py.

python augment_peer.py FOLDER_OF_TIMM IMAGES.npz OUT.npz
"""

import itertools
import random
import sys

import numpy as np
from bare_timm import timm
from PIL import Image

auto_augment = timm.data.auto_augment
_, images, out = sys.argv[1:]

SEEDS = {1: 1, -1: 0}  # after these the first of random.random() is below or above .5: the sign

found = {}
images = np.load(images)
names = [op.name for op in auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {}).ops]
for name, mode, sign in itertools.product(names, images["modes"], SEEDS):
    hparams = dict(img_mean=tuple(images["fill"].tolist()), interpolation=Image.Resampling.BICUBIC)
    if mode == "L":
        hparams["img_mean"] = hparams["img_mean"][0]
    for level in images["levels"]:
        if name == "PosterizeIncreasing" and level == 1:
            continue  # keeps 0 bits, which Pillow 13 refuses to timm
        random.seed(SEEDS[sign])
        changed = auto_augment.AugmentOp(name, 1.0, 10 * level, hparams)(
            Image.fromarray(images[mode])
        )
        found[f"{name} {mode} {sign} {level}"] = np.asarray(changed)
np.savez(out, **found)
