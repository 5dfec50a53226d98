"""The paper's ablations (Table 1 and figure 5), one setting changed at a time.

    mae-jax train --config ablations:vit_l16,mask_ratio_50 --workdir runs/ratio_50
    mae-jax train --config ablations:demo,mask_ratio_50 --workdir runs/toy_ratio_50

The argument is SCALE,ROW. Scale `vit_l16` is the paper's (800 epochs of ImageNet); `demo` takes two
minutes on two CPU cores. ROWS lists the rows. `python scripts/ablations.py` runs and evaluates all
at demo scale; results: docs/reports/ablations.md. Not included: Table 1c (mask tokens in the
encoder), the PCA and dVAE targets of 1d, fixed-size crops and color jitter of 1e. Not in the paper:
rows that predict only a part of the masked patches.
"""

from mae_jax.train import recipes

# Row -> the config keys that it sets. "baseline" has the defaults of the paper, or of the demo.
ROWS = {
    "baseline": {},
    # 1a: decoder depth, blocks
    "decoder_depth_1": {"model.decoder_depth": 1},
    "decoder_depth_2": {"model.decoder_depth": 2},
    "decoder_depth_4": {"model.decoder_depth": 4},
    "decoder_depth_8": {"model.decoder_depth": 8},
    "decoder_depth_12": {"model.decoder_depth": 12},
    # 1b: decoder width, features
    "decoder_width_128": {"model.decoder_width": 128},
    "decoder_width_256": {"model.decoder_width": 256},
    "decoder_width_512": {"model.decoder_width": 512},
    "decoder_width_768": {"model.decoder_width": 768},
    "decoder_width_1024": {"model.decoder_width": 1024},
    # 1d: reconstruction target
    "pixels": {"target.norm_pix": False},
    # 1e: augmentation; "none" is a center crop without a flip
    "no_augmentation": {"data.augment": "none"},
    # 1f: masking strategy
    "block_50": {"mask.kind": "block", "mask.ratio": 0.5},
    "block_75": {"mask.kind": "block"},
    "grid_75": {"mask.kind": "grid"},
    # figure 5: mask ratio, percent
    **{
        f"mask_ratio_{p}": {"mask.ratio": p / 100} for p in (10, 20, 25, 30, 40, 50, 60, 70, 80, 90)
    },
    # Pixio: cells of masks, class tokens, and these with a deep decoder
    "cell_2": {"mask.cell": 2},
    "cell_4": {"mask.cell": 4},
    "class_tokens_8": {"model.class_tokens": 8},
    "pixio": {"mask.cell": 2, "model.class_tokens": 8, "model.decoder_depth": 8},
    # not in the paper: share of the masked patches that is predicted, percent
    **{f"predict_{p}": {"decoder.predict_ratio": p / 100} for p in (50, 25)},
}
SCALES = ("vit_l16", "demo")


def get_config(arg: str = "vit_l16,baseline"):
    scale, _, row = arg.partition(",")
    if scale not in SCALES or row not in ROWS:
        raise ValueError(
            f"{arg!r} is not SCALE,ROW: a scale ({', '.join(SCALES)}) and a row ({', '.join(ROWS)})"
        )
    config = recipes.get("demo") if scale == "demo" else recipes.get("pretrain", scale)
    if scale == "demo":
        config.steps = 600
        config.eval.update(
            knn_every_epochs=0.0, pictures_every_epochs=0.0, linear=False, baselines=False
        )
        config.checkpoint.update(every_steps=600, max_to_keep=1)
    elif "mask.cell" in ROWS[row]:
        config.model.image_size = (256, 256)  # Pixio's: cells of 4 do not divide 14x14 patches
    config.update_from_flattened_dict(ROWS[row])
    return config
