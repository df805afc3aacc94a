//! `peft combine` and `peft convert`: what comes out does what went in.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{close, fixture, peft};
use peft::{
    Adapter, Ctx, Input, ModelExt, OpenOptions,
    core::{State, tensors},
    open,
};
use tch::{Kind, Tensor};

/// Logits of a model with adapters, each in its own weight's worth.
fn logits(model: &str, adapters: &[&Path]) -> Tensor {
    let model = fixture(&format!("models/{model}"));
    let mut model = open(&model.to_string_lossy(), OpenOptions::default()).unwrap();
    for (at, dir) in adapters.iter().enumerate() {
        let name = format!("a{at}");
        let adapter = Adapter::load(dir, &peft::builtin()).unwrap();
        adapter.apply(&name, &mut *model).unwrap();
        model.switch(&name, true).unwrap();
    }
    let vocab = model.vocab();
    let ids: Vec<i64> = (0..24).map(|i| (i * 7 + 3) % vocab).collect();
    let input = Input::new(Tensor::from_slice(&ids).view([2, 12]));
    tch::no_grad(|| model.forward(&input, Ctx::EVAL)).to_kind(Kind::Double)
}

fn typed(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn state(dir: &Path) -> State {
    common::read(&dir.join("adapter_model.safetensors"))
}

#[test]
fn concatenated_adapters_do_what_both_do() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("both");
    let parts: [PathBuf; 2] =
        ["llama__r3", "llama__target-all-linear"].map(|it| fixture(&format!("lora/{it}")));
    peft([
        "combine",
        &typed(&parts[0]),
        &typed(&parts[1]),
        "--out",
        &typed(&out),
    ])
    .ok();
    let both = logits("llama", &[&parts[0], &parts[1]]);
    close("both", &logits("llama", &[&out]), &both, None);

    let half = dir.path().join("half");
    peft([
        "combine",
        &typed(&parts[0]),
        &typed(&parts[0]),
        "--weights",
        "0.25,0.75",
        "--combination-type",
        "svd",
        "--out",
        &typed(&half),
    ])
    .ok();
    let one = logits("llama", &[&parts[0]]);
    close(
        "a quarter and the rest",
        &logits("llama", &[&half]),
        &one,
        None,
    );
}

#[test]
fn a_dora_becomes_a_lora() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("lora/gpt2__dora");
    let (whole, small) = (dir.path().join("whole"), dir.path().join("small"));
    let said = peft([
        "convert",
        &typed(&from),
        "--rank",
        "24",
        "--out",
        &typed(&whole),
    ])
    .ok();
    assert!(said.contains("rank"), "{said}");
    let wanted = logits("gpt2", &[&from]);
    close("all ranks", &logits("gpt2", &[&whole]), &wanted, None);
    peft(["check", &typed(&whole)]).ok();

    peft([
        "convert",
        &typed(&from),
        "--keep",
        "0.9",
        "--out",
        &typed(&small),
    ])
    .ok();
    let count = |dir: &Path| state(dir).values().map(Tensor::numel).sum::<usize>();
    assert!(count(&small) < count(&whole));
}

#[test]
fn what_cannot_be_combined_or_converted_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (out_typed, lora) = (typed(&out), typed(&fixture("lora/llama__r3")));
    let combine = |more: &[&str]| {
        let mut args = vec!["combine", "--out", &out_typed];
        args.extend(more);
        peft(args)
    };
    let other = typed(&fixture("lora/gpt2__r3"));
    let dora = typed(&fixture("lora/llama__dora"));
    for (more, code, words) in [
        (
            vec![&*lora, "--weights", "1,2"],
            2,
            vec!["2 numbers", "1 adapter"],
        ),
        (vec![&*lora, "--weights", "nan"], 2, vec!["weight"]),
        (
            vec![&*lora, &*lora, "--combination-type", "tie"],
            2,
            vec!["tie", "ties"],
        ),
        (
            vec![&*lora, &*lora, "--combination-type", "ties"],
            2,
            vec!["density"],
        ),
        (vec![&*lora, &*lora, "--svd-rank", "3"], 2, vec!["svd_rank"]),
        (vec![&*lora, "--rules", "pythons"], 2, vec!["peft-0.20"]),
        (
            vec![&*lora, "--majority-sign-method", "totl"],
            2,
            vec!["total"],
        ),
        (
            vec![&*lora, &*other],
            2,
            vec!["gpt2", "llama", "--same-base"],
        ),
        (vec![&*lora, &*dora], 2, vec!["use_dora", "convert it"]),
        (vec![&*lora, "fixtures"], 1, vec!["adapter_config.json"]),
        (vec![&*lora, "--weights", "0"], 2, vec!["all 0"]),
    ] {
        combine(&more).fails(code, &words);
        assert!(!out.exists(), "{more:?}");
    }
    let harmed = dir.path().join("harmed");
    fs::create_dir(&harmed).unwrap();
    fs::copy(
        fixture("lora/llama__r3").join("adapter_config.json"),
        harmed.join("adapter_config.json"),
    )
    .unwrap();
    let mut factors = state(&fixture("lora/llama__r3"));
    let _ = factors.values_mut().next().unwrap().fill_(f64::NAN);
    tensors::write(&harmed.join("adapter_model.safetensors"), &factors).unwrap();
    combine(&[&lora, &typed(&harmed)]).fails(1, &["harmed", "lora_", "is not finite"]);
    assert!(!out.exists());
    let convert = |more: &[&str]| {
        let mut args = vec!["convert", "--out", &out_typed];
        args.extend(more);
        peft(args)
    };
    convert(&[&lora]).fails(2, &["--rank"]);
    convert(&[&lora, "--rank", "0"]).fails(2, &["rank 0"]);
    convert(&[&lora, "--keep", "1.5"]).fails(2, &["1.5"]);
    convert(&[common::TEXT, "--rank", "4"]).fails(2, &["nothing to convert"]);
    assert!(!out.exists());
}
