"""From a config to runnable cases: what is refused and in which words, the plan of chunks, and the cases themselves."""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import measure_bias
from jax_async_grpo import experiment, losses, staleness
from jax_async_grpo.policies import tabular
from jax_async_grpo.tasks import bandit


def make_config(**changes):
    """The default config, without its transformer, as plain dicts with dotted__keys replaced."""
    config = measure_bias.get_config().to_dict()
    config["cases"] = {name: config["cases"][name] for name in ("tabular", "linear", "proxy_gold")}
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = config
        for name in parents:
            part = part[name]
        part[last] = value
    return config


def message_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


# A user's module, as config files name it.


def clip_of_my_own(logprobs, old_logprobs, advantages, mask=None):
    ratio = jnp.exp(logprobs - old_logprobs)
    advantages = advantages[..., None]
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.7, 1.4) * advantages)


def detaching(logprobs, old_logprobs, advantages, mask=None, *, detached_logprobs=None):
    detached = jax.lax.stop_gradient(logprobs) if detached_logprobs is None else detached_logprobs
    return -jnp.exp(detached - old_logprobs) * advantages[..., None] * logprobs


def hidden_stop_gradient(logprobs, old_logprobs, advantages, mask=None):
    return -jax.lax.stop_gradient(jnp.exp(logprobs - old_logprobs)) * advantages[..., None] * logprobs


def capped_at_one(logprobs, old_logprobs, advantages, mask=None):
    return -jnp.minimum(jnp.exp(logprobs - old_logprobs), 1.0) * advantages[..., None]


def coupled_rows(logprobs, old_logprobs, advantages, mask=None):
    return -jnp.exp(logprobs - old_logprobs) * (advantages / (1 + jnp.abs(advantages).mean()))[..., None]


def summed_tokens(logprobs, old_logprobs, advantages, mask=None):
    return -jnp.sum(jnp.exp(logprobs - old_logprobs), axis=-1) * advantages


def batch_normalized(rewards):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def rewards_themselves(rewards):
    return rewards


not_a_function = 3.0
MINE = __name__


# Dotted names.


def test_dotted_names_resolve_to_the_users_own_functions():
    assert experiment.resolve("jax_async_grpo.losses.ppo_clip", "loss") is losses.ppo_clip
    assert experiment.resolve(f"{MINE}.clip_of_my_own", "loss") is clip_of_my_own


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ppo_clip", "importable dotted name"),
        ("", "importable dotted name"),
        (None, "importable dotted name"),
        ("jax_async_grpo.losses.ppo_clp", "no attribute 'ppo_clp'"),
        ("no_such_module.loss", "No module named 'no_such_module'"),
        ("jax_async_grpo.losses", "it must name a function, not a module"),
        (f"{MINE}.not_a_function", "it must name a function, not a float"),
    ],
)
def test_other_names_are_refused_by_field_and_value(name, reason):
    message = message_of(experiment.resolve, name, "cases.a.optimizer")
    assert message.startswith(f"config.cases.a.optimizer is {name!r}; ") and reason in message


def test_a_module_with_a_syntax_error_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my_broken_module.py").write_text("def loss(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "my_broken_module.py, line 1" in message_of(experiment.resolve, "my_broken_module.loss", "loss")
    sys.modules.pop("my_broken_module", None)


# Validation.


def test_the_default_config_and_odd_ones_are_valid():
    experiment.validate(measure_bias.get_config().to_dict())
    only = {"tabular": make_config()["cases"]["tabular"]}
    for changes in [
        dict(cases__tabular__schedules=("random",), cases__tabular__max_staleness=(0,)),
        dict(cases__tabular__updates=("sampled",), cases__tabular__learning_rates=(0.1,), cases__tabular__num_measurements=2),
        dict(cases__tabular__fit_variable="drift", cases__tabular__horizon_updates=5, cases__tabular__horizon_learning_rate=1),
        dict(cases__tabular__warm_start={"target_reward": 0.5}, cases__tabular__learning_rates=(np.float64(0.1), 0.125)),
        dict(group_size=1, advantage=f"{MINE}.rewards_themselves", loss=f"{MINE}.clip_of_my_own", loss_options={}),
        dict(
            **dict(group_size=np.int64(3), max_compositions=1, num_bootstrap=100, seed=0),
            **dict(clip_epsilons=[0.1, 0.3], loss_options=dict(epsilon_low=0.1, epsilon_high=0.3)),
        ),
        dict(loss=f"{MINE}.clip_of_my_own", loss_options={}, clip_epsilons=(0.3, 0.4)),
    ]:
        experiment.validate(make_config(cases=only, **changes))


NOT_POSITIVE_INTEGERS = [(0, ">= 1"), (-1, ">= 1"), (1.0, ">= 1"), (True, ">= 1"), ("2", ">= 1"), (None, ">= 1")]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", -1, "it must be an integer >= 0"),
        ("seed", 0.5, "it must be an integer >= 0"),
        ("num_bootstrap", 99, "it must be an integer >= 100"),
        *[(key, *case) for key in ("group_size", "max_compositions") for case in NOT_POSITIVE_INTEGERS],
        *[
            (key, value, "it must be a number between 0 and 1")
            for key in ("confidence", "clip_level", "collapse_fraction")
            for value in (0.0, 1.0, math.nan, "0.5")
        ],
        ("clip_epsilons", 0.2, "(epsilon_low, epsilon_high)"),
        ("clip_epsilons", (0.2, 0.2, 0.2), "(epsilon_low, epsilon_high)"),
        ("clip_epsilons", (0.0, 0.2), "it must be a number > 0"),
        ("clip_epsilons", (0.2, math.nan), "it must be a number > 0"),
        ("loss_options", None, "it must be a ConfigDict"),
        ("advantage_options", 3, "it must be a ConfigDict"),
        ("cases", ("tabular",), "it must be a ConfigDict"),
        ("cases", {}, "nothing to measure"),
        ("nope", 1, "not a key of this job; the keys are seed, group_size, loss, "),
        ("cases__tabular__nope", 1, "not a key of this job; the keys are policy, policy_options, task, "),
        ("cases__tabular", 3, "it must be a ConfigDict"),
        ("cases__tabular__max_staleness", (0, -1), "-1; it must be an integer >= 0"),
        ("cases__tabular__max_staleness", (0.5,), "0.5; it must be an integer >= 0"),
        ("cases__tabular__max_staleness", (True,), "True; it must be an integer >= 0"),
        ("cases__tabular__max_staleness", 4, "a tuple of numbers, not empty"),
        ("cases__tabular__max_staleness", (), "a tuple of numbers, not empty"),
        ("cases__tabular__max_staleness", (1, 2, 1), "1 stands there twice"),
        *[("cases__tabular__learning_rates", (0.1, x), "it must be a number > 0") for x in (0.0, -0.1, math.nan, math.inf)],
        ("cases__tabular__learning_rates", ("0.1",), "it must be a number > 0"),
        ("cases__tabular__learning_rates", 0.1, "a tuple of numbers, not empty"),
        ("cases__tabular__learning_rates", "0.1", "a tuple of numbers, not empty"),
        ("cases__tabular__learning_rates", (0.1, 0.1 + 1e-9), "0.1 stands there twice"),
        ("cases__tabular__schedules", ("fixd",), "some of ('fixed', 'periodic', 'random')"),
        ("cases__tabular__schedules", (), "some of ('fixed', 'periodic', 'random')"),
        ("cases__tabular__schedules", ("fixed", "fixed"), "fixed stands there twice"),
        ("cases__tabular__updates", ("Exact",), "some of ('exact', 'sampled')"),
        ("cases__tabular__updates", ("exact", "exact"), "exact stands there twice"),
        ("cases__tabular__fit_variable", "S", "one of ('staleness_x_learning_rate', 'drift')"),
        *[
            (f"cases__tabular__{key}", value, "it must be (low, high) with 0 <= low < high")
            for key in ("time_window", "fit_window")
            for value in ((2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (1.0,), (1.0, 2.0, 3.0), (0.0, math.nan), ("a", "b"), 3.0)
        ],
        ("cases__tabular__time_window", (6.0, math.inf), "it must be (low, high) with 0 <= low < high"),
        ("cases__tabular__time_window", (0.5, 12.0), "before there have been 32 updates; start at 5.12 or later"),
        ("cases__tabular__time_window", (6.0, 1e9), "at most 2147483647 updates"),
        ("cases__tabular__num_measurements", 1, "it must be an integer >= 2"),
        ("cases__tabular__num_seeds", 0, "it must be an integer >= 1"),
        ("cases__tabular__horizon_updates", -1, "it must be an integer >= 0"),
        ("cases__proxy_gold__horizon_learning_rate", 0.0, "it must be a number > 0"),
        ("cases__tabular__warm_start", {"target": 0.4}, "the options are target_reward, learning_rate, "),
        ("cases__tabular__warm_start", None, "it must be a ConfigDict"),
        ("cases__tabular__policy_options", None, "it must be a ConfigDict"),
        ("cases__tabular__vectorize", "no", "it must be True or False"),
        ("cases__tabular__first_order", 1, "it must be True or False"),
        ("cases__tabular__policy", "jax_async_grpo.policies.tabula", "no attribute 'tabula'"),
        ("cases__tabular__task", "tasks.bandit", "No module named 'tasks'"),
        ("cases__tabular__optimizer", "sgd", "importable dotted name"),
    ],
)
def test_bad_values_are_refused_by_field_with_what_is_allowed(key, value, allowed):
    message = message_of(experiment.validate, make_config(**{key: value}))
    assert message.startswith("config." + key.replace("__", ".")) and allowed in message


def test_missing_keys_are_named():
    for path in ("seed", "cases__tabular__num_seeds"):
        config = make_config()
        *parents, last = path.split("__")
        part = config
        for name in parents:
            part = part[name]
        del part[last]
        assert message_of(experiment.validate, config) == f"config.{path.replace('__', '.')} is missing"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(loss_options={"epsilon_low": 0.0}), ("config.loss ", "epsilon_low is 0.0", "(0, 1]")),
        (dict(loss_options={"epsilon_high": math.nan}), ("config.loss ", "epsilon_high is nan")),
        (dict(loss_options={"epsilon": 0.2}), ("config.loss ", "unexpected keyword argument 'epsilon'")),
        (dict(loss="math.sqrt", loss_options={}), ("config.loss ",)),
        (dict(unclipped_loss="math.sqrt"), ("config.unclipped_loss ",)),
        (dict(group_size=1), ("config.advantage ", "group_size is 1", "group_size >= 2")),
        (dict(advantage_options={"ddof": "one"}), ("config.advantage ",)),
        (dict(aggregation="jax_async_grpo.losses.ppo_clip"), ("config.aggregation ",)),
    ],
)
def test_functions_that_refuse_their_options_are_named(changes, words):
    message = message_of(experiment.validate, make_config(**changes))
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(clip_epsilons=(0.2, 0.28)), ("config.clip_epsilons is (0.2, 0.28)", "config.loss_options.epsilon_high is 0.2")),
        (
            dict(loss_options=dict(epsilon_low=0.1)),
            ("config.clip_epsilons is (0.2, 0.2)", "config.loss_options.epsilon_low is 0.1"),
        ),
        (dict(loss_options={}, clip_epsilons=(0.3, 0.2)), ("(0.3, 0.2)", "config.loss_options.epsilon_low is 0.2")),
    ],
)
def test_the_clip_radius_is_that_of_the_loss(changes, named):
    message = message_of(experiment.validate, make_config(**changes))
    assert all(word in message for word in named)


# Trying the algorithm and the cases before a run.


@pytest.mark.parametrize("loss", ["clip_of_my_own", "detaching"])
def test_a_smooth_loss_of_ones_own_passes(loss):
    experiment.check_algorithm(make_config(loss=f"{MINE}.{loss}", loss_options={}))


@pytest.mark.parametrize(
    ("field", "function", "words"),
    [
        ("loss", "hidden_stop_gradient", ("stop_gradient", "first_order=False")),
        ("loss", "capped_at_one", ("kink", "ratio 1", "first_order=False")),
        ("loss", "coupled_rows", ("couples rows", "brute_force_objective")),
        ("loss", "summed_tokens", ("must be per token",)),
        ("advantage", "batch_normalized", ("couples groups", "normalize within groups")),
    ],
)
def test_what_the_oracle_cannot_do_is_refused_before_a_run(field, function, words):
    config = make_config(**{field: f"{MINE}.{function}"}, loss_options={}) if field == "loss" else make_config()
    config |= {field: f"{MINE}.{function}"}
    message = message_of(experiment.check_algorithm, config)
    assert message.startswith(f"config.{field} is '{MINE}.{function}'") and all(word in message for word in words)


def twice_unclipped(logprobs, old_logprobs, advantages, mask=None):
    return 2 * losses.importance_sampling(logprobs, old_logprobs, advantages, mask)


@pytest.mark.parametrize(
    ("loss", "unclipped_loss"),
    [
        # not the same gradient at ratio 1; the same there, but another first-order law
        ("jax_async_grpo.losses.ppo_clip", f"{MINE}.twice_unclipped"),
        ("jax_async_grpo.losses.reinforce", "jax_async_grpo.losses.importance_sampling"),
    ],
)
def test_the_unclipped_loss_is_the_loss_near_ratio_1(loss, unclipped_loss):
    config = make_config(loss=loss, loss_options={}, unclipped_loss=unclipped_loss)
    message = message_of(experiment.check_algorithm, config)
    assert f"config.unclipped_loss is {unclipped_loss!r} and config.loss is {loss!r}" in message and "ratio 1" in message
    experiment.check_algorithm(config | {"unclipped_loss": loss})


def test_a_loss_without_a_first_order_law_may_have_its_bias_measured():
    config = make_config(loss=f"{MINE}.capped_at_one", loss_options={})
    for case in config["cases"].values():
        case["first_order"] = False
    experiment.check_algorithm(config)


def test_a_group_of_one_needs_an_advantage_without_the_mean():
    config = make_config(group_size=1, advantage="jax_async_grpo.advantages.group_centered")
    message = message_of(experiment.validate, config)
    assert "group_size is 1" in message and "every advantage is 0" in message
    experiment.validate(config | {"advantage": f"{MINE}.rewards_themselves"})
    experiment.check_algorithm(config | {"advantage": f"{MINE}.rewards_themselves"})


def test_token_mean_is_refused_where_lengths_differ_and_only_there():
    config = make_config(aggregation="jax_async_grpo.aggregation.token_mean")
    experiment.check_case(config, experiment.build_case(config, "tabular", start=False))  # one token a completion
    config["cases"]["linear"]["task"] = f"{MINE}.two_lengths"
    config["cases"]["linear"]["task_options"] = {}
    case = experiment.build_case(config, "linear", start=False)
    message = message_of(experiment.check_case, config, case)
    assert message.startswith("config.aggregation is 'jax_async_grpo.aggregation.token_mean': ")
    assert "unequal lengths" in message and "use sequence_mean" in message and "cases.linear" in message


def test_a_ring_larger_than_the_machine_is_refused():
    """10 x 11 float64 a version; two schedules, one lag, three seeds."""
    grid = dict(max_staleness=(2**31 - 2,), schedules=("fixed", "periodic"), num_seeds=3, learning_rates=(0.1,))
    config = make_config(**{f"cases__tabular__{key}": value for key, value in grid.items()})

    def check():
        experiment.check_case(config, experiment.build_case(config, "tabular", start=False))

    message = message_of(check)
    assert message.startswith("config.cases.tabular.max_staleness = 2147483646 keeps as many old versions of the parameters")
    assert all(word in message for word in ("6 cells side by side", "1.06e+04 GiB", "num_seeds", "vectorize=False"))
    config["cases"]["tabular"]["vectorize"] = False
    message = message_of(check)
    assert "1.76e+03 GiB" in message and "vectorize" not in message and "num_seeds" not in message
    config["cases"]["tabular"]["max_staleness"] = (1000,)
    check()


def two_lengths():
    from jax_async_grpo.tasks import enumerate_completions, make_task

    allowed = np.ones((2, 3), bool)
    completions, mask = enumerate_completions(allowed, end_token=2)
    strings = dict(completions=completions, mask=mask, allowed=allowed, end_token=2)
    return make_task("two lengths", prompts=[[0]], rewards=[np.arange(7) % 2.0], **strings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(task_options={"rewards": ((1.0, 1.0), (0.0, 0.0))}), ("cases.tabular.task", "the same reward")),
        (dict(optimizer_options={"momentun": 0.9}), ("cases.tabular.optimizer (optax.sgd)", "momentun")),
        (dict(optimizer="math.sqrt"), ("cases.tabular.optimizer (math.sqrt)",)),
    ],
)
def test_cases_that_cannot_run_are_refused(changes, words):
    config = make_config(**{f"cases__tabular__{key}": value for key, value in changes.items()})
    message = message_of(lambda: experiment.check_case(config, experiment.build_case(config, "tabular", start=False)))
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(task_options={"rewards": ((1.0, math.nan),)}), ("cases.tabular.task (", "nan", "finite")),
        (dict(task_options={}), ("cases.tabular.task (", "rewards")),
        (dict(task="jax_async_grpo.losses.ppo_clip", task_options={}), ("cases.tabular.task (",)),
        (dict(task="builtins.dict"), ("cases.tabular.task (builtins.dict) returns a dict; it must be a Task",)),
        (dict(task=f"{MINE}.needs_a_package", task_options={}), ("cases.tabular.task (", "pip install it")),
        (dict(policy_options={"context_length": 0}), ("cases.tabular.policy (", "context_length")),
        (dict(policy="builtins.dict", policy_options={}), ("cases.tabular.policy (builtins.dict)",)),
        (dict(policy=f"{MINE}.no_policy", policy_options={}), ("returns a int; it must be a Policy",)),
        (dict(warm_start={"target_reward": 2.0}), ("config.cases.tabular.warm_start: target_reward=2.0",)),
    ],
)
def test_factories_that_refuse_are_named_by_field(changes, words):
    config = make_config(**{f"cases__tabular__{key}": value for key, value in changes.items()})
    message = message_of(experiment.build_case, config, "tabular")
    assert all(word in message for word in words), message


def needs_a_package():
    raise ImportError("pip install it")


def no_policy(vocab_size):
    return vocab_size


def test_too_many_compositions_say_how_many_and_what_to_lower():
    config = make_config(group_size=64, max_compositions=2079)  # 3 reward levels: (63 + 2 choose 2) = 2080
    message = message_of(experiment.build_case, config, "tabular")
    for word in ("cases.tabular.task", "3 distinct rewards", "2080 compositions", "2079", "lower group_size"):
        assert word in message
    assert experiment.build_case(config | {"max_compositions": 2080}, "tabular", start=False).task.name == "bandit"


# Cases.


@pytest.fixture(scope="module")
def case():
    return experiment.build_case(make_config(), "tabular")


def test_a_case_is_what_the_config_says(case):
    options = make_config()["cases"]["tabular"]["task_options"]
    np.testing.assert_array_equal(case.task.rewards, bandit(**options).rewards)
    assert case.labels == {"policy": "tabular", "optimizer": "sgd", "task": "bandit", "loss": "ppo_clip"}
    start = tabular(case.task.vocab_size, context_length=1, init_scale=1.0).init(jax.random.fold_in(jax.random.key(0), 0))
    np.testing.assert_allclose(case.params["table"], start["table"], rtol=1e-12)
    assert case.params["table"].dtype == jnp.float64
    other = experiment.build_case(make_config(seed=1), "tabular")
    assert np.abs(other.params["table"] - case.params["table"]).max() > 0.1
    update, _ = case.optimizer_fn(0.25).update({"x": jnp.ones(())}, case.optimizer_fn(0.25).init({"x": jnp.ones(())}))
    assert update["x"] == -0.25


def test_shapes_without_a_start_are_those_of_the_start(case):
    config = make_config(cases__tabular__warm_start={"target_reward": 0.7})
    shapes = experiment.build_case(config, "tabular", start=False).params
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), case.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == described
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


def test_a_warm_start_starts_where_it_ends():
    options = {"target_reward": 0.7, "learning_rate": 0.1}
    warm = experiment.build_case(make_config(cases__tabular__warm_start=options), "tabular")
    assert 0.7 <= jax.jit(warm.rewards)(warm.params)["reward"] < 0.75


def test_rewards_are_what_is_trained_on_and_what_is_judged_on():
    case = experiment.build_case(make_config(cases__proxy_gold__policy_options={"context_length": 1}), "proxy_gold")
    rewards = jax.jit(case.rewards)(case.params)  # a uniform policy
    np.testing.assert_allclose([rewards["reward"], rewards["gold_reward"]], [1.5 / 4, 1 / 4], rtol=1e-12)


def test_sampled_updates_estimate_the_gradient_that_exact_ones_follow(case):
    stale = jax.tree.map(lambda leaf: 0.5 * leaf, case.params)
    arguments = (case.params, stale, jnp.array(7), jnp.array(5))
    exact = jax.jit(case.update_gradient("exact"))(jax.random.key(0), *arguments)["table"]
    keys = jax.random.split(jax.random.key(3), 2000)
    sampled = jax.jit(jax.vmap(case.update_gradient("sampled"), in_axes=(0, None, None, None, None)))(keys, *arguments)["table"]
    error = sampled.std(axis=0) / math.sqrt(len(keys))
    assert (np.abs(sampled.mean(axis=0) - exact) <= 4.5 * error + 1e-12).all()
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)


def test_the_unclipped_loss_stands_in_when_asked_for(case):
    algorithm = case.algorithm
    assert algorithm.arguments()["loss_fn"].func is losses.ppo_clip
    assert algorithm.arguments(clipped=False)["loss_fn"] is losses.importance_sampling
    far = jax.tree.map(lambda leaf: -leaf, case.params)  # ratios far from 1
    gradients = [
        jax.jit(lambda *p, clipped=clipped: case.role_gradient(*p, clipped=clipped))(case.params, far, far, far)["table"]
        for clipped in (True, False)
    ]
    assert np.abs(gradients[0] - gradients[1]).max() > 0.01


# The plan.


def plan(**changes):
    config = make_config(**{f"cases__tabular__{key}": value for key, value in changes.items()})
    config["cases"] = {"tabular": config["cases"]["tabular"]}
    return config, experiment.chunks(config)


def test_chunks_cover_the_grid_once():
    _, chunks = plan(max_staleness=(0, 3), schedules=("fixed", "random"), learning_rates=(0.02, 0.1), num_seeds=3)
    assert [chunk.name for chunk in chunks] == [
        f"tabular/{updates}/{rate}" for updates in ("exact", "sampled") for rate in ("0.02", "0.1")
    ]
    grid = [(schedule, lag) for schedule in ("fixed", "random") for lag in (0, 3)]
    for chunk in chunks:
        seeds = range(3) if chunk.updates == "sampled" else range(1)  # exact updates draw nothing
        cells = [(cell.schedule, cell.max_staleness, cell.seed) for cell in chunk.cells]
        assert cells == [(*point, seed) for point in grid for seed in seeds]


def test_one_step_of_every_stratum_is_measured_at_matched_times():
    rates, count = (0.001, 0.004), 24
    _, chunks = plan(updates=("exact",), learning_rates=rates, num_measurements=count, time_window=(6.0, 9.0))
    fine, coarse = (chunk.measure_steps * chunk.learning_rate for chunk in chunks)
    edges = np.linspace(6.0, 9.0, count + 1)
    for chunk, times in zip(chunks, (fine, coarse), strict=True):
        assert (times > edges[:-1] - chunk.learning_rate).all() and (times < edges[1:]).all()  # a time is rounded down
        assert chunk.num_updates == chunk.measure_steps[-1] + 1
    assert np.abs(fine - coarse).max() <= max(rates)
    # jittered: a regular grid would meet a periodic schedule at one phase
    assert np.ptp(np.diff(fine)) > 0.5 * 3.0 / count
    _, again = plan(updates=("exact",), learning_rates=rates, num_measurements=count, time_window=(6.0, 9.0))
    np.testing.assert_array_equal(chunks[0].measure_steps, again[0].measure_steps)
    assert (experiment.chunks(make_config(seed=1))[0].measure_steps != experiment.chunks(make_config())[0].measure_steps).any()


def test_strata_narrower_than_an_update_share_a_step_that_counts_once():
    _, chunks = plan(updates=("exact",), learning_rates=(0.01, 0.5), num_measurements=48, time_window=(16.0, 20.0))
    fine, coarse = (chunk.measure_steps for chunk in chunks)
    assert len(fine) == 48 and coarse.tolist() == [32, 33, 34, 35, 36, 37, 38, 39]


def test_schedules_are_those_of_the_cells_and_padding_changes_nothing():
    chunk = next(chunk for chunk in plan(max_staleness=(0, 5), num_seeds=2)[1] if chunk.updates == "sampled")
    longer, shorter = chunk.staleness(0, 400), chunk.staleness(0, 250)
    assert longer.shape == (len(chunk.cells), 400) and longer.dtype == np.int32
    np.testing.assert_array_equal(longer[:, :250], shorter)
    drawn = {}
    for cell, schedule in zip(chunk.cells, longer, strict=True):
        if cell.schedule == "random":
            drawn[cell.max_staleness, cell.seed] = schedule
        else:
            expected = {"fixed": staleness.fixed, "periodic": staleness.periodic}[cell.schedule](cell.max_staleness, 400)
            np.testing.assert_array_equal(schedule, expected)
    assert not drawn[0, 0].any() and set(drawn[5, 0]) == set(range(6))
    assert (drawn[5, 0] != drawn[5, 1]).any() and (chunk.staleness(1, 400) != longer).any()


def test_the_described_plan_counts_what_will_be_done():
    grid = dict(max_staleness=(0, 9), schedules=("fixed",), learning_rates=(0.1, 0.2))
    config, chunks = plan(**grid, num_seeds=4, num_measurements=6)
    case = experiment.build_case(config, "tabular", start=False)
    header, exact, sampled, last = experiment.describe(config, [case]).split("\n")
    assert header.split()[:3] == ["case", "updates", "cells"]
    for line, updates, seeds in ((exact, "exact", 1), (sampled, "sampled", 4)):
        mine = [chunk for chunk in chunks if chunk.updates == updates]
        num_updates = sum(len(chunk.cells) * chunk.num_updates for chunk in mine)
        cells = 2 * 2 * seeds
        ring = 10 * 2 * seeds * 11 * 10 * 8 / 2**20  # versions of a chunk's cells, each 11 contexts x 10 tokens of 8 bytes
        counts = (cells, 0.1, 0.2, num_updates, num_updates + 2 * 6 * cells, f"{ring:.1f}", 6, 36)
        assert line.split() == ["tabular", updates, *map(str, counts)]
    assert last.startswith("4 chunks")
    config["cases"]["tabular"]["vectorize"] = False
    alone = experiment.describe(config, [experiment.build_case(config, "tabular", start=False)]).split("\n")[2]
    assert alone.split()[7] == f"{10 * 11 * 10 * 8 / 2**20:.1f}"  # one cell at a time
