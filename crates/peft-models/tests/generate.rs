//! Text as `transformers` makes it, alone and in company, and laws of drawing at random.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use peft_core::{State, tensors};
use peft_models::{
    Answer, Decoder, GenerateError, Memory, OpenOptions, Sampling, Stop, converse, generate, open,
};
use tch::{Kind, Tensor};

fn models() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/models");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut all: Vec<PathBuf> = entries.map(|it| it.unwrap().path()).collect();
    all.retain(|it| it.join("base.safetensors").exists());
    all.sort();
    assert!(all.len() >= 20, "fixtures are missing");
    all
}

fn load(dir: &Path) -> Box<dyn Decoder> {
    tch::set_num_threads(1); // tiny tensors gain nothing by more
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    open(dir.to_str().unwrap(), options).unwrap()
}

fn llama() -> Box<dyn Decoder> {
    load(
        &models()
            .into_iter()
            .find(|it| it.ends_with("llama"))
            .unwrap(),
    )
}

fn ids(tensor: &Tensor) -> Vec<Vec<u32>> {
    let rows: Vec<Vec<i64>> = tensor.to_kind(Kind::Int64).try_into().unwrap();
    rows.into_iter()
        .map(|row| row.into_iter().map(|id| id as u32).collect())
        .collect()
}

type Rows = Vec<Vec<u32>>;

/// Prompts without their padding, and Python's continuations.
fn greedy(io: &State, prefix: &str) -> Option<(Rows, Rows)> {
    let mask = ids(io.get(&format!("{prefix}.attention_mask"))?);
    let padded = ids(&io[&format!("{prefix}.input_ids")]);
    let kept = |(row, mask): (&Vec<u32>, &Vec<u32>)| {
        row.iter()
            .zip(mask)
            .filter(|(_, m)| **m == 1)
            .map(|(id, _)| *id)
            .collect()
    };
    let prompts = padded.iter().zip(&mask).map(kept).collect();
    Some((prompts, ids(&io[&format!("{prefix}.tokens")])))
}

fn quiet(_: usize, _: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn tokens(answers: &[Answer]) -> Vec<Vec<u32>> {
    answers.iter().map(|it| it.tokens.clone()).collect()
}

#[test]
fn greedy_text_is_pythons_in_a_batch_and_alone() {
    for dir in models() {
        let io = tensors::read(&dir.join("base.safetensors")).unwrap();
        let model = load(&dir);
        for prefix in ["greedy", "greedy_long"] {
            let Some((prompts, expected)) = greedy(&io, prefix) else {
                continue;
            };
            let sampling = Sampling {
                max_new_tokens: expected[0].len(),
                context: (prefix == "greedy_long").then_some(1000),
                ..Sampling::default()
            };
            let what = format!("{} {prefix}", dir.display());
            let together = generate(&*model, &prompts, &sampling, &mut quiet).unwrap();
            assert_eq!(tokens(&together), expected, "{what}");
            if what.contains("dynamic") && prefix == "greedy_long" {
                continue; // its frequencies depend on the longest row of the batch, in Python as here
            }
            for (prompt, expected) in prompts.iter().zip(&expected) {
                let alone = generate(&*model, std::slice::from_ref(prompt), &sampling, &mut quiet);
                assert_eq!(&alone.unwrap()[0].tokens, expected, "{what} alone");
            }
        }
    }
}

#[test]
fn rows_that_end_early_leave_the_others_as_they_are() {
    let model = llama();
    let prompts = [vec![5, 6, 7], vec![9], vec![11, 12, 13, 14, 15]];
    let plain = Sampling {
        max_new_tokens: 10,
        ..Sampling::default()
    };
    let all = generate(&*model, &prompts, &plain, &mut quiet).unwrap();
    // Whatever the second row says third ends an answer from now on.
    let end = all[1].tokens[2];
    let sampling = Sampling {
        stop_ids: vec![end],
        ..plain
    };
    let stopped = generate(&*model, &prompts, &sampling, &mut quiet).unwrap();
    for (before, after) in all.iter().zip(&stopped) {
        match before.tokens.iter().position(|&it| it == end) {
            Some(at) => {
                assert_eq!(after.tokens, before.tokens[..at]);
                assert_eq!(after.stop, Stop::End(end));
            }
            None => assert_eq!(after, before),
        }
    }
}

#[test]
fn a_draw_depends_on_the_seed_and_not_on_the_company() {
    let model = llama();
    let sampling = |seed| Sampling {
        max_new_tokens: 12,
        temperature: 1.3,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.2,
        seed,
        ..Sampling::default()
    };
    let prompts = [vec![5, 6, 7], vec![9], vec![11, 12, 13, 14, 15]];
    let together = generate(&*model, &prompts, &sampling(3), &mut quiet).unwrap();
    for (prompt, expected) in prompts.iter().zip(&together) {
        let alone = generate(
            &*model,
            std::slice::from_ref(prompt),
            &sampling(3),
            &mut quiet,
        );
        assert_eq!(&alone.unwrap()[0], expected);
    }
    let other = generate(&*model, &prompts, &sampling(4), &mut quiet).unwrap();
    assert_ne!(together, other);

    // What is asked again is answered anew, in one batch as in several.
    let thrice = vec![prompts[0].clone(); 3];
    let answers = generate(&*model, &thrice, &sampling(3), &mut quiet).unwrap();
    assert_eq!(answers[0], together[0]);
    assert!(answers[1] != answers[0] && answers[2] != answers[0] && answers[2] != answers[1]);
    let second = Sampling {
        asked_before: vec![1],
        ..sampling(3)
    };
    assert_eq!(
        generate(&*model, &thrice[..1], &second, &mut quiet).unwrap()[0],
        answers[1]
    );
}

#[test]
fn drawing_leaves_the_random_state_of_libtorch_alone() {
    let model = llama();
    let sampling = Sampling {
        temperature: 1.0,
        max_new_tokens: 4,
        ..Sampling::default()
    };
    tch::manual_seed(1);
    let expected = Tensor::rand([4], (Kind::Float, tch::Device::Cpu));
    tch::manual_seed(1);
    generate(&*model, &[vec![5]], &sampling, &mut quiet).unwrap();
    assert_eq!(expected, Tensor::rand([4], (Kind::Float, tch::Device::Cpu)));
}

#[test]
fn what_was_said_before_is_not_computed_again_and_changes_nothing() {
    let model = llama();
    let sampling = Sampling {
        max_new_tokens: 6,
        ..Sampling::default()
    };
    let mut each = |_| ControlFlow::Continue(());
    let mut memory = Memory::new();
    let mut talk = vec![5, 6, 7];
    for turn in 0..4 {
        let fresh = generate(&*model, &[talk.clone()], &sampling, &mut quiet).unwrap();
        let kept = converse(&*model, &mut memory, &talk, &sampling, &mut each).unwrap();
        assert_eq!(fresh[0], kept, "turn {turn}");
        talk.extend(kept.tokens);
        talk.extend([20 + turn, 30]);
    }
    // Another conversation, and the same one again.
    for prompt in [vec![5, 6, 40], vec![5, 6, 40], vec![8]] {
        let fresh = generate(
            &*model,
            std::slice::from_ref(&prompt),
            &sampling,
            &mut quiet,
        )
        .unwrap();
        let kept = converse(&*model, &mut memory, &prompt, &sampling, &mut each).unwrap();
        assert_eq!(fresh[0], kept);
    }
}

#[test]
fn an_answer_ends_for_a_reason() {
    let model = llama();
    let positions = model.max_positions() as usize;
    let sampling = Sampling {
        max_new_tokens: 1000,
        ..Sampling::default()
    };
    let prompt = vec![7; positions - 3];
    let answer = generate(&*model, &[prompt], &sampling, &mut quiet).unwrap();
    assert_eq!(answer[0].stop, Stop::Context);
    assert_eq!(answer[0].tokens.len(), 4); // the last one needs no position of its own

    let mut seen = 0;
    let mut two = |_, _| {
        seen += 1;
        if seen == 2 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let answer = generate(&*model, &[vec![5]], &sampling, &mut two).unwrap();
    assert_eq!((answer[0].stop, answer[0].tokens.len()), (Stop::Caller, 2));

    let none = Sampling {
        max_new_tokens: 0,
        ..sampling
    };
    let answer = generate(&*model, &[vec![5]], &none, &mut quiet).unwrap();
    assert_eq!(
        answer[0],
        Answer {
            tokens: vec![],
            stop: Stop::Length
        }
    );
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let model = llama();
    let fault = |prompt: Vec<u32>, sampling: Sampling| {
        generate(&*model, &[vec![5], prompt], &sampling, &mut quiet).unwrap_err()
    };
    let plain = Sampling::default;
    assert!(matches!(
        fault(vec![], plain()),
        GenerateError::Empty { row: 2 }
    ));
    assert!(matches!(
        fault(vec![61], plain()),
        GenerateError::Token { row: 2, id: 61, .. }
    ));
    assert!(matches!(
        fault(vec![1; 65], plain()),
        GenerateError::TooLong { row: 2, .. }
    ));
    for sampling in [
        Sampling {
            temperature: -1.0,
            ..plain()
        },
        Sampling {
            temperature: f64::NAN,
            ..plain()
        },
        Sampling {
            top_p: 0.0,
            ..plain()
        },
        Sampling {
            min_p: 1.5,
            ..plain()
        },
        Sampling {
            repetition_penalty: 0.0,
            ..plain()
        },
        Sampling {
            context: Some(0),
            ..plain()
        },
    ] {
        assert!(matches!(
            fault(vec![5], sampling),
            GenerateError::Setting { .. }
        ));
    }
}

#[test]
fn narrow_settings_draw_what_greedy_takes() {
    let model = llama();
    let greedy = generate(&*model, &[vec![5, 6]], &Sampling::default(), &mut quiet).unwrap();
    let hot = || Sampling {
        temperature: 5.0,
        seed: 1,
        ..Sampling::default()
    };
    for sampling in [
        Sampling { top_k: 1, ..hot() },
        Sampling {
            top_k: usize::MAX,
            temperature: 1e-300,
            ..hot()
        },
        Sampling {
            temperature: 1e-31,
            ..hot()
        },
        Sampling {
            top_p: 1e-9,
            ..hot()
        },
        Sampling {
            min_p: 1.0,
            ..hot()
        },
    ] {
        let drawn = generate(&*model, &[vec![5, 6]], &sampling, &mut quiet).unwrap();
        assert_eq!(drawn, greedy);
    }
}
