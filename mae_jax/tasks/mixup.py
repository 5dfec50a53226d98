"""Mixup, CutMix and random erasing of normalized images, with soft labels.

Mixup (Zhang et al. 2018) blends an image with its partner, CutMix (Yun et al. 2019) pastes a box of
the partner. As in the reference: the partner of row i of a batch is row -1 - i.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mae_jax.utils.errors import UserError

MODES = ("batch", "pair", "elem")
ATTEMPTS = 10  # at sampling a box that fits into the image, in random erasing


class Mix(NamedTuple):
    """How the images of a batch are mixed with their partners.

    lam: the papers' lambda, the weight of an image and its label against the partner's;
    is_cutmix: paste the box instead of blending; box: top, bottom, left and right of the pasted
    box, pixels, bottom and right excluded.
    """

    lam: Float[Array, " b"]
    is_cutmix: Bool[Array, " b"]
    box: Int[Array, "b 4"]


def cutmix_box(
    lam: Float[Array, " b"],
    center: Int[Array, "b 2"],
    image_size: tuple[int, int],
) -> tuple[Int[Array, "b 4"], Float[Array, " b"]]:
    """Return the box of area 1 - lam around (y, x), clipped to the image, and the exact lam."""
    height, width = image_size
    ratio = jnp.sqrt(1 - lam)
    # As in the reference: sides are truncated to pixels, then halved, so odd sides lose a pixel.
    half = jnp.stack([(height * ratio).astype(int) // 2, (width * ratio).astype(int) // 2], axis=1)
    size = jnp.array(image_size)
    low, high = jnp.clip(center - half, 0, size), jnp.clip(center + half, 0, size)
    box = jnp.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    return box, 1 - jnp.prod(high - low, axis=1) / (height * width)


@dataclass(frozen=True)
class Mixup:
    """Distribution of mixup and CutMix.

    mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of lambda, 0 is off. prob: of any
    mixing. switch: probability of CutMix if both are on. mode: sample once per "batch", per "pair"
    of partners, or per image ("elem").
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5
    mode: str = "batch"

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            value = vars(self)[name]
            if not value >= 0:
                raise UserError("must be at least 0", key=f"classify.{name}", value=value)
        for name in ("prob", "switch"):
            value = vars(self)[name]
            if not 0 <= value <= 1:
                raise UserError("must be within 0 to 1", key=f"classify.mixup_{name}", value=value)
        if self.mode not in MODES:
            problem = f"must be one of {', '.join(MODES)}"
            raise UserError(problem, key="classify.mixup_mode", value=self.mode)

    @property
    def active(self) -> bool:
        """Whether any images are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.prob > 0

    def sample(self, key: Key[Array, ""], batch: int, image_size: tuple[int, int]) -> Mix:
        """Sample how to mix a batch; at least one alpha must be above 0."""
        keys = jax.random.split(key, 5)
        if self.mixup > 0 and self.cutmix > 0:
            is_cutmix = jax.random.bernoulli(keys[0], self.switch, (batch,))
        else:
            is_cutmix = jnp.full((batch,), self.cutmix > 0)
        mixup_lam, cutmix_lam = (
            jax.random.beta(key, alpha or 1.0, alpha or 1.0, (batch,))
            for key, alpha in zip(keys[1:3], (self.mixup, self.cutmix))
        )
        mixed = jax.random.bernoulli(keys[3], self.prob, (batch,))
        center = jax.random.randint(keys[4], (batch, 2), 0, jnp.array(image_size))
        box, cutmix_lam = cutmix_box(cutmix_lam, center, image_size)
        lam = jnp.where(mixed, jnp.where(is_cutmix, cutmix_lam, mixup_lam), 1.0)
        mix = Mix(lam, is_cutmix & mixed, box)
        rows = jnp.arange(batch)
        if self.mode == "batch":
            rows = jnp.zeros_like(rows)
        if self.mode == "pair":
            rows = jnp.minimum(rows, batch - 1 - rows)
        return Mix(*(x[rows] for x in mix))


def mix_images(pixels: Float[Array, "b h w c"], mix: Mix) -> Float[Array, "b h w c"]:
    """Blend every image with its partner, or paste the partner's box into it."""
    lam, partner = mix.lam[:, None, None, None], pixels[::-1]
    inside = _inside(mix.box, (pixels.shape[1], pixels.shape[2]))[..., None]
    blended = pixels * lam + partner * (1 - lam)
    return jnp.where(
        mix.is_cutmix[:, None, None, None], jnp.where(inside, partner, pixels), blended
    )


def mix_targets(targets: Float[Array, "b classes"], mix: Mix) -> Float[Array, "b classes"]:
    """Mix soft labels with the same lambda as the images."""
    lam = mix.lam[:, None]
    return targets * lam + targets[::-1] * (1 - lam)


def _inside(box: Int[Array, "b 4"], image_size: tuple[int, int]) -> Bool[Array, "b h w"]:
    row, column = jnp.indices(image_size)
    top, bottom, left, right = (side[:, None, None] for side in box.T)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def random_erasing(
    key: Key[Array, ""], pixels: Float[Array, "b h w c"], prob: float
) -> Float[Array, "b h w c"]:
    """Random erasing (Zhong et al. 2020): fill a box with N(0, 1) noise, with probability `prob`.

    As in the reference: area 2 % to 1/3 of the image, aspect ratio 0.3 to 1 / 0.3, and the first of
    ten attempts that fits inside.
    """
    batch, height, width, _ = pixels.shape
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (batch, ATTEMPTS), minval=0.02, maxval=1 / 3)
    log_aspect = jax.random.uniform(keys[1], (batch, ATTEMPTS), minval=-1.0, maxval=1.0)
    aspect = jnp.exp(log_aspect * jnp.log(1 / 0.3))
    sides = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=-1)
    sides = jnp.round(sides * (height * width) ** 0.5).astype(int)
    size = jnp.array([height, width])
    fits = (sides < size).all(axis=-1)
    first = jnp.argmax(fits, axis=1)
    sides = sides[jnp.arange(batch), first]
    erased = fits.any(axis=1) & jax.random.bernoulli(keys[2], prob, (batch,))
    low = jax.random.randint(keys[3], (batch, 2), 0, jnp.maximum(size - sides, 0) + 1)
    high = low + sides
    box = jnp.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    inside = _inside(box, (height, width)) & erased[:, None, None]
    return jnp.where(inside[..., None], jax.random.normal(keys[4], pixels.shape), pixels)
