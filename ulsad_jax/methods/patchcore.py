"""Implements PatchCore: the distance of a patch to the nearest one of normal images.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from ulsad_jax.methods.base import Batch, State
from ulsad_jax.methods.rows import Rows, read_seen
from ulsad_jax.runtime import hosts
from ulsad_jax.runtime.rules import Rule, at_least, is_number
from ulsad_jax.scoring.calibration import enlarge_and_blur

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float, Int

TILE = 2048  # most patches of the bank that are compared with all others at once
CANDIDATES, AT_ONCE = 1024, 32  # see `select_coreset`


@dataclasses.dataclass(frozen=True)
class Patchcore(Rows):
    """PatchCore: a bank of patches that cover those of all training images.

    A patch is the average of 3 x 3 features. The bank is a coreset of the training
    patches, chosen in a random projection of theirs. As in the paper, the map is
    enlarged bilinearly and blurred. The paper averages the features of each layer
    before it joins them, and does not standardise them; here they come joined and
    standardised.

    Attributes:
        share: share of the training patches in the bank, which has at least `neighbors`
            patches if there are so many.
        neighbors: number of patches of the bank, b in the paper, around the one nearest
            to an image's most anomalous patch: they reweight the image's score. The
            first of them is that nearest one itself.
        dimensions: number of dimensions of the random projection; patches that have no
            more channels are not projected.
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        "methods.patchcore.share": Rule(
            lambda v: is_number(v) and 0 < v <= 1, "a number above 0, and 1 at most"
        ),
        "methods.patchcore.neighbors": at_least(2),  # of one, weights would be 0
        "methods.patchcore.dimensions": at_least(1),
    }

    splits_model: ClassVar[bool] = True

    share: float = 0.1
    neighbors: int = 9
    dimensions: int = 128

    def describe(
        self, features: Float[Array, "b h w c"], key: jax.Array
    ) -> Float[Array, "b h w c"]:
        """Returns the patches of each image."""
        del key
        return average(features)

    def finish(self, state: State) -> State:
        """Chooses the bank among the patches of the images that were seen."""
        patches = read_seen(state)
        patches = patches.reshape(-1, patches.shape[-1])
        count = max(int(self.share * len(patches)), self.neighbors)
        key = hosts.gather(state.training["key"])  # a key cannot be split
        chosen = choose(
            jax.random.wrap_key_data(key),
            patches,
            count=min(count, len(patches)),
            dimensions=self.dimensions,
        )
        return State(state.step, {"bank": patches[chosen]}, {})

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns the map `nearest`: the distance to the nearest patch of the bank."""
        distances = find_distances(average(batch.features), model["bank"])
        return {"nearest": enlarge_and_blur(distances, batch.image.shape[1:3])}

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns the score `patchcore`: the largest distance, reweighted.

        The weight of equation 7 in the paper is 1 less the softmax, over neighbours of
        the nearest patch, of their distances to the image's patch.
        """
        bank, patches = model["bank"], average(batch.features)
        distances = find_distances(patches, bank)
        distances, patches = (
            x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (distances, patches)
        )
        farthest = distances.argmax(1)
        patch = jnp.take_along_axis(patches, farthest[:, None, None], 1)[:, 0]
        nearest = bank[square_distances(patch, bank).argmin(1)]
        near = -square_distances(nearest, bank)
        _, around = jax.lax.top_k(near, min(self.neighbors, len(bank)))
        others = jnp.sqrt(jnp.square(patch[:, None] - bank[around]).sum(-1))
        weight = 1 - jax.nn.softmax(others, 1)[:, 0]
        return {"patchcore": weight * distances.max(1)}


METHODS = {"patchcore": Patchcore}


def average(x: Float[ArrayLike, "b h w c"]) -> Float[Array, "b h w c"]:
    """Averages 3 x 3 features; those beyond the border are 0 and count."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME") / 9


def square_distances(
    x: Float[Array, "q c"], y: Float[Array, "m c"]
) -> Float[Array, "q m"]:
    """Returns squares of the Euclidean distances between rows, 0 or more."""
    products = jnp.matmul(x, y.T, precision="highest")
    norms = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1)
    return jnp.maximum(norms - 2 * products, 0.0)


def find_distances(
    x: Float[Array, "*n c"], bank: Float[Array, "m c"]
) -> Float[Array, "*n"]:
    """Returns the Euclidean distances to the nearest rows of the bank.

    Only the distances to `TILE` rows of the bank, or fewer, are held at once.
    """
    flat, tiles = x.reshape(-1, x.shape[-1]), -(-len(bank) // TILE)
    size = -(-len(bank) // tiles)

    def compare(i: Int[Array, ""], least: Float[Array, " q"]) -> Float[Array, " q"]:
        # The last tile begins early: it has no rows beyond the bank's.
        start = jnp.minimum(i * size, len(bank) - size)
        # Not a slice, for which a bank that is split over devices would be gathered.
        rows = start + jnp.arange(size)
        tile = jnp.take(bank, rows, axis=0, mode="clip")
        return jnp.minimum(least, square_distances(flat, tile).min(1))

    squares = jax.lax.fori_loop(0, tiles, compare, jnp.full(flat.shape[0], jnp.inf))
    return jnp.sqrt(squares).reshape(x.shape[:-1])


def draw_projection(
    key: jax.Array, channels: int, dimensions: int
) -> Float[Array, "channels dimensions"]:
    """Draws a very sparse random projection, which keeps distances on average.

    Li et al., "Very Sparse Random Projections", KDD 2006: one in sqrt(channels) entries
    is not 0.
    """
    density, shape = channels**-0.5, (channels, dimensions)
    keys = jax.random.split(key)
    signs = jax.random.rademacher(keys[0], shape, jnp.float32)
    is_there = jax.random.bernoulli(keys[1], density, shape)
    return signs * is_there / (density * dimensions) ** 0.5


@functools.partial(jax.jit, static_argnames="count")
def select_coreset(
    points: Float[Array, "n d"], start: Int[ArrayLike, ""], count: int
) -> Int[Array, " count"]:
    """Chooses rows one by one, each the farthest from those chosen before.

    That is the greedy k-center of Gonzalez, "Clustering to Minimize the Maximum
    Intercluster Distance", 1985. A distance to the rows chosen so far only shrinks.
    Among the `CANDIDATES` farthest rows, whose distances are kept up to date, the
    farthest one is therefore the farthest of all, as long as it is farther than the
    others were before. Only then, or after `AT_ONCE` choices, are the distances of all
    rows updated, by one matrix product for all choices.

    Args:
        points: one point in each row.
        start: row that is chosen first.
        count: number of rows to choose, n at most.
    """
    size = min(CANDIDATES, len(points))

    def include(
        nearest: Float[Array, " n"], rows: Int[Array, " r"]
    ) -> Float[Array, " n"]:
        new = square_distances(points, points[rows]).min(1)
        return jnp.minimum(nearest, new).at[rows].set(-1.0)  # no row is chosen twice

    def choose_some(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, total, nearest = state
        far, rows = jax.lax.top_k(nearest, size)
        bound = far[-1] if size < len(points) else -1.0
        x = points[rows]

        def goes_on(inner: tuple[jax.Array, ...]) -> jax.Array:
            chosen, own, _ = inner
            is_full = (chosen == AT_ONCE) | (total + chosen == count)
            # One at least: with NaN, nothing is farthest.
            return ~is_full & ((chosen == 0) | (own.max() >= bound))

        def add(inner: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            chosen, own, new = inner
            i = own.argmax()
            own = jnp.minimum(own, jnp.square(x - x[i]).sum(1)).at[i].set(-1.0)
            return chosen + 1, own, new.at[chosen].set(rows[i])

        # Rows that are not chosen repeat the first one, and are written over.
        inner = jnp.int32(0), far, jnp.full(AT_ONCE, rows[0])
        chosen, _, new = jax.lax.while_loop(goes_on, add, inner)
        found = jax.lax.dynamic_update_slice(found, new, (total,))
        return found, total + chosen, include(nearest, new)

    first = jnp.asarray(start, jnp.int32)[None]
    found = jnp.zeros(count + AT_ONCE, jnp.int32).at[:1].set(first)
    state = found, jnp.int32(1), include(jnp.full(len(points), jnp.inf), first)
    found, *_ = jax.lax.while_loop(lambda s: s[1] < count, choose_some, state)
    return found[:count]


@functools.partial(jax.jit, static_argnames=("count", "dimensions"))
def choose(
    key: jax.Array, patches: Float[Array, "n c"], *, count: int, dimensions: int
) -> Int[Array, " count"]:
    """Returns the rows of a coreset, from a random one on, in a random projection."""
    keys, channels = jax.random.split(key), patches.shape[1]
    if channels > dimensions:
        projection = draw_projection(keys[0], channels, dimensions)
        patches = jnp.matmul(patches, projection, precision="highest")
    start = jax.random.randint(keys[1], (), 0, len(patches))
    return select_coreset(patches, start, count)
