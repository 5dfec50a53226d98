"""Pictures of features: principal components against SVD, attention of heads, maps, errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from PIL import Image

import mae_jax
from mae_jax import features
from mae_jax.convert import cli as convert_cli
from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import FileSource
from mae_jax.evaluate import feature_map
from mae_jax.evaluate.feature_figures import resize_tile, tile_rows
from mae_jax.evaluate.pca import (
    Foreground,
    Moments,
    PatchColors,
    PatchMoments,
    Pca,
    fit_colors,
    project_all,
    select_border,
)
from mae_jax.utils.errors import UserError


def random_vectors(count=200, width=12, seed=0):
    """Return vectors far from zero whose variances differ."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(3, 0.5, width)
    return (50 + rng.normal(size=(count, width)) * scale).astype(np.float32)


def svd_components(vectors, k):
    """Return components with the sign of `Pca`, and deviations."""
    centered = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, sigma, components = np.linalg.svd(centered, full_matrices=False)
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return (components * np.sign(largest))[:k], sigma[:k] / len(vectors) ** 0.5


def moments_of(vectors, batch=33):
    moments = Moments()
    for start in range(0, len(vectors), batch):
        part = jnp.asarray(vectors[start : start + batch])
        moments.add(part, jnp.ones(len(part)))
    return moments


def test_principal_components_are_those_of_svd():
    vectors = random_vectors()
    pca = Pca.fit(moments_of(vectors), 3, "vectors")
    components, deviations = svd_components(vectors, 3)
    np.testing.assert_allclose(pca.components, components, atol=1e-4)
    np.testing.assert_allclose(pca.deviations, deviations, rtol=1e-5)
    np.testing.assert_allclose(pca.variance, vectors.var(axis=0, dtype=np.float64).sum(), rtol=1e-5)
    points, same = project_all(vectors, 3, "vectors")
    np.testing.assert_allclose(points.std(axis=0), same.deviations, rtol=1e-4)


def add_images(moments, grids, order, batch=4):
    """Add images in some order, in batches of which the last is padded with its last image."""
    order = [*order, *[order[-1]] * (-len(order) % batch)]
    for start in range(0, len(order), batch):
        moments.add({"grid": jnp.asarray(grids[order[start : start + batch]])})


def make_grids(count=10, side=5):
    return random_vectors(count * side**2, 8).reshape(count, side, side, 8)


def test_colors_do_not_depend_on_the_order_of_the_images():
    grids, none = make_grids(), PatchMoments([], 10)
    colors = []
    for order in (range(10), np.random.default_rng(0).permutation(10)):
        moments = PatchMoments(["grid"], 10)
        add_images(moments, grids, list(order))
        assert moments.moments["grid"].count == 250  # without padding
        colors.append(fit_colors(moments, none, None)["grid"](jnp.asarray(grids)).astype(int))
    assert np.abs(colors[0] - colors[1]).max() <= 1  # float32 rounding
    pca = Pca.fit(moments_of(grids.reshape(-1, 8)), 3, "patches")
    expected = PatchColors(pca)(jnp.asarray(grids)).astype(int)
    assert np.abs(colors[0] - expected).max() <= 1
    assert expected.std(axis=(0, 1, 2)).min() > 30


def test_foreground_is_the_side_without_the_border():
    rng, inside = np.random.default_rng(0), np.zeros((6, 5, 5), bool)
    inside[:, 1:-1, 1:4] = True
    direction = np.linspace(-1, 1, 8)
    grids = rng.normal(size=(6, 5, 5, 8)) + 20 * inside[..., None] * direction
    for sign in (1, -1):
        signed = (sign * grids).astype(np.float32)
        moments, border = (PatchMoments(["grid"], 6, select) for select in (None, select_border))
        for each in (moments, border):
            add_images(each, signed, list(range(6)))
        assert border.moments["grid"].count == 6 * 16
        again = {"grid": jnp.asarray(signed)}
        colors = fit_colors(moments, border, lambda add, again=again: add(again))
        drawn = colors["grid"](jnp.asarray(signed))
        np.testing.assert_array_equal(drawn.any(axis=-1), inside)
        # The colors are those of a PCA of the foreground alone.
        components, deviations = svd_components(signed[inside], 3)
        np.testing.assert_allclose(colors["grid"].pca.components, components, atol=1e-3)
        np.testing.assert_allclose(colors["grid"].pca.deviations, deviations, rtol=1e-4)


def test_the_same_features_everywhere_are_an_error_and_few_directions_are_gray():
    with pytest.raises(UserError, match="^vectors have all the same features"):
        Pca.fit(moments_of(np.full((9, 4), 7.3, np.float32)), 3, "vectors")
    line = np.linspace(1, 2, 9, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    colors = PatchColors(Pca.fit(moments_of(line), 3, "vectors"))(jnp.asarray(line))
    assert colors[0, 0] < 128 < colors[-1, 0]
    assert (colors[:, 1:] == 128).all()
    assert Foreground.fit(Pca.fit(moments_of(line), 1, ""), moments_of(line)).sign in (1.0, -1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of two images each."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


CHECKPOINTS = {
    "hf": ["hf/hf_tiny/pretrained_v5"],
    "official": [OFFICIAL, "--num-heads", "2", "--decoder-num-heads", "2"],
    "fc_norm": ["vit/v0_gap/state_dict.safetensors", "--num-heads", "2"],
}


def draw(images, checkpoint, out, *flags, **pictures):
    """Run the command in a folder; return its pictures by flag."""
    argv = [*map(str, images), "--checkpoint", *map(str, checkpoint), "--batch-size", "4", *flags]
    paths = {name: out / f"{name}.png" for name in pictures}
    for name, path in paths.items():
        argv += [f"--{name}", str(path), *pictures[name]]
    features.main(argv)
    return {name: np.asarray(Image.open(path)) for name, path in paths.items()}


@pytest.mark.parametrize("dialect", CHECKPOINTS)
def test_pictures_of_every_dialect(golden, images, tmp_path, capsys, dialect):
    name, *flags = CHECKPOINTS[dialect]
    wanted = {"pca": ["--foreground"], "map": ["--thumbnails"]}
    wanted["attention"] = ["--attention-blocks", "1,2", "--attention-heads", "all"]
    drawn = draw([images], [golden / name, *flags], tmp_path, "--layers", "1,2", **wanted)
    assert "pca.png: 6 images" in capsys.readouterr().out
    assert drawn["pca"].shape[1] == 6 + 3 * (128 + 6)  # image and two layers
    assert drawn["map"].shape == (1000, 1260, 3)
    heads = 4 if dialect == "hf" else 2
    assert drawn["attention"].shape[:2] == (6 + 12 * (128 + 36 + 6), 6 + (1 + heads) * (128 + 6))
    names = ["attention.png", "map.png", "pca.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if dialect == "hf":
        again = draw([images], [golden / name, *flags], tmp_path, "--layers", "1,2", **wanted)
        for name, picture in again.items():
            np.testing.assert_array_equal(picture, drawn[name])


def test_the_picture_of_an_image_does_not_depend_on_the_order(golden, images, tmp_path):
    checkpoint = [golden / CHECKPOINTS["hf"][0]]
    files = sorted(images.rglob("*.png"))
    rows = []
    for order in (files, files[::-1]):
        picture = draw(order, checkpoint, tmp_path, pca=[])["pca"]
        rows.append(picture[-6 * (128 + 6) :].reshape(6, 128 + 6, -1, 3).astype(int))
    assert np.abs(rows[0] - rows[1][::-1]).max() <= 1


def test_attention_of_heads_and_blocks(golden, images):
    model, params = mae_jax.load(golden / CHECKPOINTS["hf"][0])
    outputs = model.features(
        params, model.read_images([images]), attention=True, attention_blocks=(1, 2)
    )
    assert outputs["attention_1"].shape == (6, 4, 4, 4)
    mean = outputs["attention_2"].mean(axis=1)
    np.testing.assert_allclose(mean, outputs["attention"], rtol=1e-5)
    assert (outputs["attention_1"][:, 0] != outputs["attention_1"][:, 1]).any()
    with pytest.raises(ConvertError, match="no layer 3: .* has 1 to 2"):
        model.features(params, model.read_images([images]), attention_blocks=(3,))


def test_many_channels_of_float32(golden, tmp_path):
    official = weights.adapt_input_channels(weights.read(golden / OFFICIAL, **HEADS), 5)
    weights.write(official, tmp_path / "five.safetensors", "mae_jax")
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "images" / name).mkdir(parents=True)
        np.save(tmp_path / "images" / name / "0.npy", rng.random((32, 32, 5), np.float32))
    run = lambda show: draw(
        [tmp_path / "images"], [tmp_path / "five.safetensors"], tmp_path, "--show", show,
        pca=[], map=["--thumbnails"],
    )  # fmt: skip
    first, second = run("4,2,0"), run("0")
    assert (first["pca"] != second["pca"]).any()
    with pytest.raises(UserError, match="eval.show_channels=.*numbers from 0 to 4"):
        run("5")


def test_classes_are_the_folders_below_the_common_one(tmp_path):
    files = [tmp_path / name for name in ("a/x/1.png", "b/2.png", "3.png", "a/y/4.png")]
    classes, labels = feature_map.image_classes(files)
    assert (classes, labels.tolist()) == (["a", "b"], [0, 1, -1, 0])
    assert feature_map.image_classes([files[0], files[3]])[0] == ["x", "y"]
    assert feature_map.image_classes(files[:1])[0] == []


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_separate_clusters_and_are_deterministic(method):
    if method == "tsne":
        pytest.importorskip("sklearn")
    vectors = random_vectors(60) + 100 * np.repeat(np.eye(3, 12, dtype=np.float32), 20, axis=0)
    points, title = feature_map.embed(vectors, method)
    assert title.startswith({"pca": "PCA, ", "tsne": "t-SNE, perplexity 19.7"}[method])
    np.testing.assert_array_equal(feature_map.embed(vectors, method)[0], points)
    centers = points.reshape(3, 20, 2).mean(axis=1)
    nearest = np.square(points[:, None] - centers).sum(axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(nearest, np.repeat(np.arange(3), 20))


def test_thumbnails_do_not_overlap_and_legends_end():
    points = np.random.default_rng(0).random((3000, 2), np.float32)
    pixels = feature_map.to_pixels(points)
    assert pixels.min() >= 0
    assert pixels.max() <= feature_map.SIDE
    chosen = feature_map.select_thumbnails(pixels)
    assert 100 < len(chosen) < (feature_map.SIDE / feature_map.THUMBNAIL) ** 2
    distance = np.abs(pixels[chosen][:, None] - pixels[chosen]).max(axis=-1)
    assert distance[~np.eye(len(chosen), dtype=bool)].min() >= feature_map.THUMBNAIL
    names = [f"class {number}" for number in range(200)]
    figure = feature_map.map_figure(pixels, names, np.arange(3000) % 200, "title", {})
    assert figure.shape == (1000, 1260, 3)


def test_tiles_are_gray_or_color_of_any_shape():
    gray, wide = np.zeros((8, 8, 1), np.uint8), np.zeros((30, 60, 3), np.uint8)
    assert resize_tile(gray).shape == (112, 112, 3)
    assert resize_tile(wide, 20).shape == (10, 20, 3)
    sheet = tile_rows([[(resize_tile(wide, 20), "a long caption\nb")] * 2, []])
    assert sheet.shape == (6 + 2 * (10 + 36 + 6), 6 + 2 * 26, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to write: set --out, --attention, --pca or --map"),
        (["--pca", "p.jpg"], "--pca p.jpg must end in .png"),
        (["--map", "m.png", "--foreground"], "--foreground is for .*: add --pca OUT.png"),
        (["--pca", "p.png", "--thumbnails"], "--thumbnails is for .*: add --map OUT.png"),
        (["--pca", "p.png", "--attention-blocks", "1"], "--attention-blocks is for .*--attention"),
        (["--pca", "p.png", "--layers", "1,3"], "no layer 3: .* has 1 to 2"),
        (["--attention", "a.png", "--attention-blocks", "9"], "no layer 9: .* has 1 to 2"),
        (["--map", "m.png", "--map-method", "umap"], "--map-method umap .*pip install umap-learn"),
    ],
)
def test_bad_flags_are_errors_without_output(golden, images, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        features.main([str(images), "--checkpoint", str(golden / CHECKPOINTS["hf"][0]), *flags])
    assert not list(tmp_path.iterdir())


def test_maps_need_some_images_and_classes(golden, images, tmp_path):
    checkpoint = [golden / CHECKPOINTS["hf"][0]]
    with pytest.raises(UserError, match="--map needs at least 3 images, but there are 1"):
        draw([images / "ant/0.png"], checkpoint, tmp_path, map=[])
    with pytest.raises(UserError, match="--map has no classes .*all 3 images are in .*ant"):
        draw([images / "ant/0.png"] * 3, checkpoint, tmp_path, map=[])
    with pytest.raises(UserError, match="--map: the 3 images have all the same features"):
        draw([images / "ant/0.png"] * 3, checkpoint, tmp_path, map=["--thumbnails"])
    assert draw([images / "ant/0.png"], checkpoint, tmp_path, pca=[])["pca"].any()  # its patches


def test_nan_is_an_error_that_names_an_image(images):
    source = FileSource([images])
    arrays = {"cls": np.zeros((6, 4)), "mean": np.zeros((6, 4))}
    convert_cli.check_finite(arrays, source)
    arrays["mean"][4:, 1] = np.nan
    with pytest.raises(UserError, match="mean of .*cat/0.png contains NaN or Inf, as of 2 of 6"):
        convert_cli.check_finite(arrays, source)
