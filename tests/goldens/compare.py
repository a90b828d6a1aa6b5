"""Our arrays against golden ones, a row for each."""

from typing import NamedTuple

import numpy as np

OK, MISS, SKIPPED = "ok", "MISS", "not compared"
TIE = 1e-5  # a value this close to a rounding tie may fall on either side


class Row(NamedTuple):
    name: str
    verdict: str  # OK, MISS or SKIPPED
    error: float | None = None  # largest absolute difference
    tolerance: str = ""
    note: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.2e}"
        return f"{self.name:<84} {error:>9}  {self.tolerance:<16} {self.verdict} {self.note}".rstrip()


def compare(name, ours, golden, ignore=None, tolerance=None) -> Row:
    """One row. `ignore`: bool like golden, entries that are not compared. `tolerance`: (rtol, atol), else by name."""
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return Row(name, MISS, note=f"our shape is {ours.shape}, the golden one {golden.shape}")
    if ours.size == 0:
        return Row(name, MISS, note="empty")
    allowed, tolerance = _tolerance(name, golden, tolerance)
    with np.errstate(invalid="ignore"):  # equal infinities agree, and an infinity allows nothing else
        error = np.where(ours == golden, 0, np.abs(ours.astype(np.float64) - golden.astype(np.float64)))
    allowed = np.where(np.isinf(golden), 0, allowed)
    note = ""
    if ignore is not None and ignore.any():
        error = np.where(ignore, 0, error)
        note = f"({ignore.sum()} of {ignore.size} entries ignored: within {TIE:.0e} of a rounding tie)"
        if ignore.all():
            return Row(name, MISS, note=note)
    verdict = OK if np.all(error <= allowed) else MISS  # NaN is no agreement
    return Row(name, verdict, float(np.max(error)), tolerance, note)


def compare_all(prefix, ours: dict, golden: dict, inputs=(), defects=None, tolerances=None) -> list[Row]:
    """Rows for every golden array and every array of ours: one without its partner is a miss.

    Args:
        prefix: of the printed names.
        inputs: names of golden arrays that are fed to the model.
        defects: {name: why it is not compared}.
        tolerances: {name: (rtol, atol)} of floating point arrays.
    """
    reasons = {name: "input" for name in inputs} | (defects or {})
    rows = []
    for name in golden:
        if name in reasons:
            rows.append(Row(f"{prefix}/{name}", SKIPPED, note=reasons[name]))
        elif name not in ours:
            rows.append(Row(f"{prefix}/{name}", MISS, note="nothing of ours answers to this name"))
        else:
            row = compare(name, ours[name], golden[name], _at_a_tie(name, golden), (tolerances or {}).get(name))
            rows.append(row._replace(name=f"{prefix}/{name}"))
    rows += [Row(f"{prefix}/{name}", MISS, note="not in the file") for name in ours if name not in golden]
    return rows


def _tolerance(name, golden, given=None):
    """What each entry may differ by, and how it is printed."""
    if golden.dtype.kind in "biu":
        return 0, "exact"
    if given is not None:
        rtol, atol = given
        return atol + rtol * np.abs(golden.astype(np.float64)), f"{atol:.0e} + {rtol:.0e}|x|"
    if name.startswith("grad/"):
        largest = float(np.max(np.abs(golden)))
        return 1e-4 * largest, f"{1e-4 * largest:.2e}"
    if name == "temb_freq_maxt1":  # t * 1000 is rounded in float32
        return 1e-4, "1e-04"
    return 2e-5 + 1e-5 * np.abs(golden.astype(np.float64)), "2e-05 + 1e-05|x|"


def _at_a_tie(name, golden):
    """For codes and indices: which entries come from a bounded value that may round either way."""
    prefix, _, kind = name.rpartition("_")
    if kind not in ("codes", "indices") or f"{prefix}_bounded" not in golden:
        return None
    bounded = golden[f"{prefix}_bounded"].astype(np.float64)
    tie = np.abs(bounded - np.floor(bounded) - 0.5) < TIE
    return tie if kind == "codes" else tie.any(-1)
