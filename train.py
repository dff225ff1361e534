"""Train PersonaFuse (section 4.3): experts, then router, then all together.

    python train.py --stage all --base smollm2          minutes on a laptop
    python train.py --stage all                         the embedded tiny base, to step through
    python train.py --stage all --base llama-3.1-8b --preset paper
    python train.py --stage all --resume                go on where a run was stopped
    torchrun --nproc_per_node 8 train.py --stage all --base llama-3.1-8b --preset paper

    stage      trains                         a step's batch                       loss
    1 experts  A and B of the ten experts     --batch1 records for each expert i,  Eq. 8, one-hot w
                                              from P_i = {(q, r) : p_i = 1}
    2 router   encoder f_θ, embeddings e      --batch2 queries, --group of each p  Eq. 6
    3 joint    experts, encoder, embeddings   --batch3 records                     Eq. 2, w by Eq. 1
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (TRAITS, VARIANTS, by_hash, expert_batch, expert_subsets, joint_batch,
                  load_records, router_batch, split, trait_groups)
from lora import clip_experts
from losses import contrastive_loss, cosine, joint_loss, lm_loss, router_loss, trait_loss
from personafuse import base_sampling, build, pad, pick_device, response_batch, save_run
from plumbing.files import HERE, UserError, file_sha256, keep_freed_memory, number, run_program
from plumbing.models import absolute, default_encoder, find_model, model_sha256, model_table
from plumbing.processes import (any_process, from_first, joined_processes, my_share, process_count,
                                process_rank, shard, sum_over_processes)
from plumbing.runs import Run
from router import average_precision

# A preset holds the defaults that belong to a base. "tiny" is tuned on the embedded one, "quick" on
# smollm2, "paper" is section 4.3 and appendix A. The last three are sample.py's.
PRESETS = {
    "tiny": dict(
        steps1=60, batch1=4, lr1=4e-3,
        steps2=200, batch2=64, group=4, lr2=2e-3, lr_e=1e-2,
        steps3=20, batch3=32, lr3=1e-3, lr3_router=1e-3,
        pooling="words", query_format="raw", encoder_layers=0, start="means",
        train_encoder=True, tau=0.05,
        margin=0.0, beta=0.1, max_length=512, micro_batch=5, held_out=512,
        save_minutes=1, temperature=0.7, top_p=0.9, repetition_penalty=1.0),
    "quick": dict(
        steps1=16, batch1=2, lr1=4e-3,
        steps2=20, batch2=32, group=4, lr2=1e-5, lr_e=1e-4,
        steps3=16, batch3=20, lr3=4e-3, lr3_router=1e-5,
        pooling="both", query_format="lead-in", encoder_layers=24, start="ridge",
        train_encoder=False, tau=0.1,
        margin=0.0, beta=0.1, max_length=224, micro_batch=4, held_out=48,
        save_minutes=1.5, temperature=0.5, top_p=0.9, repetition_penalty=1.1),
    "paper": dict(
        steps1=1000, batch1=256, lr1=1e-4,
        steps2=1500, batch2=64, group=64, lr2=1e-4, lr_e=1e-4,
        steps3=300, batch3=32, lr3=1e-5, lr3_router=1e-5,
        pooling="last", query_format="raw", encoder_layers=0, start="means",
        train_encoder=True, tau=1.0,
        margin=0.0, beta=1.0, max_length=2048, micro_batch=32, held_out=512,
        save_minutes=8, temperature=0.7, top_p=0.9, repetition_penalty=1.0),
}


# ------------------------------------------------------------------------------------------ a step

def train_step(model, optimizer, stage, batch, args, where=""):
    """One step of section 4.3 -> its losses by name, and the gradient's norm before clipping.

    Each term runs backward as soon as it is there: the gradient of a sum is that of its terms.
    """
    losses = {}
    if stage > 1 and model.router:              # a baseline has none
        # all of them at once, for Eq. 5 compares pairs
        queries = [example.query for example in batch.examples]
        p = torch.tensor([example.p for example in batch.examples], device=model.device)
        h = model.embed(queries, checkpointing=args.checkpointing)              # (B, d)
        similarity = cosine(h, model.router.e)                                  # Eq. 4, (B, E)
        contrastive = contrastive_loss(similarity, p, args.margin)              # Eq. 3
        trait = trait_loss(h, p)                                                # Eq. 5
        router = router_loss(contrastive, trait, args.loss_alpha, args.beta)    # Eq. 6
        weight = 1 if stage == 2 else args.gamma                                # of Eq. 2
        # every process computes all of it, and their gradients are summed below
        (weight * router / process_count()).backward()
        losses = {"contrastive": contrastive, "trait": trait, "router": router}

    if stage != 2:
        lm = torch.zeros((), device=model.device)
        # the base is large: only a few rows at a time go through it
        mine, counts = my_share(len(batch.examples))
        for start in range(0, len(mine), args.micro_batch):
            part = mine[start:start + args.micro_batch]
            examples = [batch.examples[i] for i in part]
            if batch.fixed_w:
                w = torch.tensor([batch.fixed_w[i] for i in part], device=model.device)
            else:
                # the weights are not detached: L_lm teaches the router too
                w = model.router(*pad([example.query for example in examples], model.device))
            token_weight = [batch.token_weight[i] * c for i, c in zip(part, counts[start:])]
            loss = response_loss(model, examples, w, token_weight, args)        # Eq. 8, w by Eq. 1
            loss.backward()
            lm += loss.detach()
        sum_over_processes([lm])
        losses["lm"] = lm / batch.experts
    if stage == 3 and model.router:
        losses["joint"] = joint_loss(lm, router, args.gamma)                    # Eq. 2

    trained = [t for _, t in trainable(model, stage) if t.grad is not None]
    sum_over_processes([t.grad for t in trained])
    norm = clip_gradients(model, stage, trained, args)
    losses = {name: value.item() for name, value in losses.items()}
    check_finite(losses, norm, where)
    optimizer.step()
    # None rather than zeros: the next backward writes where it would have added
    optimizer.zero_grad(set_to_none=True)
    return losses, norm.max().item()


def clip_gradients(model, stage, trained, args):
    """Gradients to norm `clip` at most, in stage 1 each expert's on its own -> the norm(s)."""
    if stage == 1:
        return clip_experts(model.base, model.experts, args.clip)               # (E,)
    return torch.nn.utils.clip_grad_norm_(trained, args.clip)


def check_finite(losses, norm, where):
    if np.isfinite([*losses.values(), *norm.flatten().tolist()]).all():
        return
    raise UserError(f"{where}: the loss or its gradient is not finite ({losses}); stopped before "
                    "it reached the weights: look for NaN in the base's, in fp16 try bf16, or "
                    "lower the learning rate")


def response_loss(model, examples, w, token_weight, args):
    """Eq. 8 over some rows of a batch, whose experts are mixed by w (b, E).

    token_weight: what each response token of an example counts. Made so that the losses of a
    batch's parts add up to the loss of the whole.
    """
    tokens, targets = response_batch(examples, model.device)                    # (b, T)
    hidden = model.base(tokens, w, checkpointing=args.checkpointing)            # (b, T, d)
    response = targets >= 0
    # only positions that predict a response token pay for logits
    targets = targets[response]                                                 # (N,)
    lengths = [len(example.answer) for example in examples]
    weights = torch.tensor(np.repeat(token_weight, lengths), dtype=torch.float32)
    weights = weights.to(model.device)                                          # (N,)
    loss = 0
    for some, logits in model.base.logits_in_parts(hidden[response]):           # (n, V)
        loss = loss + lm_loss(logits, targets[some], weights[some])
    return loss


# ----------------------------------------------------------------------------------------- a stage

def run_stage(model, stage, first_step, examples, args, run):
    """The steps of one stage, from first_step on."""
    steps = vars(args)[f"steps{stage}"]
    # frozen means frozen: this is all that the stage trains
    model.requires_grad_(False)
    for _, t in trainable(model, stage):
        t.requires_grad_(True)
    optimizer = make_optimizer(model, stage, args)
    if first_step > 0:
        restore(model, stage, run, optimizer)
    elif stage == 2:
        start_router(model, examples[:4096])

    # P_i and the groups that share p are looked up once, not at every step
    subsets = expert_subsets(examples) if model.experts > 1 else [range(len(examples))]
    groups = trait_groups(examples)
    if stage == 1:
        name_idle_experts(subsets)
    title = f"stage {stage}, {('experts', 'router', 'joint')[stage - 1]}"
    progress = tqdm(range(first_step, steps), title, steps, initial=first_step,
                    disable=process_rank() > 0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps)
        # a batch is a function of seed, stage and step: a resumed run sees the same
        if stage == 1:
            batch = expert_batch(examples, subsets, args.batch1, step, args.seed)
        elif stage == 2:
            batch = router_batch(examples, groups, args.batch2, args.group, step, args.seed)
        else:
            batch = joint_batch(examples, args.batch3, step, args.seed, model.router is None)
        where = f"stage {stage}, step {step + 1}"
        losses, norm = train_step(model, optimizer, stage, batch, args, where)
        # the loss that the stage minimises is the last one
        progress.set_postfix_str(f"loss {list(losses.values())[-1]:.3f}", refresh=False)
        run.log({"stage": stage, "step": step + 1, **losses, "grad_norm": norm,
                 "lr": optimizer.param_groups[0]["lr"]})
        # a signal to one process stops all of them at this step
        stop = any_process(run.stop_requested)
        if step + 1 < steps and (stop or run.save_due(step + 1)):
            run.save_state(stage, step + 1, state(model, stage, optimizer), done=False)
        if stop and step + 1 < steps:
            progress.close()
            raise UserError(f"interrupted; saved after step {step + 1} of stage {stage}: "
                            "the same command with --resume goes on")
    # done: the next stage, or a run of it alone, starts from here
    run.save_state(stage, steps, state(model, stage), done=True)


def start_router(model, examples):
    """Before the first step of stage 2: the router starts at what these training queries tell."""
    with torch.no_grad():
        queries = [example.query for example in examples]
        h = model.embed(queries, read=model.router.pool)                        # (n, d)
    model.router.start_at(h, torch.tensor([example.p for example in examples]))


def name_idle_experts(subsets):
    idle = [name for name, subset in zip(TRAITS, subsets) if not subset]
    if idle and process_rank() == 0:
        print(f"no record calls for {', '.join(idle)}: these experts stay as they are")


def trainable(model, stage):
    """(name, parameter) of what a stage trains, in a fixed order."""
    chosen = []
    for name, t in model.named_parameters():
        expert = name.endswith((".A", ".B"))
        router = name.startswith("router.")
        if name.startswith("router.encoder.") and model.router.frozen_encoder:
            continue
        if (expert and stage != 2) or (router and stage != 1):
            chosen.append((name, t))
    return chosen


def make_optimizer(model, stage, args):
    """AdamW without weight decay: a rate for the experts, one or two for the router."""
    groups = []
    for name, t in trainable(model, stage):
        peak = vars(args)[f"lr{stage}"]
        if stage == 2 and not name.startswith("router.encoder."):
            peak = args.lr_e
        if stage == 3 and name.startswith("router."):
            peak = args.lr3_router
        groups.append({"params": [t], "peak": peak})
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def learning_rate(step, steps):
    """The share of the peak rate: up over the first 5% of the steps, then straight down to 0."""
    warm_up = (step + 1) / (0.05 * steps)
    decay = (steps - step) / (0.95 * steps)
    return min(warm_up, decay, 1)


# what AdamW keeps of each parameter
MOMENTS = ["step", "exp_avg", "exp_avg_sq"]


def state(model, stage, optimizer=None):
    """What a stage trains, and AdamW's moments where they are needed to go on -> by name."""
    tensors = {}
    for name, t in trainable(model, stage):
        tensors[name] = t.detach()
        if optimizer:
            for key, moment in optimizer.state[t].items():
                tensors[f"{key} {name}"] = moment
    return tensors


def restore(model, stage, run, optimizer=None):
    """Read what `state` made, from the run's folder, into the model and the optimizer."""
    tensors, _ = run.load_state(stage)
    for name, t in trainable(model, stage):
        t.data.copy_(tensors[name])
        for key in MOMENTS:
            if optimizer and f"{key} {name}" in tensors:
                optimizer.state[t][key] = tensors[f"{key} {name}"].to(t.device)


# ------------------------------------------------------------------------------ held-out evaluation

@torch.no_grad()
def held_out_loss(model, examples, w, args, run):
    """The response loss per token with mixing weights w (n, E), or None for the bare base.

    Each process scores its share of the examples, like lengths together.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    mine, counts = my_share(len(order))
    total = torch.zeros(2, device=model.device)
    for start in tqdm(range(0, len(mine), 16), "held out", leave=False, disable=process_rank() > 0):
        if any_process(run.stop_requested):
            raise UserError("interrupted in the evaluation; the stage is saved: "
                            "the same command with --resume goes on")
        part = [order[k] for k in mine[start:start + 16]]
        count = counts[start:start + 16]
        chosen = [examples[i] for i in part]
        total[0] += response_loss(model, chosen, None if w is None else w[part], count, args)
        total[1] += sum(c * len(example.answer) for c, example in zip(count, chosen))
    sum_over_processes([total])
    return round((total[0] / total[1]).item(), 4)


def evaluate(model, held_out, training, args, known, with_router, run):
    """The held-out examples after a stage -> a dict of figures.

    The response loss per token of the first --held-out of them, with and without experts, and how
    well the router's weights rank the right experts, beside a ranking that knows nothing of the
    query. `known` are losses that an earlier stage measured and the last one has not changed.
    """
    p = np.array([example.p for example in held_out])                           # (n, E)
    weights = {"base": None}
    if model.experts == 1:
        weights["lora"] = torch.ones(len(p), 1, device=model.device)
    else:
        oracle = p / p.sum(axis=1, keepdims=True)
        weights["oracle"] = torch.tensor(oracle, dtype=torch.float32, device=model.device)
    if with_router:
        weights["router"] = model.route([example.query for example in held_out])
    examples = held_out[:args.held_out]
    metrics = dict(known)
    for name, w in weights.items():
        if f"loss_{name}" not in known:
            metrics[f"loss_{name}"] = held_out_loss(model, examples, w, args, run)
    if with_router:
        w = weights["router"].cpu().numpy()
        commonest = np.mean([example.p for example in training], axis=0)        # (E,)
        metrics["map"] = round(average_precision(w, p).mean(), 4)
        prior = np.tile(commonest, (len(p), 1))                                 # (n, E)
        metrics["map_prior"] = round(average_precision(prior, p).mean(), 4)
    return metrics


def print_evaluation(metrics, losses, ranked):
    """`losses` and `ranked`: of how many records."""
    what = {"loss_base": "bare base", "loss_lora": "with the LoRA",
            "loss_oracle": "experts mixed by p", "loss_router": "by the router"}
    parts = [f"{metrics[key]:.3f} {name}" for key, name in what.items() if key in metrics]
    print(f"  held out, {losses} records: response loss per token {', '.join(parts)}")
    if "map" in metrics:
        print(f"  router, {ranked} records: mean average precision {metrics['map']:.3f} "
              f"(always the commonest traits {metrics['map_prior']:.3f})")


# ---------------------------------------------------------------------------------------- settings

def add_run_options(parser):
    positive = number(float, 0, above=True)
    count = number(int, 1)

    add = parser.add_argument_group("the run").add_argument
    add("--stage", default="all", choices=["1", "2", "3", "all"])
    add("--base", default="tiny", help="a name of the table below, owner/model on the hub, a "
                                       "folder, or a GGUF file")
    add("--encoder", help="the router's language model (default: as the table says)")
    add("--data", default=str(HERE / "persona_cot.jsonl"), help="Persona-CoT records "
                                                                "(default: ours)")
    add("--out", help="the run's folder (default: out/<base>)")
    add("--variant", default="personafuse", choices=VARIANTS,
        help="or a baseline: one LoRA as large as the ten")
    add("--preset", choices=PRESETS, help="defaults for the options without one (default: tiny for "
                                          "--base tiny, else quick)")
    add("--resume", action="store_true", help="go on from the last saved step")
    add("--seed", type=number(int, 0, high=2**32 - 1), default=0)

    add = parser.add_argument_group("the stages").add_argument
    for stage, of in ((1, "records for each expert"), (2, "queries"), (3, "records")):
        add(f"--steps{stage}", type=number(int, 0))
        add(f"--batch{stage}", type=count, help=f"{of} in a step")
        add(f"--lr{stage}", type=positive, help="peak learning rate")
    add("--group", type=count, help="queries of a batch of stage 2 that share one p, at most")
    add("--lr-e", type=positive, help="in stage 2, of expert embeddings and map")
    add("--lr3-router", type=positive, help="in stage 3, of the router")
    add("--clip", type=positive, default=1.0, help="largest gradient norm, in stage 1 of each "
                                                   "expert")


def add_method_options(parser):
    positive = number(float, 0, above=True)
    count = number(int, 1)
    add = parser.add_argument_group("the method").add_argument
    add("--rank", type=count, default=8, help="r of each expert")
    add("--lora-alpha", type=positive, default=16, help="ΔW is scaled by alpha/rank")
    add("--query-format", choices=["raw", "chat", "lead-in"],
        help="what the encoder reads: the bare query, the prompt up to the answer, or that and the "
             "beginning of one")
    add("--encoder-layers", type=number(int, 0), help="its first blocks; 0: all")
    add("--train-encoder", action=argparse.BooleanOptionalAction,
        help="as in the paper, or only the expert embeddings and the map")
    add("--pooling", choices=["last", "mean", "both", "words"], help="see router.py")
    # not --start: torchrun takes that for one of its own
    add("--router-start", dest="start", choices=["means", "ridge"], help="see router.py")
    add("--tau", type=positive, help="τ of Eq. 1")
    add("--margin", type=number(float, -1, high=1), help="m of Eq. 3")
    add("--loss-alpha", type=number(float, 0), default=1.0, help="α of Eq. 6")
    add("--beta", type=number(float, 0), help="β of Eq. 6")
    add("--gamma", type=number(float, 0), default=0.2, help="γ of Eq. 2")

    add = parser.add_argument_group("the machine").add_argument
    add("--max-length", type=count, help="tokens of prompt and response; longer ones are cut")
    add("--micro-batch", type=count, help="rows that go through the base at a time")
    add("--checkpointing", action="store_true", help="recompute activations in backward")
    add("--shard", action="store_true", help="share the base among the processes of torchrun")
    add("--held-out", type=number(int, 1), help="held-out records whose loss is measured")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the base")
    add("--save-minutes", type=positive, help="between saved states")
    add("--save-every", type=count, help="steps between saved states, besides")


def preset_table():
    """PRESETS as text, for --help."""
    lines = [f"  {'preset':20}" + "".join(f"{name:>12}" for name in PRESETS)]
    for key in PRESETS["tiny"]:
        lines.append(f"  {key:20}" + "".join(f"{values[key]:>12}" for values in PRESETS.values()))
    return "\n".join(lines)


def parse_with_preset(parser):
    """A parser with the options of a run -> the arguments; what is not given is the preset's."""
    add_run_options(parser)
    add_method_options(parser)
    args = parser.parse_args()
    preset = args.preset or ("tiny" if args.base == "tiny" else "quick")
    # once more, now that the preset's defaults are known
    parser.set_defaults(**PRESETS[preset])
    return parser.parse_args()


def parse_arguments():
    parser = argparse.ArgumentParser(usage="train.py [options]", description=__doc__,
                                     epilog=f"{preset_table()}\n\n{model_table()}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_with_preset(parser)
    if args.variant != "personafuse":
        if args.stage == "2":
            parser.error("a baseline is one LoRA without a router: it has no stage 2")
        # of the size of the ten experts together, and a step reads as many records as theirs;
        # alpha/rank, the scale of ΔW, stays
        args.batch1 *= len(TRAITS)
        args.rank *= len(TRAITS)
        args.lora_alpha *= len(TRAITS)
    return args


def run_settings(args):
    """Every setting of a run, and what its base, its encoder and its data are -> a dict.

    All of them are looked at here, before anything is written.
    """
    settings = vars(args) | {"base": absolute(args.base), "names": TRAITS, "encoder": None,
                             "encoder_folder": None, "encoder_sha256": None}
    if not Path(args.data).is_file():
        raise UserError(f"{args.data} is no regular file: records are read more than once")
    load_records(args.data, (VARIANTS[args.variant],))
    settings["data"] = str(Path(args.data).resolve())
    settings["data_sha256"] = file_sha256(args.data)
    name = Path(settings["base"]).stem.lower()
    if args.variant == "personafuse":
        settings["encoder"] = absolute(args.encoder or default_encoder(settings["base"]))
    else:
        settings["names"] = ["lora"]
        name += "-" + args.variant
    settings["out"] = args.out or f"out/{name}"
    for what in ("base", "encoder"):
        if settings[what]:
            folder = find_model(settings[what], f"--{what}")
            settings[f"{what}_folder"] = str(folder)
            settings[f"{what}_sha256"] = model_sha256(folder)
    return settings | base_sampling(settings["base_folder"])


# -------------------------------------------------------------------------------------------- main

def read_examples(model, settings):
    """(training, held-out) Examples of the run's data, for this model."""
    answer = VARIANTS[settings["variant"]]
    training, held_out = split(load_records(settings["data"], (answer,)))
    # the first of a fixed order: more records do not move those that are evaluated
    held_out = sorted(held_out, key=by_hash)[:512]
    sides = []
    for records in (training, held_out):
        sides.append(model.examples(records, settings["max_length"], answer))
    if not sides[0]:
        raise UserError(f"{settings['data']} has no record to train on")
    kept = [example for side in sides for example in side]
    lost = len(training) + len(held_out) - len(kept)
    cut = sum(example.cut for example in kept)
    if (lost or cut) and process_rank() == 0:
        print(f"{cut} records are cut and {lost} left out: longer than --max-length, "
              f"{settings['max_length']} tokens, or than the base's context")
    return sides


def train(args, device):
    """The run that the arguments describe, from the data to the finished folder."""
    settings = from_first(lambda: run_settings(args))
    stages = [1, 2, 3] if args.stage == "all" else [int(args.stage)]
    if args.variant != "personafuse":
        stages = [stage for stage in stages if stage != 2]
    is_main = process_rank() == 0
    run = Run(settings["out"], settings, is_main)
    # everything that can be wrong is looked at before anything is moved or written
    start = from_first(lambda: run.plan(stages, args.resume))
    if start is None:
        if is_main:
            print(f"{settings['out']} is complete: there is nothing left to resume")
        return
    model = build(settings, device, args.dtype)
    training, held_out = read_examples(model, settings)
    if is_main:
        print(model.tokenizer.format_note)
    if args.shard:
        shard(model.base, device)
    from_first(run.begin)
    run.watch_signals()
    try:
        first_stage, first_step = start
        for stage in range(1, first_stage):
            if stage in run.begun():
                restore(model, stage, run)
        known = {}
        for stage in stages:
            if stage < first_stage:
                continue
            run_stage(model, stage, first_step, training, args, run)
            first_step = 0
            known = finish_stage(model, stage, training, held_out, args, known, run)
    finally:
        run.close()
    if is_main:
        print(f"done: {settings['out']}; now: python sample.py --run {settings['out']} "
              '"I feel anxious"')


def finish_stage(model, stage, training, held_out, args, known, run):
    """Write what others read, and evaluate on the held-out records -> what stays true of it in the
    next stage.
    """
    is_main = process_rank() == 0
    with_router = stage > 1 and model.router is not None
    if is_main:
        save_run(model, run.out, run.settings, with_router)
    metrics = {}
    if held_out:
        metrics = evaluate(model, held_out, training, args, known, with_router, run)
        if is_main:
            print_evaluation(metrics, min(len(held_out), args.held_out), len(held_out))
    run.log({"stage": stage, "step": vars(args)[f"steps{stage}"], "held_out": metrics})
    # the base never changes, and stage 2 leaves the experts as they are
    kept = ("loss_base", "loss_oracle") if stage == 1 else ("loss_base",)
    return {name: metrics[name] for name in kept if name in metrics}


def main():
    args = parse_arguments()
    keep_freed_memory()
    device = pick_device(args.device, args.base)
    with joined_processes(device) as device:
        train(args, device)


if __name__ == "__main__":
    run_program(main)
