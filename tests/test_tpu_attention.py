"""The fused attention of TPUs, interpreted, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from mae_jax.distributed.sharding import make_mesh
from mae_jax.models import attention, tpu_attention
from mae_jax.models.attention import AttentionImpl


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(6, 13, 8, 32), (3, 10, 3, 16), (2, 5, 8, 80)],
    ids=["two groups of heads", "no whole registers", "heads across registers"],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_results_and_gradients_are_those_of_xla(batch, tokens, heads, width, padding):
    rng = np.random.default_rng(0)
    shape = (batch, tokens, heads, width)
    *inputs, gradient = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    merge = lambda x: rearrange(x, "b t h e -> b t (h e)")

    expected, expected_vjp = jax.vjp(lambda *x: AttentionImpl()(*x, tokens), *inputs)

    def padded(*inputs):
        inputs = (jnp.pad(x, ((0, 0), (0, padding), (0, 0)), constant_values=9.0) for x in inputs)
        return tpu_attention.tpu_attention(*inputs, heads, tokens, True)[:, :tokens]

    actual, actual_vjp = jax.vjp(padded, *map(merge, inputs))
    pairs = zip(
        (actual, *actual_vjp(merge(gradient))), map(merge, (expected, *expected_vjp(gradient)))
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * jnp.abs(b).max())


@pytest.mark.parametrize("images", [1, 2, 4])
def test_blocks_of_images(images, monkeypatch):
    """All images that fit into the vector memory are one block; 4 divides 8 images, 5 does not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 128)), jnp.float32)
    expected = tpu_attention.tpu_attention(x, x, x, 4, 3, True)
    block = 8 * 3 * 128 * 4  # bytes of an image: three inputs and the result, twice
    monkeypatch.setattr(tpu_attention, "BLOCK_BYTES", (images + images // 4) * block)
    np.testing.assert_array_equal(tpu_attention.tpu_attention(x, x, x, 4, 3, True), expected)


def test_every_device_attends_to_its_own_images(monkeypatch):
    """On the devices of a mesh; a batch that does not divide, as in initialization, takes XLA."""
    interpreted = lambda q, k, v, num_heads, num_keys: tpu_attention.tpu_attention(
        q, k, v, num_heads, num_keys, True
    )
    monkeypatch.setattr(attention, "tpu_attention", interpreted)
    mesh = make_mesh(fsdp=2)
    fused = AttentionImpl(frozenset([(5, 2, 8)]), "tpu", mesh)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(mesh.size, 5, 2, 8)), jnp.float32)

    def run(implementation, x):
        return jax.value_and_grad(lambda x: jnp.square(implementation(x, x, x, 5)).sum())(x)

    for batch in (x, x[:1]):
        actual = jax.jit(run, static_argnums=0)(fused, batch)
        expected = run(AttentionImpl(), batch)
        for a, b in zip(actual, expected):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * jnp.abs(b).max())
