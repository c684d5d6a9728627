"""Tables of runs made by known laws.

Each law has runs that determine all its parameters: several epochs for `fade`, batches around the
best one, and sizes and samples between which the irreducible error shows.
"""

import numpy as np
from scipy.optimize import brentq

from clip_jax.scaling.laws import LAWS, Batched, Law, Repeated, Runs
from clip_jax.scaling.run_table import RunTable
from clip_jax.scaling.uncertainty import Form


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


def measured(law: Law, seed=0, noise=NOISE, sizes=4, counts=4, seeds=1) -> Runs:
    """Runs of some sizes, each at some counts of samples; three thirds, if the law takes one."""
    third = {Repeated: (1e6, 1e7, 1e8), Batched: (1e3, 1e4, 1e5)}.get(type(law), (1.0,))
    size = np.geomspace(3, 300, sizes) if sizes > 1 else np.array([30.0])
    axes = size, np.geomspace(1e6, 1e10, counts), np.array(third)
    size, samples, third = (np.repeat(x.ravel(), seeds) for x in np.meshgrid(*axes))
    runs = Runs(size, samples, np.ones_like(size), third)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(size.shape))
    return runs._replace(error=runs.under(law) * scatter)


def table_of(runs: Runs) -> RunTable:
    """The table of runs, whose models are named by their sizes: m3, m300."""
    names = ("gmacs_per_sample", "samples_seen", "error", "unique_samples")
    columns = (np.asarray(x).tolist() for x in runs[:4])
    rows = [dict(zip(names, x, strict=True)) for x in zip(*columns, strict=True)]
    return RunTable([row | {"arch": f"m{row[names[0]]:g}"} for row in rows])


def crossing_of(first: Law, second: Law, least: float, most: float) -> float:
    """Compute between `least` and `most` where the laws are equal at their best divisions."""

    def gap(log_compute: float) -> float:
        compute, sizes = np.exp(log_compute), (0.3, 3e3)
        first_error, second_error = (x.optimum(compute, sizes).error for x in (first, second))
        return float(np.log(first_error / second_error))

    return float(np.exp(brentq(gap, np.log(least), np.log(most))))
