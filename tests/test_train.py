"""The three stages: a step against the plain loss, what each stage trains, and runs that go on.

`plain_loss` is the yardstick: the equations over the whole batch in one piece.
"""

import copy
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (QUICK_ROUTER, ROOT, fails_in_one_line, program, succeeds, train_arguments)
from safetensors.torch import load_file, save_file
from started import Started

import train
from data import (TRAITS, Batch, expert_batch, expert_subsets, joint_batch, load_records,
                  router_batch, trait_groups)
from experiments.common import response_nll
from lora import lora_layers
from personafuse import build, load_run, response_batch
from plumbing.files import UserError
from plumbing.runs import Run

CPU = torch.device("cpu")
SETTINGS = dict(names=TRAITS, rank=4, lora_alpha=8, encoder_layers=0, train_encoder=True,
                pooling="last", query_format="raw", start="means", tau=1.0, seed=0)
ARGS = Namespace(margin=0.1, loss_alpha=0.5, beta=0.7, gamma=0.2, clip=1e9, micro_batch=100,
                 checkpointing=False)


def make_trainer(mini, data):
    """A model with all in it at random, so that everything gets gradient, and its examples."""
    settings = SETTINGS | {"base_folder": mini, "encoder_folder": mini}
    model = build(settings, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model.base):
        layer.B.data = 0.05 * torch.randn(layer.B.shape, generator=generator)
    model.router.e.data = torch.randn(10, 32, generator=generator)
    return model, model.examples(load_records(data), 120)


@pytest.fixture(scope="module")
def trainer(mini, small_data):
    return make_trainer(mini, small_data)


@pytest.fixture
def model(trainer):
    return copy.deepcopy(trainer[0])


@pytest.fixture
def examples(trainer):
    return trainer[1]


def batch_of(stage, examples, step=0):
    if stage == 1:
        return expert_batch(examples, expert_subsets(examples), 3, step, seed=0)
    if stage == 2:
        return router_batch(examples, trait_groups(examples), 12, 4, step, seed=0)
    return joint_batch(examples, 10, step, seed=0)


# -------------------------------------------------------------------------------- one step

def plain_cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def plain_router_loss(h, e, p):
    """Eq. 6 of Eq. 3 to 5, as loops; h a list of (d,), p a list of tuples."""
    B = len(h)
    contrastive = 0
    for i in range(B):
        for j in range(10):
            s = plain_cosine(h[i], e[j])
            if p[i][j]:
                contrastive = contrastive + (1 - s) ** 2 / B
            else:
                contrastive = contrastive + (s - 0.1).clamp(min=0) ** 2 / B
    pairs = [(i, j) for j in range(B) for i in range(j) if p[i] == p[j]]
    trait = sum(1 - plain_cosine(h[i], h[j]) for i, j in pairs) / max(1, len(pairs))
    return 0.5 * contrastive + 0.7 * trait


def plain_loss(model, stage, batch):
    """The stage's loss, an example at a time and in one piece, as the equations have it."""
    h = []
    for example in batch.examples:
        h.append(model.router.encoder(torch.tensor(example.query)[None])[0, -1])
    router = plain_router_loss(h, model.router.e, [example.p for example in batch.examples])
    if stage == 2:
        return router
    # Eq. 8: the mean over the tokens of a batch, in stage 1 over those of each expert
    total = [0] * 10
    count = [0] * 10
    for i, example in enumerate(batch.examples):
        if stage == 1:
            w = torch.tensor(batch.fixed_w[i])
            whose = int(w.argmax())
        else:
            s = torch.stack([plain_cosine(h[i], e) for e in model.router.e])
            w = s.exp() / s.exp().sum()
            whose = 0
        ids = torch.tensor([*example.prompt.tolist(), *example.answer.tolist()])
        logits = model.base.logits(model.base(ids[None, :-1], w[None]))[0]
        start = len(example.prompt) - 1
        total[whose] = total[whose] + F.cross_entropy(logits[start:], ids[start + 1:],
                                                      reduction="sum")
        count[whose] += len(example.answer)
    lm = sum(t / n for t, n in zip(total, count) if n)
    return lm if stage == 1 else lm + 0.2 * router


def plain_step(model, stage, batch, clip):
    """One step of plain gradient descent at rate 1 -> the loss and the largest norm.

    The gradient's norm is at most `clip`, in stage 1 that of each expert.
    """
    trained = start_stage(model, stage)
    loss = plain_loss(model, stage, batch)
    loss.backward()
    if stage == 1:
        parts = []
        for i in range(10):
            rows = slice(4 * i, 4 * i + 4)
            for name, t in trained.items():
                part = t.grad[rows] if name.endswith("A") else t.grad[:, rows]
                parts.append((i, part))
    else:
        parts = [(0, t.grad) for t in trained.values()]
    norms = torch.zeros(10)
    for i, part in parts:
        norms[i] += part.square().sum()
    norms = norms.sqrt()
    for i, part in parts:
        if norms[i] > clip:
            part *= clip / norms[i]
    for t in trained.values():
        t.data -= t.grad
    return loss.item(), norms.max().item()


def start_stage(model, stage):
    """Only what the stage trains gets gradient -> it, by name."""
    model.requires_grad_(False)
    trained = dict(train.trainable(model, stage))
    for t in trained.values():
        t.requires_grad_(True)
    return trained


def our_step(model, stage, batch, **changes):
    """The same with train.train_step."""
    trained = start_stage(model, stage)
    optimizer = torch.optim.SGD(trained.values(), lr=1)
    args = Namespace(**(vars(ARGS) | changes))
    losses, norm = train.train_step(model, optimizer, stage, batch, args)
    return list(losses.values())[-1], norm


def same_step(before, ours, plain):
    """Two models have moved by the same, to rounding."""
    ours = dict(ours.named_parameters())
    plain = dict(plain.named_parameters())
    for name, t in before.named_parameters():
        moved = plain[name].detach() - t.detach()
        difference = (ours[name].detach() - plain[name].detach()).abs().max()
        # a weight near 1 has lost 1e-7 of its own
        assert difference <= 1e-5 * moved.abs().max() + 1e-6, name
    return True


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3}, {"clip": 0.3},
                                     {"micro_batch": 4, "checkpointing": True}], ids=str)
def test_a_step_moves_the_weights_by_the_gradient_of_the_plain_loss(model, examples, stage,
                                                                    changes):
    before = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    batch = batch_of(stage, examples)
    loss, norm = our_step(model, stage, batch, **changes)
    plain_value, plain_norm = plain_step(plain, stage, batch, changes.get("clip", 1e9))
    # stage 1 tells the mean over its ten experts
    assert loss == pytest.approx(plain_value / (10 if stage == 1 else 1), rel=1e-5)
    assert norm == pytest.approx(plain_norm, rel=1e-4)
    assert same_step(before, model, plain)
    # and they have moved
    for name, t in train.trainable(before, stage):
        assert not torch.equal(t, dict(plain.named_parameters())[name]), name


def test_the_language_loss_of_stage_3_teaches_the_router_through_w(model, examples):
    """With γ = 0 there is no other way to it, and the plain loss agrees."""
    before = copy.deepcopy(model)
    batch = batch_of(3, examples)
    our_step(model, 3, batch, gamma=0.0)
    for name in ("router.e", "router.encoder.layers.0.mlp.up_proj.weight"):
        old = before.get_parameter(name)
        moved = (model.get_parameter(name) - old).detach()
        # the slope of the loss along the way that it went, from a little before and after
        losses = []
        for way in (-1, 1):
            probe = copy.deepcopy(before)
            probe.get_parameter(name).data += way * 0.02 * moved / moved.norm()
            with torch.no_grad():
                h = [probe.router.encoder(torch.tensor(r.query)[None])[0, -1]
                     for r in batch.examples]
                p = [r.p for r in batch.examples]
                joint = plain_loss(probe, 3, batch)
                losses.append(float(joint - 0.2 * plain_router_loss(h, probe.router.e, p)))
        slope = (losses[1] - losses[0]) / 0.04
        # the gradient's length is what moved, at rate 1
        assert slope == pytest.approx(-moved.norm().item(), rel=0.05), name


def test_losses_that_are_not_finite_leave_the_weights_alone(model, examples):
    for stage in (1, 3):
        broken = copy.deepcopy(model)
        broken.base.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
        before = {name: t.clone() for name, t in train.trainable(broken, stage)}
        with pytest.raises(UserError, match="not finite"):
            our_step(broken, stage, batch_of(stage, examples))
        for name, t in train.trainable(broken, stage):
            assert torch.equal(t, before[name])


def rows_of(batch, expert):
    """Of a batch of stage 1 only the rows of one expert."""
    rows = [i for i, w in enumerate(batch.fixed_w) if w[expert] == 1]
    columns = (batch.examples, batch.fixed_w, batch.token_weight)
    return Batch(*[[column[i] for i in rows] for column in columns])


def three_steps(model, examples, expert=None):
    """Three steps of AdamW in stage 1, on the rows of one expert or of all."""
    trained = start_stage(model, 1)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    args = Namespace(**(vars(ARGS) | {"clip": 0.5}))
    for step in range(3):
        batch = batch_of(1, examples, step)
        if expert is not None:
            batch = rows_of(batch, expert)
        train.train_step(model, optimizer, 1, batch, args)
    return [layer for _, layer in lora_layers(model.base)]


def test_ten_experts_in_one_batch_are_ten_separate_runs(model, examples):
    """Steps of AdamW on batches of all experts leave each as if it had trained on its own rows
    alone, clipping included.
    """
    fresh = [layer for _, layer in lora_layers(model.base)]
    together = three_steps(copy.deepcopy(model), examples)
    for i in (0, 4, 9):
        alone = three_steps(copy.deepcopy(model), examples, i)
        rows = slice(4 * i, 4 * i + 4)
        others = [k for k in range(40) if not 4 * i <= k < 4 * i + 4]
        for a, b, c in zip(alone, together, fresh):
            assert (a.A[rows] - b.A[rows]).abs().max() < 1e-5
            assert (a.B[:, rows] - b.B[:, rows]).abs().max() < 1e-5
            # and it did train
            assert (a.A[rows] - c.A[rows]).abs().max() > 1e-4
            assert torch.equal(a.A[others], c.A[others])
            assert torch.equal(a.B[:, others], c.B[:, others])


# ---------------------------------------------------------------------------------- batches

def test_queries_read_in_parts_keep_their_places(model, examples):
    queries = [example.query for example in examples[:10]]
    lengths = [len(query) for query in queries]
    assert lengths != sorted(lengths)
    with torch.no_grad():
        h = model.embed(queries, rows=3)
        for i, query in enumerate(queries):
            alone = model.router.encoder(torch.tensor(query)[None])[0, -1]
            assert (h[i] - alone).abs().max() < 1e-4


def test_only_response_tokens_are_targets(examples):
    tokens, targets = response_batch(examples[:3], CPU)
    for i, example in enumerate(examples[:3]):
        ids = [*example.prompt, *example.answer]
        assert tokens[i, :len(ids) - 1].tolist() == ids[:-1]
        assert targets[i][targets[i] >= 0].tolist() == list(example.answer)
        assert (targets[i, :len(example.prompt) - 1] == -1).all()
    assert (targets >= 0).sum() == sum(len(example.answer) for example in examples[:3])


def test_stage_2_batches_share_p_in_groups(examples):
    groups = trait_groups(examples)
    # the paper's batch: one p for all
    rows = router_batch(examples, groups, 4, 4, 0, seed=0).examples
    assert len({example.p for example in rows}) == 1
    rows = router_batch(examples, groups, 12, 4, 0, seed=0).examples
    assert 1 < len({example.p for example in rows}) <= 3


def test_stage_1_rows_come_from_the_subset_of_their_expert(examples):
    batch = batch_of(1, examples)
    for example, w in zip(batch.examples, batch.fixed_w):
        assert sorted(w) == [0] * 9 + [1]
        assert example.p[w.index(1)] == 1


# --------------------------------------------------------------------------------- a stage

def expert_rows(name, t):
    """A stacked A or B as ten rows, one for each expert."""
    if name.endswith("A"):
        return t.view(10, -1)
    return t.view(len(t), 10, -1).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("frozen_encoder", [False, True])
def test_frozen_means_frozen_and_each_stage_trains_its_own(model, examples, frozen_encoder):
    model.router.frozen_encoder = frozen_encoder
    rates = dict(lr1=1e-2, lr2=1e-2, lr_e=1e-2, lr3=1e-2, lr3_router=1e-2)
    sizes = dict(steps1=2, steps2=2, steps3=2, batch1=3, batch2=12, group=4, batch3=10, seed=0)
    args = Namespace(**(vars(ARGS) | rates | sizes))
    # nothing activates experts 1 and 8
    examples = [example for example in examples if not example.p[1] and not example.p[8]]
    # not the main process's: it writes nothing
    settings = dict(variant="personafuse", save_every=None, save_minutes=60)
    run = Run(".", settings, is_main=False)
    for stage in (1, 2, 3):
        before = {name: t.detach().clone() for name, t in model.named_parameters()}
        train.run_stage(model, stage, 0, examples, args, run)
        for name, t in model.named_parameters():
            expert = name.endswith((".A", ".B")) and stage != 2
            encoder = name.startswith("router.encoder.")
            router = name.startswith("router.") and stage != 1
            if encoder and frozen_encoder or not (expert or router):
                # to the bit
                assert torch.equal(t, before[name]), (stage, name)
            elif stage == 1:
                changed = expert_rows(name, t != before[name]).any(dim=1)
                assert changed.tolist() == [i not in (1, 8) for i in range(10)], name
            else:
                assert not torch.equal(t, before[name]), (stage, name)


# ------------------------------------------------------------------------------ whole runs

def start(mini, data, out, *more):
    return program(*train_arguments(mini, data, out, *more))


def weights(out, stage=3):
    return load_file(out / f"stage{stage}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(out):
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def steps(out):
    return [(line["stage"], line["step"]) for line in metrics(out) if "held_out" not in line]


def test_what_a_run_leaves(run):
    folders = {path.name for path in run.iterdir() if path.is_dir()}
    assert folders == {name.replace(" ", "_") for name in TRAITS}
    config = json.loads((run / "high_openness" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 16
    assert len(config["target_modules"]) == 7
    assert steps(run) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]
    last = metrics(run)[-1]["held_out"]
    assert {"loss_base", "loss_oracle", "loss_router", "map", "map_prior"} <= last.keys()


def test_the_logged_losses_are_the_equations(run, mini, small_data):
    for line in metrics(run):
        if "held_out" in line:
            continue
        if line["stage"] > 1:
            # --loss-alpha 1 and quick's --beta 0.1
            router = line["contrastive"] + 0.1 * line["trait"]
            assert line["router"] == pytest.approx(router, rel=1e-4)
        if line["stage"] == 3:
            assert line["joint"] == pytest.approx(line["lm"] + 0.2 * line["router"], rel=1e-4)


@pytest.mark.parametrize("poles", [["high openness"], ["high openness", "low neuroticism"], TRAITS])
def test_the_loss_of_stage_1_is_that_of_an_expert_with_records(mini, small_data, tmp_path, poles):
    """Printed and logged: the mean of the mean losses of those that have any; the others are named.

    Before its first step an expert is the bare base, whose loss is computed here.
    """
    data = tmp_path / "few.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for i, record in enumerate(load_records(small_data)):
            pole = poles[i % len(poles)]
            file.write(json.dumps(record | {"social_traits": [pole], "task_traits": []}) + "\n")
    out = tmp_path / "run"
    result = succeeds(*train_arguments(mini, data, out, "--stage", 1, "--steps1", 1))

    model, settings = load_run(out, CPU, torch.float32)
    training, _ = train.read_examples(model, settings)
    batch = expert_batch(training, expert_subsets(training), 2, 0, seed=0)
    nll, counts = response_nll(model, batch.examples)
    per_expert = []
    for i in range(10):
        rows = [k for k, w in enumerate(batch.fixed_w) if w[i] == 1]
        if rows:
            per_expert.append((nll[rows].sum() / counts[rows].sum()).item())
    assert len(per_expert) == len(poles)
    expected = sum(per_expert) / len(per_expert)
    assert metrics(out)[0]["lm"] == pytest.approx(expected, rel=1e-4)
    printed = re.findall(r"loss (\d+\.\d+)", result.stderr)[-1]
    assert float(printed) == pytest.approx(expected, abs=1e-3)

    others = [name for name in TRAITS if name not in poles]
    named = f"no record calls for {', '.join(others)}: these experts stay as they are"
    assert (named in result.stdout) == bool(others)


def test_the_same_command_twice_moves_the_old_run_aside_and_gives_the_same_bits(
        run, mini, small_data, tmp_path):
    out = tmp_path / "mini"
    shutil.copytree(run, out)
    result = start(mini, small_data, out)
    assert result.returncode == 0 and f"it is now {out}.1" in result.stdout
    assert same(weights(out), weights(run))
    assert same(weights(tmp_path / "mini.1"), weights(run))


def test_stage_by_stage_is_all_at_once(run, mini, small_data, tmp_path):
    out = tmp_path / "mini"

    def refused(stage, *words):
        return fails_in_one_line(start(mini, small_data, out, "--stage", stage), *words)

    assert refused(2, "no finished stage 1", "--stage 1")
    assert refused(3, "no finished stage 1")
    for stage in (1, 2, 3):
        succeeds(*train_arguments(mini, small_data, out, "--stage", stage))
        if stage == 1:
            assert refused(3, "no finished stage 2")
            asked = program("sample.py", "hi", "--run", out)
            assert fails_in_one_line(asked, "no router yet")
    assert same(weights(out), weights(run))
    # again: from what stage 2 left, not on top
    result = start(mini, small_data, out, "--stage", 3)
    assert result.returncode == 0 and f"{out}.1" in result.stdout
    assert same(weights(out), weights(run))


# --------------------------------------------------------------------- stopped and going on

def started(folder, mini, data, out, *more):
    """train.py in a process of its own, which saves after every step."""
    arguments = train_arguments(mini, data, out, "--save-every", 1, *more)
    return Started(folder, train.main, arguments)


def has_logged(out, lines):
    path = out / "metrics.jsonl"
    return path.exists() and len(path.read_text(encoding="utf-8").splitlines()) >= lines


@pytest.mark.parametrize("number, lines", [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_a_signal_saves_and_says_how_to_go_on(run, mini, small_data, tmp_path, number, lines):
    out = tmp_path / "mini"
    with started(tmp_path, mini, small_data, out) as process:
        process.wait_for(lambda: has_logged(out, lines))
        os.kill(process.processes[0].pid, number)
        result = process.wait()
    # it may have been at the last step of a stage or in an evaluation
    assert result.returncode == 0 or fails_in_one_line(result, "--resume goes on")
    succeeds(*train_arguments(mini, small_data, out, "--resume"))
    assert same(weights(out), weights(run))
    assert steps(out) == steps(run)


def killed(folder, mini, data, out, seconds, *more):
    """SIGKILL after so many seconds -> whether it came before the run's end."""
    with started(folder, mini, data, out, *more) as process:
        process.processes[0].join(seconds)
        process.processes[0].kill()
        return process.wait().returncode != 0


@pytest.mark.parametrize("router", [[], QUICK_ROUTER], ids=["paper", "quick"])
def test_killed_at_random_moments_and_resumed_ends_alike(mini, small_data, tmp_path, router):
    """SIGKILL at random moments, start-up and saving included; KILLS=50 for the long campaign."""
    succeeds(*train_arguments(mini, small_data, tmp_path / "whole", *router))
    out = tmp_path / "mini"
    moments = random.Random(0)
    kills = int(os.environ.get("KILLS", 3))
    while kills:
        resume = ["--resume"] if (out / "stage1.safetensors").exists() else []
        if killed(tmp_path, mini, small_data, out, moments.uniform(0.1, 2), *router, *resume):
            kills -= 1
        else:
            # it got through before its moment: start the next one
            assert same(weights(out), weights(tmp_path / "whole"))
            shutil.rmtree(out)
    resume = ["--resume"] if (out / "stage1.safetensors").exists() else []
    succeeds(*train_arguments(mini, small_data, out, *router, *resume))
    assert same(weights(out), weights(tmp_path / "whole"))
    assert steps(out) == steps(tmp_path / "whole")


def test_a_frozen_encoder_is_not_saved_and_the_run_answers_alike(mini, small_data, tmp_path):
    """What quick trains of the router is ten embeddings and a map: a small file."""
    out = tmp_path / "run"
    succeeds(*train_arguments(mini, small_data, out, *QUICK_ROUTER))
    saved = load_file(out / "router.safetensors")
    assert saved.keys() == {"e", "map.weight", "map.bias"}
    assert not [name for name in weights(out) if "encoder" in name]

    model, settings = load_run(out, CPU, torch.float32)
    for name, t in weights(out).items():
        assert torch.equal(model.get_parameter(name), t), name
    # Eq. 1 written out, on the first block's outputs for the prompt and the beginning of an answer
    ids = torch.tensor(model.tokenizer.encode("User: I feel anxious\nAssistant:")
                       + model.tokenizer.encode(" I want to sound"))
    with torch.no_grad():
        hidden = model.router.encoder(ids[None])[0]
        h = saved["map.weight"] @ torch.cat([hidden[-1], hidden.mean(dim=0)]) + saved["map.bias"]
        s = torch.stack([plain_cosine(h, e) for e in saved["e"]]) / settings["tau"]
    w = model.mixing_weights(["I feel anxious"])[0]
    assert len(model.router.encoder.layers) == 1
    assert w.tolist() == pytest.approx((s.exp() / s.exp().sum()).tolist(), rel=1e-4)


def test_resume_is_refused_for_another_rate_and_a_cut_state(run, mini, small_data, tmp_path):
    assert fails_in_one_line(start(mini, small_data, run, "--resume", "--lr1", 0.5), "lr1", "0.5")
    cut = shutil.copytree(run, tmp_path / "cut")
    state = cut / "stage3.safetensors"
    state.write_bytes(state.read_bytes()[:-1000])
    assert fails_in_one_line(start(mini, small_data, cut, "--resume"), state)


def test_a_complete_run_says_so_and_stays(run, mini, small_data):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = start(mini, small_data, run, "--resume")
    assert result.returncode == 0 and "complete" in result.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------- what goes wrong

def test_nan_in_the_weights_stops_before_anything_is_trained(mini, small_data, tmp_path):
    folder = shutil.copytree(mini, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    result = start(folder, small_data, tmp_path / "out")
    assert fails_in_one_line(result, "stage 1, step 1", "not finite")
    assert not (tmp_path / "out" / "stage1.safetensors").exists()


def test_an_out_that_cannot_be_written(mini, small_data, tmp_path):
    (tmp_path / "file").write_text("")
    result = start(mini, small_data, tmp_path / "file" / "run")
    assert fails_in_one_line(result, "cannot write", "file")


WITHOUT_MEANING = [
    ("--lora-alpha", 0), ("--lora-alpha", -16), ("--rank", 0), ("--tau", 0), ("--tau", "nan"),
    ("--clip", 0), ("--clip", -1), ("--clip", "inf"), ("--lr1", 0), ("--lr2", -1),
    ("--lr3", "nan"), ("--lr-e", "inf"), ("--lr3-router", 0), ("--steps1", -1), ("--batch1", 0),
    ("--group", 0), ("--micro-batch", 0), ("--max-length", 0), ("--held-out", 0),
    ("--beta", "nan"), ("--gamma", -0.1), ("--margin", 2), ("--encoder-layers", -1),
    ("--save-minutes", 0), ("--save-every", 0), ("--seed", -1), ("--seed", 10**30),
]


@pytest.mark.parametrize("option, value", WITHOUT_MEANING, ids=str)
def test_a_setting_without_a_meaning_is_refused_when_the_options_are_read(tmp_path, option, value):
    # nothing else is there yet: no base, no data
    result = program("train.py", "--base", tmp_path / "none", "--out", tmp_path / "out",
                     f"{option}={value}")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and f"argument {option}: {value}" in lines[0], result.stderr
    assert not (tmp_path / "out").exists()


def test_a_baseline_has_no_stage_2(tmp_path):
    result = program("train.py", "--variant", "direct", "--stage", 2, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "error: a baseline is one LoRA" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------ memory

THREE_STEPS = """
import resource, sys
from plumbing.files import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for step in range(3):
    blocks = [b"x" * 2**23 for _ in range(20)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_is_there_for_the_next():
    pages = {}
    for freed in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", THREE_STEPS, freed], cwd=ROOT,
                              capture_output=True, text=True, check=True, timeout=60)
        pages[freed] = int(done.stdout)
    # 160 MB are 40,960 pages of 4 KB, or 80 huge ones
    assert pages["kept"] < 10
    assert pages["given back"] >= 80


# --------------------------------------------------------------------------------- baselines

def lora_numbers(state):
    return sum(t.numel() for name, t in state.items() if name.startswith("base"))


@pytest.mark.parametrize("variant", ["direct", "human-like", "cot-finetuned"])
def test_a_baseline_is_one_lora_of_the_same_size(run, mini, small_data, tmp_path, variant):
    out = tmp_path / variant
    succeeds(*train_arguments(mini, small_data, out, "--variant", variant))
    assert lora_numbers(weights(out)) == lora_numbers(weights(run))
    assert (out / "lora" / "adapter_config.json").exists()
    succeeds("sample.py", "hi", "--run", out, "--max-new-tokens", 5)
    # which has nothing that a profile could shift
    result = program("sample.py", "hi", "--run", out, "--profile", tmp_path / "me.json")
    assert fails_in_one_line(result, "--profile", "single LoRA")


def test_a_baseline_without_its_answers_says_how_to_make_them(mini, small_data, tmp_path):
    path = tmp_path / "bare.jsonl"
    keep = ("query", "social_traits", "task_traits", "response")
    with open(path, "w", encoding="utf-8") as file:
        for line in small_data.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            file.write(json.dumps({key: record[key] for key in keep}) + "\n")
    result = start(mini, path, tmp_path / "o", "--variant", "direct")
    assert fails_in_one_line(result, "naive_response", "experiments.generate generate", "--naive")
    # PersonaFuse needs those four keys only
    succeeds(*train_arguments(mini, path, tmp_path / "o", "--stage", 1))
