"""The voice of a run: a progress bar, `metrics.jsonl`, tables, and TensorBoard for those who ask."""

import contextlib
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

# The metrics that stand on the progress line, if a `log` brings them, and how they are written there.
ON_THE_BAR = {"loss": "loss {:.4f}", "images_per_s": "{:.0f} images/s"}


class Logger:
    """Says how a run is doing: on the screen, in `workdir/metrics.jsonl` and, if asked, in TensorBoard.

    On a terminal it keeps one live progress bar; elsewhere (a file, a pipe, a cluster's log) each `log` that brings a
    loss or a rate prints one plain line. `metrics.jsonl` gets one JSON object a `log` call, and is then closed again:
    `{"step": ..., name: number, ...}`; NaN and the infinities, which JSON does not have, are written as null.
    A resumed run drops the lines past `start_step`, whose steps it repeats; a run from step 0 begins an empty file.
    Only process 0 writes and speaks.

    Args:
      workdir: the run's folder, made if missing; of a bucket too ("gs://BUCKET/run"), where the file, which cannot grow
        there, is written anew by each `log`.
      total_steps: the step at which the run ends.
      start_step: steps already done: 0, or the step of the checkpoint it resumed from.
      tensorboard: also write `workdir/tensorboard`; needs the extra `jaxtok[tensorboard]`, else ImportError.
    """

    def __init__(self, workdir: str | os.PathLike, total_steps: int, start_step: int = 0, *, tensorboard: bool = False):
        self.total_steps = total_steps
        self.first = None  # (step, time) of the first log: what came before it is compilation, not speed
        self.active = jax.process_index() == 0
        self.writer = self.bar = None
        if not self.active:
            return
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        self.text = _keep_until(self.path, start_step)
        if tensorboard:
            self.writer = _tensorboard_writer(str(workdir / "tensorboard"))
        if sys.stderr.isatty():
            bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bar = tqdm(total=total_steps, initial=start_step, bar_format=bar_format, dynamic_ncols=True)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records metrics (numbers, or arrays of one number) of `step`, the count of steps done so far."""
        if not self.active:
            return
        scalars = {name: _number(name, value) for name, value in metrics.items()}
        record = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._write(json.dumps({"step": int(step), **record}, allow_nan=False) + "\n")
        if self.writer:
            self.writer.write_scalars(step, scalars)
        words = [text.format(scalars[name]) for name, text in ON_THE_BAR.items() if name in scalars]
        if not words:  # an evaluation: nothing to say of the progress
            return
        now = time.monotonic()
        self.first = self.first or (step, now)
        if step > self.first[0]:
            seconds = (now - self.first[1]) / (step - self.first[0]) * (self.total_steps - step)
            words.append(f"{tqdm.format_interval(seconds)} left")
        if self.bar is None:
            print(f"step {step}/{self.total_steps}", *words, sep="  ", flush=True)
        else:
            self.bar.n = step
            self.bar.set_postfix_str("  ".join(words))

    def print(self, text: str) -> None:
        """Prints a message without tearing the progress bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.active:
            print(text, flush=True)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints the rows as an aligned table under the title; the keys of the first row are the columns."""
        self.print(format_table(title, rows))

    def close(self) -> None:
        """Ends the bar and TensorBoard's file; a second call does nothing."""
        if self.bar is not None:
            self.bar.close()
        if self.writer:
            self.writer.close()
        self.active, self.writer, self.bar = False, None, None

    def _write(self, line):
        if "://" in str(self.path):
            self.text += line
            self.path.write_text(self.text)
        else:
            with self.path.open("a") as file:
                file.write(line)


class Window:
    """Rates since the last log."""

    def __init__(self, patience=60.0):
        """patience: seconds after which, and each time it has passed again, a wait for data is reported."""
        self.patience = patience
        self.start, self.waited, self.ends = time.perf_counter(), 0.0, []

    @contextlib.contextmanager
    def waiting(self, step, source):
        """Around what waits for the batch of a step."""
        start, done = time.perf_counter(), threading.Event()

        def watch():
            while not done.wait(self.patience):
                print(
                    f"Step {step} has waited {time.perf_counter() - start:.0f} s for its batch from {source}: does the "
                    "disk or network with the pictures answer, and do the worker processes (config.data.workers) live?",
                    file=sys.stderr,
                    flush=True,
                )

        watchdog = threading.Thread(target=watch, daemon=True)
        watchdog.start()
        try:
            yield
        finally:
            done.set()
            self.waited += time.perf_counter() - start

    def step(self):
        """A step was handed to the devices; once they are behind, this is as often as they take one."""
        self.ends.append(time.perf_counter())

    def close(self, images, total_flops):
        seconds, waited = time.perf_counter() - self.start, self.waited
        times = np.diff(self.ends) if len(self.ends) > 1 else [seconds]
        self.__init__(self.patience)
        return {
            "images_per_s": images / seconds,
            "model_flops_per_s": total_flops / seconds,
            "data_wait_share": waited / seconds,
            "step_s_median": np.median(times),
            "step_s_p95": np.percentile(times, 95),
            "memory_peak_gb": memory_peak() / 1e9,
        }


def memory_peak():
    """Bytes: the most that the fullest device of this process has held; on a CPU, that this process has."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux


def copy_files(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies all files below a local folder, where alone the profiler writes, to below another, be it in a bucket."""
    for file in filter(Path.is_file, Path(source).rglob("*")):
        place = epath.Path(target) / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())


def format_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned plain text under the title: columns of numbers to the right, of words to the left.

    Raises ValueError if a row's columns are not those of the first.
    """
    columns = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"table {title!r}: row {number} has the columns {list(row)}, the first row has {columns}")
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    align = [str.rjust if all(map(_reads_as_number, column)) else str.ljust for column in zip(*cells, strict=True)]

    def line(texts):
        return "  ".join(put(text, width) for put, text, width in zip(align, texts, widths, strict=True)).rstrip()

    return "\n".join([title, line(columns), line("-" * width for width in widths), *map(line, cells)])


def _cell(value: Any) -> str:
    """Counts whole, quantities with four significant digits, trailing zeros kept: 0.6 reads 0.6000 beside 0.5432."""
    if isinstance(value, str | int | np.integer):
        return str(value)
    return f"{float(value):#.4g}".rstrip(".")


def _reads_as_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _number(name: str, value: Any) -> float:
    if np.shape(value):
        raise ValueError(f"metric {name!r} has the shape {np.shape(value)}; log takes one number a name: average first")
    return float(value)


def _keep_until(path: epath.Path, step: int) -> str:
    """Takes out the lines past `step` and those a kill cut short, by one rename: a kill now loses nothing.

    Returns the lines that stay.
    """
    kept, past, broken = [], 0, 0
    if step and path.exists():
        for line in path.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                repeated = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError):
                broken += 1
                continue
            past += repeated
            if not repeated:
                kept.append(line + "\n")
        if past or broken:
            print(f"{path}: dropped {past} lines past step {step}, whose steps run again, and {broken} broken lines")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
    return "".join(kept)


def _tensorboard_writer(folder: str):
    try:
        from clu import metric_writers
    except ImportError as error:
        raise ImportError(
            f"tensorboard=True needs tensorflow and tensorboard ({error}); "
            'install them with: pip install "jaxtok[tensorboard]", or leave it off: metrics.jsonl has the same numbers'
        ) from error
    return metric_writers.SummaryWriter(folder)
