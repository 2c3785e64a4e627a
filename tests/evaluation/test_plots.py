import numpy as np
import pytest
from matplotlib.image import imread

from lora_sentiment.evaluation.plots import (
    ParetoPoint,
    name_labels,
    plot_confusion,
    plot_pareto,
    plot_training,
)
from lora_sentiment.training.history import EvalPoint, History, TrainPoint

LABELS = {
    "dollars": ["$", "$$", "$5 to $20", r"\\frac{$x"],
    "other scripts": ["好评", "差评", "👍", "ดี"],
    "long": ["x" * 200 + "a", "x" * 200 + "b", "ok"],
    "steering": ["a\nb", "a\tb", "\x1b[31mred", "\u202eabc", "\u200b", "\u200d"],
    "numbers": ["#1", "好", "#0 #1"],
    "right to left": ["جيد", "سيئ", "טוב"],
}


@pytest.mark.parametrize("num_steps", [1, 200])
def test_a_training_curve_is_drawn_and_repeats(tmp_path, num_steps):
    history = History(
        steps=[TrainPoint(i + 1, 1.0, 1 / (i + 1), 0.1, 1.0, 9, 1.0) for i in range(num_steps)],
        evaluations=[
            EvalPoint(num_steps, 1.0, {"accuracy": 0.9, "log_loss": 0.2}, 0.9, True, 9, 1.0)
        ],
        best_step=num_steps,
    )
    for name in ("a.png", "b.png"):
        plot_training(history, tmp_path / name, title="x")
    assert imread(tmp_path / "a.png").shape[:2] == (540, 960)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_confusion_matrix_is_drawn_with_an_empty_row(tmp_path):
    plot_confusion(
        np.array([[5, 1, 0], [0, 0, 0], [2, 3, 9]]), tmp_path / "c.png", labels="abc", title="x"
    )
    assert imread(tmp_path / "c.png").size


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_any_label_is_drawn_as_text_and_told_apart(tmp_path, labels):
    names = name_labels(labels)
    assert len(set(names)) == len(labels)
    assert max(map(len, names)) <= 40
    assert all(name.isprintable() for name in names)
    matrix = np.eye(len(labels), dtype=np.int64)
    plot_confusion(matrix, tmp_path / "a.png", labels=labels, title=labels[0])
    history = History([TrainPoint(1, 1.0, 0.5, 0.1, 1.0, 9, 1.0)], best_step=1)
    plot_training(history, tmp_path / "b.png", title=labels[0])
    points = [ParetoPoint(label, 10, 0.5, 0.4, 0.6, 1) for label in labels]
    plot_pareto(points, tmp_path / "c.png", title=labels[0])


def test_a_label_that_is_no_mathematics_keeps_its_dollars():
    assert name_labels(["$5 to $20", "under $5"]) == ["$5 to $20", "under $5"]
    assert name_labels(["好评", "bad"]) == ["#0", "bad"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_labels", [2, 26, 100, 1000])
def test_a_picture_is_bounded_at_any_number_of_labels(tmp_path, num_labels):
    matrix = np.ones((num_labels, num_labels), dtype=np.int64)
    names = [f"a topic with a long name {i}" for i in range(num_labels)]
    plot_confusion(matrix, tmp_path / "a.png", labels=names, title="x")
    assert max(imread(tmp_path / "a.png").shape[:2]) < 2500
    assert (tmp_path / "a.png").stat().st_size < 500_000
