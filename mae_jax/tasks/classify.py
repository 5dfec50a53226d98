"""Classification with labels: fine-tuning, probing and training from scratch (paper section 4)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Shaped

from mae_jax.models.attention import AttentionShape, attention_shape
from mae_jax.models.classifier import Classifier, Outputs, Probe
from mae_jax.models.image_ops import normalize
from mae_jax.models.layers import cast_kernels
from mae_jax.models.patches import patchify
from mae_jax.tasks import mixup
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.optimizer import stop_frozen_gradients

Params = dict[str, Any]
Stats = dict[str, Any]


def apply_with_stats(
    module: Any, variables: dict[str, Any], *args: Any, **named: Any
) -> tuple[Any, Stats]:
    """What a module makes of its arguments, and its running statistics afterwards."""
    made, changed = module.apply(variables, *args, **named, mutable=["batch_stats"])
    return made, changed.get("batch_stats", {})


@dataclass(frozen=True)
class ProbeTask:
    """Cross-entropy of a head alone, over {"pooled": [b, *shape], "label": int [b]}."""

    probe: Probe
    shape: tuple[int, ...]

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Running statistics before the first batch."""
        return self._init(jax.random.key(0)).get("batch_stats", {})

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        return dict(self.probe.init(key, jnp.zeros((1, *self.shape)), False))

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Adds "target", one-hot labels; nothing is random."""
        del key
        return batch | {"target": jax.nn.one_hot(batch["label"], self.probe.num_classes)}

    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Mean loss of a batch from `sample`, and the statistics after it."""
        variables = {"params": params, "batch_stats": stats}
        logits, stats = apply_with_stats(self.probe, variables, batch["pooled"], train=True)
        return optax.softmax_cross_entropy(logits, batch["target"]).mean(), stats

    def logits(self, params: Params, stats: Stats, features: Array) -> Float[Array, "b classes"]:
        """Outside training."""
        return self.probe.apply({"params": params, "batch_stats": stats}, features, False)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Cross-entropy over batches {"image": [b, h, w, c], "label": int [b]}.

    In place of "image" a batch may hold what the head takes, "pooled", as the method of that name
    makes it: then the head alone is computed, and images are neither mixed nor erased.

    patch: side in pixels; mean, std: per channel. train_last_blocks: None trains everything, 0 the
    head alone, k also the last k blocks. smoothing: of labels. erase: share of images in which a
    box is erased.
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
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"classify.{name}={vars(self)[name]} is not within 0 to 1")
        if not 0 <= self.model.encoder.drop_path < 1:
            raise ValueError(f"classify.drop_path={self.model.encoder.drop_path} is not in [0, 1)")
        blocks, depth = self.train_last_blocks, self.model.encoder.depth
        if blocks is not None and not 0 <= blocks <= depth:
            raise ValueError(
                f"optim.train_last_blocks={blocks} is not from 0 to the {depth} blocks of the "
                "encoder"
            )

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """Of all that is computed."""
        encoder = self.model.encoder
        rows, columns = encoder.grid
        return {attention_shape(1 + rows * columns, encoder.width, encoder.num_heads)}

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Running statistics before the first batch; empty without a BatchNorm."""
        return self._init(jax.random.key(0)).get("batch_stats", {})

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rows, columns = self.model.encoder.grid
        values = self.patch**2 * len(self.mean)
        return dict(self.model.init(key, jnp.zeros((1, rows * columns, values))))

    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """The batch with everything random about its loss, drawn for all its rows at once.

        Adds "target" [b, classes]; "pixels" where images are erased or mixed; "drop_path_noise" where
        paths are dropped, [b, depth, 2].
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
        """Mean loss of a batch from `sample`, and the statistics after it."""
        params = dict(stop_frozen_gradients(params, self.train_last_blocks))
        if "pooled" in batch:
            return self._head.loss(params, stats, batch)
        pixels = batch.get("pixels")
        if pixels is None:
            pixels = normalize(batch["image"], self.mean, self.std)
        drop_path_noise = batch.get("drop_path_noise")
        if drop_path_noise is not None:
            drop_path_noise = jnp.moveaxis(drop_path_noise, 0, -1)
        patches = patchify(pixels, self.patch)
        copies = cast_kernels(params, self.model.encoder.execution.dtype)
        variables = {"params": params, "batch_stats": stats, **copies}
        made, stats = apply_with_stats(
            self.model, variables, patches, train=True, drop_path_noise=drop_path_noise
        )
        return optax.softmax_cross_entropy(made.logits, batch["target"]).mean(), stats

    @property
    def is_stochastic(self) -> bool:
        """Whether training sees anything else of an image than evaluation does."""
        return bool(self.erase or self.mixup.active or self.model.encoder.drop_path)

    @property
    def _head(self) -> ProbeTask:
        """The head alone, for features that are known already."""
        model = self.model
        probe = Probe(
            model.num_classes,
            norm=model.head_norm,
            attention_heads=model.attention_heads,
            init_std=model.head_init_std,
        )
        return ProbeTask(probe, ())

    def outputs(self, params: Params, stats: Stats, images: Shaped[Array, "b h w c"]) -> Outputs:
        """Everything that the encoder and the head make of whole images, outside training."""
        patches = patchify(normalize(images, self.mean, self.std), self.patch)
        return self.model.apply({"params": params, "batch_stats": stats}, patches)  # type: ignore[return-value]

    def pooled(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b *n d"]:
        """What the head takes of images."""
        return self._encode_without_head(params, images).pooled

    def features(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Mean of the encoder's patch tokens, float32, after fc_norm where it is of that mean."""
        made = self._encode_without_head(params, images)
        if self.model.fc_norm and self.model.pool == "mean":
            return made.pooled
        return made.tokens[:, 1:].astype(jnp.float32).mean(axis=1)

    def _encode_without_head(self, params: Params, images: Shaped[Array, "b h w c"]) -> Outputs:
        patches = patchify(normalize(images, self.mean, self.std), self.patch)
        return self.model.clone(num_classes=0).apply({"params": params}, patches)  # type: ignore[return-value]
