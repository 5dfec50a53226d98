"""Supervised training from scratch on ImageNet-1k, the paper's recipe (Table 11).

    mae-jax train --config scratch:vit_b16 --workdir runs/scratch_b

Reported by the paper, not reproduced here, top-1 of B / L / H with EMA weights:
82.3 / 82.6 / 83.1 %.
"""

from mae_jax.train import recipes


def get_config(size: str = "vit_b16"):
    config = recipes.get("finetune", size)
    large = size not in ("vit_ti16", "vit_s16", "vit_b16")
    config.init.path = "random"
    config.batch_size = 4096
    config.epochs = 200.0 if large else 300.0
    config.classify.update(drop_path=0.2 if large else 0.1, erase=0.0, head_init_std=0.02)
    config.optim.update(base_lr=1e-4, min_lr=0.0, warmup_epochs=20.0, b2=0.95, weight_decay=0.3)
    config.optim.update(layer_decay=1.0, ema=0.9999)
    return config
