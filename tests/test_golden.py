"""The model, its loss, its gradients and its training against the official PyTorch code."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from official_state_dict import official_names, to_params
from safetensors.numpy import load_file

from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patchify, unpatchify
from mae_jax.models.variants import VitVariant
from mae_jax.tasks import masking
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain, patch_statistics
from mae_jax.utils.pytree import diff, flatten

MODELS = [
    "p0_plain",
    "p1_normpix",
    "p3_patch4_r50",
    "p4_gray",
    "p6_eps1e-5_mlp2",
]
RECORDED = 1  # images of a batch of which targets and predictions are recorded


def make_task(config: dict) -> Pretrain:
    side = config["img_size"] // config["patch_size"]
    channels = config["in_chans"]
    size = VitVariant(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
    )
    model = make_mae(
        size,
        grid=(side, side),
        channels=channels,
        pos_embed="learned" if config["rand_pos"] else "sincos",
        layer_norm_eps=config["ln_eps"],
    )
    return Pretrain(
        model=model,
        grid=(side, side),
        patch=config["patch_size"],
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        mask_ratio=config["mask_ratio"],
        norm_pix=config["norm_pix_loss"],
    )


def nhwc(images):
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


@pytest.fixture(scope="module", params=MODELS)
def case(request, golden):
    folder = golden / "mae" / request.param
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    task = make_task(config)
    params = to_params(load_file(folder / "state_dict.safetensors"), config["rand_pos"])
    patches = patchify(nhwc(io["images"]), config["patch_size"])
    mask = masking.mask_from_noise(jnp.asarray(io["noise"]), config["len_keep"])
    grads = folder / "grads.safetensors"
    return SimpleNamespace(
        config=config,
        io=io,
        task=task,
        params=params,
        patches=patches,
        mask=mask,
        outputs=outputs_of(task, params, patches, mask, with_grads=grads.exists()),
        grads=load_file(grads) if grads.exists() else None,
    )


def outputs_of(task, params, patches, mask, with_grads):
    """Compute everything to compare in one compiled program."""

    @jax.jit
    def run(params, patches, mask):
        apply = lambda method, *args: task.model.apply(  # noqa: E731
            {"params": params}, patches, *args, method=method
        )
        if with_grads:
            loss, grads = jax.value_and_grad(task.loss_of_patches)(params, patches, mask)
        else:
            loss, grads = task.loss_of_patches(params, patches, mask), None
        return {
            "latent": apply("encode", mask.ids_keep),
            "pred": apply("predict", *mask),
            "masked_pred": apply("__call__", *mask),
            "loss": loss,
            "grads": grads,
        }

    return run(params, patches, mask)


def test_parameter_shapes_are_the_references(case):
    shapes = jax.eval_shape(case.task.init, jax.random.key(0))
    assert diff(shapes, case.params) == []


def test_mask_is_exact(case):
    assert masking.len_keep(case.task.num_patches, case.config["mask_ratio"]) == len(
        case.io["ids_keep"][0]
    )
    np.testing.assert_array_equal(case.mask.ids_keep, case.io["ids_keep"])
    np.testing.assert_array_equal(case.mask.as_bool(), case.io["mask"].astype(bool))
    order = jnp.concatenate(case.mask, axis=1)
    np.testing.assert_array_equal(jnp.argsort(order, axis=1), case.io["ids_restore"])


def test_patchify_is_exact(case):
    patch, grid = case.config["patch_size"], case.task.grid
    np.testing.assert_array_equal(unpatchify(case.patches, patch, grid), nhwc(case.io["images"]))
    if not case.task.norm_pix:  # then the recorded target is the patches themselves
        np.testing.assert_array_equal(case.patches[:RECORDED], case.io["target"])


def test_latent_and_prediction(case):
    tolerance = dict(atol=2e-5, rtol=1e-5)
    pred, expected = case.outputs["pred"], case.io["pred"]
    np.testing.assert_allclose(case.outputs["latent"], case.io["latent"], **tolerance)
    np.testing.assert_allclose(pred[:RECORDED], expected, **tolerance)
    # A tanh GELU would change the prediction by 2e-4 of its maximum.
    assert np.abs(pred[:RECORDED] - expected).max() <= 5e-5 * np.abs(expected).max()
    picked = jnp.take_along_axis(pred, case.mask.ids_masked[..., None], axis=1)
    np.testing.assert_allclose(case.outputs["masked_pred"], picked, atol=1e-6, rtol=1e-6)


def test_target(case):
    target = case.patches[:RECORDED]
    if case.task.norm_pix:
        mean, std = patch_statistics(target, case.task.norm_pix_eps)
        target = (target - mean) / std
    np.testing.assert_allclose(target, case.io["target"], atol=2e-5, rtol=1e-5)


def test_loss_and_gradients(case):
    np.testing.assert_allclose(case.outputs["loss"], case.io["loss"], atol=2e-6, rtol=2e-6)
    if case.grads is not None:
        check_gradients(flatten(case.outputs["grads"]), case.grads)


def check_gradients(grads, official):
    """Compare flat gradients with those of the official parameters, block by block."""
    expected = flatten(to_params(official, learned_pos_embed=False))
    assert set(grads) - set(expected) <= {"encoder/pos_embed/table", "decoder/pos_embed/table"}
    for name, reference in expected.items():
        grad = np.asarray(grads[name])
        if name.endswith("qkv/bias"):  # the key bias has no effect: its true gradient is 0
            width = grad.shape[-1] // 3
            assert np.abs(grad[:, width : 2 * width]).max() <= 1e-6
            key_bias = slice(width, 2 * width)
            grad, reference = (np.delete(g, key_bias, axis=1) for g in (grad, reference))
        pairs = zip(grad, reference) if "/blocks/" in name else [(grad, reference)]
        for block, (g, r) in enumerate(pairs):
            assert np.abs(g - r).max() <= 2e-5 * np.abs(r).max() + 1e-7, (name, block)


def schedule_of(config):
    """Return the learning rate schedule of a recorded trajectory."""
    per_epoch = config["steps_per_epoch"]
    return warmup_cosine(
        peak=config["lr"],
        minimum=config["min_lr"],
        warmup_steps=config["warmup_epochs"] * per_epoch,
        total_steps=config["epochs"] * per_epoch,
    )


def test_training_trajectory(golden):
    """Four AdamW steps, with fixed positions; tests/test_pixio.py takes more and learns them."""
    folder = golden / "pretrain_traj" / "t0"
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    task = make_task(config["model"])
    params = to_params(load_file(folder / "init_state_dict.safetensors"), False)
    lr = schedule_of(config)
    b1, b2 = config["betas"]
    tx = adamw(lr, b1=b1, b2=b2, eps=1e-8, weight_decay=config["weight_decay"])
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, patches, mask):
        loss, grads = jax.value_and_grad(task.loss_of_patches)(params, patches, mask)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    kept = masking.len_keep(task.num_patches, task.mask_ratio)
    for i in range(config["opt_steps"]):
        np.testing.assert_allclose(lr(jnp.float32(i)), io["lr"][i], rtol=1e-6, atol=0)
    for i in range(len(io["images"])):
        mask = masking.mask_from_noise(jnp.asarray(io["noise"][i]), kept)
        patches = patchify(nhwc(io["images"][i]), task.patch)
        loss, params, opt_state = step(params, opt_state, patches, mask)
        np.testing.assert_allclose(loss, io["losses"][i], atol=2e-5)


def test_initializers(golden):
    """Compare mean, standard deviation and maximum of every tensor with the official ones."""
    stats = json.loads((golden / "init" / "init_stats.json").read_text())
    reference = stats["mae_vit_base_patch16"]["stats"]
    base = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12)
    base |= dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0)
    task = make_task(base | dict(rand_pos=True, ln_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True))
    params = flatten(jax.jit(task.init)(jax.random.key(0, impl="rbg")))  # faster than threefry
    for path, names in official_names(reference).items():
        leaf = np.asarray(params[path])
        for block, name in enumerate(names):
            x, ref = leaf[block] if "/blocks/" in path else leaf, reference[name]
            count = x.size
            noise = 6 / np.sqrt(count) * max(ref["std"], 1e-12)
            assert abs(x.mean() - ref["mean"]) <= 2 * noise + 1e-6, name
            assert abs(x.std() - ref["std"]) <= noise + 1e-6, name
            if "token" in name:  # normal, not truncated: the maximum is random
                assert np.abs(x).max() > 2.2 * ref["std"], name
            else:
                assert np.abs(x).max() <= 1.03 * ref["absmax"] + 1e-9, name
