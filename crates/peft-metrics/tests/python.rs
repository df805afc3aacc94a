//! The numbers of scikit-learn, scipy, seqeval, sacreBLEU and rouge-score (`fixtures/metrics`).

use std::fs;
use std::path::PathBuf;

use peft_metrics::{
    Confusion, Entity, Flags, Numbers, Overlap, Score, Words, answer_f1, bleu, entities,
    exact_match, rouge, token_accuracy,
};
use serde_json::Value;

fn cases(kind: &str) -> Vec<Value> {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/metrics/metrics.json");
    let all: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    all[kind].as_array().unwrap().clone()
}

fn floats(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it.as_f64().unwrap())
        .collect()
}

fn usizes(value: &Value) -> Vec<usize> {
    floats(value).iter().map(|it| *it as usize).collect()
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it.as_str().unwrap().into())
        .collect()
}

fn near(got: f64, wanted: f64, what: &str) {
    assert!(
        (got - wanted).abs() < 1e-9 * wanted.abs().max(1.0),
        "{what}: {got}, Python has {wanted}"
    );
}

/// Precision, recall, F1, and the support where Python gives it.
fn score(got: Score, wanted: &Value, what: &str) {
    let wanted = floats(wanted);
    for (got, wanted) in [got.precision, got.recall, got.f1].iter().zip(&wanted) {
        near(*got, *wanted, what);
    }
    if let Some(support) = wanted.get(3) {
        assert_eq!(got.support as f64, *support, "{what}");
    }
}

#[test]
fn classes() {
    for case in cases("classes") {
        let n = case["classes"].as_u64().unwrap() as usize;
        let names: Vec<String> = (0..n).map(|at| at.to_string()).collect();
        let seen = Confusion::of(&names, &usizes(&case["truth"]), &usizes(&case["said"])).unwrap();
        near(
            seen.accuracy(),
            case["accuracy"].as_f64().unwrap(),
            "accuracy",
        );
        for class in 0..n {
            score(
                seen.class(class),
                &case["each"][class],
                &format!("class {class} of {case}"),
            );
            let row: Vec<usize> = (0..n)
                .map(|said| seen.count(class, said) as usize)
                .collect();
            assert_eq!(row, usizes(&case["confusion"][class]));
        }
        score(seen.macro_mean(), &case["macro"], "macro");
        score(seen.weighted_mean(), &case["weighted"], "weighted");
        score(seen.micro(), &case["micro"], "micro");
    }
}

#[test]
fn flags() {
    for case in cases("flags") {
        let rows = |key: &str| -> Vec<Vec<usize>> {
            case[key].as_array().unwrap().iter().map(usizes).collect()
        };
        let bools =
            |key: &str| -> Vec<bool> { rows(key).concat().iter().map(|it| *it == 1).collect() };
        let n = rows("truth")[0].len();
        let names: Vec<String> = (0..n).map(|at| at.to_string()).collect();
        let seen = Flags::of(&names, &bools("truth"), &bools("said")).unwrap();
        near(seen.exact(), case["exact"].as_f64().unwrap(), "exact");
        near(
            seen.hamming_loss(),
            case["hamming"].as_f64().unwrap(),
            "hamming",
        );
        score(seen.macro_mean(), &case["macro"], "macro");
        score(seen.weighted_mean(), &case["weighted"], "weighted");
        score(seen.micro(), &case["micro"], "micro");
        score(seen.samples(), &case["samples"], "samples");
    }
}

#[test]
fn entities_of_tags() {
    for case in cases("entities") {
        let rows = |key: &str| -> Vec<Vec<String>> {
            case[key].as_array().unwrap().iter().map(strings).collect()
        };
        let (truth, said) = (rows("truth"), rows("said"));
        for (tags, wanted) in truth.iter().zip(case["entities"].as_array().unwrap()) {
            // Python's ends are the last word, ours one past it.
            let made: Vec<Value> = Entity::of(tags)
                .into_iter()
                .map(|it| serde_json::json!([it.kind, it.start, it.end - 1]))
                .collect();
            assert_eq!(Value::Array(made), *wanted, "{tags:?}");
        }
        let seen = entities(&truth, &said).unwrap();
        let kinds = case["kinds"].as_object().unwrap();
        assert_eq!(seen.kinds.len(), kinds.len());
        for (kind, wanted) in kinds {
            score(seen.kinds[kind], wanted, kind);
        }
        score(seen.micro, &case["micro"], "micro");
        score(seen.macro_mean, &case["macro"], "macro");
        score(seen.weighted_mean, &case["weighted"], "weighted");
        near(
            token_accuracy(&truth, &said).unwrap(),
            case["accuracy"].as_f64().unwrap(),
            "words",
        );
    }
}

#[test]
fn answers() {
    for case in cases("answers") {
        let (right, said) = (strings(&case["right"]), case["said"].as_str().unwrap());
        near(
            exact_match(&right, said),
            case["exact"].as_f64().unwrap(),
            said,
        );
        near(answer_f1(&right, said), case["f1"].as_f64().unwrap(), said);
    }
}

#[test]
fn numbers() {
    for case in cases("numbers") {
        let seen = Numbers::of(&floats(&case["truth"]), &floats(&case["said"])).unwrap();
        let wanted = |key: &str| case[key].as_f64().unwrap();
        near(seen.mse, wanted("mse"), "mse");
        near(seen.mae, wanted("mae"), "mae");
        near(seen.r2.unwrap(), wanted("r2"), "r2");
        near(seen.pearson.unwrap(), wanted("pearson"), "pearson");
        near(seen.spearman.unwrap(), wanted("spearman"), "spearman");
    }
}

#[test]
fn texts() {
    for case in cases("texts") {
        let said = strings(&case["said"]);
        let right: Vec<Vec<String>> = case["right"]
            .as_array()
            .unwrap()
            .iter()
            .map(strings)
            .collect();
        let seen = bleu(&right, &said).unwrap();
        near(seen.score, case["bleu"].as_f64().unwrap(), "bleu");
        for (got, wanted) in seen.precisions.iter().zip(floats(&case["precisions"])) {
            near(*got, wanted, "precision");
        }
        near(seen.brevity, case["brevity"].as_f64().unwrap(), "brevity");
        assert_eq!(
            [seen.length, seen.reference_length].to_vec(),
            usizes(&case["lengths"])
        );
        let seen = rouge(&right, &said, Words::Ascii).unwrap();
        let check = |got: Overlap, name: &str| {
            let wanted = floats(&case["rouge"][name]);
            for (got, wanted) in [got.precision, got.recall, got.f].iter().zip(wanted) {
                near(*got, wanted, name);
            }
        };
        check(seen.rouge1, "rouge1");
        check(seen.rouge2, "rouge2");
        check(seen.rouge_l, "rougeL");
    }
}
