"""The autoencoder tutorial's pure parts: arithmetic of the table, networks, batches, failures of single methods."""

import csv
import math

import keras
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("losses", "target", "epoch"),
    [
        ([3.0, 2.0, 1.0], 2.0, 2),
        ([3.0, 2.0, 1.0], 2.5, 2),
        ([3.0, 2.0, 1.0], 0.5, None),
        ([1.0, 2.0], 1.0, 1),
        ([math.nan, 1.0], 1.0, 2),
        ([], 1.0, None),
    ],
)
def test_epochs_to_is_the_first_epoch_at_or_below_the_target(losses, target, epoch):
    from autoencoder_report import epochs_to

    assert epochs_to(losses, target) == epoch


def test_best_loss_ignores_nan_and_infinity():
    from autoencoder_report import best_loss

    assert best_loss([math.inf, 2.0, 1.5, math.nan]) == 1.5
    assert best_loss([math.nan]) is None and best_loss([]) is None


def test_seconds_per_epoch_leaves_the_traced_first_epoch_out():
    from autoencoder_report import seconds_per_epoch

    assert seconds_per_epoch([10.0, 11.0, 13.0, 14.0]) == pytest.approx(1.0)
    assert seconds_per_epoch([10.0]) == 10.0
    assert seconds_per_epoch([]) is None


def test_table_compares_with_adams_best_wherever_adam_stands():
    from autoencoder_report import table_rows
    from autoencoder_training import Run

    kfac = Run("kfac", losses=[0.5, 0.2, 0.1], seconds=[4.0, 6.0, 8.0], status="finished", held_out_loss=0.12)
    adam = Run("adam", losses=[0.9, 0.3, 0.35], seconds=[2.0, 3.0, 4.0], status="finished", held_out_loss=0.4)
    sgd = Run("sgd", losses=[0.9], seconds=[1.0], status="failed: ValueError: no")
    rows = table_rows([kfac, adam, sgd])
    assert rows[0] == ["kfac", "3", "0.10000", "0.12000", "2", "6.0", "2.00", "4.0", "finished"]
    assert rows[1][4:6] == ["2", "3.0"]
    assert rows[2][3:6] == ["–", "–", "–"] and rows[2][-1] == "failed"
    assert [row[4] for row in table_rows([kfac, sgd])] == ["–", "–"]


def test_epochs_are_written_as_they_were_recorded(tmp_path):
    from autoencoder_report import write_epochs
    from autoencoder_training import Run

    runs = [Run("adam", [0.5, math.nan], [1.25, 2.5]), Run("sgd")]
    write_epochs(runs, tmp_path / "epochs.csv")
    with (tmp_path / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["epoch"], row["seconds"]) for row in rows] == [
        ("adam", "1", "1.250"),
        ("adam", "2", "2.500"),
    ]
    assert float(rows[0]["loss"]) == 0.5 and math.isnan(float(rows[1]["loss"]))


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("curves", [400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("mnist", [1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces", [2000, 1000, 500, 30, 500, 1000, 2000, 625]),
    ],
)
def test_networks_are_the_papers_with_linear_code_and_output(name, units):
    from autoencoder_problems import PROBLEM_FACTORIES, build_autoencoder

    problem = PROBLEM_FACTORIES[name](32, 0)
    model = build_autoencoder(problem.widths, keras.layers.Dense, 0)
    assert [layer.units for layer in model.layers] == units
    linear = [layer.units for layer in model.layers if layer.activation is keras.activations.linear]
    assert linear == [min(units), units[-1]]
    assert model.output_shape[-1] == problem.train_images.shape[1] == problem.test_images.shape[1]


def test_equal_seeds_give_equal_weights_and_no_two_layers_share_theirs():
    from autoencoder_problems import build_autoencoder

    first, second, other = (build_autoencoder((9, 9, 9, 4), keras.layers.Dense, seed) for seed in (1, 1, 2))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.get_weights()[0] != other.get_weights()[0]).all()
    assert (first.get_weights()[0] != first.get_weights()[2]).all()


def test_batches_depend_on_the_seed_alone_cover_each_image_once_and_change_every_epoch():
    from autoencoder_training import batches

    images = np.arange(10, dtype=np.float32)[:, None]

    def epochs(seed):
        data = batches(images, 3, seed)
        return [np.concatenate([x.numpy().ravel() for x, _ in data]) for _ in range(3)]

    first = epochs(0)
    for order, again in zip(first, epochs(0), strict=True):
        np.testing.assert_array_equal(order, again)
        assert len(order) == 9 and len(set(order)) == 9
    assert (first[0] != first[1]).any() and (first[0] != epochs(1)[0]).any()


def test_lowest_loss_is_what_keras_gives_a_perfect_copy():
    from autoencoder_problems import pixel_entropy

    images = np.random.default_rng(0).uniform(0.01, 0.99, (20, 30)).astype(np.float32)
    logits = np.log(images / (1 - images))
    expected = keras.losses.BinaryCrossentropy(from_logits=True)(images, logits)
    assert pixel_entropy(images) == pytest.approx(float(expected), rel=1e-5)


def test_faces_are_standardised_and_turned_back_into_pixels():
    from autoencoder_problems import PROBLEM_FACTORIES

    from keras_kpsvd.datasets import load_faces

    problem = PROBLEM_FACTORIES["faces"](200, 0)
    assert problem.train_images.std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(problem.train_images.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(problem.to_pixels(problem.train_images), load_faces(200).images, atol=1e-5)


@pytest.fixture
def tiny(monkeypatch):
    """A problem and options that train in a second."""
    import autoencoder_problems
    from autoencoder import parse_arguments

    problem = autoencoder_problems.PROBLEM_FACTORIES["curves"](32, 0)
    monkeypatch.setattr("autoencoder_training.make_model", _tiny_model)
    return problem, parse_arguments(["--batch-size", "16", "--out", "/tmp"])


def _tiny_model(problem, method, options):
    from autoencoder_problems import build_autoencoder

    if method == "kfac":
        raise RuntimeError("no such luck\nand more")
    model = build_autoencoder((784, 8, 4), keras.layers.Dense, 0)
    model.compile(keras.optimizers.SGD(math.nan if method == "sgd" else 0.1), problem.loss)
    return model


def test_method_that_fails_is_a_row_with_its_reason(tiny, capsys):
    from autoencoder_training import train

    problem, options = tiny
    runs = []
    train(problem, "kfac", 2, options, runs)
    assert runs[0].status == "failed: RuntimeError: no such luck" and runs[0].epochs == 0


def test_method_that_diverges_is_a_row_and_is_drawn_without_it(tiny, tmp_path):
    from autoencoder_report import write_report
    from autoencoder_training import train

    problem, options = tiny
    runs = []
    for method in ("sgd", "adam"):
        train(problem, method, 2, options, runs)
    assert [run.status for run in runs] == ["diverged", "finished"]
    report = write_report(problem, runs, "description", tmp_path)
    assert "diverged" in report and (tmp_path / "loss.png").stat().st_size > 5000


def test_recorder_counts_training_time_only(tiny, monkeypatch):
    import autoencoder_training

    ticks = iter([100.0, 103.0, 110.0, 112.0])
    monkeypatch.setattr(autoencoder_training.time, "perf_counter", lambda: next(ticks))
    run = autoencoder_training.Run("adam")
    recorder = autoencoder_training.EpochRecorder(run)
    for epoch, loss in enumerate((0.5, 0.25)):
        recorder.on_epoch_begin(epoch)
        recorder.on_epoch_end(epoch, {"loss": loss})
    assert run.seconds == [3.0, 5.0] and run.losses == [0.5, 0.25]
