"""Semantic segmentation: cross-entropy of every labeled pixel."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from mae_jax.models.segmentation import LinearHead, upsample
from mae_jax.tasks.supervised import Params, Stats, SupervisedTask, apply_with_stats


def pixel_cross_entropy(
    logits: Float[Array, "b h w classes"],
    masks: Int[Array, "b h w"],
    ignore: int,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Compute the mean cross-entropy over the pixels that are not ignored; 0 without any.

    Args:
      count: number of pixels to divide the sum by; by default those that are not ignored.
    """
    labeled = masks != ignore
    labels = jnp.where(labeled, masks, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    count = labeled.sum() if count is None else count
    return jnp.where(labeled, losses, 0.0).sum() / jnp.maximum(count, 1)


@dataclass(frozen=True)
class SegmentationProbe:
    """A linear head on patch features: {"grid": [b, *shape], "mask": int [b, h, w]}.

    shape: rows, columns and width of the features. ignore: class number of pixels without label.
    align_corners: of the logits' upsampling to the mask, as in `upsample`.
    """

    head: LinearHead
    shape: tuple[int, int, int]
    ignore: int
    align_corners: bool = False

    def init(self, key: Key[Array, ""]) -> Params:
        """Initialize the parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Initialize the running statistics."""
        return self._init(jax.random.key(0))["batch_stats"]

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        return dict(self.head.init(key, jnp.zeros((1, *self.shape)), False))

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Return the batch; nothing is random."""
        del key
        return batch

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the loss of a batch, and the updated statistics."""
        variables = {"params": params, "batch_stats": stats}
        logits, stats = apply_with_stats(self.head, variables, batch["grid"], train=True)
        masks = batch["mask"].astype(jnp.int32)
        _, height, width = masks.shape
        logits = upsample(logits, (height, width), align_corners=self.align_corners)
        return pixel_cross_entropy(logits, masks, self.ignore), stats

    def logits(
        self, params: Params, stats: Stats, grid: Float[Array, "b y x d"]
    ) -> Float[Array, "b y x classes"]:
        """Compute the logits of every patch in evaluation mode."""
        return self.head.apply({"params": params, "batch_stats": stats}, grid, False)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Segment(SupervisedTask):
    """Cross-entropy of pixels over batches {"image": [b, h, w, c], "mask": int [b, h, w]}.

    ignore: class number of pixels without label.
    """

    prefix: ClassVar[str] = "segment."

    ignore: int

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Add "labeled" [b], the mean number of labeled pixels of an image of the global batch.

        Every labeled pixel of a batch weighs the same, in whatever micro-batch it is. With drop
        path also add "drop_path_noise" [b, depth, 2].
        """
        masks = batch["mask"].astype(jnp.int32)
        labeled = (masks != self.ignore).sum(axis=(1, 2)).astype(jnp.float32)
        sampled = {"labeled": jnp.broadcast_to(labeled.mean(), labeled.shape)}
        return batch | sampled | self.sample_drop_path(key, len(masks))

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the loss of a batch from `sample`, and the updated statistics."""
        logits, stats = self.train_logits(params, stats, batch)
        masks = batch["mask"].astype(jnp.int32)
        _, height, width = masks.shape
        logits = upsample(logits, (height, width))
        logits = self.model.encoder.execution.shard_activations(logits)
        count = batch["labeled"].sum()
        return pixel_cross_entropy(logits, masks, self.ignore, count), stats

    def predict(
        self, params: Params, stats: Stats, images: Shaped[Array, "b h w c"]
    ) -> Int[Array, "b h w"]:
        """Return the class of every pixel; the number of classes where a logit is NaN/Inf."""
        logits = self.outputs(params, stats, images).logits
        assert logits is not None
        _, height, width, _ = images.shape
        logits = upsample(logits, (height, width))
        finite = jnp.isfinite(logits).all(axis=-1)
        return jnp.where(finite, logits.argmax(axis=-1), self.model.num_classes)
