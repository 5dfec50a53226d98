"""Fine-tuning, probing and evaluation as runs: results, resuming, errors."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_helpers import COMMIT, hub_cache, write_cache  # noqa: F401
from PIL import Image
from run_helpers import save_first_state

from configs import attentive, finetune, knn, linprobe
from mae_jax import predict
from mae_jax.convert import __main__ as convert
from mae_jax.convert import weights
from mae_jax.data.sources import DataError
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.train import trainer
from mae_jax.train.config import from_config_dict
from mae_jax.train.init_state import init_provenance, restore_or_init
from mae_jax.train.setup import build
from mae_jax.utils.errors import UserError

CLASSES = {"dark": 0, "light": 128, "mixed": 64}
SHARED = dict(model__image_size=(32, 32), model__patch=8, model__width=32, model__depth=2)
SHARED |= dict(model__heads=2, model__dtype="float32", batch_size=8, data__source="folder")
SHARED |= dict(data__workers=0, data__eval_crop=1.0, log__every_steps=2, eval__batch_size=6)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise in three classes; 37 evaluation images have no divisor."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (10, 10, 10)), ("validation", (13, 12, 12))):
        for (name, low), count in zip(CLASSES.items(), counts):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(golden):
    return str(golden / "mae" / "p0_plain" / "state_dict.safetensors")


def config_of(recipe, images, **overrides):
    config = recipe.get_config()
    values = SHARED | dict(data__path=str(images)) | overrides
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return from_config_dict(config)


FINETUNE = dict(steps=12, optim__warmup_steps=2, optim__ema=0.9, checkpoint__every_steps=4)
FINETUNE |= dict(eval__accuracy_every_epochs=2.0, accumulate=2, checkpoint__max_to_keep=9)
LINPROBE = dict(epochs=4.0, optim__warmup_epochs=1.0, optim__base_lr=3.0, data__augment="none")


@pytest.fixture(scope="module")
def finetuned(images, pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finetuned")
    trainer.train_and_evaluate(
        config_of(finetune, images, init__path=pretrained, **FINETUNE), workdir
    )
    return workdir


@pytest.fixture(scope="module")
def probed(images, pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("probed")
    trainer.train_and_evaluate(
        config_of(linprobe, images, init__path=pretrained, **LINPROBE), workdir
    )
    return workdir


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_a_run_writes_its_results(finetuned, pretrained):
    summary = summary_of(finetuned)
    assert summary["steps"] == 12
    assert summary["eval_images"] == 37
    low, high = summary["top1_interval"]
    assert 0 <= low < summary["top1"] < high <= 1
    assert summary["top5"] == 1.0, "there are only three classes"
    assert set(summary) >= {"top1_ema", "final_loss", "eval_seconds"}
    rows = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "top1" in row] == [6, 12]
    init = summary["init"]
    assert init["path"] == pretrained
    assert "encoder/pos_embed/table" in init["loaded"]
    assert init["fresh"] == ["fc_norm/bias", "fc_norm/scale", "head/bias", "head/kernel"]
    assert sorted(init["unused"]) == ["encoder/norm/bias", "encoder/norm/scale"]


def test_a_resumed_run_is_bit_identical(finetuned, images, tmp_path):
    """Mixing, erasing, dropped paths and RandAugment included; init.path is not needed again."""
    shutil.copytree(finetuned / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    shutil.copy(finetuned / "init.json", tmp_path)
    trainer.train_and_evaluate(config_of(finetune, images, **FINETUNE), tmp_path)
    ours, theirs = (weights.read(path).arrays for path in (tmp_path, finetuned))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    ours, theirs = summary_of(tmp_path), summary_of(finetuned)
    same = ("top1", "top1_ema", "final_loss", "init")
    assert [ours[name] for name in same] == [theirs[name] for name in same]


def test_a_run_records_which_model_of_the_hub_it_started_from(
    images,
    pretrained,
    tmp_path,
    hub_cache,  # noqa: F811
):
    """A restart before the first checkpoint reads the same revision; later ones need none."""
    write_cache(hub_cache, "org/model", {"model.safetensors": Path(pretrained).read_bytes()})
    setup = build(config_of(linprobe, images, init__path="org/model", **LINPROBE), tmp_path)
    with closing(Checkpointer(tmp_path / "checkpoints", 1)) as checkpointer:
        args = setup.config, setup.task, setup.layout, checkpointer, setup.meta
        restore_or_init(*args)
        first = init_provenance(tmp_path)
        assert (first["init"]["path"], first["init"]["revision"]) == ("org/model", COMMIT)
        write_cache(hub_cache, "org/model", {"config.json": b"{}"}, commit="2" * 40)
        restore_or_init(*args)
        assert init_provenance(tmp_path) == first


def test_evaluation_alone_repeats_the_accuracy(finetuned, images, tmp_path):
    """With another batch size, which neither divides 37 images nor suits 4 devices."""
    assert jax.device_count() == 4
    overrides = FINETUNE | dict(steps=0, optim__ema=None, eval__batch_size=5)
    config = config_of(finetune, images, init__path=str(finetuned), **overrides)
    trainer.train_and_evaluate(config, tmp_path)
    summary = summary_of(tmp_path)
    assert summary["top1"] == summary_of(finetuned)["top1"]
    assert summary["eval_images"] == 37
    assert summary["init"]["fresh"] == []
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_frozen_encoder_keeps_its_bits(probed, pretrained):
    before = weights.read(pretrained, heads=2, decoder_heads=2).arrays
    after = weights.read(probed).arrays
    for name, array in after.items():
        if name.startswith("encoder/"):
            assert array.tobytes() == before[name].astype(np.float32).tobytes(), name
    assert after["head_norm/count"] == 12
    assert np.abs(after["head_norm/mean"]).max() > 0


def test_cached_features_make_the_same_probe(probed, images, pretrained, tmp_path):
    overrides = LINPROBE | dict(init__path=pretrained, data__cache_features=True)
    trainer.train_and_evaluate(config_of(linprobe, images, **overrides), tmp_path)
    ours, theirs = (weights.read(path).arrays for path in (tmp_path, probed))
    for name in ("head/kernel", "head_norm/mean", "head_norm/var"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, atol=2e-5)
    assert summary_of(tmp_path)["top1"] == summary_of(probed)["top1"]


def test_the_last_blocks_alone(images, pretrained, tmp_path):
    overrides = FINETUNE | dict(init__path=pretrained, optim__train_last_blocks=1, steps=4)
    overrides |= dict(accumulate=1, optim__warmup_steps=1, data__augment="none")
    trainer.train_and_evaluate(config_of(finetune, images, **overrides), tmp_path)
    before = weights.read(pretrained, heads=2, decoder_heads=2).arrays
    after, averaged = (weights.read(tmp_path, ema=ema).arrays for ema in (False, True))
    for name, array in [*after.items(), *averaged.items()]:
        if name.startswith("encoder/blocks/"):
            assert array[0].tobytes() == before[name][0].tobytes(), name
            assert np.any(array[1] != before[name][1]), name
        elif name.startswith("encoder/"):
            assert array.tobytes() == before[name].tobytes(), name


def test_attentive_probe_is_a_checkpoint_like_any_other(images, pretrained, tmp_path, capsys):
    overrides = LINPROBE | dict(init__path=pretrained, data__cache_features=True)
    trainer.train_and_evaluate(config_of(attentive, images, **overrides), tmp_path / "run")
    top1 = summary_of(tmp_path / "run")["top1"]
    single = tmp_path / "probe.safetensors"
    convert.main([str(tmp_path / "run"), str(single), "--to", "mae_jax"])
    again = config_of(attentive, images, init__path=str(single), steps=0)
    trainer.train_and_evaluate(again, tmp_path / "again")
    assert summary_of(tmp_path / "again")["top1"] == top1
    with pytest.raises(weights.ConvertError, match="has no learned attention pooling"):
        convert.main([str(single), str(tmp_path / "x.safetensors"), "--to", "timm"])


def test_heads_go_to_other_dialects(finetuned, probed, images, tmp_path):
    for workdir, dialect in ((finetuned, "timm"), (finetuned, "official"), (probed, "official")):
        file = tmp_path / f"{workdir.name}_{dialect}.safetensors"
        convert.main([str(workdir), str(file), "--to", dialect])
        out = [tmp_path / f"{name}.csv" for name in ("ours", "theirs")]
        for checkpoint, csv in zip((workdir, file), out):
            arguments = [str(images / "validation"), "--checkpoint", str(checkpoint)]
            predict.main([*arguments, "--out", str(csv)])
        assert out[0].read_text() == out[1].read_text()
        assert "dark" in out[0].read_text()


def test_knn_needs_no_head_and_no_training(images, pretrained, tmp_path):
    trainer.train_and_evaluate(config_of(knn, images, init__path=pretrained), tmp_path)
    summary = summary_of(tmp_path)
    assert 0 <= summary["knn_top1"] <= 1
    assert {f"knn_top1_k{k}" for k in (1, 5, 10, 100, 200)} <= summary.keys()
    assert "top1" not in summary


def test_knn_of_arrays(pretrained, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 128, (count, 32, 32, 3)) + 120 * labels[:, None, None, None]
        np.savez(tmp_path / f"{split}.npz", image=images.astype(np.uint8), label=labels)
    config = config_of(knn, tmp_path, data__source="arrays", init__path=pretrained)
    trainer.train_and_evaluate(config, tmp_path / "run")
    assert summary_of(tmp_path / "run")["knn_top1"] > 0.9


def refused(message, config, workdir):
    with pytest.raises(UserError, match=message):
        trainer.train_and_evaluate(config, workdir)
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


def test_random_features_only_when_asked_for(images, tmp_path, caplog):
    config = config_of(linprobe, images, **LINPROBE)
    refused("init.path is not set, so the encoder would be random", config, tmp_path / "a")
    save_first_state(config_of(linprobe, images, init__path="random", **LINPROBE), tmp_path)
    assert "init.path=random: the encoder starts from random weights" in caplog.text
    assert init_provenance(tmp_path) == {"init": {"path": "random"}}


def test_another_head_is_replaced_only_when_asked(images, golden, tmp_path):
    with_head = str(golden / "vit" / "v0_cls" / "state_dict.safetensors")
    overrides = LINPROBE | dict(init__path=with_head, data__cache_features=True)
    config = config_of(linprobe, images, **overrides)
    refused(
        "head is head over cls, this model's head and head_norm over cls.*new_head",
        config,
        tmp_path,
    )
    plain = overrides | dict(classify__head_norm=False)
    refused(
        r"head/kernel has shape \(32, 10\)(?s:.)*new_head",
        config_of(linprobe, images, **plain),
        tmp_path,
    )
    save_first_state(config_of(linprobe, images, init__new_head=True, **overrides), tmp_path)
    fresh = init_provenance(tmp_path)["init"]["fresh"]
    assert {"head/bias", "head/kernel", "head_norm/mean"} <= set(fresh)


def test_a_checkpoint_without_the_encoder(images, golden, tmp_path):
    fc_norm = str(golden / "vit" / "v0_gap" / "state_dict.safetensors")
    config = config_of(linprobe, images, init__path=fc_norm, **LINPROBE)
    refused("has no final norm, which this model needs", config, tmp_path)
    overrides = LINPROBE | dict(init__new_head=True, classify__fc_norm=True, model__width=16)
    narrow = config_of(linprobe, images, init__path=fc_norm, **overrides)
    refused(r"encoder/cls_token has shape \(1, 1, 32\), the model needs", narrow, tmp_path)


def test_a_checkpoint_that_is_not_there(tmp_path, images):
    config = config_of(linprobe, images, init__path=str(tmp_path / "gone.pth"), **LINPROBE)
    refused("init.path: .*gone.pth does not exist", config, tmp_path / "run")


def test_a_bad_image_is_left_out_of_the_accuracy(finetuned, images, tmp_path, caplog):
    shutil.copytree(images, tmp_path / "images")
    bad = tmp_path / "images" / "validation" / "light" / "3.png"
    bad.write_bytes(b"not an image")
    overrides = FINETUNE | dict(init__path=str(finetuned), steps=0, optim__ema=None)
    config = config_of(finetune, tmp_path / "images", **overrides)
    with pytest.raises(DataError, match="light/3.png is bad"):
        trainer.train_and_evaluate(config, tmp_path / "a")
    config = config_of(finetune, tmp_path / "images", data__on_bad="skip", **overrides)
    with caplog.at_level("WARNING", "mae_jax"):
        trainer.train_and_evaluate(config, tmp_path / "b")
    assert summary_of(tmp_path / "b")["eval_images"] == 36
    assert caplog.text.count("skipped a bad image (1 so far): ") == 1
