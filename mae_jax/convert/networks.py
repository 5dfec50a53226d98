"""The networks that the metadata of checkpoints describe, and the shapes of their arrays."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.convert.model_info import ModelInfo
from mae_jax.models.classifier import Classifier
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import MAE, make_mae
from mae_jax.models.patches import num_patch_values
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import make_encoder
from mae_jax.utils.pytree import flatten


def _variant(info: ModelInfo) -> VitVariant:
    return VitVariant(
        width=info.width,
        depth=info.depth,
        heads=info.heads or 1,  # has no influence on shapes
        patch=info.patch,
        decoder_width=info.decoder_width,
        decoder_depth=info.decoder_depth,
        decoder_heads=info.decoder_heads or 1,
        mlp_ratio=info.mlp_ratio,
        class_tokens=info.class_tokens,
    )


def make_autoencoder(info: ModelInfo, execution: ExecutionConfig = ExecutionConfig()) -> MAE:
    """Return the MAE of a checkpoint with a decoder; positional embeddings are parameters."""
    return make_mae(
        _variant(info),
        grid=info.grid,
        channels=info.channels,
        decoder_mlp_ratio=info.decoder_mlp_ratio,
        pos_embed="learned",
        layer_norm_eps=info.layer_norm_eps,
        execution=execution,
    )


def make_classifier(info: ModelInfo, execution: ExecutionConfig = ExecutionConfig()) -> Classifier:
    """Return the encoder of a checkpoint with its pooling and head."""
    encoder = make_encoder(
        _variant(info),
        info.grid,
        pos_embed="learned",
        layer_norm_eps=info.layer_norm_eps,
        final_norm=not info.fc_norm,
        execution=execution,
    )
    return Classifier(
        encoder,
        num_classes=info.num_classes,
        pool=info.pool,
        fc_norm=info.fc_norm,
        head_norm=info.head_norm,
        upsample_width=info.upsample_width,
    )


def to_variables(params: Mapping[str, Any]) -> dict[str, Any]:
    """Split a tree of all arrays into flax collections."""
    statistics = {name: tree for name, tree in params.items() if name == "head_norm"}
    return {
        "params": {name: tree for name, tree in params.items() if name not in statistics},
        "batch_stats": statistics,
    }


def expected_shapes(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a checkpoint, by parameter path."""
    network = make_autoencoder(info) if info.decoder_depth else make_classifier(info)
    num_patches = info.grid[0] * info.grid[1]
    patch_dim = num_patch_values(info.patch, info.channels)
    return dict(_init_shapes(network, num_patches, patch_dim))  # pyright: ignore[reportArgumentType]


@functools.lru_cache(maxsize=8)
def _init_shapes(
    network: MAE | Classifier, num_patches: int, patch_dim: int
) -> dict[str, tuple[int, ...]]:
    """Trace the initialization of a network, which takes longer than reading a small file."""
    inputs = [jnp.zeros((1, num_patches, patch_dim))]
    if isinstance(network, MAE):
        order = jnp.arange(num_patches)[None]
        inputs += [order[:, :1], order[:, 1:]]
    shapes: Any = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    tree = {**shapes["params"], **shapes.get("batch_stats", {})}
    return {name: leaf.shape for name, leaf in flatten(tree).items()}
