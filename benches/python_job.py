"""One job of Python's stack in one process, printing one line of JSON: the other half of `src/bin/jobs.rs`."""

import argparse
import json
import os
import resource
import time

STARTED = time.perf_counter()


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(args):
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)


def adapted(args, model):
    from peft import LoraConfig, get_peft_model

    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def step(args):
    import torch

    model = adapted(args, load(args))
    model.train()
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq))
    labels = ids.clone()
    labels[:, : int(args.seq * args.masked)] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    samples, losses = [], []
    for i in range(args.warmup + args.steps):
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        losses.append(loss.item())
        if i >= args.warmup:
            samples.append(seconds)
    return {"samples": samples, "losses": losses}


def generate(args):
    import torch

    model = load(args).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(model.config.vocab_size, (1, args.prompt))
    samples = []
    with torch.no_grad():
        for _ in range(args.repeats + 1):
            begin = time.perf_counter()
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new,
                min_new_tokens=args.new,
                do_sample=False,
            )
            samples.append(time.perf_counter() - begin)
    return {"samples": samples[1:], "tokens": out[0, args.prompt :].tolist()}


def merge(args):
    model = adapted(args, load(args))
    begin = time.perf_counter()
    merged = model.merge_and_unload()
    seconds = time.perf_counter() - begin
    merged.save_pretrained(args.out)
    return {"samples": [time.perf_counter() - begin], "merge_s": seconds}


def tokenise(args):
    """`apply_chat_template` over all rows in two processes, ids and mask of the answers, saved as one array file."""
    import multiprocessing

    import numpy
    from transformers import AutoTokenizer

    begin = time.perf_counter()
    global TOKENIZER
    TOKENIZER = AutoTokenizer.from_pretrained(args.tokenizer)
    with open(args.data, encoding="utf-8") as file:
        lines = file.readlines()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = pool.map(encode, lines, chunksize=1000)
    numpy.save(args.cache, numpy.concatenate([numpy.asarray(ids, dtype=numpy.uint32) for ids, _ in rows]))
    return {
        "samples": [time.perf_counter() - begin],
        "rows": len(rows),
        "tokens": sum(len(ids) for ids, _ in rows),
    }


def encode(line):
    """The ids of a conversation, and where its last answer begins."""
    messages = json.loads(line)["messages"]
    whole = TOKENIZER.apply_chat_template(messages, return_dict=False)
    prompt = TOKENIZER.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    return whole, len(prompt)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["step", "generate", "merge", "tokenise"])
    parser.add_argument("--model")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--masked", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--tokenizer")
    parser.add_argument("--data")
    parser.add_argument("--cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--onednn", action="store_true", help="fp32 products through oneDNN")
    args = parser.parse_args()
    if args.job != "tokenise":
        import torch

        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        if args.onednn:
            torch.set_float32_matmul_precision("medium")
    result = globals()[args.job](args)
    result["process_s"] = time.perf_counter() - STARTED
    result["peak_bytes"] = peak_bytes()
    print(json.dumps(result))


main()
