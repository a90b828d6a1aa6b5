"""Writes the arrays beside it, with torch and transformers, which jaxtok does not need: python make.py FOLDER

The classes are built from tiny configs and get weights drawn here; the published sizes and weights play no part. They
compute in float64, so that what differs is ours.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5ForConditionalGeneration


def draw(module, seed):
    """Weights large enough for attention to be far from uniform; scales lie around 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            array = 0.3 * rng.normal(size=tuple(weight.shape)) + ("norm" in name and name.endswith("weight"))
            weight.copy_(torch.from_numpy(array.astype(np.float32)))
    return module.double().eval()


def arrays(model, ids, features, prefix=""):
    """Weights under "param/", by the names of the published files, some of which begin with a `prefix` more."""
    weights = {f"param/{prefix}{key}": value.float().numpy() for key, value in model.state_dict().items()}
    config = json.dumps(model.config.to_dict())
    return weights | {"config": np.array(config), "ids": ids, "features": features.float().numpy()}


def texts(lengths, vocabulary, total, seed):
    """int [B total], zeros behind each text."""
    rng, ids = np.random.default_rng(seed), np.zeros((len(lengths), total), np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(1, vocabulary, length)
    return ids


def t5():
    """More tokens than the farthest distance, heads that together are not as wide as the model; a decoder beside it."""
    config = T5Config(
        vocab_size=19, d_model=24, d_kv=5, num_heads=3, d_ff=40, num_layers=2, num_decoder_layers=1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model, ids = draw(T5ForConditionalGeneration(config), 0), texts((150, 9), 19, 150, 1)
    features = model.encoder(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(ids > 0))[0]
    return arrays(model, ids, features)


def clip_text(act):
    """Texts begin with the last id but one and end with the last; an id of 0 stands within one."""
    config = CLIPTextConfig(
        vocab_size=19, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=13, hidden_act=act, bos_token_id=17, eos_token_id=18, pad_token_id=0,
    )  # fmt: skip
    model, ids = draw(CLIPTextModel(config), 2), texts((13, 6), 17, 13, 3)
    for row, length in zip(ids, (13, 6), strict=True):
        row[0], row[length - 1] = 17, 18
    ids[1, 2] = 0
    features = model(torch.from_numpy(ids).long()).last_hidden_state
    prefix = "" if any(key.startswith("text_model.") for key in model.state_dict()) else "text_model."
    return arrays(model, ids, features, prefix)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with torch.no_grad():
        files = {"t5": t5(), "clip_text": clip_text("quick_gelu"), "clip_text_gelu": clip_text("gelu")}
    for name, file in files.items():
        np.savez_compressed(folder / f"{name}.npz", **file)
