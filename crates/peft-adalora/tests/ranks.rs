//! How ranks are shared out: against the equations written out number by number; and in files.

use peft_adalora::{AdaLoraConfig, Allocator};
use peft_core::{Adapter, Ctx, ModelExt, Param, Registry, Schedule, Tuner, parse};
use peft_testing::toy::{Kit, Toy};
use peft_testing::{close, same_bits};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

fn config(more: Value) -> AdaLoraConfig {
    let mut json = json!({
        "peft_type": "ADALORA", "init_r": 3, "target_r": 1, "lora_alpha": 7, "total_step": 12, "tinit": 2, "tfinal": 3,
        "deltaT": 2, "beta1": 0.7, "beta2": 0.6, "target_modules": ["q_proj", "v_proj", "o_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    parse::<AdaLoraConfig>(json).unwrap()
}

fn out(model: &Toy) -> Tensor {
    let ids = (Tensor::arange(14, (Kind::Int64, Device::Cpu)) * 3)
        .remainder(23)
        .view([2, 7]);
    model.forward(&ids, Ctx::EVAL)
}

/// One step: gradients of something, and plain descent.
fn step(model: &mut Toy, schedule: &mut dyn Schedule, number: usize) -> Vec<Param> {
    for mut it in model.trainable("default") {
        it.tensor.zero_grad();
    }
    let weights = (Tensor::arange(23, (Kind::Float, Device::Cpu)) * (1.3 + number as f64)).sin();
    let loss = (out(model).tanh() * weights).sum(Kind::Float);
    let params = model.params("default");
    match schedule.penalty(&params) {
        Some(term) => (loss + term).backward(),
        None => loss.backward(),
    }
    for mut it in model.trainable("default") {
        let _off = tch::no_grad_guard();
        let step = it.tensor.grad() * 0.05;
        let _ = it.tensor.g_sub_(&step);
    }
    schedule.after_step(&params, number).unwrap();
    params
}

fn numbers(t: &Tensor) -> Vec<Vec<f64>> {
    Vec::<Vec<f64>>::try_from(t.detach().to_kind(Kind::Double)).unwrap()
}

fn of<'a>(params: &'a [Param], at: &str, name: &str) -> &'a Tensor {
    &params
        .iter()
        .find(|it| it.at == at && it.name == name)
        .unwrap()
        .tensor
}

const LAYERS: [&str; 3] = ["blocks.0.q_proj", "blocks.1.v_proj", "blocks.1.o_proj"];

/// Equations 8 to 10 and 12 of the paper, in loops.
#[derive(Default)]
struct Loops {
    mean: std::collections::BTreeMap<String, Vec<Vec<f64>>>,
    unsure: std::collections::BTreeMap<String, Vec<Vec<f64>>>,
}

impl Loops {
    fn see(&mut self, params: &[Param], (b1, b2): (f64, f64)) {
        for it in params.iter().filter(|it| it.name.starts_with("lora_")) {
            let key = format!("{}.{}", it.at, it.name);
            let (w, g) = (numbers(&it.tensor), numbers(&it.tensor.grad()));
            let zeros = vec![vec![0.0; w[0].len()]; w.len()];
            let mean = self
                .mean
                .entry(key.clone())
                .or_insert_with(|| zeros.clone());
            let unsure = self.unsure.entry(key).or_insert(zeros);
            for i in 0..w.len() {
                for j in 0..w[0].len() {
                    let now = (w[i][j] * g[i][j]).abs();
                    mean[i][j] = b1 * mean[i][j] + (1.0 - b1) * now;
                    unsure[i][j] = b2 * unsure[i][j] + (1.0 - b2) * (now - mean[i][j]).abs();
                }
            }
        }
    }

    fn score(&self, at: &str, i: usize) -> f64 {
        let s = |name: &str, i: usize, j: usize| {
            let key = format!("{at}.{name}");
            self.mean[&key][i][j] * self.unsure[&key][i][j]
        };
        let size = |name: &str| {
            let t = &self.mean[&format!("{at}.{name}")];
            (t.len(), t[0].len())
        };
        let (_, inp) = size("lora_A");
        let (out, _) = size("lora_B");
        let a = (0..inp).map(|j| s("lora_A", i, j)).sum::<f64>() / inp as f64;
        let b = (0..out).map(|j| s("lora_B", j, i)).sum::<f64>() / out as f64;
        s("lora_E", i, 0) + a + b
    }
}

#[test]
fn the_ranks_that_go_are_those_that_matter_least() {
    let config = config(json!({}));
    let mut model = toy();
    tch::manual_seed(9);
    model.inject("default", &config).unwrap();
    let mut schedule = config.schedule().unwrap();
    let mut loops = Loops::default();
    // init_r · 3 = 9 to target_r · 3 = 3 between steps 2 and 9, at every second step and at the last.
    let budgets = [(4, 5), (6, 3), (8, 3), (9, 3)];
    let mut left: Option<Vec<(usize, usize)>> = None;
    for number in 1..=12 {
        let before: Vec<Vec<f64>> = LAYERS
            .iter()
            .map(|at| numbers(of(&model.params("default"), at, "lora_E")).concat())
            .collect();
        let params = step(&mut model, &mut *schedule, number);
        if number < 9 {
            loops.see(&unmasked(&params, &before), (0.7, 0.6));
        }
        if let Some((_, budget)) = budgets.iter().find(|(at, _)| *at == number) {
            let mut all: Vec<(f64, usize, usize)> = Vec::new();
            for (layer, at) in LAYERS.iter().enumerate() {
                all.extend((0..3).map(|i| (loops.score(at, i), layer, i)));
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            left = Some(all[..*budget].iter().map(|it| (it.1, it.2)).collect());
        }
        let masked = budgets.iter().any(|(at, _)| *at == number) || number > 9;
        for (layer, at) in LAYERS.iter().enumerate() {
            for (i, e) in numbers(of(&params, at, "lora_E"))
                .concat()
                .into_iter()
                .enumerate()
            {
                let gone = masked && !left.as_ref().unwrap().contains(&(layer, i));
                assert_eq!(e == 0.0, gone, "step {number}, {at}, rank {i}: {e}");
            }
        }
    }
}

/// What was there when the gradients were taken: the mask that a step ends with is not part of its importance. Here E is
/// needed after the optimiser and before the mask, and that is E − 0.05 · gradient.
fn unmasked(params: &[Param], before: &[Vec<f64>]) -> Vec<Param> {
    let fix = |it: &Param| {
        let mut it = it.clone();
        if let (Some(layer), "lora_E") =
            (LAYERS.iter().position(|at| *at == it.at), it.name.as_str())
        {
            let was = Tensor::from_slice(&before[layer])
                .view([-1, 1])
                .to_kind(Kind::Float);
            let grad = it.tensor.grad();
            let value = (was - &grad * 0.05).set_requires_grad(true);
            (&value * &grad).sum(Kind::Float).backward();
            it.tensor = value;
        }
        it
    };
    params.iter().map(fix).collect()
}

#[test]
fn the_budget_is_pythons() {
    let allocator = Allocator::new(&config(
        json!({"total_step": 100, "tinit": 10, "tfinal": 20, "deltaT": 7}),
    ));
    // (init − target) · (1 − (t − 10)/70)³ + target, cut off, of 9 at first and 3 at last
    for (t, budget, due) in [
        (0, 9, false),
        (10, 9, false),
        (11, 8, false),
        (14, 8, true),
        (45, 3, false),
        (80, 3, false),
        (81, 3, true),
    ] {
        assert_eq!(allocator.budget(t, 9, 3), (budget, due), "step {t}");
    }
}

#[test]
fn factors_are_drawn_to_be_orthogonal() {
    let config = config(json!({"orth_reg_weight": 0.3}));
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let params = model.params("default");
    let term = config.schedule().unwrap().penalty(&params).unwrap();
    let mut sum = 0.0;
    for at in LAYERS {
        let (a, b) = (of(&params, at, "lora_A"), of(&params, at, "lora_B"));
        for t in [a.matmul(&a.tr()), b.tr().matmul(b)] {
            let off = t - Tensor::eye(3, (Kind::Float, Device::Cpu));
            sum += off.square().sum(Kind::Double).sqrt().double_value(&[]);
        }
    }
    let expected = Tensor::from(sum / 6.0 * 0.3);
    close(&term.to_kind(Kind::Double), &expected, 1e-6, "term");
    let none = self::config(json!({"orth_reg_weight": 0.0}));
    assert!(none.schedule().unwrap().penalty(&params).is_none());
}

/// After the schedule the file has the ranks that are left and says which; loaded it gives the very same, also when it is
/// loaded, trained no further and saved again.
#[test]
fn a_file_has_the_ranks_that_are_left() {
    for target in [1, 0] {
        let config = config(json!({"target_r": target}));
        let mut model = toy();
        model.inject("default", &config).unwrap();
        let mut schedule = config.schedule().unwrap();
        for number in 1..=12 {
            step(&mut model, &mut *schedule, number);
        }
        let adapter = Adapter::of("default", &config, &mut model).unwrap();
        let json = adapter.tuner.to_json();
        let left: usize = LAYERS
            .iter()
            .map(|at| {
                let kept = json["rank_pattern"][format!("{at}.lora_E")]
                    .as_array()
                    .unwrap();
                assert_eq!(kept.len(), 3);
                let left = kept.iter().filter(|it| **it == json!(true)).count();
                let key = |name: &str| format!("base_model.model.{at}.{name}");
                assert_eq!(adapter.state[&key("lora_A")].size()[0], left as i64);
                assert_eq!(adapter.state[&key("lora_E")].size(), [left as i64, 1]);
                assert_eq!(adapter.state[&key("lora_B")].size()[1], left as i64);
                left
            })
            .sum();
        assert_eq!(left, 3 * target as usize);

        let dir = tempfile::tempdir().unwrap();
        adapter.save(dir.path()).unwrap();
        let registry = Registry::default().with::<AdaLoraConfig>();
        let loaded = Adapter::load(dir.path(), &registry).unwrap();
        let mut fresh = toy();
        loaded.apply("again", &mut fresh).unwrap();
        close(&out(&fresh), &out(&model), 1e-6, "loaded");
        let twice = Adapter::of("again", &*loaded.tuner, &mut fresh).unwrap();
        assert_eq!(twice.tuner.to_json()["rank_pattern"], json["rank_pattern"]);
        assert!(
            twice
                .state
                .iter()
                .all(|(key, t)| same_bits(t, &adapter.state[key]))
        );
        fresh.merge().unwrap();
        close(&out(&fresh), &out(&model), 1e-5, "merged");
    }
}

/// Between two masks a masked rank grows again: a file must give what the model gives.
#[test]
fn a_rank_that_grows_again_is_in_the_file() {
    let config = config(json!({}));
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let mut schedule = config.schedule().unwrap();
    for number in 1..=5 {
        step(&mut model, &mut *schedule, number); // the last mask is of step 4
    }
    let adapter = Adapter::of("default", &config, &mut model).unwrap();
    let mut fresh = toy();
    adapter.apply("again", &mut fresh).unwrap();
    assert!(same_bits(&out(&fresh), &out(&model)));
}

/// Interrupted in the middle, with what it remembers put back, it ends at the same bits.
#[test]
fn it_goes_on_from_what_it_remembers() {
    let config = config(json!({}));
    let start = |model: &mut Toy| {
        tch::manual_seed(9);
        model.inject("default", &config).unwrap();
    };
    let mut whole = toy();
    start(&mut whole);
    let mut schedule = config.schedule().unwrap();
    let mut parts = toy();
    start(&mut parts);
    let mut first = config.schedule().unwrap();
    for number in 1..=12 {
        step(&mut whole, &mut *schedule, number);
        if number == 6 {
            let remembered = first.state();
            assert_eq!(remembered.len(), 2 * 3 * LAYERS.len());
            first = config.schedule().unwrap();
            first.restore(remembered).unwrap();
        }
        step(&mut parts, &mut *first, number);
    }
    let pairs = whole
        .params("default")
        .into_iter()
        .zip(parts.params("default"));
    assert!(
        pairs
            .into_iter()
            .all(|(a, b)| same_bits(&a.tensor, &b.tensor))
    );
    let unknown = peft_core::State::from([("ipt".to_owned(), Tensor::from(1f32))]);
    assert!(
        first
            .restore(unknown)
            .unwrap_err()
            .to_string()
            .contains("`ipt`")
    );
}

fn refused(more: Value, words: &[&str]) {
    let mut json = json!({"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": 10, "init_r": 3, "target_r": 2});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let mut model = toy();
    let result = parse::<AdaLoraConfig>(json.clone()).and_then(|it| model.inject("default", &it));
    let message = result
        .err()
        .unwrap_or_else(|| panic!("{json} is accepted"))
        .to_string();
    for word in words {
        assert!(message.contains(word), "{json}: `{message}` lacks `{word}`");
    }
    assert!(model.adapters().is_empty());
}

#[test]
fn what_does_not_fit() {
    refused(json!({"total_step": null}), &["total_step must be given"]);
    refused(json!({"total_step": 0}), &["total_step"]);
    refused(
        json!({"tinit": 7, "tfinal": 3}),
        &["tinit 7", "tfinal 3", "10"],
    );
    refused(json!({"deltaT": 0}), &["deltaT 0"]);
    refused(json!({"beta1": 1.0}), &["beta1"]);
    refused(json!({"beta2": 0.0}), &["beta2"]);
    refused(json!({"orth_reg_weight": -0.5}), &["orth_reg_weight"]);
    refused(json!({"init_r": 0}), &["init_r"]);
    refused(json!({"target_r": 4}), &["target_r is 4", "3"]);
    refused(json!({"lora_dropout": 1.0}), &["lora_dropout"]);
    refused(json!({"use_dora": true}), &["use_dora"]);
    refused(
        json!({"loftq_config": {"loftq_bits": 4}}),
        &["loftq_config"],
    );
    refused(
        json!({"layers_pattern": "blocks"}),
        &["layers_to_transform"],
    );
    refused(
        json!({"target_modules": ["norm"]}),
        &["blocks.0.norm", "a norm"],
    );
    refused(
        json!({"target_modules": ["q_prj"]}),
        &["q_prj", "blocks.0.q_proj"],
    );
    refused(
        json!({"rank_pattern": {"blocks.0.q_proj.lora_E": [true]}}),
        &["1 entries", "blocks.0.q_proj.lora_E", "3"],
    );
    refused(
        json!({"rank_pattern": {"blocks.0.q_porj.lora_E": [true, true, false]}}),
        &["q_porj", "nearest is `blocks.0.q_proj.lora_E`"],
    );
    refused(json!({"delta_t": 3}), &["delta_t"]);
}

#[test]
fn a_mask_without_anything_seen_is_an_error() {
    let config = config(json!({"tinit": 0, "tfinal": 0, "total_step": 1}));
    let mut model = toy();
    model.inject("default", &config).unwrap();
    let params = model.params("default");
    let error = config
        .schedule()
        .unwrap()
        .after_step(&params, 1)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("step 1") && error.contains("total_step 1"),
        "{error}"
    );
}
