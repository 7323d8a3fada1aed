"""Each schedule, weight and curriculum against values worked out by hand from the paper's formulas."""

from math import log2

import pytest
import torch
from tiny_models import tiny_model

from layerskip_kernels.training import RECIPES, exit_weights
from layerskip_kernels.training.curriculum import enabled_exits, gradual, rotational
from layerskip_kernels.training.early_exit_loss import normalised_weights
from layerskip_kernels.training.layer_dropout import LayerDropout, dropout_rate, layer_schedule, time_schedule


def test_layer_schedule():
    # 5 layers: 2^(l/4) - 1
    table = [0.0, 0.189207115, 0.414213562, 0.681792831, 1.0]
    assert [layer_schedule(layer, 5) for layer in range(5)] == pytest.approx(table)


def test_time_schedule():
    assert [time_schedule(step, 5, "constant") for step in range(5)] == [1.0] * 5
    table = [0.0, 0.189207115, 0.414213562, 0.681792831, 1.0]
    assert [time_schedule(step, 5, "exponential") for step in range(5)] == pytest.approx(table)
    assert time_schedule(9, 5, "exponential") == pytest.approx(1.0)  # past the planned end
    assert time_schedule(0, 1, "exponential") == 0.0


def test_dropout_rate_is_the_product():
    # layer 2 of 5 at step 6 of 9, p_max 0.2: (2^0.5 - 1) · (2^0.75 - 1) · 0.2
    assert dropout_rate(2, 5, 0.2, 6, 9, "exponential") == pytest.approx(0.414213562 * 0.681792831 * 0.2)
    assert dropout_rate(4, 5, 0.2, 6, 9, "constant") == pytest.approx(0.2)
    assert dropout_rate(0, 5, 0.2) == 0


def test_exit_weights():
    # L = 4, sums of i ≤ l: 0, 1, 3; last layer 3 + e_scale · 3
    assert exit_weights(4, 0.2) == pytest.approx([0.0, 0.2, 0.6, 3.6])
    assert exit_weights(4, 1.0) == pytest.approx([0.0, 1.0, 3.0, 6.0])
    assert exit_weights(4, 0.0) == pytest.approx([0.0, 0.0, 0.0, 3.0])
    # L = 6: 0, 1, 3, 6, 10; last 5 + e_scale · 10
    assert exit_weights(6, 0.1) == pytest.approx([0.0, 0.1, 0.3, 0.6, 1.0, 6.0])


def test_weights_are_normalised_over_the_enabled_layers():
    assert normalised_weights((1, 2, 3), 4, 0.2) == pytest.approx({1: 0.2 / 4.4, 2: 0.6 / 4.4, 3: 3.6 / 4.4})
    assert normalised_weights((3, 0, 2), 4, 0.2) == pytest.approx({2: 0.6 / 4.2, 3: 3.6 / 4.2})
    assert normalised_weights((1,), 4, 0.2) == {1: 1.0}
    assert normalised_weights((0,), 4, 0.2) == {3: 1.0}  # nothing else to train
    assert normalised_weights((1, 2), 4, 0.0) == {3: 1.0}


def test_rotational():
    steps = [rotational(step, 7, 3, include_last=False) for step in range(5)]
    assert steps == [(0, 3, 6), (1, 4), (2, 5), (0, 3, 6), (1, 4)]
    steps = [rotational(step, 7, 3) for step in range(4)]
    assert steps == [(0, 3, 6), (1, 4, 6), (2, 5, 6), (0, 3, 6)]
    assert rotational(2, 4, 1) == (0, 1, 2, 3)
    for layers, interval in ((32, 8), (24, 23), (40, 39)):
        counts = [len(rotational(t, layers, interval, include_last=False)) for t in range(2 * interval)]
        assert max(counts) == -(-layers // interval)


def test_gradual():
    # L = 4, T = 40: one more layer every 5 steps
    firsts = {0: 3, 4: 3, 5: 2, 9: 2, 10: 1, 14: 1, 15: 0, 20: 0, 39: 0}
    for step, first in firsts.items():
        assert gradual(step, 4, 40) == tuple(range(first, 4))
    # T / 2L = 1.5 steps
    assert [gradual(step, 3, 9)[0] for step in range(5)] == [2, 2, 1, 0, 0]


def test_enabled_exits_by_name():
    assert enabled_exits("all", 5, 4, 10) == (0, 1, 2, 3)
    assert enabled_exits("rotational", 1, 6, 10, interval=4, include_last=False) == (1, 5)
    assert enabled_exits("gradual", 0, 6, 10) == (5,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: enabled_exits("random", 0, 4, 10), "curriculum='random': choose all, rotational, gradual$"),
        (lambda: rotational(0, 4, 5), r"interval=5: the model has 4 layers, choose 1\.\.4$"),
        (lambda: gradual(0, 4, 0), "total_steps=0: must be >= 1$"),
        (lambda: time_schedule(0, 4, "linear"), "schedule='linear': choose constant, exponential$"),
        (lambda: layer_schedule(0, 1), "num_layers=1: layer dropout needs at least 2$"),
        (lambda: exit_weights(4, -1), "e_scale=-1: must be >= 0$"),
        (lambda: LayerDropout(torch.nn.Linear(1, 1), 1.5), r"max_rate=1.5: choose 0\.\.1$"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match="^" + message):
        call()


def test_recipes_are_arguments_of_the_trainer():
    from layerskip_kernels.training import LayerSkipArguments

    for name, recipe in RECIPES.items():
        arguments = LayerSkipArguments(use_cpu=True, report_to=[], **recipe.arguments())
        assert arguments.layer_dropout == recipe.layer_dropout and arguments.curriculum == recipe.curriculum, name
    assert RECIPES["llama2-7b-continual"].arguments() == {
        "layer_dropout": 0.1,
        "layer_dropout_schedule": "constant",
        "e_scale": 0.2,
        "curriculum": "rotational",
        "curriculum_interval": 8,
        "learning_rate": 3e-5,
    }


def test_rate_of_an_attached_model_follows_the_schedules():
    dropout = LayerDropout(tiny_model("llama2"), 0.4, total_steps=11, schedule="exponential")
    dropout.set_step(5)
    assert [log2(1 + dropout.rate(layer) / 0.4 / (2**0.5 - 1)) for layer in range(4)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )
