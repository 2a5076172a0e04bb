"""Colours of optimizers and methods in every figure: Okabe and Ito's palette, made for colour-blind eyes, and a grey.

`METHOD_COLOURS` is in the order of legends.
"""

METHOD_COLOURS = {
    "sgd": "#999999",
    "adam": "#000000",
    "adamw": "#F0E442",
    "muon": "#CC79A7",
    "kfac": "#E69F00",
    "kpsvd": "#56B4E9",
    "deflation": "#009E73",
    "lanczos": "#D55E00",
    "kfac_corrected": "#0072B2",
}
