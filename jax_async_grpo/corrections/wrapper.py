"""A loss with a correction, as one loss with the signature all losses have."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp

__all__ = ["corrected"]

_POSITIONAL = ("logprobs", "old_logprobs", "advantages", "mask")
_BY_NAME = ("behavior_logprobs", "detached_logprobs")


def corrected(loss_fn: Callable, correction_fn: Callable) -> Callable:
    """The per-token loss w·ℓ with w of `correction_fn` and ℓ of `loss_fn`; wrap again for a product of several weights.

    The mask goes to both as it is: dropped tokens keep their place in the denominator of an aggregation and in the means of a
    sequence-level loss. Aggregate with the weights' support as the mask where they should not.

    Args:
      loss_fn: `loss_fn(logprobs, old_logprobs, advantages, mask, ...)` -> [..., L].
      correction_fn: a function whose parameters are among logprobs, old_logprobs, behavior_logprobs, advantages, mask and
        detached_logprobs, each handed over by name, and options with a default: `functools.partial(token_tis, cap=2.0)`.

    Returns:
      `(logprobs, old_logprobs, advantages, mask=None, *, ...) -> [..., L]`. Further parameters are those of `loss_fn`, and
      `behavior_logprobs` or `detached_logprobs` if either function asks for it by name; its signature says so, and `exact` and
      `surrogate` read it there.

    Raises:
      ValueError: a correction with another parameter that has no default; when called, behavior_logprobs missing or weights
        of another shape than the loss.

    Example:
      >>> import functools
      >>> from jax_async_grpo import losses
      >>> from jax_async_grpo.corrections import token_tis
      >>> loss_fn = corrected(losses.ppo_clip, functools.partial(token_tis, cap=2.0))
      >>> learner, old, behavior = jnp.log(jnp.array([[0.5], [0.5], [0.2]]))
      >>> print(loss_fn(learner, old, jnp.float32(1.0), behavior_logprobs=behavior))
      [-2.]
    """
    of_loss = _further_parameters(loss_fn)
    of_correction = inspect.signature(correction_fn).parameters
    for name, parameter in of_correction.items():
        if name not in _POSITIONAL + _BY_NAME and parameter.default is parameter.empty:
            raise ValueError(f"correction_fn {_name(correction_fn)} needs {name}: bind it, functools.partial(..., {name}=...)")

    def weighted_loss(logprobs, old_logprobs, advantages, mask=None, **inputs):
        offered = dict(zip(_POSITIONAL, (logprobs, old_logprobs, advantages, mask), strict=True))
        offered |= {name: inputs[name] for name in _BY_NAME if name in inputs}
        if "behavior_logprobs" in of_correction and offered.get("behavior_logprobs") is None:
            raise ValueError("behavior_logprobs is None; a correction needs the log-probs the tokens were drawn with")
        weights = correction_fn(**{name: array for name, array in offered.items() if name in of_correction})
        own = {name: value for name, value in inputs.items() if name in of_loss or name not in _BY_NAME}
        values = loss_fn(logprobs, old_logprobs, advantages, mask, **own)
        if jnp.shape(weights) != jnp.shape(values):
            shapes = f"{jnp.shape(weights)}; it must be {jnp.shape(values)}, as the loss"
            raise ValueError(f"correction_fn {_name(correction_fn)} returns shape {shapes}")
        return values * weights

    weighted_loss.__name__ = f"{_name(loss_fn)}_with_{_name(correction_fn)}"
    weighted_loss.__signature__ = _signature(of_loss, of_correction)
    return weighted_loss


def _further_parameters(loss_fn):
    """The parameters of a loss beside the four that are handed over by position, by name, as keywords."""
    parameters = list(inspect.signature(loss_fn).parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(_POSITIONAL)]
    others = [p for p in parameters if p not in by_position and p.kind is not p.VAR_POSITIONAL]
    return {p.name: p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in others}


def _signature(of_loss, of_correction):
    parameter = inspect.Parameter
    by_position = [
        parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=None if name == "mask" else parameter.empty)
        for name in _POSITIONAL
    ]
    keywords = dict(of_loss)
    if "behavior_logprobs" in of_correction:
        keywords["behavior_logprobs"] = parameter("behavior_logprobs", parameter.KEYWORD_ONLY)
    if "detached_logprobs" in of_correction:
        keywords.setdefault("detached_logprobs", parameter("detached_logprobs", parameter.KEYWORD_ONLY, default=None))
    # **kwargs come last
    return inspect.Signature(by_position + sorted(keywords.values(), key=lambda p: p.kind))


def _name(function):
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", repr(function))
