//! AdaLoRA over its whole schedule against Python: losses, budgets, and what is left of every rank after every step.

use peft::{
    AdamW, Adapter, Ctx, Input, ModelExt, OpenOptions, causal_loss,
    core::{State, Tuner, tensors},
    open,
    tch::{Kind, Tensor},
    torch::Moments,
};
use peft_testing::{close, fixtures::cases};

/// E of every layer, in order of names. `[layers, r]`
fn values(model: &mut dyn peft::Decoder) -> Tensor {
    let mut all = model.params("default");
    all.retain(|it| it.name == "lora_E");
    all.sort_by(|a, b| a.at.cmp(&b.at));
    let rows: Vec<Tensor> = all
        .iter()
        .map(|it| it.tensor.detach().view([-1]).copy())
        .collect();
    Tensor::stack(&rows, 0)
}

#[test]
fn the_schedule_is_pythons() {
    tch::set_num_threads(1);
    let mut done = 0;
    for case in cases("methods/adalora") {
        let told = case.dir.join("schedule.safetensors");
        if !told.exists() || case.meta["task"] != "CAUSAL_LM" {
            continue;
        }
        done += 1;
        let told: State = tensors::read(&told).unwrap();
        let options = OpenOptions {
            kind: Some(Kind::Float),
            ..OpenOptions::default()
        };
        let mut model = open(&case.model.to_string_lossy(), options).unwrap();
        let start = Adapter::load(&case.dir.join("start"), &peft::builtin()).unwrap();
        start.resume("default", &mut *model).unwrap();
        let tuner: Box<dyn Tuner> = start.tuner;
        let mut schedule = tuner.schedule().unwrap();

        let ids = case.tensor("right.input_ids");
        let labels = case.tensor("right.labels");
        let input = Input {
            attention_mask: Some(case.tensor("right.attention_mask").shallow_clone()),
            ..Input::new(ids.shallow_clone())
        };
        let mut trained: Vec<Tensor> = model
            .trainable("default")
            .into_iter()
            .map(|it| it.tensor)
            .collect();
        let mut moments: Vec<Moments> = trained.iter().map(Moments::new).collect();
        let steps = told["losses"].size()[0];
        for step in 0..steps {
            let what = |part: &str| format!("{}: {part} of step {step}", case.name);
            let (sum, count) = causal_loss(&*model, &input, labels, Ctx::TRAIN);
            let task = sum / count as f64;
            let params = model.params("default");
            let loss = &task + schedule.penalty(&params).unwrap();
            close(&task, &told["task_losses"].get(step), 1e-5, &what("loss"));
            close(
                &loss,
                &told["losses"].get(step),
                1e-5,
                &what("loss with the term"),
            );
            trained.iter_mut().for_each(Tensor::zero_grad);
            loss.backward();
            let mut pairs: Vec<_> = trained.iter_mut().zip(&mut moments).collect();
            AdamW::default().step(&mut pairs, 1e-2, 0.0).unwrap();
            close(
                &values(&mut *model),
                &told["stepped"].get(step),
                1e-4,
                &what("E after the optimiser"),
            );
            schedule.after_step(&params, step as usize).unwrap();
            let (ours, theirs) = (values(&mut *model), told["masked"].get(step));
            assert!(
                ours.eq(0.0).equal(&theirs.eq(0.0)),
                "{}",
                what("the ranks that are left")
            );
            close(&ours, &theirs, 1e-4, &what("E after the mask"));
        }
        let ours = Adapter::of("default", &*tuner, &mut *model).unwrap();
        let theirs = Adapter::load(&case.dir, &peft::builtin()).unwrap();
        assert_eq!(
            ours.tuner.to_json()["rank_pattern"],
            theirs.tuner.to_json()["rank_pattern"],
            "{}",
            case.name
        );
        for (key, tensor) in &theirs.state {
            assert_eq!(ours.state[key].size(), tensor.size(), "{} {key}", case.name);
        }
    }
    assert!(done > 2, "fixtures of schedules");
}
