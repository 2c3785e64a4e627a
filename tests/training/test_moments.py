"""One process or two, killed or told to stop at the moments that matter: every run goes on bit for bit, dropout on."""

import signal

import pytest

from tests.training.stopped_runs import MOMENTS, run_scenarios

STOPS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 75}
EVERY = [[name, moment] for name in STOPS for moment in MOMENTS]
ONE = [["SIGKILL", "evaluated 4"]]
TWO = [["SIGKILL", "part 2 of step 6"], ["SIGTERM", "evaluation 4"]]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(ONE, TWO, id="some"),
        pytest.param(EVERY, EVERY, id="every", marks=pytest.mark.slow),
    ],
)
def test_killed_or_stopped_at_the_moments_that_matter_a_run_goes_on_bit_for_bit(
    tiny_base, tmp_path, one, two
):
    found = run_scenarios(tiny_base, tmp_path, one={"stops": one}, two={"stops": two})
    for name, processes, stops in (("one", 1, one), ("two", 2, two)):
        for count, (kind, moment) in enumerate(stops):
            stopped = [STOPS[kind]] * processes
            if kind == "SIGKILL" and processes == 2:
                stopped[1 - count % 2] = 1  # the other one finds itself alone
            step = MOMENTS[moment][kind == "SIGTERM"]
            wanted = [[stopped, [0] * processes], [[step]] * processes, [True, True]]
            assert found[name][f"{kind} {moment}"] == wanted, (name, kind, moment)
