"""Curation of training images: scores, filters and soft sampling by loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from image_helpers import fill_folder, noise_image

import mae_jax
from mae_jax.data import __main__ as data
from mae_jax.data.sampling import ImageScores, color_entropy, read_scores, sample
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.evaluate.image_scores import score_images
from mae_jax.tasks.masking import Mask
from mae_jax.train import recipes
from mae_jax.train.build_data import make_loader
from mae_jax.train.build_sources import make_train_source
from mae_jax.train.config import from_config_dict
from mae_jax.train.config_schema import as_json
from mae_jax.train.resume import check_compatible
from mae_jax.utils.errors import UserError


class Numbers:
    """A source of records that are never read."""

    classes = ()

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def fingerprint(self):
        return str(self.count)


def make_scores(loss, entropy=8.0, short_side=100, **about):
    loss = np.asarray(loss, np.float32)
    filled = lambda value, dtype: np.broadcast_to(value, loss.shape).astype(dtype)
    about = {"fingerprint": str(len(loss)), "data": "numbers"} | about
    return ImageScores(loss, filled(entropy, np.float32), filled(short_side, np.int32), about)


def kept(scores, **options):
    subset = sample(Numbers(len(scores.loss)), scores, **{"seed": 0, **options})
    return subset._indices.tolist()


def test_entropy_of_the_colors():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert 7.9 < color_entropy(noise) < 8
    two = np.zeros((8, 8, 3), np.uint8)
    assert color_entropy(two) == 0
    two[:4] = 255
    assert color_entropy(two) == 1
    two[..., 0] = 9  # one channel of one value, two of two
    assert color_entropy(two) == pytest.approx(2 / 3)
    assert color_entropy(noise.astype(np.float32) / 255) == color_entropy(noise)
    assert np.isnan(color_entropy(noise.astype(np.uint16)))
    assert np.isnan(color_entropy(noise.astype(np.float32)))


def test_the_probability_grows_with_the_loss():
    losses = np.repeat([0.0, 0.1, 0.2, 0.4, 0.9], 4000)
    chosen = np.zeros(len(losses))
    chosen[kept(make_scores(losses), loss=0.4)] = 1
    shares = chosen.reshape(5, -1).mean(axis=1)
    np.testing.assert_allclose(shares, [0, 0.25, 0.5, 1, 1], atol=0.03)
    assert set(shares[[0, 3, 4]]) == {0, 1}


def test_sampling_is_a_function_of_seed_index_and_score():
    losses = np.random.default_rng(0).random(400)
    first = kept(make_scores(losses), loss=1.0)
    assert first == kept(make_scores(losses), loss=1.0)
    assert first != kept(make_scores(losses), loss=1.0, seed=1)
    half = kept(make_scores(losses[:200]), loss=1.0)
    assert half == [index for index in first if index < 200]


def test_filters(caplog):
    entropy, side = [7, 1, 7, np.nan], [64, 64, 32, 0]
    scores = make_scores([1, 1, 1, np.nan], entropy, side)
    assert kept(scores) == [0, 1, 2], "a bad image is never kept"
    assert kept(scores, min_entropy=2.0) == [0, 2]
    assert kept(scores, min_side=64) == [0, 1]
    with caplog.at_level("INFO", "mae_jax"):
        assert kept(scores, min_entropy=2.0, min_side=64) == [0]
    assert (
        "keeps 1 of 4 images (left out: 1 bad images, 1 below 64 pixels, 1 entropy" in caplog.text
    )
    with pytest.raises(DataError, match=r"leaves no image \(1 bad images, 3 below 65 pixels\)"):
        kept(scores, min_side=65)
    with pytest.raises(DataError, match=r"data.sampling.min_entropy=1.0 .*not of 8 bits"):
        kept(make_scores([1, 1], [np.nan, np.nan]), min_entropy=1.0)


def test_scores_of_other_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="are of 3 images of numbers, not of these 4"):
        sample(Numbers(4), make_scores([1, 2, 3]), seed=0)
    with pytest.raises(DataError, match="files have changed since"):
        kept(make_scores([1, 2, 3], fingerprint="before"))
    (tmp_path / "scores.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"sampling.scores='.*scores.npz' is not a table that mae"):
        read_scores(tmp_path / "scores.npz")
    with pytest.raises(DataError, match=r"data.sampling.scores='.*nope.npz' does not exist"):
        read_scores(tmp_path / "nope.npz")


@pytest.fixture(scope="module")
def model(golden):
    return mae_jax.load(golden / OFFICIAL, **HEADS, target="normalized")


def score(model, source, **options):
    options = {"mask_ratio": 0.5} | options
    return score_images(*model, source, **options)


def test_losses_are_those_of_training(model, tmp_path):
    source = FolderSource(str(fill_folder(tmp_path)), "")
    scores = score(model, source, masks=2, seed=3, batch_size=8)
    images = jnp.asarray(next(iter(model[0].batches(source, len(source))))["image"])
    task, key, index = model[0].task(mask_ratio=0.5), jax.random.key(3), 13
    expected = []
    for number in range(2):
        image_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
        mask = Mask(*task.sample_mask(image_key, 1))
        patches = task.to_patches(images[index : index + 1])
        expected.append(task.loss_of_patches(model[1], patches, mask))
    np.testing.assert_allclose(scores.loss[index], np.mean(expected), rtol=1e-5)
    other = score(model, source, masks=2, seed=3, batch_size=20)
    np.testing.assert_allclose(scores.loss, other.loss, rtol=1e-5)
    assert (scores.loss != score(model, source, masks=2, seed=4, batch_size=8).loss).all()
    assert scores.short_side.tolist() == [16] * 20
    assert (scores.entropy > 6).all()


def test_the_command_writes_a_table(golden, tmp_path, capsys, caplog):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    fill_folder(folder)
    (folder / "ant" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "scores.npz"
    argv = ["score", str(folder.parent), "--checkpoint", str(golden / OFFICIAL), "--num-heads", "2"]
    argv += ["--decoder-num-heads", "2", "--target", "normalized", "--out", str(out)]
    with pytest.raises(DataError, match=r"cut.png is bad: .*use --skip-bad"):
        data.main(argv)
    assert not out.exists()
    data.main([*argv, "--skip-bad"])
    assert "cut.png is bad" in caplog.text
    assert "left out 1 bad image" in caplog.text
    printed = capsys.readouterr().out
    assert "20 images" in printed
    assert f"--config.data.sampling.scores={out}" in printed
    scores, source = read_scores(out), FolderSource(str(folder.parent), "train")
    bad = [source.describe(index).endswith("cut.png") for index in range(len(source))]
    assert (scores.short_side == 0).tolist() == bad
    assert np.isnan(scores.loss).tolist() == bad
    assert scores.about["data"] == f"{folder.parent} train"
    assert len(sample(source, scores, seed=0)) == 20


@pytest.fixture
def config(tmp_path):
    """A config of a run on the images whose losses are above 0.5, by index: 2, 3, 6, 7, ..."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for index in range(24):
        noise_image(index, (16, 16)).save(folder / f"{index:02}.png")
    source = FolderSource(str(folder.parent), "train")
    losses = [1.0 if index % 4 > 1 else 0.0 for index in range(24)]
    make_scores(losses, fingerprint=source.fingerprint()).write(tmp_path / "scores.npz")
    config = recipes.base()
    config.batch_size = 6
    config.model.update(image_size=(16, 16), patch=8)
    config.data.update(source="folder", path=str(folder.parent), threads=1)
    config.data.sampling.update(scores=str(tmp_path / "scores.npz"), loss=1.0)
    return config


def test_batches_do_not_depend_on_hosts(config, tmp_path, monkeypatch):
    typed = from_config_dict(config)
    source = make_train_source(typed, tmp_path)
    assert len(source) == 12

    def batches(host=0, hosts=1, start=0):
        monkeypatch.setattr(jax, "process_index", lambda: host)
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        loader = make_loader(typed, source, None, np.dtype(np.uint8))
        iterator = loader.batches(start)
        return [next(iterator)["image"].copy() for _ in range(4 - start)]

    alone = batches()
    parts = [batches(host, 2) for host in range(2)]
    for step, images in enumerate(alone):
        np.testing.assert_array_equal(images, np.concatenate([part[step] for part in parts]))
    np.testing.assert_array_equal(alone[3], batches(start=3)[0])
    names = {source.describe(index).rsplit("/")[-1] for index in range(12)}
    assert names == {f"{i:02}.png" for i in range(24) if i % 4 > 1}


def test_a_resumed_run_keeps_its_images(config):
    typed = from_config_dict(config)
    old = {"config": as_json(typed), "data_fingerprint": "same"}
    del old["config"]["data"]["sampling"]
    config.data.sampling.loss = 2.0
    new = {"config": as_json(from_config_dict(config)), "data_fingerprint": "same"}
    with pytest.raises(CheckpointError, match=r"data.sampling.loss: None -> 2.0"):
        check_compatible(old, new, ())


def test_options_without_scores_are_refused(config):
    config.data.sampling.scores = None
    with pytest.raises(UserError, match=r"data.sampling.loss=1.0 needs data.sampling.scores"):
        from_config_dict(config)
