//! Networks of one's own against Python: embedding, convolutions over one, two and three axes, parts of a merged layer;
//! what holds for adapters on convolutions; and the examples. The numbers are from `fixtures/own.py`.

use std::path::{Path, PathBuf};

use peft_core::{
    Adapter, BASE, Config, Conv, Ctx, Dense, Embedding, Error, Geometry, Linear, Model, ModelExt,
    Registry, Rows, Slot, Spec, State, parse, tensors,
};
use peft_lora::{LoraConfig, MergedLora};
use peft_testing::{close, conforms, fixtures, same_bits};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

#[path = "../examples/convnet.rs"]
mod convnet;
#[path = "../examples/fused_attention.rs"]
mod fused_attention;
#[path = "../examples/mlp.rs"]
mod mlp;

const EXACT: f64 = 1e-5;

/// The network of `fixtures/own.py`.
struct Net {
    embed: Embedding,
    line: Conv,
    grouped: Conv,
    dilated: Conv,
    image: Conv,
    mixed: Conv,
    point: Conv,
    volume: Conv,
    head: Linear,
}

fn folder() -> PathBuf {
    fixtures::root().join("own")
}

fn geometry(stride: &[i64], padding: &[i64], dilation: i64, groups: i64) -> Geometry {
    Geometry {
        stride: stride.to_vec(),
        padding: padding.to_vec(),
        dilation: vec![dilation; stride.len()],
        groups,
    }
}

impl Net {
    fn new() -> Net {
        let state = tensors::read(&folder().join("base.safetensors")).unwrap();
        let get = |name: &str| state.get(name).map(Tensor::copy);
        let conv = |at: &str, geometry| {
            let weight = get(&format!("{at}.weight")).unwrap();
            Conv::new(weight, get(&format!("{at}.bias")), geometry).unwrap()
        };
        Net {
            embed: Embedding::new(get("embed.weight").unwrap()),
            line: conv("line", geometry(&[2], &[1], 1, 1)),
            grouped: conv("grouped", geometry(&[1], &[1], 1, 2)),
            dilated: conv("dilated", geometry(&[1], &[4], 2, 1)),
            image: conv("image", geometry(&[2, 1], &[1, 0], 1, 1)),
            mixed: conv("mixed", geometry(&[1, 1], &[1, 1], 1, 2)),
            point: conv("point", Geometry::plain(2)),
            volume: conv("volume", geometry(&[1, 2, 1], &[1, 1, 0], 1, 1)),
            head: Linear::new(Dense::new(get("head.weight").unwrap(), get("head.bias"))),
        }
    }

    /// ids `[batch, 12]`, image `[batch, 3, 9, 8]`, volume `[batch, 2, 5, 6, 4]` -> `[batch, 4]`
    fn forward(&self, batch: &State, ctx: Ctx) -> Tensor {
        let h = self.embed.forward(&batch["ids"], ctx).transpose(1, 2);
        let h = self
            .grouped
            .forward(&self.line.forward(&h, ctx).tanh(), ctx);
        let h = self.dilated.forward(&h.tanh(), ctx).tanh();
        let i = self.image.forward(&batch["image"], ctx).tanh();
        let i = self.mixed.forward(&i, ctx).tanh();
        let i = self.point.forward(&i, ctx).tanh();
        let v = self.volume.forward(&batch["volume"], ctx).tanh();
        let all = [h, i, v].map(|t| {
            t.flatten(2, -1)
                .mean_dim([2i64].as_slice(), false, Kind::Float)
        });
        self.head.forward(&Tensor::cat(&all, 1), ctx)
    }

    /// Every tensor of the base.
    fn base(&mut self) -> Vec<Tensor> {
        let mut all = Vec::new();
        self.slots(&mut |_, slot| match slot {
            Slot::Conv(it) => {
                all.push(it.base().weight().copy());
                all.extend(it.base().bias().map(Tensor::copy));
            }
            Slot::Linear(it) => all.push(it.base().weight().copy()),
            Slot::Embedding(it) => all.push(it.weight().copy()),
            _ => {}
        });
        all
    }
}

impl Model for Net {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("embed", Slot::Embedding(&mut self.embed));
        visit("line", Slot::Conv(&mut self.line));
        visit("grouped", Slot::Conv(&mut self.grouped));
        visit("dilated", Slot::Conv(&mut self.dilated));
        visit("image", Slot::Conv(&mut self.image));
        visit("mixed", Slot::Conv(&mut self.mixed));
        visit("point", Slot::Conv(&mut self.point));
        visit("volume", Slot::Conv(&mut self.volume));
        visit("head", Slot::Linear(&mut self.head));
    }
}

fn batch() -> State {
    tensors::read(&folder().join("batch.safetensors")).unwrap()
}

fn registry() -> Registry {
    Registry::default()
        .with::<LoraConfig>()
        .with::<MergedLora>()
}

fn out(net: &Net) -> Tensor {
    tch::no_grad(|| net.forward(&batch(), Ctx::EVAL))
}

/// The sum that `fixtures/own.py` takes gradients of.
fn loss(y: &Tensor) -> Tensor {
    let weights = (Tensor::arange(y.size()[1], (Kind::Float, y.device())) * 1.3 + 1.0).sin();
    (y.tanh() * weights).sum(Kind::Float)
}

/// Logits, loss, gradients and merged logits of an adapter, under the names of a fixture.
fn measured(adapter: &Adapter, net: &mut Net) -> State {
    let logits = net.forward(&batch(), Ctx::EVAL);
    let loss = loss(&logits);
    loss.backward();
    let mut found = State::new();
    for param in net.trainable("default") {
        let key = adapter.tuner.key(&param.at, &param.name);
        found.insert(format!("grad.{key}"), param.tensor.grad().copy());
    }
    found.insert("logits".to_owned(), logits.detach());
    found.insert("loss".to_owned(), loss.detach());
    if net.merge().is_ok() {
        found.insert("merged_logits".to_owned(), out(net));
        net.unmerge();
    }
    found
}

fn cases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder()).unwrap().flatten();
    let mut all: Vec<PathBuf> = entries.map(|it| it.path()).collect();
    all.retain(|it| it.join("adapter_config.json").exists());
    all.sort();
    assert!(all.len() >= 9);
    all
}

/// Where this test leaves what `fixtures/own.py --check` reads.
fn written(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("own")
        .join(name)
}

#[test]
fn the_base_is_pythons() {
    close(&out(&Net::new()), &batch()["base_logits"], EXACT, "base");
}

#[test]
fn adapters_are_pythons() {
    for dir in cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let io = tensors::read(&dir.join("io.safetensors")).unwrap();
        let adapter = Adapter::load(&dir, &registry()).unwrap();
        let mut net = Net::new();
        adapter.apply("default", &mut net).unwrap();
        let found = measured(&adapter, &mut net);
        let keys = |state: &State| state.keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&found), keys(&io), "{name}");
        for (key, expected) in &io {
            close(&found[key], expected, EXACT, &format!("{name}: {key}"));
        }
        // Saved again it is the same file.
        let again = Adapter::of("default", &*adapter.tuner, &mut net).unwrap();
        assert_eq!(keys(&again.state), keys(&adapter.state), "{name}");
        for (key, expected) in &adapter.state {
            assert!(same_bits(&again.state[key], expected), "{name}: {key}");
        }
    }
}

#[test]
fn adapters_for_python() {
    for (name, config) in [
        (
            "odd",
            json!({"r": 3, "target_modules": ["embed", "line", "image", "point", "volume", "head"]}),
        ),
        (
            "groups",
            json!({"r": 4, "target_modules": ["grouped", "mixed", "volume"], "use_rslora": true}),
        ),
        (
            "dora",
            json!({"r": 5, "target_modules": ["line", "image", "volume"], "use_dora": true}),
        ),
        (
            "parts",
            json!({"r": 3, "target_modules": ["line"], "bias": "all", "modules_to_save": ["volume"]}),
        ),
        (
            "lora-bias",
            json!({"r": 3, "target_modules": ["image", "dilated"], "lora_bias": true}),
        ),
    ] {
        let (adapter, mut net) = moved(config);
        let found = measured(&adapter, &mut net);
        adapter.save(&written(name)).unwrap();
        tensors::write(&written(name).join("expected.safetensors"), &found).unwrap();
    }
}

fn lora(more: Value) -> LoraConfig {
    let mut json = json!({"peft_type": "LORA", "lora_alpha": 7, "init_lora_weights": false});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    parse(json).unwrap()
}

/// A net with an adapter as training might leave it.
fn moved(more: Value) -> (Adapter, Net) {
    let (config, mut net) = (lora(more), Net::new());
    tch::manual_seed(4);
    net.inject("default", &config).unwrap();
    shake(&mut net);
    (Adapter::of("default", &config, &mut net).unwrap(), net)
}

fn shake(model: &mut dyn Model) {
    for param in model.trainable("default") {
        let mut tensor = param.tensor;
        tch::no_grad(|| tensor += tensor.randn_like() * 0.2);
    }
}

const CONVS: [&str; 5] = ["line", "dilated", "image", "point", "volume"];

#[test]
fn a_fresh_convolution_is_the_base() {
    for more in [
        json!({}),
        json!({"init_lora_weights": "gaussian"}),
        json!({"lora_bias": true}),
        json!({"use_dora": true}),
        json!({"modules_to_save": ["mixed"], "bias": "all"}),
    ] {
        let mut json = json!({"r": 3, "target_modules": CONVS, "init_lora_weights": true});
        for (key, value) in more.as_object().unwrap() {
            json[key] = value.clone();
        }
        let mut net = Net::new();
        net.inject("default", &lora(json)).unwrap();
        close(&out(&net), &out(&Net::new()), 1e-6, &more.to_string());
    }
}

#[test]
fn convolutions_merge_and_unmerge_to_the_bit() {
    for more in [
        json!({"target_modules": CONVS}),
        json!({"target_modules": CONVS, "use_dora": true, "bias": "all"}),
        json!({"target_modules": CONVS, "lora_bias": true}),
        json!({"target_modules": ["line"], "modules_to_save": ["mixed", "volume"]}),
    ] {
        let (_, mut net) = moved(more.clone());
        let (live, base) = (out(&net), net.base());
        assert!(!same_bits(&live, &out(&Net::new())));
        net.merge().unwrap();
        close(&out(&net), &live, EXACT, &more.to_string());
        net.unmerge();
        assert!(same_bits(&out(&net), &live));
        let same = net.base().iter().zip(&base).all(|(a, b)| same_bits(a, b));
        assert!(same, "{more}: the base after unmerging");
        let off = net.without_adapters(|net| out(net));
        assert!(same_bits(&off, &out(&Net::new())), "{more}: off");
        net.merge_and_unload().unwrap();
        close(&out(&net), &live, EXACT, &format!("{more}: unloaded"));
        assert!(net.adapters().is_empty());
    }
}

#[test]
fn what_cannot_be_merged_says_so() {
    let (_, mut net) = moved(json!({"r": 4, "target_modules": ["line", "grouped"]}));
    let live = out(&net);
    let error = net.merge().unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::NotMergeable { .. }));
    assert!(
        message.contains("`grouped`") && message.contains("2 groups"),
        "{message}"
    );
    assert!(!net.merged() && same_bits(&out(&net), &live));

    let (_, mut net) = moved(json!({"r": 3, "target_modules": ["line"]}));
    for param in net.trainable("default") {
        let _ = tch::no_grad(|| param.tensor.shallow_clone().fill_(f64::INFINITY));
    }
    let message = net.merge().unwrap_err().to_string();
    assert!(
        message.contains("`line`") && message.contains("finite"),
        "{message}"
    );
}

#[test]
fn rows_of_a_mixed_batch_are_strangers() {
    let mut net = Net::new();
    for (seed, name, use_dora) in [(1, "a", false), (2, "b", true)] {
        tch::manual_seed(seed);
        let config = lora(
            json!({"r": 3, "target_modules": ["embed", "line", "image", "volume"], "use_dora": use_dora}),
        );
        net.inject(name, &config).unwrap();
    }
    let batch = batch();
    let rows = Rows::new(&mut net, &["b", BASE, "a"]).unwrap();
    let mixed = tch::no_grad(|| net.forward(&batch, Ctx::mixed(&rows)));
    for (row, name) in [(0, "b"), (1, BASE), (2, "a")] {
        let alone = match name {
            BASE => net.without_adapters(|net| out(net)),
            name => {
                net.activate(name).unwrap();
                out(&net)
            }
        };
        close(&mixed.get(row), &alone.get(row), EXACT, name);
    }
}

#[test]
fn dropout_of_a_convolution_is_for_training() {
    for use_dora in [false, true] {
        let (_, net) =
            moved(json!({"target_modules": CONVS, "lora_dropout": 0.4, "use_dora": use_dora}));
        let train = || tch::no_grad(|| net.forward(&batch(), Ctx::TRAIN));
        assert!(same_bits(&out(&net), &out(&net)));
        assert!(!same_bits(&train(), &out(&net)) && !same_bits(&train(), &train()));
    }
}

#[test]
fn a_convolution_in_half_precision_gives_half_precision() {
    let weight = Tensor::randn([5, 3, 3], (Kind::Float, tch::Device::Cpu));
    let x = Tensor::randn([2, 3, 9], (Kind::Float, tch::Device::Cpu));
    let run = |kind: Kind, use_dora: bool| {
        let conv = Conv::new(weight.to_kind(kind), None, Geometry::plain(1)).unwrap();
        let mut one = One(Slots::Conv(conv));
        tch::manual_seed(8);
        one.inject(
            "default",
            &lora(json!({"r": 3, "target_modules": ["it"], "use_dora": use_dora})),
        )
        .unwrap();
        let Slots::Conv(conv) = &one.0 else {
            unreachable!()
        };
        let live = conv.forward(&x.to_kind(kind), Ctx::EVAL);
        assert_eq!(live.kind(), kind);
        live.to_kind(Kind::Float)
    };
    for use_dora in [false, true] {
        close(
            &run(Kind::BFloat16, use_dora),
            &run(Kind::Float, use_dora),
            2e-2,
            "bf16",
        );
    }
}

#[test]
fn settings_that_do_not_go_on_a_convolution_are_refused() {
    let refused = |more: Value, words: &[&str]| {
        let mut net = Net::new();
        let message = net
            .inject("default", &lora(more.clone()))
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(message.contains(word), "{more}: `{message}` lacks `{word}`");
        }
        assert!(net.adapters().is_empty());
    };
    refused(
        json!({"r": 3, "target_modules": ["line", "grouped"]}),
        &["rank 3", "`grouped`", "2 groups", "rank_pattern"],
    );
    refused(
        json!({"r": 4, "target_modules": ["mixed"], "use_dora": true}),
        &["use_dora", "`mixed`", "groups"],
    );
    for init in ["pissa", "pissa_niter_3", "olora", "orthogonal"] {
        let json = json!({"r": 2, "target_modules": ["head", "line"], "init_lora_weights": init});
        refused(json, &["init_lora_weights", init, "`line`", "gaussian"]);
    }
    refused(
        json!({"target_modules": ["line"], "trainable_token_indices": {"image": [1]}}),
        &["`image`", "no rows"],
    );
    refused(json!({"target_modules": ["lin"]}), &["lin", "line"]);
}

#[test]
fn first_factors_are_uniform_over_what_an_output_sums_up() {
    for (at, inp, out) in [
        ("line", 18f64, 1f64),
        ("image", 18.0, 1.0),
        ("volume", 24.0, 1.0),
        ("grouped", 24.0, 2.0),
    ] {
        let mut largest = [0f64; 2];
        for seed in 0..32 {
            tch::manual_seed(seed);
            let mut net = Net::new();
            net.inject("default", &lora(json!({"r": 4, "target_modules": [at]})))
                .unwrap();
            for (largest, param) in largest.iter_mut().zip(net.params("default")) {
                *largest = largest.max(param.tensor.abs().max().double_value(&[]));
            }
        }
        for (found, bound) in largest
            .iter()
            .zip([1.0 / inp.sqrt(), 1.0 / (4.0 / out).sqrt()])
        {
            assert!(
                *found <= bound && *found > 0.95 * bound,
                "{at}: {found}, bound {bound}"
            );
        }
    }
}

#[test]
fn every_parameter_of_a_network_can_be_trained() {
    let mut net = Net::new();
    let all = net.thaw(None).unwrap();
    assert_eq!(all.len(), 16); // Nine weights, and the biases of all but the table and `mixed`.
    loss(&net.forward(&batch(), Ctx::TRAIN)).backward();
    for param in all {
        let largest = param.tensor.grad().abs().max().double_value(&[]);
        assert!(largest > 0.0, "{}.{}", param.at, param.name);
    }
}

/// One place.
struct One(Slots);

enum Slots {
    Linear(Linear),
    Conv(Conv),
}

impl Model for One {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        match &mut self.0 {
            Slots::Linear(it) => visit("qkv", Slot::Linear(it)),
            Slots::Conv(it) => visit("it", Slot::Conv(it)),
        }
    }
}

fn merged(more: Value) -> Value {
    let mut json = json!({
        "peft_type": "MERGED_LORA", "r": 3, "lora_alpha": 7, "parts": [true, false, true],
        "sizes": [4, 3, 6], "target_modules": ["q_proj", "v_proj"],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    json
}

#[test]
fn parts_of_a_merged_layer_keep_the_laws() {
    conforms::<MergedLora>(&[
        merged(json!({})),
        merged(json!({"lora_dropout": 0.3, "use_rslora": true})),
        merged(
            json!({"parts": [false, true], "sizes": null, "target_modules": ["k_proj", "o_proj"]}),
        ),
        merged(json!({"parts": [true, true, false], "sizes": [1, 2, 10], "r": 1})),
        merged(
            json!({"parts": [true], "sizes": null, "target_modules": ".*q_proj", "task_type": "CAUSAL_LM"}),
        ),
    ]);
}

#[test]
fn parts_of_a_merged_layer_are_loralibs() {
    for (name, sizes) in [("equal", vec![4, 4, 4]), ("sizes", vec![7, 3, 2])] {
        let io =
            tensors::read(&folder().join(format!("merged_linear/{name}.safetensors"))).unwrap();
        let dense = || Dense::new(io["weight"].copy(), Some(io["bias"].copy()));
        let mut one = One(Slots::Linear(Linear::new(dense())));
        let sizes = (name == "sizes").then_some(sizes);
        let config = MergedLora {
            r: 3,
            lora_alpha: 7.0,
            sizes,
            ..MergedLora::on(["qkv"], [true, false, true])
        };
        one.inject("default", &config).unwrap();
        for param in one.params("default") {
            tch::no_grad(|| param.tensor.shallow_clone().copy_(&io[&param.name]));
        }
        let run = |one: &One| match &one.0 {
            Slots::Linear(it) => it.forward(&io["x"], Ctx::EVAL),
            Slots::Conv(_) => unreachable!(),
        };
        let y = run(&one);
        close(&y, &io["y"], EXACT, name);
        let weights = (Tensor::arange(12, (Kind::Float, y.device())) * 1.3 + 1.0).sin();
        (y.tanh() * weights).sum(Kind::Float).backward();
        for param in one.params("default") {
            let key = format!("grad.{}", param.name);
            close(
                &param.tensor.grad(),
                &io[&key],
                EXACT,
                &format!("{name}: {key}"),
            );
        }
        let adapter = Adapter::of("default", &config, &mut one).unwrap();
        one.merge().unwrap();
        let Slots::Linear(layer) = &one.0 else {
            unreachable!()
        };
        close(&layer.base().weight(), &io["merged_weight"], EXACT, name);

        // As plain LoRA it is the same function, and a file for Python.
        let plain = MergedLora::to_lora(&adapter).unwrap();
        plain.save(&written(&format!("merged-{name}"))).unwrap();
        let loaded = Adapter::load(
            &written(&format!("merged-{name}")),
            &Registry::default().with::<LoraConfig>(),
        )
        .unwrap();
        assert_eq!(loaded.tuner.to_json()["r"], json!(6));
        let mut fresh = One(Slots::Linear(Linear::new(dense())));
        loaded.apply("default", &mut fresh).unwrap();
        close(
            &run(&fresh),
            &io["y"],
            EXACT,
            &format!("{name} as plain LoRA"),
        );
        let expected = ["x", "y", "weight", "bias"].map(|key| (key.to_owned(), io[key].copy()));
        tensors::write(
            &written(&format!("merged-{name}")).join("expected.safetensors"),
            &expected.into(),
        )
        .unwrap();
    }
}

#[test]
fn a_rank_stabilised_merged_layer_keeps_its_scale_as_plain_lora() {
    let dense = || {
        Linear::new(Dense::new(
            Tensor::randn([9, 5], (Kind::Float, tch::Device::Cpu)),
            None,
        ))
    };
    let config = MergedLora {
        r: 2,
        lora_alpha: 3.0,
        use_rslora: true,
        ..MergedLora::on(["qkv"], [false, true, true])
    };
    tch::manual_seed(6);
    let mut one = One(Slots::Linear(dense()));
    one.inject("default", &config).unwrap();
    shake(&mut one);
    let plain = MergedLora::to_lora(&Adapter::of("default", &config, &mut one).unwrap()).unwrap();
    tch::manual_seed(6);
    let mut fresh = One(Slots::Linear(dense()));
    plain.apply("default", &mut fresh).unwrap();
    let weight = |one: &mut One| {
        one.merge().unwrap();
        let Slots::Linear(layer) = &one.0 else {
            unreachable!()
        };
        layer.base().weight()
    };
    close(&weight(&mut fresh), &weight(&mut one), EXACT, "weight");
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let refused = |more: Value, words: &[&str]| {
        let mut toy = peft_testing::toy::Toy::new(
            peft_testing::toy::Kit {
                tied: false,
                lossy: false,
            },
            1,
        );
        let json = merged(more);
        let message = parse::<MergedLora>(json.clone())
            .and_then(|it| toy.inject("default", &it))
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(message.contains(word), "{json}: `{message}` lacks `{word}`");
        }
        assert!(toy.adapters().is_empty());
    };
    refused(json!({"parts": []}), &["parts", "0 entries"]);
    refused(json!({"parts": [false, false, false]}), &["adapts none"]);
    refused(json!({"sizes": [4, 9]}), &["[4, 9]", "3 parts"]);
    refused(json!({"sizes": [4, -3, 12]}), &["[4, -3, 12]"]);
    refused(
        json!({"sizes": [4, 3, 5]}),
        &["[4, 3, 5]", "12", "q_proj", "13"],
    );
    refused(
        json!({"sizes": null}),
        &["13", "q_proj", "3 equal parts", "sizes"],
    );
    refused(json!({"r": 0}), &["r = 0"]);
    refused(json!({"r": 65536}), &["65536"]);
    refused(json!({"lora_dropout": 1.5}), &["lora_dropout"]);
    refused(json!({"target_modules": null}), &["target_modules"]);
    refused(
        json!({"target_modules": ["qkv_proj"]}),
        &["qkv_proj", "q_proj"],
    );
    refused(
        json!({"target_modules": ["q_proj", "norm"]}),
        &["norm", "no linear layer"],
    );
    refused(json!({"use_dora": true}), &["use_dora"]);

    // What Python does not know it must not read as something else.
    let message = parse::<LoraConfig>(json!({"peft_type": "LORA", "parts": [true]}))
        .unwrap_err()
        .to_string();
    assert!(message.contains("`parts`"), "{message}");
    let config = lora(json!({"target_modules": ["head"]}));
    let mut net = Net::new();
    net.inject("default", &config).unwrap();
    let plain = Adapter::of("default", &config, &mut net).unwrap();
    let message = MergedLora::to_lora(&plain).unwrap_err().to_string();
    assert!(
        message.contains("LORA") && message.contains(MergedLora::PEFT_TYPE),
        "{message}"
    );
}

#[test]
fn a_file_of_other_parts_is_refused() {
    let config = MergedLora {
        r: 2,
        sizes: Some(vec![4, 3, 2]),
        ..MergedLora::on(["qkv"], [true, false, true])
    };
    let mut adapter = Adapter {
        tuner: Box::new(config),
        state: State::new(),
        trained: State::new(),
        source: PathBuf::new(),
    };
    let b = Tensor::zeros([5, 2], (Kind::Float, tch::Device::Cpu));
    adapter
        .state
        .insert("base_model.model.qkv.lora_B.weight".to_owned(), b);
    let message = MergedLora::to_lora(&adapter).unwrap_err().to_string();
    assert!(
        message.contains("[6, 2]") && message.contains("[5, 2]") && message.contains("qkv"),
        "{message}"
    );
}

#[test]
fn layers_of_tch_become_places() {
    use tch::nn::{self, Module};
    let vs = nn::VarStore::new(tch::Device::Cpu);
    let layer = || nn::linear(vs.root(), 5, 3, Default::default());
    let x = Tensor::randn([4, 5], (Kind::Float, tch::Device::Cpu));
    let (one, table) = (layer(), nn::embedding(vs.root(), 7, 5, Default::default()));
    let ids = Tensor::from_slice(&[3i64, 0, 6]);
    let (y, e) = (one.forward(&x), table.forward(&ids));
    let (linear, table) = (Linear::from(one), Embedding::from(table));
    assert!(linear.forward(&x, Ctx::EVAL).equal(&y) && !linear.base().weight().requires_grad());
    assert!(table.forward(&ids, Ctx::EVAL).equal(&e) && !table.weight().requires_grad());
}

/// Each example learns, and what it saved does the same elsewhere.
#[test]
fn examples_learn_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mlp = mlp::run(&at("mlp")).unwrap();
    let convnet = convnet::run(&at("convnet")).unwrap();
    let fused = fused_attention::run(&at("fused")).unwrap();
    for (name, [before, after], off, allowed) in [
        ("mlp", mlp.loss, mlp.off, 0.0),
        ("convnet", convnet.loss, convnet.off, 0.0),
        ("fused_attention", fused.loss, fused.off, 1e-4),
    ] {
        assert!(after < 0.5 * before, "{name}: {before} → {after}");
        assert!(off <= allowed, "{name}: {off}");
    }
}
