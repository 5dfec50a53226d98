"""MAE on crops of photographs that ship inside Python packages, for a machine without a GPU.

    make demo

A small ViT learns for minutes, not days. What to expect is in the README.
"""

from configs import common


def get_config():
    config = common.base()
    config.batch_size = 64
    config.steps = 1000
    config.model.update(image_size=(64, 64), patch=8, width=128, depth=4, heads=4)
    config.model.update(decoder_width=64, decoder_depth=1, decoder_heads=4)
    config.model.remat = "dots"  # the fastest on a CPU
    config.target.norm_pix_eps = 1e-2  # of patches this small many are nearly flat
    config.optim.base_lr = 4e-3  # 1e-3 at batch 64
    config.optim.warmup_steps = 100
    config.data.update(name="photo_crops", path="datasets", eval_split="test")
    config.data.update(workers=0, threads=2, eval_crop=1.0)
    config.eval.update(knn_every_epochs=2.5, pictures_every_epochs=2.5)
    config.eval.update(knn_bank=3800, knn_baselines=True)
    config.checkpoint.every_steps = 200
    return config
