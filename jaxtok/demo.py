"""A page to play with a tokenizer: python -m jaxtok.demo --checkpoint=runs/flextok --generator=runs/ar

A picture, a slider over the number of tokens, and what they give. It is served to this machine alone (--host opens it),
asks nothing of any other, and reports nothing.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

import jaxtok
from jaxtok import command, hub
from jaxtok.bound import BoundTokenizer, check_sampler, paint
from jaxtok.build import build
from jaxtok.data import pipeline
from jaxtok.data.images import BadRecord, decode_image
from jaxtok.eval.reconstruction import psnr
from jaxtok.eval.usage import bits_of
from jaxtok.step import transforms
from jaxtok.tasks import GeneratorTask
from jaxtok.tokenizer import Tokenizer

SIDE = 320  # pixels: a small picture is drawn at least so large, its own pixels as squares
SAMPLES = 8  # of a class at a time
# Of what follows a slider: what it passes over need not be drawn.
MOVED = dict(trigger_mode="always_last", show_progress="hidden", api_visibility="private")


class View(NamedTuple):
    """A tokenizer as the page uses it. Both programs are compiled once, whatever the number of tokens."""

    encode: Callable  # uint8 [B H W 3] -> Codes
    decode: Callable  # (Codes, k, key, options=pairs) -> uint8 [B H W 3]
    shape: tuple[int, int, int]  # of a picture
    tokens: int
    bits: float | None  # of a token; None: continuous
    samplers: Mapping[str, tuple]  # title -> options of the decoder's `sample`, as pairs
    shortens: bool  # whether it was trained on fewer tokens too
    held_out: Callable | None  # () -> (uint8 [H W 3], caption), any held-out picture; None where the data are not here
    credit: str  # whose pictures these are, where that must be said


class Drawer(NamedTuple):
    """A generator as the page uses it."""

    draw: Callable  # (class, seed) -> Codes of SAMPLES samples
    decode: Callable  # (Codes, k, key) -> uint8 [SAMPLES H W 3]
    tokens: int
    classes: tuple[str, ...]  # names, or numbers where the data are not here; none: unconditional


# ---- what the page does, without the page ----


def open_tokenizer(checkpoint) -> View:
    """The tokenizer in a workdir, and the held-out pictures of its run.

    FileNotFoundError or ValueError say what is wrong with the workdir.
    """
    tokenizer, spec = load(checkpoint)
    if not isinstance(tokenizer, BoundTokenizer):
        raise ValueError(f"{checkpoint} is a generator: give it as --generator, and a tokenizer as --checkpoint.")
    model, (held_out, credit) = tokenizer.model, pictures(spec.get("data"))
    shape = tokenizer.picture or (held_out()[0].shape if held_out else (256, 256, 3))
    encode = jax.jit(functools.partial(model.apply, tokenizer.variables, method="encode"))
    samplers = spec["task"].get("samplers") or [{"title": "default"}]
    return View(
        encode=encode,
        decode=decoder(model, tokenizer.variables),
        shape=shape,
        tokens=jax.eval_shape(encode, jax.ShapeDtypeStruct((1, *shape), jnp.uint8)).keep.shape[1],
        bits=bits_of(tokenizer.vocabulary),
        samplers={sampler["title"]: options_of(model.decoder, sampler) for sampler in samplers},
        shortens=model.nested_dropout is not None,
        held_out=held_out,
        credit=credit,
    )


def open_generator(checkpoint) -> Drawer:
    """The generator in a workdir. FileNotFoundError or ValueError say what is wrong with the workdir."""
    generator, spec = load(checkpoint)
    if isinstance(generator, BoundTokenizer):
        raise ValueError(f"{checkpoint} is a tokenizer: give it as --checkpoint, and a generator as --generator.")
    task: GeneratorTask = generator.task
    if task.text_tower is not None or getattr(task.model, "vocabulary", None) is None:
        raise ValueError(f"{checkpoint} reads texts or draws no codes; this page draws codes of a class, or of none.")
    variables, classes = generator.variables["tokenizer"], getattr(task.model, "classes", 0)
    # Drawn with all tokens and shown with the first k of them: these would be the sample of k, at no new program.
    options = {k: v for k, v in (task.samplers[-1] if task.samplers else {}).items() if k not in ("title", "tokens")}

    def draw(label, seed):
        condition = dict(labels=np.full(SAMPLES, label)) if classes else dict(batch=SAMPLES)
        codes = generator.sample(**condition, seed=seed, **options)
        return jax.device_get(task.lookup(variables, codes))

    decode = functools.partial(decoder(task.codec, variables), options=options_of(task.codec.decoder, task.decoder))
    return Drawer(draw, decode, task.model.length, class_names(spec, classes))


def load(checkpoint) -> tuple[Any, dict]:
    """(The model of a workdir, its config)."""
    path = hub.workdir(checkpoint)
    return jaxtok.load(path), json.loads((path / "config.json").read_text())


def decoder(model: Tokenizer, variables) -> Callable:
    """(Codes, k, key, options=pairs) -> uint8 [B H W 3], what the first k of their tokens give."""
    return functools.partial(jax.jit(functools.partial(paint, model), static_argnames="options"), variables)


def options_of(part, sampler) -> tuple:
    """A sampler of a config as pairs, which jit can hash."""
    options = {name: value for name, value in sampler.items() if name != "title"}
    check_sampler(part, options)
    return tuple(sorted(options.items()))


def pictures(data) -> tuple[Callable | None, str]:
    """(Function that gives any held-out picture of a config's data and its caption, whom to credit), or (None, "")."""
    try:
        source = build(data["eval"]["source"]) if data else None
    except (FileNotFoundError, ModuleNotFoundError) as error:
        print(f"No held-out pictures: {error}")
        source = None
    if source is None:
        return None, ""
    change, rng = transforms(data["eval"]), np.random.default_rng()

    def held_out():
        example, _ = pipeline.next_good(source, int(rng.integers(len(source))), len(source), 1.0)
        return pipeline.augment(example, change, (0,))["image"], example.get("caption", "")

    return held_out, getattr(source, "attribution", "")


def class_names(spec, classes) -> tuple[str, ...]:
    try:
        return tuple(build(spec["data"]["eval"]["source"]).class_names)[:classes]
    except (FileNotFoundError, ModuleNotFoundError):
        return tuple(map(str, range(classes)))


def fit(file, shape) -> np.ndarray:
    """A file as the tokenizer wants it, uint8 [H W 3]: its middle, resized. BadRecord says why it cannot be read."""
    height, width, _ = shape
    picture = Image.fromarray(decode_image(file, os.path.basename(file)))
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR))


def rebuild(view: View, picture, codes, k, title) -> tuple[np.ndarray, str]:
    """What the first k tokens of a picture give, uint8 [H W 3], and a line of numbers."""
    made = np.asarray(view.decode(codes, k, jax.random.key(0), options=view.samplers[title]))[0]
    near = float(psnr(picture[None], made[None])[0])
    size = "continuous" if view.bits is None else f"{k * view.bits:.1f} bits, {k * view.bits / 8:.1f} bytes"
    return made, f"**{k} of {view.tokens} tokens · {size} · PSNR {near:.2f} dB**"


def large(picture) -> np.ndarray:
    """A picture whose pixels are squares, at least SIDE pixels high: browsers blur what they enlarge."""
    scale = -(-SIDE // picture.shape[0])
    return picture.repeat(scale, 0).repeat(scale, 1)


# ---- the page ----


def page(view: View, drawer: Drawer | None = None, title="jaxtok"):
    """The page, a gradio.Blocks: `launch` serves it."""
    gr = gradio()
    image = functools.partial(gr.Image, show_label=False, format="png", interactive=False, buttons=[])

    def take(picture, caption, k, sampler):
        state = picture, jax.device_get(view.encode(picture[None]))
        return state, large(picture), caption, *slide(state, k, sampler)

    def slide(state, k, sampler):
        if state is None:
            return gr.skip(), gr.skip()
        made, line = rebuild(view, *state, int(k), sampler)
        return large(made), line

    def upload(file, k, sampler):
        try:
            return None, *take(fit(file, view.shape), os.path.basename(file), k, sampler)
        except BadRecord as error:
            gr.Warning(str(error), title="That is no picture")
            return None, *[gr.skip()] * 5  # None: ready for the next file

    def example(k, sampler):
        return take(*view.held_out(), k, sampler)

    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nA picture as a row of tokens: move the slider, and see what the first of them say.")
        state = gr.State()
        with gr.Row():
            with gr.Column(min_width=200):
                gr.Markdown("**A picture of yours**, or a held-out one")
                dropped = gr.File(show_label=False, file_types=["image"], height=200)  # gr.Image decodes, less readably
                another = gr.Button("A held-out picture", visible=view.held_out is not None)
            with gr.Column(min_width=200):
                gr.Markdown(f"**What goes in**, {view.shape[1]} x {view.shape[0]} pixels")
                seen = image(elem_id="seen")
                caption = gr.Markdown(elem_id="caption")
            with gr.Column(min_width=200):
                gr.Markdown("**What the tokens give**")
                made = image(elem_id="made")
                numbers = gr.Markdown(elem_id="numbers")
        tokens = gr.Slider(1, view.tokens, view.tokens, step=1, label="Tokens", elem_id="tokens")
        if not view.shortens:
            gr.Markdown("This tokenizer was trained with all of its tokens: it was never asked for less.")
        titles = list(view.samplers)
        sampler = gr.Radio(titles, value=titles[0], label="Decoder", visible=len(titles) > 1)
        if drawer is not None:
            generator_part(gr, drawer, image)
        gr.Markdown(view.credit)
        asked, given = [tokens, sampler], [made, numbers]
        shown = [state, seen, caption, *given]
        dropped.upload(upload, [dropped, *asked], [dropped, *shown], api_visibility="private")
        another.click(example, asked, shown, api_visibility="private")
        for part in asked:
            part.change(slide, [state, *asked], given, **MOVED)
        if view.held_out is not None:
            blocks.load(example, asked, shown, api_visibility="private")
    return blocks


def generator_part(gr, drawer, image):
    """The part of the page that samples a class."""

    def draw(label, seed, k):
        codes = drawer.draw(int(label or 0), int(seed))
        return codes, seed + 1, slide(codes, k)

    def slide(codes, k):
        if codes is None:
            return gr.skip()
        return large(np.concatenate(list(drawer.decode(codes, int(k), jax.random.key(0))), 1))

    gr.Markdown(f"## Samples\n{SAMPLES} at a time, drawn token by token, none chosen.")
    codes, seed = gr.State(), gr.State(0)
    with gr.Row():
        names = [(name, i) for i, name in enumerate(drawer.classes)]
        label = gr.Dropdown(names, value=0 if names else None, label="Class", visible=bool(names), elem_id="class")
        tokens = gr.Slider(1, drawer.tokens, drawer.tokens, step=1, label="Tokens of a sample", elem_id="drawn")
        button = gr.Button("Sample")
    drawn = image(elem_id="samples")
    button.click(draw, [label, seed, tokens], [codes, seed, drawn], api_visibility="private")
    tokens.change(slide, [codes, tokens], drawn, **MOVED)


def gradio():
    """The library, told before it is imported that it reports nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    try:
        import gradio
    except ImportError:
        raise ModuleNotFoundError('The page needs Gradio: pip install "jaxtok[demo-page]".') from None
    return gradio


@command.one_line("python -m jaxtok.demo")
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m jaxtok.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="workdir of a tokenizer, a run's or a converted one")
    add("--generator", help="workdir of a generator, such as configs/ar_flextok.py: samples of a class")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the page to other machines (default: this one alone)")
    add("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args(argv)
    gradio()
    view = open_tokenizer(arguments.checkpoint)
    drawer = arguments.generator and open_generator(arguments.generator)
    title = f"jaxtok: {os.path.basename(os.path.normpath(arguments.checkpoint))}"
    launch(page(view, drawer or None, title), server_name=arguments.host, server_port=arguments.port)


def launch(blocks, **options):
    """Serves the page: no link from outside, no server-side rendering, which needs Node.js."""
    fixed = dict(share=False, ssr_mode=False, show_error=True, footer_links=[])
    return blocks.queue(api_open=False).launch(**fixed, **options)


if __name__ == "__main__":
    main()
