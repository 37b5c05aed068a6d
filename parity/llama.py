"""One random Llama in three systems: the weights of `policies.decoder` put into tunix's and Hugging Face's own models.

Imports the other systems only where one of their models is made.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_async_grpo import policies
from jax_async_grpo.types import Params, Policy

__all__ = ["Sizes", "decoder", "hugging_face_llama", "tunix_llama", "weights_by_name"]

ROPE_BASE, EPSILON = 1e6, 1e-6  # the base of tunix, whose attention takes no other


class Sizes(NamedTuple):
    """Attributes: as the arguments of `policies.decoder`; as many key-value heads as heads."""

    vocab_size: int = 32_000
    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    mlp_width: int = 688


def decoder(sizes: Sizes) -> Policy:
    """The same model here."""
    return policies.decoder(**sizes._asdict(), rope_base=ROPE_BASE, norm_epsilon=EPSILON)


def weights_by_name(params: Params, sizes: Sizes) -> dict[str, np.ndarray]:
    """The weights by Hugging Face's names, [out, in], from the flat layout of `policies.decoder`.

    Its heads stand one after the other and turn the pairs (i, i + size/2), as Llama's do in Hugging Face's layout.
    """
    weights = {"model.embed_tokens.weight": params["embedding"], "lm_head.weight": params["unembedding"]}
    weights["model.norm.weight"] = params["final_norm"]["scale"]
    for layer in range(sizes.num_layers):
        attention, mlp, prefix = params[f"attention_{layer}"], params[f"mlp_{layer}"], f"model.layers.{layer}."
        key, value = np.split(np.asarray(attention["key_value"]), 2)
        gate, up = np.split(np.asarray(mlp["gate_up"]), 2)
        of_layer = {"self_attn.q_proj": attention["query"], "self_attn.k_proj": key, "self_attn.v_proj": value}
        of_layer |= {"self_attn.o_proj": attention["out"]}
        of_layer |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": mlp["down"]}
        of_layer |= {"input_layernorm": params[f"attention_norm_{layer}"]["scale"]}
        of_layer |= {"post_attention_layernorm": params[f"mlp_norm_{layer}"]["scale"]}
        weights |= {f"{prefix}{name}.weight": array for name, array in of_layer.items()}
    return {name: np.array(array, np.float32) for name, array in weights.items()}


def hugging_face_llama(params: Params, sizes: Sizes):
    """transformers.LlamaForCausalLM, ready to generate."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        rms_norm_eps=EPSILON,
        rope_theta=ROPE_BASE,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    named = {name: torch.from_numpy(array) for name, array in weights_by_name(params, sizes).items()}
    model.load_state_dict(named, strict=True)
    return model


def tunix_llama(params: Params, sizes: Sizes):
    """tunix.models.llama3.model.Llama3."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    heads, size, weights = sizes.num_heads, sizes.width // sizes.num_heads, weights_by_name(params, sizes)
    config = llama3.ModelConfig(
        num_layers=sizes.num_layers,
        vocab_size=sizes.vocab_size,
        embed_dim=sizes.width,
        hidden_dim=sizes.mlp_width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        norm_eps=EPSILON,
        rope_theta=int(ROPE_BASE),
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))

    def fill(variable, name, convert=lambda weight: weight):
        array = jnp.asarray(convert(weights[f"{name}.weight"]))
        if variable.get_value().shape != array.shape:
            raise ValueError(f"{name} has shape {array.shape} here and {variable.get_value().shape} in tunix")
        variable.set_value(array)

    fill(model.embedder.input_embedding, "model.embed_tokens")
    fill(model.lm_head.w, "lm_head", np.transpose)
    fill(model.final_norm.w, "model.norm")
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj"):  # [D, heads, size], or [heads, D, size] in older versions
            variable = getattr(layer.attn, name).w
            axes = (0, 2, 1) if variable.get_value().shape[0] == heads else (2, 0, 1)
            fill(variable, f"{prefix}self_attn.{name}", lambda w, axes=axes: w.reshape(heads, size, -1).transpose(axes))
        fill(layer.attn.o_proj.w, f"{prefix}self_attn.o_proj", lambda w: w.T.reshape(heads, size, -1))
        for name in ("gate_proj", "up_proj", "down_proj"):
            fill(getattr(layer.mlp, name).kernel, f"{prefix}mlp.{name}", np.transpose)
        for name in ("input_layernorm", "post_attention_layernorm"):
            fill(getattr(layer, name).w, f"{prefix}{name}")
    return model
