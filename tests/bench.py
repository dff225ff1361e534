"""How fast, beside the libraries: every figure is a ratio of medians, the two sides timed in turn in one run.

    python tests/bench.py                       training step, decoding, router against a bag of words
    python tests/bench.py --load DIR            loading a checkpoint and a first answer, beside transformers
    python tests/bench.py --memory              memory of training, measured beside the formula of docs/scale.md
    python tests/bench.py --rehearsal           98,838 records through all parts of a run, in two processes
    python tests/bench.py --cost                what a full run costs, calculated
    python tests/bench.py --answers RUN         a run's answers: do they loop, are they English; its losses
    python tests/bench.py --device cuda         the first two measurements on a GPU

Needs what tests/requirements.txt names.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))       # before conftest, which sets one

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from conftest import MINI  # noqa: E402

import bench_answers  # noqa: E402
from bench_generate import generate_throughput, server_throughput  # noqa: E402
from bench_scale import base_flops, block_parameters, cost, memory_table, rehearsal, training_memory  # noqa: E402
from data import TRAITS, load_records, split  # noqa: E402
from experiments.record import bag_of_words  # noqa: E402
from losses import lm_loss  # noqa: E402
from lora import join, lora_layers, merge  # noqa: E402
from personafuse import Config, generate, load_llama, pick_device, DTYPES  # noqa: E402
from plumbing import HERE, keep_freed_memory  # noqa: E402
from router import average_precision  # noqa: E402

SMOLLM2_135M = MINI | dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                           num_key_value_heads=3, vocab_size=49152, rope_theta=100000, max_position_embeddings=8192,
                           bos_token_id=1, eos_token_id=2)


def random_checkpoint(folder, shape=SMOLLM2_135M):
    """A folder with that config.json and random weights, made by transformers."""
    import transformers
    (Path(folder) / "config.json").write_text(json.dumps(shape))
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def in_turn(rounds, *functions):
    """Run the functions in turn, once to warm up and then `rounds` times -> the median seconds of each."""
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for f, t in zip(functions, times):
            began = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            t.append(time.perf_counter() - began)
    return [statistics.median(t[1:]) for t in times]


def our_loss(llama, tokens, targets, w, checkpointing=False):
    """The mean of Eq. 8 over all positions, computed as train.py does."""
    targets = targets.flatten()
    mean = torch.full((len(targets),), 1 / len(targets), device=targets.device)
    hidden = llama(tokens, w, checkpointing=checkpointing).flatten(0, 1)
    return sum(lm_loss(logits, targets[some], mean[some]) for some, logits in llama.logits_in_parts(hidden))


def our_step(llama, tokens, targets, w):
    def step():
        our_loss(llama, tokens, targets, w).backward()
        for _, layer in lora_layers(llama):
            layer.A.grad = layer.B.grad = None
    return step


def with_experts(folder, device, dtype, experts):
    llama = load_llama(folder, device, dtype, experts=experts, rank=8, alpha=16)
    for _, layer in lora_layers(llama):
        layer.A.requires_grad_(True)
        layer.B.requires_grad_(True)
        layer.B.data.normal_(std=0.01)
    return llama


def peft_model(folder, device, dtype):
    """transformers + peft with ten active adapters at every projection."""
    import peft
    import transformers
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj",       # noqa: E731
                                                                         "gate_proj", "up_proj", "down_proj"])
    names = [name.replace(" ", "_") for name in TRAITS]
    model = peft.get_peft_model(base, config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    model.base_model.set_adapter(names)
    for name, t in model.named_parameters():
        t.requires_grad_("lora_" in name)
    return model


def training_step(folder, device, dtype, rounds=5):
    keep_freed_memory()                             # as train.py does, here for all three sides
    # a GPU needs more rows, or the time is that of launching kernels
    rows, length = (16, 512) if device.type == "cuda" else (4, 256)
    tokens = torch.randint(0, 49152, (rows, length), device=device)
    targets = tokens.roll(-1, dims=1)
    ten, one = (with_experts(folder, device, dtype, n) for n in (10, 1))
    peft = peft_model(folder, device, dtype)

    def peft_step():
        logits = peft(tokens, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        peft.zero_grad()

    w = torch.full((rows, 10), 0.1, device=device)
    t_ten, t_one, t_peft = in_turn(rounds, our_step(ten, tokens, targets, w),
                                   our_step(one, tokens, targets, torch.ones(rows, 1, device=device)), peft_step)
    print(f"training step, {rows} x {length} tokens, {dtype}: ten experts {t_ten:.3f} s; {t_ten / t_one:.2f} of one LoRA "
          f"({t_one:.3f} s); {t_ten / t_peft:.2f} of peft with ten active adapters ({t_peft:.3f} s)")
    flops = rows * base_flops(ten.config, 0, length, checkpointing=False)
    print(f"  {flops / t_ten / 1e12:.2f} TFLOP/s of what the step needs by the formula; divided by the device's peak, its MFU")


def decoding(folder, device, dtype, new=64, rounds=5):
    import transformers
    ours = with_experts(folder, device, dtype, 10)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    merge(ours, torch.full((10,), 0.1, device=device))
    join(ours)
    prompt = torch.randint(3, 49152, (32,)).tolist()
    as_tensor = torch.tensor([prompt], device=device)
    t_ours, t_theirs = in_turn(
        rounds, lambda: list(generate(ours, prompt, new, stop=())),
        lambda: theirs.generate(as_tensor, attention_mask=torch.ones_like(as_tensor), max_new_tokens=new, min_new_tokens=new,
                                do_sample=False, pad_token_id=2))
    print(f"decoding {new} tokens with merged experts, {dtype}: {new / t_ours:.1f} tokens/s, {t_theirs / t_ours:.2f} times "
          f"transformers with merged weights ({new / t_theirs:.1f} tokens/s)")
    c = ours.config
    weights = (block_parameters(c) * c.num_hidden_layers + c.vocab_size * c.hidden_size) * dtype.itemsize
    read, memory = weights * new / t_ours, read_bandwidth(device, dtype)
    print(f"  {read / 1e9:.1f} GB/s of weights read, each once a token: {read / memory:.0%} of the {memory / 1e9:.1f} GB/s "
          "at which memory is read")


def read_bandwidth(device, dtype):
    """Bytes a second that a product of a gigabyte of matrix and a vector reads, the best of five."""
    columns = 16384
    matrix = torch.ones(2**30 // dtype.itemsize // columns, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    best = min(in_turn(1, lambda: torch.mv(matrix, vector))[0] for _ in range(5))
    return matrix.nbytes / best


LOADING = """
import resource, sys, time
folder, who, dtype = sys.argv[1:]
import torch
if who == "ours":
    from personafuse import load_llama
else:
    import transformers
tokens = torch.arange(32)[None]
began = time.perf_counter()
with torch.no_grad():
    if who == "ours":
        model = load_llama(folder, torch.device("cpu"), getattr(torch, dtype), experts=10)
        loaded = time.perf_counter()
        model.logits(model(tokens)[:, -1])
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        loaded = time.perf_counter()
        model(tokens, logits_to_keep=1)
answered = time.perf_counter()
print(loaded - began, answered - loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def loading(folder, dtype, rounds=3):
    """Each in a process of its own, in turn; the first round warms the page cache."""
    found = {"ours": [], "transformers": []}
    for n in range(rounds + 1):
        for who, rows in found.items():
            result = subprocess.run([sys.executable, "-c", LOADING, folder, who, dtype], capture_output=True, text=True,
                                    check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
            if n:
                rows.append([float(x) for x in result.stdout.split()[-3:]])
    median = {who: [statistics.median(column) for column in zip(*rows)] for who, rows in found.items()}
    for who, (load, forward, peak) in median.items():
        print(f"{who:12} load {load:.2f} s, 32-token prompt {forward:.2f} s, peak memory {peak:.1f} GiB" +
              (" (with ten rank-8 experts)" if who == "ours" else ""))
    print(f"time of ours / transformers: {sum(median['ours'][:2]) / sum(median['transformers'][:2]):.2f}")


def held_out_bag_of_words():
    """The router's yardstick, trained on the training split -> mean average precision, held out."""
    train, held = split(load_records(HERE / "persona_cot.jsonl"))
    return average_precision(bag_of_words(train, held), np.array([record["p"] for record in held])).mean()


MEASURED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch, bench
torch.set_num_threads(2)
rows, length, checkpointing = {rows}, {length}, {checkpointing}
begun = bench.peak_memory()
llama = bench.with_experts({folder!r}, torch.device("cpu"), torch.float32, 10)
params = [t for t in llama.parameters() if t.requires_grad]
optimizer = torch.optim.AdamW(params, fused=True)
for step in range(2):
    tokens = torch.randint(0, 49152, (rows, length))
    bench.our_loss(llama, tokens, tokens, torch.full((rows, 10), 0.1), checkpointing).backward()
    optimizer.step()
    optimizer.zero_grad()
print(bench.peak_memory() - begun)
"""


def peak_memory():
    """Bytes that this program ever held: VmHWM, for ru_maxrss starts at what the program held that started this one."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def memory(folder):
    """The formula beside the measured growth of a process that trains the shape of SmolLM2-135M, fp32."""
    c = Config.from_folder(folder)
    for rows, length, checkpointing in ((4, 256, False), (8, 256, False), (8, 256, True)):
        code = MEASURED.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parent.parent), folder=str(folder),
                               rows=rows, length=length, checkpointing=checkpointing)
        measured = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}).stdout)    # freed is given back
        formula = sum(training_memory(c, rows * length, rows * length, 4, checkpointing=checkpointing))
        print(f"{rows} x {length} tokens{', checkpointing' if checkpointing else ''}: formula {formula / 2**30:.2f} GiB, "
              f"measured {measured / 2**30:.2f} GiB, ratio {measured / formula:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", metavar="DIR")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--answers", metavar="RUN", help="a run's answers: do they loop, are they English; its losses")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    s = parser.parse_args()
    torch.set_num_threads(THREADS)
    if s.device != "cpu" and (s.load or s.memory or s.rehearsal):
        parser.error("--load, --memory and --rehearsal measure on the CPU")
    if s.rehearsal:
        return rehearsal()
    if s.cost:
        return cost()
    if s.answers:
        bench_answers.answers(s.answers)
        return bench_answers.loss(s.answers)
    if s.memory:
        memory_table()
        with tempfile.TemporaryDirectory() as folder:
            return memory(random_checkpoint(folder))
    if s.load:
        return loading(s.load, {"fp32": "float32", "bf16": "bfloat16"}[s.dtype])
    device = pick_device(s.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)               # the one that in_turn waits for
    dtype = DTYPES[s.dtype]
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(folder)
        training_step(folder, device, dtype)
        decoding(folder, device, dtype)
        if s.device == "cpu":
            generate_throughput(folder)
            server_throughput()
            print("mean average precision on the held-out queries of a bag-of-words logistic regression: "
                  f"{held_out_bag_of_words():.3f}")


if __name__ == "__main__":
    main()
