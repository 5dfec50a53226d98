"""Pixio as a config of the MAE, against its official PyTorch code (tests/golden/pixio)."""

import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_state_dict import official_names, to_params
from safetensors.numpy import load_file
from test_golden import check_gradients, nhwc

from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD, normalize
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import interpolate_pos_embed, patchify
from mae_jax.models.variants import VitVariant, get_variant
from mae_jax.tasks import masking
from mae_jax.tasks.optimizer import adamw, warmup_cosine, weight_decay_mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import init_state, make_train_step
from mae_jax.utils.pytree import diff, flatten

MODELS = ["p0_grid2", "p1_grid1_plain", "p2_grid4_droppath"]


def make_task(config: dict) -> Pretrain:
    side = config["img_size"] // config["patch_size"]
    size = VitVariant(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        class_tokens=config["n_cls_tokens"],
    )
    model = make_mae(
        size,
        grid=(side, side),
        pos_embed="learned_random",
        layer_norm_eps=config["ln_eps"],
        drop_path=config["drop_path"],
    )
    return Pretrain(
        model=model,
        grid=(side, side),
        patch=config["patch_size"],
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        mask_ratio=config["mask_ratio"],
        mask_cell=config["mask_grid"],
        norm_pix=config["norm_pix_loss"],
    )


def normalized(images):
    """Normalize images as the reference does, to the bit: XLA multiplies by 1 / std instead."""
    pixels = images.astype(np.float32) / np.float32(255)
    stats = (np.array(x, np.float32)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    mean, std = stats
    return nhwc((pixels - mean) / std)


def mask_from(task, noise):
    """Return the mask of recorded noise of cells."""
    cells = task.num_patches // task.mask_cell**2
    kept = masking.len_keep(cells, task.mask_ratio)
    mask = masking.mask_from_noise(jnp.asarray(noise), kept)
    return masking.cell_mask(mask, task.grid, task.mask_cell)


def to_noise(task, uniforms):
    """Return the noise [b, depth, 2] of drop path of recorded uniforms [calls, b].

    Nothing was recorded of the blocks that never drop a branch: those of rate 0.
    """
    depth, batch = task.model.encoder.depth, uniforms.shape[-1]
    noise = np.full((batch, depth, 2), 0.5, np.float32)
    noise[:, 1:] = uniforms.reshape(depth - 1, 2, batch).transpose(2, 0, 1)
    return jnp.asarray(noise)


@pytest.fixture(scope="module", params=MODELS)
def case(request, golden):
    folder = golden / "pixio" / request.param
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    task = make_task(config)
    params = to_params(load_file(folder / "state_dict.safetensors"), True)
    images = normalized(io["images_u8"])
    case = SimpleNamespace(folder=folder, config=config, io=io, task=task, params=params)
    case.images, case.patches = images, patchify(images[io["index"]], task.patch)
    case.mask = mask_from(task, io["noise"])
    case.noise = to_noise(task, io["drop_path_rand"]) if config["drop_path"] else None
    case.outputs = outputs_of(case)
    return case


def outputs_of(case):
    """Compute everything to compare in one compiled program."""
    task, mask = case.task, case.mask

    @jax.jit
    def run(params, patches, noise):
        variables = {"params": params}
        apply = lambda method, *args: task.model.apply(  # noqa: E731
            variables, patches, *args, method=method
        )
        loss_of = lambda params, noise: task.loss_of_patches(  # noqa: E731
            params, patches, mask, None, noise
        )
        loss, grads = jax.value_and_grad(loss_of)(params, noise)
        encode = lambda noise: task.model.encoder.apply(  # noqa: E731
            {"params": params["encoder"]}, patches, mask.ids_keep, noise
        )
        train_noise = None if noise is None else jnp.moveaxis(noise, 0, -1)
        return {
            "latent": encode(train_noise),
            "latent_eval": encode(None),
            "pred": task.model.apply(
                variables,
                encode(train_noise),
                mask,
                method=lambda model, latent, mask: model.decoder(latent, *mask, 0),
            ),
            "loss": loss,
            "loss_eval": loss_of(params, None),
            "grads": grads,
            "tokens": apply("encode"),
            "global_feature": apply("global_feature"),
        }

    return run(case.params, case.patches, case.noise)


def test_parameter_shapes_are_the_references(case):
    shapes = jax.eval_shape(case.task.init, jax.random.key(0))
    assert diff(shapes, case.params) == []


def test_masks_are_exact(case):
    mask, io = case.mask, case.io
    assert case.task.num_kept == case.config["patches_kept"] == io["ids_keep"].shape[1]
    np.testing.assert_array_equal(mask.ids_keep, io["ids_keep"])
    np.testing.assert_array_equal(mask.as_bool(), io["mask"].astype(bool))
    np.testing.assert_array_equal(
        jnp.argsort(jnp.concatenate(mask, axis=1), axis=1), io["ids_restore"]
    )


def test_normalized_images(case):
    images = case.io["images_u8"][case.io["index"]]
    corner = nhwc(case.io["normalized_corner"])
    np.testing.assert_array_equal(normalized(images)[0, :4, :6], corner)
    ours = normalize(nhwc(images), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(ours[0, :4, :6], corner, atol=1e-6)


def test_latent_and_prediction(case):
    tolerance = dict(atol=2e-5, rtol=1e-5)
    for name in {"latent", "latent_eval"} & set(case.io):
        np.testing.assert_allclose(case.outputs[name], case.io[name], **tolerance)
    recorded = case.io["pred"]  # of the first images
    order = np.concatenate(case.mask, axis=1)[: len(recorded)]
    expected = np.take_along_axis(recorded, order[..., None], axis=1)
    pred = case.outputs["pred"][: len(recorded)]
    np.testing.assert_allclose(pred, expected, **tolerance)
    assert np.abs(pred - expected).max() <= 5e-5 * np.abs(expected).max()


def test_loss_and_gradients(case):
    for name in {"loss", "loss_eval"} & set(case.io):
        np.testing.assert_allclose(case.outputs[name], case.io[name], atol=2e-6, rtol=2e-6)
    official = load_file(case.folder / "grads.safetensors")
    recorded = set(official_names(official))
    grads = flatten(case.outputs["grads"])
    check_gradients({name: grads[name] for name in recorded}, official)


def test_encoder_and_global_feature_of_whole_images(case):
    tolerance = dict(atol=2e-5, rtol=1e-5)
    expected = case.io["encoder_tokens_norm"]
    np.testing.assert_allclose(case.outputs["tokens"][: len(expected)], expected, **tolerance)
    if case.config["n_cls_tokens"] > 1:
        expected = case.io["global_feature"]
    else:  # as everywhere with one class token: the mean of the patches
        expected = np.asarray(case.outputs["tokens"])[:, 1:].mean(axis=1)
    np.testing.assert_allclose(case.outputs["global_feature"], expected, **tolerance)


@dataclass(frozen=True)
class Recorded:
    """The objective of a task whose batches hold recorded masks and noise."""

    task: Pretrain

    def init(self, key):
        return self.task.init(key)

    def init_stats(self):
        return {}

    def sample(self, key, batch):
        del key
        return batch

    def loss(self, params, stats, batch):
        return self.task.loss(params, stats, batch)


@pytest.mark.parametrize("case", ["p0_grid2", "p2_grid4_droppath"], indirect=True)
def test_training_trajectory(case):
    """Ten AdamW steps of the train step, with accumulation, drop path and the schedule."""
    task, config, recorded = (
        case.task,
        case.config["traj"],
        load_file(case.folder / "traj.safetensors"),
    )
    accumulate, steps = config["accum_iter"], config["opt_steps"]
    per_epoch = config["iters_per_epoch"] / accumulate
    lr = warmup_cosine(
        peak=config["lr_used_as_peak"],
        minimum=config["min_lr"],
        warmup_steps=config["warmup_epochs"] * per_epoch,
        total_steps=config["epochs"] * per_epoch,
    )
    tx = adamw(lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=config["weight_decay"])
    train_step = jax.jit(
        make_train_step(Recorded(task), tx, lr, jax.random.key(0), grad_accum_steps=accumulate)
    )
    state = dataclasses.replace(
        init_state(Recorded(task), tx, jax.random.key(0)), params=case.params
    )
    for step in range(steps):
        micro = [
            micro_batch(case, recorded, number)
            for number in range(step * accumulate, (step + 1) * accumulate)
        ]
        # Row j of micro-batch i is row j * accumulate + i of the batch.
        batch = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *micro)
        state, metrics = train_step(state, batch)
        np.testing.assert_allclose(metrics["learning_rate"], recorded["lr"][step], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], recorded["grad_norm"][step], rtol=1e-4)
        expected = recorded["losses"].reshape(steps, accumulate)[step].mean()
        np.testing.assert_allclose(metrics["loss"], expected, atol=2e-5)

    # The changes of the weights are recorded in float16, with errors below 4e-6.
    changes = load_file(case.folder / "traj_change.safetensors")
    changes = flatten(to_params({n: x.astype(np.float32) for n, x in changes.items()}, True))
    before, after = flatten(case.params), flatten(state.params)
    for path, change in changes.items():
        atol = np.full(change.shape[-1], 1e-5)
        if path.endswith("qkv/bias"):  # AdamW amplifies rounding errors of the key bias to lr
            width = change.shape[-1] // 3
            atol[width : 2 * width] = recorded["lr"].sum()
        assert (np.abs(after[path] - before[path] - change) <= atol).all(), path


def micro_batch(case, recorded, number):
    mask = mask_from(case.task, recorded["noise"][number])
    batch = {"image": case.images[recorded["index"][number]], **mask._asdict()}
    if case.config["drop_path"]:
        batch["drop_path_noise"] = to_noise(case.task, recorded["drop_path_rand"][number])
    return batch


def test_weight_decay_of_the_reference(case):
    """All parameters of two or more dimensions decay, tokens and positions too."""
    groups = {group["weight_decay"]: group for group in case.config["traj"]["param_groups"]}
    decayed = set(official_names(groups[0.05]["params"]))
    ours = flatten(weight_decay_mask(case.params))
    assert {name for name, decays in ours.items() if decays} == decayed
    assert {"encoder/cls_token", "encoder/pos_embed/table", "decoder/mask_token"} < decayed


@pytest.mark.parametrize("name", ["vith16_width_1block", "tiny"])
def test_initializers(golden, name):
    """Compare mean, standard deviation, maximum and quantiles with the reference's."""
    reference = json.loads((golden / "pixio" / "init_stats.json").read_text())[name]
    options = dict(img_size=256, n_cls_tokens=8, mlp_ratio=4.0, drop_path=0.0, mask_ratio=0.75)
    task = make_task(options | dict(mask_grid=1, norm_pix_loss=True) | reference["kw"])
    params = flatten(jax.jit(task.init)(jax.random.key(0, impl="rbg")))  # faster than threefry
    assert sum(leaf.size for leaf in params.values()) == reference["parameters"]
    for path, names in official_names(reference["stats"]).items():
        for block, official in enumerate(names):
            leaf, ref = np.asarray(params[path]), reference["stats"][official]
            x = leaf[block] if "/blocks/" in path else leaf
            noise = 6 / np.sqrt(x.size) * max(ref["std"], 1e-12)
            assert abs(x.mean() - ref["mean"]) <= 2 * noise + 1e-6, official
            assert abs(x.std() - ref["std"]) <= noise + 1e-6, official
            if "quantiles_5_25_50_75_95" in ref:  # not of constants and small arrays
                quantiles = np.quantile(x, [0.05, 0.25, 0.5, 0.75, 0.95])
                expected = ref["quantiles_5_25_50_75_95"]
                np.testing.assert_allclose(quantiles, expected, atol=2 * noise, err_msg=official)
            if "token" in official or "pos_embed" in official:  # normal: the maximum is random
                assert x.size < 1000 or np.abs(x).max() > 2.2 * ref["std"], official
            else:
                assert np.abs(x).max() <= 1.03 * ref["absmax"] + 1e-9, official


@pytest.mark.parametrize(
    ("table", "grid", "class_tokens", "sizes"),
    [
        ("table0", 4, 1, [(8, 8), (6, 5), (3, 3), (4, 4), (4, 6)]),
        ("table1", 8, 4, [(12, 12), (5, 9), (16, 4)]),
        ("table2", 16, 8, [(14, 14), (32, 32), (24, 20)]),
    ],
)
def test_positions_at_other_sizes(golden, table, grid, class_tokens, sizes):
    arrays = np.load(golden / "pixio" / "positions.npz")
    source = arrays[table][0]
    for size in sizes:
        result = interpolate_pos_embed(source, (grid, grid), size, class_tokens)
        expected = arrays[f"{table}_to_{size[0]}x{size[1]}"][0]
        np.testing.assert_allclose(result, expected, atol=1e-5)
        np.testing.assert_array_equal(result[:class_tokens], source[:class_tokens])


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("vit_b16", 85855488, None),
        ("vit_l16", 303377408, None),
        ("vit_h16", 631013120, 102062848),
        ("vit_1b16", 1361515008, 102193920),
        ("vit_5b16", 5440939008, 102980352),
    ],
)
def test_parameter_counts_of_the_recipe(name, encoder, decoder):
    size = dataclasses.replace(get_variant(name), class_tokens=8, decoder_depth=32)
    model = make_mae(size, grid=(16, 16), pos_embed="learned_random")
    ids = jnp.arange(256)[None]
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 256, 768)), ids[:, :64], ids[:, 64:]
    )["params"]
    counts = {part: sum(x.size for x in jax.tree.leaves(shapes[part])) for part in shapes}
    assert counts["encoder"] == encoder
    assert decoder in (None, counts["decoder"])
