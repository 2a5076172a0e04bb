"""`KPSVD`, the optimizer: it schedules, keeps state and calls down; the mathematics is in `curvature` and `linalg`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import keras
import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.arguments import (
    KL_CLIP,
    check_branches,
    check_choice,
    check_combinations,
    check_count,
    check_fraction,
    check_positive,
    check_rate,
    check_seed,
    check_strategy,
    check_switch,
    check_terms,
    is_number,
    resolve_seed,
)
from keras_kpsvd.averages import AveragesOfStepsTaken
from keras_kpsvd.curvature.approximations import TWO_TERM_METHODS, check_method
from keras_kpsvd.curvature.natural_gradient import NaturalGradient, StepOptions
from keras_kpsvd.curvature.options import EIGENVALUES, CurvatureOptions
from keras_kpsvd.curvature.samples import check_fisher
from keras_kpsvd.curvature.state import LayerCurvature
from keras_kpsvd.interrupts import uninterrupted
from keras_kpsvd.layers import Recorder, layers_of
from keras_kpsvd.linalg import DampingRule, IndefiniteRule
from keras_kpsvd.reporting import tell_of_fallback, tell_of_unused_rate
from keras_kpsvd.saved_state import SavesExactly
from keras_kpsvd.steps import WholeSteps
from keras_kpsvd.tracing import ThrownAwayTrace, outside_the_trace, uncollected

PLAIN_RATE = 0.01

# Updates between exact quadratic models without conjugate gradients.
FIT_INTERVAL = 20


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVD(WholeSteps, AveragesOfStepsTaken, SavesExactly, keras.optimizers.SGD):
    """Natural gradient with Kronecker-product-SVD approximations of the Fisher matrix.

    Trains the weights of instrumented layers (`KPSVDDense`, …) by the gradient preconditioned with a damped Kronecker
    approximation of each layer's Fisher block (Koroko et al. 2023, arXiv:2201.10285), all other variables by SGD with
    momentum. Used as any Keras optimizer is: `model.compile(optimizer=KPSVD(), loss=…)`, then `fit`.

    The curvature is that of the loss as compiled: its generalised Gauss–Newton matrix, `E[∇log p ∇log pᵀ]/c` for a loss
    that Keras averages over `c` outputs. A unit step is Newton-like whatever the width of the output.

    By default nothing has to be tuned: step length and momentum are found from the quadratic model of the loss with
    exact products, which are carried on from step to step in between (`curvature.step_control`,
    `curvature.extrapolation`). With `conjugate_steps` the direction is found from exact products too. With a number or
    schedule as `learning_rate` the step is the paper's: that rate times the preconditioned gradient, shortened to the
    KL bound, through SGD's momentum.

    The first step of `fit` already has curvature (of an eager `fit` or a hand-written loop from the second: there the
    first call of `apply` makes the state, and takes a plain gradient step at rate 0.01 or the given one). A step whose
    gradient holds NaN or Inf is skipped whole, with a RuntimeWarning: weights, momentum and curvature keep every bit. A
    layer whose decomposition fails keeps its last good preconditioner (with corrected eigenvalues its factors too), or
    takes a plain gradient step if it has none.
    Where either happens 20 times in a row, training ends with an InvalidArgumentError that names the layers.

    On several devices (`tf.distribute.MirroredStrategy` in `fit`, `MultiWorkerMirroredStrategy` in hand-written loops)
    a step is that of one device with the whole batch: statistics weight every example alike. The gradient is Keras's,
    which on a batch that does not split evenly is the mean of the replicas' means.

    Args:
        learning_rate: "adaptive", or a float, `LearningRateSchedule` or callable as in every Keras optimizer. With
            "adaptive", rate and momentum minimise the quadratic model along the preconditioned gradient and the
            previous step (Martens & Grosse 2015, §7), shortened where the logits of a "categorical" or "bernoulli"
            output would move by more than 2 (root mean square), where layers together would change by more than
            themselves, and for batches smaller than the usual. Variables of other layers train at the rate 0.01
            (`optimizer.learning_rate` sets it).
        method: "kfac", "kpsvd", "deflation", "lanczos" or "kfac_corrected"; see `approximate_fisher`. In training the
            second term of the two-term methods is the best one with symmetric factors.
        eigenvalues: by what the preconditioner divides in the eigenbasis of a one-term method's factors: "kronecker",
            the products of their own eigenvalues, or "corrected", the diagonal that the Fisher block itself has there
            (EKFAC, George et al. 2018), damped by λ, and like the factors where a batch says little: where λ leaves
            five directions or more free for each target, or few examples make up the Fisher (`curvature.corrected`).
            Needs a sixth to a third fewer epochs on the auto-encoders, at the same cost. None: "corrected" with the
            adaptive rate and a one-term method. Of a factor of more than 128 rows either way 64 eigenpairs are kept,
            and the mean of its other eigenvalues stands for each of them; of a second term 64 likewise, and no others.
        momentum: SGD's momentum in [0, 1], `v ← momentum·v − rate·Δ`; with the adaptive rate the upper bound of the
            momentum found, `(−rate, momentum) = −M⁻¹(∇ᵀΔ, ∇ᵀδ₀)` with `M` the model's curvature along `Δ` and the last
            step `δ₀`.
        nesterov: Nesterov's form of the momentum; not with the adaptive rate.
        damping: the paper's λ, in units of the compiled loss's curvature. "adaptive" starts at 0.002 times the
            curvature along per-example gradients (0.0006 with corrected eigenvalues, a tenth of that where they are
            damped like the factors), stays above a floor that grows as its root and below 1e4 times that curvature, and
            follows how far the quadratic model is right: nothing depends on the scale of the loss
            (`curvature.damping`). A number holds λ.
        damping_rule: "sqrt" adds `π√λ` and `√λ/π` to the factors, `π² = (tr A/d_in)/(tr G/d_out)` (Martens & Grosse
            2015, §6.3); "factor" adds λ to each. The same for every method; corrected eigenvalues may leave it out.
        kl_clip: with a given rate, the bound κ on `rate²·⟨Δ, ∇⟩` (Ba et al. 2017; the paper: 1e-2), to which longer
            steps are scaled down. None switches it off. The adaptive rate needs no such bound: others are refused.
        factor_decay: decay ρ of the moving average of the factors per refresh, in [0, 1), bias-corrected.
        curvature_interval: updates between refreshes of the factors (the paper's T_cov), or "growing": every update at
            first, then less and less often, from the 190th on every twentieth (`curvature.intervals`).
        inverse_interval: updates between rebuilds of the preconditioners (T_inv), likewise; with corrected eigenvalues
            made with the first refresh that comes then.
        conjugate_steps: with the adaptive rate, steps of conjugate gradients on the exact Fisher matrix of the batch
            that the preconditioned gradient is improved by (`curvature.conjugate`). 1: none, `F̂_λ⁻¹∇` itself. 3, with
            "kronecker" eigenvalues, need up to a fifth fewer epochs than the default, of three times the cost.
        fit_interval: with the adaptive rate and `conjugate_steps=1`, updates between exact quadratic models. Those in
            between are extrapolated (`curvature.extrapolation`), except in the first 20 updates, with a new
            preconditioner, for batches of fewer than 128 examples, where the last step overshot or was cut short, and
            where the descent has doubled. 1: never. None: 20, or 1 with more conjugate steps, which need an exact model
            in every step.
        fisher: "sampled" (targets drawn from the model's own predictive distribution), "exact" (the expectation over
            targets, one backward pass for each output, for at most 256 of them), or "empirical" (the actual targets).
        likelihood: "auto" reads it off the compiled loss; "categorical", "bernoulli" and "normal" (variance 1/2, whose
            negative log-density is the squared error) name it; or a callable from the model's output to a
            `tfp.distributions.Distribution`, whose loss is then taken to be the batch mean of `−log p`.
        fisher_batch_size: rows of each batch used for the factors. None: all for "kfac", at most 128 for the others,
            whose exact triples cost the cube of that number. Of layers that share their weights among several
            positions (convolutions, sequences) as many rows as have 4,096 positions, at least 32 and at most 128. Where
            samples are copied, by all but "kfac" with "kronecker" eigenvalues or one position, no more than 256 MiB
            allow for a layer.
        indefinite: by what the second term's part divides, since `1 + x` may be negative: "absolute" `1 + |x|`, which
            never lengthens a step, or "reflect" `1 + x` where that is positive and `1 + |x|` elsewhere. Of no meaning
            for methods of one term.
        seed: of the drawn targets. None takes one from the state of Python's `random`, which
            `keras.utils.set_random_seed` sets, without advancing it; on several processes one must be given. Draws are
            stateless and disturb nobody else's random numbers.
        name: of the optimizer.
        **keras_optimizer_arguments: `weight_decay`, `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`, `gradient_accumulation_steps`, as in every
            Keras optimizer. With accumulation the curvature is that of the last part: parts of a few examples know too
            little of it for the adaptive rate.

    Raises:
        ValueError: an argument out of range, by name, when the object is made; in the first step a loss whose
            predictive distribution is not known.
    """

    _rate_is_unused = False

    def __init__(
        self,
        learning_rate: Any = "adaptive",
        method: str = "kfac",
        eigenvalues: str | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        damping: float | str = "adaptive",
        damping_rule: str = "sqrt",
        kl_clip: float | None = KL_CLIP,
        factor_decay: float = 0.85,
        curvature_interval: int | str = "growing",
        inverse_interval: int | str = "growing",
        conjugate_steps: int = 1,
        fit_interval: int | None = None,
        fisher: str = "sampled",
        likelihood: str | Callable = "auto",
        fisher_batch_size: int | None = None,
        indefinite: str = "absolute",
        seed: int | None = None,
        name: str = "kpsvd",
        **keras_optimizer_arguments: Any,
    ):
        check_method(method)
        check_fisher(fisher)
        likelihoods.check(likelihood, fisher)
        check_choice("damping_rule", damping_rule, get_args(DampingRule))
        check_choice("indefinite", indefinite, get_args(IndefiniteRule))
        if damping != "adaptive":
            check_positive("damping", damping, " or 'adaptive'")
        if kl_clip is not None:
            check_positive("kl_clip", kl_clip, " or None")
        intervals = {"curvature_interval": curvature_interval, "inverse_interval": inverse_interval}
        for argument, interval in intervals.items():
            if interval != "growing":
                check_count(argument, interval, " or 'growing'")
        check_count("conjugate_steps", conjugate_steps)
        check_switch("nesterov", nesterov)
        check_seed(seed)
        adaptive = isinstance(learning_rate, str) and learning_rate == "adaptive"
        if fit_interval is None:
            fit_interval = FIT_INTERVAL if adaptive and conjugate_steps == 1 else 1
        check_count("fit_interval", fit_interval)
        if fisher_batch_size is not None:
            check_count("fisher_batch_size", fisher_batch_size)
        check_fraction("factor_decay", factor_decay, one=False)
        check_fraction("momentum", momentum, one=True)
        if eigenvalues is None:
            eigenvalues = "corrected" if adaptive and method not in TWO_TERM_METHODS else "kronecker"
        check_choice("eigenvalues", eigenvalues, EIGENVALUES, " or None")
        check_terms(eigenvalues, method, two_term=method in TWO_TERM_METHODS)
        together = {"conjugate_steps": conjugate_steps, "fit_interval": fit_interval}
        check_combinations(adaptive=adaptive, nesterov=nesterov, kl_clip=kl_clip, **together)
        if not adaptive:
            check_rate(learning_rate)
            learning_rate = float(learning_rate) if is_number(learning_rate) else learning_rate
        super().__init__(
            learning_rate=PLAIN_RATE if adaptive else learning_rate,
            momentum=float(momentum),
            nesterov=nesterov,
            name=name,
            **keras_optimizer_arguments,
        )
        self.adaptive = adaptive
        self.method = method
        self.eigenvalues = eigenvalues
        self.damping = damping if damping == "adaptive" else float(damping)
        self.damping_rule = damping_rule
        self.kl_clip = None if kl_clip is None else float(kl_clip)
        self.factor_decay = float(factor_decay)
        self.curvature_interval, self.inverse_interval = (
            interval if interval == "growing" else int(interval) for interval in (curvature_interval, inverse_interval)
        )
        self.conjugate_steps = int(conjugate_steps)
        self.fit_interval = int(fit_interval)
        self.fisher = fisher
        self.likelihood = likelihood
        self.fisher_batch_size = fisher_batch_size
        self.indefinite = indefinite
        self._seeded = seed is not None
        self.seed = resolve_seed(seed)
        self._recorder = Recorder(keep_loss=fisher == "empirical", persistent=adaptive or fisher == "exact")

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates all state, finds the instrumented layers that own `variables`, and attaches to them."""
        if self.built:
            return
        check_strategy(self._distribution_strategy, seeded=self._seeded)
        self._exclude_again(variables)
        with outside_the_trace():
            super().build(variables)
            if (self.adaptive or self.damping == "adaptive") and not self.momentums:
                self.momentums = self.add_optimizer_variables(variables, "momentum")
            options = CurvatureOptions(
                self.method, self.damping_rule, self.factor_decay, self.indefinite, self.eigenvalues
            )
            self._blocks = tuple(LayerCurvature(layer, options, self.add_variable) for layer in layers_of(variables))
        self._first_trace = ThrownAwayTrace()
        step = StepOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(StepOptions)})
        self._natural = NaturalGradient(step, self._blocks, self.add_variable)
        curved = {self._var_key(v) for block in self._blocks for v in block.layer.curvature_variables}
        for block in self._blocks:
            block.layer.attach(self._recorder)
        others = [variable for variable in variables if self._var_key(variable) not in curved]
        self._rate_is_unused = not others
        tell_of_fallback(others, all_of_them=not self._blocks)
        with tf.init_scope():
            self._saved_state.restore_waiting(self.variables)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Ends the recording of the forward pass that made `loss`, then scales as Keras does."""
        self._recorder.close(loss)
        return super().scale_loss(loss)

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        """Takes a step with `grads`, as every Keras optimizer does."""
        check_branches(
            self._distribution_strategy,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            ema_overwrite_frequency=self.ema_overwrite_frequency if self.use_ema else None,
        )
        if self.built:  # Refused again, if it was when it was built.
            self._saved_state.restore_waiting(self.variables)
        with uninterrupted(), uncollected():
            super().apply(grads, trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """The arguments, the seed in use included, so that a restored optimizer goes on with the same draws."""
        config = super().get_config()
        if self.adaptive:
            config["learning_rate"] = "adaptive"
        likelihood = self.likelihood
        if callable(likelihood):
            likelihood = keras.saving.serialize_keras_object(likelihood)
        names = (
            "method eigenvalues damping damping_rule kl_clip factor_decay curvature_interval inverse_interval "
            "conjugate_steps fit_interval fisher fisher_batch_size indefinite seed"
        )
        return {**config, **{name: getattr(self, name) for name in names.split()}, "likelihood": likelihood}

    @keras.optimizers.SGD.learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        """The given rate; with the adaptive one, that of variables without curvature, which must be a number.

        Where there are no such variables setting it has no effect, and one warning says so.
        """
        if self.adaptive and callable(learning_rate):
            raise ValueError(
                "`learning_rate` can only be set to a number where the optimizer was made with "
                f"learning_rate='adaptive': make one with the schedule instead. Received: {learning_rate!r}"
            )
        if self.adaptive and self._rate_is_unused and self.weight_decay is None:
            tell_of_unused_rate()
            self._rate_is_unused = False
        keras.optimizers.SGD.learning_rate.fset(self, learning_rate)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> KPSVD:
        """The inverse of `get_config`."""
        if isinstance(config.get("likelihood"), dict):
            likelihood = keras.saving.deserialize_keras_object(config["likelihood"], custom_objects=custom_objects)
            config = {**config, "likelihood": likelihood}
        return super().from_config(config, custom_objects=custom_objects)
