"""Samples of a generator as a picture: python -m jaxtok.generate --checkpoint=runs/ar --labels=all --out=samples.png"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import jaxtok
from jaxtok import command, sharding
from jaxtok.build import build, nearest
from jaxtok.eval import pictures


@command.one_line("python -m jaxtok.generate")
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m jaxtok.generate",
        description="Draws codes from a generator, decodes them, and writes a grid: a column a class.",
        epilog="example: python -m jaxtok.generate --checkpoint=runs/ar --labels='Flags,Food & Drink' --tokens=16 "
        "--guidance=1.5 --seed=0 --out=samples.png",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="workdir of a run of a generator, such as configs/ar_flextok.py")
    add("--labels", help="names or numbers of classes with commas between, or all; none: unconditional samples")
    add("--samples", type=int, default=8, help="of each class (default: 8)")
    add("--batch", type=int, default=32, help="how many are drawn at a time (default: 32)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("samples.png"), help="the grid (default: samples.png)")
    add("--codes", type=Path, help="also write codes and labels there, a NumPy .npz")
    for name, kind, what in (
        ("tokens", int, "how many tokens a sample has (default: all)"),
        ("guidance", float, "scale of classifier-free guidance, 1 for none"),
        ("temperature", float, "of what is drawn from, 0 for the likeliest"),
        ("top_k", int, "draw among the k likeliest"),
        ("top_p", float, "draw among the likeliest that have this mass"),
        ("steps", int, "of a masked or a flow model"),
    ):
        add(f"--{name}", type=kind, help=what)
    add(
        "--decode",
        nargs="*",
        default=(),
        metavar="KEY=VALUE",
        help="options of the tokenizer's decoder, such as steps=20 guidance=7.5, over those of the run's config",
    )
    arguments = parser.parse_args(argv)
    for path in filter(None, (arguments.out, arguments.codes)):
        path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before anything is drawn
    names, labels, images = generate(arguments)
    columns = {name: images[labels == label] for label, name in names.items()}
    pictures.grid(columns, arguments.out)
    print(f"{len(images)} samples: {arguments.out}" + (f", codes: {arguments.codes}" if arguments.codes else ""))


def generate(arguments):
    """({label: name}, labels int [N], pictures uint8 [N H W 3]) of what the command asks for."""
    if min(arguments.samples, arguments.batch) < 1 or arguments.seed < 0:
        raise ValueError("--samples and --batch are at least 1, and --seed 0.")
    with jax.set_mesh(sharding.make_mesh()):
        generator = jaxtok.load(arguments.checkpoint)
    if not hasattr(generator, "sample"):
        raise ValueError(
            f"{arguments.checkpoint} is a tokenizer: train a generator on its codes (configs/ar_flextok.py)."
        )
    names = {-1: "samples"} if arguments.labels is None else classes(arguments)
    labels = np.repeat(np.array(list(names), np.int32), arguments.samples)
    options = {k: getattr(arguments, k) for k in ("tokens", "guidance", "temperature", "top_k", "top_p", "steps")}
    options = {k: v for k, v in options.items() if v is not None}
    decoder = dict(map(command.pair, arguments.decode))
    rows, images, size = [], [], arguments.batch
    for start in tqdm(range(0, len(labels), size), unit="batch", disable=None):
        given = labels[start : start + size]
        padded = np.pad(given, (0, size - len(given)), mode="edge")  # one program for all batches
        condition = dict(batch=size) if arguments.labels is None else dict(labels=padded)
        seed = int(np.random.SeedSequence((arguments.seed, start)).generate_state(1)[0])  # no two runs share a batch
        codes = generator.sample(**condition, seed=seed, **options)
        images.append(np.asarray(generator.decode(codes, seed=seed, **decoder))[: len(given)])
        rows.append(np.asarray(codes)[: len(given)])
    if arguments.codes:
        np.savez(arguments.codes, codes=np.concatenate(rows), labels=labels)
    return names, labels, np.concatenate(images)


def classes(arguments):
    """{label: name} of the classes asked for, in that order. The names are those of the run's data."""
    source = json.loads((Path(arguments.checkpoint) / "config.json").read_text())["data"]["eval"]["source"]
    try:
        known = build(source).class_names
    except FileNotFoundError:  # the data may be elsewhere: numbers need none
        known = ()
    if arguments.labels == "all":
        if not known:
            raise FileNotFoundError("--labels=all needs the run's data, which is not here: give numbers of classes.")
        return dict(enumerate(known))
    chosen = {}
    for text in arguments.labels.split(","):
        text = text.strip()
        if text in known:
            chosen[known.index(text)] = text
        elif text.isdigit():
            chosen[int(text)] = known[int(text)] if int(text) < len(known) else text
        else:
            raise ValueError(f'--labels: there is no class "{text}".{nearest(text, known)} {", ".join(known)}'.rstrip())
    return chosen


if __name__ == "__main__":
    main()
