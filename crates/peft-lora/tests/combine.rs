//! Combined adapters against the sum of what each does, and what cannot be combined.

use std::collections::BTreeMap;

use peft_core::{Adapter, Model, ModelExt, Slot, State, parse};
use peft_lora::{
    Combination, CombinationType, LoraConfig, Rules, combine,
    task_vectors::{MajoritySign, disjoint_merge, elect_sign, prune_magnitude},
};
use peft_testing::{
    close,
    toy::{Kit, Toy},
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const ALL: [&str; 5] = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"];

fn toy() -> Toy {
    let kit = Kit {
        tied: false,
        lossy: false,
    };
    Toy::new(kit, 1)
}

/// A LoRA of rank 3 and α 7 on everything, with random factors, and whatever `more` says.
fn adapter(seed: i64, more: Value) -> Adapter {
    let mut json = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ALL});
    for (key, value) in more.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    let config: LoraConfig = parse(json).unwrap();
    let mut model = toy();
    model.inject("a", &config).unwrap();
    tch::manual_seed(seed);
    for mut param in model.params("a") {
        tch::no_grad(|| {
            let _ = param.tensor.normal_(0.0, 0.4);
        });
    }
    Adapter::of("a", &config, &mut model).unwrap()
}

/// W' − W of every place, by loading the adapter and merging it.
fn updates(adapter: &Adapter) -> BTreeMap<String, Tensor> {
    let weights = |model: &mut Toy| {
        let mut all = BTreeMap::new();
        model.slots(&mut |at, slot| {
            let weight = match slot {
                Slot::Linear(it) => it.base().weight(),
                Slot::Embedding(it) => it.weight().shallow_clone(),
                _ => return,
            };
            all.insert(at.to_owned(), weight.to_kind(Kind::Double));
        });
        all
    };
    let mut model = toy();
    let before = weights(&mut model);
    adapter.apply("a", &mut model).unwrap();
    model.merge().unwrap();
    let after = weights(&mut model).into_iter();
    after
        .map(|(at, it)| (at.clone(), it - &before[&at]))
        .collect()
}

/// That `made` does Σ cᵢ times what the adapters do.
fn is_sum(made: &Adapter, of: &[(&Adapter, f64)], tolerance: f64, what: &str) {
    let made = updates(made);
    let parts: Vec<_> = of.iter().map(|(it, c)| (updates(it), c)).collect();
    for (at, update) in made {
        let sum = parts.iter().map(|(it, c)| &it[&at] * **c);
        let sum = sum.reduce(|a, b| a + b).unwrap();
        let off = (&update - &sum).abs().max().double_value(&[]);
        let size = sum.abs().max().double_value(&[]).max(1.0);
        assert!(off <= tolerance * size, "{what}, {at}: off by {off:.1e}");
    }
}

fn of(kind: CombinationType) -> Combination {
    let mut how = Combination::of(kind);
    how.density = CombinationType::ALL
        .iter()
        .find(|(name, it)| {
            *it == kind && ["ties", "dare", "prune"].iter().any(|w| name.contains(w))
        })
        .map(|_| 1.0);
    how
}

fn config(adapter: &Adapter) -> LoraConfig {
    parse(adapter.tuner.to_json()).unwrap()
}

#[test]
fn cat_and_a_full_decomposition_are_the_sum() {
    let first = adapter(1, json!({"use_rslora": true}));
    let second = adapter(
        2,
        json!({"r": 2, "lora_alpha": 5, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}}),
    );
    let third = adapter(
        3,
        json!({"target_modules": ["k_proj", "embed_tokens"], "r": 1}),
    );
    let parts = [(&first, 0.7), (&second, -1.3), (&third, 0.4)];
    for (kind, rank, expected) in [
        (CombinationType::Cat, None, 3 + 4 + 1),
        (CombinationType::Svd, Some(8), 8),
        (CombinationType::Svd, Some(12), 12), // more than there are directions
    ] {
        let how = Combination {
            svd_rank: rank,
            ..of(kind)
        };
        let made = combine(&parts, &how).unwrap();
        is_sum(&made, &parts, 2e-6, &kind.to_string());
        let config = config(&made);
        assert_eq!((config.r, config.lora_alpha), (expected, expected as f64));
        assert!(
            !config.use_rslora && config.rank_pattern.is_empty() && config.alpha_pattern.is_empty()
        );
    }
}

#[test]
fn a_decomposition_of_full_rank_is_the_nearest_of_its_rank() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({"r": 4})));
    let parts = [(&first, 0.7), (&second, 0.6)];
    let full = updates(&combine(&parts, &of(CombinationType::Cat)).unwrap());
    for rank in [1, 3, 5] {
        let how = Combination {
            svd_rank: Some(rank),
            ..of(CombinationType::Svd)
        };
        let cut = updates(&combine(&parts, &how).unwrap());
        for (at, full) in &full {
            let (_, s, _) = full.svd(true, true);
            let tail = s.slice(0, rank, None, 1).norm().double_value(&[]);
            let off = (full - &cut[at]).norm().double_value(&[]);
            assert!(
                (off - tail).abs() < 1e-5 * (1.0 + tail),
                "{at} at {rank}: {off} {tail}"
            );
        }
    }
}

#[test]
fn one_weight_gives_the_one_adapter() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({})));
    for (_, kind) in CombinationType::ALL {
        let made = combine(&[(&first, 1.0)], &of(kind)).unwrap();
        is_sum(&made, &[(&first, 1.0)], 5e-6, &format!("{kind} of one"));
        // The disjoint merge divides by how many adapters agree, whatever their weights.
        if !kind.to_string().contains("ties") {
            let made = combine(&[(&first, 1.0), (&second, 0.0)], &of(kind)).unwrap();
            is_sum(
                &made,
                &[(&first, 1.0)],
                5e-6,
                &format!("{kind} with weight 0"),
            );
        }
        let made = combine(&[(&first, -2.5)], &of(kind)).unwrap();
        is_sum(
            &made,
            &[(&first, -2.5)],
            5e-6,
            &format!("{kind} of a negative weight"),
        );
    }
}

/// BA of `linear` is (Σ ±√|c| B)(Σ √|c| A): the wanted terms and those across.
#[test]
fn linear_has_the_cross_terms_that_it_is_documented_to_have() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({"lora_alpha": 2})));
    let made = combine(
        &[(&first, 0.5), (&second, -0.8)],
        &of(CombinationType::Linear),
    )
    .unwrap();
    let key = |half: &str| format!("base_model.model.blocks.0.q_proj.lora_{half}.weight");
    let (c1, c2) = (0.5f64 * 7.0 / 3.0, 0.8f64 * 2.0 / 3.0);
    let a = &first.state[&key("A")] * c1.sqrt() - &second.state[&key("A")] * c2.sqrt();
    let b = &first.state[&key("B")] * c1.sqrt() + &second.state[&key("B")] * c2.sqrt();
    close(&made.state[&key("A")], &a, 1e-6, "A");
    close(&made.state[&key("B")], &b, 1e-6, "B");
}

#[test]
fn ties_on_the_updates_is_the_merge_of_the_updates() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({"r": 2})));
    let deltas = [updates(&first), updates(&second)];
    for method in [MajoritySign::Total, MajoritySign::Frequency] {
        let how = Combination {
            density: Some(0.35),
            majority_sign_method: Some(method),
            svd_rank: Some(10),
            ..of(CombinationType::TiesSvd)
        };
        let made = updates(&combine(&[(&first, 0.9), (&second, 0.4)], &how).unwrap());
        for (at, made) in &made {
            if at == "lm_head" {
                continue;
            }
            let pruned = deltas.each_ref().map(|it| prune_magnitude(&it[at], 0.35));
            let tasks = Tensor::stack(&pruned, 0);
            let weighted = Tensor::stack(&[&pruned[0] * 0.9, &pruned[1] * 0.4], 0);
            let expected = disjoint_merge(&weighted, &elect_sign(&tasks, method));
            close(made, &expected, 1e-5, at);
        }
    }
}

#[test]
fn draws_follow_the_seed_and_nothing_else() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({})));
    let made = |seed, torch| {
        tch::manual_seed(torch);
        let how = Combination {
            density: Some(0.6),
            seed,
            ..of(CombinationType::DareLinear)
        };
        combine(&[(&first, 0.5), (&second, 0.5)], &how)
            .unwrap()
            .state
    };
    let same = |a: &State, b: &State| a.iter().all(|(key, it)| it.equal(&b[key]));
    assert!(same(&made(4, 1), &made(4, 2)));
    assert!(!same(&made(4, 1), &made(5, 1)));
}

/// With α = 2r every update of the old releases is doubled; with rsLoRA the new ones are √r times too large.
#[test]
fn pythons_rules() {
    let (first, second) = (
        adapter(1, json!({"lora_alpha": 6})),
        adapter(2, json!({"lora_alpha": 6})),
    );
    let parts = [(&first, 0.7), (&second, 0.3)];
    let how = |rules, kind| Combination {
        rules,
        svd_rank: Some(6),
        ..of(kind)
    };
    let twice = [(&first, 1.4), (&second, 0.6)];
    for kind in [
        CombinationType::Svd,
        CombinationType::DareLinearSvd,
        CombinationType::MagnitudePruneSvd,
    ] {
        is_sum(
            &combine(&parts, &how(Rules::Exact, kind)).unwrap(),
            &parts,
            2e-6,
            "exact",
        );
        is_sum(
            &combine(&parts, &how(Rules::Peft, kind)).unwrap(),
            &parts,
            2e-6,
            "0.21",
        );
        is_sum(
            &combine(&parts, &how(Rules::Peft020, kind)).unwrap(),
            &twice,
            2e-6,
            "0.20",
        );
    }
    let first = adapter(1, json!({"use_rslora": true}));
    let parts = [(&first, 0.7), (&second, 0.3)];
    let root = 6f64.sqrt();
    let made = combine(&parts, &how(Rules::Peft, CombinationType::Svd)).unwrap();
    assert!(config(&made).use_rslora);
    is_sum(
        &made,
        &[(&first, 0.7 * root), (&second, 0.3 * root)],
        2e-6,
        "copied rsLoRA",
    );
}

#[test]
fn a_clamp_bounds_both_factors() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({})));
    let how = Combination {
        svd_clamp: Some(0.9),
        ..of(CombinationType::Svd)
    };
    let parts = [(&first, 1.0), (&second, 1.0)];
    let free = combine(&parts, &of(CombinationType::Svd)).unwrap().state;
    let clamped = combine(&parts, &how).unwrap().state;
    let keys =
        ["A", "B"].map(|half| format!("base_model.model.blocks.1.v_proj.lora_{half}.weight"));
    let all = keys.each_ref().map(|key| free[key].flatten(0, -1));
    let bound = Tensor::cat(&all, 0)
        .quantile_scalar(0.9, None, false, "linear")
        .double_value(&[]);
    for key in &keys {
        close(&clamped[key], &free[key].clamp(-bound, bound), 1e-6, key);
    }
    let untouched = keys.iter().all(|key| clamped[key].equal(&free[key]));
    assert!(!untouched, "nothing is cut off at {bound}");
}

/// What a rank above that of a place is filled up with does not count.
#[test]
fn a_clamp_bounds_the_same_at_any_rank() {
    let (first, second) = (adapter(1, json!({})), adapter(2, json!({})));
    let clamped = |rank: i64| {
        let how = Combination {
            svd_clamp: Some(0.9),
            svd_rank: Some(rank),
            ..of(CombinationType::Svd)
        };
        combine(&[(&first, 1.0), (&second, 1.0)], &how).unwrap()
    };
    let (enough, more) = (clamped(12), clamped(17));
    for at in ["blocks.0.q_proj", "blocks.1.v_proj"] {
        let product = |it: &Adapter| {
            let half = |half: &str| &it.state[&format!("base_model.model.{at}.lora_{half}.weight")];
            half("B").matmul(half("A"))
        };
        close(&product(&more), &product(&enough), 1e-6, at);
    }
}

#[test]
fn targets_are_put_together() {
    let q = adapter(1, json!({"target_modules": ["q_proj"]}));
    let v = adapter(2, json!({"target_modules": ["v_proj", "q_proj"]}));
    let names = |adapter: &Adapter| adapter.tuner.to_json()["target_modules"].clone();
    let cat = of(CombinationType::Cat);
    assert_eq!(
        names(&combine(&[(&q, 1.0), (&v, 1.0)], &cat).unwrap()),
        json!(["q_proj", "v_proj"])
    );
    let [first, second] = [(1, r".*\.q_proj"), (2, r"blocks\.1\..*_proj")]
        .map(|(seed, it)| adapter(seed, json!({"target_modules": it})));
    let both = combine(&[(&first, 1.0), (&second, 0.5)], &cat).unwrap();
    assert_eq!(names(&both), json!(r"(.*\.q_proj)|(blocks\.1\..*_proj)"));
    is_sum(&both, &[(&first, 1.0), (&second, 0.5)], 2e-6, "expressions");
}

/// Python keeps the first adapter's `layers_to_transform`, and with it only half of the second.
#[test]
fn blocks_that_only_the_second_has_are_kept() {
    let first = adapter(
        1,
        json!({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}),
    );
    let second = adapter(
        2,
        json!({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["q_proj"]}),
    );
    let parts = [(&first, 0.8), (&second, 0.9)];
    let made = combine(&parts, &of(CombinationType::Cat)).unwrap();
    is_sum(&made, &parts, 2e-6, "blocks");
    assert_eq!(
        made.tuner.to_json()["target_modules"],
        json!(["blocks.0.q_proj", "blocks.1.v_proj"])
    );
}

#[test]
fn a_tied_head_follows_its_table() {
    let tied = json!({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": true});
    let load = |json: &Value, seed| {
        let config: LoraConfig = parse(json.clone()).unwrap();
        let mut model = Toy::new(
            Kit {
                tied: true,
                lossy: false,
            },
            1,
        );
        model.inject("a", &config).unwrap();
        tch::manual_seed(seed);
        for mut param in model.params("a") {
            tch::no_grad(|| drop(param.tensor.normal_(0.0, 0.4)));
        }
        Adapter::of("a", &config, &mut model).unwrap()
    };
    let mut json = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 7});
    for (key, value) in tied.as_object().unwrap() {
        json[key] = value.clone();
    }
    let (first, second) = (load(&json, 1), load(&json, 2));
    for kind in [CombinationType::Linear, CombinationType::Svd] {
        let made = combine(&[(&first, 0.5), (&second, -0.5)], &of(kind)).unwrap();
        let get = |key: &str| &made.state[&format!("base_model.model.{key}")];
        close(
            get("lm_head.lora_A.weight"),
            &get("embed_tokens.lora_embedding_B").tr(),
            1e-9,
            "A",
        );
        close(
            get("lm_head.lora_B.weight"),
            &get("embed_tokens.lora_embedding_A").tr(),
            1e-9,
            "B",
        );
        made.apply(
            "a",
            &mut Toy::new(
                Kit {
                    tied: true,
                    lossy: false,
                },
                1,
            ),
        )
        .unwrap();
    }
}

#[test]
fn a_whole_module_is_taken_over() {
    let first = adapter(
        1,
        json!({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    );
    let second = adapter(2, json!({"target_modules": ["q_proj", "v_proj"]}));
    let made = combine(&[(&second, 0.3), (&first, 1.0)], &of(CombinationType::Cat)).unwrap();
    is_sum(&made, &[(&second, 0.3), (&first, 1.0)], 2e-6, "with a head");
    assert_eq!(
        config(&made).modules_to_save,
        Some(vec!["lm_head".to_owned()])
    );
}

fn refused(parts: &[(&Adapter, f64)], how: &Combination, words: &[&str]) {
    let message = combine(parts, how).map(|_| ()).unwrap_err().to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn adapters_that_cannot_be_combined() {
    let plain = adapter(1, json!({}));
    let cat = of(CombinationType::Cat);
    refused(&[], &cat, &["no adapters"]);
    for weight in [f64::NAN, f64::INFINITY] {
        refused(
            &[(&plain, 1.0), (&plain, weight)],
            &cat,
            &["adapter 2", "not finite"],
        );
    }
    for (more, words) in [
        (json!({"use_dora": true}), ["use_dora", "adapter 2"]),
        (
            json!({"lora_bias": true, "target_modules": ["q_proj"]}),
            ["lora_bias", "adapter 2"],
        ),
        (json!({"bias": "all"}), ["bias", "adapter 2"]),
        (
            json!({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}),
            ["trainable_token_indices", "adapter 2"],
        ),
        (
            json!({"target_modules": ".*q_proj"}),
            ["list", "`.*q_proj`"],
        ),
        (
            json!({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
            ["lm_head", "weight is 0.5"],
        ),
        (
            json!({"target_modules": ["q_proj"], "ensure_weight_tying": true}),
            ["ensure_weight_tying", "adapter 2"],
        ),
    ] {
        let other = adapter(2, more);
        refused(&[(&plain, 0.5), (&other, 0.5)], &cat, &words);
    }
    let head = json!({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]});
    let [one, two] = [1, 2].map(|seed| adapter(seed, head.clone()));
    refused(
        &[(&one, 1.0), (&two, 1.0)],
        &cat,
        &["`lm_head.weight`", "adapter 1", "adapter 2"],
    );
    let target = adapter(2, json!({"target_modules": ["lm_head"]}));
    refused(
        &[(&one, 1.0), (&target, 1.0)],
        &cat,
        &["`lm_head`", "modules_to_save", "adapter 2"],
    );
    let larger = adapter(2, json!({"rank_pattern": {"v_proj": 4}}));
    refused(
        &[(&plain, 0.5), (&larger, 0.5)],
        &of(CombinationType::Linear),
        &["equal ranks", "blocks.1.v_proj", "[3, 4]", "`cat`"],
    );
    let mut pissa = adapter(2, json!({}));
    pissa.tuner = Box::new(
        parse::<LoraConfig>(json!({"init_lora_weights": "pissa", "target_modules": ALL})).unwrap(),
    );
    refused(&[(&pissa, 1.0)], &cat, &["init_lora_weights", "adapter 1"]);
}

#[test]
fn files_that_are_not_whole() {
    let good = adapter(1, json!({}));
    let cat = of(CombinationType::Cat);
    let with = |change: &dyn Fn(&mut State)| {
        let mut bad = adapter(2, json!({}));
        change(&mut bad.state);
        bad
    };
    let a = "base_model.model.blocks.0.q_proj.lora_A.weight";
    let narrow = with(&|it| {
        drop(it.insert(
            a.to_owned(),
            Tensor::ones([3, 8], (Kind::Float, tch::Device::Cpu)),
        ))
    });
    refused(
        &[(&good, 1.0), (&narrow, 1.0)],
        &cat,
        &[a, "[3, 10]", "[3, 8]", "adapter 2", "adapter 1"],
    );
    let ranked = with(&|it| {
        drop(it.insert(
            a.to_owned(),
            Tensor::ones([2, 10], (Kind::Float, tch::Device::Cpu)),
        ))
    });
    refused(&[(&ranked, 1.0)], &cat, &[a, "[3, 10]", "[2, 10]"]);
    let flat = with(&|it| {
        drop(it.insert(
            a.to_owned(),
            Tensor::ones([3], (Kind::Float, tch::Device::Cpu)),
        ))
    });
    refused(&[(&flat, 1.0)], &cat, &[a, "[3]"]);
    let half = with(&|it| drop(it.remove(a)));
    refused(&[(&half, 1.0)], &cat, &["lacks", a]);
    let more =
        with(&|it| drop(it.insert("base_model.model.q.other".to_owned(), Tensor::from(1.0f32))));
    refused(&[(&more, 1.0)], &cat, &["base_model.model.q.other"]);
    let nan = with(&|it| {
        drop(it.insert(
            a.to_owned(),
            Tensor::full([3, 10], f64::NAN, (Kind::Float, tch::Device::Cpu)),
        ))
    });
    refused(&[(&nan, 1.0)], &cat, &["not finite", a]);
    let none = with(&|it| it.clear());
    refused(&[(&none, 1.0)], &cat, &["no factors"]);
}

#[test]
fn settings_out_of_range_or_without_use() {
    let plain = adapter(1, json!({}));
    let check = |how: Combination, words: &[&str]| refused(&[(&plain, 1.0)], &how, words);
    let cat = of(CombinationType::Cat);
    let ties = of(CombinationType::Ties);
    let svd = of(CombinationType::Svd);
    check(
        Combination {
            svd_rank: Some(3),
            ..cat.clone()
        },
        &["`cat`", "svd_rank"],
    );
    check(
        Combination {
            svd_clamp: Some(0.9),
            ..ties.clone()
        },
        &["`ties`", "svd_clamp"],
    );
    check(
        Combination {
            density: Some(0.5),
            ..svd.clone()
        },
        &["`svd`", "density"],
    );
    let sign = Some(MajoritySign::Frequency);
    check(
        Combination {
            majority_sign_method: sign,
            ..svd.clone()
        },
        &["majority_sign_method"],
    );
    check(
        Combination {
            density: None,
            ..ties.clone()
        },
        &["`ties`", "density"],
    );
    check(
        Combination {
            density: Some(1.5),
            ..ties.clone()
        },
        &["density 1.5"],
    );
    check(
        Combination {
            density: Some(f64::NAN),
            ..ties
        },
        &["density NaN"],
    );
    check(
        Combination {
            density: Some(0.0),
            ..of(CombinationType::DareTies)
        },
        &["density 0"],
    );
    check(
        Combination {
            svd_rank: Some(0),
            ..svd.clone()
        },
        &["svd_rank 0"],
    );
    check(
        Combination {
            svd_clamp: Some(1.2),
            ..svd
        },
        &["svd_clamp 1.2"],
    );
    let message = "tyes".parse::<CombinationType>().unwrap_err().to_string();
    assert!(message.contains("nearest is `ties`"), "{message}");
    for (name, kind) in CombinationType::ALL {
        assert_eq!(name.parse::<CombinationType>().unwrap(), kind);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn sums_of_any_ranks_and_scales(
        ranks in prop::collection::vec((1i64..6, -9.0f64..9.0, any::<bool>(), -2.0f64..2.0), 1..4),
    ) {
        let adapters: Vec<Adapter> = (1..).zip(&ranks).map(|(seed, (r, alpha, rslora, _))| {
            adapter(seed, json!({"r": r, "lora_alpha": alpha, "use_rslora": rslora}))
        }).collect();
        let parts: Vec<(&Adapter, f64)> = adapters.iter().zip(&ranks).map(|(it, (.., weight))| (it, *weight)).collect();
        let made = combine(&parts, &of(CombinationType::Cat)).unwrap();
        is_sum(&made, &parts, 1e-5, "cat");
        let how = Combination { svd_rank: Some(10), ..of(CombinationType::Svd) };
        is_sum(&combine(&parts, &how).unwrap(), &parts, 1e-5, "svd");
    }
}
