"""A checkpoint of any dialect as a model that runs: features, reconstructions, classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Key, Shaped

from mae_jax.convert import weights
from mae_jax.convert.model_info import (
    ConvertError,
    ModelInfo,
    make_autoencoder,
    make_classifier,
    to_variables,
)
from mae_jax.data.loader import available_cpus, eval_batches
from mae_jax.data.sources import FileSource, Source
from mae_jax.data.transforms import EvalTransform
from mae_jax.models import attention_autotune
from mae_jax.models.attention import AttentionImpl, attention_shape
from mae_jax.models.classifier import Outputs
from mae_jax.models.image_ops import normalize, stats_match_dtype
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.patches import patchify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import unflatten

Params = dict[str, Any]


def load(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    dtype: str = "float32",
    attention: str = "xla",
    **reading: Any,
) -> tuple["PretrainedModel", Params]:
    """A model and its parameters (float32) from a checkpoint of any dialect.

    Args:
      path: a file or directory: official, HuggingFace, timm, or a run of ours.
      image_size: side, or height and width, in pixels; the checkpoint's own unless given. Position
        tables are resampled as in the reference.
      channels: of the images; the checkpoint's own unless given.
      dtype: "float32" or "bfloat16", of activations.
      attention: "xla", "cudnn" (GPUs, bfloat16), or "auto", the faster one, which takes seconds to
        find out.
      reading: what the file does not tell, as in `mae_jax.convert.weights.read`.

    Raises:
      mae_jax.convert.info.ConvertError: the checkpoint cannot be read; says why and what to do.

    Example:
      model, params = mae_jax.load("mae_pretrain_vit_base_full.pth")
      images = model.read_images(["cat.jpg", "dog.jpg"])
      features = model.features(params, images)["mean"]    # [2, 768]
      pictures = model.reconstruct(params, images)         # uint8 [2, 224, 224, 3]
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConvertError(f"dtype={dtype!r}; use 'float32' or 'bfloat16'")
    found = weights.read(path, need_heads=("encoder",), **reading)
    pair = None if image_size is None else np.broadcast_to(np.asarray(image_size, int), 2).tolist()
    found = weights.adapt(found, channels=channels, image_size=pair and (pair[0], pair[1]))
    params = {
        name: jnp.asarray(np.asarray(array, np.float32)) for name, array in found.arrays.items()
    }
    execution = ExecutionConfig(
        dtype=jnp.dtype(dtype), attention=_select_attention(found.info, attention, dtype)
    )
    return PretrainedModel(found.info, execution, str(path)), unflatten(params)


def _select_attention(info: ModelInfo, wanted: str, dtype: str) -> AttentionImpl:
    tokens = 1 + info.grid[0] * info.grid[1]
    shapes = {attention_shape(tokens, info.width, info.heads)}
    if info.decoder_heads:
        shapes.add(attention_shape(tokens, info.decoder_width, info.decoder_heads))
    try:
        return attention_autotune.select_implementation(
            wanted, shapes, jnp.dtype(dtype), single_process=True
        )
    except UserError as error:
        raise ConvertError(error.problem, key="attention", value=wanted) from error


@partial(jax.jit, static_argnames=("info", "execution", "observe"))
def _outputs(
    info: ModelInfo, execution: ExecutionConfig, params: Params, images: Array, observe: bool
) -> Outputs:
    patches = patchify(normalize(images, info.mean, info.std), info.patch)
    network = make_classifier(info, execution)
    return network.apply(to_variables(params), patches, observe)  # type: ignore[return-value]


@dataclass(frozen=True)
class PretrainedModel:
    """A model from a checkpoint. Its methods take the parameters, and work under `jax.jit`.

    Images are [b, h, w, c] of `info.image_size`, as `read_images` gives them: uint8, or uint16 or
    float32 where the model was trained on such.
    """

    info: ModelInfo
    execution: ExecutionConfig
    path: str

    def outputs(
        self, params: Params, images: Shaped[Array, "b h w c"], *, observe: bool = False
    ) -> Outputs:
        """Everything that the encoder, and the head if there is one, make of whole images."""
        self._check(images)
        return _outputs(self.info, self.execution, params, images, observe)

    def features(
        self,
        params: Params,
        images: Shaped[Array, "b h w c"],
        *,
        layers: Sequence[int] = (),
        grid: bool = False,
        attention: bool = False,
    ) -> dict[str, Float[Array, "b ..."]]:
        """Features of whole images, nothing masked, float32.

        "cls" [b, d]: the cls token; "mean" [b, d]: the mean of the patches. Both after the final
        norm; a model with fc_norm has none, and normalises only the mean.
        layers: also "cls_3", "mean_3" and so on after block 3, counted from 1, final norm included.
        grid: also "grid" (and "grid_3") [b, rows, columns, d], the token of every patch.
        attention: also "attention" [b, rows, columns]: of the cls token in the last block, mean
          over the heads.
        """
        depth = self.info.depth
        for layer in layers:
            if not 1 <= layer <= depth:
                raise ConvertError(f"there is no layer {layer}: {self.path} has 1 to {depth}")
        made = self.outputs(params, images, observe=bool(layers) or attention)
        found = self._of_tokens(made.tokens, "", grid)
        if self.info.fc_norm and self.info.pool == "mean":
            found["mean"] = made.pooled
        for layer in layers:
            assert made.intermediates is not None
            found |= self._of_tokens(made.intermediates.tokens[layer - 1], f"_{layer}", grid)
        if attention:
            assert made.intermediates is not None
            found["attention"] = self._as_grid(made.intermediates.attention[-1][..., None])[..., 0]
        return found

    def _of_tokens(self, tokens: Array, suffix: str, grid: bool) -> dict[str, Array]:
        tokens = tokens.astype(jnp.float32)
        found = {f"cls{suffix}": tokens[:, 0], f"mean{suffix}": tokens[:, 1:].mean(axis=1)}
        if grid:
            found[f"grid{suffix}"] = self._as_grid(tokens)
        return found

    def _as_grid(self, tokens: Array) -> Array:
        return rearrange(tokens[:, 1:], "b (y x) d -> b y x d", y=self.info.grid[0])

    def logits(self, params: Params, images: Shaped[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """What the head of a fine-tuned or probed model makes of images.

        Raises:
          ConvertError: the checkpoint has no head.
        """
        self.check_head()
        logits = self.outputs(params, images).logits
        assert logits is not None
        return logits

    def check_head(self) -> None:
        """ConvertError unless the checkpoint has a classification head."""
        if not self.info.num_classes:
            raise ConvertError(
                f"{self.path} has no classification head: classes take a fine-tuned checkpoint, "
                "such as the official mae_finetuned_vit_base.pth"
            )

    def task(self, *, mask: str = "random", mask_ratio: float | None = None) -> Pretrain:
        """The pretraining objective of a checkpoint with a decoder; with its mask ratio, or yours.

        Raises:
          ConvertError: it has none, or does not tell what its decoder predicts.
        """
        info = self.info
        if not info.decoder_depth:
            names = {"vit_b16": "base", "vit_l16": "large", "vit_h14": "huge"}
            size = names.get(info.size_name, "base")
            raise ConvertError(
                f"{self.path} holds no decoder, so it cannot reconstruct. Of the official files, "
                f"mae_pretrain_vit_{size}_full.pth (normalised pixels) and "
                f"mae_visualize_vit_{size}.pth (pixels) have one"
            )
        if info.target == "unknown":
            raise ConvertError(
                f"{self.path} does not tell whether its decoder predicts pixels or normalised "
                "pixels; say it with --target pixels or --target normalized (in Python, target=)"
            )
        if not info.decoder_heads:
            raise ConvertError(
                f"{self.path} does not tell how many attention heads its decoder has: say it with "
                "--decoder-num-heads (in Python, decoder_heads=)"
            )
        return Pretrain(
            model=make_autoencoder(info, self.execution),
            grid=info.grid,
            patch=info.patch,
            mean=info.mean,
            std=info.std,
            mask=mask,
            mask_ratio=info.mask_ratio if mask_ratio is None else mask_ratio,
            norm_pix=info.target == "normalized",
            norm_pix_eps=info.norm_pix_eps,
        )

    def reconstruct(
        self,
        params: Params,
        images: Shaped[Array, "b h w c"],
        *,
        mask: str = "random",
        mask_ratio: float | None = None,
        seed: int = 0,
        stats: str = "visible",
    ) -> Shaped[Array, "b h w c"]:
        """The model's picture of each image from the patches that a random mask leaves.

        `stats` is where the brightness of patches comes from if the model predicts normalised
        pixels: "visible" neighbours, or "gt", the truth. See `task` for the mask ratio and errors.
        """
        self._check(images)
        key = jax.random.key(seed)
        return _reconstruct(self, params, images, key, mask, mask_ratio, stats)

    def _check(self, images: Any) -> None:
        wanted = (*self.info.image_size, self.info.channels)
        typed = images.dtype.name in ("uint8", "uint16", "float32")
        typed = typed and stats_match_dtype(images.dtype, self.info.mean)
        if not typed or images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, and this model takes those that "
                f"read_images gives, [b, {wanted[0]}, {wanted[1]}, {wanted[2]}], of uint8 for a "
                "model of photographs"
            )

    @property
    def transform(self) -> EvalTransform:
        """How an encoded image becomes an array for this model."""
        info = self.info
        return EvalTransform(
            info.image_size,
            info.channels,
            info.crop,
            squash=info.resize == "squash",
            interpolation=info.interpolation,
            exif=info.exif,
        )

    def read_images(
        self, paths: str | Path | Sequence[str | Path]
    ) -> Shaped[np.ndarray, "b h w c"]:
        """Image files, and those in folders, resized as this model is used to.

        Raises:
          mae_jax.data.sources.DataError: names the file that is missing or no image.
        """
        source = FileSource([paths] if isinstance(paths, (str, Path)) else paths)
        (batch,) = self.batches(source, len(source))
        return batch["image"]

    def batches(
        self, source: Source, batch_size: int, num_classes: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The images of a source in order; see `ordered_batches`."""
        return eval_batches(
            source,
            self.transform,
            batch_size,
            threads=available_cpus(),
            advice="Mend it, or leave it out",
            num_classes=num_classes,
        )


@partial(jax.jit, static_argnames=("model", "mask", "mask_ratio", "stats"))
def _reconstruct(
    model: PretrainedModel,
    params: Params,
    images: Array,
    key: Key[Array, ""],
    mask: str,
    mask_ratio: float | None,
    stats: str,
) -> Array:
    task = model.task(mask=mask, mask_ratio=mask_ratio)
    return task.reconstruct(params, images, task.sample_mask(key, len(images)), stats)
