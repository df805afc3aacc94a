//! From files to rows, with the small tokenizer of `fixtures/tokenizer`.

use std::fs;
use std::path::{Path, PathBuf};

use peft_data::{
    Dataset, Format, Message, Options, RenderOptions, Tokenizer, Turns, detect, pieces, prepare,
};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&fixtures().join("tokenizer")).unwrap()
}

fn with_template(name: &str) -> Tokenizer {
    let path = fixtures().join(format!("chat/templates/{name}.jinja"));
    tokenizer()
        .with_chat_template(fs::read_to_string(path).unwrap())
        .unwrap()
}

/// The tokenizer of a base model: no chat template.
fn base_tokenizer() -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        fixtures().join("tokenizer/tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": {"content": "<|im_end|>"}}"#,
    )
    .unwrap();
    Tokenizer::open(dir.path()).unwrap()
}

fn file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, content).unwrap();
    path
}

fn load(
    tokenizer: &Tokenizer,
    name: &str,
    content: impl AsRef<[u8]>,
    options: &Options,
) -> peft_data::Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    prepare(
        &[file(dir.path(), name, content)],
        tokenizer,
        options,
        &|_| {},
    )
}

/// What is trained of row `at`, with | between separate stretches; and the whole text.
fn shown(tokenizer: &Tokenizer, data: &Dataset, at: usize) -> (String, String) {
    let (mut all, mut trained, mut was) = (String::new(), String::new(), false);
    for piece in pieces(tokenizer, data.get(at).unwrap()).unwrap() {
        all.push_str(&piece.text);
        if piece.trained {
            if !was && !trained.is_empty() {
                trained.push('|');
            }
            trained.push_str(&piece.text);
        }
        was = piece.trained;
    }
    (trained, all)
}

/// Checks what is trained of one row.
fn check(tokenizer: &Tokenizer, row: &str, options: &Options, trained: &str) -> String {
    let data = load(tokenizer, "rows.jsonl", row, options).unwrap();
    let (got, all) = shown(tokenizer, &data, 0);
    assert_eq!(got, trained, "of {all:?}");
    all
}

const TWO_TURNS: &str = r#"{"messages": [{"role": "user", "content": "Hi <|im_end|> you"}, {"role": "assistant", "content": "Hello 👋"}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}"#;

#[test]
fn chat_templates_train_the_replies_and_their_end() {
    let options = Options::default();
    for name in ["chatml", "chatml_tools", "generation"] {
        let all = check(
            &with_template(name),
            TWO_TURNS,
            &options,
            "Hello 👋<|im_end|>|4<|im_end|>",
        );
        assert!(all.ends_with("4<|im_end|>\n"), "{all}");
    }
    let last = Options {
        turns: Turns::Last,
        ..Options::default()
    };
    check(&with_template("chatml"), TWO_TURNS, &last, "4<|im_end|>");
    check(
        &with_template("generation"),
        TWO_TURNS,
        &last,
        "4<|im_end|>",
    );
}

#[test]
fn the_rendered_text_is_the_rows_text() {
    let tokenizer = with_template("chatml");
    let messages = [Message::user("é👩‍🚀 a"), Message::assistant("\u{200b}ß")];
    let text = tokenizer
        .render(&messages, &RenderOptions::default())
        .unwrap();
    let row = serde_json::json!({ "messages": messages }).to_string();
    let all = check(&tokenizer, &row, &Options::default(), "\u{200b}ß<|im_end|>");
    assert_eq!(all, text);
}

#[test]
fn templates_that_rewrite_history() {
    // Qwen's manner drops the reasoning of the first turn and keeps that of the last.
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\nOne."}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "<think>\ny\n</think>\n\nTwo."}]}"#;
    let trained = "One.<|im_end|>|<think>\ny\n</think>\n\nTwo.<|im_end|>";
    check(
        &with_template("thinking"),
        row,
        &Options::default(),
        trained,
    );
    // Mistral's manner moves the system prompt to the last question.
    let row = r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "One."}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "Two."}]}"#;
    let trained = shown_by("inst", row);
    assert!(
        trained.starts_with("One.<|im_end|>|") || trained.starts_with(" One.<|im_end|>|"),
        "{trained:?}"
    );
    assert!(trained.ends_with("Two.<|im_end|>"), "{trained:?}");
    // Phi's manner ends a conversation by a token that a turn does not end with.
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "One."}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "Two."}]}"#;
    assert!(shown_by("ends", row).starts_with("One."));
}

fn shown_by(template: &str, row: &str) -> String {
    let tokenizer = with_template(template);
    let data = load(&tokenizer, "rows.jsonl", row, &Options::default()).unwrap();
    shown(&tokenizer, &data, 0).0
}

#[test]
fn tool_calls_are_trained_and_results_are_not() {
    let row = r#"{"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]}"#;
    let trained = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call><|im_end|>|Seven.<|im_end|>";
    let got = shown_by("chatml_tools", row);
    assert_eq!(got.trim_start(), trained);
    assert!(shown_by("thinking", row).contains("</tool_call><|im_end|>|"));
}

/// What is said may look like what the template writes, to its last blank.
#[test]
fn a_reply_may_end_with_the_text_of_a_token() {
    let tokenizer = with_template("chatml");
    for said in ["It is <|im_end|>\\n", "<|im_end|> ", "\\n"] {
        let row = format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "{said}"}}]}}"#
        );
        let trained = format!("{}<|im_end|>", said.replace("\\n", "\n"));
        check(&tokenizer, &row, &Options::default(), &trained);
    }
}

/// An empty reply in the middle is found by what stands where it would, and calls of tools beside a text by what ends them.
#[test]
fn replies_that_templates_leave_out() {
    let row = r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "Two."}]}"#;
    for template in ["chatml", "thinking", "inst"] {
        let trained = shown_by(template, row).replace("<think>\n\n</think>\n\n", "");
        assert_eq!(
            trained.replace(' ', ""),
            "<|im_end|>|Two.<|im_end|>",
            "{template}"
        );
    }
}

/// A turn that calls tools has a content where the row has one.
#[test]
fn an_empty_content_is_one() {
    for calls in ["null", "[]"] {
        let row = format!(
            r#"{{"messages": [{{"role": "user", "content": "", "tool_calls": {calls}}}, {{"role": "assistant", "content": "Yo", "tool_calls": {calls}}}]}}"#
        );
        assert_eq!(shown_by("chatml", &row), "Yo<|im_end|>");
    }
    let calling =
        serde_json::json!({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]});
    let message: Message = serde_json::from_value(calling.clone()).unwrap();
    assert_eq!(serde_json::to_value(message).unwrap(), calling);
}

#[test]
fn formats_through_a_template_and_without() {
    let (chat, base) = (tokenizer(), base_tokenizer());
    let options = Options::default();
    let alpaca = r#"{"instruction": "Say", "input": "it", "output": "Yes"}"#;
    assert!(check(&chat, alpaca, &options, "Yes<|im_end|>").contains("user\nSay\n\nit<|im_end|>"));
    let all = check(&base, alpaca, &options, "Yes<|im_end|>");
    assert!(
        all.starts_with("Below is an instruction")
            && all.ends_with("### Input:\nit\n\n### Response:Yes<|im_end|>")
    );
    let pair = r#"{"prompt": "Q: why? A:", "completion": " so."}"#;
    assert_eq!(
        check(&base, pair, &options, " so.<|im_end|>"),
        "Q: why? A: so.<|im_end|>"
    );
    check(&chat, pair, &options, " so.<|im_end|>");
    let lists = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]}"#;
    check(&chat, lists, &options, "d<|im_end|>");
    let share = r#"{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#;
    assert!(
        check(&chat, share, &options, "b<|im_end|>").starts_with("<|im_start|>system\ns<|im_end|>")
    );
    check(
        &base,
        r#"{"text": "All of it."}"#,
        &options,
        "All of it.<|im_end|>",
    );
    let all = Options {
        train_on_prompt: true,
        add_eos: false,
        ..Options::default()
    };
    check(&base, pair, &all, "Q: why? A: so.");
}

#[test]
fn prose_is_cut_into_windows() {
    let text = fs::read_to_string(fixtures().join("data/austen_pp_200k.txt")).unwrap();
    let tokenizer = base_tokenizer();
    let options = Options {
        max_length: 128,
        ..Options::default()
    };
    let data = load(&tokenizer, "austen.txt", &text, &options).unwrap();
    assert_eq!(data.files()[0].format, "plain-text");
    let joined: String = (0..data.len())
        .map(|at| shown(&tokenizer, &data, at).1)
        .collect();
    assert_eq!(joined, text + "<|im_end|>");
    assert!(
        data.lengths()[..data.len() - 1]
            .iter()
            .all(|length| *length == 128)
    );
}

#[test]
fn files_as_editors_leave_them() {
    let tokenizer = tokenizer();
    let rows = "\u{feff}\r\n{\"text\": \"a\"}\r\n\n  {\"text\": \"b\"}  \r\n";
    let data = load(&tokenizer, "rows.jsonl", rows, &Options::default()).unwrap();
    assert_eq!(data.len(), 2);
    let list = "\u{feff}[\n {\"text\": \"a\"},\n {\"text\": \"b\", \"id\": 3}]";
    let data = load(&tokenizer, "rows.json", list, &Options::default()).unwrap();
    assert_eq!(data.len(), 2);
    assert_eq!(data.files()[0].ignored["id"], 1);
    assert!(data.report().warnings()[0].contains("`id`"));
}

#[test]
fn tables_hold_the_same_rows() {
    let tokenizer = tokenizer();
    let rows = "\u{feff}instruction,input,output\r\n\"Say, please\",it,\"a \"\"b\"\"\nc\"\r\n";
    let table = load(&tokenizer, "rows.csv", rows, &Options::default()).unwrap();
    let row = r#"{"instruction": "Say, please", "input": "it", "output": "a \"b\"\nc"}"#;
    let lines = load(&tokenizer, "rows.jsonl", row, &Options::default()).unwrap();
    assert_eq!(table.get(0).unwrap().ids, lines.get(0).unwrap().ids);
    assert_eq!(table.files()[0].format, "alpaca");
    let lines = "{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
    let lines = load(&tokenizer, "lines.json", lines, &Options::default());
    assert_eq!(lines.unwrap().len(), 2);
    let rows = "prompt\tcompletion\na\tb\nc\td\n";
    assert_eq!(
        load(&tokenizer, "rows.tsv", rows, &Options::default())
            .unwrap()
            .len(),
        2
    );
}

/// Checks that a file is refused with these words.
fn refuses(name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
    let error = load(&tokenizer(), name, content, &Options::default())
        .unwrap_err()
        .to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} without {word:?}");
    }
}

#[test]
fn errors_name_file_line_and_the_nearest() {
    refuses("rows.jsonl", "", &["rows.jsonl", "empty"]);
    refuses("rows.jsonl", " \n\n", &["empty"]);
    refuses("rows.xlsx", "a,b", &["`.xlsx`", ".jsonl"]);
    refuses("rows.csv", "a,b", &["rows.csv", "no row below"]);
    refuses("rows.csv", "txt\na", &["rows.csv:2", "`txt` mean `text`"]);
    refuses("rows.jsnol", "{}", &["the nearest is `.json"]);
    refuses(
        "rows.jsonl",
        "{\"text\": \"a\"}\n\n{\"txt\": \"b\"}",
        &["rows.jsonl:3", "text", "`txt` mean `text`"],
    );
    refuses(
        "rows.jsonl",
        "{\"mesages\": []}",
        &["rows.jsonl:1", "`mesages` mean `messages`"],
    );
    refuses(
        "rows.jsonl",
        "{\"text\": \"a\"}\n{\"text\": 3}",
        &["rows.jsonl:2", "a string, not a number"],
    );
    refuses(
        "rows.jsonl",
        "{\"text\": \"a\"}\n{\"text\": \"b\"",
        &["rows.jsonl:2", "not JSON"],
    );
    refuses(
        "rows.jsonl",
        "{\"text\": \"a\"}\n[1]",
        &["rows.jsonl:2", "object"],
    );
    refuses(
        "rows.jsonl",
        b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}",
        &["rows.jsonl:2", "UTF-8"],
    );
    refuses(
        "rows.jsonl",
        "{\"text\": \"a\0\"}",
        &["rows.jsonl:1", "NUL"],
    );
    refuses("rows.txt", "a\nb\0", &["rows.txt:2", "NUL"]);
    refuses(
        "rows.json",
        "[{\"text\": \"a\"},\n{\"text\": 1}]",
        &["rows.json:2", "number"],
    );
    refuses("rows.json", "{\"text\":\n \"a\"}", &["rows.json:1", "list"]);
    refuses(
        "rows.jsonl",
        format!("{{\"text\": {}}}", "[".repeat(9000)),
        &["rows.jsonl:1", "recursion"],
    );
    refuses(
        "rows.jsonl",
        format!("{{\"text\": \"{}\"}}", "a".repeat(17 << 20)),
        &["rows.jsonl:1", "the most is"],
    );
    refuses(
        "rows.jsonl",
        r#"{"messages": [{"role": "user", "content": "a"}]}"#,
        &["rows.jsonl:1", "no assistant turn", "`user`"],
    );
    refuses(
        "rows.jsonl",
        r#"{"messages": [{"role": "user", "contents": "a"}]}"#,
        &["`messages`[0]", "did `contents` mean `content`"],
    );
    refuses("rows.jsonl", r#"{"messages": []}"#, &["empty list"]);
    refuses(
        "rows.jsonl",
        r#"{"conversations": [{"from": "humam", "value": "a"}]}"#,
        &["`humam`", "the nearest is `human`"],
    );
}

#[test]
fn a_template_that_refuses_says_where() {
    let row = r#"{"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let error = load(
        &with_template("turns"),
        "rows.jsonl",
        row,
        &Options::default(),
    )
    .unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("rows.jsonl:1: ") && error.contains("must alternate"),
        "{error}"
    );
}

#[test]
fn truncation_is_counted_and_warned_about() {
    let rows = [TWO_TURNS, r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#].join("\n");
    let options = Options {
        max_length: 60,
        ..Options::default()
    };
    let data = load(&with_template("zephyr"), "rows.jsonl", rows, &options).unwrap();
    assert_eq!(data.report().rows, 2);
    let tight = Options {
        max_length: 4,
        ..Options::default()
    };
    let data = load(&tokenizer(), "rows.jsonl", TWO_TURNS, &tight).unwrap();
    assert_eq!((data.report().truncated, data.report().untrained), (1, 1));
    assert!(data.report().warnings()[0].contains("1 of 1 rows have no trained token"));
    assert!(
        load(
            &tokenizer(),
            "a.jsonl",
            TWO_TURNS,
            &Options {
                max_length: 1,
                ..tight
            }
        )
        .is_err()
    );
}

#[test]
fn the_cache_is_found_again_and_mended() {
    let dir = tempfile::tempdir().unwrap();
    let data = file(dir.path(), "rows.jsonl", TWO_TURNS);
    let cache_dir = dir.path().join("cache");
    let options = Options {
        cache_dir: Some(cache_dir.clone()),
        ..Options::default()
    };
    let runs = std::sync::atomic::AtomicUsize::new(0);
    let tokenizer = tokenizer();
    let load = |options: &Options| {
        let count = |_: peft_data::Progress<'_>| {
            runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        let data = prepare(std::slice::from_ref(&data), &tokenizer, options, &count).unwrap();
        let row = data.get(0).unwrap();
        (row.ids.to_vec(), row.mask(), data.report().clone())
    };
    let first = load(&options);
    assert_eq!(load(&options), first);
    assert_eq!(runs.load(std::sync::atomic::Ordering::Relaxed), 1);
    let entries: Vec<_> = fs::read_dir(&cache_dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(
        entries.len(),
        1,
        "nothing but the cache is left: {entries:?}"
    );
    let whole = fs::read(&entries[0]).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        fs::write(
            &entries[0],
            if at % 2 == 0 { &damaged } else { &whole[..at] },
        )
        .unwrap();
        assert_eq!(load(&options), first, "damaged at {at}");
    }
    let shorter = Options {
        max_length: 20,
        ..options
    };
    assert_eq!(load(&shorter).0.len(), 20);
    assert_eq!(fs::read_dir(&cache_dir).unwrap().count(), 2);
}

#[test]
fn runs_at_once_do_not_clash() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..500)
        .map(|i| format!("{{\"text\": \"row {i}\"}}\n"))
        .collect();
    let data = file(dir.path(), "rows.jsonl", rows);
    let options = Options {
        cache_dir: Some(dir.path().join("cache")),
        ..Options::default()
    };
    let tokenizer = tokenizer();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let data = prepare(std::slice::from_ref(&data), &tokenizer, &options, &|_| {});
                assert_eq!(data.unwrap().len(), 500);
            });
        }
    });
}

#[test]
fn the_wordnet_rows() {
    let path = fixtures().join("data/wordnet_define_sft.jsonl");
    assert_eq!(detect(&path).unwrap(), Format::Alpaca);
    let data = prepare(
        &[path.clone(), path],
        &tokenizer(),
        &Options::default(),
        &|_| {},
    )
    .unwrap();
    assert_eq!(data.len(), 1000);
    assert_eq!(
        (data.file_of(499), data.file_of(500), data.file_of(1000)),
        (Some(0), Some(1), None)
    );
    let batch = data.batch(&[3, 998], 3, peft_data::Side::Right, 8).unwrap();
    assert_eq!(
        (batch.rows, batch.cols % 8, &batch.indices[..]),
        (2, 0, &[3, 998][..])
    );
    assert!(data.batch(&[1000], 3, peft_data::Side::Right, 8).is_err());
    let trained: usize = data.rows().map(|row| row.trained_tokens()).sum();
    assert_eq!(trained, data.report().trained_tokens);
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = with_template("thinking");
    tokenizer.save(dir.path()).unwrap();
    let again = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(again.chat_template(), tokenizer.chat_template());
    assert_eq!(again.fingerprint(), tokenizer.fingerprint());
    again.save(dir.path()).unwrap();
    assert_eq!(Tokenizer::open(dir.path()).unwrap().eos_ids(), [2]);
    assert_ne!(tokenizer.fingerprint(), base_tokenizer().fingerprint());
}

#[test]
fn ids_and_streams() {
    let tokenizer = tokenizer();
    assert_eq!(
        (
            tokenizer.vocab_size(),
            tokenizer.pad_id(),
            tokenizer.bos_id()
        ),
        (512, 3, Some(1))
    );
    let text = "Grüße, 👩‍🚀 and so on. 你好\n";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    let mut stream = tokenizer.stream(true);
    let mut streamed = String::new();
    for id in &ids {
        if let Some(piece) = stream.push(*id).unwrap() {
            assert!(!piece.contains('\u{fffd}'));
            streamed.push_str(&piece);
        }
    }
    streamed.push_str(&stream.finish().unwrap().unwrap_or_default());
    assert_eq!(streamed, text);
    let error = tokenizer.decode(&[512], true).unwrap_err().to_string();
    assert!(error.contains("512"), "{error}");
    assert!(
        tokenizer
            .require("<|im_edn|>")
            .unwrap_err()
            .to_string()
            .contains("`<|im_end|>`")
    );
}

/// The ids and masks that `apply_chat_template` gives (`fixtures/tokenizer/cases.py`).
#[test]
fn ids_and_masks_equal_pythons() {
    let cases = fs::read(fixtures().join("tokenizer/cases.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&cases).unwrap();
    // With the template's own marks, and without: the turns must be found all the same.
    let marked = fs::read_to_string(fixtures().join("chat/templates/generation.jinja")).unwrap();
    let plain = marked
        .replace("{%- generation %}", "{%- if true %}")
        .replace("{%- endgeneration %}", "{%- endif %}");
    for template in [marked, plain] {
        let tokenizer = tokenizer().with_chat_template(template).unwrap();
        for case in &cases {
            let row = serde_json::json!({ "messages": case["messages"] }).to_string();
            let data = load(&tokenizer, "rows.jsonl", row, &Options::default()).unwrap();
            let row = data.get(0).unwrap();
            let mask: Vec<u8> = row.mask().into_iter().map(u8::from).collect();
            assert_eq!(serde_json::json!(row.ids), case["ids"]);
            assert_eq!(
                serde_json::json!(mask),
                case["mask"],
                "{}",
                case["messages"]
            );
        }
    }
}

/// A token that tokenizer_config.json names is special, as in Python, also where tokenizer.json has it as an ordinary word.
#[test]
fn tokens_that_are_named_are_special() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "truncation": null, "padding": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "end": 2, "?": 3}, "unk_token": "?"},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": "end"}"#,
    )
    .unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("aend b", true).unwrap(), [0, 2, 1]);
    assert_eq!(tokenizer.decode(&[0, 2, 1], true).unwrap(), "a b");
    assert_eq!(tokenizer.decode(&[0, 2, 1], false).unwrap(), "a end b");
}
