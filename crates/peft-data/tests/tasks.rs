//! Rows of every task, with the small tokenizers of `fixtures/tokenizer`.

use std::fs;
use std::path::{Path, PathBuf};

use peft_data::{
    Columns, Holdout, IGNORED, Pass, Problem, Search, Side, Target, Targets, Task, TaskDataset,
    TaskOptions, Tokenizer, detect_task, prepare_task,
};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::open(&fixtures().join("tokenizer").join(name)).unwrap()
}

fn load(
    tokenizer: &Tokenizer,
    name: &str,
    content: impl AsRef<[u8]>,
    options: &TaskOptions,
) -> peft_data::Result<TaskDataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    prepare_task(&[path], tokenizer, options, &|_| {})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn usizes(value: &Value) -> Vec<usize> {
    let list = value.as_array().unwrap().iter();
    list.map(|it| it.as_u64().unwrap() as usize).collect()
}

/// The numbers of `fixtures/tokenizer/encoder_cases.py`.
fn cases() -> Value {
    let text = fs::read_to_string(fixtures().join("tokenizer/encoder_cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

const KINDS: [&str; 3] = ["wordpiece", "byte-level", "unigram"];

#[test]
fn pairs_are_cut_and_joined_as_python_does() {
    let cases = cases();
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        assert_eq!(tokenizer.has_segments(), kind == "wordpiece");
        for case in cases[kind]["pairs"].as_array().unwrap() {
            let mut rows = [
                json!({"text": case["text"], "label": "a"}),
                json!({"text": "b", "label": "b"}),
            ];
            if !case["pair"].is_null() {
                rows[0]["text_pair"] = case["pair"].clone();
                rows[1]["text_pair"] = "b".into();
            }
            let options = TaskOptions {
                max_length: case["max_length"].as_u64().unwrap() as usize,
                ..TaskOptions::of(Task::SeqCls)
            };
            let data = load(&tokenizer, "rows.jsonl", lines(&rows), &options).unwrap();
            let row = data.get(0).unwrap();
            assert_eq!(json!(row.ids), case["ids"], "{kind}: {case}");
            match case["types"].is_null() {
                true => assert!(row.segments.is_empty()),
                false => assert_eq!(json!(row.segments), case["types"], "{kind}: {case}"),
            }
        }
    }
}

#[test]
fn special_ids_are_found_where_they_are_kept() {
    let cases = cases();
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        for (name, id) in cases[kind]["special"].as_object().unwrap() {
            let found = tokenizer.special_id(&format!("{name}_token"));
            assert_eq!(json!(found), *id, "{kind}: {name}");
        }
    }
    // A class of transformers knows its tokens where no file names them.
    let dir = tempfile::tempdir().unwrap();
    let json = fixtures().join("tokenizer/wordpiece/tokenizer.json");
    fs::copy(json, dir.path().join("tokenizer.json")).unwrap();
    fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"tokenizer_class": "BertTokenizerFast", "pad_token": null}"#,
    )
    .unwrap();
    let tokenizer = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(tokenizer.special_id("mask_token"), Some(4));
    assert_eq!(tokenizer.special_id("pad_token"), None);
}

#[test]
fn words_get_their_tags_on_the_tokens_python_says() {
    let cases = cases();
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        for case in cases[kind]["words"].as_array().unwrap() {
            let count = case["words"].as_array().unwrap().len();
            let tags: Vec<String> = (0..count).map(|at| format!("B-{at}")).collect();
            let inner: Vec<String> = (0..count).map(|at| format!("I-{at}")).collect();
            let classes: Vec<String> = tags.iter().chain(&inner).cloned().collect();
            let row = json!({"tokens": case["words"], "ner_tags": tags}).to_string();
            for all in [false, true] {
                let options = TaskOptions {
                    max_length: case["max_length"].as_u64().unwrap() as usize,
                    classes: Some(classes.clone()),
                    label_all_tokens: all,
                    ..TaskOptions::of(Task::TokenCls)
                };
                let data = load(&tokenizer, "rows.jsonl", &row, &options).unwrap();
                let got = data.get(0).unwrap();
                assert_eq!(json!(got.ids), case["ids"], "{kind}: {case}");
                let of = case["of"].as_array().unwrap();
                let mut before = Value::Null;
                let mut wanted = Vec::new();
                for word in of {
                    wanted.push(match word.as_i64() {
                        None => IGNORED,
                        Some(_) if *word == before && !all => IGNORED,
                        Some(at) if *word == before => at + count as i64,
                        Some(at) => at,
                    });
                    before = word.clone();
                }
                assert_eq!(got.target, Target::Tokens(&wanted), "{kind}: {case}");
                let begun: Vec<i64> = data
                    .words(0)
                    .iter()
                    .map(|(word, _)| i64::from(*word))
                    .collect();
                let mut seen = usizes(&Value::Array(
                    of.iter().filter(|it| !it.is_null()).cloned().collect(),
                ));
                seen.dedup();
                assert_eq!(data.report().lost_words, count - seen.len());
                assert_eq!(begun, seen.iter().map(|it| *it as i64).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn answers_lie_in_the_windows_where_python_finds_them() {
    let cases = cases();
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        for case in cases[kind]["answers"].as_array().unwrap() {
            let (texts, starts) = match case["answer_start"].is_null() {
                true => (json!([]), json!([])),
                false => (json!([case["answer"]]), json!([case["answer_start"]])),
            };
            let row = json!({
                "question": case["question"],
                "context": case["context"],
                "answers": {"text": texts, "answer_start": starts},
            });
            let options = TaskOptions {
                max_length: case["max_length"].as_u64().unwrap() as usize,
                doc_stride: case["doc_stride"].as_u64().unwrap() as usize,
                ..TaskOptions::of(Task::QuestionAns)
            };
            let data = load(&tokenizer, "rows.jsonl", row.to_string(), &options).unwrap();
            let windows = case["windows"].as_array().unwrap();
            assert_eq!(data.len(), windows.len(), "{kind}: {case}");
            for (row, window) in data.rows().zip(windows) {
                assert_eq!(json!(row.ids), window["ids"]);
                if !window["types"].is_null() {
                    assert_eq!(json!(row.segments), window["types"]);
                }
                let span = usizes(&window["span"]);
                assert_eq!(row.target, Target::Span(span[0], span[1]), "{kind}: {case}");
            }
        }
    }
}

#[test]
fn a_perfect_model_says_the_answer() {
    let context =
        "The Ünïversity of Łódź lies in the city of Łódź. ".repeat(6) + "It was founded in 1945";
    let row = json!({"question": "  When?", "context": context, "answer": "1945", "answer_start": context.chars().count() - 4});
    let options = TaskOptions {
        max_length: 40,
        doc_stride: 8,
        ..TaskOptions::of(Task::QuestionAns)
    };
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        let data = load(&tokenizer, "rows.jsonl", row.to_string(), &options).unwrap();
        assert!(data.len() > 3 && data.report().lost_answers == 0);
        assert_eq!(data.rows_of(0), 0..data.len());
        let scores: Vec<(Vec<f32>, Vec<f32>)> = data
            .rows()
            .map(|row| {
                let Target::Span(start, end) = row.target else {
                    panic!("{:?}", row.target);
                };
                let peak = |at: usize| (0..row.ids.len()).map(|it| f32::from(it == at)).collect();
                (peak(start), peak(end))
            })
            .collect();
        let found = data.answer(
            0,
            |row| (&scores[row].0, &scores[row].1),
            &Search::default(),
        );
        let found = found.unwrap();
        assert_eq!((found.text.as_str(), found.score), ("1945", 2.0), "{kind}");
        assert!(
            data.answer(
                1,
                |row| (&scores[row].0, &scores[row].1),
                &Search::default()
            )
            .is_err()
        );
    }
}

#[test]
fn the_wordnet_classes() {
    let tokenizer = tokenizer("wordpiece");
    let path = fixtures().join("data/wordnet_gloss_6way.jsonl");
    let found = detect_task(std::slice::from_ref(&path), &Columns::default()).unwrap();
    assert_eq!(found.task, Some(Task::SeqCls));
    let data = prepare_task(&[path], &tokenizer, &TaskOptions::of(Task::SeqCls), &|_| {}).unwrap();
    assert_eq!(
        data.classes(),
        ["animal", "food", "location", "person", "plant", "time"]
    );
    assert_eq!(
        data.report()
            .classes
            .iter()
            .map(|it| it.1)
            .collect::<Vec<_>>(),
        [100; 6]
    );
    assert_eq!(
        (data.len(), data.problem()),
        (600, Some(Problem::SingleLabel))
    );
    assert!(data.report().longest < 200, "padded by its tokenizer.json");
    let shown = data.show(&tokenizer, 0).unwrap();
    assert_eq!(shown.label.as_deref(), Some("food"));
    assert_eq!(
        (
            shown.pieces[0].token.as_str(),
            shown.pieces[1].token.as_str()
        ),
        ("[CLS]", "sw")
    );
    let (train, held_out) = data.split(Holdout::Count(60), 3).unwrap();
    assert_eq!((train.len(), held_out.len()), (540, 60));
}

#[test]
fn the_languages_by_byte_level_and_pieces() {
    let path = fixtures().join("data/udhr_langid_10way.jsonl");
    for kind in ["byte-level", "unigram"] {
        let tokenizer = tokenizer(kind);
        let files = [path.clone()];
        let data =
            prepare_task(&files, &tokenizer, &TaskOptions::of(Task::SeqCls), &|_| {}).unwrap();
        assert_eq!((data.len(), data.outputs()), (500, Some(10)));
        let batch = data.batch(&[0, 7, 3], Pass::Eval, 8).unwrap();
        assert_eq!((batch.rows, batch.cols % 8), (3, 0));
        assert!(batch.token_type_ids.is_empty());
    }
}

/// Checks what one file of labels is understood as.
fn labels(name: &str, content: &str, options: &TaskOptions) -> (Vec<String>, Vec<Vec<f32>>) {
    let data = load(&tokenizer("wordpiece"), name, content, options).unwrap();
    let values = data.rows().map(|row| match row.target {
        Target::Class(id) => vec![id as f32],
        Target::Flags(values) | Target::Numbers(values) => values.to_vec(),
        other => panic!("{other:?}"),
    });
    (data.classes().to_vec(), values.collect())
}

#[test]
fn labels_of_every_sort() {
    let options = TaskOptions::of(Task::SeqCls);
    let of = |name: &str, content: &str| labels(name, content, &options);
    let named = |names: &[&str]| names.iter().map(|it| it.to_string()).collect::<Vec<_>>();
    let rows = |labels: &[Value]| {
        lines(
            &labels
                .iter()
                .map(|it| json!({"text": "x", "label": it}))
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(
        of("a.jsonl", &rows(&[json!("b"), json!("a")])),
        (named(&["a", "b"]), vec![vec![1.0], vec![0.0]])
    );
    assert_eq!(
        of("a.jsonl", &rows(&[json!(10), json!(9)])),
        (named(&["9", "10"]), vec![vec![1.0], vec![0.0]])
    );
    assert_eq!(
        of("a.jsonl", &rows(&[json!(true), json!(false)])),
        (named(&["false", "true"]), vec![vec![1.0], vec![0.0]])
    );
    assert_eq!(
        of("a.jsonl", &rows(&[json!(1), json!(0.25)])),
        (vec![], vec![vec![1.0], vec![0.25]])
    );
    assert_eq!(
        of(
            "a.jsonl",
            &rows(&[json!(["b"]), json!(["a", "b"]), json!([])])
        ),
        (
            named(&["a", "b"]),
            vec![vec![0.0, 1.0], vec![1.0, 1.0], vec![0.0, 0.0]]
        )
    );
    assert_eq!(
        of("a.jsonl", &rows(&[json!([0, 1, 1]), json!([1, 0, 0])])),
        (
            named(&["0", "1", "2"]),
            vec![vec![0.0, 1.0, 1.0], vec![1.0, 0.0, 0.0]]
        )
    );
    assert_eq!(of("a.csv", "text,label\nx,b\ny,a|b\n").0, ["a|b", "b"]);
    assert_eq!(
        of("a.csv", "text,labels\nx,b\ny,\"a|b\"\nz,\n"),
        (
            named(&["a", "b"]),
            vec![vec![0.0, 1.0], vec![1.0, 1.0], vec![0.0, 0.0]]
        )
    );
    assert_eq!(
        of("a.tsv", "text\tlabel\nx\t2\ny\t1.5\n"),
        (vec![], vec![vec![2.0], vec![1.5]])
    );
    assert_eq!(of("a.json", r#"[{"premise": "x", "hypothesis": "y", "label": 1}, {"premise": "x", "hypothesis": "y", "label": 0}]"#).0, ["0", "1"]);
    let regression = TaskOptions {
        problem: Some(Problem::Regression),
        ..options.clone()
    };
    assert_eq!(
        labels(
            "a.jsonl",
            &rows(&[json!([1, 2.5]), json!([0, 1])]),
            &regression
        ),
        (vec![], vec![vec![1.0, 2.5], vec![0.0, 1.0]])
    );
}

/// Checks that a file is refused with these words.
fn refuses(task: Task, name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
    let options = TaskOptions {
        max_length: 32,
        doc_stride: 4,
        ..TaskOptions::of(task)
    };
    refused(&options, name, content, words);
}

fn refused(options: &TaskOptions, name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
    let error = load(&tokenizer("wordpiece"), name, content, options);
    let error = error.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} without {word:?}");
    }
}

#[test]
fn mistakes_name_file_line_and_the_nearest() {
    use Task::*;
    let good = r#"{"text": "a", "label": "x"}"#;
    refuses(
        SeqCls,
        "r.jsonl",
        r#"{"text": "a"}"#,
        &["r.jsonl:1", "text without any label"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        r#"{"text": "a", "lable": 1}"#,
        &["`lable` mean `label`"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{{\"text\": \"b\"}}"),
        &["r.jsonl:2", "no label"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{{\"text\": \"b\", \"label\": null}}"),
        &["r.jsonl:2", "null"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n\n{{\"text\": \" \", \"label\": \"y\"}}"),
        &["r.jsonl:3", "`text` is empty"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{{\"text\": \"b\", \"label\": 3}}"),
        &["r.jsonl:2", "an integer", "strings"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{{\"text\": \"b\", \"label\": [\"x\"]}}"),
        &["r.jsonl:2", "a list"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{good}"),
        &["r.jsonl:1", "nothing to tell apart"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        format!("{good}\n{{\"text\": \"b\", \"text_pair\": \"c\", \"label\": \"y\"}}"),
        &["r.jsonl:2", "text_pair"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        r#"{"text": "a", "sentence": "b", "label": 1}"#,
        &["`text`, `sentence`", "say which"],
    );
    refuses(
        SeqCls,
        "r.jsonl",
        r#"{"premise": "a", "label": 1}"#,
        &["without `hypothesis`"],
    );
    refuses(
        SeqCls,
        "r.csv",
        "text,label\na,x\nb\n",
        &["r.csv:3", "1 cells", "2 columns"],
    );
    refuses(
        SeqCls,
        "r.csv",
        "text,label\na,x\nb,\n",
        &["r.csv:3", "empty"],
    );
    refuses(
        SeqCls,
        "r.csv",
        "text,text\na,x\n",
        &["r.csv:1", "two columns"],
    );
    refuses(
        SeqCls,
        "r.csv",
        "a great film,1\na bad one,0\n",
        &["r.csv:2", "no column for the text"],
    );
    refuses(
        SeqCls,
        "r.csv",
        "text,label\n\"a,x\nb,y\n",
        &["r.csv:2", "never closed"],
    );
    refuses(
        SeqCls,
        "r.csv",
        b"text,label\na,x\n\xff,y\n",
        &["r.csv:3", "UTF-8"],
    );
    refuses(SeqCls, "r.txt", "prose", &["text without any label"]);
    refuses(
        TokenCls,
        "r.jsonl",
        r#"{"tokens": ["a", "b"], "tags": ["x"]}"#,
        &["r.jsonl:1", "2 items", "has 1"],
    );
    refuses(
        TokenCls,
        "r.jsonl",
        r#"{"tokens": ["a", ""], "tags": ["x", "y"]}"#,
        &["`tokens`[1] is empty"],
    );
    refuses(
        TokenCls,
        "r.jsonl",
        r#"{"tokens": ["a"], "ner_tags": [0], "pos_tags": [1]}"#,
        &["`ner_tags`, `pos_tags`"],
    );
    refuses(
        TokenCls,
        "r.jsonl",
        r#"{"tokens": ["a"], "tags": [0.5]}"#,
        &["a name or an integer"],
    );
    let answer = |text: &str, start: usize| {
        json!({"question": "q", "context": "üab cd", "answer": text, "answer_start": start})
            .to_string()
    };
    refuses(
        QuestionAns,
        "r.jsonl",
        answer("cd", 3),
        &["r.jsonl:1", "does not point", "` c`", "at 4"],
    );
    refuses(QuestionAns, "r.jsonl", answer("xy", 3), &["nowhere"]);
    refuses(
        QuestionAns,
        "r.jsonl",
        answer("cd", 30),
        &["has 6 characters"],
    );
    refuses(
        QuestionAns,
        "r.jsonl",
        r#"{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": []}}"#,
        &["1 texts and 0 starts"],
    );
    refuses(
        QuestionAns,
        "r.jsonl",
        r#"{"question": "q", "context": "c"}"#,
        &["without `answers`"],
    );
    refuses(
        QuestionAns,
        "r.jsonl",
        json!({"question": "why ".repeat(40), "context": "c", "answer": "c", "answer_start": 0})
            .to_string(),
        &["the question takes"],
    );
    refuses(
        Seq2SeqLm,
        "r.jsonl",
        r#"{"source": "a"}"#,
        &["no column for the source and target"],
    );
    refuses(
        Seq2SeqLm,
        "r.jsonl",
        r#"{"source": "a", "target": ""}"#,
        &["`target` is empty"],
    );
    refuses(CausalLm, "r.jsonl", good, &["causal-lm"]);
    let classes = TaskOptions {
        classes: Some(vec!["negative".into(), "positive".into()]),
        ..TaskOptions::of(SeqCls)
    };
    refused(
        &classes,
        "r.jsonl",
        r#"{"text": "a", "label": "postive"}"#,
        &["r.jsonl:1", "the nearest is `positive`"],
    );
    refused(
        &classes,
        "r.jsonl",
        r#"{"text": "a", "label": 2}"#,
        &["out of range", "2 classes"],
    );
    refused(
        &classes,
        "r.jsonl",
        r#"{"text": "a", "label": 0.5}"#,
        &["classes are given"],
    );
    let short = TaskOptions {
        max_length: 4,
        ..TaskOptions::of(SeqCls)
    };
    refused(&short, "r.jsonl", good, &["max_length is 4", "5 tokens"]);
    let none = load(
        &tokenizer("unigram"),
        "r.jsonl",
        r#"{"text": "a"}"#,
        &TaskOptions::of(MaskedLm),
    );
    assert!(none.unwrap_err().to_string().contains("no mask_token"));
}

#[test]
fn detection_says_what_the_keys_say_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, content: &str, task: Option<Task>, fits: &[Task]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let found = detect_task(&[path], &Columns::default()).unwrap();
        assert_eq!(
            (found.task, found.fits.as_slice()),
            (task, fits),
            "{content}"
        );
    };
    use Task::*;
    check("a.jsonl", r#"{"text": "a"}"#, None, &[CausalLm, MaskedLm]);
    check(
        "a.jsonl",
        r#"{"text": "a", "label": 1}"#,
        Some(SeqCls),
        &[CausalLm, SeqCls, MaskedLm],
    );
    check(
        "a.csv",
        "sentence1,sentence2,label\na,b,1\n",
        Some(SeqCls),
        &[SeqCls],
    );
    check(
        "a.jsonl",
        r#"{"tokens": ["a"], "tags": ["b"]}"#,
        Some(TokenCls),
        &[TokenCls],
    );
    check(
        "a.jsonl",
        r#"{"question": "a", "context": "b", "answers": {}}"#,
        Some(QuestionAns),
        &[QuestionAns],
    );
    check(
        "a.jsonl",
        r#"{"source": "a", "target": "b"}"#,
        Some(Seq2SeqLm),
        &[Seq2SeqLm],
    );
    check(
        "a.jsonl",
        r#"{"input": "a", "output": "b"}"#,
        Some(Seq2SeqLm),
        &[Seq2SeqLm],
    );
    check(
        "a.jsonl",
        r#"{"prompt": "a", "completion": "b"}"#,
        None,
        &[CausalLm, Seq2SeqLm],
    );
    check(
        "a.jsonl",
        r#"{"instruction": "a", "input": "", "output": "b"}"#,
        None,
        &[CausalLm, Seq2SeqLm],
    );
    check(
        "a.jsonl",
        r#"{"messages": []}"#,
        Some(CausalLm),
        &[CausalLm],
    );
    check("a.txt", "prose", None, &[CausalLm, MaskedLm]);
    let path = dir.path().join("b.jsonl");
    fs::write(&path, r#"{"sentence1": "a", "lable": 1}"#).unwrap();
    let error = detect_task(&[path], &Columns::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("b.jsonl:1") && error.contains("`lable`"),
        "{error}"
    );
}

#[test]
fn targets_are_padded_apart_from_sources() {
    let tokenizer = tokenizer("unigram");
    let rows = [
        json!({"source": "summarize: a city in central Argentina", "target": "city"}),
        json!({"source": "b", "target": "a site of a university founded in 1613"}),
    ];
    let data = load(
        &tokenizer,
        "rows.jsonl",
        lines(&rows),
        &TaskOptions::of(Task::Seq2SeqLm),
    )
    .unwrap();
    assert_eq!(
        data.references()[1],
        "a site of a university founded in 1613"
    );
    let batch = data.batch(&[0, 1], Pass::Eval, 0).unwrap();
    let Targets::Decoder { cols, labels } = &batch.targets else {
        panic!("{:?}", batch.targets);
    };
    for (at, row) in rows.iter().enumerate() {
        let ids = |key: &str| tokenizer.encode(row[key].as_str().unwrap(), true).unwrap();
        let real = |cells: &[i64], fill: i64| -> Vec<u32> {
            let kept = cells.iter().take_while(|id| **id != fill);
            kept.map(|id| *id as u32).collect()
        };
        assert_eq!(real(&labels[at * cols..][..*cols], IGNORED), ids("target"));
        assert_eq!(
            real(&batch.input_ids[at * batch.cols..][..batch.cols], 0),
            ids("source")
        );
        assert_eq!(ids("target").last(), Some(&1));
    }
    let shown = data.show(&tokenizer, 0).unwrap();
    assert_eq!(shown.target.last().unwrap().token, "</s>");
    let instruction = json!({"instruction": "Say", "input": "it", "output": "yes"}).to_string();
    let data = load(
        &tokenizer,
        "rows.jsonl",
        instruction,
        &TaskOptions::of(Task::Seq2SeqLm),
    )
    .unwrap();
    assert_eq!(
        data.get(0).unwrap().ids,
        tokenizer.encode("Say\n\nit", true).unwrap()
    );
}

/// The same tokenizer with padding on the left.
fn left(kind: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let from = fixtures().join("tokenizer").join(kind);
    for entry in fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["padding_side"] = "left".into();
    fs::write(&path, config.to_string()).unwrap();
    Tokenizer::open(dir.path()).unwrap()
}

#[test]
fn padding_on_the_left_moves_answers_and_tags() {
    let tokenizer = left("wordpiece");
    assert_eq!(tokenizer.padding_side(), Side::Left);
    let rows = [
        json!({"question": "q", "context": "a city in Argentina", "answer": "city", "answer_start": 2}),
        json!({"question": "q", "context": "x", "answer": "x", "answer_start": 0}),
    ];
    let data = load(
        &tokenizer,
        "rows.jsonl",
        lines(&rows),
        &TaskOptions::of(Task::QuestionAns),
    )
    .unwrap();
    let batch = data.batch(&[0, 1], Pass::Eval, 16).unwrap();
    let Targets::Spans { starts, ends } = &batch.targets else {
        panic!("{:?}", batch.targets);
    };
    for at in 0..2 {
        let row = data.get(at).unwrap();
        let Target::Span(start, end) = row.target else {
            panic!();
        };
        let cell = |column: i64| batch.input_ids[at * batch.cols + column as usize] as u32;
        assert_eq!(
            (cell(starts[at]), cell(ends[at])),
            (row.ids[start], row.ids[end])
        );
        assert_eq!(batch.attention_mask[at * batch.cols], 0);
    }
    let row = json!({"words": ["Argentina", "is"], "labels": [1, 0]}).to_string();
    let data = load(
        &tokenizer,
        "rows.jsonl",
        row,
        &TaskOptions::of(Task::TokenCls),
    )
    .unwrap();
    let batch = data.batch(&[0], Pass::Eval, 32).unwrap();
    let Targets::Tokens(labels) = &batch.targets else {
        panic!("{:?}", batch.targets);
    };
    let first = batch.attention_mask.iter().position(|it| *it == 1).unwrap();
    assert_eq!((labels[first], labels[first + 1]), (IGNORED, 1));
}

#[test]
fn hidden_tokens_are_the_same_in_any_batch() {
    let tokenizer = tokenizer("wordpiece");
    let path = fixtures().join("data/wordnet_gloss_6way.jsonl");
    let mut options = TaskOptions::of(Task::MaskedLm);
    options.max_length = 16;
    let data = prepare_task(&[path], &tokenizer, &options, &|_| {}).unwrap();
    assert!(
        data.len() > 600 && data.report().examples == 600,
        "long rows go on"
    );
    let hidden = |rows: &[usize], pass: Pass| -> Vec<Vec<i64>> {
        let batch = data.batch(rows, pass, 1).unwrap();
        let Targets::Hidden(labels) = &batch.targets else {
            panic!();
        };
        (0..batch.rows)
            .map(|row| {
                let range = row * batch.cols..row * batch.cols + data.lengths()[rows[row]];
                [&batch.input_ids[range.clone()], &labels[range]].concat()
            })
            .collect()
    };
    let train = Pass::Train { epoch: 1 };
    assert_eq!(
        hidden(&[5, 9, 2], train),
        [[5], [9], [2]].map(|row| hidden(&row, train)[0].clone())
    );
    assert_ne!(
        hidden(&[5, 9, 2], train),
        hidden(&[5, 9, 2], Pass::Train { epoch: 2 })
    );
    assert_eq!(hidden(&[5], Pass::Eval), hidden(&[5], Pass::Eval));
    let shown = data.show(&tokenizer, 0).unwrap();
    assert!(shown.pieces.iter().any(|piece| piece.label.is_some()));
    assert!(shown.pieces[0].label.is_none());
}

#[test]
fn prose_to_fill_in_is_cut_into_windows_and_nothing_is_lost() {
    let tokenizer = tokenizer("wordpiece");
    let text = fs::read_to_string(fixtures().join("data/austen_pp_200k.txt")).unwrap();
    let text: String = text.chars().take(20_000).collect();
    let mut options = TaskOptions::of(Task::MaskedLm);
    options.max_length = 64;
    let data = load(&tokenizer, "prose.txt", &text, &options).unwrap();
    let whole = tokenizer.encode(&text, false).unwrap();
    let joined: Vec<u32> = data
        .rows()
        .flat_map(|row| row.ids[1..row.ids.len() - 1].to_vec())
        .collect();
    assert_eq!(joined, whole);
    assert!(
        data.rows()
            .all(|row| row.ids[0] == 2 && row.ids.len() <= 64)
    );
}

#[test]
fn windows_of_one_context_are_held_out_together() {
    let rows: Vec<Value> = (0..20)
        .map(|at| {
            let context = format!("city {at} ").repeat(30 + at * 3);
            json!({"question": "q", "context": context, "answer": "city", "answer_start": 0})
        })
        .collect();
    let options = TaskOptions {
        max_length: 40,
        doc_stride: 10,
        ..TaskOptions::of(Task::QuestionAns)
    };
    let data = load(
        &tokenizer("wordpiece"),
        "rows.jsonl",
        lines(&rows),
        &options,
    )
    .unwrap();
    let (train, held_out) = data.split(Holdout::Count(5), 1).unwrap();
    let examples = |rows: &[usize]| -> Vec<usize> {
        let mut all: Vec<usize> = rows
            .iter()
            .map(|row| data.example_of(*row).unwrap())
            .collect();
        all.dedup();
        all
    };
    assert_eq!((examples(&train).len(), examples(&held_out).len()), (15, 5));
    assert_eq!(train.len() + held_out.len(), data.len());
}

#[test]
fn rows_to_be_answered_need_no_labels() {
    let tokenizer = tokenizer("wordpiece");
    let of = |task: Task, row: Value| {
        let options = TaskOptions {
            labelled: false,
            classes: (task != Task::QuestionAns).then(|| vec!["x".into(), "y".into()]),
            ..TaskOptions::of(task)
        };
        let data = load(&tokenizer, "rows.jsonl", row.to_string(), &options).unwrap();
        let batch = data.batch(&[0], Pass::Eval, 1).unwrap();
        assert_eq!(data.get(0).unwrap().target, Target::None);
        assert_eq!(batch.targets, Targets::None);
        assert_eq!((data.problem(), data.outputs()), (None, None));
        data.show(&tokenizer, 0).unwrap();
        data
    };
    // A label that is there is not read, whatever it is.
    let data = of(
        Task::SeqCls,
        json!({"text": "a", "text_pair": "b", "label": "z"}),
    );
    assert_eq!((data.classes().len(), data.len()), (2, 1));
    let data = of(Task::TokenCls, json!({"tokens": ["Argentina", "is", "x"]}));
    let row = data.get(0).unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap();
    let first = ids("Argentina").len() as u32;
    let second = first + ids("is").len() as u32;
    assert_eq!(data.words(0), [(0, 1), (1, 1 + first), (2, 1 + second)]);
    assert_eq!(row.ids[1], ids("Argentina")[0]);
    let data = of(
        Task::QuestionAns,
        json!({"question": "q", "context": "a city"}),
    );
    let scores = vec![0.0; data.lengths()[0]];
    assert!(
        data.answer(0, |_| (&scores, &scores), &Search::default())
            .is_ok()
    );
    let data = of(Task::Seq2SeqLm, json!({"source": "a"}));
    assert!(data.references().is_empty());
    let bare = TaskOptions {
        labelled: false,
        ..TaskOptions::of(Task::MaskedLm)
    };
    refused(&bare, "r.txt", "prose", &["nothing to leave out"]);
}

#[test]
fn names_of_tasks() {
    assert_eq!("SEQ_CLS".parse::<Task>().unwrap(), Task::SeqCls);
    assert_eq!("masked-lm".parse::<Task>().unwrap(), Task::MaskedLm);
    let error = "seq-clas".parse::<Task>().unwrap_err().to_string();
    assert!(error.contains("the nearest is `seq-cls`"), "{error}");
    assert_eq!(
        "regression".parse::<Problem>().unwrap(),
        Problem::Regression
    );
    assert!(Path::new(&fixtures()).exists());
}
