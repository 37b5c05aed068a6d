"""Training: lag as planned, S = 0 as synchronous training; both replays and every interruption give the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_async_grpo import losses, policies, records, staleness, tasks, training
from jax_async_grpo.advantages import group_normalized
from jax_async_grpo.aggregation import token_mean
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.training import learner as learner_lib
from jax_async_grpo.training import pending as pending_lib
from jax_async_grpo.training.lag import make_lag_plan
from jax_async_grpo.training.rollouts import TRAINING_STREAM, batch_prompts
from jax_async_grpo.types import Rollouts
from tests import tiny_training

LEARNER_STEP = jax.jit(learner_lib.learner_step, static_argnums=0)
ROOT = Path(__file__).resolve().parent.parent


def tiny_config(**changes) -> dict:
    """That of the job's tests without bias measurements, with changes such as staleness__max=2."""
    config = tiny_training.get_config()
    config.bias.every = 0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config.to_dict()


def trained(folder: Path, config: dict, stop_at: int | None = None, on_row=lambda row: None) -> training.Trainer:
    """A run in this process, to its end or until so many updates are done."""
    workdir = records.open_workdir(folder, config)
    with Checkpoints(workdir.path / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        made: list[training.Trainer] = []
        should_stop = lambda: bool(made) and stop_at is not None and made[0].progress.step >= stop_at  # noqa: E731
        made.append(training.Trainer(training.build(config), workdir, checkpoints, on_row, should_stop))
        made[0].run()
    return made[0]


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def metrics_of(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run that others are compared with: (folder, config, trainer)."""
    folder, config = tmp_path_factory.mktemp("train") / "whole", tiny_config(staleness__max=2)
    return folder, config, trained(folder, config)


# --- lag


@pytest.mark.parametrize("schedule", ["fixed", "periodic", "random"])
@pytest.mark.parametrize("reuse", [1, 3])
def test_a_batch_is_as_old_as_its_schedule_says_and_both_replays_can_serve_it(schedule, reuse):
    """By simulation: θ_v exists when it generates, is in the ring when it is read, and waiting batches have room."""
    S, T = 4, 23
    plan = make_lag_plan(schedule, S, T, updates_per_batch=reuse, seed=1)
    configured = staleness.random(1, S, T) if schedule == "random" else getattr(staleness, schedule)(S, T)
    waiting, most = set(), 0
    for step in range(T):
        batch = step // reuse
        assert plan.batch_of(step) == batch and plan.first_step(batch) == batch * reuse
        assert plan.versions[batch] == batch * reuse - min(configured[batch * reuse], batch * reuse)
        assert 0 <= plan.staleness(step) < plan.capacity
        waiting |= set(plan.generated_at(step))
        assert batch in waiting  # generated now or before
        if (step + 1) % reuse == 0:
            waiting.remove(batch)
        most = max(most, len(waiting))
    assert plan.max_pending >= most and plan.max_pending <= S // reuse + 2
    assert plan.capacity <= S + reuse


def test_lag_longer_than_a_run_is_refused():
    with pytest.raises(ValueError, match="no rollout would ever be that old; lower staleness.max"):
        make_lag_plan("fixed", 10, 10)
    with pytest.raises(ValueError, match="must be fixed, periodic or random"):
        make_lag_plan("ring", 1, 10)


def test_every_epoch_has_every_question_once():
    rows, ids = (np.concatenate(found) for found in zip(*(batch_prompts(3, 10, 4, batch) for batch in range(5)), strict=True))
    assert len(set(ids.tolist())) == 20 and (ids % 10 == rows).all()  # a question that comes again is drawn anew
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist() and rows[:10].tolist() != list(range(10))


def test_pending_rollouts_come_back_as_they_were():
    rng = np.random.default_rng(0)
    one = dict(
        completions=rng.integers(0, 5, (2, 3, 4)).astype(np.int32),
        mask=rng.random((2, 3, 4)) < 0.5,
        behavior_logprobs=rng.normal(size=(2, 3, 4)).astype(np.float32),
        rewards=rng.random((2, 3)).astype(np.float32),
        policy_version=np.full((2, 3), 7, np.int32),
    )
    packed = pending_lib.pack({7: one, 2: one}, 3, (2, 3, 4))
    back = pending_lib.unpack(packed)
    assert sorted(back) == [2, 7] and all(np.array_equal(back[7][name], one[name]) for name in one)
    assert jax.tree.map(jnp.shape, packed) == jax.tree.map(jnp.shape, pending_lib.pack({}, 3, (2, 3, 4)))  # one template
    with pytest.raises(ValueError, match="holds 2 batches and capacity is 1"):
        pending_lib.pack({7: one, 2: one}, 1, (2, 3, 4))


# --- S = 0 and the two replays


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    """Four updates of a loop that knows no lag, through the same compiled update: the state, and θ_0."""
    trainer = trained(tmp_path_factory.mktemp("loop") / "run", tiny_config(staleness__max=0, num_updates=4), stop_at=0)
    job, config, state = trainer.job, trainer.job.config, trainer.state
    start = bits(state.train.params)
    for t in range(4):
        rows, ids = batch_prompts(config["seed"], len(job.train_task.questions), config["num_prompts"], t)
        options = dict(step=t, version=t, stream=TRAINING_STREAM, draw_ids=ids, put=trainer._put)
        rollouts, _ = trainer._draw(state.train.params, job.train_task, rows, **options)
        state, _ = trainer._step(state, learner_lib.Batch(rollouts, rollouts.behavior_logprobs))
    return state, start


@pytest.mark.parametrize("schedule", ["fixed", "periodic", "random"])
def test_without_lag_a_run_is_the_synchronous_loop(tmp_path, synchronous, schedule):
    """Bit for bit, whatever the schedule."""
    state, start = synchronous
    lagless = trained(tmp_path / "run", tiny_config(staleness__max=0, staleness__schedule=schedule, num_updates=4))
    assert bits(state.train) == bits(lagless.state.train) and bits(state.train.params) != start
    updates = [row for row in records.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "update"]
    assert all(row["staleness/max"] == 0 and row["drift/from_behavior"] == 0 for row in updates)
    assert all(abs(row["is_ratio/max"] - 1) < 1e-5 for row in updates)


@pytest.mark.parametrize("schedule", ["fixed", "periodic", "random"])
def test_replaying_rollouts_is_replaying_parameters(tmp_path, whole, schedule):
    changes = dict(staleness__max=2, staleness__schedule=schedule)
    of_params = whole[2] if schedule == "fixed" else trained(tmp_path / "params", tiny_config(**changes))
    of_rollouts = trained(tmp_path / "rollouts", tiny_config(**changes, replay="rollouts"))
    assert bits(of_params.state.train.params) == bits(of_rollouts.state.train.params)
    assert bits(of_params.state.train.opt_state) == bits(of_rollouts.state.train.opt_state)
    assert not of_rollouts.pending and of_rollouts.state.train.history.capacity == 1


def test_rollouts_are_as_old_as_recorded_and_drawn_from_that_version(whole):
    folder, config, trainer = whole
    rows = [json.loads(line) for line in metrics_of(folder).splitlines()]
    updates = [row for row in rows if row["kind"] == "update"]
    assert [row["staleness/mean"] for row in updates] == [0, 1] + [2] * 8
    assert updates[0]["drift/from_behavior"] == 0 and updates[1]["drift/from_behavior"] > 0
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    assert max(row["logprob_mismatch/max_abs"] for row in updates if "logprob_mismatch/max_abs" in row) < 1e-5
    np.testing.assert_allclose(updates[-1]["lr/t_eta"], 10 * 0.03, rtol=1e-12)
    assert updates[-1]["lr/s_eta"] == pytest.approx(0.06)


# --- interruptions


@pytest.mark.parametrize(("replay", "stops"), [("params", (3, 10)), ("rollouts", (5,))])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, whole, replay, stops):
    """Parameters, optimizer, ring, records: as if it had never stopped."""
    folder, config, trainer = whole
    if replay == "rollouts":
        config = tiny_config(staleness__max=2, replay="rollouts")
        folder, trainer = tmp_path / "whole", trained(tmp_path / "whole", config)
    for stop in (*stops, None):
        parts = trained(tmp_path / "parts", config, stop_at=stop)
    assert bits(parts.state) == bits(trainer.state)
    assert metrics_of(tmp_path / "parts") == metrics_of(folder)


def test_reuse_and_old_denominators_go_on_within_a_batch(tmp_path):
    """Three updates a batch, the learner's log-probs at its first update as the denominator; stopped within a batch."""
    config = tiny_config(staleness__max=2, updates_per_batch=3, denominator="learner", num_updates=8)
    one = trained(tmp_path / "whole", config)
    trained(tmp_path / "parts", config, stop_at=4)
    two = trained(tmp_path / "parts", config)
    assert bits(one.state) == bits(two.state) and metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    updates = [row for row in map(json.loads, metrics_of(tmp_path / "whole").splitlines()) if row["kind"] == "update"]
    assert [row["staleness/mean"] for row in updates] == [0, 1, 2, 2, 3, 4, 2, 3]
    assert updates[3]["pg_clipfrac"] == 0 and abs(updates[3]["off_policy/kl"]) > 0  # fresh denominator, old rollouts


def test_a_batch_in_reuse_is_kept_where_the_ring_rounds_what_drew_it(tmp_path):
    """Drawn from the learner itself at its first update, it could only be drawn again from the ring's rounded copy."""
    changes = dict(staleness__max=0, updates_per_batch=3, ring__dtype="bfloat16", optimizer__learning_rate=0.3)
    config = tiny_config(**changes, num_updates=3, evaluation__every=9)
    one = trained(tmp_path / "whole", config)
    trained(tmp_path / "parts", config, stop_at=1)
    two = trained(tmp_path / "parts", config)
    assert bits(one.state) == bits(two.state) and metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


def test_a_finished_run_stays_as_it_is(whole):
    folder, config, trainer = whole
    before = metrics_of(folder)
    again = trained(folder, config)
    assert metrics_of(folder) == before and bits(again.state) == bits(trainer.state)


def test_damaged_checkpoints_are_skipped_and_never_restarted_over(tmp_path):
    config = tiny_config(staleness__max=1, num_updates=6, checkpoint__every=2)
    trained(tmp_path / "whole", config)
    trained(tmp_path / "run", config, stop_at=5)
    newest, *others = sorted((tmp_path / "run" / "checkpoints").glob("step_*"), reverse=True)
    (newest / "checkpoint.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged and was skipped"):
        trained(tmp_path / "run", config)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        (folder / "checkpoint.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="every checkpoint in .* is damaged"):
        trained(tmp_path / "run", config)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


# --- the update


def a_batch(seed=0, B=8, G=4, L=3, V=5) -> learner_lib.Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, L + 1, (B, G))
    mask = np.arange(L) < lengths[..., None]
    rollouts = Rollouts(
        prompts=jnp.asarray(rng.integers(0, V, (B, 4))),
        prompt_mask=jnp.asarray(np.arange(4) >= rng.integers(0, 3, (B, 1))),
        completions=jnp.asarray(rng.integers(0, V, (B, G, L))),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(np.where(mask, -rng.random((B, G, L)) - 1, 0), jnp.float32),
        rewards=jnp.asarray(rng.random((B, G)), jnp.float32),
        policy_version=jnp.zeros((B, G), jnp.int32),
    )
    return learner_lib.Batch(rollouts, rollouts.behavior_logprobs)


def a_learner(policy, **changes) -> learner_lib.Learner:
    options = dict(loss_fn=losses.ppo_clip, advantage_fn=group_normalized, aggregation_fn=token_mean, optimizer=optax.sgd(0.1))
    return learner_lib.Learner(policy, **options | changes)


@pytest.mark.parametrize("steps", [2, 4])
def test_an_accumulated_gradient_is_that_of_the_whole_batch(steps):
    """Rows of unequal length under a token mean: parts count by their tokens."""
    policy, batch = policies.mlp(5, 4, width=6), a_batch()
    state = learner_lib.init_state(a_learner(policy), policy.init(jax.random.key(0)), 2)
    whole, parts = (LEARNER_STEP(a_learner(policy, accumulation_steps=n), state, batch) for n in (1, steps))
    for one, other in zip(jax.tree.leaves(whole[0].train.params), jax.tree.leaves(parts[0].train.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for name in whole[1]:
        np.testing.assert_allclose(whole[1][name], parts[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("what", ["loss", "gradient", "optimizer"])
def test_what_is_not_finite_changes_nothing_but_the_count(what):
    policy, batch = policies.mlp(5, 4, width=6), a_batch()
    spoiled = {
        "loss": dict(loss_fn=lambda *a: losses.ppo_clip(*a) * jnp.nan),
        "gradient": dict(loss_fn=lambda logprobs, *a: losses.ppo_clip(logprobs, *a) + jnp.sqrt(logprobs - logprobs)),
        "optimizer": dict(optimizer=optax.chain(optax.scale_by_adam(), optax.scale(jnp.inf))),
    }[what]
    learner = a_learner(policy, **spoiled)
    state = learner_lib.init_state(learner, policy.init(jax.random.key(0)), 2)
    new, logged = LEARNER_STEP(learner, state, batch)
    assert bits(new.train.params) == bits(state.train.params) and bits(new.train.opt_state.inner) == bits(
        state.train.opt_state.inner
    )
    assert int(new.train.step) == 1 and float(logged["update/is_finite"]) == 0
    assert bits(staleness.read(new.train.history, 0)[0]) == bits(state.train.params)


def bad_loss(logprobs, old_logprobs, advantages, mask=None):
    """NaN once the learner has moved away from its rollouts, i.e. from the second update on under lag."""
    moved = jnp.max(jnp.abs(logprobs - old_logprobs)) > 1e-4
    return jnp.where(moved, jnp.nan, 1.0) * losses.importance_sampling(logprobs, old_logprobs, advantages, mask)


def punishing_task():
    """Digit sums whose rewards are all negative."""
    task = tasks.digit_text(num_prompts=24, num_digits=2, base=3)
    object.__setattr__(task, "verify", lambda row, text: -1.0 - row)
    return task


def test_negative_rewards_are_trained_on_and_not_judged(tmp_path):
    """A collapse is a share of a peak; once there were evaluations enough to look for one, the run ended."""
    changes = dict(task="tests.test_train.punishing_task", task_options={}, evaluation__every=1, num_updates=4)
    trained(tmp_path / "run", tiny_config(**changes, staleness__max=1, warm_start__num_updates=0))
    rows = [json.loads(line) for line in metrics_of(tmp_path / "run").splitlines()]
    assert [row["collapse/flag"] for row in rows if row["kind"] == "evaluation"] == [0] * 5


def test_an_optimizer_that_keeps_a_key_is_refused_before_anything_is_compiled():
    noise = (("optax.add_noise", {"eta": 0.1, "gamma": 0.5, "key": 0}),)
    with pytest.raises(ValueError, match="config.optimizer keeps a PRNG key .* checkpoints cannot hold"):
        training.build(tiny_config(optimizer__before=noise))


def test_too_many_bad_updates_end_a_run_and_keep_the_last_good_checkpoint(tmp_path):
    config = tiny_config(staleness__max=2, loss="tests.test_train.bad_loss", max_bad_updates=2, checkpoint__every=1)
    with pytest.raises(training.BadUpdates, match="2 updates in a row, up to step 2, .* last good checkpoint is of step 1"):
        trained(tmp_path / "run", config)
    rows = [json.loads(line) for line in metrics_of(tmp_path / "run").splitlines()]
    assert [row["update/is_finite"] for row in rows if row["kind"] == "update"] == [1, 0, 0]


def test_a_control_transformation_keeps_a_run_within_its_radius(tmp_path):
    """‖θ_t − φ_t‖ stays within R at every update; without it the same run leaves it."""
    radius = 0.05
    control = dict(
        optimizer__control="jax_async_grpo.control.limit_staleness_drift",
        optimizer__control_options__radius=radius,
        optimizer__control_options__max_staleness=2,
    )
    drifts = {}
    for name, changes in (("free", {}), ("limited", control)):
        trained(tmp_path / name, tiny_config(staleness__max=2, **changes))
        rows = records.read_jsonl(tmp_path / name / "metrics.jsonl")
        drifts[name] = max(row["drift/from_behavior"] for row in rows if row["kind"] == "update")
    assert drifts["limited"] <= radius * (1 + 1e-5) < drifts["free"]


def test_recomputed_denominators_are_the_recorded_ones_up_to_rounding(tmp_path, whole):
    other = trained(tmp_path / "run", tiny_config(staleness__max=2, denominator="recomputed"))
    for one, two in zip(jax.tree.leaves(whole[2].state.train.params), jax.tree.leaves(other.state.train.params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
