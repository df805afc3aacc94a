//! Rows of tasks from damaged files, and what must hold of every batch.
//!
//! `PROPTEST_CASES=20000 cargo test -p peft-data --test fuzz_tasks` for a long run.

mod harm;

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use harm::{apply, cases, harms};
use peft_data::{
    Columns, IGNORED, Pass, Plan, Problem, Targets, Task, TaskDataset, TaskOptions, Tokenizer,
    detect_task, prepare_task,
};
use proptest::prelude::*;

const KINDS: [&str; 3] = ["wordpiece", "byte-level", "unigram"];

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tokenizers() -> &'static [Tokenizer] {
    static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    ALL.get_or_init(|| {
        KINDS
            .iter()
            .map(|kind| Tokenizer::open(&fixtures().join("tokenizer").join(kind)).unwrap())
            .collect()
    })
}

const FILES: [(&str, Task, &str); 13] = [
    (
        "a.csv",
        Task::SeqCls,
        "text,label\na b,x\n\"c, \"\"d\"\"\",y\n\"e\nf\",x\n",
    ),
    (
        "a.csv",
        Task::SeqCls,
        "\u{feff}text,text_pair,labels\r\na,b,x|y\r\nb,c,\r\n",
    ),
    ("a.tsv", Task::SeqCls, "sentence\tlabel\na\t1\nb\t2.5\n"),
    (
        "a.jsonl",
        Task::SeqCls,
        "{\"text\": \"Grüße\", \"label\": 1}\n{\"text\": \"b\", \"label\": 0}\n",
    ),
    (
        "a.jsonl",
        Task::SeqCls,
        "{\"premise\": \"a\", \"hypothesis\": \"b\", \"label\": [\"x\", \"y\"]}\n{\"premise\": \"a\", \"hypothesis\": \"b\", \"label\": []}",
    ),
    (
        "a.json",
        Task::SeqCls,
        "[{\"text\": \"a\", \"label\": [0, 1]},\n{\"text\": \"b\", \"label\": [1, 1]}]",
    ),
    (
        "a.jsonl",
        Task::TokenCls,
        "{\"tokens\": [\"EU\", \"rejects\", \"it\"], \"ner_tags\": [\"B-ORG\", \"O\", \"O\"]}\n{\"tokens\": [\"a\"], \"ner_tags\": [\"O\"]}",
    ),
    (
        "a.csv",
        Task::TokenCls,
        "words,tags\nEU rejects it,1 0 0\na b,0 0\n",
    ),
    (
        "a.jsonl",
        Task::QuestionAns,
        "{\"question\": \"q\", \"context\": \"a üb c d e f g h i j k l m n o p q r s t u v w x y z\", \"answers\": {\"text\": [\"üb c\"], \"answer_start\": [2]}}\n{\"question\": \"q\", \"context\": \"a\", \"answers\": {\"text\": [], \"answer_start\": []}}",
    ),
    (
        "a.csv",
        Task::QuestionAns,
        "question,context,answer,answer_start\nq,a b c,b,2\nq,a,,\n",
    ),
    (
        "a.tsv",
        Task::Seq2SeqLm,
        "source\ttarget\na b\tc\n\"d \"\"\"\te\n",
    ),
    (
        "a.jsonl",
        Task::Seq2SeqLm,
        "{\"instruction\": \"a\", \"input\": null, \"output\": \"b\"}\n{\"instruction\": \"a\", \"input\": \"x\", \"output\": \"b\"}",
    ),
    (
        "a.txt",
        Task::MaskedLm,
        "It is a truth universally acknowledged, é.\n\nThat a single man.",
    ),
];

/// The options by number: 0 are the usual ones.
fn options(task: Task, variant: usize) -> TaskOptions {
    let usual = TaskOptions {
        max_length: 20,
        max_target_length: 9,
        doc_stride: 4,
        ..TaskOptions::of(task)
    };
    match variant {
        1 => TaskOptions {
            labelled: false,
            ..usual
        },
        2 => TaskOptions {
            classes: Some(vec![
                "x".into(),
                "O".into(),
                "1".into(),
                "B-ORG".into(),
                "0".into(),
            ]),
            label_all_tokens: true,
            ..usual
        },
        3..=5 if task == Task::SeqCls => TaskOptions {
            problem: Some(Problem::ALL[variant - 3]),
            ..usual
        },
        _ => usual,
    }
}

fn load(
    which: usize,
    variant: usize,
    tokenizer: &Tokenizer,
    bytes: Vec<u8>,
) -> peft_data::Result<TaskDataset> {
    let (name, task, _) = FILES[which];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    let options = options(task, variant);
    let _ = detect_task(std::slice::from_ref(&path), &Columns::default());
    prepare_task(&[path], tokenizer, &options, &|_| {})
}

/// Everything that can be asked of a data set.
fn walk(data: &TaskDataset, tokenizer: &Tokenizer) -> Result<(), TestCaseError> {
    prop_assert_eq!(data.rows().len(), data.len());
    for row in data.rows() {
        prop_assert!(!row.ids.is_empty() && row.ids.len() <= 20);
    }
    let all: Vec<usize> = (0..data.len()).collect();
    for side in [1, 8] {
        alone_and_together(data, &all, side)?;
    }
    for row in 0..data.len() {
        let shown = data.show(tokenizer, row).unwrap();
        prop_assert_eq!(shown.pieces.len(), data.get(row).unwrap().ids.len());
    }
    if let Some(Problem::SingleLabel | Problem::MultiLabel) = data.problem() {
        prop_assert_eq!(data.outputs(), Some(data.classes().len()));
    }
    Ok(())
}

/// A row in a batch is the row alone: neighbours and padding change nothing.
fn alone_and_together(
    data: &TaskDataset,
    rows: &[usize],
    multiple_of: usize,
) -> Result<(), TestCaseError> {
    let pass = Pass::Train { epoch: 3 };
    let together = data.batch(rows, pass, multiple_of).unwrap();
    prop_assert_eq!(together.input_ids.len(), together.rows * together.cols);
    prop_assert_eq!(together.cols % multiple_of, 0);
    for (at, row) in rows.iter().enumerate() {
        let alone = data.batch(&[*row], pass, 1).unwrap();
        let range = at * together.cols..(at + 1) * together.cols;
        let length = alone.cols;
        let kept = |cells: &[i64]| -> Vec<i64> {
            let mask = &together.attention_mask[range.clone()];
            let cells = cells[range.clone()].iter().zip(mask);
            cells
                .filter(|(_, mask)| **mask == 1)
                .map(|(cell, _)| *cell)
                .collect()
        };
        prop_assert_eq!(kept(&together.input_ids), alone.input_ids);
        if !alone.token_type_ids.is_empty() {
            prop_assert_eq!(kept(&together.token_type_ids), alone.token_type_ids);
        }
        match (&together.targets, &alone.targets) {
            (Targets::Classes(all), Targets::Classes(one)) => prop_assert_eq!(all[at], one[0]),
            (Targets::Flags { outputs, values }, Targets::Flags { values: one, .. })
            | (Targets::Numbers { outputs, values }, Targets::Numbers { values: one, .. }) => {
                prop_assert_eq!(&values[at * outputs..][..*outputs], one.as_slice());
            }
            (Targets::Tokens(all), Targets::Tokens(one))
            | (Targets::Hidden(all), Targets::Hidden(one)) => {
                prop_assert_eq!(&kept(all), one);
                let padded = together.attention_mask.iter().zip(all);
                prop_assert!(padded.filter(|it| *it.0 == 0).all(|it| *it.1 == IGNORED));
            }
            (Targets::Spans { starts, ends }, Targets::Spans { starts: s, ends: e }) => {
                // These tokenizers pad on the right.
                prop_assert_eq!((starts[at], ends[at]), (s[0], e[0]));
                prop_assert!(s[0] <= e[0] && (e[0] as usize) < length);
            }
            (
                Targets::Decoder { cols, labels },
                Targets::Decoder {
                    cols: width,
                    labels: one,
                },
            ) => {
                let row = &labels[at * cols..][..*cols];
                prop_assert_eq!(&row[..*width], one.as_slice());
                prop_assert!(row[*width..].iter().all(|id| *id == IGNORED));
            }
            (Targets::None, Targets::None) => {}
            other => prop_assert!(false, "{:?}", other),
        }
    }
    Ok(())
}

#[test]
fn whole_files_are_read() {
    for (which, (name, task, content)) in FILES.iter().enumerate() {
        for (tokenizer, kind) in tokenizers().iter().zip(KINDS) {
            if *task == Task::MaskedLm && kind == "unigram" {
                continue;
            }
            let data = load(which, 0, tokenizer, content.as_bytes().to_vec());
            let data = data.unwrap_or_else(|error| panic!("{name} {task} {kind}: {error}"));
            walk(&data, tokenizer).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files(which in 0..FILES.len(), variant in 0..6usize, kind in 0..3usize, harms in harms()) {
        let tokenizer = &tokenizers()[kind];
        if let Ok(data) = load(which, variant, tokenizer, apply(FILES[which].2.into(), &harms)) {
            walk(&data, tokenizer)?;
        }
    }

    /// What `csv` writes is read back to the letter.
    #[test]
    fn tables_hold_any_text(
        rows in prop::collection::vec((".{1,30}", "[a-c]"), 2..8), crlf in any::<bool>()
    ) {
        let rows: Vec<(String, String)> = rows
            .into_iter()
            .map(|(text, label)| (format!("x{}", text.replace('\0', "")), label))
            .collect();
        let terminator = if crlf { csv::Terminator::CRLF } else { csv::Terminator::Any(b'\n') };
        let mut writer = csv::WriterBuilder::new().terminator(terminator).from_writer(Vec::new());
        writer.write_record(["source", "target"]).unwrap();
        for (text, label) in &rows {
            writer.write_record([text, label]).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let table = dir.path().join("a.csv");
        fs::write(&table, writer.into_inner().unwrap()).unwrap();
        let lines = dir.path().join("a.jsonl");
        let json: String = rows
            .iter()
            .map(|(text, label)| format!("{}\n", serde_json::json!({"source": text, "target": label})))
            .collect();
        fs::write(&lines, json).unwrap();
        let load = |path: PathBuf| {
            prepare_task(&[path], &tokenizers()[1], &TaskOptions::of(Task::Seq2SeqLm), &|_| {}).unwrap()
        };
        let (table, lines) = (load(table), load(lines));
        prop_assert_eq!(table.references(), lines.references());
        for (a, b) in table.rows().zip(lines.rows()) {
            prop_assert_eq!(a.ids, b.ids);
        }
    }

    #[test]
    fn batches_hold_each_row_once(size in 1..9usize, epoch in 0..4usize) {
        static DATA: OnceLock<TaskDataset> = OnceLock::new();
        let data = DATA.get_or_init(|| {
            let path = fixtures().join("data/udhr_langid_10way.jsonl");
            prepare_task(&[path], &tokenizers()[0], &TaskOptions::of(Task::SeqCls), &|_| {}).unwrap()
        });
        let plan = Plan::new((0..50).collect(), size, 9).unwrap().shuffled();
        let plan = plan.grouped_by_length(&data.lengths()).unwrap();
        let mut seen = Vec::new();
        for rows in plan.epoch(epoch) {
            let batch = data.batch(&rows, Pass::Train { epoch }, 8).unwrap();
            alone_and_together(data, &rows, 8)?;
            seen.extend(batch.indices);
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..50).collect::<Vec<_>>());
    }
}
