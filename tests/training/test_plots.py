import numpy as np
import pytest
from matplotlib.image import imread

from lora_sentiment.training.history import EvalPoint, History, TrainPoint
from lora_sentiment.training.plots import plot_confusion, plot_training


@pytest.mark.parametrize("num_steps", [1, 200])
def test_a_training_curve_is_drawn_and_repeats(tmp_path, num_steps):
    history = History(
        steps=[TrainPoint(i + 1, 1.0, 1 / (i + 1), 0.1, 1.0, 9, 1.0) for i in range(num_steps)],
        evaluations=[EvalPoint(num_steps, 1.0, 0.9, 0.2, 0.9, True, 9, 1.0)],
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
