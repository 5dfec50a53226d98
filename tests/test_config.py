"""Every config key is declared and can be overridden; bad values raise an error with the key."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import (
    ablations,
    attentive,
    demo,
    finetune,
    knn,
    linprobe,
    pixio,
    pretrain,
    scratch,
    segment,
    small,
)
from mae_jax.data.sources import DataError
from mae_jax.models.variants import VARIANTS
from mae_jax.train import recipes, report
from mae_jax.train.build_data import make_eval_transform
from mae_jax.train.build_evaluators import has_labels
from mae_jax.train.build_model import flops_per_image
from mae_jax.train.config import Config, MaskConfig, from_config_dict
from mae_jax.train.config_schema import as_json, declared_keys, to_config_dict
from mae_jax.train.setup import build
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

CONFIGS = Path(demo.__file__).parent
PLAIN = {bool, int, float, str, tuple, type(None)}


def flat(config: ConfigDict) -> dict:
    return flatten(config.to_dict(), sep=".")


def test_every_key_can_be_overridden():
    changes = {
        bool: lambda v: not v,
        int: lambda v: v + 1,
        float: lambda v: v + 0.5,
        str: lambda v: v + "x",
        tuple: lambda v: tuple(x + type(x)("1") for x in v),
    }
    for key, value in flat(recipes.base()).items():
        config = recipes.base()
        config.lock()
        # None is a placeholder for a value of some type.
        new = type_of(config, key)(3) if value is None else changes[type(value)](value)
        config.update_from_flattened_dict({key: new})
        assert flat(config)[key] == new


def type_of(config: ConfigDict, key: str) -> type:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last)


def test_the_config_dict_and_the_typed_config_convert_into_each_other():
    config = recipes.base()
    assert from_config_dict(config) == Config()
    config.mask.ratio = 0.5
    config.optim.clip_norm = 1.0
    config.model.image_size = [64, 96]
    typed = from_config_dict(config)
    assert typed.mask == MaskConfig(ratio=0.5)
    assert (typed.optim.clip_norm, typed.model.image_size) == (1.0, (64, 96))
    assert from_config_dict(to_config_dict(typed)) == typed
    assert as_json(typed)["model"]["image_size"] == [64, 96]


def test_a_value_in_place_of_a_group_is_an_error():
    with pytest.raises(UserError, match="mask=3 must be a group of keys"):
        Config(mask=3)


def test_every_key_has_a_meaning():
    groups = [Config(), *(x for x in vars(Config()).values() if dataclasses.is_dataclass(x))]
    for group in groups:
        for field in dataclasses.fields(group):
            assert field.metadata.get("meaning") or dataclasses.is_dataclass(field.default)


def test_a_value_of_the_wrong_type_is_an_error_with_an_example():
    for group, values, message in (
        ("data", {"mean": ("a",) * 3}, r"data.mean=.* must be of type float, as in \(0.485, "),
        ("eval", {"knn_k": (1.5,)}, r"eval.knn_k=\(1.5,\) must be of type int, as in \(10,\)"),
        ("data", {"shots": True}, "data.shots=True must be of type int, as in 1"),
        ("data", {"crop_scale": (0.2,)}, r"crop_scale=.* must be 2 numbers, as in \(0.2, 1.0\)"),
        ("model", {"image_size": 224}, r"image_size=224 must be 2 numbers, as in \(224, 224\)"),
        ("mask", {"ratio": (0.5, 0.5)}, r"mask.ratio=.* must be of type float, as in 0.75"),
        ("optim", {"base_lr": float("inf")}, "base_lr=inf must be at least 0, and finite"),
        ("data", {"shots_seed": -1}, "data.shots_seed=-1 must be from 0 to 4294967295"),
    ):
        groups = {name: type(value) for name, value in vars(Config()).items()}
        with pytest.raises(UserError, match=message) as error:
            groups[group](**values)
        assert error.value.key == f"{group}.{next(iter(values))}"


def test_recipes_add_no_keys():
    known = flat(recipes.base()).keys()
    configs = [demo.get_config(task) for task in demo.TASKS]
    configs += [small.get_config(f"vit_ti16,{side}") for side in (32, 64, 96)]
    configs += [
        ablations.get_config(f"{s},{row}") for s in ablations.SCALES for row in ablations.ROWS
    ]
    for recipe in (pretrain, pixio, finetune, linprobe, attentive, scratch, segment, knn):
        configs += [recipe.get_config(size) for size in VARIANTS]
    for config in configs:
        assert flat(config).keys() == known
        assert {type(x) for x in flat(config).values()} <= PLAIN


def test_an_unknown_key_is_refused_with_the_closest_one():
    config = recipes.base()
    config.lock()
    with pytest.raises((AttributeError, KeyError), match="base_lr"):
        config.optim.base_lrr = 1.0


def test_resumable_keys_do_not_change_the_result():
    keys = {key for key, declared in declared_keys(Config()).items() if declared["resumable"]}
    assert {"model.remat", "data.path", "data.threads", "eval.linear", "mesh.fsdp"} <= keys
    assert not keys & {"seed", "batch_size", "mask.ratio", "model.dtype", "optim.b1", "data.exif"}
    assert declared_keys(Config()).keys() == flat(recipes.base()).keys()


def test_docstrings_of_recipes_have_their_command():
    for path in CONFIGS.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if path.stem not in ("__init__", "common"):
            assert "mae-jax train" in text, path


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for i in range(8):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def config_of(folder, **overrides) -> Config:
    config = demo.get_config()
    config.batch_size = 8
    config.data.update(source="folder", path=str(folder))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return from_config_dict(config)


def test_a_folder_without_labels_has_no_knn(folder):
    run = build(config_of(folder), folder / "run")
    assert not has_labels(run.train_source, run.eval_source)
    assert len(run.train_source) == 8
    assert run.length.total_steps == 1000


def test_epochs_and_steps(folder):
    run = build(
        config_of(
            folder, steps=None, epochs=30.0, optim__warmup_steps=None, optim__warmup_epochs=2.5
        ),
        folder / "run",
    )
    assert run.length.total_steps == 30
    assert run.length.warmup_steps == 2.5
    assert float(run.learning_rate(30)) == 0.0
    assert float(run.learning_rate(2.5)) == pytest.approx(4e-3 * 8 / 256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(model__image_size=(64, 60)), r"60 = 7 \* 8 \+ 4. Use 56 or 64"),
        (dict(mask__ratio=0.99), "mask.ratio=0.99 keeps 0 of 64 patches"),
        (dict(mask__ratio=0.0), "mask.ratio=0.0 keeps 64"),
        (
            dict(mask__kind="stripes"),
            "mask.kind='stripes' must be one of random, block, grid, user",
        ),
        (dict(mask__kind="grid", mask__ratio=0.5), "one of each 2x2"),
        (dict(mask__kind="user"), "mask.path"),
        (dict(mask__path="/nowhere.npy", mask__kind="user"), "/nowhere.npy.* cannot be read"),
        (dict(decoder__predict_ratio=0.0), "decoder.predict_ratio=0.0 must be above 0 and at most"),
        (dict(decoder__predict_ratio=1.5), "decoder.predict_ratio=1.5 must be above 0 and at most"),
        (
            dict(decoder__predict_ratio=float("nan")),
            "decoder.predict_ratio=nan must be above 0 and at most 1",
        ),
        (dict(batch_size=6), "batch_size=6 .*4 devices: use 4 or 8"),
        (dict(batch_size=8, accumulate=3), "accumulate=3"),
        (dict(model__dtype="float16"), "model.dtype='float16'"),
        (dict(model__channels=0), "model.channels=0"),
        (dict(model__channels=4), "data.mean=.* needs a value for each of 4 channels"),
        (dict(model__heads=5), "model.width=128 is not divisible by model.heads=5"),
        (dict(model__heads=0), "model.heads=0 must be at least 1"),
        (dict(model__depth=0), "model.depth=0 must be at least 1"),
        (dict(model__patch=0), "model.patch=0 must be at least 1"),
        (dict(model__decoder_depth=0), "model.decoder_depth=0 must be at least 1"),
        (dict(model__mlp_ratio=0.0), "model.mlp_ratio=0.0"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(model__remat="some"), "model.remat='some'"),
        (dict(data__on_bad="ignore"), "data.on_bad='ignore'"),
        (dict(task="detect"), "task='detect' must be one of pretrain, classify, segment"),
        (
            dict(data__augment="mirror"),
            "data.augment='mirror' must be one of none, crop, weak_crop",
        ),
        (dict(optim__name="sgd"), "optim.name='sgd' must be one of adamw, lars"),
        (dict(optim__layer_decay=0.0), "optim.layer_decay=0.0"),
        (dict(optim__train_last_blocks=0), "optim.train_last_blocks=0 is for task='classify'"),
        (dict(eval__knn_k=()), r"eval.knn_k=\(\)"),
        (dict(data__shots=0), "data.shots=0"),
        (dict(seed=-1), "seed=-1"),
        (dict(eval__knn_k=("a",)), r"eval.knn_k=\('a',\)"),
        (dict(eval__knn_temperature=0.0), "eval.knn_temperature=0.0"),
        (dict(data__std=(0.2, 0.0, 0.2)), "data.std=.0.2, 0.0, 0.2. must be above 0"),
        (dict(data__canvas=0), "data.canvas=0"),
        (dict(data__eval_crop=0.0, data__augment="none"), "data.eval_crop=0.0"),
        (dict(model__image_size=(64,)), r"model.image_size=\(64,\) must be 2 numbers"),
        (dict(optim__base_lr=-1.0), "optim.base_lr=-1.0"),
        (dict(optim__base_lr=float("nan")), "optim.base_lr=nan must be at least 0"),
        (dict(optim__ema=1.0), "optim.ema=1.0"),
        (dict(optim__b1=1.0), "optim.b1=1.0"),
        (dict(optim__b2=-0.1), "optim.b2=-0.1"),
        (dict(optim__eps=0.0), "optim.eps=0.0"),
        (dict(optim__momentum=1.0), "optim.momentum=1.0"),
        (dict(optim__clip_norm=-1.0), "optim.clip_norm=-1.0 must be above 0"),
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
    with pytest.raises(UserError, match=message):
        build(config_of(folder, **overrides), folder / "run")
    assert not (folder / "run").exists()


def test_predicting_some_patches_costs_less_and_is_logged(folder, caplog):
    caplog.set_level("INFO")
    costs, logged = [], []
    for ratio in (1.0, 0.5, 0.001):
        caplog.clear()
        run = build(config_of(folder, decoder__predict_ratio=ratio), folder / "run")
        costs.append(flops_per_image(run.config, run.task))
        report.log_run_summary(run.config, run.task, run.layout, run.length, 8, 0)
        logged.append(caplog.messages[0].partition("; ")[2])
    assert costs[0] > costs[1] > costs[2]
    assert logged[0] == "16 of 64 patches are visible"
    assert logged[1].endswith("; 24 of 48 masked ones are predicted")
    assert logged[2].endswith("; 1 of 48 masked ones are predicted")


def test_bad_data(folder):
    with pytest.raises(DataError, match="nowhere"):
        build(config_of(folder / "nowhere"), folder / "run")
    with pytest.raises(DataError, match="batch_size=16 is larger than the dataset of 8 images"):
        build(config_of(folder, batch_size=16), folder / "run")


@pytest.fixture
def labeled(tmp_path):
    from PIL import Image

    tmp_path = tmp_path / "labeled"
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
        (dict(classify__pool="max"), "classify.pool='max' must be one of cls, mean, attention"),
        (dict(classify__num_classes=2), "classify.num_classes=2 is less than the 3 classes"),
        (dict(classify__mixup=-0.1), "classify.mixup=-0.1"),
        (dict(classify__mixup_prob=2.0), "classify.mixup_prob=2.0"),
        (dict(classify__mixup_mode="all"), "classify.mixup_mode='all' must be one of batch, pair"),
        (dict(classify__smoothing=1.5), "classify.smoothing=1.5"),
        (dict(classify__erase=-1.0), "classify.erase=-1.0"),
        (dict(classify__drop_path=1.0), "classify.drop_path=1.0"),
        (dict(classify__head=False), "classify.head=False leaves nothing to train"),
        (dict(classify__head=False, steps=0, eval__knn_every_epochs=-1.0), "nothing to evaluate"),
        (
            dict(classify__pool="attention", classify__fc_norm=True),
            "after the final norm: it needs fc_norm=False",
        ),
        (dict(classify__head_init_std=-1.0), "classify.head_init_std=-1.0"),
        (dict(optim__train_last_blocks=5), "train_last_blocks=5 must be from 0 to the 4 blocks"),
        (dict(data__cache_features=True), "data.augment=none"),
        (dict(optim__name="lars", optim__clip_norm=1.0), "optim.clip_norm=1.0 is for adamw only"),
        (dict(data__randaugment_magnitude=11.0, data__augment="randaugment"), "magnitude=11.0"),
        (dict(model__position="none"), "model.position='none' must be one of sincos, learned"),
    ],
    ids=str,
)
def test_bad_values_of_classification(labeled, overrides, message):
    with pytest.raises(UserError, match=message):
        build(classify(labeled, **overrides), labeled / "run")


def test_classification_needs_labels_and_an_evaluation_split(folder, labeled):
    with pytest.raises(DataError, match="has no class labels"):
        build(classify(folder), folder / "run")
    with pytest.raises(DataError, match="validation exists, but no .*training"):
        build(classify(labeled, data__train_split="training"), labeled / "run")
    with pytest.raises(DataError, match="eval_split names the images"):
        build(classify(labeled, data__eval_split="val"), labeled / "run")
    (labeled / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in .*empty"):
        build(classify(labeled, data__eval_split="empty"), labeled / "run")
    with pytest.raises(DataError, match="data.shots=5 is more than the 4 images of class 'a'"):
        build(classify(labeled, data__shots=5), labeled / "run")
    (labeled / "validation" / "c").rename(labeled / "validation" / "d")
    with pytest.raises(DataError, match="not in the training split: d"):
        build(classify(labeled), labeled / "run")


def test_few_shot_images_depend_on_their_seed_alone(labeled):
    one, again, other = (
        build(classify(labeled, data__shots=3, data__shots_seed=seed), labeled / "run")
        for seed in (0, 0, 1)
    )
    labels = [one.train_source[i]["label"] for i in range(len(one.train_source))]
    assert labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    keys = [[run.train_source.describe(i) for i in range(9)] for run in (one, again, other)]
    assert keys[0] == keys[1] != keys[2]
    fingerprints = [run.train_source.fingerprint() for run in (one, again, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_evaluation_alone_trains_nothing_and_needs_no_batch(labeled):
    run = build(classify(labeled, steps=0, batch_size=512), labeled / "run")
    assert run.loader is None
    assert run.length.total_steps == 0


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
def test_evaluation_crops_as_the_reference_does(side, given, crop):
    config = recipes.base()
    config.model.image_size = (side, side)
    config.data.eval_crop = given
    assert make_eval_transform(from_config_dict(config)).crop == crop
