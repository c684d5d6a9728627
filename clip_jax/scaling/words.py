"""What fits answer, in words for a terminal."""

from collections.abc import Mapping
from typing import Any

from clip_jax.scaling.table import short


def describe(result: Mapping[str, Any]) -> str:
    """Put the result of `fit` in words, for a terminal."""
    head = f"{result['metric']}: {result['form']} law; C in {result['compute_unit']}"
    lines = [head] if "families" in result else []
    for name, family in result.get("families", {"": result}).items():
        bins = result["through"] == "frontier"
        through = "the least errors of the bins of" if bins else "all of"
        lines.append(
            (name or f"{result['metric']}: {result['form']} law")
            + f" through {len(family['points'])} points, {through} {family['runs']} runs"
            + ("" if name else f"; C in {result['compute_unit']}")
        )
        lines += _of_law(family)
    for pair in result.get("pairs", ()):
        lines += _of_pair(pair)
    if "hold_out" in result:
        held = result["hold_out"]
        lines.append(
            f"held out: {len(held['runs'])} runs predicted from the {held['fitted']} others, off "
            f"by {held['mean_relative_error']:.1%} on average, {held['inside_interval']} of them "
            "inside the 95% interval"
        )
    for wanted, prediction in result.get("predictions", {}).items():
        lines.append(f"{wanted}: {_words(prediction)}")
    if "budget" in result:
        budget = result["budget"]
        lines.append(
            f"{budget['training_flops']:.3g} training FLOPs: {budget['model']} on "
            f"{short(budget['samples'])} pairs"
        )
        lines += [
            f"  {option['model']:16} {short(option['samples']):>6} pairs  {_words(option)}, "
            f"best in {option['share_of_draws']:.0%} of draws"
            for option in budget["options"]
        ]
    lines += [f"written: {path}" for path in result.get("plots", [])]
    return "\n".join(lines + [f"warning: {line}" for line in result["warnings"]])


def _of_law(family: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, parameter in family["parameters"].items():
        value, (low, high) = parameter["value"], parameter["interval"]
        if name == "irreducible" and family["irreducible_error"] is None:
            lines.append(f"  {name:13} not determined by these runs (95%: {low:.4g} to {high:.4g})")
        else:
            lines.append(f"  {name:13} {value:<10.4g} (95%: {low:.4g} to {high:.4g})")
    if "optimal" in family:
        optimal = family["optimal"]
        low, high = optimal["size_exponent"]["interval"]
        lines.append(
            f"  best division of compute: N grows as C^{optimal['size_exponent']['value']:.2f} "
            f"(95%: {low:.2f} to {high:.2f})"
        )
        for at in optimal["divisions"]:
            size, samples = at["size"]["value"], at["samples"]["value"]
            lines.append(
                f"    {at['training_flops']:.1e} training FLOPs: {size:.3g} GMACs a pair, "
                f"{short(samples)} pairs, error {at['error']['value']:.4g}"
            )
    return lines


def _words(prediction: Mapping[str, Any]) -> str:
    if "score" in prediction:
        low, high = prediction["score_interval"]
        return f"{prediction['score']:.1%} (95%: {low:.1%} to {high:.1%})"
    low, high = prediction["error_interval"]
    return f"{prediction['error']:.4g} (95%: {low:.4g} to {high:.4g})"


def _of_pair(pair: Mapping[str, Any]) -> list[str]:
    one, other = pair["families"]
    lines = [f"{other} beside {one}:"]
    for at, where in zip(pair["ratios"], ("least", "largest"), strict=True):
        lines.append(
            f"  at the {where} compute of both, {at['compute']:.3g}: {at['ratio'] - 1:+.1%} error "
            f"(95%: {at['low'] - 1:+.1%} to {at['high'] - 1:+.1%}), smaller in "
            f"{at['share']:.0%} of draws"
        )
    cross = pair["crossing"]
    at = "from the least on" if cross["compute"] is None else f"from {cross['compute']:.3g} on"
    low = f"{cross['low']:.3g}" if cross["low"] else "less than any"
    high = "more than any" if cross["high"] is None else f"{cross['high']:.3g}"
    better = f"{pair['families'][cross['better']]} is the better one {at} (95%: {low} to {high})"
    if not cross["low"] and cross["high"] is None:
        better = "these runs do not determine which is better where"
    lines.append(f"  {better}; the laws cross in {cross['share']:.0%} of draws")
    if alike := pair["paired"]:
        lines.append(
            f"  in {alike['pairs']} pairs of runs alike in all else: {alike['ratio'] - 1:+.2%} "
            f"error (95%: {alike['low'] - 1:+.2%} to {alike['high'] - 1:+.2%})"
        )
    return lines
