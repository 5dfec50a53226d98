"""The JSON files beside weights in directories of HuggingFace and timm."""

from typing import Any

from mae_jax.convert.model_info import ConvertError, ModelInfo
from mae_jax.models.layers import mlp_dim

Json = dict[str, Any]
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def parse_hf_config(config: Json) -> Json:
    """Fields of an `Info` that config.json tells."""
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ConvertError(f"config.json: hidden_act={activation!r}; only the exact 'gelu' is MAE")
    facts: Json = {
        "heads": config.get("num_attention_heads", 12),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "image_size": _pair(config.get("image_size", 224)),
    }
    if config.get("model_type") == "vit_mae":
        facts["decoder_heads"] = config.get("decoder_num_attention_heads", 16)
        facts["target"] = "normalized" if config.get("norm_pix_loss") else "pixels"
        facts["mask_ratio"] = config.get("mask_ratio", 0.75)
    names = config.get("id2label") or {}
    if names and not all(str(name).startswith("LABEL_") for name in names.values()):
        facts["class_names"] = tuple(names[key] for key in sorted(names, key=int))
    return facts


def parse_hf_preprocessor(preprocessor: Json, channels: int) -> Json:
    """Fields of an `Info` that preprocessor_config.json tells."""
    facts: Json = {}
    if preprocessor.get("do_normalize") is False:
        preprocessor = preprocessor | {"image_mean": 0.0, "image_std": 1.0}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in preprocessor:
            value = preprocessor[theirs]
            facts[ours] = (value,) * channels if isinstance(value, (int, float)) else tuple(value)
    if preprocessor.get("resample") in RESAMPLING:
        facts["interpolation"] = RESAMPLING[preprocessor["resample"]]
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    if shortest:
        cropped = crop["height"] if isinstance(crop, dict) else crop
        cropped = cropped if preprocessor.get("do_center_crop") else None
        facts |= {"resize": "crop", "crop": (cropped or shortest) / shortest}
    return facts


# What config.json tells of sizes that the tensors show: HuggingFace's keys, and timm's model_args.
_SIZES = (
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"),
    *("embed_dim", "depth", "in_chans"),
)


def declared_sizes(config: Json) -> Json:
    """Those of config.json, or of its model_args, that the tensors show as well."""
    told = {key: config[key] for key in _SIZES if key in config}
    patch = told.get("patch_size")
    if isinstance(patch, list) and len(set(patch)) == 1:
        told["patch_size"] = patch[0]
    return told


def size_mismatches(told: Json, info: ModelInfo) -> list[str]:
    """What `sizes` tells otherwise than the tensors; a decoder that is not there is no matter."""
    made = hf_config(info) | timm_model_args(info)
    return [
        f"{key}={value} (its tensors: {made[key]})"
        for key, value in told.items()
        if key in made and value != made[key]
    ]


def hf_config(info: ModelInfo) -> Json:
    """config.json of ViTMAEForPreTraining, ViTMAEModel or ViTForImageClassification."""
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
    """preprocessor_config.json; transformers' ViT processor squashes, whatever `resize` says."""
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


# timm's arguments that change what a model computes and leave no trace in its tensors.
_TIMM_ONLY = {
    "act_layer": (None, "gelu"),
    "no_embed_class": (None, False),
    "pool_include_prefix": (None, False),
}


def _check_timm(arguments: Json) -> None:
    for name, known in _TIMM_ONLY.items():
        if arguments.get(name) not in known:
            raise ConvertError(
                f"config.json: model_args has {name}={arguments[name]!r}; only {known[-1]!r} is "
                "known here, and the tensors alone would be read as that"
            )


def parse_timm_config(config: Json) -> Json:
    """Fields of an `Info` that a timm hub directory's config.json tells."""
    facts: Json = {}
    pretrained = config.get("pretrained_cfg", {})
    arguments = config.get("model_args", {})
    _check_timm(arguments)
    for name in ("mean", "std"):
        if name in pretrained:
            facts[name] = tuple(pretrained[name])
    if pretrained.get("crop_mode") == "squash":
        facts["resize"] = "squash"
    if "crop_pct" in pretrained:
        facts["crop"] = float(pretrained["crop_pct"])
    if pretrained.get("interpolation") in RESAMPLING.values():
        facts["interpolation"] = pretrained["interpolation"]
    if config.get("global_pool") in ("avg", "token"):
        facts["pool"] = "mean" if config["global_pool"] == "avg" else "cls"
    if "num_heads" in arguments:
        facts["heads"] = arguments["num_heads"]
    if "img_size" in arguments:
        facts["image_size"] = _pair(arguments["img_size"])
    if config.get("label_names"):
        facts["class_names"] = tuple(config["label_names"])
    return facts


ARCHITECTURES = {
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_h14": "vit_huge_patch14_224",
}


def timm_model_args(info: ModelInfo) -> Json:
    """Keyword arguments with which timm.create_model makes the model, whatever its size."""
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
    """config.json for timm.create_model("local-dir:...")."""
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
