"""What the command lines of the benchmarks share: errors of one line, and kinds of arguments."""

from __future__ import annotations

import argparse
import importlib.util
import sys

INTERRUPTED = 130  # the shell's exit status for a program ended by Ctrl-C


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit status 2."""

    def error(self, message: str) -> None:
        """Ends the program."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def fail(program: str, message: str) -> int:
    """Prints an error in one line and returns the exit status 2."""
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


def package_is_missing() -> bool:
    """Whether keras_kpsvd can't be imported."""
    return importlib.util.find_spec("keras_kpsvd") is None


NOT_INSTALLED = "keras_kpsvd is not installed: pip install -e '.[tutorials]'"
