#!/usr/bin/env python3
"""Python's encoders of virtual tokens in numbers: what tests/python.rs compares itself with.

    python crates/peft-prompt/tests/python.py

Writes python.safetensors beside this file. For each case: `<case>.<name in the live model>`, the parameters after they
were moved by noise; `<case>.rows`, what the encoder gives in evaluation; `<case>.grad.<name>` of sum(rows * weights); and
`<case>.fresh`, the checksums of the parameters as seed 7 begins them. `text` and `vocab` are how a prompt begins.
"""

from pathlib import Path

import torch
from peft import PromptEncoderConfig, PromptTuningConfig
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.prompt_tuning import PromptEmbedding
from safetensors.torch import save_file

ROWS, WIDTH, HIDDEN, VOCAB = 4, 10, 7, 23


def sizes(**more):
    return dict(num_virtual_tokens=ROWS, token_dim=WIDTH, num_transformer_submodules=1, num_attention_heads=2, num_layers=2, **more)


def encoder(**more):
    torch.manual_seed(7)
    return PromptEncoder(PromptEncoderConfig(**sizes(encoder_hidden_size=HIDDEN, **more)))


def measure(out, case, module):
    for name, param in module.named_parameters():
        out[f"{case}.fresh.{name}"] = param.detach().clone()
    torch.manual_seed(11)
    with torch.no_grad():
        for param in module.parameters():
            param += torch.randn_like(param) * 0.3
    module.eval()
    rows = module(torch.arange(ROWS)[None])[0]
    weights = (torch.arange(ROWS * WIDTH) * 1.3).sin().view(ROWS, WIDTH)
    (rows * weights).sum().backward()
    out[f"{case}.rows"] = rows.detach()
    for name, param in module.named_parameters():
        out[f"{case}.{name}"] = param.detach().clone()
        out[f"{case}.grad.{name}"] = param.grad.clone()


def main():
    torch.set_num_threads(1)
    out = {}
    measure(out, "mlp", encoder(encoder_reparameterization_type="MLP"))
    measure(out, "lstm", encoder(encoder_reparameterization_type="LSTM", encoder_num_layers=2))

    torch.manual_seed(5)
    words = torch.nn.Embedding(VOCAB, WIDTH)
    out["words"] = words.weight.detach().clone()
    torch.manual_seed(7)
    sampled = PromptEmbedding(PromptTuningConfig(**sizes(prompt_tuning_init="SAMPLE_VOCAB")), words)
    out["sampled"] = sampled.embedding.weight.detach().clone()
    torch.manual_seed(7)
    random = PromptEmbedding(PromptTuningConfig(**sizes()), words)
    out["random"] = random.embedding.weight.detach().clone()
    save_file(out, Path(__file__).with_suffix(".safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
