"""Train PersonaFuse (section 4.3): experts, then router, then all together.

    python train.py --stage all                         the embedded tiny base, minutes on a laptop
    python train.py --stage all --base smollm2
    python train.py --stage all --base llama-3.1-8b --preset paper
    python train.py --stage all --resume                go on where a run was stopped
    torchrun --nproc_per_node 8 train.py --stage all --base llama-3.1-8b --preset paper

    stage      trains                         a step's batch                       loss
    1 experts  A and B of the ten experts     --batch1 records for each expert i,  Eq. 8, one-hot w
                                              from P_i = {(q, r) : p_i = 1}
    2 router   encoder f_θ, embeddings e      --batch2 queries, --group of each p  Eq. 6
    3 joint    experts, encoder, embeddings   --batch3 records                     Eq. 2, w by Eq. 1
"""

import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (TRAITS, expert_batch, expert_subsets, joint_batch, load_records, router_batch,
                  trait_groups)
from lora import clip_experts
from losses import contrastive_loss, cosine, joint_loss, lm_loss, router_loss, trait_loss
from personafuse import build, pick_device, response_batch
from plumbing import UserError, keep_freed_memory, run_program
from processes import (average_gradients, gradient_of, interrupted, joined_processes, my_share,
                       process_count, process_rank, shard, sum_over_processes, watch_signals)
from router import average_precision, pole_auc
from runs import (VARIANTS, load_state, log, open_run, parse_arguments, read_examples, save_run,
                  save_state, state_file, trainable, write_examples)


# ---------------------------------------------------------------------------------------- the loss

def stage_loss(model, stage, batch, settings):
    """The loss of a step, as section 4.3 has it -> (the tensor to minimise, all losses by name)."""
    if batch.fixed_w:
        # stage 1: each row's w is the one-hot of its expert (and a baseline's one LoRA has w = 1)
        w = torch.tensor(batch.fixed_w, device=model.device, requires_grad=True)    # (B, E)
        lm = response_loss(model, batch, w, settings)                               # Eq. 8
        return lm, {"lm": lm}

    # queries are short and the encoder small: all of them at once, for Eq. 5 compares pairs
    queries = [example.query for example in batch.examples]
    p = torch.tensor([example.p for example in batch.examples], device=model.device)    # (B, E)
    h = model.embed(queries, checkpointing=settings.checkpointing)                  # (B, d)
    similarity = cosine(h, model.router.e)                                          # Eq. 4, (B, E)
    contrastive = contrastive_loss(similarity, p, settings.margin)                  # Eq. 3
    trait = trait_loss(h, p)                                                        # Eq. 5
    router = router_loss(contrastive, trait, settings.loss_alpha, settings.beta)    # Eq. 6
    losses = {"contrastive": contrastive, "trait": trait, "router": router}
    if stage == 2:
        return router, losses

    # the weights are not detached: L_lm teaches the router too
    w = model.router.weights(h)                                                     # Eq. 1, (B, E)
    lm = response_loss(model, batch, w, settings)                                   # Eq. 8
    joint = joint_loss(lm, router, settings.gamma)                                  # Eq. 2
    return joint, losses | {"lm": lm, "joint": joint}


def response_loss(model, batch, w, settings):
    """Eq. 8 over the batch, in parts of micro_batch rows, shared among the processes.

    Each part runs backward at once: that fills the experts' gradients and frees what the part
    computed. What comes back has the value of L_lm and, at w (B, E), its gradient g = dL_lm/dw, so
    that the caller's loss.backward() carries it on into the router.
    """
    w_leaf = w.detach().requires_grad_()
    lm = torch.zeros((), device=model.device)
    # the base is large: only a few rows at a time go through it
    mine, counts = my_share(len(batch.examples))
    for start in range(0, len(mine), settings.micro_batch):
        part = mine[start:start + settings.micro_batch]
        examples = [batch.examples[i] for i in part]
        tokens, targets = response_batch(examples, model.device)                    # (b, T)
        hidden = model.base(tokens, w_leaf[part], checkpointing=settings.checkpointing)
        response = targets >= 0
        token_weight = []
        for i, count in zip(part, counts[start:]):
            token_weight += [batch.token_weight[i] * count] * len(batch.examples[i].answer)
        token_weight = torch.tensor(token_weight, device=model.device)              # (N,)
        # only positions that predict a response token pay for logits
        targets = targets[response]                                                 # (N,)
        loss = 0
        for some, logits in model.base.logits_in_parts(hidden[response]):           # (n, V)
            loss = loss + lm_loss(logits, targets[some], token_weight[some])
        # backward now, so that the next part finds the memory free
        loss.backward()
        lm += loss.detach()

    gradients = [gradient_of(t) for _, t in trainable(model, stage=1)]
    sum_over_processes([lm, w_leaf.grad, *gradients])
    # w - w.detach() is 0 with gradient 1: nothing is added to the value, and g arrives at w
    return lm + ((w - w.detach()) * w_leaf.grad).sum()


# ----------------------------------------------------------------------------------------- a stage

def run_stage(model, stage, first_step, examples, settings, received):
    """The steps of one stage, from first_step on; `received` are the signals that may end it."""
    steps = (settings.steps1, settings.steps2, settings.steps3)[stage - 1]
    path = state_file(settings, stage)
    is_main = process_rank() == 0                   # one process prints and writes

    # frozen means frozen: this is all that the stage trains
    model.requires_grad_(False)
    for _, t in trainable(model, stage):
        t.requires_grad_(True)
    optimizer = make_optimizer(model, stage, settings)
    if stage == 2 and first_step == 0:
        # the expert embeddings start at the class means of h; 4,096 queries tell them
        known = examples[:4096]
        with torch.no_grad():
            h = model.embed([example.query for example in known])                   # (n, d)
        model.router.init_embeddings(h, torch.tensor([example.p for example in known]))
    if path.exists():
        load_state(path, model, optimizer)
    elif is_main:
        save_state(path, model, optimizer, stage, 0, False, settings)

    # P_i and the groups that share p are looked up once, not at every step
    subsets = expert_subsets(examples) if len(settings.names) > 1 else [range(len(examples))]
    groups = trait_groups(examples)
    title = f"stage {stage}, {('experts', 'router', 'joint')[stage - 1]}"
    progress = tqdm(range(first_step, steps), title, steps, initial=first_step, disable=not is_main)
    for step in progress:
        began = time.time()
        # which records, and what each is taught to: a function of the step alone
        batch = make_batch(stage, step, examples, subsets, groups, settings)
        # the paper is in stage_loss; backward fills .grad of all that this stage trains
        loss, losses = stage_loss(model, stage, batch, settings)
        loss.backward()
        if stage > 1 and model.router:
            average_gradients(model.router.parameters())
        norm = clip_gradients(model, stage, settings)
        # a signal to one process stops all of them at this step
        stop = interrupted(received)
        losses = {name: value.item() for name, value in losses.items()}
        check_finite(losses, norm, stage, step, path)

        # AdamW moves the weights, at the rate that the schedule has for this step
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, steps)
        optimizer.step()
        # None rather than zeros: the next backward writes where it would have added
        optimizer.zero_grad(set_to_none=True)

        if is_main:
            tokens_per_s = batch_tokens(batch, stage) / (time.time() - began)
            report(progress, stage, step, losses, norm, optimizer, tokens_per_s, settings)
            if step + 1 < steps and (stop or (step + 1) % settings.save_every == 0):
                save_state(path, model, optimizer, stage, step + 1, False, settings)
        if stop and step + 1 < steps:
            progress.close()
            raise UserError(f"interrupted; saved after step {step + 1} of stage {stage}: "
                            "the same command with --resume goes on")
    # done: the next stage, or a run of it alone, starts from here
    if is_main:
        save_state(path, model, optimizer, stage, steps, True, settings)


def make_batch(stage, step, examples, subsets, groups, settings):
    """A stage's batch, a function of seed, stage and step alone: a resumed run sees the same."""
    seed = settings.seed
    if stage == 1:
        # a baseline's one LoRA sees as many records as the ten experts together
        batch_size = settings.batch1 * len(TRAITS) // len(subsets)
        return expert_batch(examples, subsets, batch_size, step, seed)
    if stage == 2:
        return router_batch(examples, groups, settings.batch2, settings.group, step, seed)
    batch = joint_batch(examples, settings.batch3, step, seed)
    if len(settings.names) == 1:
        batch.fixed_w = [[1.0]] * len(batch.examples)
    return batch


def make_optimizer(model, stage, settings):
    """AdamW without weight decay; in stage 2 the expert embeddings have a rate of their own."""
    peak = (settings.lr1, settings.lr2, settings.lr3)[stage - 1]
    groups = []
    for name, t in trainable(model, stage):
        own = stage == 2 and name == "router.e"
        groups.append({"params": [t], "peak": settings.lr_e if own else peak})
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def learning_rate(step, steps):
    """The share of the peak rate: up over the first 5% of the steps, then straight down to 0."""
    warm_up = (step + 1) / (0.05 * steps)
    decay = (steps - step) / (0.95 * steps)
    return min(warm_up, decay, 1)


def clip_gradients(model, stage, settings):
    """Gradients to norm `clip` at most, in stage 1 each expert's on its own -> the norm(s)."""
    if stage == 1:
        return clip_experts(model.base, len(settings.names), settings.clip)         # (E,)
    parameters = [t for _, t in trainable(model, stage)]
    return torch.nn.utils.clip_grad_norm_(parameters, settings.clip)


def check_finite(losses, norm, stage, step, path):
    values = list(losses.values()) + norm.flatten().tolist()
    if np.isfinite(values).all():
        return
    raise UserError(f"stage {stage}, step {step}: the loss or its gradient is not finite "
                    f"({losses}); stopped before it reached the weights. The last good state is in "
                    f"{path}: look for NaN in the base's weights, or lower the learning rate")


def batch_tokens(batch, stage):
    if stage == 2:
        return sum(len(example.query) for example in batch.examples)
    return sum(example.length for example in batch.examples)


def report(progress, stage, step, losses, norm, optimizer, tokens_per_s, settings):
    """A line of metrics.jsonl and the progress bar."""
    if stage == 1:
        losses["lm"] /= len(settings.names)         # of one expert, as the other stages see it
    loss = list(losses.values())[-1]                # the one that the stage minimises
    progress.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
    log(settings, {
        "stage": stage,
        "step": step + 1,
        **losses,
        "grad_norm": norm.max().item(),
        "lr": optimizer.param_groups[0]["lr"],
        "tokens_per_s": round(tokens_per_s),
    })


# ------------------------------------------------------------------------------ held-out evaluation

def held_out_loss(model, examples, w, received, what):
    """The response loss per token with mixing weights w (n, E), or None for the bare base.

    Each process scores its share of the examples, like lengths together.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    mine, counts = my_share(len(examples))
    total = torch.zeros(2, device=model.device)
    progress = tqdm(range(0, len(mine), 16), f"held out, {what}", leave=False,
                    disable=process_rank() > 0)
    for start in progress:
        if interrupted(received):
            progress.close()
            raise UserError("interrupted in the evaluation; the stage is saved: "
                            "the same command with --resume goes on")
        part = [order[k] for k in mine[start:start + 16]]
        count = torch.tensor(counts[start:start + 16], device=model.device)
        nll, tokens, _ = model.response_nll([examples[i] for i in part],
                                            None if w is None else w[part])
        total += torch.stack([(nll * count).sum(), (tokens * count).sum()])
    sum_over_processes([total])
    return round((total[0] / total[1]).item(), 4)


def evaluate(model, examples, training, settings, known, with_router, received):
    """The held-out examples after a stage -> a dict of figures.

    The response loss per token with and without experts, and how well the router's weights rank
    the right experts, beside rankings that know nothing of the query. `known` are losses that an
    earlier stage measured and the last one has not changed.
    """
    def loss(w, what):
        return held_out_loss(model, examples, w, received, what)

    p = np.array([example.p for example in examples])                               # (n, E)
    metrics = {"loss_base": known.get("loss_base") or loss(None, "bare base")}
    if len(settings.names) == 1:
        w = torch.ones(len(examples), 1, device=model.device)
        return metrics | {"loss_lora": loss(w, "one LoRA")}
    oracle = torch.tensor(p / p.sum(axis=1, keepdims=True), dtype=torch.float32)
    metrics["loss_oracle"] = (known.get("loss_oracle")
                              or loss(oracle.to(model.device), "experts mixed by p"))
    if not with_router:
        return metrics

    w = model.route([example.query for example in examples])                        # (n, E)
    metrics["loss_router"] = loss(w, "router")
    w = w.cpu().numpy()
    metrics["map"] = round(average_precision(w, p).mean(), 4)
    metrics["auc"] = {}
    for trait, auc in zip(TRAITS, pole_auc(w, p)):
        if not np.isnan(auc):                   # a pole that all or none of the records call for
            metrics["auc"][trait] = round(auc, 4)
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(200):
        guess = rng.random(p.shape)
        chance.append(average_precision(guess, p).mean())
    metrics["map_chance"] = round(np.mean(chance), 4)
    commonest = np.mean([example.p for example in training], axis=0)                # (E,)
    prior = np.tile(commonest, (len(p), 1))                                         # (n, E)
    metrics["map_prior"] = round(average_precision(prior, p).mean(), 4)
    return metrics


def print_evaluation(metrics, n):
    parts = [f"{metrics['loss_base']:.3f} bare base"]
    for key, what in (("loss_lora", "with the LoRA"), ("loss_oracle", "experts mixed by p"),
                      ("loss_router", "by the router")):
        if key in metrics:
            parts.append(f"{metrics[key]:.3f} {what}")
    print(f"  held out, {n} records: response loss per token {', '.join(parts)}")
    if "map" not in metrics:
        return
    print(f"  router: mean average precision {metrics['map']:.3f} (chance "
          f"{metrics['map_chance']:.3f}, always the commonest traits {metrics['map_prior']:.3f})")
    auc = [f"{metrics['auc'][name]:.2f}" if name in metrics["auc"] else "-" for name in TRAITS]
    parts = [f"{TRAITS[i].split()[1]} {auc[i]}/{auc[i + 1]}" for i in range(0, 10, 2)]
    print("  AUC, high/low:", ", ".join(parts))


# --------------------------------------------------------------------------------------------- main

def main():
    settings = parse_arguments(__doc__)
    keep_freed_memory()
    device = pick_device(settings.device, settings.base)
    with joined_processes(device) as device:
        run_stages(settings, device)


def run_stages(settings, device):
    """The run that the settings describe, from the data to the finished folder."""
    is_main = process_rank() == 0
    received = watch_signals()

    stages = [1, 2, 3] if settings.stage == "all" else [int(settings.stage)]
    if len(settings.names) == 1:
        stages = [stage for stage in stages if stage != 2]      # a baseline has no router
    start = [None]
    if is_main:
        # the data first: a bad record should not wait for 16 GB of weights
        records = load_records(settings.data, (VARIANTS[settings.variant],))
        start = [open_run(settings, stages)]
        write_examples(settings, records)
        del records
    if process_count() > 1:
        dist.broadcast_object_list(start)
    first_stage, first_step = start[0]
    training, held_out = read_examples(settings)
    if not training:
        raise UserError(f"{settings.data} has no record to train on")
    model = build(asdict(settings), device, settings.dtype)
    if settings.shard:
        shard(model.base, device)

    # what earlier stages wrote
    for stage in range(1, first_stage):
        if state_file(settings, stage).exists():
            load_state(state_file(settings, stage), model)
    known = {}
    for stage in stages:
        if stage < first_stage:
            continue
        run_stage(model, stage, first_step, training, settings, received)
        first_step = 0
        with_router = stage > 1 and model.router is not None
        if is_main:
            save_run(model, settings, with_router)
        if not held_out:
            continue
        metrics = evaluate(model, held_out, training, settings, known, with_router, received)
        # the base never changes, and stage 2 leaves the experts as they are
        unchanged = ("loss_base", "loss_oracle") if stage == 1 else ("loss_base",)
        known = {name: metrics[name] for name in unchanged if name in metrics}
        if is_main:
            print_evaluation(metrics, len(held_out))
            steps = (settings.steps1, settings.steps2, settings.steps3)[stage - 1]
            log(settings, {"stage": stage, "step": steps, "held_out": metrics})
    if is_main:
        print(f"done: {settings.out}; now: python sample.py --run {settings.out} "
              '"I feel anxious"')


if __name__ == "__main__":
    run_program(main)
