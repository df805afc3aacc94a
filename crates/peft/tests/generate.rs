//! Adapted models write what Python's adapted models write: every fixture, a left-padded batch, through the cache.

use std::ops::ControlFlow;

use peft::{
    Adapter, Ctx, Decoder, Input, ModelExt, OpenOptions, Sampling, generate, open,
    tch::{Kind, Tensor},
};
use peft_testing::fixtures::{Case, cases};

type Rows = Vec<Vec<u32>>;

fn rows(tensor: &Tensor) -> Rows {
    let rows: Vec<Vec<i64>> = tensor.to_kind(Kind::Int64).try_into().unwrap();
    let row = |row: Vec<i64>| row.into_iter().map(|id| id as u32).collect();
    rows.into_iter().map(row).collect()
}

/// The prompts without their padding.
fn prompts(case: &Case) -> Rows {
    let ids = rows(case.tensor("greedy.input_ids"));
    let masks = rows(case.tensor("greedy.attention_mask"));
    let kept = |(row, mask): (Vec<u32>, Vec<u32>)| {
        let marked = row.into_iter().zip(mask);
        marked.filter(|it| it.1 == 1).map(|it| it.0).collect()
    };
    ids.into_iter().zip(masks).map(kept).collect()
}

fn dressed(case: &Case) -> Box<dyn Decoder> {
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    let mut model = open(case.model.to_str().unwrap(), options).unwrap();
    for (name, dir) in [
        ("default", case.dir.clone()),
        ("second", case.dir.join("second")),
    ] {
        if dir.exists() {
            let adapter = Adapter::load(&dir, &peft::builtin()).unwrap();
            adapter.apply(name, &mut *model).unwrap();
        }
    }
    model
}

fn written(model: &dyn Decoder, prompts: &[Vec<u32>], tokens: usize) -> Rows {
    let sampling = Sampling {
        max_new_tokens: tokens,
        ..Sampling::default()
    };
    let answers = generate(model, prompts, &sampling, &mut |_, _| {
        ControlFlow::Continue(())
    });
    answers.unwrap().into_iter().map(|it| it.tokens).collect()
}

#[test]
fn adapted_text_is_pythons() {
    tch::set_num_threads(1);
    let mut count = 0;
    for case in cases("lora") {
        if !case.io.contains_key("greedy.tokens") {
            continue;
        }
        count += 1;
        let expected = rows(case.tensor("greedy.tokens"));
        let found = written(&*dressed(&case), &prompts(&case), expected[0].len());
        assert_eq!(found, expected, "{}", case.name);
    }
    assert!(count > 100, "only {count} fixtures have text");
}

#[test]
fn merged_and_switched_off_models_write_what_their_logits_say() {
    tch::set_num_threads(1);
    for case in cases("lora")
        .into_iter()
        .filter(|it| it.name == "llama__r8" || it.name == "gpt2__r3")
    {
        let mut model = dressed(&case);
        let (prompts, adapted) = (prompts(&case), rows(case.tensor("greedy.tokens")));
        model.merge().unwrap();
        assert_eq!(
            written(&*model, &prompts, adapted[0].len()),
            adapted,
            "{} merged",
            case.name
        );
        model.unmerge();
        model.switch("default", false).unwrap();
        let base = written(&*model, &prompts, 3);
        for (prompt, said) in prompts.iter().zip(base) {
            let mut ids: Vec<i64> = prompt.iter().map(|&id| id.into()).collect();
            for token in said {
                let input = Input::new(Tensor::from_slice(&ids).unsqueeze(0));
                let logits = tch::no_grad(|| model.forward(&input, Ctx::EVAL));
                let best = logits.get(0).get(-1).argmax(0, false).int64_value(&[]);
                assert_eq!(best, i64::from(token), "{} off", case.name);
                ids.push(best);
            }
        }
    }
}
