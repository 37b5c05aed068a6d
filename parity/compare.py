"""Our losses against TRL's and tunix's own code on the same arrays: value and gradient, one line a case.

    make parity                              # or, in .venv-parity:
    python -m parity.compare [--write]       # --write: keep what they returned in tests/golden

Exits with 1 where a difference exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from parity import golden, trl_losses, tunix_losses
from parity.cases import CASES, ROWS_CUT, TOLERANCE, loss_and_gradient
from parity.inputs import GROUP_SIZE, seeded_inputs

SYSTEMS = {"trl": trl_losses, "tunix": tunix_losses}


def main() -> int:
    """Prints the table; 0 if every case agrees."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write what the other systems returned to tests/golden")
    write = parser.parse_args().write
    arrays = seeded_inputs()
    failures = 0
    for system, module in SYSTEMS.items():
        print(f"\n{module.ORIGIN} ({', '.join(f'{name} {version}' for name, version in module.VERSIONS.items())})")
        print(f"{'case':30} {'loss':>13} {'difference':>11} {'max |grad|':>11} {'difference':>11}")
        results = {}
        for case in CASES[system]:
            loss, gradient = module.loss_and_gradient(arrays, ROWS_CUT if case.cut else (), GROUP_SIZE, case.options)
            our_loss, our_gradient = loss_and_gradient(case, arrays)
            largest = np.abs(gradient).max()
            differences = abs(our_loss - loss), np.abs(our_gradient - gradient).max()
            agrees = differences[0] <= TOLERANCE[system] and differences[1] <= TOLERANCE[system] * largest
            failures += not agrees
            numbers = f"{loss:13.9f} {differences[0]:11.1e} {largest:11.4f} {differences[1]:11.1e}"
            print(f"{case.name:30} {numbers}  {'PASS' if agrees else 'FAIL'}")
            results[case.name] = dict(options=case.options, loss=loss, gradient=gradient)
        if write:
            print(f"wrote {golden.save(system, module.ORIGIN, module.VERSIONS, arrays, results)}")
    print(f"\n{failures} of {sum(map(len, CASES.values()))} cases differ")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
