"""k-nearest-neighbor accuracy of a checkpoint on ImageNet-1k, over the full dataset.

    mae-jax train --config knn:vit_b16 --workdir runs/knn_b \\
        --config.init.path=runs/pretrain_b

Nothing is trained. `mae-jax evaluate` does the same without a workdir.
"""

from mae_jax.train import recipes


def get_config(size: str = "vit_b16"):
    config = recipes.base()
    recipes.set_size(config, size)
    config.task = "classify"
    config.steps = 0
    config.model.update(position="learned", dtype="bfloat16")  # learned: the checkpoint's table
    config.classify.head = False
    config.batch_size = 256
    config.eval.update(knn_k=(20, 1, 5, 10, 100, 200), knn_bank=10**9, knn_queries=10**9)
    return config
