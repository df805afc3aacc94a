"""One job of Python's stack in one process, printing one line of JSON: the other half of `src/bin/jobs.rs`."""

import argparse
import json
import os
import resource
import statistics
import time

STARTED = time.perf_counter()


def turn():
    """Waits for this program's turn, where several give each other turns."""
    if "PEFT_BENCH_TURNS" in os.environ:
        print("turn", flush=True)
        input()


def peak_bytes():
    """Of this program alone; what `getrusage` gives is no less than what the process held before it became this one,
    which is a copy of `compare.py`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def load(args):
    import torch
    from transformers import AutoModelForCausalLM

    dtype = dtype_of(args)
    if not args.quantise:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quantise,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, quantization_config=config)


def dtype_of(args):
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]


def adapted(args, model):
    """Dresses a model as `--adapter` says; without one everything is trained."""
    import peft

    if not args.adapter:
        return model
    config = json.loads(args.adapter)
    kind = config.pop("peft_type")
    if kind == "BITFIT":  # which `peft` does not have
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model
    if kind == "ADALORA":
        config["total_step"] = args.warmup + args.steps
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **config)
    return peft.get_peft_model(model, config)


def to_be_trained(args, model):
    """As QLoRA has it: all that is not quantised in fp32. Checkpoints are of each layer, in the way that torch advises."""
    kwargs = {"use_reentrant": False}
    if args.quantise:
        from peft import prepare_model_for_kbit_training

        return prepare_model_for_kbit_training(model, args.gradient_checkpointing, kwargs)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(kwargs)
    return model


LORA = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}'


def step(args):
    import torch

    model = adapted(args, to_be_trained(args, load(args)))
    model.train()
    ids = torch.randint(model.config.vocab_size, (args.batch, args.seq))
    labels = ids.clone()
    labels[:, : int(args.seq * args.masked)] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    samples, losses = [], []
    for i in range(args.warmup + args.steps):
        turn()
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        if "ADALORA" in (args.adapter or ""):
            model.base_model.update_and_allocate(i + 1)
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
            turn()
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
    args.adapter = LORA
    model = adapted(args, load(args))
    begin = time.perf_counter()
    merged = model.merge_and_unload()
    seconds = time.perf_counter() - begin
    merged.save_pretrained(args.out)
    return {"samples": [time.perf_counter() - begin], "merge_s": seconds}


def mixed(args):
    import torch

    args.adapter = LORA
    model = adapted(args, load(args)).eval()
    for i in range(1, args.adapters):
        model.add_adapter(str(i), model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.01)
    names = ["default", *map(str, range(1, args.adapters))]
    ids = torch.randint(model.config.vocab_size, (args.adapters, args.seq))
    one, samples = [], []
    with torch.no_grad():
        for _ in range(args.repeats + 1):
            for times, extra in [(one, {}), (samples, {"adapter_names": names})]:
                begin = time.perf_counter()
                model(input_ids=ids, use_cache=False, **extra)
                times.append(time.perf_counter() - begin)
    return {"samples": samples[1:], "one": one[1:]}


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def load_many(args):
    from peft import PeftModel

    model = load(args)
    before, begin = memory(), time.perf_counter()
    model = PeftModel.from_pretrained(model, args.file, adapter_name="0")
    for i in range(1, args.adapters):
        model.load_adapter(args.file, adapter_name=str(i))
    return {"samples": [time.perf_counter() - begin], "bytes": memory() - before}


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


def open4bit(args):
    """Loads a model in 4 bits: one that is stored so, or with `--quantise` a dense one."""
    import bitsandbytes  # noqa: F401  what is imported is no part of loading
    import transformers.models.llama.modeling_llama  # noqa: F401

    before, begin = memory(), time.perf_counter()
    model = load(args)
    seconds = time.perf_counter() - begin
    return {"samples": [seconds], "bytes": memory() - before, "layers": len(list(model.modules()))}


def timed(args, body):
    """Seconds of calls: in each turn nothing for 0.03 s, then at least five of them and 0.06 s."""
    samples = []
    body()
    for _ in range((args.repeats + 4) // 5):
        turn()
        begun = time.perf_counter()
        body()
        while time.perf_counter() - begun < 0.03:
            body()
        begun, calls = time.perf_counter(), 0
        while calls < 5 or time.perf_counter() - begun < 0.06:
            begin = time.perf_counter()
            body()
            samples.append(time.perf_counter() - begin)
            calls += 1
    return samples


def packed_weight(args, dtype):
    import bitsandbytes.functional as bnb
    import torch

    weight = torch.randn(args.rows, args.columns).to(dtype)
    return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=args.double_quant)


def quantise(args):
    """[rows, columns] in `--dtype` to NF4."""
    import bitsandbytes.functional as bnb
    import torch

    weight = torch.randn(args.rows, args.columns).to(dtype_of(args))
    body = lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=args.double_quant)
    return {"samples": timed(args, body)}


def dequantise(args):
    """NF4 to [rows, columns] in `--dtype`."""
    import bitsandbytes.functional as bnb

    packed, state = packed_weight(args, dtype_of(args))
    return {"samples": timed(args, lambda: bnb.dequantize_4bit(packed, state))}


def linear4bit(args):
    """x: [tokens, columns] through NF4 [rows, columns]. `bitsandbytes` has two ways: to dequantise and multiply, as in
    training, and where the processor has AVX512-BF16 and nothing is trained, a kernel over a packed weight. Both are
    measured, and the faster one counts. One weight after the other, since a model has many: they do not stay in a
    cache."""
    import bitsandbytes
    import torch

    dtype = dtype_of(args)
    x = torch.randn(args.tokens, args.columns).to(dtype)
    layers = []
    for _ in range(args.copies):
        layer = bitsandbytes.nn.Linear4bit(
            args.columns, args.rows, False, dtype, compress_statistics=args.double_quant, quant_type="nf4"
        )
        layers.append(layer.to(dtype).to("cpu"))  # which is what quantises

    def through():
        for layer in layers:
            layer(x)

    with torch.no_grad():
        ways = {"dequantised": [it / args.copies for it in timed(args, through)]}
        for layer in layers:
            layer.eval()
        ways["packed"] = [it / args.copies for it in timed(args, through)]
    return {"samples": min(ways.values(), key=statistics.median), "ways": ways}


def adamw8bit(args):
    """One step of 8-bit AdamW on a tensor of `--size`."""
    import bitsandbytes
    import torch

    parameter = torch.nn.Parameter(torch.randn(args.size))
    parameter.grad = torch.randn(args.size)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-4, weight_decay=0.01)
    return {"samples": timed(args, optimizer.step)}


JOBS = {
    "step": step,
    "generate": generate,
    "merge": merge,
    "mixed": mixed,
    "load": load_many,
    "tokenise": tokenise,
    "open4bit": open4bit,
    "quantise": quantise,
    "dequantise": dequantise,
    "linear4bit": linear4bit,
    "adamw8bit": adamw8bit,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--file")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--masked", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantise", choices=["nf4", "fp4"], help="the linear layers of a dense model, as it is loaded")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--keep-in-fp32", action="store_true", help="what is not quantised; Python does so anyway")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="ours alone has it")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--size", type=int, default=1 << 24)
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
        # With AMX "medium" means products in bf16, which are other numbers; MKL is at home there.
        if args.onednn and not torch.cpu._is_amx_tile_supported():
            torch.set_float32_matmul_precision("medium")
    result = JOBS[args.job](args)
    result["process_s"] = time.perf_counter() - STARTED
    result["peak_bytes"] = peak_bytes()
    print(json.dumps(result))


main()
