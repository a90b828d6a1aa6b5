"""Checkpoints of FlexTok as they are published, made up: the tree of the config, keys and shapes, and a file of both.

The keys are those listed in state_dicts/. The tree has the classes and arguments of the public code; how a published
one is wrapped is not known, so tests wrap it in several ways.
"""

import copy
import json
from pathlib import Path

import numpy as np

from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained.safetensors import DTYPES

NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
NORM = {"_target_": "flextok.model.layers.norm.Fp32LayerNorm", "_partial_": True, "elementwise_affine": False}
D12 = dict(encoder=(768, 12), decoder=(768, 12), channels=16, registers=256, grid=16)
TINY = dict(encoder=(64, 2), decoder=(64, 2), channels=4, registers=8, grid=2)  # 32 px
# The tiny codec, as its own repository would have it.
TINY_VAE = dict(
    _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[4, 8, 12, 12], latent_channels=4,
    layers_per_block=2, norm_num_groups=4, in_channels=3, out_channels=3, scaling_factor=0.5,
)  # fmt: skip


def listed(name):
    """{key: shape} of a published size: "d12_d12", "d18_d18" or "d18_d28"."""
    text = (Path(__file__).parent / "state_dicts" / f"flextok_{name}.json").read_text()
    return {key: tuple(shape) for key, (shape, _) in json.loads(text).items()}


def tiny_shapes():
    """{key: shape} of TINY: the list of d12_d12 with other numbers."""
    trunk = {768: 64, 2048: 170, 9216: 768, 1536: 128, 64: 16}
    codec = {128: 4, 256: 8, 512: 12, 32: 8, 16: 4}
    shapes = {}
    for key, shape in listed("d12_d12").items():
        block = key.partition(".blocks.")[2].partition(".")[0]
        if block.isdigit() and int(block) >= 2:
            continue
        shape = [(codec if key.startswith("vae.") else trunk).get(n, n) for n in shape]
        if "register" in key:
            shape = [8 if n == 256 else n for n in shape]
        if "posembs" in key:
            shape = [2 if n == 16 else n for n in shape]
        shapes[key] = tuple(shape)
    return shapes


def config(encoder, decoder, channels, registers, grid, scaling_factor=0.7):
    """The tree; encoder, decoder: (width, depth)."""

    def transformer(part, width, depth, **more):
        return dict(
            _target_="flextok.model.trunks.transformers.FlexTransformer", input_seq_read_key=f"{part}_packed_seq",
            output_seq_write_key=f"{part}_packed_seq", dim=width, depth=depth, block_mask_read_key=f"{part}_block_mask",
            use_act_checkpoint=True, **more,
        )  # fmt: skip

    def patches(read, write, width):
        return dict(
            _target_="flextok.model.preprocessors.patching.PatchEmbedder", input_tensor_list_read_key=read,
            patches_list_write_key=write, n_patches_write_key=f"n_{write}", channels_in=channels, dim=width,
            patch_sizes=[2, 2], flatten_patches=False,
        )  # fmt: skip

    def positions(key, width, sizes, kind):
        return dict(
            _target_="flextok.model.utils.posembs.PositionalEmbeddingAdder", read_key=key, write_key=key, dim=width,
            max_sizes=sizes, posemb_type=kind, posemb_scaling="absolute",
        )  # fmt: skip

    def layout(read, write, op):
        op = {"_target_": f"flextok.model.utils.dict_ops.{op}", "_partial_": True}
        return dict(
            _target_="flextok.model.utils.dict_ops.PerSampleOp", read_key=read, write_key=write, per_sample_op=op
        )

    def packer(part, keys, **more):
        return dict(
            _target_="flextok.model.preprocessors.flex_seq_packing.BlockWiseSequencePacker", input_list_read_keys=keys,
            packed_seq_write_key=f"{part}_packed_seq", block_mask_write_key=f"{part}_block_mask",
            inner_packed_shapes_write_key=f"{part}_ps_inner", outer_packed_shapes_write_key=f"{part}_ps_outer",
            pad_to_multiple=128, **more,
        )  # fmt: skip

    def unpacker(part, keys):
        return dict(
            _target_="flextok.model.postprocessors.seq_unpacking.SequenceUnpacker", inner_seq_write_keys=keys,
            packed_seq_read_key=f"{part}_packed_seq", inner_packed_shapes_read_key=f"{part}_ps_inner",
            outer_packed_shapes_read_key=f"{part}_ps_outer",
        )  # fmt: skip

    time = dict(adaLN_emb_read_key="dec_temb", adaLN_packing_fn_read_key="dec_emb_packing_fn")
    enc = {
        "enc_channels_to_last": layout("vae_latents", "vae_latents_bhwc", "channels_first_to_last"),
        "enc_patch_emb": patches("vae_latents_bhwc", "enc_patches", encoder[0]),
        "enc_posemb_module": positions("enc_patches", encoder[0], [grid, grid], "sincos"),
        "enc_register_module": dict(
            _target_="flextok.model.preprocessors.registers.Registers1D", input_tensor_list_read_key="enc_patches",
            register_sizes_read_write_key="register_sizes", registers_write_key="enc_registers", dim=encoder[0],
            n_min=registers, n_max=registers, size_sampling_mode="uniform", ordering_mode="nested",
        ),
        "enc_seq_packer": packer("enc", ["enc_patches", "enc_registers"], mask_mode="causal_last"),
        "enc_transformer": transformer("enc", *encoder),
        "enc_unpacker": unpacker("enc", ["enc_patches", "enc_registers"]),
        "enc_to_latents": dict(
            _target_="flextok.model.postprocessors.heads.LinearHead", read_key="enc_registers", norm_layer=NORM,
            write_key="enc_registers", dim=encoder[0], dim_out=6, use_mup_readout=False, dtype_override=None,
        ),
    }  # fmt: skip
    dec = {
        "dec_from_latents": dict(
            _target_="flextok.model.preprocessors.linear.LinearLayer", read_key="quants", write_key="dec_registers",
            dim_in=6, dim=decoder[0],
        ),
        "dec_registers_posemb_module": positions("dec_registers", decoder[0], [registers], "learnable_sum"),
        "dec_nested_dropout": dict(
            _target_="flextok.model.preprocessors.token_dropout.MaskedNestedDropout", read_write_key="dec_registers",
            dim=decoder[0], size_sampling_mode="pow2",
        ),
        "dec_latent_dropout": dict(
            _target_="flextok.model.preprocessors.nullcond.LearnedNullCond", read_write_key="dec_registers",
            dim=decoder[0], dropout_prob=0.2,
        ),
        "dec_noise_channels_to_last": layout("noised", "noised_bhwc", "channels_first_to_last"),
        "dec_noise_patch_emb": patches("noised_bhwc", "dec_patches", decoder[0]),
        "dec_patches_posemb_module": positions("dec_patches", decoder[0], [grid, grid], "sincos"),
        "dec_seq_packer": packer(
            "dec", ["dec_patches", "dec_registers"], mask_mode="full", per_subseq_embs=True,
            emb_packing_fn_write_key="dec_emb_packing_fn",
        ),
        "dec_time_embedder": dict(
            _target_="flextok.model.preprocessors.time_embedding.TimestepEmbedder", timesteps_read_key="timesteps",
            time_embedding_write_key="dec_temb", dim=decoder[0], max_timestep=1.0,
        ),
        "dec_transformer": transformer(
            "dec", *decoder, adaLN_expansion=2, intermediate_layers=[1], intermediate_layer_write_key="dec_1", **time
        ),
        "dec_unpacker": unpacker("dec", ["dec_patches", "dec_registers"]),
        "dec_repa_layer": dict(_target_="flextok.model.postprocessors.heads.MLPHead", dim=decoder[0], dim_out=1024),
        "dec_to_patches": dict(
            _target_="flextok.model.postprocessors.heads.ToPatchesLinearHead", read_key="dec_patches",
            write_key="dec_patches", dim=decoder[0], channels_out=channels, patch_sizes=[2, 2], use_mup_readout=False,
            **time,
        ),
        "dec_channels_to_first": layout("dec_patches", "reconst", "channels_last_to_first"),
    }  # fmt: skip
    sequential = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
    return {
        "vae": dict(
            _target_="flextok.vae_wrapper.StableDiffusionVAE", images_read_key="rgb", latent_channels=channels,
            vae_latents_read_key="reconst", vae_latents_write_key="vae_latents", frozen=True, sample_posterior=True,
            images_reconst_write_key="rgb_reconst", scaling_factor=scaling_factor,
        ),
        "encoder": {"_target_": sequential, "module_dict": enc},
        "decoder": {"_target_": sequential, "module_dict": dec},
        "regularizer": dict(
            _target_="flextok.regularizers.quantize_fsq.FSQ", latents_read_key="enc_registers",
            quants_write_key="quants", tokens_write_key="tokens", levels=[8, 8, 8, 5, 5, 5], drop_quant_p=0.0,
        ),
        "flow_matching_noise_module": dict(
            _target_="flextok.flow_matching.noise_modules.MinRFNoiseModule", clean_images_read_key="vae_latents",
            noised_images_write_key="noised", timesteps_write_key="timesteps", sigmas_write_key="sigmas", ln=False,
            stratisfied=False, mode_scale=0.25,
        ),
        "pipeline": dict(
            _target_="flextok.flow_matching.pipelines.MinRFPipeline", _partial_=True, out_channels=channels,
            latents_read_key="quants", reconst_write_key="reconst",
        ),
    }  # fmt: skip


def tiny_config():
    """The tree of TINY, whose codec is described in a repository of its own (TINY_VAE)."""
    tree = config(**TINY, scaling_factor=None)
    tree["vae"] |= {"hf_hub_path": "someone/tiny_vae", "latent_channels": 16}
    return tree


def changed(tree, path, value):
    """A copy of the tree with another value at "vae.frozen" (... removes it)."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split(".")
    node = tree
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return tree


def weights(shapes, seed=0):
    """Random arrays of the given shapes, small ones but for norms; true sine-cosine tables."""
    rng, arrays = np.random.default_rng(seed), {}
    for key, shape in shapes.items():
        if "posembs" in key and len(shape) == 4 and shape[2] == shape[3]:
            arrays[key] = np.moveaxis(sincos_2d(shape[2], shape[3], shape[1]), -1, 0)[None]
        else:
            norm = "norm" in key and key.endswith("weight")
            arrays[key] = (rng.normal(size=shape) * 0.1 + norm).astype(np.float32)
    return arrays


def metadata(tree):
    """The tree as a .safetensors file carries it: a Python literal for each of its keys."""
    return {key: str(value) for key, value in tree.items()} | {"_target_": "flextok.flextok_wrapper.FlexTok"}


def write_safetensors(path, arrays, metadata=None):
    """A .safetensors file of arrays."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for key, array in arrays.items():
        header[key] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return path
