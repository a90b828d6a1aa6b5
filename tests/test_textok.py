"""TexTok and TA-TiTok as systems: what a text says need not be in the tokens, and nothing of it gets in unseen.

PSNR in dB on held-out shapes of 16 px, whose text is the class of the largest one, by the number of tokens of two
floats, seeds 0 / 1 / 2 (`python -m tests.test_textok 0 1 2`). The control never saw a text, and is judged without one:

    tokens   text                    another picture's text   the control
    1        16.35 / 17.21 / 17.18   15.57 / 15.18 / 15.17    15.49 / 16.20 / 15.99
    8        17.54 / 18.73 / 18.77   16.56 / 16.90 / 17.46    17.54 / 18.64 / 18.32
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok
from configs import ar_flextok, textok, titok
from jaxtok import evaluate, tokenize
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from jaxtok.eval.reconstruction import psnr
from jaxtok.tasks import NO_TEXT, OTHER_TEXT
from tests import fits, runs

BOTH = ("encoder", "decoder")


def shapes(split, n):
    """n pictures, uint8 [n 16 16 3], and for each a text of one word, the class of its largest shape, int32 [n 1]."""
    drawn = fits.shapes(split, n)
    return dict(image=drawn["image"], text=np.int32(1 + drawn["label"])[:, None])


def learn(tokens, dropout=0.0, seed=0, steps=1500):
    """PSNR of held-out pictures with their texts, without, and with another picture's at the decoder.

    dropout 1: the control, which has the same parameters and never saw a text.
    """
    config = textok.get_config("tiny")
    model = titok.titok(16, (64, 1), (64, 1), tokens, channels=2, codes=None, patch=8, low=-1.0, head_dim=32)
    tower = dict(name="encoders.text.TextTransformer", width=32, depth=1, length=1, vocabulary=41)
    config.task = titok.task(textok.reading(model, BOTH, tower, dropout), titok.losses(None))
    config.update(total_steps=steps, batch_size=32, ema=0.95, schedule=dict(peak_lr=1e-3, warmup=50, end=0.01))
    task, variables, _ = fits.fit(config, shapes("train", 4096), seed)
    images, texts = shapes("test", 256).values()

    def quality(read, decoded):
        codes = fits.method(task, "encode")(variables, images, context=read)
        return float(psnr(images, fits.method(task, "decode")(variables, codes, context=decoded)).mean())

    return quality(texts, texts), quality(0 * texts, 0 * texts), quality(texts, np.roll(texts, 1, 0))


@pytest.fixture(scope="module")
def one():
    """What `learn` gives of one token, with text and of the control."""
    return learn(1), learn(1, 1.0)


def test_a_text_gains_where_there_is_one_token(one):
    assert one[0][0] > one[1][1] + 0.3


@pytest.mark.slow
def test_a_text_gains_less_where_there_are_eight(one):
    assert learn(8)[0] - learn(8, 1.0)[1] < one[0][0] - one[1][1] - 0.3


def test_another_pictures_text_costs(one):
    right, _, wrong = one[0]
    assert right > wrong + 0.5


@pytest.fixture(scope="module")
def models():
    """{who reads the text: (a run of a random model's methods, the model)}, and pictures and texts."""
    pixels = jax.random.randint(jax.random.key(0), (4, 16, 16, 3), 0, 255).astype(jnp.uint8)
    texts = jnp.array([[3, 5, 0], [4, 0, 0], [9, 9, 9], [0, 0, 0]])
    made = {}
    for parts in ((), ("decoder",), BOTH):
        model = titok.titok(16, (64, 1), (64, 1), tokens=2, channels=8, codes=None, patch=4, head_dim=32)
        model = build(textok.reading(model, parts, textok.byte_tower(64, length=3)))
        keys = {"params": jax.random.key(1), "train": jax.random.key(2)}
        variables = jax.jit(functools.partial(model.init, train=True))(keys, pixels, context=texts)
        made[parts] = functools.partial(apply, model, variables), model
    return made, pixels, texts


@functools.partial(jax.jit, static_argnames=("model", "train", "method"))
def apply(model, variables, *args, key=0, **options):
    return model.apply(variables, *args, **options, rngs={"train": jax.random.key(key)})


def both_ways(models, parts, texts):
    """(z, pictures) for texts."""
    made, pixels, _ = models
    run = made[parts][0]
    codes = run(pixels, context=texts, method="encode")
    return codes.z, run(codes, context=texts, method="decode")


@pytest.mark.parametrize("parts", [(), ("decoder",), BOTH])
def test_each_end_reads_the_text_or_does_not(models, parts):
    texts = models[2]
    (z, pictures), (other_z, other_pictures) = both_ways(models, parts, texts), both_ways(models, parts, texts[::-1])
    assert (jnp.abs(z - other_z).max() > 1e-3) == ("encoder" in parts)
    assert (jnp.abs(pictures - other_pictures).max() > 1e-3) == bool(parts)  # a decoder that ignores it shows 0


def test_padding_is_read_by_nobody(models):
    """A row of ids that is shorter by its padding gives the same; one more id does not."""
    made, pixels, texts = models
    read = lambda texts: made[BOTH][0](pixels[:2], context=texts, method="encode").z
    padded = read(texts[:2])
    np.testing.assert_allclose(read(texts[:2, :2]), padded, atol=1e-5)
    assert jnp.abs(read(texts[:2].at[:, 2].set(7)) - padded).max() > 1e-3


def test_a_text_of_zeros_is_none_and_so_is_one_that_is_dropped(models):
    made, pixels, texts = models
    run, model = made[BOTH]
    mask = run(texts, method="read")["mask"]
    np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])

    def train_pass(dropout, texts):
        dropping = functools.partial(apply, model.clone(text_dropout=dropout), run.args[1])
        return dropping(pixels, context=texts, train=True)["decoded"].prediction

    np.testing.assert_array_equal(train_pass(1.0, texts), train_pass(1.0, 0 * texts))
    assert jnp.abs(train_pass(0.0, texts) - train_pass(0.0, 0 * texts)).max() > 1e-3
    half = apply(model.clone(text_dropout=0.5), run.args[1], jnp.ones((64, 3), int), train=True, method="read")["mask"]
    assert 0.3 < half.all(1).mean() < 0.7 and (half.all(1) == half.any(1)).all()


# ---- the loop, and who hands no text ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("textok")
    config = textok.get_config("tiny")
    config.total_steps = 4
    return workdir, runs.alone(config, workdir)


def test_a_frozen_tower_needs_weights_and_keeps_them(run, tmp_path):
    config = textok.get_config("tiny")
    config.total_steps, config.task.frozen = 2, ("text_tower",)
    with pytest.raises(ValueError, match="frozen parameters have no weights .text_tower/"):
        runs.alone(config, tmp_path / "without")
    rules = ((r"text_tower/.*", r"\g<0>"), (r".*", None))
    config.init_from = (dict(path=str(run[0]), rules=rules),)
    runs.alone(config, tmp_path / "with")
    kept = Checkpoints(tmp_path / "with" / "frozen").restore_params(which="frozen")["text_tower"]
    jax.tree.map(np.testing.assert_array_equal, kept, Checkpoints(run[0]).restore_params()["text_tower"])
    assert "text_tower" not in Checkpoints(tmp_path / "with").restore_params()


def test_a_tower_that_trains_with_the_run_moves(run):
    state = Checkpoints(run[0])
    before, after = (state.restore_params(step, "params")["text_tower"] for step in (3, 4))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_the_evaluation_has_rows_without_text_and_with_anothers(run, tmp_path, monkeypatch):
    def missing(name):
        raise FileNotFoundError("no extractor here")

    monkeypatch.setattr(evaluate, "extractor", missing)
    metrics = evaluate.evaluate(run[0], tmp_path)
    found = metrics["reconstruction"]["one pass"]["2"]
    assert found["psnr"] == pytest.approx(run[1]["psnr/one pass@2"], rel=1e-4)
    for name in (NO_TEXT, OTHER_TEXT):
        assert metrics["reconstruction"][name]["psnr"] == pytest.approx(run[1][f"psnr/{name}"], rel=1e-4)
        assert metrics["reconstruction"][name]["psnr"] != pytest.approx(found["psnr"], abs=1e-6)


def test_data_without_texts_are_refused(tmp_path):
    config = textok.get_config("tiny")
    config.data.train.transforms = config.data.eval.transforms = ()
    with pytest.raises(ValueError, match="the data bring none: add .*caption_bytes"):
        runs.alone(config, tmp_path)


def test_what_hands_no_text_says_so(run, tmp_path):
    with pytest.raises(ValueError, match="reads the texts of its pictures"):
        jaxtok.load(run[0])
    with pytest.raises(ValueError, match="reads the texts of its pictures"):
        tokenize.tokenize(run[0], tmp_path, batch=8, shard=8)
    generator = ar_flextok.get_config("tiny")
    generator.task.tokenizer = str(run[0])
    with pytest.raises(ValueError, match="reads texts, and a generator hands it none"):
        runs.alone(generator, tmp_path / "generator")


def test_a_model_that_needs_a_text_and_gets_none_says_so(models):
    made, pixels, _ = models
    run, model = made[BOTH]
    with pytest.raises(ValueError, match="needs the texts of its pictures"):
        run(pixels, method="encode")
    with pytest.raises(ValueError, match="Latents reads a text, .* none was given"):
        apply(model.clone(text_tower=None), run.args[1], pixels, method="encode")


def test_published_variants_read_the_text_where_their_papers_do():
    for variant in textok.VARIANTS:
        model = textok.get_config(variant).task.model
        reads = tuple(part for part in BOTH if model[part].get("text", False))
        assert reads == (("decoder",) if variant.startswith("ta_") else BOTH)
        assert (model.text_dropout == 1) == variant.endswith("_off")


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        for count in (1, 8):
            for title, drop in (("text", 0.0), ("none", 1.0)):
                levels = " ".join(f"{level:.2f}" for level in learn(count, drop, number))
                print(f"seed {number}, {count} tokens, {title}: {levels}", flush=True)
