"""Figures hold the numbers of the rows they are drawn from."""

from itertools import pairwise

import matplotlib
import pytest

matplotlib.use("Agg")

from .conftest import make_row
from .test_ablation import case_rows
from .test_evidence import rows_of_three_seeds, run_of


@pytest.fixture
def drawn():
    """Closes what a test draws."""
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def standings_of(rows):
    from evidence import comparison

    return comparison(rows)


def lines_of(panel):
    return {line.get_label(): line for line in panel.lines}


def test_losses_are_medians_over_epochs_and_the_median_run_over_seconds(drawn):
    from colours import METHOD_COLOURS
    from figures import draw_losses

    panels = draw_losses(standings_of(rows_of_three_seeds()), "digits").axes
    epochs, seconds, held_out, _ = map(lines_of, panels)
    assert list(epochs["kfac"].get_ydata()) == pytest.approx([0.5, 0.3, 0.1])
    assert list(seconds["kfac"].get_xdata()) == [6, 9] and list(seconds["kfac"].get_ydata()) == [0.3, 0.2]
    assert list(held_out["adam"].get_ydata()) == pytest.approx([8, 3, 4])
    assert list(epochs["Adam's best"].get_ydata()) == [0.3, 0.3] and epochs["Adam's best"].get_linestyle() == "--"
    assert epochs["kfac"].get_color() == METHOD_COLOURS["kfac"]
    assert [panel.get_yscale() for panel in panels] == ["log"] * 4 and len(panels[0].collections) == 2


def test_a_race_has_a_line_for_each_seed_over_epochs_and_over_seconds(drawn):
    from figures import draw_race

    adam = [make_row([0.9, 0.4, 0.3], [2, 1, 1]), make_row([0.8, 0.5], [3, 2], seed=1)]
    own = [make_row([0.5, 0.2], [4, 3], optimizer="kpsvd"), make_row([0.6, None], [5, 3], optimizer="kpsvd", seed=1)]
    panels = draw_race({"digits": (adam, own), "curves": (adam[:1], [])}, "race").axes
    epochs, others, seconds, _ = ([line for line in panel.lines if len(line.get_xdata())] for panel in panels)
    assert [list(line.get_ydata()) for line in epochs] == [[0.9, 0.4, 0.3], [0.8, 0.5], [0.5, 0.2], [0.6], [0.3, 0.3]]
    assert [list(line.get_xdata()) for line in epochs[:4]] == [[1, 2, 3], [1, 2], [1, 2], [1]]
    assert [list(line.get_xdata()) for line in seconds[:4]] == [[2, 3, 4], [3, 5], [4, 7], [5]]
    assert [line.get_label() for line in epochs if not line.get_label().startswith("_")] == [
        "Adam",
        "KPSVD()",
        "Adam's best",
    ]
    assert len(others) == 2 and panels[0].get_title() == "digits" and panels[0].get_xscale() == "log"


def test_equal_losses_are_all_seen_and_epochs_are_whole(drawn):
    """A later line on an earlier one has gaps, or is the narrower."""
    from colours import LINE, LINES, METHOD_COLOURS
    from figures import draw_losses

    labels = [label for label in METHOD_COLOURS if label not in ("sgd", "muon")]
    rows = [run_of(label, [0.9, 0.5], options={"learning_rate": 1}) for label in labels]
    panel, *_, below, _ = draw_losses(standings_of(rows), "digits").axes
    lines = [lines_of(panel)[label] for label in labels]
    for k, line in enumerate(lines):
        for above in lines[k + 1 :]:
            if {line.get_label(), above.get_label()} <= LINES.keys() - {"adam", "adamw"}:
                assert above.is_dashed() or above.get_linewidth() < line.get_linewidth() - 1
    assert lines_of(panel)["adamw"].is_dashed() and not lines_of(panel)["adam"].is_dashed()
    assert lines_of(panel)["adamw"].get_linewidth() < lines_of(panel)["adam"].get_linewidth()
    assert LINE[1] == "-" and all(tick == int(tick) for tick in below.get_xticks())
    # No line is faint on white: relative luminance by WCAG.
    for name in METHOD_COLOURS.values():
        linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(name)]
        assert 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.5


def test_ratios_to_target_are_dots_and_never_is_written(drawn):
    from figures import draw_to_target

    rows = [*rows_of_three_seeds(), run_of("muon", [0.9]), run_of("sgd", [None], status="diverged")]
    panels = draw_to_target(standings_of(rows), ["digits"]).axes
    assert [list(lines_of(panel)["kfac"].get_xdata()) for panel in panels] == [[1], [2.5]]
    assert "muon" not in lines_of(panels[0]) and panels[0].get_xscale() == "log"
    assert [text.get_text() for text in panels[0].texts] == ["no result", "never", "1/3 never"]


def test_epoch_costs_are_bars_beside_the_papers_diamonds(drawn):
    from figures import draw_epoch_cost

    rows = [row | {"problem": "curves"} for row in rows_of_three_seeds()] + [run_of("kfac", [0.3, 0.2])]
    first, second, *_ = draw_epoch_cost(standings_of(rows), ["curves", "digits"]).axes
    assert [bar.get_width() for bar in first.patches] == [1, 2] and len(second.patches) == 0
    assert [list(line.get_xdata()) for line in first.lines if line.get_marker() == "D"] == [[2.0]]


def test_ablation_has_a_panel_for_each_aspect_and_marks_what_diverged(drawn):
    from ablation import cases_of
    from figures import draw_ablation

    rows = [
        *case_rows("batch: quarter", "kfac", [1.0, 2.0, 4.0]),
        *case_rows("batch: whole", "kfac", [0.5, None, 2.0], statuses=["finished", "diverged"]),
        *case_rows("fisher: exact", "lanczos", [None], statuses=["diverged"]),
    ]
    batch, fisher, *_ = draw_ablation(cases_of(rows), "digits").axes
    dots = [line for line in batch.lines if line.get_marker() == "o"]
    assert [list(dot.get_xdata()) for dot in dots] == [[2.0], [2.0]]
    assert [dot.get_fillstyle() for dot in dots] == ["full", "none"]
    assert [line.get_marker() for line in fisher.lines] == ["x"]
    assert [label.get_text() for label in batch.get_yticklabels()] == ["quarter", "whole"]


def test_numbers_below_an_ablation_panel_do_not_run_together(drawn):
    from ablation import cases_of
    from figures import draw_ablation

    rows = [case_rows(f"batch: {k}", "kfac", [loss]) for k, loss in enumerate((0.01305, 0.01482, 0.03195))]
    figure = draw_ablation(cases_of([row for own in rows for row in own]), "digits")
    figure.draw_without_rendering()
    left, right = figure.axes[0].get_xlim()
    boxes = [
        label.get_window_extent()
        for label in figure.axes[0].get_xticklabels()
        if left <= label.get_position()[0] <= right
    ]
    assert len(boxes) > 2 and all(one.x1 + 15 < other.x0 for one, other in pairwise(boxes))


def test_figures_are_a_thousand_pixels_wide(drawn, tmp_path):
    import matplotlib.pyplot as plt
    from figures import draw_losses, save

    save(draw_losses(standings_of(rows_of_three_seeds()), "digits"), tmp_path / "a.png")
    assert plt.imread(tmp_path / "a.png").shape[1] == 1000
