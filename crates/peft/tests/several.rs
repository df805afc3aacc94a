//! Several adapters on one model, against Python's numbers in `fixtures/methods/combine`.

use std::path::PathBuf;

use peft::{
    Adapter, Ctx, Decoder, HeadOptions, Input, Network, OpenOptions, Task,
    core::{State, files, tensors},
    lora::{Rank, hotswap, to_lora},
    models::Source,
    open, open_task,
    tch::{self, Kind, Tensor},
};
use peft_testing::{close, fixtures, same_bits};

fn folder() -> PathBuf {
    fixtures::root().join("methods/combine")
}

fn adapter(name: &str) -> Adapter {
    Adapter::load(&folder().join(name), &peft::builtin()).unwrap()
}

fn llama() -> Box<dyn Decoder> {
    let path = fixtures::root().join("models/llama");
    open(path.to_str().unwrap(), OpenOptions::default()).unwrap()
}

/// Logits where there is something to attend to.
fn logits(model: &dyn Decoder, io: &State) -> Tensor {
    let mask = &io["swapped.attention_mask"];
    let input = Input {
        attention_mask: Some(mask.shallow_clone()),
        ..Input::new(io["swapped.input_ids"].shallow_clone())
    };
    tch::no_grad(|| model.forward(&input, Ctx::EVAL)) * mask.unsqueeze(-1)
}

/// Python refuses the last two, whose scales it cannot change, and swaps `b` under the scale of the first unless
/// the model has been prepared; here each is what it is alone.
#[test]
fn a_swapped_adapter_is_what_it_is_alone() {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let mut model = llama();
    adapter("a").apply("style", &mut *model).unwrap();
    for name in ["b", "patterned", "rooted"] {
        hotswap(&mut *model, "style", &adapter(name)).unwrap();
        let expected = &io[&format!("alone.{name}.logits")];
        let mask = io["swapped.attention_mask"].unsqueeze(-1);
        close(&logits(&*model, &io), &(expected * mask), 1e-5, name);
    }
    let before = logits(&*model, &io);
    let message = hotswap(&mut *model, "style", &adapter("c"))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("o_proj") || message.contains("v_proj"),
        "{message}"
    );
    assert!(same_bits(&logits(&*model, &io), &before));
    adapter("c").replace("style", &mut *model).unwrap();
    let mask = io["swapped.attention_mask"].unsqueeze(-1);
    close(
        &logits(&*model, &io),
        &(&io["alone.c.logits"] * mask),
        1e-5,
        "c",
    );
}

fn bert() -> Box<dyn Network> {
    let path = fixtures::root().join("methods/bases/bert-classes");
    let head = HeadOptions::default();
    open_task(
        &Source::Folder(path),
        Task::SeqCls,
        OpenOptions::default(),
        &head,
    )
    .unwrap()
}

/// Python's `convert_to_lora` for a LoRA with a head: the same products, ranks and whole modules.
#[test]
fn a_converted_adapter_is_pythons() {
    let io = tensors::read(&folder().join("combine.safetensors")).unwrap();
    let facts = files::read_json(&folder().join("combine.json")).unwrap();
    let method = fixtures::root().join("methods/lora/bert-classes__default");
    let adapter = Adapter::load(&method, &peft::builtin()).unwrap();
    let mut model = bert();
    adapter.apply("a", &mut *model).unwrap();
    for (rank, word) in [(Rank::Number(2), "2"), (Rank::Energy(0.9), "0.9")] {
        let made = to_lora(&mut *model, "a", &*adapter.tuner, rank).unwrap();
        let what = format!("lora/bert-classes__default/{word}");
        let facts = &facts["converted"][&what];
        let ranks = facts["ranks"].as_object().unwrap();
        assert_eq!(made.layers.len(), ranks.len());
        for layer in &made.layers {
            assert_eq!(ranks[&layer.at], layer.rank, "{}", layer.at);
            let half = |name: &str| {
                let key = format!("base_model.model.{}.lora_{name}.weight", layer.at);
                made.adapter.state[&key].shallow_clone()
            };
            let theirs = &io[&format!("converted.{what}.{}", layer.at)];
            close(&half("B").matmul(&half("A")), theirs, 1e-5, &layer.at);
        }
        for key in facts["heads"].as_array().unwrap() {
            let key = key.as_str().unwrap();
            close(&made.adapter.state[key], &adapter.state[key], 1e-9, key);
        }
    }
    let input = || Input::new(Tensor::from_slice(&[3i64, 14, 15, 9, 26, 5]).view([2, 3]));
    let outputs =
        |model: &dyn Network| tch::no_grad(|| model.outputs(&input(), Ctx::EVAL)).unwrap();
    let made = to_lora(&mut *model, "a", &*adapter.tuner, Rank::Number(3)).unwrap();
    let mut plain = bert();
    made.adapter.apply("a", &mut *plain).unwrap();
    let [expected, found] =
        [&model, &plain].map(|it| outputs(&**it)["logits"].to_kind(Kind::Float));
    close(&found, &expected, 1e-6, "logits");
}
