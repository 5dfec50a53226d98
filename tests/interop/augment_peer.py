"""Runs timm's RandAugment operations in a separate process, as timm_peer.py.

python augment_peer.py TIMM_FOLDER INPUTS.npz OUTPUTS.npz
"""

import itertools
import random
import sys

import numpy as np
from bare_timm import timm
from PIL import Image

auto_augment = timm.data.auto_augment
_, inputs_path, outputs_path = sys.argv[1:]

SEEDS = {1: 1, -1: 0}  # sign -> seed after which random.random() makes timm choose that sign

outputs = {}
inputs = np.load(inputs_path)
names = [op.name for op in auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {}).ops]
for name, mode, sign in itertools.product(names, inputs["modes"], SEEDS):
    fill = tuple(inputs["fill"].tolist())
    hparams = dict(
        img_mean=fill[0] if mode == "L" else fill, interpolation=Image.Resampling.BICUBIC
    )
    for level in inputs["levels"]:
        if name == "PosterizeIncreasing" and level == 1:
            continue  # keeps 0 bits, which Pillow 13 rejects in timm
        random.seed(SEEDS[sign])
        op = auto_augment.AugmentOp(name, 1.0, 10 * level, hparams)
        outputs[f"{name} {mode} {sign} {level}"] = np.asarray(op(Image.fromarray(inputs[mode])))
np.savez(outputs_path, **outputs)
