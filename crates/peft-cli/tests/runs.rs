//! A run folder is enough for every later command, and says what is wrong with it.

mod common;

use std::{fs, path::Path};

use common::{TEXT, peft, root};

/// A run of two steps in `dir`.
fn train(dir: &Path, model: &str) {
    let rows = "fixtures/data/wordnet_define_sft.jsonl";
    let text = fs::read_to_string(root().join(rows)).unwrap();
    let few: Vec<&str> = text.lines().take(12).collect();
    let data = dir.with_extension("jsonl");
    fs::write(&data, few.join("\n")).unwrap();
    let cache = dir.with_extension("cache");
    let [run, data, cache] = [dir, &data, &cache].map(|it| it.to_str().unwrap());
    peft([
        "train",
        "--model",
        model,
        "--data",
        data,
        "--out",
        run,
        "--cache-dir",
        cache,
        "--max-steps",
        "2",
    ])
    .ok();
}

#[test]
fn a_run_is_all_that_later_commands_need() {
    let held = tempfile::tempdir().unwrap();
    let dir = held.path().join("run");
    train(&dir, TEXT);
    let run = dir.to_str().unwrap();
    let say = |more: &[&str]| {
        let args = [
            "generate",
            run,
            "--prompt",
            "A tide is",
            "--max-new-tokens",
            "8",
            "--dtype",
            "fp32",
        ];
        peft(args.iter().chain(more)).ok()
    };
    let adapted = say(&[]);
    assert_eq!(say(&["--merged"]), adapted);
    assert_eq!(say(&["--unmerged"]), adapted);
    say(&["--best"]);
    let base = [
        "generate",
        "--model",
        TEXT,
        "--prompt",
        "A tide is",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
    ];
    assert_eq!(say(&["--no-adapter"]), peft(base).ok());

    assert!(
        peft(["check", run])
            .ok()
            .contains("that of the base, template included")
    );
    assert!(peft(["info", run]).ok().contains("finished"));
    let merged = held.path().join("merged");
    let merged = merged.to_str().unwrap();
    peft(["merge", run, "--out", merged]).ok();
    let args = [
        "generate",
        merged,
        "--prompt",
        "A tide is",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
    ];
    assert_eq!(peft(args).ok(), adapted);

    damaged(&dir, run);
}

/// What is said where a part of the run is gone or wrong.
fn damaged(dir: &Path, run: &str) {
    let ask = ["generate", run, "--prompt", "x"];
    let info = fs::read_to_string(dir.join("run.json")).unwrap();
    let base = "no/such/base";
    let mut json: serde_json::Value = serde_json::from_str(&info).unwrap();
    json["base_model"] = base.into();
    fs::write(dir.join("run.json"), json.to_string()).unwrap();
    peft(ask).fails(1, &["the base of the run", "--model", base]);
    // The base can have moved.
    peft(
        ask.iter()
            .chain(&["--model", TEXT, "--max-new-tokens", "1"]),
    )
    .ok();
    fs::write(dir.join("run.json"), "{}").unwrap();
    peft(ask).fails(1, &["run.json", "status"]);
    fs::write(dir.join("run.json"), info).unwrap();

    fs::remove_dir_all(dir.join("best")).unwrap();
    peft(ask.iter().chain(&["--best"])).fails(1, &["best", "not evaluated"]);
    fs::remove_file(dir.join("tokenizer.json")).unwrap();
    peft(ask).fails(1, &["tokenizer.json"]);
    fs::remove_dir_all(dir.join("adapter")).unwrap();
    peft(ask).fails(1, &["adapter", "has not ended"]);
}

#[test]
fn another_base_of_the_same_shapes_is_noticed() {
    let held = tempfile::tempdir().unwrap();
    let (dir, base) = (held.path().join("run"), held.path().join("base"));
    fs::create_dir(&base).unwrap();
    for file in fs::read_dir(root().join(TEXT)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), base.join(file.file_name())).unwrap();
    }
    train(&dir, base.to_str().unwrap());
    let run = dir.to_str().unwrap();
    let ask = ["generate", run, "--prompt", "x", "--max-new-tokens", "1"];
    let said = peft(ask);
    assert!(!said.err.contains("note:"), "{}", said.err);
    let weights = base.join("model.safetensors");
    let was = fs::read(&weights).unwrap();
    let mut other = was.clone();
    let at = other.len() / 2;
    other[at..].chunks_mut(2).for_each(|it| it[0] ^= 1);
    fs::write(&weights, &other).unwrap();
    let said = peft(ask);
    assert!(
        said.err.contains("is not the base that the run"),
        "{}",
        said.err
    );
    said.ok();
    let again = ["train", "--resume", run];
    peft(again).fails(1, &["base", "is not the one that the run", "began with"]);
    fs::write(&weights, &was).unwrap();
    peft(again).fails(2, &["finished"]);
    fs::write(dir.join("config.yaml"), "").unwrap();
    peft(again).fails(2, &["config.yaml"]);
}
