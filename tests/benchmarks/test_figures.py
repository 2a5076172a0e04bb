"""Figures hold the numbers of the rows they are drawn from."""

import matplotlib
import pytest

matplotlib.use("Agg")

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


def test_figures_are_a_thousand_pixels_wide(drawn, tmp_path):
    import matplotlib.pyplot as plt
    from figures import draw_losses, save

    save(draw_losses(standings_of(rows_of_three_seeds()), "digits"), tmp_path / "a.png")
    assert plt.imread(tmp_path / "a.png").shape[1] == 1000
