"""Runs on every kind of data: training, resuming, errors."""

import json

import jax
import numpy as np
import pytest
from image_helpers import photograph
from PIL import Image
from run_helpers import save_first_state

import mae_jax
from mae_jax import features, reconstruct
from mae_jax.convert import weights
from mae_jax.data.sources import DataError
from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.train import recipes, trainer
from mae_jax.train.config import from_config_dict
from mae_jax.utils.errors import UserError

CHANNELS = 5
TINY = dict(model__image_size=(16, 24), model__patch=8, model__width=16, model__depth=1)
TINY |= dict(model__heads=2, model__decoder_width=16, model__decoder_depth=1)
TINY |= dict(model__decoder_heads=2, batch_size=8, steps=6, optim__warmup_steps=2)
TINY |= dict(log__every_steps=2, checkpoint__every_steps=2, checkpoint__max_to_keep=9)
TINY |= dict(eval__pictures_every_epochs=0.0, eval__knn_every_epochs=0.0, eval__pictures=2)
RESIZING = dict(steps=3, log__every_steps=1, checkpoint__every_steps=3)
RESIZING |= dict(eval__pictures_every_epochs=-1.0, eval__knn_every_epochs=-1.0)
BANDS = dict(
    model__image_size=(16, 16),
    model__channels=CHANNELS,
    data__mean=(1000.0,) * 5,
    data__std=(300.0,) * 5,
)


def config_of(path, **overrides):
    config = recipes.base()
    values = TINY | dict(data__source="folder", data__path=str(path)) | overrides
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return from_config_dict(config)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [row["loss"] for row in rows(workdir) if "loss" in row]


def params_of(workdir):
    return {name: np.asarray(x) for name, x in weights.read(workdir).arrays.items()}


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """A folder of arrays of five channels of numbers about 1000."""
    folder = tmp_path_factory.mktemp("bands")
    for split, count in (("train", 20), ("validation", 4)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for number in range(count // 2):
                rng = np.random.default_rng([count, number, ord(label)])
                array = rng.normal(1000, 300, (20, 30, CHANNELS))
                np.save(folder / split / label / f"{number}.npy", array.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Crops of one, as JPEG files, without labels."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(20):
        left, top = rng.integers(0, 200), rng.integers(0, 100)
        photograph().crop((left, top, left + 150, top + 120)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def run_on_bands(bands, tmp_path_factory):
    """The workdir of a run of six steps, and the names of what was compiled for it."""
    workdir, compiled = tmp_path_factory.mktemp("trained_on_bands"), []

    def listen(event, _, fun_name="", **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    trainer.train_and_evaluate(config_of(bands, eval__show_channels=(4, 2, 0), **BANDS), workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, compiled


@pytest.fixture(scope="module")
def trained_on_bands(run_on_bands):
    return run_on_bands[0]


def test_a_run_compiles_its_step_once(run_on_bands):
    """Six steps, with checkpoints and evaluations in between."""
    assert [name for name in run_on_bands[1] if "train_step" in name] == ["jit(train_step)"]


def test_many_channels_in_training_and_figures(trained_on_bands):
    assert np.isfinite(losses(trained_on_bands)).all()
    assert 0.5 < losses(trained_on_bands)[0] < 2.0, "of normalized values"
    assert any("knn_top1" in row for row in rows(trained_on_bands))
    with Image.open(trained_on_bands / "pictures" / "step_0000006.png") as picture:
        assert picture.mode == "RGB"
        assert len(picture.getcolors(1 << 20)) > 100
    kernel = params_of(trained_on_bands)["encoder/patch_embed/kernel"]
    assert kernel.size == 8 * 8 * CHANNELS * 16


def test_many_channels_in_the_commands_and_conversion(trained_on_bands, bands, tmp_path):
    model, params = mae_jax.load(trained_on_bands)
    assert model.info.mean == BANDS["data__mean"]
    assert model.info.pixels == "other", "the checkpoint records that they are not of 8 bits"
    files = sorted((bands / "validation").rglob("*.npy"))
    images = model.read_images(files)
    assert images.dtype == np.float32
    assert images.shape == (4, 16, 16, CHANNELS)
    made = model.reconstruct(params, images)
    assert made.dtype == np.float32
    assert 0 < float(np.mean(made)) < 2000, "in the units of the data"
    command = [str(bands / "validation"), "--checkpoint", str(trained_on_bands)]
    reconstruct.main([*command, "--out", str(tmp_path / "a.png"), "--show", "1"])
    features.main(
        [*command, "--out", str(tmp_path / "f.npz"), "--attention", str(tmp_path / "b.png")]
    )
    with pytest.raises(UserError, match="show_channels=.*from 0 to 4"):
        reconstruct.main([*command, "--out", str(tmp_path / "a.png"), "--show", "1,2,5"])
    for dialect in ("official", "hf", "timm"):
        path = tmp_path / (dialect + (".safetensors" if dialect == "official" else ""))
        found = weights.read(trained_on_bands)
        found = weights.encoder_only(found) if dialect == "timm" else found
        weights.write(found, path, dialect, overwrite=False)
        back = weights.read(path, heads=2, decoder_heads=2, target="normalized")
        assert back.info.channels == CHANNELS
        for name, array in back.arrays.items():
            np.testing.assert_array_equal(array, found.arrays[name])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            dict(data__mean=(0.5,) * 3),
            UserError,
            "a value for each of 5 channels .*: mae-jax data stats",
        ),
        (dict(eval__show_channels=(0, 1)), UserError, "eval.show_channels=.0, 1."),
        (dict(data__augment="randaugment"), UserError, "needs gray or RGB images"),
        (dict(data__resize_on="device"), UserError, "data.resize_on='device' needs"),
        (
            dict(data__in_memory=True, data__workers=1),
            UserError,
            "data.workers=1 must be 0",
        ),
        (dict(model__channels=4, data__mean=(1.0,) * 4, data__std=(1.0,) * 4), DataError, "shape"),
    ],
    ids=str,
)
def test_bad_values_for_many_channels(bands, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        trainer.train_and_evaluate(config_of(bands, **BANDS | overrides), tmp_path / "run")


def test_float_images_need_their_own_mean(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(8):
        np.save(tmp_path / "data" / f"{number}.npy", np.full((20, 20, 3), 1000.0))
    with pytest.raises(UserError, match=r"does not fit .*0.npy, whose dtype is float32.*stats"):
        trainer.train_and_evaluate(config_of(tmp_path / "data"), tmp_path / "run")
    for overrides in (dict(data__resize_on="device"), dict(data__augment="randaugment")):
        overrides |= dict(data__mean=(1000.0,) * 3, data__std=(300.0,) * 3)
        with pytest.raises(UserError, match="images of uint8"):
            trainer.train_and_evaluate(config_of(tmp_path / "data", **overrides), tmp_path / "run")


def test_a_run_with_exif_orientation_makes_a_model_that_applies_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "data").mkdir()
    for number in range(8):
        photograph().save(tmp_path / "data" / f"{number}.jpg", exif=exif)
    config = config_of(tmp_path / "data", data__exif=True)
    save_first_state(config, tmp_path / "run")
    model, _ = mae_jax.load(tmp_path / "run")
    upright = photograph().rotate(270, expand=True)
    upright.save(tmp_path / "upright.png")
    photograph().save(tmp_path / "turned.png", exif=exif)
    found = model.read_images([tmp_path / "turned.png", tmp_path / "upright.png"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.fixture(scope="module")
def on_host(photographs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("on_host")
    config = config_of(photographs, data__resize_on="host", **RESIZING)
    trainer.train_and_evaluate(config, workdir)
    return workdir


def test_resizing_on_the_device_gives_the_same_losses(photographs, on_host, tmp_path):
    """Of crops of up to 150 pixels, the larger ones by the host."""
    config = config_of(photographs, data__resize_on="device", data__canvas=100, **RESIZING)
    trainer.train_and_evaluate(config, tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(on_host), rtol=5e-3)
    assert (tmp_path / "summary.json").exists()


def test_resuming_with_another_batch_size_is_an_error(on_host, photographs):
    with pytest.raises(CheckpointError, match="batch_size"):
        trainer.train_and_evaluate(config_of(photographs, batch_size=4, steps=8), on_host)
