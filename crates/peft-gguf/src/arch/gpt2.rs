//! GPT-2, whose `Conv1D` layers are linear layers with a transposed weight.

use super::{Keys, Layout, Linear, Table, blocks, object, vocab_size};
use crate::error::Result;
use crate::file::Gguf;
use serde_json::{Map, Value, json};

/// Keys that GPT-2 has besides the common ones.
const KNOWN: &[&str] = &["attention.layer_norm_epsilon"];

pub(super) fn build(gguf: &Gguf, keys: &Keys<'_>) -> Result<(Map<String, Value>, Table)> {
    keys.refuse_unknown(KNOWN)?;
    let layers = blocks(gguf, keys)?;
    let hidden = keys.size("embedding_length")?;
    let inner = keys.size("feed_forward_length")?;
    let heads = keys.size("attention.head_count")?;
    let positions = keys.size("context_length")?;
    let vocab = vocab_size(gguf, keys, hidden)?;
    if !hidden.is_multiple_of(heads) {
        let problem = format!("{heads} heads do not divide {hidden} values");
        return keys.wrong("attention.head_count", problem);
    }
    if keys.size_or("attention.head_count_kv", heads)? != heads {
        let problem = "GPT-2 has as many key as query heads";
        return keys.wrong("attention.head_count_kv", problem);
    }
    let tied = !gguf.has("output.weight");
    let config = object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": positions,
        "n_ctx": positions,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.positive("attention.layer_norm_epsilon")?,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": true,
    }));

    let conv = |inp, out| Linear {
        out,
        inp,
        bias: true,
        layout: Layout::Transposed,
    };
    let convs = [
        ("attn.c_attn", "attn_qkv", conv(hidden, 3 * hidden)),
        ("attn.c_proj", "attn_output", conv(hidden, hidden)),
        ("mlp.c_fc", "ffn_up", conv(hidden, inner)),
        ("mlp.c_proj", "ffn_down", conv(inner, hidden)),
    ];
    let mut table = Table::default();
    let norm = |table: &mut Table, to: &str, from: &str| {
        for part in ["weight", "bias"] {
            table.add(format!("{to}.{part}"), format!("{from}.{part}"), &[hidden]);
        }
    };
    table.add(
        "transformer.wte.weight",
        "token_embd.weight",
        &[vocab, hidden],
    );
    table.add(
        "transformer.wpe.weight",
        "position_embd.weight",
        &[positions, hidden],
    );
    for n in 0..layers {
        let (hf, blk) = (format!("transformer.h.{n}"), format!("blk.{n}"));
        for (to, from, conv) in &convs {
            table.linear(&format!("{hf}.{to}"), &format!("{blk}.{from}"), conv);
        }
        norm(
            &mut table,
            &format!("{hf}.ln_1"),
            &format!("{blk}.attn_norm"),
        );
        norm(
            &mut table,
            &format!("{hf}.ln_2"),
            &format!("{blk}.ffn_norm"),
        );
    }
    norm(&mut table, "transformer.ln_f", "output_norm");
    if !tied {
        table.add("lm_head.weight", "output.weight", &[vocab, hidden]);
    }
    Ok((config, table))
}
