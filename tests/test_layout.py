"""The shape of the source: which module may import which, what each one exports, what an import costs, what is documented.

Sources are parsed, never imported, so that a mistake shows here by its name and not as an ImportError somewhere else. The
checks return lists of complaints; the tests at the end feed each of them a small package with exactly one mistake.
"""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jax_async_grpo"
NAME = PACKAGE.name

# Lowest floor first. A module imports from its own floor or from those below; `policies` and `tasks` stand for all they hold.
# Names of modules that are planned and not written yet may stand here.
FLOORS = {
    "mathematics": {
        "types",
        "masked",
        "aggregation",
        "advantages",
        "losses",
        "corrections",
        "staleness",
        "scaling",
        "delay_stability",
        "gram_statistics",
        "option_checks",
        "control",
        "planner",
    },
    "measurement": {
        "policies",
        "tasks",
        "sampling",
        "head",
        "closed_form",
        "compositions",
        "moments",
        "separability",
        "surrogate",
        "exact",
        "bias",
        "estimation",
        "metrics",
        "invariants",
    },
    "jobs": {
        "training",
        "audit",
        "audit_points",
        "audit_summary",
        "compiling",
        "config_checks",
        "update",
        "experiment",
        "warm_start",
        "workdir_lock",
        "plan_evidence",
        "plan_log",
        "plan_report",
        "plan_run",
        "plan_training",
        "sweep_run",
        "sweep_summary",
        "sweeps",
        "diagnostics",
        "bias_run",
        "bias_summary",
        "checkpoint",
        "checkpoint_files",
        "html_report",
        "records",
        "report",
        "run_pages",
        "studies",
        "sweep_figure",
    },
}
GROUND = {"types", "masked"}  # what everything else stands on: these import nothing of the package but each other
CLONE_ONLY = {
    "benchmarks",
    "configs",
    "examples",
    "launch",
    "parity",
    "tests",
}  # used from the clone; the package never imports them


def read_package(root: Path) -> dict[str, ast.Module]:
    """Parsed modules by dotted name relative to the package; the package itself is "", a sub-package its own name."""
    trees = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return trees


def floor_of(module: str) -> int | None:
    """Index of the module's floor, None where the table does not have it."""
    top = module.partition(".")[0]
    return next((i for i, names in enumerate(FLOORS.values()) if top in names), None)


def imported_names(tree: ast.Module, package: str) -> set[str]:
    """Absolute dotted names a module imports, at any depth; `package` is where its relative imports start."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For every module the modules of the package it imports ("" excepted); names inside a module count as the module."""
    graph = {}
    for module, tree in trees.items():
        is_package = module == "" or any(other.startswith(module + ".") for other in trees)
        package = f"{NAME}.{module}".rstrip(".") if is_package else f"{NAME}.{module}".rpartition(".")[0]
        graph[module] = set()
        for name in imported_names(tree, package):
            inner = name.removeprefix(NAME + ".") if name.startswith(NAME + ".") else ""
            while inner and inner not in trees:
                inner = inner.rpartition(".")[0]
            graph[module] |= {inner} - {""}
    return graph


def import_complaints(trees: dict[str, ast.Module]) -> list[str]:
    """What breaks the floors: a module without one, an import that goes up, anything below the ground, a cycle."""
    graph = import_graph(trees)
    floors = list(FLOORS)
    complaints = []
    for module in sorted(set(trees) - {""}):
        floor = floor_of(module)
        if floor is None:
            complaints.append(f"{NAME}.{module} is on no floor: add it to FLOORS in tests/test_layout.py and to docs/design.md")
            continue
        for target in sorted(graph[module]):
            if (floor_of(target) or 0) > floor:
                complaints.append(
                    f"{NAME}.{module} ({floors[floor]}) imports {target}, a floor up ({floors[floor_of(target)]})"
                )
            if module in GROUND and target not in GROUND:
                complaints.append(f"{NAME}.{module} is the ground and imports {target}")
    for module, tree in trees.items():
        outside = {name.partition(".")[0] for name in imported_names(tree, "")} & CLONE_ONLY
        complaints += [f"{NAME}.{module} imports {name}, which is not installed with it" for name in sorted(outside)]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        complaints.append("import cycle: " + " -> ".join(reversed(error.args[1])))
    return complaints


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements of a module, those under a top-level `if` or `try` included."""
    statements, queue = [], list(tree.body)
    while queue:
        node = queue.pop(0)
        statements.append(node)
        if isinstance(node, ast.If | ast.Try):
            queue += node.body + node.orelse
            queue += [s for h in getattr(node, "handlers", []) for s in h.body]
    return statements


def bound_names(tree: ast.Module) -> set[str]:
    """Names a module defines or imports at its top level."""
    names = set()
    for node in top_level(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return names


def public_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes at the top level whose names have no leading underscore."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node for node in top_level(tree) if isinstance(node, kinds) and not node.name.startswith("_")]


def export_complaints(trees: dict[str, ast.Module]) -> list[str]:
    """Where `__all__` and what a module defines part. The package itself exports nothing and is left out."""
    complaints = []
    for module, tree in trees.items():
        if not module:
            continue
        lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
        if len(lists) != 1:
            complaints.append(f"{NAME}.{module} has {len(lists)} assignments to __all__, it must have one")
            continue
        exported = ast.literal_eval(lists[0])
        defined = {node.name for node in public_definitions(tree)}
        complaints += [
            f"{NAME}.{module}.__all__ has {name}, never defined" for name in exported if name not in bound_names(tree)
        ]
        complaints += [f"{NAME}.{module}.__all__ lacks {name}" for name in sorted(defined - set(exported))]
        complaints += [
            f"{NAME}.{module}.__all__ has {name} twice" for name in sorted({n for n in exported if exported.count(n) > 1})
        ]
        complaints += [f"{NAME}.{module}.__all__ has {name}, a private name" for name in exported if name.startswith("_")]
    return complaints


def docstring_complaints(trees: dict[str, ast.Module]) -> list[str]:
    """Modules, public functions and classes, and public methods without a docstring."""

    def missing(node: ast.AST, name: str) -> list[str]:
        found = [] if ast.get_docstring(node) else [name]
        if isinstance(node, ast.ClassDef):
            for member in public_definitions(node):
                found += missing(member, f"{name}.{member.name}")
        return found

    complaints = []
    for module, tree in trees.items():
        name = f"{NAME}.{module}".rstrip(".")
        complaints += missing(tree, name)
        for node in public_definitions(tree):
            complaints += missing(node, f"{name}.{node.name}")
    return [f"{name} has no docstring" for name in complaints]


def launch_complaints(folder: Path) -> list[str]:
    """Launch scripts that are not thin (or so thin that the job hides elsewhere); what they share is no script."""
    shared = {"__init__.py", "command_line.py"}
    lengths = {path.name: len(path.read_text().splitlines()) for path in sorted(folder.glob("*.py")) if path.name not in shared}
    return [f"launch/{name} has {n} lines, it must have 20 to 80" for name, n in lengths.items() if not 20 <= n <= 80]


def modules_after(statement: str) -> set[str]:
    """The modules a fresh Python has loaded after the statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return read_package(PACKAGE)


def test_imports_go_down_the_floors(trees):
    assert "losses" in trees  # the sources were found
    assert import_complaints(trees) == []


def test_all_lists_what_a_module_defines(trees):
    assert export_complaints(trees) == []


def test_public_things_have_docstrings(trees):
    assert docstring_complaints(trees) == []


def test_design_document_shows_every_module_on_its_floor():
    text = (ROOT / "docs" / "design.md").read_text()
    starts = [text.index(f"\n {floor} ") for floor in FLOORS]
    for floor, start, end in zip(FLOORS, starts, [*starts[1:], text.index("\nconfigs/")], strict=True):
        missing = {name for name in FLOORS[floor] if not re.search(rf"\b{name}\b", text[start:end])}
        assert not missing, f"docs/design.md does not show {sorted(missing)} under {floor}"


def test_the_guide_runs():
    text = (ROOT / "docs" / "how_to_add.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```") // 2
    exec(compile("\n".join(blocks), "docs/how_to_add.md", "exec"), {"__name__": "how_to_add"})


def test_importing_the_package_imports_nothing():
    loaded = modules_after(f"import {NAME}")
    assert NAME in loaded
    assert {"jax", "numpy", "chex"} & loaded == set()
    assert {name for name in loaded if name.startswith(NAME + ".")} == set()


def test_importing_losses_brings_jax_alone():
    loaded = modules_after(f"import {NAME}.losses")
    assert "jax" in loaded
    assert {"flax", "matplotlib", "ml_collections", "optax", "orbax", "tqdm"} & loaded == set()


def test_no_file_is_called_utils():
    folders = [PACKAGE, *(ROOT / name for name in CLONE_ONLY)]
    assert [str(path) for folder in folders for path in folder.rglob("utils.py")] == []


def test_launch_scripts_are_thin():
    assert launch_complaints(ROOT / "launch") == []


def write_package(root: Path, files: dict[str, str]) -> dict[str, ast.Module]:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_package(root)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"losses.py": "from jax_async_grpo.masked import x", "masked.py": "import jax"}, None),
        (
            {"policies/__init__.py": "from .tabular import t", "policies/tabular.py": "from ..types import P", "types.py": ""},
            None,
        ),
        ({"losses.py": "from jax_async_grpo import exact", "exact.py": ""}, "a floor up"),
        ({"losses.py": "import jax_async_grpo.exact as oracle", "exact.py": ""}, "a floor up"),
        ({"losses.py": "def f():\n  from .exact import g", "exact.py": "def g(): pass"}, "a floor up"),
        ({"tasks/bandit.py": "from ..update import g", "update.py": ""}, "a floor up"),
        ({"types.py": "from .losses import f", "losses.py": ""}, "is the ground"),
        ({"losses.py": "from . import scaling", "scaling.py": "from . import losses"}, "import cycle"),
        (
            {"policies/__init__.py": "from .a import x", "policies/a.py": "from jax_async_grpo.policies import y"},
            "import cycle",
        ),
        ({"update.py": "from configs import measure_bias"}, "not installed"),
        ({"novelty.py": ""}, "add it to FLOORS"),
    ],
)
def test_import_rules_catch(tmp_path, files, complaint):
    complaints = import_complaints(write_package(tmp_path, {"__init__.py": "", **files}))
    assert [complaint in c for c in complaints] == ([] if complaint is None else [True])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            "__all__ = ['F', 'g', 'h', 'K']\nfrom x import h\nF: int = 1\ndef g(): ...\nif 1:\n  class K: ...\ndef _i(): ...",
            None,
        ),
        ("def g(): pass", "0 assignments"),
        ("__all__ = ['g']", "never defined"),
        ("__all__ = ['g']\ndef f():\n  def g(): pass\n  return g\nf.g = 1\n__all__ = ['f', 'g']", "2 assignments"),
        ("__all__ = []\ndef g(): pass", "lacks g"),
        ("__all__ = []\nclass K: pass", "lacks K"),
        ("__all__ = ['g', 'g']\ndef g(): pass", "twice"),
        ("__all__ = ['_g']\ndef _g(): pass", "private"),
    ],
)
def test_export_rules_catch(tmp_path, source, complaint):
    complaints = export_complaints(write_package(tmp_path, {"__init__.py": "", "losses.py": source}))
    assert [complaint in c for c in complaints] == ([] if complaint is None else [True])


def test_docstring_rules_catch(tmp_path):
    source = '"""M."""\ndef f(): ...\nclass K:\n  "K."\n  def m(self): ...\n  def _n(self): ...\ndef _g(): ...\ndef d(): "D."'
    complaints = docstring_complaints(write_package(tmp_path, {"__init__.py": "", "losses.py": source}))
    assert [c.split()[0] for c in complaints] == [NAME, f"{NAME}.losses.f", f"{NAME}.losses.K.m"]


def test_launch_rule_catches(tmp_path):
    for name, lines in {"__init__.py": 0, "short.py": 19, "thin.py": 20, "full.py": 80, "long.py": 81}.items():
        (tmp_path / name).write_text("\n" * lines)
    assert [c.split()[0] for c in launch_complaints(tmp_path)] == ["launch/long.py", "launch/short.py"]
