"""The size of the optimizer's state, counted by hand for a network of one layer."""

import csv

import pytest


@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
def test_sizes_are_those_of_the_variables_counted_by_hand(method, monkeypatch):
    import keras
    import state_memory

    import keras_kpsvd

    def one_layer():
        return keras.Sequential([keras.Input((199,)), keras_kpsvd.KPSVDDense(10)])

    monkeypatch.setitem(state_memory.NETWORKS, "one layer", one_layer)
    row = state_memory.measure("one layer", method)
    mib = 2**20 / 4  # of float32
    factors, preconditioner = 200 * 201 / 2 + 10 * 11 / 2, 200 * 64 + 64 + 1 + 10**2
    if method == "kfac":  # Both bases, the eigenvalues of either side, and S twice: averaged, and damped and inverted.
        preconditioner = 200 * 64 + 10**2 + 65 + 10 + 2 * 65 * 10
    else:
        factors, preconditioner = 2 * factors, preconditioner + 200 * 64 + 64 + 10**2 + 10
    assert row.parameters == row.momentum == 2000 / mib
    assert row.factors == factors / mib and row.preconditioners == pytest.approx(preconditioner / mib)
    assert row.adam == pytest.approx(4000 / mib, abs=20 / mib)
    assert row.other < 200 / mib  # counters and coefficients
    total = row.momentum + row.factors + row.preconditioners + row.other
    assert row.ratio == pytest.approx(total / row.adam)


def test_every_network_and_method_is_a_line_of_the_table(monkeypatch, tmp_path, capsys):
    import state_memory

    networks = {"digits": state_memory.PROBLEMS["digits"].build}
    monkeypatch.setattr(
        state_memory, "NETWORKS", {name: lambda build=build: build(0) for name, build in networks.items()}
    )
    state_memory.main(["--out", str(tmp_path / "state.csv")])
    printed = capsys.readouterr().out
    with (tmp_path / "state.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(state_memory.METHODS)
    assert all(f"{float(row['ratio']):.2f} × Adam's" in printed for row in rows)
