"""Checkpoints of other programs and methods whose encoder is a plain ViT, made plain.

Each function changes a checkpoint that is its own, before the format is detected, and leaves all
others alone. It logs a warning that names every tensor it leaves out.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mae_jax.convert.weight_files import RawCheckpoint

log = logging.getLogger("mae_jax")

_MAE_LITE = "module.model."
# Attention heads by width and depth of its encoders, then of its decoders (models_mae.py).
_MAE_LITE_HEADS = {(192, 96, 1): (12, 3), (384, 192, 1): (12, 6)}
_MAE_LITE_OTHERS = re.compile(r"module\.(tch_model|attn_adapter|hidden_adapter|ema_model)\.")
_CROSS_DECODER = re.compile(r"(decoder_|mask_token$|wfm\.|dec_norms\.)")


def read_mae_lite(raw: RawCheckpoint, path: Path) -> None:
    """Keep the model of a checkpoint of MAE-Lite (Wang et al. 2023), whose ViT-Ti has 12 heads.

    With distillation it also contains the teacher and adapters between the two.
    """
    names = [name for name in raw.tensors if name.startswith(_MAE_LITE)]
    left_out = [name for name in raw.tensors if _MAE_LITE_OTHERS.match(name)]
    if not names or not all(name.startswith("module.") for name in raw.tensors):
        return
    # Unknown tensors keep their names, by which the check of all tensors refuses them.
    kept = {name: x for name, x in raw.tensors.items() if name not in set(left_out)}
    raw.tensors = {name.removeprefix(_MAE_LITE): x for name, x in kept.items()}
    _warn_left_out(path, "MAE-Lite", left_out)
    width, decoder_width = (_last_axis(raw, name) for name in ("cls_token", "mask_token"))
    blocks = {name.split(".")[1] for name in raw.tensors if name.startswith("decoder_blocks.")}
    if heads := _MAE_LITE_HEADS.get((width, decoder_width, len(blocks))):
        raw.metadata |= dict(zip(("heads", "decoder_heads"), heads))
    elif width in (192, 384) and not blocks:
        log.warning(
            "%s has the names of MAE-Lite, whose ViT-Ti and S have 12 attention heads, unlike the "
            "standard ones: if it is one of these, set --num-heads 12 (in Python, heads=12)",
            path,
        )


def _last_axis(raw: RawCheckpoint, name: str) -> int:
    return raw.tensors[name].shape[-1] if name in raw.tensors else 0


def read_cross_mae(raw: RawCheckpoint, path: Path) -> None:
    """Keep the encoder of a checkpoint of CrossMAE (Fu et al. 2024).

    Its decoder attends from the masked patches to the encoder's blocks, so the encoder has no final
    norm. As in the reference's linear probe, it gets a new one, of scale 1 and bias 0.
    """
    if not any(re.match(r"decoder_blocks\.\d+\.cross_attn\.", name) for name in raw.tensors):
        return
    left_out = [name for name in raw.tensors if _CROSS_DECODER.match(name)]
    raw.tensors = {name: x for name, x in raw.tensors.items() if name not in set(left_out)}
    _warn_left_out(path, "CrossMAE", left_out)
    token = raw.tensors.get("cls_token")
    if token is not None and not any(name.startswith("norm.") for name in raw.tensors):
        log.warning("%s has no final norm: it gets one of scale 1 and bias 0", path)
        raw.tensors["norm.weight"] = np.ones(token.shape[-1:], token.dtype)
        raw.tensors["norm.bias"] = np.zeros(token.shape[-1:], token.dtype)


def read_pixio_backbone(raw: RawCheckpoint, path: Path) -> None:
    """Keep the PixioModel of transformers' PixioBackbone, with the norm of the backbone.

    That norm, outside of the model, is the only one in the backbone's outputs.
    """
    norm = {name: x for name, x in raw.tensors.items() if name.startswith("layernorm.")}
    for prefix in ("encoder.", "pixio."):
        inner = {n.removeprefix(prefix): x for n, x in raw.tensors.items() if n.startswith(prefix)}
        is_backbone = "embeddings.cls_token" in inner and len(norm) == 2
        if is_backbone and len(inner) + len(norm) == len(raw.tensors):
            unused = [n for n in norm if n in inner and not np.array_equal(norm[n], inner[n])]
            _warn_left_out(path, "PixioBackbone", [prefix + name for name in unused])
            raw.tensors = inner | norm
            return


def _warn_left_out(path: Path, method: str, names: Iterable[str]) -> None:
    """Log a warning that names tensors, those of numbered blocks once."""
    if patterns := sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}):
        log.warning("%s is a file of %s: left out %s", path, method, ", ".join(patterns))
