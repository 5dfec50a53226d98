"""Files of torch.save; the only module that imports torch, and only when such a file comes by."""

import argparse
import importlib.util
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mae_jax.convert.model_info import ConvertError

# Where training programs keep the weights among other things; the first that is there counts.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise ConvertError(
            "reading and writing .pth needs torch: pip install 'mae_jax[torch]'. Files that end in "
            ".safetensors do without"
        )
    import torch  # pyright: ignore[reportMissingImports]

    return torch


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights in a file, and whatever else it holds.

    Raises:
      ConvertError: no torch, no checkpoint, a truncated one, or one that would run code.
    """
    torch = _torch()
    try:
        # Official training checkpoints carry their command line as a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are none of torch's
            _verify_zip_crc(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(_unsafe_pickle_message(path, str(error))) from error
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises whatever its readers stumble over
        raise ConvertError(
            f"{path} is truncated or damaged: it cannot be read ({first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    wrapper = next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), None)
    weights, rest = content, {}
    if wrapper:
        weights = content[wrapper]
        rest = {key: value for key, value in content.items() if key != wrapper}
    tensors = {str(key): value for key, value in weights.items() if torch.is_tensor(value)}
    rest |= {key: value for key, value in weights.items() if not torch.is_tensor(value)}
    return {name: _to_numpy(torch, x, f"{path}: {name}") for name, x in tensors.items()}, rest


def _verify_zip_crc(path: Path) -> None:
    """BadZipFile where a part of a zip is not what was written; torch does not look."""
    if not zipfile.is_zipfile(path):
        return  # a pickle of before torch 1.6 has no sums
    with zipfile.ZipFile(path) as archive:
        summed = any(entry.CRC for entry in archive.infolist())  # torch can be told to leave it
        if summed and (name := archive.testzip()):
            raise zipfile.BadZipFile(f"{name} has another checksum than when it was written")


def first_line(error: Exception) -> str:
    """The beginning of an error's message; its name where it has none."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _unsafe_pickle_message(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return f"{path} is a pickle, but not one of torch.save"
    return (
        f"{path} is refused: opening it would run code of {found[1]}. If you trust who made it, "
        "save its state dict alone: torch.save(model.state_dict(), ...)"
    )


def _to_numpy(torch: Any, tensor: Any, what: str) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ConvertError(
            f"{what} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, not a plain "
            "one: save it as dense numbers"
        )
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise ConvertError(
            f"{what} is a tensor of {tensor.dtype}, which numpy lacks: save it as float32"
        ) from error


def save(path: Path, tensors: dict[str, np.ndarray], rest: dict[str, Any] | None) -> None:
    """Writes {"model": tensors, **rest}, or the tensors alone where `rest` is None."""
    torch = _torch()
    weights = {name: _to_torch(torch, array) for name, array in tensors.items()}
    torch.save(weights if rest is None else {"model": weights, **rest}, path)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
