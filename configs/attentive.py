"""Attentive probing: as linear probing, but a learned query pools the frozen encoder's patches.

    python train.py --config configs/attentive.py:vit_b16 --workdir runs/attentive_b \\
        --config.init.path=runs/pretrain_b

MAE's features lie in its patches more than in their mean: for MAE-B attentive probes are reported
at up to 75.6 % top-1 (Psomas et al. 2025), where linear probes reach 67.7; not measured by us.
"""

from configs import linprobe


def get_config(size: str = "vit_b16"):
    config = linprobe.get_config(size)
    config.classify.pool = "attention"
    return config
