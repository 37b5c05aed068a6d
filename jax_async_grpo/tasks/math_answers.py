"""Final answers in free text: where they stand, exact numbers, and mathematics compared by math-verify behind a gate.

math-verify's plain-text path ends in `sympy.parse_expr`, which evals; only its LaTeX path, a grammar of its own, is used. That
path still computes what it reads: a tower of powers, or brackets in brackets, keep a machine busy for hours, inside single calls
that no time limit can end. The gate lets through what ordinary final answers need and bounds its cost.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

__all__ = ["final_answer", "is_readable", "math_verifier", "read_number"]

_INSTALL = 'math-verify is needed for answers that are not plain numbers: pip install "jax-async-grpo[tasks]"'
_MAX_CHARACTERS = 120
_MAX_DEPTH = 5  # math-verify's parser takes some six times longer every second level
_MAX_DIGITS = 15
_MAX_POWER = 100  # product of all exponents, so that powers of powers stay small as well

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_CHARACTERS = re.compile(r"[A-Za-z0-9 +\-*/=<>()\[\]{}^.,|\\]*")
_COMMANDS = frozenset(
    "frac dfrac tfrac sqrt pi cdot times div pm left right infty cup cap le leq ge geq lt gt ne neq".split()
) | frozenset("sin cos tan cot sec csc ln log text mathrm quad , ; { }".split())
_COMMAND = re.compile(r"\\([A-Za-z]+|.?)")
_EXPONENT = re.compile(r"\^ *(?:(\d)(?!\d)|[A-Za-z]|\{ *-? *(?:(\d{1,3})(?: */ *\d{1,3})?|[A-Za-z]) *\})")


def final_answer(text: str) -> str:
    r"""The part of a completion that is compared: the line after the last "####", else the last \boxed{...}, else all of it.

    Example:
      >>> final_answer("3 + 4 = 7\n#### 7"), final_answer(r"so \boxed{\frac{1}{2}}."), final_answer(" 7 ")
      ('7', '\\frac{1}{2}', '7')
    """
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().partition("\n")[0].strip()
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text.strip()
    depth = 0
    for end in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : end].strip()
    return ""


def read_number(text: str) -> Fraction | None:
    """The exact value of a plain number, None where the text is none.

    A sign, digits with or without commas between thousands, decimals, a fraction a/b of two such; a leading "$" and a closing
    "." or "%" are dropped. No exponents, and at most 120 characters: the value's size is that of the text.

    Example:
      >>> read_number("$1,234.50"), read_number("3/4"), read_number("1e9")
      (Fraction(2469, 2), Fraction(3, 4), None)
    """
    text = text.strip()
    if len(text) > _MAX_CHARACTERS or not text.isascii():
        return None
    text = re.sub(r"^([+-]?) *\$ *", r"\1", text).removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) and part[-1:].isdigit() for part in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def is_readable(text: str) -> bool:
    r"""Whether the gate lets an answer through to math-verify.

    At most 120 characters and 5 brackets deep; letters, digits, the operators + - * / = < > ^, brackets and a list of LaTeX
    commands; numbers of at most 15 digits; exponents that are a letter or a number, their product at most 100. Neither "**" nor
    factorials, sums, integrals or subscripts.

    Example:
      >>> is_readable(r"\frac{x^2}{3}"), is_readable("9^9^9^9"), is_readable("__import__('os')")
      (True, False, False)
    """
    if not 0 < len(text) <= _MAX_CHARACTERS or not _CHARACTERS.fullmatch(text) or "**" in text:
        return False
    if any(command not in _COMMANDS for command in _COMMAND.findall(text)):
        return False
    if any(len(digits) > _MAX_DIGITS for digits in re.findall(r"\d+", text.replace(",", ""))):
        return False
    exponents = list(_EXPONENT.finditer(text))
    if len(exponents) != text.count("^"):
        return False
    if math.prod(max(1, int(match[1] or match[2] or 1)) for match in exponents) > _MAX_POWER:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return depth == 0 and deepest <= _MAX_DEPTH


def math_verifier(reference: str) -> Callable[[str], float]:
    r"""A function that scores completions against one reference answer: 1 or 0.

    A reference that is a plain number asks for a plain number of exactly that value, `read_number`: 72, 72.0, $72 and 144/2 are
    one answer. Any other is compared by math-verify: x(x+1) and x^2+x are one answer. What the gate `is_readable` stops, or
    math-verify cannot read, scores 0.

    Args:
      reference: LaTeX or a plain number, as it stands after "####".

    Returns:
      text -> reward of the text's `final_answer`; it may run on any thread.

    Raises:
      ImportError: math-verify is needed and not installed.
      ValueError: a reference that is no plain number and cannot be compared safely.
    """
    number = read_number(reference)
    if number is not None:
        return lambda text: float(read_number(final_answer(text)) == number)
    latex = _strip(reference)
    parsed = _parse(latex) if is_readable(latex) else []
    if not parsed:
        raise ValueError(f"reference={reference[:80]!r} is neither a plain number nor mathematics that can be compared safely")

    def verify(text: str) -> float:
        answer = _strip(final_answer(text))
        return float(is_readable(answer) and _math_verify().verify(parsed, _parse(answer), timeout_seconds=None))

    return verify


def _strip(text: str) -> str:
    return text.strip().removesuffix(".").strip("$").strip()


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error
    # It warns of the time limits that are switched off here, and reports what it cannot read.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _parse(latex: str) -> list[Any]:
    library = _math_verify()
    config = [library.LatexExtractionConfig(boxed_match_priority=-1)]
    # Its own time limits are signals, which exist in the main thread alone: `verification.Verifiers` has the limit.
    return library.parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None)
