"""MAE pretraining on ImageNet-1k, the paper's recipe (appendix A.1): 800 epochs, batch 4096.

    mae-jax train --config pretrain:vit_b16 --workdir runs/pretrain_b

On a folder of images, without labels:

    mae-jax train --config pretrain:vit_b16 --workdir runs/mine \\
        --config.data.source=folder --config.data.path=DIR --config.batch_size=256

Sizes: vit_ti16, vit_s16, vit_b16 (default), vit_l16, vit_h14; Pixio's have a recipe of their own.
Reported by the paper for B after 1600 epochs, not reproduced here: top-1 of 83.6 % fine-tuned,
68.0 % by linear probe.
"""

from mae_jax.train import recipes


def get_config(size: str = "vit_b16"):
    config = recipes.base()
    recipes.set_size(config, size)
    config.model.dtype = "bfloat16"
    return config
