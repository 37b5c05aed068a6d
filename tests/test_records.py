"""Records are strict JSON, whole after any crash, and a workdir never mixes two runs."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_async_grpo import records


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Plain values and strict JSON.


def test_numpy_and_jax_values_become_plain_numbers(tmp_path):
    obj = {
        "scalars": (np.float32(0.5), np.int64(3), np.bool_(True), jnp.float32(0.25), jnp.bfloat16(1.5), jnp.int32(-2)),
        "arrays": {8: np.arange(4).reshape(2, 2), "jax": jnp.ones(2), "text": np.array(["a"])},
        "path": Path("a") / "b",
        "function": records.write_json,
        "none": None,
        "word": "η ≤ 1",
    }
    records.write_json(tmp_path / "x.json", obj)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "scalars": [0.5, 3, True, 0.25, 1.5, -2],
        "arrays": {"8": [[0, 1], [2, 3]], "jax": [1.0, 1.0], "text": ["a"]},
        "path": "a/b",
        "function": "jax_async_grpo.records.write_json",
        "none": None,
        "word": "η ≤ 1",
    }
    assert type(records.to_plain(np.float64(1.5))) is float and type(records.to_plain(np.int32(1))) is int


def test_floats_survive_bit_for_bit(tmp_path):
    values = [0.1, 1e-300, 2**-1074, 1 / 3, -0.0]
    records.append_jsonl(tmp_path / "m.jsonl", [{"x": value} for value in values])
    assert [math.copysign(row["x"], row["x"]) for row in records.read_jsonl(tmp_path / "m.jsonl")] == values


def test_non_finite_floats_are_strings_on_disk_and_floats_again(tmp_path):
    row = {"limit": math.inf, "low": np.float32(-np.inf), "nested": [{"loss": jnp.nan}], "array": np.array([1.0, np.nan])}
    records.append_jsonl(tmp_path / "m.jsonl", [row])
    records.write_json(tmp_path / "s.json", row)

    def refuse(token):
        raise AssertionError(f"{token} is not strict JSON")

    for name in ("m.jsonl", "s.json"):
        plain = json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        assert plain == {"limit": "Infinity", "low": "-Infinity", "nested": [{"loss": "NaN"}], "array": [1.0, "NaN"]}
    for read in (records.read_jsonl(tmp_path / "m.jsonl")[0], records.read_json(tmp_path / "s.json")):
        assert read["limit"] == math.inf and read["low"] == -math.inf
        assert math.isnan(read["nested"][0]["loss"]) and math.isnan(read["array"][1])


@pytest.mark.parametrize(
    "value, place",
    [
        ({"fits": [1, {"policy": object()}]}, r"record\.fits\[1\]\.policy is <object"),
        ({"key": jax.random.key(0)}, r"record\.key is"),
        ({"z": 1j}, r"record\.z is 1j \(complex\)"),
        ({"f": lambda x: x}, r"record\.f is"),
        ({"f": functools.partial(min, 1)}, r"record\.f is"),
        ({"a": {(1, 2): 3}}, r"record\.a has the key \(1, 2\) of type tuple"),
        ({"z": np.complex128(1j)}, r"record\.z is"),
        ({"o": np.array([{}])}, r"record\.o is"),
        ({"s": {1, 2}}, r"record\.s is .* \(set\)"),
    ],
)
def test_what_is_not_a_record_is_refused_with_its_place(value, place, tmp_path):
    with pytest.raises(ValueError, match=place) as error:
        records.write_json(tmp_path / "x.json", value)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


# Crashes.


@pytest.mark.parametrize("crash", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file_whole(crash, tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    records.write_json(path, {"old": 1})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, crash, fail)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(path, {"new": 2})
    assert records.read_json(path) == {"old": 1}
    assert names(tmp_path) == ["summary.json"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "bias.png"
    records.write_text(path, "old")
    with records.atomic_path(path) as temporary:
        assert temporary.parent == tmp_path  # a rename is atomic only within one file system
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["bias.png"]
    with pytest.raises(RuntimeError), records.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new" and names(tmp_path) == ["bias.png"]


def test_a_failed_append_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    records.append_jsonl(path, [{"step": 0}])
    before, write = path.read_bytes(), os.write

    def half(descriptor, data):
        if half.called:
            raise OSError(28, "No space left on device")
        half.called = True
        return write(descriptor, data[: len(data) // 2])

    half.called = False
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        records.append_jsonl(path, [{"step": 1}, {"step": 2}])
    assert path.read_bytes() == before


def test_short_writes_are_completed_and_an_interrupt_after_the_last_byte_keeps_the_rows(tmp_path, monkeypatch):
    path, write = tmp_path / "metrics.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.append_jsonl(path, [{"step": 1}, {"step": 2}])
    assert records.read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("torn", ['{"x": "' + 150_000 * "y", '{"step": 9, "loss": 0.', "{", '{"word": "η'])
def test_a_torn_last_line_costs_only_itself(rows, torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": step, "padding": "x" * 40_000} for step in range(rows)]  # longer than one block read from the end
    records.append_jsonl(path, whole)
    with open(path, "ab") as file:
        file.write(torn.encode()[:-1] if "η" in torn else torn.encode())  # cut inside a character too
    with pytest.warns(UserWarning, match="the last line is cut off .* skipped"):
        assert records.read_jsonl(path) == whole
    with pytest.warns(UserWarning, match="the last line is cut off .* removed"):
        records.append_jsonl(path, [{"step": rows}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records.read_jsonl(path) == [*whole, {"step": rows}]


def test_a_whole_row_without_its_line_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(records.read_jsonl(path)) == 2
        records.append_jsonl(path, [{"step": 2}])
        assert [row["step"] for row in records.read_jsonl(path)] == [0, 1, 2]


def test_append_is_all_or_nothing_and_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.read_jsonl(path) == []
    records.append_jsonl(path, [])
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"rows\[1\]\.x is"):
        records.append_jsonl(path, [{"x": 1}, {"x": object()}])
    with pytest.raises(ValueError, match=r"rows\[0\] is a int; a row is a dict"):
        records.append_jsonl(path, [3])
    assert names(tmp_path) == []
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        records.read_jsonl(path)


# Workdirs.

CONFIG = {"seed": 0, "optimizer": {"learning_rate": 0.1, "name": "sgd"}, "staleness": (1, 2), "limit": math.inf, "empty": {}}


def test_the_same_config_resumes_and_keeps_the_metrics(tmp_path):
    path = tmp_path / "a" / "run"
    workdir = records.open_workdir(path, CONFIG)
    assert (workdir.path, workdir.resumed) == (path, False)
    assert records.read_json(path / "config.json") == {**CONFIG, "staleness": [1, 2]}
    assert workdir.read_metrics() == []
    workdir.append_metrics([{"kind": "a", "step": 0}])
    workdir.write_summary({"fits": []})
    again = records.open_workdir(str(path), CONFIG)
    assert again.resumed
    again.append_metrics([{"kind": "a", "step": 1}])
    assert again.read_metrics() == [{"kind": "a", "step": 0}, {"kind": "a", "step": 1}]
    assert names(path) == ["config.json", "metrics.jsonl", "summary.json"]


def test_another_config_is_refused_naming_keys_and_values(tmp_path):
    records.open_workdir(tmp_path, CONFIG).append_metrics([{"step": 0}])
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    other = {**CONFIG, "optimizer": {"learning_rate": 0.2, "name": "sgd", "clip": "x" * 500}, "limit": math.nan}
    del other["seed"]
    with pytest.raises(ValueError) as error:
        records.open_workdir(tmp_path, other)
    message = str(error.value)
    assert "optimizer.learning_rate is 0.1 there and 0.2 here" in message
    assert 'optimizer.clip is absent there and "xxx' in message
    assert 'limit is "Infinity" there and "NaN" here' in message
    assert "(and 1 more)" in message and "--overwrite" in message and "another --workdir" in message
    assert "\n" not in message and len(message) < 500
    with pytest.raises(ValueError, match="seed is 0 there and absent here"):
        records.open_workdir(tmp_path, {key: value for key, value in CONFIG.items() if key != "seed"})
    with pytest.raises(ValueError, match="empty is {} there and absent here"):
        records.open_workdir(tmp_path, {key: value for key, value in CONFIG.items() if key != "empty"})
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}


def test_a_run_of_another_job_is_named_by_its_job(tmp_path):
    training = {"num_prompts": 8, "staleness": {}, "denominator": "recorded", "seed": 0}
    bias = {"clip_level": 0.01, "cases": {}, "seed": 0}
    records.open_workdir(tmp_path, bias)
    with pytest.raises(ValueError, match=r"holds a run of launch\.measure_bias; give another --workdir$"):
        records.open_workdir(tmp_path, training)
    with pytest.raises(ValueError, match="holds another config: seed is 0 there and 1 here"):
        records.open_workdir(tmp_path, bias | {"seed": 1})
    assert not records.open_workdir(tmp_path, training, overwrite=True).resumed


def test_overwrite_removes_the_files_of_the_job_and_no_others(tmp_path):
    workdir = records.open_workdir(tmp_path, CONFIG)
    workdir.append_metrics([{"step": 0}])
    workdir.write_summary({})
    for name in ("bias.png", "holiday.png", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoints").mkdir()
    fresh = records.open_workdir(tmp_path, {"seed": 1}, overwrite=True, figures=("bias.png", "drift.png"))
    assert not fresh.resumed and fresh.read_metrics() == []
    assert names(tmp_path) == ["checkpoints", "config.json", "holiday.png", "notes.txt"]
    assert records.read_json(tmp_path / "config.json") == {"seed": 1}
    fresh.append_metrics([{"step": 5}])
    assert not records.open_workdir(tmp_path, {"seed": 1}, overwrite=True).resumed  # afresh with the same config too
    assert names(tmp_path) == ["checkpoints", "config.json", "holiday.png", "notes.txt"]


def test_a_folder_with_foreign_files_can_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert not records.open_workdir(tmp_path, CONFIG).resumed
    assert names(tmp_path) == ["config.json", "notes.txt"]


def test_unreadable_runs_are_refused_and_can_be_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a metrics.jsonl without config.json; pass --overwrite"):
        records.open_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="holds a config.json that is not JSON; pass --overwrite"):
        records.open_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds another config"):
        records.open_workdir(tmp_path, CONFIG)
    assert records.open_workdir(tmp_path, CONFIG, overwrite=True).read_metrics() == []


def test_paths_that_cannot_be_a_workdir_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "file" / "run", "cannot be created or written: Not a dir"),
    ]
    records.open_workdir(tmp_path / "run", CONFIG)
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            records.open_workdir(path, CONFIG)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def deny(self, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", deny)  # the user running the tests may be root, whom chmod does not stop
    for config, overwrite in [(CONFIG, False), ({"seed": 1}, True)]:  # resuming must notice too
        with pytest.raises(ValueError, match="cannot be created or written: Permission denied; give another --workdir"):
            records.open_workdir(tmp_path / "run", config, overwrite=overwrite)


def test_config_with_an_object_is_refused_before_anything_is_created(tmp_path):
    with pytest.raises(ValueError, match=r"config\.optimizer is"):
        records.open_workdir(tmp_path / "run", {"optimizer": object()})
    assert names(tmp_path) == []


def test_versions():
    versions = records.versions()
    assert set(versions) == {
        *("python", "jax", "jaxlib", "optax", "flax", "chex", "numpy", "jax_async_grpo"),
        *("platform", "device_kind", "num_devices"),
    }
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert versions["platform"] == jax.default_backend() and versions["num_devices"] == jax.device_count()
    assert all(value is not None for value in versions.values())
    json.dumps(records.to_plain(versions), allow_nan=False)


# Cutting back to a checkpoint.


def test_rows_behind_the_first_refused_one_go_and_those_before_are_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.append_jsonl(path, [{"step": step, "x": math.nan if step == 1 else 0.1} for step in (0, 1, 2, 1)])
    lines = path.read_bytes().splitlines(keepends=True)
    seen = []

    def keep(row):
        seen.append(row["x"])
        return row["step"] < 2

    assert records.truncate_jsonl(path, keep) == 2  # the last row would be kept, but stands behind one that is not
    assert path.read_bytes() == b"".join(lines[:2])
    assert math.isnan(seen[1]) and len(seen) == 3
    assert records.truncate_jsonl(path, keep) == 0
    records.append_jsonl(path, [{"step": 2, "x": 0.1}])
    assert path.read_bytes() == b"".join(lines[:3])
    assert records.truncate_jsonl(path, lambda row: False) == 3
    assert path.read_bytes() == b""
    assert records.truncate_jsonl(tmp_path / "none.jsonl", keep) == 0 and not (tmp_path / "none.jsonl").exists()


def test_a_torn_tail_goes_aloud_and_a_tail_without_line_end_is_a_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"ste')
    with pytest.warns(UserWarning, match=r"metrics.jsonl: the last line is cut off \(5 bytes\) and was removed"):
        assert records.truncate_jsonl(path, lambda row: row["step"] < 1) == 1
    assert path.read_bytes() == b'{"step": 0}\n'
    path.write_bytes(b'{"step": 0}\n{"step": 1}')
    assert records.truncate_jsonl(path, lambda row: True) == 0
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}'
    assert records.truncate_jsonl(path, lambda row: row["step"] < 1) == 1
    assert path.read_bytes() == b'{"step": 0}\n'


def test_damage_before_the_cut_is_an_error_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is not JSON"):
        records.truncate_jsonl(path, lambda row: row["step"] < 1)
    assert path.read_bytes() == b'{"step": 0}\nrubbish\n{"step": 1}\n'
    assert records.truncate_jsonl(path, lambda row: False) == 3  # behind the cut it does not matter


def test_a_workdir_cuts_its_own_rows(tmp_path):
    workdir = records.open_workdir(tmp_path, {"a": 1})
    workdir.append_metrics([{"kind": "train", "step": step} for step in range(4)])
    assert workdir.truncate_rows("metrics.jsonl", lambda row: row["step"] <= 1) == 2
    assert [row["step"] for row in workdir.read_metrics()] == [0, 1]


def test_rows_that_were_put_away_come_first_and_new_ones_behind(tmp_path):
    """Compressing loses nothing, twice gives the same bytes, and a run can go on behind it."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "cell", "value": 0.1 * k, "odd": math.inf if k == 3 else None} for k in range(50)]
    records.append_jsonl(path, rows[:30])
    packed = records.compress_jsonl(path)
    first = packed.read_bytes()
    assert not path.exists() and packed.name == "metrics.jsonl.gz" and records.read_jsonl(path) == rows[:30]
    assert records.compress_jsonl(path).read_bytes() == first
    records.append_jsonl(path, rows[30:])
    assert records.read_jsonl(path) == rows
    records.compress_jsonl(path)
    assert not path.exists() and records.read_jsonl(path) == rows
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="metrics.jsonl.gz is no whole gzip file"):
        records.read_jsonl(path)
