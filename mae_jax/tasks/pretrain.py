"""Masked-image pretraining: reconstruct the pixels of the masked patches (paper section 3)."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from mae_jax.models.attention import AttentionShape, attention_shape
from mae_jax.models.image_ops import denormalize, normalize
from mae_jax.models.layers import cast_kernels
from mae_jax.models.mae import MAE
from mae_jax.models.patches import gather_patches, patchify, unpatchify
from mae_jax.tasks import masking
from mae_jax.tasks.masking import Mask

Params = dict[str, Any]

# Folded into the key of a step for the choice of predicted patches: the samplers of masks derive
# theirs from small numbers, and the masks are the same whether some or all are predicted.
_CHOICE = 2**31 - 1


def patch_statistics(
    patches: Float[Array, "b n p"], eps: float
) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Mean and standard deviation of every patch."""
    mean = patches.mean(axis=-1, keepdims=True)
    # As in the reference: unbiased variance (p - 1), and eps inside the root.
    return mean, jnp.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + eps)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """The MAE objective over batches {"image": [b, h, w, c]}, of any type that `normalise` takes.

    grid: rows and columns of patches; patch: side in pixels; mean, std: per channel.
    mask: "random", "block", "grid", or "user" with `user_mask` bool [n] or [b, n], True = masked.
    predict_ratio: share of the masked patches that the decoder sees and predicts in training.
    """

    model: MAE
    grid: tuple[int, int]
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask: str = "random"
    mask_ratio: float = 0.75
    user_mask: np.ndarray | None = None
    predict_ratio: float = 1.0
    norm_pix: bool = True
    norm_pix_eps: float = 1e-6

    def __post_init__(self):
        if not 0 < self.predict_ratio <= 1:
            raise ValueError(
                f"decoder.predict_ratio={self.predict_ratio} must be above 0 and at most 1"
            )
        if self.mask not in (*masking.SAMPLERS, "user"):
            known = ", ".join((*masking.SAMPLERS, "user"))
            raise ValueError(f"mask.kind={self.mask!r}; use one of {known}")
        if (self.mask == "user") != (self.user_mask is not None):
            raise ValueError("mask.kind='user' and a mask file (mask.path) go together")
        if self.user_mask is not None:
            masking.check_user_mask(self.user_mask, self.num_patches)
            return
        kept = masking.len_keep(self.num_patches, self.mask_ratio)
        if self.mask == "grid":
            masking.check_grid(self.grid, kept)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_kept(self) -> int:
        """Patches that the encoder sees."""
        if self.user_mask is not None:
            return self.num_patches - int(np.atleast_2d(self.user_mask)[0].sum())
        return masking.len_keep(self.num_patches, self.mask_ratio)

    @property
    def num_masked(self) -> int:
        """Patches that the encoder does not see."""
        return self.num_patches - self.num_kept

    @property
    def num_predicted(self) -> int:
        """Masked patches that the decoder predicts in training: rounded, and at least one."""
        return max(1, round(self.predict_ratio * self.num_masked))

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """Of all that is computed, in training and in evaluation."""
        whole, kept = 1 + self.num_patches, 1 + self.num_kept
        encoder, decoder = self.model.encoder, self.model.decoder
        shapes = {
            attention_shape(tokens, encoder.width, encoder.num_heads) for tokens in (whole, kept)
        }
        for tokens in (whole, kept + self.num_predicted):
            shapes.add(attention_shape(tokens, decoder.width, decoder.num_heads))
        return shapes

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters {"encoder": ..., "decoder": ...}, float32."""
        values = self.model.decoder.patch_values
        order = jnp.arange(self.num_patches)[None]
        patches = jnp.zeros((1, self.num_patches, values))
        return dict(self.model.init(key, patches, order[:, :1], order[:, 1:])["params"])

    def init_stats(self) -> dict[str, Any]:
        """Nothing here has running statistics."""
        return {}

    def apply(self, method: str, params: Params, *args: Array) -> Array:
        """Runs a method of the model."""
        copies = cast_kernels(params, self.model.encoder.execution.dtype)
        return cast(Array, self.model.apply({"params": params, **copies}, *args, method=method))

    def sample_mask(self, key: Key[Array, ""], batch: int) -> Mask:
        """One independent mask per image (the same for all under a user mask [n])."""
        if self.user_mask is not None:
            return masking.user_mask(self.user_mask, batch, self.num_patches)
        return masking.SAMPLERS[self.mask](key, batch, self.grid, self.num_kept)

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """The batch with everything random about its loss, sampled for all its rows at once.

        "ids_keep" and "ids_masked" are those of a Mask; where not all masked patches are to be predicted,
        "ids_predicted" are those that are.
        """
        mask = self.sample_mask(key, len(batch["image"]))
        sampled = batch | mask._asdict()
        if self.num_predicted < self.num_masked:
            key = jax.random.fold_in(key, _CHOICE)
            sampled["ids_predicted"] = masking.sample_patches(
                key, mask.ids_masked, self.num_predicted
            )
        return sampled

    def loss(
        self, params: Params, stats: dict[str, Any], batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Mean squared error over the predicted patches of a sampled batch (paper section 3)."""
        patches, mask = (
            self.to_patches(batch["image"]),
            Mask(batch["ids_keep"], batch["ids_masked"]),
        )
        return self.loss_of_patches(params, patches, mask, batch.get("ids_predicted")), stats

    def loss_of_patches(
        self,
        params: Params,
        patches: Float[Array, "b n p"],
        mask: Mask,
        ids_predicted: Int[Array, "b q"] | None = None,
    ) -> Float[Array, ""]:
        """The loss of already normalised patches; all masked ones are predicted, or some."""
        if ids_predicted is None:
            ids_predicted = mask.ids_masked
        pred = self.apply("__call__", params, patches, mask.ids_keep, ids_predicted)
        target = gather_patches(patches, ids_predicted)
        if self.norm_pix:
            mean, std = patch_statistics(target, self.norm_pix_eps)
            target = (target - mean) / std
        return jnp.mean(jnp.square(pred - target))

    def to_patches(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b n p"]:
        """Normalised pixels, cut into patches."""
        return patchify(normalize(images, self.mean, self.std), self.patch)

    def features(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Mean of the encoder's patch tokens over the whole, unmasked image, float32."""
        tokens = self.apply("encode", params, self.to_patches(images))
        return tokens[:, 1:].astype(jnp.float32).mean(axis=1)

    def reconstruct(
        self, params: Params, images: Shaped[Array, "b h w c"], mask: Mask, stats: str = "gt"
    ) -> Shaped[Array, "b h w c"]:
        """The model's picture of each image from its kept patches alone.

        Under norm_pix predictions have no brightness or contrast of their own. `stats` says where
        those come from: "gt", each patch's own true mean and deviation, which the model has never
        seen; or "visible", those of the image's kept patches, near ones counting most.
        """
        patches = self.to_patches(images)
        pred = self.apply("predict", params, patches, *mask)
        if self.norm_pix:
            mean, std = patch_statistics(patches, self.norm_pix_eps)
            if stats == "visible":
                weights = self._gaussian_weights(mask.ids_keep)
                mean, std = (weights @ gather_patches(x, mask.ids_keep) for x in (mean, std))
            elif stats != "gt":
                raise ValueError(f"stats={stats!r}; use 'gt' or 'visible'")
            pred = pred * std + mean
        pixels = unpatchify(pred, self.patch, self.grid)
        return denormalize(pixels, self.mean, self.std, images.dtype)

    def _gaussian_weights(self, ids_keep: Int[Array, "b k"]) -> Float[Array, "b n k"]:
        """Weights of the kept patches for every patch: a Gaussian of one patch, summing to 1."""
        places = jnp.indices(self.grid).reshape(2, -1).T.astype(jnp.float32)
        offsets = places[None, :, None] - places[ids_keep][:, None]
        return jax.nn.softmax(-jnp.square(offsets).sum(axis=-1) / 2, axis=-1)
