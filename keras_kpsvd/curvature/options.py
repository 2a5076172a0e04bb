"""What every layer is told of the optimizer's arguments."""

from __future__ import annotations

from dataclasses import dataclass

# Whose a preconditioner divides by: the factors' own, or the block's in their eigenbasis.
EIGENVALUES = ("kronecker", "corrected")


@dataclass(frozen=True)
class CurvatureOptions:
    """The choices that travel together from the optimizer to every layer."""

    method: str
    damping_rule: str
    factor_decay: float
    indefinite: str
    eigenvalues: str = "kronecker"
