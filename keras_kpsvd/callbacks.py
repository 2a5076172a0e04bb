"""`CurvatureMonitor`, the Keras callback that writes down what the curvature of a training run looks like.

And what mends the files that Keras's own `BackupAndRestore` leaves when a run is killed.
"""

from __future__ import annotations

import csv as csv_format
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_kpsvd.arguments import check_count, is_number
from keras_kpsvd.backups import is_whole, mend_backup
from keras_kpsvd.curvature.observation import QUANTITIES, Observer
from keras_kpsvd.optimizer import KPSVD

__all__ = ["CurvatureMonitor", "is_whole", "mend_backup"]

COLUMNS = ("layer", "update", *(name for name in QUANTITIES if name != "update"))


class CurvatureMonitor(keras.callbacks.Callback):
    """Watches the Fisher approximations, preconditioners and steps of a model that `KPSVD` trains.

    Observes refreshes of the factors, those that the budget allows, and writes of each block of each instrumented
    layer (a grouped convolution has several: `layer/block_0`, …):

    - `error_1`: `‖F − F̂‖_F / ‖F‖_F` (Koroko et al. 2023, arXiv:2201.10285, §5.1), without a dense matrix. `F` is the
      Fisher block of the first `rows` of this refresh's own samples, `F̂` the averaged factors that the optimizer holds
      after it. With `factor_decay=0` and `rows` no fewer than the samples it is the paper's error. With fewer rows than
      the factors were made of it holds their sampling noise too. Resolved to about 1e-3 in float32.
    - `sigma_1`, `sigma_2`: the leading singular values of `R(F)` of these samples (the paper's §3). `σ₂/σ₁` says
      whether a second Kronecker term could help. Exact for one position per example; for convolutions and sequences as
      a rule good to 1e-4 `σ₁` (`curvature.observation`). In units of `F`.
    - `eigenvalue_max`, `eigenvalue_min`: of the damped `A_λ ⊗ G_λ` that the preconditioner in force inverts, or of the
      damped diagonal where eigenvalues are corrected (`error_1` is of `A ⊗ G` then too); of a two-term method, its
      first term. 1 before there is a preconditioner.
    - of the step, the same for all layers: `update` (the number of updates before it), `damping` (λ, less what is taken
      off where factors are damped too; the optimizer's variable of that name is without that), `rate` and `momentum` as
      used, `kl_scale`: the factor by which `kl_clip` shortened a given rate; with the adaptive rate the trusted part of
      the step (`curvature.step_control`); and `refresh_seconds`: wall time of drawing the samples, of the refresh and,
      where one was due, of the inversion.

    Where they go: into `records`; into a CSV file; into TensorBoard; and at the end of each epoch, those of the last
    observed refresh, into `logs` as `layer/quantity`, so that `History`, progress bars and other callbacks after this
    one have them. Nothing of the training changes, nor what is saved: weights and the optimizer's state keep every bit.

    What it costs: the first step takes longer to trace, and a model that was trained without a monitor before is traced
    anew. From then on, at most `budget` of the wall time. Without a monitor nothing is added to the step.

    A fit that was broken off does not end its monitor: the next one with a monitor does.

    Args:
        csv: path of a file with a line per block and observed refresh, written as epochs end. An existing one is
            continued, as a run that is resumed needs it. None: no file.
        tensorboard: a log directory. Scalars are `layer/quantity` by number of updates. None: no events.
        budget: the largest part of the wall time of training spent on observing, in (0, 1]. The first refresh of a fit
            is always observed; later ones are passed over while the time spent would be more. None: all are observed.
        rows: how many samples of a refresh are used, 128 at most by default; fewer where memory asks for it. With
            `fisher="exact"` an example counts as often as it has outputs.
        log_quantities: which quantities go into `logs`; progress bars print them all. None: all of them.

    Attributes:
        records: a dict for each block and observed refresh, `layer` and every quantity, in the order of their making.

    Raises:
        ValueError: an argument out of range, by name, when the object is made. Before training: an optimizer that is no
            `KPSVD`, or a file at `csv` that has other columns.
    """

    def __init__(
        self,
        csv: str | os.PathLike | None = None,
        tensorboard: str | os.PathLike | None = None,
        budget: float | None = 0.02,
        rows: int = 128,
        log_quantities: Iterable[str] | None = None,
    ):
        super().__init__()
        for argument, path in (("csv", csv), ("tensorboard", tensorboard)):
            if path is not None and (not isinstance(path, str | os.PathLike) or not os.fspath(path)):
                raise ValueError(f"`{argument}` must be a path or None. Received: {argument}={path!r}")
        if budget is not None and not (is_number(budget) and 0 < budget <= 1):
            raise ValueError(f"`budget` must be a number in (0, 1] or None. Received: budget={budget!r}")
        check_count("rows", rows)
        self.log_quantities = QUANTITIES if log_quantities is None else _checked_quantities(log_quantities)
        self.csv = None if csv is None else Path(csv)
        self.tensorboard = None if tensorboard is None else os.fspath(tensorboard)
        self.rows = int(rows)
        self.budget = Budget(None if budget is None else float(budget))
        self.records: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, Any]] = {}
        self._unwritten: list[dict[str, Any]] = []
        self._writer: tf.summary.SummaryWriter | None = None

    def due(self) -> int:
        """How many samples of the refresh that begins are to be used; see `curvature.observation.Sink`."""
        return self.rows if self.budget.allows() else 0

    def receive(self, records: list[dict[str, Any]], seconds: float) -> None:
        """Keeps an observed refresh; see `curvature.observation.Sink`."""
        self.records += records
        self._unwritten += records
        self._last.update((record["layer"], record) for record in records)
        self.budget.observed(seconds)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Puts itself into the step, which is made anew where it was made without a monitor."""
        optimizers = _kpsvd_optimizers(self.model.optimizer)
        if not optimizers:
            raise ValueError(
                "`CurvatureMonitor` watches models that are compiled with `KPSVD`. "
                f"Received: optimizer={type(self.model.optimizer).__name__}"
            )
        if self.csv is not None:
            _prepare(self.csv)
        if self.tensorboard is not None:
            self._writer = tf.summary.create_file_writer(self.tensorboard)
        self._last = {}
        for one in optimizers:
            one.observer = one.observer or Observer()
            one.observer.sink = self
        if any(self.model.train_function not in one.observer.functions for one in optimizers):
            self.model.make_train_function(force=True)
        for one in optimizers:
            one.observer.functions.add(self.model.train_function)
        self.budget.begins()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what was observed, and puts the last of it into `logs`."""
        began = time.perf_counter()
        self._write()
        if logs is not None:
            for layer, record in self._last.items():
                logs.update((f"{layer}/{name}", record[name]) for name in self.log_quantities)
        self.budget.wrote(time.perf_counter() - began)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Observes no more; what it added to the step stays there, and does nothing."""
        self._write()
        for one in _kpsvd_optimizers(self.model.optimizer):
            if one.observer is not None and one.observer.sink is self:
                one.observer.sink = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        if self.csv is not None and self._unwritten:
            with self.csv.open("a", newline="", encoding="utf-8") as file:
                csv_format.DictWriter(file, COLUMNS, lineterminator="\n").writerows(self._unwritten)
        if self._writer is not None and self._unwritten:
            with self._writer.as_default():
                for record in self._unwritten:
                    # One operation for all: one for each scalar would cost as much as observing it.
                    values = [
                        tf.compat.v1.Summary.Value(tag=f"{record['layer']}/{name}", simple_value=record[name])
                        for name in QUANTITIES
                        if name != "update"
                    ]
                    summary = tf.compat.v1.Summary(value=values).SerializeToString()
                    tf.summary.experimental.write_raw_pb(summary, step=record["update"])
            self._writer.flush()
        self._unwritten = []


class Budget:
    """How much wall time goes into observing.

    Args:
        share: the largest part of it; None for no limit.
        clock: seconds.

    Attributes:
        seconds: spent so far.
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter):
        self.share = share
        self.seconds = 0.0
        self._clock = clock
        self._cheapest = math.inf
        self._began = clock()

    def begins(self) -> None:
        """Training does; nothing is spent yet."""
        self.seconds, self._cheapest, self._began = 0.0, math.inf, self._clock()

    def allows(self) -> bool:
        """Whether one more observation, as cheap as the cheapest so far, would stay within the share; the first does.

        The first ones also warm things up, and are no measure of what one costs.
        """
        if self.share is None or self._cheapest == math.inf:
            return True
        return self.seconds + self._cheapest <= self.share * (self._clock() - self._began)

    def observed(self, seconds: float) -> None:
        """An observation took so long."""
        self.seconds += seconds
        self._cheapest = min(self._cheapest, seconds)

    def wrote(self, seconds: float) -> None:
        """Writing took so long."""
        self.seconds += seconds


def _checked_quantities(names: Iterable[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for name in names:
        if name not in QUANTITIES:
            expected = ", ".join(map(repr, QUANTITIES))
            raise ValueError(f"`log_quantities` must be some of {expected}, or None. Received: {name!r}")
    return names


def _kpsvd_optimizers(optimizer: Any) -> list[KPSVD]:
    """The optimizer itself, or those in Keras's `LossScaleOptimizer` and `MultiOptimizer`."""
    inner = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    return [one for one in (optimizer, *inner) if isinstance(one, KPSVD)]


def _prepare(path: Path) -> None:
    """Makes the file with its header, or checks that it has it; a line that a killed run left torn is ended.

    Raises:
        ValueError: it has another one.
    """
    header = ",".join(COLUMNS) + "\n"
    if not path.exists() or path.stat().st_size == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header, encoding="utf-8")
        return
    content = path.read_bytes()
    if not content.startswith(header.encode()):
        raise ValueError(
            f"`csv` must be a new file or one that `CurvatureMonitor` wrote, whose first line is {header.strip()!r}. "
            f"Received: csv={os.fspath(path)!r}, which begins with {content[:40]!r}"
        )
    if not content.endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
