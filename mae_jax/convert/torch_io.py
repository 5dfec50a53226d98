"""Read and write files of torch.save; the only module that imports torch, and only on use."""

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

# Keys under which training programs store the state dict; the first one present is used.
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")


def require_torch() -> None:
    """Raise ConvertError, with the remedy, unless torch is installed."""
    if importlib.util.find_spec("torch") is None:
        raise ConvertError(
            "reading and writing .pth needs torch: pip install 'mae_jax[torch]'. .safetensors "
            "files do not need it"
        )


def _torch() -> Any:
    require_torch()
    import torch  # pyright: ignore[reportMissingImports]

    return torch


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file without running code from it (weights_only).

    Returns:
      The tensors of its state dict, and everything else in the file, by key.

    Raises:
      ConvertError: torch is missing, or the file is not a checkpoint, truncated or unsafe.
    """
    torch = _torch()
    try:
        # Official training checkpoints carry their command line as a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            _verify_zip_crc(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConvertError(_unsafe_pickle_message(path, str(error))) from error
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch raises many types for damaged files
        raise ConvertError(f"{path} is truncated or corrupt ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    model_key = next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), None)
    weights, rest = content, {}
    if model_key:
        weights = content[model_key]
        rest = {key: value for key, value in content.items() if key != model_key}
    tensors = {str(key): value for key, value in weights.items() if torch.is_tensor(value)}
    rest |= {key: value for key, value in weights.items() if not torch.is_tensor(value)}
    return {name: _to_numpy(torch, x, f"{path}: {name}") for name, x in tensors.items()}, rest


def _verify_zip_crc(path: Path) -> None:
    """Raise BadZipFile if a CRC-32 of a zip file is wrong; torch does not check it."""
    if not zipfile.is_zipfile(path):
        return  # pickles of torch before 1.6 have no checksums
    with zipfile.ZipFile(path) as archive:
        has_checksums = any(entry.CRC for entry in archive.infolist())  # optional in torch
        if has_checksums and (name := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of {name} is wrong")


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _unsafe_pickle_message(path: Path, message: str) -> str:
    match = re.search(r"GLOBAL (\S+)", message)
    if match is None:
        return f"{path} is a pickle that torch.save did not write"
    return (
        f"{path} is not loaded: unpickling would run code of {match[1]}. If you trust its source, "
        "save only its state dict: torch.save(model.state_dict(), ...)"
    )


def _to_numpy(torch: Any, tensor: Any, what: str) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ConvertError(
            f"{what} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}: save it "
            "as a dense tensor"
        )
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.numpy()
    except TypeError as error:
        raise ConvertError(
            f"{what} has dtype {tensor.dtype}, which numpy lacks: save it as float32"
        ) from error


def save(path: Path, tensors: dict[str, np.ndarray], rest: dict[str, Any] | None) -> None:
    """Write {"model": tensors, **rest}, or the bare tensors if `rest` is None."""
    torch = _torch()
    weights = {name: _to_torch(torch, array) for name, array in tensors.items()}
    torch.save(weights if rest is None else {"model": weights, **rest}, path)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
