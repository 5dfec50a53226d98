"""Linear probe on ImageNet-1k, the paper's recipe (Table 10): frozen encoder, 90 epochs of LARS.

    mae-jax train --config linprobe:vit_b16 --workdir runs/linprobe_b \\
        --config.init.path=runs/pretrain_b

`init.path` takes any checkpoint (official, Hugging Face, timm, workdir); `random` is the baseline.
Reported by the paper, not reproduced here, top-1 of B / L / H after 1600 epochs of pretraining:
68.0 / 75.8 / 76.6 %. On a dataset smaller than ImageNet use a smaller batch, but keep the peak
learning rate of 0.1 * 16384 / 256 = 6.4 (a LARS step is a fraction of the weights' norm). For
results in seconds, compute features once, without augmentation:

    --config.batch_size=256 --config.optim.base_lr=6.4 \\
    --config.data.augment=none --config.data.cache_features=True
"""

from mae_jax.train import recipes


def get_config(size: str = "vit_b16"):
    config = recipes.base()
    recipes.set_size(config, size)
    config.task = "classify"
    config.batch_size = 16384
    config.epochs = 90.0 if size in ("vit_ti16", "vit_s16", "vit_b16") else 50.0
    config.model.update(position="learned", dtype="bfloat16")  # learned: the checkpoint's table
    config.classify.head_norm = True
    config.optim.update(name="lars", base_lr=0.1, weight_decay=0.0, train_last_blocks=0)
    config.optim.warmup_epochs = 10.0
    config.data.update(augment="weak_crop", crop_scale=(0.08, 1.0))
    config.eval.update(accuracy_every_epochs=5.0, knn_every_epochs=-1.0)
    return config
