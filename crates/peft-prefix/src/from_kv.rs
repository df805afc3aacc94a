//! A prefix that begins as what the model remembers of a text.
//!
//! ```text
//! row t of the table = for each layer: Kₗ[:, t, :], Vₗ[:, t, :], head by head
//! ```
//!
//! A forward pass over a text leaves keys and values in every layer; the first n of them are a prefix of n tokens
//! that does what the text would do before the input. Training then starts from something that means something.

use peft_core::{Error, Model, ModelExt, Param, Result, SiteKind, VirtualTokens};
use tch::{Kind, Tensor};

use crate::PrefixConfig;

/// Keys and values of every layer as a table; each `[kv_heads, n, head_dim] -> [n, layers·2·kv_heads·head_dim]`, in fp32.
pub fn prefix_from_kv(kv: &[(Tensor, Tensor)]) -> Result<Tensor> {
    let Some((first, _)) = kv.first() else {
        return Err(PrefixConfig::fault(
            "there are no keys and values to begin with",
        ));
    };
    let expected = first.size();
    let mut slots = Vec::with_capacity(2 * kv.len());
    for (layer, (k, v)) in kv.iter().enumerate() {
        for (what, t) in [("keys", k), ("values", v)] {
            if t.size() != expected || t.dim() != 3 {
                return Err(Error::Shape {
                    key: format!("{what} of layer {layer}, [kv_heads, tokens, head_dim]"),
                    expected,
                    got: t.size(),
                });
            }
            slots.push(t.detach().to_kind(Kind::Float).transpose(0, 1)); // [n, kv_heads, head_dim]
        }
    }
    Ok(Tensor::f_stack(&slots, 1)?.flatten(1, 3)) // [n, 2L, kv_heads, head_dim]
}

/// Puts the keys and values of a text into the prefix called `name`, which is attached: the first of them, as many as
/// there are virtual tokens. Each `[kv_heads, at least n, head_dim]`.
///
/// Refused by name: a projected prefix, since a projection has no inverse, and an encoder with a decoder, where several layers
/// share what one text leaves different in each.
pub fn begin_with_kv<M: Model + ?Sized>(
    model: &mut M,
    name: &str,
    kv: &[(Tensor, Tensor)],
) -> Result<()> {
    model.known(name)?;
    let fault = |why: &str| {
        Err(Error::Name {
            name: name.to_owned(),
            why: why.to_owned(),
        })
    };
    let spec = model.spec();
    if spec.encoder_decoder {
        return fault(
            "keys and values of a text have no place in an encoder with a decoder, whose layers share rows of the prefix",
        );
    }
    let prompt = |model: &mut M| -> Vec<Param> {
        let outline = model.outline();
        let here = |it: &Param| {
            let site = outline.site(&it.at);
            site.is_some_and(|site| site.kind == SiteKind::Prompt)
        };
        model.params(name).into_iter().filter(here).collect()
    };
    let params = prompt(model);
    if params.iter().any(|it| it.name.starts_with("transform.")) {
        return fault(
            "prefix_projection computes the keys and values, and that has no inverse; begin with keys and values without it",
        );
    }
    let [table] = params.as_slice() else {
        return fault("it is no prefix: it has no table of keys and values");
    };
    let size = table.tensor.size();
    let row = spec.layers as i64 * 2 * spec.kv_heads * spec.head_dim;
    if table.name != VirtualTokens::TABLE || size.get(1) != Some(&row) {
        return fault("it is no prefix: it has no table of keys and values");
    }
    let rows = prefix_from_kv(kv)?;
    let there = rows.size()[0];
    if there < size[0] {
        return fault(&format!(
            "it has {} virtual tokens, and the text left keys and values of {there}; take a longer text or fewer tokens",
            size[0]
        ));
    }
    let first = rows.narrow(0, 0, size[0]);
    if first.size() != size {
        return Err(Error::Shape {
            key: VirtualTokens::TABLE.to_owned(),
            expected: size,
            got: first.size(),
        });
    }
    tch::no_grad(|| table.tensor.shallow_clone().f_copy_(&first))?;
    Ok(())
}
