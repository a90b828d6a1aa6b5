"""Models over codes: (class, text or nothing) -> indices, one idea a file.

Every generator is a Flax module with two methods. A condition is None or a dict: {"label": int32 [B]}, where label
`classes` is the null class, and, for those that read text, {"text": float [B T D], "text_mask": bool [B T] if padded}.

    loss(indices int32 [B N], condition, *, train=False, step=0) -> objective.Scores
        of every token: its loss, its weight in the mean that is minimised, and whether the guess was right. The
        stream "train" drops conditions and units (if train) and draws masks and orders. `step` is the run's.
    sample(rng, condition, *, tokens=None, guidance=1.0, temperature=1.0, ..., batch=1) -> int32 [B tokens]
        to be jitted: `tokens` and all other options are static. `guidance` is a scale or a schedule of sampling.py; 1.0
        saves the second pass. `batch` says how many where no condition does.
"""
