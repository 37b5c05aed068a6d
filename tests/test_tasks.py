"""Tasks: the completions are all there, once, and carry all the probability; the rewards are what the verifiers say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_async_grpo import tasks
from jax_async_grpo.tasks import characters
from jax_async_grpo.tasks.reasoning import ANSWERS

ARRAYS = ("prompts", "prompt_mask", "completions", "mask", "allowed", "rewards", "gold_rewards")


def strings_of(completions: np.ndarray, mask: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row[valid].tolist()) for row, valid in zip(completions, mask, strict=True)]


def assert_same(task, other):
    assert (task.name, task.end_token) == (other.name, other.end_token)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(task, name), getattr(other, name), err_msg=name)


def random_allowed(rng: np.random.Generator, length: int, vocab_size: int) -> np.ndarray:
    allowed = rng.random((length, vocab_size)) < 0.6
    allowed[np.arange(length), rng.integers(vocab_size, size=length)] = True
    return allowed


# Enumeration


@pytest.mark.parametrize("seed", range(12))
def test_enumeration_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    length, vocab_size = rng.integers(1, 5), rng.integers(1, 5)
    end = None if seed % 3 == 0 else int(rng.integers(vocab_size))
    allowed = random_allowed(rng, length, vocab_size)
    expected = set()
    for string in itertools.product(*(np.flatnonzero(row).tolist() for row in allowed)):
        expected.add(string[: string.index(end) + 1] if end in string else string)
    completions, mask = tasks.enumerate_completions(allowed, end)
    assert strings_of(completions, mask) == sorted(expected, key=lambda string: (len(string), string))
    assert tasks.count_completions(allowed, end) == len(expected)
    assert completions.dtype == np.int32 and mask.dtype == bool
    assert (completions[~mask] == end).all()


@pytest.mark.parametrize("seed", range(4))
def test_completions_carry_all_the_probability_of_any_policy(seed):
    """Kraft's equality under a policy whose next-token probabilities depend on the whole prefix."""
    rng = np.random.default_rng(seed)
    allowed = random_allowed(rng, 4, 4)
    completions, mask = tasks.enumerate_completions(allowed, end_token=seed)

    def next_token(prefix: tuple[int, ...]) -> np.ndarray:
        seed_of_prefix = int(hashlib.sha256(repr((seed, prefix)).encode()).hexdigest(), 16)
        weights = np.random.default_rng(seed_of_prefix).random(4) * allowed[len(prefix)]
        return weights / weights.sum()

    strings = strings_of(completions, mask)
    total = sum(np.prod([next_token(s[:n])[s[n]] for n in range(len(s))]) for s in strings)
    assert total == pytest.approx(1, abs=1e-14)
    assert not any(a != b and b[: len(a)] == a for a in strings for b in strings)


def test_enumeration_is_bounded_before_it_is_built():
    allowed = np.ones((3, 4), bool)
    assert len(tasks.enumerate_completions(allowed, 0, max_completions=40)[0]) == 1 + 3 + 9 + 27
    with pytest.raises(ValueError, match=r"gives 40 completions, more than max_completions=39: lower the length L=3"):
        tasks.enumerate_completions(allowed, 0, max_completions=39)
    with pytest.raises(ValueError, match=r"1,048,576 completions, more than max_completions=100000"):
        tasks.enumerate_completions(np.ones((20, 2), bool))
    with pytest.raises(ValueError, match=r"about 10\^30000 completions"):
        tasks.enumerate_completions(np.ones((30_000, 10), bool))


@pytest.mark.parametrize(
    ("allowed", "end", "message"),
    [
        (np.ones((2, 3)), None, "allowed must be a non-empty bool"),
        (np.ones(3, bool), None, "allowed must be a non-empty bool"),
        (np.ones((0, 3), bool), None, "allowed must be a non-empty bool"),
        (np.array([[True, True], [False, False]]), None, "forbids every token at position 1"),
        (np.ones((2, 3), bool), 3, r"end_token=3 must be None or a token id in 0\.\.2"),
        (np.ones((2, 3), bool), -1, r"end_token=-1 must be"),
    ],
)
def test_enumeration_refuses(allowed, end, message):
    with pytest.raises(ValueError, match=message):
        tasks.enumerate_completions(allowed, end)


# The checked constructor


def task_arrays() -> dict:
    """Two prompts, one of them padded; V = 3, L = 2, end token 2, hence 7 completions."""
    allowed = np.ones((2, 3), bool)
    completions, mask = tasks.enumerate_completions(allowed, 2)
    rewards = np.arange(14.0).reshape(2, 7)
    prompt_mask = np.array([[True, True], [False, True]])
    arrays = {"prompts": np.array([[0, 1], [2, 0]]), "prompt_mask": prompt_mask, "rewards": rewards}
    return {**arrays, "completions": completions, "mask": mask, "allowed": allowed, "end_token": 2}


def test_make_task_copies_what_it_is_given():
    arrays = task_arrays()
    gold = -arrays["rewards"]
    task = tasks.make_task("mine", **arrays, gold_rewards=gold)
    assert (task.name, task.end_token, task.vocab_size) == ("mine", 2, 3)
    for name in ARRAYS[:-1]:
        np.testing.assert_array_equal(getattr(task, name), arrays[name])
    np.testing.assert_array_equal(task.gold_rewards, gold)
    arrays["rewards"][0, 0] = 7
    assert task.rewards[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        task.rewards[0, 0] = 7


def test_make_task_defaults():
    arrays = task_arrays()
    del arrays["prompt_mask"]
    task = tasks.make_task("mine", **arrays)
    assert task.gold_rewards is task.rewards
    assert task.prompt_mask.all() and task.prompt_mask.shape == (2, 2)


def replaced(array: np.ndarray, index, value) -> np.ndarray:
    array = np.array(array)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"prompts": a["prompts"][0]}, "prompts must be non-empty integers of rank 2"),
        (lambda a: {"prompts": a["prompts"] * 1.0}, "prompts must be non-empty integers of rank 2, got float64"),
        (lambda a: {"prompts": a["prompts"] + 1}, r"prompts must hold token ids in 0\.\.2, got 1\.\.3"),
        (lambda a: {"prompts": a["prompts"] - 1}, r"prompts must hold token ids"),
        (lambda a: {"prompt_mask": a["prompt_mask"][:, :1]}, r"prompt_mask must be bool of shape \(2, 2\)"),
        (lambda a: {"prompt_mask": a["prompt_mask"][:, ::-1]}, "prompt_mask must pad on the left.* prompt 1"),
        (lambda a: {"mask": a["mask"] * 1}, r"mask must be bool of shape \(7, 2\), got int64"),
        (lambda a: {"mask": a["mask"][1:]}, r"mask must be bool of shape \(7, 2\)"),
        (lambda a: {"mask": replaced(a["mask"], 0, [True, True])}, "mask must be True up to and including.* completion 0"),
        (lambda a: {"mask": replaced(a["mask"], 4, [True, False])}, "mask must be True up to and including.* completion 4"),
        (lambda a: {"allowed": a["allowed"][:1]}, r"allowed must be bool of shape \(2, 3\)"),
        (lambda a: {"allowed": replaced(a["allowed"], (1, 1), False)}, "completion 2 holds a token that allowed forbids"),
        (lambda a: {"completions": replaced(a["completions"], (3, 1), 3)}, "completion 3 holds a token that allowed forbids"),
        (lambda a: {"completions": replaced(a["completions"], 2, a["completions"][1])}, "completion 2 stands there twice"),
        (lambda a: {n: a[n][:-1] for n in ("completions", "mask")}, r"carry 0\.888889 of the uniform policy's probability"),
        (lambda a: {"rewards": a["rewards"][:, 1:]}, r"rewards must have shape \[B, Y\] = \(2, 7\), got \(2, 6\)"),
        (lambda a: {"rewards": replaced(a["rewards"], (1, 4), np.nan)}, r"^rewards of prompt 1, completion 4 is nan"),
        (
            lambda a: {"gold_rewards": replaced(a["rewards"], (0, 6), -np.inf)},
            r"gold_rewards of prompt 0, completion 6 is -inf",
        ),
        (lambda a: {"end_token": 3}, "end_token=3 must be"),
        (lambda a: {"end_token": None}, "mask must be True up to and including end_token=None"),
    ],
)
def test_make_task_refuses(change, message):
    arrays = task_arrays()
    with pytest.raises(ValueError, match=message) as error:
        tasks.make_task("mine", **{**arrays, **change(arrays)})
    assert "\n" not in str(error.value)


# Bandits and digit sums


def test_bandit_has_a_token_for_every_prompt_and_action():
    rewards, gold = [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    task = tasks.bandit(rewards, gold_rewards=gold, name="mine")
    assert (task.name, task.vocab_size, task.end_token) == ("mine", 5, None)
    assert task.completions.tolist() == [[0], [1], [2]] and task.mask.all()
    assert task.prompts.tolist() == [[3], [4]] and task.prompt_mask.all()
    assert task.allowed.tolist() == [[True, True, True, False, False]]
    assert task.rewards.tolist() == rewards and task.gold_rewards.tolist() == gold
    same = tasks.bandit(rewards)
    assert same.gold_rewards is same.rewards and same.name == "bandit"


def test_bandit_refuses():
    with pytest.raises(ValueError, match=r"rewards must have shape \[B, A\]"):
        tasks.bandit([0.0, 1.0])
    with pytest.raises(ValueError, match="at least 1 prompt and 2 actions"):
        tasks.bandit([[1.0]])
    with pytest.raises(ValueError, match="rewards of prompt 0, completion 1 is nan"):
        tasks.bandit([[1.0, np.nan]])


def test_proxy_gold_bandit_is_hackable():
    task = tasks.proxy_gold_bandit()
    assert task.rewards.tolist() == [[0, 0, 0.5, 1]] and task.gold_rewards.tolist() == [[0, 0, 1, 0]]
    assert len(tasks.PROXY_GOLD_LOGITS) == len(task.completions)
    # Ascent on the proxy from these logits raises the gold at first and lowers it where the proxy is nearly learned.
    for logits, sign in ((np.array(tasks.PROXY_GOLD_LOGITS), 1), (np.array([-6.0, -6.0, 0.0, 2.0]), -1)):
        p = np.exp(logits) / np.exp(logits).sum()
        policy_gradient = p * (task.rewards[0] - p @ task.rewards[0])
        gold_gradient = p * (task.gold_rewards[0] - p @ task.gold_rewards[0])
        assert np.sign(policy_gradient @ gold_gradient) == sign


def value_of(digits: np.ndarray, base: int) -> int:
    return int("".join(map(str, digits)), base)


@pytest.mark.parametrize(("num_prompts", "num_digits", "base"), [(5, 2, 10), (4, 3, 4), (45, 2, 3), (6, 1, 3)])
def test_digit_sum_rewards_the_sum(num_prompts, num_digits, base):
    task = tasks.digit_sum(num_prompts, num_digits, base, seed=3)
    assert task.completions.shape == (base**num_digits, num_digits) and task.mask.all()
    assert task.prompts.shape == (num_prompts, 2 * num_digits + 1) and task.vocab_size == base + 1
    assert (task.prompts[:, num_digits] == base).all()
    pairs = [(value_of(p[:num_digits], base), value_of(p[num_digits + 1 :], base)) for p in task.prompts]
    assert len(set(pairs)) == num_prompts
    for (first, second), rewards in zip(pairs, task.rewards, strict=True):
        answer = [value_of(c, base) == first + second for c in task.completions]
        np.testing.assert_array_equal(rewards, answer)
        assert sum(answer) == 1


def test_sums_of_variable_length_are_said_without_leading_zeros():
    task = tasks.digit_sum(5, 3, 2, partial_credit=True, variable_length=True, seed=1)
    assert task.completions.shape == (2 + 4 + 8, 3) and task.vocab_size == 4 and task.end_token == 3
    assert sorted(set(task.mask.sum(1).tolist())) == [2, 3]
    for prompt, rewards in zip(task.prompts, task.rewards, strict=True):
        total = int("".join(map(str, prompt[:3])), 2) + int("".join(map(str, prompt[4:])), 2)
        for completion, reward in zip(task.completions, rewards, strict=True):
            text = "".join(str(token) for token in completion if token < 2)
            assert reward == (1.0 if text == bin(total)[2:] else 0.5 * (int(text[-1]) == total % 2))
    assert (task.rewards == 1).sum(1).tolist() == [1] * 5
    strict = tasks.digit_sum(5, 3, 2, variable_length=True, seed=1)
    np.testing.assert_array_equal(strict.rewards, task.rewards == 1)
    with pytest.raises(ValueError, match="base=11"):
        tasks.digit_sum(2, 2, 11, variable_length=True)


def test_digit_sum_partial_credit_counts_right_digits():
    whole, partial = (tasks.digit_sum(4, 3, 3, partial_credit=credit, seed=1) for credit in (False, True))
    np.testing.assert_array_equal(whole.prompts, partial.prompts)
    right = task_answers(whole)
    expected = np.array([[sum(a == b for a, b in zip(c, r, strict=True)) / 3 for c in whole.completions] for r in right])
    np.testing.assert_array_equal(partial.rewards, expected)
    assert len(np.unique(partial.rewards)) == 4


def task_answers(task) -> np.ndarray:
    return task.completions[task.rewards.argmax(axis=1)]


def test_digit_sum_is_a_function_of_the_seed():
    assert_same(tasks.digit_sum(6, seed=5), tasks.digit_sum(6, seed=5))
    assert (tasks.digit_sum(6, seed=5).prompts != tasks.digit_sum(6, seed=6).prompts).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 10), "num_prompts=0 must be an integer of at least 1"),
        ((1, 0, 10), "num_digits=0 must be an integer of at least 1"),
        ((1, 2, 1), "base=1 must be an integer of at least 2"),
        ((1, 2.0, 10), "num_digits=2.0 must be an integer of at least 1"),
        (("1", 2, 10), "num_prompts='1' must be"),
        ((1, 2, 9.5), "base=9.5 must be"),
        ((7, 1, 3), "num_prompts=7 must be at most 6"),
        ((1, 9, 10), "1,000,000,000 completions"),
    ],
)
def test_digit_sum_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.digit_sum(*arguments)


# Characters


def test_characters_round_trip():
    text = "What is 17 * 3?\n~ {ok}"
    tokens = characters.encode(text)
    assert characters.decode(tokens) == text
    assert tokens.min() > characters.UNKNOWN_TOKEN and tokens.max() < characters.VOCAB_SIZE == 99
    assert characters.encode("é\t").tolist() == [characters.UNKNOWN_TOKEN] * 2
    assert characters.decode([characters.PAD_TOKEN, *characters.encode("1é"), characters.END_TOKEN]) == "1\ufffd"


# reasoning-gym


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


@pytest.fixture
def make(gym, tmp_path):
    """`tasks.reasoning_gym` with a cache of the test's own."""
    return lambda dataset, **options: tasks.reasoning_gym(dataset, **{"cache_dir": tmp_path, **options})


def entries_that_fit(gym, name: str, count: int, **options) -> list[dict]:
    """Those with an answer of one or two digits, in order: right for datasets that want the exact number."""
    data = gym.create_dataset(name, size=10_000, **options)
    return list(itertools.islice((e for e in data if len(e["answer"]) <= 2 and e["answer"].isdigit()), count))


def test_completions_are_the_111_strings(make):
    task = make("gcd", num_prompts=2)
    assert [characters.decode(row) for row in task.completions] == list(ANSWERS)
    assert list(ANSWERS) == ["", *(str(n) for n in range(10)), *(f"{n:02d}" for n in range(100))]
    assert task.completions.shape == (111, 3) and task.mask.sum(axis=1).tolist() == [len(answer) + 1 for answer in ANSWERS]
    last = np.argmax(np.cumsum(task.mask, axis=1), axis=1)
    assert (task.completions[np.arange(111), last] == task.end_token).all()
    assert np.flatnonzero(task.allowed[2]).tolist() == [task.end_token]


@pytest.mark.parametrize(
    ("name", "options"),
    [("gcd", {"max_value": 300}), ("lcm", {}), ("count_bits", {}), ("simple_equations", {"max_terms": 2})],
)
def test_rewards_are_the_verifiers(gym, make, name, options):
    task = make(name, num_prompts=3, seed=4, **options)
    entries = entries_that_fit(gym, name, 3, seed=4, **options)
    data = gym.create_dataset(name, seed=4, size=1, **options)
    for row, entry in enumerate(entries):
        assert characters.decode(task.prompts[row]) == entry["question"][-64:]
        for answer in ("", "0", "7", "07", "77", entry["answer"], entry["answer"][0] + "1"):
            assert task.rewards[row, ANSWERS.index(answer)] == data.score_answer(answer, entry)
        assert task.rewards[row, ANSWERS.index(entry["answer"])] == 1
    assert (task.rewards.max(axis=1) == 1).all() and task.gold_rewards is task.rewards and task.name == name


def test_partial_credit_levels(make):
    gcd = make("gcd", num_prompts=4)
    answers = [ANSWERS[index] for index in gcd.rewards.argmax(axis=1)]
    for answer, rewards in zip(answers, gcd.rewards, strict=True):
        longer = [n for n, string in enumerate(ANSWERS) if answer in string and string != answer]
        assert np.flatnonzero(rewards == len(answer) / 2).tolist() == (longer if len(answer) == 1 else [ANSWERS.index(answer)])
    assert np.unique(gcd.rewards).tolist() == [0, 0.5, 1]
    assert np.unique(make("gsm_symbolic", num_prompts=3).rewards).tolist() == [0, 0.01, 1]
    products = make("products", num_prompts=4, min_digits=1, max_digits=1)
    assert (products.rewards == 1).sum() > 4  # this verifier takes "6" and "06": ties


def test_several_datasets_share_the_prompts(make):
    names = ("gcd", "products", "count_bits")
    task = make(names, num_prompts=7, seed=2, products={"max_digits": 1})
    parts = [make("gcd", num_prompts=3, seed=2), make("products", num_prompts=2, seed=2, max_digits=1)]
    parts.append(make("count_bits", num_prompts=2, seed=2))
    assert task.name == "gcd+products+count_bits"
    for name in ("prompts", "prompt_mask", "rewards"):
        np.testing.assert_array_equal(getattr(task, name), np.concatenate([getattr(part, name) for part in parts]))


def test_prompts_are_tails_padded_on_the_left(make):
    task = make("simple_equations", num_prompts=4, prompt_length=40)
    full = make("simple_equations", num_prompts=4, prompt_length=80)
    lengths = full.prompt_mask.sum(axis=1)
    assert task.prompts.shape == (4, 40) and lengths.min() < 40
    for short, long in zip(task.prompts, full.prompts, strict=True):
        text = characters.decode(long)
        assert text.startswith("Solve for") and characters.decode(short) == text[-40:]
    np.testing.assert_array_equal(full.prompt_mask, np.arange(80) >= 80 - lengths[:, None])


def test_questions_that_read_the_same_are_kept_once(gym, make):
    task = make("products", num_prompts=10, prompt_length=48, max_digits=1)  # " * 4. Give only ...": one operand is cut off
    first_answers: dict[str, str] = {}
    for entry in entries_that_fit(gym, "products", 500, seed=0, max_digits=1):
        first_answers.setdefault(entry["question"][-48:], entry["answer"])
    kept = [(characters.decode(p), ANSWERS[r.argmax()]) for p, r in zip(task.prompts, task.rewards, strict=True)]
    assert kept == list(itertools.islice(first_answers.items(), 10))
    with pytest.raises(ValueError, match="products' has 1 different .* raise prompt_length=30 or narrow its options min_terms"):
        make("products", num_prompts=2, prompt_length=30, max_digits=1)


def test_seed_and_options_change_the_questions(make):
    tasks_made = [
        make("gcd", num_prompts=2, **o) for o in ({}, {"seed": 1}, {"max_value": 40}, {"min_numbers": 3, "max_numbers": 3})
    ]
    assert len({task.prompts.tobytes() for task in tasks_made}) == 4
    numbers = characters.decode(tasks_made[2].prompts[0]).split(": ")[1].split(".")[0].split(", ")
    assert max(map(int, numbers)) <= 40


def test_cache_hit_asks_nobody(make, monkeypatch):
    first = make("gcd", num_prompts=2)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert_same(make("gcd", num_prompts=2), first)
    with pytest.raises(ImportError, match="reasoning-gym is needed"):
        make("gcd", num_prompts=3)


@pytest.mark.parametrize("damage", ["truncated", "altered", "garbage", "empty", "other JSON", "folder"])
def test_damaged_cache_is_made_again(make, tmp_path, damage):
    first = make("gcd", num_prompts=2)
    (path,) = tmp_path.glob("*.json")
    good = path.read_text()
    wrong = {
        "truncated": good[: len(good) // 2].encode(),
        "altered": good.replace("0.5", "0.6", 1).encode(),
        "garbage": bytes(range(256)),
        "empty": b"",
        "other JSON": b"[1, 2]",
    }
    path.unlink()
    if damage == "folder":
        path.mkdir()
        with pytest.warns(UserWarning, match="scores are not cached"):
            assert_same(make("gcd", num_prompts=2), first)
    else:
        path.write_bytes(wrong[damage])
        assert_same(make("gcd", num_prompts=2), first)
        assert path.read_text() == good
    assert list(tmp_path.iterdir()) == [path]


def test_cache_key_has_all_that_matters(make, tmp_path, monkeypatch):
    variants = [{}, {"seed": 1}, {"prompt_length": 50}, {"max_value": 999}, {"num_prompts": 2}]
    for options in variants:
        make("gcd", **{"num_prompts": 1, **options})
    make("lcm", num_prompts=1)
    assert len(list(tmp_path.glob("*.json"))) == len(variants) + 1
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "999")
    make("gcd", num_prompts=1)
    assert len(list(tmp_path.glob("*.json"))) == len(variants) + 2


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_default_cache_folder(gym, tmp_path, monkeypatch, variable):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    tasks.reasoning_gym("count_bits", num_prompts=1)
    folder = tmp_path / "jax_async_grpo" if variable == "XDG_CACHE_HOME" else tmp_path / ".cache" / "jax_async_grpo"
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["content"][0][0].startswith("How many 1 bits")


def test_unwritable_cache_is_a_warning(make, tmp_path):
    first = make("gcd", num_prompts=2)
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.warns(UserWarning, match="scores are not cached"):
        assert_same(make("gcd", num_prompts=2, cache_dir=file / "folder"), first)


def test_verifier_that_raises_gives_no_credit(gym, make, monkeypatch):
    expected = make("count_bits", num_prompts=2)
    data_class = gym.factory.DATASETS["count_bits"][0]
    original = data_class.score_answer

    def fragile(self, answer, entry):
        return original(self, str(int(answer)), entry) / (answer != "3")

    monkeypatch.setattr(data_class, "score_answer", fragile)
    task = make("count_bits", num_prompts=2, seed=0, max_n=2147483647)  # the default, spelled out: another cache file
    assert_same(task, expected)  # "" raises ValueError and "3" ZeroDivisionError, which were 0 before

    def broken(self, answer, entry):
        raise TypeError("no such field")

    monkeypatch.setattr(data_class, "score_answer", broken)
    with pytest.raises(
        ValueError, match=r"has 0 different .* first 100, .*\(score_answer raised TypeError\('no such field'\)\)"
    ):
        make("count_bits", num_prompts=1, seed=9)


def test_entries_whose_best_answer_scores_below_one_are_left_out(gym, make, monkeypatch):
    data_class = gym.factory.DATASETS["gcd"][0]
    monkeypatch.setattr(data_class, "score_answer", lambda self, answer, entry: 0.99 if answer == entry["answer"] else 0.5)
    with pytest.raises(ValueError, match="'gcd' has 0 different questions"):
        make("gcd")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_must_be_finite(gym, make, monkeypatch, score):
    data_class = gym.factory.DATASETS["gcd"][0]
    monkeypatch.setattr(data_class, "score_answer", lambda self, answer, entry: score if answer == "42" else 1.0)
    with pytest.raises(ValueError, match=rf"dataset 'gcd', entry 0: score_answer\('42'\) is {score}, must be finite"):
        make("gcd")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("gdc", {}, "dataset='gdc' is unknown to reasoning-gym: did you mean gcd"),
        ("#", {}, "dataset='#' is unknown to reasoning-gym"),
        ("gcd", {"max_terms": 3}, "max_terms=3 is not an option of dataset 'gcd': allowed are min_numbers"),
        ("gcd", {"size": 3}, "size=3 is not an option"),
        ("gcd", {"min_value": -3}, "dataset 'gcd' refuses its options {'min_value': -3}: "),
        ("products", {"min_digits": 4}, "'products' has 0 different questions .* first 100, num_prompts=8"),
        ("gcd", {"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        (("gcd", "lcm"), {"num_prompts": 1}, "num_prompts=1 must be at least 2"),
        (("gcd", "gcd"), {}, "must be a name or several different ones"),
        ((), {}, "must be a name or several different ones"),
        (("gcd", "lcm"), {"max_value": 3}, "max_value=3 must"),
        (("gcd", "lcm"), {"products": {"max_digits": 1}}, "products={'max_digits': 1} must"),
        ("gcd", {"prompt_length": 0}, "prompt_length=0 must be at least 1"),
        ("gcd", {"prompt_length": 4.0}, "prompt_length=4.0 must be an integer"),
        ("gcd", {"num_prompts": "4"}, "num_prompts=.4. must be an integer"),
    ],
)
def test_reasoning_gym_refuses(make, dataset, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(dataset, **options)
    assert "\n" not in str(error.value)


def test_missing_reasoning_gym_says_how_to_install_it(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match=r'pip install "jax-async-grpo\[tasks\]", or make demo') as error:
        tasks.reasoning_gym("gcd", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_importing_tasks_does_not_import_reasoning_gym():
    code = "import sys, jax_async_grpo.tasks; sys.exit('reasoning_gym' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True, timeout=120)
