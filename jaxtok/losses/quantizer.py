"""What a quantizer reports about itself, as losses."""


def aux(outputs, batch, *, term):
    """The scalar of that name in `Codes.aux`: "commitment", "codebook", "sample_entropy", "batch_entropy" ...

    Of several streams, codes being a dict, the sum over those that have it. An entropy that should rise, as
    `batch_entropy`, gets a negative weight. Raises ValueError where no quantizer reports the term.
    """
    codes = outputs["codes"]
    streams = list(codes.values()) if isinstance(codes, dict) else [codes]
    found = [stream.aux[term] for stream in streams if term in stream.aux]
    if not found:
        known = sorted({name for stream in streams for name in stream.aux})
        raise ValueError(
            f'The quantizer reports no "{term}", only {", ".join(known) or "nothing"}: drop the loss, or set the field '
            "that switches the term on (entropies need a `temperature`)."
        )
    return sum(found)
