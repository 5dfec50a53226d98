"""MAE on crops of photographs that ship inside Python packages, for a machine without a GPU.

    mae-jax demo

Trains a small ViT in minutes; the README has the expected results. Then, in a minute or two each,

    mae-jax train --config demo:linprobe --workdir runs/demo_linprobe
    mae-jax train --config demo:finetune --workdir runs/demo_finetune
    mae-jax train --config demo:segment --workdir runs/demo_segment

start from the demo's weights (compare with `--config.init.path=random`).
"""

from mae_jax.train import recipes

TASKS = ("pretrain", "linprobe", "finetune", "segment")


def get_config(task: str = "pretrain"):
    if task not in TASKS:
        raise ValueError(f"{task!r} is not one of {', '.join(TASKS)}")
    config = recipes.get(task)
    config.batch_size = 64
    config.model.update(image_size=(64, 64), patch=8, width=128, depth=4, heads=4)
    config.model.update(decoder_width=64, decoder_depth=1, decoder_heads=4)
    config.model.update(dtype="float32", remat="dots")  # the fastest on a CPU
    config.target.norm_pix_eps = 1e-2  # many patches this small are nearly flat
    config.data.update(name="photo_crops", path="datasets", eval_split="test")
    config.data.update(workers=0, threads=2, eval_crop=1.0)
    if task == "pretrain":
        config.steps = 1000
        config.optim.update(base_lr=4e-3, warmup_steps=100)  # 1e-3 at batch 64
        config.eval.update(knn_every_epochs=2.5, pictures_every_epochs=2.5)
        config.eval.update(knn_bank=3800, linear=True, baselines=True)
        config.checkpoint.every_steps = 200
        return config
    config.init.path = "runs/demo"
    if task == "linprobe":
        config.batch_size = 256
        config.optim.base_lr = 6.4  # the paper's peak learning rate, for any batch size
        config.data.update(augment="none", cache_features=True)
        config.eval.accuracy_every_epochs = 10.0
    if task == "finetune":
        config.steps = 600
        config.optim.update(base_lr=4e-3, warmup_steps=60)  # 1e-3 at batch 64
        config.classify.update(mixup=0.0, cutmix=0.0, erase=0.0, drop_path=0.0)
        config.data.update(augment="crop", crop_scale=(0.5, 1.0))
        config.eval.accuracy_every_epochs = 2.0
    if task == "segment":
        config.steps = 400
        config.batch_size = 32
        config.optim.update(base_lr=8e-3, warmup_steps=60)  # 1e-3 at batch 32
        config.segment.update(drop_path=0.0, scale=(0.75, 1.5))
        config.data.update(name="photo_mosaics", eval_split="validation")
        config.eval.update(accuracy_every_epochs=5.0, pictures_every_epochs=10.0, batch_size=64)
    return config
