"""Principal components (PCA) of any number of vectors, from their covariance in one pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from mae_jax.utils.cli import pluralize
from mae_jax.utils.errors import UserError

CONSTANT = 1e-12  # variance over the mean square: below it, only float32 rounding is left
CHUNK = 4096  # vectors at a time


class Moments:
    """Count, mean and scatter matrix of vectors, added batch by batch: 8 d (d + 1) bytes.

    A batch is centered in float32 on the device, and added in float64 (Chan et al. 1983).
    """

    def __init__(self) -> None:
        self.count: float = 0.0
        self.mean: Float[np.ndarray, " d"] = np.zeros(1)
        self.scatter: Float[np.ndarray, "d d"] = np.zeros((1, 1))

    def add(self, vectors: Shaped[Array, "*b d"], weights: Shaped[Array, "*b"]) -> None:
        """Add the vectors whose weight is 1; those of weight 0 are ignored."""
        count, mean, scatter = (np.float64(x) for x in jax.device_get(_moments(vectors, weights)))
        if not count:
            return
        total, difference = self.count + count, mean - self.mean
        between = np.outer(difference, difference) * self.count * count / total
        self.scatter = self.scatter + scatter + between
        self.mean = self.mean + difference * count / total
        self.count = float(total)


@jax.jit
def _moments(vectors: Array, weights: Array) -> tuple[Array, Array, Array]:
    weights = weights.reshape(-1, 1).astype(jnp.float32)
    vectors = vectors.reshape(-1, vectors.shape[-1]).astype(jnp.float32)
    count = weights.sum()
    mean = (weights * vectors).sum(axis=0) / jnp.maximum(count, 1)
    centered = weights * (vectors - mean)
    scatter = jnp.matmul(centered.T, centered, precision=jax.lax.Precision.HIGHEST)
    return count, mean, scatter


@dataclass(frozen=True)
class Pca:
    """The components of largest variance, in descending order; the largest entry is positive.

    deviations: standard deviation along each component, 0 where vectors do not vary; variance: of
    the vectors, over all components.
    """

    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "k d"]
    deviations: Float[np.ndarray, " k"]
    variance: float

    @classmethod
    def fit(cls, moments: Moments, k: int, what: str) -> "Pca":
        """Return the first k components (at most d) of vectors; errors call these `what`.

        Raises:
          UserError: the vectors are all the same.
        """
        variances, vectors = np.linalg.eigh(moments.scatter / max(moments.count, 1))
        rounding = CONSTANT * (moments.mean @ moments.mean)
        if variances.sum() <= rounding:
            raise UserError(
                f"{what} have all the same features, so these have no principal components: give "
                "images that differ, and check that the weights are trained"
            )
        deviations = np.where(variances > rounding, variances, 0)[::-1][:k] ** 0.5
        components = vectors[:, ::-1].T[:k]
        largest = np.abs(components).argmax(axis=1, keepdims=True)
        components = components * np.sign(np.take_along_axis(components, largest, axis=1))
        return cls(moments.mean, components, deviations, float(variances.sum()))

    def project(self, vectors: Shaped[Array, "*b d"]) -> Float[Array, "*b k"]:
        """Return the coordinates along the components, in float32."""
        return _project(vectors, self.mean, self.components)


@jax.jit
def _project(vectors: Array, mean: Array, components: Array) -> Array:
    centered = vectors.astype(jnp.float32) - mean.astype(jnp.float32)
    components = components.astype(jnp.float32)
    return jnp.matmul(centered, components.T, precision=jax.lax.Precision.HIGHEST)


def project_all(
    vectors: Float[np.ndarray, "n d"], k: int, what: str
) -> tuple[Float[np.ndarray, "n k"], Pca]:
    """Return the coordinates of vectors along their own first components.

    Raises:
      UserError: as `Pca.fit`.
    """
    starts = range(0, len(vectors), CHUNK)
    chunk = lambda start: jnp.asarray(vectors[start : start + CHUNK])
    moments = Moments()
    for start in starts:
        rows = chunk(start)
        moments.add(rows, jnp.ones(len(rows)))
    pca = Pca.fit(moments, k, what)
    return np.concatenate([np.asarray(pca.project(chunk(start))) for start in starts]), pca


class PatchMoments:
    """Moments of the patches of `count` images, for each of several layers.

    Args:
      layers: names of dense features [b, y, x, d].
      count: number of images; those of the last batch beyond it are padding.
      select: returns which patches count, by layer and dense features; all by default.
    """

    def __init__(
        self,
        layers: Iterable[str],
        count: int,
        select: Callable[[str, Array], Bool[Array, "#b y x"]] | None = None,
    ):
        self.moments = {layer: Moments() for layer in layers}
        self.count, self._left, self._select = count, count, select

    def add(self, features: Mapping[str, Array]) -> None:
        """Add the next batch of images."""
        for layer, moments in self.moments.items():
            grid = features[layer]
            weights = (jnp.arange(len(grid)) < self._left)[:, None, None]
            weights = jnp.broadcast_to(weights, grid.shape[:3])
            if self._select:
                weights &= self._select(layer, grid)
            moments.add(grid, weights)
        self._left -= len(next(iter(features.values())))

    def fit(self, k: int, what: str) -> dict[str, "Pca"]:
        """Return the first k components in each layer."""
        what = f"{what} of {pluralize(self.count, 'image')}"
        return {layer: Pca.fit(moments, k, what) for layer, moments in self.moments.items()}


def select_border(layer: str, grid: Float[Array, "b y x d"]) -> Bool[Array, "1 y x"]:
    """Return which patches are at the border of an image."""
    return jnp.ones((1, *grid.shape[1:3]), bool).at[:, 1:-1, 1:-1].set(False)


@dataclass(frozen=True)
class Foreground:
    """Patches on one side of the mean, along the first component of all patches.

    It is the side where the mean of the patches at the border of the images is not.
    """

    pca: Pca
    sign: float

    @classmethod
    def fit(cls, pca: Pca, border: Moments) -> "Foreground":
        """Separate patches by their first component, and by the patches at the border."""
        side = pca.project(jnp.asarray(border.mean))[0]
        return cls(pca, 1.0 if side < 0 else -1.0)

    def select(self, grid: Float[Array, "b y x d"]) -> Bool[Array, "b y x"]:
        """Return which patches are foreground."""
        return self.sign * self.pca.project(grid)[..., 0] > 0


@dataclass(frozen=True)
class PatchColors:
    """Colors of patches: three components as red, green and blue; the background is black.

    A channel is 0 two deviations below the mean, and 255 two above.
    """

    pca: Pca
    foreground: Foreground | None = None

    def __call__(self, grid: Float[Array, "b y x d"]) -> UInt8[np.ndarray, "b y x 3"]:
        """Return the color of every patch."""
        scale = np.where(self.pca.deviations > 0, 4 * self.pca.deviations, np.inf)
        colors = (0.5 + np.asarray(self.pca.project(grid)) / scale).clip(0, 1)
        if self.foreground:
            colors = colors * np.asarray(self.foreground.select(grid))[..., None]
        return (255 * colors).round().astype(np.uint8)


def color_patches(grid: Float[np.ndarray, "b y x d"]) -> UInt8[np.ndarray, "b y x 3"]:
    """Return the colors of patches by their own components; black if all are the same."""
    moments = Moments()
    moments.add(jnp.asarray(grid), jnp.ones(grid.shape[:3]))
    try:
        return PatchColors(Pca.fit(moments, 3, "the patches"))(jnp.asarray(grid))
    except UserError:
        return np.zeros((*grid.shape[:3], 3), np.uint8)


def fit_colors(
    patches: PatchMoments,
    border: PatchMoments,
    second_pass: Callable[[Callable[[Mapping[str, Array]], None]], object],
) -> dict[str, PatchColors]:
    """Return the colors of patches in each layer; of the foreground, if there is a border.

    Args:
      patches: all patches of the images.
      border: those at the border, in the layers of which the foreground is wanted.
      second_pass: calls a function of the features of a batch for all images again.

    Raises:
      UserError: the patches, or those of the foreground, are all the same.
    """
    whole = patches.fit(3, "--pca: the patches")
    if not border.moments:
        return {layer: PatchColors(pca) for layer, pca in whole.items()}
    sides = {layer: Foreground.fit(pca, border.moments[layer]) for layer, pca in whole.items()}
    inside = PatchMoments(sides, patches.count, lambda layer, grid: sides[layer].select(grid))
    second_pass(inside.add)
    pcas = inside.fit(3, "--foreground: the foreground patches")
    return {layer: PatchColors(pca, sides[layer]) for layer, pca in pcas.items()}
