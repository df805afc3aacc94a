//! `peft forward` against what Python computed, and what it refuses.

mod common;

use common::{close, fixture, peft, read, under};
use peft::core::{State, tensors};
use tch::{Kind, Tensor};

/// Adapters of every kind; the library's tests go through all there are.
const CASES: [&str; 8] = [
    "llama__r3",
    "llama__dora",
    "llama__save-head",
    "llama__init-pissa",
    "llama-tied__bias-all",
    "gpt2__lora-bias",
    "gpt2__tokens-list",
    "qwen2__r3",
];

fn inputs(io: &State, batch: &str) -> State {
    let mut inputs = under(io, batch);
    inputs.retain(|key, _| {
        ["input_ids", "attention_mask", "position_ids", "labels"].contains(&key.as_str())
    });
    inputs
}

/// Runs `peft forward` on a batch with more flags.
fn forward(case: &str, batch: &State, flags: &[&str]) -> State {
    let held = tempfile::tempdir().unwrap();
    let (to, from) = (
        held.path().join("in.safetensors"),
        held.path().join("out.safetensors"),
    );
    tensors::write(&to, batch).unwrap();
    let model = format!("fixtures/models/{}", case.split("__").next().unwrap());
    let adapter = format!("fixtures/lora/{case}");
    let mut args = vec![
        "forward",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--inputs",
        to.to_str().unwrap(),
    ];
    args.extend(["--out", from.to_str().unwrap()]);
    args.extend(flags);
    peft(args).ok();
    // Out of the mapped file, which is about to go.
    read(&from)
        .into_iter()
        .map(|(key, it)| (key, it.copy()))
        .collect()
}

#[test]
fn logits_loss_and_gradients_are_pythons() {
    for case in CASES {
        let path = fixture("lora").join(case).join("io.safetensors");
        if !path.exists() {
            continue; // a renamed case
        }
        let io = read(&path);
        let batch = inputs(&io, "right");
        let mask = batch.get("attention_mask").map(Tensor::shallow_clone);
        let ours = forward(case, &batch, &["--backward"]);
        close(
            &format!("{case} logits"),
            &ours["logits"],
            &io["right.logits"],
            mask.as_ref(),
        );
        close(
            &format!("{case} loss"),
            &ours["loss"].view([1]),
            &io["right.loss"].view([1]),
            None,
        );
        let wanted: Vec<&String> = io.keys().filter(|it| it.starts_with("grad.")).collect();
        let found: Vec<&String> = ours.keys().filter(|it| it.starts_with("grad.")).collect();
        assert_eq!(found, wanted, "{case}");
        for key in wanted {
            close(&format!("{case} {key}"), &ours[key], &io[key], None);
        }
        if let Some(merged) = io.get("right.merged_logits") {
            let ours = forward(case, &batch, &["--merged"]);
            close(
                &format!("{case} merged"),
                &ours["logits"],
                merged,
                mask.as_ref(),
            );
        }
    }
}

#[test]
fn wrong_inputs_are_refused_by_name() {
    let held = tempfile::tempdir().unwrap();
    let (to, from) = (
        held.path().join("in.safetensors"),
        held.path().join("out.safetensors"),
    );
    let ids = |values: &[i64]| Tensor::from_slice(values).view([1, values.len() as i64]);
    let state = |entries: &[(&str, Tensor)]| -> State {
        entries
            .iter()
            .map(|(key, it)| ((*key).to_owned(), it.shallow_clone()))
            .collect()
    };
    let good = ids(&[3, 4, 5]);
    let cases: [(State, &[&str]); 9] = [
        (state(&[]), &["no `input_ids`"]),
        (
            state(&[("input_ids", Tensor::from_slice(&[1i64, 2]))]),
            &["input_ids", "[2]"],
        ),
        (
            state(&[("input_ids", ids(&[1, 61]))]),
            &["input_ids", "below 61", "61 at [0, 1]"],
        ),
        (state(&[("input_ids", ids(&[1, -1]))]), &["input_ids", "-1"]),
        (
            state(&[("input_ids", good.to_kind(Kind::Float))]),
            &["input_ids", "whole numbers"],
        ),
        (
            state(&[("input_ids", good.copy()), ("labels", ids(&[1, 2]))]),
            &["labels", "[1, 2]", "[1, 3]"],
        ),
        (
            state(&[("input_ids", good.copy()), ("labels", ids(&[1, 2, 99]))]),
            &["labels", "-100"],
        ),
        (
            state(&[
                ("input_ids", good.copy()),
                ("attention_mask", ids(&[1, 2, 1])),
            ]),
            &["attention_mask", "0 or 1"],
        ),
        (
            state(&[("input_ids", good.copy()), ("label", ids(&[1, 2, 3]))]),
            &["`label`", "nearest is `labels`"],
        ),
    ];
    let args = |model: &str, more: &[&str]| {
        let mut args = vec![
            "forward".to_owned(),
            "--model".into(),
            format!("fixtures/models/{model}"),
        ];
        args.extend([
            "--inputs".into(),
            to.display().to_string(),
            "--out".into(),
            from.display().to_string(),
        ]);
        args.extend(more.iter().map(|&it| it.to_owned()));
        args
    };
    for (state, words) in cases {
        tensors::write(&to, &state).unwrap();
        peft(args("llama", &[])).fails(1, words);
        assert!(!from.exists());
    }
    tensors::write(&to, &state(&[("input_ids", ids(&[3; 33]))])).unwrap();
    peft(args("gpt2", &[])).fails(1, &["33 positions", "32"]);
    tensors::write(
        &to,
        &state(&[
            ("input_ids", good.copy()),
            ("position_ids", ids(&[30, 31, 32])),
        ]),
    )
    .unwrap();
    peft(args("gpt2", &[])).fails(1, &["position_ids", "0 to 31"]);
    peft(args("llama", &["--backward"])).fails(2, &["--adapter"]);
    let made_up = peft(args("llama", &["--task", "TOKEN_CLS"]));
    assert!(made_up.err.contains("no `score`"), "{}", made_up.err);
    peft(args(
        "llama",
        &["--adapter", "fixtures/lora/llama__r3", "--backward"],
    ))
    .fails(1, &["labels"]);
}
