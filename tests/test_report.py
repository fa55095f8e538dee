"""Tables say no more than their images allow, explain their columns, and choose without test images."""

import pytest
from matplotlib.figure import Figure

from adaptive_inference.budgeted import (
    ExitPredictions,
    evaluate_thresholds,
    geometric_thresholds,
)
from adaptive_inference.finding import fit_full_policy
from adaptive_inference.points import evaluate_points
from adaptive_inference.policies import Policy
from engine.report import (
    best_within,
    budget_rows,
    budget_table,
    draw_curves,
    draw_runtime,
    save_figure,
    table,
    temperature_line,
)
from tests.helpers import OPERATIONS, make_predictions
from utils import percent


def rows_of(count):
    val, test = (ExitPredictions.from_logits(*make_predictions(count, seed)) for seed in (0, 1))
    thresholds = geometric_thresholds(val.confidence)
    points = evaluate_points("geometric", thresholds, Policy((0.0,) * 3), val, OPERATIONS)
    return budget_rows(points, test, OPERATIONS), thresholds, val, test


def test_rows_hold_held_out_and_test_results():
    rows, thresholds, val, test = rows_of(500)
    for row, own in zip(rows, thresholds, strict=True):
        expected = evaluate_thresholds(own, val, OPERATIONS), evaluate_thresholds(own, test, OPERATIONS)
        assert (row["val_operations"], row["operations"]) == tuple(round(x.operations) for x in expected)
        assert (row["val_acc1"], row["test_acc1"]) == pytest.approx([x.acc1 for x in expected], abs=1e-4)


def test_test_images_choose_nothing():
    """A row is not within a budget that its held-out images exceed, however cheap its test images are."""
    rows = [
        {"p": 1, "val_operations": 10, "operations": 12, "val_acc1": 50.0, "test_acc1": 50.0},
        {"p": 2, "val_operations": 21, "operations": 19, "val_acc1": 60.0, "test_acc1": 90.0},
    ]
    assert best_within(rows, 20)["p"] == 1
    assert best_within(rows, 21)["p"] == 2
    assert best_within(rows, 9) is None


def test_digits_follow_the_number_of_images():
    value = 100 / 6
    digits = {12: "17", 100: "17", 101: "16.7", 1000: "16.7", 10_000: "16.67", None: "16.67"}
    assert {count: percent(value, count) for count in digits} == digits
    shown = table([{"exit": 1, "acc1": value, "ece": 3.21}], ["exit", "acc1", "acc5", "ece"], 12)
    assert "17" in shown
    assert "16.67" not in shown
    assert "calibration error: mean distance between confidence and accuracy" in shown


def test_budgets_that_are_the_same_are_shown_once():
    rows, *_ = rows_of(8)
    text = budget_table(rows, rows, rows, OPERATIONS[-1], 8)
    numbers = [line for line in text.splitlines() if line.strip()[0].isdigit()]
    assert len(numbers) == len({line.split(maxsplit=1)[1] for line in numbers}) < 10
    assert "policy: of 40" in text
    assert "8 test images" in text
    assert "ensemble of exits" not in text  # the same as the optimised rule


def test_few_images_are_drawn_with_error_bars():
    rows, *_ = rows_of(50)
    exits = [{"operations": n, "acc1": 50.0} for n in OPERATIONS]
    for count, has_bars in ((50, True), (5000, False), (None, False)):
        figure = draw_curves({"run": (exits, rows, rows)}, count)
        figure.canvas.draw()
        (axes,) = figure.axes
        assert bool(axes.containers) == has_bars
        assert any(line.get_linestyle() == "-" for line in axes.lines) != has_bars


def test_letters_that_the_font_lacks_cost_no_warning(tmp_path, recwarn):
    figure = Figure()
    figure.suptitle("ねこ 猫")
    save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert not recwarn.list


def test_the_legend_of_runtime_covers_no_point():
    rows = [{"operations": n, "milliseconds": n, "acc1": 50.0 + n} for n in OPERATIONS]
    figure = draw_runtime(rows, rows, rows)
    figure.canvas.draw()
    assert all(axes.get_legend() is None for axes in figure.axes)
    (legend,) = figure.legends
    lowest = min(axes.get_window_extent().y0 for axes in figure.axes)
    assert legend.get_window_extent().y1 <= lowest


def test_the_line_of_temperatures_says_how_many_images():
    logits, targets = make_predictions(12)
    line = temperature_line(fit_full_policy(logits, targets), 12)
    assert "fitted on 12 held-out images, few" in line
    assert line.count("/") == 2
