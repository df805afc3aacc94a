//! AdaLoRA over its whole schedule against Python: losses, budgets, and what is left of every rank after every step; and
//! in a run of the trainer, unbroken and stopped.

use peft::{
    AdaLoraConfig, AdamW, Adapter, Ctx, Input, ModelExt, OpenOptions, Settings, Tokenizer,
    causal_loss,
    core::{State, Tuner, tensors},
    open,
    tch::{self, Kind, Tensor},
    torch::Moments,
    train::{CausalLm, Checkpoint, Data, Event, Observer, Rows, Run},
};
use peft_testing::{
    close,
    fixtures::{self, cases},
};

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

/// Stops a run after so many steps.
struct StopAfter(usize, usize);

impl Observer for StopAfter {
    fn on(&mut self, event: &Event<'_>) {
        if let Event::Step { done, .. } = event {
            self.1 = *done;
        }
    }
    fn stop(&self) -> bool {
        self.1 >= self.0
    }
}

/// Stopped while ranks are taken away, and after the last mask: the run ends at the very files of an unbroken one, whose
/// last adapter has the ranks that it was to have.
#[test]
fn a_run_that_was_stopped_shares_out_the_same_ranks() {
    tch::set_num_threads(1);
    let home = fixtures::root().join("models/llama-text");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.jsonl");
    let words: Vec<String> = ('a'..='y')
        .map(|letter| format!("{{\"text\": \"{letter} truth universally {letter}cknowledged\"}}\n"))
        .collect();
    std::fs::write(&file, words.concat()).unwrap();
    let tokenizer = Tokenizer::open(&home).unwrap();
    let options = peft::data::Options::default();
    let data = peft::data::prepare(&[file], &tokenizer, &options, &|_| {}).unwrap();
    let settings = Settings {
        learning_rate: 0.02,
        per_device_train_batch_size: 4,
        max_steps: 10,
        ..Settings::default()
    };
    let adalora = AdaLoraConfig {
        init_r: 4,
        target_r: 2,
        tinit: 1,
        tfinal: 2,
        ..AdaLoraConfig::on(["q_proj", "v_proj", "down_proj"], 10)
    };
    let train = |name: &str, stops: &[usize]| {
        let run = Run::create(&dir.path().join(name), false).unwrap();
        let mut from = None;
        for stop in stops {
            let mut model = open(home.to_str().unwrap(), OpenOptions::default()).unwrap();
            tch::manual_seed(6);
            model.inject("default", &adalora).unwrap();
            let mut objective = CausalLm {
                model: &mut *model,
                name: "default",
                tuner: &adalora,
            };
            let rows = Rows::new(&data, (0..25).collect(), tokenizer.pad_id()).unwrap();
            let data = Data {
                train: rows,
                held_out: None,
            };
            let watch = &mut StopAfter(*stop, 0);
            peft::train::train(&mut objective, &settings, &data, &run, from, watch).unwrap();
            from = Checkpoint::load(&run.checkpoint()).ok();
        }
        let adapter = Adapter::load(&run.adapter(), &peft::builtin()).unwrap();
        let file = run.adapter().join("adapter_model.safetensors");
        (adapter.tuner.to_json(), std::fs::read(file).unwrap())
    };
    let (config, whole) = train("whole", &[99]);
    let pattern = config["rank_pattern"].as_object().unwrap();
    let left = pattern.values().flat_map(|it| it.as_array().unwrap());
    let left = left.filter(|it| it.as_bool() == Some(true)).count();
    assert_eq!(left, 2 * pattern.len());
    for (name, stops) in [("early", [5, 99]), ("late", [9, 99])] {
        let (again, parts) = train(name, &stops);
        assert_eq!(again["rank_pattern"], config["rank_pattern"], "{name}");
        assert!(parts == whole, "{name}: other bits");
    }
}
