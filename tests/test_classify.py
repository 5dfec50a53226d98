"""Classification against the official PyTorch code: heads, BatchNorm, trajectories, mixup."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from official_state_dict import official_names, to_params
from safetensors.numpy import load_file
from test_golden import check_gradients, nhwc, schedule_of

from mae_jax.models.classifier import Classifier
from mae_jax.models.patches import patchify
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import make_encoder
from mae_jax.tasks import mixup
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.mixup import Mix
from mae_jax.tasks.optimizer import adamw, lars, lr_multipliers, weight_decay_mask
from mae_jax.tasks.train_step import TrainState, make_train_step
from mae_jax.utils.pytree import flatten

NO_DECAY = ("cls_token", "pos_embed")


def make_task(config: dict, *, mean_pool: bool, drop_path: float = 0.0, **kwargs) -> Classify:
    side = config["img_size"] // config["patch_size"]
    variant = VitVariant(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
    )
    encoder = make_encoder(
        variant,
        (side, side),
        pos_embed="learned",
        final_norm=not mean_pool,
        drop_path=drop_path,
    )
    model = Classifier(
        encoder,
        num_classes=config["num_classes"],
        pool="mean" if mean_pool else "cls",
        fc_norm=mean_pool,
        head_norm=kwargs.pop("head_norm", False),
    )
    channels = config["in_chans"]
    statistics = dict(mean=(0.0,) * channels, std=(1.0,) * channels)
    return Classify(model=model, patch=config["patch_size"], **statistics, **kwargs)


@pytest.fixture(params=["v0_cls", "v0_gap"])
def vit(request, golden):
    """Return the folder, config, recorded arrays and parameters of a reference ViT."""
    folder = golden / "vit" / request.param
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    params = to_params(load_file(folder / "state_dict.safetensors"), True)
    return folder, config, io, params


def with_probe_head(params, io):
    """Replace the head by that of the linear probe."""
    head = {"kernel": jnp.asarray(io["head_weight"].T), "bias": jnp.asarray(io["head_bias"])}
    return params | {"head": head}


def test_forward_and_gradients(vit, golden):
    folder, config, io, params = vit
    task = make_task(config, mean_pool=config["global_pool"])
    has_grads = config["global_pool"]
    targets = jax.nn.one_hot(io["labels"], config["num_classes"])
    batch = {"pixels": nhwc(io["images"]), "target": targets}

    @jax.jit
    def run(params, batch):
        outputs = task.model.apply({"params": params}, patchify(batch["pixels"], task.patch))
        if has_grads:
            return outputs, *jax.value_and_grad(lambda p: task.loss(p, {}, batch)[0])(params)
        return outputs, task.loss(params, {}, batch)[0], None

    outputs, loss, grads = run(params, batch)
    np.testing.assert_allclose(outputs.pooled, io["features"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(outputs.logits, io["logits"], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(loss, io["ce_loss"], atol=2e-6, rtol=2e-6)
    if has_grads:
        check_gradients(flatten(grads), load_file(folder / "grads_ce.safetensors"))


def test_linear_probe_head(vit):
    """Training normalizes by the batch, evaluation by (unbiased) running statistics."""
    _, config, io, params = vit
    task = make_task(config, mean_pool=config["global_pool"], head_norm=True, train_last_blocks=0)
    params = with_probe_head(params, io)
    before = {
        "head_norm": {
            "mean": jnp.asarray(io["bn0_running_mean"]),
            "var": jnp.asarray(io["bn0_running_var"]),
            "count": jnp.int32(0),
        }
    }
    targets = jax.nn.one_hot(io["labels"], config["num_classes"])
    batch = {"pixels": nhwc(io["images"]), "target": targets}
    patches = patchify(batch["pixels"], task.patch)

    @jax.jit
    def train(params, stats):
        variables = {"params": params, "batch_stats": stats}
        outputs, updated = task.model.apply(
            variables, patches, False, True, mutable=["batch_stats"]
        )
        loss_and_grads = jax.value_and_grad(task.loss, has_aux=True)(params, stats, batch)
        return outputs.logits, updated["batch_stats"], loss_and_grads

    @jax.jit
    def evaluate(params, stats):
        return task.model.apply({"params": params, "batch_stats": stats}, patches).logits

    logits, after, ((loss, loss_stats), grads) = train(params, before)
    np.testing.assert_allclose(logits, io["lin_train_logits"], atol=1e-5)
    for stats in (after["head_norm"], loss_stats["head_norm"]):
        np.testing.assert_allclose(stats["mean"], io["bn1_running_mean"], atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(stats["var"], io["bn1_running_var"], atol=1e-6, rtol=1e-5)
        assert stats["count"] == 1
    for stats, expected in ((before, "before"), (after, "after")):
        expected = io[f"lin_eval_logits_{expected}"]
        np.testing.assert_allclose(evaluate(params, stats), expected, atol=1e-5)
    np.testing.assert_allclose(loss, io["lin_train_loss"], atol=1e-5)
    # The recorded gradient includes that of the plain head, which was not zeroed before.
    plain = (jax.nn.softmax(io["logits"]) - targets) / len(targets)
    kernel, bias = plain.T @ io["features"], plain.sum(axis=0)
    np.testing.assert_allclose(grads["head"]["kernel"].T, io["lin_grad_weight"] - kernel, atol=5e-6)
    np.testing.assert_allclose(grads["head"]["bias"], io["lin_grad_bias"] - bias, atol=5e-6)
    for name, grad in flatten(grads).items():
        assert name.startswith("head/") or not np.any(grad), name


@pytest.mark.parametrize(
    ("vit", "cached"), [("v0_cls", False), ("v0_gap", False), ("v0_gap", True)], indirect=["vit"]
)
def test_linear_probe_trajectory(vit, golden, cached):
    """Six LARS steps, also on cached features; the encoder does not change, to the bit."""
    folder, config, io, params = vit
    task = make_task(config, mean_pool=config["global_pool"], head_norm=True, train_last_blocks=0)
    params = with_probe_head(params, io)
    expected = load_file(folder / "linprobe_traj.safetensors")
    batches = load_file(golden / "vit" / "v0_linprobe_batches.safetensors")
    recipe = config["linprobe_traj"]
    lr = schedule_of(recipe)
    tx = lars(
        lr,
        momentum=recipe["momentum"],
        weight_decay=recipe["weight_decay"],
        trust_coefficient=recipe["trust_coefficient"],
        train_last_blocks=0,
    )
    before = jax.tree.map(np.asarray, params)
    width = config["embed_dim"]
    stats = {"head_norm": {"mean": jnp.zeros(width), "var": jnp.ones(width), "count": jnp.int32(0)}}
    state = TrainState(*jnp.zeros((3,), jnp.int32), params, tx.init(params), None, stats)
    step = jax.jit(make_train_step(task, tx, lr, jax.random.key(1)))
    headless = task.model.clone(num_classes=0)
    encode = jax.jit(lambda pixels: headless.apply({"params": params}, patchify(pixels, 8)).pooled)
    for number, loss in enumerate(expected["losses"]):
        batch = {"label": jnp.asarray(batches["labels"][number])}
        pixels = nhwc(batches["images"][number])
        if cached:
            batch["pooled"] = encode(pixels)
        else:
            batch["pixels"] = pixels
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, atol=5e-5)
    head = state.params["head"]
    np.testing.assert_allclose(head["kernel"].T, expected["final_head.1.weight"], atol=5e-5)
    np.testing.assert_allclose(head["bias"], expected["final_head.1.bias"], atol=5e-5)
    stats = state.batch_stats["head_norm"]
    np.testing.assert_allclose(stats["mean"], expected["final_head.0.running_mean"], atol=1e-5)
    np.testing.assert_allclose(stats["var"], expected["final_head.0.running_var"], atol=1e-5)
    assert stats["count"] == expected["final_head.0.num_batches_tracked"]
    for name, leaf in flatten(state.params["encoder"]).items():
        assert np.asarray(leaf).tobytes() == flatten(before["encoder"])[name].tobytes()


@pytest.mark.parametrize("name", ["f2_clip", "f3_droppath"])
def test_finetuning_trajectory(name, golden):
    folder = golden / "finetune" / name
    config = json.loads((folder / "config.json").read_text())
    io = load_file(folder / "io.safetensors")
    task = make_task(
        config["model"],
        mean_pool=config["global_pool"],
        drop_path=config["drop_path"],
        smoothing=config["label_smoothing"] or 0.0,
    )
    lr = schedule_of(config)
    b1, b2 = config["betas"]
    tx = adamw(
        lr,
        b1=b1,
        b2=b2,
        eps=config["adam_eps"],
        weight_decay=config["weight_decay"],
        no_weight_decay=NO_DECAY,
        clip_norm=config["clip_grad"],
        layer_decay=config["layer_decay"],
    )
    params = to_params(load_file(folder / "init_state_dict.safetensors"), True)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, optax.tree.norm(grads), optax.apply_updates(params, updates), opt_state

    for i, loss in enumerate(io["losses"]):
        classes = config["model"]["num_classes"]
        targets = smooth(jnp.asarray(io["labels"][i]), classes, task.smoothing)
        batch = {"pixels": nhwc(io["images"][i]), "target": targets}
        if "soft_targets" in io:
            batch["target"] = jnp.asarray(io["soft_targets"][i])
        if config["drop_path"]:  # the reference has no noise for the first block, whose rate is 0
            noise = np.zeros((task.model.encoder.depth, 2, len(targets)), np.float32)
            noise[1:] = io["drop_path_rand"][i].reshape(-1, 2, len(targets))
            batch["drop_path_noise"] = jnp.moveaxis(noise, -1, 0)
        actual, norm, params, opt_state = step(params, opt_state, batch)
        np.testing.assert_allclose(actual, loss, atol=1e-5)
        np.testing.assert_allclose(norm, io["grad_norms"][i], rtol=1e-4)

    # f3 has recorded only the smaller arrays; the losses above depend on all.
    final = to_params(load_file(folder / "final_state_dict.safetensors"), True)
    params = flatten(params)
    for path, expected in flatten(final).items():
        atol = np.full(expected.shape[-1], 1e-5)
        if path.endswith("qkv/bias"):  # AdamW amplifies rounding errors of the key bias to lr
            width = expected.shape[-1] // 3
            atol[width : 2 * width] = io["base_lr"].sum()
        assert (np.abs(params[path] - expected) <= atol).all(), path


@pytest.mark.parametrize("name", ["cls_0.75", "gap_0.65"])
def test_layer_decay_groups_are_the_references(name, golden):
    reference = json.loads((golden / "lr_decay" / f"vit_base_patch16_{name}.json").read_text())
    config = dict(img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12)
    task = make_task(
        config | dict(mlp_ratio=4.0, num_classes=1000), mean_pool=reference["global_pool"]
    )
    params = jax.eval_shape(task.init, jax.random.key(0))
    scales = flatten(lr_multipliers(params, layer_decay=reference["layer_decay"]))
    decayed = flatten(weight_decay_mask(params, NO_DECAY))
    groups = reference["as_main_finetune"]
    official = official_names(groups)
    assert set(official) == set(scales)
    for path, names in official.items():
        expected = [groups[n]["lr_scale"] for n in names]
        np.testing.assert_allclose(np.ravel(scales[path]), expected, rtol=1e-6)
        assert {groups[n]["weight_decay"] > 0 for n in names} == {decayed[path]}, path


def smooth(labels, num_classes, smoothing):
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def test_losses(golden):
    io = load_file(golden / "finetune" / "losses.safetensors")
    logits = jnp.asarray(io["logits"])
    for smoothing in (0.0, 0.1, 0.2):
        targets = smooth(jnp.asarray(io["labels"]), 10, smoothing)
        expected = io[f"label_smoothing_{smoothing}"]
        np.testing.assert_allclose(
            optax.softmax_cross_entropy(logits, targets).mean(), expected, rtol=2e-6
        )
    actual = optax.softmax_cross_entropy(logits, jnp.asarray(io["soft"])).mean()
    np.testing.assert_allclose(actual, io["soft_target_ce"], rtol=2e-6)


@pytest.mark.parametrize("case", range(8))
def test_mixup_and_cutmix(case, golden):
    """Mixed images and soft labels, for the lambdas and boxes that the reference sampled."""
    config = json.loads((golden / "finetune" / "mixup.json").read_text())[case]
    arrays = load_file(golden / "finetune" / "mixup.safetensors")
    get = lambda name: jnp.asarray(arrays[f"m{case}_{name}"])  # noqa: E731
    batch, side = config["B"], config["S"]
    rows = np.arange(batch)
    rows = {"batch": 0 * rows, "elem": rows, "pair": np.minimum(rows, batch - 1 - rows)}
    rows = rows[config["mode"]]
    cut = np.array(config["use_cutmix"])
    lam, boxes = np.array(config["lam_drawn"]), np.zeros((len(cut), 4), int)
    boxes[cut] = np.array(config["cutmix_calls"]["box"]).reshape(-1, 4)
    lam[cut] = config["cutmix_calls"]["lam"]
    mix = Mix(*(jnp.asarray(x[rows]) for x in (lam.astype(np.float32), cut, boxes)))
    images = jnp.moveaxis(get("x"), 1, -1)
    mixed = jnp.moveaxis(mixup.mix_images(images, mix), -1, 1)
    np.testing.assert_allclose(mixed, get("out"), atol=1e-6)
    targets = smooth(get("labels"), config["ncls"], config["smooth"])
    np.testing.assert_allclose(mixup.mix_targets(targets, mix), get("target"), atol=1e-6)
    # The box and the corrected lambda follow from the center and the sampled lambda.
    calls = config["cutmix_calls"]
    for box, sampled, expected in zip(boxes[cut], calls["lam0"], calls["lam"]):
        half = int(side * np.sqrt(1 - sampled)) // 2
        center = [high - half if low == 0 else low + half for low, high in (box[:2], box[2:])]
        actual, lam = mixup.cutmix_box(jnp.array([sampled]), jnp.array([center]), (side, side))
        np.testing.assert_array_equal(actual[0], box)
        np.testing.assert_allclose(lam[0], expected, rtol=1e-6)
