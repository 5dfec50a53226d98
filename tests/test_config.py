"""Every key can be overridden, and bad values end in one clear sentence."""

import ast
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import (
    ablations,
    attentive,
    common,
    demo,
    finetune,
    knn,
    linprobe,
    pretrain,
    scratch,
    small,
)
from mae_jax.data.sources import DataError
from mae_jax.models.variants import VARIANTS
from mae_jax.train import judges
from mae_jax.train.build_data import make_eval_transform
from mae_jax.train.build_model import flops_per_image
from mae_jax.train.init_state import RESUMABLE_KEYS, flatten
from mae_jax.train.parts import log_run_summary
from mae_jax.train.trainer import ConfigError, build

CONFIGS = Path(common.__file__).parent
PLAIN = {bool, int, float, str, tuple, type(None)}


def keys_and_values():
    return flatten(common.base().to_dict()).items()


@pytest.mark.parametrize(("key", "value"), keys_and_values(), ids=lambda x: str(x))
def test_every_key_can_be_overridden(key, value):
    config = common.base()
    config.lock()
    change = {
        bool: lambda v: not v,
        int: lambda v: v + 1,
        float: lambda v: v + 0.5,
        str: lambda v: v + "x",
        tuple: lambda v: tuple(x + 1 for x in v),
        type(None): lambda v: type_of(config, key)(3),  # None stands for a value of some type
    }
    new = change[type(value)](value)
    config.update_from_flattened_dict({key: new})
    assert flatten(config.to_dict())[key] == new


def type_of(config: ConfigDict, key: str) -> type:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last)


def test_recipes_add_no_key_of_their_own():
    known = flatten(common.base().to_dict()).keys()
    configs = [demo.get_config(task) for task in demo.TASKS]
    configs += [small.get_config(f"vit_ti16,{side}") for side in (32, 64, 96)]
    configs += [
        ablations.get_config(f"{s},{row}") for s in ablations.SCALES for row in ablations.ROWS
    ]
    for recipe in (pretrain, finetune, linprobe, attentive, scratch, knn):
        configs += [recipe.get_config(size) for size in VARIANTS]
    for config in configs:
        assert flatten(config.to_dict()).keys() == known
        assert {type(x) for x in flatten(config.to_dict()).values()} <= PLAIN


def test_an_unknown_key_is_refused_with_the_closest_one():
    config = common.base()
    config.lock()
    with pytest.raises((AttributeError, KeyError), match="base_lr"):
        config.optim.base_lrr = 1.0


def test_free_keys_exist():
    known = flatten(common.base().to_dict())
    for free in RESUMABLE_KEYS:
        assert free in known or any(key.startswith(free) for key in known if free.endswith("."))


def test_configs_say_how_they_are_run():
    for path in CONFIGS.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if path.name not in ("__init__.py", "common.py"):
            assert "train.py" in text or "make demo" in text, path


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for i in range(8):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def config_of(folder, **overrides) -> ConfigDict:
    config = demo.get_config()
    config.batch_size = 8
    config.data.update(source="folder", path=str(folder))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def test_a_folder_without_labels_has_no_knn(folder):
    run = build(config_of(folder), folder / "run")
    assert not judges.features_enabled(run.config, run.train_source, run.eval_source)
    assert len(run.train_source) == 8
    assert run.duration.total_steps == 1000


def test_epochs_and_steps(folder):
    run = build(
        config_of(
            folder, steps=None, epochs=30.0, optim__warmup_steps=None, optim__warmup_epochs=2.5
        ),
        folder / "run",
    )
    assert run.duration.total_steps == 30
    assert run.duration.warmup_steps == 2.5
    assert float(run.learning_rate(30)) == 0.0
    assert float(run.learning_rate(2.5)) == pytest.approx(4e-3 * 8 / 256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(model__image_size=(64, 60)), r"60 = 7 \* 8 \+ 4. Use 56 or 64"),
        (dict(mask__ratio=0.99), "keeps 0 of 64 patches"),
        (dict(mask__ratio=0.0), "mask.ratio=0.0 keeps 64"),
        (dict(mask__kind="stripes"), "mask.kind='stripes'; use one of random, block, grid, user"),
        (dict(mask__kind="grid", mask__ratio=0.5), "one of each 2x2"),
        (dict(mask__kind="user"), "mask.path"),
        (dict(mask__path="/nowhere.npy", mask__kind="user"), "/nowhere.npy.* cannot be read"),
        (dict(decoder__predict_ratio=0.0), "decoder.predict_ratio=0.0 must be above 0 and at most"),
        (dict(decoder__predict_ratio=1.5), "decoder.predict_ratio=1.5 must be above 0 and at most"),
        (dict(decoder__predict_ratio=float("nan")), "decoder.predict_ratio=nan must be above 0"),
        (dict(batch_size=6), "batch_size=6 .*4 devices. Use 4 or 8"),
        (dict(batch_size=8, accumulate=3), "accumulate=3"),
        (dict(model__dtype="float16"), "model.dtype='float16'"),
        (dict(model__channels=0), "model.channels=0"),
        (dict(model__channels=4), "data.mean and data.std need a value for each of 4 channels"),
        (dict(model__heads=5), "model.width=128 does not divide by model.heads=5"),
        (dict(model__heads=0), "model.heads=0 must be at least 1"),
        (dict(model__depth=0), "model.depth=0 must be at least 1"),
        (dict(model__patch=0), "model.patch=0 must be at least 1"),
        (dict(model__decoder_depth=0), "model.decoder_depth=0 must be at least 1"),
        (dict(model__mlp_ratio=0.0), "model.mlp_ratio=0.0"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(model__remat="some"), "model.remat='some'"),
        (dict(data__on_bad="ignore"), "data.on_bad='ignore'"),
        (dict(task="segment"), "task='segment'; use one of pretrain, classify"),
        (dict(data__augment="mirror"), "data.augment='mirror'; use one of none, crop, weak_crop"),
        (dict(optim__name="sgd"), "optim.name='sgd'; use one of adamw, lars"),
        (dict(optim__layer_decay=0.0), "optim.layer_decay=0.0"),
        (dict(optim__train_last_blocks=0), "train_last_blocks .* are for task='classify'"),
        (dict(eval__knn_k=()), r"eval.knn_k=\(\)"),
        (dict(data__shots=0), "data.shots=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(eval__knn_k=("a",)), r"eval.knn_k=\('a',\)"),
        (dict(eval__knn_temperature=0.0), "eval.knn_temperature=0.0"),
        (dict(data__std=(0.2, 0.0, 0.2)), "data.std=.0.2, 0.0, 0.2.: numbers, those of data.std"),
        (dict(data__canvas=0), "data.canvas=0"),
        (dict(data__eval_crop=0.0, data__augment="none"), "data.eval_crop=0.0"),
        (dict(model__image_size=(64,)), r"model.image_size=\(64,\) is not a height and a width"),
        (dict(optim__base_lr=-1.0), "optim.base_lr=-1.0"),
        (dict(optim__base_lr=float("nan")), "optim.base_lr=nan must be a number from 0 up"),
        (dict(optim__ema=1.0), "optim.ema=1.0"),
        (dict(optim__b1=1.0), "optim.b1=1.0"),
        (dict(optim__b2=-0.1), "optim.b2=-0.1"),
        (dict(optim__eps=0.0), "optim.eps=0.0"),
        (dict(optim__momentum=1.0), "optim.momentum=1.0"),
        (dict(optim__clip_norm=-1.0), "optim.clip_norm=-1.0 must be a number above 0, or None"),
        (dict(steps=50), "optim.warmup_steps=100 is a warm-up of 100 steps, which must be shorter"),
        (dict(mesh__fsdp=3), "mesh.fsdp=3"),
        (dict(eval__stats="mine"), "eval.stats='mine'"),
        (dict(data__crop_scale=(0.5, 0.2)), "data.crop_scale"),
        (dict(log__every_steps=0), "log.every_steps=0"),
        (dict(checkpoint__every_steps=0), "checkpoint.every_steps=0"),
        (dict(eval__pictures=0), "eval.pictures=0"),
    ],
    ids=str,
)
def test_bad_values(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(config_of(folder, **overrides), folder / "run")
    assert not (folder / "run").exists()


def test_a_run_knows_that_it_predicts_some_patches(folder, caplog):
    caplog.set_level("INFO")
    costs, said = [], []
    for ratio in (1.0, 0.5, 0.001):
        caplog.clear()
        run = build(config_of(folder, decoder__predict_ratio=ratio), folder / "run")
        costs.append(flops_per_image(run.config, run.task))
        log_run_summary(run, 0)
        said.append(caplog.messages[0].partition("; ")[2])
    assert costs[0] > costs[1] > costs[2]
    assert said[0] == "16 of 64 patches are visible"
    assert said[1].endswith("; 24 of 48 masked ones are predicted")
    assert said[2].endswith("; 1 of 48 masked ones are predicted")


def test_bad_data(folder):
    with pytest.raises(DataError, match="nowhere"):
        build(config_of(folder / "nowhere"), folder / "run")
    with pytest.raises(DataError, match="batch_size=16 is larger than the data set of 8"):
        build(config_of(folder, batch_size=16), folder / "run")


@pytest.fixture
def labelled(tmp_path):
    from PIL import Image

    tmp_path = tmp_path / "labelled"
    for split in ("train", "validation"):
        for label in ("a", "b", "c"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 20)).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


def classify(folder, **overrides):
    common = dict(task="classify", optim__train_last_blocks=0, steps=200)
    common["data__eval_split"] = "validation"
    return config_of(folder, **(common | overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(classify__pool="max"), "classify.pool='max'; use one of cls, mean, attention"),
        (dict(classify__num_classes=2), "classify.num_classes=2 is less than the 3 classes"),
        (dict(classify__mixup=-0.1), "classify.mixup=-0.1"),
        (dict(classify__mixup_prob=2.0), "classify.mixup_prob=2.0"),
        (dict(classify__mixup_mode="all"), "classify.mixup_mode='all'; use one of batch, pair"),
        (dict(classify__smoothing=1.5), "classify.smoothing=1.5"),
        (dict(classify__erase=-1.0), "classify.erase=-1.0"),
        (dict(classify__drop_path=1.0), "classify.drop_path=1.0"),
        (dict(classify__head=False), "classify.head=False leaves nothing to train"),
        (dict(classify__head=False, steps=0, eval__knn_every_epochs=-1.0), "nothing to measure"),
        (
            dict(classify__pool="attention", classify__fc_norm=True),
            "after the final norm: no fc_norm",
        ),
        (dict(classify__head_init_std=-1.0), "classify.head_init_std=-1.0"),
        (dict(optim__train_last_blocks=5), "train_last_blocks=5 is not from 0 to the 4 blocks"),
        (dict(data__cache_features=True), "data.augment=none"),
        (dict(optim__name="lars", optim__clip_norm=1.0), "lars has neither"),
        (dict(data__randaugment_magnitude=11.0, data__augment="randaugment"), "magnitude=11.0"),
        (dict(model__position="none"), "model.position='none'; use one of sincos, learned"),
    ],
    ids=str,
)
def test_bad_values_of_classification(labelled, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(classify(labelled, **overrides), labelled / "run")


def test_classification_needs_labels_and_something_to_judge_on(folder, labelled):
    with pytest.raises(DataError, match="has no class labels"):
        build(classify(folder), folder / "run")
    with pytest.raises(DataError, match="validation exists, but no .*training"):
        build(classify(labelled, data__train_split="training"), labelled / "run")
    with pytest.raises(DataError, match="eval_split names the images"):
        build(classify(labelled, data__eval_split="val"), labelled / "run")
    (labelled / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in .*empty"):
        build(classify(labelled, data__eval_split="empty"), labelled / "run")
    with pytest.raises(DataError, match="5 shots, but class 'a' has only 4 images"):
        build(classify(labelled, data__shots=5), labelled / "run")
    (labelled / "validation" / "c").rename(labelled / "validation" / "d")
    with pytest.raises(DataError, match="classes that training has not: d"):
        build(classify(labelled), labelled / "run")


def test_few_shots_are_a_fixed_few_of_every_class(labelled):
    one, again, other = (
        build(classify(labelled, data__shots=3, data__shots_seed=seed), labelled / "run")
        for seed in (0, 0, 1)
    )
    labels = [one.train_source[i]["label"] for i in range(len(one.train_source))]
    assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    keys = [[run.train_source.key(i) for i in range(9)] for run in (one, again, other)]
    assert keys[0] == keys[1] != keys[2]
    fingerprints = [run.train_source.fingerprint() for run in (one, again, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_evaluation_alone_trains_nothing_and_needs_no_batch(labelled):
    run = build(classify(labelled, steps=0, batch_size=512), labelled / "run")
    assert run.loader is None
    assert run.duration.total_steps == 0


def test_sizes_of_small_images():
    assert small.get_config("vit_ti16,96").model.patch == 12
    with pytest.raises(ValueError, match="images of 50 pixels"):
        small.get_config("vit_ti16,50")
    with pytest.raises(ValueError, match="is not SCALE,ROW"):
        ablations.get_config("demo,nothing")


@pytest.mark.parametrize(
    ("side", "given", "crop"),
    [(224, None, 0.875), (96, None, 0.875), (448, None, 1.0), (448, 0.9, 0.9)],
)
def test_what_evaluation_looks_at_is_the_references(side, given, crop):
    config = common.base()
    config.model.image_size = (side, side)
    config.data.eval_crop = given
    assert make_eval_transform(config).crop == crop
