//! Files that lie: each lie is found before it costs anything, and named.

use crate::support::{Kv, Row, Writer, file, fixture, string};
use peft_gguf::Gguf;

fn error_of(bytes: &[u8]) -> String {
    let (_dir, path) = file(bytes);
    Gguf::open(&path).unwrap_err().to_string()
}

fn check(writer: &Writer, expected: &str) {
    let error = error_of(&writer.bytes());
    assert!(error.contains("model.gguf: "), "{error}");
    assert!(error.contains(expected), "{error}");
}

fn row(dims: &[u64], kind: u32, offset: Option<u64>, size: usize) -> Writer {
    let mut writer = Writer::new();
    writer.tensors.push(Row {
        name: "w".into(),
        dims: dims.into(),
        kind,
        offset,
        data: vec![0; size],
    });
    writer
}

#[test]
fn other_kinds_of_file() {
    assert!(error_of(b"").contains("truncated: magic"));
    assert!(error_of(b"PK\x03\x04 and so on").contains(r"starts with `PK\x03\x04`"));
    assert!(error_of(b"GGUF").contains("truncated: version"));
    let version = |version| Writer {
        version,
        ..Writer::new()
    };
    check(
        &version(1),
        "GGUF version 1; this build reads versions 2 and 3",
    );
    check(&version(4), "GGUF version 4");
    check(&version(3 << 24), "a big-endian GGUF file");
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str| Gguf::open(&dir.path().join(name)).unwrap_err().to_string();
    assert!(open("absent.gguf").contains("absent.gguf: open: "));
    assert!(open(".").contains("not a regular file"));
}

#[test]
fn counts_that_lie() {
    for count in [1, 2, 1 << 32, 1 << 60, u64::MAX] {
        let keys = Writer {
            key_count: Some(count),
            ..Writer::new()
        };
        check(&keys, "truncated: key count");
        let tensors = Writer {
            tensor_count: Some(count),
            ..Writer::new()
        };
        check(&tensors, "truncated: tensor count");
        // an array of strings, of arrays, of bytes; a string; all inside a key
        for kind in [8u32, 9, 0] {
            let lie = [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
            check(&Writer::new().key("k", Kv::Raw(9, lie)), "key `k`: byte");
        }
        let lie = count.to_le_bytes().to_vec();
        check(&Writer::new().key("k", Kv::Raw(8, lie)), "key `k`: byte");
    }
}

#[test]
fn values_that_are_none() {
    check(
        &Writer::new().key("k", Kv::Raw(13, vec![0; 8])),
        "unknown value type 13",
    );
    check(
        &Writer::new().key("k", Kv::Raw(7, vec![2])),
        "a bool is 0 or 1, got 2",
    );
    let bad = [2u64.to_le_bytes().as_slice(), b"\xff\xfe"].concat();
    check(
        &Writer::new().key("k", Kv::Raw(8, bad)),
        "not UTF-8 at byte",
    );
    let twice = Writer::new().key("k", Kv::U32(1)).key("k", Kv::U32(1));
    check(&twice, "key `k`: appears twice");
    // an array in an array in an array …, 100 deep
    let mut nested = Vec::new();
    for _ in 0..100 {
        nested.extend(9u32.to_le_bytes());
        nested.extend(1u64.to_le_bytes());
    }
    check(
        &Writer::new().key("k", Kv::Raw(9, nested)),
        "arrays nested more than 8 deep",
    );
    let long = Writer::new().key(&"k".repeat(70_000), Kv::U32(1));
    check(&long, "key: 70000 bytes, at most 65535 allowed");
    // what a terminal would obey is escaped
    let twice = Writer::new()
        .key("\u{1b}[2J", Kv::U32(1))
        .key("\u{1b}[2J", Kv::U32(1));
    check(&twice, r"`\u{1b}[2J`");
}

#[test]
fn nested_arrays_within_reason_are_read() {
    let inner = [0u32.to_le_bytes().as_slice(), &2u64.to_le_bytes(), &[7, 8]].concat();
    let outer = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &inner].concat();
    let (_dir, path) = Writer::new().key("k", Kv::Raw(9, outer)).file();
    let gguf = Gguf::open(&path).unwrap();
    let expected = peft_gguf::Array::Array(vec![peft_gguf::Array::U8(vec![7, 8])]);
    assert_eq!(
        gguf.metadata().get("k"),
        Some(&peft_gguf::Value::Array(expected))
    );
}

#[test]
fn alignments_that_are_none() {
    for alignment in [0, 3, 33, u32::MAX] {
        let writer = Writer::new().key("general.alignment", Kv::U32(alignment));
        check(
            &writer,
            &format!("expected a power of two up to 1048576, got {alignment}"),
        );
    }
    let writer = Writer::new().key("general.alignment", Kv::Text("32"));
    check(
        &writer,
        "expected a whole number that is not negative, got the string `32`",
    );
}

#[test]
fn another_alignment_is_honoured() {
    let mut writer = Writer::new()
        .key("general.alignment", Kv::U32(128))
        .f32("a", &[1], &[1.5])
        .f32("b", &[2, 1], &[2.5, 3.5]);
    writer.alignment = 128;
    let (_dir, path) = writer.file();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.dequantise("b").unwrap(), [2.5, 3.5]);
    assert_eq!(gguf.tensor("b").unwrap().shape, [1, 2]);
}

#[test]
fn tensors_that_are_none() {
    check(
        &row(&[2; 5], 0, None, 128),
        "tensor `w`: has 5 dimensions, at most 4",
    );
    check(
        &row(&[4, 0], 0, None, 0),
        "tensor `w`: has an empty dimension: [4, 0]",
    );
    for dims in [
        &[u64::MAX][..],
        &[1 << 32, 1 << 32],
        &[1 << 62],
        &[u64::MAX - 31; 4],
    ] {
        check(
            &row(dims, 0, None, 0),
            "tensor `w`: has more values than can be",
        );
    }
    check(
        &row(&[1 << 40], 0, None, 64),
        "tensor `w`: truncated: 4398046511104 bytes",
    );
    check(
        &row(&[33], 8, None, 64),
        "rows of 33 values, but Q8_0 comes in blocks of 32",
    );
    check(
        &row(&[128, 2], 12, None, 144),
        "rows of 128 values, but Q4_K comes in blocks of 256",
    );
    for (kind, name) in [
        (10, "Q2_K"),
        (18, "IQ3_XXS"),
        (28, "F64"),
        (39, "MXFP4"),
        (99, "unknown"),
    ] {
        let expected = format!("tensor `w`: has ggml type {kind} ({name}), which cannot be read");
        check(&row(&[256], kind, None, 256), &expected);
    }
    check(
        &row(&[8], 0, Some(4), 64),
        "tensor `w`: offset 4 is not a multiple of 32",
    );
    check(
        &row(&[8], 0, Some(64), 64),
        "tensor `w`: truncated: 32 bytes at offset 64",
    );
    check(
        &row(&[8], 0, Some(u64::MAX - 31), 64),
        "tensor `w`: truncated",
    );
}

#[test]
fn tensors_in_the_same_place_or_of_the_same_name() {
    let mut writer = Writer::new()
        .f32("a", &[16], &[0.0; 16])
        .f32("b", &[16], &[0.0; 16]);
    writer.tensors[1].offset = Some(32);
    check(&writer, "tensor `b`: starts at byte");
    check(&writer, "inside `a` (64 bytes from");
    writer.tensors[1].offset = None;
    writer.tensors[1].name = "a".into();
    check(&writer, "tensor `a`: appears twice");
}

#[test]
fn every_truncation_of_a_real_file_is_an_error() {
    let bytes = std::fs::read(fixture("qwen3.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    // every length near the start, then ever fewer; the last byte of the data is needed too
    let mut cut = 0;
    while cut < bytes.len() {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(Gguf::open(&path).is_err(), "{cut} bytes of {}", bytes.len());
        cut += 1 + cut / 64;
    }
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(Gguf::open(&path).is_err());
}

#[test]
fn a_sparse_giant_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("giant.gguf");
    let mut bytes = Writer::new().bytes()[..16].to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(string("k"));
    bytes.extend(8u32.to_le_bytes());
    bytes.extend((1u64 << 40).to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    if file.set_len(1 << 41).is_err() {
        return eprintln!("skipped: this file system has no sparse files");
    }
    let error = Gguf::open(&path).unwrap_err().to_string();
    assert!(error.contains("key `k`"), "{error}");
}

#[test]
fn a_file_that_shrinks_while_open_is_an_error() {
    let (_dir, path) = Writer::new().f32("a", &[64], &[1.0; 64]).file();
    let gguf = Gguf::open(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(100).unwrap();
    let error = gguf.dequantise("a").unwrap_err().to_string();
    assert!(error.contains("tensor `a`: read at byte"), "{error}");
}
