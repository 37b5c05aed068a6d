"""`launch.train` as its user meets it: messages before compilation, signals, one process a workdir, failing verifiers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest
from tensorboardX.event_file_writer import EventsWriter

from jax_async_grpo import records, training, workdir_lock
from jax_async_grpo.checkpoint import Checkpoints
from jax_async_grpo.tasks import digit_text
from jax_async_grpo.training import monitor as training_monitor
from launch import command_line
from launch import train as launch_train
from tests.launched import job_of

ROOT = Path(__file__).resolve().parent.parent
CONFIG = f"--config={ROOT / 'tests' / 'tiny_training.py'}"


job = job_of(launch_train.main, "train")


@pytest.fixture(autouse=True, scope="module")
def precision():
    """Training jobs are in float32; the other tests are not."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the job: (folder, what it said)."""
    folder = tmp_path_factory.mktemp("job") / "run"
    code, said, error = job(CONFIG, f"--workdir={folder}")
    assert code == 0, error
    return folder, said


def test_a_run_says_what_it_is_and_writes_what_it_promises(finished):
    folder, said = finished
    for words in ("S*eta      0.06", "T*eta      0.3", "ring       3 versions", "limit      not known", "held-out reward"):
        assert words in said, words
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "train.png",
        "tensorboard",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_updates"] == 10 and summary["heldout_reward"]["best"] >= summary["heldout_reward"]["start"]
    assert summary["skipped_updates"] == 0 and summary["bias"]["measured"] == 2


def test_bias_is_zero_without_lag_and_comes_with_its_detection_limit(finished, tmp_path):
    assert job(CONFIG, f"--workdir={tmp_path / 'run'}", "--config.staleness.max=0", "--config.num_updates=1")[0] == 0
    (first,) = (row for row in records.read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "bias")
    assert first["bias/norm_squared"] == 0 and first["coupled_fraction"] == 1 and not first["detected"]
    later = [row for row in records.read_jsonl(finished[0] / "metrics.jsonl") if row["kind"] == "bias"]
    assert [(row["step"], row["staleness"]) for row in later] == [(2, 2), (6, 2)]  # at full lag
    assert all(row["bias/detection_limit"] > 0 for row in later) and later[0]["method"] == "sampled"
    assert all(row["coupled_fraction"] > 0.5 or row["method"] == "reweighted" for row in later)


def test_the_same_command_again_changes_nothing_and_another_config_is_refused(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    held = {path for path in folder.rglob("*") if path.is_file()}
    opened = ("config.json", "metrics.jsonl", ".lock")  # though what they hold stays
    files = {path: path.stat().st_mtime_ns for path in held if path.name not in opened}
    code, said, _ = job(CONFIG, f"--workdir={folder}")
    assert code == 0 and "\nalready complete: 10 updates, held-out reward" in said and "train.png" not in said
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert held == {path for path in folder.rglob("*") if path.is_file()} and (folder / "metrics.jsonl").read_bytes() == before
    (folder / "train.png").unlink()
    assert "train.png" in job(CONFIG, f"--workdir={folder}")[1] and (folder / "train.png").exists()
    assert (folder / "metrics.jsonl").read_bytes() == before
    code, _, error = job(CONFIG, f"--workdir={folder}", "--config.seed=5")
    assert code == 2 and "holds another config: seed is 0 there and 5 here" in error
    with workdir_lock.workdir_lock(folder):
        code, _, error = job(CONFIG, f"--workdir={folder}")
    assert code == 2 and re.search(f"in use by pid {os.getpid()} on .*; wait for it", error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("staleness.max=10", "staleness.max is 10 and num_updates 10: .* lower staleness.max or raise num_updates"),
        ("staleness.schedule=ring", "staleness.schedule is 'ring'; it must be fixed, periodic or random"),
        ("group_size=1", "group_size is 1; it must be an integer >= 2"),
        ("accumulation_steps=3", "accumulation_steps is 3; it must divide num_prompts = 8"),
        ("mesh.fsdp=3", "needs 3 devices; there are 1: take data=-1"),
        ("bias.num_blocks=16", "bias.num_blocks is 16; it must divide num_prompts = 8"),
        ("replay=rollout", "replay is 'rollout'; it must be one of params, rollouts"),
        ("replay=rollouts", "bias.every is set and replay is 'rollouts'"),
        ("learning_rate=1", "there is no learning_rate|learning_rate is not a key of this job"),
        ("optimizer.learning_rat=1", "learning_rat"),
        ("loss=jax_async_grpo.losses.nope", "loss is 'jax_async_grpo.losses.nope'; it must be an importable"),
        ("loss_options.epsilon=1.0", "config.loss .* refuses its options"),
        ("task_options.base=99", "config.task .* refuses its options: base=99"),
        ("num_heldout=24", "config.num_heldout: num_heldout=24 must be an integer in 1..23"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate is -1.0; it must be a number > 0"),
        ("policy_options.width=0", "config.policy .* refuses its options: width is 0"),
        ("plan=/nowhere", "config.plan=/nowhere holds no plan.json"),
        ("denominator=fresh", "denominator is 'fresh'; it must be one of"),
        ("denominator=learner", "the bias is measured for recorded denominators only; take bias.every=0"),
        ("correction=jax_async_grpo.corrections.token_tis", "it would do nothing; take denominator='learner'"),
        ("sampling.temperature=0.7", "stale and fresh rollouts would differ by more than lag"),
        ("seed=4294967296", "seed is 4294967296; it must be at most 4294967295"),
        ("sampling.temperature=1e-40", "sampling.temperature is 1e-40; it must be a number >= 1e-06"),
        ("sampling.top_p=1e-50", "sampling.top_p is 1e-50; it must be a number in "),
        ("num_heldout=20", "num_prompts is 8; there are 4 questions to train on"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_compiled(tmp_path, change, message):
    code, said, error = job(CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.{change}")
    assert code == 2 and not said and error.count("\n") == 1 and re.search(message, error), error


def test_the_limit_of_a_plan_is_shown_and_its_staleness_checked(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {"max_staleness": 2, "max_learning_rate": 0.045}}))
    code, said, _ = job(CONFIG, "--dry_run", f"--config.plan={tmp_path}")
    assert code == 0 and "limit      eta_80 = 0.045, head-room 1.5x: use at most half" in said
    code, _, error = job(CONFIG, "--dry_run", f"--config.plan={tmp_path}", "--config.staleness.max=3")
    assert code == 2 and "is for S = 2 and staleness.max is 3" in error


def hostile_task(**options):
    """A digit sum whose verifier raises, returns NaN or hangs on some of the texts, and tells nobody."""
    task = digit_text(**options)
    inner = task.verify

    def verify(row: int, text: str) -> float:
        if text.startswith("0"):
            raise KeyError(text)
        if text.startswith("1"):
            return float("nan")
        if row == 3 and text == "22":
            time.sleep(1.0)
        return inner(row, text)

    object.__setattr__(task, "verify", verify)
    return task


def test_verifiers_that_fail_are_counted_and_the_run_goes_on(tmp_path):
    change = [
        "--config.task=tests.test_launch_train.hostile_task",
        "--config.verifier.time_limit=0.2",
        "--config.num_updates=4",
    ]
    code, _, error = job(CONFIG, f"--workdir={tmp_path / 'run'}", *change)
    assert code == 0, error
    failed = json.loads((tmp_path / "run" / "summary.json").read_text())["failed_samples"]
    assert failed["raised"] > 0 and failed["not_finite"] > 0


def hanging_task(**options):
    """A digit sum that is never scored in time."""
    task = digit_text(**options)
    object.__setattr__(task, "verify", lambda row, text: time.sleep(2.0))
    return task


def test_verifiers_that_all_hang_end_the_run_in_one_line(tmp_path):
    change = ["--config.task=tests.test_launch_train.hanging_task", "--config.verifier.time_limit=0.01"]
    code, _, error = job(CONFIG, f"--workdir={tmp_path / 'run'}", *change)
    assert code == 2 and error.startswith("error: 17 verifications") and error.count("\n") == 1


def test_a_warm_start_that_diverges_says_so(tmp_path):
    change = ["--config.warm_start.learning_rate=1e38", "--config.warm_start.num_updates=3"]
    code, _, error = job(CONFIG, f"--workdir={tmp_path / 'run'}", *change)
    assert code == 2 and "not finite after 3 updates: lower config.warm_start.learning_rate" in error


def test_checkpoints_go_on_with_their_own_config_and_records_alone(finished, tmp_path):
    """Lost rows are not passed over, checkpoints whose config is gone are not taken for this one, --overwrite removes them."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for text, message in (
        ("".join(lines[: len(lines) // 2]), "has rows of . of the 10 updates .* put the whole file back"),
        ("", "has rows of 0 of the 10 updates"),
        ("[1]\n" + "".join(lines), "line 1 is no record of a job; delete it, or"),
    ):
        (folder / "metrics.jsonl").write_text(text)
        code, _, error = job(CONFIG, f"--workdir={folder}")
        assert code == 2 and re.search(message, error) and error.count("\n") == 1, error
    for name in ("metrics.jsonl", "config.json"):
        (folder / name).unlink()
    code, _, error = job(CONFIG, f"--workdir={folder}", "--config.seed=5")
    assert code == 2 and "checkpoints is not of this config: pass --overwrite" in error
    (folder / "config.json").unlink()
    code, said, error = job(CONFIG, f"--workdir={folder}", "--config.num_updates=4", "--overwrite")
    assert code == 0 and "update      4 of 4" in said, error


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    """The third save fails; the same command goes on from the second when there is room again."""
    saved, inner = [], Checkpoints.save

    def save(self, step, *arguments, **options):
        saved.append(step)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        return inner(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", save)
    code, _, error = job(CONFIG, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and "No space left on device" in error and "Traceback" not in error
    monkeypatch.undo()
    code, said, _ = job(CONFIG, f"--workdir={tmp_path / 'run'}")
    assert code == 0 and "\ngoing on from update 5 of 10\n" in said and "warm start" not in said
    whole = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in whole if row["kind"] == "update"] == list(range(10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_tensorboard_is_an_error_and_no_standstill(tmp_path, monkeypatch):
    """Its thread dies of the first event; rows that nobody takes must not be waited for."""

    def write_event(*_):
        raise OSError(28, "No space left on device")

    job_of_it = types.SimpleNamespace(config=dict(num_prompts=1, group_size=2, num_updates=9, warm_start={}))
    row = {"kind": "evaluation", "step": 0} | {f"metric/{k}": 1.0 for k in range(30)}
    with (
        training_monitor.Monitor(job_of_it, records.Workdir(tmp_path, False)) as shown,
        pytest.raises(OSError, match="is the disk full"),
    ):
        shown.started_at(0)
        monkeypatch.setattr(EventsWriter, "write_event", write_event)
        for _ in range(100):
            shown.on_row(row | {"heldout_reward": 0.0})
            time.sleep(0.01)


def signals(monkeypatch, kind: str, *numbers: int) -> None:
    """Sends this process the signals when the first record of that kind is made."""
    inner, waiting = training_monitor.Monitor.on_row, list(numbers)

    def on_row(self, row):
        inner(self, row)
        while row["kind"] == kind and waiting:
            os.kill(os.getpid(), waiting.pop(0))

    monkeypatch.setattr(training_monitor.Monitor, "on_row", on_row)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_in_the_warm_start_says_that_nothing_is_saved(tmp_path, monkeypatch, number, code):
    signals(monkeypatch, "warm_start", number)
    stopped = job(CONFIG, f"--workdir={tmp_path / 'run'}")
    assert stopped[0] == code and "saving" not in stopped[2] and "all is saved" not in stopped[2]
    assert "stopped: nothing is saved before the first update; the same command begins again\n" in stopped[2]


def test_a_second_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    signals(monkeypatch, "update", signal.SIGINT, signal.SIGINT)
    code, _, error = job(CONFIG, f"--workdir={tmp_path / 'run'}")
    assert code == 130 and "the same command goes on from there" in error and "Traceback" not in error


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_ctrl_c_while_the_job_is_built_is_never_lost(tmp_path, monkeypatch, when):
    """Also one that a library swallowed, before the run has its own handler."""
    inner = training.build if when == "during" else command_line.config_of_job

    def interrupted(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments, **options)

    monkeypatch.setattr(*((training, "build") if when == "during" else (command_line, "config_of_job")), interrupted)
    code, said, error = job(CONFIG, f"--workdir={tmp_path / 'run'}")
    words = "stopping before the first update" if when == "during" else "Interrupted."
    assert code == 130 and not said and words in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_called_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    code, said, error = job(CONFIG, f"--workdir={tmp_path / 'file'}")
    assert (code, said, error) == (2, "", f"error: --workdir={tmp_path / 'file'} is a file; give a folder\n")


def test_every_key_and_every_metric_is_documented(finished):
    page = (ROOT / "docs" / "training.md").read_text()
    named = set(re.findall(r"`([^`\n]+)`", page))
    config = json.loads((finished[0] / "config.json").read_text())
    keys = {f"config.{key}.{part}" for key, parts in config.items() if isinstance(parts, dict) for part in parts}
    keys -= {key for key in keys if key.split(".")[1].endswith("_options")}
    keys |= {f"config.{key}" for key, value in config.items() if not isinstance(value, dict) or key.endswith("_options")}
    assert len(keys) > 50 and not keys - named
    assert {key for key in named if re.fullmatch(r"config\.[a-z_.]+", key)} - keys == {"config.json"}
    rows = records.read_jsonl(finished[0] / "metrics.jsonl")
    metrics = {name for row in rows for name in row} - {"kind", "step"}
    assert len(metrics) > 40 and not metrics - named and {row["kind"] for row in rows} <= named


def config_file(folder: Path, lines: str) -> str:
    """The flag of a config: that of these tests with changes."""
    start = "from tests import tiny_training\n\n\ndef get_config():\n    config = tiny_training.get_config()\n"
    (folder / "config.py").write_text(f"{start}{lines}    return config\n")
    return f"--config={folder / 'config.py'}"


def documented_tasks() -> list[str]:
    """The config lines of docs/training.md that choose a task."""
    page = (ROOT / "docs" / "training.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def test_the_documented_tasks_can_be_built(tmp_path, monkeypatch):
    """Digit sums, reasoning-gym, a JSONL file, each with its own tokenizer and with one from disk."""
    library = pytest.importorskip("tokenizers")
    pytest.importorskip("reasoning_gym")
    built = library.Tokenizer(library.models.BPE())
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>"], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    built.train_from_iterator(["how many apples are left"], trainer)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    built.save(str(tmp_path / "models" / "mine" / "tokenizer.json"))
    (tmp_path / "data").mkdir()
    lines = [json.dumps(dict(question=f"{k} + 1 apples?", answer=f"so #### {k + 1}")) for k in range(20)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    *chosen, tokenizer = documented_tasks()
    assert len(chosen) == 3
    for task, sizes in zip(chosen, ("digit_text, 504", "chain_sum, 504", "train, 12"), strict=True):
        for extra, vocabulary in (("", None), (tokenizer, built.get_vocab_size())):
            text = "".join(f"    {line}\n" for line in (task + extra).splitlines())
            width = "    config.policy_options.context_length = 512\n"
            code, said, error = job(config_file(tmp_path, text + width), "--dry_run")
            assert code == 0 and f"task       {sizes} questions, 8 held out" in said, error
            if vocabulary:
                number = 512 * (vocabulary + 1) * 8 + 8 + 8 * vocabulary  # of tests.tiny_training's network
                assert f"{number:,} parameters" in said
    code, _, error = job(config_file(tmp_path, "    config.task_options.tokenizer = 'nowhere'\n"), "--dry_run")
    assert code == 2 and "config.task_options.tokenizer: path='nowhere" in error and error.count("\n") == 1


def start(folder: Path) -> subprocess.Popen:
    """The job in a process of its own; what one has compiled the next one takes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    changes = ["--config.num_updates=28", "--config.bias.every=0"]
    command = [sys.executable, "-m", "launch.train", CONFIG, f"--workdir={folder}", *changes]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_updates(folder: Path, process: subprocess.Popen, step: int) -> None:
    """Until a checkpoint of that many updates is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        there = [int(path.name.split("_")[1]) for path in (folder / "checkpoints").glob("step_*")]
        if there and max(there) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of {step} updates: {process.communicate()}")


def test_sigterm_saves_and_kill_nine_loses_nothing(tmp_path):
    """One run killed three times, once by SIGTERM, ends as one that was never stopped, to the byte."""
    for step, number in ((4, signal.SIGKILL), (12, signal.SIGTERM), (20, signal.SIGKILL)):
        process = start(tmp_path / "killed")
        wait_for_updates(tmp_path / "killed", process, step)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == 0 and "all is saved; the same command goes on from there" in error, error
    for name in ("killed", "whole"):  # in processes of their own too: this one compiles otherwise
        process = start(tmp_path / name)
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1] and b'"step": 27' in files[0]


def test_the_smoke_config_is_the_default_with_smaller_numbers():
    from configs import train_arithmetic, train_smoke

    default, smoke = (config.get_config().to_dict() for config in (train_arithmetic, train_smoke))
    training.validate(default)
    training.validate(smoke)
    assert default.keys() == smoke.keys() and default["loss"] == smoke["loss"]
