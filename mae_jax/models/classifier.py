"""Pooling and classification heads on top of an encoder of unmasked images."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from mae_jax.models.batch_norm import BatchNorm
from mae_jax.models.layers import Dense, Intermediates, layer_norm
from mae_jax.models.segmentation import UpsampleHead
from mae_jax.models.vit import Encoder

POOLS = ("cls", "mean", "attention")


class AttentionPool(nn.Module):
    """Attention pooling: one learned query attends to the patch tokens."""

    num_heads: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        width = tokens.shape[-1]
        init = nn.initializers.normal(0.02)
        query = self.param("query", init, (self.num_heads, width // self.num_heads))
        keys, values = (
            rearrange(
                Dense(width, jnp.float32, name=name)(tokens),
                "b n (h e) -> b n h e",
                h=self.num_heads,
            )
            for name in ("key", "value")
        )
        scores = jnp.einsum("he,bnhe->bhn", query, keys) * query.shape[-1] ** -0.5
        pooled = jnp.einsum("bhn,bnhe->bhe", jax.nn.softmax(scores), values)
        return rearrange(pooled, "b h e -> b (h e)")


def make_head(
    num_classes: int, *, norm: bool, attention_heads: int, init_std: float
) -> Callable[..., Float[Array, "b *grid classes"]]:
    """Return a head: attention pooling (none for 0 heads), optional BatchNorm and a linear layer.

    The head takes features and whether to train: [b, d], for attention pooling [b, n, d], for
    segmentation the grid of patches [b, y, x, d].
    """

    def head(x: Array, train: bool) -> Array:
        if attention_heads:
            x = AttentionPool(attention_heads, name="attention_pool")(x)
        if norm:
            x = BatchNorm(name="head_norm")(x, train)
        kernel_init = nn.initializers.normal(init_std)
        return nn.Dense(num_classes, kernel_init=kernel_init, name="head")(x)

    return head


class Probe(nn.Module):
    """A head for precomputed features; its parameters have the same names as in Classifier."""

    num_classes: int
    norm: bool = True
    attention_heads: int = 0
    init_std: float = 0.01

    @nn.compact
    def __call__(self, features: Float[Array, "b *n d"], train: bool) -> Float[Array, "b classes"]:
        head = make_head(
            self.num_classes,
            norm=self.norm,
            attention_heads=self.attention_heads,
            init_std=self.init_std,
        )
        return head(features, train)


class Outputs(NamedTuple):
    """Outputs of a Classifier.

    tokens: of the encoder, class tokens first; global_feature: see `Encoder.global_feature`;
    pooled: input of the head, float32; logits: None without a head, [b, y, x, classes] of
    segmentation; intermediates: of every block, None unless asked for.
    """

    tokens: Float[Array, "b t d"]
    global_feature: Float[Array, "b d"]
    pooled: Float[Array, "b *n d"]
    logits: Float[Array, "b *grid classes"] | None
    intermediates: Intermediates | None


class Classifier(nn.Module):
    """An encoder of unmasked images with pooling and, if `num_classes` is not 0, a head.

    pool: "cls" token (of several the mean), "mean" of the patch tokens, "attention" pooling of
    them, or for segmentation "grid": the head classifies every patch. fc_norm: LayerNorm after
    pooling instead of before (the reference's fine-tuning). head_norm: BatchNorm before the linear
    layer (its linear probe). head_init_std: of the kernel of that layer. upsample_width: features
    of an `UpsampleHead` before it, 0 for none.
    """

    encoder: Encoder
    num_classes: int = 0
    pool: str = "cls"
    fc_norm: bool = False
    head_norm: bool = False
    head_init_std: float = 2e-5
    upsample_width: int = 0

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b n p"],
        return_intermediates: bool = False,
        train: bool = False,
        drop_path_noise: Float[Array, "depth 2 b"] | None = None,
    ) -> Outputs:
        """Encode, pool and classify; `drop_path_noise` as in `Encoder`."""
        tokens, global_feature, intermediates = self.encoder.with_global_feature(
            patches, drop_path_noise, return_intermediates=return_intermediates
        )
        pooled = self.pool_tokens(tokens)
        if self.fc_norm:
            pooled = layer_norm("fc_norm", self.encoder.layer_norm_eps, jnp.float32)(pooled)
        logits = None
        if self.num_classes:
            features = pooled
            if self.upsample_width:
                upsample = UpsampleHead(
                    self.upsample_width, self.encoder.execution, name="upsample"
                )
                features = upsample(pooled)
            head = make_head(
                self.num_classes,
                norm=self.head_norm,
                attention_heads=self.attention_heads,
                init_std=self.head_init_std,
            )
            logits = head(features, train)
        return Outputs(tokens, global_feature, pooled, logits, intermediates)

    def pool_tokens(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b *n d"]:
        """Return the input of the head: all patch tokens for attention pooling and segmentation."""
        tokens = tokens.astype(jnp.float32)
        count = self.encoder.class_tokens
        if self.pool == "cls":
            return tokens[:, :count].mean(axis=1)
        patches = tokens[:, count:]
        if self.pool == "grid":
            return rearrange(patches, "b (y x) d -> b y x d", y=self.encoder.grid[0])
        return patches.mean(axis=1) if self.pool == "mean" else patches

    @property
    def attention_heads(self) -> int:
        """Number of heads of attention pooling, 0 for other poolings."""
        return self.encoder.num_heads if self.pool == "attention" else 0
