"""Study: does the planner predict the largest stable learning rate of tasks it has not seen, and do simpler rules do as well?

Every world of the config is two cases, `<world>_anchor` and `<world>_truth`; the probes are derived from the anchors, at the
largest learning rate of the ladder that is at most half of η_80 at the larger anchor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_async_grpo import planner, sweep_summary
from jax_async_grpo.config_checks import check_integer, check_keys, check_mapping, check_number
from jax_async_grpo.plan_evidence import anchor_of_boundary, probe_of_cell
from jax_async_grpo.records import Workdir
from jax_async_grpo.scaling import CollapseRule
from jax_async_grpo.studies.prediction_delay import delay_pieces, run_delay, validate_delay
from jax_async_grpo.studies.prediction_page import figures, page
from jax_async_grpo.studies.swept import run_sweep, sweep_pieces, validate_sweep

__all__ = ["figures", "page", "pieces", "rivals", "run", "summary", "validate"]

_KEYS = (
    "study",
    "sources",
    "precision",
    "anchor_staleness",
    "probe",
    "largest_tv",
    "seen_before",
    "apart",
    "criteria",
    "sweep",
)
_CRITERIA = ("median", "p90", "worst", "half_is_stable", "coverage", "without_anchors_median")
_MEASURES = {  # of the stale rollouts of a probe; each is made proportional to η by its transform
    "tv": ("off_policy/tv", lambda x: x),
    "sqrt_second_moment": ("off_policy/second_moment", math.sqrt),
    "sqrt_ess": ("off_policy/ess_ratio", lambda x: 1 / math.sqrt(x) - 1),
}

_NUM_BOOTSTRAP = 2000
_FEWEST = 12  # settings below which nothing is said to hold


def pieces(config: Mapping[str, Any]) -> list[str]:
    """The chunks of the sweep, then the delay stability of every (world, loss), where the config asks for it."""
    return sweep_pieces(config) + delay_pieces(config)


def validate(config: Mapping[str, Any]) -> None:
    """ValueError on the first thing in the config that cannot be run."""
    check_keys({name: part for name, part in config.items() if name != "delay"}, _KEYS, "")
    check_keys(config["probe"], ("num_updates", "first_seed", "num_seeds"), "probe")
    check_mapping(config["criteria"], "criteria")
    check_keys(config["criteria"], _CRITERIA, "criteria")
    for name in _CRITERIA:
        check_number(config["criteria"][name], f"criteria.{name}", lambda x: x > 0, "> 0")
    check_integer(config["anchor_staleness"], "anchor_staleness", minimum=1)
    check_number(config["largest_tv"], "largest_tv", lambda x: 0 < x < 1, "between 0 and 1")
    validate_sweep(config)
    for world in _worlds(config):
        anchor, truth = (config["sweep"]["cases"].get(f"{world}_{role}") for role in ("anchor", "truth"))
        if anchor is None or truth is None or tuple(anchor["max_staleness"]) != (0, config["anchor_staleness"]):
            raise ValueError(
                f"config.sweep.cases: the world {world} needs {world}_anchor with max_staleness (0, "
                f"{config['anchor_staleness']}) and {world}_truth"
            )
    validate_delay(config, _worlds(config))


def run(config: Mapping[str, Any], workdir: Workdir, on_piece: Callable[[str, float], None]) -> None:
    """Anchors, truth and ladders of probes, then the probes that anchors ask for where a world has no ladder, then delay."""
    programs: dict = {}
    run_sweep(config, workdir, on_piece, programs)
    cases = dict(config["sweep"]["cases"]) | _probe_cases(config, workdir.read_metrics())
    run_sweep({**config, "sweep": {**config["sweep"], "cases": cases}}, workdir, on_piece, programs)
    run_delay(config, workdir, on_piece)


def summary(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting with its truth, plan and rivals; errors per rule and per loss; what was to hold and what did."""
    del sources
    settings = _settings(rows, config)
    apart = [setting for setting in settings if setting["algorithm"] in config["apart"]]
    judged = [setting for setting in settings if setting["algorithm"] not in config["apart"]]
    scores = {"all": _scores(judged)} | {
        name: _scores([s for s in settings if s["algorithm"] == name]) for name in sorted({s["algorithm"] for s in settings})
    }
    return {
        "settings": settings,
        "scores": scores,
        "delay": {name: _beside_delay(settings, name) for name in scores},
        "differences": {rival: _difference(judged, rival) for rival in ("log_log", "constant", "sqrt_msd")},
        "statuses": _statuses(settings),
        "checks": _checks(judged, scores["all"], config["criteria"], config["sweep"]["level"]),
        "seen_before": config["seen_before"],
        "has_ladder": any(name.endswith("_ladder") for name in config["sweep"]["cases"]),
        "num_settings": len(settings),
        "num_judged": len([s for s in judged if s["truth"]["status"] == "found"]),
        "num_apart": len(apart),
        "num_worlds": len(_worlds(config)),
        "num_anchor_pairs": len({(s["world"], s["algorithm"]) for s in settings}),
        "design": _design(config),
        "widths": _widths(settings),
    }


def rivals(anchors: tuple[planner.Anchor, planner.Anchor], max_staleness: int, horizon: int, ratios: Mapping[str, float]):
    """{rule: predicted η_80} of the simpler rules, from the same two anchors.

    With η_0 and η_a the anchors at S = 0 and S_a: "constant" is η_a; "s_eta_constant" is S·η = S_a·η_a; "log_log" is linear in
    ln(1 + S) through both; "paper_min" is min{η_a·S_a/S, η_0·T_a/T} (arXiv 2607.01083, both radii from the anchors); every
    other rule X takes 1/η = 1/η_0 + (X(S)/X(S_a))·(1/η_a − 1/η_0), "s_eta" with X = S.

    Args:
      anchors: found, at S = 0 and S_a.
      max_staleness, horizon: S and T wanted, updates.
      ratios: {rule: X(S)/X(S_a)} of measured X.
    """
    fresh, stale = anchors
    low, high = fresh.learning_rate, stale.learning_rate
    ratio = max_staleness / stale.max_staleness
    position = math.log1p(max_staleness) / math.log1p(stale.max_staleness)
    found = {
        "constant": high,
        "s_eta_constant": high / ratio,
        "log_log": low * (high / low) ** position,
        "paper_min": min(high / ratio, low * fresh.horizon / horizon),
    }
    for name, value in {"s_eta": ratio, **ratios}.items():
        found[name] = 1 / (1 / low + value * max(1 / high - 1 / low, 0.0))
    return found


def _design(config) -> dict[str, Any]:
    """What the page says of anchors, probes and truth, from the config."""
    parts = config["sweep"]["cases"].items()
    return {
        "anchor_staleness": config["anchor_staleness"],
        "probe_updates": config["probe"]["num_updates"],
        **{
            f"{role}_{key}": sorted({x for name, part in parts if name.endswith(role) for x in np.ravel(part[key]).tolist()})
            for role in ("anchor", "truth")
            for key in ("num_updates", "num_seeds", "max_staleness")
        },
    }


def _worlds(config) -> list[str]:
    return sorted({name.rpartition("_")[0] for name in config["sweep"]["cases"]})


def _boundaries(rows, config) -> dict[tuple[str, str, int], dict[str, Any]]:
    rule, sweep = CollapseRule(**config["sweep"]["rule"]), config["sweep"]
    options = dict(levels=(sweep["level"], 0.5), confidence=sweep["confidence"])
    return {
        (case, algorithm, staleness): sweep_summary.boundary_record(cells, rule, **options)
        for (case, algorithm, _, staleness), cells in sweep_summary.groups(rows).items()
        if not case.endswith("_probe")
    }


def _probe_cases(config, rows) -> dict[str, Any]:
    """Cases of the probes: every (world, loss) at its own learning rate, at the wanted lags and at the anchor's."""
    found, cases, lag = _boundaries(rows, config), {}, config["anchor_staleness"]
    for world in _worlds(config):
        part = config["sweep"]["cases"][f"{world}_truth"]
        for algorithm in () if f"{world}_ladder" in config["sweep"]["cases"] else part["algorithms"]:
            anchor = anchor_of_boundary(found[f"{world}_anchor", algorithm, lag], lag, config["sweep"]["level"])
            if anchor.learning_rate is None:
                continue
            rates = [rate for rate in part["learning_rates"] if rate <= anchor.learning_rate / 2]
            probe = {**part, **config["probe"], "algorithms": (algorithm,), "num_windows": 1}
            probe |= {"learning_rates": (max(rates, default=min(part["learning_rates"])),)}
            cases[f"{world}_{algorithm}_probe"] = probe
            cases[f"{world}_{algorithm}_near_probe"] = {**probe, "max_staleness": (0, lag)}
    return cases


def _settings(rows, config) -> list[dict[str, Any]]:
    boundaries, groups, lag = _boundaries(rows, config), sweep_summary.groups(rows), config["anchor_staleness"]
    delays = {(r["world"], r["algorithm"], r["max_staleness"]): r["learning_rate"] for r in rows if r["kind"] == "delay"}
    settings = []
    for world in _worlds(config):
        part = config["sweep"]["cases"][f"{world}_truth"]
        for algorithm, staleness in itertools.product(part["algorithms"], part["max_staleness"]):
            truth = boundaries[f"{world}_truth", algorithm, staleness]
            records = [boundaries[f"{world}_anchor", algorithm, s] for s in (0, lag)]
            anchors = tuple(anchor_of_boundary(r, s, config["sweep"]["level"]) for r, s in zip(records, (0, lag), strict=True))
            rate = anchors[1].learning_rate
            far, near = (_probe(groups, world, algorithm, *of, rate) for of in ((staleness, "probe"), (lag, "near_probe")))
            low = _low_probe(groups, world, algorithm, staleness, config["largest_tv"]) or far
            setting = dict(world=world, algorithm=algorithm, max_staleness=staleness, truth=truth)
            setting["delay"] = delays.get((world, algorithm, staleness))
            settings.append(setting | _predictions(anchors, staleness, int(truth["horizon"]), far, near, low))
    return settings


def _probe(groups, world, algorithm, staleness, kind, anchor_rate) -> dict[str, Any] | None:
    """The probe at S at the largest rate up to half of the anchor's: of the world's ladder, or the one derived from it."""
    ladder = groups.get((f"{world}_ladder", algorithm, "fixed", staleness))
    if ladder is None:
        return groups.get((f"{world}_{algorithm}_{kind}", algorithm, "fixed", staleness), [None])[0]
    low = [cell for cell in ladder if anchor_rate is not None and cell["learning_rate"] <= anchor_rate / 2]
    return (low or ladder)[-1 if low else 0] if anchor_rate is not None else None


def _low_probe(groups, world, algorithm, staleness, largest_tv) -> dict[str, Any] | None:
    """Of the world's ladder, from the lowest rate upwards, the last probe before total variation exceeds `largest_tv`."""
    ladder = groups.get((f"{world}_ladder", algorithm, "fixed", staleness), [])
    calm = list(itertools.takewhile(lambda cell: np.mean(cell["windows"]["off_policy/tv"]) <= largest_tv, ladder))
    return (calm or ladder or [None])[-1 if calm else 0]


def _predictions(anchors, staleness, horizon, far, near, low) -> dict[str, Any]:
    """The plan with and without anchors, and the rivals, of one setting; None where there is no number."""
    words = {anchor.max_staleness: anchor.status for anchor in anchors}
    rates = {anchor.max_staleness: anchor.learning_rate for anchor in anchors}
    result = dict(anchors=words, anchor_rates=rates, plan=None, without_anchors=None, rules={}, probe=None)
    if low is not None:
        result["without_anchors"] = _short(
            planner.make_plan(max_staleness=staleness, horizon=horizon, probe=probe_of_cell(low))
        )
    if far is None:
        return result
    probe = probe_of_cell(far, [near])
    plan = planner.make_plan(max_staleness=staleness, horizon=horizon, probe=probe, anchors=anchors)
    result |= dict(
        plan=_short(plan), probe=dict(learning_rate=probe.learning_rate, drift=probe.drift, policy_drift=probe.policy_drift)
    )
    if set(words.values()) == {"found"}:
        ratios = {name: _measure(far, *of) / _measure(near, *of) for name, of in _MEASURES.items()}
        ratios["sqrt_msd"] = probe.drift_at(staleness) / probe.drift_at(anchors[1].max_staleness)
        result["rules"] = {"planner": plan.max_learning_rate} | rivals(anchors, staleness, horizon, ratios)
    return result


def _short(plan: planner.Plan) -> dict[str, Any]:
    return dict(status=plan.status, rate=plan.max_learning_rate, interval=plan.interval, binding=plan.binding)


def _measure(cell, name, transform) -> float:
    return max(transform(float(np.mean(cell["windows"][name]))), 1e-12)


def _scores(settings) -> dict[str, dict[str, float]]:
    """{rule: median, p90 and worst |ln(predicted/true)|, and how many} where the truth and every rule have a number."""
    usable = [s for s in settings if s["truth"]["status"] == "found" and s["rules"]]
    names = list(usable[0]["rules"]) if usable else []
    table = {name: [abs(math.log(s["rules"][name] / s["truth"]["eta_80"])) for s in usable] for name in names}
    alone = [s for s in settings if s["truth"]["status"] == "found" and s["without_anchors"] and s["without_anchors"]["rate"]]
    table["without_anchors"] = [abs(math.log(s["without_anchors"]["rate"] / s["truth"]["eta_80"])) for s in alone]
    table["delay_stability"] = [abs(x) for x in _logs_of_delay(settings)]
    return {
        name: dict(
            median=float(np.median(errors)), p90=float(np.quantile(errors, 0.9)), worst=float(max(errors)), number=len(errors)
        )
        for name, errors in table.items()
        if errors
    }


def _logs_of_delay(settings) -> list[float]:
    """ln(delay stability / true η_80) of the settings in which both are numbers; it is 0 where nothing at all is stable."""
    known = [s for s in settings if s["truth"]["status"] == "found" and s["delay"] and math.isfinite(s["delay"])]
    return [math.log(s["delay"] / s["truth"]["eta_80"]) for s in known]


def _beside_delay(settings, name: str) -> dict[str, Any] | None:
    """How far below the truth delay stability lies, for "all" losses, those reported apart too, or one; None without it."""
    logs = _logs_of_delay([s for s in settings if name in ("all", s["algorithm"])])
    if not logs:
        return None
    return dict(number=len(logs), at_or_below=sum(x <= 0 for x in logs), median_ratio=math.exp(float(np.median(logs))))


def _difference(settings, rival: str) -> dict[str, Any] | None:
    """Median |ln error| of the planner minus the rival's; its 90 % bootstrap interval over tasks, as losses share anchors."""
    usable = [s for s in settings if s["truth"]["status"] == "found" and s["rules"]]
    if not usable:
        return None
    errors: dict[str, list[list[float]]] = {}
    for s in usable:
        of_rules = [abs(math.log(s["rules"][rule] / s["truth"]["eta_80"])) for rule in ("planner", rival)]
        errors.setdefault(s["world"], []).append(of_rules)
    worlds = list(errors)

    def difference(chosen) -> float:
        mine, other = np.median(np.concatenate([errors[worlds[k]] for k in chosen]), axis=0)
        return float(mine - other)

    rng = np.random.default_rng(0)
    draws = [difference(rng.integers(0, len(worlds), len(worlds))) for _ in range(_NUM_BOOTSTRAP)]
    low, high = np.quantile(draws, [0.05, 0.95]).tolist()
    return dict(value=difference(range(len(worlds))), interval=[low, high], groups=len(worlds))


def _statuses(settings) -> list[dict[str, Any]]:
    """How often each word of the plan met each word of the truth."""
    pairs = [(s["plan"]["status"] if s["plan"] else _word(s["anchors"]), s["truth"]["status"]) for s in settings]
    return [dict(plan=plan, truth=truth, number=pairs.count((plan, truth))) for plan, truth in sorted(set(pairs))]


def _word(words: Mapping[int, str]) -> str:
    return next((word for word in ("none", "ill-defined", "censored") if word in words.values()), "no probe")


def _widths(settings) -> dict[str, float]:
    """Median ln(η_20/η_80) of the truth, per loss."""
    widths: dict[str, list[float]] = {}
    for setting in settings:
        if setting["truth"]["status"] == "found":
            widths.setdefault(setting["algorithm"], []).append(setting["truth"]["width"])
    return {name: float(np.median(values)) for name, values in sorted(widths.items())}


def _is_stable(truth: Mapping[str, Any], learning_rate: float, level: float) -> bool:
    """Do the runs at the next tried learning rate, not below it, succeed? False beyond the largest."""
    tried = [share for rate, share in zip(truth["learning_rates"], truth["shares"], strict=True) if rate >= learning_rate]
    return bool(tried) and tried[0] >= level


def _checks(judged, scores, criteria, level) -> list[dict[str, Any]]:
    """What was to hold, the measured number, and whether it did."""
    usable = scores["planner"]["number"] if "planner" in scores else 0
    checks = [dict(name="settings in which truth and both anchors are numbers", value=usable, limit=_FEWEST, at_most=False)]
    checks += [
        dict(name=f"{kind} of abs ln error", value=scores["planner"][kind], limit=criteria[kind], at_most=True)
        for kind in ("median", "p90", "worst")
        if "planner" in scores
    ]
    numbered = [s for s in judged if s["plan"] and s["plan"]["rate"]]
    known = [s for s in numbered if s["truth"]["status"] == "found"]
    shares = {
        "half_is_stable": [_is_stable(s["truth"], s["plan"]["rate"] / 2, level) for s in numbered],
        "coverage": [s["plan"]["interval"][0] <= s["truth"]["eta_80"] <= s["plan"]["interval"][1] for s in known],
    }
    words = dict(half_is_stable="half the prediction is stable, share", coverage="90 % intervals that cover, share")
    checks += [
        dict(name=words[name], value=float(np.mean(hits)), limit=criteria[name], at_most=False)
        for name, hits in shares.items()
        if hits
    ]
    for rival, word in (("constant", "a constant η"), ("log_log", "log-log interpolation")):
        if rival in scores:
            value, limit = scores["planner"]["median"], scores[rival]["median"]
            checks.append(dict(name=f"median not above that of {word}", value=value, limit=limit, at_most=True))
    if "without_anchors" in scores:
        value = scores["without_anchors"]["median"]
        checks.append(
            dict(
                name="median without anchors",
                value=value,
                limit=criteria["without_anchors_median"],
                at_most=True,
            )
        )
    for check in checks:
        check["holds"] = check["value"] <= check["limit"] if check["at_most"] else check["value"] >= check["limit"]
    return checks
