"""Trains one of the paper's deep autoencoders with several optimizers and shows who needs how many epochs and seconds.

    python tutorials/autoencoder.py
    python tutorials/autoencoder.py --problem mnist --methods adam,kpsvd,kfac_corrected --epochs 20

Everything here is stock Keras: a Sequential model, `compile`, `fit`. For the methods of keras_kpsvd the model is made
of `KPSVDDense` layers and compiled with `KPSVD(method=...)`; that is all there is to it. Every optimizer starts from
the same weights and sees the same batches in the same order. No data is downloaded.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PROBLEMS = ("curves", "mnist", "faces")
KPSVD_METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")
METHODS = ("adam", "sgd", *KPSVD_METHODS)
INITIALIZERS = ("glorot_uniform", "he_normal")
INTERRUPTED = 130  # the shell's exit status for a program ended by Ctrl-C


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a wrong argument ends the program with one line that says what was wrong."""
    parser = _OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="curves", help="data and network (default: %(default)s)")
    parser.add_argument(
        "--methods",
        type=_methods,
        default=("adam", "kfac", "kfac_corrected"),
        help=f"comma-separated, trained in this order, of {', '.join(METHODS)} (default: adam,kfac,kfac_corrected)",
    )
    parser.add_argument("--epochs", type=_at_least_one, default=30, help="for every method (default: %(default)s)")
    parser.add_argument(
        "--kpsvd-epochs",
        type=_at_least_one,
        help="for the methods of keras_kpsvd, if fewer will do (default: --epochs)",
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=256, help="default: %(default)s")
    parser.add_argument(
        "--samples", type=_at_least_one, help="training images (default: 10000; mnist: what is at hand, at most 10000)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of data, weights and batches (default: %(default)s)")
    parser.add_argument("--adam-learning-rate", type=_positive, help="default: the best of a few tried on the problem")
    parser.add_argument("--sgd-learning-rate", type=_positive, help="default: the same, with momentum 0.9")
    parser.add_argument(
        "--initializer", choices=INITIALIZERS, default="glorot_uniform", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for results (default: results/autoencoder-PROBLEM)")
    options = parser.parse_args(arguments)
    options.kpsvd_epochs = options.kpsvd_epochs or options.epochs
    options.out = options.out or Path("results") / f"autoencoder-{options.problem}"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: can't write to {options.out}: {error.strerror}")
    return options


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(name.strip() for name in text.split(","))
    for name in methods:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r} (choose from {', '.join(METHODS)})")
    if len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"each method once, got {text!r}")
    return methods


def _at_least_one(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**31, "a whole number from 0 to 2147483647")


def _positive(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a positive number")


def _number(text: str, kind: type, accepts: Callable[[float], bool], wanted: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return value


def _refuse(reason: str) -> int:
    print(f"autoencoder.py: error: {reason}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the tutorial; returns its exit status."""
    options = parse_arguments(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # without a GPU, TensorFlow reports its absence as an error
    print("Loading TensorFlow ...", flush=True)
    try:
        from autoencoder_problems import PROBLEM_FACTORIES
        from autoencoder_report import describe_run, write_report
        from autoencoder_training import train
    except ModuleNotFoundError as error:
        return _refuse(f"{error}; install what the tutorials need: pip install -e '.[tutorials]'")
    try:
        problem = PROBLEM_FACTORIES[options.problem](options.samples, options.seed)
    except ImportError as error:
        return _refuse(str(error))
    except ValueError as error:
        return _refuse(f"argument --samples: {error}")
    available = len(problem.train_images)
    if options.batch_size > available:
        return _refuse(f"argument --batch-size: {options.batch_size} is more than the {available} training images")
    options.adam_learning_rate = options.adam_learning_rate or problem.learning_rates["adam"]
    options.sgd_learning_rate = options.sgd_learning_rate or problem.learning_rates["sgd"]
    description = describe_run(problem, options)
    print(description, flush=True)

    runs = []
    interrupted = False
    try:
        for position, method in enumerate(options.methods, start=1):
            epochs = options.kpsvd_epochs if method in KPSVD_METHODS else options.epochs
            print(f"\n[{position}/{len(options.methods)}] {method}, {epochs} epochs", flush=True)
            train(problem, method, epochs, options, runs)
    except KeyboardInterrupt:
        interrupted = True
        print("\nInterrupted: keeping the finished epochs.", flush=True)
    # A second Ctrl-C must not cut the files short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if any(run.epochs for run in runs):
        print("\n" + write_report(problem, runs, description, options.out), flush=True)
    else:
        print(f"No epoch was finished; nothing was written to {options.out}.", flush=True)
    if interrupted:
        return INTERRUPTED
    return 1 if all(run.status.startswith("failed") for run in runs) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the training, while TensorFlow is being loaded
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
