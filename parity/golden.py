"""What other systems returned, as small JSON files beside the tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

__all__ = ["load", "save"]

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
_DIGITS = {"trl": 10, "tunix": 9}  # significant; the one computes in float64, the other in float32


def save(system: str, origin: str, versions: dict, arrays: dict[str, np.ndarray], results: dict[str, dict]) -> Path:
    """Writes a system's inputs and results; `results` maps a case to its `options`, `loss` and `gradient`."""
    digits = _DIGITS[system]

    def rounded(values):
        return [rounded(x) for x in values] if isinstance(values, list) else float(f"{values:.{digits}g}")

    head = {"origin": origin, "versions": versions, "made_with": "python -m parity.compare --write"}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines += [_block("inputs", {name: array.tolist() for name, array in arrays.items()})]
    cases = {
        name: {"options": case["options"], "loss": rounded(case["loss"]), "gradient": rounded(case["gradient"].tolist())}
        for name, case in results.items()
    }
    lines += [_block("cases", cases)]
    path = FOLDER / f"{system}.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def load(system: str) -> dict:
    """The file of a system; arrays of `inputs` and `gradient` are NumPy."""
    content = json.loads((FOLDER / f"{system}.json").read_text())
    content["inputs"] = {name: np.array(array) for name, array in content["inputs"].items()}
    for case in content["cases"].values():
        case["gradient"] = np.array(case["gradient"])
    return content


def _block(name, entries):
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    return f" {json.dumps(name)}: {{\n{body}\n }}"
