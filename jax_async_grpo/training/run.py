"""The loop of a training run: draw, score, measure, update, record, save; stopped anywhere, it goes on bit for bit.

Records in metrics.jsonl, all functions of the config alone (times are elsewhere): "warm_start" and "start" once, "update" for
every update t, and before an update, where they are due, "evaluation" and "bias" of that t; the last "evaluation" is at T.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_async_grpo import estimation, metrics, records, scaling, staleness
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.tasks.verification import FAILURES
from jax_async_grpo.training import pending as pending_lib
from jax_async_grpo.training.learner import Batch, LearnerState, init_state, lean_logprobs, learner_step
from jax_async_grpo.training.mesh import batch_sharding, history_shardings, replicated, tree_shardings
from jax_async_grpo.training.rollouts import EVALUATION_STREAM, TRAINING_STREAM, Drawer, batch_prompts, drawer
from jax_async_grpo.training.setup import TrainJob, learning_rate_at
from jax_async_grpo.training.supervised import supervised
from jax_async_grpo.types import Params, Rollouts

__all__ = ["BadUpdates", "Progress", "Stopped", "Trainer", "sizes"]

_FEWEST_EVALUATIONS = 3  # before a collapse is looked for


class Stopped(Exception):
    """Asked to stop before there was anything to save."""


class BadUpdates(RuntimeError):
    """More updates in a row than allowed had a loss or gradient that is not finite."""


@dataclasses.dataclass
class Progress:
    """What a run knows besides its arrays; plain data, saved with every checkpoint.

    Attributes:
      step: updates done.
      bad_updates: in a row, up to now. total_bad_updates: in all.
      total_learning_rate: Σ η_k of the updates done.
      evaluations: [(step, held-out reward)].
      previous_ess: of the last bias measurement, or None.
      failed_samples: {reason: number} of the verifier.
    """

    step: int = 0
    bad_updates: int = 0
    total_bad_updates: int = 0
    total_learning_rate: float = 0.0
    evaluations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    previous_ess: float | None = None
    failed_samples: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FAILURES, 0))

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dataclasses.asdict(self) | {"evaluations": [list(pair) for pair in self.evaluations]}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Progress:
        """Of `to_plain`."""
        return Progress(**plain | {"evaluations": [(int(step), reward) for step, reward in plain["evaluations"]]})


class Trainer:
    """A run: its compiled programs, its state, its records.

    Args:
      job: of `setup.build`.
      workdir: of `records.open_workdir`; metrics.jsonl is cut back to the checkpoint that a run goes on from.
      checkpoints: open; nothing is restored from an empty folder.
      on_row: called with every row as it is made, e.g. for TensorBoard or a progress bar.
      should_stop: asked between updates, and at the checks of a warm start.

    Raises:
      Stopped: before update 0 of a new run, of whose warm start nothing is kept.
      ValueError: the warm start diverges; every checkpoint of the workdir is damaged, or they are of another config;
        metrics.jsonl lacks rows from before the newest whole one.
    """

    def __init__(
        self,
        job: TrainJob,
        workdir: records.Workdir,
        checkpoints: Checkpoints,
        on_row: Callable[[dict[str, Any]], None] = lambda row: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._should_stop = should_stop
        self.job, self._workdir, self._checkpoints, self._on_row = job, workdir, checkpoints, on_row
        config = job.config
        self._key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
        self._put = functools.partial(jax.device_put, device=batch_sharding(job.mesh))
        self._rows: list[dict[str, Any]] = []
        self.pending: dict[int, dict[str, np.ndarray]] = {}
        self._saved: int | None = None  # the step of the last checkpoint
        self._draw = self._drawer(config["group_size"], **config["sampling"])
        evaluation = config["evaluation"]
        self._draw_evaluation = self._drawer(evaluation["num_samples"], greedy=evaluation["greedy"])
        self._read = jax.jit(staleness.read)
        self._logprobs = jax.jit(self._token_logprobs)
        self._drift = jax.jit(metrics.drift)
        self._objective = job.learner.objective()  # one object: `estimation` compiles for each
        restored = self._restored()
        self.is_resumed = restored is not None
        self.state, self.progress = restored or self._started()
        self.save()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self._step = jax.jit(
            functools.partial(learner_step, job.learner), donate_argnums=0, out_shardings=(shardings, replicated(job.mesh))
        )

    @property
    def is_complete(self) -> bool:
        """Whether all T updates are done."""
        return self.progress.step == self.job.config["num_updates"]

    def run(self) -> bool:
        """Updates until T, or until `should_stop`; True if the run is complete. Everything is saved at the end.

        Raises:
          BadUpdates: `max_bad_updates` in a row; the last good checkpoint is kept.
          OSError: a record or checkpoint cannot be written; what was written before is whole.
        """
        every = self.job.config["checkpoint"]["every"]
        while not self.is_complete and not self._should_stop():
            self._one_update()
            if self.progress.step % every == 0 and self.progress.bad_updates == 0:
                self._evaluate_if_due()  # first, so that the checkpoint's score is its own
                self.save()
        if self.is_complete:
            self._evaluate_if_due()
        self.save()
        return self.is_complete

    def save(self) -> None:
        """Writes the rows so far and a checkpoint, unless this step is saved."""
        self._flush()
        if self.progress.step == self._saved:
            return
        self._saved = self.progress.step
        evaluated, reward = self.progress.evaluations[-1] if self.progress.evaluations else (None, None)
        score = reward if evaluated == self.progress.step else None
        self._checkpoints.save(self.progress.step, self._arrays(), self.progress.to_plain(), score=score)

    def _one_update(self) -> None:
        config, t = self.job.config, self.progress.step
        self._evaluate_if_due()
        batch = self.job.lag.batch_of(t)
        behavior = self._behavior(t) if config["replay"] == "params" else None
        rollouts = self._rollouts_of(batch, behavior)
        logged = {} if behavior is None else self._of_behavior(behavior, rollouts)
        # From update S on, so that a period that divides `every` is met at its full lag.
        since = t - config["staleness"]["max"]
        if config["bias"]["every"] and since >= 0 and since % config["bias"]["every"] == 0:
            self._measure_bias(batch, behavior, rollouts)
        self.state, measured = self._step(self.state, Batch(rollouts, self._old_logprobs(rollouts, behavior, t)))
        self._record(t, {**jax.device_get(measured), **logged})

    def _record(self, t: int, measured: dict[str, Any]) -> None:
        """The row of an update, and the counts that stop a run."""
        job, progress = self.job, self.progress
        eta = learning_rate_at(job, t - progress.total_bad_updates)
        progress.total_learning_rate += eta if measured["update/is_finite"] else 0.0
        row = {"kind": "update", "step": t} | {name: float(value) for name, value in measured.items()}
        row |= {
            "staleness/configured": job.config["staleness"]["max"],
            "lr/current": eta,
            "lr/s_eta": job.config["staleness"]["max"] * eta,
            "lr/t_eta": progress.total_learning_rate,
        }
        if job.predicted_limit is not None:
            row |= {"lr/predicted_max": job.predicted_limit, "lr/headroom": job.predicted_limit / eta if eta > 0 else math.inf}
        self._write(row)
        progress.step = t + 1
        is_bad = not row["update/is_finite"]
        progress.bad_updates = progress.bad_updates + 1 if is_bad else 0
        progress.total_bad_updates += is_bad
        if progress.bad_updates >= job.config["max_bad_updates"]:
            self._flush()
            self._checkpoints.wait()
            saved = max(self._checkpoints.steps(), default=None)
            raise BadUpdates(
                f"{progress.bad_updates} updates in a row, up to step {t}, had a loss or gradient that is not finite: lower "
                "optimizer.learning_rate or S" + ("" if saved is None else f"; the last good checkpoint is of step {saved}")
            )

    # --- rollouts

    def _behavior(self, t: int) -> Params:
        return self._version(self.job.lag.staleness(t))

    def _version(self, age: int) -> Params:
        """θ_{t−age}; without lag the learner's own parameters, which a ring in bfloat16 rounds."""
        return self._read(self.state.train.history, jnp.int32(age))[0] if age else self.state.train.params

    def _rollouts_of(self, batch: int, behavior: Params | None) -> Rollouts:
        """Of the batch: drawn from the ring's version, or pending; a reused batch waits between its updates, and is saved.

        Drawn again it would be another one where the ring rounds: it may come from the learner's own parameters.
        """
        lag, step = self.job.lag, self.progress.step
        if behavior is not None and lag.updates_per_batch == 1:
            return self._drawn(batch, behavior)
        for ahead in lag.generated_at(step) if behavior is None else [batch]:
            if ahead not in self.pending:
                drawn = self._drawn(ahead, self.state.train.params if behavior is None else behavior)
                self.pending[ahead] = pending_lib.fields_of(drawn)
        is_last_use = lag.first_step(batch + 1) == step + 1
        return self._placed(batch, self.pending.pop(batch) if is_last_use else self.pending[batch])

    def _drawn(self, batch: int, behavior: Params) -> Rollouts:
        rows, ids = self._prompts(batch)
        rollouts, scores = self._draw(
            behavior,
            self.job.train_task,
            rows,
            draw_ids=ids,
            step=self.job.lag.first_step(batch),
            version=int(self.job.lag.versions[batch]),
            stream=TRAINING_STREAM,
            put=self._put,
        )
        for reason, number in scores.reasons.items():
            self.progress.failed_samples[reason] += number
        return rollouts

    def _placed(self, batch: int, fields: dict[str, np.ndarray]) -> Rollouts:
        task, (rows, _) = self.job.train_task, self._prompts(batch)
        return Rollouts(
            prompts=self._put(task.prompts[rows]),
            prompt_mask=self._put(task.prompt_mask[rows]),
            **{name: self._put(array) for name, array in fields.items()},
        )

    def _prompts(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.job.config
        return batch_prompts(config["seed"], len(self.job.train_task.questions), config["num_prompts"], batch)

    def _old_logprobs(self, rollouts: Rollouts, behavior: Params | None, t: int) -> jax.Array:
        """The ratio's denominator: as recorded, recomputed under φ, or of the learner when it first saw the batch."""
        kind = self.job.config["denominator"]
        if kind == "recorded":
            return rollouts.behavior_logprobs
        if kind == "recomputed":
            return self._logprobs(behavior, rollouts)
        age = t - self.job.lag.first_step(self.job.lag.batch_of(t))
        return self._logprobs(self._version(age), rollouts)

    def _token_logprobs(self, params: Params, rollouts: Rollouts) -> jax.Array:
        r = rollouts
        return lean_logprobs(self.job.policy, params, r.prompts, r.completions, r.mask, r.prompt_mask)

    def _of_behavior(self, behavior: Params, rollouts: Rollouts) -> dict[str, float]:
        """‖θ − φ‖, and at evaluations how far recomputed log-probs are from the recorded ones."""
        found = {"drift/from_behavior": self._drift(self.state.train.params, behavior)["drift/from_behavior"]}
        if self.progress.step % self.job.config["evaluation"]["every"] == 0:
            recomputed = self._logprobs(behavior, rollouts)
            found |= metrics.logprob_mismatch(rollouts.behavior_logprobs, recomputed, rollouts.mask)
        return {name: float(value) for name, value in found.items()}

    # --- measurements

    def heldout_reward(self, params: Params, step: int) -> float:
        """Mean reward of all held-out questions, drawn as the config says, `step` folded in."""
        task = self.job.heldout_task
        number = len(task.questions)
        rows = np.resize(np.arange(number), -(-number // self.job.mesh.size) * self.job.mesh.size)
        rollouts, _ = self._draw_evaluation(
            params, task, rows, step=step, version=step, stream=EVALUATION_STREAM, put=self._put
        )
        return float(np.mean(np.asarray(rollouts.rewards)[:number]))

    def _evaluate_if_due(self) -> None:
        """Held-out reward of θ_t, once, at every multiple of `evaluation.every` and at T."""
        t, config = self.progress.step, self.job.config
        if (t % config["evaluation"]["every"] and t != config["num_updates"]) or t in dict(self.progress.evaluations[-1:]):
            return
        reward = self.heldout_reward(self.state.train.params, t)
        self.progress.evaluations.append((t, reward))
        failed = {f"verifier/{reason.replace(' ', '_')}": number for reason, number in self.progress.failed_samples.items()}
        self._write({"kind": "evaluation", "step": t, "heldout_reward": reward, **failed, **self._collapse()})
        self._flush()

    def _collapse(self) -> dict[str, float | None]:
        """Has held-out reward fallen, by the config's rule? NaN-free: the step is None where it has not.

        The rule takes shares of a peak, which negative rewards do not have: a task with such is not judged.
        """
        steps, rewards = zip(*self.progress.evaluations, strict=True)
        if len(steps) <= _FEWEST_EVALUATIONS or min(rewards) < 0:
            return {"collapse/flag": 0, "collapse/step": None}
        judged = scaling.classify_run(
            np.array(steps[1:]),
            np.array(rewards[1:]),
            start_reward=rewards[0],
            ceiling=max(1.0, *rewards),
            rule=scaling.CollapseRule(**self.job.config["rule"]),
        )
        fell = judged.outcome == "fall"
        return {"collapse/flag": int(fell), "collapse/step": float(judged.collapse_step) if fell else None}

    def _measure_bias(self, batch: int, behavior: Params, rollouts: Rollouts) -> None:
        """δ of this very batch against fresh rollouts with its random numbers (`estimation`)."""
        job, options = self.job, self.job.config["bias"]

        def sample(params: Params, prompts: tuple[np.ndarray, np.ndarray], key: jax.Array) -> Rollouts:
            del key  # the run's own, folded by the step: the fresh rollouts share the noise of the stale ones
            if params is behavior:
                return rollouts
            step, version = job.lag.first_step(batch), self.progress.step
            options = dict(step=step, version=version, stream=TRAINING_STREAM, put=self._put)
            rows, ids = prompts
            return self._draw(params, job.train_task, rows, draw_ids=ids, **options)[0]

        found = estimation.estimate(
            self._logprobs,
            sample,
            self._objective,
            self.state.train.params,
            behavior,
            self._prompts(batch),
            self._key,
            num_blocks=options["num_blocks"],
            previous_ess=self.progress.previous_ess if job.is_separable else None,
            ess_threshold=options["ess_threshold"],
        )
        self.progress.previous_ess = found.ess_ratio
        t = self.progress.step
        row = {"kind": "bias", "step": t, "staleness": job.lag.staleness(t), "method": found.method}
        row |= {"detected": int(found.detected), "fresh_norm_squared": found.fresh_norm_squared}
        self._write(row | {"ess_ratio": found.ess_ratio, "coupled_fraction": found.coupled_fraction, **found.metrics()})

    # --- start, save, records

    def _drawer(self, group_size: int, **options) -> Drawer:
        task = self.job.train_task
        return drawer(
            self.job.policy,
            self.job.verifiers,
            self._key,
            group_size=group_size,
            max_length=task.max_length,
            tokenizer=task.tokenizer,
            **options,
        )

    def _started(self) -> tuple[LearnerState, Progress]:
        """θ_0, warm-started, and an empty record."""
        config, job = self.job.config, self.job
        self._workdir.truncate_rows("metrics.jsonl", lambda row: False)
        init = jax.jit(job.policy.init, out_shardings=tree_shardings(self._shapes(), job.mesh))
        params = init(jax.random.fold_in(jax.random.key(config["seed"]), 0))
        number = sum(leaf.size for leaf in jax.tree.leaves(params))
        warm = supervised(
            job.policy,
            params,
            job.train_task,
            functools.partial(self.heldout_reward, step=-1),
            seed=config["seed"],
            put=self._put,
            on_check=self._on_warm_start,
            **config["warm_start"],
        )
        if not jax.jit(_is_finite)(warm.params):
            raise ValueError(
                f"the warm start's parameters are not finite after {warm.num_updates} updates: lower "
                "config.warm_start.learning_rate"
            )
        self._write({"kind": "start", "num_parameters": number, "warm_start_updates": warm.num_updates, "reward": warm.reward})
        return self._init_state(warm.params), Progress()

    def _restored(self) -> tuple[LearnerState, Progress] | None:
        shapes = jax.eval_shape(self._plain_state, self._shapes())
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings(shapes),
        )
        found = self._checkpoints.restore({"state": template, "pending": jax.eval_shape(self._packed)})
        if found is None:
            if any(self._checkpoints.folder.glob("step_*")):
                raise ValueError(f"every checkpoint in {self._checkpoints.folder} is damaged; move them away to start afresh")
            return None
        if not self._workdir.resumed:  # arrays of the same shapes say nothing about the config
            raise ValueError(f"{self._checkpoints.folder} is not of this config: pass --overwrite or another --workdir")
        self.pending = pending_lib.unpack(found.arrays["pending"])
        progress = Progress.from_plain(found.host)
        self._cut_records(progress)
        self._saved = found.step
        return found.arrays["state"], progress

    def _cut_records(self, progress: Progress) -> None:
        """metrics.jsonl as it was when the checkpoint with this progress was taken; ValueError where it holds less."""
        rows = self._workdir.read_metrics()
        number = sum(row["kind"] == "update" and row["step"] < progress.step for row in rows)
        if number < progress.step:
            raise ValueError(
                f"{self._workdir.path / 'metrics.jsonl'} has rows of {number} of the {progress.step} updates that the newest "
                "checkpoint goes on from: put the whole file back, pass --overwrite or another --workdir"
            )
        self._workdir.truncate_rows("metrics.jsonl", lambda row: _is_before(row, progress))

    def _shapes(self) -> Params:
        return jax.eval_shape(self.job.policy.init, jax.random.key(0))

    def _init_state(self, params: Params) -> LearnerState:
        """Where it belongs: optimizer state as the parameters it mirrors, the ring in its kind of memory."""
        state = self._plain_state(params, memory_kind=self.job.config["ring"]["memory_kind"] or None)
        return jax.device_put(state, self._shardings(state))

    def _plain_state(self, params: Params, **history_options) -> LearnerState:
        config = self.job.config
        capacity = self.job.lag.capacity if config["replay"] == "params" else 1
        dtype = jnp.dtype(config["ring"]["dtype"]) if config["ring"]["dtype"] else None
        return init_state(self.job.learner, params, capacity, dtype=dtype, **config["track"], **history_options)

    def _shardings(self, state: LearnerState) -> LearnerState:
        mesh, memory_kind = self.job.mesh, self.job.config["ring"]["memory_kind"] or None
        plain = tree_shardings(state, mesh)
        history = history_shardings(state.train.history, mesh, memory_kind)
        return plain._replace(train=plain.train._replace(history=history))

    def _on_warm_start(self, step: int, reward: float) -> None:
        self._write({"kind": "warm_start", "step": step, "heldout_reward": reward})
        if self._should_stop():
            raise Stopped("nothing is saved before the first update; the same command begins again")

    def _arrays(self) -> dict[str, Any]:
        return {"state": self.state, "pending": self._packed()}

    def _packed(self) -> dict[str, jax.Array]:
        config = self.job.config
        shape = (config["num_prompts"], config["group_size"], self.job.train_task.max_length)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(self._shapes()))
        return pending_lib.pack(self.pending, self._num_pending(), shape, dtype)

    def _num_pending(self) -> int:
        """Slots for rollouts that wait; one, for a batch in reuse, where parameters are replayed."""
        return max(1, self.job.lag.max_pending) if self.job.config["replay"] == "rollouts" else 1

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._on_row(row)

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        self._workdir.append_metrics(rows)


def _is_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def sizes(job: TrainJob) -> tuple[int, int]:
    """(bytes of the ring, 0 where rollouts are replayed; number of parameters), before anything is allocated."""
    config, shapes = job.config, jax.eval_shape(job.policy.init, jax.random.key(0))
    number = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if config["replay"] == "rollouts":
        return 0, number
    dtype = jnp.dtype(config["ring"]["dtype"]) if config["ring"]["dtype"] else None
    history = jax.eval_shape(functools.partial(staleness.create_history, capacity=job.lag.capacity, dtype=dtype), shapes)
    return staleness.nbytes(history), number


def _is_before(row: dict[str, Any], progress: Progress) -> bool:
    """Was the row written before the checkpoint with this progress? The last evaluation is at the step of its checkpoint."""
    if row["kind"] in ("warm_start", "start"):
        return True
    return row["step"] < progress.step or (row["kind"] == "evaluation" and row["step"] in dict(progress.evaluations))
