"""Patches with a height and a width, from the config to files for other programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import assert_same, random_weights
from jax import export as jax_export
from run_helpers import save_first_state, write_tiny
from safetensors.numpy import load_file, save_file

import mae_jax
from mae_jax.convert import export, state_dict, weights
from mae_jax.convert.model_card import model_card
from mae_jax.convert.model_info import ConvertError
from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.evaluate.feature_figures import attention_figure, pca_figure
from mae_jax.evaluate.figures import GRAY, image_grid, reconstruction_panels
from mae_jax.evaluate.segmentation import SegmentationSetup
from mae_jax.evaluate.segmentation_probes import KnnOptions, knn_probe
from mae_jax.evaluate.segmentation_views import Views
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_corners, patch_grid, patchify, unpatchify
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.masking import cell_grid
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.yardsticks import copy_nearest, visible_pixels
from mae_jax.train import recipes, trainer
from mae_jax.train.config import from_config_dict
from mae_jax.train.config_schema import as_json
from mae_jax.train.warm_start import merge
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import height_width

PATCH, SIZE, GRID = (4, 12), (16, 24), (4, 2)
STRIPS = dict(patch=PATCH, image_size=SIZE)
DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2, target="normalized")


def images_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


def test_patches_are_cut_by_height_and_width():
    images = images_of(2)
    patches = patchify(jnp.asarray(images), PATCH)
    assert patches.shape == (2, 8, 4 * 12 * 3)
    for patch, (row, column) in enumerate(patch_corners(GRID, PATCH)):
        cut = images[:, row : row + 4, column : column + 12]
        np.testing.assert_array_equal(patches[:, patch], cut.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(patches, PATCH, GRID), images)


def test_embedding_is_a_convolution_with_the_exported_kernel():
    checkpoint, images = random_weights(**STRIPS), images_of(2).astype(np.float32)
    layout = state_dict.select_layout("timm", checkpoint.arrays)
    tensors = state_dict.export_state_dict(layout, dict(checkpoint.arrays), PATCH)
    kernel = tensors["patch_embed.proj.weight"]
    assert kernel.shape == (16, 3, *PATCH)
    axes = ("NHWC", "OIHW", "NHWC")
    expected = jax.lax.conv_general_dilated(images, kernel, PATCH, "VALID", dimension_numbers=axes)
    embedded = (
        patchify(jnp.asarray(images), PATCH) @ checkpoint.arrays["encoder/patch_embed/kernel"]
    )
    np.testing.assert_allclose(embedded, expected.reshape(2, 8, 16), rtol=1e-5)


def test_reconstruction_is_that_of_square_patches_with_the_same_values(tmp_path):
    """4 x 16 pixels are as many as 8 x 8, so that the network may be the same."""
    patches = np.random.default_rng(0).integers(0, 256, (2, 8, 8 * 8 * 3), dtype=np.uint8)
    results = []
    for patch in (8, (4, 16)):
        height, width = (side * count for side, count in zip(height_width(patch), GRID))
        info = dict(patch=patch, image_size=(height, width), depth=1)
        weights.write(random_weights(**info, **DECODER), tmp_path / str(patch), "mae_jax")
        model, params = mae_jax.load(tmp_path / str(patch))
        images = np.asarray(unpatchify(jnp.asarray(patches), patch, GRID))
        reconstructed = model.reconstruct(params, images, stats="gt")
        results.append(np.asarray(patchify(reconstructed, patch)))
    assert results[0].std() > 10, "an image"
    np.testing.assert_array_equal(results[0], results[1])


def test_near_patches_are_near_in_pixels():
    variant = VitVariant(8, 1, 1, PATCH, decoder_width=8, decoder_depth=1, decoder_heads=1)
    stats = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
    task = Pretrain(model=make_mae(variant, grid=GRID), grid=GRID, patch=PATCH, **stats)
    kept = np.array([[4, 1]])  # 8 pixels below patch 0, and 12 to the right of it
    weights = np.exp([-(8**2) / 2 / 48, -(12**2) / 2 / 48])
    expected = weights / weights.sum()
    weights = task._gaussian_weights(jnp.asarray(kept), None)
    np.testing.assert_allclose(weights[0, 0], expected, rtol=1e-5)
    patches = np.arange(8, dtype=np.float32)[None, :, None]
    copied = copy_nearest(patches, kept, patch_corners(GRID, PATCH))
    assert copied[0, 0, 0] == 4, "two rows are nearer than one column"


def test_pictures_show_the_pixels_of_patches():
    masked = (np.arange(8) == 2)[None]  # the left patch of the second row
    hidden = np.zeros((1, *SIZE), bool)
    hidden[:, 4:8, :12] = True
    images, black = np.full((1, *SIZE, 3), 200, np.uint8), np.zeros((1, *SIZE, 3), np.uint8)
    shown, _, pasted, _ = reconstruction_panels(images, black, masked, PATCH)
    np.testing.assert_array_equal(shown == GRAY, np.repeat(hidden[..., None], 3, axis=-1))
    np.testing.assert_array_equal(pasted == 0, np.repeat(hidden[..., None], 3, axis=-1))
    kept = np.flatnonzero(~masked)[None]
    np.testing.assert_array_equal(visible_pixels(kept, GRID, SIZE), ~hidden)

    cells = masked.reshape(1, *GRID)
    mask = np.where(hidden, np.uint8(255), np.uint8(0))[..., None]
    weighted = (images * np.where(mask, 1.0, 0.15)).astype(np.uint8)
    expected = image_grid([images, mask, weighted], ["image", "attention of cls", "both"])
    np.testing.assert_array_equal(attention_figure(images, cells.astype(np.float32)), expected)
    colors = np.uint8(255) * cells[..., None].repeat(3, axis=-1)
    expected = image_grid([images, mask], ["image", "last layer, 3 components"])
    np.testing.assert_array_equal(pca_figure(images, {"grid": colors}), expected)


def test_pixels_of_the_nearest_patch_are_predicted():
    views = Views(SIZE, 3, (0.0, 0.0, 0.0))
    setup = SegmentationSetup(
        grids=lambda images: {},
        views=views,
        batch_size=1,
        patch=PATCH,
        num_classes=48,
        ignore=255,
        convention="capi",
    )
    bank, pixels = np.eye(8, dtype=np.float32), np.arange(48)[None].repeat(8, axis=0)
    scores = knn_probe(bank, pixels, setup, KnnOptions(k=1))(bank.reshape(1, *GRID, 8))
    classes = scores.argmax(axis=-1)
    np.testing.assert_array_equal(classes[0], np.tile(np.arange(48).reshape(PATCH), GRID))


@pytest.mark.parametrize(
    ("patch", "parsed", "stored"),
    [(8, 8, 8), ((8, 8), 8, 8), (PATCH, PATCH, [4, 12]), ([4, 12], PATCH, [4, 12])],
)
def test_the_config_takes_an_int_or_a_pair(patch, parsed, stored):
    config = recipes.base().to_dict()
    config["model"]["patch"] = patch
    typed = from_config_dict(recipes.ConfigDict(config))
    assert typed.model.patch == parsed
    assert as_json(typed)["model"]["patch"] == stored


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ((4, 5, 6), r"must be 2 numbers, as in \(16, 16\)"),
        ((4, 0), "must be at least 1"),
        ((4.0, 8), "must be of type int"),
        (True, "must be of type int"),
    ],
)
def test_other_values_are_refused(patch, message):
    config = recipes.base()
    config.model.patch = patch
    with pytest.raises(UserError, match=message):
        from_config_dict(config)


def test_errors_name_the_height_or_the_width():
    with pytest.raises(UserError, match=r"the height of model.patch=\(4, 12\): 18 = 4 \* 4 \+ 2"):
        patch_grid((18, 24), PATCH)
    with pytest.raises(UserError, match=r"the width of model.patch=\(4, 12\).*Use 24 or 36"):
        patch_grid((16, 32), PATCH)
    with pytest.raises(UserError, match="a height of 16 or 24 and a width of 48 or 72") as raised:
        cell_grid((5, 5), 2, PATCH)
    assert "mask.cell=1" in str(raised.value)


# Checkpoints


def config_of(folder, patch):
    config = recipes.base()
    config.model.update(image_size=SIZE, patch=patch, width=16, depth=1, heads=2)
    config.model.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.update(dict(batch_size=4, steps=2))
    config.optim.warmup_steps = 1
    config.data.update(source="folder", path=str(folder), workers=0, eval_split="val")
    config.mesh.update(fsdp=2, min_split_bytes=256, max_whole=1.0)
    return from_config_dict(config)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run before its first step, sharded over devices."""
    folder = tmp_path_factory.mktemp("strips")
    write_tiny(folder)
    save_first_state(config_of(folder, PATCH), folder / "run")
    return folder / "run"


def test_a_run_is_read_with_its_patches(run):
    model, params = mae_jax.load(run)
    assert (model.info.patch, model.info.grid) == (PATCH, GRID)
    tables = [params[part]["pos_embed"]["table"] for part in ("encoder", "decoder")]
    assert [table.shape for table in tables] == [(1, 9, 16), (1, 9, 16)]
    assert "patches of 4 x 12 pixels" in model_card(model.info, "mae_jax", {}, repo="me/strips")


def test_a_run_does_not_go_on_with_other_patches(run):
    with pytest.raises(CheckpointError, match=r"model.patch: \[4, 12\] -> 8"):
        trainer.train_and_evaluate(config_of(run.parent, 8), run)
    square = {"encoder": {"patch_embed": {"kernel": np.zeros((8 * 8 * 3, 16))}}}
    with pytest.raises(ConvertError, match="--config.model.patch=4,12"):
        merge(square, weights.read(run))
    with pytest.raises(UserError, match=r"model.patch=\(4, 12\): 18 = 4"):
        mae_jax.load(run, image_size=(18, 24))


def test_formats_of_square_patches_refuse_others(tmp_path):
    checkpoint = random_weights(**STRIPS, **DECODER)
    for to in ("official", "hf"):
        with pytest.raises(ConvertError, match=f"{to} has square patches only, not 4 x 12 pixels"):
            weights.write(checkpoint, tmp_path / to, to)
    pixio = random_weights(**STRIPS, source="pixio", class_tokens=2)
    for to in ("pixio", "hf"):
        with pytest.raises(ConvertError, match=f"{to} has square patches only.*--to mae_jax has"):
            weights.write(pixio, tmp_path / to, to)


@pytest.mark.parametrize(
    ("to", "info"), [("timm", {}), ("hf", dict(num_classes=3)), ("mae_jax", DECODER)]
)
def test_other_formats_keep_them(tmp_path, to, info):
    checkpoint = random_weights(**STRIPS, **info)
    weights.write(checkpoint, tmp_path / to, to)
    again = weights.read(tmp_path / to)
    assert (again.info.patch, again.info.image_size) == (PATCH, SIZE)
    assert_same(again.arrays, checkpoint.arrays)


def test_a_bare_file_needs_its_grid(tmp_path):
    weights.write(random_weights(**STRIPS), tmp_path / "timm", "timm")
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "timm" / "model.safetensors"), bare)
    with pytest.raises(ConvertError, match="8 patches of 4 x 12 pixels.*--grid-size"):
        weights.read(bare, heads=2)
    assert weights.read(bare, heads=2, grid=GRID).info.image_size == SIZE


@pytest.mark.parametrize("patch", [(8, 8), (4, 0), (4, 4, 4), 2.5])
def test_invalid_metadata_is_refused(patch):
    with pytest.raises(ConvertError, match="must be an integer >= 1, or two that differ"):
        random_weights(patch=patch)


def test_export_for_serving(tmp_path):
    weights.write(random_weights(**STRIPS), tmp_path / "model.safetensors", "mae_jax")
    model, params = mae_jax.load(tmp_path / "model.safetensors")
    program = export.make_program(model, params)
    exported = jax_export.deserialize(bytearray(export.to_stablehlo(program)))
    expected = model.features(params, images_of(2), grid=True)
    for name, array in jax.jit(exported.call)(images_of(2)).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)
