//! A prefix that begins at a text does what the text before the input would do.

use peft::{
    Adapter, Ctx, Decoder, HeadOptions, Input, LoraConfig, ModelExt, OpenOptions, PrefixConfig,
    PromptConfig, Task, begin_prefix_at,
    models::{Source, open_task},
    open,
    tch::{Kind, Tensor},
};
use peft_testing::{close, fixtures, same_bits};

const TEXT: [u32; 5] = [3, 14, 15, 9, 26];
const INPUT: [u32; 6] = [35, 8, 9, 7, 9, 32];

fn model(name: &str) -> Box<dyn Decoder> {
    let folder = fixtures::root().join("models").join(name);
    let options = OpenOptions {
        kind: Some(Kind::Float),
        ..OpenOptions::default()
    };
    open(&folder.to_string_lossy(), options).unwrap()
}

/// Scores of one row `[1, seq, vocab]`.
fn scores(model: &dyn Decoder, ids: &[u32]) -> Tensor {
    let ids: Vec<i64> = ids.iter().map(|&it| i64::from(it)).collect();
    let input = Input::new(Tensor::from_slice(&ids).view([1, -1]));
    tch::no_grad(|| model.forward(&input, Ctx::EVAL))
}

#[test]
fn it_does_what_the_text_would_do() {
    for name in [
        "gpt2",
        "llama",
        "llama-rope-llama3",
        "mistral",
        "qwen2",
        "qwen3",
    ] {
        let mut model = model(name);
        let both = scores(&*model, &[&TEXT[..], &INPUT[..]].concat());
        let behind = both.narrow(1, TEXT.len() as i64, INPUT.len() as i64);
        let prefix = PrefixConfig::of(TEXT.len() as i64);
        model.inject("default", &prefix).unwrap();
        begin_prefix_at(&mut *model, "default", &TEXT).unwrap();
        close(&scores(&*model, &INPUT), &behind, 1e-5, name);

        // Its file says the same, and more of the text than there are virtual tokens changes nothing.
        let adapter = Adapter::of("default", &prefix, &mut *model).unwrap();
        let longer = [&TEXT[..], &INPUT[..]].concat();
        begin_prefix_at(&mut *model, "default", &longer).unwrap();
        let again = Adapter::of("default", &prefix, &mut *model).unwrap();
        let [once, twice] = [&adapter, &again].map(|it| &it.state["prompt_embeddings"]);
        close(twice, once, 1e-5, name);
    }
}

#[test]
fn the_base_alone_reads_it_and_switches_are_as_they_were() {
    let mut model = model("llama");
    model.inject("default", &PrefixConfig::of(3)).unwrap();
    begin_prefix_at(&mut *model, "default", &TEXT).unwrap();
    let rows = |model: &mut Box<dyn Decoder>| model.params("default")[0].tensor.copy();
    let alone = rows(&mut model);
    let lora = LoraConfig {
        init_lora_weights: peft::lora::Init::Random,
        ..LoraConfig::on(["k_proj", "v_proj"])
    };
    model.inject("loud", &lora).unwrap();
    model.inject("quiet", &lora).unwrap();
    model.switch("quiet", false).unwrap();
    let before = model.adapters();
    begin_prefix_at(&mut *model, "default", &TEXT).unwrap();
    assert!(same_bits(&rows(&mut model), &alone));
    assert_eq!(model.adapters(), before);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let mut model = model("gpt2");
    model.inject("default", &PrefixConfig::of(4)).unwrap();
    let projected = PrefixConfig {
        prefix_projection: true,
        ..PrefixConfig::of(4)
    };
    model.inject("projected", &projected).unwrap();
    model.inject("prompt", &PromptConfig::of(4)).unwrap();
    let long = vec![1; 2000];
    for (name, ids, words) in [
        ("defalt", &TEXT[..], ["defalt", "nearest is `default`"]),
        ("projected", &TEXT, ["projected", "no inverse"]),
        ("prompt", &TEXT, ["prompt", "no prefix"]),
        ("default", &TEXT[..3], ["4 virtual tokens", "of 3"]),
        ("default", &[], ["default", "no tokens"]),
        ("default", &[5, 100_000], ["token 100000", "vocabulary"]),
        ("default", &long, ["2000 tokens", "positions"]),
    ] {
        let error = begin_prefix_at(&mut *model, name, ids)
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(error.contains(word), "`{error}` lacks `{word}`");
        }
    }

    let folder = fixtures::root().join("methods/bases/bert-classes");
    let source = Source::Folder(folder);
    let (options, head) = (OpenOptions::default(), HeadOptions::default());
    let mut model = open_task(&source, Task::SeqCls, options, &head).unwrap();
    model.inject("default", &PrefixConfig::of(4)).unwrap();
    let error = begin_prefix_at(&mut *model, "default", &TEXT).unwrap_err();
    assert!(error.to_string().contains("language model"), "{error}");
}
