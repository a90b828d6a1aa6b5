"""Arrays of 1D tokenizers: the generators over their codes.

Each function takes the arrays of one file and gives (ours, inputs, tolerances), see tests/goldens/__main__.py.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.generate import masked, rar, sampling
from jaxtok.generate.ar import AR
from jaxtok.generate.heads import Channels
from jaxtok.generate.masked import Masked
from jaxtok.generate.objective import score
from jaxtok.generate.rar import RAR
from jaxtok.nn.rotary import rotary_2d
from jaxtok.pretrained import llamagen, maskgit_generator
from jaxtok.pretrained import rar as rar_weights
from jaxtok.pretrained.convert import LINEAR, convert, rules_of

TOLERANCE = (1e-4, 2e-5)
K = 20  # codes of the small models of one family; ids 21 ... 30 are classes, 31 is the null class


def checked(ours, golden, *fed):
    """The triple: what was fed are the weights and `fed`; every float has the same tolerance."""
    inputs = [key for key in golden if key.startswith("param/") or key.endswith("kwargs") or key in fed]
    return ours, inputs, dict.fromkeys(golden, TOLERANCE)


def weights(golden):
    return {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}


def shapes(module, indices, label):
    """Of the module's parameters."""
    init = partial(module.init, {"params": jax.random.key(0), "train": jax.random.key(1)}, method="loss")
    return jax.eval_shape(init, indices, {"label": label})["params"]


def kwargs(golden):
    """{case: its arguments}."""
    return {key.split("/")[0]: json.loads(str(golden[key])) for key in golden if key.endswith("/kwargs")}


# ---- LlamaGen ----


def llamagen_model(golden, label):
    """(the model, its parameters): three by three tokens, 24 codes, 5 classes."""
    block = dict(norm="rms", head_dim=8, hidden=96)
    module = AR(24, 9, 32, 2, block, position="rotary_2d", classes=5, class_token=True)
    like = shapes(module, jnp.zeros((2, 9), int), label)
    return module, llamagen.from_state_dict(weights(golden), like)[0]


def llamagen_gpt_forward(golden):
    ids, condition = jnp.asarray(golden["ids"]), {"label": jnp.asarray(golden["labels"])}
    module, params = llamagen_model(golden, condition["label"])
    logits = jax.jit(module.apply)({"params": params}, ids, condition)
    scores = score(logits, ids)
    table = np.stack(rotary_2d(3, 3, 8), -1)
    ours = {
        "logits": logits,
        "loss": scores.mean(),
        "loss_valid": scores._replace(weight=scores.weight * golden["valid"][:, None]).mean(),
        "freqs_cis": np.concatenate([np.zeros_like(table[:1]), table]),
    }
    return checked(ours, golden, "ids", "labels", "valid")


def llamagen_gpt_generate(golden):
    condition, ours = {"label": jnp.asarray(golden["labels"])}, {}
    module, params = llamagen_model(golden, condition["label"])
    for case, options in kwargs(golden).items():
        guidance = options["cfg_scale"]
        if "cfg_interval" in options:  # counts from the first token after the prefill
            guidance = partial(sampling.interval, scale=guidance, last=options["cfg_interval"] + 1)
        run = partial(module.apply, method="rollout", guidance=guidance, temperature=0)
        tokens, logits = jax.jit(run)({"params": params}, jax.random.key(0), condition)
        law = {key: options[key] for key in ("temperature", "top_k", "top_p") if key in options}
        ours[f"{case}/tokens"] = tokens
        ours[f"{case}/probs"] = jax.nn.softmax(sampling.filtered(logits, **law)).swapaxes(0, 1)
    return checked(ours, golden, "labels")


# ---- digits by a transformer over them ----

DEPTH_RULES = (
    *llamagen.RULES,
    *((f"head_{regex}", f"digits/{path}", p) for regex, path, p in llamagen.RULES if path.startswith("blocks")),
    (r"(embeds|before)_(\d)", r"digits/\1_\2/embedding", "k d -> k d"),
    (r"heads_(\d)", r"digits/heads_\1/kernel", "o i -> i o"),
    (r"last_norm", "digits/norm/scale", "d -> d"),
)


def depth_logits(renamed, digits, label):
    """Of the model in whose state dict tables and heads have our names: float32 [B N K] of each digit, int [B N] each.

    Our heads have a bias, which is zero here.
    """
    sizes = tuple(renamed[f"heads_{g}"].shape[0] for g in range(len(digits)))
    block, codes = dict(norm="rms", head_dim=8, hidden=96), jnp.stack(digits, -1)
    fields = dict(position="rotary_2d", classes=5, class_token=True, head_depth=1)
    module = AR(sizes, 9, 32, 2, block, **fields)
    like = shapes(module, codes, label)
    bias = {f"heads_{g}": like["digits"][f"heads_{g}"].pop("bias") for g in range(len(digits))}
    params, _ = convert(renamed, DEPTH_RULES, like)
    for name, shape in bias.items():
        params["digits"][name]["bias"] = jnp.zeros(shape.shape)

    def run(module):
        return module.digits.logits(module(codes, {"label": label}), digits)

    return jax.jit(lambda params: module.apply({"params": params}, method=run))(params)


def far_dual(golden):
    """Their input is a matrix of both vectors side by side: two vectors that are added."""
    digits, theirs = [jnp.asarray(golden[f"idx_{i}"]) for i in (1, 2)], weights(golden)
    halves = np.split(theirs.pop("aggregation_layer.weight"), 2, -1)
    bias = [theirs.pop("aggregation_layer.bias"), 0.0]
    renamed = {"last_norm": theirs.pop("norm.weight")}
    for g in range(2):
        vectors = theirs.pop(f"tok_embeddings_{g + 1}.weight")
        renamed |= {f"embeds_{g}": vectors @ halves[g].T + bias[g], f"heads_{g}": theirs.pop(f"output_{g + 1}.weight")}
        renamed |= {"before_0": vectors} if g == 0 else {}
    renamed |= {key.replace("ar_head", "head_layers"): value for key, value in theirs.items()}
    logits = depth_logits(renamed, digits, jnp.asarray(golden["labels"]))
    loss = sum(score(*of).mean() for of in zip(logits, digits, strict=True)) / 2
    return checked({"logits_1": logits[0], "logits_2": logits[1], "loss": loss}, golden, "idx_1", "idx_2", "labels")


def open_magvit2_ar(golden):
    theirs, renamed = weights(golden), {}
    for g, name in enumerate(("pre", "post")):
        renamed |= {f"embeds_{g}": theirs.pop(f"{name}_emb.weight"), f"heads_{g}": theirs.pop(f"head.{g}.weight")}
    renamed |= {"before_0": renamed["embeds_0"], "last_norm": theirs.pop("norm.weight")}
    for key, value in theirs.items():
        for old, new in (
            ("spatial_blocks", "layers"),
            ("factorized_blocks", "head_layers"),
            ("class_emb", "cls_embedding"),
        ):
            key = key.replace(old, new)
        renamed[key] = value
    digits = [jnp.asarray(golden[f"idx_{name}"]) for name in ("pre", "post")]
    logits = depth_logits(renamed, digits, jnp.asarray(golden["cls"][:, 0]))
    return checked({"logits_0": logits[0], "logits_1": logits[1]}, golden, "idx_pre", "idx_post", "cls")


CHANNEL_RULES = (
    (r"channel_embed", "pos_embed", "1 g d -> g d"),
    (r"timesteps_embeddings", "number_embed", "1 g d -> g d"),
    (r"token_embeddings\.(\d+)\.weight", r"before_\1/embedding", "k d -> k d"),
    *((regex.replace("blocks", "channel_blocks", 1), *rest) for regex, *rest in rar_weights.RULES if "blocks" in regex),
    *rules_of(
        (
            (r"condition_proj", "enter", LINEAR),
            (r"channel_heads\.(\d+)", r"heads_\1", LINEAR),
            (r"channel_norm", "norm", rar_weights.AFFINE),
            (r"channel_final\.adaLN_modulation\.1", "head_adaln", rar_weights._ADALN),
        )
    ),
)


def tokenbridge_channels(golden):
    """The head at features where `mask` is set. Their sampler adds the first vector of numbers to the first input."""
    order, places = tuple(int(c) for c in golden["channel_order"]), golden["mask"].astype(bool)
    z, codes = jnp.asarray(golden["z"])[places], jnp.asarray(golden["indices"])[places]
    block = rar.BLOCK | dict(eps=1e-5, head_dim=8, hidden=128)
    module = Channels((16,) * 16, z.shape[-1], True, 2, block, inner=32, order=order)
    like = jax.eval_shape(partial(module.init, method="score"), jax.random.key(0), z, codes)["params"]
    params, _ = convert(weights(golden), CHANNEL_RULES, like)
    in_turn = list(np.moveaxis(golden["targets_reordered"][places], -1, 0))
    logits = module.apply({"params": params}, z, in_turn, method="logits")
    first = np.zeros_like(params["pos_embed"])
    first[0] = params["number_embed"][0]
    theirs = params | {"pos_embed": params["pos_embed"] + first}
    greedy = module.apply({"params": theirs}, z, lambda logits, g: logits.argmax(-1), method="draw")
    ours = {
        "channel_logits": jnp.stack(logits, 1),
        "loss": module.apply({"params": params}, z, codes, method="score").mean() / len(order),
        "greedy_tokens_reordered": greedy[:, np.array(order)],
    }
    return checked(ours, golden, "z", "mask", "channel_order", "indices", "targets_reordered")


# ---- RAR ----


def rar_model(golden, label):
    module = RAR(K, 16, 32, 4, 10, dict(head_dim=8, hidden=64))
    like = shapes(module, jnp.zeros((2, 16), int), label)
    return module, rar_weights.from_state_dict(weights(golden), like)[0]


def rar_forward(golden):
    condition, orders = {"label": jnp.asarray(golden["labels_class"])}, jnp.asarray(golden["orders"])
    module, params = rar_model(golden, condition["label"])
    shuffled = jnp.take_along_axis(jnp.asarray(golden["ids"]), orders, 1)
    logits = jax.jit(partial(module.apply, method="predict"))({"params": params}, shuffled, orders, condition)
    scores = score(logits[:, :-1], shuffled)
    ours = {
        "condition_id": module.vocabulary + 1 + condition["label"],
        "logits": logits,
        "shuffled_labels": shuffled,
        "loss": scores.mean(),
        "acc": scores.correct.mean(),
    }
    return checked(ours, golden, "ids", "labels_class", "orders")


def rar_generate_greedy(golden):
    condition, ours = {"label": jnp.asarray(golden["labels_class"])}, {}
    module, params = rar_model(golden, condition["label"])
    for case, options in kwargs(golden).items():
        scale, power = options["guidance_scale"], options["guidance_scale_pow"]
        guidance = partial(sampling.power_cosine, scale=scale, power=power) if scale else 1.0
        scales = [float(guidance(i, 16)) if scale else 0.0 for i in range(16)]
        run = partial(module.apply, method="rollout", guidance=guidance, temperature=0)
        tokens, logits = jax.jit(run)({"params": params}, jax.random.key(0), condition)
        full = jax.jit(module.apply)({"params": params}, tokens, condition)
        if scale:
            none = {"label": jnp.full(2, module.classes)}
            uncond = jax.jit(module.apply)({"params": params}, tokens, none)
            full = sampling.guide(full, uncond, jnp.array(scales)[:, None])
        for name, chosen_by in (("kv1", logits), ("kv0", full)):  # on a cache, and from the whole prefix anew
            probs = jax.nn.softmax(sampling.filtered(chosen_by, options["randomize_temperature"]))
            ours[f"{case}/probs_{name}"] = probs.swapaxes(0, 1)
        ours |= {f"{case}/tokens_kv1": tokens, f"{case}/tokens_kv0": full.argmax(-1)}
        ours[f"{case}/cfg_scale"] = np.array(scales)
    return checked(ours, golden, "labels_class")


def rar_random_ratio(golden):
    ratio = jax.vmap(partial(rar.random_ratio, start=125_000, end=187_500))(jnp.asarray(golden["step"]))
    return checked({"ratio": ratio}, golden, "step")


# ---- MaskGIT ----


def maskgit_masking(golden):
    u, n = jnp.asarray(golden["timesteps"]), golden["argsort"].shape[1]
    count = masked.masked_count(u, n)
    ours = {
        "mask_ratio": jnp.arccos(u) / (jnp.pi / 2),
        "num_masked": count,
        "mask": golden["argsort"] < count[:, None],
    }
    return checked(ours, golden, "timesteps", "argsort")


def maskgit_sampler(golden):
    """Our sampler's step on their analytic model: logits of place n are table[n] + 0.05 ((id mod 5) - 2)."""
    ours = {}
    tables = [jnp.asarray(golden[name]) for name in ("table_cond", "table_uncond")]
    n, vocabulary = tables[0].shape
    for case, options in kwargs(golden).items():
        steps, scale, decay = (options[key] for key in ("num_sample_steps", "guidance_scale", "guidance_decay"))
        guidance = {  # theirs is cond + scale (cond - uncond), but in power-cosine
            "constant": partial(sampling.constant, scale=1 + scale),
            "linear": partial(sampling.linear, scale=1 + scale),
            "power-cosine": partial(sampling.power_cosine, scale=scale, power=options.get("guidance_scale_pow")),
        }[decay]
        indices, hidden, calls = jnp.zeros((2, n), int), jnp.ones((2, n), bool), []
        for step, count in enumerate(masked.counts(n, steps)):
            shown = jnp.where(hidden, vocabulary, indices)
            calls += [shown] * (1 if decay == "linear" and step == 0 else 2)  # they save a pass of weight 0
            both = [table + 0.05 * (shown % 5 - 2)[..., None] for table in tables]
            logits, left = sampling.guide(*both, guidance(step, steps)), 1 - (step + 1) / steps
            if options.get("softmax_temperature_annealing"):
                logits = masked.annealed(logits, left)
            uniforms = [golden[f"{case}/uniform_{name}"][step] for name in ("token", "conf")]
            temperature = options["randomize_temperature"] * left
            indices, hidden = masked.reveal(indices, hidden, logits, uniforms, temperature, count)
        ours |= {f"{case}/final_ids": indices, f"{case}/ids_before_each_call": np.stack(calls)}
    uniforms = [key for key in golden if "/uniform_" in key]
    return checked(ours, golden, "table_cond", "table_uncond", *uniforms)


def maskgit_forward(fields, golden):
    ids, condition = jnp.asarray(golden["ids"]), {"label": jnp.asarray(golden["labels"])}
    module = Masked(K, 12, 32, 4, 10, **fields)
    like = shapes(module, ids, condition["label"])
    params, _ = maskgit_generator.from_state_dict(weights(golden), like)
    run = jax.jit(partial(module.apply, {"params": params}))
    logits = run(ids, condition)
    weight = jnp.where(golden["mask"], 1.0, 0.1)
    scores = score(logits, jnp.asarray(golden["targets"]), weight, smoothing=0.1)
    hits = (scores.correct * golden["mask"]).sum() / golden["mask"].sum()
    ours = {"logits_cond": logits, "logits_uncond": run(ids), "mlm_loss": scores.mean(), "mlm_acc": hits}
    return checked(ours, golden, "ids", "labels", "targets", "mask")


VIT = dict(block=dict(head_dim=8, hidden=64, post_norm=True, eps=1e-12))
UVIT = dict(block=dict(head_dim=8, hidden=64, bias=("out", "mlp")), skips=True)


# ---- laws ----


def topk_topp(golden):
    ours = {}
    for name in golden.keys() - {"logits"}:
        k, p = name.removeprefix("k").split("_p")
        ours[name] = sampling.filtered(jnp.asarray(golden["logits"]), top_k=int(k), top_p=float(p))
    return checked(ours, golden, "logits")


FILES = {
    "llamagen_gpt_forward": llamagen_gpt_forward,
    "llamagen_gpt_generate": llamagen_gpt_generate,
    "far_dual": far_dual,
    "open_magvit2_ar": open_magvit2_ar,
    "tokenbridge": tokenbridge_channels,
    "rar_forward": rar_forward,
    "rar_generate_greedy": rar_generate_greedy,
    "rar_random_ratio": rar_random_ratio,
    "maskgit_masking": maskgit_masking,
    "maskgit_sampler": maskgit_sampler,
    "maskgit_vit_forward": partial(maskgit_forward, VIT),
    "maskgit_uvit_forward": partial(maskgit_forward, UVIT),
    "topk_topp": topk_topp,
}
