"""Figures of the comparison and the ablation, 1000 pixels wide; the arithmetic is in `evidence` and `ablation`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ablation import Case
from colours import LINE, LINES, METHOD_COLOURS
from contestants import METHODS
from evidence import Spread, Standing, in_order, measured, per_epoch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from paper import PAPER
from runs import Row, best_loss

WIDTH, DPI = 10, 100
_STEEP = 10  # losses above this many times the median first one are cut off


def colour(label: str) -> str:
    """The label's colour; a brown for those without one of their own."""
    return METHOD_COLOURS.get(label, "#8C564B")


def save(figure: Figure, path: Path) -> None:
    """Writes the figure and closes it."""
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def median_run(rows: Sequence[Row]) -> Row | None:
    """The run whose lowest loss is the median of those that have one; the lower of the two middle ones."""
    rows = sorted((row for row in rows if best_loss(row["losses"]) is not None), key=lambda r: best_loss(r["losses"]))
    return rows[(len(rows) - 1) // 2] if rows else None


def draw_losses(standings: Sequence[Standing], title: str) -> Figure:
    """Training and held-out loss of one setting against epochs (median, range) and seconds (the median run)."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 7.6), sharex="col", sharey="row", layout="constrained")
    lines = per_epoch(standings)
    for row, (name, series) in enumerate((("loss", "losses"), ("held_out_loss", "held_out_losses"))):
        for standing in standings:
            own = [line for line in lines if line["label"] == standing.label and line[name] is not None]
            width, dashes = LINES.get(standing.label, LINE)
            style = {"color": colour(standing.label), "label": standing.label, "linewidth": width, "linestyle": dashes}
            style |= {"marker": "o", "markersize": width + 1}
            if own:
                epochs = [line["epoch"] for line in own]
                low, high = ([line[f"{name}_{end}"] for line in own] for end in ("low", "high"))
                panels[row, 0].plot(epochs, [line[name] for line in own], **style)
                panels[row, 0].fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
            run = median_run(measured(standing.rows))
            if run is not None:
                points = zip(accumulate(run["seconds"]), run[series], strict=True)
                points = [point for point in points if point[1] is not None]
                panels[row, 1].plot(*zip(*points, strict=True), **style) if points else None
        adam = next((s.measures[name] for s in standings if s.label == "adam"), Spread())
        for panel in panels[row]:
            if adam.median is not None:
                panel.axhline(adam.median, color=colour("adam"), linestyle="--", linewidth=0.9, label="Adam's best")
            _log_axis(panel)
        first = sorted(line[name] for line in lines if line["epoch"] == 1 and line[name] is not None)
        if first:
            top = _STEEP * first[len(first) // 2]
            if panels[row, 0].get_ylim()[1] > top:
                panels[row, 0].set_ylim(top=top)
        panels[row, 0].set_ylabel(("training loss", "held-out loss")[row])
    panels[1, 0].set_xlabel("epochs (median and range over seeds)")
    panels[1, 1].set_xlabel("seconds of training, tracing included (the median seed's run)")
    panels[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1, 1].set_xlim(left=0)
    figure.suptitle(title)
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, handlelength=4)
    return figure


def _log_axis(panel: Axes) -> None:
    panel.set_yscale("log")
    panel.grid(which="both", alpha=0.25)
    low, high = panel.get_ylim()
    label = FuncFormatter(lambda value, _: f"{value:.3g}")
    panel.yaxis.set_major_formatter(label)
    if high / low < 60:
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)) if high / low > 3 else LogLocator(subs=range(2, 10)))
        panel.yaxis.set_minor_formatter(label)
    else:
        panel.yaxis.set_minor_formatter(NullFormatter())


def draw_race(races: dict[str, tuple[Sequence[Row], Sequence[Row]]], title: str) -> Figure:
    """Training losses of KPSVD's runs and Adam's over epochs (above) and seconds (below), a line for each seed.

    Args:
        races: by the name of a problem, Adam's runs and KPSVD's, at least one of Adam's.
        title: of the figure.
    """
    figure, panels = plt.subplots(
        2, len(races), figsize=(WIDTH, 6.4), sharey="col", squeeze=False, layout="constrained"
    )
    looks = (("Adam", colour("adam")), ("KPSVD()", colour("kfac")))  # the default method
    for column, (problem, contestants) in zip(panels.T, races.items(), strict=True):
        column[0].set_title(problem, fontsize=10)
        goal = sorted(best_loss(row["losses"]) or math.inf for row in contestants[0])[(len(contestants[0]) - 1) // 2]
        for panel, unit in zip(column, ("epochs", "seconds"), strict=True):
            for (label, shade), rows in zip(looks, contestants, strict=True):
                for number, row in enumerate(rows):
                    ends = range(1, len(row["losses"]) + 1) if unit == "epochs" else accumulate(row["seconds"])
                    points = [pair for pair in zip(ends, row["losses"], strict=True) if pair[1] is not None]
                    name = label if number == 0 else None
                    panel.plot(*zip(*points, strict=True), color=shade, linewidth=1.4, alpha=0.8, label=name)
            if math.isfinite(goal):
                panel.axhline(goal, color=colour("adam"), linestyle="--", linewidth=0.9, label="Adam's best")
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            _log_axis(panel)
            panel.set_xlabel(unit if unit == "epochs" else "seconds of training, tracing included")
    for row in panels:
        row[0].set_ylabel("training loss")
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def draw_to_target(standings: Sequence[Standing], titles: Sequence[str]) -> Figure:
    """Epochs and seconds to Adam's best as parts of Adam's own: median and range, "never" at the right edge."""
    groups = _by_setting(standings)
    heights = [len(own) + 1 for own in groups]
    figure, panels = plt.subplots(
        len(groups),
        2,
        figsize=(WIDTH, 1 + 0.26 * sum(heights)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    ends = [value for s in standings for name in _RATIOS for value in s.measures[name].finite]
    low, high = min([0.5, *ends]) / 1.3, max([2, *ends]) * 1.3
    for row, (own, title) in enumerate(zip(groups, titles, strict=True)):
        for column, name in enumerate(_RATIOS):
            panel = panels[row, column]
            panel.set_xscale("log")
            panel.set_xlim(low, high * (high / low) ** 0.22)  # room for words at the right
            panel.axvline(1, color=colour("adam"), linestyle="--", linewidth=0.9)
            for place, standing in enumerate(own):
                _draw_ratio(panel, place, standing, name, high)
            _label_rows(panel, [s.label for s in own] if column == 0 else [""] * len(own))
        panels[row, 0].set_title(title, loc="left", fontsize=10)
    for panel, unit in zip(panels[-1], ("epochs", "seconds"), strict=True):
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if high / low < 60:
            panel.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            panel.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(f"{unit} to Adam's lowest training loss, × Adam's own")
    return figure


_RATIOS = ("epochs_ratio", "seconds_ratio")


def _draw_ratio(panel: Axes, place: int, standing: Standing, name: str, right: float) -> None:
    spread, shade = standing.measures[name], colour(standing.label)
    missed = len(spread.values) - len(spread.finite)
    if spread.median is not None:
        panel.plot([min(spread.finite), max(spread.finite)], [place, place], color=shade, linewidth=2, alpha=0.5)
        panel.plot(spread.median, place, "o", color=shade, label=standing.label)
    elif spread.finite:
        panel.plot(spread.finite, [place] * len(spread.finite), "o", color=shade, fillstyle="none")
    text = (
        "no result" if not spread.values else "never" if not spread.finite else f"{missed}/{len(spread.values)} never"
    )
    if missed or not spread.values:
        panel.text(right, place, text, va="center", fontsize=8, color="#555555")


def _by_setting(standings: Iterable[Standing]) -> list[list[Standing]]:
    groups: dict[tuple, list[Standing]] = {}
    for standing in standings:
        groups.setdefault(standing.setting, []).append(standing)
    return list(groups.values())


def _label_rows(panel: Axes, names: Sequence[str]) -> None:
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.25)
    panel.tick_params(axis="y", length=0)


def draw_epoch_cost(standings: Sequence[Standing], titles: Sequence[str]) -> Figure:
    """Seconds of an epoch, × Adam's: bars with ranges over seeds, and the paper's figures as diamonds."""
    groups, columns = _by_setting(standings), min(3, len(_by_setting(standings)))
    rows = math.ceil(len(groups) / columns)
    height = 1 + rows * (0.7 + 0.27 * max(map(len, groups)))
    figure, panels = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    for panel in panels.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, own, title in zip(panels.flat, groups, titles, strict=False):
        paper = PAPER.get(own[0].setting.problem, {}).get("epoch_cost", {})
        for place, standing in enumerate(own):
            cost = standing.measures["epoch_cost"]
            if cost.median is not None:
                error = [[cost.median - cost.low], [cost.high - cost.median]]
                panel.barh(place, cost.median, xerr=error, color=colour(standing.label), ecolor="#555555", height=0.7)
                panel.annotate(f"{cost.median:.2g}", (max(cost.high, paper.get(standing.label, 0)), place), (7, 0),
                               textcoords="offset points", va="center", fontsize=8)  # fmt: skip
            else:
                panel.text(0.03, place, "no result", va="center", fontsize=8, color="#555555")
            if standing.label in paper:
                panel.plot(paper[standing.label], place, "D", markerfacecolor="white", markeredgecolor="black")
        _label_rows(panel, [standing.label for standing in own])
        panel.axvline(1, color=colour("adam"), linestyle="--", linewidth=0.9)
        panel.set_xlim(0, 1.18 * max(panel.get_xlim()[1], 1))
        panel.set_title(title, loc="left", fontsize=10)
    figure.supxlabel("seconds of an epoch after the first, × Adam's (diamonds: the paper's, on its GPU)", fontsize=10)
    return figure


def draw_ablation(cases: Sequence[Case], title: str) -> Figure:
    """The lowest training loss of each method under each case of one setting, a panel for each aspect."""
    aspects = list(dict.fromkeys(case.aspect for case in cases))
    methods = in_order((case.method for case in cases), METHODS)
    rows = math.ceil((len(aspects) + 1) / 2)
    figure, panels = plt.subplots(rows, 2, figsize=(WIDTH, 0.8 + 2.7 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(aspects) :]:
        panel.set_axis_off()
    for panel, aspect in zip(panels.flat, aspects, strict=False):
        own = [case for case in cases if case.aspect == aspect]
        names, here = (
            list(dict.fromkeys(case.case for case in own)),
            [m for m in methods if m in {c.method for c in own}],
        )
        _label_rows(panel, names)
        for case in own:
            shift = 0.7 * ((here.index(case.method) + 0.5) / len(here) - 0.5)
            _draw_case(panel, names.index(case.case) + shift, case)
        values = [value for case in own for value in case.measures["loss"].finite if value > 0]
        if values and max(values) > 5 * min(values):
            panel.set_xscale("log")
            steps = (1, 3) if max(values) < 100 * min(values) else (1,)
            panel.xaxis.set_major_locator(LogLocator(subs=steps))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_title(aspect, loc="left", fontsize=10)
        panel.set_xlabel("lowest training loss", fontsize=9)
    handles = [Line2D([], [], color=colour(method), marker="o", label=method) for method in methods]
    handles.append(Line2D([], [], color="#555555", marker="o", linestyle="", fillstyle="none", label="a seed diverged"))
    handles.append(
        Line2D([], [], color="#555555", marker="x", linestyle="", label="no loss on half of the seeds or more")
    )
    panels.flat[len(aspects)].legend(handles=handles, loc="center", frameon=False, title="dot: median; line: range")
    figure.suptitle(title)
    return figure


def _draw_case(panel: Axes, place: float, case: Case) -> None:
    spread, shade = case.measures["loss"], colour(case.method)
    if spread.median is None:
        panel.plot(0.97, place, "x", color=shade, transform=panel.get_yaxis_transform())
        return
    panel.plot([min(spread.finite), max(spread.finite)], [place, place], color=shade, linewidth=2, alpha=0.5)
    bad = case.count("diverged") > 0
    panel.plot(spread.median, place, "o", color=shade, fillstyle="none" if bad else "full", label=case.method)
