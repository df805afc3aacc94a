//! What the loop promises, on the smallest model that has a loss: the next token given this one.

use std::fs;
use std::path::{Path, PathBuf};

use peft_core::{Ctx, Param, Schedule, State, tensors};
use peft_data::{Dataset, Tokenizer, prepare};
use peft_torch::checkpoint;
use peft_train::{
    Batch, Checkpoint, Data, Ending, Error, Event, Objective, Observer, Record, Result, Rows, Run,
    Settings, Summary, evaluate, read_log, train,
};
use tch::{Device, Kind, Tensor};

/// Scores of the next token: dropout(E[token]) · W, computed twice where that is asked for.
struct Bigram {
    embed: Tensor,
    head: Tensor,
    dropout: f64,
    /// The loss of this row is no number.
    poison: Option<usize>,
    /// Held-out losses to report instead of the real ones.
    script: Vec<f64>,
    /// A method that acts between steps.
    acts: bool,
}

/// Pulls the head towards the mean of its own gradients, and holds the embedding small.
#[derive(Debug, Default)]
struct Acts {
    mean: Option<Tensor>,
    seen: Vec<usize>,
}

impl Schedule for Acts {
    fn penalty(&self, params: &[Param]) -> Option<Tensor> {
        Some(params[0].tensor.square().sum(Kind::Float) * 0.01)
    }

    fn after_step(&mut self, params: &[Param], step: usize) -> peft_core::Result<()> {
        let _off = tch::no_grad_guard();
        let mut head = params[1].tensor.shallow_clone();
        let mean = match &self.mean {
            Some(mean) => mean * 0.7 + head.grad() * 0.3,
            None => head.grad().copy(),
        };
        let _ = head.g_sub_(&(&mean * (0.1 / step as f64)));
        self.mean = Some(mean);
        self.seen.push(step);
        Ok(())
    }

    fn state(&self) -> State {
        let mean = self.mean.iter().map(Tensor::shallow_clone);
        mean.map(|mean| ("mean".to_owned(), mean)).collect()
    }

    fn restore(&mut self, mut state: State) -> peft_core::Result<()> {
        self.mean = state.remove("mean");
        Ok(())
    }
}

impl Bigram {
    fn new() -> Bigram {
        tch::manual_seed(7);
        let random = |shape: [i64; 2]| {
            let it = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.3;
            it.set_requires_grad(true)
        };
        Bigram {
            embed: random([600, 5]),
            head: random([5, 600]),
            dropout: 0.1,
            poison: None,
            script: Vec::new(),
            acts: false,
        }
    }
}

impl Objective for Bigram {
    fn loss(&mut self, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
        let Batch::Text(batch) = batch else {
            panic!("texts only");
        };
        let shape = [batch.rows as i64, batch.cols as i64];
        let (input, labels) = peft_train::tensors(batch, Device::Cpu)?;
        let count = batch.trained_tokens() as i64;
        if let (false, Some(&loss)) = (ctx.train, self.script.first()) {
            self.script.remove(0);
            return Ok((Tensor::from(loss * count as f64), count));
        }
        let seen = Tensor::embedding(&self.embed, &input.ids, -1, false, false);
        let (p, head) = (self.dropout, self.head.shallow_clone());
        let scores = move |seen: &Tensor| seen.dropout(p, ctx.train).matmul(&head);
        let scores = match ctx.checkpoint {
            false => scores(&seen),
            true => checkpoint(&[&seen], &[&self.head], move |it, _| Ok(scores(&it[0])))?,
        };
        let scores = scores.narrow(1, 0, shape[1] - 1).reshape([-1, 600]);
        let labels = labels.narrow(1, 1, shape[1] - 1).reshape([-1]);
        let sum =
            scores.cross_entropy_loss::<Tensor>(&labels, None, tch::Reduction::Sum, -100, 0.0);
        let bad = self.poison.is_some_and(|row| batch.indices.contains(&row));
        Ok((if bad { sum * f64::NAN } else { sum }, count))
    }

    fn params(&mut self) -> Vec<Param> {
        let param = |at: &str, tensor: &Tensor| Param {
            adapter: "default".into(),
            at: at.into(),
            name: "weight".into(),
            norm: false,
            tensor: tensor.shallow_clone(),
        };
        vec![param("embed", &self.embed), param("head", &self.head)]
    }

    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        self.acts
            .then(|| Box::new(Acts::default()) as Box<dyn Schedule>)
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        let state = State::from([("head".into(), self.head.detach().copy())]);
        Ok(tensors::write(
            &dir.join("adapter_model.safetensors"),
            &state,
        )?)
    }

    fn device(&self) -> Device {
        Device::Cpu
    }
}

/// Twenty-three short rows of different lengths, tokenised.
fn dataset(dir: &Path) -> (Dataset, u32) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let tokenizer = Tokenizer::open(&fixtures.join("tokenizer")).unwrap();
    let words =
        "it is a truth universally acknowledged that a single man in possession of a good fortune";
    let row = |i: usize| {
        let text: Vec<&str> = words
            .split(' ')
            .cycle()
            .skip(i * 5)
            .take(2 + i % 7)
            .collect();
        format!("{{\"text\": \"{}\"}}\n", text.join(" "))
    };
    let path = dir.join("rows.jsonl");
    fs::write(&path, (0..23).map(row).collect::<String>()).unwrap();
    let options = peft_data::Options::default();
    let data = prepare(&[path], &tokenizer, &options, &|_| {}).unwrap();
    (data, tokenizer.pad_id())
}

struct World {
    dir: tempfile::TempDir,
    data: Dataset,
    pad: u32,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let (data, pad) = dataset(dir.path());
        World { dir, data, pad }
    }

    fn data(&self) -> Data<'_> {
        let rows = |range: std::ops::Range<usize>| {
            Rows::new(&self.data, range.collect(), self.pad).unwrap()
        };
        Data {
            train: rows(0..18),
            held_out: Some(rows(18..23)),
        }
    }

    fn run(&self, name: &str) -> Run {
        Run::create(&self.dir.path().join(name), false).unwrap()
    }

    fn run_at(&self, name: &str) -> Run {
        Run::at(&self.dir.path().join(name))
    }

    fn train(&self, name: &str, settings: &Settings, model: &mut Bigram) -> Result<Summary> {
        train(
            model,
            settings,
            &self.data(),
            &self.run(name),
            None,
            &mut (),
        )
    }
}

fn settings() -> Settings {
    Settings {
        learning_rate: 0.02,
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 2,
        num_train_epochs: 4.0,
        eval_steps: Some(4),
        save_steps: 5,
        weight_decay: 0.1,
        ..Settings::default()
    }
}

/// The log without what a clock or the system tells.
fn log(run: &Run) -> Vec<Record> {
    let mut records = read_log(&run.log()).unwrap();
    for record in &mut records {
        match record {
            Record::Step(it) => (it.tokens_per_second, it.memory) = (0.0, None),
            Record::Eval(it) => it.seconds = 0.0,
        }
    }
    records
}

fn bits(run: &Run, folder: PathBuf) -> Vec<u8> {
    fs::read(run.dir().join(folder).join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_run_learns_and_leaves_a_whole_folder() {
    let world = World::new();
    let summary = world.train("run", &settings(), &mut Bigram::new()).unwrap();
    assert_eq!((summary.steps, summary.ending), (12, Ending::Done)); // 5 batches, 3 windows an epoch
    assert!(
        summary.last_eval.unwrap() < summary.first_eval.unwrap() - 0.1,
        "{summary:?}"
    );
    let run = world.run_at("run");
    let records = log(&run);
    assert_eq!(records.len(), 12 + 1 + 3);
    let png = fs::read(run.curve("png")).unwrap();
    assert!(png.starts_with(b"\x89PNG") && png.len() > 10_000);
    let svg = fs::read_to_string(run.curve("svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("held out") && svg.ends_with("</svg>\n"));
    assert_eq!(bits(&run, run.best()), bits(&run, run.adapter()));
    let left = fs::read_dir(run.dir())
        .unwrap()
        .map(|it| it.unwrap().file_name());
    let left: Vec<_> = left
        .filter(|it| it.to_string_lossy().contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_seed_means_the_same_bits() {
    let world = World::new();
    world.train("a", &settings(), &mut Bigram::new()).unwrap();
    world.train("b", &settings(), &mut Bigram::new()).unwrap();
    let other = Settings {
        seed: 43,
        ..settings()
    };
    world.train("c", &other, &mut Bigram::new()).unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| world.run_at(name));
    assert_eq!(bits(&a, a.adapter()), bits(&b, b.adapter()));
    assert_eq!(log(&a), log(&b));
    assert_ne!(bits(&a, a.adapter()), bits(&c, c.adapter()));
}

/// Stops after some steps.
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

#[test]
fn a_resumed_run_is_an_unbroken_run() {
    let world = World::new();
    let plateau = Settings {
        lr_scheduler_type: serde_json::from_str("\"reduce_on_plateau\"").unwrap(),
        lr_scheduler_kwargs: serde_json::from_str(r#"{"patience": 0, "threshold": 0.5}"#).unwrap(),
        logging_steps: 2,
        eval_steps: Some(2),
        ..settings()
    };
    let twice = Settings {
        gradient_checkpointing: true,
        ..settings()
    };
    let cases = [
        (settings(), false),
        (plateau, false),
        (settings(), true),
        (twice, false),
    ];
    for (at, (settings, acts)) in cases.iter().enumerate() {
        let bigram = || Bigram {
            acts: *acts,
            ..Bigram::new()
        };
        let whole = format!("whole{at}");
        world.train(&whole, settings, &mut bigram()).unwrap();
        let whole = world.run_at(&whole);
        for stop in [1, 5, 8] {
            let run = world.run(&format!("broken{at}-{stop}"));
            let data = world.data();
            let mut first = bigram();
            let mut watch = StopAfter(stop, 0);
            let summary = train(&mut first, settings, &data, &run, None, &mut watch).unwrap();
            assert_eq!((summary.ending, summary.steps), (Ending::Interrupted, stop));
            // What was logged after the checkpoint, as by a run that was killed, does not count.
            let mut text = fs::read_to_string(run.log()).unwrap();
            text.push_str("{\"step\": 99");
            fs::write(run.log(), text).unwrap();

            let mut second = bigram();
            drop(tch::no_grad(|| second.head.fill_(1.0)));
            let from = Checkpoint::load(&run.checkpoint()).unwrap();
            let data = world.data();
            let summary = train(&mut second, settings, &data, &run, Some(from), &mut ()).unwrap();
            assert_eq!(summary.ending, Ending::Done);
            assert_eq!(log(&run), log(&whole), "stopped after {stop}");
            assert_eq!(bits(&run, run.adapter()), bits(&whole, whole.adapter()));
            assert_eq!(bits(&run, run.best()), bits(&whole, whole.best()));
        }
    }
}

#[test]
fn gradient_checkpointing_reaches_the_model_in_training_alone_and_changes_nothing() {
    struct Asked(Bigram, Vec<(bool, bool)>);
    impl Objective for Asked {
        fn loss(&mut self, batch: &Batch, ctx: Ctx) -> Result<(Tensor, i64)> {
            self.1.push((ctx.train, ctx.checkpoint));
            self.0.loss(batch, ctx)
        }
        fn params(&mut self) -> Vec<Param> {
            self.0.params()
        }
        fn save(&mut self, dir: &Path) -> Result<()> {
            self.0.save(dir)
        }
        fn device(&self) -> Device {
            self.0.device()
        }
    }
    let world = World::new();
    let [plain, twice] = [false, true].map(|on| {
        let settings = Settings {
            gradient_checkpointing: on,
            ..settings()
        };
        let mut model = Asked(Bigram::new(), Vec::new());
        let run = world.run(&format!("{on}"));
        train(&mut model, &settings, &world.data(), &run, None, &mut ()).unwrap();
        assert!(model.1.contains(&(true, on)) && model.1.contains(&(false, false)));
        assert!(!model.1.contains(&(true, !on)) && !model.1.contains(&(false, true)));
        run
    });
    assert_eq!(log(&plain), log(&twice));
    assert_eq!(bits(&plain, plain.adapter()), bits(&twice, twice.adapter()));
}

/// One step by hand: the gradient of the mean loss and of the term, AdamW, then what the method does.
#[test]
fn a_method_adds_to_the_loss_and_acts_after_the_step() {
    let world = World::new();
    let settings = Settings {
        max_steps: 1,
        gradient_accumulation_steps: 2,
        max_grad_norm: 0.0,
        weight_decay: 0.0,
        ..settings()
    };
    let run = |acts: bool, name: &str| {
        let mut model = Bigram {
            acts,
            dropout: 0.0,
            ..Bigram::new()
        };
        let before = model.embed.detach().copy();
        let summary = world.train(name, &settings, &mut model).unwrap();
        let step = tch::no_grad(|| &model.embed - before);
        (
            step,
            model.embed.grad().copy(),
            model.head.detach().copy(),
            summary.loss.unwrap(),
        )
    };
    let (_, plain, head, loss) = run(false, "plain");
    let (_, with, moved, same_loss) = run(true, "acts");
    let start = Bigram::new().embed.detach();
    let term = (with - plain) - start * 0.02;
    assert!(
        term.abs().max().double_value(&[]) < 1e-6,
        "the gradient of the term"
    );
    assert!(
        (head - moved).abs().max().double_value(&[]) > 0.0,
        "nothing was done after the step"
    );
    assert_eq!(
        loss, same_loss,
        "the term is not part of the loss that is reported"
    );
}

#[test]
fn a_window_is_the_big_batch() {
    let world = World::new();
    let step = |batch: usize, window: usize, name: &str| {
        let settings = Settings {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: window,
            num_train_epochs: 2.0,
            ..settings()
        };
        let mut model = Bigram {
            dropout: 0.0,
            ..Bigram::new()
        };
        world.train(name, &settings, &mut model).unwrap();
        (model, log(&world.run_at(name)))
    };
    // 18 rows: windows of 8, 8 and 2 rows.
    let (big, big_log) = step(8, 1, "big");
    for (batch, window) in [(1, 8), (2, 4), (4, 2)] {
        let (small, small_log) = step(batch, window, &format!("small{batch}"));
        for (a, b) in [(&big.embed, &small.embed), (&big.head, &small.head)] {
            let worst = (a - b).abs().max().double_value(&[]);
            assert!(worst < 1e-5, "{batch} × {window}: {worst}");
        }
        assert_eq!(big_log.len(), small_log.len());
        for (a, b) in big_log.iter().zip(&small_log) {
            if let (Record::Step(a), Record::Step(b)) = (a, b) {
                assert!((a.loss - b.loss).abs() < 1e-5 && (a.grad_norm - b.grad_norm).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn a_loss_that_is_no_number_names_its_rows_and_changes_nothing() {
    let world = World::new();
    let mut model = Bigram {
        poison: Some(11),
        ..Bigram::new()
    };
    let error = world.train("run", &settings(), &mut model).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }));
    let text = error.to_string();
    assert!(
        text.contains("rows.jsonl, row 12") && text.contains("NaN"),
        "{text}"
    );
    for param in model.params() {
        assert!(
            bool::try_from(param.tensor.isfinite().all()).unwrap(),
            "{}",
            param.at
        );
    }
}

#[test]
fn the_best_is_kept_and_patience_ends() {
    let world = World::new();
    let settings = Settings {
        eval_steps: Some(1),
        early_stopping_patience: Some(2),
        per_device_eval_batch_size: 100, // one batch an evaluation, so one line of the script each
        eval_on_start: false,
        ..settings()
    };
    let script = vec![3.0, 2.0, 2.5, 2.4, 1.0];
    let mut model = Bigram {
        script,
        ..Bigram::new()
    };
    let summary = world.train("run", &settings, &mut model).unwrap();
    assert_eq!((summary.ending, summary.steps), (Ending::EarlyStopped, 4));
    assert_eq!(
        summary.best.map(|best| (best.step, best.eval_loss)),
        Some((2, 2.0))
    );
    let run = world.run_at("run");
    let stop = Settings {
        max_steps: 2,
        early_stopping_patience: None,
        ..settings
    };
    // The learning rate depends on the planned steps, so it is held still.
    let constant = |it: Settings| Settings {
        lr_scheduler_type: serde_json::from_str("\"constant\"").unwrap(),
        ..it
    };
    assert_ne!(bits(&run, run.best()), bits(&run, run.adapter()));
    world
        .train("two", &constant(stop.clone()), &mut Bigram::new())
        .unwrap();
    let four = constant(Settings {
        max_steps: 4,
        ..stop
    });
    let mut model = Bigram {
        script: vec![3.0, 2.0, 2.5, 2.4],
        ..Bigram::new()
    };
    world.train("four", &four, &mut model).unwrap();
    let (two, four) = (world.run_at("two"), world.run_at("four"));
    assert_eq!(bits(&four, four.best()), bits(&two, two.adapter()));
}

/// Numbers that are none in JSON, and a loss that is none at all: they neither end a run nor are they ever the best.
#[test]
fn a_held_out_loss_may_be_beyond_numbers() {
    let world = World::new();
    let settings = Settings {
        eval_steps: Some(1),
        max_steps: 4,
        early_stopping_patience: Some(3),
        per_device_eval_batch_size: 100,
        save_steps: 2,
        ..settings()
    };
    let script = [800.0, f64::NAN, f64::INFINITY, 5000.0, 700.0];
    let model = |from: usize| Bigram {
        script: script[from..].to_vec(),
        ..Bigram::new()
    };
    let summary = world.train("run", &settings, &mut model(0)).unwrap();
    let best = |summary: &Summary| summary.best.map(|it| (it.step, it.eval_loss));
    assert_eq!(best(&summary), Some((4, 700.0)));
    let run = world.run_at("run");
    let evaluations: Vec<_> = log(&run)
        .into_iter()
        .filter_map(|it| match it {
            Record::Eval(it) => Some(it),
            Record::Step(_) => None,
        })
        .collect();
    let losses: Vec<f64> = evaluations.iter().map(|it| it.eval_loss).collect();
    assert_eq!((losses[0], losses[3], losses[4]), (800.0, 5000.0, 700.0));
    assert!(losses[1].is_nan() && losses[2].is_nan());
    assert!(evaluations[0].perplexity.is_nan() && evaluations[4].perplexity > 1e300);
    let marked: Vec<bool> = evaluations.iter().map(|it| it.best).collect();
    assert_eq!(marked, [false, false, false, true, true]);
    assert!(run.curve("png").is_file() && run.curve("svg").is_file());

    // A run that stops where there is no loss goes on.
    let broken = world.run("broken");
    let data = world.data();
    let mut watch = StopAfter(2, 0);
    train(&mut model(0), &settings, &data, &broken, None, &mut watch).unwrap();
    let from = Checkpoint::load(&broken.checkpoint()).unwrap();
    let summary = train(
        &mut model(3),
        &settings,
        &world.data(),
        &broken,
        Some(from),
        &mut (),
    )
    .unwrap();
    assert_eq!(best(&summary), Some((4, 700.0)));

    // A log that was damaged is named before anything is computed.
    let damaged = world.run("damaged");
    let mut watch = StopAfter(2, 0);
    train(
        &mut model(0),
        &settings,
        &world.data(),
        &damaged,
        None,
        &mut watch,
    )
    .unwrap();
    let text = fs::read_to_string(damaged.log()).unwrap();
    fs::write(damaged.log(), text.replacen("\"step\"", "\"stop\"", 1)).unwrap();
    let from = Checkpoint::load(&damaged.checkpoint()).unwrap();
    let mut untouched = model(3);
    let error = train(
        &mut untouched,
        &settings,
        &world.data(),
        &damaged,
        Some(from),
        &mut (),
    )
    .unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
    assert_eq!(untouched.script.len(), 2, "nothing was evaluated");
}

#[test]
fn evaluation_weighs_tokens_not_batches() {
    let world = World::new();
    let mut model = Bigram::new();
    let rows = world.data().train;
    let mut loss = |batch: &Batch| model.loss(batch, Ctx::EVAL);
    let all = evaluate(&mut loss, &rows, 100, &mut |_, _| {}).unwrap();
    for size in [1, 3, 8] {
        let some = evaluate(&mut loss, &rows, size, &mut |_, _| {}).unwrap();
        assert_eq!(some.labels, all.labels);
        assert!((some.loss() - all.loss()).abs() < 1e-6);
    }
}

#[test]
fn a_run_does_not_go_on_with_other_settings_or_data() {
    let world = World::new();
    let run = world.run("run");
    let mut watch = StopAfter(2, 0);
    train(
        &mut Bigram::new(),
        &settings(),
        &world.data(),
        &run,
        None,
        &mut watch,
    )
    .unwrap();
    let again = |settings: &Settings, data: &Data<'_>| {
        let from = Checkpoint::load(&run.checkpoint()).unwrap();
        train(
            &mut Bigram::new(),
            settings,
            data,
            &run,
            Some(from),
            &mut (),
        )
        .unwrap_err()
        .to_string()
    };
    let other = Settings {
        learning_rate: 0.5,
        ..settings()
    };
    assert!(again(&other, &world.data()).contains("the settings it began with"));
    let fewer = Rows::new(&world.data, (0..9).collect(), world.pad).unwrap();
    let data = Data {
        train: fewer,
        held_out: None,
    };
    assert!(again(&settings(), &data).contains("18 rows"));
}

#[test]
fn a_folder_that_is_not_empty_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "mine").unwrap();
    for overwrite in [false, true] {
        let error = Run::create(dir.path(), overwrite).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }
    assert_eq!(
        fs::read_to_string(dir.path().join("thesis.txt")).unwrap(),
        "mine"
    );
}
