"""The data order: exactly once an epoch, a function of seed and step alone, padded evaluation, bad records."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtok.data.images import BadRecord
from jaxtok.data.pipeline import eval_batches, train_batches
from jaxtok.data.shapes import Shapes
from jaxtok.data.sources import Folder
from jaxtok.data.transforms import flip, resize_crop, shift

ROOT = Path(__file__).parents[2]


class Numbered:
    """n pictures whose every pixel is the index; those in `bad` cannot be read."""

    class_names = ("all",)

    def __init__(self, n, bad=(), shape=(4, 4, 3)):
        self.n, self.bad, self.shape = n, bad, shape

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise BadRecord(f"record-{i}: broken")
        return {"image": np.full(self.shape, i, np.uint8), "label": np.int32(i % 3), "caption": f"number {i}"}


def take(batches, steps):
    with batches:
        return [next(batches) for _ in range(steps)]


def positions(per_process, key="index"):
    """The global stream, from the batches of every process: row j of process p in batch s is position s*B + p*b + j."""
    P, (b, *_) = len(per_process), per_process[0][0][key].shape
    stream = {}
    for p, batches in enumerate(per_process):
        for s, batch in enumerate(batches):
            for j in range(b):
                stream[s * P * b + p * b + j] = batch[key][j]
    assert sorted(stream) == list(range(len(stream)))
    return np.array([stream[t] for t in range(len(stream))])


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_each_example_exactly_once_an_epoch(processes, workers):
    n, batch_size = 25, 6  # batches run across the borders of epochs
    share = {"batch_size": batch_size, "process_count": processes, "workers": workers}
    run = [take(train_batches(Numbered(n), process_index=p, **share), 13) for p in range(processes)]
    stream = positions(run)
    epochs = [stream[e * n : (e + 1) * n] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert not np.array_equal(epochs[0], epochs[1])
    alone = positions([take(train_batches(Numbered(n), batch_size=batch_size), 13)])
    np.testing.assert_array_equal(stream, alone)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_batches_of_one(n):
    stream = positions([take(train_batches(Numbered(n), batch_size=1, start_step=10**9 * n), 3 * n)])
    assert [sorted(stream[e * n : (e + 1) * n]) for e in range(3)] == [list(range(n))] * 3


def test_batch_holds_what_the_source_gave():
    (batch,) = take(train_batches(Numbered(9), batch_size=4), 1)
    assert set(batch) == {"image", "label", "caption", "index"}
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (4, 4, 4, 3)
    assert batch["label"].dtype == np.int32 and batch["index"].dtype == np.int64
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    assert batch["caption"] == [f"number {i}" for i in batch["index"]]


def test_closed_batches_say_so():
    batches = train_batches(Numbered(9), batch_size=4)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_a_program_that_fails_ends_at_once_and_quietly():
    code = """if __name__ == "__main__":
    from jaxtok.data.pipeline import train_batches
    from jaxtok.data.shapes import Shapes
    batches = train_batches(Shapes(size=16), batch_size=4, workers=1)
    next(batches)
    raise RuntimeError("boom")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "RuntimeError: boom" in run.stderr
    assert "Exception ignored" not in run.stderr


def test_order_and_augmentation_follow_the_seed():
    def run(seed):
        return take(train_batches(Shapes(size=16, n=10), [flip(), shift(2)], batch_size=5, seed=seed), 8)

    first, again, other = run(3), run(3), run(4)
    for a, b in zip(first, again, strict=True):
        equal(a, b)
    assert any(not np.array_equal(a["index"], b["index"]) for a, b in zip(first, other, strict=True))
    # One seed's second epoch is not the next seed's first: the two runs would see nearly the same order.
    assert not np.array_equal(positions([first])[10:20], positions([other])[:10])
    seen = {}
    for batch in first:
        for index, image in zip(batch["index"], batch["image"], strict=True):
            seen.setdefault(int(index), set()).add(image.tobytes())
    assert sum(len(images) > 1 for images in seen.values()) > 5  # augmented anew each epoch


def test_resume_in_the_middle_of_an_epoch_is_bit_exact():
    def run(**kwargs):
        return train_batches(Shapes(size=16, n=23), [flip(), shift(1)], batch_size=6, seed=1, **kwargs)

    whole = take(run(), 9)
    for a, b in zip(whole[5:], take(run(start_step=5), 4), strict=True):
        equal(a, b)
    # With another number of processes: the same examples, augmented in the same way, in every global batch.
    halves = [take(run(start_step=5, process_index=p, process_count=2), 4) for p in range(2)]
    for s, batch in enumerate(whole[5:]):
        together = {(int(i), x.tobytes()) for h in halves for i, x in zip(h[s]["index"], h[s]["image"], strict=True)}
        assert together == {(int(i), x.tobytes()) for i, x in zip(batch["index"], batch["image"], strict=True)}


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures of different sizes and one text file that is called a picture."""
    rng = np.random.default_rng(0)
    for k in range(11):
        Image.fromarray(rng.integers(0, 256, (9 + k, 12, 3), np.uint8)).save(tmp_path / f"p{k:02}.png")
    (tmp_path / "p06-not.png").write_text("I am no picture")
    return tmp_path


def test_worker_processes_change_nothing(folder):
    source, transforms = Folder(folder), [resize_crop(8), flip()]

    def run(p, workers):
        batches = train_batches(
            source,
            transforms,
            batch_size=4,
            process_index=p,
            process_count=2,
            workers=workers,
            max_bad=0.1,
            start_step=1,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = take(batches, 16)  # enough that either process meets the bad record
        return got, batches.bad, [str(w.message) for w in caught if "Bad record" in str(w.message)]

    for p in range(2):
        inline, spawned = run(p, 0), run(p, 2)
        for a, b in zip(inline[0], spawned[0], strict=True):
            equal(a, b)
        assert inline[1:] == spawned[1:]
        assert list(inline[1]) == [6] and "p06-not.png" in inline[1][6]
        assert len(inline[2]) == 1
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_keeps_its_words(folder):
    with (
        pytest.raises(ValueError, match="p06-not.png"),
        train_batches(Folder(folder), [resize_crop(8)], batch_size=12, workers=1) as batches,
    ):
        next(batches)
    assert not multiprocessing.active_children()


def test_bad_record_gives_way_to_the_next_good_one_and_is_named_once():
    source = Numbered(30, bad={4, 5})
    batches = train_batches(source, batch_size=10, max_bad=0.1)
    with pytest.warns(UserWarning, match=r"record-[45]: broken") as caught:
        got = take(batches, 6)  # two epochs
    assert len(caught) == 2
    assert set(batches.bad) == {4, 5} and batches.bad[5] == "record-5: broken"
    for epoch in (got[:3], got[3:]):
        counts = np.bincount(positions([epoch]), minlength=30)
        assert counts[4] == counts[5] == 0 and counts[6] == 3
        assert all(counts[i] == 1 for i in range(30) if i not in (4, 5, 6))
    with pytest.warns(UserWarning):
        again = take(train_batches(source, batch_size=10, max_bad=0.1, start_step=2), 4)
    for a, b in zip(got[2:], again, strict=True):
        equal(a, b)


def test_too_many_bad_records_stop_the_run():
    few, many = Numbered(200, bad={3, 50}), Numbered(200, bad={3, 50, 120})
    with pytest.warns(UserWarning, match="[12] of 200"):
        assert len(take(train_batches(few, batch_size=20), 12)) == 12  # exactly the default 1 %
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"3 of 200 .*max_bad=0.01.*record-\d+: broken"):
        take(train_batches(many, batch_size=20), 12)
    with pytest.raises(ValueError, match="8 of 8 records of Numbered are bad"):
        take(train_batches(Numbered(8, bad=range(8)), batch_size=4, max_bad=1.0), 1)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("n", [8, 9, 3])
def test_eval_gives_every_example_once_and_masks_the_rest(processes, n):
    run = [
        list(eval_batches(Numbered(n), batch_size=4, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    steps = -(-n // 4)
    assert [len(batches) for batches in run] == [steps] * processes
    for batches in run:
        for batch in batches:
            assert batch["image"].shape == (4 // processes, 4, 4, 3) and batch["image"].dtype == np.uint8
            assert batch["mask"].dtype == bool and len(batch["caption"]) == 4 // processes
            assert (batch["index"][~batch["mask"]] == -1).all() and not batch["image"][~batch["mask"]].any()
    mask, index, images = (positions(run, key) for key in ("mask", "index", "image"))
    assert index[mask].tolist() == list(range(n))
    np.testing.assert_array_equal(images[mask][:, 0, 0, 0], index[mask])
    assert len(mask) == 4 * steps


def test_eval_masks_bad_records_and_stops_at_too_many():
    batches = eval_batches(Numbered(6, bad={0, 1}), batch_size=2, max_bad=0.4)
    with pytest.warns(UserWarning, match="record-[01]: broken"):
        got = list(batches)
    assert [b["mask"].tolist() for b in got] == [[False, False], [True, True], [True, True]]
    assert got[0]["image"].shape == (2, 4, 4, 3) and set(batches.bad) == {0, 1}
    with pytest.raises(ValueError, match="1 of 6 records of Numbered are bad"):
        list(eval_batches(Numbered(6, bad={5}), batch_size=2))


def test_eval_transforms_are_repeatable():
    def run():
        return list(eval_batches(Shapes(size=16, n=5), [flip(), shift(3)], batch_size=2))

    for a, b in zip(run(), run(), strict=True):
        equal(a, b)


@pytest.mark.parametrize(
    "source, kwargs, words",
    [
        (Numbered(0), {}, "Numbered is empty"),
        (Numbered(9), {"batch_size": 0}, "batch_size must be positive, got 0"),
        (Numbered(9), {"batch_size": 4, "process_count": 3}, "batch_size=4 must be divisible by the 3 processes"),
        (Numbered(9), {"process_index": 2, "process_count": 2}, "process_index=2"),
        (Numbered(3), {}, "3 examples, fewer than one batch of 4"),
        (Numbered(9), {"start_step": -1}, "start_step=-1"),
        (Numbered(9), {"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sizes_are_refused_at_once(source, kwargs, words):
    with pytest.raises(ValueError, match=words):
        train_batches(source, **{"batch_size": 4, **kwargs})


def test_eval_refuses_impossible_sizes_at_once():
    with pytest.raises(ValueError, match="Numbered is empty"):
        eval_batches(Numbered(0), batch_size=4)


def test_pictures_of_several_shapes_name_the_file_and_the_transform(folder):
    (folder / "p06-not.png").unlink()
    with pytest.raises(ValueError, match=r"p\d\d\.png .*p\d\d\.png.*resize_crop") as caught:
        take(train_batches(Folder(folder), batch_size=4), 1)
    assert not any("sparse" in note for note in getattr(caught.value, "__notes__", []))  # Grain's guess, and wrong here


def test_pictures_stay_uint8():
    def scale(example, rng):
        return example | {"image": example["image"] / 255}

    with pytest.raises(ValueError, match="uint8.*float64.*codec"):
        take(train_batches(Numbered(9), [scale], batch_size=4), 1)


def test_keys_must_agree():
    def drop(example, rng):
        return example if example["index"] % 2 else {k: v for k, v in example.items() if k != "label"}

    with pytest.raises(ValueError, match="Numbered example .* keys: label"):
        take(train_batches(Numbered(9), [drop], batch_size=9), 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_signals_to_the_run(number):
    with train_batches(Shapes(size=16, n=64), batch_size=8, workers=1) as batches:
        next(batches)
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, number)
        time.sleep(0.2)
        for _ in range(20):  # more than are there already
            next(batches)
        assert multiprocessing.active_children() == workers
    assert not any(worker.is_alive() for worker in workers)


KILLED = """
import multiprocessing, os, signal
from jaxtok.data.pipeline import train_batches
from jaxtok.data.shapes import Shapes
if __name__ == "__main__":
    batches = train_batches(Shapes(size=16, n=64), batch_size=8, workers=1)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out, timeout=120)
    worker, end = int((tmp_path / "out").read_text()), time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
