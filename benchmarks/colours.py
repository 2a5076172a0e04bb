"""Looks of optimizers and methods in every figure: Okabe and Ito's palette, made for colour-blind eyes, and a grey.

`METHOD_COLOURS` is in the order of legends. Their yellow is faint on white: an olive stands in its place.
"""

METHOD_COLOURS = {
    "sgd": "#999999",
    "adam": "#000000",
    "adamw": "#9E9A00",
    "muon": "#CC79A7",
    "kfac": "#E69F00",
    "kpsvd": "#56B4E9",
    "deflation": "#009E73",
    "lanczos": "#D55E00",
    "kfac_corrected": "#0072B2",
}

# Width and dashes of lines: those that often lie on each other are drawn in the order above, a wide one
# first, and the later ones leave the earlier ones to be seen.
LINES = {
    "adam": (3.0, "-"),
    "adamw": (1.6, (0, (4, 3))),
    "kfac": (3.4, "-"),
    "kpsvd": (1.8, "-"),
    "deflation": (1.8, (0, (3, 3))),
    "lanczos": (1.8, (3, (2, 4))),
    "kfac_corrected": (1.8, (-1, (1, 2))),
}
LINE = (1.6, "-")  # of all others
