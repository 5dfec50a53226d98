"""Pixio: MAE pretraining with class tokens, masked cells and a deep decoder (Yang et al. 2025).

    mae-jax train --config pixio:vit_h16 --workdir runs/pixio_h \\
        --config.data.source=folder --config.data.path=DIR

Sizes: vit_h16 (default), vit_1b16, vit_5b16; others, as vit_b16, take the same class tokens and
decoder. As in the reference's scripts for H and 5B (arXiv 2512.15715): images of 256 pixels, 8
class tokens, masks of cells of 4x4 patches, drop path, no flip. Its "epoch" is 1,605 steps whatever
the data, so the length is in steps. 1B has no script, and takes H's values.
"""

from mae_jax.train import recipes

STEPS_PER_EPOCH = 1605

# Batch size, base learning rate, epochs; the peak learning rate is 8e-4 for both.
RECIPES = {"vit_h16": (8192, 2.5e-5, 400), "vit_5b16": (16384, 1.25e-5, 800)}


def get_config(size: str = "vit_h16"):
    config = recipes.base()
    recipes.set_size(config, size)
    batch_size, base_lr, epochs = RECIPES.get(size, RECIPES["vit_h16"])
    config.batch_size = batch_size
    config.steps = epochs * STEPS_PER_EPOCH
    config.optim.update(base_lr=base_lr, warmup_steps=epochs // 10 * STEPS_PER_EPOCH)
    config.model.update(image_size=(256, 256), class_tokens=8, position="learned_random")
    config.model.update(decoder_width=512, decoder_depth=32, decoder_heads=16, dtype="bfloat16")
    config.mask.update(ratio=0.75, cell=4)
    config.pretrain.drop_path = 0.4
    config.data.update(crop_scale=(0.2, 1.0), flip=False)
    return config
