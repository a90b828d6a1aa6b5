"""Quantizers of the 1D family: what ours give for the inputs of each file of goldens/one_d.

Every function takes the arrays of a file and gives (ours, inputs, tolerances). Sizes come from the arrays; weights of
losses that no array tells stand here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.losses.quantizer import aux
from jaxtok.quantizers import perturb, vq
from jaxtok.quantizers.binary import LFQ
from jaxtok.quantizers.ibq import IBQ
from jaxtok.quantizers.post_training import GaussianLevels, gaussian_levels
from jaxtok.quantizers.product import Product
from jaxtok.quantizers.vq import VQ

CLOSE = (1e-5, 1e-5)  # (rtol, atol) of values and losses
GRADIENT = (1e-4, 1e-6)
ENTROPY = (1e-3, 1e-5)  # a temperature of 0.01 makes errors a hundred times as large
BETA, TAU = 0.25, 0.01


def last(x):
    """[B C ...] -> [B N C]."""
    return np.moveaxis(x, 1, -1).reshape(len(x), -1, x.shape[1])


def like(x, golden):
    """[B N C] -> the layout [B C ...] of a golden array."""
    return np.moveaxis(np.asarray(x), -1, 1).reshape(golden.shape)


def close(*names, **others):
    """Tolerances: CLOSE for the names, for others what is given."""
    return dict.fromkeys(names, CLOSE) | others


def weighted(codes, **weights):
    """A sum of aux losses, through the loss that configs name."""
    return sum(weight * aux({"codes": codes}, {}, term=term) for term, weight in weights.items())


def vector(golden, ratio, rotation=False, **fields):
    """LlamaGen's quantizer: losses, and the gradients of the straight-through (or rotated) code and of the losses."""
    table = golden["param/embedding.weight"]
    module = VQ(len(table), rotation=rotation, temperature=TAU, **fields)
    z, weight = last(golden["z"]), last(golden["weight"])
    run = jax.jit(lambda table, z: module.apply({"params": {"codebook": table}}, z, train=True))
    entropy = {"sample_entropy": ratio, "batch_entropy": -ratio}
    codes = run(table, z)
    through = jax.grad(lambda z: (run(table, z).z * weight).sum())(z)
    total = lambda table, z: weighted(run(table, z), codebook=1.0, commitment=BETA, **entropy)
    grad_table, grad_z = jax.grad(total, (0, 1))(table, z)
    ours = {
        "quant": like(codes.z, golden["z"]),
        "indices": codes.indices.reshape(-1),
        "vq_loss": weighted(codes, codebook=1.0),
        "commit_loss": weighted(codes, commitment=BETA),
        "entropy_loss": weighted(codes, **entropy),
        "grad_rot_z" if rotation else "grad_st_z": like(through, golden["z"]),
        "grad_loss_z": like(grad_z, golden["z"]),
    }
    if not rotation:
        ours["grad_loss_codebook"] = grad_table
    tolerances = close("quant", "vq_loss", "commit_loss", entropy_loss=ENTROPY)
    tolerances |= {name: GRADIENT for name in ("grad_rot_z", "grad_st_z")}
    return (
        ours,
        ["z", "weight", "param/embedding.weight"],
        tolerances | dict.fromkeys(("grad_loss_z", "grad_loss_codebook"), ENTROPY),
    )


def vq_plain(golden):
    return vector(golden, 0.1)


def vq_l2(golden):
    return vector(golden, 0.1, normalize="both")


def gigatok(golden):
    return vector(golden, 0.005, rotation=True, normalize="both")


def ibq(golden):
    table = golden["param/embedding.weight"]
    module, z, weight = IBQ(len(table), temperature=TAU), last(golden["z"]), last(golden["weight"])
    run = jax.jit(lambda table, z: module.apply({"params": {"codebook": table}}, z, train=True))
    quant = lambda codes: weighted(codes, joint=1.0, commitment=1.0, codebook=BETA)
    entropy = lambda codes: weighted(codes, sample_entropy=1.0, batch_entropy=-1.0)
    through = jax.grad(lambda table, z: (run(table, z).z * weight).sum(), (0, 1))(table, z)
    total = jax.grad(lambda table, z: quant(run(table, z)) + 0.05 * entropy(run(table, z)), (0, 1))(table, z)
    codes = run(table, z)
    ours = {
        "quant": like(codes.z, golden["z"]),
        "indices": codes.indices.reshape(-1),
        "quant_loss": quant(codes),
        "sample_entropy": codes.aux["sample_entropy"],
        "avg_entropy": codes.aux["batch_entropy"],
        "entropy_loss": entropy(codes),
        "grad_st_codebook": through[0],
        "grad_st_z": like(through[1], golden["z"]),
        "grad_loss_codebook": total[0],
        "grad_loss_z": like(total[1], golden["z"]),
    }
    rough = ("sample_entropy", "avg_entropy", "entropy_loss", "grad_loss_z", "grad_loss_codebook")
    tolerances = close("quant", "quant_loss", grad_st_z=GRADIENT, grad_st_codebook=GRADIENT)
    return ours, ["z", "weight", "param/embedding.weight"], tolerances | dict.fromkeys(rough, ENTROPY)


def lfq(golden, weights=(1.0, 1.0)):
    """Open-MAGVIT2's and, where there are several indices a token, WeTok's quantizer with pooled groups."""
    z, weight = last(golden["z"]), last(golden["weight"])
    groups = len(golden["indices"]) // (z.shape[0] * z.shape[1])
    bits = z.shape[-1] if groups == 1 else (z.shape[-1] // groups,) * groups
    module = LFQ(bits, temperature=TAU, pooled=groups > 1)
    run = jax.jit(lambda z: module.apply({}, z, train=True))
    entropy = lambda codes: weighted(codes, sample_entropy=weights[0], batch_entropy=-weights[1])
    gradient = lambda f: like(jax.grad(lambda z: f(run(z)))(z), golden["z"])
    codes = run(z)
    shape = (*z.shape[:2], groups) if groups > 1 else z.shape[:2]
    ours = {
        "quant": like(codes.z, golden["z"]),
        "indices": codes.indices.reshape(-1),
        "indices_eval": module.apply({}, z).indices.reshape(-1),
        "per_sample_entropy": codes.aux["sample_entropy"],
        "codebook_entropy": codes.aux["batch_entropy"],
        "entropy_aux_loss": entropy(codes),
        "commit_loss": weighted(codes, commitment=1.0),
        "grad_st_z": gradient(lambda codes: (codes.z * weight).sum()),
        "grad_entropy_z": gradient(entropy),
        "grad_commit_z": gradient(lambda codes: weighted(codes, commitment=1.0)),
        "decode_bits": module.apply({}, golden["indices_eval"].reshape(shape), method="lookup"),
    }
    tolerances = close("quant", "commit_loss", "decode_bits", grad_st_z=GRADIENT, grad_commit_z=GRADIENT)
    tolerances |= dict.fromkeys(("per_sample_entropy", "codebook_entropy", "entropy_aux_loss"), ENTROPY)
    return ours, ["z", "weight"], tolerances | {"grad_entropy_z": (1e-3, 2e-5)}


def lfq_weights(golden):
    return lfq(golden, weights=(0.5, 2.0))


def lfq_asymmetric(golden):
    return bit_groups(golden, tuple(int(n) for n in golden["bits"]), ("indices_pre", "indices_post"), ["z", "bits"])


def gfq(golden):
    names = [name for name in golden if name.startswith("indices_")]
    return bit_groups(golden, (golden["z"].shape[1] // len(names),) * len(names), sorted(names), ["z"])


def bit_groups(golden, bits, names, inputs):
    """One index a group of bits."""
    codes = LFQ(bits).apply({}, last(golden["z"]))
    ours = {name: codes.indices[..., g].reshape(-1) for g, name in enumerate(names)}
    return ours | {"quant": like(codes.z, golden["z"])}, inputs, close("quant")


def clustering(golden):
    """TA-TiTok's codebook: the losses come before the update, which is written past the optimizer."""
    table, z = golden["embedding_before"], last(golden["z"])
    module, count = VQ(len(table), clustering=True), z.shape[0] * z.shape[1]
    state = {"offset": jnp.zeros(table.shape), "count": golden["embed_prob_before"] * count}
    variables = {"params": {"codebook": table}, "codebook": state}
    codes, after = module.apply(variables, z, train=True, mutable=["codebook"])
    ours = {
        "z_quantized": like(codes.z, golden["z"]),
        "indices": codes.indices.reshape(golden["indices"].shape),
        "quantizer_loss": weighted(codes, codebook=1.0, commitment=BETA),
        "embedding_after": table + after["codebook"]["offset"],
        "embed_prob_after": after["codebook"]["count"] / count,
    }
    floats = [name for name in ours if name != "indices"]
    return ours, ["z", "embedding_before", "embed_prob_before"], close(*floats)


def omnitokenizer(golden):
    """A moving-average codebook; latents are scaled to length 1, codes are not."""
    z, names = last(golden["z"]), {"codes": "embeddings", "count": "N", "sum": "z_avg"}
    module = VQ(len(golden["N_before"]), normalize="latents", ema=0.99)
    state = {ours: golden[f"{theirs}_before"] for ours, theirs in names.items()}
    codes, after = module.apply({"codebook": state}, z, train=True, mutable=["codebook"])
    ours = {
        "embeddings_st": like(codes.z, golden["z"]),
        "encodings": codes.indices.reshape(golden["encodings"].shape),
        "commitment_loss": weighted(codes, commitment=BETA),
        "perplexity": codebook_usage(codes.indices),
    }
    ours |= {f"{theirs}_after": after["codebook"][name] for name, theirs in names.items()}
    inputs = ["z", *(f"{theirs}_before" for theirs in names.values())]
    return ours, inputs, close(*(name for name in ours if name != "encodings"))


def fqgan(golden):
    """FQGAN's two books on two streams, joined in the order (visual, semantic)."""
    names = {"vis": "visual", "sem": "semantic"}
    tables = {short: golden[f"param/quantize_{short}.embedding.weight"] for short in names}
    book = {name: VQ(len(tables[short]), normalize="both", temperature=TAU) for short, name in names.items()}
    module = Product(books=book)
    params = {"params": {f"books_{name}": {"codebook": tables[short]} for short, name in names.items()}}
    streams = {name: last(golden[f"h_{short}"]) for short, name in names.items()}
    run = jax.jit(lambda streams: module.apply(params, streams, train=True))
    entropy = {"sample_entropy": 0.03, "batch_entropy": -0.03}
    total = lambda streams: weighted(run(streams), codebook=1.0, commitment=BETA, overlap=0.1, **entropy)
    gradients, codes = jax.grad(total)(streams), run(streams)
    ours = {"concat": like(codes.z, golden["concat"]), "disentangle_loss": weighted(codes, overlap=0.1)}
    for g, (short, name) in enumerate(names.items()):
        alone = book[name].apply({"params": {"codebook": tables[short]}}, streams[name], train=True)
        ours |= {
            f"quant_{short}": like(jnp.split(codes.z, 2, -1)[g], golden[f"h_{short}"]),
            f"indices_{short}": codes.indices[..., g].reshape(-1),
            f"vq_{short}": weighted(alone, codebook=1.0),
            f"commit_{short}": weighted(alone, commitment=BETA),
            f"entropy_{short}": weighted(alone, **entropy),
            f"grad_h_{short}": like(gradients[name], golden[f"h_{short}"]),
        }
    rough = [name for name in ours if name.startswith(("entropy", "grad"))]
    floats = [name for name in ours if not name.startswith(("entropy", "grad", "indices"))]
    inputs = [name for name in golden if name.startswith(("h_", "param/"))]
    return ours, inputs, close(*floats) | dict.fromkeys(rough, ENTROPY)


def tokenbridge(golden):
    latent, levels = golden["latent"], len(golden["reconstruction_values"])
    bits = levels.bit_length() - 1
    module = GaussianLevels(channels=latent.shape[-1], bits=bits)
    codes = module.apply({}, latent)
    ours = {
        "indices": codes.indices,
        "dequant": module.apply({}, golden["indices"], method="lookup"),
        "reconstruction_values": gaussian_levels(bits),
    }
    return ours, ["latent"], close("dequant", "reconstruction_values")


def robusttok_perturbation(golden):
    """Of the first int(B beta) pictures, the codes nearest to the latents, at the ranks and draws of the file."""
    table, z = (l2(x) for x in (golden["codebook"], last(golden["z"])))
    delta, share = int(golden["delta"]), int(len(z) * float(golden["beta"]))
    rows = z.reshape(-1, z.shape[-1])
    ranked = perturb.codebook.neighbours(rows, table, delta)
    given = [golden[name] for name in ("rand_prob", "rand_rank")]
    count = share * z.shape[1]
    given = [x[:count] for x in given]
    new = perturb.replace(ranked[:count, 0], ranked[:count], *given, float(golden["alpha"]))
    out = last(golden["z_q"]).reshape(rows.shape).copy()
    out[:count] = table[new]
    return (
        {"out": like(out.reshape(z.shape), golden["out"]), "nearest": ranked[:, 0]},
        ["z", "z_q", "codebook", "rand_prob", "rand_rank", "alpha", "beta", "delta"],
        close("out"),
    )


def robusttok_anneal(golden):
    ratio = perturb.anneal(golden["epoch"], 40, 120, 0.5)
    ours = {"ratio": ratio, "delta": np.floor(ratio * 100), "alpha": ratio}
    return ours, ["epoch"], close("ratio", "alpha")


def l2(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def codebook_usage(indices):
    return vq.codebook.usage(indices)[0]


def titok(golden, **fields):
    """The quantizer inside a TiTok: what its indices stand for; the rest from its latents, where the file has them."""
    table = golden["param/quantize.embedding.weight"]
    module, indices = VQ(len(table), **fields), golden["indices"].reshape(len(golden["indices"]), -1)
    run = lambda z: module.apply({"params": {"codebook": table}}, z, train=True)
    found = module.apply({"params": {"codebook": table}}, indices, method="lookup")
    ours, inputs = {"z_quantized": like(found, golden["z_quantized"])}, ["param/quantize.embedding.weight"]
    if "z" in golden:
        z, inputs = last(golden["z"]), [*inputs, "z"]
        total = lambda codes: weighted(codes, codebook=1.0, commitment=BETA)
        codes = run(z)
        ours |= {
            "indices": codes.indices.reshape(golden["indices"].shape),
            "commitment_loss": weighted(codes, commitment=BETA),
            "codebook_loss": weighted(codes, codebook=1.0),
            "quantizer_loss": total(codes),
        }
        if "grad_qloss_z" in golden:
            ours["grad_qloss_z"] = like(jax.grad(lambda z: total(run(z)))(z), golden["z"])
    else:
        inputs = [*inputs, "indices"]
    return ours, inputs, close(*(name for name in ours if name != "indices"), grad_qloss_z=GRADIENT)


def titok_l2(golden):
    return titok(golden, normalize="both")


def llamagen(golden):
    """The quantizer inside LlamaGen's autoencoder, from its latents."""
    table = golden["param/quantize.embedding.weight"]
    named = {"z": golden["h"], "weight": golden["h"], "param/embedding.weight": table}
    ours, _, tolerances = vector(named, 0.1, normalize="both")
    del ours["grad_st_z"]
    renamed = {"grad_loss_z": "grad_h", "grad_loss_codebook": "grad_codebook"}
    ours = {renamed.get(name, name): value for name, value in ours.items()}
    tolerances |= {new: tolerances[old] for old, new in renamed.items()}
    return ours, ["h", "param/quantize.embedding.weight"], tolerances


FILES = {
    "vq_plain": vq_plain,
    "vq_l2": vq_l2,
    "gigatok_vq_rotation": gigatok,
    "ibq": ibq,
    "lfq": lfq,
    "lfq_groups": lfq,
    "lfq_weights": lfq_weights,
    "lfq_asymmetric": lfq_asymmetric,
    "gfq_factorized": gfq,
    "clustering_vq_step": clustering,
    "omnitokenizer_codebook": omnitokenizer,
    "fqgan_dual_quant": fqgan,
    "tokenbridge": tokenbridge,
    "robusttok_perturbation": robusttok_perturbation,
    "robusttok_anneal": robusttok_anneal,
    "tatitok_vq": titok,
    "titok_rgb_vq": titok,
    "titok_stage1_legacy": titok_l2,
    "titok_stage2_legacy": titok_l2,
    "onedpiece_tail_drop": titok_l2,
    "llamagen_vq": llamagen,
}
