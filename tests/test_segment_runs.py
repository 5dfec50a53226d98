"""Segmentation as runs: results, resuming, checkpoints, predictions, errors."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from run_helpers import assert_same_end, save_first_state
from test_tfds import TFRECORDS

import mae_jax
from configs import segment
from mae_jax import predict
from mae_jax.convert import __main__ as convert
from mae_jax.convert import weights
from mae_jax.data.sources import DataError
from mae_jax.train import trainer
from mae_jax.train.config import from_config_dict
from mae_jax.train.init_state import init_provenance
from mae_jax.train.setup import build
from mae_jax.train.warm_start import load_init_weights
from mae_jax.utils.errors import UserError

NAMES = ("sky", "grass", "brick", "sand")
COLORS = np.array([(90, 150, 250), (40, 160, 60), (180, 60, 40), (230, 210, 150)])
TINY = dict(model__image_size=(16, 24), model__patch=8, model__width=16, model__depth=1)
TINY |= dict(model__heads=2, model__dtype="float32", batch_size=8, steps=16)
TINY |= dict(accumulate=2, segment__drop_path=0.1, optim__base_lr=1.0, optim__warmup_steps=4)
TINY |= dict(optim__ema=0.8, optim__layer_decay=0.9, checkpoint__every_steps=8)
TINY |= dict(checkpoint__max_to_keep=9, data__source="folder", data__workers=0, init__path="random")
TINY |= dict(eval__accuracy_every_epochs=2.0, eval__pictures_every_epochs=2.0, eval__pictures=2)
TINY |= dict(log__every_steps=2, eval__batch_size=4, mesh__fsdp=2, mesh__max_whole=1.0)
TINY |= dict(mesh__min_split_bytes=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two halves in noisy colors; 24 to train on, 5 to evaluate on."""
    folder, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    for split, count in (("train", 24), ("validation", 5)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((20, 30), np.uint8)
            mask[:, :15], mask[:, 15:] = rng.choice(4, 2, replace=False)
            pixels = COLORS[mask] + rng.integers(-5, 6, (20, 30, 3))
            mask[0] = 255
            image = Image.fromarray(mask)
            image.putpalette(bytes(range(12)))
            image.save(folder / split / "masks" / f"{number}.png")
            pixels = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            pixels.save(folder / split / "images" / f"{number}.png")
    return folder


def config_of(folder, **overrides):
    config = segment.get_config()
    values = TINY | dict(data__path=str(folder)) | overrides
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return from_config_dict(config)


@pytest.fixture(scope="module")
def segmented(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("segmented")
    trainer.train_and_evaluate(config_of(folder), workdir)
    return workdir


@pytest.fixture(scope="module")
def upsampled(folder, segmented, tmp_path_factory):
    """The start of a second run from the first one's encoder: another head."""
    workdir = tmp_path_factory.mktemp("upsampled")
    overrides = dict(segment__head="upsample", segment__head_width=8, init__path=str(segmented))
    overrides |= dict(init__new_head=True, optim__ema=None, data__in_memory=True)
    save_first_state(config_of(folder, **overrides), workdir)
    return workdir


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_a_run_learns_and_writes_its_results(segmented):
    summary = summary_of(segmented)
    rows = [json.loads(line) for line in (segmented / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row for row in rows if "miou" in row}
    assert list(evaluated) == [6, 12, 16]
    assert evaluated[6]["miou"] < evaluated[16]["miou"] == summary["miou"]
    assert 0.5 < summary["miou"] <= summary["pixel_accuracy"] <= 1
    assert set(summary) >= {"miou_ema", "pixel_accuracy_ema", "mean_accuracy", "eval_seconds"}
    assert summary["eval_images"] == 5
    assert set(summary["class_iou"]) == set(NAMES)
    assert np.mean(list(summary["class_iou"].values())) == pytest.approx(summary["miou"])
    names = [f"step_{step:07d}.png" for step in (6, 12, 16)]
    assert sorted(file.name for file in (segmented / "pictures").iterdir()) == names
    with Image.open(summary["pictures"]) as figure:
        assert figure.width > figure.height, "three columns of two images"


def test_a_resumed_run_is_bit_identical(segmented, folder, tmp_path):
    shutil.copytree(segmented / "checkpoints" / "8", tmp_path / "checkpoints" / "8")
    trainer.train_and_evaluate(config_of(folder), tmp_path)
    assert_same_end(tmp_path, segmented, step=16)
    for name in ("miou", "miou_ema", "class_iou", "final_loss"):
        assert summary_of(tmp_path)[name] == summary_of(segmented)[name]


def test_evaluation_alone_repeats_the_miou(segmented, folder, tmp_path):
    """With another batch size, which does not divide 5 images, and one device's rows of padding."""
    overrides = dict(steps=0, optim__ema=None, eval__batch_size=8, init__path=str(segmented))
    trainer.train_and_evaluate(config_of(folder, **overrides), tmp_path)
    assert summary_of(tmp_path)["miou"] == summary_of(segmented)["miou"]
    assert init_provenance(tmp_path)["init"]["fresh"] == []


def test_another_head_is_replaced_only_when_asked(segmented, upsampled, folder, golden, tmp_path):
    fresh = init_provenance(upsampled)["init"]["fresh"]
    assert {name.split("/")[0] for name in fresh} == {"head", "upsample"}
    for changes, message in (
        (
            dict(init__path=str(segmented), segment__head="upsample"),
            "its head is head over grid, this model's head and upsample over grid.*new_head",
        ),
        (
            dict(init__path=str(golden / "vit" / "v0_cls" / "state_dict.safetensors")),
            "its head is head over cls, this model's head over grid.*new_head",
        ),
        (
            dict(init__path=str(segmented), segment__num_classes=5),
            r"head/bias has shape \(4,\)(?s:.)*new_head",
        ),
    ):
        config = config_of(folder, **changes)
        run = build(config, tmp_path)
        with pytest.raises(UserError, match=message):
            load_init_weights(config, run.task, run.layout.shapes.params, NAMES)


def test_checkpoints_are_models(segmented, upsampled, folder, tmp_path, capsys):
    for workdir, width in ((segmented, 0), (upsampled, 8)):
        single = tmp_path / f"{width}.safetensors"
        convert.main([str(workdir), str(single), "--to", "mae_jax"])
        for path in (workdir, single):
            model, params = mae_jax.load(path)
            assert (model.info.problem, model.info.upsample_width) == (
                "semantic_segmentation",
                width,
            )
            assert model.info.class_names == NAMES
            images = model.read_images(folder / "validation" / "images" / "0.png")
            assert model.features(params, images, grid=True)["grid"].shape == (1, 2, 3, 16)
            assert model.logits(params, images).shape == (1, *((16, 24) if width else (2, 3)), 4)
        with pytest.raises(weights.ConvertError, match="timm has no segmentation head.*encoder-"):
            convert.main([str(workdir), str(tmp_path / "x.safetensors"), "--to", "timm"])
        encoder = tmp_path / f"{width}_encoder.safetensors"
        convert.main([str(workdir), str(encoder), "--to", "timm", "--encoder-only"])
        assert weights.read(encoder, heads=2).info.num_classes == 0
        capsys.readouterr()
        convert.main(["inspect", str(workdir)])
        text = capsys.readouterr().out
        assert "4 classes, named" in text
        assert "semantic_segmentation" in text
        assert ("upsampling with 8 features" in text) == bool(width)


def test_predict_writes_masks_and_overlays(segmented, upsampled, folder, tmp_path, capsys):
    images = folder / "validation" / "images"
    for workdir in (segmented, upsampled):
        out = tmp_path / workdir.name
        predict.main([str(images), "--checkpoint", str(workdir), "--out", str(out)])
        assert (out / "classes.txt").read_text().splitlines() == list(NAMES)
        assert len(list(out.glob("*.png"))) == 10
        for number in range(5):
            with Image.open(out / f"{number}_mask.png") as mask:
                assert (mask.size, mask.mode) == ((30, 20), "P")
                assert np.asarray(mask).max() < 4
            with Image.open(out / f"{number}_overlay.png") as overlay:
                assert (overlay.size, overlay.mode) == ((30, 20), "RGB")
    truth = [np.asarray(Image.open(folder / f"validation/masks/{n}.png")) for n in range(5)]
    masks = [np.asarray(Image.open(tmp_path / segmented.name / f"{n}_mask.png")) for n in range(5)]
    labeled = np.stack(truth) != 255
    accuracy = (np.stack(masks) == np.stack(truth))[labeled].mean()
    assert accuracy == pytest.approx(summary_of(segmented)["pixel_accuracy"], abs=0.05)
    assert "0.png: " in capsys.readouterr().out


def test_predict_refuses_what_it_cannot_do(segmented, folder, tmp_path):
    images = str(folder / "validation" / "images")
    flags = ["--checkpoint", str(segmented)]
    with pytest.raises(UserError, match=r"p.csv must be a folder"):
        predict.main([images, *flags, "--out", str(tmp_path / "p.csv")])
    names = tmp_path / "data" / "classes.txt"
    names.parent.mkdir()
    names.write_text("other\n")
    for other in (names.parent, images):
        with pytest.raises(UserError, match="has files that are not predictions"):
            predict.main([images, *flags, "--out", str(other)])
    assert names.read_text() == "other\n"
    with pytest.raises(UserError, match="--top is for classes"):
        predict.main([images, *flags, "--out", str(tmp_path / "p"), "--top", "2"])
    twice = str(folder / "train" / "images" / "0.png")
    with pytest.raises(UserError, match=r"would both be written to 0_mask.png"):
        predict.main([images, twice, *flags, "--out", str(tmp_path / "p")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(segment__head="deep"), "segment.head='deep' must be one of linear, upsample"),
        (dict(segment__head_width=0), "segment.head_width=0 must be at least 1"),
        (dict(segment__head="upsample", segment__head_norm=True), "segment.head_norm=True is for"),
        (dict(segment__num_classes=3), "segment.num_classes=3 is less than the 4 classes"),
        (dict(segment__drop_path=1.0), "segment.drop_path=1.0 must be at least 0 and below 1"),
        (dict(segment__scale=(2.0, 0.5)), r"segment.scale=\(2.0, 0.5\) must increase"),
        (dict(segment__scale=(0.0, 0.5)), r"segment.scale=\(0.0, 0.5\) must be above 0"),
        (dict(data__augment="randaugment"), "data.augment='randaugment' must be none or crop"),
        (dict(data__shots=3), "data.shots=3 is not for task='segment'"),
        (dict(data__exif=True), "data.exif=True is not for task='segment'"),
        (dict(data__cache_features=True), "data.cache_features=True is not for"),
        (dict(data__resize_on="device"), "data.resize_on='device' needs"),
        (dict(data__eval_split="elsewhere"), "elsewhere does not exist: data.eval_split"),
        (dict(data__source="arrays"), "validation does not exist: data.eval_split"),
    ],
    ids=str,
)
def test_bad_values(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build(config_of(folder, **changes), tmp_path / "run")


def test_data_without_masks_or_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "classes.txt").unlink()
    with pytest.raises(UserError, match="segment.num_classes=None must be set"):
        build(config_of(tmp_path / "copy"), tmp_path / "run")
    run = build(config_of(tmp_path / "copy", segment__num_classes=6), tmp_path / "run")
    assert (run.task.model.num_classes, run.classes) == (6, ())
    (tmp_path / "copy" / "train" / "masks" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3.png has no mask"):
        build(config_of(tmp_path / "copy", segment__num_classes=6), tmp_path / "run")
    tfds = dict(data__source="tfds", data__name="many_bands", data__path=str(TFRECORDS))
    tfds |= dict(data__image_feature="bands", segment__mask_feature="nothing")
    with pytest.raises(DataError, match="segment.mask_feature='nothing' is not a feature of"):
        build(config_of(folder, **tfds), tmp_path / "run")
