"""Models of the PyTorch peers with a common interface.

Training: (images, noise) -> loss. Encoding: images -> tokens. The patches with the lowest values of
`noise` [b, n] are kept.
"""

import functools
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.rpc import UnusableError

Plan = dict[str, Any]
LIBRARIES: list[Any] = []  # operators are unregistered when their library is garbage collected


def load(name: str, plan: Plan) -> torch.nn.Module:
    """Return the model of an implementation in float32, with the weights of the plan.

    Its parameters have the names of its own code, so its state_dict can be converted.
    """
    library, train = plan["peers"][name], plan["task"] == "train"
    folder = Path(plan["folder"]) / library
    try:
        if library == "hf":
            return hf_autoencoder(folder) if train else HfEncoder(folder)
        if library == "timm":
            return timm_encoder(folder)
        return official_autoencoder(folder, plan["official_repo"])
    except ImportError as error:
        raise UnusableError(
            f"{error}; name a Python that has it by --python {name}=PATH, or a folder with it by "
            f"--path {name}=FOLDER"
        ) from error


def _from_pretrained(kind: type, folder: Path, **arguments: Any) -> Any:
    model, report = kind.from_pretrained(
        folder, attn_implementation="sdpa", output_loading_info=True, **arguments
    )
    if unmatched := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise UnusableError(
            f"this version of transformers has other names for {len(unmatched)} weights: "
            f"{', '.join(unmatched[:3])}, ..."
        )
    return model


def hf_autoencoder(folder: Path) -> torch.nn.Module:
    """Return transformers' ViTMAEForPreTraining."""
    from transformers import ViTMAEForPreTraining

    class Autoencoder(ViTMAEForPreTraining):
        def forward(self, images: Any, noise: Any) -> Any:
            return super().forward(images, noise=noise).loss

    return _from_pretrained(Autoencoder, folder)


class HfEncoder(torch.nn.Module):
    """The encoder of transformers' ViTMAE, without masking and with patches in image order."""

    def __init__(self, folder: Path):
        from transformers import ViTMAEForPreTraining

        super().__init__()
        self.vit = _from_pretrained(ViTMAEForPreTraining, folder, mask_ratio=0.0).vit

    def forward(self, images: Any) -> Any:
        count = self.vit.embeddings.patch_embeddings.num_patches
        order = torch.arange(count, device=images.device).expand(len(images), -1)
        return self.vit(images, noise=order).last_hidden_state


def timm_encoder(folder: Path) -> torch.nn.Module:
    """Return timm's VisionTransformer."""
    timm = import_with_torchvision("timm.models.vision_transformer")

    class Encoder(timm.VisionTransformer):
        def forward(self, images: Any) -> Any:
            return self.forward_features(images)

    model = Encoder(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def import_with_torchvision(name: str) -> Any:
    """Import a module that needs torchvision, also a CUDA build of it beside a CPU torch."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if torch.version.cuda or "torchvision::nms" not in str(error):
            raise
    for loaded in [each for each in sys.modules if each.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[loaded]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # which the CPU build lacks
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    LIBRARIES.append(library)
    return importlib.import_module(name)


def official_autoencoder(folder: Path, repository: str) -> torch.nn.Module:
    """Return MaskedAutoencoderViT of an unmodified checkout of facebookresearch/mae."""
    module, noise_cell = import_official(Path(repository))
    variant = json.loads((folder / "config.json").read_text())

    class Autoencoder(module.MaskedAutoencoderViT):
        def forward(self, imgs: Any, noise: Any) -> Any:
            noise_cell[0] = noise
            return super().forward(imgs, mask_ratio=0.75)[0]

    model = Autoencoder(
        patch_size=variant["patch"],
        embed_dim=variant["width"],
        depth=variant["depth"],
        num_heads=variant["heads"],
        decoder_embed_dim=variant["decoder_width"],
        decoder_depth=variant["decoder_depth"],
        decoder_num_heads=variant["decoder_heads"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def import_official(repository: Path) -> tuple[Any, list[Any]]:
    """Return the module models_mae and a list whose only item replaces the noise that it samples.

    Names that newer releases of numpy and timm removed are restored for it.
    """
    import numpy as np

    timm = import_with_torchvision("timm.models.vision_transformer")
    block = timm.Block
    timm.Block = lambda *args, qk_scale=None, **kwargs: block(*args, **kwargs)
    np.float = float
    sys.path.insert(0, str(repository))
    try:
        module = importlib.import_module("models_mae")
    except Exception as error:
        raise UnusableError(
            f"--official-repo {repository}: importing models_mae failed: {error!r}"
        ) from error
    noise_cell: list[Any] = [None]
    patched_torch = types.ModuleType("torch")
    vars(patched_torch).update({**vars(torch), "rand": lambda *shape, device: noise_cell[0]})
    module.torch = patched_torch
    return module, noise_cell
