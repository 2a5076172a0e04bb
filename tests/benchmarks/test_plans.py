"""The plan of the evidence, and its file."""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from .conftest import main_of_reproduce as _main

CONTESTANTS = ("sgd", "adam", "adamw", "muon", "kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def test_every_contestant_is_tried_with_as_many_settings_and_runs_on_as_many_seeds():
    import contestants
    from plans import SCALES, make_plan

    assert tuple(contestants.CONTESTANTS) == CONTESTANTS
    plan = [run for run in make_plan("standard") if run.study == "comparison"]
    assert {run.problem for run in plan} == {"curves", "mnist", "faces", "conv"}
    searched = Counter((run.problem, run.label) for run in plan if run.seed == 0)
    chosen = Counter((run.problem, run.label) for run in plan if run.seed != 0)
    assert set(searched.values()) == {SCALES["standard"].settings} and set(chosen.values()) == {2}
    assert len(searched) == len(chosen) == 4 * len(CONTESTANTS)
    assert all((run.options is None) == (run.seed != 0) for run in plan)
    assert all(run.options is not None or len(run.grid) == 3 for run in plan)


@pytest.mark.parametrize("scale", ["quick", "standard", "paper"])
def test_no_two_runs_of_a_plan_have_the_same_name_and_a_file_brings_the_plan_back(scale, tmp_path):
    from plans import make_plan, read_plan, same, write_plan

    plan = make_plan(scale)
    assert len({run.key for run in plan}) == len(plan)
    write_plan(tmp_path / "plan.json", scale, plan)
    found_scale, found = read_plan(tmp_path / "plan.json")
    assert found_scale == scale and same(found, plan) and [run.key for run in found] == [run.key for run in plan]
    assert not same(found[:-1], plan) and not same([replace(found[0], epochs=999), *found[1:]], plan)


def test_settings_are_arguments_that_the_optimizers_take():
    import contestants

    for contestant in contestants.CONTESTANTS.values():
        for options in contestant.grid:
            config = contestants.make_optimizer(contestant.optimizer, options).get_config()
            assert all(config[name] == pytest.approx(value) for name, value in options.items())


def test_ablation_changes_one_thing_at_a_time():
    from contestants import METHODS
    from plans import ablation_cases

    cases = list(ablation_cases(64, METHODS, ["lanczos"], exact=True))
    changed = {
        "damping": {"damping_rule", "damping"},
        "indefinite": {"indefinite"},
        "conjugate gradients": {"conjugate_steps"},
        "interval": {"curvature_interval", "inverse_interval"},
        "batch": {"fisher_batch_size"},
        "fisher": {"fisher"},
    }
    for label, options in cases:
        assert options.keys() - {"method"} <= changed[label.partition(":")[0]]
    methods = {aspect: {o["method"] for label, o in cases if label.startswith(aspect)} for aspect in changed}
    assert methods["damping"] == set(METHODS)
    assert methods["indefinite"] == {"deflation", "lanczos", "kfac_corrected"}
    assert all(methods[aspect] == {"lanczos"} for aspect in ("conjugate gradients", "interval", "batch", "fisher"))
    by_label = {}
    for label, options in cases:
        by_label.setdefault(label, []).append({k: v for k, v in options.items() if k != "method"})
    assert by_label["damping: factor, λ=0.003"] == [{"damping_rule": "factor", "damping": 0.003}] * 5
    intervals = [own[0] for label, own in by_label.items() if "interval" in label]
    assert intervals == [{}, *({"curvature_interval": n, "inverse_interval": n} for n in (5, 20, 100))]
    steps = [own[0] for label, own in by_label.items() if "conjugate" in label]
    assert steps == [{}, {"conjugate_steps": 2}, {"conjugate_steps": 3}]
    assert by_label["batch: quarter"][0] == {"fisher_batch_size": 16}
    assert by_label["batch: whole"][0] == {"fisher_batch_size": 64}
    assert not any("exact" in label for label, _ in ablation_cases(64, METHODS, METHODS, exact=False))


def test_cases_that_name_no_option_are_those_of_the_defaults():
    """The labels say "1" and "growing" where the options are left to KPSVD."""
    from plans import DEFAULTS

    import keras_kpsvd

    config = keras_kpsvd.KPSVD().get_config()
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS


def test_a_chosen_setting_at_the_edge_of_its_grid_is_told():
    from contestants import edge_of_grid

    assert edge_of_grid("adam", {"learning_rate": 1e-2}) == "learning_rate=0.01 is the largest tried"
    assert edge_of_grid("adam", {"learning_rate": 1e-3}) == "learning_rate=0.001 is the smallest tried"
    assert edge_of_grid("sgd", {"momentum": 0.9, "learning_rate": 10.0}) == "learning_rate=10 is the largest tried"
    assert edge_of_grid("kfac", {"method": "kfac", "damping": 0.001}) == "damping=0.001 is the smallest tried"
    inside = [("adam", {"learning_rate": 3e-3}), ("kfac", {"method": "kfac"}), ("lion", {"rate": 1.0}), ("adam", None)]
    assert [edge_of_grid(*one) for one in inside] == [None] * 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken", "holds no plan"),
        ("[]", "holds no plan"),
        ({"format": 99, "scale": "quick", "runs": []}, "format 99"),
        ({"format": 1, "scale": "quick", "runs": [{"problem": "digits"}]}, "another version"),
        ({"format": 1, "scale": "huge", "runs": []}, "another version"),
        ({"format": 1, "scale": "quick", "runs": "all"}, "another version"),
        ({"optimizer": "lion"}, "run 2"),
        ({"problem": ["digits"]}, "run 2"),
        ({"study": None}, "run 2"),
        ({"label": 7}, "run 2"),
        ({"batch": "x"}, "run 2"),
        ({"epochs": 0}, "run 2"),
        ({"samples": 1.5}, "run 2"),
        ({"seed": True}, "run 2"),
        ({"options": None, "grid": None}, "run 2"),
        ({"options": None, "grid": []}, "run 2"),
        ({"options": [1]}, "run 2"),
        ("other sizes", "--replan"),
        ("other scale", "scale 'standard'"),
    ],
)
def test_a_plan_of_another_version_is_one_line_and_nothing_is_overwritten(content, words, started, tmp_path, capsys):
    from plans import make_plan

    plan = [asdict(run) for run in make_plan("quick")]
    if isinstance(content, dict) and "format" not in content:
        content = {"format": 1, "scale": "quick", "runs": [plan[0], plan[1] | content, *plan[2:]]}
    elif content == "other sizes":
        content = {"format": 1, "scale": "quick", "runs": plan[:-1]}
    elif content == "other scale":
        content = {"format": 1, "scale": "standard", "runs": plan}
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "plan.json").write_text(text)
    (tmp_path / "runs.jsonl").write_text("kept\n")
    assert _main(tmp_path, "run") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and words in errors[0]
    assert (tmp_path / "plan.json").read_text() == text and (tmp_path / "runs.jsonl").read_text() == "kept\n"
    assert started.runs == []
    if words not in ("--replan", "scale 'standard'"):
        assert _main(tmp_path, "status") == _main(tmp_path, "report") == 2
        assert len(capsys.readouterr().err.splitlines()) == 2


def test_refreshes_are_counted_as_the_optimizer_schedules_them():
    from plans import refreshes_within

    from keras_kpsvd.curvature.intervals import next_due

    for interval in (1, 7, "growing"):
        for updates in (1, 15, 90, 333):
            dues = {0}
            while max(dues) < updates:
                dues.add(int(next_due(max(dues), interval)))
            assert refreshes_within(updates, interval) == len([due for due in dues if due < updates])
