"""jaxtok: visual tokenizers in JAX, each a composition of a few parts and one config."""

__version__ = "0.1.0"


def load(source, kind="flextok"):
    """A pretrained tokenizer, ready for use: load("EPFL-VILAB/flextok_d18_d28_dfn").encode(images) -> codes.

    Args:
      source: a workdir of python -m jaxtok.train or jaxtok.pretrained.convert, a folder or file as published, or the id
        of a repository on the hub.
      kind: of a source that is published, whose it is: a module of `jaxtok.pretrained`.

    Returns a `jaxtok.bound.BoundTokenizer`. On the mesh that jax.set_mesh has set, if any, else on the default device.

    FileNotFoundError says where weights may come from, ValueError what is wrong with those there.
    """
    from jaxtok import hub

    return hub.load(source, kind)
