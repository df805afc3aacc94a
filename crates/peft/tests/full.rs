//! Full fine-tuning, against Python's numbers: gradients of every parameter, and five steps of AdamW.

use std::path::Path;

use peft::{
    Ctx, Input, LoraConfig, ModelExt, OpenOptions, Settings, causal_loss,
    core::{Names, Slot, tensors},
    open,
    train::Optimizer,
};
use peft_testing::agree;
use tch::{Kind, Tensor};

fn fixtures(path: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    folder.join(path).to_string_lossy().into_owned()
}

#[test]
fn gradients_and_five_steps_are_pythons() {
    tch::set_num_threads(1);
    for name in ["gpt2", "gpt2-untied", "llama", "llama-tied", "qwen3-bias"] {
        let io = tensors::read(fixtures(&format!("full/{name}.safetensors")).as_ref()).unwrap();
        let mut model = open(&fixtures(&format!("models/{name}")), OpenOptions::default()).unwrap();
        let params = model.thaw(None).unwrap();
        let spec = model.spec();
        let settings = Settings {
            weight_decay: 0.1,
            max_grad_norm: 0.0,
            ..Settings::default()
        };
        let mut optimizer = Optimizer::new(&params, &settings).unwrap();
        let input = Input {
            attention_mask: Some(io["right.attention_mask"].shallow_clone()),
            ..Input::new(io["right.input_ids"].shallow_clone())
        };
        let mut losses = Vec::new();
        for step in 0..6 {
            let (sum, count) = causal_loss(&*model, &input, &io["right.labels"], Ctx::EVAL);
            let loss = sum / count as f64;
            losses.push(loss.double_value(&[]) as f32);
            optimizer.zero_grad();
            loss.backward();
            if step == 0 {
                let wanted = io.keys().filter(|key| key.starts_with("grad.")).count();
                assert_eq!(
                    params.len(),
                    wanted,
                    "{name}: other parameters than Python's"
                );
                for param in &params {
                    let key = format!("grad.{}.{}", param.at, param.name);
                    let grad = param.tensor.grad();
                    // GPT-2 keeps its layers, and Python their gradients, [in, out].
                    let turned =
                        spec.transposed && grad.dim() == 2 && io[&key].size() != grad.size()
                            || spec.transposed && param.at.contains(".c_") && grad.dim() == 2;
                    let grad = if turned { grad.tr() } else { grad };
                    agree(&grad, &io[&key], 1e-5, &format!("{name} {key}")).unwrap();
                }
            }
            optimizer.step(1e-2).unwrap();
        }
        agree(&Tensor::from_slice(&losses), &io["step_losses"], 1e-5, name).unwrap();
    }
}

#[test]
fn a_pattern_leaves_the_rest_frozen() {
    let mut model = open(&fixtures("models/llama"), OpenOptions::default()).unwrap();
    let params = model.thaw(Some(&Names::from(["lm_head", "norm"]))).unwrap();
    let names: Vec<&str> = params.iter().map(|it| it.at.as_str()).collect();
    assert_eq!(names, ["model.norm", "lm_head"]);
    let mut trained = 0;
    model.slots(&mut |_, slot| match slot {
        Slot::Linear(it) => trained += i32::from(it.base().weight().requires_grad()),
        Slot::Embedding(it) => trained += i32::from(it.weight().requires_grad()),
        Slot::Norm(it) => trained += i32::from(it.base().weight.requires_grad()),
        _ => {}
    });
    assert_eq!(trained, 2);
}

#[test]
fn what_cannot_be_thawed_is_refused_and_left_alone() {
    let mut model = open(&fixtures("models/llama"), OpenOptions::default()).unwrap();
    let error = model
        .thaw(Some(&Names::from(["q_prj"])))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("q_prj") && error.contains("q_proj"),
        "{error}"
    );
    model
        .inject("default", &LoraConfig::on(["q_proj"]))
        .unwrap();
    let error = model.thaw(None).unwrap_err().to_string();
    assert!(
        error.contains("`default`") && error.contains("merge or delete"),
        "{error}"
    );
    let ids = Tensor::from_slice(&[3i64, 4, 5]).unsqueeze(0);
    let y = model.forward(&Input::new(ids), Ctx::EVAL).sum(Kind::Float);
    y.backward();
    model.slots(&mut |_, slot| {
        if let Slot::Linear(it) = slot {
            assert!(!it.base().weight().requires_grad());
        }
    });
}

/// Else the pages of the file count as memory of the run, a quarter of what the moments take.
#[test]
#[cfg(target_os = "linux")]
fn a_thawed_model_lets_go_of_its_file() {
    for name in ["gpt2", "llama-tied", "qwen3-bias"] {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixtures(&format!("models/{name}"))).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
        let folder = folder.path().to_string_lossy().into_owned();
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.contains(&folder)
        };
        let mut model = open(&folder, OpenOptions::default()).unwrap();
        assert!(mapped(), "{name}: a model is pages of its file");
        model.thaw(None).unwrap();
        assert!(!mapped(), "{name}");
    }
}
