import os

import pytest
import torch
from accelerate import PartialState

from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.launch import join_launch, make_accelerator, set_threads


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps 4"),
    ],
)
def test_launch_settings_that_disagree_are_refused_by_name(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        make_accelerator(join_launch(), "float32")


def test_a_launch_setting_that_agrees_is_fine(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator(join_launch(), "float32").mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is right on a GPU")
def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ModelError, match="float16 needs a GPU"):
        make_accelerator(join_launch(), "float16")


def test_threads_are_the_usable_cores_divided_among_local_processes(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert set_threads(PartialState()) == torch.get_num_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert set_threads(PartialState()) == torch.get_num_threads() == 1
    monkeypatch.undo()
    set_threads(PartialState())
