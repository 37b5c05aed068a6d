"""Configs that cannot run: what is refused says what is allowed, before anything is compiled or written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import jax
import pytest

from jax_async_grpo import config_checks, losses, tasks, training
from jax_async_grpo.corrections import token_tis
from launch import train as launch_train
from tests import tiny_training
from tests.launched import job_of

ROOT = Path(__file__).resolve().parent.parent
CONFIG = f"--config={ROOT / 'tests' / 'tiny_training.py'}"
JSONL = "jax_async_grpo.tasks.jsonl_task"


@pytest.fixture(autouse=True, scope="module")
def precision():
    """Training jobs are in float32; the other tests are not."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def compiled():
    """Names of the events of compilations since the module began; clear it before what is watched."""
    seen: list[str] = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


job = job_of(launch_train.main, "train")


def tiny_config(**changes) -> dict:
    config = tiny_training.get_config().to_dict()
    for name, value in changes.items():
        *parts, last = name.split("__")
        part = config
        for key in parts:
            part = part[key]
        part[last] = value
    return config


def refusal(**changes) -> str:
    with pytest.raises(ValueError) as error:
        training.build(tiny_config(**changes))
    message = str(error.value)
    assert "\n" not in message and message.startswith("config.")
    return message


def questions(path: Path, count: int, different: int | None = None) -> Path:
    rows = [{"question": f"{row % (different or count)} + 1?", "answer": f"#### {row + 1}"} for row in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_nothing_is_compiled_or_written_before_a_refusal(tmp_path, compiled):
    """The listener hears a compilation; none of the refusals makes one, with or without --dry_run."""
    compiled.clear()
    jax.jit(lambda x: x * 3 + 1)(0.5)
    assert compiled
    changes = [
        "ring.memory_kind=attic",
        "loss=ppo_clip",
        "loss_options.epsilon=0.1",
        "policy_options.widht=8",
        "optimizer.options.foo=1",
        "updates_per_batch=11",
    ]
    for change in changes:
        compiled.clear()
        said = [job(CONFIG, f"--config.{change}", flag) for flag in ("--dry_run", f"--workdir={tmp_path / 'run'}")]
        assert said[0] == said[1] and said[0][:2] == (2, "") and said[0][2].count("\n") == 1, change
        assert not compiled and not list(tmp_path.iterdir()), change


def test_kinds_of_memory_are_those_of_the_devices():
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    message = refusal(ring__memory_kind="attic")
    assert message.startswith("config.ring.memory_kind is 'attic'; ") and ", ".join(kinds) in message
    refusal(ring__memory_kind=None)
    assert training.build(tiny_config(ring__memory_kind=kinds[-1])).config["ring"]["memory_kind"] == kinds[-1]


# Names of options.


def test_a_misspelt_option_gets_a_guess_and_the_list():
    message = refusal(loss_options={"epsilon": 0.1})
    assert "config.loss (jax_async_grpo.losses.ppo_clip) refuses its options: there is no epsilon" in message
    assert "did you mean epsilon_low or epsilon_high?); it takes epsilon_low, epsilon_high, dual_clip" in message
    assert "to replace" not in message and "advantages" not in message
    decoder = dict(policy="jax_async_grpo.policies.decoder")
    message = refusal(**decoder, policy_options={"num_layer": 1})
    assert "no num_layer (did you mean num_layers" in message and "it takes num_layers, width, " in message
    assert "vocab_size" not in message
    message = refusal(optimizer__options={"b3": 0.9, "foo": 1})
    assert (
        "config.optimizer.name (optax.adam)" in message and "it takes b1, b2, eps, " in message and "takes learn" not in message
    )
    assert "there is no learning_rate (the job gives it)" in refusal(optimizer__options={"learning_rate": 9.0})
    message = refusal(optimizer__before=(("optax.clip_by_global_norm", {"max_nrm": 1.0}),))
    assert "config.optimizer.before[0] (optax.clip_by_global_norm)" in message and "did you mean max_norm?" in message
    message = refusal(rule=tiny_config()["rule"] | {"gian": 1})
    assert message.startswith("config.rule: there is no gian (did you mean gain?); it takes gain, keep, ")


def test_a_missing_option_is_asked_for_where_it_belongs():
    """A correction's own refusal is not blamed on the loss that it weighs."""
    weighed = dict(denominator="learner", bias__every=0, correction="jax_async_grpo.corrections.token_tis")
    message = refusal(**weighed)
    assert message.startswith("config.correction (jax_async_grpo.corrections.token_tis) refuses its options: it needs cap;")
    assert message.endswith("""--config.correction_options="{'cap': ...}\"""")
    assert "no kap (did" not in refusal(**weighed, correction_options={"kap": 2.0, "cap": 2.0}, loss_options={"foo": 1})
    assert "correction" in refusal(**weighed, correction_options={"kap": 2.0, "cap": 2.0})
    message = refusal(optimizer__schedule="optax.cosine_decay_schedule")
    assert "config.optimizer.schedule " in message and "needs init_value, decay_steps" in message
    assert """--config.optimizer.schedule_options="{'init_value': ..., 'decay_steps': ...}\"""" in message
    message = refusal(optimizer__control="jax_async_grpo.control.limit_staleness_drift")
    assert """--config.optimizer.control_options="{'radius': ..., 'max_staleness': ...}\"""" in message


def test_options_that_another_function_left_are_replaced_by_the_words_of_the_message(tmp_path):
    """The advice, pasted, is what runs."""
    path = questions(tmp_path / "sums.jsonl", 24)
    change = [CONFIG, "--dry_run", f"--config.task={JSONL}", f"--config.task_options.path={path}", "--config.num_prompts=8"]
    change += ["--config.policy_options.context_length=800"]
    code, _, error = job(*change)
    assert code == 2 and "there is no base, num_digits, partial_credit;" in error and "it takes path, question_key" in error
    advice = shlex.split(error.partition("to replace all that stands there: ")[2])
    assert advice == [f"--config.task_options={{'path': '{path}'}}"]
    code, said, error = job(*(argument for argument in change if "task_options" not in argument), *advice)
    assert code == 0 and "sums, 16 questions, 8 held out\n" in said, error
    code, _, error = job(CONFIG, "--dry_run", "--config.policy=jax_async_grpo.policies.linear")
    assert "there is no width; it needs" not in error and """--config.policy_options="{'context_length': 6}\"""" in error
    nothing = refusal(loss="jax_async_grpo.losses.reinforce", loss_options={"epsilon_low": 0.1})
    assert "there is no epsilon_low; it takes none; " in nothing and nothing.endswith("""--config.loss_options="{}\"""")


def test_an_option_that_is_itself_a_dict_is_given_whole():
    """Nothing can be set within what is not there; the advice is for options alone, whose keys are free."""
    code, _, error = job(CONFIG, "--dry_run", "--config.task_options.tokenizer.path=nowhere")
    assert code == 2 and "there is no tokenizer; there are " in error
    (advice,) = shlex.split(error.partition("to give it whole: ")[2])
    assert advice == "--config.task_options.tokenizer={'path': ...}"
    code, _, error = job(CONFIG, "--dry_run", advice.replace("...", "'nowhere'"))
    assert code == 2 and re.search("config.task_options.tokenizer: (path='nowhere' must be|tokenizers is needed)", error)
    code, _, error = job(CONFIG, "--dry_run", "--config.optimzer.learning_rate=1")
    assert code == 2 and "there is no optimzer; there are acc" in error and "whole" not in error
    message = refusal(task_options={"num_prompts": 24, "tokenizer": {"paht": "x"}})
    assert message.startswith("config.task_options.tokenizer: there is no paht (did you mean path?); it needs path; it takes")


def test_only_names_are_judged_by_the_signature():
    """Values, functions that take any keyword, and builtins without a signature speak for themselves."""
    check = config_checks.misnamed_options
    assert check(losses.ppo_clip, {"epsilon_low": -1}, "loss_options", filled=4) == ""
    assert check(tasks.reasoning_text, {"dataset": "gcd", "num_prompts": 1, "max_digits": 1}, "task_options") == ""
    assert check(dict, {"a": 1}, None) == "" and check(print, {"end": ""}, None) == ""
    assert "and more; to replace" in check(tasks.reasoning_text, {"num_prompts": 1}, "task_options")
    arrays = ("old_logprobs", "behavior_logprobs", "mask")
    assert check(token_tis, {"cap": 2.0}, None, taken=arrays) == "" and check(token_tis, {}, None, taken=arrays)
    assert "no mask (the job gives it)" in check(token_tis, {"cap": 2.0, "mask": 1}, None, taken=arrays)


# Dotted names.


@pytest.mark.parametrize(
    ("field", "name", "hint"),
    [
        ("loss", "ppo_clip", ", did you mean jax_async_grpo.losses.ppo_clip?"),
        ("policy", "decodr", ", did you mean jax_async_grpo.policies.decoder?"),
        ("task", "jsonl_task", ", did you mean jax_async_grpo.tasks.jsonl_task?"),
        ("optimizer.name", "sgd", ", did you mean optax.sgd?"),
        ("optimizer.before[0]", "xyzzy", " such as optax.clip_by_global_norm"),
        ("advantage", "", " such as jax_async_grpo.advantages.group_normalized"),
        ("loss", "losses.gspo", " such as jax_async_grpo.losses.ppo_clip (No module named 'losses')"),
        ("loss", "jax_async_grpo.losses.gsp", ", did you mean jax_async_grpo.losses.gspo? (module"),
        ("losses.mine", "tests.nowhere.loss", " such as jax_async_grpo.losses.ppo_clip (No module"),
    ],
)
def test_a_name_that_is_none_gets_a_right_one(field, name, hint):
    with pytest.raises(ValueError) as error:
        config_checks.resolve(name, field)
    assert str(error.value).startswith(f"config.{field} is {name!r}; it must be an importable dotted name{hint}")


def test_every_example_of_a_name_can_be_resolved():
    for field, name in config_checks._EXAMPLES.items():
        assert callable(config_checks.resolve(name, field))


# Sizes.


def test_a_batch_serves_no_more_updates_than_there_are():
    message = refusal(updates_per_batch=11, staleness__max=0)
    assert message.startswith("config.updates_per_batch is 11 and num_updates 10") and "lower updates_per_batch" in message
    training.validate(tiny_config(updates_per_batch=10, staleness__max=0))


def test_repeats_of_held_out_questions_are_said(tmp_path):
    options = dict(path=str(questions(tmp_path / "sums.jsonl", 40, different=20)), prompt_length=8, max_length=8)
    changes = dict(task=JSONL, task_options=options, policy_options=dict(context_length=16, width=8))
    said = training.describe(training.build(tiny_config(**changes)), 0, 0)
    assert "sums, 24 questions, 16 held out (8 different ones and their repeats)\n" in said
    assert "the 40 questions have 20 different prompts" in refusal(**changes, num_heldout=20)
