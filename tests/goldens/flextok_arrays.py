"""What our FlexTok computes for each array of a golden folder, by the golden's name.

The reference is channels-first; here arrays are turned on the way in and out.
"""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.codecs.identity import Identity
from jaxtok.decoders.flow import GUIDANCE, FlowDecoder
from jaxtok.encoders.latent1d import Latent1D
from jaxtok.losses.flow import flow_matching
from jaxtok.nn import flow
from jaxtok.nn.masks import keep_prefix, prefix_causal
from jaxtok.nn.position import sincos_2d, timestep_embedding
from jaxtok.pretrained.convert import flatten, match
from jaxtok.pretrained.flextok import RULES
from jaxtok.quantizers.fsq import FSQ, bound, digits_to_indices
from jaxtok.tokenizer import Tokenizer


def _named(module, method):
    """What Flax captures besides what the model sows: the outputs of these submodules."""
    return method == "__call__" and module.name in ("code_embed", "patch_embed", "time")


SEE_INSIDE = {"capture_intermediates": _named, "mutable": ["intermediates"]}


class KeepGiven(nn.Module):
    """Nested dropout at given lengths."""

    k: tuple[int, ...]

    def __call__(self, codes, *, train=False):
        return codes.replace(keep=keep_prefix(jnp.array(self.k), codes.keep.shape[1]))


def last(x):
    """[... C H W] -> [... H W C]."""
    return np.moveaxis(x, -3, -1)


def first(x):
    """[... H W C] -> [... C H W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def tokenizer(model, hw, keep=None, plain=False) -> Tokenizer:
    """The model of a folder's config on latents of size hw.

    keep: tokens kept of each sample in the training pass. plain: without shortcuts, computing what nothing reads too.
    """
    trunk = {"patch": model["patch"], "head_dim": model["head_dim"]} | ({"shortcuts": ()} if plain else {})
    encoder = Latent1D(
        width=model["enc_dim"],
        depth=model["enc_depth"],
        registers=model["n_reg"],
        channels=len(model["levels"]),
        **trunk,
    )
    decoder = FlowDecoder(
        width=model["dec_dim"],
        depth=model["dec_depth"],
        registers=model["n_reg"],
        shape=(*hw, model["ch"]),
        max_timestep=model["max_timestep"],
        **trunk,
    )
    nested = None if keep is None else KeepGiven(tuple(int(k) for k in keep))
    return Tokenizer(Identity(), encoder, FSQ(tuple(model["levels"])), decoder, nested)


def shapes(model, hw) -> dict:
    """The parameter tree of that model, as shapes."""
    module, x = tokenizer(model, hw), jnp.zeros((1, *hw, model["ch"]))
    init = partial(module.init, jax.random.key(0), time=jnp.zeros(1), noise=x)
    return jax.eval_shape(init, x)["params"]


def forward(config, params, golden) -> dict:
    """forward.npz: one encoding, and the velocity with all intermediates.

    What is inside comes from the plain form, which computes all of it; what comes out, from the form that is used.
    """
    model, ks = config["model"], config["run"]["keep"]
    latents, noise, t = last(golden["latents"]), last(golden["noise"]), golden["t"]
    module, plain = (tokenizer(model, latents.shape[1:3], plain=plain) for plain in (False, True))
    patches = (latents.shape[1] // model["patch"], latents.shape[2] // model["patch"])
    count = patches[0] * patches[1]

    @jax.jit
    def encode(x):
        _, state = plain.encoder.apply({"params": params["encoder"]}, x, **SEE_INSIDE)
        z = module.encoder.apply({"params": params["encoder"]}, x)
        return z, module.quantizer.apply({}, z), state["intermediates"]

    @jax.jit
    def velocity(x_t, codes, null):
        arguments = {"params": params["decoder"]}, x_t, t, codes, null
        _, state = plain.decoder.apply(*arguments, method="velocity", **SEE_INSIDE)
        return module.decoder.apply(*arguments, method="velocity"), state

    z, codes, state = encode(latents)
    sequence = state["sequence"][0]
    ours = {
        "enc_patches_proj": _grid(state["patch_embed"]["__call__"][0], patches),
        "enc_patches_posemb": _grid(sequence[:, :count], patches),
        "enc_seq_in": sequence,
        "enc_mask_sample0": prefix_causal(count, sequence.shape[1]),
        "enc_seq_after_block": state["blocks"]["out"][0],
        "enc_prequant": z,
        "fsq_bounded": bound(z, model["levels"]),
        "fsq_codes": codes.z,
        "fsq_indices": codes.indices,
    }
    x_t = flow.interpolate(latents, noise, t)
    ours["x_t"] = first(x_t)
    none, every = np.zeros(len(t), bool), np.ones(len(t), bool)
    for k in {*ks, *(int(m[1]) for name in golden if (m := re.fullmatch(r"velocity_k(\d+)", name)))}:
        kept = codes.replace(keep=keep_prefix(np.full(len(t), k), model["n_reg"]))
        v, state = velocity(x_t, kept, none)
        ours[f"velocity_k{k}"] = first(v)
        if k == ks[1]:
            sequence = state["intermediates"]["sequence"][0]
            ours |= {
                "dec_regs_proj": state["intermediates"]["code_embed"]["__call__"][0],
                "dec_regs_masked": sequence[:, count:],
                "dec_patches_posemb": _grid(sequence[:, :count], patches),
                "dec_seq_in": sequence,
                "dec_temb": state["intermediates"]["time"]["__call__"][0],
                "dec_temb_freq": timestep_embedding(jnp.asarray(t), max_timestep=model["max_timestep"]),
                "dec_seq_after_block": state["intermediates"]["blocks"]["out"][0],
            }
    _, state = velocity(x_t, codes, none)  # all tokens kept: nothing is overwritten
    ours["dec_regs_posemb"] = state["intermediates"]["sequence"][0][:, count:]
    ours["velocity_uncond"] = first(velocity(x_t, codes, every)[0])
    return ours


def sampling(config, params, golden) -> dict:
    """sampling.npz: Euler trajectories, each ending in what `FlowDecoder.sample` gives."""
    noise = last(golden["noise_init"])
    module, ours = tokenizer(config["model"], noise.shape[1:3]), {}
    for tag in [name.removesuffix("_args") for name in golden if name.endswith("_args")]:
        k, steps, guidance, apg = golden[f"{tag}_args"]
        codes = module.apply(
            {}, golden["indices"][:, : int(k)], int(k), method="lookup"
        )  # the tokens it lacks are masked
        options = int(steps), float(guidance), "apg" if apg else "cfg"
        arrays = _solve(module.decoder, params["decoder"], codes, noise, *options)
        # guided runs need not carry the velocities of every step
        ours |= {f"{tag}_{name}": a for name, a in arrays.items() if name[0] == "t" or f"{tag}_{name}" in golden}
    return ours


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _solve(decoder, params, codes, noise, steps, guidance, guide):
    """The trajectory, its times, and the velocities at its points; channels first."""
    variables, batch = {"params": params}, len(noise)

    def both(x, t):
        v_cond = decoder.apply(variables, x, jnp.full(batch, t), codes, method="velocity")
        null = jnp.ones(batch, bool)
        return v_cond, decoder.apply(variables, x, jnp.full(batch, t), codes, null, method="velocity")

    def velocity(x, t, buffer, _):
        v_cond, v_uncond = both(x, t)
        return (v_cond, buffer) if guidance == 1 else GUIDANCE[guide](v_cond, v_uncond, guidance, buffer)

    times = flow.times(steps)
    _, path = flow.euler(velocity, noise, times, jnp.zeros_like(noise))
    v_cond, v_uncond = jax.lax.map(lambda point: both(*point), (path[:-1], times))
    options = {"steps": steps, "guidance": guidance, "guide": guide, "noise": noise}
    path = path.at[-1].set(decoder.apply(variables, codes, **options, method="sample"))
    turn = partial(jnp.moveaxis, source=-1, destination=-3)
    return {"traj": turn(path), "t": times, "vcond": turn(v_cond), "vuncond": turn(v_uncond)}


def train(config, params, golden, given, weights) -> tuple[dict, dict]:
    """train.npz: the loss at given lengths, times and noise, and its gradient by every foreign parameter.

    Returns (ours, golden), with the gradients of both in our layout. A parameter whose gradient is not in the file was
    not used: its golden gradient is zero.
    """
    latents, noise = last(given["latents"]), last(given["noise"])
    module = tokenizer(config["model"], latents.shape[1:3], keep=golden["keep_k"])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        outputs = module.apply({"params": params}, latents, time=given["t"], noise=noise)
        return flow_matching(outputs, None), jax.vmap(lambda sample: flow_matching(sample, None))(outputs)

    (total, per_sample), gradients = loss(params)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradients)))
    ours = {"loss": total, "loss_per_sample": per_sample, "grad_global_norm": norm}
    golden, flat = dict(golden), flatten(gradients)
    foreign = {name.removeprefix("grad/"): value for name, value in golden.items() if name.startswith("grad/")}
    pieces, _ = match(foreign, RULES, gradients)
    for key, piece in match(weights, RULES, gradients)[0].items():
        ours[f"grad/{key}"] = flat[piece.path][piece.index]
        if key in pieces:
            golden[f"grad/{key}"] = pieces[key].value
        elif key not in foreign:
            golden[f"grad/{key}"] = np.zeros_like(piece.value)
    return ours, golden


def units(golden) -> tuple[dict, dict]:
    """units.npz: functions alone. Returns (our arrays, {name: why it is not compared})."""
    ours, defects = {}, {}
    for name, value in golden.items():
        if m := re.fullmatch(r"(fsq\d+)_levels", name):
            levels = tuple(int(n) for n in value)
            ours |= {f"{m[1]}_{kind}": array for kind, array in _fsq(levels, m[1], golden).items()}
        elif m := re.fullmatch(r"mode_sigma_([\d.]+)", name):
            ours[name] = flow.mode_time(golden["mode_u"], float(m[1]))
        elif m := re.fullmatch(r"temb_freq_maxt([\d.]+)", name):
            ours[name] = timestep_embedding(jnp.asarray(golden["temb_t"]), max_timestep=float(m[1]))
        elif m := re.fullmatch(r"sincos_(\d+)_(\d+)x(\d+)(?:_nonsquare)?", name):
            width, rows, columns = map(int, m.groups())
            if rows == columns:
                ours[name] = first(sincos_2d(rows, columns, width))[None]
            else:
                defects[name] = "known defect of the reference: it scrambles a table that is not square"
        elif m := re.fullmatch(r"apg_out_scale([\d.]+)", name):
            ours[name] = _guided(flow.apg, golden, float(m[1]))
        elif m := re.fullmatch(r"cfg_out_scale([\d.]+)", name):
            ours[name] = _guided(flow.cfg, golden, float(m[1]))
        elif m := re.fullmatch(r"apg_nomom_eta([\d.]+)_thr([\d.]+)_out", name):
            guidance = partial(flow.apg, momentum=0.0, eta=float(m[1]), threshold=float(m[2]))
            ours[name] = _guided(guidance, golden, 4.0)
    return ours, defects


def _fsq(levels, prefix, golden):
    """A sweep of z, and the table between indices and codes in both directions."""
    fsq, z, table = FSQ(levels), golden[f"{prefix}_z"], golden[f"{prefix}_table_idx"]
    codes = fsq.apply({}, z[None])
    return {
        "bounded": bound(z, levels),
        "codes": codes.z[0],
        "indices": codes.indices[0],
        "table_codes": fsq.apply({}, table[None], method="lookup")[0],
        "table_idx": digits_to_indices(golden[f"{prefix}_table_codes"] * (np.array(levels) // 2), levels),
    }


def _guided(guidance, golden, scale):
    """Guidance over the steps [steps N C H W] with one buffer."""
    buffer, out = np.zeros_like(golden["apg_vcond"][0]), []
    for v_cond, v_uncond in zip(golden["apg_vcond"], golden["apg_vuncond"], strict=True):
        v, buffer = guidance(v_cond, v_uncond, scale, buffer)
        out.append(v)
    return np.stack(out)


def _grid(tokens, patches):
    """[B (h w) D] -> [B h w D]."""
    return tokens.reshape(len(tokens), *patches, -1)
