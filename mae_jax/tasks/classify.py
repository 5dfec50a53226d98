"""Supervised classification: fine-tuning, linear probing, training from scratch (section 4)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from mae_jax.models.classifier import Probe
from mae_jax.tasks import mixup
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.supervised import Params, Stats, SupervisedTask, apply_with_stats
from mae_jax.utils.errors import UserError


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
class Classify(SupervisedTask):
    """Cross-entropy over batches {"image": [b, h, w, c], "label": int [b]}.

    Instead of "image" a batch may have precomputed features, "pooled", from the method of that
    name: then only the head is computed, without mixup, CutMix and random erasing.

    smoothing: label smoothing; erase: probability of random erasing.

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    prefix: ClassVar[str] = "classify."

    smoothing: float = 0.0
    mixup: Mixup = Mixup()
    erase: float = 0.0

    def __post_init__(self):
        for name in ("smoothing", "erase"):
            value = vars(self)[name]
            if not 0 <= value <= 1:
                raise UserError("must be within 0 to 1", key=f"classify.{name}", value=value)
        super().__post_init__()

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
            pixels = self.normalize(batch["image"])
            if self.erase:
                pixels = mixup.random_erasing(erase_key, pixels, self.erase)
            if self.mixup.active:
                mix = self.mixup.sample(mix_key, len(pixels), (pixels.shape[1], pixels.shape[2]))
                pixels, targets = mixup.mix_images(pixels, mix), mixup.mix_targets(targets, mix)
            batch = {name: x for name, x in batch.items() if name != "image"}
            sampled["pixels"] = pixels
        sampled |= self.sample_drop_path(path_key, len(targets))
        return batch | sampled | {"target": targets}

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the mean loss of a batch from `sample`, and the updated statistics."""
        if "pooled" in batch:
            return self._head.loss(self.stop_gradients(params), stats, batch)
        logits, stats = self.train_logits(params, stats, batch)
        return optax.softmax_cross_entropy(logits, batch["target"]).mean(), stats

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
