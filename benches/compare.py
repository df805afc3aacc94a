"""Ours beside Python's, one process each, with the floor of the same run: steps and kernels in turn, else whole jobs.

    target/python/bin/python benches/compare.py --jobs target/debug/jobs --out benches/results

Three runners: ours; Python as people run it; Python tuned with two switches that few know (fp32 products
through oneDNN where it does not take them for bf16, an allocator that keeps freed blocks). A round runs each of them once; medians are over all
samples of all rounds. Ratios below 1 mean that ours is faster, or smaller.

`--only PART` measures what has PART in its name: `steps`, `methods`, and `qlora`, which are steps over a base in 4 bits
and the kernels of `bitsandbytes`, are groups.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEEP = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"

# name, arguments of the job, weights multiplied per token (forward and backward), targets for ours / Python, / tuned, / floor
GPT2 = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 768 * 50257
BLOCKS = 12 * (4 * 768 * 768 + 3 * 768 * 2048)
LLAMA = BLOCKS + 768 * 32000


def adapter(peft_type, **settings):
    """The flag that dresses a model, with what `adapter_config.json` would hold."""
    return ["--adapter", json.dumps({"peft_type": peft_type, **settings})]


def lora(*targets):
    return adapter("LORA", r=8, lora_alpha=16, target_modules=list(targets) or "all-linear")


STEPS = [
    ("gpt2 c_attn fp32", ["--model", "gpt2", *lora("c_attn")], 512 * 4 * GPT2, "fp32", (0.42, 0.75, 1.2)),
    ("llama all-linear fp32", ["--model", "llama", *lora()], 512 * 4 * LLAMA, "fp32", (0.42, 0.75, 1.25)),
    ("llama all-linear bf16", ["--model", "llama", *lora(), "--dtype", "bf16"], 512 * 4 * LLAMA, "bf16", (0.60, 0.70, 1.6)),
    (
        "llama all-linear bf16, 3/4 masked",
        ["--model", "llama", *lora(), "--dtype", "bf16", "--masked", "0.75"],
        512 * 4 * BLOCKS + 128 * 4 * 768 * 32000,
        "bf16",
        (0.50, 0.60, None),
    ),
]

# Every method on the shape of GPT-2 small, batch 4 x 128, fp32. The whole model's gradients and moments weigh as much
# in either language, so its memory has a target of its own.
VIRTUAL = {"num_virtual_tokens": 20}
#
# The floor is the products of the base alone: forward and dx, in full fine-tuning dW besides; virtual tokens that
# are embeddings go through all of it.
FORWARD_DX, LONGER = 4 * 512 * GPT2, 4 * (512 + 4 * 20) * GPT2
METHODS = [
    ("LoRA", lora("c_attn"), FORWARD_DX),
    ("AdaLoRA", adapter("ADALORA", target_modules=["c_attn"]), FORWARD_DX),
    ("VeRA", adapter("VERA", target_modules=["c_attn"]), FORWARD_DX),
    ("(IA)3", adapter("IA3"), FORWARD_DX),
    ("BitFit", adapter("BITFIT"), FORWARD_DX),
    ("LN tuning", adapter("LN_TUNING"), FORWARD_DX),
    ("prefix tuning", adapter("PREFIX_TUNING", **VIRTUAL), FORWARD_DX),
    ("prompt tuning", adapter("PROMPT_TUNING", **VIRTUAL), LONGER),
    ("P-tuning", adapter("P_TUNING", **VIRTUAL), LONGER),
    ("full fine-tuning", [], 6 * 512 * GPT2),
]


# QLoRA: steps of the Llama shape, and the kernels under them. The products are those of the base; checkpoints repeat the
# blocks'. Python's `prepare_model_for_kbit_training` puts all that is not quantised in fp32, the head with its products
# as well; ours does so where it is asked to. Kernels are bound by memory: every byte once, at the rate of reading
# or of writing, and from the last cache where that holds all, which it does not of the 16 matrices of one token. 4 bits and a scale for 64 weights are 0.5625 bytes, with quantised scales 0.5159.
FOUR_BITS = ["--quantise", "nf4", "--double-quant"]
HEAD_WORK = 512 * 4 * 768 * 32000
STEP_TARGETS = (0.50, None, None)
QLORA_STEPS = [  # name, flags, products in bf16, products in fp32; without FOUR_BITS each is a step of LoRA
    ("QLoRA step", FOUR_BITS, 512 * 4 * LLAMA, 0),
    ("QLoRA step, the rest in fp32", [*FOUR_BITS, "--keep-in-fp32"], 512 * 4 * BLOCKS, HEAD_WORK),
    ("QLoRA step, checkpoints", [*FOUR_BITS, "--gradient-checkpointing"], 512 * (4 * LLAMA + 2 * BLOCKS), 0),
]
NF4, DOUBLE = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
SQUARE, TALL = 4096 * 4096, 11008 * 4096
ONE = ["--threads", "1"]
CACHED = 64e6  # bytes
KERNELS = [  # name, the job, bytes read and written, products, targets
    ("quantise 4096 x 4096 fp32, one thread", ["quantise", "--dtype", "fp32", *ONE], SQUARE * 4, SQUARE * NF4, 0, (1 / 80, None, 3)),
    ("quantise 4096 x 4096 bf16, double, one thread", ["quantise", "--dtype", "bf16", "--double-quant", *ONE], SQUARE * 2, SQUARE * DOUBLE, 0, (1 / 80, None, 3)),
    ("dequantise 4096 x 4096 to bf16", ["dequantise", "--dtype", "bf16"], SQUARE * NF4, SQUARE * 2, 0, (0.1, None, 1.3)),
    ("dequantise 11008 x 4096 to bf16", ["dequantise", "--rows", "11008", "--dtype", "bf16"], TALL * NF4, TALL * 2, 0, (0.1, None, 1.3)),
    ("dequantise 4096 x 4096 to bf16, double", ["dequantise", "--dtype", "bf16", "--double-quant"], SQUARE * DOUBLE, SQUARE * 2, 0, (0.1, None, 1.3)),
    ("512 tokens through 4096 x 4096 bf16", ["linear4bit", "--dtype", "bf16", "--dense"], 0, 0, 2 * 512 * SQUARE, (None, None, None)),
    ("1 token through 4096 x 4096 bf16", ["linear4bit", "--dtype", "bf16", "--tokens", "1", "--copies", "16"], SQUARE * NF4, 0, 0, (0.85, None, 1.25)),
    ("AdamW in 8 bits, 16.8 million", ["adamw8bit"], (1 << 24) * 10, (1 << 24) * 6, 0, (1 / 30, None, None)),
]


def models(folder):
    """The two shapes of the benchmark with made-up weights, made once."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shapes = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=2048,
                vocab_size=32000,
                max_position_embeddings=1024,
            )
        ),
    }
    for name, make in shapes.items():
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
        # The same in bf16, as people have it on disk.
        if not (folder / f"{name}-bf16" / "model.safetensors").exists():
            torch.manual_seed(0)
            make().to(torch.bfloat16).save_pretrained(folder / f"{name}-bf16")


def in_four_bits(dense, folder):
    """A dense model as Python quantises and saves it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not (folder / "model.safetensors").exists():
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
        )
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16, quantization_config=config)
        model.save_pretrained(folder)


def conversations(path, rows):
    """Chat rows of several turns from the WordNet definitions."""
    if path.exists():
        return
    source = (ROOT / "fixtures/data/wordnet_define_sft.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in source]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            messages = [{"role": "system", "content": f"You are dictionary number {i}."}]
            for j in range(1 + i % 3):
                row = pairs[(i * 7 + j * 13) % len(pairs)]
                asked = f"{row['instruction']} {row.get('input', '')}".strip()
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": row["output"]})
            file.write(json.dumps({"messages": messages}) + "\n")


def adapter_of(model, folder):
    """A LoRA of rank 8 on every linear layer of a model, trained by nobody."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter_config.json").exists():
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


def run(command, env=None):
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    result["wall_s"] = seconds
    return result


class Turns:
    """A job that asks for its turn with a line; it has loaded what it needs when it does so first."""

    def __init__(self, command, env):
        self.errors = tempfile.TemporaryFile("w+")
        env = {**os.environ, **env, "PEFT_BENCH_TURNS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=self.errors)
        self.result = None
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        if line.strip() == "turn":
            return
        if self.process.wait() != 0:
            self.errors.seek(0)
            sys.exit(f"{self.process.args}\n{self.errors.read()[-2000:]}")
        self.result = json.loads(line)

    def take(self):
        """Lets it go on to its next question, if it has not ended."""
        if self.result is None:
            time.sleep(0.05)  # until the threads of the one before have gone to sleep
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.read()
        return self.result is None


class Bench:
    def __init__(self, args):
        self.args = args
        self.folder = ROOT / "target/bench"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.raw, self.notes = [], {}, []

    def ours(self, job):
        return run([self.args.jobs, *job])

    def python(self, job, tuned=False):
        extra = ["--onednn"] if tuned else []
        env = {"GLIBC_TUNABLES": KEEP} if tuned else {}
        return run([sys.executable, ROOT / "benches/python_job.py", *job, *extra], env)

    def rounds(self, name, job, count, tuned=True, reset=None):
        """Whole jobs, one after the other."""
        runs = {"ours": [], "python": [], "tuned": []}
        for _ in range(count):
            for who in ["ours", "python", "tuned"] if tuned else ["ours", "python"]:
                if reset:
                    reset()
                runs[who].append(self.ours(job) if who == "ours" else self.python(job, who == "tuned"))
        self.raw[name] = runs
        return runs

    def turns(self, name, job, count, beside=None):
        """Jobs that take their samples in turn: a machine whose clock changes is as slow for all of them. `beside` is another of ours."""
        ours, python = [self.args.jobs, *job], [sys.executable, ROOT / "benches/python_job.py", *job]
        commands = {"ours": (ours, {}), "python": (python, {}), "tuned": ([*python, "--onednn"], {"GLIBC_TUNABLES": KEEP})}
        if beside:
            commands["beside"] = ([self.args.jobs, *beside], {})
        runs = {who: [] for who in commands}
        for _ in range(count):
            started = {who: Turns(*it) for who, it in commands.items()}
            while any([it.take() for it in started.values()]):
                pass
            for who, it in started.items():
                runs[who].append(it.result)
        self.raw[name] = runs
        return runs

    def row(self, name, value, runs, floor=None, targets=(None, None, None), unit="s"):
        """One line of the table from a figure of each run."""
        medians = {who: statistics.median(value(it)) for who, it in runs.items() if it and who != "beside"}
        mine = medians["ours"]
        ratios = [mine / medians[who] if who in medians else None for who in ["python", "tuned"]]
        ratios.append(mine / floor if floor else None)
        self.rows.append({"name": name, "unit": unit, **medians, "floor": floor, "ratios": ratios, "targets": targets})
        print(line(self.rows[-1]), flush=True)

    def steps(self):
        quick = ["--steps", str(self.args.steps)]
        for name, job, work, dtype, targets in STEPS:
            if self.args.only not in name and self.args.only not in "steps":
                continue
            job = [str(self.folder / it) if it in ("gpt2", "llama") else it for it in job]
            if dtype == "bf16":
                job = [it + "-bf16" if it.endswith("/llama") else it for it in job]
            runs = self.turns(name, ["step", *job, *quick], self.args.rounds)
            floor = work / self.floor[f"gemm_{dtype}_flops"]
            self.row(f"step: {name}", lambda it: [s for r in it for s in r["samples"]], runs, floor, targets)
            self.row(f"peak memory: {name}", lambda it: [r["peak_bytes"] / 2**20 for r in it], runs, None, (0.60, None, None), "MiB")

    def methods(self):
        job = ["step", "--model", str(self.folder / "gpt2"), "--steps", str(self.args.steps), "--warmup", "1"]
        for name, flags, work in METHODS:
            if self.args.only not in name and self.args.only not in "methods":
                continue
            runs = self.turns(f"method: {name}", [*job, *flags], self.args.rounds)
            self.row(f"step: {name}", lambda it: [s for r in it for s in r["samples"]], runs, work / self.floor["gemm_fp32_flops"], (0.45, 0.80, None))
            memory = 0.60 if flags else 0.85
            self.row(f"peak memory: {name}", lambda it: [r["peak_bytes"] / 2**20 for r in it], runs, None, (memory, None, None), "MiB")

    def note(self, name, ratio, target):
        self.notes.append(f"{name}: {ratio:.2f} (≤ {target:g}: {'met' if ratio <= target else 'missed'})")
        print(self.notes[-1], flush=True)

    def measure_floor(self, one=False):
        """The machine's rates, which change while it is measured on: again for each row."""
        self.floor = self.ours(["floor", *(ONE if one else [])])
        self.raw.setdefault("floors", []).append(self.floor)

    def qlora(self):
        asked = lambda name: self.args.only in f"qlora: {name}"
        every = lambda it: [s for r in it for s in r["samples"]]
        peak = lambda it: [r["peak_bytes"] / 2**20 for r in it]
        middle = lambda runs, key="samples": statistics.median(s for r in runs for s in r[key])
        model, rounds = self.folder / "llama-bf16", self.args.rounds
        for name, flags, narrow, wide in QLORA_STEPS:
            if asked(name):
                job = ["step", "--model", str(model), *lora(), "--dtype", "bf16", "--steps", str(self.args.steps)]
                dense = [it for it in flags if it not in FOUR_BITS]
                self.measure_floor()
                runs = self.turns(f"qlora: {name}", [*job, *flags], rounds, beside=[*job, *dense])
                floor = narrow / self.floor["gemm_bf16_flops"] + wide / self.floor["gemm_fp32_flops"]
                self.row(name, every, runs, floor, STEP_TARGETS)
                self.row(f"peak memory: {name}", peak, runs, None, (0.45, None, None), "MiB")
                self.note(f"{name} / the same of LoRA", middle(runs["ours"]) / middle(runs["beside"]), 1.12)
        for name, job, read, written, work, targets in KERNELS:
            if asked(name):
                job = [*job, "--repeats", "20"]
                self.measure_floor(one=ONE[0] in job)
                runs = self.turns(f"qlora: {name}", job, rounds)
                where = "cached_" if read + written <= CACHED and "--copies" not in job else ""
                moved = [read / self.floor[f"{where}read_bytes_per_s"], written / self.floor[f"{where}written_bytes_per_s"]]
                floor = sum(moved) + work / self.floor["gemm_bf16_flops"]
                self.row(name, lambda it: [1e3 * s for s in every(it)], runs, 1e3 * floor, targets, "ms")
                if work:
                    self.note(f"{name} / the dense product", middle(runs["ours"]) / middle(runs["ours"], "dense"), 1.08)
                if job[0] == "adamw8bit":
                    self.note(f"{name} / libtorch's fused in fp32", middle(runs["ours"]) / middle(runs["ours"], "fused_fp32"), 1)
        small, stored = ROOT / "target/models/smollm2", self.folder / "llama-nf4"
        for name, folder, flags in [
            ("load SmolLM2 in 4 bits", small, FOUR_BITS),
            ("load the Llama shape in 4 bits", model, FOUR_BITS),
            ("load what is in 4 bits", stored, []),
        ]:
            if asked(name):
                in_four_bits(model, stored)
                runs = self.rounds(f"qlora: {name}", ["open4bit", "--model", str(folder), "--dtype", "bf16", *flags], rounds)
                file = (folder / "model.safetensors").stat().st_size
                self.row(name, every, runs, file / self.floor["read_bytes_per_s"], STEP_TARGETS)
                self.row(f"memory: {name}", lambda it: [r["bytes"] / 2**20 for r in it], runs, unit="MiB")
                self.row(f"peak memory: {name}", peak, runs, unit="MiB")

    def mixing(self):
        runs = self.rounds("mixed", ["mixed", "--model", str(self.folder / "gpt2")], self.args.rounds)
        self.row("8 rows, one adapter", lambda it: [s for r in it for s in r["one"]], runs)
        self.row("8 rows, 8 adapters", lambda it: [s for r in it for s in r["samples"]], runs)
        middle = lambda key: statistics.median(s for r in runs["ours"] for s in r[key])
        for what, many, one in [("", "samples", "one"), (", blocks alone", "blocks", "blocks_one")]:
            self.note(f"8 adapters / one adapter{what}", middle(many) / middle(one), 1.3)

    def loading(self):
        model = ROOT / "target/models/smollm2"
        if not model.exists():
            print("loading: skipped, `cargo xtask demo` makes target/models/smollm2", flush=True)
            return
        file = self.folder / "adapter"
        adapter_of(model, file)
        # Python takes minutes; its allocator and its products hardly matter here.
        runs = self.rounds("load", ["load", "--model", str(model), "--file", str(file), "--adapters", "100"], self.args.rounds, tuned=False)
        self.row("load 100 adapters of rank 8", lambda it: [s for r in it for s in r["samples"]], runs)
        self.row("their memory", lambda it: [r["bytes"] / 2**20 for r in it], runs, unit="MiB")

    def start(self):
        job = ["step", "--model", str(self.folder / "gpt2"), *lora("c_attn"), "--steps", "1", "--warmup", "0"]
        runs = self.rounds("start", job, self.args.rounds)
        self.row("start to the end of the first step", lambda it: [r["wall_s"] for r in it], runs, None, (0.20, None, None))

    def generation(self):
        job = ["generate", "--model", str(self.folder / "llama-bf16"), "--dtype", "bf16"]
        runs = self.turns("generate", job, self.args.rounds)
        floor = 64 * 2 * LLAMA / self.floor["read_bytes_per_s"]
        self.row("generate 64 tokens, bf16", lambda it: [s for r in it for s in r["samples"]], runs, floor, (0.45, None, 1.6))

    def merging(self):
        out = self.folder / "merged"
        job = ["merge", "--model", str(self.folder / "llama"), "--out", str(out)]
        runs = self.rounds("merge", job, self.args.rounds, reset=lambda: shutil.rmtree(out, ignore_errors=True))
        self.row("merge and save, fp32", lambda it: [s for r in it for s in r["samples"]], runs, None, (0.40, None, None))

    def tokenising(self):
        tokenizer = ROOT / "target/models/smollm2"
        if not tokenizer.exists():
            print("tokenising: skipped, `cargo xtask demo` makes target/models/smollm2", flush=True)
            return
        data = self.folder / "conversations.jsonl"
        conversations(data, 100_000)
        cache = tempfile.mkdtemp(dir=self.folder)
        job = ["tokenise", "--tokenizer", str(tokenizer), "--data", str(data), "--cache", cache + "/cache"]
        reset = lambda: (shutil.rmtree(cache, ignore_errors=True), os.makedirs(cache))
        runs = self.rounds("tokenise", job, self.args.rounds, tuned=False, reset=reset)
        shutil.rmtree(cache, ignore_errors=True)
        counts = {who: it[0]["tokens"] for who, it in runs.items() if it}
        print(f"    tokens: {counts}", flush=True)
        self.row("tokenise 100,000 chat rows", lambda it: [s for r in it for s in r["samples"]], runs, None, (0.40, None, None))

    def all(self):
        models(self.folder)
        self.measure_floor()
        print(json.dumps(self.floor), flush=True)
        print(HEAD, flush=True)
        self.steps()
        self.methods()
        self.qlora()
        jobs = {
            "mixed": self.mixing,
            "load": self.loading,
            "start": self.start,
            "generate": self.generation,
            "merge": self.merging,
            "tokenise": self.tokenising,
        }
        for name, job in jobs.items():
            if self.args.only in name:
                job()
        self.write()

    def write(self):
        stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        report = {"machine": machine(), "when": stamp, "floor": self.floor, "rows": self.rows, "notes": self.notes, "raw": self.raw}
        out = pathlib.Path(self.args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{stamp}.json").write_text(json.dumps(report, indent=1) + "\n")
        table = "\n".join([HEAD, *map(line, self.rows)])
        notes = "".join(f"\n{note}\n" for note in self.notes)
        (out / f"{stamp}.md").write_text(f"{machine()}, {stamp}\n\n{table}\n{notes}")
        print(f"raw results: {out / stamp}.json")


HEAD = """| work | ours | Python | tuned Python | floor | ours / Python | ours / tuned | ours / floor |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row):
    def figure(x):
        return "" if x is None else f"{x:.0f} {row['unit']}" if x >= 100 else f"{x:.3g} {row['unit']}"

    def ratio(x, target):
        if x is None:
            return ""
        figures = f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"
        return figures + (f" (≤ {target:.3g}: {'met' if x <= target else 'missed'})" if target else "")

    cells = [row["name"], *(figure(row.get(k)) for k in ["ours", "python", "tuned", "floor"])]
    return "| " + " | ".join(cells + [ratio(*pair) for pair in zip(row["ratios"], row["targets"])]) + " |"


def machine():
    lines = [[part.strip() for part in it.split(":", 1)] for it in open("/proc/cpuinfo") if ":" in it]
    names = [value for key, value in lines if key == "model name"]
    # Virtual machines hide the model's name; family and number tell how much a core multiplies.
    first = dict(reversed(lines))
    which = f"family {first.get('cpu family', '?')}, model {first.get('model', '?')}"
    return f"{platform.machine()}, {len(names)} x {names[0]} ({which})" if names else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default=str(ROOT / "target/debug/jobs"))
    parser.add_argument("--out", default=str(ROOT / "benches/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="part of a name")
    Bench(parser.parse_args()).all()


main()
