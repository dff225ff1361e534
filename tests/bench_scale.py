"""The paper's size on one machine: a rehearsal with 98,838 records, and what a full run costs, calculated.

bench.py --rehearsal starts this file twice under torchrun; bench.py --cost prints the table of docs/scale.md.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from data import TRAITS, expert_subsets, load_records, trait_groups  # noqa: E402
from personafuse import LOGITS_AT_ONCE, Config, build  # noqa: E402
from plumbing import HERE, run_program  # noqa: E402
from processes import joined_processes, process_count, process_rank  # noqa: E402
from runs import (PRESETS, load_state, open_run, parse_arguments, read_examples, save_run, state_file,  # noqa: E402
                  write_examples)
from train import evaluate, make_batch, run_stage  # noqa: E402

RECORDS = 98838                     # the paper's


# ----------------------------------------------------------------------------------------------------- the rehearsal

def rehearsal():
    """Two gloo processes go through a run of the paper's preset, with few and small steps."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.jsonl"
        repeat_records(data)
        print(f"{RECORDS} records, {data.stat().st_size / 1e6:.0f} MB; the paper's preset, but 1 step a stage, of 1 record an "
              "expert, 64 queries and 8 records, and 64 held-out records", flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
                   "--rdzv_endpoint", "localhost:0", __file__, data, f"{folder}/run", time.time()]
        subprocess.run([str(part) for part in command], check=True, 
                       env={"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | os.environ)


def repeat_records(path):
    """Our records again and again, each time with another suffix, so that all queries differ."""
    records = load_records(HERE / "persona_cot.jsonl")
    with open(path, "w") as file:
        for i in range(RECORDS):
            record = records[i % len(records)]
            file.write(json.dumps(record | {"query": f"{record['query']} ({i // len(records)})"}, ensure_ascii=False) + "\n")


class Stopwatch:
    """Prints what each part took: its seconds, those of them on a core (all threads together), and the largest memory of
    this process so far.
    """

    def __init__(self, start):
        self.start = start
        self.last = start
        self.last_cpu = 0
        self.part("python and torch started")

    def part(self, what, times=1):
        now = time.time()
        cpu = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"process {process_rank()} {what:56} {(now - self.last) / times:8.3f} s {(cpu - self.last_cpu) / times:8.3f} s CPU "
              f"{peak:6.2f} GiB  at {now - self.start:6.1f} s", flush=True)
        self.last = time.time()
        self.last_cpu = time.process_time()


def rehearse():
    """What train.py does in one process, part by part."""
    data, out, start = sys.argv[1:]
    sys.argv = ["train.py", "--preset", "paper", "--data", data, "--out", out, "--steps1", "1", "--batch1", "1", "--steps2", "1",
                "--steps3", "1", "--batch3", "8", "--micro-batch", "4", "--held-out", "64"]
    settings = parse_arguments("")
    with joined_processes(torch.device("cpu")) as device:
        watch = Stopwatch(float(start))
        if process_rank() == 0:
            records = load_records(settings.data)
            watch.part("reading and checking the records")
            open_run(settings, [1, 2, 3])
            write_examples(settings, records)
            watch.part("tokenizing them and writing the token ids")
            del records
        dist.barrier()
        watch.part("waiting for process 0")
        training, held_out = read_examples(settings)
        watch.part("reading the token ids")
        model = build(vars(settings), device, settings.dtype)
        watch.part("loading the base and the encoder")
        for stage in (1, 2, 3):
            rehearse_stage(model, stage, training, settings, watch)
        if process_rank() == 0:
            save_run(model, settings, with_router=True)
        watch.part("saving experts and router")
        evaluate(model, held_out, training, settings, {}, True, [])
        watch.part(f"evaluating {len(held_out)} held-out records in three ways")
        if process_rank() == 0:
            open_run(replace(settings, resume=True), [1, 2, 3])
            load_state(state_file(settings, 3), model)
        watch.part("resuming: opening the run, reading a state")
        if process_rank() == 0:
            print_tokens(training)


def rehearse_stage(model, stage, training, settings, watch):
    subsets = expert_subsets(training)
    groups = trait_groups(training)
    watch.part(f"stage {stage}: indexing P_i and the groups")
    paper = PRESETS["paper"]
    full = replace(settings, batch1=paper["batch1"], batch3=paper["batch3"])
    for step in range(10):
        make_batch(stage, step, training, subsets, groups, full)
    watch.part(f"stage {stage}: choosing a batch of the paper's size", times=10)
    run_stage(model, stage, 0, training, settings, received=[])
    watch.part(f"stage {stage}: indexing again, a step, its state saved twice")


def print_tokens(examples):
    for column in ("prompt", "answer", "query"):
        lengths = [len(getattr(example, column)) for example in examples]
        print(f"{column}: {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most")


# ------------------------------------------------------------------------------------------------- what a run costs

# mean and largest lengths in tokens, as --rehearsal prints them: of our records by the tokenizer of `tiny`, whose 4,096 words
# make more tokens of a text than the 49,152 to 128,256 of the models below, so what follows is an upper bound
PROMPT, ANSWER, QUERY = 55, 165, 50
LONGEST = 512
MFU = 0.3                           # the assumed share of the GPU's peak: no GPU was at hand to measure it
RANK, EXPERTS = 8, 10


def block_parameters(c):
    """The weights of one block of a Config."""
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    return c.hidden_size * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size


def expert_parameters(c):
    """A and B of one expert in one block."""
    d, f = c.hidden_size, c.intermediate_size
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    return RANK * (2 * (d + heads) + 2 * (d + kv) + 3 * (d + f))


def attention_flops(c, length):
    """Forward, a token of a sequence of that length, in one block: q kᵀ and the sum of v, half of each masked."""
    return 2 * length * c.num_attention_heads * c.head_dim


def base_flops(c, prompt, answer, checkpointing):
    """Training FLOPs of one record through the frozen base with its experts.

    A frozen weight has its product forward and the gradient of its input backward: 2 x 2 a weight and token. What is
    trained, and attention, whose two factors both get gradient, have three. --checkpointing runs the blocks forward again.
    """
    length = prompt + answer
    linear = 2 * block_parameters(c)
    trained = 2 * EXPERTS * expert_parameters(c) + attention_flops(c, length)
    block = 2 * linear + 3 * trained
    if checkpointing:
        block += linear + trained
    head = 2 * 2 * c.vocab_size * c.hidden_size
    return length * c.num_hidden_layers * block + answer * head


def encoder_flops(c, query, checkpointing):
    """Training FLOPs of one query through the encoder, all of whose weights are trained."""
    block = 2 * block_parameters(c) + attention_flops(c, query)
    return query * c.num_hidden_layers * block * (4 if checkpointing else 3)


def training_memory(c, tokens, response_tokens, a, weight_bytes=None, checkpointing=False):
    """Bytes that a training step of stage 1 takes: (weights, experts with gradients and AdamW's moments, activations).

    c is a Config, a the bytes of an activation (2 for bf16). Kept a token and layer for the backward pass: the inputs and
    outputs of both norms (4 d), q, k, v, the attention's output before and after its transposition ((3 H + 2 K) c), gate,
    silu(gate), up and their product (4 f), and A x and w ⊙ A x of seven projections (14 E r). Of the logits the
    fp32 log-softmax is kept; as they come and as gradient they are there in parts of LOGITS_AT_ONCE.
    """
    matrices = 1 if c.tie_word_embeddings else 2
    weights = matrices * c.vocab_size * c.hidden_size + block_parameters(c) * c.num_hidden_layers
    block = block_activations(c, a) + a * 14 * EXPERTS * RANK
    kept = block * c.num_hidden_layers
    if checkpointing:
        kept = a * c.hidden_size * c.num_hidden_layers + block
    return (weights * (weight_bytes or a), expert_parameters(c) * EXPERTS * c.num_hidden_layers * 16,
            tokens * kept + response_tokens * c.vocab_size * 4 + LOGITS_AT_ONCE * (a + 4))


def encoder_memory(c, tokens, a, checkpointing=False):
    """Bytes that training the encoder takes: (fp32 weights, gradients and two moments, plus copies of type a; activations)."""
    count = c.vocab_size * c.hidden_size + block_parameters(c) * c.num_hidden_layers
    kept = block_activations(c, a) * c.num_hidden_layers
    if checkpointing:
        kept = a * c.hidden_size * c.num_hidden_layers + block_activations(c, a)
    return count * (16 + (a if a < 4 else 0)), tokens * kept


def block_activations(c, a):
    """Bytes that a block without experts keeps for each token."""
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    return a * (4 * c.hidden_size + 3 * heads + 2 * kv + 4 * c.intermediate_size)


def shape(**figures):
    return Config(rms_norm_eps=1e-5, max_position_embeddings=8192, rope_theta=1e4, rope_scaling=None, qkv_bias=False,
                  o_bias=False, **figures)


LLAMA_8B = shape(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)
SMOLLM2_2B = shape(vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
                   num_key_value_heads=32, head_dim=64, tie_word_embeddings=True)
QWEN_05B = shape(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, head_dim=64, tie_word_embeddings=True)

# base, GPUs, GiB of each, its peak in bf16 FLOP/s (A100 80 GB, RTX 4090), rows of a micro-batch, --checkpointing, command
CASES = [
    ("Llama-3.1-8B", LLAMA_8B, 8, 80, 312e12, 8, False,
     "torchrun --nproc_per_node 8 train.py --base llama-3.1-8b --preset paper --micro-batch 8 --data FILE"),
    ("SmolLM2-1.7B", SMOLLM2_2B, 1, 24, 165e12, 8, True,
     "python train.py --base smollm2-1.7b --preset paper --micro-batch 8 --checkpointing --data FILE"),
]


def stage_costs(c, gpus, rows, checkpointing):
    """Each stage -> (FLOPs of all GPUs together, bytes on each).

    The rows of Eq. 8 are shared among the GPUs; the router's queries every one of them goes through, for its loss is over
    the pairs of a whole batch.
    """
    paper = PRESETS["paper"]
    record = base_flops(c, PROMPT, ANSWER, checkpointing)
    query = gpus * encoder_flops(QWEN_05B, QUERY, checkpointing)
    # memory at the longest rows that a micro-batch may have, and queries padded to twice their mean
    base, experts, kept = training_memory(c, rows * LONGEST, rows * (LONGEST - PROMPT), 2, checkpointing=checkpointing)
    weights, router2 = encoder_memory(QWEN_05B, paper["batch2"] * 2 * QUERY, 2, checkpointing)
    encoder = weights / 18                          # its parameters: fp32 and bf16 copy, gradient and two moments are 18 bytes
    _, router3 = encoder_memory(QWEN_05B, paper["batch3"] * 2 * QUERY, 2, checkpointing)
    return [
        (paper["steps1"] * paper["batch1"] * EXPERTS * record, base + experts + kept + 4 * encoder),
        (paper["steps2"] * paper["batch2"] * query, base + experts / 4 + weights + router2),
        (paper["steps3"] * paper["batch3"] * (record + query), base + experts + kept + weights + router3),
    ]


def cost():
    """The table of docs/scale.md."""
    print(f"{PROMPT} tokens of prompt, {ANSWER} of answer and {QUERY} of query on average; MFU {MFU:.0%}, assumed; memory at rows "
          f"of {LONGEST} tokens")
    for name, c, gpus, size, peak, rows, checkpointing, command in CASES:
        print(f"\n{name}, {gpus} x {size} GB at {peak / 1e12:.0f} TFLOP/s: {command}")
        print("| stage | FLOPs | GPU-hours | hours | memory a GPU |")
        print("|---|---|---|---|---|")
        total = 0
        for stage, (flops, memory) in enumerate(stage_costs(c, gpus, rows, checkpointing), 1):
            hours = flops / (peak * MFU) / 3600
            total += hours
            print(f"| {stage} | {flops:.1e} | {hours:.1f} | {hours / gpus:.1f} | {memory / 2**30:.1f} GiB |")
        print(f"| all | | {total:.1f} | {total / gpus:.1f} | |")


def memory_table():
    """The table of docs/scale.md: Llama-3.1-8B, ten rank-8 experts, Qwen2.5-0.5B as encoder, bf16."""
    print("micro-batch (512 tokens a row, 350 of response, 100 of query) | stage 1 | with --checkpointing | stage 2 | stage 3")
    for rows in (1, 4, 16):
        one, slim = (training_memory(LLAMA_8B, rows * 512, rows * 350, 2, checkpointing=k) for k in (False, True))
        two = encoder_memory(QWEN_05B, rows * 100, 2)
        print(rows, *(f"{sum(x) / 2**30:.1f} GiB" for x in (one, slim, (one[0], *two), (*one, *two))), sep=" | ")


if __name__ == "__main__":
    run_program(rehearse)
