"""Masked-image pretraining: reconstruct the pixels of the masked patches (paper section 3)."""

import math
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from mae_jax.models.attention import AttentionShape, attention_shape
from mae_jax.models.image_ops import denormalize, normalize
from mae_jax.models.layers import make_variables
from mae_jax.models.mae import MAE
from mae_jax.models.patches import gather_patches, patch_corners, patchify, unpatchify
from mae_jax.tasks import masking
from mae_jax.tasks.masking import Mask
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides, height_width

Params = dict[str, Any]

# Folded into the key of a step to sample the predicted patches, so that masks are the same whether
# all masked patches are predicted or some. The mask samplers fold in small numbers only.
_PREDICTED = 2**31 - 1
_DROP_PATH = 2**31 - 2  # likewise, to sample the noise of drop path


def patch_statistics(
    patches: Float[Array, "b n p"], eps: float, valid: Bool[Array, "b n p"] | None = None
) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Compute mean and standard deviation of every patch, over all values or the valid ones.

    A patch with one valid value has variance 0, as a constant one; one with none also mean 0.
    """
    # As in the reference: unbiased variance (ddof 1), and eps inside the square root.
    if valid is None:
        mean = patches.mean(axis=-1, keepdims=True)
        return mean, jnp.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + eps)
    count = valid.sum(axis=-1, keepdims=True)
    mean = jnp.where(valid, patches, 0).sum(axis=-1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(valid, jnp.square(patches - mean), 0).sum(axis=-1, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1) + eps)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """The MAE objective over batches {"image": [b, h, w, c]}, of any dtype of `normalize`.

    grid: rows and columns of patches; patch: side of a patch, or its height and width, pixels;
    mean, std: per channel; mask: masking strategy, "random", "block", "grid", or "user" with
    `user_mask`, bool [n] or [r, n], True = masked; mask_cell: side, in patches, of the cells that
    "random" hides, and `mask_ratio` counts; predict_ratio: fraction of the masked patches that the
    decoder sees and predicts in training; norm_pix: normalize the pixels of each target patch
    (norm_pix_loss). The encoder's drop path is on in training.

    nodata: NaN of images has no data. The encoder sees the mean there, and the loss leaves it out:
    it is the mean over all valid values of the predicted patches of a global batch, and 0 without
    any. Masks stay as they are; patches without data are predicted only if there are no others.

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    model: MAE
    grid: tuple[int, int]
    patch: Sides
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask: str = "random"
    mask_ratio: float = 0.75
    mask_cell: int = 1
    user_mask: np.ndarray | None = None
    predict_ratio: float = 1.0
    norm_pix: bool = True
    norm_pix_eps: float = 1e-6
    nodata: bool = False

    def __post_init__(self):
        if not 0 < self.predict_ratio <= 1:
            problem = "must be above 0 and at most 1"
            raise UserError(problem, key="decoder.predict_ratio", value=self.predict_ratio)
        if self.mask not in (*masking.SAMPLERS, "user"):
            problem = f"must be one of {', '.join((*masking.SAMPLERS, 'user'))}"
            raise UserError(problem, key="mask.kind", value=self.mask)
        if (self.mask == "user") != (self.user_mask is not None):
            needs = "needs a mask file: set mask.path"
            unused = "does not use the mask file of mask.path: set mask.kind='user'"
            problem = needs if self.mask == "user" else unused
            raise UserError(problem, key="mask.kind", value=self.mask)
        if self.mask != "random" and self.mask_cell != 1:
            problem = f"is for mask.kind='random': mask.kind='{self.mask}' needs 1"
            raise UserError(problem, key="mask.cell", value=self.mask_cell)
        if self.user_mask is not None:
            masking.check_user_mask(self.user_mask, self.num_patches)
            return
        if self.mask == "grid":
            masking.check_grid(self.grid, self.num_kept)
        assert self.num_kept  # raises an error if the ratio or the cells do not fit

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_kept(self) -> int:
        """Number of patches that the encoder sees."""
        if self.user_mask is not None:
            return self.num_patches - int(np.atleast_2d(self.user_mask)[0].sum())
        return self._kept_cells * self.mask_cell**2

    @property
    def _kept_cells(self) -> int:
        """Number of cells that the encoder sees."""
        rows, columns = self._cells
        unit = "patches" if self.mask_cell == 1 else "cells"
        return masking.len_keep(rows * columns, self.mask_ratio, unit)

    @property
    def _cells(self) -> tuple[int, int]:
        """Rows and columns of cells, which are patches unless `mask_cell` is above 1."""
        return masking.cell_grid(self.grid, self.mask_cell, self.patch)

    @property
    def num_masked(self) -> int:
        """Number of patches that the encoder does not see."""
        return self.num_patches - self.num_kept

    @property
    def num_predicted(self) -> int:
        """Number of masked patches that the decoder predicts in training, at least one."""
        return max(1, round(self.predict_ratio * self.num_masked))

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """Attention shapes of training and of evaluation."""
        class_tokens = self.model.encoder.class_tokens
        everything, kept = class_tokens + self.num_patches, class_tokens + self.num_kept
        calls = [
            (self.model.encoder, (everything, kept)),
            (self.model.decoder, (everything, kept + self.num_predicted)),
        ]
        return {
            attention_shape(tokens, network.width, network.num_heads)
            for network, lengths in calls
            for tokens in lengths
        }

    def init(self, key: Key[Array, ""]) -> Params:
        """Initialize the parameters {"encoder": ..., "decoder": ...}, float32."""
        ids = jnp.arange(self.num_patches)[None]
        patches = jnp.zeros((1, self.num_patches, self.model.decoder.patch_values))
        return dict(self.model.init(key, patches, ids[:, :1], ids[:, 1:])["params"])

    def init_stats(self) -> dict[str, Any]:
        """Return {}: there are no running statistics."""
        return {}

    def apply(self, method: str, params: Params, *args: Array) -> Array:
        """Apply a method of the model."""
        variables = make_variables(params, self.model.encoder.execution.dtype)
        return cast(Array, self.model.apply(variables, *args, method=method))

    def sample_mask(self, key: Key[Array, ""], batch: int) -> Mask:
        """Sample an independent mask for every image; a user mask is not random."""
        if self.user_mask is not None:
            return masking.user_mask(self.user_mask, batch, self.num_patches)
        mask = masking.SAMPLERS[self.mask](key, batch, self._cells, self._kept_cells)
        return mask if self.mask_cell == 1 else masking.cell_mask(mask, self.grid, self.mask_cell)

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Add everything random about the loss to a global batch, for all rows at once.

        This is the Mask, "ids_keep" [b, k] and "ids_masked" [b, m]; if not all masked patches are
        predicted, also "ids_predicted" [b, q]; with drop path, "drop_path_noise" [b, depth, 2];
        with nodata, "valid_values" [b], the mean number per image of values that the loss is over,
        so that every one weighs the same, in whatever micro-batch it is.
        """
        mask = self.sample_mask(key, len(batch["image"]))
        sampled = batch | mask._asdict()
        valid, ids_predicted = self.valid_values(batch["image"]), mask.ids_masked
        counts = None if valid is None else valid.sum(axis=-1)
        if self.num_predicted < self.num_masked:
            predicted_key = jax.random.fold_in(key, _PREDICTED)
            empty = None if counts is None else _take(counts, ids_predicted) == 0
            ids_predicted = masking.sample_patches(
                predicted_key, ids_predicted, self.num_predicted, last=empty
            )
            sampled["ids_predicted"] = ids_predicted
        if counts is not None:
            mean_count = _take(counts, ids_predicted).sum(axis=1).astype(jnp.float32).mean()
            sampled["valid_values"] = jnp.broadcast_to(mean_count, len(batch["image"]))
        encoder = self.model.encoder
        if encoder.drop_path:
            shape = (len(batch["image"]), encoder.depth, 2)
            noise = jax.random.uniform(jax.random.fold_in(key, _DROP_PATH), shape)
            sampled["drop_path_noise"] = noise
        return sampled

    def loss(
        self, params: Params, stats: dict[str, Any], batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Compute the MSE of the predicted patches of a batch from `sample` (paper section 3)."""
        patches = self.to_patches(batch["image"])
        mask = Mask(batch["ids_keep"], batch["ids_masked"])
        predicted, noise = batch.get("ids_predicted"), batch.get("drop_path_noise")
        valid = self.valid_values(batch["image"])
        if valid is None:
            return self.loss_of_patches(params, patches, mask, predicted, noise), stats
        errors = self.squared_errors(params, patches, mask, predicted, noise, valid)
        return errors.sum() / jnp.maximum(batch["valid_values"].sum(), 1), stats

    def loss_of_patches(
        self,
        params: Params,
        patches: Float[Array, "b n p"],
        mask: Mask,
        ids_predicted: Int[Array, "b q"] | None = None,
        drop_path_noise: Float[Array, "b depth 2"] | None = None,
    ) -> Float[Array, ""]:
        """Compute the loss of normalized patches; all masked ones are predicted, or some."""
        return jnp.mean(self.squared_errors(params, patches, mask, ids_predicted, drop_path_noise))

    def squared_errors(
        self,
        params: Params,
        patches: Float[Array, "b n p"],
        mask: Mask,
        ids_predicted: Int[Array, "b q"] | None = None,
        drop_path_noise: Float[Array, "b depth 2"] | None = None,
        valid: Bool[Array, "b n p"] | None = None,
    ) -> Float[Array, "b q p"]:
        """Compute the squared errors of the predicted patches; 0 where values are not valid."""
        if ids_predicted is None:
            ids_predicted = mask.ids_masked
        args = patches, mask.ids_keep, ids_predicted
        if drop_path_noise is not None:
            args = *args, jnp.moveaxis(drop_path_noise, 0, -1)
        pred = self.apply("__call__", params, *args)
        with jax.named_scope("loss"):
            if valid is not None:
                valid = gather_patches(valid, ids_predicted)
            target = self.to_targets(gather_patches(patches, ids_predicted), valid)
            errors = jnp.square(pred - target)
            return errors if valid is None else jnp.where(valid, errors, 0)

    def to_targets(
        self, patches: Float[Array, "b q p"], valid: Bool[Array, "b q p"] | None = None
    ) -> Float[Array, "b q p"]:
        """Return the regression targets of normalized patches: with norm_pix each standardized.

        They are 0 where values are not valid.
        """
        if self.norm_pix:
            mean, std = patch_statistics(patches, self.norm_pix_eps, valid)
            patches = (patches - mean) / std
        return patches if valid is None else jnp.where(valid, patches, 0)

    def to_patches(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b n p"]:
        """Normalize images and cut them into patches."""
        return patchify(normalize(images, self.mean, self.std, self.nodata), self.patch)

    def valid_values(self, images: Shaped[Array, "b h w c"]) -> Bool[Array, "b n p"] | None:
        """Return which values of the patches have data; None without `nodata`: all have."""
        return patchify(~jnp.isnan(images), self.patch) if self.nodata else None

    def features(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Return the global feature of unmasked images, float32: see `Encoder.global_feature`."""
        return self.apply("global_feature", params, self.to_patches(images))

    def grid_features(
        self, params: Params, images: Shaped[Array, "b h w c"]
    ) -> Float[Array, "b y x d"]:
        """Return the encoder's patch tokens of unmasked images, float32."""
        tokens = self.apply("encode", params, self.to_patches(images))
        patches = tokens[:, self.model.encoder.class_tokens :]
        return patches.astype(jnp.float32).reshape(len(images), *self.grid, -1)

    def reconstruct(
        self, params: Params, images: Shaped[Array, "b h w c"], mask: Mask, stats: str = "gt"
    ) -> Shaped[Array, "b h w c"]:
        """Reconstruct images, in their dtype, from their kept patches alone.

        With norm_pix the model does not predict the mean and standard deviation of a patch. `stats`
        is where these come from: "gt", the patch itself, which the model has not seen; or
        "visible", the kept patches of the image, nearer ones with more weight.

        Raises:
          UserError: `stats` is unknown.
        """
        patches, valid = self.to_patches(images), self.valid_values(images)
        pred = self.apply("predict", params, patches, *mask)
        if self.norm_pix:
            mean, std = patch_statistics(patches, self.norm_pix_eps, valid)
            if stats == "visible":
                weights = self._gaussian_weights(mask.ids_keep, valid)
                mean, std = (weights @ gather_patches(x, mask.ids_keep) for x in (mean, std))
            elif stats != "gt":
                raise UserError("must be 'gt' or 'visible'", key="stats", value=stats)
            pred = pred * std + mean
        pixels = unpatchify(pred, self.patch, self.grid)
        return denormalize(pixels, self.mean, self.std, images.dtype)

    def _gaussian_weights(
        self, ids_keep: Int[Array, "b k"], valid: Bool[Array, "b n p"] | None
    ) -> Float[Array, "b n k"]:
        """Return weights of the kept patches for every patch.

        They are a Gaussian of the distance; sigma is the side of a square of a patch's area.
        Patches without valid values count only if there are no others.
        """
        sigma = math.sqrt(math.prod(height_width(self.patch)))
        positions = jnp.asarray(patch_corners(self.grid, self.patch) / sigma, jnp.float32)
        offsets = positions[None, :, None] - positions[ids_keep][:, None]
        logits = -jnp.square(offsets).sum(axis=-1) / 2
        if valid is not None:
            has_data = _take(valid.any(axis=-1), ids_keep)
            logits = jnp.where(has_data[:, None], logits, logits - 1e6)
        return jax.nn.softmax(logits, axis=-1)


def _take(values: Shaped[Array, "b n"], ids: Int[Array, "b i"]) -> Shaped[Array, "b i"]:
    """Return the values of patches of every image."""
    return jnp.take_along_axis(values, ids, axis=1)
