#!/usr/bin/env python3
"""Python's prefix encoders in numbers, and what T5's decoder gets: what tests/python.rs compares itself with.

    python crates/peft-prefix/tests/python.py

Writes python.safetensors beside this file.

    projected.<name>, projected.rows, projected.grad.<name>     a projection after it was moved by noise, its table, and
                                                                gradients of sum(rows * weights)
    projected.fresh.<name>                                      the same as seed 7 begins it
    llama.table, llama.{keys,values}.<layer>                    a table, and what get_prompt makes of it under grouped queries
    t5.table, t5.{keys,values}.<layer>                          the same for the self-attention of a decoder behind an encoder
    kv.{keys,values}.<layer>, kv.table                          a cache of five tokens as a table of three
"""

from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from peft.tuners.prefix_tuning import PrefixEncoder
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

TOKENS, LAYERS, HEADS, HEAD, HIDDEN = 4, 3, 2, 3, 7
WIDTH = HEADS * HEAD


def projected(out):
    torch.manual_seed(7)
    module = PrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=TOKENS,
            token_dim=WIDTH,
            num_transformer_submodules=1,
            num_attention_heads=HEADS,
            num_layers=LAYERS,
            encoder_hidden_size=HIDDEN,
            prefix_projection=True,
        )
    )
    for name, param in module.named_parameters():
        out[f"projected.fresh.{name}"] = param.detach().clone()
    torch.manual_seed(11)
    with torch.no_grad():
        for param in module.parameters():
            param += torch.randn_like(param) * 0.3
    rows = module(torch.arange(TOKENS)[None])[0]
    weights = (torch.arange(rows.numel()) * 1.3).sin().view_as(rows)
    (rows * weights).sum().backward()
    out["projected.rows"] = rows.detach()
    for name, param in module.named_parameters():
        out[f"projected.{name}"] = param.detach().clone()
        out[f"projected.grad.{name}"] = param.grad.clone()


def dealt(out, case, model, task, cache):
    model = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS))
    out[f"{case}.table"] = model.prompt_encoder["default"].embedding.weight.detach().clone()
    for layer, it in enumerate(cache(model.get_prompt(1)).layers):
        out[f"{case}.keys.{layer}"] = it.keys[0].detach().contiguous().clone()
        out[f"{case}.values.{layer}"] = it.values[0].detach().contiguous().clone()


def main():
    torch.set_num_threads(1)
    out = {}
    projected(out)
    torch.manual_seed(5)
    llama = LlamaConfig(
        vocab_size=23,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=HEAD,
    )
    dealt(out, "llama", LlamaForCausalLM(llama), "CAUSAL_LM", lambda it: it)
    t5 = T5Config(vocab_size=23, d_model=WIDTH, d_kv=HEAD, num_heads=HEADS, d_ff=8, num_layers=LAYERS, decoder_start_token_id=0)
    dealt(out, "t5", T5ForConditionalGeneration(t5), "SEQ_2_SEQ_LM", lambda it: it.self_attention_cache)
    cache = [(torch.randn(1, HEADS, 5, HEAD), torch.randn(1, HEADS, 5, HEAD)) for _ in range(LAYERS)]
    for layer, (keys, values) in enumerate(cache):
        out[f"kv.keys.{layer}"], out[f"kv.values.{layer}"] = keys[0].clone(), values[0].clone()
    out["kv.table"] = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3)
    save_file(out, Path(__file__).with_suffix(".safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
