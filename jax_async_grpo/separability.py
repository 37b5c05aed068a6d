"""Probes that find out whether a user's loss, advantage and aggregation let the exact oracle treat rows one by one.

Each function is run on a few seeded rows together and apart; where the results part, the oracle's closed form would be an
approximation, so `check_separable` refuses with the reason.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["check_coupling", "check_loss_inputs", "check_separable", "named_parameters"]

_NUM_ROWS = 12
_SPREADS = (0.05, 0.3, 1.0)  # of the log-probs of two rows


def check_separable(loss_fn, advantage_fn, aggregation_fn, mask, levels, group_size: int, loss_inputs: tuple[str, ...] = ()):
    """Raises unless the closed form by composition counts is exact for these functions.

    Args:
      loss_fn: per-token loss; a row must not depend on other rows.
      advantage_fn: must treat the members of a group alike and know nothing of other groups.
      aggregation_fn: must weight each row by its own mask alone.
      mask: [..., L]; the rows that occur. A traced mask counts as rows of every length.
      levels: [n] the distinct rewards.
      group_size: G.
      loss_inputs: names of the further arrays `loss_fn` takes.

    Raises:
      ValueError: naming the function and what it couples.
    """
    length = mask.shape[-1]
    if isinstance(mask, jax.core.Tracer):
        rows = np.tril(np.ones((length, length), dtype=bool))
    else:
        rows = np.unique(np.asarray(mask, dtype=bool).reshape(-1, length), axis=0)
    key = (rows.tobytes(), rows.shape)
    # probes run on concrete numbers even while the caller is being traced
    with jax.ensure_compile_time_eval():
        _once(_probe_loss, loss_fn, length, tuple(sorted(loss_inputs)))
        _once(_probe_advantage, advantage_fn, tuple(np.asarray(levels, dtype=float).tolist()), group_size)
        _once(_probe_aggregation, aggregation_fn, *key)


def check_coupling(loss_fn, coupling: str, length: int, loss_inputs: tuple[str, ...] = ()) -> None:
    """Raises where a loss couples more than `coupling` says: "token" nothing, "row" the tokens of a row, "batch" anything.

    Args:
      loss_fn: per-token loss.
      coupling: "token", "row" or "batch".
      length: L of the rows to try, at least 3 are tried.
      loss_inputs: names of the further arrays `loss_fn` takes.

    Raises:
      ValueError: naming the function and the coupling it needs.
    """
    if coupling != "batch":
        with jax.ensure_compile_time_eval():
            _once(_probe_coupling, loss_fn, coupling, max(length, 3), tuple(sorted(loss_inputs)))


def check_loss_inputs(loss_fn, names: tuple[str, ...]) -> None:
    """Raises ValueError where a loss needs more than its four arrays and `names`, or does not take one of the names."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # some built-ins
        return
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.name not in positional[:4] and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in by_name:
        if parameter.default is parameter.empty and parameter.name not in names:
            raise ValueError(
                f"loss_fn {_name(loss_fn)} needs {parameter.name}: give a [B, Y, L] array of that name in loss_inputs, or bind "
                "an option with functools.partial"
            )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in names:
            if name not in [p.name for p in by_name]:
                raise ValueError(f"loss_inputs holds {name}, which loss_fn {_name(loss_fn)} does not take")


def named_parameters(function) -> tuple[str, ...]:
    """The names of a function's parameters, which say what further arrays a loss asks for; () where it has no signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-ins
        return ()


def _once(probe, function, *key):
    """Runs a probe the first time a function meets these circumstances (each time where it cannot be hashed)."""
    try:
        hash(function)
    except TypeError:
        probe(function, *key)
    else:
        _remembered(probe, function, *key)


@functools.lru_cache(maxsize=512)
def _remembered(probe, function, *key):
    probe(function, *key)


def _probe_loss(loss_fn, length: int, loss_inputs: tuple[str, ...]):
    if _couples(loss_fn, length, loss_inputs, _rows):
        raise ValueError(
            f"loss_fn {_name(loss_fn)} couples rows: the loss of a row changes with the rows beside it, so the closed form "
            "is not exact; use brute_force_objective or a loss that treats rows one by one"
        )


def _probe_coupling(loss_fn, coupling: str, length: int, loss_inputs: tuple[str, ...]):
    if coupling == "row" and _couples(loss_fn, length, loss_inputs, _rows):
        raise ValueError(f"loss_fn {_name(loss_fn)} couples rows; pass coupling='batch'")
    if coupling == "token" and _couples(loss_fn, length, loss_inputs, lambda array: _rows(array.reshape(-1, 1))):
        raise ValueError(f"loss_fn {_name(loss_fn)} couples tokens; pass coupling='row', or 'batch' if it couples rows too")


def _rows(array: np.ndarray) -> list[np.ndarray]:
    return [array[i : i + 1] for i in range(len(array))]


def _couples(loss_fn, length: int, loss_inputs: tuple[str, ...], split) -> bool:
    """Whether the loss of seeded rows [N, L] differs from that of the pieces that `split` makes of every array."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < rng.integers(1, length + 1, size=(_NUM_ROWS, 1))
    compiled = jax.jit(loss_fn)  # two shapes; op by op it would be dozens of compilations
    # two rows may stand out: a statistic of the batch couples rows where theirs and that of all lie on two sides of a threshold
    for spread in _SPREADS:
        scale = np.where(np.arange(_NUM_ROWS) < 2, spread, _SPREADS[0])[:, None]
        learner, old, *extra = -1.0 + scale * rng.standard_normal((2 + len(loss_inputs), _NUM_ROWS, length))
        advantages = np.broadcast_to(rng.standard_normal((_NUM_ROWS, 1)), mask.shape)
        arrays = [learner, old, advantages, mask, *extra]

        def run(learner, old, advantages, mask, *extra):
            # one advantage per row, as the oracle has it
            values = compiled(learner, old, advantages[:, 0], mask, **dict(zip(loss_inputs, extra, strict=True)))
            if jnp.shape(values) != learner.shape:
                raise ValueError(f"loss_fn returns shape {jnp.shape(values)}; it must be per token, {learner.shape}")
            return np.asarray(values)

        pieces = zip(*(split(np.asarray(array)) for array in arrays), strict=True)
        apart = np.concatenate([run(*piece).reshape(-1) for piece in pieces])
        if not _close(run(*arrays).reshape(-1), apart):
            return True
    return False


def _probe_advantage(advantage_fn, levels: tuple[float, ...], group_size: int):
    rng = np.random.default_rng(0)
    # the task's own levels decide what the oracle asks for; a spread of others is needed where there is only one
    values = np.array(levels) if len(levels) > 1 else np.array([levels[0], levels[0] + 1.0])
    groups = values[rng.integers(len(values), size=(_NUM_ROWS, group_size))]
    groups[0], groups[1, 0] = values[0], values[-1]
    compiled = jax.jit(advantage_fn)
    together = np.asarray(compiled(groups))
    if together.shape != groups.shape:
        raise ValueError(f"advantage_fn maps rewards of shape {groups.shape} to {together.shape}; the shapes must agree")
    apart = np.concatenate([np.asarray(compiled(group[None])) for group in groups])
    if not _close(together, apart):
        raise ValueError(
            f"advantage_fn {_name(advantage_fn)} couples groups: the advantages of a group change with the groups "
            "beside it (a batch statistic), so the closed form is not exact; normalize within groups"
        )
    order = rng.permutation(group_size)
    for shuffle in (order, np.roll(np.arange(group_size), 1)):
        if not _close(np.asarray(compiled(groups[:, shuffle])), together[:, shuffle]):
            raise ValueError(
                f"advantage_fn {_name(advantage_fn)} does not treat the members of a group alike: permuted rewards do not give "
                "permuted advantages, so counts of rewards do not determine it"
            )


def _probe_aggregation(aggregation_fn, mask_bytes: bytes, shape: tuple[int, int]):
    mask = np.frombuffer(mask_bytes, dtype=bool).reshape(shape)
    # at least two copies of a row, so that a sum over rows does not pass for a mean over one
    mask = np.concatenate([mask, mask])
    values = np.random.default_rng(0).standard_normal(mask.shape)
    compiled = jax.jit(lambda values, mask: aggregation_fn(values, mask).mean())
    together = float(compiled(values, mask))
    apart = [float(compiled(value[None], valid[None])) for value, valid in zip(values, mask, strict=True)]
    if not _close(together, np.mean(apart)):
        raise ValueError(
            f"aggregation_fn {_name(aggregation_fn)} couples rows of these masks: the aggregate of several rows is not "
            "the mean of their own (a token mean over unequal lengths does this); use sequence_mean, sequence_sum "
            "or constant_length"
        )


def _close(a, b) -> bool:
    tolerance = 1e-9 if jnp.result_type(float) == jnp.float64 else 1e-4
    return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _name(function) -> str:
    return getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", repr(function))
