"""One process or two, killed or told to stop at the moments that matter: every run goes on bit for bit, dropout on."""

import signal

import pytest

from tests.training.stopped_runs import MOMENTS, run_scenarios


@pytest.fixture(scope="module")
def found(tiny_base, tmp_path_factory):
    return run_scenarios(tiny_base, tmp_path_factory.mktemp("moments"), one={}, two={})


@pytest.mark.parametrize(("name", "processes"), [("one", 1), ("two", 2)])
def test_killed_or_stopped_at_the_moments_that_matter_a_run_goes_on_bit_for_bit(
    found, name, processes
):
    for number, (kind, ended) in enumerate([("SIGKILL", -signal.SIGKILL), ("SIGTERM", 75)]):
        for count, moment in enumerate(MOMENTS):
            stopped = [ended] * processes
            if kind == "SIGKILL" and processes == 2:
                stopped[1 - count % 2] = 1  # the other one finds itself alone
            step = MOMENTS[moment][number]
            wanted = [[stopped, [0] * processes], [[step]] * processes, [True, True]]
            assert found[name][f"{kind} {moment}"] == wanted, (kind, moment)
