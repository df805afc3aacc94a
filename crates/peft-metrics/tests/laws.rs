//! What must hold of every answer, and pictures.

use std::fs;

use peft_metrics::{
    Confusion, Flags, Numbers, Words, answer_f1, bleu, entities, exact_match, perplexity, rouge,
};
use proptest::prelude::*;

fn names(n: usize) -> Vec<String> {
    (0..n).map(|at| format!("class {at}")).collect()
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

/// Rows of (truth, said), over classes some of which do not occur.
fn rows() -> impl Strategy<Value = (usize, Vec<(usize, usize)>)> {
    (1..7usize).prop_flat_map(|n| (Just(n), prop::collection::vec((0..n, 0..n), 1..60)))
}

proptest! {
    #[test]
    fn the_order_of_rows_does_not_matter((n, pairs) in rows(), turn in 0..60usize) {
        let count = |pairs: &[(usize, usize)]| {
            let (truth, said): (Vec<usize>, Vec<usize>) = pairs.iter().copied().unzip();
            Confusion::of(&names(n), &truth, &said).unwrap()
        };
        let mut other = pairs.clone();
        other.rotate_left(turn % pairs.len());
        prop_assert_eq!(count(&pairs), count(&other));
    }

    #[test]
    fn means_are_means_and_sums_are_sums((n, pairs) in rows()) {
        let (truth, said): (Vec<usize>, Vec<usize>) = pairs.iter().copied().unzip();
        let seen = Confusion::of(&names(n), &truth, &said).unwrap();
        let sum: u64 = (0..n * n).map(|at| seen.count(at / n, at % n)).sum();
        prop_assert_eq!(sum, pairs.len() as u64);
        let used: Vec<usize> = (0..n).filter(|c| truth.contains(c) || said.contains(c)).collect();
        let mean = used.iter().map(|c| seen.class(*c).f1).sum::<f64>() / used.len() as f64;
        prop_assert!(near(seen.macro_mean().f1, mean));
        prop_assert!(near(seen.micro().f1, seen.accuracy()));
        prop_assert!(near(seen.weighted_mean().recall, seen.accuracy()));
        // What is said swapped with what is true swaps precision and recall.
        let back = Confusion::of(&names(n), &said, &truth).unwrap();
        for class in 0..n {
            let (a, b) = (seen.class(class), back.class(class));
            prop_assert_eq!((a.precision, a.recall, a.f1), (b.recall, b.precision, b.f1));
        }
        let perfect = Confusion::of(&names(n), &truth, &truth).unwrap();
        prop_assert_eq!((perfect.accuracy(), perfect.macro_mean().f1), (1.0, 1.0));
    }

    #[test]
    fn flags_of_one_class_each_are_classes((n, pairs) in rows()) {
        let hot = |of: fn(&(usize, usize)) -> usize| -> Vec<bool> {
            pairs.iter().flat_map(|pair| (0..n).map(|at| at == of(pair)).collect::<Vec<_>>()).collect()
        };
        let flags = Flags::of(&names(n), &hot(|it| it.0), &hot(|it| it.1)).unwrap();
        let (truth, said): (Vec<usize>, Vec<usize>) = pairs.iter().copied().unzip();
        let seen = Confusion::of(&names(n), &truth, &said).unwrap();
        prop_assert!(near(flags.exact(), seen.accuracy()) && near(flags.micro().f1, seen.accuracy()));
        prop_assert!(near(flags.samples().f1, seen.accuracy()));
        for class in 0..n {
            prop_assert_eq!(flags.class(class), seen.class(class));
        }
    }

    #[test]
    fn texts_never_panic_and_stay_in_range(a in any::<String>(), b in any::<String>()) {
        let it = bleu(&[vec![&a]], &[&b]).unwrap();
        prop_assert!((0.0..=100.0 + 1e-9).contains(&it.score));
        for words in [Words::Ascii, Words::Unicode] {
            let it = rouge(&[vec![&a]], &[&b], words).unwrap();
            for f in [it.rouge1.f, it.rouge2.f, it.rouge_l.f] {
                prop_assert!((0.0..=1.0).contains(&f));
            }
        }
        prop_assert!((0.0..=1.0).contains(&answer_f1(&[&a], &b)));
        prop_assert_eq!(exact_match(&[&a], &a), 1.0);
        prop_assert_eq!(answer_f1(&[&a], &a), 1.0);
        prop_assert!(near(answer_f1(&[&a], &b), answer_f1(&[&b], &a)));
    }

    #[test]
    fn tags_never_panic(rows in prop::collection::vec(prop::collection::vec("[BIOES]?(-?[A-C汉]?)", 0..9), 1..5)) {
        let it = entities(&rows, &rows).unwrap();
        prop_assert!(it.micro.support == 0 || it.micro.f1 == 1.0);
        prop_assert!(!it.report().is_empty());
    }

    #[test]
    fn correlations_do_not_change_with_the_scale(
        xs in prop::collection::vec(-1000i32..1000, 3..30), a in 1..50i32, b in -100..100i32
    ) {
        let truth: Vec<f64> = xs.iter().map(|it| f64::from(*it)).collect();
        let said: Vec<f64> = xs.iter().map(|it| f64::from(it * a + b)).collect();
        let it = Numbers::of(&truth, &said).unwrap();
        if let (Some(pearson), Some(spearman)) = (it.pearson, it.spearman) {
            prop_assert!((pearson - 1.0).abs() < 1e-9 && (spearman - 1.0).abs() < 1e-9);
        }
        prop_assert!(it.mae * it.mae <= it.mse * (1.0 + 1e-9));
    }
}

#[test]
fn perplexity_of_a_fair_die() {
    assert!(near(perplexity(6f64.ln()), 6.0));
}

/// A confusion of `n` classes that are mostly told right.
fn example(names: Vec<String>, rows: usize) -> Confusion {
    let n = names.len();
    let truth: Vec<usize> = (0..rows).map(|at| (at * at + at / 7) % n).collect();
    let said: Vec<usize> = truth
        .iter()
        .enumerate()
        .map(|(at, truth)| {
            if at % 5 == 0 {
                (truth + at / 5) % n
            } else {
                *truth
            }
        })
        .collect();
    Confusion::of(&names, &truth, &said).unwrap()
}

#[test]
fn text_of_a_confusion() {
    let classes = ["animal", "food", "person"].map(str::to_owned);
    let seen = Confusion::of(&classes, &[0, 0, 0, 1, 1, 2], &[0, 0, 1, 1, 1, 0]).unwrap();
    assert_eq!(
        seen.table(),
        "percent of each true class (row) that is said to be … (column)\n\
         \u{20}        rows    1    2    3\n\
         1 animal    3   67   33    ·\n\
         2 food      2    ·  100    ·\n\
         3 person    1  100    ·    ·\n"
    );
    assert!(
        seen.report()
            .contains("animal            0.6667  0.6667  0.6667        3\n"),
        "{}",
        seen.report()
    );
}

#[test]
fn pictures_are_drawn_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let long = |at: usize| format!("class {at} {}", "with a name ".repeat(at % 4));
    for n in [2, 6, 10, 18, 30, 45, 100] {
        for ending in ["png", "svg"] {
            let path = dir.path().join(format!("{n}.{ending}"));
            let seen = example((0..n).map(long).collect(), n * 60);
            seen.draw(&path, "Held-out rows, Łódź & <Москва>").unwrap();
            assert!(fs::metadata(&path).unwrap().len() > 1000);
        }
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 14);
    let seen = example(names(3), 30);
    let error = seen
        .draw(&dir.path().join("a.jpg"), "t")
        .unwrap_err()
        .to_string();
    assert!(error.contains(".jpg"), "{error}");
    assert!(seen.draw(&dir.path().join("no/a.png"), "t").is_err());
    let error = example(names(300), 600)
        .draw(&dir.path().join("b.png"), "t")
        .unwrap_err();
    assert!(error.to_string().contains("300 classes"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 14);
}
