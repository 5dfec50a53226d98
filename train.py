"""Train what a config describes, or resume it: the same command does both.

    python train.py --config configs/pretrain.py:vit_b16 --workdir runs/x [--config.key=value ...]

From any folder: mae-jax train --config pretrain:vit_b16 ...

Exit codes: 0 finished, or stopped on request with everything saved; 2 bad config or input;
3 aborted on NaN/Inf loss; 1 any other error.
"""

from absl import flags

from mae_jax.train import __main__ as command

flags.adopt_module_key_flags(command)

if __name__ == "__main__":
    command.run()
