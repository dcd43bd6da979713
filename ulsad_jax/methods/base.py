"""Defines the interface of a method: pure functions that the training loop calls.

A method learns from normal images and returns anomaly maps. Calibration, thresholds,
fusion, scores.csv, the report, prediction, export and sweeps use the names of its maps.
A module of this package lists its methods by name:

    METHODS = {"padim": Padim}
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.struct
import jax

from ulsad_jax.runtime import registry
from ulsad_jax.runtime.errors import UserError, suggest
from ulsad_jax.runtime.rules import Rule
from ulsad_jax.trunks.sources import Batch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from ml_collections import ConfigDict

GRID, LEVELS, IMAGES = "grid", "levels", "images"  # values of `Method.takes`
TOTAL = "total"  # the loss that ranks checkpoints
FROM_RUN = {"from": "run"}  # metadata of fields that are not those of `config.methods`
# Names that would collide with the columns and fields of a result.
RESERVED = ("normalized", "anomaly", "image", "mask")
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Spec(NamedTuple):
    """Shapes of the training data, and how much of it there will be.

    Attributes:
        batch: `Batch` of shapes and dtypes.
        num_images: number of training images.
        num_updates: number of updates of a complete training, for methods whose
            training has phases; 0 if it is not known.
    """

    batch: Batch
    num_images: int
    num_updates: int = 0


@flax.struct.dataclass
class State:
    """State of training.

    Attributes:
        step: int32 [], number of updates so far.
        model: tree of the arrays that inference reads.
        training: tree of the other arrays that updates read, such as the state of an
            optimizer.
    """

    step: Int[Array, ""]
    model: Any
    training: Any


@dataclasses.dataclass(frozen=True)
class Method:
    """Base class of methods: immutable hyperparameters and pure functions.

    Fields must be hashable: equal methods share one compiled program. Those with the
    metadata `FROM_RUN` come from the run, as `dtype` and `axis_name` do. The other
    fields of a subclass are those of `config.methods.<name>`, with their defaults.

    Attributes:
        dtype: computation type, "float32" or "bfloat16".
        axis_name: name of the `jax.pmap` axis over which a batch is split, or None.
    """

    # `GRID` to get standardised features of the trunk on one grid; `LEVELS` to get raw
    # outputs of the trunk by name, those of `config.trunk.layers`; `IMAGES` to get only
    # images, in which case no trunk is loaded.
    takes: ClassVar[str] = GRID
    # Number of passes over the training images; None for that of the config.
    num_epochs: ClassVar[int | None] = None
    # Number of passes over the training images that was published; None for as many as
    # are done here. `published_updates` is for methods that published no passes.
    published_epochs: ClassVar[float | None] = None
    published_updates: ClassVar[float | None] = None
    # True: it reads the loss terms of `config.losses`.
    takes_losses: ClassVar[bool] = False
    # True: a pass sees every image once, in order, and the last batch is padded. False:
    # images are shuffled, and an incomplete last batch is left out.
    sees_every_image: ClassVar[bool] = False
    # True: with `config.parallel.shard_state`, `finish`, `maps` and `scores` get arrays
    # that are split over the devices. False: they get whole arrays.
    splits_model: ClassVar[bool] = False
    # What values of config fields have to be, by the fields' paths.
    rules: ClassVar[Mapping[str, Rule]] = {}

    dtype: str = dataclasses.field(default="float32", metadata=FROM_RUN)
    axis_name: str | None = dataclasses.field(default=None, metadata=FROM_RUN)

    @classmethod
    def from_config(cls, config: ConfigDict, name: str) -> Method:
        """Makes the method from a resolved config.

        Args:
            config: resolved config of a run.
            name: name of the method's fields in `config.methods`.

        Raises:
            UserError: a field of `config.methods.<name>` is unknown; the message names
                it.
        """
        fields = dict(config.methods.get(name, {}))
        declared = dataclasses.fields(cls)
        known = {field.name for field in declared if field.metadata != FROM_RUN}
        for field in sorted(fields.keys() - known):
            raise UserError(
                f"Expected config.methods.{name} to hold fields of {name} "
                f"({', '.join(sorted(known)) or 'it has none'}), found {field!r}. "
                f"Correct it.{suggest(field, known)}"
            )
        return cls(dtype=config.train.dtype, **fields)

    def check(self, spec: Spec) -> str:
        """Checks the method before any data is read or anything is written.

        Args:
            spec: shapes of the batches; `num_images` and `num_updates` are not known
                yet and are 0.

        Returns:
            Warnings to the user, one per line, or an empty string.

        Raises:
            UserError: training cannot succeed.
        """
        del spec
        return ""

    def adapt(self, batch: Batch) -> Method:
        """Returns the method with hyperparameters that depend on the training images.

        It is called before `init`, in every command that trains. The other functions
        are also called on the method as it was before: they have to read what was
        chosen from the shapes of their arrays.

        Args:
            batch: the first training images in order, in host memory.
        """
        del batch
        return self

    def init(self, key: jax.Array, spec: Spec) -> State:
        """Returns the initial state; it may be jitted.

        Args:
            key: random key that determines every random choice.
            spec: shapes of the batches.
        """
        raise NotImplementedError

    def update(
        self, state: State, batch: Batch, key: jax.Array
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """Returns the state after one batch, and the losses before the update by name.

        Args:
            state: state before the update.
            batch: batch of training images.
            key: random key of this update only.
        """
        raise NotImplementedError

    def losses(
        self, model: Any, batch: Batch, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Returns losses by name, averaged over the valid rows of a batch.

        Args:
            model: `State.model`.
            batch: batch of validation normals.
            step: number of updates so far.

        Returns:
            Scalar losses by name. The one named `TOTAL` ranks checkpoints. Empty if the
            method has no losses.
        """
        del model, batch, step
        return {}

    def finish(self, state: State) -> State:
        """Returns the state to validate and save as a checkpoint.

        It is called outside any jitted function. Arrays may change shape, and may be
        NumPy's. Updates go on with `state.training`, and with `state.model` or, after
        resuming, with the model that was returned here.
        """
        return state

    def maps(self, model: Any, batch: Batch) -> dict[str, Float[Array, "b h w"]]:
        """Returns anomaly maps by name, at image size; larger is more anomalous.

        Args:
            model: `State.model` of a finished state.
            batch: batch of any images; `valid` is ignored.
        """
        raise NotImplementedError

    def scores(self, model: Any, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Returns image scores by name, in addition to those of the maps.

        Args:
            model: `State.model` of a finished state.
            batch: batch of any images; `valid` is ignored.

        Returns:
            Scores [b], larger is more anomalous. Empty if there are only maps.
        """
        del model, batch
        return {}

    def trace(self, numbers: Mapping[str, Any]) -> Method:
        """Returns the method with some hyperparameters replaced by traced arrays.

        Args:
            numbers: scalar arrays by config field, for fields that `traceable` accepts;
                empty outside sweeps.
        """
        assert not numbers, numbers
        return self

    @classmethod
    def traceable(cls, field: str, values: list[Any]) -> bool:
        """Returns whether one program can train sweep members that differ in a field.

        Args:
            field: path of a config field.
            values: values of the field, one per member.
        """
        del field, values
        return False

    def estimate_bytes(self, spec: Spec) -> int:
        """Estimates the device memory that a training step needs, in bytes."""
        state = jax.eval_shape(lambda key: self.init(key, spec), jax.random.key(0))
        return 2 * (count_bytes(state) + count_bytes(spec.batch))


def find(reference: str) -> type[Method]:
    """Returns the method that `config.method` names.

    Args:
        reference: name of a built-in method, or "module:attribute"; or several, joined
            with "+", see `branches.combine`.

    Raises:
        UserError: there is no such method, or the name refers to something else.
    """
    parts = reference.split("+")
    if len(parts) > 1:
        from ulsad_jax.methods.branches import combine  # it is made from this module

        return combine(tuple(parts))
    known = registry.collect("ulsad_jax.methods", "METHODS")
    found = registry.find(reference, known, field="config.method")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"Expected config.method = {reference!r} to be a class made from "
            f"ulsad_jax.methods.base.Method, found {found!r}. Name one."
        )
    return found


def make(config: ConfigDict) -> Method:
    """Makes the method of a resolved config."""
    return find(config.method).from_config(config, short_name(config.method))


def check_names(maps: Iterable[str], scores: Iterable[str]) -> None:
    """Checks the names of a method's maps and scores.

    Raises:
        UserError: there is no map, or a name is taken or contains other characters than
            letters, digits, "_" and "-".
    """
    names = [*maps, *scores]
    wrong = sorted({n for n in names if n in RESERVED or not NAME.fullmatch(n)})
    wrong += sorted({n for n in names if names.count(n) > 1})
    if wrong:
        raise UserError(
            "Expected maps and scores of config.method to have different names, of "
            f"letters, digits, _ and -, and none of {', '.join(RESERVED)}, found "
            f"{', '.join(map(repr, wrong))}. Rename them."
        )
    if not [*maps]:
        raise UserError(
            f"Expected a config.method with at least one map, found only scores "
            f"({', '.join(names)}). Join it with another, such as ulsad+pooled."
        )


def check_losses(reference: str, fields: Sequence[str]) -> None:
    """Rejects loss terms of one's own for a method that would ignore them.

    Args:
        reference: `config.method`.
        fields: fields of `config.losses` that are set.

    Raises:
        UserError: there are fields, and the method does not read them.
    """
    if fields and not find(reference).takes_losses:
        raise UserError(
            f"Expected no loss terms of yours with config.method={reference}, which "
            f"has none, found values of {', '.join(fields)}. Leave them out, or take "
            "ulsad; a class of your own that reads them says `takes_losses = True`."
        )


def short_name(reference: str) -> str:
    """Returns a method's name in `config.methods`: the part after a colon, if any."""
    return reference.rpartition(":")[2]


def count_batches(num_images: int, batch_size: int, *, whole_only: bool) -> int:
    """Returns the number of batches in a pass over the training images.

    Args:
        num_images: number of training images.
        batch_size: number of images in a batch.
        whole_only: True to leave out an incomplete last batch.
    """
    return num_images // batch_size if whole_only else -(-num_images // batch_size)


def count_bytes(tree: Any) -> int:
    """Returns the size in bytes of a tree of arrays or of shapes."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
