"""Train what a config describes, or resume it; see mae_jax/train/__main__.py.

python train.py --config configs/pretrain.py:vit_b16 --workdir runs/x [--config.key=value ...]
"""

from absl import app

from mae_jax.train.__main__ import main, parse_flags

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
