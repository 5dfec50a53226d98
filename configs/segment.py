"""Fine-tuning for semantic segmentation, with a light head on the patches.

    mae-jax train --config segment:vit_b16 --workdir runs/segment_b \\
        --config.init.path=runs/pretrain_b --config.data.source=folder --config.data.path=DIR

DIR has SPLIT/images and SPLIT/masks with files of the same names for the splits train and
validation, and classes.txt with a name per line. `--config.segment.head=upsample` has convolutions
and progressive upsampling (SETR-PUP) before the linear layer. Layer decay and drop path are those
of `finetune`. This is not the paper's UPerNet: its mIoU on ADE20K, reported as 48.1 (B) and 53.6
(L), is not to be expected.
"""

from mae_jax.train import recipes

# Layer decay, drop path
RECIPES = {
    "vit_b16": (0.65, 0.1),
    "vit_l16": (0.75, 0.2),
    "vit_h14": (0.75, 0.3),
    "vit_h16": (0.75, 0.3),
    "vit_1b16": (0.75, 0.3),
    "vit_5b16": (0.75, 0.3),
}


def get_config(size: str = "vit_b16"):
    config = recipes.base()
    recipes.set_size(config, size)
    layer_decay, drop_path = RECIPES.get(size, RECIPES["vit_b16"])
    side = 518 if size == "vit_h14" else 512
    config.task = "segment"
    config.batch_size = 16
    config.epochs = 100.0
    config.model.update(image_size=(side, side), position="learned", dtype="bfloat16")
    config.segment.drop_path = drop_path
    config.optim.update(base_lr=1.6e-3, warmup_epochs=1.0, b2=0.999)  # 1e-4 at batch 16
    config.optim.update(layer_decay=layer_decay, decay_embeddings=False)
    config.data.eval_crop = 1.0
    config.eval.update(accuracy_every_epochs=5.0, pictures_every_epochs=5.0)
    config.eval.update(knn_every_epochs=-1.0, batch_size=16)
    return config
