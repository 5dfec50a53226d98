"""Mixup, CutMix and random erasing of normalised images, and the soft labels that go with them.

Mixup (Zhang et al. 2018) blends an image with its partner, CutMix (Yun et al. 2019) pastes a box
of it. As in the reference: the partner of row i of a batch is row i from its end.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

MODES = ("batch", "pair", "elem")
ATTEMPTS = 10  # at a box to erase that fits into the image


class Mix(NamedTuple):
    """How the images of a batch are mixed with their partners.

    share: of its own that an image and its label keep, the papers' lambda; cut: paste the box
    instead of blending; box: top, bottom, left and right of what is pasted, pixels, ends excluded.
    """

    lam: Float[Array, " b"]
    is_cutmix: Bool[Array, " b"]
    box: Int[Array, "b 4"]


def cutmix_box(
    lam: Float[Array, " b"],
    centre: Int[Array, "b 2"],
    image_size: tuple[int, int],
) -> tuple[Int[Array, "b 4"], Float[Array, " b"]]:
    """A box of about 1 - lam of the image around (y, x), and the lam that it really leaves."""
    height, width = image_size
    cut = jnp.sqrt(1 - lam)
    # As in the reference: sides are cut off to whole pixels and halved, so odd ones lose one.
    half = jnp.stack([(height * cut).astype(int) // 2, (width * cut).astype(int) // 2], axis=1)
    size = jnp.array(image_size)
    low, high = jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)
    box = jnp.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    return box, 1 - jnp.prod(high - low, axis=1) / (height * width)


@dataclass(frozen=True)
class Mixup:
    """Which images are mixed, and how; alphas of 0 switch a kind off.

    mixup, cutmix: of the Beta(alpha, alpha) that shares are drawn from. prob: that there is any
    mixing. switch: probability of CutMix where both are on. mode: one draw for the whole "batch",
    one for each "pair" of partners, or one for each image ("elem").
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch: float = 0.5
    mode: str = "batch"

    def __post_init__(self):
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(
                f"classify.mixup={self.mixup} and classify.cutmix={self.cutmix} must be at least 0"
            )
        for name in ("prob", "switch"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"classify.mixup_{name}={vars(self)[name]} is not within 0 to 1")
        if self.mode not in MODES:
            raise ValueError(f"classify.mixup_mode={self.mode!r}; use one of {', '.join(MODES)}")

    @property
    def active(self) -> bool:
        """Whether anything is mixed at all."""
        return (self.mixup > 0 or self.cutmix > 0) and self.prob > 0

    def sample(self, key: Key[Array, ""], batch: int, image_size: tuple[int, int]) -> Mix:
        """The mixing of a batch, at least one alpha being above 0."""
        keys = jax.random.split(key, 5)
        if self.mixup > 0 and self.cutmix > 0:
            cut = jax.random.bernoulli(keys[0], self.switch, (batch,))
        else:
            cut = jnp.full((batch,), self.cutmix > 0)
        blend, paste = (
            jax.random.beta(key, alpha or 1.0, alpha or 1.0, (batch,))
            for key, alpha in zip(keys[1:3], (self.mixup, self.cutmix))
        )
        mixed = jax.random.bernoulli(keys[3], self.prob, (batch,))
        centre = jax.random.randint(keys[4], (batch, 2), 0, jnp.array(image_size))
        box, own = cutmix_box(paste, centre, image_size)
        mix = Mix(jnp.where(mixed, jnp.where(cut, own, blend), 1.0), cut & mixed, box)
        rows = jnp.arange(batch)
        if self.mode == "batch":
            rows = jnp.zeros_like(rows)
        if self.mode == "pair":
            rows = jnp.minimum(rows, batch - 1 - rows)
        return Mix(*(x[rows] for x in mix))


def mix_images(pixels: Float[Array, "b h w c"], mix: Mix) -> Float[Array, "b h w c"]:
    """Every image with its partner's pixels blended or pasted in."""
    share, partner = mix.lam[:, None, None, None], pixels[::-1]
    inside = _inside(mix.box, (pixels.shape[1], pixels.shape[2]))[..., None]
    blended = pixels * share + partner * (1 - share)
    return jnp.where(
        mix.is_cutmix[:, None, None, None], jnp.where(inside, partner, pixels), blended
    )


def mix_targets(targets: Float[Array, "b classes"], mix: Mix) -> Float[Array, "b classes"]:
    """Soft labels, mixed by the same shares."""
    share = mix.lam[:, None]
    return targets * share + targets[::-1] * (1 - share)


def _inside(box: Int[Array, "b 4"], image_size: tuple[int, int]) -> Bool[Array, "b h w"]:
    row, column = jnp.indices(image_size)
    top, bottom, left, right = (side[:, None, None] for side in box.T)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def random_erasing(
    key: Key[Array, ""], pixels: Float[Array, "b h w c"], prob: float
) -> Float[Array, "b h w c"]:
    """Random erasing (Zhong et al. 2020): N(0, 1) noise in a box of some of the images.

    As in the reference: area 2 % to 1/3 of the image, aspect 0.3 to 1 / 0.3, the first of ten
    attempts that fits inside.
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
