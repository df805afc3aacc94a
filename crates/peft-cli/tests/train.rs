//! `peft train`, `data` and `eval` as a person calls them, on a model of twenty thousand parameters.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// Runs the program in `dir`, which also holds its cache.
fn peft(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(args)
        .args(["--threads", "1"])
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a run that must succeed.
fn good(dir: &Path, args: &[&str]) -> String {
    let output = peft(dir, args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Exit code and standard error of a run that must fail.
fn bad(dir: &Path, args: &[&str]) -> (i32, String) {
    let output = peft(dir, args);
    assert!(!output.status.success(), "{args:?}");
    (output.status.code().unwrap(), text(&output.stderr))
}

struct World {
    dir: tempfile::TempDir,
    model: String,
    data: String,
}

impl World {
    fn new() -> World {
        let rows =
            std::fs::read_to_string(fixtures().join("data/wordnet_define_sft.jsonl")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("rows.jsonl");
        let some: String = rows
            .lines()
            .take(40)
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&data, some).unwrap();
        World {
            model: fixtures()
                .join("models/llama-text")
                .to_string_lossy()
                .into_owned(),
            data: data.to_string_lossy().into_owned(),
            dir,
        }
    }

    fn train<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let usual = [
            "train",
            "--model",
            &self.model,
            "--data",
            &self.data,
            "--dtype",
            "fp32",
        ];
        [&usual, more].concat()
    }

    fn bits(&self, run: &str) -> Vec<u8> {
        std::fs::read(
            self.dir
                .path()
                .join(run)
                .join("adapter/adapter_model.safetensors"),
        )
        .unwrap()
    }
}

#[test]
fn a_first_session() {
    let world = World::new();
    let dir = world.dir.path();
    let run = [
        "--out",
        "run",
        "--max-steps",
        "6",
        "--batch-size",
        "4",
        "--prompt",
        "Who?",
    ];
    let said = good(dir, &world.train(&run));
    for part in [
        "trainable params: 8,672 || all params: 30,224 || trainable%: 28.6924",
        "40 rows, format alpaca",
        "⟦spontaneous removal",
        "Answers before training",
        "Answers after training",
        "step 6/6",
        "peft chat run",
        "peft merge run --out run-merged",
    ] {
        assert!(said.contains(part), "`{part}` is not in\n{said}");
    }
    for file in [
        "run.json",
        "config.yaml",
        "tokenizer.json",
        "log.jsonl",
        "loss.png",
        "loss.svg",
        "best/adapter_config.json",
    ] {
        assert!(dir.join("run").join(file).is_file(), "{file}");
    }
    // The settings can be fed back, and give the same bits; flags go before them.
    good(dir, &["train", "run/config.yaml", "--out", "again"]);
    assert_eq!(world.bits("run"), world.bits("again"));
    let other = good(
        dir,
        &[
            "train",
            "run/config.yaml",
            "--out",
            "other",
            "--seed",
            "1",
            "--set",
            "r=4",
        ],
    );
    assert!(other.contains("r 4"));
    assert_ne!(world.bits("run"), world.bits("other"));

    let (code, error) = bad(dir, &world.train(&run));
    assert!(code == 1 && error.contains("finished run"), "{error}");
    let (code, error) = bad(dir, &["train", "--resume", "run"]);
    assert!(code == 2 && error.contains("finished"), "{error}");
    good(dir, &world.train(&[&run[..], &["--overwrite"]].concat()));

    let table = good(
        dir,
        &[
            "eval",
            "run",
            "--data",
            &world.data,
            "--dtype",
            "fp32",
            "--json",
        ],
    );
    let line: serde_json::Value = serde_json::from_str(&table).unwrap();
    assert!(line["loss"].as_f64().unwrap() < line["without_adapter"]["loss"].as_f64().unwrap());
    let shown = good(dir, &["data", "run", "--data", &world.data, "--rows", "1"]);
    assert!(
        shown.contains("⟦s│p│on│t") && shown.contains("<|im_end|>⟧"),
        "{shown}"
    );
}

const STEPS: [&str; 10] = [
    "--max-steps",
    "500",
    "--batch-size",
    "2",
    "--save-steps",
    "25",
    "--eval-steps",
    "250",
    "--set",
    "lora_dropout=0.1",
];

/// A run that is killed after its first checkpoint, and resumed.
fn killed_and_resumed(world: &World, run: &str, more: &[&str]) {
    let dir = world.dir.path();
    let args = [&STEPS[..], &["--out", run, "--threads", "1"], more].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(world.train(&args))
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let saved = dir.join(run).join("checkpoint/state.safetensors");
    for _ in 0..3000 {
        if saved.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(saved.exists());
    // Other settings are refused, and the run is none the worse for it.
    for (flag, value, key) in [
        ("--learning-rate", "0.5", "learning_rate"),
        ("--r", "3", "r"),
        ("--quantization", "fp4", "quantization"),
    ] {
        let (code, said) = bad(dir, &["train", "--resume", run, flag, value]);
        assert!(
            code == 2 && said.contains(&format!("`{key}` was")),
            "{said}"
        );
    }
    good(dir, &["train", "--resume", run]);
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits_whether_blocks_are_kept_or_computed_again() {
    let world = World::new();
    let dir = world.dir.path();
    good(
        dir,
        &world.train(&[&STEPS[..], &["--out", "whole"]].concat()),
    );
    for (run, more) in [
        ("kept", &[][..]),
        ("again", &["--gradient-checkpointing"][..]),
    ] {
        killed_and_resumed(&world, run, more);
        assert!(world.bits(run) == world.bits("whole"), "{run}");
    }
    let config = |run: &str| std::fs::read_to_string(dir.join(run).join("config.yaml")).unwrap();
    assert!(config("kept").contains("gradient_checkpointing: false"));
    assert!(config("again").contains("gradient_checkpointing: true"));
    // What a file says, a flag takes back.
    let args = ["train", "again/config.yaml", "--dry-run", "--out", "third"];
    let said = good(dir, &args);
    assert!(said.contains("blocks computed twice"), "{said}");
    let said = good(
        dir,
        &[&args[..], &["--gradient-checkpointing=false"]].concat(),
    );
    assert!(said.contains("gradient_checkpointing: false"), "{said}");
}

#[test]
fn mistakes_are_named_and_leave_nothing() {
    let world = World::new();
    let dir = world.dir.path();
    for (args, code, part) in [
        (&["--set", "lora_alhpa=3"][..], 2, "nearest is `lora_alpha`"),
        (&["--set", "learning_rate"], 2, "expected KEY=VALUE"),
        (&["--learning-rate", "-1"], 2, "learning_rate"),
        (&["--format", "mesages"], 2, "`messages`"),
        (&["--validation", "1.5"], 2, "1.5"),
        (&["--validation", "40"], 2, "40 rows cannot be held out"),
        (&["--set", "target_modules=[qq_proj]"], 2, "q_proj"),
        (&["--lr-scheduler-type", "cosin"], 2, "`cosine`"),
        (&["--set", "r=0"], 2, "rank 0"),
        (&["--batch-size", "0"], 2, "batch_size"),
        (
            &["--set", "gradient_checkpointing=often"],
            2,
            "gradient_checkpointing",
        ),
        (&["--max-length", "0"], 2, "max_length"),
        (&["--format", "messages"], 1, "rows.jsonl"),
        (&["--validation", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ] {
        let (got, error) = bad(dir, &world.train(&[&["--out", "run"], args].concat()));
        assert!(error.contains(part), "{args:?}: {error}");
        assert_eq!(got, code, "{args:?}: {error}");
        assert!(!dir.join("run").exists(), "{args:?}");
    }
    let (code, error) = bad(dir, &["train", "--model", "nowhere", "--data", &world.data]);
    assert!(code == 1 && error.contains("nowhere"), "{error}");
    let narrow = [
        "train",
        "--model",
        &world.model,
        "--data",
        &world.data,
        "--dtype",
        "fp8",
    ];
    let (code, error) = bad(dir, &narrow);
    assert!(code == 2 && error.contains("bf16"), "{error}");
    let (code, error) = bad(dir, &["train", "--data", &world.data]);
    assert!(code == 2 && error.contains("--model"), "{error}");
}

#[test]
fn a_dry_run_says_everything_and_writes_nothing() {
    let world = World::new();
    let said = good(
        world.dir.path(),
        &world.train(&["--out", "run", "--dry-run", "--r", "3"]),
    );
    assert!(
        said.contains("r: 3") && said.contains("adam_beta2: 0.999"),
        "{said}"
    );
    assert!(!world.dir.path().join("run").exists());
}

/// Texts with a label in a file of the test's own.
fn labelled(world: &World, name: &str, label: impl Fn(usize) -> String) -> String {
    let path = world.dir.path().join(name);
    let rows: String = (0..24)
        .map(|i| {
            format!(
                "{{\"text\": \"word {i} of {}\", \"label\": {}}}\n",
                i % 3,
                label(i)
            )
        })
        .collect();
    std::fs::write(&path, rows).unwrap();
    path.to_string_lossy().into_owned()
}

#[test]
fn prompts_begin_at_words_and_prefixes_at_a_text() {
    let world = World::new();
    let config = |run: &str| {
        let path = world
            .dir
            .path()
            .join(run)
            .join("adapter/adapter_config.json");
        let text = std::fs::read_to_string(path).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    let steps = ["--max-steps", "1", "--batch-size", "2"];
    let train = |more: &[&'static str]| {
        let mut args = world.train(&steps);
        args.extend(more);
        args
    };
    good(
        world.dir.path(),
        &train(&[
            "--method",
            "prompt",
            "--set",
            "label_words=[good, bad]",
            "--num-virtual-tokens",
            "4",
            "--out",
            "words",
        ]),
    );
    assert_eq!(
        config("words")["label_words"],
        serde_json::json!(["good", "bad"])
    );
    let text =
        "prefix_init_text=Define the noun that comes after these words as a dictionary would do it";
    let with = |rate: &'static str, set: &'static str, out: &'static str| {
        train(&[
            "--method",
            "prefix",
            "--num-virtual-tokens",
            "3",
            "--learning-rate",
            rate,
            "--set",
            set,
            "--out",
            out,
        ])
    };
    good(world.dir.path(), &with("1e-9", text, "text"));
    good(
        world.dir.path(),
        &with("1e-9", "init_weights=zero", "zeros"),
    );
    let largest = |run: &str| {
        let path = world
            .dir
            .path()
            .join(run)
            .join("adapter/adapter_model.safetensors");
        let state = peft::core::tensors::read(&path).unwrap();
        state["prompt_embeddings"].abs().max().double_value(&[])
    };
    assert!(largest("zeros") < 1e-6 && largest("text") > 1e-3);
    for (more, words) in [
        (
            ["--method", "prompt", "--set", "label_words=good"],
            "no list of words",
        ),
        (
            ["--method", "prompt", "--set", "label_words=['']"],
            "no tokens",
        ),
        (
            ["--method", "prefix", "--set", "prefix_init_text=' '"],
            "prefix_init_text",
        ),
        (
            ["--method", "prefix", "--set", "prefix_init_text=short"],
            "prefix_init_text",
        ),
        (
            [
                "--method",
                "prompt",
                "--set",
                "prompt_tuning_init_text=Define",
            ],
            "prompt_tuning_init=TEXT",
        ),
        (
            ["--method", "lora", "--set", "prefix_init_text=x"],
            "prefix",
        ),
    ] {
        let mut args = train(&["--out", "none"]);
        args.extend(more);
        let (code, said) = bad(world.dir.path(), &args);
        assert!(code == 2 && said.contains(words), "{more:?}: {said}");
        assert!(!world.dir.path().join("none").exists());
    }
}

#[test]
fn numbers_are_learnt_and_measured_again() {
    let world = World::new();
    let data = labelled(&world, "numbers.jsonl", |i| format!("{}.5", i % 4));
    good(
        world.dir.path(),
        &[
            "train",
            "--model",
            &world.model,
            "--data",
            &data,
            "--max-steps",
            "2",
            "--out",
            "run",
        ],
    );
    let said = good(world.dir.path(), &["eval", "run", "--data", &data]);
    assert!(said.contains("mse"), "{said}");
    let said = good(world.dir.path(), &["check", "run"]);
    assert!(said.contains("every key and shape"), "{said}");
    let (code, said) = bad(world.dir.path(), &["generate", "run", "--prompt", "x"]);
    assert!(
        code == 2 && said.contains("SEQ_CLS") && said.contains("peft eval"),
        "{said}"
    );

    // Whole ones are classes, but where the rows to train on, the run or a setting say otherwise.
    let whole = labelled(&world, "whole.jsonl", |i| format!("{}", i % 3));
    let train = |data: &str, more: &[&str]| {
        let mut args = vec!["train", "--model", &world.model, "--data", data];
        args.extend(["--max-steps", "2", "--out", "other", "--overwrite"]);
        args.extend(more);
        args.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let said = |args: Vec<String>| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        good(world.dir.path(), &args)
    };
    assert!(said(train(&whole, &[])).contains("accuracy"));
    assert!(said(train(&data, &["--validation", &whole])).contains("mse"));
    assert!(said(train(&whole, &["--set", "problem_type=regression"])).contains("mse"));
    assert!(good(world.dir.path(), &["eval", "other", "--data", &whole]).contains("mse"));
    for (problem, words) in [
        ("regresion", "nearest is `regression`"),
        ("single_label_classification", "with a fraction"),
    ] {
        let problem = format!("problem_type={problem}");
        let args = train(&data, &["--set", &problem]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (_, said) = bad(world.dir.path(), &args);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn full_fine_tuning_is_in_fp32_unless_asked_for() {
    let world = World::new();
    let train = |more: &[&'static str]| {
        let mut args = vec!["train", "--model", &world.model, "--data", &world.data];
        args.extend(["--method", "full", "--max-steps", "1", "--dry-run"]);
        args.extend(more);
        good(world.dir.path(), &args)
    };
    let said = train(&[]);
    assert!(
        said.contains("fp32") && !said.contains("rounded away; "),
        "{said}"
    );
    let said = train(&["--dtype", "bf16"]);
    assert!(
        said.contains("in bf16") && said.contains("are rounded away"),
        "{said}"
    );
}

#[test]
fn a_run_on_four_bits_remembers_its_base() {
    let world = World::new();
    let dir = world.dir.path();
    let steps = ["--method", "qlora", "--max-steps", "6", "--batch-size", "4"];
    let eight = ["--set", "optim=adamw_8bit", "--out", "run"];
    let said = good(dir, &world.train(&[&steps[..], &eight].concat()));
    for part in [
        "linear layers in NF4, blocks of 64, scales in 8 bits",
        "QLoRA at",
        "blocks computed twice",
    ] {
        assert!(said.contains(part), "`{part}` is not in\n{said}");
    }
    let json = |path: &str| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join(path)).unwrap()).unwrap()
    };
    assert_eq!(json("run/run.json")["quantization"]["type"], "nf4");
    good(dir, &["eval", "run", "--data", &world.data]);
    // Another adapter made of it names the base alone, and that is said.
    for (verb, how) in [("convert", "--rank=2"), ("combine", "--weights=0.5")] {
        let said = good(dir, &[verb, "run", how, "--out", verb]);
        assert!(said.contains("trained over its base in NF4"), "{said}");
    }
    // Merged it is dense, and the base in few bits is nowhere in it.
    good(dir, &["merge", "run", "--out", "merged"]);
    assert!(
        json("merged/config.json")
            .get("quantization_config")
            .is_none()
    );

    // A folder in few bits is used as it is.
    let model = world.model.as_str();
    good(dir, &["quantize", model, "--out", "four", "--double-quant"]);
    let data = world.data.as_str();
    let on = [
        "train", "--model", "four", "--data", data, "--dtype", "fp32",
    ];
    good(dir, &[&on[..], &steps, &["--out", "again"]].concat());
    good(dir, &["eval", "again", "--data", data]);
    good(dir, &["merge", "again", "--out", "merged-again"]);
    assert!(
        json("merged-again/config.json")
            .get("quantization_config")
            .is_none()
    );
    // It becomes dense again, what was dense does not.
    let said = good(dir, &["dequantize", "four", "--out", "dense"]);
    assert!(said.contains("from NF4"), "{said}");
    assert!(
        json("dense/config.json")
            .get("quantization_config")
            .is_none()
    );
    good(dir, &["eval", "dense", "--data", data]);
    let (code, said) = bad(dir, &["dequantize", "dense", "--out", "no"]);
    assert!(code == 2 && said.contains("`dense` is dense"), "{said}");
    let (code, said) = bad(dir, &["dequantize", "no-such", "--out", "no"]);
    assert!(code == 1 && said.contains("no-such"), "{said}");
    let twice = [&on[..], &steps, &["--quantization", "fp4", "--out", "no"]].concat();
    let (code, said) = bad(dir, &twice);
    assert!(code == 2 && said.contains("in few bits already"), "{said}");
    let none = ["--method", "qlora", "--quantization", "none", "--out", "no"];
    let (code, said) = bad(dir, &world.train(&none));
    assert!(code == 2 && said.contains("--method lora"), "{said}");
    let loftq = ["--set", "init_lora_weights=loftq", "--out", "no"];
    let (code, said) = bad(dir, &world.train(&loftq));
    assert!(code == 2 && said.contains("loftq"), "{said}");
    let skip = [
        "quantize",
        model,
        "--out",
        "no",
        "--skip",
        "lm_head,down_prj",
    ];
    let (code, said) = bad(dir, &skip);
    assert!(
        code == 2 && said.contains("nearest is `down_proj`"),
        "{said}"
    );
    let (code, _) = bad(
        dir,
        &["quantize", model, "--out", "no", "--shard-size", "0"],
    );
    assert_eq!(code, 2);
    let skip = [
        "--set",
        "quantization={type: nf4, skip: [layers.7]}",
        "--out",
        "no",
    ];
    let (code, said) = bad(dir, &world.train(&skip));
    assert!(code == 2 && said.contains("`layers.7`"), "{said}");
    assert!(!dir.join("no").exists());
    assert!(!dir.join("no").exists());
}

/// The settings of bits that have no blocks are read again, too.
#[test]
fn a_run_on_eight_bits_goes_on() {
    let world = World::new();
    let int8 = ["--set", "quantization={type: int8}"];
    let whole = [&STEPS[..], &int8, &["--out", "whole"]].concat();
    good(world.dir.path(), &world.train(&whole));
    killed_and_resumed(&world, "resumed", &int8);
    assert!(world.bits("resumed") == world.bits("whole"));
}

/// Two rounds of LoftQ change the base, which the run then has in a folder of its own.
#[test]
fn a_base_that_loftq_changed_goes_on_with_the_run() {
    let world = World::new();
    let dir = world.dir.path();
    let loftq = [
        "--method",
        "qlora",
        "--set",
        "init_lora_weights=loftq",
        "--set",
        "loftq_config={loftq_iter: 2}",
    ];
    let whole = [&STEPS[..], &loftq, &["--out", "whole"]].concat();
    good(dir, &world.train(&whole));
    killed_and_resumed(&world, "resumed", &loftq);
    assert!(world.bits("resumed") == world.bits("whole"));
    let info = std::fs::read_to_string(dir.join("whole/run.json")).unwrap();
    assert!(info.contains("whole/base"), "{info}");
    // So is the adapter's: on the dense model it would mean nothing.
    let config = std::fs::read_to_string(dir.join("whole/adapter/adapter_config.json")).unwrap();
    assert!(config.contains("whole/base\""), "{config}");
    good(dir, &["eval", "whole/adapter", "--data", &world.data]);
    // It may be moved, and is merged into what its base decodes to.
    std::fs::rename(dir.join("whole"), dir.join("moved")).unwrap();
    for what in ["moved", "moved/adapter"] {
        good(dir, &["eval", what, "--data", &world.data]);
    }
    let said = good(dir, &["merge", "moved", "--out", "merged"]);
    assert!(said.contains("(rounding)"), "{said}");
}
