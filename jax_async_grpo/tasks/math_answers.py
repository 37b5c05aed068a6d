"""Final answers in free text: where they stand, exact numbers, and mathematics compared by math-verify behind a gate.

math-verify's own readers eval: its plain-text path hands the text to `sympy.parse_expr`, its LaTeX path the digits of every
number. Here its LaTeX grammar reads, with numbers built from their digits, and its `verify` compares. That still computes what
it reads: a tower of powers, or brackets in brackets, keep a machine busy for hours, partly inside single calls that no time
limit can end. The gate lets through what ordinary final answers need and bounds its cost.
"""

from __future__ import annotations

import functools
import importlib
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
_MAX_TERMS = 64  # of powers of sums, multiplied out: sympy expands them
_MAX_BARS = 12  # math-verify's parser tries every way to pair them

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
    commands; numbers of at most 15 digits; exponents that are a letter or a number, their product at most 100; powers of sums
    that multiply out to at most 64 terms; at most 12 bars |. Neither "**" nor factorials, sums, integrals or subscripts.

    Example:
      >>> is_readable(r"\frac{x^2}{3}"), is_readable("9^9^9^9"), is_readable("__import__('os')")
      (True, False, False)
    """
    if not 0 < len(text) <= _MAX_CHARACTERS or not _CHARACTERS.fullmatch(text) or "**" in text or text.count("|") > _MAX_BARS:
        return False
    if any(command not in _COMMANDS for command in _COMMAND.findall(text)):
        return False
    if any(len(digits) > _MAX_DIGITS for digits in re.findall(r"\d+", text.replace(",", ""))):
        return False
    exponents = list(_EXPONENT.finditer(text))
    if len(exponents) != text.count("^"):
        return False
    powers = [max(1, int(match[1] or match[2] or 1)) for match in exponents]
    if math.prod(powers) > _MAX_POWER:
        return False
    bases = (_bracket_before(text[: match.start()]) for match in exponents)
    if math.prod(_num_terms(base, power) for base, power in zip(bases, powers, strict=True)) > _MAX_TERMS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return depth == 0 and deepest <= _MAX_DEPTH


def _bracket_before(text: str) -> str:
    r"""The bracket that ends a text, "" where none does; of \frac{...}{...} both."""
    start = end = len(text.rstrip())
    while text[start - 1 : start] in ((")", "]", "}") if start == end else ("}",)):
        depth = 0
        for start in range(start - 1, -1, -1):  # noqa: B020
            depth += (text[start] in ")]}") - (text[start] in "([{")
            if depth == 0:
                break
    return text[start:end]


def _num_terms(base: str, power: int) -> int:
    """At most so many terms has the power of a sum, multiplied out; a sign is a term more."""
    signs = base.count("+") + base.count("-") + base.count(r"\pm")
    return math.comb(signs + power, power)


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
    parsed = _parse(latex)
    if parsed is None or not _are_equal(parsed, parsed):  # 1/0 is no answer, not even its own
        raise ValueError(f"reference={reference[:80]!r} is neither a plain number nor mathematics that can be compared safely")

    def verify(text: str) -> float:
        answer = _parse(_strip(final_answer(text)))
        return 0.0 if answer is None else float(_are_equal(parsed, answer))

    return verify


def _are_equal(reference: Any, answer: Any) -> bool:
    return _import("math_verify").verify(reference, answer, timeout_seconds=None)


def _strip(text: str) -> str:
    return text.strip().removesuffix(".").strip("$").strip()


@functools.cache
def _converter() -> type:
    """math-verify's LaTeX grammar with numbers built from their digits: the library's own come from `sympify`, which evals."""
    latex2sympy, sympy = _import("latex2sympy2_extended.latex2sympy2"), _import("sympy")

    class Converter(latex2sympy._Latex2Sympy):
        def parse_number(self, text: str) -> Any:
            text = text.replace(",", "")
            if not re.fullmatch(r"\d+|\d*\.\d+", text):  # no exponents: 1E999999999 is an integer of a gigabyte
                raise ValueError(f"{text} is no plain number")
            return sympy.Rational(text)

    return Converter


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error


def _parse(text: str) -> Any:
    """A sympy object, None where the gate or the grammar says no."""
    number = read_number(text)
    if number is not None:
        return _import("sympy").Rational(number.numerator, number.denominator)
    if not is_readable(text):
        return None
    library, converter = _import("math_verify"), _converter()
    # It warns of the time limits that are switched off here: they are signals, which exist in the main thread alone, and
    # `verification.Verifiers` has a limit of its own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        latex = library.parser.normalize_latex(text, library.LatexExtractionConfig().normalization_config)
        return converter(is_real=not library.grader.should_treat_as_complex(latex)).parse(latex)
    except Exception:  # the grammar and sympy refuse what they cannot read in any way they like
        return None
