"""The peers' models behind one face: (images, noise) -> loss to train, images -> tokens to encode.

`noise` [b, n] says which patches are kept, those of the lowest.
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

from benchmarks.workers.protocol import UnusableError

Plan = dict[str, Any]
KEPT: list[Any] = []  # operators are there as long as their library is


def load(name: str, plan: Plan) -> torch.nn.Module:
    """The model of an implementation, float32, with the weights of the plan.

    Its parameters are named as in its own code, so that its state_dict tells them apart.
    """
    family, train = plan["peers"][name], plan["task"] == "train"
    folder = Path(plan["folder"]) / family
    try:
        if family == "hf":
            return hf_autoencoder(folder) if train else HfEncoder(folder)
        if family == "timm":
            return timm_encoder(folder)
        return official_autoencoder(folder, plan["official_repo"])
    except ImportError as error:
        raise UnusableError(
            f"{error}; name a Python that has it by --python {name}=PATH, or a folder that holds "
            f"it by --path {name}=FOLDER"
        ) from error


def _from_pretrained(kind: type, folder: Path, **arguments: Any) -> Any:
    model, report = kind.from_pretrained(
        folder, attn_implementation="sdpa", output_loading_info=True, **arguments
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise UnusableError(
            f"this version of transformers names {len(wrong)} of its weights otherwise than is "
            f"known here: {', '.join(wrong[:3])}, ..."
        )
    return model


def hf_autoencoder(folder: Path) -> torch.nn.Module:
    """ViTMAEForPreTraining."""
    from transformers import ViTMAEForPreTraining

    class Autoencoder(ViTMAEForPreTraining):
        def forward(self, images: Any, noise: Any) -> Any:
            return super().forward(images, noise=noise).loss

    return _from_pretrained(Autoencoder, folder)


class HfEncoder(torch.nn.Module):
    """transformers' encoder, which masks nothing and is told to keep the patches in order."""

    def __init__(self, folder: Path):
        from transformers import ViTMAEForPreTraining

        super().__init__()
        self.vit = _from_pretrained(ViTMAEForPreTraining, folder, mask_ratio=0.0).vit

    def forward(self, images: Any) -> Any:
        count = self.vit.embeddings.patch_embeddings.num_patches
        order = torch.arange(count, device=images.device).expand(len(images), -1)
        return self.vit(images, noise=order).last_hidden_state


def timm_encoder(folder: Path) -> torch.nn.Module:
    """timm's VisionTransformer."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    class Encoder(VisionTransformer):
        def forward(self, images: Any) -> Any:
            return self.forward_features(images)

    model = Encoder(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def import_timm() -> None:
    """Imports timm, also where its torchvision lacks operators beside a CPU build of torch."""
    try:
        import timm  # noqa: F401
    except RuntimeError as error:
        if torch.version.cuda or "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for missing in ("nms", "qnms"):
            library.define(f"{missing}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        KEPT.append(library)


def official_autoencoder(folder: Path, repository: str) -> torch.nn.Module:
    """MaskedAutoencoderViT of a checkout of the official code, which stays as it is."""
    module, given = import_official(Path(repository))
    size = json.loads((folder / "config.json").read_text())

    class Autoencoder(module.MaskedAutoencoderViT):
        def forward(self, imgs: Any, noise: Any) -> Any:
            given[0] = noise
            return super().forward(imgs, mask_ratio=0.75)[0]

    model = Autoencoder(
        patch_size=size["patch"],
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        decoder_embed_dim=size["decoder_width"],
        decoder_depth=size["decoder_depth"],
        decoder_num_heads=size["decoder_heads"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def import_official(repository: Path) -> tuple[Any, list[Any]]:
    """The module models_mae, and a list whose only item is the noise that it draws.

    Names that newer releases of numpy and timm have dropped are put back for it.
    """
    import numpy as np

    import_timm()
    from timm.models import vision_transformer

    block = vision_transformer.Block
    vision_transformer.Block = lambda *args, qk_scale=None, **kwargs: block(*args, **kwargs)
    np.float = float
    sys.path.insert(0, str(repository))
    try:
        module = importlib.import_module("models_mae")
    except Exception as error:
        raise UnusableError(f"--official-repo {repository}: models_mae fails: {error!r}") from error
    given: list[Any] = [None]
    own = types.ModuleType("torch")
    vars(own).update({**vars(torch), "rand": lambda *shape, device: given[0]})
    module.torch = own
    return module, given
