//! Every tiny model gives Python's numbers: logits, loss, and the same again through the cache.

use std::path::{Path, PathBuf};

use peft_core::{Ctx, State, tensors};
use peft_models::{Cache, Decoder, Input, OpenOptions, causal_loss, open};
use tch::{Kind, Tensor};

fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models");
    let mut all: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("fixtures")
        .map(|it| it.expect("entry").path())
        .filter(|it| it.join("base.safetensors").exists())
        .collect();
    all.sort();
    assert!(all.len() > 20, "the fixtures are there");
    all
}

fn load(dir: &Path) -> (Box<dyn Decoder>, State) {
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    let model = open(dir.to_str().expect("a path"), options).expect("a model");
    (
        model,
        tensors::read(&dir.join("base.safetensors")).expect("numbers"),
    )
}

fn input(state: &State, case: &str) -> Option<Input> {
    let get = |name: &str| {
        state
            .get(&format!("{case}.{name}"))
            .map(Tensor::shallow_clone)
    };
    Some(Input {
        attention_mask: get("attention_mask"),
        position_ids: get("position_ids"),
        ..Input::new(get("input_ids")?)
    })
}

/// The largest difference at attended positions, relative to the largest number there.
fn gap(got: &Tensor, expected: &Tensor, mask: Option<&Tensor>) -> f64 {
    let keep = |t: &Tensor| match mask {
        Some(mask) => t.index_select(0, &mask.reshape([-1]).nonzero().view([-1])),
        None => t.shallow_clone(),
    };
    let width = *got.size().last().expect("a dimension");
    let (got, expected) = (got.reshape([-1, width]), expected.reshape([-1, width]));
    let (got, expected) = (keep(&got), keep(&expected));
    ((&got - &expected).abs().max() / expected.abs().max()).double_value(&[])
}

#[test]
fn logits_and_loss_are_pythons() {
    for dir in models() {
        let (model, state) = load(&dir);
        for case in ["plain", "right", "left", "positions", "long"] {
            let Some(input) = input(&state, case) else {
                continue;
            };
            let got = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
            let mask = input.attention_mask.as_ref();
            let off = gap(&got, &state[&format!("{case}.logits")], mask);
            assert!(
                off < 1e-5,
                "{} {case}: logits off by {off:e}",
                dir.display()
            );

            let labels = &state[&format!("{case}.labels")];
            let (sum, count) = tch::no_grad(|| causal_loss(&*model, &input, labels, Ctx::EVAL));
            let expected = state[&format!("{case}.loss")].double_value(&[]);
            let loss = sum.double_value(&[]) / count as f64;
            assert!(
                (loss - expected).abs() < 1e-5 * expected.abs(),
                "{} {case}: {loss} {expected}",
                dir.display()
            );
        }
    }
}

#[test]
fn the_cache_changes_nothing() {
    for dir in models() {
        let (model, state) = load(&dir);
        if dir.ends_with("llama-rope-dynamic") {
            continue; // its frequencies depend on the length of the text
        }
        for case in ["plain", "left"] {
            let Some(input) = input(&state, case) else {
                continue;
            };
            let whole = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
            let seq = input.ids.size()[1];
            let mut cache = Cache::new();
            let mut parts = Vec::new();
            for (begin, len) in [(0, 3), (3, 1), (4, 1), (5, seq - 5)] {
                let narrow = |t: &Tensor| t.narrow(1, begin, len);
                let part = Input {
                    attention_mask: input
                        .attention_mask
                        .as_ref()
                        .map(|it| it.narrow(1, 0, begin + len)),
                    position_ids: input.position_ids.as_ref().map(narrow),
                    ..Input::new(narrow(&input.ids))
                };
                parts.push(tch::no_grad(|| {
                    let hidden = model.hidden(&part, Some(&mut cache), Ctx::EVAL);
                    model.head().forward(&hidden, Ctx::EVAL)
                }));
            }
            let off = gap(
                &Tensor::cat(&parts, 1),
                &whole,
                input.attention_mask.as_ref(),
            );
            assert!(off < 1e-5, "{} {case}: off by {off:e}", dir.display());
        }
    }
}

#[test]
fn a_real_model_gives_pythons_logits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let dir = root.join("target/models/smollm2");
    if !dir.exists() {
        println!("skipped: no model in target/models/smollm2; `cargo xtask test` fetches it");
        return;
    }
    let state = tensors::read(&root.join("fixtures/smollm2.safetensors")).expect("numbers");
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    let model = open(dir.to_str().expect("a path"), options).expect("a model");
    for prompt in ["prompt0", "prompt1", "prompt2"] {
        let get = |name: &str| &state[&format!("{prompt}.{name}")];
        let input = Input::new(get("input_ids").shallow_clone());
        let logits = tch::no_grad(|| model.forward(&input, Ctx::EVAL)).squeeze_dim(0); // [seq, vocab]
        let chosen = logits
            .index_select(0, &get("positions").to_kind(Kind::Int64))
            .index_select(1, &state["ids"].to_kind(Kind::Int64));
        let sums = logits.logsumexp(-1, false);
        for (got, name) in [(chosen, "chosen_logits"), (sums, "logsumexp")] {
            let off = (got - get(name)).abs().max().double_value(&[]);
            assert!(off < 1e-3, "{prompt} {name}: off by {off:e}");
        }
    }
}
