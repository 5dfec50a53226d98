"""Export a model for serving: a StableHLO or ONNX file with its weights, which needs no mae_jax.

mae-jax export CHECKPOINT OUT.stablehlo --output features --resize
mae-jax export CHECKPOINT OUT.onnx
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, UInt8

from mae_jax import __version__
from mae_jax.convert import cli as convert_cli
from mae_jax.convert import onnx_io
from mae_jax.convert.locate import checkpoint_argument
from mae_jax.convert.model_info import ConvertError, ModelInfo
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.models.image_ops import FILTERS, resize_center_crop
from mae_jax.tasks.masking import mask_from_noise
from mae_jax.utils import cli
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.pytree import map_with_path

OUTPUTS = ("features", "logits", "reconstruction")
SUFFIXES = (".stablehlo", ".onnx")
PLATFORMS = ("cpu", "cuda", "tpu")  # of a .stablehlo file
MAX_BYTES = 2**31 - 2**24  # flatbuffers and protobuf hold 2 GiB, of which the program takes little
PREPROCESSING = ("resize", "crop", "interpolation", "size", "crop_size", "alpha", "exif")


@dataclass(frozen=True)
class Program:
    """A function with its parameters, to be exported.

    function: of the arrays of `inputs`, in this order, to a dict of arrays.
    inputs: name -> shape and dtype; axes are pixels, or names of symbolic sizes as in "b".
    metadata: of the file, for JSON.
    """

    function: Callable[..., dict[str, Array]]
    inputs: dict[str, tuple[tuple[int | str, ...], Any]]
    metadata: dict[str, Any]

    def specs(self) -> list[jax.ShapeDtypeStruct]:
        """Return the inputs with symbolic sizes, which are the same in all of them."""
        scope = export.SymbolicScope()
        return [
            jax.ShapeDtypeStruct(
                export.symbolic_shape(", ".join(map(str, shape)), scope=scope), dtype
            )
            for shape, dtype in self.inputs.values()
        ]


def make_program(
    model: PretrainedModel,
    params: Params,
    *,
    output: str | None = None,
    mask_ratio: float | None = None,
    stats: str = "visible",
    resize: bool = False,
) -> Program:
    """Return the program of a model: normalization and network, and resizing if asked for.

    Args:
      output: "features" ("cls" and "mean" [b, d], "grid" [b, rows, columns, d]), "logits" or
        "reconstruction"; by default "logits" of a model with a head, else "features".
      mask_ratio: of the reconstruction, whose second input is "noise" [b, n], float32: the patches
        of highest noise are hidden.
      stats: likewise, as in `PretrainedModel.reconstruct`.
      resize: take uint8 images of any size, which the program resizes and crops as the model's
        preprocessing does.

    Raises:
      ConvertError: the checkpoint has no such output, more than 2 GiB of parameters, or a resize
        rule that a program cannot contain.
    """
    info = model.info
    output = output or ("logits" if info.num_classes else "features")
    dtype = np.uint8 if info.accepts(np.uint8) else np.float32
    params = _stored_params(params, output, model.execution.dtype)
    _check_size(model, params)
    size = ("h", "w") if resize else info.image_size
    inputs: dict[str, Any] = {"images": (("b", *size, info.channels), dtype)}
    prepare = _make_resize(model) if resize else lambda images: images
    function: Callable[..., dict[str, Array]]
    settings: dict[str, Any] = {}
    if output == "features":
        function = lambda images: model.features(params, prepare(images), grid=True)
    elif output == "logits":
        model.check_head()
        settings = {"problem": info.problem, "class_names": info.class_names}
        function = lambda images: {"logits": model.logits(params, prepare(images))}
    else:
        task = model.task(mask_ratio=mask_ratio, dtype=dtype)
        settings = {"kept_patches": task.num_kept, "patch_statistics": stats}
        inputs["noise"] = (("b", task.num_patches), np.float32)

        def reconstruct(images: Array, noise: Array) -> dict[str, Array]:
            mask = mask_from_noise(noise, task.num_kept)
            return {"reconstruction": task.reconstruct(params, prepare(images), mask, stats)}

        function = reconstruct

    program = Program(function, inputs, {})
    metadata = _metadata(model, program, output, resize) | settings
    return dataclasses.replace(program, metadata=metadata)


def _stored_params(params: Params, output: str, dtype: Any) -> Params:
    """Return the parameters that an output needs, kernels of blocks in the dtype they are used."""
    if output != "reconstruction":
        params = {name: tree for name, tree in params.items() if name != "decoder"}
    networks = ("encoder/", "decoder/")
    is_cast = lambda name: name.startswith(networks) and name.endswith("/kernel")
    return map_with_path(lambda n, x: x.astype(dtype) if is_cast(n) else x, params)


def _check_size(model: PretrainedModel, params: Params) -> None:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > MAX_BYTES:
        raise ConvertError(
            f"{model.path} has {size / 2**30:.2f} GiB of parameters, but a file of this kind holds "
            "2 GiB: a .stablehlo file with --dtype bfloat16 needs half of that"
        )


def _make_resize(model: PretrainedModel) -> Callable[[Array], Array]:
    """Return the resize rule of a model, of images of any size.

    Raises:
      ConvertError: the rule depends on more than the size of the images, or there is no such filter
        on the device.
    """
    info = model.info
    if not info.accepts(np.uint8) or info.bit_depth:
        raise ConvertError(f"--resize is for uint8 images, which {model.path} does not take")
    if info.resize not in ("crop", "squash") or info.interpolation not in FILTERS:
        raise ConvertError(
            f"--resize knows the rules crop and squash with the filters {' and '.join(FILTERS)}; "
            f"the rule of {model.path} is {info.resize} with {info.interpolation}: export without "
            "it, and resize the images before, as model.read_images does"
        )

    def resize(images: UInt8[Array, "b h w c"]) -> UInt8[Array, "b y x c"]:
        size = _resized_size(info, *map(jnp.asarray, images.shape[1:3]))
        return resize_center_crop(images, size, info.image_size, info.interpolation)

    return resize


def _resized_size(info: ModelInfo, rows: Array, columns: Array) -> tuple[Any, Any]:
    """Return height and width before the crop, rounded as `EvalTransform` and `ModelTransform`."""
    height, width = info.image_size
    tall, wide = int(height / info.crop), int(width / info.crop)
    if info.resize == "squash":
        return tall, wide
    is_wider = height * columns >= width * rows  # than the model's aspect ratio
    return (
        jnp.where(is_wider, tall, wide * rows // columns),
        jnp.where(is_wider, tall * columns // rows, wide),
    )


def _metadata(
    model: PretrainedModel, program: Program, output: str, resize: bool
) -> dict[str, Any]:
    info = model.info
    outputs = jax.eval_shape(program.function, *program.specs())
    describe = lambda shape, dtype: {
        "shape": [axis if isinstance(axis, int) else str(axis) for axis in shape],
        "dtype": np.dtype(dtype).name,
    }
    return {
        "format": "mae_jax export",
        "versions": {"mae_jax": __version__, "jax": jax.__version__},
        "checkpoint": Path(model.path).name,
        "output": output,
        "inputs": {name: describe(*spec) for name, spec in program.inputs.items()},
        "outputs": {name: describe(x.shape, x.dtype) for name, x in outputs.items()},
        "image_size": info.image_size,
        "normalization_inside": {"mean": info.mean, "std": info.std},
        "resize_inside": resize,
        "preprocessing": {name: vars(info)[name] for name in PREPROCESSING},
        "compute_dtype": jnp.dtype(model.execution.dtype).name,
    }


def to_stablehlo(program: Program) -> bytes:
    """Return a file for `jax.export.deserialize`: the program for cpu, cuda and tpu.

    Its `fun_name`, the only text that the format has room for, is the metadata.
    """
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)(*program.specs())
    exported = dataclasses.replace(exported, fun_name=json.dumps(program.metadata))
    return bytes(exported.serialize())


def to_onnx(program: Program) -> bytes:
    """Return an ONNX file, whose metadata properties are the metadata, each as JSON.

    Raises:
      ConvertError: jax2onnx is missing, or cannot convert the program.
    """
    names = list(program.metadata["outputs"])

    def outputs(*inputs: Array) -> list[Array]:
        arrays = program.function(*inputs)
        return [arrays[name] for name in names]

    return onnx_io.convert(outputs, program.specs(), list(program.inputs), names, program.metadata)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.convert.export", __doc__)
    parser.add_argument(
        "checkpoint", type=checkpoint_argument, help="a workdir, or any other checkpoint"
    )
    parser.add_argument("out", type=cli.path_argument, help="ends in .stablehlo or .onnx")
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        help="of the program (logits of a model with a head, else features)",
    )
    parser.add_argument(
        "--resize",
        action="store_true",
        help="take images of any size, and resize and crop them in the program (.stablehlo)",
    )
    parser.add_argument(
        "--mask-ratio",
        type=cli.fraction,
        help="of reconstruction: fraction of patches to hide (the checkpoint's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    convert_cli.add_model_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    out = arguments.out
    _check_flags(arguments)
    model, params = convert_cli.load_model(arguments)
    start = time.monotonic()
    program = make_program(
        model,
        params,
        output=arguments.output,
        mask_ratio=arguments.mask_ratio,
        resize=arguments.resize,
    )
    output = program.metadata["output"]
    if arguments.mask_ratio and output != "reconstruction":
        raise ConvertError(f"--mask-ratio is for --output reconstruction, not {output}")
    content = to_onnx(program) if out.suffix == ".onnx" else to_stablehlo(program)
    with atomic_path(out) as part:
        part.write_bytes(content)
    for kind in ("inputs", "outputs"):
        for name, array in program.metadata[kind].items():
            shape = ", ".join(map(str, array["shape"]))
            print(f"{kind[:-1]:6} {name:15} {array['dtype']} [{shape}]")
    seconds = time.monotonic() - start
    print(f"{out}: {len(content) / 1e6:,.1f} MB, {seconds:.0f} seconds")


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError, before any work is done, for a file or flags that cannot be."""
    out = arguments.out
    cli.check_output("OUT", out, *SUFFIXES)
    if out.exists() and not arguments.overwrite:
        raise ConvertError(f"{out} exists: choose another path, or replace it with --overwrite")
    if out.suffix != ".onnx":
        return
    onnx_io.require_jax2onnx()
    if arguments.resize:
        raise ConvertError("--resize is for .stablehlo files only: an .onnx file has no such rule")
    if arguments.dtype != "float32":
        raise ConvertError(
            "--dtype bfloat16 is for .stablehlo files only: onnxruntime computes few of its "
            "operations in bfloat16"
        )


if __name__ == "__main__":
    cli.run_command(main)
