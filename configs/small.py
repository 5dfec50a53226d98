"""Pretraining on small images: CIFAR-like data of 32 to 96 pixels, with a ViT-Ti.

    mae-jax train --config small:vit_ti16,32 --workdir runs/cifar \\
        --config.data.name=cifar10

The argument is SIZE,SIDE; the image side is 32 by default. A patch is 1/8 of it, so an image
has 64 patches. Crops are mild, and patches of few pixels need a larger norm_pix_eps. At first the
loss stays at that of predicting the mean patch; a higher learning rate makes this phase longer.
"""

from mae_jax.train import recipes


def get_config(arg: str = "vit_ti16,32"):
    size, _, side = arg.partition(",")
    pixels = int(side or 32)
    if pixels % 8 or not 32 <= pixels <= 96:
        raise ValueError(f"images of {pixels} pixels: use a multiple of 8 from 32 to 96")
    config = recipes.base()
    recipes.set_size(config, size)
    config.batch_size = 512
    config.epochs = 400.0
    config.model.update(image_size=(pixels, pixels), patch=pixels // 8, dtype="bfloat16")
    config.model.update(decoder_width=128, decoder_depth=2, decoder_heads=4)
    config.target.norm_pix_eps = 1e-2
    config.optim.base_lr = 5e-4
    config.data.update(name="cifar10", eval_split="test", crop_scale=(0.5, 1.0), eval_crop=1.0)
    return config
