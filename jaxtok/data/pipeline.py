"""Batches of a source: `train_batches` for ever, `eval_batches` once.

The training stream is a pure function of the seed: position t of the stream holds one example, and its augmentation is
drawn from (seed, t). Global batch s is positions s*B to s*B + B - 1, of which process p of n takes the p-th n-th: the
rows of all processes, one after another, are those of one alone. So the step is all there is to restore, on any number
of processes; and each example comes exactly once an epoch of len(source) positions, whether or not the batch size
divides it.
"""

import multiprocessing
import os
import signal
import threading
import warnings
import weakref

import numpy as np

from jaxtok.data.images import BadRecord

BAD = "_bad"  # key under which a batch carries its bad records, (index, reason) each, from the workers to `Batches`
NAMED = 10  # bad records that get a warning of their own; after that, one warning each time their number has doubled


def train_batches(
    source,
    transforms=(),
    *,
    batch_size,
    seed=0,
    start_step=0,
    process_index=0,
    process_count=1,
    workers=0,
    max_bad=0.01,
):
    """An endless iterator over the batches of ONE process, shuffled anew each epoch.

    Args:
      source: see `jaxtok.data`.
      transforms: functions `(example, rng) -> example`, applied in order.
      batch_size: of all processes together; this process gets b = batch_size / process_count.
      seed: whole number >= 0. Order and augmentations depend on it and on the step, on nothing else.
      start_step: the global step to begin with; a run that stopped after s steps resumes with s.
      process_index, process_count: which of how many processes this is.
      workers: grain worker processes; 0 reads in threads of this one. The batches are the same.
      max_bad: share of bad records in the source above which the run stops. Below it, a bad record gives way to the
        next good one (the shapes stay), and a warning names it.

    Returns:
      `Batches` of dicts: `image` uint8 [b H W 3], `label` int32 [b], `index` int64 [b] (in the source, of the record
      that was delivered), `caption` list of b str, and the other keys of the examples, arrays stacked.

    Raises:
      ValueError: impossible sizes; pictures of several shapes in one batch; too many bad records.
    """
    import grain

    b = local_batch_size(source, batch_size, process_index, process_count)
    n = len(source)
    if n < batch_size:
        raise ValueError(
            f"{type(source).__name__} has {n} examples, fewer than one batch of {batch_size}: "
            "lower batch_size, or add pictures."
        )
    if seed < 0 or start_step < 0 or workers < 0:
        raise ValueError(f"seed={seed}, start_step={start_step} and workers={workers} must not be negative.")

    def load(position, index):
        example, bad = next_good(source, int(index), n, max_bad)
        return augment(example, transforms, (seed, position)) | {BAD: bad}

    # Grain's order of the epochs is seed, seed + 1, ...: hashing first keeps neighbouring seeds from sharing epochs.
    epoch_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # As good as endless; the length of Grain's own endless repeat overflows in batches of one.
    order = grain.MapDataset.range(n).shuffle(seed=epoch_seed).repeat(2**52 // n)
    examples, first = order.map_with_index(load), process_index * b
    stream = grain.MapDataset.range(2**52 // batch_size * b)
    stream = stream.map(lambda i: examples[i // b * batch_size + first + i % b])
    batches = stream.batch(b, batch_fn=list).map(lambda examples: stack(examples, source))[start_step:]
    return Batches(batches, source, workers, n, max_bad)


def eval_batches(source, transforms=(), *, batch_size, process_index=0, process_count=1, max_bad=0.01):
    """One pass over all examples in order; every example once, over all processes together.

    Batches are as in `train_batches`, plus `mask` bool [b]: False marks a row that is no example, because the set ended
    or the record is bad; such a row has zeros, an empty caption and index -1. All processes get equally many batches.
    Transforms should not be random; one that is draws from the index of the example.
    """
    import grain

    b = local_batch_size(source, batch_size, process_index, process_count)
    n = len(source)

    def read(index):
        return augment(source[index] | {"index": np.int64(index)}, transforms, (index,))

    def load(step):
        rows, bad = [], []
        first = step * batch_size + process_index * b
        for index in range(first, first + b):
            try:
                rows.append(read(index) if index < n else None)
            except BadRecord as error:
                rows.append(None)
                bad.append((index, str(error)))
        like = next((row for row in rows if row is not None), None)
        if like is None:  # no example here: any good one gives the shapes
            like = read(next_good(source, 0, n, max_bad)[0]["index"])
        batch = stack([blank(like) if row is None else row for row in rows], source)
        return batch | {"mask": np.array([row is not None for row in rows]), BAD: bad}

    steps = -(-n // batch_size)
    return Batches(grain.MapDataset.range(steps).map(load), source, 0, n, max_bad)


def one_batch(source, transforms, max_bad):
    """A batch of one: the first example that can be read. What all others look like, for little reading."""
    local_batch_size(source, 1, 0, 1)
    example, _ = next_good(source, 0, len(source), max_bad)
    return stack([augment(example, transforms, (0, 0))], source)


class Batches:
    """An iterator over batches that reads ahead; close it, or use it as a context manager, when done.

    Attribute `bad` maps the index of each bad record met so far to the reason.
    """

    def __init__(self, dataset, source, workers, n, max_bad):
        import grain

        threads = getattr(source, "read_threads", 1)
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads)))
        if workers:
            mark_flags_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), follow_parent)
        self._open = [iter(batches)]
        # Closed also when the program ends by an exception; and let go, for Grain's iterators close themselves again
        # when they are deleted, and fill the screen if the interpreter has lost its modules by then.
        self._close = weakref.finalize(self, close_all, self._open)
        self._source, self._n, self._max_bad = source, n, max_bad
        self.bad = {}

    def __iter__(self):
        return self

    def __next__(self):
        if not self._open:
            raise ValueError("These batches are closed.")
        batch = next(self._open[0])
        for index, reason in batch.pop(BAD):
            if index not in self.bad:
                self.bad[index] = reason
                self._report(reason)
        return batch

    def _report(self, reason):
        count = len(self.bad)
        if count > self._max_bad * self._n:
            raise too_many_bad(self._source, list(self.bad.values()), self._n, self._max_bad)
        if count <= NAMED or count & (count - 1) == 0:
            warnings.warn(f"Bad record skipped ({count} of {self._n} so far): {reason}", stacklevel=3)

    def close(self):
        self._close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def close_all(iterators):
    while iterators:
        iterators.pop().close()


def local_batch_size(source, batch_size, process_index, process_count):
    if len(source) == 0:
        raise ValueError(f"{type(source).__name__} is empty: there is nothing to make batches of.")
    if batch_size <= 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in [0, process_count={process_count}).")
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be divisible by the {process_count} processes.")
    return batch_size // process_count


def next_good(source, index, n, max_bad):
    """Example `index`, or the next of the first `n` that can be read; and the bad ones between, as (index, reason)."""
    bad = []
    while True:
        i = (index + len(bad)) % n
        try:
            return source[i] | {"index": np.int64(i)}, bad
        except BadRecord as error:
            bad.append((i, str(error)))
        if len(bad) > max_bad * n or len(bad) == n:
            raise too_many_bad(source, [reason for _, reason in bad], n, max_bad)


def too_many_bad(source, reasons, n, max_bad):
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return ValueError(
        f"{len(reasons)} of {n} records of {type(source).__name__} are bad, more than max_bad={max_bad:g} allows: "
        f"{'; '.join(reasons[:3])}{more}. Repair or remove them, or raise max_bad."
    )


def augment(example, transforms, key):
    if transforms:
        rng = np.random.default_rng(key)
        for transform in transforms:
            example = transform(example, rng)
    return example


def stack(examples, source):
    """Examples as one batch: arrays and numbers stacked, strings in a list."""
    first, batch = examples[0], {}
    for example in examples[1:]:
        if example.keys() != first.keys():
            odd = ", ".join(sorted(example.keys() ^ first.keys()))
            raise ValueError(f"{which(source, example)} and {which(source, first)} do not have the same keys: {odd}.")
    for key, value in first.items():
        values = [example[key] for example in examples]
        if key == BAD:
            batch[key] = [record for bad in values for record in bad]
        elif isinstance(value, str):
            batch[key] = values
        else:
            other = next((k for k, v in enumerate(values) if np.shape(v) != np.shape(value)), None)
            if other is not None:
                raise ValueError(
                    f"{key} of {which(source, first)} has the shape {np.shape(value)}, but of "
                    f"{which(source, examples[other])} {np.shape(values[other])}: in a batch they must agree. Pictures "
                    'do after a transform such as dict(name="data.transforms.resize_crop", size=64).'
                )
            batch[key] = np.stack(values) if np.ndim(value) else np.array(values, np.int32 if key == "label" else None)
    image = batch.get("image")
    if image is not None and (image.dtype != np.uint8 or image.ndim != 4 or image.shape[3] != 3):
        raise ValueError(
            f"Pictures must be uint8 [H W 3], but {which(source, first)} is {image.dtype} {list(image.shape[1:])} "
            "after the transforms: leave the scaling to the codec."
        )
    return batch


def which(source, example):
    index = int(example["index"])
    return source.describe(index) if hasattr(source, "describe") else f"{type(source).__name__} example {index}"


def blank(example):
    """A row that is no example, in the shapes of `example`."""
    empty = {k: "" if isinstance(v, str) else np.zeros_like(v) for k, v in example.items()}
    return empty | {"index": np.int64(-1)}


def follow_parent(worker, workers):
    """A worker ends with the process whose worker it is, be that killed, and not before: never by a signal of its own.

    Ctrl-C at a terminal and a cluster's SIGTERM come to workers too, and a run that stops by them still needs batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def mark_flags_parsed():
    """Grain's workers read absl flags, which nobody has parsed in a notebook or a test."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
