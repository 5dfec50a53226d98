"""Convert functions to ONNX; the only module that imports jax2onnx and onnx, and only on use."""

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mae_jax.convert.model_info import ConvertError


def require_jax2onnx() -> None:
    """Raise ConvertError, with the remedy, unless jax2onnx is installed."""
    if importlib.util.find_spec("jax2onnx") is None:
        raise ConvertError(
            "writing .onnx needs jax2onnx: pip install 'mae_jax[onnx]'. .stablehlo files do not "
            "need it"
        )


def convert(
    function: Callable[..., list[jax.Array]],
    specs: Sequence[jax.ShapeDtypeStruct],
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, Any],
) -> bytes:
    """Return an ONNX file of a function, whose symbolic sizes become dynamic axes.

    Args:
      function: of the arrays of `specs` to a list of arrays.
      inputs: names of the arrays; outputs: likewise.
      metadata: properties of the model; values that are not text are written as JSON.

    Raises:
      ConvertError: jax2onnx is missing, or cannot convert the function.
    """
    require_jax2onnx()
    # They warn of types and plugins that they leave out, with the traceback of each.
    for name in ("onnx_ir", "jax2onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import jax2onnx  # pyright: ignore[reportMissingImports]
    import onnx  # pyright: ignore[reportMissingImports]

    versions = metadata["versions"] | {"jax2onnx": importlib.metadata.version("jax2onnx")}
    try:
        model = jax2onnx.to_onnx(
            function,
            list(specs),
            model_name="mae_jax",
            input_names=list(inputs),
            output_names=list(outputs),
        )
    except Exception as error:  # jax2onnx raises many types for operations that it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConvertError(
            f"jax2onnx {versions['jax2onnx']} cannot convert this model: {reason}. Write a "
            ".stablehlo file instead"
        ) from error
    properties = {**metadata, "versions": versions}
    onnx.helper.set_model_props(
        model,
        {k: x if isinstance(x, str) else json.dumps(x) for k, x in properties.items()},
    )
    return model.SerializeToString()
