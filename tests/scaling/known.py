"""Tables of runs made by known laws.

Each law has runs that determine all its parameters: several epochs for `fade`, batches around
`critical`, and sizes and samples between which the irreducible error shows.
"""

import numpy as np
from scipy.optimize import brentq

from clip_jax.scaling.laws import LAWS, Batched, Law, Repeated, Runs
from clip_jax.scaling.run_table import RunTable
from clip_jax.scaling.uncertainty import Fit, Form, fit_law


def law(form: Form, *parameters: float) -> Law:
    return LAWS[form](*map(np.array, parameters))


NOISE = 0.03
KNOWN: dict[Form, Law] = {
    "power": law("power", -0.11, 5.0),
    "saturating": law("saturating", 0.4, 1e8, 400.0, 0.2),
    "additive": law("additive", 0.5, 0.3, 1.0, 40.0, 0.1),
    "repeated": law("repeated", 0.5, 0.3, 1.0, 40.0, 0.1, 15.0),
    "batched": law("batched", 0.5, 0.3, 1.0, 40.0, 0.1, 2.0, 100.0),
}
# Laws that cross those above once, at an amount of compute that the runs contain. With equal
# irreducible errors it would not be certain that the additive ones cross at all.
OTHERS: dict[Form, Law] = {
    "power": law("power", -0.16, 5.0 * 1e10**0.05),
    "saturating": law("saturating", 0.4, 1e8, 900.0, 0.2 - 500 * (1e10 + 1e8) ** -0.4),
    "additive": law("additive", 0.6, 0.4, 1.1, 280.0, 0.07),
}


def measured(law: Law, seed=0, noise=NOISE, sizes=4, counts=4) -> Runs:
    """Runs of some sizes, each at some counts of samples; three thirds, if the law takes one."""
    third = {Repeated: (1e6, 1e7, 1e8), Batched: (1e3, 1e4, 1e5)}.get(type(law), (1.0,))
    axes = np.geomspace(3, 300, sizes), np.geomspace(1e6, 1e10, counts), np.array(third)
    size, samples, third = (x.ravel() for x in np.meshgrid(*axes))
    runs = Runs(size, samples, np.ones_like(size), third)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(size.shape))
    return runs._replace(error=runs.under(law) * scatter)


def table_of(runs: Runs) -> RunTable:
    """The table of runs, whose models are named by their sizes: m3, m300."""
    names = ("gmacs_per_sample", "samples_seen", "error", "unique_samples")
    columns = (np.asarray(x).tolist() for x in runs[:4])
    rows = [dict(zip(names, x, strict=True)) for x in zip(*columns, strict=True)]
    return RunTable([row | {"arch": f"m{row[names[0]]:g}"} for row in rows])


def frontier_coverage(tables: int, draws: int) -> float:
    """How often a frontier's interval contains alpha, where runs end above the law."""
    law, inside = KNOWN["power"], []
    compute = np.repeat(np.geomspace(1e9, 1e13, 12), 3)
    one = np.ones_like(compute)
    for seed in range(tables):
        rng = np.random.default_rng(seed)
        scatter = NOISE * rng.standard_normal(36) + 0.1 * rng.exponential(size=36)
        runs = Runs(one, compute, law(one, compute) * np.exp(scatter))
        low, high = fit_law("power", runs, draws=draws).interval("alpha")
        inside.append(low < law.parameters["alpha"] < high)
    return float(np.mean(inside))


def families(form: Form, seed: int, draws: int) -> tuple[Fit, Fit]:
    """Fits to two tables, of laws that cross."""
    made = []
    for number, law in enumerate((KNOWN[form], OTHERS[form]), 2 * seed):
        runs = measured(law, number, counts=5)
        made.append(fit_law(form, runs, "all", draws=draws, seed=number))
    return made[0], made[1]


def true_crossing(form: Form) -> float:
    """Compute where the laws are equal."""

    def gap(log_compute: float) -> float:
        compute, sizes = np.exp(log_compute), (0.3, 3e3)
        one, other = (law[form].optimum(compute, sizes).error for law in (KNOWN, OTHERS))
        return float(one - other)

    return float(np.exp(brentq(gap, np.log(1e7), np.log(1e13))))
