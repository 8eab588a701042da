"""Settings of a training: what is impossible is refused, and the warm-up is the Trainer's."""

import pytest

from peft_xmask.cli.classify import _training_arguments
from peft_xmask.cli.train_settings import TrainSettings
from peft_xmask.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("epochs", 0.0),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("head_learning_rate", -1.0),
        ("mask_learning_rate", 0.0),
        ("warmup", -0.1),
        ("warmup", 1.0),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} is invalid"):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.06, 6), (0.3, 30)])
def test_the_warm_up_is_a_share_of_the_steps(warmup, steps, tmp_path):
    arguments = _training_arguments(TrainSettings(max_steps=100, warmup=warmup), str(tmp_path))
    assert arguments.get_warmup_steps(100) == steps
