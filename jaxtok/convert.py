"""Published weights into a workdir of ours: python -m jaxtok.pretrained.convert SOURCE --out=runs/d12

The workdir is one that jaxtok.load and a config's `init_from` take: the model's spec in config.json, the parameters in
checkpoints/0. Reading it needs neither the hub nor the conversion again.
"""

import argparse

from ml_collections import ConfigDict

from jaxtok import command, hub
from jaxtok.checkpoint import Checkpoints, claim_workdir


@command.one_line("python -m jaxtok.pretrained.convert")
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m jaxtok.pretrained.convert",
        description="Writes published weights into a workdir that jaxtok.load and a config's init_from take.",
        epilog="example: python -m jaxtok.pretrained.convert vgg --kind=perceptual --out=runs/lpips_vgg",
    )
    parser.add_argument("source", help="a repository's id, or a folder or file as published; for perceptual, a net")
    parser.add_argument("--out", required=True, help="the workdir, which must be new")
    parser.add_argument("--kind", default="flextok", help="whose weights they are: a module of jaxtok.pretrained")
    arguments = parser.parse_args(argv)
    checkpoints = Checkpoints(arguments.out)
    if steps := checkpoints.steps():
        raise ValueError(f"{arguments.out} has checkpoints already, of steps {steps}: give --out a new workdir.")
    path = arguments.source if hasattr(hub.table_of(arguments.kind), "read") else hub.find(arguments.source)
    converted = hub.convert(path, arguments.kind, host=True)
    source = dict(name=arguments.source, kind=arguments.kind, licence=converted.licence)
    claim_workdir(arguments.out, ConfigDict(converted.config | dict(source=source)))
    checkpoints.save(0, {"ema": converted.variables["params"]})
    checkpoints.close()
    aside = sum(map(len, converted.report.set_aside.values()))
    used = converted.keys - len(converted.report.unused) - aside
    print(f"{used} of {converted.keys} keys of {arguments.source} are in {arguments.out} now.")
    if str(converted.report):
        print(converted.report)
    print(converted.licence)


if __name__ == "__main__":
    main()
