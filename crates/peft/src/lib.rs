//! Parameter-efficient fine-tuning: the crates of this workspace under one name.

pub use peft_core as core;
pub use peft_data as data;
pub use peft_lora as lora;
pub use peft_models as models;
pub use peft_torch as torch;
pub use peft_train as train;

pub use tch;
