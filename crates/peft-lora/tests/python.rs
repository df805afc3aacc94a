//! Sums of adapters against Python's `add_weighted_adapter`.
//!
//! `fixtures/methods/combine` has the adapters, and for every sum the factors that Python made, or where their signs are
//! free, their product.

use std::collections::BTreeMap;

use peft_core::{Adapter, Registry, State, files, tensors};
use peft_lora::{
    Combination, CombinationType, LoraConfig, Rules, combine,
    task_vectors::{MajoritySign, disjoint_merge, elect_sign, weighted_sum},
};
use peft_testing::{close, fixtures};
use serde_json::Value;
use tch::{Kind, Tensor};

/// The sums as Python describes them, and all tensors.
fn sums() -> (Vec<Value>, State) {
    let folder = fixtures::root().join("methods/combine");
    let facts = files::read_json(&folder.join("combine.json")).unwrap();
    let tensors = tensors::read(&folder.join("combine.safetensors")).unwrap();
    (facts["sums"].as_array().unwrap().clone(), tensors)
}

fn adapters(sum: &Value) -> Vec<(Adapter, f64)> {
    let registry = Registry::default().with::<LoraConfig>();
    let folder = fixtures::root().join("methods/combine");
    let names = sum["adapters"].as_array().unwrap().iter();
    let weights = sum["weights"].as_array().unwrap();
    let load =
        |name: &Value| Adapter::load(&folder.join(name.as_str().unwrap()), &registry).unwrap();
    names
        .zip(weights)
        .map(|(name, weight)| (load(name), weight.as_f64().unwrap()))
        .collect()
}

fn how(sum: &Value, rules: Rules) -> Combination {
    let options = &sum["options"];
    let word = |key: &str| options[key].as_str();
    Combination {
        svd_rank: options["svd_rank"].as_i64(),
        svd_clamp: options["svd_clamp"].as_f64(),
        density: options["density"].as_f64(),
        majority_sign_method: word("majority_sign_method").map(|it| it.parse().unwrap()),
        rules,
        ..Combination::of(word("combination_type").unwrap().parse().unwrap())
    }
}

fn made(sum: &Value, rules: Rules) -> Adapter {
    let parts = adapters(sum);
    let parts: Vec<(&Adapter, f64)> = parts.iter().map(|(it, weight)| (it, *weight)).collect();
    combine(&parts, &how(sum, rules)).unwrap_or_else(|error| panic!("{sum}: {error}"))
}

/// A and B of a place.
fn factors<'a>(adapter: &'a Adapter, at: &str) -> [&'a Tensor; 2] {
    ["A", "B"].map(|half| {
        let names = [
            format!("lora_{half}.weight"),
            format!("lora_embedding_{half}"),
        ];
        let found = names
            .iter()
            .find_map(|name| adapter.state.get(&format!("base_model.model.{at}.{name}")));
        found.unwrap_or_else(|| panic!("no factors at {at}"))
    })
}

#[test]
fn every_sum_that_is_not_drawn() {
    let (sums, expected) = sums();
    let (mut places, mut kinds) = (0, BTreeMap::new());
    for sum in &sums {
        let name = sum["name"].as_str().unwrap();
        let kind = sum["options"]["combination_type"].as_str().unwrap();
        if kind.starts_with("dare") {
            continue;
        }
        let adapter = made(sum, Rules::Peft);
        let json = adapter.tuner.to_json();
        assert_eq!(
            [&json["r"], &json["lora_alpha"], &json["use_rslora"]],
            [&sum["r"], &sum["lora_alpha"], &sum["use_rslora"]],
            "{name}"
        );
        let mut targets: Vec<&str> = json["target_modules"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        targets.sort();
        assert_eq!(
            targets,
            sum["target_modules"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(Value::as_str)
                .collect::<Vec<_>>()
        );
        for at in sum["scaling"].as_object().unwrap().keys() {
            let [a, b] = factors(&adapter, at);
            for (half, tensor) in [("a", a), ("b", b)] {
                if let Some(theirs) = expected.get(&format!("{name}.{at}.{half}")) {
                    close(tensor, theirs, 1e-5, &format!("{name} {at} {half}"));
                }
            }
            let theirs = &expected[&format!("{name}.{at}.product")];
            close(&b.matmul(a), theirs, 1e-5, &format!("{name} {at}"));
            places += 1;
        }
        *kinds.entry(kind).or_insert(0) += 1;
    }
    assert_eq!(
        kinds.keys().copied().collect::<Vec<_>>(),
        [
            "cat",
            "linear",
            "magnitude_prune",
            "magnitude_prune_svd",
            "svd",
            "ties",
            "ties_svd"
        ]
    );
    assert!(places > 80, "{places}");
}

/// Python copies `use_rslora` and scales the sum by √r. Exactly, its product is the same and its scale is 1.
#[test]
fn exact_sums_are_scaled_by_one() {
    let (sums, expected) = sums();
    for sum in &sums {
        let name = sum["name"].as_str().unwrap();
        let kind = sum["options"]["combination_type"].as_str().unwrap();
        if kind.starts_with("dare") || !sum["options"]["svd_clamp"].is_null() {
            continue;
        }
        let adapter = made(sum, Rules::Exact);
        assert_eq!(adapter.tuner.to_json()["use_rslora"], false);
        assert_eq!(
            adapter.tuner.to_json()["lora_alpha"],
            adapter.tuner.to_json()["r"]
        );
        for at in sum["scaling"].as_object().unwrap().keys() {
            let [a, b] = factors(&adapter, at);
            let theirs = &expected[&format!("{name}.{at}.product")];
            close(&b.matmul(a), theirs, 1e-5, &format!("{name} {at}"));
        }
    }
}

/// What Python drew, put through the same functions.
#[test]
fn sums_that_are_drawn() {
    let (sums, expected) = sums();
    let mut seen = 0;
    for sum in &sums {
        let name = sum["name"].as_str().unwrap();
        let how = how(sum, Rules::Peft);
        let on_factors = matches!(
            how.combination_type,
            CombinationType::DareLinear | CombinationType::DareTies
        );
        if !on_factors {
            continue;
        }
        let parts = adapters(sum);
        let mut masks = (0..).map(|i| expected[&format!("{name}.mask.{i}")].to_kind(Kind::Float));
        for at in sum["scaling"].as_object().unwrap().keys() {
            for (half, sign) in [(0, true), (1, false)] {
                let (mut tasks, mut weights) = (Vec::new(), Vec::new());
                for (adapter, weight) in &parts {
                    let json = adapter.tuner.to_json();
                    let scaled =
                        weight * json["lora_alpha"].as_f64().unwrap() / json["r"].as_f64().unwrap();
                    let root = scaled.abs().sqrt();
                    weights.push(if sign { root.copysign(scaled) } else { root });
                    let tensor = factors(adapter, at)[half];
                    tasks.push(tensor * masks.next().unwrap() / how.density.unwrap());
                }
                let merged = match how.combination_type {
                    CombinationType::DareLinear => weighted_sum(&tasks, &weights),
                    _ => {
                        let method = how.majority_sign_method.unwrap_or(MajoritySign::Total);
                        let weighted: Vec<Tensor> =
                            tasks.iter().zip(&weights).map(|(it, w)| it * *w).collect();
                        disjoint_merge(
                            &Tensor::stack(&weighted, 0),
                            &elect_sign(&Tensor::stack(&tasks, 0), method),
                        )
                    }
                };
                let theirs = &expected[&format!("{name}.{at}.{}", ["a", "b"][half])];
                close(&merged, theirs, 1e-6, &format!("{name} {at} {half}"));
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 4 * 4 * 2);
}
