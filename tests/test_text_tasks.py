"""Tasks of free text: what is tokenized comes back, what is scored agrees with the exact world, and no verifier ends a run."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jax_async_grpo import tasks
from jax_async_grpo.tasks import characters, math_answers
from jax_async_grpo.tasks.reasoning_text import REFUSED

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("", "12+34", "line\n#### 7", "</s><pad> is text", "naïve 数 🙂", "  spaces  ")


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def math_verify():
    return pytest.importorskip("math_verify")


def text_task(verify, num_prompts=3, **options):
    texts = {"questions": [f"question {row}" for row in range(num_prompts)], "answers": ["yes"] * num_prompts}
    lengths = {"prompt_length": 12, "max_length": 8}
    return tasks.make_text_task("planted", tokenizer=tasks.character_tokenizer(), verify=verify, **(texts | lengths | options))


def completions_of(task, texts):
    """[B, G, L] tokens and mask of nested texts, ended where the end token fits."""
    length = task.max_length
    tokens = np.full((len(texts), len(texts[0]), length), task.tokenizer.pad_token, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for index in np.ndindex(mask.shape[:2]):
        ended = np.append(task.tokenizer.encode(texts[index[0]][index[1]]), task.tokenizer.end_token)[:length]
        tokens[index][: len(ended)], mask[index][: len(ended)] = ended, True
    return tokens, mask


# Tokenizers


@pytest.fixture(scope="module")
def save_tokenizer():
    """Writes a byte-level BPE tokenizer.json with these special tokens, padding and truncation switched on."""
    library = pytest.importorskip("tokenizers")

    def save(folder, special, **configured):
        built = library.Tokenizer(library.models.BPE())
        built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
        built.train_from_iterator(["how many apples are left", "12 + 34 = 46"], trainer)
        built.enable_truncation(4)
        built.enable_padding(length=16)
        built.save(str(folder / "tokenizer.json"))
        if configured:
            (folder / "tokenizer_config.json").write_text(json.dumps(configured))
        return built

    return save


def test_characters_come_back_and_strangers_do_not_break_them():
    tokenizer = tasks.character_tokenizer()
    assert tokenizer.decode(tokenizer.encode("12+34\n")) == "12+34\n" and tokenizer.encode("ab").dtype == np.int32
    assert tokenizer.decode(np.array([characters.PAD_TOKEN, 3, characters.END_TOKEN, 99, -1])) == "\n\ufffd\ufffd"
    assert (tokenizer.vocab_size, tokenizer.pad_token, tokenizer.end_token) == (99, 0, 1)


def test_a_tokenizer_file_gives_every_text_back(save_tokenizer, tmp_path):
    built = save_tokenizer(tmp_path, ["<pad>", "</s>"])
    tokenizer = tasks.load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32 and not {tokenizer.end_token, tokenizer.pad_token} & set(tokens.tolist())
        ended = [*tokens.tolist(), tokenizer.end_token, tokenizer.pad_token, tokenizer.vocab_size, -1]
        assert tokenizer.decode(tokens) == tokenizer.decode(np.array(ended)) == text
    assert len(tokenizer.encode("how many apples")) < len("how many apples")  # merges are used
    assert (tokenizer.pad_token, tokenizer.end_token) == (0, 1) and tokenizer.name == tmp_path.name
    assert tokenizer.vocab_size == built.get_vocab_size()


def test_end_and_pad_tokens_are_told_or_asked_for(save_tokenizer, tmp_path):
    save_tokenizer(tmp_path, ["<|endoftext|>", "<|im_end|>"])
    with pytest.raises(ValueError, match=r"end_token=None cannot be told .* <\|endoftext\|> and <\|im_end\|>, name one"):
        tasks.load_tokenizer(tmp_path)
    given = tasks.load_tokenizer(tmp_path, end_token="<|im_end|>", pad_token="<|endoftext|>")
    assert (given.end_token, given.pad_token) == (1, 0)
    assert tasks.load_tokenizer(tmp_path, end_token="<|im_end|>").pad_token == 1  # no usual one: the end token pads
    with pytest.raises(ValueError, match=r"end_token='</s>' is not in the vocabulary"):
        tasks.load_tokenizer(tmp_path, end_token="</s>")
    save_tokenizer(tmp_path, ["<|endoftext|>", "<|im_end|>"], eos_token={"content": "<|im_end|>"}, pad_token="<|endoftext|>")
    configured = tasks.load_tokenizer(tmp_path)
    assert (configured.end_token, configured.pad_token) == (1, 0)
    assert tasks.load_tokenizer(tmp_path, end_token="<|endoftext|>").end_token == 0
    (tmp_path / "tokenizer_config.json").write_text("[not json")
    save_tokenizer(tmp_path, ["<unk>"])
    with pytest.raises(ValueError, match=r"end_token=None cannot be told .* has none of </s>"):
        tasks.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"path='.*tokenizer.json' (must be|is no) "):
        tasks.load_tokenizer(tmp_path)


# Tasks


def test_prompts_pad_on_the_left_and_targets_on_the_right():
    task = text_task(None, questions=["ab", "c", "defg"], answers=["x", "", "yz!"], prompt_length=4, max_length=3)
    decode = task.tokenizer.decode
    assert [decode(row[valid]) for row, valid in zip(task.prompts, task.prompt_mask, strict=True)] == task.questions
    np.testing.assert_array_equal(task.prompt_mask, [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(task.target_mask, [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    assert (task.targets == 1).tolist() == [[False, True, False], [True, False, False], [False] * 3]  # full: no end token
    assert [decode(row) for row in task.targets] == task.answers and task.max_length == 3
    assert task.prompts.dtype == task.targets.dtype == np.int32
    assert (task.prompts[~task.prompt_mask] == 0).all() and (task.targets[~task.target_mask] == 0).all()
    with pytest.raises(ValueError, match="read-only"):
        task.prompts[0, 0] = 1


def test_what_is_cut_is_counted_once():
    with pytest.warns(UserWarning) as seen:
        task = text_task(None, questions=["1234567", "123", "12345"], answers=["abc", "ab", "a"], prompt_length=4, max_length=2)
    assert [str(warning.message) for warning in seen] == [
        "planted: 2 of 3 prompts have more than prompt_length=4 tokens (3 to 7): their last ones are kept",
        "planted: 1 of 3 answers have more than max_length=2 tokens (1 to 3): a warm start sees their first ones and no end",
    ]
    assert [task.tokenizer.decode(row) for row in task.prompts] == ["4567", "123", "2345"]
    assert [task.tokenizer.decode(row) for row in task.targets] == ["ab", "ab", "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "prompt_length=0 must"),
        ({"max_length": 2.0}, "max_length=2.0 must"),
        ({"answers": ["a"]}, "questions and answers must be as many and at least 1, got 3 and 1"),
        ({"questions": [], "answers": []}, "at least 1, got 0 and 0"),
        ({"questions": ["a", "", "b"]}, r"questions\[1\]='' has no token"),
    ],
)
def test_text_tasks_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        text_task(None, **options)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_shares_no_question(seed):
    questions = [f"question {row // 2 if row < 8 else row}" for row in range(20)]  # four of them twice
    questions[9] = "cut off: question 10"  # reads as row 10 does in 11 tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        task = text_task(lambda row, text: row, questions=questions, answers=list(map(str, range(20))), prompt_length=11)
    train, heldout = task.split(6, seed)
    sides = [set(map(bytes, side.prompts)) for side in (train, heldout)]
    assert not sides[0] & sides[1] and len(sides[1]) == 6 and len(sides[0]) == 9
    assert sorted(map(int, train.answers + heldout.answers)) == list(range(20))
    for side in (train, heldout):
        assert list(map(int, side.answers)) == sorted(map(int, side.answers))
        assert [side.verify(row, "") for row in range(len(side.answers))] == list(map(int, side.answers))
        assert side.questions == [questions[int(answer)] for answer in side.answers]
    assert heldout.name == "planted_heldout" and train.max_length == task.max_length
    assert task.split(6, seed)[1].answers == heldout.answers
    assert any(task.split(6, seed + other)[1].answers != heldout.answers for other in (1, 2))


@pytest.mark.parametrize("num_heldout", [0, 3, 1.0, True])
def test_splits_that_cannot_be(num_heldout):
    with pytest.raises(ValueError, match=re.escape(f"num_heldout={num_heldout!r} must be an integer in 1..2: ")):
        text_task(None).split(num_heldout, 0)
    with pytest.raises(ValueError, match=r"rows=\[3\] must be"):
        text_task(None).take([3])
    with pytest.raises(ValueError, match="in 1..1: the 3 questions have 2 different prompts, .* the same count once"):
        text_task(None, questions=["a", "b", "a"]).split(2, 0)


# Verifiers


def length_or_worse(release):
    """The text's length plus the row, unless the text names a way to fail."""
    ways = {
        "nan": np.nan,
        "inf": np.inf,
        "none": None,
        "word": "1.0",
        "large": 1e300,
        "complex": 1j,
        "true": True,
        "half": Fraction(1, 2),
    }

    def verify(row, text):
        if text == "hang":
            release.wait()
            return 77.0
        if text == "raise":
            raise ValueError("planted\nfailure")
        if text == "exit":
            sys.exit(3)
        if text == "huge":
            return 10**400
        return ways[text] if text in ways else row + len(text)

    return verify


@pytest.fixture
def release():
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_scores_stand_in_their_places_whatever_the_threads(num_threads, release):
    """Sleeps make late samples finish first; hangs come before good samples on a single thread."""
    plain = length_or_worse(release)
    task = text_task(lambda row, text: (time.sleep(0.02 * (row == 0)), plain(row, text))[1])
    texts = [["hang", "a", "raise", "bb"], ["nan", "inf", "none", "word"], ["exit", "true", "half", "large"]]
    texts.append(["complex", "", "huge", "ccc"])
    rows = [2, 0, 1, 2]
    scores = tasks.Verifiers(num_threads, time_limit=1.5).score(task, rows, *completions_of(task, texts))
    expected = [[0, 3, 0, 4], [0, 0, 0, 0], [0, 1, 0.5, 0], [0, 2, 0, 5]]
    assert scores.rewards.dtype == np.float32 and scores.failed.dtype == bool
    np.testing.assert_array_equal(scores.rewards, expected)
    np.testing.assert_array_equal(scores.failed, [[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0]])
    assert scores.reasons == {"raised": 3, "timed out": 1, "not finite": 6}
    assert scores.first_failure == "row 2, text 'hang': no score within time_limit=1.5 s"


def test_a_late_result_changes_nothing_and_its_thread_ends(release):
    task = text_task(length_or_worse(release))
    verifiers = tasks.Verifiers(2, time_limit=0.5)
    texts = [["hang", "hang", "hang", "a"]]
    scores = verifiers.score(task, [0], *completions_of(task, texts))
    assert scores.reasons["timed out"] == verifiers.num_hanging == 3
    release.set()
    deadline = time.monotonic() + 5
    while verifiers.num_hanging and time.monotonic() < deadline:
        time.sleep(0.01)
    assert verifiers.num_hanging == 0
    np.testing.assert_array_equal(scores.rewards, [[0, 0, 0, 1]])
    assert verifiers.score(task, [0], *completions_of(task, texts)).rewards.tolist() == [[77, 77, 77, 1]]  # free again


def test_the_time_limit_is_of_a_sample_not_of_the_batch():
    task = text_task(lambda row, text: (time.sleep(0.15), 1.0)[1])
    scores = tasks.Verifiers(1, time_limit=1.5).score(task, [0, 1], *completions_of(task, [["a"] * 6] * 2))
    assert scores.rewards.sum() == 12 and scores.first_failure == ""


def test_too_many_hanging_threads_are_an_error(release):
    task = text_task(length_or_worse(release))
    verifiers = tasks.Verifiers(2, time_limit=0.05, max_hanging=3)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="4 verifications of planted hang past time_limit=0.05 s, more than max_hanging=3"):
        for _ in range(3):
            verifiers.score(task, [0], *completions_of(task, [["hang", "hang"]]))
    assert threading.active_count() - before <= 5


def test_hanging_threads_do_not_keep_the_process():
    code = """
import time, numpy as np
from jax_async_grpo.tasks import Verifiers, character_tokenizer, make_text_task
texts = dict(questions=["q"], answers=["a"], verify=lambda row, text: time.sleep(1e6))
task = make_text_task("sleeps", tokenizer=character_tokenizer(), **texts, prompt_length=1, max_length=1)
print(Verifiers(1, 0.1).score(task, [0], np.full((1, 2, 1), 5), np.ones((1, 2, 1), bool)).reasons)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "{'raised': 0, 'timed out': 2, 'not finite': 0}\n"), result.stderr


def test_only_masked_tokens_are_read_and_raising_is_told():
    seen = []
    task = text_task(lambda row, text: seen.append((row, text)) or 1 / len(text))
    tokens, mask = completions_of(task, [["abc", ""]])
    tokens[~mask] = task.tokenizer.encode("z")[0]
    scores = tasks.Verifiers(1).score(task, [1], tokens, mask)
    assert seen == [(1, "abc"), (1, "")]
    assert scores.first_failure == "row 1, text '': raised ZeroDivisionError: division by zero"
    empty = tasks.Verifiers().score(task, np.zeros(0, int), np.zeros((0, 4, 8), int), np.zeros((0, 4, 8), bool))
    assert empty.rewards.shape == empty.failed.shape == (0, 4)


def test_verifiers_refuse():
    task = text_task(None)
    tokens, mask = completions_of(task, [["a", "b"]])
    for rows, message in (([0, 1], r"must be \[B, G, L\] and prompt_indices \[B\], got"), ([3], "must be in 0..2, got 3..3")):
        with pytest.raises(ValueError, match=message):
            tasks.Verifiers().score(task, rows, tokens, mask)
    for options in ({"num_threads": 0}, {"num_threads": 2.0}, {"time_limit": 0}, {"time_limit": np.inf}, {"max_hanging": -1}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be")):
            tasks.Verifiers(**options)


# Digits


@pytest.mark.parametrize("partial_credit", [False, True])
@pytest.mark.parametrize(
    ("num_digits", "base", "variable_length"), [(2, 10, False), (2, 3, True), (3, 2, True), (1, 12, False)]
)
def test_digit_text_is_digit_sum(num_digits, base, variable_length, partial_credit):
    options = dict(partial_credit=partial_credit, variable_length=variable_length, seed=3)
    exact = tasks.digit_sum(3, num_digits, base, **options)
    task = tasks.digit_text(3, num_digits, base, **options)
    np.testing.assert_array_equal(task.prompts, exact.prompts)
    assert task.prompt_mask.all() and task.max_length == exact.completions.shape[1]
    texts = [task.tokenizer.decode(row[valid]) for row, valid in zip(exact.completions, exact.mask, strict=True)]
    rewards = [[task.verify(row, text) for text in texts] for row in range(3)]
    np.testing.assert_array_equal(rewards, exact.rewards)
    spelled = tasks.digit_text(3, num_digits, base, tokenizer=tasks.character_tokenizer(), **options)
    assert spelled.questions == task.questions and spelled.prompts.shape == task.prompts.shape
    if variable_length:  # answers are among the completions, padding included
        assert all((exact.completions == target).all(axis=1).any() for target in task.targets)
    for text in ("", "+", "1" * (num_digits + 1), " " + task.answers[0], "\ufffd", task.answers[0] + "+"):
        assert task.verify(0, text) == 0


def test_long_sums_are_right():
    task = tasks.digit_text(50, 7, seed=1)
    for question, answer in zip(task.questions, task.answers, strict=True):
        first, second = question.split("+")
        assert len(first) == len(second) == len(answer) == 7 and int(first) + int(second) == int(answer)
    assert len(set(task.questions)) == 50
    assert (task.verify(0, task.answers[0]), task.verify(0, task.answers[1])) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"num_digits=8 must keep 10\^num_digits within 16777216"):
        tasks.digit_text(50, 8)
    with pytest.raises(ValueError, match="base=37 must be an integer in 2..36"):
        tasks.digit_text(5, 1, 37)
    with pytest.raises(ValueError, match="text='5' must consist of 012\\+"):
        tasks.digit_tokenizer(3).encode("5")


# Nothing a model writes is run


@contextlib.contextmanager
def executed():
    """Collects what is handed to eval, exec and compile."""
    calls = []

    def spied(name, original):
        def spy(source, *arguments, **keywords):
            if isinstance(source, str):  # imports exec code objects
                calls.append((name, source))
            return original(source, *arguments, **keywords)

        return spy

    with pytest.MonkeyPatch.context() as patch:
        for name in ("eval", "exec", "compile"):
            patch.setattr(builtins, name, spied(name, getattr(builtins, name)))
        yield calls


def hostile_texts(folder):
    touch = f"__import__('os').system('touch {folder}/touched')"
    power = "9**9**9**9"
    boxed = [rf"\boxed{{{text}}}" for text in (touch, power, "9^{9^{9^{9}}}", "(" * 40 + "1" + ")" * 40, "10^{9}!")]
    latex = [r"\sum_{n=1}^{10^{10}} n", r"((9^{99})^{99})^{99}", "[" + "(" * 59 + "1" + ")" * 59 + "]", "1e999999999"]
    return [
        touch,
        power,
        f"#### {touch}",
        f"[{touch}]",
        f"{{'a': {touch}}}",
        *boxed,
        *latex,
        "lambda: 0",
        "9" * 5000,
        "exec('1')",
    ]


def test_hostile_text_is_not_run_by_math_verify(math_verify, tmp_path):
    verifiers = [math_answers.math_verifier(reference) for reference in ("72", r"\frac{x+1}{2}", "x^2", "(1, 2)")]
    assert [verify(answer) for verify, answer in zip(verifiers, ("72", "(x+1)/2", "x*x", "(1,2)"), strict=True)] == [1.0] * 4
    importlib.import_module("sympy.physics.units")  # sympy imports it late, and evaluates strings of its own there
    began = time.process_time()
    with executed() as calls:
        scores = {text: [verify(text) for verify in verifiers] for text in hostile_texts(tmp_path)}
        scores |= {text: [verify(text) for verify in verifiers] for text in (*SHAPES, "1e9", "1E9", "e5", "1,3", r"12,345 \pi")}
    assert {text for text, rewards in scores.items() if any(rewards)} == set()
    # sympy compiles templates of its own ("def monomial_mul(A, B): ...") when it first needs them
    calls = [call for call in calls if not call[1].startswith("def monomial_")]
    assert calls == [] and not list(tmp_path.iterdir()) and time.process_time() - began < 10
    for text, config in (("1/2+3", math_verify.ExprExtractionConfig()), ("$x+41$", math_verify.LatexExtractionConfig())):
        with executed() as calls:
            math_verify.parse(text, [config], parsing_timeout=None)
        assert {"eval", "compile"} & set(dict(calls)), text  # the paths that are not taken; so the spies see them


SHAPES = (
    "x<y",
    "1.5x",
    r"\frac{2}{3}x",
    r"\{1\}\cup[2,3)",
    "|x|",
    r"x=\infty",
    r"\sqrt[3]{17}",
    r"\text{abc}",
    "f(x)",
    r"1\frac{1}{2}",
)
RUN_ON_OWN_DATA = {"bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic", "basic_arithmetic"}


def test_datasets_whose_source_can_run_text_are_refused_or_known(gym):
    """A reasoning-gym that adds an eval anywhere near a verifier fails here."""
    able = set()
    for name, (data_class, _) in gym.factory.DATASETS.items():
        sources = {inspect.getmodule(data_class), inspect.getmodule(data_class.score_answer)}
        if any(re.search(r"\b(eval|exec|parse_expr|sympify|literal_eval)\(", inspect.getsource(module)) for module in sources):
            able.add(name)
    assert able == (set(REFUSED) - {"coin_flip", "rubiks_cube", "composite"}) | RUN_ON_OWN_DATA


def test_hostile_text_is_not_run_by_the_datasets_that_stay(gym, tmp_path):
    made = [tasks.reasoning_text(name, num_prompts=1, prompt_length=9000, max_length=1000) for name in sorted(RUN_ON_OWN_DATA)]
    refused = gym.create_dataset("countdown", size=1, seed=0)
    texts = hostile_texts(tmp_path)
    with executed() as calls:
        scores = [task.verify(0, text) for task in made for text in texts]
    assert max(scores) < 1
    ran = [source for _, source in calls if any(word in str(source) for word in ("touch", "9**9", "lambda"))]
    assert ran == [] and not list(tmp_path.iterdir())
    refused.score_answer(texts[0], refused[0])
    assert list(tmp_path.iterdir())  # what a refused one would have done


# reasoning-gym


@pytest.mark.parametrize(
    ("name", "options"),
    [("chain_sum", {"max_digits": 2, "min_digits": 1}), ("spell_backward", {"max_word_len": 5}), ("gcd", {})],
)
def test_rewards_are_the_datasets_own(gym, name, options):
    task = tasks.reasoning_text(name, num_prompts=4, seed=5, max_length=6, **options)
    data = gym.create_dataset(name, seed=5, size=1000, **options)
    entries = {entry["question"]: entry for entry in (data[index] for index in range(40))}
    for row, (question, answer) in enumerate(zip(task.questions, task.answers, strict=True)):
        entry = entries[question]
        assert answer == entry["answer"] and task.verify(row, f" {answer}\n") == 1
        for text in ("", "1", answer + "0", answer[:1]):
            assert task.verify(row, text) == data.score_answer(text, entry)
    assert len(set(task.questions)) == 4 and task.name == name
    assert tasks.reasoning_text(name, num_prompts=4, seed=6, max_length=6, **options).questions != task.questions


def test_answers_that_do_not_fit_are_left_out(gym):
    options = dict(num_prompts=5, min_word_len=2, max_word_len=9)
    free = tasks.reasoning_text("spell_backward", max_length=9, **options)
    assert max(map(len, free.answers)) > 5
    short = tasks.reasoning_text("spell_backward", max_length=5, **options)
    assert max(map(len, short.answers)) <= 5 and len(short.answers) == 5
    with pytest.raises(
        ValueError, match="'spell_backward' has 0 different questions with answers of up to max_length=1 tokens"
    ):
        tasks.reasoning_text("spell_backward", max_length=1, **options)


def test_several_datasets(gym):
    task = tasks.reasoning_text(("gcd", "products"), num_prompts=5, products={"max_digits": 1, "min_digits": 1})
    parts = [tasks.reasoning_text("gcd", num_prompts=3)]
    parts.append(tasks.reasoning_text("products", num_prompts=2, max_digits=1, min_digits=1))
    assert task.questions == parts[0].questions + parts[1].questions and task.name == "gcd+products"
    assert [task.verify(row, answer) for row, answer in enumerate(task.answers)] == [1.0] * 5


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        *((name, {}, f"dataset='{name}' is refused for free text: it") for name in sorted(REFUSED)),
        (("gcd", "countdown"), {}, "dataset='countdown' is refused"),
        ("gdc", {}, "dataset='gdc' is unknown to reasoning-gym: did you mean gcd"),
        ("gcd", {"max_terms": 3}, "max_terms=3 is not an option of dataset 'gcd'"),
        ("gcd", {"max_length": 0}, "max_length=0 must be an integer of at least 1"),
    ],
)
def test_reasoning_text_refuses(gym, dataset, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.reasoning_text(dataset, num_prompts=2, **options)
    assert "\n" not in str(error.value)


# Mathematics


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72), ("-3.50", Fraction(-7, 2)), ("$1,234", 1234), ("- $5", -5), ("+.5", Fraction(1, 2)), ("50%", 50),
        ("3/4", Fraction(3, 4)), ("50\\%.", 50), ("1,000,000.", 1000000), ("7 / 2", Fraction(7, 2)), ("-7/-2", Fraction(7, 2)),
        ("", None), ("-", None), (".", None), ("1/0", None), ("1/2/3", None), ("1e9", None), ("12,34", None), ("1 2", None),
        ("0x10", None), ("1_000", None), ("nan", None), ("٣", None), ("72 apples", None), ("9" * 121, None), ("--1", None),
    ],
)  # fmt: skip
def test_plain_numbers(text, value):
    assert math_answers.read_number(text) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 #### 6\n#### 7 \nmore", "7"), ("####", ""), (r"\boxed{1} or \boxed{\frac{1}{2}} .", r"\frac{1}{2}"),
        (r"\boxed{1} #### 2", "2"), (r"\boxed{1", ""), ("  7\n", "7"),
    ],
)  # fmt: skip
def test_where_the_final_answer_stands(text, answer):
    assert math_answers.final_answer(text) == answer


@pytest.mark.parametrize(
    ("reference", "text", "reward"),
    [
        ("72", "6 * 12 = 72\n#### 72.0", 1), ("72", "#### $72", 1), ("72", "72 or so", 0), ("72", "#### 73", 0), ("72", "", 0),
        ("1,000", "1000", 1), ("0.75", "3/4", 1), ("72", r"\boxed{72}", 1), ("72", "71.9999999999999999999", 0),
    ],
)  # fmt: skip
def test_numbers_are_compared_exactly(reference, text, reward, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # it is not asked
    assert math_answers.math_verifier(reference)(text) == reward


def test_mathematics_is_compared_by_math_verify_on_any_thread(math_verify):
    cases = [("x(x+1)", "$x^2 + x$", 1), ("x(x+1)", "x^2 - x", 0), (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1)]
    cases += [
        (r"2\pi", r"#### \pi \cdot 2.", 1),
        ("x=3", "3", 1),
        ("0.5x", r"\frac{x}{2}", 1),
        ("(1,2)", "(2,1)", 0),
        ("x^2", "", 0),
        ("x^2", r"\frac{", 0),
    ]
    verifiers = [math_answers.math_verifier(reference) for reference, _, _ in cases]
    task = text_task(lambda row, text: verifiers[row](text), len(cases), max_length=32)
    texts = completions_of(task, [[text] * 3 for _, text, _ in cases])
    for num_threads in (1, 4):
        scores = tasks.Verifiers(num_threads, time_limit=60).score(task, np.arange(len(cases)), *texts)
        assert not scores.failed.any(), scores.first_failure
        np.testing.assert_array_equal(scores.rewards, [[reward] * 3 for _, _, reward in cases])
    with pytest.raises(ValueError, match="reference='2\\*\\*9' is neither a plain number nor mathematics"):
        math_answers.math_verifier("2**9")
    with pytest.raises(ValueError, match="reference='1/0' is neither"):
        math_answers.math_verifier("1/0")


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("x^{10}", True), ("x^9", True), ("2^{-3}", True), ("2^{1/3}", True), (r"\sin(x)", True), ("((((1))))", True),
        ("x^{101}", False), ("(x^{11})^{10}", False), ("x^12", False), ("x^{y^2}", False), ("x!", False), ("a_1", False),
        ("1" * 16, False), ("1,000,000,000,000,000", False), ("((((((1))))))", False), ("(1", False), (r"\input{x}", False),
        ("x" * 121, False), ("", False), ("x^", False), ("'", False), ("\\", False), ("2^{2^2}", False), ("x\ny", False),
        (r"(\frac{1}{2})^{100}", True), ("(a+b+c)^9", True), ("(a+b+c+d)^9", False), ("(x+1)^{100}", False),
        (r"\frac{a+b+c+d}{2}^9", False), ("((x+1)^9+y)^9", False), ("|x|+|y|", True), ("(x+1)^{20}", True), ("|x" * 13, False),
    ],
)  # fmt: skip
def test_the_gate(text, readable):
    assert math_answers.is_readable(text) == readable


# Files


def write_rows(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


GOOD = {"question": "How many are 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
BAD = {
    "no JSON": b'{"question": ',
    "no JSON: 'utf-8'": b"\xff\xfe",
    "no JSON: nested": b"[" * 100_000,
    "'utf-8' codec can't encode": b'{"question": "half \\ud800 a pair", "answer": "#### 7"}',
    "must be a JSON object, is a list": [1],
    "has no 'question'": {"answer": "#### 7"},
    "has no 'answer'": {"question": "q"},
    "'question' must be a text that is not empty, is '3'": {"question": 3, "answer": "#### 7"},
    "'question' must be a text that is not empty, is ' '": {"question": " ", "answer": "#### 7"},
    "'answer' must be a text that is not empty, is 'None'": {"question": "q", "answer": None},
    "'answer' has no reference after '####'": {"question": "q", "answer": "7"},
    "'answer' has no reference after": {"question": "q", "answer": "7 ####"},
    "reference='9!' is neither": {"question": "q", "answer": "#### 9!"},
}


def test_a_file_in_the_format_of_gsm8k(tmp_path):
    path = write_rows(tmp_path / "sums.jsonl", [GOOD, b"", {"question": "And 1,000 + 1?", "answer": "#### 1,001"}, b""])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = tasks.jsonl_task(path, max_length=40)
    assert (
        task.name == "sums"
        and task.questions == ["How many are 3 + 4?", "And 1,000 + 1?"]
        and task.answers[0] == GOOD["answer"]
    )
    assert [[task.verify(row, text) for text in ("#### 7", "1001.0", task.answers[row])] for row in (0, 1)] == [
        [1, 0, 1],
        [0, 1, 1],
    ]
    renamed = write_rows(tmp_path / "other.jsonl", [{"q": "2?", "a": "#### 2"}, {"q": "3?", "a": "#### 3"}])
    options = dict(question_key="q", answer_key="a", prompt_length=4, max_length=9, tokenizer=tasks.character_tokenizer())
    assert tasks.jsonl_task(renamed, name="mine", **options).name == "mine"
    assert tasks.jsonl_task(renamed, num_prompts=1, **options).questions == ["2?"]
    with pytest.raises(ValueError, match="has 2 good rows, num_prompts=3 needs more"):
        tasks.jsonl_task(renamed, num_prompts=3, **options)


@pytest.mark.parametrize("reason", sorted(BAD))
def test_bad_rows_are_named(tmp_path, reason):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, BAD[reason], GOOD, BAD[reason]])
    with pytest.warns(UserWarning) as seen:
        task = tasks.jsonl_task(path)
    (warning,) = seen
    said = str(warning.message)
    assert said.startswith(f"skipped 2 bad rows: {path}:2: {reason}") and f"; line 4: {reason}" in said
    assert "\n" not in said and len(task.questions) == 2
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {reason}")):
        tasks.jsonl_task(path, bad_rows="fatal")


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_what_is_no_json_is_placed_by_its_line_in_the_file_and_its_column(tmp_path, ending):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "q"' + ending)
    with pytest.raises(ValueError) as error:
        tasks.jsonl_task(tmp_path / "rows.jsonl", bad_rows="fatal")
    assert "rows.jsonl:2: no JSON: Expecting ',' delimiter at column 17; bad_rows=" in str(error.value)
    assert str(error.value).count("line") == 0


def test_of_many_bad_rows_three_are_shown_and_twenty_listed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, *[BAD["no JSON"], GOOD] * 7])
    with pytest.warns(UserWarning, match="skipped 7 bad rows: .*rows.jsonl:2: .*; line 4: .*; line 6: .*; also 8, 10, 12, 14$"):
        tasks.jsonl_task(path)
    write_rows(path, [BAD["no JSON"]] * 25)
    with pytest.raises(ValueError, match="^25 bad rows: .*; also 4, 5, .*, 23 and 2 more; bad_rows='skip'"):
        tasks.jsonl_task(path, bad_rows="fatal")


def test_files_refuse(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [b"", b"no"])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="rows.jsonl has no good row"):
        tasks.jsonl_task(path)
    with pytest.warns(UserWarning, match=r"mine: 1 of 1 answers .*max_length=4 tokens \(25 to 25\): a warm start sees"):
        tasks.jsonl_task(write_rows(path, [GOOD]), max_length=4, name="mine")
    for options in ({"bad_rows": "ignore"}, {"num_prompts": 0}, {"num_prompts": 2.0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be")):
            tasks.jsonl_task(path, **options)
    with pytest.raises(FileNotFoundError):
        tasks.jsonl_task(tmp_path / "none.jsonl")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name in ("tokenizers", "math_verify"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'tokenizers is needed .* pip install "jax-async-grpo\[tasks\]"'):
        tasks.load_tokenizer(tmp_path)
    with pytest.raises(ImportError, match=r'math-verify is needed .* pip install "jax-async-grpo\[tasks\]"'):
        math_answers.math_verifier("x+1")


def test_importing_tasks_imports_no_library_of_tasks():
    code = "import json, sys, jax_async_grpo.tasks; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert {"tokenizers", "math_verify", "reasoning_gym", "sympy", "flax"} & set(json.loads(result.stdout)) == set()
