"""Training processes killed at random moments and inside saves: every run goes on to the same adapter."""

import sys

import pytest

from tests.training.stopped_runs import run_scenarios


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "kills", "in_saves"),
    [pytest.param(1, 50, 20, id="one"), pytest.param(2, 16, 6, id="either of two")],
)
def test_killed_anywhere_a_run_goes_on_bit_for_bit(tiny_base, tmp_path, processes, kills, in_saves):
    found = run_scenarios(
        tiny_base, tmp_path, random={"kills": kills, "in_saves": in_saves, "processes": processes}
    )["random"]
    told = {key: value for key, value in found.items() if key != "outcomes"} | {
        "runs": len(found["outcomes"])
    }
    sys.stdout.write(f"{told}\n")
    assert found["kills"] >= kills, told
    assert found["phases"]["save"] >= in_saves, told
    assert found["restarts"] > kills / 2, told
    assert len(found["outcomes"]) > 1
    assert all(outcome == [True, True] for outcome in found["outcomes"])
