"""The short examples run, and print what they promise; examples/own_loss.py is run by the README's tests."""

from __future__ import annotations

import re
import runpy


def test_the_optax_loop_learns_from_rollouts_four_updates_old(capsys):
    runpy.run_module("examples.optax_loop", run_name="__main__")
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d+)", capsys.readouterr().out)]
    assert len(rewards) == 6
    assert rewards[0] < 0.4 and rewards[-1] > 0.95  # one answer of four is right


def test_the_audit_prints_a_bias_that_grows_with_drift_for_both_losses(capsys):
    runpy.run_module("examples.audit_own_loss", run_name="__main__")
    lines = re.findall(r"^(\w+) +drift +([\d.]+)  bias (\S+)  relative +([\d.]+)%", capsys.readouterr().out, flags=re.MULTILINE)
    assert [(name, float(drift)) for name, drift, *_ in lines] == [
        (name, drift) for name in ("ppo_clip", "my_loss") for drift in (0.05, 0.1, 1.0)
    ]
    for of_loss in (lines[:3], lines[3:]):
        norms = [float(norm) for *_, norm, _ in of_loss]
        assert 0 < norms[0] < norms[1] < norms[2]
        assert 1.9 < norms[1] / norms[0] < 2.1  # δ is linear in a small drift
