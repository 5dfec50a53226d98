"""State dict keys of every format, mapped to our parameters: one list of key maps per layout.

A key map names a parameter (by its path in models/), the external tensors that it is made of, and
the functions between them. Keys with {i} exist once per block; our parameters are stacked
[depth, ...].
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from einops import rearrange

from mae_jax.models.segmentation import LEVELS
from mae_jax.utils.sides import Sides, height_width


@dataclass(frozen=True)
class KeyMap:
    """Map between one parameter and the external tensors that it is made of.

    param: path of the parameter.
    external: keys of the tensors in the state dict.
    to_param: external tensors -> parameter (of one block).
    from_param: parameter, side of a patch, or height and width, pixels -> external tensors.
    """

    param: str
    external: tuple[str, ...]
    to_param: Callable[..., np.ndarray]
    from_param: Callable[[np.ndarray, Sides], Sequence[np.ndarray]]

    def external_names(self, depth: int) -> list[tuple[str, ...]]:
        """Return the external keys of each block; a parameter that is not stacked has one."""
        if not self.stacked:
            return [self.external]
        return [tuple(name.format(i=i) for name in self.external) for i in range(depth)]

    @property
    def stacked(self) -> bool:
        return "{i}" in self.external[0]


def _same(param: str, external: str) -> KeyMap:
    return KeyMap(param, (external,), lambda x: x, lambda x, _: (x,))


def _linear(param: str, external: str) -> list[KeyMap]:
    """Map a Linear of torch, whose kernel is (outputs, inputs)."""
    kernel = KeyMap(
        f"{param}/kernel", (f"{external}.weight",), lambda w: w.T, lambda kernel, _: (kernel.T,)
    )
    return [kernel, _same(f"{param}/bias", f"{external}.bias")]


def _norm(param: str, external: str) -> list[KeyMap]:
    return [
        _same(f"{param}/scale", f"{external}.weight"),
        _same(f"{param}/bias", f"{external}.bias"),
    ]


def _patch_embed(param: str, external: str) -> list[KeyMap]:
    """Map a convolution (d, channel, row, column) to a matrix (row column channel, d)."""

    def from_param(kernel: np.ndarray, patch: Sides) -> tuple[np.ndarray]:
        height, width = height_width(patch)
        return (rearrange(kernel, "(r s c) d -> d c r s", r=height, s=width),)

    to_param = lambda w: rearrange(w, "d c r s -> (r s c) d")
    kernel = KeyMap(f"{param}/kernel", (f"{external}.weight",), to_param, from_param)
    return [kernel, _same(f"{param}/bias", f"{external}.bias")]


def _split_qkv(param: str, external: Sequence[str]) -> list[KeyMap]:
    """Map three projections to one, concatenated over the outputs."""
    return [
        KeyMap(
            f"{param}/kernel",
            tuple(f"{name}.weight" for name in external),
            lambda *weights: np.concatenate([w.T for w in weights], axis=1),
            lambda kernel, _: [part.T for part in np.split(kernel, 3, axis=1)],
        ),
        KeyMap(
            f"{param}/bias",
            tuple(f"{name}.bias" for name in external),
            lambda *biases: np.concatenate(biases),
            lambda bias, _: np.split(bias, 3),
        ),
    ]


def _timm_blocks(param: str, external: str) -> list[KeyMap]:
    return [
        *_norm(f"{param}/norm1", f"{external}.{{i}}.norm1"),
        *_linear(f"{param}/attn/qkv", f"{external}.{{i}}.attn.qkv"),
        *_linear(f"{param}/attn/proj", f"{external}.{{i}}.attn.proj"),
        *_norm(f"{param}/norm2", f"{external}.{{i}}.norm2"),
        *_linear(f"{param}/mlp/fc1", f"{external}.{{i}}.mlp.fc1"),
        *_linear(f"{param}/mlp/fc2", f"{external}.{{i}}.mlp.fc2"),
    ]


def _hf4_blocks(
    param: str,
    external: str,
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after"),
    mlp: tuple[str, str] = ("intermediate.dense", "output.dense"),
) -> list[KeyMap]:
    block = f"{external}.{{i}}"
    attention = [f"{block}.attention.attention.{name}" for name in ("query", "key", "value")]
    return [
        *_norm(f"{param}/norm1", f"{block}.{norms[0]}"),
        *_split_qkv(f"{param}/attn/qkv", attention),
        *_linear(f"{param}/attn/proj", f"{block}.attention.output.dense"),
        *_norm(f"{param}/norm2", f"{block}.{norms[1]}"),
        *_linear(f"{param}/mlp/fc1", f"{block}.{mlp[0]}"),
        *_linear(f"{param}/mlp/fc2", f"{block}.{mlp[1]}"),
    ]


def _hf5_blocks(param: str, external: str) -> list[KeyMap]:
    block = f"{external}.{{i}}"
    attention = [f"{block}.attention.{name}_proj" for name in ("q", "k", "v")]
    return [
        *_norm(f"{param}/norm1", f"{block}.layernorm_before"),
        *_split_qkv(f"{param}/attn/qkv", attention),
        *_linear(f"{param}/attn/proj", f"{block}.attention.o_proj"),
        *_norm(f"{param}/norm2", f"{block}.layernorm_after"),
        *_linear(f"{param}/mlp/fc1", f"{block}.mlp.fc1"),
        *_linear(f"{param}/mlp/fc2", f"{block}.mlp.fc2"),
    ]


PIXIO_ENCODER = [
    _same("encoder/cls_token", "cls_token"),
    _same("encoder/pos_embed/table", "pos_embed"),
    *_patch_embed("encoder/patch_embed", "patch_embed.proj"),
    *_timm_blocks("encoder/blocks", "blocks"),
    *_norm("encoder/norm", "norm"),
]
TIMM_ENCODER = [*PIXIO_ENCODER, *_norm("fc_norm", "fc_norm")]
OFFICIAL_DECODER = [
    _same("decoder/mask_token", "mask_token"),
    _same("decoder/pos_embed/table", "decoder_pos_embed"),
    *_linear("decoder/embed", "decoder_embed"),
    *_timm_blocks("decoder/blocks", "decoder_blocks"),
    *_norm("decoder/norm", "decoder_norm"),
    *_linear("decoder/head", "decoder_pred"),
]
OFFICIAL_PROBE = [
    _same("head_norm/mean", "head.0.running_mean"),
    _same("head_norm/var", "head.0.running_var"),
    _same("head_norm/count", "head.0.num_batches_tracked"),
    *_linear("head", "head.1"),
]


def _hf_encoder(prefix: str, blocks: list[KeyMap]) -> list[KeyMap]:
    return [
        _same("encoder/cls_token", f"{prefix}embeddings.cls_token"),
        _same("encoder/pos_embed/table", f"{prefix}embeddings.position_embeddings"),
        *_patch_embed("encoder/patch_embed", f"{prefix}embeddings.patch_embeddings.projection"),
        *blocks,
        *_norm("encoder/norm", f"{prefix}layernorm"),
    ]


def _hf_decoder(blocks: list[KeyMap]) -> list[KeyMap]:
    return [
        _same("decoder/mask_token", "decoder.mask_token"),
        _same("decoder/pos_embed/table", "decoder.decoder_pos_embed"),
        *_linear("decoder/embed", "decoder.decoder_embed"),
        *blocks,
        *_norm("decoder/norm", "decoder.decoder_norm"),
        *_linear("decoder/head", "decoder.decoder_pred"),
    ]


def _hf4(decoder_blocks: str) -> list[KeyMap]:
    return [
        *_hf_encoder("vit.", _hf4_blocks("encoder/blocks", "vit.encoder.layer")),
        *_hf_decoder(_hf4_blocks("decoder/blocks", decoder_blocks)),
        *_linear("head", "classifier"),
    ]


@dataclass(frozen=True, eq=False)
class Layout:
    """The state dict keys of one variant of a format.

    dialect: the format, one of `DIALECTS`.
    variant: description that distinguishes the layouts of one format; may be empty.
    pixio: the program that reads these keys runs Pixio's models, not MAE's.
    """

    dialect: str
    variant: str
    key_maps: Sequence[KeyMap]
    pixio: bool = False

    @cached_property
    def _params(self) -> dict[str, str]:
        return {name: key_map.param for key_map in self.key_maps for name in key_map.external}

    def match(self, name: str) -> tuple[str, int] | None:
        """Return the parameter and the block (0 if it has none) of an external key, or None."""
        if name in self._params:
            return self._params[name], 0
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        param = number and self._params.get(f"{name[: number.start()]}{{i}}{name[number.end() :]}")
        return (param, int(number[0])) if number and param else None

    def external_name(self, param: str) -> str:
        """Return the first external key of a parameter, in block 0."""
        return next(k.external[0].format(i=0) for k in self.key_maps if k.param == param)

    def __str__(self) -> str:
        return f"{self.dialect} ({self.variant})" if self.variant else self.dialect


_OFFICIAL = [*TIMM_ENCODER, *OFFICIAL_DECODER, *OFFICIAL_PROBE]
ATTENTION_POOL = ("query", "key/kernel", "key/bias", "value/kernel", "value/bias")
_PARAMS = [key_map.param for key_map in _OFFICIAL]
# No other format has these.
_PARAMS += [f"attention_pool/{name}" for name in ATTENTION_POOL]
_PARAMS += [
    f"upsample/{layer}{level}/{name}"
    for level in range(LEVELS)
    for layer, names in (("conv", ("kernel", "bias")), ("norm", ("scale", "bias")))
    for name in names
]

_PIXIO_NORMS = ("norm1", "norm2")
# Of the layouts of a format, the first that covers all parameters is written.
LAYOUTS = (
    Layout("mae_jax", "", [_same(name, name) for name in _PARAMS]),
    Layout("official", "", [*TIMM_ENCODER, *OFFICIAL_DECODER, *_linear("head", "head")]),
    Layout("official", "linear probe", [*TIMM_ENCODER, *OFFICIAL_PROBE]),
    Layout("timm", "", [*TIMM_ENCODER, *_linear("head", "head")]),
    Layout(
        "hf",
        "base model",
        _hf_encoder("", _hf4_blocks("encoder/blocks", "encoder.layer")),
    ),
    Layout("hf", "", _hf4("decoder.decoder_layers")),
    # save_pretrained of transformers 5.x writes other keys for the decoder's layers.
    Layout("hf", "as saved by 5.x", _hf4("decoder.decoder_encoder.layer")),
    Layout(
        "hf",
        "5.x in memory",
        [
            *_hf_encoder("vit.", _hf5_blocks("encoder/blocks", "vit.layers")),
            *_hf_decoder(_hf5_blocks("decoder/blocks", "decoder.decoder_layers")),
            *_linear("head", "classifier"),
        ],
    ),
    Layout(
        "hf",
        "5.x in memory, base model",
        _hf_encoder("", _hf5_blocks("encoder/blocks", "layers")),
    ),
    Layout("pixio", "", [*PIXIO_ENCODER, *OFFICIAL_DECODER], pixio=True),
    # 5.0 reads only these keys; it leaves the MLPs of the next layout random.
    Layout(
        "hf",
        "Pixio",
        _hf_encoder(
            "",
            _hf4_blocks("encoder/blocks", "encoder.layer", _PIXIO_NORMS, ("mlp.fc1", "mlp.fc2")),
        ),
        pixio=True,
    ),
    Layout(
        "hf",
        "Pixio as first saved by 5.24",
        _hf_encoder("", _hf4_blocks("encoder/blocks", "encoder.layer", _PIXIO_NORMS)),
        pixio=True,
    ),
    Layout(
        "hf",
        "Pixio, 5.24 in memory",
        _hf_encoder("", _hf5_blocks("encoder/blocks", "layers")),
        pixio=True,
    ),
)
DIALECTS = tuple(dict.fromkeys(layout.dialect for layout in LAYOUTS))
