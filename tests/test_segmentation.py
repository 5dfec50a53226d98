"""Segmentation probes, held to arrays of pixio's and CAPI's evaluations."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mae_jax.data import __main__ as data_command
from mae_jax.data import demo_dataset
from mae_jax.data.decode import decode
from mae_jax.data.mask_checks import check_masks
from mae_jax.data.segmentation import decode_mask, match_folders, open_segmentation, resize_mask
from mae_jax.data.sources import DataError
from mae_jax.evaluate import __main__ as evaluate_command
from mae_jax.evaluate.segmentation import (
    PatchSample,
    SegmentationSetup,
    merge_views,
    upsample_on_host,
)
from mae_jax.evaluate.segmentation_metrics import count_pixels, segmentation_score
from mae_jax.evaluate.segmentation_probes import (
    KnnOptions,
    LinearOptions,
    class_fractions,
    knn_probe,
    linear_probe,
    polynomial_decay,
    probe_optimizer,
)
from mae_jax.evaluate.segmentation_views import Example, Views, window_starts
from mae_jax.models.segmentation import LinearHead, upsample
from mae_jax.tasks.segment import SegmentationProbe
from mae_jax.tasks.train_step import init_state, make_train_step
from mae_jax.train import recipes
from mae_jax.train.build_evaluators import make_evaluators
from mae_jax.train.config import from_config_dict
from mae_jax.train.setup import build
from mae_jax.utils.errors import UserError

CASES = ("l0_plain", "l1_ignore_absent", "l2_two_images", "l3_pred255")


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "segmentation"


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_the_references(folder, case):
    arrays = np.load(folder / "metrics.npz")
    cases = json.loads((folder / "metrics.json").read_text())["cases"]
    expected = next(c for c in cases if c["name"] == case)
    counts = count_pixels(
        arrays[f"{case}.target"], arrays[f"{case}.pred"], expected["classes"], ignore=255
    )
    np.testing.assert_array_equal(counts, arrays[f"{case}.confusion"])
    standard, pixio, capi = (
        segmentation_score(counts, 1, convention) for convention in ("standard", "pixio", "capi")
    )
    direct = expected["direct"]
    np.testing.assert_allclose(standard.iou, arrays[f"{case}.iou"], rtol=1e-12)
    exact = pytest.approx
    assert standard.miou == exact(direct["mIoU_classes_in_target_or_prediction"], rel=1e-12)
    assert standard.pixel_accuracy == exact(direct["pixel_accuracy"], rel=1e-12)
    assert standard.mean_accuracy == exact(direct["mean_accuracy_classes_in_target"], rel=1e-12)
    assert 100 * pixio.miou == exact(expected["pixio"]["mIoU_percent"], rel=1e-12)
    assert capi.miou == exact(expected["capi"]["mIoU"], rel=1e-12)


def test_score_without_labeled_pixels_is_nan():
    counts = count_pixels(np.full(4, 255), np.zeros(4, int), 2, ignore=255)
    score = segmentation_score(counts, 1)
    assert np.isnan([score.miou, score.pixel_accuracy, score.mean_accuracy]).all()
    assert score.pixels == 0


@pytest.mark.parametrize("case", ["b1_5x7_to_33x41", "b3_8x8_to_5x6", "b4_3x5_to_20x11"])
@pytest.mark.parametrize("corners", ["half_pixel", "align_corners"])
def test_upsampling_is_torchs(folder, case, corners):
    arrays = np.load(folder / "bilinear.npz")
    logits, expected = (
        np.moveaxis(arrays[f"{case}.{name}"], 1, -1) for name in ("logits", corners)
    )
    size, align_corners = expected.shape[1:3], corners == "align_corners"
    np.testing.assert_allclose(
        upsample(jnp.asarray(logits), size, align_corners=align_corners), expected, atol=1e-5
    )
    on_host = upsample_on_host(logits[0], size, align_corners)
    np.testing.assert_allclose(on_host, expected[0], atol=1e-5)


def _head(arrays, prefix):
    """Return the parameters and the running statistics of the reference's head."""
    values = {name: jnp.asarray(arrays[f"{prefix}.{name}"]) for name in HEAD_ARRAYS}
    params = {
        "head_norm": {"scale": values["0.weight"], "bias": values["0.bias"]},
        "head": {"kernel": values["1.weight"][:, :, 0, 0].T, "bias": values["1.bias"]},
    }
    stats = {"mean": values["0.running_mean"], "var": values["0.running_var"]}
    count = values["0.num_batches_tracked"].astype(jnp.int32)
    return params, {"head_norm": stats | {"count": count}}


HEAD_ARRAYS = [
    *("0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked"),
    *("1.weight", "1.bias"),
]


def test_training_of_the_linear_head_is_pixios(folder):
    arrays = np.load(folder / "linear_head.npz")
    task = SegmentationProbe(LinearHead(5), (6, 6, 32), ignore=255, align_corners=True)
    learning_rate = polynomial_decay(0.02, 10)
    tx = probe_optimizer(learning_rate)
    params, stats = _head(arrays, "init")
    state = init_state(task, tx, jax.random.key(0))
    state = dataclasses.replace(state, params=params, batch_stats=stats, opt_state=tx.init(params))
    step = jax.jit(make_train_step(task, tx, learning_rate, jax.random.key(0)))
    for rows, loss, rate in zip(arrays["batch_index"], arrays["losses"], arrays["lr_used"]):
        grid = np.moveaxis(arrays["features"][rows], 1, -1)
        state, metrics = step(state, {"grid": grid, "mask": arrays["labels"][rows]})
        assert float(metrics["loss"]) == pytest.approx(loss, abs=1e-5)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-6)
    for ours, expected in zip((state.params, state.batch_stats), _head(arrays, "final")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)


def make_setup(**changes):
    values = dict(
        grids=lambda images: {},
        views=Views((16, 16), 3, (0.0, 0.0, 0.0)),
        batch_size=1,
        patch=4,
        num_classes=5,
        ignore=255,
    )
    return SegmentationSetup(**values | changes)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_pixel_knn_is_capis(folder, k):
    arrays = np.load(folder / "patch_knn.npz")

    def patches(labels):
        return labels.reshape(-1, 4, 4, 4, 4).swapaxes(2, 3).reshape(-1, 16)

    probe = knn_probe(
        arrays["train_features"],
        patches(arrays["train_labels"]),
        make_setup(convention="capi"),
        KnnOptions(k=k),
    )
    scores = probe(arrays["test_features"].reshape(2, 4, 4, -1))
    assert scores.shape == (2, 16, 16, 6)
    classes = scores.argmax(axis=-1)
    expected = np.where(arrays[f"cosine_k{k}.pred"] == 255, 5, arrays[f"cosine_k{k}.pred"])
    np.testing.assert_array_equal(patches(classes), expected)


def test_knn_votes_are_weighted_fractions_of_the_neighbors():
    bank = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [1.0, 0.0]], np.float32)
    masks = np.array([[0, 0, 1, 255], [1, 1, 1, 1], [2, 2, 2, 2], [255, 255, 255, 255]])
    options = KnnOptions(k=2, temperature=0.5)
    probe = knn_probe(bank, masks, make_setup(num_classes=3), options)
    scores = probe(np.array([[[[2.0, 0.0]]]], np.float32))
    weight = np.exp(-0.2 / 0.5)  # of the second, relative to the first
    expected = np.array([2 / 3, 1 / 3 + weight, 0]) / (1 + weight)
    np.testing.assert_allclose(scores[0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("convention", ["standard", "capi"])
def test_probes_without_labeled_pixels_are_refused(convention):
    setup = make_setup(convention=convention)
    with pytest.raises(DataError, match="no patch of the training images has labeled pixels"):
        knn_probe(np.ones((2, 3)), np.full((2, 16), 255), setup, KnnOptions())
    with pytest.raises(DataError, match="no patch of the training images has labeled pixels"):
        linear_probe(
            np.ones((1, 4, 4, 3), np.float32), np.full((1, 16, 16), 255), setup, LinearOptions()
        )


def test_sample_of_patches_is_uniform_and_bounded():
    counts = np.zeros(40)
    for seed in range(200):
        sample = PatchSample(10, seed)
        for start in range(0, 40, 8):
            sample.add({"x": np.arange(start, start + 8)})
        rows = sample.take()["x"]
        assert len(rows) == 10
        assert (np.diff(rows) > 0).all()
        counts[rows] += 1
    assert 25 < counts.min() < counts.max() < 80  # of 50 expected
    assert PatchSample(10, 0).take() == {}


def test_class_fractions_count_labeled_pixels():
    fractions = class_fractions(np.array([[0, 2, 2, 255], [255, 255, 255, 255]]), 3, 255)
    np.testing.assert_allclose(fractions, [[1 / 3, 0, 2 / 3], [0, 0, 0]])


def test_windows_cover_the_image():
    assert window_starts(100, 32, 21, overhang=False) == [0, 21, 42, 63, 68]
    assert window_starts(32, 32, 21, overhang=False) == [0]
    assert window_starts(20, 32, 21, overhang=False) == [0]
    # pixio: two windows a side even for an image of exactly the window's size
    assert window_starts(48, 48, 32, overhang=True) == [0, 32]
    assert window_starts(80, 48, 32, overhang=True) == [0, 32, 64]


def test_merging_windows_sums_probabilities():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2, 2, 3)).astype(np.float32)
    boxes = [(0, 0, 4, 4), (0, 2, 4, 4)]
    mask = np.zeros((4, 5), np.int32)  # the second window sticks out
    example = Example(np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), int), mask, boxes)
    classes = merge_views(scores, example, False, softmax=True)
    total = np.zeros((4, 6, 3))
    for start, grid in zip((0, 2), scores):
        total[:, start : start + 4] += jax.nn.softmax(upsample_on_host(grid, (4, 4), False))
    np.testing.assert_array_equal(classes, total[:, :5].argmax(axis=-1))


def test_masks_are_resized_at_the_centers_of_pixels():
    mask = np.arange(16, dtype=np.int32).reshape(4, 4)
    np.testing.assert_array_equal(resize_mask(mask, (2, 2)), [[5, 7], [13, 15]])
    np.testing.assert_array_equal(resize_mask(mask, (8, 4))[::2], mask)


def _encode(image, tmp_path, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["palette", "L", "I;16", "bits", "tiff", "gray rgb", "npy"])
def test_masks_are_read_as_class_numbers(tmp_path, kind):
    numbers = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    if kind in ("palette", "L", "tiff", "gray rgb"):
        numbers = numbers * 200 + 3
    image = Image.fromarray(numbers)
    if kind == "palette":
        image.putpalette(list(range(256)) * 3)
    if kind == "I;16":
        numbers = numbers.astype(np.uint16) * 1000
        image = Image.fromarray(numbers)
    if kind == "bits":
        image = Image.fromarray(numbers.astype(bool))
    if kind == "gray rgb":
        image = image.convert("RGB")
    if kind == "npy":
        np.save(tmp_path / "mask.npy", numbers.astype(np.int64))
        encoded = (tmp_path / "mask.npy").read_bytes()
    else:
        encoded = _encode(image, tmp_path, "mask.tif" if kind == "tiff" else "mask.png")
    mask = decode_mask(encoded)
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, numbers)


def test_masks_without_class_numbers_are_refused(tmp_path):
    colors = Image.fromarray(np.eye(3, dtype=np.uint8)[None] * 255)
    with pytest.raises(DataError, match="one class number per pixel"):
        decode_mask(_encode(colors, tmp_path, "mask.png"))
    with pytest.raises(DataError, match="JPEG"):
        decode_mask(_encode(colors, tmp_path, "mask.jpg"))
    with pytest.raises(DataError, match="WEBP"):
        decode_mask(_encode(colors, tmp_path, "mask.webp"))
    with pytest.raises(DataError, match="its bytes are not an image"):
        decode_mask(b"no image")
    with pytest.raises(DataError, match="class numbers are integers"):
        decode_mask(np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match="4294967297, which are no classes"):
        decode_mask(np.full((2, 2), 2**32 + 1))


@pytest.fixture
def dataset(tmp_path):
    """Return a folder of two splits, whose classes are colors."""
    rng = np.random.default_rng(0)
    colors = np.array([[220, 20, 20], [20, 200, 40], [30, 60, 220]])
    for split, count in (("train", 12), ("validation", 5)):
        for name in ("images", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        for number in range(count):
            cells = rng.integers(0, 3, (2, 2))
            mask = np.kron(cells, np.ones((16, 20), int)).astype(np.uint8)
            image = colors[mask] + rng.integers(-15, 16, (*mask.shape, 3))
            mask[:2] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                tmp_path / split / "images" / f"{number}.png"
            )
            Image.fromarray(mask).save(tmp_path / split / "masks" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    return tmp_path


def test_files_without_partner_are_named(dataset):
    (dataset / "train/masks/3.png").rename(dataset / "train/masks/other.png")
    with pytest.raises(DataError, match=r"images/3\.png has no mask; .*masks/other\.png has no im"):
        open_segmentation(str(dataset), "train")
    source, unmatched = match_folders(dataset, "train", 255)
    assert len(source) == 11
    assert list(unmatched.values()) == ["has no mask", "has no image"]


def test_bad_masks_are_named(dataset):
    Image.fromarray(np.full((32, 40), 3, np.uint8)).save(dataset / "train/masks/1.png")
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(dataset / "train/masks/2.png")
    (dataset / "train/masks/5.png").write_bytes(b"nothing")
    report = check_masks(open_segmentation(str(dataset), "train"), 3, threads=1)
    problems = {name[-5:]: problem for name, problem in report.bad.items()}
    assert "has the class 3, but classes are 0 to 2" in problems["1.png"]
    assert "30 x 40 pixels, the image 32 x 40" in problems["2.png"]
    assert "masks/5.png is bad" in problems["5.png"]
    assert report.num_classes(255) == 4


def test_a_class_name_used_twice_is_refused(dataset):
    (dataset / "classes.txt").write_text("red\ngreen\nred\n")
    with pytest.raises(DataError, match="calls both class 0 and class 2 'red'"):
        open_segmentation(str(dataset), "train")


def test_splits_of_arrays_are_read(tmp_path):
    images, masks = np.zeros((3, 8, 8, 3), np.uint8), np.arange(3 * 64).reshape(3, 8, 8) % 5
    np.savez(tmp_path / "train.npz", image=images, mask=masks, classes=list("abcde"))
    source = open_segmentation(str(tmp_path), "train")
    assert len(source) == 3
    assert source.class_names == tuple("abcde")
    np.testing.assert_array_equal(source.mask(1), masks[1])
    np.savez(tmp_path / "other.npz", image=images)
    with pytest.raises(DataError, match="the array 'mask' is missing"):
        open_segmentation(str(tmp_path), "other")


def evaluate(dataset, golden, *flags):
    checkpoint = str(golden / "mae" / "p0_plain" / "state_dict.safetensors")
    arguments = ["--checkpoint", checkpoint, "--data", str(dataset), "--num-heads", "2"]
    out = dataset / "report.json"
    evaluate_command.main([*arguments, "--out", str(out), *flags])
    return json.loads(out.read_text())


def test_command_reports_every_probe(dataset, golden, capsys):
    picture = dataset / "picture.png"
    flags = ["--suite", "segment_knn,segment_linear", "--picture", str(picture), "--k", "5"]
    report = evaluate(dataset, golden, *flags, "--learning-rate", "0.05")
    rows = {(row["measure"], row["features"]): row for row in report["results"]}
    assert len(rows) == 6
    assert {row["images"] for row in rows.values()} == {5}
    assert {row["pixels"] for row in rows.values()} == {5 * 30 * 40}  # without two ignored rows
    # Classes are colors, so both probes of colors find nearly all of them.
    for measure in ("segment_knn", "segment_linear"):
        colors = rows[measure, "raw colors"]
        assert colors["miou"] > 0.8
        assert list(colors["iou"]) == ["red", "green", "blue"]
        assert colors["miou"] == pytest.approx(np.mean(list(colors["iou"].values())))
    assert "raw colors" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert image.width > 4 * 224


def test_command_slides_windows_over_large_images(dataset, golden):
    flags = ["--suite", "segment_knn", "--k", "3", "--window", "--image-size", "16"]
    report = evaluate(dataset, golden, *flags, "--stride", "8,10", "--layers", "1,2", "--with-cls")
    colors = next(row for row in report["results"] if row["features"] == "raw colors")
    assert colors["pixels"] == 5 * 30 * 40
    assert colors["miou"] > 0.8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "segment_knn,knn"], "knn need class labels"),
        (["--suite", "segment_knn", "--stride", "8"], "--window"),
        (["--suite", "segment_knn", "--layers", "9"], "there is no block 9"),
        (["--suite", "segment_knn", "--num-classes", "4"], "there are 3 class names"),
        (["--suite", "segment_linear", "--max-gb", "1e-6"], "allow them with --max-gb"),
        (
            ["--suite", "segment_linear", "--max-gb", "5e-5", "--window", "--image-size", "16"],
            "allow more with --max-gb",
        ),
        (
            ["--suite", "segment_knn", "--window", "--stride", "50"],
            "larger than the window of 32 x",
        ),
    ],
)
def test_command_refuses(dataset, golden, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(dataset, golden, *flags)


def test_evaluation_masks_are_checked_first(dataset, golden):
    for number in range(5):
        Image.fromarray(np.full((32, 40), 255, np.uint8)).save(
            dataset / "validation/masks" / f"{number}.png"
        )
    with pytest.raises(DataError, match="all pixels of all masks are 255"):
        evaluate(dataset, golden, "--suite", "segment_knn")
    Image.fromarray(np.full((32, 40), 3, np.uint8)).save(dataset / "validation/masks/0.png")
    with pytest.raises(DataError, match=r"0\.png: its mask has the class 3"):
        evaluate(dataset, golden, "--suite", "segment_knn")


def test_command_counts_classes_without_names(dataset, golden):
    (dataset / "classes.txt").unlink()
    report = evaluate(dataset, golden, "--suite", "segment_knn", "--convention", "pixio")
    assert report["classes"] == 3
    assert report["settings"]["k"] == 30
    assert list(report["results"][0]["iou"]) == ["0", "1", "2"]


def test_data_check_lists_bad_masks(dataset, capsys):
    (dataset / "classes.txt").unlink()
    (dataset / "train/masks/0.png").unlink()
    beyond = Image.fromarray(np.full((32, 40), 7, np.uint8))
    beyond.save(dataset / "validation/masks/1.png")  # training has no such class
    with pytest.raises(SystemExit):
        data_command.main(["check", str(dataset)])
    output = capsys.readouterr().out
    assert "0.png: has no mask" in output
    assert "1.png: its mask has the class 7" in output
    assert "3 of 3" in output


def test_mosaics_have_the_pixels_of_their_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_dataset, "NUM_MOSAICS", {"train": 2, "validation": 5})
    source = open_segmentation("photo_mosaics", "validation", data_dir=str(tmp_path))
    assert len(source) == 5
    assert source.class_names == tuple(demo_dataset.PHOTOGRAPHS)
    image, mask = decode(source[3]["image"], 3), source.mask(3)
    for label in np.unique(mask):
        photograph = np.asarray(demo_dataset.photograph(source.class_names[label]))
        first, _ = demo_dataset.columns(photograph.shape[1], "validation")
        colors = {tuple(color) for color in photograph[:, first:].reshape(-1, 3).tolist()}
        assert {tuple(color) for color in image[mask == label].tolist()} <= colors


def test_pretraining_measures_patch_knn(dataset, tmp_path):
    config = recipes.base()
    config.batch_size, config.steps = 8, 6
    config.model.update(image_size=(16, 24), patch=8, width=16, depth=1, heads=2)
    config.model.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.optim.warmup_steps = 1
    config.data.update(source="folder", path=str(dataset), workers=0)
    config.eval.update(segment_knn=True, rankme=False, knn_every_epochs=3.0, pictures=2)
    setup = build(from_config_dict(config), tmp_path)
    state = init_state(setup.task, optax.identity(), jax.random.key(0))

    class Writer:
        def write_image(self, *arguments):
            pass

    pictures, patch_knn = make_evaluators(
        setup.config,
        setup.task,
        train_source=setup.train_source,
        eval_source=setup.eval_source,
        length=setup.length,
        mesh=setup.mesh,
        writer=Writer(),
        workdir=tmp_path,
        init_key=jax.random.key(0),
        heartbeat=lambda _: None,
    )
    assert patch_knn.every == 3
    results = patch_knn.run(3, state)
    assert 1 / 3 < results["segment_knn_miou"] <= 1  # classes are colors
    assert 0.5 < results["segment_knn_accuracy"] <= 1
    with Image.open(pictures.run(3, state)["pictures"]) as picture:
        assert picture.width > 5 * 112  # with a column of features
