"""Parse and write config.json of checkpoint directories of Hugging Face and timm."""

import logging
from collections import Counter
from typing import Any

from mae_jax.convert.model_info import PROBLEM_TYPES, ConvertError, ModelInfo
from mae_jax.convert.preprocessing import as_crop
from mae_jax.convert.timm_preprocessing import check_value, parse_timm_preprocessing
from mae_jax.models.layers import mlp_dim
from mae_jax.utils.sides import Sides, height_width

log = logging.getLogger("mae_jax")

Json = dict[str, Any]


def parse_hf_config(config: Json) -> Json:
    """Return the fields of a `ModelInfo` that config.json of Hugging Face contains."""
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ConvertError(f"config.json: hidden_act={activation!r}; only 'gelu' is supported")
    pixio = config.get("model_type") == "pixio"
    metadata: Json = {
        "heads": config.get("num_attention_heads", 16 if pixio else 12),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6 if pixio else 1e-12),
        "image_size": height_width(config.get("image_size", 256 if pixio else 224)),
    }
    if pixio:
        return metadata
    if config.get("model_type") == "vit_mae":
        metadata["decoder_heads"] = config.get("decoder_num_attention_heads", 16)
        metadata["target"] = "normalized" if config.get("norm_pix_loss") else "pixels"
        metadata["mask_ratio"] = config.get("mask_ratio", 0.75)
    metadata["problem_type"] = _problem_type(config)
    by_name = config.get("label2id") or {}
    names = config.get("id2label") or {str(label): name for name, label in by_name.items()}
    metadata["class_names"] = _class_names(names)
    return metadata


def _problem_type(config: Json) -> str:
    value = config.get("problem_type") or ""
    if value not in ("", *PROBLEM_TYPES):
        raise ConvertError(
            f"config.json: problem_type={value!r} is unknown: set it to one of "
            f"{', '.join(PROBLEM_TYPES)}"
        )
    return value


def _class_names(names: Json) -> tuple[str, ...]:
    """Return the names by class; () for the default ones, or if some class has none."""
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        raise ConvertError(
            "config.json: id2label must be an object of names by class number, as "
            '{"0": "cat", "1": "dog"}'
        )
    by_class = {int(key): name for key, name in names.items()}
    if all(str(name).startswith("LABEL_") for name in names.values()):
        return ()
    if sorted(by_class) != list(range(len(names))) or None in by_class.values():
        log.warning(
            "config.json: id2label does not name every class from 0 to %d: the names are ignored",
            max(by_class),
        )
        return ()
    ordered = tuple(str(by_class[number]) for number in sorted(by_class))
    if repeated := sorted(name for name, count in Counter(ordered).items() if count > 1):
        log.warning("config.json: several classes are called %s", ", ".join(repeated))
    return ordered


# Sizes that can be checked against tensor shapes: keys of config.json, and of timm's model_args.
_SIZES = (
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"),
    *("embed_dim", "depth", "in_chans"),
    "n_cls_tokens",
)


def declared_sizes(config: Json) -> Json:
    """Return the sizes in config.json (or model_args) that can be checked against the tensors."""
    sizes = {key: config[key] for key in _SIZES if key in config}
    if "n_cls_tokens" in sizes and "mlp_ratio" in config:  # of Pixio
        sizes["mlp_ratio"] = config["mlp_ratio"]
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
    """Return config.json of the model of transformers that has these parameters.

    It is PixioModel, ViTMAEForPreTraining, ViTMAEModel or ViTForImageClassification.
    """
    config = _hf_encoder_config(info)
    if info.is_pixio:
        return config | {
            "architectures": ["PixioModel"],
            "model_type": "pixio",
            "apply_layernorm": True,
            "drop_path_rate": 0.0,
            "mlp_ratio": int(info.mlp_ratio) if info.mlp_ratio % 1 == 0 else info.mlp_ratio,
            "n_cls_tokens": info.class_tokens,
            "reshape_hidden_states": True,
        }
    config |= {
        "architectures": ["ViTMAEForPreTraining" if info.decoder_depth else "ViTMAEModel"],
        "model_type": "vit_mae",
        "intermediate_size": mlp_dim(info.width, info.mlp_ratio),
    }
    if info.problem_type:
        config["problem_type"] = info.problem_type
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


def _json_sides(sides: Sides) -> int | list[int]:
    height, width = height_width(sides)
    return height if height == width else [height, width]


def _hf_encoder_config(info: ModelInfo) -> Json:
    """Return the settings that all these models have."""
    return {
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": info.width,
        "image_size": _json_sides(info.image_size),
        "initializer_range": 0.02,
        "layer_norm_eps": info.layer_norm_eps,
        "num_attention_heads": info.heads,
        "num_channels": info.channels,
        "num_hidden_layers": info.depth,
        "patch_size": _json_sides(info.patch),
        "qkv_bias": True,
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
    """Return the fields of a `ModelInfo` that config.json of a timm directory contains.

    Raises:
      ConvertError: a value is invalid or not supported, or two values contradict each other.
    """
    pretrained_cfg = config.get("pretrained_cfg", config)  # older files have no such level
    model_args = config.get("model_args", {})
    for name, group in (("pretrained_cfg", pretrained_cfg), ("model_args", model_args)):
        if not isinstance(group, dict):
            raise ConvertError(f"config.json: {name}={group!r} must be an object of settings")
    _check_timm(model_args)
    metadata = parse_timm_preprocessing(pretrained_cfg, model_args)
    metadata["problem_type"] = _problem_type(config)
    if config.get("global_pool") in ("avg", "token"):
        metadata["pool"] = "mean" if config["global_pool"] == "avg" else "cls"
    if "num_heads" in model_args:
        metadata["heads"] = model_args["num_heads"]
    names = config.get("label_names") or pretrained_cfg.get("label_names")
    if names:
        valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
        check_value("label_names", names, valid, "a list of names")
        metadata["class_names"] = tuple(names)
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
        "patch_size": _json_sides(info.patch),
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
    rule, crop = as_crop(info) or ("squash", 1.0)
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
            "crop_pct": crop,
            "crop_mode": "center" if rule in ("crop", "cover") else rule,
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": info.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if info.problem_type:
        config["problem_type"] = info.problem_type  # timm ignores it, but readers of it need not
    if info.class_names:
        config["label_names"] = list(info.class_names)
    return config
