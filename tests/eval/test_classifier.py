import numpy as np

from jaxtok.data.transforms import flip
from jaxtok.eval.classifier import accuracy, train_classifier


def test_it_learns_what_is_to_be_seen_and_samples_are_judged_by_it():
    """Bright and dark noise: 1.00 held out with three seeds, and labels exchanged give the rest."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    images = np.clip(rng.normal(90 + 60 * labels[:, None, None, None], 40, (200, 16, 16, 3)), 0, 255).astype(np.uint8)
    source = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    apply, params, scores = train_classifier(source, (flip(),), 2, steps=25, batch_size=16)
    assert scores["accuracy"] > 0.9 and scores["balanced"] > 0.9
    assert apply(params, images[:3]).shape == (3, 2)
    found = accuracy(apply, params, images[:70], labels[:70])
    swapped = accuracy(apply, params, images[:70], 1 - labels[:70])
    assert found["accuracy"] > 0.9 and np.isclose(swapped["accuracy"], 1 - found["accuracy"])
