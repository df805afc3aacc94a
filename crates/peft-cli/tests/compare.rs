//! `peft compare`: each row of the table is what `peft train` gives alone.

mod common;

use std::{fs, path::Path};

use common::{TEXT, peft};
use serde_json::Value;

const ROWS: &str = "fixtures/data/wordnet_define_sft.jsonl";
const CLASSES: &str = "fixtures/data/wordnet_gloss_6way.jsonl";

/// The first rows of a data file, in a folder of the test's own.
fn rows(dir: &Path, file: &str, count: usize) -> String {
    let text = fs::read_to_string(common::root().join(file)).unwrap();
    let some: String = text
        .lines()
        .take(count)
        .map(|it| format!("{it}\n"))
        .collect();
    let path = dir.join("rows.jsonl");
    fs::write(&path, some).unwrap();
    path.to_string_lossy().into_owned()
}

fn usual<'a>(data: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "compare",
        "--model",
        TEXT,
        "--data",
        data,
        "--dtype",
        "fp32",
        "--max-steps",
        "4",
        "--batch-size",
        "4",
        "--threads",
        "1",
        "--out",
        out,
    ]
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn losses(outcome: &Value) -> Vec<(u64, f64)> {
    serde_json::from_value(outcome["losses"].clone()).unwrap()
}

#[test]
fn every_row_is_a_run_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows(dir.path(), ROWS, 40);
    let out = dir.path().join("all").to_string_lossy().into_owned();
    let mut args = usual(&data, &out);
    args.extend([
        "--methods",
        "lora,prompt,full",
        "--r",
        "3",
        "--num-virtual-tokens",
        "5",
    ]);
    let said = peft(args).ok();
    for word in ["lora", "prompt", "full", "trained", "best loss"] {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
    let out = Path::new(&out);
    let found = json(&out.join("compare.json"));
    let outcomes = found["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 3);
    // The settings that a method has went to it, and nobody else's.
    let of = |name: &str| fs::read_to_string(out.join(name).join("config.yaml")).unwrap();
    assert!(of("lora").contains("r: 3") && !of("lora").contains("num_virtual_tokens"));
    assert!(of("prompt").contains("num_virtual_tokens: 5"));
    // 5 tokens of the model's width, and all there is.
    let info = peft(["info", TEXT]).ok();
    let all = info
        .lines()
        .find_map(|it| it.strip_prefix("parameters"))
        .unwrap();
    let all = all
        .split_whitespace()
        .next()
        .unwrap()
        .replace(',', "")
        .parse::<u64>()
        .unwrap();
    assert_eq!(outcomes[2]["trainable"], all);
    let config = json(&common::root().join(TEXT).join("config.json"));
    assert_eq!(
        outcomes[1]["trainable"],
        5 * config["hidden_size"].as_u64().unwrap()
    );
    for outcome in outcomes {
        assert!(outcome["seconds"].as_f64().unwrap() > 0.0);
        assert!(outcome["peak_memory"].as_u64().unwrap() > 1_000_000);
        assert!(outcome["saved"].as_u64().unwrap() > 100);
        let steps: Vec<u64> = losses(outcome).iter().map(|it| it.0).collect();
        assert_eq!(steps, [0, 1, 2, 3, 4]);
    }
    // LoRA begins at the base, as full fine-tuning does.
    assert!((losses(&outcomes[0])[0].1 - losses(&outcomes[2])[0].1).abs() < 1e-6);
    for picture in ["compare.png", "compare.svg"] {
        assert!(fs::metadata(out.join(picture)).unwrap().len() > 4000);
    }
    let page = fs::read_to_string(out.join("compare.md")).unwrap();
    for name in ["lora", "prompt", "full"] {
        assert!(page.contains(&format!("| {name} | ")), "{page}");
    }

    let alone = dir.path().join("alone");
    let mut args = vec!["train"];
    let folder = alone.to_string_lossy().into_owned();
    args.extend(&usual(&data, &folder)[1..]);
    args.extend(["--method", "lora", "--r", "3"]);
    peft(args).ok();
    let files = ["adapter/adapter_model.safetensors"];
    for file in files {
        let [here, there] =
            [out.join("lora"), alone.clone()].map(|it| fs::read(it.join(file)).unwrap());
        assert!(here == there, "{file} differs from that of `peft train`");
    }

    // What is missing is trained again, what is there is not.
    let stamp = |name: &str| {
        fs::metadata(out.join(name).join("run.json"))
            .unwrap()
            .modified()
            .unwrap()
    };
    let before = stamp("lora");
    fs::remove_dir_all(out.join("prompt")).unwrap();
    let folder = out.to_string_lossy().into_owned();
    peft(["compare", "--threads", "1", "--resume", &folder]).ok();
    assert_eq!(stamp("lora"), before);
    let again = json(&out.join("compare.json"));
    assert_eq!(losses(&again["outcomes"][1]), losses(&outcomes[1]));
}

#[test]
fn a_file_lists_methods_with_settings_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows(dir.path(), CLASSES, 60);
    let settings = dir.path().join("settings.yaml");
    fs::write(
        &settings,
        "task: SEQ_CLS\nmethods:\n  - ln\n  - {name: small, method: lora, r: 2, learning_rate: 5e-3}\n  - lora\nlora: {lora_alpha: 5}\n",
    )
    .unwrap();
    let out = dir.path().join("out").to_string_lossy().into_owned();
    let settings = settings.to_string_lossy().into_owned();
    let mut args = usual(&data, &out);
    args.insert(1, &settings);
    let said = peft(args).ok();
    assert!(said.contains("accuracy"), "{said}");
    let out = Path::new(&out);
    let of = |name: &str| fs::read_to_string(out.join(name).join("config.yaml")).unwrap();
    let small = of("small");
    assert!(small.contains("r: 2") && small.contains("lora_alpha: 5"));
    assert!(small.contains("learning_rate: 0.005"), "{small}");
    assert!(of("lora").contains("r: 16") && of("lora").contains("lora_alpha: 5"));
    let found = json(&out.join("compare.json"));
    for outcome in found["outcomes"].as_array().unwrap() {
        let accuracy: Vec<(u64, f64)> =
            serde_json::from_value(outcome["figures"]["accuracy"].clone()).unwrap();
        assert_eq!(accuracy.len(), losses(outcome).len());
        assert!(accuracy.iter().all(|it| (0.0..=1.0).contains(&it.1)));
    }
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows(dir.path(), ROWS, 20);
    let out = dir.path().join("out").to_string_lossy().into_owned();
    let settings = dir.path().join("settings.yaml");
    let with = |text: &str, more: &[&str]| {
        fs::write(&settings, text).unwrap();
        let settings = settings.to_string_lossy().into_owned();
        let mut args = usual(&data, &out);
        args.insert(1, &settings);
        args.extend(more);
        peft(args)
    };
    for (text, more, words) in [
        ("", vec!["--methods", "lora,promt"], vec!["promt", "prompt"]),
        (
            "methods: [lora, lora]",
            vec![],
            vec!["`lora` twice", "name"],
        ),
        ("methods: 3", vec![], vec!["methods", "no list"]),
        (
            "methods: [{r: 3}]",
            vec![],
            vec!["does not say its `method`"],
        ),
        (
            "methods: [{method: lora, name: a/b}]",
            vec![],
            vec!["a/b", "folder"],
        ),
        ("method: lora", vec![], vec!["one method", "methods"]),
        (
            "",
            vec!["--methods", "lora,ia3", "--set", "rr=3"],
            vec!["rr"],
        ),
        (
            "prefix: {num_virtual_tokens: 3}",
            vec!["--methods", "lora,ia3"],
            vec!["prefix", "not among"],
        ),
        (
            "",
            vec!["--methods", "lora,ia3", "--target-modules", "qproj"],
            vec!["lora", "qproj"],
        ),
    ] {
        with(text, &more).fails(2, &words);
        assert!(!Path::new(&out).exists(), "{text} {more:?}");
    }
    // A mistake in the data is one of the first dry run.
    let mut args = usual("nowhere.jsonl", &out);
    args.extend(["--methods", "lora"]);
    peft(args).fails(1, &["nowhere.jsonl"]);
    assert!(!Path::new(&out).exists());
    peft(["compare", "--resume", "fixtures"]).fails(2, &["no comparison"]);
    fs::create_dir(&out).unwrap();
    fs::write(Path::new(&out).join("mine.txt"), "mine").unwrap();
    with("", &["--methods", "lora"]).fails(2, &["not empty", "--resume"]);
}
