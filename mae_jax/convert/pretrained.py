"""Any checkpoint as a model: features, reconstructions, class predictions."""

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
from mae_jax.convert.model_info import ConvertError, ModelInfo, check_reconstructs
from mae_jax.convert.networks import make_autoencoder, make_classifier, to_variables
from mae_jax.convert.preprocessing import ModelTransform, make_transform
from mae_jax.data.bit_depth import warn_of_loss
from mae_jax.data.loader import eval_batches
from mae_jax.data.sources import DataError, FileSource, Source
from mae_jax.data.transforms import EvalTransform
from mae_jax.models import attention_selection
from mae_jax.models.attention import AttentionImpl, attention_shape
from mae_jax.models.classifier import Outputs
from mae_jax.models.image_ops import normalize
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.patches import num_patch_values, patchify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.cpus import available_cpus
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import unflatten

Params = dict[str, Any]
POOLED = ("mean", "cls", "global")  # features of whole images
EIGHT_BITS = "The model takes 8 bits: scale values of {} bits to all bits of the file"


def load(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    dtype: str = "float32",
    attention: str = "xla",
    **overrides: Any,
) -> tuple["PretrainedModel", Params]:
    """Load a model and its parameters (float32) from a checkpoint of any format.

    Args:
      path: a file or directory: official, Hugging Face, timm, or the workdir of a run; or the name
        of an official file, or org/name (or hf://...) of a model of the Hugging Face hub.
      image_size: side, or height and width, in pixels; the checkpoint's by default. Positional
        embeddings are interpolated as in the reference.
      channels: of the images; the checkpoint's by default.
      dtype: "float32" or "bfloat16", of activations.
      attention: "xla", "cudnn" (GPUs, bfloat16), or "auto", which times both for some seconds and
        takes the faster.
      overrides: metadata that the file lacks, as in `mae_jax.convert.weights.read`.

    Raises:
      mae_jax.convert.model_info.ConvertError: the checkpoint cannot be read; has the remedy.

    Example:
      ```python
      model, params = mae_jax.load("mae_pretrain_vit_base_full.pth")
      images = model.read_images(["cat.jpg", "dog.jpg"])
      features = model.features(params, images)["mean"]    # [2, 768]
      pictures = model.reconstruct(params, images)         # uint8 [2, 224, 224, 3]
      ```
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConvertError("must be 'float32' or 'bfloat16'", key="dtype", value=dtype)
    checkpoint = weights.read(path, require_num_heads=("encoder",), **overrides)
    pair = None if image_size is None else np.broadcast_to(np.asarray(image_size, int), 2).tolist()
    size = pair and (pair[0], pair[1])
    checkpoint = weights.adapt(checkpoint, channels=channels, image_size=size)
    params = {
        name: jnp.asarray(np.asarray(array, np.float32))
        for name, array in checkpoint.arrays.items()
    }
    info = checkpoint.info
    implementation = _select_attention(info, attention, dtype)
    execution = ExecutionConfig(dtype=jnp.dtype(dtype), attention=implementation)
    return PretrainedModel(info, execution, str(path)), unflatten(params)


def _select_attention(info: ModelInfo, wanted: str, dtype: str) -> AttentionImpl:
    tokens = info.class_tokens + info.grid[0] * info.grid[1]
    shapes = {attention_shape(tokens, info.width, info.heads)}
    if info.decoder_heads:
        shapes.add(attention_shape(tokens, info.decoder_width, info.decoder_heads))
    try:
        return attention_selection.select_implementation(
            wanted, shapes, jnp.dtype(dtype), single_process=True
        )
    except UserError as error:
        raise ConvertError(error.problem, key="attention", value=wanted) from error


def _normalize(info: ModelInfo, images: Array) -> Array:
    return normalize(images, *info.stats(images.dtype), nodata=info.nodata is not None)


@partial(jax.jit, static_argnames=("info", "execution", "observe"))
def _outputs(
    info: ModelInfo, execution: ExecutionConfig, params: Params, images: Array, observe: bool
) -> Outputs:
    patches = patchify(_normalize(info, images), info.patch)
    network = make_classifier(info, execution)
    return network.apply(to_variables(params), patches, observe)  # type: ignore[return-value]


@dataclass(frozen=True)
class PretrainedModel:
    """A model from a checkpoint. Its methods take the parameters, and work under `jax.jit`.

    Images are [b, h, w, c] of `info.image_size`, as `read_images` returns them: uint8, or uint16
    or float32 if the model was trained on these.
    """

    info: ModelInfo
    execution: ExecutionConfig
    path: str

    def outputs(
        self, params: Params, images: Shaped[Array, "b h w c"], *, observe: bool = False
    ) -> Outputs:
        """Return all outputs of the encoder, and of the head if there is one, without masking."""
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
        attention_blocks: Sequence[int] = (),
    ) -> dict[str, Float[Array, "b ..."]]:
        """Return features of images without masking, float32.

        "cls" [b, d]: the cls token; "mean" [b, d]: the mean of the patches. Both after the final
        norm; a model with fc_norm has no such norm, and normalizes only the mean.

        A model with several class tokens, as Pixio's, has all of them, "class_tokens" [b, n, d],
        and "cls" is their mean, both after the final norm (pooler_output of transformers).
        "global" [b, d] is their mean before the final norm, which its k-NN evaluation compares.

        Args:
          layers: also "cls_3", "mean_3" (and "class_tokens_3") and so on after block 3, counted
            from 1, with final norm.
          grid: also "grid" (and "grid_3") [b, rows, columns, d], the token of every patch.
          attention: also "attention" [b, rows, columns]: of the cls tokens in the last block, mean
            over them and the heads.
          attention_blocks: also "attention_3" [b, heads, rows, columns] and so on: of the cls token
            in block 3, counted from 1, of every head.

        Raises:
          ConvertError: there is no such layer.
        """
        self.check_layers([*layers, *attention_blocks])
        observe = bool(layers or attention_blocks) or attention
        outputs = self.outputs(params, images, observe=observe)
        features = self._pool_tokens(outputs.tokens, "", grid)
        if self.info.fc_norm and self.info.pool == "mean":
            features["mean"] = outputs.pooled
        if self.info.class_tokens > 1:
            features["global"] = outputs.global_feature
        for layer in layers:
            assert outputs.intermediates is not None
            tokens = outputs.intermediates.tokens[layer - 1]
            features |= self._pool_tokens(tokens, f"_{layer}", grid)
        if attention:
            assert outputs.intermediates is not None
            weights = outputs.intermediates.attention[-1][..., None]
            features["attention"] = self._as_grid(weights)[..., 0]
        for block in attention_blocks:
            assert outputs.intermediates is not None
            weights = outputs.intermediates.head_attention[block - 1]
            features[f"attention_{block}"] = rearrange(
                weights[..., self.info.class_tokens :],
                "b h (y x) -> b h y x",
                y=self.info.grid[0],
            )
        return features

    def normalize(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalize images by the mean and std of the model."""
        return _normalize(self.info, images)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ConvertError unless all layers, counted from 1, exist."""
        depth = self.info.depth
        for layer in layers:
            if not 1 <= layer <= depth:
                raise ConvertError(f"there is no layer {layer}: {self.path} has 1 to {depth}")

    def check_pooled(self, name: str) -> None:
        """Raise ConvertError unless the model has this feature of whole images."""
        if name == "global" and self.info.class_tokens == 1:
            raise ConvertError(
                f"{self.path} has one class token: 'global' is of models with several, as Pixio's; "
                "use mean or cls"
            )

    def random_params(self, seed: int) -> Params:
        """Return the parameters of an untrained encoder, as a baseline of its features."""
        rows, columns = self.info.grid
        patches = jnp.zeros(
            (1, rows * columns, num_patch_values(self.info.patch, self.info.channels))
        )
        variables: Any = make_classifier(self.info).init(jax.random.key(seed), patches)
        return {**variables["params"], **variables.get("batch_stats", {})}

    def _pool_tokens(self, tokens: Array, suffix: str, grid: bool) -> dict[str, Array]:
        tokens = tokens.astype(jnp.float32)
        count = self.info.class_tokens
        features = {
            f"cls{suffix}": tokens[:, :count].mean(axis=1),
            f"mean{suffix}": tokens[:, count:].mean(axis=1),
        }
        if count > 1:
            features[f"class_tokens{suffix}"] = tokens[:, :count]
        if grid:
            features[f"grid{suffix}"] = self._as_grid(tokens)
        return features

    def _as_grid(self, tokens: Array) -> Array:
        patches = tokens[:, self.info.class_tokens :]
        return rearrange(patches, "b (y x) d -> b y x d", y=self.info.grid[0])

    def logits(
        self, params: Params, images: Shaped[Array, "b h w c"]
    ) -> Float[Array, "b *grid classes"]:
        """Return the class logits of a fine-tuned or probed model.

        Those of a segmentation model are of every patch, [b, rows, columns, classes], or of finer
        cells after upsampling; `mae_jax.models.segmentation.upsample` makes them those of pixels.

        Raises:
          ConvertError: the checkpoint has no head.
        """
        self.check_head()
        logits = self.outputs(params, images).logits
        assert logits is not None
        return logits

    def check_head(self) -> None:
        """Raise ConvertError unless the checkpoint has a head."""
        if not self.info.num_classes:
            raise ConvertError(
                f"{self.path} has no classification head: use a fine-tuned checkpoint, such as the "
                "official mae_finetuned_vit_base.pth"
            )

    def task(
        self, *, mask: str = "random", mask_ratio: float | None = None, dtype: Any = np.uint8
    ) -> Pretrain:
        """Return the pretraining objective of a checkpoint with a decoder.

        Args:
          mask: masking strategy: "random", "block" or "grid".
          mask_ratio: fraction of the patches to hide; the checkpoint's by default. "random" masks
            have cells of its `mask_cell`.
          dtype: of the images.

        Raises:
          ConvertError: there is no decoder, or its target or number of heads is unknown.
        """
        info = self.info
        check_reconstructs(info, self.path, mask)
        mean, std = info.stats(dtype)
        return Pretrain(
            model=make_autoencoder(info, self.execution),
            grid=info.grid,
            patch=info.patch,
            mean=mean,
            std=std,
            mask=mask,
            mask_ratio=info.mask_ratio if mask_ratio is None else mask_ratio,
            mask_cell=info.mask_cell if mask == "random" else 1,
            norm_pix=info.target == "normalized",
            norm_pix_eps=info.norm_pix_eps,
            nodata=info.nodata is not None,
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
        """Return the reconstruction of each image from the visible patches of a random mask.

        Args:
          stats: where mean and deviation of patches come from if the model predicts normalized
            pixels: "visible" neighbors, or the ground truth ("gt").
          mask: as in `task`, which also has the errors.
          mask_ratio: likewise.
          seed: of the mask.
        """
        self._check(images)
        key = jax.random.key(seed)
        return _reconstruct(self, params, images, key, mask, mask_ratio, stats)

    def _check(self, images: Any) -> None:
        shape = (*self.info.image_size, self.info.channels)
        valid_dtype = images.dtype.name in ("uint8", "uint16", "float32")
        valid_dtype = valid_dtype and self.info.accepts(images.dtype)
        if not valid_dtype or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, but this model takes those of "
                f"read_images, [b, {shape[0]}, {shape[1]}, {shape[2]}], of uint8 for photographs"
            )

    @property
    def transform(self) -> EvalTransform | ModelTransform:
        """Return the transform from an encoded image to an array for this model."""
        return make_transform(self.info)

    def read_images(
        self, paths: str | Path | Sequence[str | Path]
    ) -> Shaped[np.ndarray, "b h w c"]:
        """Read image files, and those in folders, resized for this model.

        Raises:
          mae_jax.data.sources.DataError: names the file that is missing or is not an image.
        """
        source = FileSource([paths] if isinstance(paths, (str, Path)) else paths)
        (batch,) = self.batches(source, len(source))
        return batch["image"]

    def batches(
        self, source: Source, batch_size: int, num_classes: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the images of a source in order; see `eval_batches`.

        Raises:
          mae_jax.data.sources.DataError: an image is bad, or mean and std of the model are not for
            images of its dtype.
        """
        if self.info.bit_depth is None and self.info.bands is None:
            warn_of_loss(source, self.info.channels, EIGHT_BITS)
        batches = eval_batches(
            source,
            self.transform,
            batch_size,
            threads=available_cpus(),
            hint="Fix or remove it",
            num_classes=num_classes,
        )
        for number, batch in enumerate(batches):
            dtype = batch["image"].dtype
            if not self.info.accepts(dtype):
                raise DataError(
                    f"{source.describe(number * batch_size)} is read as {dtype}, but the mean and "
                    f"std of this model, {self.info.mean} and {self.info.std}, are for images of "
                    "other units. Pictures are read as uint8: save values of more bits as .npy"
                )
            yield batch


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
    task = model.task(mask=mask, mask_ratio=mask_ratio, dtype=images.dtype)
    return task.reconstruct(params, images, task.sample_mask(key, len(images)), stats)
