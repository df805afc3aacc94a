//! The command line itself: helps, mistakes, and that a pipe gets the text alone.

mod common;

use std::fs;

use common::{TEXT, fed, peft};

/// Commands whose help is kept as a file: what a user reads is part of the product.
const KEPT: [&str; 11] = [
    "compare",
    "generate",
    "chat",
    "merge",
    "combine",
    "convert",
    "check",
    "info",
    "import",
    "forward",
    "dequantize",
];

#[test]
fn helps_are_what_was_looked_at() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/help");
    for command in KEPT {
        let help = peft([command, "--help"]).ok();
        let path = format!("{folder}/{command}.txt");
        if std::env::var_os("PEFT_BLESS").is_some() {
            fs::create_dir_all(folder).unwrap();
            fs::write(&path, &help).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            help, kept,
            "`peft {command} --help` changed; look at it, then run with PEFT_BLESS=1"
        );
    }
}

#[test]
fn every_command_has_help_and_every_shell_completions() {
    let help = peft(["--help"]).ok();
    for command in KEPT
        .into_iter()
        .chain(["train", "eval", "data", "completions"])
    {
        assert!(help.contains(command), "{command}");
        assert!(
            peft([command, "--help"]).ok().contains("Usage: peft"),
            "{command}"
        );
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(
            peft(["completions", shell]).ok().contains("forward"),
            "{shell}"
        );
    }
    assert!(peft(["--version"]).ok().starts_with("peft "));
}

#[test]
fn mistakes_of_typing_end_with_code_2_and_the_right_name() {
    for (args, words) in [
        (vec![], vec!["Usage"]),
        (vec!["trian"], vec!["trian", "train"]),
        (vec!["generate", "--prompt", "x"], vec!["--model", "RUN"]),
        (vec!["generate", "--model", TEXT], vec!["--prompt"]),
        (
            vec!["generate", "--model", TEXT, "--promt", "x"],
            vec!["--promt", "--prompt"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompt", "x", "--stop", ""],
            vec!["--stop"],
        ),
        (
            vec![
                "generate", "--model", TEXT, "--prompt", "x", "--device", "gpu",
            ],
            vec!["gpu", "cuda"],
        ),
        (
            vec![
                "generate", "--model", TEXT, "--prompt", "x", "--dtype", "int4",
            ],
            vec!["int4", "bf16"],
        ),
        (
            vec![
                "generate", "--model", TEXT, "--prompt", "x", "--top-k", "-1",
            ],
            vec!["-1"],
        ),
        (
            vec![
                "generate",
                "--model",
                TEXT,
                "--prompt",
                "x",
                "--threads",
                "0",
            ],
            vec!["0"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompt", "x", "--best"],
            vec!["--best"],
        ),
        (
            vec!["generate", TEXT, "--model", TEXT, "--prompt", "x"],
            vec!["both"],
        ),
        (
            vec![
                "generate",
                "--model",
                TEXT,
                "--adapter",
                "a=b",
                "--adapter",
                "a=c",
                "--prompt",
                "x",
            ],
            vec!["`a`"],
        ),
        (
            vec!["merge", TEXT, "--out", "target/never"],
            vec!["nothing to merge"],
        ),
        (
            vec!["info", TEXT, "--method", "lorra"],
            vec!["lorra", "nearest is `lora`"],
        ),
        (
            vec!["info", TEXT, "--method", "lora", "--set", "rr=4"],
            vec!["rr", "nearest is `r`"],
        ),
        (
            vec!["info", TEXT, "--method", "lora", "--set", "r"],
            vec!["KEY=VALUE"],
        ),
        (
            vec![
                "generate",
                "--model",
                TEXT,
                "--prompt",
                "x",
                "--temperature",
                "-1",
            ],
            vec!["temperature", "0 or more"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompt", "x", "--top-p", "2"],
            vec!["top_p", "at most 1"],
        ),
        (vec!["completions", "tcsh"], vec!["tcsh"]),
    ] {
        peft(&args).fails(2, &words);
    }
}

#[test]
fn work_that_fails_ends_with_code_1_and_says_what_and_where() {
    let held = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = held.path().join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let empty = held.path().display().to_string();
    let rows = file("rows.jsonl", "{\"prompt\": \"a\"}\n\n{\"promt\": \"b\"}\n");
    let none = file("none.txt", "\n \n");
    let gguf = file("model.gguf", "GGUF and no more");
    for (args, words) in [
        (
            vec![
                "generate",
                "--model",
                "fixtures/models/lama",
                "--prompt",
                "x",
            ],
            vec!["lama", "nearest is `llama`"],
        ),
        (
            vec!["generate", &empty, "--prompt", "x"],
            vec!["run.json", "adapter_config.json", "config.json"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompts", &rows],
            vec!["rows.jsonl:3", "`prompt`"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompts", &none],
            vec!["none.txt", "no prompt"],
        ),
        (
            vec!["generate", "--model", TEXT, "--prompts", "no/such"],
            vec!["no/such"],
        ),
        (
            vec![
                "generate",
                "--model",
                "fixtures/models/llama",
                "--prompt",
                "x",
            ],
            vec!["tokenizer.json"],
        ),
        (
            vec!["generate", "--model", TEXT, "--raw", "--prompt", ""],
            vec!["prompt 1", "empty"],
        ),
        (
            vec![
                "generate",
                "--model",
                TEXT,
                "--adapter",
                &empty,
                "--prompt",
                "x",
            ],
            vec!["adapter_config.json"],
        ),
        (vec!["chat", "--model", &gguf], vec!["model.gguf"]),
        (
            vec!["import", &gguf, "--out", "target/never"],
            vec!["model.gguf"],
        ),
        (
            vec!["import", "no.gguf", "--out", "target/never"],
            vec!["no.gguf"],
        ),
        (vec!["info", "no/such/model"], vec!["no/such/model"]),
        (vec!["check", "no/such/adapter"], vec!["no/such/adapter"]),
        (
            vec!["check", TEXT],
            vec!["adapter_config.json", "no adapter"],
        ),
        (
            vec![
                "forward",
                "--model",
                TEXT,
                "--inputs",
                &gguf,
                "--out",
                "target/never",
            ],
            vec!["model.gguf", "safetensors"],
        ),
    ] {
        peft(&args).fails(1, &words);
    }
    assert!(!common::root().join("target/never").exists());
}

#[test]
fn too_long_a_prompt_is_refused_with_both_lengths() {
    let long = "word ".repeat(400);
    peft(["generate", "--model", TEXT, "--prompt", &long])
        .fails(1, &["prompt 1", "context", "256"]);
}

#[test]
fn the_same_seed_says_the_same_and_a_pipe_gets_the_text_alone() {
    let say = |more: &[&str]| {
        let args = [
            "generate",
            "--model",
            TEXT,
            "--prompt",
            "A lighthouse is",
            "--max-new-tokens",
            "12",
        ];
        peft(args.iter().chain(more)).ok()
    };
    let greedy = say(&[]);
    assert!(greedy.ends_with('\n') && !greedy.contains('\x1b') && !greedy.contains("tokens"));
    assert_eq!(greedy, say(&["--seed", "9"]), "greedy needs no seed");
    let warm = ["--temperature", "1", "--seed", "7"];
    assert_eq!(say(&warm), say(&warm));
    assert_ne!(say(&warm), say(&["--temperature", "1", "--seed", "8"]));
    // A stop string that is in the answer ends it there.
    let third = greedy.chars().nth(3).unwrap().to_string();
    let cut = greedy.split(&third).next().unwrap();
    assert_eq!(say(&["--stop", &third]).trim_end_matches('\n'), cut);
}

#[test]
fn many_prompts_get_the_answers_they_get_alone() {
    let prompts = [
        "One",
        "Two and a longer one",
        "Three, which is the longest of all of them by far",
    ];
    let held = tempfile::tempdir().unwrap();
    let path = held.path().join("prompts.txt");
    fs::write(&path, prompts.join("\n")).unwrap();
    let base = [
        "generate",
        "--model",
        TEXT,
        "--max-new-tokens",
        "10",
        "--temperature",
        "0.8",
        "--seed",
        "5",
        "--dtype",
        "fp32", // bf16 rounds differently in company
    ];
    let path = path.to_str().unwrap();
    let together = peft(base.iter().chain(&["--prompts", path, "--json"])).ok();
    let rows: Vec<serde_json::Value> = together
        .lines()
        .map(|it| serde_json::from_str(it).unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    for (row, prompt) in rows.iter().zip(prompts) {
        assert_eq!(row["prompt"], prompt);
        let alone = peft(base.iter().chain(&["--prompt", prompt])).ok();
        assert_eq!(
            row["answer"].as_str().unwrap(),
            alone.strip_suffix('\n').unwrap()
        );
        assert!(["length", "end"].contains(&row["stop"].as_str().unwrap()));
    }
    let read = fed(
        base.iter().chain(&["--prompts", "-", "--json"]),
        &prompts.join("\n"),
    )
    .ok();
    assert_eq!(read, together);
}

#[test]
fn a_conversation_remembers_obeys_and_is_saved() {
    let held = tempfile::tempdir().unwrap();
    let file = held.path().join("talk.jsonl");
    let input = format!(
        "hello\n/sytem x\nand now?\n/save {}\n/reset\nhello\n/quit\nnever\n",
        file.display()
    );
    let chat = [
        "chat",
        "--model",
        TEXT,
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
    ];
    let said = fed(chat, &input);
    assert!(
        said.err
            .contains("unknown command /sytem; nearest is `system`"),
        "{}",
        said.err
    );
    let out = said.ok();
    let row: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let turns = row["messages"].as_array().unwrap();
    let roles: Vec<&str> = turns
        .iter()
        .map(|it| it["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    // After /reset the same words get the same answer.
    let first = turns[1]["content"].as_str().unwrap();
    assert_eq!(out.matches(first).count(), 2, "{out}");
    assert!(!out.contains("never"));
}

#[test]
fn colours_are_for_terminals_unless_asked_for() {
    let check = ["check", "fixtures/lora/llama__r3"];
    assert!(!peft(check).ok().contains('\x1b'));
    assert!(
        peft(check.iter().chain(&["--color", "always"]))
            .ok()
            .contains('\x1b')
    );
    let fault = peft(["check", "no/such", "--color", "always"]);
    assert!(fault.err.contains('\x1b') && !peft(["check", "no/such"]).err.contains('\x1b'));
}
