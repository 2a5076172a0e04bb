"""`KPSVD`, the optimizer: it schedules, keeps state and calls down; the mathematics is in `curvature` and `linalg`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import keras
import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_positive,
    check_rate,
    check_state,
    is_number,
    resolve_seed,
)
from keras_kpsvd.curvature.approximations import check_method
from keras_kpsvd.curvature.extrapolation import KEPT_SHAPES, KeptModel, needs_exact_fit, next_step
from keras_kpsvd.curvature.reduction import refresh_rows
from keras_kpsvd.curvature.samples import check_fisher, layer_calls, pass_heads, preactivation_gradients
from keras_kpsvd.curvature.state import CurvatureOptions, LayerCurvature, assign_last, invert_layers, refresh_layers
from keras_kpsvd.curvature.step_control import StepCoefficients, control_after, inner, quadratic_model, scaled
from keras_kpsvd.layers import ForwardPass, Recorder, check_kernels_are_not_shared, layers_of
from keras_kpsvd.linalg import DampingRule, IndefiniteRule
from keras_kpsvd.reporting import tell_of_fallback, warn_of_layers, warn_when_run

INITIAL_DAMPING = 0.03
PLAIN_RATE = 0.01


class _Proposal(NamedTuple):
    """A step that was computed and not yet taken."""

    gradients: list
    step: StepCoefficients | None
    control: list[tuple[keras.Variable, tf.Tensor]]
    finite: tf.Tensor


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVD(keras.optimizers.SGD):
    """Natural gradient with Kronecker-product-SVD approximations of the Fisher matrix.

    Trains the weights of instrumented layers (`KPSVDDense`, …) by the gradient preconditioned with a damped Kronecker
    approximation of each layer's Fisher block (Koroko et al. 2023, arXiv:2201.10285), all other variables by SGD with
    momentum. Used as any Keras optimizer is: `model.compile(optimizer=KPSVD(), loss=…)`, then `fit`.

    The curvature is that of the loss as compiled: its generalised Gauss–Newton matrix, `E[∇log p ∇log pᵀ]/c` for a loss
    that Keras averages over `c` outputs. A unit step is Newton-like whatever the width of the output.

    By default nothing has to be tuned: step length, momentum and damping are found from the exact quadratic model of
    the loss in every step (`curvature.step_control`). With a number or schedule as `learning_rate` the step is the
    paper's: that rate times the preconditioned gradient, shortened to the KL bound, through SGD's momentum.

    The first step of `fit` already has curvature (of an eager `fit` or a hand-written loop from the second: there the
    first call of `apply` makes the state, and takes a plain gradient step at rate 0.01 or the given one). A step whose
    gradient holds NaN or Inf is skipped whole, with a RuntimeWarning: weights, momentum and curvature keep every bit. A
    layer whose decomposition fails keeps its last good preconditioner, or takes a plain gradient step if it has none.

    Args:
        learning_rate: "adaptive", or a float, `LearningRateSchedule` or callable as in every Keras optimizer. With
            "adaptive", rate and momentum minimise the quadratic model along the preconditioned gradient and the
            previous step (Martens & Grosse 2015, §7), shortened where the logits of a "categorical" or "bernoulli"
            output would move by more than 2 (root mean square), and variables of other layers train at the rate 0.01
            (`optimizer.learning_rate` sets it).
        method: "kfac", "kpsvd", "deflation", "lanczos" or "kfac_corrected"; see `approximate_fisher`. In training the
            second term of the two-term methods is the best one with symmetric factors.
        momentum: SGD's momentum in [0, 1]; with the adaptive rate the upper bound of the momentum found.
        nesterov: Nesterov's form of the momentum; not with the adaptive rate.
        damping: the paper's λ, in units of the compiled loss's curvature: "adaptive" starts at 0.03 and follows how far
            the quadratic model is right (`curvature.step_control`); a number > 0 holds it.
        damping_rule: "sqrt" adds `π√λ` and `√λ/π` to the factors, `π² = (tr A/d_in)/(tr G/d_out)` (Martens & Grosse
            2015, §6.3); "factor" adds λ to each. The same for every method.
        kl_clip: with a given rate, the bound κ on `rate²·⟨Δ, ∇⟩`: longer steps are shortened to it (the paper: 1e-2).
            None switches it off. The adaptive rate needs no bound and applies none.
        factor_decay: decay ρ of the moving average of the factors per refresh, in [0, 1), bias-corrected.
        curvature_interval: updates between refreshes of the factors (the paper's T_cov).
        inverse_interval: updates between rebuilds of the preconditioners (T_inv).
        fit_interval: with the adaptive rate, updates between exact quadratic models. Those in between are extrapolated
            (`curvature.extrapolation`), except in the first 100 updates, with a new preconditioner, for batches of
            fewer than 16 examples, and where the last step overshot. 1: never.
        fisher: "sampled" (targets drawn from the model's own predictive distribution), "exact" (the expectation over
            targets, one backward pass for each output, for at most 256 of them), or "empirical" (the actual targets).
        likelihood: "auto" reads it off the compiled loss; "categorical", "bernoulli" and "normal" (variance 1/2, whose
            negative log-density is the squared error) name it; or a callable from the model's output to a
            `tfp.distributions.Distribution`, whose loss is then taken to be the batch mean of `−log p`.
        fisher_batch_size: rows of each batch used for the factors. None: all for "kfac", at most 128 for the others,
            whose exact triples cost the cube of that number. Of layers that share their weights among several
            positions (convolutions, sequences) as many rows as have 4,096 positions, at least 32 and at most 128.
        indefinite: by what the second term's part divides, since `1 + x` may be negative: "absolute" `1 + |x|`, which
            never lengthens a step, or "reflect" `1 + x` where that is positive and `1 + |x|` elsewhere.
        seed: of the drawn targets. None takes one from the state of Python's `random`, which
            `keras.utils.set_random_seed` sets, without advancing it. Draws are stateless and disturb nobody else's
            random numbers.
        name: of the optimizer.
        **keras_optimizer_arguments: `weight_decay`, `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`, `gradient_accumulation_steps`, as in every
            Keras optimizer.

    Raises:
        ValueError: an argument out of range, by name, when the object is made; in the first step a loss whose
            predictive distribution is not known.
    """

    def __init__(
        self,
        learning_rate: Any = "adaptive",
        method: str = "kfac",
        momentum: float = 0.9,
        nesterov: bool = False,
        damping: float | str = "adaptive",
        damping_rule: str = "sqrt",
        kl_clip: float | None = 1e-2,
        factor_decay: float = 0.85,
        curvature_interval: int = 10,
        inverse_interval: int = 10,
        fit_interval: int = 10,
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
        likelihoods.check(likelihood)
        check_choice("damping_rule", damping_rule, get_args(DampingRule))
        check_choice("indefinite", indefinite, get_args(IndefiniteRule))
        if damping != "adaptive":
            check_positive("damping", damping, " or 'adaptive'")
        if kl_clip is not None:
            check_positive("kl_clip", kl_clip, " or None")
        check_count("curvature_interval", curvature_interval)
        check_count("inverse_interval", inverse_interval)
        check_count("fit_interval", fit_interval)
        if fisher_batch_size is not None:
            check_count("fisher_batch_size", fisher_batch_size)
        check_fraction("factor_decay", factor_decay, one=False)
        check_fraction("momentum", momentum, one=True)
        adaptive = isinstance(learning_rate, str) and learning_rate == "adaptive"
        if adaptive and nesterov:
            raise ValueError(
                "`nesterov`=True has no meaning with learning_rate='adaptive', whose momentum is found in each step: "
                "leave it out, or give `learning_rate` a number."
            )
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
        self.damping = damping if damping == "adaptive" else float(damping)
        self.damping_rule = damping_rule
        self.kl_clip = None if kl_clip is None else float(kl_clip)
        self.factor_decay = float(factor_decay)
        self.curvature_interval = int(curvature_interval)
        self.inverse_interval = int(inverse_interval)
        self.fit_interval = int(fit_interval)
        self.fisher = fisher
        self.likelihood = likelihood
        self.fisher_batch_size = fisher_batch_size
        self.indefinite = indefinite
        self.seed = resolve_seed(seed)
        self._recorder = Recorder(keep_loss=fisher == "empirical", persistent=adaptive or fisher == "exact")
        self._blocks: tuple[LayerCurvature, ...] = ()
        self._curved: frozenset = frozenset()
        self._coefficients: StepCoefficients | None = None

    def build(self, variables: list[keras.Variable]) -> None:
        """Creates all state, finds the instrumented layers that own `variables`, and attaches to them."""
        if self.built:
            return
        if self._distribution_strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "KPSVD trains on one device: its curvature is not yet averaged over replicas. "
                f"Received a strategy with {self._distribution_strategy.num_replicas_in_sync} replicas."
            )
        super().build(variables)
        self._moves = self.damping == "adaptive"
        self._follows = self.adaptive or self._moves
        if self._follows and not self.momentums:
            self.momentums = self.add_optimizer_variables(variables, "momentum")
        options = CurvatureOptions(self.method, self.damping_rule, self.factor_decay, self.indefinite)
        self._updates, self._next_refresh, self._next_inverse, self._next_fit = (
            self.add_variable(shape=(), dtype="int64", name=name)
            for name in ("updates", "next_refresh", "next_inverse", "next_fit")
        )
        start = INITIAL_DAMPING if self.damping == "adaptive" else self.damping
        self._damping = self.add_variable(
            shape=(), dtype="float32", name="damping", initializer=keras.initializers.Constant(start)
        )
        self._slope = self.add_variable(shape=(2,), dtype="float32", name="slope")
        self._slope_averages = self.add_variable(shape=(2,), dtype="float32", name="slope_averages")
        self._kept = [
            self.add_variable(shape=shape, dtype="float32", name=f"model_{name}")
            for name, shape in zip(KEPT_SHAPES._fields, KEPT_SHAPES, strict=True)
        ]
        self._blocks = tuple(LayerCurvature(layer, options, self.add_variable) for layer in layers_of(variables))
        self._curved = frozenset(self._var_key(v) for block in self._blocks for v in block.layer.curvature_variables)
        for block in self._blocks:
            block.layer.attach(self._recorder)
        others = [variable for variable in variables if self._var_key(variable) not in self._curved]
        tell_of_fallback(others, all_of_them=not self._blocks)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Ends the recording of the forward pass that made `loss`, then scales as Keras does."""
        self._recorder.close(loss)
        return super().scale_loss(loss)

    def _apply_weight_decay(self, variables: list) -> None:
        """Nothing here: weight decay is part of the step, which may be skipped whole; see `_backend_update_step`."""

    def _backend_update_step(self, grads: list, trainable_variables: list, learning_rate: Any) -> None:
        forward_pass = self._recorder.take()

        def attempt() -> tf.Tensor:
            proposal = self._propose(forward_pass, grads, trainable_variables, learning_rate)
            return tf.cond(proposal.finite, lambda: take(proposal), lambda: skip("the preconditioned gradient", ""))

        def take(proposal: _Proposal) -> tf.Tensor:
            super(KPSVD, self)._apply_weight_decay(trainable_variables)
            self._coefficients = proposal.step
            # Keras reduces all gradients in one operation, which takes tensors of one graph only: that of this branch.
            gradients = tf.nest.map_structure(tf.identity, proposal.gradients)
            super(KPSVD, self)._backend_update_step(gradients, trainable_variables, learning_rate)
            assign_last(*([pair[side] for pair in proposal.control] for side in (0, 1)))
            self._updates.assign_add(1)
            return tf.constant(True)

        def skip(what: str, curvature: str) -> tf.Tensor:
            warn_when_run(
                f"KPSVD skipped a step: {what} holds NaN or Inf. Weights and momentum{curvature} are unchanged."
            )
            return tf.constant(False)

        finite = tf.reduce_all(tf.stack([_is_finite(gradient) for gradient in grads]))
        tf.cond(finite, attempt, lambda: skip("the gradient", ", and curvature,"))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """SGD's update; for instrumented layers under the adaptive rate the step that was fitted."""
        if self._coefficients is None or self._var_key(variable) not in self._curved:
            super().update_step(gradient, variable, learning_rate)
            return
        rate, momentum = (tf.cast(value, variable.dtype) for value in self._coefficients)
        if not self.momentums:  # No momentum, and nothing else that needs the last step.
            self.assign_sub(variable, rate * tf.cast(gradient, variable.dtype))
            return
        velocity = self.momentums[self._get_variable_index(variable)]
        step = momentum * tf.cast(velocity.value, variable.dtype) - rate * tf.cast(gradient, variable.dtype)
        self.assign(velocity, step)
        self.assign_add(variable, step)

    def _propose(self, forward_pass: ForwardPass | None, grads: list, variables: list, learning_rate: Any) -> _Proposal:
        """Refreshes what is due, then computes a step without taking it."""
        position = {self._var_key(variable): index for index, variable in enumerate(variables)}
        blocks = {
            block: [position[self._var_key(variable)] for variable in block.layer.curvature_variables]
            for block in self._blocks
            if all(self._var_key(variable) in position for variable in block.layer.curvature_variables)
        }
        if not blocks:
            return _Proposal(grads, None, [], tf.constant(True))
        heads = None if forward_pass is None else pass_heads(forward_pass, self.likelihood)
        if forward_pass is not None and forward_pass.model is not None:
            check_kernels_are_not_shared(forward_pass.model)
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(self._iterations.value, tf.int64)])
        seed = tf.cast(seed % (2**31 - 1), tf.int32)
        self._refresh(forward_pass, heads, list(blocks), seed)
        rebuilt = self._invert(list(blocks))
        gradients = {block.layer: [tf.convert_to_tensor(grads[i]) for i in at] for block, at in blocks.items()}
        directions = {block.layer: block.precondition(gradients[block.layer]) for block in blocks}
        descent = inner(directions, gradients)
        finite = tf.math.is_finite(descent)
        rate, momentum = tf.cast(learning_rate, tf.float32), tf.constant(self.momentum)
        previous, overlap, trusted = None, tf.constant(0.0), tf.constant(1.0)
        if self._follows:
            velocity = [one.value for one in self.momentums]
            previous = {
                block.layer: [velocity[self._get_variable_index(v)] for v in block.layer.curvature_variables]
                for block in blocks
            }
            overlap = inner(gradients, previous)
        control = []
        if self.adaptive and forward_pass is not None:
            kept = KeptModel(*(tf.convert_to_tensor(variable) for variable in self._kept))
            damping, updates = tf.convert_to_tensor(self._damping.value), tf.convert_to_tensor(self._updates.value)
            counts = (updates, self._next_fit.value, rebuilt, tf.shape(heads[0].outputs)[0])
            due = needs_exact_fit(kept, self._slope.value, descent, overlap, *counts)
            exact = functools.partial(quadratic_model, forward_pass, heads, [directions, previous], damping, seed)
            (rate, momentum), trusted, kept = next_step(exact, due, kept, tf.stack([descent, overlap]), self.momentum)
            control += zip(self._kept, kept, strict=True)
            control.append((self._next_fit, tf.where(due, updates + self.fit_interval, self._next_fit.value)))
        elif not self.adaptive and self.kl_clip is not None:
            scale = tf.sqrt(tf.math.divide_no_nan(self.kl_clip, rate * rate * descent))
            scale = tf.where(descent > 0, tf.minimum(1.0, scale), 1.0)
            rate *= scale
            if self.nesterov:  # Keras's own update takes the rate: the scale goes into the gradient.
                directions = scaled(directions, scale)
        finite &= tf.math.is_finite(rate) & tf.math.is_finite(momentum)
        if self._follows:
            slope = momentum * overlap - rate * descent
            state = (self._slope, self._damping, self._slope_averages)
            values = control_after(*(one.value for one in state), overlap, slope, trusted)
            control += [pair for pair in zip(state, values, strict=True) if self._moves or pair[0] is not self._damping]
        results = list(grads)
        for block, at in blocks.items():
            for place, value in zip(at, directions[block.layer], strict=True):
                results[place] = value
        return _Proposal(results, None if self.nesterov else StepCoefficients(rate, momentum), control, finite)

    def _refresh(
        self,
        forward_pass: ForwardPass | None,
        heads: list[likelihoods.Head] | None,
        blocks: list[LayerCurvature],
        seed: tf.Tensor,
    ) -> None:
        """Draws samples and folds them into the factors, on updates where that is due; others compute nothing."""
        if forward_pass is None:
            return

        def refresh() -> tf.Tensor:
            gradients = preactivation_gradients(forward_pass, heads, self.fisher, seed)
            rows = functools.partial(refresh_rows, self.method, wanted=self.fisher_batch_size)
            repeats = likelihoods.draws_per_example(heads) if self.fisher == "exact" else 1
            calls = layer_calls(forward_pass, gradients, rows, repeats)
            present = [block for block in blocks if block.layer in calls]
            good = refresh_layers(present, calls)
            self._next_refresh.assign(self._updates.value + self.curvature_interval)
            names = [block.layer.name for block in present]
            warn_of_layers(names, good, "its new curvature is not finite; the old one stays")
            return tf.constant(True)

        tf.cond(self._updates.value >= self._next_refresh.value, refresh, lambda: tf.constant(False))

    def _invert(self, blocks: list[LayerCurvature]) -> tf.Tensor:
        """Makes the preconditioners anew, where that is due and once there is curvature; whether it was."""

        def invert() -> tf.Tensor:
            good = invert_layers(blocks, tf.convert_to_tensor(self._damping.value))
            self._next_inverse.assign(self._updates.value + self.inverse_interval)
            names = [block.layer.name for block in blocks]
            warn_of_layers(names, good, "its decomposition failed; the last good preconditioner stays")
            return tf.constant(True)

        due = (self._updates.value >= self._next_inverse.value) & (self._next_refresh.value > 0)
        return tf.cond(due, invert, lambda: tf.constant(False))

    def load_own_variables(self, store: Any) -> None:
        """Restores the state, or raises where it does not match variable for variable; live state is then left alone.

        A weights file without any optimizer's state is no error.
        """
        if not store.keys():
            warnings.warn(f"The file holds no state of optimizer {self.name!r}, which stays as it is.", stacklevel=2)
            return
        check_state(self.name, [tuple(v.shape) for v in self.variables], store)
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """The arguments, the seed in use included, so that a restored optimizer goes on with the same draws."""
        config = super().get_config()
        if self.adaptive:
            config["learning_rate"] = "adaptive"
        likelihood = self.likelihood
        if callable(likelihood):
            likelihood = keras.saving.serialize_keras_object(likelihood)
        names = (
            "method damping damping_rule kl_clip factor_decay curvature_interval inverse_interval fit_interval fisher "
            "fisher_batch_size indefinite seed"
        )
        return {**config, **{name: getattr(self, name) for name in names.split()}, "likelihood": likelihood}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> KPSVD:
        """The inverse of `get_config`."""
        if isinstance(config.get("likelihood"), dict):
            likelihood = keras.saving.deserialize_keras_object(config["likelihood"], custom_objects=custom_objects)
            config = {**config, "likelihood": likelihood}
        return super().from_config(config, custom_objects=custom_objects)


def _is_finite(gradient: Any) -> tf.Tensor:
    return tf.reduce_all(tf.math.is_finite(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient))
