"""Losses and samples do not depend on devices, sharding, rematerialization or accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.distributed import sharding
from mae_jax.distributed.checksums import checksums
from mae_jax.models.classifier import Classifier
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import make_encoder
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import init_state, make_train_step

SIZE = VitVariant(64, 2, 2, 8, decoder_width=32, decoder_depth=2, decoder_heads=2)
LEARNING_RATE = warmup_cosine(peak=1e-2, warmup_steps=2, total_steps=20)
KEY = jax.random.key(5)
STEPS, ROWS, CLASSES = 5, 16, 7
PIXELS = dict(patch=8, mean=(0.5,) * 3, std=(0.25,) * 3)


def make_pretrain(execution, **kwargs):
    model = make_mae(SIZE, grid=(4, 4), execution=execution)
    return Pretrain(model=model, grid=(4, 4), **PIXELS, **kwargs)


def make_pretrain_some(execution):
    """Return a task that predicts some of the masked patches, of a grid mask."""
    return make_pretrain(execution, mask="grid", predict_ratio=0.5)


def make_finetune(execution):
    encoder = make_encoder(SIZE, (4, 4), final_norm=False, drop_path=0.2, execution=execution)
    model = Classifier(encoder, num_classes=CLASSES, pool="mean", fc_norm=True)
    mixup = Mixup(mixup=0.8, cutmix=1.0, mode="elem")
    return Classify(model=model, smoothing=0.1, mixup=mixup, erase=0.25, **PIXELS)


TASKS = {
    "pretrain": make_pretrain,
    "pretrain_some": make_pretrain_some,
    "finetune": make_finetune,
}


def batch_of(step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, CLASSES, ROWS, dtype=np.int32)}


def make(name, mesh, **execution):
    """Return a task, its optimizer, and the shapes and shardings of its state on a mesh."""
    task = TASKS[name](
        ExecutionConfig(shard_activations=sharding.batch_constraint(mesh), **execution)
    )
    tx = adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0)
    init = lambda key: init_state(task, tx, key)
    shapes = jax.eval_shape(init, KEY)
    return task, tx, init, shapes, sharding.state_shardings(shapes, mesh, min_bytes=1024)


def train(name, mesh, grad_accum_steps=1, **execution):
    """Return losses, and the checksums of the first state."""
    task, tx, init, _, shardings = make(name, mesh, **execution)
    state = jax.jit(init, out_shardings=shardings)(KEY)
    first = checksums(vars(state))
    step = make_train_step(task, tx, LEARNING_RATE, KEY, grad_accum_steps=grad_accum_steps)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, sharding.shard_batch(batch_of(number), mesh))
        losses.append(float(metrics["loss"]))
    return losses, first


@functools.cache
def train_on_one_device(name):
    return train(name, one_device())


def one_device():
    mesh = sharding.make_mesh()
    return jax.sharding.Mesh(mesh.devices[:1, :1], mesh.axis_names, axis_types=mesh.axis_types)


REMAT = dict(remat="full", grad_accum_steps=4)
UNROLL = dict(scan_unroll=2, remat="dots", grad_accum_steps=2)


@pytest.mark.parametrize(
    ("name", "fsdp", "options"),
    [
        ("pretrain", 1, {}),
        ("pretrain", 2, REMAT),
        ("pretrain_some", 4, UNROLL),
        ("finetune", 2, REMAT),
        ("finetune", 4, UNROLL),
    ],
    ids=str,
)
def test_the_same_losses(name, fsdp, options):
    losses, first = train_on_one_device(name)
    sharded_losses, sharded_first = train(name, sharding.make_mesh(fsdp), **options)
    assert sharded_first == first, "the first state is bit-identical"
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_samples_for_every_image(name):
    """Masks are bit-identical; mixed images and labels differ by rounding only."""
    samples = []
    for mesh in (one_device(), sharding.make_mesh(), sharding.make_mesh(4)):
        task = make(name, mesh)[0]
        batch = sharding.shard_batch(batch_of(0), mesh)
        samples.append(jax.device_get(jax.jit(task.sample)(KEY, batch)))
    for other in samples[1:]:
        for name, array in samples[0].items():
            tolerance = 0 if array.dtype.kind in "iu" else 1e-6
            np.testing.assert_allclose(other[name], array, rtol=tolerance, atol=tolerance)


def test_a_sharded_state_takes_its_share_of_memory():
    mesh = sharding.make_mesh(4)
    _, _, init, shapes, shardings = make("pretrain", mesh)
    state = jax.jit(init, out_shardings=shardings)(KEY)
    for item in ("params", "opt_state"):
        arrays = jax.tree.leaves(vars(state)[item])
        total = sum(array.nbytes for array in arrays)
        first = sum(array.addressable_shards[0].data.nbytes for array in arrays)
        small = sum(array.nbytes for array in arrays if array.nbytes < 1024)
        assert first <= total / 4 + small
    sharded, replicated = sharding.bytes_per_device(shapes, shardings)
    assert sharded + replicated == sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
    )


def test_no_device_initializes_the_full_state():
    mesh = sharding.make_mesh(4)
    _, _, init, shapes, shardings = make("pretrain", mesh)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = jax.jit(init, out_shardings=shardings).lower(KEY).compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < total / 2
    replicated = jax.jit(init).lower(KEY).compile().memory_analysis()
    assert replicated.output_size_in_bytes >= total, "the test can fail"


def test_gather_to_host_and_back():
    mesh = sharding.make_mesh(4)
    arrays = {"a": np.arange(4096.0).reshape(8, 512), "b": np.float32(3)}
    placed = sharding.device_put_tree(
        arrays, sharding.state_shardings(arrays, mesh, min_bytes=1024)
    )
    assert not placed["a"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, sharding.gather_to_host(placed), arrays)
    again = sharding.device_put_tree({"a": jnp.ones(3)}, {"a": placed["b"].sharding})
    np.testing.assert_array_equal(again["a"], np.ones(3))
