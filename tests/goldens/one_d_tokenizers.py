"""Whole tokenizers of the 1D family, and their critics: what ours give for the pictures and weights of each file.

Every function takes the arrays of a file and gives (ours, inputs, tolerances), see tests/goldens/__main__.py. Sizes
that no array tells stand here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.build import build
from jaxtok.decoders.cnn import CNN
from jaxtok.encoders.factorized import Adapter
from jaxtok.losses import adversarial, proxy
from jaxtok.losses.contrastive import FeatureHead
from jaxtok.losses.critics import Blurred
from jaxtok.losses.quantizer import aux
from jaxtok.nn import gaussian
from jaxtok.pretrained import llamagen_vq, maskgit_vqgan, titok
from jaxtok.pretrained.convert import AFFINE, CONV, LINEAR, convert, rules_of
from jaxtok.structs import Codes

TOLERANCE = (1e-4, 2e-5)


def last(x):
    """[B C ...] -> [B ... C]."""
    return jnp.asarray(np.moveaxis(x, 1, -1))


def first(x):
    """[B ... C] -> [B C ...]."""
    return np.moveaxis(np.asarray(x), -1, 1)


def weights(golden):
    return {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}


def checked(ours, golden, *fed):
    """The triple: what was fed are the weights and `fed`; every float of ours has the same tolerance."""
    inputs = [key for key in golden if key.startswith("param/") or key in fed]
    return ours, inputs, dict.fromkeys(ours, TOLERANCE)


def gan_losses(golden):
    real, fake, *averages = (
        jnp.asarray(golden[name]) for name in ("logits_real", "logits_fake", "ema_real", "ema_fake")
    )
    ours = {
        "hinge_d": adversarial.hinge_critic(real, fake),
        "hinge_g": adversarial.hinge_generator(fake),
        "vanilla_d": adversarial.softplus_critic(real, fake),
        "lecam_scalar": adversarial.lecam(real.mean(), fake.mean(), *averages),
        "lecam_elementwise": adversarial.lecam(real, fake, *averages),
    }
    return checked(ours, golden, "logits_real", "logits_fake", "ema_real", "ema_fake")


def maskgit_discriminator(golden):
    critic = Blurred(features=32, multipliers=(1, 2))
    layers = (
        (r"block_in\.0", "conv_in", CONV),
        (r"blocks\.(\d)\.0", r"conv_\1", CONV),
        (r"blocks\.(\d)\.2", r"norm_\1", AFFINE),
        (r"to_logits\.0", "conv_mid", CONV),
        (r"to_logits\.2", "conv_out", CONV),
    )
    rules = (*rules_of(layers), (r"blocks\.\d\.1\.kernel", None, "fixed"))
    like = jax.eval_shape(critic.init, jax.random.key(0), last(golden["real"]))["params"]
    params, _ = convert(weights(golden), rules, like)
    run = jax.jit(lambda x: critic.apply({"params": params}, x))
    ours = {f"logits_{name}": first(run(last(golden[name]))) for name in ("real", "fake")}
    return checked(ours, golden, "real", "fake")


def tokenizer(spec, rules, golden, **fed):
    """A run of the tokenizer's methods, with the file's weights. fed: further arguments of its init."""
    model = build(spec)
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    like = jax.eval_shape(partial(model.init, train=True, **fed), keys, last(golden["image"]))["params"]
    variables = {"params": jax.tree.map(jnp.asarray, convert(weights(golden), rules, like)[0])}
    return partial(model.apply, variables)


def places(x, golden):
    """[B N D] -> the layout [B D ...] of a golden array."""
    return np.moveaxis(np.asarray(x), -1, 1).reshape(golden.shape)


def maskgit(golden):
    spec = maskgit_vqgan.model(16, 32, channels=(32, 64))
    run = tokenizer(spec, maskgit_vqgan.rules(2), golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    codes = outputs["codes"]
    codebook = golden["param/quantize.embedding.weight"]
    latents = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    z = latents.reshape(len(latents), -1, latents.shape[-1])
    distances = jnp.square(z[:, :, None] - codebook).sum(-1)
    ours = {
        "h": first(latents),
        "h_q": places(codes.z, golden["h_q"]),
        "indices": codes.indices,
        "loss": aux(outputs, {}, term="commitment") + 0.25 * aux(outputs, {}, term="codebook"),
        "soft_code": jax.nn.softmax(-distances),
        "reconstruction": first(outputs["decoded"].prediction),
    }
    return checked(ours, golden, "image")


def llamagen(golden):
    spec = llamagen_vq.model((32, 64), 48, 8, 24, blocks=1)
    run = tokenizer(spec, llamagen_vq.RULES, golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    codes = outputs["codes"]
    latents = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    found = run(golden["indices"].reshape(codes.indices.shape), codes.indices.shape[1], method="lookup")
    decoded = jax.jit(partial(run, method=lambda model, codes: model.decoder.sample(codes)))(
        found.replace(grid=codes.grid)
    )
    ours = {
        "h": first(latents),
        "indices": codes.indices.reshape(-1),
        "reconstruction": first(outputs["decoded"].prediction),
        "decode_code": first(decoded),
    }
    return checked(ours, golden, "image")


TITOK = dict(size=32, encoder=(32, 2), decoder=(32, 2), tokens=8, patch=8, head_dim=8)


def without_pixels(golden):
    """A run of the methods of a first stage, whose decoder gives logits and no more."""
    spec = titok.model(channels=12, codes=64, form="codes", **TITOK)
    spec["decoder"] = spec["decoder"]["body"]
    rules = [(key, path and path.replace("decoder/body/", "decoder/"), how) for key, path, how in titok.rules("codes")]
    return tokenizer(spec, rules, golden)


def titok_stage1(golden):
    """The first stage: logits over the codes of another tokenizer. Its pixel decoder is not in the file."""
    run = without_pixels(golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    latents = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    codes, logits = outputs["codes"], outputs["decoded"].prediction
    found = run(golden["indices"][:, 0], 8, method="lookup")
    again = jax.jit(partial(run, method=lambda model, codes: model.decoder.sample(codes)))(found)
    ce = proxy.cross_entropy(logits, golden["target_codes"])
    ours = {
        "z": places(latents, golden["z"]),
        "z_quantized": places(codes.z, golden["z_quantized"]),
        "indices": codes.indices[:, None],
        "decoder_logits": first(logits),
        "decode_tokens_logits": first(again),
        "stage1_ce": ce,
        "stage1_total": ce + aux(outputs, {}, term="codebook") + 0.25 * aux(outputs, {}, term="commitment"),
    }
    return checked(ours, golden, "image", "target_codes")


def titok_stage2(golden):
    """The second: from logits to pictures."""
    pixels = dict(width=16, channels=(32, 64), blocks=1)
    spec = titok.model(channels=12, codes=64, form="codes", pixels=pixels, **TITOK)
    rules = titok.rules("codes", levels=2)
    run = tokenizer(spec, rules, golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    logits = run(outputs["codes"], method=lambda model, codes: model.decoder.body.predict(codes))
    ours = {
        "z_quantized": places(outputs["codes"].z, golden["z_quantized"]),
        "indices": outputs["codes"].indices[:, None],
        "decoder_logits": first(logits),
        "soft_code": first(run(logits, method=lambda model, logits: model.decoder.expected(logits))),
        "reconstruction": first(outputs["decoded"].prediction),
    }
    ours, inputs, tolerances = checked(ours, golden, "image")
    # The file's own picture is 3.4e-5 off what float64 makes of its soft codes, ours 0.5e-5.
    return ours, inputs, tolerances | {"reconstruction": (1e-4, 1e-4)}


def titok_vq(golden):
    spec = titok.model(channels=16, codes=64, **TITOK)
    run = tokenizer(spec, titok.rules("pixels"), golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    latents = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    ours = {
        "z": places(latents, golden["z"]),
        "indices": outputs["codes"].indices[:, None],
        "reconstruction": first(outputs["decoded"].prediction),
    }
    return checked(ours, golden, "image")


def titok_vae(golden):
    """A Gaussian a token. The divergence is a sum over channels, here a token, in `kl_loss` a mean over pictures."""
    spec = titok.model(channels=8, **TITOK)
    run = tokenizer(spec, titok.rules("pixels"), golden)
    moments = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    mean, logvar = gaussian.moments(moments)
    noise = np.moveaxis(golden["noise"][:, :, 0], 1, -1)
    z = gaussian.sample(mean, logvar, noise)
    codes = Codes(z, None, jnp.ones(z.shape[:2], bool))
    kl = jax.vmap(gaussian.kl, 1, 1)(mean, logvar)  # [B N]
    ours = {
        "moments": places(moments, golden["moments"]),
        "mean": places(mean, golden["mean"]),
        "logvar": places(logvar, golden["logvar"]),
        "z_sample": places(z, golden["z_sample"]),
        "kl": kl,
        "kl_loss": gaussian.kl(mean, logvar).mean(),
        "reconstruction": first(jax.jit(partial(run, method=lambda m, c: m.decoder.sample(c)))(codes)),
    }
    return checked(ours, golden, "image", "noise")


def tatitok(golden):
    spec = titok.model(channels=12, codes=64, text=True, **TITOK)
    text = {"tokens": jnp.asarray(golden["text"]), "mask": jnp.ones(golden["text"].shape[:2], bool)}
    run = tokenizer(spec, titok.rules("pixels"), golden, context=text)
    outputs = jax.jit(partial(run, train=True, context=text))(last(golden["image"]))
    ours = {
        "indices": outputs["codes"].indices[:, None],
        "reconstruction": first(outputs["decoded"].prediction),
    }
    return checked(ours, golden, "image", "text")


def tail_drop(golden):
    """One-D-Piece: dropped tokens are masked here, and cut off there."""
    run = without_pixels(golden)
    codes = jax.jit(partial(run, method="encode"))(last(golden["image"]))
    sample = jax.jit(partial(run, method=lambda model, codes: model.decoder.sample(codes)))
    ours = {"indices": codes.indices[:, None]}
    for k in (1, 4, 8):
        keep = jnp.broadcast_to(jnp.arange(8) < k, codes.keep.shape)
        ours[f"logits_len{k}"] = first(sample(codes.replace(keep=keep)))
    return checked(ours, golden, "image")


WETOK = dict(channels=(32, 64), blocks=1, block=dict(bias=False), attention="none")  # and Open-MAGVIT2


def wetok_rules():
    """The table of a whole autoencoder. Levels count from full resolution there, and in the decoder to it here."""
    block = (
        (r"(norm[12])", r"/\1", AFFINE),
        (r"(conv[12])", r"/\1", CONV),
        (r"nin_shortcut", "/shortcut", CONV),
    )
    ends = ((r"(conv_in|conv_out)", r"/\1", CONV), (r"norm_out", "/norm_out", AFFINE))
    places = [(rf"encoder\.down\.{i}\.block\.0\.", f"encoder/down_{i}/block_0") for i in range(2)]
    places += [(rf"decoder\.up\.{i}\.block\.0\.", f"decoder/up_{1 - i}/block_0") for i in range(2)]
    places += [(rf"{side}\.mid_block\.0\.", f"{side}/mid/block_0") for side in ("encoder", "decoder")]
    adaptive = ((r"gamma", "/scale", LINEAR), (r"beta", "/bias", LINEAR))
    return (
        *(rule for side in ("encoder", "decoder") for rule in rules_of(ends, rf"{side}\.", side)),
        *(rule for key, path in places for rule in rules_of(block, key, path)),
        *(r for i in range(2) for r in rules_of(adaptive, rf"decoder\.adaptive\.{i}\.", f"decoder/adaptive_{1 - i}")),
        *rules_of(((r"encoder\.down\.0\.downsample", "encoder/down_0/stride/conv", CONV),)),
        *rules_of(((r"decoder\.up\.1\.upsample\.conv1", "decoder/up_0/shuffle/conv", CONV),)),
        (r"noise", "decoder/conv_noise/kernel", "o i h w -> h w i o"),
    )


def wetok(golden):
    """Autoencoder of bits; the picture of its generative decoder has its weights in another file."""
    spec = dict(
        name="tokenizer.Tokenizer",
        codec=dict(name="codecs.identity.Identity"),
        encoder=dict(name="encoders.cnn.CNN", out=6, latent=0, last=1, down="stride", **WETOK),
        quantizer=dict(name="quantizers.binary.LFQ", bits=6),
        decoder=dict(name="decoders.cnn.CNN", first=0, more=0, up="shuffle", adaptive=True, **WETOK),
    )
    run = tokenizer(spec, wetok_rules(), golden)
    outputs = jax.jit(partial(run, train=True))(last(golden["image"]))
    latents = jax.jit(partial(run, method=lambda model, x: model.encoder(x)))(last(golden["image"]))
    ours = {
        "h": first(latents),
        "z_binary": places(outputs["codes"].z, golden["z_binary"]),
        "reconstruction": first(outputs["decoded"].prediction),
    }
    return checked(ours, golden, "image", "noise", "gan_reconstruction")


def wetok_generative(golden):
    """The decoder that reads noise; there, bits and noise are the input of one convolution."""
    decoder = CNN(first=0, more=0, up="shuffle", adaptive=True, generative=True, **WETOK)
    z, noise = (np.moveaxis(golden[name], 1, -1) for name in ("z_binary", "noise"))
    rows = lambda x: jnp.asarray(x.reshape(len(x), -1, x.shape[-1]))
    codes = Codes(rows(z), None, jnp.ones((len(z), z.shape[1] * z.shape[2]), bool), z.shape[1:3])
    arrays = weights(golden)
    both = arrays["decoder.conv_in.weight"]
    arrays |= {"decoder.conv_in.weight": both[:, : z.shape[-1]], "noise": both[:, z.shape[-1] :]}
    like = jax.eval_shape(partial(decoder.init, jax.random.key(0), method="sample"), codes, noise=rows(noise))
    params, _ = convert(arrays, wetok_rules(), {"decoder": like["params"]})
    variables = {"params": jax.tree.map(jnp.asarray, params["decoder"])}
    picture = jax.jit(lambda noise: decoder.apply(variables, codes, noise=noise, method="sample"))
    return checked({"gan_reconstruction": first(picture(rows(noise)))}, golden, "z_binary", "noise")


def fqgan_adapter(golden):
    """A branch's transformer, and what reads a book's codes for a teacher's feature."""
    modules = {
        "adapter": Adapter(32, depth=2, head_dim=8),
        "head": FeatureHead(32, depth=1, head_dim=8),
    }
    layers = (
        (r"positional_embedding", "pos_embed", "n d -> n d"),
        (r"class_embedding", "class_token", "n d -> n d"),
        *rules_of(((r"ln_pre", "norm_pre", AFFINE), (r"ln_post", "norm_post", AFFINE))),
        *rules_of(((r"upscale\.0", "fc1", LINEAR), (r"upscale\.2", "fc2", LINEAR))),
        *rules_of(titok._BLOCK, r"transformer\.(\d+)\.", "blocks/", r"[\1]"),
    )
    outputs = {}
    for name, module in modules.items():
        x = last(golden[f"{name}_in"])
        x = x.reshape(len(x), -1, x.shape[-1]) if name == "head" else x
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in weights(golden).items() if key.startswith(prefix)}
        like = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        outputs[name] = jax.jit(module.apply)({"params": convert(own, layers, like)[0]}, x)
    ours = {"adapter_out": first(outputs["adapter"]), "head_out": outputs["head"]}
    return checked(ours, golden, "adapter_in", "head_in")


FILES = {
    "fqgan_adapter": fqgan_adapter,
    "titok_stage1_legacy": titok_stage1,
    "titok_stage2_legacy": titok_stage2,
    "titok_rgb_vq": titok_vq,
    "titok_rgb_vae": titok_vae,
    "tatitok_vq": tatitok,
    "onedpiece_tail_drop": tail_drop,
    "gan_losses": gan_losses,
    "maskgit_discriminator": maskgit_discriminator,
    "maskgit_vqgan": maskgit,
    "llamagen_vq": llamagen,
    "wetok_autoencoder": wetok,
    "wetok_gan_decoder": wetok_generative,
}
