"""The report of `reproduce.py`: tables, figures and sentences of the runs there are, written into a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import figures
from ablation import MEASURES, SECONDS, Case, ablation_lines, cases_of, sentences, table_of
from contestants import CONTESTANTS, edge_of_grid
from evidence import (
    Setting,
    Standing,
    comparison,
    conditions,
    in_order,
    per_epoch,
    setting_of,
    settings_in_order,
    stands_on,
    summarise,
    title_of,
)
from paper import BESIDE, CHANCE, CLAIM_COLUMNS, NOTES, PAPER, SOURCE, batch_sizes, beside, count_verdicts, judge
from runs import SEARCH_SEED, Row
from tables import DASH, SUMMARY, as_markdown, as_text, cells_of, in_words, write_csv

REPORT = "report.md"


class _Pages:
    """The report as Markdown and as text, built side by side."""

    def __init__(self) -> None:
        self.markdown: list[str] = []
        self.text: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        self.markdown.append(f"{'#' * level} {text}")
        self.text.append(f"{text}\n{'=-'[level > 2] * len(text)}")

    def say(self, *sentences: str) -> None:
        if sentences:
            self.markdown.append("\n".join(f"- {s}" for s in sentences) if len(sentences) > 1 else sentences[0])
            self.text.append("\n".join(sentences))

    def table(self, cells: list[list[str]]) -> None:
        self.markdown.append(as_markdown(cells))
        self.text.append(as_text(cells))

    def figure(self, name: str, caption: str) -> None:
        self.markdown.append(f"![{caption}]({name})")


def make_report(
    rows: Iterable[Row], directory: Path, planned: Iterable[dict[str, Any]] | None = None, extra: str = ""
) -> str:
    """Writes `report.md`, CSV files and figures of the comparison and the ablation; returns the text to print.

    Args:
        rows: of finished runs, also only some of them, or none.
        directory: is made if it is missing.
        planned: every run of the plan, as dictionaries; tables then say how many of them they stand on.
        extra: Markdown for the end of `report.md`.
    """
    rows, directory = list(rows), Path(directory)
    planned = None if planned is None else list(planned)
    directory.mkdir(parents=True, exist_ok=True)
    pages = _Pages()
    pages.heading("Results", 1)
    pages.say(stands_on(rows, planned))
    if rows:
        pages.say(*_where(rows))
        pages.table(_sizes(rows))
        _grids(pages, rows, planned)
        _went_wrong(pages, rows)
        pages.say(*warnings_of(rows))
    _comparison(pages, rows, planned, directory)
    _ablation(pages, rows, planned, directory)
    text = "\n\n".join([*pages.text, f"written to {directory / REPORT}"])
    (directory / REPORT).write_text("\n\n".join([*pages.markdown, *([extra] if extra else [])]) + "\n", "utf-8")
    return text


def _where(rows: Sequence[Row]) -> list[str]:
    """Device, how many runs at a time, versions, revision."""
    lines = conditions(rows)
    versions = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in rows if row.get("versions")
    )
    revisions = dict.fromkeys(str(row["revision"]) for row in rows if row.get("revision"))
    for what, values in (("Versions", versions), ("Revision", revisions)):
        if values:
            lines.append(f"{what}: {'; '.join(values)}{' (they differ between runs)' if len(values) > 1 else ''}.")
    return lines


def _sizes(rows: Sequence[Row]) -> list[list[str]]:
    cells = [["study", "problem", "samples", "batch", "epochs", "seeds", "runs at a time", "threads each"]]
    for study in dict.fromkeys(str(row.get("study")) for row in rows):
        for setting in settings_in_order(row for row in rows if str(row.get("study")) == study):
            own = [row for row in rows if str(row.get("study")) == study and setting_of(row) == setting]
            several = (sorted({str(row.get(name)) for row in own}) for name in ("seed", "jobs", "threads"))
            size = (setting.samples, setting.batch, setting.epochs)
            cells.append([study, setting.problem, *map(str, size), *map(", ".join, several)])
    return cells


def _grids(pages: _Pages, rows: Sequence[Row], planned: Sequence[dict] | None) -> None:
    """The settings that each optimizer of the comparison is tried with, by the plan or else by the rows."""
    grids: dict[str, list[str]] = {}
    for run in _of(rows if planned is None else planned, "comparison") or ():
        if run["seed"] == SEARCH_SEED and run["options"] is not None:
            grids.setdefault(run["label"], []).append(in_words(run["options"]))
    if grids:
        pages.heading("Grids", 3)
        cells = [[label, "; ".join(dict.fromkeys(grids[label]))] for label in in_order(grids, CONTESTANTS)]
        pages.table([["optimizer of the comparison", "settings tried on seed 0"], *cells])


def _went_wrong(pages: _Pages, rows: Sequence[Row]) -> None:
    """Why runs diverged or failed."""
    cells = [
        [
            row["status"],
            str(row.get("study")),
            row["problem"],
            row["label"],
            in_words(row["options"]),
            str(row["seed"]),
            str(row.get("reason") or DASH),
        ]
        for status in ("diverged", "failed")
        for row in rows
        if row["status"] == status
    ]
    if cells:
        pages.heading("Runs that went wrong", 3)
        pages.table([["how", "study", "problem", "optimizer or case", "options", "seed", "reason"], *cells])


def warnings_of(rows: Iterable[Row]) -> list[str]:
    """What KPSVD warned of, once, with the problems where it did."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for warning in row.get("warnings") or ():
            found.setdefault(str(warning), {})[row["problem"]] = None
    return [f"Warned on {', '.join(problems)}: {warning}" for warning, problems in found.items()]


def _of(rows: Iterable[dict] | None, study: str, setting: Setting | None = None) -> list[dict] | None:
    if rows is None:
        return None
    rows = [row for row in rows if row.get("study") == study]
    return rows if setting is None else [row for row in rows if setting_of(row) == setting]


def file_name(start: str, title: str) -> str:
    """The name of a figure: the title without blanks and commas."""
    return f"{start}_{title.replace(', ', '-').replace(' ', '')}.png"


def _comparison(pages: _Pages, rows: Sequence[Row], planned: Sequence[dict] | None, directory: Path) -> None:
    standings = comparison(rows)
    pages.heading("Comparison")
    if not standings:
        pages.say(stands_on(_of(rows, "comparison"), _of(planned, "comparison")))
        return
    pages.say(
        "Each optimizer at the setting of its grid with the lowest training loss on seed 0, on all seeds that have it: "
        "median (range of the seeds that got there). A training loss is the mean that `fit` reports for an epoch. "
        "Epochs and seconds to Adam's and to KFAC's lowest training loss are counted to that of the same seed; seconds "
        "are of training, the first epoch and its tracing included; – where the median seed never got there."
    )
    settings = list(dict.fromkeys(standing.setting for standing in standings))
    titles = [title_of(setting, settings) for setting in settings]
    for setting, title in zip(settings, titles, strict=True):
        own = [standing for standing in standings if standing.setting == setting]
        pages.heading(title, 3)
        pages.table(cells_of(summarise(own), SUMMARY))
        pages.say(stands_on(_of(rows, "comparison", setting), _of(planned, "comparison", setting)))
        edges = [(one.label, edge_of_grid(one.label, one.options)) for one in own]
        if any(edge for _, edge in edges):
            found = "; ".join(f"{label}, {edge}" for label, edge in edges if edge)
            pages.say(f"At the edge of their grids, so that a better setting may lie beyond: {found}.")
        pages.say(*conditions(row for standing in own for row in standing.rows.values()))
        if any(standing.rows for standing in own):
            name = file_name("losses", title)
            figures.save(figures.draw_losses(own, title), directory / name)
            pages.figure(name, f"losses on {title}")
    pages.heading("To Adam's lowest loss, and the cost of an epoch", 3)
    for name, draw in (("to_target.png", figures.draw_to_target), ("epoch_cost.png", figures.draw_epoch_cost)):
        figures.save(draw(standings, titles), directory / name)
        pages.figure(name, name.partition(".")[0].replace("_", " "))
    write_csv(summarise(standings), directory / "comparison.csv")
    if lines := per_epoch(standings):
        write_csv(lines, directory / "per_epoch.csv")
    _paper(pages, standings, rows, planned, directory)


def _paper(
    pages: _Pages, standings: Sequence[Standing], rows: Sequence[Row], planned: Sequence[dict] | None, directory: Path
) -> None:
    own = [standing for standing in standings if standing.setting.problem in PAPER]
    if not own:
        return
    pages.heading("Beside the paper")
    pages.say(f"Paper: {SOURCE}.", *NOTES, *batch_sizes(standing.setting for standing in own))
    for setting in dict.fromkeys(standing.setting for standing in own):
        pages.heading(f"{title_of(setting, [s.setting for s in own])}, the paper's and ours", 3)
        pages.table(cells_of(beside(s for s in own if s.setting == setting), BESIDE))
        pages.say(stands_on(_of(rows, "comparison", setting), _of(planned, "comparison", setting)))
    claims = judge(own)
    pages.heading("Claims", 3)
    pages.say('"Holds" and "does not hold" need ranges over seeds that do not overlap.', CHANCE, count_verdicts(claims))
    for problem in dict.fromkeys(line["problem"] for line in claims):
        pages.heading(f"{problem}, claims", 4)
        pages.table(cells_of((line for line in claims if line["problem"] == problem), CLAIM_COLUMNS))
    if lines := beside(own):
        write_csv(lines, directory / "paper.csv")
    write_csv(claims, directory / "claims.csv")


def _ablation(pages: _Pages, rows: Sequence[Row], planned: Sequence[dict] | None, directory: Path) -> None:
    cases = cases_of(rows, planned)
    pages.heading("Ablation")
    if not cases:
        pages.say(stands_on(_of(rows, "ablation"), _of(planned, "ablation")))
        return
    pages.say(
        "KPSVD's defaults, but for the method and what the case names: median (range) over seeds. A change is the "
        "median over seeds of both; it is within the seeds' spread where the ranges overlap. The seconds compared are "
        "those of the median epoch after the first: the first is mostly tracing, and given by itself."
    )
    settings = list(dict.fromkeys(case.setting for case in cases))
    for setting in settings:
        title, own = title_of(setting, settings), [case for case in cases if case.setting == setting]
        pages.heading(f"{title}, ablation", 3)
        pages.say(*conditions(row for case in own for row in case.rows.values()))
        name = file_name("ablation", title)
        figures.save(figures.draw_ablation(own, title), directory / name)
        pages.figure(name, f"ablation on {title}")
        for aspect in dict.fromkeys(case.aspect for case in own):
            _aspect(pages, aspect, [case for case in own if case.aspect == aspect], planned)
    write_csv(ablation_lines(cases), directory / "ablation.csv")


def _aspect(pages: _Pages, aspect: str, cases: Sequence[Case], planned: Sequence[dict] | None) -> None:
    pages.heading(f"{aspect}", 4)
    for name, title, form in (*MEASURES, *SECONDS):
        cells = table_of(cases, name, form)
        pages.table([[title, *cells[0][1:]], *cells[1:]])
    wanted = _of(planned, "ablation", cases[0].setting)
    if wanted is not None:
        wanted = [run for run in wanted if run["label"].startswith(f"{aspect}: ")]
    pages.say(stands_on((row for case in cases for row in case.rows.values()), wanted))
    pages.say(*sentences(cases))
