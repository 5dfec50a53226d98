"""Model cards (README.md) of the Hugging Face hub, from what a checkpoint and its run record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_jax.convert.model_info import ConvertError, ModelInfo
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.sides import sides_text

LIBRARIES = {
    "hf": "transformers",
    "timm": "timm",
    "mae_jax": "mae_jax",
    "official": "pytorch",
    "pixio": "pytorch",
}
TARGETS = {"pixels": "pixels", "normalized": "normalized pixels", "unknown": "pixels"}
RECIPES = {
    "pretrain": "pretraining",
    "classify": "classification",
    "segment": "semantic segmentation",
}
MEASURES = {  # of summary.json, in percent
    "top1": "accuracy, top-1",
    "miou": "mIoU of segmentation",
    "top1_ema": "accuracy of the EMA parameters, top-1",
    "top5": "accuracy, top-5",
    "knn_top1": "k-NN, top-1",
    "linear_top1": "linear probe, top-1",
}


def run_facts(path: Path) -> dict[str, Any]:
    """Return "config" and "summary" of a run, as far as its workdir has them; {} of other paths.

    Raises:
      ConvertError: one of the files is not JSON.
    """
    workdir = next((each for each in (path, *path.parents[:2]) if _is_workdir(each)), None)
    names = ("config", "summary") if workdir else ()
    return {name: _read(workdir / f"{name}.json") for name in names if workdir}


def _is_workdir(path: Path) -> bool:
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def write_card(folder: Path, text: str) -> None:
    """Write README.md into a folder."""
    with atomic_path(folder / "README.md") as part:
        part.write_text(text)


def model_card(
    info: ModelInfo,
    dialect: str,
    facts: Mapping[str, Any],
    *,
    repo: str = "org/name",
    license_id: str = "",
) -> str:
    """Return the text of README.md, which begins with the metadata that the hub reads.

    Args:
      dialect: format of the weights next to it.
      facts: of `run_facts`.
      repo: name of the model on the hub.
      license_id: as the hub names it, as "apache-2.0"; "" leaves it open.
    """
    sections = [
        _metadata(info, dialect, facts, license_id),
        f"# {repo.split('/')[-1]}",
        _description(info),
        "## Training",
        _table(_training(info, facts)),
        "## Results",
        _table(_results(facts)),
        "## Usage",
        _usage(info, dialect, repo),
        "## License",
        _license(facts, license_id),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(info: ModelInfo, dialect: str, facts: Mapping[str, Any], license_id: str) -> str:
    """Return the block of metadata; every value is JSON, which YAML includes."""
    task = "image-classification" if info.num_classes else "image-feature-extraction"
    task = "image-segmentation" if info.segments else task
    values: dict[str, Any] = {
        "library_name": LIBRARIES[dialect],
        "pipeline_tag": task,
        "tags": ["mae", "masked-autoencoder", *_pixio_tag(info), "vit", "vision", "jax"],
    }
    if license_id:
        values["license"] = license_id
    if "/" in (base := _start(facts)) and facts["summary"]["init"].get("revision"):
        values["base_model"] = base.removeprefix("hf://").split("@")[0]
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _pixio_tag(info: ModelInfo) -> list[str]:
    return ["pixio"] if info.is_pixio else []


def _start(facts: Mapping[str, Any]) -> str:
    """Return what the run started from: "random", the name of a file, or a model of the hub."""
    init = facts.get("summary", {}).get("init", {})
    path = str(init.get("path", "random"))
    return path if init.get("revision") else Path(path).name  # a card shows no private folders


def _description(info: ModelInfo) -> str:
    parts = f"encoder of {info.depth} blocks, {info.width} features, "
    parts += f"patches of {sides_text(info.patch)} pixels"
    if info.decoder_depth:
        parts += f"; decoder of {info.decoder_depth} blocks, which predicts {TARGETS[info.target]}"
    if info.num_classes:
        parts += f"; head of {info.num_classes} outputs"
    size = f"{info.image_size[0]} x {info.image_size[1]} x {info.channels}"
    method = "Masked autoencoder ([He et al., CVPR 2022](https://arxiv.org/abs/2111.06377))"
    if info.is_pixio:
        method = "Pixio ([Yang et al., CVPR 2026](https://arxiv.org/abs/2512.15715))"
        parts += f"; {info.class_tokens} class tokens"
    return f"{method}, a vision transformer ({info.size_name}) for images of {size}: {parts}."


def _training(info: ModelInfo, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows that describe the run."""
    config = facts.get("config")
    if not config:
        return {"weights from": info.source}
    data, optim, summary = config["data"], config["optim"], facts["summary"]
    steps = summary.get("steps") or config["steps"]
    dataset = data["name"] if data["source"] in ("tfds", "hf") else Path(data["path"]).name
    rows = {
        "recipe": RECIPES[config["task"]],
        "data": f"{dataset}, split {data['train_split']}",
        "length": f"{steps} steps" if steps else f"{config['epochs']:g} epochs",
        "batch size": config["batch_size"],
        "optimizer": f"{optim['name']}, base learning rate {optim['base_lr']:g} per 256 images, "
        f"weight decay {optim['weight_decay']:g}",
        "augmentation": data["augment"],
        "started from": _start(facts),
        "seed": config["seed"],
    }
    if config["task"] == "pretrain":
        cell = config["mask"].get("cell", 1)
        unit = "patches" if cell == 1 else f"cells of {cell} x {cell} patches"
        rows["masking"] = f"{config['mask']['kind']}, {config['mask']['ratio']:.0%} of the {unit}"
        if rate := config.get("pretrain", {}).get("drop_path"):
            rows["drop path"] = rate
    sampling = {k: x for k, x in data.get("sampling", {}).items() if x and k != "scores"}
    if sampling:
        rows["images sampled by"] = ", ".join(f"{name}={x:g}" for name, x in sampling.items())
    return rows


def _results(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of the final measures."""
    summary = facts.get("summary", {})
    split = facts.get("config", {}).get("data", {}).get("eval_split", "")
    rows = {
        f"{label} (split {split})": f"{summary[name]:.2%}"
        for name, label in MEASURES.items()
        if isinstance(summary.get(name), float)
    }
    if isinstance(summary.get("final_loss"), float):
        rows["last training loss"] = f"{summary['final_loss']:.4f}"
    return rows


def _table(rows: Mapping[str, Any]) -> str:
    if not rows:
        return "None recorded."
    lines = [f"| {name} | {str(value).replace('|', '-')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _usage(info: ModelInfo, dialect: str, repo: str) -> str:
    """Return one line of code for each library, after a conversion where it needs one."""
    auto = "AutoModelForImageClassification" if info.num_classes else "AutoModel"
    transformers = f'import transformers; transformers.{auto}.from_pretrained("{repo}")'
    timm = f'import timm; timm.create_model("hf-hub:{repo}", pretrained=True)'
    if dialect != "hf":
        transformers = f"mae-jax convert {repo} DIR --to hf, then {auto}.from_pretrained"
        transformers = f"# transformers: {transformers}"
    if dialect != "timm":
        timm = f"# timm: mae-jax convert {repo} DIR --to timm, then create_model('local-dir:DIR')"
    if info.is_pixio:
        head = "# transformers has no head for several class tokens"
        transformers = head if info.num_classes else f"{transformers}  # of version 5.0 or later"
        if info.image_size[0] != info.image_size[1] and dialect != "hf":
            transformers = "# transformers takes square images only of Pixio's models"
        timm = "# timm has no model with several class tokens"
    if not isinstance(info.patch, int) and not info.num_classes:
        transformers = "# transformers takes square patches only, except of models with a head"
    ours = f'import mae_jax; model, params = mae_jax.load("{repo}")'
    return "\n".join(["```python", transformers, timm, ours, "```"])


def _license(facts: Mapping[str, Any], license_id: str) -> str:
    text = f"{license_id}." if license_id else "The author of these weights has not chosen one."
    if (start := _start(facts)) != "random":
        text += f" They were trained from {start}, whose license applies, too."
    return text
