"""Train PersonaFuse (section 4.3): experts, then router, then all together.

    python train.py --stage all                                           the embedded tiny base, minutes on a laptop
    python train.py --stage all --base smollm2
    python train.py --stage all --base llama-3.1-8b --preset paper
    python train.py --stage all --resume                                  go on where a run was stopped
    torchrun --nproc_per_node 8 train.py --stage all --base llama-3.1-8b --preset paper

    stage      trains                         a step's batch                          loss
    1 experts  A and B of the ten experts     --batch1 records for each expert i,     Eq. 8, w = one-hot(i)
                                              from P_i = {(q, r) : p_i = 1}
    2 router   encoder f_θ, embeddings e      --batch2 queries, --group of each p     Eq. 6
    3 joint    experts, encoder, embeddings   --batch3 records                        Eq. 2, w from the router
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import (TRAITS, UserError, draw, load_records, read_lines, replacing, run_program, split, tokenize,
                  write_json)
from lora import clip_experts, save_experts
from losses import contrastive_loss, cosine, joint_loss, lm_loss, router_loss, trait_loss
from personafuse import HERE, absolute, build, default_encoder, model_table, pad, pick_device, pick_dtype, response_batch
from router import average_precision, pole_auc

# "tiny" is tuned on the embedded base, "quick" is for real ones on a laptop, "paper" is section 4.3 and appendix A
PRESETS = {
    "tiny": dict(steps1=100, batch1=4, lr1=6e-3, steps2=120, batch2=32, group=4, lr2=2e-3, lr_e=1e-2, steps3=30, batch3=32,
                 lr3=1e-3, margin=0.0, pooling="words", max_length=512, micro_batch=10),
    "quick": dict(steps1=40, batch1=2, lr1=5e-4, steps2=60, batch2=32, group=4, lr2=1e-4, lr_e=1e-2, steps3=10, batch3=16,
                  lr3=5e-5, margin=0.0, pooling="last", max_length=512, micro_batch=4),
    "paper": dict(steps1=1000, batch1=256, lr1=1e-4, steps2=1500, batch2=64, group=64, lr2=1e-4, lr_e=1e-4, steps3=300,
                  batch3=32, lr3=1e-5, margin=0.0, pooling="last", max_length=2048, micro_batch=32),
}
VARIANTS = {"personafuse": "response", "direct": "naive_response", "human-like": "human_like_response",
            "cot-finetuned": "response"}            # what is trained -> the key of the answer that it is trained on
FREE_ON_RESUME = {"device", "micro_batch", "checkpointing", "save_every", "out"}        # change no result beyond rounding


# ----------------------------------------------------------------------------------------------------------- batches

def make_batch(stage, step, examples, s):
    """The rows of one step: (example, w or None, share) triples, a function of (seed, stage, step) alone.

    w is the one-hot of stage 1; share is what each response token of the row counts in Eq. 8. In stage 1 a row with a
    one-hot w sends gradient to its own expert alone, and each expert's tokens are averaged on their own: one batch
    trains all ten experts, each exactly as if alone.
    """
    def tokens(rows):
        return sum(len(r["answer"]) for r in rows)

    if stage == 1:
        batch = []
        for i in range(len(s.names)):
            subset = [r for r in examples if s.variant != "personafuse" or r["p"][i]]               # P_i
            count = s.batch1 * len(TRAITS) // len(s.names)               # a lone LoRA sees as many records
            rows = [subset[j] for j in draw(len(subset), count, step, s.seed, 1, i)] if subset else []
            one_hot = torch.eye(len(s.names))[i]
            batch += [(r, one_hot, 1 / tokens(rows)) for r in rows]
        return sorted(batch, key=lambda row: len(row[0]["prompt"]) + len(row[0]["answer"]))     # like lengths pad little
    if stage == 2:
        rows = []
        for k in draw(len(examples), max(1, s.batch2 // s.group), step, s.seed, 2):
            others = [r for r in examples if r["p"] == examples[k]["p"] and r is not examples[k]]
            rng = np.random.default_rng([s.seed, 2, step, k])
            rows += [examples[k]] + [others[j] for j in rng.permutation(len(others))[:s.group - 1]]
        return sorted(((r, None, 0.0) for r in rows), key=lambda row: len(row[0]["query"]))
    rows = [examples[j] for j in draw(len(examples), s.batch3, step, s.seed, 3)]
    w = torch.ones(1) if len(s.names) == 1 else None
    return sorted(((r, w, 1 / tokens(rows)) for r in rows), key=lambda row: len(row[0]["prompt"]) + len(row[0]["answer"]))


# ------------------------------------------------------------------------------------------------------ one step

def compute_gradients(model, stage, batch, s, world=1, rank=0):
    """Leave the gradient of the stage's loss over the whole batch in .grad; return the losses as a dict of floats.

    The batch is cut twice, into the processes' shares and those into parts of micro_batch rows, with the same result:
    token shares are known beforehand (Eq. 8), and Eq. 5, which pairs all rows, is computed on all embeddings h at once.
    For that, h is embedded part by part, the loss is taken back to h, and from there into the encoder, part by part.
    """
    rows, fixed_w, share = zip(*batch)
    own = list(range(rank, len(rows), world))                           # this process's rows
    parts = [own[i:i + s.micro_batch] for i in range(0, len(own), s.micro_batch)]
    device, losses = model.device, {}
    if fixed_w[0] is not None:
        w = torch.stack(fixed_w).to(device)
    if stage > 1 and model.router:
        queries = [pad([rows[i]["query"] for i in part], device) for part in parts]
        with torch.set_grad_enabled(len(parts) == 1):                   # with one part, one pass is enough
            embedded = [model.router.embed(*q, checkpointing=s.checkpointing) for q in queries]
        h = torch.zeros(len(rows), model.router.e.shape[1], device=device)              # (B, d)
        for part, h_part in zip(parts, embedded):
            h[part] = h_part.detach()
        if world > 1:
            dist.all_reduce(h)
        h.requires_grad_()
        p = torch.tensor([r["p"] for r in rows], device=device)                         # (B, E)
        contrastive, trait = contrastive_loss(cosine(h, model.router.e), p, s.margin), trait_loss(h, p)
        router = router_loss(contrastive, trait, s.loss_alpha, s.beta)
        w = model.router.weights(h)                                                     # (B, E), Eq. 1
        losses = {"contrastive": contrastive.item(), "trait": trait.item(), "router": router.item()}
    if stage != 2:
        w_leaf = w.detach().requires_grad_(w.requires_grad)
        w_leaf.grad = torch.zeros_like(w)                               # a process may have no row of a small batch
        lm = torch.zeros((), device=device)
        for part in parts:
            tokens, targets = response_batch([rows[i] for i in part], device)
            hidden = model.response_hidden(tokens, targets, w_leaf[part], s.checkpointing)      # (N, d)
            per_token = torch.tensor([share[i] for i in part for _ in rows[i]["answer"]], device=device)    # (N,)
            loss = lm_loss(model.base.logits(hidden), targets[targets >= 0], per_token)
            loss.backward()
            lm += loss.detach()
        if world > 1:
            dist.all_reduce(lm)
        losses["lm"] = lm.item()
    if stage > 1 and model.router:
        if stage == 2:
            (router / world).backward()                                 # every process has the whole loss: 1/world each
        else:                           # Eq. 2; Σ w · dL_lm/dw has the gradient of L_lm, and carries it on into the router
            joint_loss((w * w_leaf.grad).sum(), router / world, s.gamma).backward()
            losses["joint"] = joint_loss(losses["lm"], losses["router"], s.gamma)
        if world > 1:
            dist.all_reduce(h.grad)
        for k, (q, part) in enumerate(zip(queries, parts)):
            again = embedded[0] if len(parts) == 1 else model.router.embed(*q, checkpointing=s.checkpointing)
            again.backward(h.grad[part])
    if world > 1:       # plain all-reduce rather than DistributedDataParallel: only the few trained tensors need it, once
        for t in model.parameters():                                    # a step, after the by-hand backward above
            if t.requires_grad:
                t.grad = torch.zeros_like(t) if t.grad is None else t.grad
                dist.all_reduce(t.grad)
    return losses


def trained(model, stage):
    """(name, parameter) of what a stage trains, in a fixed order."""
    return [(name, t) for name, t in model.named_parameters()
            if (stage != 2 and name.endswith((".A", ".B"))) or (stage != 1 and name.startswith("router."))]


# ------------------------------------------------------------------------------------------------------------ state

def save_state(path, model, optimizer, stage, step, done, s):
    """One file holds all of a stage: what it trains, AdamW's two moments, and where it stands; renamed into place whole."""
    names, params = zip(*trained(model, stage))
    tensors = {name: t.detach() for name, t in zip(names, params)}
    if not done:
        for name, t in zip(names, params):
            if t in optimizer.state:
                tensors["exp_avg " + name] = optimizer.state[t]["exp_avg"]
                tensors["exp_avg_sq " + name] = optimizer.state[t]["exp_avg_sq"]
    about = {"stage": stage, "step": step, "done": done, "settings": settings_of(s)}
    with replacing(path) as tmp:
        save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, tmp, metadata={"personafuse": json.dumps(about)})


def load_state(path, model, optimizer=None):
    """Read what `save_state` wrote into model (and optimizer); returns its {"stage", "step", "done", "settings"}."""
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            about = json.loads(file.metadata()["personafuse"])
            for name, t in trained(model, about["stage"]):
                t.copy_(file.get_tensor(name))
                if optimizer and "exp_avg " + name in file.keys():
                    optimizer.state[t] = {"step": torch.tensor(float(about["step"]), device=t.device),
                                          "exp_avg": file.get_tensor("exp_avg " + name).to(t.device),
                                          "exp_avg_sq": file.get_tensor("exp_avg_sq " + name).to(t.device)}
    except Exception as e:                                          # safetensors' own type, KeyError, OSError, ...
        raise UserError(f"cannot read the saved state {path}: {e}; without that file the stage starts again")
    return about


# ------------------------------------------------------------------------------------------------------- evaluation

def evaluate(model, examples, training, s, loss_base, routed):
    """What a student wants to see of the held-out records after a stage: response loss per token with and without
    experts, and how well the router's weights rank the right experts, beside rankings that know nothing of the query."""
    p = np.array([r["p"] for r in examples])                                            # (n, E)

    def loss(w):
        nll, counts, _ = model.response_nll(examples, w)
        return round((nll.sum() / counts.sum()).item(), 4)

    seen = {"loss_base": loss_base or loss(None)}
    if s.variant != "personafuse":
        return seen | {"loss_lora": loss(torch.ones(len(examples), 1, device=model.device))}
    seen["loss_oracle"] = loss(torch.tensor(p / p.sum(axis=1, keepdims=True), dtype=torch.float32, device=model.device))
    if routed:
        w = model.route([r["query"] for r in examples])                                 # (n, E)
        seen["loss_router"] = loss(w)
        seen["map"] = round(average_precision(w.cpu().numpy(), p).mean(), 4)
        seen["auc"] = {name: round(a, 4) for name, a in zip(TRAITS, pole_auc(w.cpu().numpy(), p)) if not np.isnan(a)}
        rng = np.random.default_rng(0)
        seen["map_chance"] = round(np.mean([average_precision(rng.random(p.shape), p).mean() for _ in range(200)]), 4)
        prior = np.mean([r["p"] for r in training], axis=0)                             # (E,)
        seen["map_prior"] = round(average_precision(np.tile(prior, (len(p), 1)), p).mean(), 4)
    return seen


def print_evaluation(seen, n):
    print(f"  held out, {n} records: response loss per token {seen['loss_base']:.3f} bare base", end="")
    for key, what in (("loss_lora", "with the LoRA"), ("loss_oracle", "experts mixed by p"),
                      ("loss_router", "by the router")):
        if key in seen:
            print(f", {seen[key]:.3f} {what}", end="")
    print()
    if "map" in seen:
        print(f"  router: mean average precision {seen['map']:.3f} (chance {seen['map_chance']:.3f}, always the commonest "
              f"traits {seen['map_prior']:.3f})")
        auc = [f"{seen['auc'][name]:.2f}" if name in seen["auc"] else "-" for name in TRAITS]
        print("  AUC, high/low:", ", ".join(f"{TRAITS[i].split()[1]} {auc[i]}/{auc[i + 1]}" for i in range(0, 10, 2)))


# ------------------------------------------------------------------------------------------------------------- a run

def settings_of(s):
    return {k: v for k, v in vars(s).items() if k not in ("stage", "resume", "preset")}


def refuse_difference(s, theirs, folder, keys=None):
    """UserError naming the first setting in which this command differs from the run that it would go on with."""
    for key, value in settings_of(s).items():
        if key not in FREE_ON_RESUME and (keys is None or key in keys) and theirs.get(key) != value:
            raise UserError(f"{folder} was made with {key} = {theirs.get(key)!r}, this command says {value!r}: "
                            f"give the same settings, or another --out")


def move_aside(folder):
    """out/tiny becomes out/tiny.1 (or the next free number): nothing is ever overwritten."""
    n = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
    folder.rename(f"{folder}.{n}")
    print(f"{folder} holds a run already; it is now {folder}.{n}")
    return Path(f"{folder}.{n}")


def open_run(out, s, stages):
    """Make the run's folder ready; returns the stage and step to start at."""
    states = {n: out / f"stage{n}.safetensors" for n in (1, 2, 3)}
    begun = [n for n in (1, 2, 3) if states[n].exists()]
    earlier = [n for n in (1, 2) if n < stages[0] and not (n == 2 and len(s.names) == 1)]
    if s.resume:
        if not begun:
            raise UserError(f"there is nothing to resume in {out}: start without --resume")
        about = read_about(states[begun[-1]])
        refuse_difference(s, about["settings"], out)
        if (out / "metrics.jsonl").exists():                            # forget what was logged after the saved step
            lines = [json.loads(line) for _, line in read_lines(out / "metrics.jsonl")]
            with replacing(out / "metrics.jsonl") as tmp:
                tmp.write_text("".join(json.dumps(m) + "\n" for m in lines if (m["stage"], m["step"], "held_out" in m)
                                       <= (about["stage"], about["step"], False)))
        return (about["stage"], about["step"])
    for n in earlier:
        if n not in begun or not read_about(states[n])["done"]:
            raise UserError(f"stage {stages[0]} starts from what stage {n} wrote, and {out} has no finished stage {n}: "
                            f"run --stage {n} first, or --stage all")
        refuse_difference(s, read_about(states[n])["settings"], out,
                          {"base", "encoder", "variant", "rank", "alpha", "pooling", "data_sha256", "seed"})
    if out.exists() and any(out.iterdir()) and (not earlier or any(n >= stages[0] for n in begun)):
        old = move_aside(out)
        for n in earlier:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / states[n].name, states[n])
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"cannot write into {out}: {e.strerror}")
    return (stages[0], 0)


def read_about(path):
    """Where a state file stands, without its tensors."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["personafuse"])
    except Exception as e:
        raise UserError(f"cannot read the saved state {path}: {e}; remove that file and the stage starts again")


def log(out, line):
    try:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {out / 'metrics.jsonl'}: {e.strerror}; --resume goes on from the last saved step")


def export(model, out, s, routed):
    """What others read: every expert in peft's format, the router, and the settings."""
    save_experts(model.base, s.names, out, str(s.base))
    if routed and model.router:
        with replacing(out / "router.safetensors") as tmp:
            save_file({k: t.detach().cpu().contiguous() for k, t in model.router.named_parameters()}, tmp)
    write_json(out / "personafuse.json", settings_of(s))


def run_stage(model, stage, first, examples, s, out, stop, world, rank):
    """Steps first, first+1, ... of one stage, from its saved state if there is one."""
    steps, lr = ((s.steps1, s.lr1), (s.steps2, s.lr2), (s.steps3, s.lr3))[stage - 1]
    path, lead = out / f"stage{stage}.safetensors", rank == 0           # one process prints and writes
    params = trained(model, stage)
    model.requires_grad_(False)                                         # frozen means frozen ...
    for _, t in params:
        t.requires_grad_(True)                                          # ... and this is all that a stage trains
    lr_e = s.lr_e if stage == 2 else lr
    optimizer = torch.optim.AdamW([{"params": [t], "peak": lr_e if name == "router.e" else lr} for name, t in params],
                                  weight_decay=0.0, fused=True)
    if stage == 2 and first == 0:               # e starts at the class means of h, not at random; 4,096 queries tell them
        known = examples[:4096]
        model.router.init_embeddings(model.embed([r["query"] for r in known]), torch.tensor([r["p"] for r in known]))
    if path.exists():
        load_state(path, model, optimizer)
    elif lead:
        save_state(path, model, optimizer, stage, 0, False, s)
    title = f"stage {stage}, {('experts', 'router', 'joint')[stage - 1]}"
    progress = tqdm(range(first, steps), title, steps, initial=first, disable=not lead)
    for step in progress:
        began = time.time()
        batch = make_batch(stage, step, examples, s)
        losses = compute_gradients(model, stage, batch, s, world, rank)
        norm = clip_experts(model.base, len(s.names), s.clip) if stage == 1 else \
            torch.nn.utils.clip_grad_norm_([t for _, t in params], s.clip)
        if not (torch.isfinite(norm).all() and np.isfinite(list(losses.values())).all()):
            raise UserError(f"stage {stage}, step {step}: the loss or its gradient is not finite ({losses}); stopped before "
                            f"it reached the weights. The last good state is in {path}: look for NaN in the base's "
                            f"weights, or lower the learning rate")
        for group in optimizer.param_groups:                            # 5% warm-up, then a straight line down to zero
            group["lr"] = group["peak"] * min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if world > 1:                                                   # a signal to one process stops all at this step
            flag = torch.tensor(float(len(stop)), device=model.device)
            dist.all_reduce(flag)
            stop += [signal.SIGTERM] * int(flag.item() > len(stop))
        if lead:
            if stage == 1:
                losses["lm"] /= len(s.names)                            # of one expert, as the others see it
            main_loss = losses.get("joint", losses.get("router", losses.get("lm")))
            count = sum(len(r["query"]) if stage == 2 else len(r["prompt"]) + len(r["answer"]) for r, _, _ in batch)
            speed = count / (time.time() - began)
            progress.set_postfix_str(f"loss {main_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            log(out, {"stage": stage, "step": step + 1, **losses, "grad_norm": norm.max().item(), "lr": lr,
                      "tokens_per_s": round(speed)})
            if step + 1 < steps and (stop or (step + 1) % s.save_every == 0):
                save_state(path, model, optimizer, stage, step + 1, False, s)
        if stop and step + 1 < steps:
            progress.close()
            raise UserError(f"interrupted; saved after step {step + 1} of stage {stage}: "
                            "the same command with --resume goes on")
    progress.close()
    if lead:
        save_state(path, model, optimizer, stage, steps, True, s)


def main():
    s = parse_arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))       # torchrun sets both
    device = pick_device(s.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stop = []                                       # Ctrl-C and SIGTERM end the run after the step; a second Ctrl-C at once

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    answer = VARIANTS[s.variant]
    training, held = split(load_records(s.data, (answer,)))
    stages = [n for n in ([1, 2, 3] if s.stage == "all" else [int(s.stage)]) if not (n == 2 and s.variant != "personafuse")]
    out = Path(s.out)
    at = [open_run(out, s, stages) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(at)
    (stage_at, step_at), loss_base = at[0], None
    model = build(vars(s), device, pick_dtype(s.dtype, device))
    records = len(training) + len(held)
    training, held = (tokenize(r, model.chat, model.encoder_chat, s.max_length, answer) for r in (training, held))
    if rank == 0 and len(training) + len(held) < records:
        print(f"{records - len(training) - len(held)} of {records} records left out: prompts of --max-length tokens or more")
    if not training:
        raise UserError(f"{s.data} has no record to train on")
    for n in range(1, stage_at):
        if (out / f"stage{n}.safetensors").exists():
            load_state(out / f"stage{n}.safetensors", model)
    for stage in stages:
        if stage < stage_at:
            continue
        run_stage(model, stage, step_at if stage == stage_at else 0, training, s, out, stop, world, rank)
        if rank == 0 and held:
            seen = evaluate(model, held, training, s, loss_base, routed=stage > 1)
            loss_base = seen["loss_base"]
            print_evaluation(seen, len(held))
            log(out, {"stage": stage, "step": (s.steps1, s.steps2, s.steps3)[stage - 1], "held_out": seen})
        if rank == 0:
            export(model, out, s, routed=stage > 1)
    if rank == 0:
        print(f"done: {out}; now: python sample.py --run {out} \"I feel anxious\"")
    if world > 1:
        dist.destroy_process_group()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=["1", "2", "3", "all"], default="all", help="default: all")
    add("--base", default="tiny", help="a name of the table below, owner/model on the hub, or a folder (default: tiny)")
    add("--encoder", help="the router's language model, likewise (default: the one the table gives)")
    add("--data", default=str(HERE / "persona_cot.jsonl"), help="Persona-CoT records (default: the bundled ones)")
    add("--out", help="the run's folder (default: out/<base>)")
    add("--variant", choices=VARIANTS, default="personafuse", help="or a baseline: one LoRA of the same total rank")
    add("--preset", choices=PRESETS, help="defaults for what follows (default: tiny for --base tiny, else quick)")
    for key, value in PRESETS["tiny"].items():
        add(f"--{key.replace('_', '-')}", type=type(value), choices=["last", "mean", "words"] if key == "pooling" else None,
            help=", ".join(f"{name} {preset[key]}" for name, preset in PRESETS.items()))
    add("--rank", type=int, default=8, help="r of each expert (default: 8)")
    add("--alpha", type=float, default=16, help="of each expert; ΔW is scaled by alpha/rank (default: 16)")
    add("--tau", type=float, default=1.0, help="τ of Eq. 1 (default: 1.0)")
    add("--loss-alpha", type=float, default=1.0, help="α, weight of L_contrastive (default: 1.0)")
    add("--beta", type=float, default=1.0, help="β, weight of L_trait in Eq. 6 (default: 1.0)")
    add("--gamma", type=float, default=0.2, help="γ, weight of L_router in Eq. 2 (default: 0.2)")
    add("--clip", type=float, default=1.0, help="largest gradient norm, in stage 1 of each expert (default: 1.0)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the last saved step")
    add("--save-every", type=int, default=100, help="steps between saved states (default: 100)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, slower")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), or one by name")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the frozen base (default: auto)")
    s = parser.parse_args()
    for key, value in PRESETS[s.preset or ("tiny" if s.base == "tiny" else "quick")].items():
        if getattr(s, key) is None:
            setattr(s, key, value)
    for key in ("steps1", "steps2", "steps3", "batch1", "batch2", "batch3", "group", "rank", "micro_batch", "save_every"):
        if getattr(s, key) < (0 if key.startswith("steps") else 1):
            parser.error(f"--{key.replace('_', '-')} is {getattr(s, key)}, too small")
    s.names = TRAITS if s.variant == "personafuse" else ["lora"]
    if s.variant != "personafuse":                                      # one LoRA as large as the ten together
        s.rank, s.alpha = s.rank * len(TRAITS), s.alpha * len(TRAITS)
    s.encoder = None if s.variant != "personafuse" else s.encoder or default_encoder(s.base)
    s.out = s.out or "out/" + Path(s.base).name.lower() + ("" if s.variant == "personafuse" else "-" + s.variant)
    s.base, s.encoder = (absolute(name) for name in (s.base, s.encoder))
    s.data_sha256 = hashlib.sha256("".join(line for _, line in read_lines(s.data)).encode()).hexdigest()
    return s


if __name__ == "__main__":
    run_program(main)
