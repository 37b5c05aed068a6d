"""Our losses against what TRL and tunix returned for the same arrays: `make parity` runs them, tests/golden has the results."""

from __future__ import annotations

import numpy as np
import pytest

from parity import cases, golden, inputs

_NAMED = [(system, case) for system, of_system in cases.CASES.items() for case in of_system]
_GOLDEN = {system: golden.load(system) for system in cases.CASES}


@pytest.mark.parametrize(("system", "case"), _NAMED, ids=[f"{system}: {case.name}" for system, case in _NAMED])
def test_value_and_gradient_are_those_of_the_other_system(system, case):
    theirs = _GOLDEN[system]["cases"][case.name]
    assert theirs["options"] == case.options, "the case changed: run `python -m parity.compare --write`"
    loss, gradient = cases.loss_and_gradient(case, _GOLDEN[system]["inputs"])
    tolerance = cases.TOLERANCE[system]
    np.testing.assert_allclose(loss, theirs["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(gradient, theirs["gradient"], rtol=0, atol=tolerance * np.abs(theirs["gradient"]).max())


@pytest.mark.parametrize("system", cases.CASES)
def test_golden_files_hold_the_seeded_inputs_and_every_case_once(system):
    for name, array in inputs.seeded_inputs().items():
        np.testing.assert_array_equal(_GOLDEN[system]["inputs"][name], array)
    assert list(_GOLDEN[system]["cases"]) == [case.name for case in cases.CASES[system]]
    assert system in _GOLDEN[system]["origin"] and all(_GOLDEN[system]["versions"].values())


def test_inputs_stay_off_the_kinks_and_reach_every_branch():
    x = inputs.seeded_inputs()
    mask = x["mask"]
    log_ratio = np.where(mask, x["logprobs"] - x["old_logprobs"], 0)
    token_ratio, sequence_ratio = np.exp(log_ratio)[mask], np.exp(log_ratio.sum(-1) / mask.sum(-1))
    log_weight = np.where(mask, x["old_logprobs"] - x["behavior_logprobs"], 0)
    token_weight, sequence_weight = np.exp(log_weight)[mask], np.exp(log_weight.sum(-1))
    distance = (np.where(mask, x["behavior_logprobs"] - x["logprobs"], 0)).sum(-1) / mask.sum(-1)
    for ratios, bounds in (
        (token_ratio, (0.8, 1.2, 1.28, 1.3, 1.4)),
        (sequence_ratio, (0.9, 1.1, 1.15)),
        (token_weight, (0.8, 1.2)),
        (sequence_weight, (1.2,)),
        (distance, (0.05,)),
    ):
        for bound in bounds:  # systems differ in the gradient at a tie, and only there
            assert np.abs(ratios - bound).min() > 1e-3
            assert (ratios < bound).any() and (ratios > bound).any()


@pytest.mark.parametrize(
    ("system", "one", "other"),
    [
        ("trl", "grpo", "bnpo"),
        ("trl", "grpo", "grpo delta"),
        ("trl", "grpo", "grpo top entropy"),
        ("trl", "grpo", "grpo truncated rows masked"),
        ("trl", "grpo beta", "grpo beta bias-corrected"),
        ("trl", "gspo", "luspo"),
        ("trl", "vespo", "vespo gates"),
        ("trl", "vespo", "vespo against the sampler"),
        ("trl", "grpo token truncate", "grpo token truncate two-sided"),
        ("trl", "grpo token mask", "grpo token mask two-sided"),
        ("trl", "grpo token truncate", "grpo sequence truncate"),
        ("trl", "grpo token mask", "grpo sequence mask"),
        ("trl", "grpo", "grpo off-policy rows masked"),
        ("tunix", "grpo", "clip-higher"),
        ("tunix", "grpo", "dual clip"),
        ("tunix", "token-scale", "token-sum"),
        ("tunix", "kl", "mse_kl"),
        ("tunix", "grpo", "empty row"),
    ],
)
def test_the_options_make_a_difference(system, one, other):
    first, second = (_GOLDEN[system]["cases"][name]["gradient"] for name in (one, other))
    assert np.abs(first - second).max() > 1e-2 * np.abs(first).max()
