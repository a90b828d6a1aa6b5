"""What each system takes and gives on the embedded data: python -m benchmarks.systems titok one_d_piece --seeds=0,1,2

Trains configs one after the other, each in a process of its own, into OUT/<config>-<seed>, and prints a table of what
their logs say. Runs that have ended are read and not repeated. Config keys may follow: --config.total_steps=500.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxtok.metrics import format_table


def run(config: str, seed: int, workdir: Path, extra: Sequence[str]) -> dict:
    """Trains a config and returns its row. RuntimeError with the end of its output if it fails."""
    done = workdir / "seconds.json"
    if not done.exists():
        start = time.perf_counter()
        name, _, variant = config.partition(":")
        spec = f"configs/{name}.py{variant and ':'}{variant}"
        result = subprocess.run(
            [sys.executable, "-m", "jaxtok.train", f"--config={spec}", f"--workdir={workdir}"]
            + [f"--config.seed={seed}", *extra],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        if result.returncode:
            raise RuntimeError(f"{config}, seed {seed}: {result.stdout[-2000:]}")
        done.write_text(json.dumps(time.perf_counter() - start))
    return row(config, seed, workdir, json.loads(done.read_text()))


def row(config, seed, workdir, seconds):
    """What the log of a run says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "images_per_s" in line]
    last = {name: value for line in lines for name, value in line.items() if name.startswith("eval/")}
    scores = [name for name in last if name.startswith("eval/psnr/") and "@" in name]
    best = max(scores, key=lambda name: (int(name.rpartition("@")[2]), -scores.index(name)), default=None)
    return {
        "system": config,
        "seed": seed,
        "steps": lines[-1]["step"],
        "minutes": seconds / 60,
        "images/s": float(np.median([line["images_per_s"] for line in steps])),
        "peak memory, GB": max(line["memory_peak_gb"] for line in steps),
        "PSNR, all tokens": last[best] if best else float("nan"),
        "swapped": last.get("eval/psnr/another picture's codes", float("nan")),
    }


def table(rows: Sequence[dict]) -> str:
    """The rows, a line a system: means over seeds, and the spread of PSNR."""
    found = []
    for system in dict.fromkeys(r["system"] for r in rows):
        own = [r for r in rows if r["system"] == system]
        mean = lambda key, own=own: float(np.mean([r[key] for r in own]))
        scores = [r["PSNR, all tokens"] for r in own]
        found.append(
            {
                "system": system,
                "steps": own[0]["steps"],
                "seeds": len(own),
                "minutes": f"{mean('minutes'):.1f}",
                "images/s": f"{mean('images/s'):.0f}",
                "peak memory, GB": f"{mean('peak memory, GB'):.2f}",
                "PSNR, all tokens": f"{np.mean(scores):.2f}",
                "over seeds": f"{min(scores):.2f} ... {max(scores):.2f}" if len(own) > 1 else "",
                "another picture's codes": f"{mean('swapped'):.2f}",
            }
        )
    return format_table("Training on the embedded data", found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", help="names of configs, titok or titok:tiny")
    parser.add_argument("--seeds", default="0", help="with commas between")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"), help="where the runs go")
    options, extra = parser.parse_known_args()
    jobs = [(system, int(seed)) for system in options.systems for seed in options.seeds.split(",")]
    rows = []
    for system, seed in tqdm(jobs, unit="run"):
        workdir = options.out / f"{system.replace(':', '-')}-{seed}"
        rows.append(run(system, seed, workdir, extra))
    print(table(rows))


if __name__ == "__main__":
    main()
