"""Parse and write the JSON files in checkpoint directories of Hugging Face and timm."""

from typing import Any

from mae_jax.convert.model_info import ConvertError, ModelInfo
from mae_jax.models.layers import mlp_dim

Json = dict[str, Any]
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's codes


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def parse_hf_config(config: Json) -> Json:
    """Return the fields of a `ModelInfo` that config.json of Hugging Face contains."""
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ConvertError(f"config.json: hidden_act={activation!r}; only 'gelu' is supported")
    metadata: Json = {
        "heads": config.get("num_attention_heads", 12),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "image_size": _pair(config.get("image_size", 224)),
    }
    if config.get("model_type") == "vit_mae":
        metadata["decoder_heads"] = config.get("decoder_num_attention_heads", 16)
        metadata["target"] = "normalized" if config.get("norm_pix_loss") else "pixels"
        metadata["mask_ratio"] = config.get("mask_ratio", 0.75)
    names = config.get("id2label") or {}
    if names and not all(str(name).startswith("LABEL_") for name in names.values()):
        metadata["class_names"] = tuple(names[key] for key in sorted(names, key=int))
    return metadata


def parse_hf_preprocessor(preprocessor: Json, channels: int) -> Json:
    """Return the fields of a `ModelInfo` that preprocessor_config.json contains."""
    metadata: Json = {}
    if preprocessor.get("do_normalize") is False:
        preprocessor = preprocessor | {"image_mean": 0.0, "image_std": 1.0}
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        if key in preprocessor:
            value = preprocessor[key]
            is_number = isinstance(value, (int, float))
            metadata[name] = (value,) * channels if is_number else tuple(value)
    if preprocessor.get("resample") in RESAMPLING:
        metadata["interpolation"] = RESAMPLING[preprocessor["resample"]]
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if shortest:
        crop_size = crop["height"] if isinstance(crop, dict) else crop
        crop_size = crop_size if preprocessor.get("do_center_crop") else None
        metadata |= {"resize": "crop", "crop": (crop_size or shortest) / shortest}
    return metadata


# Sizes that can be checked against tensor shapes: keys of config.json, and of timm's model_args.
_SIZES = (
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"),
    *("embed_dim", "depth", "in_chans"),
)


def declared_sizes(config: Json) -> Json:
    """Return the sizes in config.json (or model_args) that can be checked against the tensors."""
    sizes = {key: config[key] for key in _SIZES if key in config}
    patch = sizes.get("patch_size")
    if isinstance(patch, list) and len(set(patch)) == 1:
        sizes["patch_size"] = patch[0]
    return sizes


def size_mismatches(declared: Json, info: ModelInfo) -> list[str]:
    """Return the declared sizes that differ from the tensors'; ignores those of a lost decoder."""
    actual = hf_config(info) | timm_model_args(info)
    return [
        f"{key}={value} (its tensors: {actual[key]})"
        for key, value in declared.items()
        if key in actual and value != actual[key]
    ]


def hf_config(info: ModelInfo) -> Json:
    """Return config.json of ViTMAEForPreTraining, ViTMAEModel or ViTForImageClassification."""
    square = info.image_size[0] == info.image_size[1]
    config: Json = {
        "architectures": ["ViTMAEForPreTraining" if info.decoder_depth else "ViTMAEModel"],
        "model_type": "vit_mae",
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": info.width,
        "image_size": info.image_size[0] if square else list(info.image_size),
        "initializer_range": 0.02,
        "intermediate_size": mlp_dim(info.width, info.mlp_ratio),
        "layer_norm_eps": info.layer_norm_eps,
        "num_attention_heads": info.heads,
        "num_channels": info.channels,
        "num_hidden_layers": info.depth,
        "patch_size": info.patch,
        "qkv_bias": True,
    }
    if info.num_classes:
        names = info.class_names or tuple(f"LABEL_{i}" for i in range(info.num_classes))
        return config | {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    config |= {"mask_ratio": info.mask_ratio, "norm_pix_loss": info.target == "normalized"}
    if info.decoder_depth:
        config |= {
            "decoder_hidden_size": info.decoder_width,
            "decoder_intermediate_size": mlp_dim(info.decoder_width, info.decoder_mlp_ratio),
            "decoder_num_attention_heads": info.decoder_heads,
            "decoder_num_hidden_layers": info.decoder_depth,
        }
    return config


def hf_preprocessor(info: ModelInfo) -> Json:
    """Return preprocessor_config.json. The ViT processor of transformers has no center crop."""
    resampling = {name: number for number, name in RESAMPLING.items()}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(info.mean),
        "image_std": list(info.std),
        "resample": resampling[info.interpolation],
        "rescale_factor": 1 / 255,
        "size": {"height": info.image_size[0], "width": info.image_size[1]},
    }


# Arguments of timm models that change the computation, but not the tensors: supported values.
_TIMM_SUPPORTED = {
    "act_layer": (None, "gelu"),
    "no_embed_class": (None, False),
    "pool_include_prefix": (None, False),
}


def _check_timm(model_args: Json) -> None:
    for name, supported in _TIMM_SUPPORTED.items():
        if model_args.get(name) not in supported:
            raise ConvertError(
                f"config.json: model_args has {name}={model_args[name]!r}; only {supported[-1]!r} "
                "is supported"
            )


def parse_timm_config(config: Json) -> Json:
    """Return the fields of a `ModelInfo` that config.json of a timm directory contains."""
    metadata: Json = {}
    pretrained_cfg = config.get("pretrained_cfg", {})
    model_args = config.get("model_args", {})
    _check_timm(model_args)
    for name in ("mean", "std"):
        if name in pretrained_cfg:
            metadata[name] = tuple(pretrained_cfg[name])
    if pretrained_cfg.get("crop_mode") == "squash":
        metadata["resize"] = "squash"
    if "crop_pct" in pretrained_cfg:
        metadata["crop"] = float(pretrained_cfg["crop_pct"])
    if pretrained_cfg.get("interpolation") in RESAMPLING.values():
        metadata["interpolation"] = pretrained_cfg["interpolation"]
    if config.get("global_pool") in ("avg", "token"):
        metadata["pool"] = "mean" if config["global_pool"] == "avg" else "cls"
    if "num_heads" in model_args:
        metadata["heads"] = model_args["num_heads"]
    if "img_size" in model_args:
        metadata["image_size"] = _pair(model_args["img_size"])
    if config.get("label_names"):
        metadata["class_names"] = tuple(config["label_names"])
    return metadata


ARCHITECTURES = {
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_h14": "vit_huge_patch14_224",
}


def timm_model_args(info: ModelInfo) -> Json:
    """Return the keyword arguments of timm.create_model for a model of any size."""
    return {
        "img_size": list(info.image_size),
        "patch_size": info.patch,
        "in_chans": info.channels,
        "embed_dim": info.width,
        "depth": info.depth,
        "num_heads": info.heads,
        "mlp_ratio": info.mlp_ratio,
        "num_classes": info.num_classes,
        "global_pool": "avg" if info.pool == "mean" else "token",
        "fc_norm": info.fc_norm,
    }


def timm_config(info: ModelInfo) -> Json:
    """Return config.json for timm.create_model("local-dir:...")."""
    config: Json = {
        "architecture": ARCHITECTURES.get(info.size_name, "vit_base_patch16_224"),
        "num_classes": info.num_classes,
        "num_features": info.width,
        "global_pool": "avg" if info.pool == "mean" else "token",
        "model_args": timm_model_args(info),
        "pretrained_cfg": {
            "input_size": [info.channels, *info.image_size],
            "fixed_input_size": True,
            "interpolation": info.interpolation,
            "crop_pct": info.crop,
            "crop_mode": "center" if info.resize == "crop" else "squash",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": info.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if info.class_names:
        config["label_names"] = list(info.class_names)
    return config
