"""What tasks with labels share: an encoder of whole images with a head."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from mae_jax.models.attention import AttentionShape, attention_shape
from mae_jax.models.classifier import Classifier, Outputs
from mae_jax.models.image_ops import normalize
from mae_jax.models.layers import make_variables
from mae_jax.models.patches import num_patch_values, patchify
from mae_jax.tasks.optimizer import stop_frozen_gradients
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides

Params = dict[str, Any]
Stats = dict[str, Any]


def apply_with_stats(
    module: Any, variables: dict[str, Any], *args: Any, **named: Any
) -> tuple[Any, Stats]:
    """Apply a module; return its outputs and the updated running statistics."""
    outputs, updated = module.apply(variables, *args, **named, mutable=["batch_stats"])
    return outputs, updated.get("batch_stats", {})


@dataclass(frozen=True, kw_only=True)
class SupervisedTask(ABC):
    """An encoder of whole images with a head; subclasses add the loss.

    patch: side of a patch, or its height and width, pixels; mean, std: per channel; nodata: NaN of
    images has no data, and becomes the mean; train_last_blocks: None trains all parameters, 0 the
    head, k also the last k blocks (partial fine-tuning).

    Raises:
      UserError: a value is invalid; the error has the config key.
    """

    prefix: ClassVar[str]  # of config keys

    model: Classifier
    patch: Sides
    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: bool = False
    train_last_blocks: int | None = None

    def __post_init__(self):
        drop_path = self.model.encoder.drop_path
        if not 0 <= drop_path < 1:
            problem = "must be at least 0 and below 1"
            raise UserError(problem, key=f"{self.prefix}drop_path", value=drop_path)
        blocks, depth = self.train_last_blocks, self.model.encoder.depth
        if blocks is not None and not 0 <= blocks <= depth:
            problem = f"must be from 0 to the {depth} blocks of the encoder"
            raise UserError(problem, key="optim.train_last_blocks", value=blocks)

    @property
    def attention_shapes(self) -> set[AttentionShape]:
        """Attention shapes of the encoder."""
        encoder = self.model.encoder
        rows, columns = encoder.grid
        tokens = encoder.class_tokens + rows * columns
        return {attention_shape(tokens, encoder.width, encoder.num_heads)}

    def init(self, key: Key[Array, ""]) -> Params:
        """Initialize the parameters."""
        return self._init(key)["params"]

    def init_stats(self) -> Stats:
        """Initialize the running statistics; {} without BatchNorm."""
        return self._init(jax.random.key(0)).get("batch_stats", {})

    def _init(self, key: Key[Array, ""]) -> dict[str, Any]:
        rows, columns = self.model.encoder.grid
        values = num_patch_values(self.patch, len(self.mean))
        return dict(self.model.init(key, jnp.zeros((1, rows * columns, values))))

    @abstractmethod
    def sample(self, key: Key[Array, ""], batch: dict[str, Array]) -> dict[str, Array]:
        """Add everything random about the loss to a global batch, for all rows at once."""

    @abstractmethod
    def loss(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, ""], Stats]:
        """Compute the mean loss of a batch from `sample`, and the updated statistics."""

    def sample_drop_path(self, key: Key[Array, ""], count: int) -> dict[str, Array]:
        """Return "drop_path_noise" [count, depth, 2] with drop path, else {}."""
        if not self.model.encoder.drop_path:
            return {}
        shape = (count, self.model.encoder.depth, 2)
        return {"drop_path_noise": jax.random.uniform(key, shape)}

    def normalize(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalize images by mean and std."""
        return normalize(images, self.mean, self.std, self.nodata)

    def train_logits(
        self, params: Params, stats: Stats, batch: dict[str, Array]
    ) -> tuple[Float[Array, "b *grid classes"], Stats]:
        """Compute the logits of "pixels", else "image", and the updated statistics."""
        params = self.stop_gradients(params)
        pixels = batch.get("pixels")
        if pixels is None:
            pixels = self.normalize(batch["image"])
        noise = batch.get("drop_path_noise")
        if noise is not None:
            noise = jnp.moveaxis(noise, 0, -1)
        patches = patchify(pixels, self.patch)
        variables = make_variables(params, self.model.encoder.execution.dtype)
        variables["batch_stats"] = stats
        outputs, stats = apply_with_stats(
            self.model, variables, patches, train=True, drop_path_noise=noise
        )
        return outputs.logits, stats

    def stop_gradients(self, params: Params) -> Params:
        """Stop the gradients of frozen parameters."""
        return dict(stop_frozen_gradients(params, self.train_last_blocks))

    def outputs(self, params: Params, stats: Stats, images: Shaped[Array, "b h w c"]) -> Outputs:
        """Apply encoder and head to images in evaluation mode."""
        patches = patchify(self.normalize(images), self.patch)
        return self.model.apply({"params": params, "batch_stats": stats}, patches)  # type: ignore[return-value]

    def pooled(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b *n d"]:
        """Return the features of images that the head takes."""
        return self._encode_without_head(params, images).pooled

    def features(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Return `Encoder.global_feature`, float32, or the mean after fc_norm of patch tokens."""
        outputs = self._encode_without_head(params, images)
        if self.model.fc_norm and self.model.pool == "mean":
            return outputs.pooled
        return outputs.global_feature

    def _encode_without_head(self, params: Params, images: Shaped[Array, "b h w c"]) -> Outputs:
        patches = patchify(self.normalize(images), self.patch)
        return self.model.clone(num_classes=0).apply({"params": params}, patches)  # type: ignore[return-value]
