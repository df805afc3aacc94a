//! Training an adapter: Python's losses, step by step, and the program's promises on a real decoder.

use std::path::{Path, PathBuf};

use peft::{
    Adapter, Ctx, Input, ModelExt, OpenOptions, Settings, builtin, causal_loss, core::tensors,
    open, train::Optimizer,
};
use tch::{Kind, Tensor};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// The losses before and after each of five steps of AdamW, for every adapter that Python trained.
#[test]
fn five_steps_are_pythons() {
    let mut done = 0;
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(fixtures().join("lora")).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let meta = peft::core::files::read_json(&dir.join("meta.json")).unwrap();
        let shared = meta["shared_memory"]
            .as_array()
            .is_some_and(|it| !it.is_empty());
        // Python steps numbers that two parameters share twice; second adapters are tested with LoRA.
        if meta.get("second").is_some() || shared {
            continue;
        }
        let io = tensors::read(&dir.join("io.safetensors")).unwrap();
        let Some(wanted) = io.get("step_losses") else {
            continue;
        };
        let got = losses(&dir, meta["model"].as_str().unwrap(), &io);
        let wanted = Vec::<f64>::try_from(wanted.to_kind(Kind::Double)).unwrap();
        // In bf16 the very activations are rounded to 2⁻⁸.
        let within = if name.contains("bf16") || name.contains("upcast") {
            2e-2
        } else {
            1e-5
        };
        for (step, (a, b)) in got.iter().zip(&wanted).enumerate() {
            if (a - b).abs() > within * b.abs().max(1.0) {
                wrong.push(format!("{name} step {step}: {a} for {b}"));
                break;
            }
        }
        done += 1;
    }
    assert!(
        wrong.is_empty(),
        "{} of {done}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(done > 50, "only {done}");
}

fn losses(dir: &Path, model: &str, io: &tensors::State) -> Vec<f64> {
    let folder = fixtures().join("models").join(model);
    let mut model = open(folder.to_str().unwrap(), OpenOptions::default()).unwrap();
    let adapter = Adapter::load(dir, &builtin()).unwrap();
    adapter.apply("default", &mut *model).unwrap();
    let settings = Settings {
        learning_rate: 1e-2,
        weight_decay: 0.1,
        max_grad_norm: 0.0,
        ..Settings::default()
    };
    let mut optimizer = Optimizer::new(&model.params("default"), &settings).unwrap();
    let input = Input {
        attention_mask: io.get("right.attention_mask").map(Tensor::shallow_clone),
        ..Input::new(io["right.input_ids"].shallow_clone())
    };
    (0..6)
        .map(|step| {
            // Evaluation mode: Python's dropout was off.
            let (sum, count) = causal_loss(&*model, &input, &io["right.labels"], Ctx::EVAL);
            let loss = sum / count as f64;
            if step < 5 {
                optimizer.zero_grad();
                loss.backward();
                optimizer.step(1e-2).unwrap();
            }
            loss.double_value(&[])
        })
        .collect()
}
