"""README and docs say what is there: their Python runs and prints what they claim, and every name in them can be found."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from jax_async_grpo import bias_run, bias_summary, scaling

ROOT = Path(__file__).resolve().parent.parent
NAME = "jax_async_grpo"
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
FLOORS = ("mathematics", "measurement", "jobs")
OTHERS_NAMES = {"jit", "make", "pmap", "shard_map", "vmap"}  # words in code spans that are not ours


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a Markdown text in that language; "" for those without one."""
    return [body for tag, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE) if tag == language]


def modules() -> set[str]:
    """Modules and packages directly in the package."""
    inside = (ROOT / NAME).iterdir()
    return {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}


def module_map(text: str) -> dict[str, list[str]]:
    """{floor: modules in the order of the lines} of the README's map."""
    (drawing,) = (block for block in blocks(text) if block.startswith(f"{NAME}/\n"))
    floors: dict[str, list[str]] = {}
    for line in drawing.splitlines()[1:]:
        floor, module, said = re.fullmatch(r" (\w*) +(\w+) +(\S.*)", line).groups()
        floors.setdefault(floor or list(floors)[-1], []).append(module)
        assert said
    return floors


def resolves(name: str) -> bool:
    """Whether a dotted name below the package is a module or something public in one."""
    module_name, _, attribute = name.partition(".")
    module = importlib.import_module(f"{NAME}.{module_name}")
    return not attribute or attribute in module.__all__


def dotted_names(text: str) -> set[str]:
    """Names such as `exact.surrogate_gradient` in code spans that begin with a module of the package."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    found = {match for span in spans for match in re.findall(r"(?<![\w./])(?:jax_async_grpo\.)?([a-z_]+\.[A-Za-z_]\w*)", span)}
    files = (".html", ".json", ".jsonl", ".md", ".png", ".py")
    return {name for name in found if name.partition(".")[0] in modules() and not name.endswith(files)}


def links(text: str) -> set[str]:
    """Targets of the links inside the clone, relative to the document's folder."""
    return {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}


def paths(text: str) -> set[str]:
    """Files of the clone that code or prose names, relative to its root; not those that a run writes."""
    folders = "benchmarks|configs|docs|examples|jax_async_grpo|launch|parity|tests"
    outside_links = re.sub(r"\]\([^)\s]+\)", "]", text)
    return set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./]+\.(?:py|md|png)", outside_links))


def test_the_readme_block_runs_and_prints_what_it_says(capsys):
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.strip()
    assert re.fullmatch(r"staleness bias \d\.\d\de-\d\d, \d+\.\d% of the fresh gradient", printed)
    assert f"`{printed}`" in README


def test_the_example_measures_the_law_and_refuses_the_kink(capsys):
    runpy.run_path(str(ROOT / "examples" / "own_loss.py"), run_name="__main__")
    printed = capsys.readouterr().out
    norms = [float(norm) for norm in re.findall(r"^ *\d+ +(\d\.\d+e-\d+)", printed, flags=re.MULTILINE)]
    assert len(norms) == 4 and all(1.9 < later / earlier < 2.1 for earlier, later in zip(norms, norms[1:], strict=False))
    assert "bias ~ S^1.00\n" in printed
    assert re.search(r"^truncated_weight: .* has a kink .* at ratio 1", printed, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "name", [f"docs/{name}.md" for name in ("advantages", "corrections", "estimation", "exactness", "head", "losses")]
)
def test_the_documents_run(name):
    for block in blocks(DOCUMENTS[name], "python"):
        exec(compile(block, name, "exec"), {"__name__": "document"})


def test_the_map_shows_every_module_once_and_no_other():
    shown = [module for names in module_map(README).values() for module in names]
    assert sorted(shown) == sorted(modules())


def test_the_map_agrees_with_the_design():
    design = DOCUMENTS["docs/design.md"]
    starts = [design.index(f"\n {floor} ") for floor in FLOORS]
    assert tuple(module_map(README)) == FLOORS
    for floor, start, end in zip(FLOORS, starts, [*starts[1:], design.index("\nconfigs/")], strict=True):
        strangers = [name for name in module_map(README)[floor] if not re.search(rf"\b{name}\b", design[start:end])]
        assert not strangers, f"docs/design.md does not show {strangers} under {floor}"


# docs/design.md shows rooms that are still to be built
@pytest.mark.parametrize("name", sorted(DOCUMENTS.keys() - {"docs/design.md"}))
def test_names_in_documents_exist(name):
    missing = sorted(dotted for dotted in dotted_names(DOCUMENTS[name]) if not resolves(dotted))
    assert not missing, f"{name} names {missing}"
    named = [(ROOT / name).parent / link for link in links(DOCUMENTS[name])] + [ROOT / path for path in paths(DOCUMENTS[name])]
    lost = sorted(str(path) for path in named if not path.exists())
    assert not lost, f"{name} names {lost}"


def test_words_in_the_readme_are_modules():
    words = set(re.findall(r"`([a-z_]+)`", "".join(re.split(r"^```.*?^```$", README, flags=re.DOTALL | re.MULTILINE))))
    assert "losses" in words
    assert words - modules() - OTHERS_NAMES == set()


def test_flags_in_documents_exist():
    source = (ROOT / "launch" / "command_line.py").read_text()
    defined = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)) | {"verbosity"}
    for name in ("README.md", "docs/audit.md", "docs/measure_bias.md"):
        assert set(re.findall(r"(?<![\w-])--([a-z_]+)", DOCUMENTS[name])) <= defined, name
    table = set(re.findall(r"^\| `--([a-z_]+)", DOCUMENTS["docs/measure_bias.md"], flags=re.MULTILINE))
    assert table - {"config"} == defined - {"config"} and "config" in table


def test_the_guide_to_the_main_job_explains_every_key():
    guide = DOCUMENTS["docs/measure_bias.md"]
    written = bias_summary.summary([], {"cases": {}}, {})
    fields = [field.name for field in dataclasses.fields(scaling.StabilityLimit)]
    unexplained = [key for key in (*written, *fields, *bias_run._MEASURED) if f"`{key}`" not in guide]
    assert not unexplained
    kinds = guide.partition("\n| Kind |")[2].partition("\n\n")[0]
    source = (ROOT / NAME / "bias_run.py").read_text()
    assert sorted(re.findall(r"^\| `(\w+)`", kinds, flags=re.MULTILINE)) == sorted(re.findall(r'"kind": "(\w+)"', source))


def test_commands_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    code = "\n".join(blocks(README) + re.findall(r"`([^`\n]+)`", README))
    targets = set(re.findall(r"^make (\w+)", code, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)]
    scripts = set(re.findall(r"python -m ([\w.]+)", code)) - {"pytest"}
    assert scripts and all((ROOT / f"{script.replace('.', '/')}.py").exists() for script in scripts)
    extras = set(re.findall(r"pip install -e '\.\[(\w+)\]'", code))
    options = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    assert extras and extras <= set(re.findall(r"^(\w+) =", options, flags=re.MULTILINE))


def test_the_checks_can_fail():
    assert not resolves("exact.no_such_thing")
    assert dotted_names("`exact.no_such_thing(x)` and `jax_async_grpo.losses.k3`, not `jax.jit`") == {
        "exact.no_such_thing",
        "losses.k3",
    }
    text = "[x](docs/none.md#there) `configs/none.py` https://a.b/docs/c.md [y](https://a.b)"
    assert (links(text), paths(text)) == ({"docs/none.md"}, {"configs/none.py"})
    assert module_map(f"```\n{NAME}/\n jobs   a   b c\n        d   e\n```\n") == {"jobs": ["a", "d"]}


def calls_of_the_names_table() -> list[str]:
    """The first code span of the right column of docs/losses.md's table of other systems' names."""
    table = DOCUMENTS["docs/losses.md"].split("## What other systems call it")[1].split("\n\nSame name")[0]
    cells = [line.rsplit("|", 2)[1] for line in table.splitlines() if line.startswith("| ")][1:]
    return [re.search(r"`([a-z]+\.[^`]+\))`", cell)[1] for cell in cells]


def test_every_call_that_other_systems_names_stand_for_runs():
    from jax_async_grpo import corrections, losses

    rng = np.random.default_rng(0)
    logprobs, old, behavior, reference = -1 - rng.random((4, 3, 2, 5))
    mask = np.arange(5) < rng.integers(1, 6, (3, 2, 1))
    names = dict(losses=losses, corrections=corrections, logprobs=logprobs, old_logprobs=old, behavior_logprobs=behavior)
    names |= dict(tokens=(logprobs, old, rng.normal(size=(3, 2)), mask), reference_logprobs=reference, mask=mask)
    names |= dict(entropies=rng.random(mask.shape))
    calls = calls_of_the_names_table()
    assert len(calls) > 25
    for call in calls:
        values = np.asarray(eval(call, names))
        assert values.shape == mask.shape and np.isfinite(values).all() and values[mask].any(), call
        assert not values[~mask].any(), call
