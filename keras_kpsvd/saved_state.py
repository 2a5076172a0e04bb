"""The state of an optimizer in files: what it is the state of, and what happens before there are variables for it."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

KIND = "kind"
EXCLUDED = "excluded_from_weight_decay"
UNCHANGED = "The optimizer's state is unchanged; weights of the model, which Keras loads first, are the file's by now."


class SavedState:
    """Writes and restores the variables of one optimizer, numbered in order as Keras does, with their kind beside them.

    A state that is loaded before the optimizer is built waits for its variables.

    Args:
        optimizer: name, for messages.
        kind: what the numbered variables mean, beyond their shapes.

    Attributes:
        early: the variables that exist before `build`: the counter, and the rate where it is a variable.
    """

    early: Sequence[keras.Variable] = ()

    def __init__(self, optimizer: str, kind: str):
        self.optimizer = optimizer
        self.kind = kind
        self._waiting: Mapping[str, np.ndarray] | None = None

    def save(self, variables: Sequence[keras.Variable], store: Any) -> None:
        """Fills `store`; with a state that still waits, too."""
        values = {**(self._waiting or {}), **{str(index): variable.numpy() for index, variable in enumerate(variables)}}
        values[KIND] = np.frombuffer(self.kind.encode(), np.uint8)
        for name, value in values.items():
            store[name] = value

    def load(self, variables: Sequence[keras.Variable], store: Any, *, built: bool) -> None:
        """Restores all of `variables`, or raises a ValueError and leaves them alone.

        Warns, and leaves them, where the store is empty, or holds another optimizer's state and nothing is built yet.
        """
        self._waiting = None
        keys = set(store.keys())
        if not keys:
            warnings.warn(
                f"The file holds no state of optimizer {self.optimizer!r}, which stays as it is.", stacklevel=3
            )
            return
        numbered, early = keys - {KIND}, len(self.early)
        if not built and len(numbered) > early and KIND not in keys:
            warnings.warn(f"The file holds the state of another optimizer than {self.optimizer!r}.", stacklevel=3)
            return
        self._check_kind(store, keys)
        if len(numbered) == early and (not built or int(self.early[0].numpy()) == 0):  # It never made a step.
            variables = self.early
        elif not built:
            self._waiting = types.MappingProxyType({name: np.asarray(store[name]) for name in keys})
            variables = [v for i, v in enumerate(self.early) if tuple(v.shape) == tuple(store[str(i)].shape)]
        else:
            self._check_shapes(variables, store, len(numbered))
        for index, variable in enumerate(variables):
            variable.assign(store[str(index)])

    def restore_waiting(self, variables: Sequence[keras.Variable]) -> None:
        """Restores what was loaded before there were variables, if anything was; as `load`, and again if refused."""
        if self._waiting is None:
            return
        self._check_shapes(variables, self._waiting, len(self._waiting) - 1)
        for index in range(len(self.early), len(variables)):
            variables[index].assign(self._waiting[str(index)])
        self._waiting = None

    def _check_kind(self, store: Any, keys: set[str]) -> None:
        saved = bytes(np.asarray(store[KIND])).decode() if KIND in keys else self.kind
        if saved != self.kind:
            raise ValueError(
                f"The saved state does not belong to optimizer {self.optimizer!r}: expected that of {self.kind}, "
                f"received that of {saved}. {UNCHANGED}"
            )

    def _check_shapes(self, variables: Sequence[keras.Variable], store: Any, count: int) -> None:
        expected = [tuple(variable.shape) for variable in variables]
        received = [tuple(store[str(index)].shape) for index in range(count)]
        if expected == received:
            return
        differing = next(
            (i for i, (one, other) in enumerate(zip(expected, received, strict=False)) if one != other),
            min(len(expected), len(received)),
        )
        raise ValueError(
            f"The saved state does not belong to optimizer {self.optimizer!r}: expected {len(expected)} variables, "
            f"received {len(received)}, and the shapes differ at number {differing} first. Build it on the same model "
            "with the same method, options and version of keras_kpsvd, load the weights before `compile`, or the model "
            "with `compile=False`. "
            f"{UNCHANGED}"
        )


class SavesExactly:
    """Mixed into a Keras optimizer with an attribute `method`: its state is restored whole or refused."""

    _saved: SavedState | None = None
    _excluded: Mapping[str, list] = types.MappingProxyType({})
    _excluded_keys: frozenset = frozenset()

    def exclude_from_weight_decay(
        self, var_list: list[keras.Variable] | None = None, var_names: list[str] | None = None
    ) -> None:
        """As in every Keras optimizer; unlike theirs, ours is still excluded from after a `.keras` file was loaded."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._excluded_keys = frozenset(self._var_key(variable) for variable in var_list or ())
        paths = [variable.path for variable in var_list or ()]
        self._excluded = {"paths": paths, "places": [], "names": sorted(set(var_names or ()))}

    def _exclude_again(self, variables: list[keras.Variable]) -> None:
        """Notes where among `variables` those are that were excluded, and excludes the ones of a loaded model.

        Those are others. They are found by their places, which are known once an optimizer was built and hold as long
        as the names there agree, else by their paths, whose first parts Keras may leave out of a loaded model's: of a
        model that was saved before its optimizer was built, all variables whose paths end alike are excluded.
        """
        if not self._excluded:
            return
        paths, places, names = (list(self._excluded[key]) for key in ("paths", "places", "names"))
        ends = [path.rpartition("/")[2] for path in paths]
        if self._excluded_keys:
            places = [place for place, one in enumerate(variables) if self._var_key(one) in self._excluded_keys]
        elif not places or [variables[place].name for place in places if place < len(variables)] != ends:
            same = [place for place, one in enumerate(variables) if one.path in paths]
            places = same or [
                place
                for place, one in enumerate(variables)
                if any(f"/{one.path}".endswith(f"/{p}") or f"/{p}".endswith(f"/{one.path}") for p in paths)
            ]
        found = [variables[place] for place in places]
        self._excluded = {"paths": [one.path for one in found], "places": places, "names": names}
        super().exclude_from_weight_decay(found, names)

    def get_config(self) -> dict[str, Any]:
        """Keras's, with what is excluded from weight decay where anything is."""
        config = super().get_config()
        if not self._excluded:
            return config
        # Plain lists: Keras tracks those of its attributes.
        return {**config, EXCLUDED: {name: list(values) for name, values in self._excluded.items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> SavesExactly:
        """The inverse of `get_config`."""
        config = dict(config)
        excluded = config.pop(EXCLUDED, {})
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer._excluded = excluded
        return optimizer

    @property
    def _kind(self) -> str:
        """What the numbered variables of a saved state mean, beyond their shapes."""
        parts = {
            "corrected eigenvalues": self.eigenvalues == "corrected",
            "averages": self.use_ema,
            "accumulators": self.gradient_accumulation_steps,
        }
        return ", ".join([f"method {self.method!r}", *(name for name, there in parts.items() if there)])

    @property
    def _saved_state(self) -> SavedState:
        if self._saved is None:
            self._saved = SavedState(self.name, self._kind)
        self._saved.early = [one for one in (self._iterations, self._learning_rate) if isinstance(one, keras.Variable)]
        return self._saved

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, and what it is the state of."""
        self._saved_state.save(self.variables, store)

    def load_own_variables(self, store: Any) -> None:
        """Restores the state, or raises where it does not match variable for variable; live state is then left alone.

        A weights file without any optimizer's state, or with that of one that never made a step, is no error. An
        optimizer that is not built yet restores when it is; the state of another optimizer it leaves.
        """
        self._saved_state.load(self.variables, store, built=self.built)
