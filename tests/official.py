"""The official PyTorch layout of MAE weights, as far as the golden arrays need it."""

import jax.numpy as jnp
import numpy as np

from mae_jax.trees import from_named

BLOCK = {
    "norm1.weight": "norm1/scale",
    "norm1.bias": "norm1/bias",
    "attn.qkv.weight": "attn/qkv/kernel",
    "attn.qkv.bias": "attn/qkv/bias",
    "attn.proj.weight": "attn/proj/kernel",
    "attn.proj.bias": "attn/proj/bias",
    "norm2.weight": "norm2/scale",
    "norm2.bias": "norm2/bias",
    "mlp.fc1.weight": "mlp/fc1/kernel",
    "mlp.fc1.bias": "mlp/fc1/bias",
    "mlp.fc2.weight": "mlp/fc2/kernel",
    "mlp.fc2.bias": "mlp/fc2/bias",
}
REST = {
    "cls_token": "encoder/cls_token",
    "pos_embed": "encoder/pos_embed/table",
    "patch_embed.proj.weight": "encoder/patch_embed/kernel",
    "patch_embed.proj.bias": "encoder/patch_embed/bias",
    "norm.weight": "encoder/norm/scale",
    "norm.bias": "encoder/norm/bias",
    "mask_token": "decoder/mask_token",
    "decoder_pos_embed": "decoder/pos_embed/table",
    "decoder_embed.weight": "decoder/embed/kernel",
    "decoder_embed.bias": "decoder/embed/bias",
    "decoder_norm.weight": "decoder/norm/scale",
    "decoder_norm.bias": "decoder/norm/bias",
    "decoder_pred.weight": "decoder/head/kernel",
    "decoder_pred.bias": "decoder/head/bias",
}


def our_names(names) -> dict[str, list[str]]:
    """Our parameter name -> the official names it is made of (one per block where stacked)."""
    ours: dict[str, list[str]] = {}
    blocks = [n for n in names if ".".join(n.split(".")[2:]) in BLOCK and "blocks." in n]
    for name in sorted(blocks, key=lambda n: int(n.split(".")[1])):
        stack, _, rest = name.split(".", 2)
        part = "decoder" if stack.startswith("decoder") else "encoder"
        ours.setdefault(f"{part}/blocks/{BLOCK[rest]}", []).append(name)
    for name in set(names) - set(blocks):
        ours[REST[name]] = [name]
    return ours


def to_ours(state_dict: dict[str, np.ndarray], learned_positions: bool) -> dict:
    """Official arrays as our parameter tree; sine-cosine tables are not parameters of ours."""

    def convert(name, array):
        if name == "patch_embed.proj.weight":  # (d, c, row, column) to (row column c, d)
            return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
        return array.T if name.endswith(".weight") and array.ndim == 2 else array

    leaves = {}
    for ours, theirs in our_names(state_dict).items():
        arrays = [convert(name, state_dict[name]) for name in theirs]
        leaves[ours] = jnp.stack(arrays) if "/blocks/" in ours else jnp.asarray(arrays[0])
    if not learned_positions:
        leaves = {name: leaf for name, leaf in leaves.items() if "pos_embed" not in name}
    return from_named(leaves)
