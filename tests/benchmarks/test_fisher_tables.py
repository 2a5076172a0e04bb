"""Tables and sentences of the study of errors follow from its numbers."""

import inspect

METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def row(epoch, layer, values, second=None):
    """A layer of 3 × 2 after an epoch: error 1 by method, and error 2 of all."""
    errors = {method: {"error_1": value, "error_2": second} for method, value in zip(METHODS, values, strict=True)}
    return {"epoch": epoch, "layer": layer, "d_in": 3, "d_out": 2, "errors": errors, "singular_values": [1.0]}


def rows(last=(0.4, 0.1, 0.06, 0.06, 0.08)):
    return [
        row(0, "a", [0.9] * 5, 0.5),
        row(0, "b", [0.7] * 5),
        row(5, "a", [2 * value for value in last], 0.25),
        row(5, "b", last),
        row(2, "a", [0.01] * 5, 0.125),
    ]


def test_table_has_medians_and_ranges_of_the_first_and_the_last_epoch():
    from fisher_tables import table

    cells = table(rows())
    assert cells[0] == ["method", "error 1, epoch 0", "error 1, epoch 5", "error 2, epoch 0", "error 2, epoch 5"]
    assert cells[1] == ["kfac", "0.8 (0.7–0.9)", "0.6 (0.4–0.8)", "0.5", "0.25"]
    assert [line[0] for line in cells[1:]] == list(METHODS) and cells[3][2] == "0.09 (0.06–0.12)"
    assert table([row(0, "a", [None] * 5), row(1, "a", [0.0] * 5)])[1] == ["kfac", "–", "0"]
    assert table(rows()[:1])[0] == ["method", "error 1, epoch 0", "error 2, epoch 0"]


def test_claims_of_the_paper_turn_with_the_numbers():
    from fisher_tables import sentences

    kfac, others, below, twins = sentences([one for one in rows() if one["epoch"] != 2])
    assert kfac.endswith("kfac 2 of 2, median 0.6. The claim holds for the median.") and "0.2 to 0.8" in kfac
    assert "kpsvd 2 of 2, median 0.15; deflation 2 of 2, median 0.09" in others and "0.05 to 0.2" in others
    assert "kpsvd in 2 of 2, deflation in 2 of 2" in below and twins.endswith("is equal.")
    kfac, others, below, twins = sentences([row(0, "a", [0.3] * 5), row(1, "a", [0.1, 0.3, 0.04, 0.03, 0.1])])
    assert kfac.endswith("does not hold for the median: kfac is below.")
    assert others.endswith("does not hold for the median: kpsvd is above, deflation is below, lanczos is below.")
    assert "kpsvd in 0 of 1, deflation in 1 of 1" in below and "kfac_corrected in 0 of 1" in below
    assert "at most 0.25 of itself" in twins
    assert sentences([row(0, "a", [0.3] * 5)]) == sentences([row(1, "a", [None] * 5)]) == []


def test_section_names_the_layers_their_limits_and_what_fits_nowhere():
    import fisher_study
    import fisher_tables
    from problems import FACES

    page = fisher_tables.section({"curves": rows(), "mnist": []})
    assert "a (3 × 2, error 2 too), b (3 × 2)." in page and "### mnist, errors\n\nNo layer is small enough." in page
    assert "| kfac | 0.8 (0.7–0.9) |" in page and "(errors.png)" in page
    assert "at most 8,192 rows; error 2 of those of at most 2,048" in page and "15,030 rows" in page
    assert "errors.png" not in fisher_tables.section({"mnist": []})
    defaults = inspect.signature(fisher_study.measure).parameters
    assert defaults["dense_size"].default == fisher_tables.DENSE_SIZE
    assert defaults["spectrum_size"].default == fisher_tables.SPECTRUM_SIZE
    both = [(FACES[k], FACES[k + 1]) for k in range(len(FACES) - 1)]
    sizes = [(a + 1) * b for one, other in both for a, b in ((one, other), (other, one))]
    assert min(sizes) == fisher_tables.SMALLEST_OF_FACES > fisher_tables.DENSE_SIZE
