"""Mathematics of Kronecker-product approximations of a Fisher block: TensorFlow only, no Keras, no variables."""

from .damping import DAMPING_RULES, DampingRule, curvature_moments, factor_damping, split_damping
from .eigenbasis import (
    apply_diagonal,
    damped_diagonal,
    diagonal_of_samples,
    diagonal_of_weight_gradients,
    directions_left_free,
    factor_eigenbasis,
    length_kurtosis,
    multiplicities,
    transported,
)
from .gram import gram_triples, row_gram, weighted_outer_products
from .kronecker import KroneckerSum, recompress
from .lanczos import golub_kahan_lanczos
from .packed import pack, packed_size, rows_of, unpack
from .rearrangement import RearrangedFisher, SubtractedTerm
from .scaling import all_finite, size_of
from .singular import cheapest_route, leading_triples, power_iteration
from .solve import (
    INDEFINITE_RULES,
    IndefiniteRule,
    Inverse,
    apply_corrected,
    apply_one_term,
    apply_two_term,
    correction_rank,
    damped_cholesky,
    invert_one_term,
    joint_eigenbasis,
    one_term_and_correction,
    two_term_denominators,
)
from .sums import mean_by, sum_in_order
from .triples import CONVERGED, NOT_CONVERGED, NOT_FINITE, SingularTriples
from .truncated import TruncatedInverse, leading_eigenpairs, truncated_inverse

__all__ = [
    "CONVERGED",
    "DAMPING_RULES",
    "INDEFINITE_RULES",
    "NOT_CONVERGED",
    "NOT_FINITE",
    "DampingRule",
    "IndefiniteRule",
    "Inverse",
    "KroneckerSum",
    "RearrangedFisher",
    "SingularTriples",
    "SubtractedTerm",
    "TruncatedInverse",
    "all_finite",
    "apply_corrected",
    "apply_diagonal",
    "apply_one_term",
    "apply_two_term",
    "cheapest_route",
    "correction_rank",
    "curvature_moments",
    "damped_cholesky",
    "damped_diagonal",
    "diagonal_of_samples",
    "diagonal_of_weight_gradients",
    "directions_left_free",
    "factor_damping",
    "factor_eigenbasis",
    "golub_kahan_lanczos",
    "gram_triples",
    "invert_one_term",
    "joint_eigenbasis",
    "leading_eigenpairs",
    "leading_triples",
    "length_kurtosis",
    "mean_by",
    "multiplicities",
    "one_term_and_correction",
    "pack",
    "packed_size",
    "power_iteration",
    "recompress",
    "row_gram",
    "rows_of",
    "size_of",
    "split_damping",
    "sum_in_order",
    "transported",
    "truncated_inverse",
    "two_term_denominators",
    "unpack",
    "weighted_outer_products",
]
