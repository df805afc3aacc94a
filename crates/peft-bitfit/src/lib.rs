//! BitFit: of all a model has, only the biases are trained.
//!
//! ```text
//! y = W x + b'                              b' [out], a linear layer
//! y = (x − μ)/√(σ² + eps) · w + b'          b' [hidden], a norm
//! ```
//!
//! Biases are a thousandth of a BERT, and changing them alone does nearly as well as changing everything where there are
//! few examples (2106.10199). Table 1 and section 4 there go further: the biases of the queries and of the first layer of the
//! feed-forward block do most of it. [`BitfitConfig::parts`] says so by name, for the models that this build knows.
//!
//! The adapter is b' − b, added to what the layer gives; the file holds b' itself, as Python's files hold biases. The base
//! stays as it is, so it switches, stacks with others and merges like any adapter. b' is kept in fp32.
//!
//! # Models without biases
//!
//! Llama has none. [`BitfitConfig::add_bias`] gives linear layers a bias of zero and trains it: then the file has a bias for
//! layers that have none in the base, and a merged model has biases, too. It is an option and no default, since a
//! model that grows parameters when it is merged should be asked for.
//!
//! # In Python
//!
//! `peft` has no BitFit. It has LoRA, which can train and save biases beside its factors (`bias="all"`) and can put a bias of
//! its own on a target (`lora_bias`). So a BitFit is, for Python, a LoRA of rank 1 whose factors are zero:
//! [`save_for_python`] writes that, and two lines load it:
//!
//! ```python
//! model = AutoModelForCausalLM.from_pretrained(base)
//! model = PeftModel.from_pretrained(model, folder)
//! ```
//!
//! [`load_from_python`] reads such a folder, ours or one that Python saved, back to a BitFit. What is lost on the way is
//! nothing; what is added are two vectors of zeros for each layer that had no bias (or, where all had one, for one layer).
//! Python cannot merge a bias into a layer that has none; merge here, and the model that is saved has it, if `transformers` has
//! a key for it in `config.json` (Llama: `attention_bias`, `mlp_bias`). Where it has none (Mistral), the merge is refused.
//!
//! # Learning rate
//!
//! As for every method that only moves what is there: ten times that of LoRA and more, 1e-3 to 1e-2.

mod config;
mod python;
mod tables;
mod tuner;

pub use config::{BitfitConfig, Part};
pub use python::{for_python, load_from_python, save_for_python};
