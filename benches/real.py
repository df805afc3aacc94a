"""Every method on a real model and real text: Python's half of the table in `REAL.md`, on the plans of `src/bin/real.rs`.

    target/python/bin/python benches/real.py --task classes --model DIR --seed 0 --plan FILE [--starts DIR]

Prints one line of JSON for each method. With `--starts` a method begins with the very numbers that ours began with,
not with Python's own random ones.
"""

import argparse
import json
import pathlib
import time

import torch
import transformers
from safetensors.torch import load_file

STANDARD = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def base(args, classes, dtype):
    if classes:
        return transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    read = transformers.AutoModelForCausalLM.from_pretrained
    if dtype == "nf4":
        import peft

        bits = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
        )
        model = read(args.model, dtype=torch.bfloat16, quantization_config=bits)
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return read(args.model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def dressed(model, adapter, classes, steps):
    """The model as a configuration says; `None`: all of it is trained."""
    import peft

    if adapter is None:
        return model
    settings = dict(adapter)
    kind = settings.pop("peft_type")
    if kind == "BITFIT":
        return bitfit(model)
    if kind == "ADALORA":
        settings["total_step"] = steps
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="SEQ_CLS" if classes else "CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config)


def bitfit(model):
    """BitFit, which `peft` does not have: every bias and the head of the task; biases of 0 where the model has none."""
    linear = [it for name, it in model.named_modules() if isinstance(it, torch.nn.Linear) and name != "lm_head"]
    if all(it.bias is None for it in linear):
        for it in linear:
            it.bias = torch.nn.Parameter(torch.zeros(it.out_features))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return model


def begin_with(model, path):
    """Puts our first values in place of Python's; every trained parameter must be there."""
    start = {key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = name.replace(".modules_to_save", "").replace(".default", "").removeprefix("base_model.model.")
                parameter.copy_(start.pop(plain).view_as(parameter))
    if start:
        raise SystemExit(f"{path}: Python's model does not train {sorted(start)}")


def batches(plan, prefix):
    names = sorted(key.removesuffix(".input_ids") for key in plan if key.startswith(prefix) and key.endswith(".input_ids"))
    return [{key: plan[f"{name}.{key}"] for key in ("input_ids", "attention_mask", "labels")} for name in names]


def evaluate(model, held):
    """From the logits: what AdaLoRA's model returns as its loss holds a penalty.

    A base in 4 bits stays in training mode, which changes nothing without dropout: in the other one `bitsandbytes` packs its
    weights for a kernel of their own, and trains on what it packed as if it had not (losses of 10 instead of 3)."""
    model.train(getattr(model, "is_loaded_in_4bit", False))
    total = count = right = 0
    with torch.no_grad():
        for batch in held:
            labels = batch["labels"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            if labels.dim() == 2:
                # The scores of virtual tokens stand in front.
                logits, labels = logits[:, -labels.shape[1] : -1].flatten(0, 1), labels[:, 1:].flatten()
            kept = labels != -100
            total += torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
            count += kept.sum().item()
            right += (logits.argmax(-1) == labels)[kept].sum().item()
    return {"loss": total / count, "accuracy": right / count}


def train(args, method, plan, start):
    torch.manual_seed(args.seed)
    classes, steps, held = plan["classes"].item(), batches(plan, "train."), batches(plan, "held.")
    adapter = method.get("adapter")
    model = dressed(base(args, classes, method.get("dtype", "fp32")), adapter, classes, len(steps))
    if start:
        begin_with(model, start)
    peak = method["learning_rate"]
    trained = [it for it in model.parameters() if it.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, **STANDARD)
    before = evaluate(model, held)
    losses, begin = [], time.perf_counter()
    for step, (batch, factor) in enumerate(zip(steps, plan["factors"].tolist()), 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if adapter and adapter["peft_type"] == "ADALORA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    return {
        "who": "python from our start" if start else "python",
        "parameters": sum(it.numel() for it in trained),
        "learning_rate": peak,
        "before": before,
        "after": evaluate(model, held),
        "losses": losses,
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default="benches/real.json")
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--methods", default="", help="only these, separated by commas")
    parser.add_argument("--starts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    # fp32 through oneDNN where the processor has no better: the same numbers in half the time. With AMX they would be products in bf16.
    if not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    with open(args.settings, encoding="utf-8") as file:
        settings = json.load(file)
    plan, kind = load_file(args.plan), settings["tasks"][args.task]["model"]
    for name, method in settings["methods"].items():
        if kind not in method or args.methods and name not in args.methods.split(","):
            continue
        start = pathlib.Path(args.starts) / f"{name}.safetensors" if args.starts else None
        line = train(args, method[kind], plan, start)
        print(json.dumps({**line, "task": args.task, "method": name, "seed": args.seed}), flush=True)


main()
