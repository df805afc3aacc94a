//! Parameter-efficient fine-tuning on libtorch: the crates of this workspace under one name.
//!
//! A base model stays as it is, and a method puts something small at named places in it, trains
//! that, and saves it: megabytes instead of gigabytes, in the files that Python's `peft` reads and writes. This
//! crate adds little of its own: the list of methods that it knows ([`builtin`]) and where a method and a model
//! meet ([`begin_prefix_at`]); who needs one part only
//! depends on that part.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`core`] | the contracts: places, adapters, methods, base formats, and their files |
//! | [`lora`] | LoRA and its relatives |
//! | [`ia3`] | (IA)³ |
//! | [`norm`] | LN tuning |
//! | [`bitfit`] | BitFit |
//! | [`adalora`] | AdaLoRA |
//! | [`vera`] | VeRA |
//! | [`prefix`], [`prompt`] | prefix tuning; prompt tuning and P-tuning |
//! | [`metrics`] | accuracy, F1, exact match, BLEU, ROUGE, with tables and pictures |
//! | [`quant`] | bases in 4 and 8 bits |
//! | [`models`] | GPT-2, the Llama family, BERT, RoBERTa, T5; loading, saving, generating |
//! | [`data`] | conversations to batches: formats, templates, tokenizers |
//! | [`train`] | a training loop that one can read |
//! | [`gguf`] | GGUF files as Hugging Face folders |
//! | [`torch`] | what the bindings to libtorch lack |
//!
//! # From a folder to an adapter and back
//!
//! The names at the root of this crate are enough for the usual way. A model is opened, dressed with a method
//! under a name, trained by any loop, and its adapter is taken out and saved:
//!
//! ```
//! use peft::{Adapter, Ctx, Input, LoraConfig, ModelExt, OpenOptions, Sampling, open};
//! use tch::{Kind, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models/llama");
//! # let out = tempfile::tempdir()?;
//! # let out = out.path();
//! let mut model = open(folder, OpenOptions::default())?;
//! let lora = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::on(["q_proj", "v_proj"]) };
//! model.inject("default", &lora)?;
//!
//! // Any text as ids; the labels are the ids themselves, and the model shifts them.
//! let ids = Tensor::from_slice(&[3i64, 14, 15, 9, 26, 5, 35]).view([1, 7]); // [batch, seq]
//! let loss = |model: &dyn peft::Decoder, ctx| {
//!     let (sum, count) = peft::causal_loss(model, &Input::new(ids.shallow_clone()), &ids, ctx);
//!     sum / count as f64
//! };
//! let before = loss(&*model, Ctx::EVAL).double_value(&[]);
//! let params: Vec<Tensor> = model.trainable("default").into_iter().map(|it| it.tensor).collect();
//! for _ in 0..20 {
//!     loss(&*model, Ctx::TRAIN).backward();
//!     tch::no_grad(|| {
//!         for mut p in params.iter().map(Tensor::shallow_clone) {
//!             p -= p.grad() * 0.5; // gradient descent, to show that any optimiser will do
//!             p.zero_grad();
//!         }
//!     });
//! }
//! assert!(loss(&*model, Ctx::EVAL).double_value(&[]) < before);
//!
//! Adapter::of("default", &lora, &mut *model)?.save(&out.join("adapter"))?;
//!
//! // Elsewhere, another day:
//! let mut fresh = open(folder, OpenOptions::default())?;
//! Adapter::load(&out.join("adapter"), &peft::builtin())?.apply("default", &mut *fresh)?;
//! fresh.merge_and_unload()?;
//! let more = Sampling { max_new_tokens: 5, ..Sampling::default() };
//! let answer = peft::generate(&*fresh, &[vec![3, 14]], &more, &mut |_, _| std::ops::ControlFlow::Continue(()))?;
//! assert_eq!(answer[0].tokens.len(), 5);
//! # Ok(())
//! # }
//! ```
//!
//! The whole of it, with batches, schedules, evaluation and checkpoints, is [`train::train`]; the program `peft`
//! is a thin layer over these crates.
//!
//! # A method of one's own
//!
//! A method is a type that implements [`core::Config`] in a crate that depends on `peft-core` alone. It need not be
//! known here: `peft::builtin().with::<MyMethod>()` reads its files beside all others.

mod begin;
mod open;
mod residual;

pub use peft_adalora as adalora;
pub use peft_bitfit as bitfit;
pub use peft_core as core;
pub use peft_data as data;
pub use peft_gguf as gguf;
pub use peft_ia3 as ia3;
pub use peft_lora as lora;
pub use peft_metrics as metrics;
pub use peft_models as models;
pub use peft_norm as norm;
pub use peft_prefix as prefix;
pub use peft_prompt as prompt;
pub use peft_quant as quant;
pub use peft_torch as torch;
pub use peft_train as train;
pub use peft_vera as vera;

pub use begin::begin_prefix_at;
pub use open::{open, open_in, open_task};
pub use peft_adalora::AdaLoraConfig;
pub use peft_bitfit::BitfitConfig;
pub use peft_core::{Adapter, Ctx, Error, Model, ModelExt, Registry, Result, Targets, Tuner};
pub use peft_data::{Message, Tokenizer};
pub use peft_ia3::Ia3Config;
pub use peft_lora::{LoraConfig, MergedLora};
pub use peft_models::{
    Cache, Decoder, HeadOptions, Input, Labels, Network, OpenOptions, Sampling, Task, causal_loss,
    generate, save,
};
pub use peft_norm::NormConfig;
pub use peft_prefix::PrefixConfig;
pub use peft_prompt::{PromptConfig, PtuningConfig};
pub use peft_torch::AdamW;
pub use peft_train::Settings;
pub use peft_vera::VeraConfig;
pub use residual::{Residual, begin_at_residual};

pub use tch;

/// Every method that this build knows, by the `peft_type` of its files.
///
/// A program may know more: `builtin().with::<MyMethod>()`.
pub fn builtin() -> Registry {
    Registry::default()
        .with::<LoraConfig>()
        .with::<MergedLora>()
        .with::<AdaLoraConfig>()
        .with::<VeraConfig>()
        .with::<Ia3Config>()
        .with::<BitfitConfig>()
        .with::<NormConfig>()
        .with::<PrefixConfig>()
        .with::<PromptConfig>()
        .with::<PtuningConfig>()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_method_is_known() {
        let known = super::builtin().known();
        let all = [
            "ADALORA",
            "BITFIT",
            "IA3",
            "LN_TUNING",
            "LORA",
            "MERGED_LORA",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
            "VERA",
        ];
        assert_eq!(known, all);
    }
}
