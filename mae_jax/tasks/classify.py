"""Supervised classification: fine-tuning, linear probing, training from scratch (section 4)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Shaped

from mae_jax.models.attention import AttentionShape, attention_shape
from mae_jax.models.classifier import Classifier, Outputs, Probe
from mae_jax.models.image_ops import normalize
from mae_jax.models.layers import make_variables
from mae_jax.models.patches import patchify
from mae_jax.tasks import mixup
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.optimizer import stop_frozen_gradients
from mae_jax.utils.errors import UserError

Params = dict[str, Any]
Stats = dict[str, Any]


def apply_with_stats(
    module: Any, variables: dict[str, Any], *args: Any, **named: Any
) -> tuple[Any, Stats]:
    """Apply a module; return its outputs and the updated running statistics."""
    outputs, updated = module.apply(variables, *args, **named, mutable=["batch_stats"])
    return outputs, updated.get("batch_stats", {})


@dataclass(frozen=True)
class ProbeTask:
    """Cross-entropy of a head on features: {"pooled": [b, *shape], "label": int [b]}."""

    probe: Probe
    shape: tuple[int, ...]

    def init(self, key: Key[Array, ""]) -> Params:
        """Initialize the parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Initialize the running statistics."""
        return self._init(jax.random.key(0)).get("batch_stats", {})

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        return dict(self.probe.init(key, jnp.zeros((1, *self.shape)), False))

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Add "target", one-hot labels; nothing is random."""
        del key
        return batch | {"target": jax.nn.one_hot(batch["label"], self.probe.num_classes)}

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the mean loss of a batch from `sample`, and the updated statistics."""
        variables = {"params": params, "batch_stats": stats}
        logits, stats = apply_with_stats(self.probe, variables, batch["pooled"], train=True)
        return optax.softmax_cross_entropy(logits, batch["target"]).mean(), stats

    def logits(self, params: Params, stats: Stats, features: Array) -> Float[Array, "b classes"]:
        """Compute logits in evaluation mode."""
        return self.probe.apply({"params": params, "batch_stats": stats}, features, False)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Cross-entropy over batches {"image": [b, h, w, c], "label": int [b]}.

    Instead of "image" a batch may have precomputed features, "pooled", from the method of that
    name: then only the head is computed, without mixup, CutMix and random erasing.

    patch: side of a patch, pixels; mean, std: per channel; train_last_blocks: None trains all
    parameters, 0 the head, k also the last k blocks (partial fine-tuning); smoothing: label
    smoothing; erase: probability of random erasing.

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    model: Classifier
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_last_blocks: int | None = None
    smoothing: float = 0.0
    mixup: Mixup = Mixup()
    erase: float = 0.0

    def __post_init__(self):
        for name in ("smoothing", "erase"):
            value = vars(self)[name]
            if not 0 <= value <= 1:
                raise UserError("must be within 0 to 1", key=f"classify.{name}", value=value)
        drop_path = self.model.encoder.drop_path
        if not 0 <= drop_path < 1:
            problem = "must be at least 0 and below 1"
            raise UserError(problem, key="classify.drop_path", value=drop_path)
        blocks, depth = self.train_last_blocks, self.model.encoder.depth
        if blocks is not None and not 0 <= blocks <= depth:
            problem = f"must be from 0 to the {depth} blocks of the encoder"
            raise UserError(problem, key="optim.train_last_blocks", value=blocks)

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """Attention shapes of the encoder."""
        encoder = self.model.encoder
        rows, columns = encoder.grid
        return {attention_shape(1 + rows * columns, encoder.width, encoder.num_heads)}

    def init(self, key: Key[Array, ""]) -> Params:
        """Initialize the parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Initialize the running statistics; {} without BatchNorm."""
        return self._init(jax.random.key(0)).get("batch_stats", {})

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rows, columns = self.model.encoder.grid
        values = self.patch**2 * len(self.mean)
        return dict(self.model.init(key, jnp.zeros((1, rows * columns, values))))

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Add everything random about the loss to a global batch, for all rows at once.

        This is "target" [b, classes]; "pixels" instead of "image" if images are erased or mixed;
        "drop_path_noise" [b, depth, 2] with drop path.
        """
        erase_key, mix_key, path_key = jax.random.split(key, 3)
        targets = jax.nn.one_hot(batch["label"], self.model.num_classes)
        targets = optax.smooth_labels(targets, self.smoothing)
        sampled = {}
        if "image" in batch and (self.erase or self.mixup.active):
            pixels = normalize(batch["image"], self.mean, self.std)
            if self.erase:
                pixels = mixup.random_erasing(erase_key, pixels, self.erase)
            if self.mixup.active:
                mix = self.mixup.sample(mix_key, len(pixels), (pixels.shape[1], pixels.shape[2]))
                pixels, targets = mixup.mix_images(pixels, mix), mixup.mix_targets(targets, mix)
            batch = {name: x for name, x in batch.items() if name != "image"}
            sampled["pixels"] = pixels
        if self.model.encoder.drop_path:
            shape = (len(targets), self.model.encoder.depth, 2)
            sampled["drop_path_noise"] = jax.random.uniform(path_key, shape)
        return batch | sampled | {"target": targets}

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the mean loss of a batch from `sample`, and the updated statistics."""
        params = dict(stop_frozen_gradients(params, self.train_last_blocks))
        if "pooled" in batch:
            return self._head.loss(params, stats, batch)
        pixels = batch.get("pixels")
        if pixels is None:
            pixels = normalize(batch["image"], self.mean, self.std)
        noise = batch.get("drop_path_noise")
        if noise is not None:
            noise = jnp.moveaxis(noise, 0, -1)
        patches = patchify(pixels, self.patch)
        variables = make_variables(params, self.model.encoder.execution.dtype)
        variables["batch_stats"] = stats
        outputs, stats = apply_with_stats(
            self.model, variables, patches, train=True, drop_path_noise=noise
        )
        return optax.softmax_cross_entropy(outputs.logits, batch["target"]).mean(), stats

    @property
    def _head(self) -> ProbeTask:
        """The objective of the head alone, for precomputed features."""
        model = self.model
        probe = Probe(
            model.num_classes,
            norm=model.head_norm,
            attention_heads=model.attention_heads,
            init_std=model.head_init_std,
        )
        return ProbeTask(probe, ())

    def outputs(self, params: Params, stats: Stats, images: Shaped[Array, "b h w c"]) -> Outputs:
        """Apply encoder and head to images in evaluation mode."""
        patches = patchify(normalize(images, self.mean, self.std), self.patch)
        return self.model.apply({"params": params, "batch_stats": stats}, patches)  # type: ignore[return-value]

    def pooled(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b *n d"]:
        """Return the features of images that the head takes."""
        return self._encode_without_head(params, images).pooled

    def features(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Return the mean of the patch tokens, float32, after the fc_norm of mean pooling."""
        outputs = self._encode_without_head(params, images)
        if self.model.fc_norm and self.model.pool == "mean":
            return outputs.pooled
        return outputs.tokens[:, 1:].astype(jnp.float32).mean(axis=1)

    def _encode_without_head(self, params: Params, images: Shaped[Array, "b h w c"]) -> Outputs:
        patches = patchify(normalize(images, self.mean, self.std), self.patch)
        return self.model.clone(num_classes=0).apply({"params": params}, patches)  # type: ignore[return-value]
