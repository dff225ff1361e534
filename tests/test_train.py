"""The three stages: what each trains and what it leaves alone, parts and processes, resuming, and bad input."""

import copy
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, fails_in_one_line, make_model, program, train_arguments
from safetensors.torch import load_file, save_file

from data import (TRAITS, Batch, expert_batch, expert_subsets, joint_batch, load_records, make_examples, router_batch,
                  trait_groups)
from lora import clip_experts, lora_layers
from losses import contrastive_loss, cosine, joint_loss, lm_loss, router_loss, trait_loss
from personafuse import build, pad, response_batch
from runs import Settings, trainable
from train import run_stage, stage_loss

CPU = torch.device("cpu")
SETTINGS = Settings(names=TRAITS, rank=4, lora_alpha=8, tau=1.0, pooling="last", batch1=3, batch2=12, group=4, batch3=10,
                    margin=0.1, beta=1.0, micro_batch=100)


@pytest.fixture
def model(mini):
    torch.manual_seed(0)
    model = build(vars(SETTINGS) | {"base": str(mini), "encoder": str(mini)}, CPU, torch.float32)
    for _, layer in lora_layers(model.base):
        layer.B.data = torch.randn(layer.B.shape) * 0.05            # so that A gets gradient too
    return model


@pytest.fixture
def examples(model, small_data):
    return make_examples(load_records(small_data), model.tokenizer, model.encoder_tokenizer, 120)


def first_batch(stage, examples, step=0):
    if stage == 1:
        return expert_batch(examples, expert_subsets(examples), 3, step, seed=0)
    if stage == 2:
        return router_batch(examples, trait_groups(examples), 12, 4, step, seed=0)
    return joint_batch(examples, 10, step, seed=0)


def gradients(model, stage, batch, **changes):
    """The gradients that one step leaves, by name."""
    model.requires_grad_(False)
    for _, t in trainable(model, stage):
        t.requires_grad_(True)
        t.grad = None
    loss, _ = stage_loss(model, stage, batch, replace(SETTINGS, **changes))
    loss.backward()
    return loss, {name: t.grad.clone() for name, t in model.named_parameters() if t.grad is not None}


def plain_loss(model, stage, batch):
    """The stage's loss over the whole batch in one piece, as the equations have it."""
    p = torch.tensor([r.p for r in batch.examples])
    if stage == 1:
        w = torch.tensor(batch.fixed_w)
    else:
        h = model.router.embed(*pad([r.query for r in batch.examples], CPU))
        w = model.router.weights(h)
        router = router_loss(contrastive_loss(cosine(h, model.router.e), p, 0.1), trait_loss(h, p), 1.0, 1.0)
        if stage == 2:
            return router
    tokens, targets = response_batch(batch.examples, CPU)
    hidden = model.base(tokens, w)[targets >= 0]
    per_token = torch.tensor([weight for weight, r in zip(batch.token_weight, batch.examples) for _ in r.answer])
    lm = lm_loss(model.base.logits(hidden), targets[targets >= 0], per_token)
    return lm if stage == 1 else joint_loss(lm, router, 0.2)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 3}, {"micro_batch": 4, "checkpointing": True}], ids=str)
def test_a_step_in_parts_has_the_gradient_of_the_plain_loss(model, examples, stage, changes):
    batch = first_batch(stage, examples)
    loss, ours = gradients(model, stage, batch, **changes)
    model.zero_grad()
    plain = plain_loss(model, stage, batch)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    expected = {name: t.grad for name, t in model.named_parameters() if t.grad is not None}
    assert ours.keys() == expected.keys()
    for name in expected:
        assert (ours[name] - expected[name]).abs().max() <= 1e-5 * max(1, expected[name].abs().max()), name


def test_the_model_in_one_call_is_the_router_then_the_base(model, examples):
    """PersonaFuse.forward and Router.forward: Eq. 1 from the queries, then the base with these weights."""
    queries, lengths = pad([r.query for r in examples[:3]], CPU)
    tokens, _ = response_batch(examples[:3], CPU)
    with torch.no_grad():
        logits = model(queries, lengths, tokens)
        for i, r in enumerate(examples[:3]):
            h = model.router.encoder(torch.tensor([r.query]))[0, -1]
            cosines = torch.stack([h @ e / (h.norm() * e.norm()) for e in model.router.e])
            w = cosines.exp() / cosines.exp().sum()
            ids = (r.prompt + r.answer)[:-1]
            alone = model.base.logits(model.base(torch.tensor([ids]), w[None]))[0]
            assert (logits[i, :len(ids)] - alone).abs().max() < 1e-4


def test_queries_read_in_parts_keep_their_places(model, examples):
    queries = [r.query for r in examples[:10]]
    assert [len(q) for q in queries] != sorted(len(q) for q in queries)
    with torch.no_grad():
        h = model.embed(queries, rows=3)
        for i, query in enumerate(queries):
            alone = model.router.encoder(torch.tensor([query]))[0, -1]
            assert (h[i] - alone).abs().max() < 1e-4


def test_query_tokens_do_not_count(model, examples):
    tokens, targets = response_batch(examples[:3], CPU)
    for i, r in enumerate(examples[:3]):
        ids = r.prompt + r.answer
        assert tokens[i, :len(ids) - 1].tolist() == ids[:-1]
        assert targets[i][targets[i] >= 0].tolist() == r.answer
        assert (targets[i, :len(r.prompt) - 1] == -1).all()
    assert (targets >= 0).sum() == sum(len(r.answer) for r in examples[:3])


def test_ten_experts_in_one_batch_are_ten_separate_runs(model, examples):
    """Steps of AdamW on batches of all experts leave each as if it had trained on its own rows alone, clipping included."""
    def rows_of(batch, only):
        rows = [i for i, w in enumerate(batch.fixed_w) if w[only] == 1]
        return Batch(*[[column[i] for i in rows] for column in (batch.examples, batch.fixed_w, batch.token_weight)])

    def run(model, only=None):
        model.requires_grad_(False)
        params = [t for _, t in trainable(model, 1)]
        for t in params:
            t.requires_grad_(True)
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
        for step in range(3):
            batch = first_batch(1, examples, step)
            stage_loss(model, 1, batch if only is None else rows_of(batch, only), SETTINGS)[0].backward()
            clip_experts(model.base, 10, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return model

    fresh = copy.deepcopy(model)
    together = run(copy.deepcopy(model))
    for i in (0, 4, 9):
        alone = run(copy.deepcopy(model), only=i)
        for (_, a), (_, b), (_, c) in zip(lora_layers(alone.base), lora_layers(together.base), lora_layers(fresh.base)):
            rows = slice(4 * i, 4 * i + 4)
            assert (a.A[rows] - b.A[rows]).abs().max() < 1e-5 and (a.B[:, rows] - b.B[:, rows]).abs().max() < 1e-5
            assert (a.A[rows] - c.A[rows]).abs().max() > 1e-4                               # and it did train
            others = [k for k in range(40) if k not in range(4 * i, 4 * i + 4)]
            assert torch.equal(a.A[others], c.A[others]) and torch.equal(a.B[:, others], c.B[:, others])


def test_stage_2_batches_share_p_in_groups(examples):
    groups = trait_groups(examples)
    rows = router_batch(examples, groups, 4, 4, 0, seed=0).examples
    assert len({r.p for r in rows}) == 1                                            # the paper's batch: one p for all
    assert 1 < len({r.p for r in router_batch(examples, groups, 12, 4, 0, seed=0).examples}) <= 3


def test_stage_1_rows_come_from_the_subset_of_their_expert(examples):
    batch = first_batch(1, examples)
    for example, w in zip(batch.examples, batch.fixed_w):
        assert sorted(w) == [0] * 9 + [1] and example.p[w.index(1)] == 1


# ------------------------------------------------------------------------------------------------------- whole runs

def train(mini, data, out, *more):
    return program(*train_arguments(mini, data, out, *more))


def weights(out, stage=3):
    return load_file(out / f"stage{stage}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_frozen_means_frozen_and_each_stage_trains_its_own(model, examples, tmp_path):
    settings = replace(SETTINGS, steps1=2, lr1=1e-2, steps2=2, lr2=1e-2, lr_e=1e-2, steps3=2, lr3=1e-2, save_every=9,
                       out=str(tmp_path), base="mini")
    examples = [r for r in examples if not r.p[1] and not r.p[8]]               # nothing activates experts 1 and 8
    for stage in (1, 2, 3):
        before = {name: t.detach().clone() for name, t in model.named_parameters()}
        run_stage(model, stage, 0, examples, settings, received=[])
        for name, t in model.named_parameters():
            expert, router = name.endswith((".A", ".B")), name.startswith("router.")
            if not (expert and stage != 2 or router and stage != 1):
                assert torch.equal(t, before[name]), (stage, name)              # to the bit
            elif expert and stage == 1:
                change = (t != before[name]).view(10, -1) if name.endswith("A") else (t != before[name]).view(t.shape[0], 10, -1).transpose(0, 1).flatten(1)
                assert change.any(dim=1).tolist() == [i not in (1, 8) for i in range(10)], name
            else:
                assert not torch.equal(t, before[name]), (stage, name)


def test_what_a_run_leaves(run):
    folders = {path.name for path in run.iterdir() if path.is_dir()}
    assert folders == {name.replace(" ", "_") for name in TRAITS}
    config = json.loads((run / "high_openness" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 16 and len(config["target_modules"]) == 7
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["step"]) for m in lines if "held_out" not in m] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]
    last = lines[-1]["held_out"]
    assert {"loss_base", "loss_oracle", "loss_router", "map", "map_chance", "auc"} <= last.keys()


def test_the_same_command_twice_moves_the_old_run_aside_and_gives_the_same_bits(run, mini, small_data, tmp_path):
    out = tmp_path / "mini"
    shutil.copytree(run, out)
    result = train(mini, small_data, out)
    assert result.returncode == 0 and f"it is now {out}.1" in result.stdout
    assert same(weights(out), weights(run)) and same(weights(tmp_path / "mini.1"), weights(run))


def test_stage_by_stage_is_all_at_once(run, mini, small_data, tmp_path):
    out = tmp_path / "mini"
    assert fails_in_one_line(train(mini, small_data, out, "--stage", 2), "no finished stage 1", "--stage 1")
    assert fails_in_one_line(train(mini, small_data, out, "--stage", 3), "no finished stage 1")
    for stage in (1, 2, 3):
        result = train(mini, small_data, out, "--stage", stage)
        assert result.returncode == 0, result.stderr
        if stage == 1:
            assert fails_in_one_line(train(mini, small_data, out, "--stage", 3), "no finished stage 2")
            assert fails_in_one_line(program("sample.py", "hi", "--run", out), "no router yet")
    assert same(weights(out), weights(run))
    result = train(mini, small_data, out, "--stage", 3)                     # again: from what stage 2 left, not on top
    assert result.returncode == 0 and f"{out}.1" in result.stdout and same(weights(out), weights(run))


def killed_and_resumed(mini, small_data, out, delay, number, *more):
    """Start, signal after `delay` of its steps have been logged, resume until done -> the signalled process's exit code."""
    process = subprocess.Popen([sys.executable, *map(str, train_arguments(mini, small_data, out, "--save-every", 1, *more))], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= delay):
        pass
    process.send_signal(number)
    error = process.communicate()[1]
    result = train(mini, small_data, out, "--save-every", 1, "--resume")
    assert result.returncode == 0, result.stderr
    return process.returncode, error


@pytest.mark.parametrize("number, delay", [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_a_signal_saves_and_says_how_to_go_on(run, mini, small_data, tmp_path, number, delay):
    code, error = killed_and_resumed(mini, small_data, tmp_path / "mini", delay, number)
    assert code in (0, 2) and "Traceback" not in error
    assert code == 0 or "--resume goes on" in error
    assert same(weights(tmp_path / "mini"), weights(run))
    assert [json.loads(x)["step"] for x in (tmp_path / "mini/metrics.jsonl").read_text().splitlines()] == \
           [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_random_moments_and_resumed_ends_alike(run, mini, small_data, tmp_path):
    """SIGKILL at random moments, start-up and saving included; KILLS=50 for the long campaign."""
    moments, kills = random.Random(0), int(os.environ.get("KILLS", 2))
    command = [sys.executable, *map(str, train_arguments(mini, small_data, tmp_path / "mini", "--save-every", 1))]
    while kills:
        resume = ["--resume"] if (tmp_path / "mini/stage1.safetensors").exists() else []
        process = subprocess.Popen(command + resume, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=moments.uniform(1, 5))
            assert process.returncode == 0 and same(weights(tmp_path / "mini"), weights(run))
            shutil.rmtree(tmp_path / "mini")                        # it got through before its moment: start the next one
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
    resume = ["--resume"] if (tmp_path / "mini/stage1.safetensors").exists() else []
    result = train(mini, small_data, tmp_path / "mini", "--save-every", 1, *resume)
    assert result.returncode == 0, result.stderr
    assert same(weights(tmp_path / "mini"), weights(run))


def test_resuming_something_else_is_refused_with_the_difference(run, mini, small_data, tmp_path):
    assert fails_in_one_line(train(mini, small_data, tmp_path / "none", "--resume"), "nothing to resume")
    assert fails_in_one_line(train(mini, small_data, run, "--resume", "--lr1", 0.5), "lr1", "0.5")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(small_data.read_text().splitlines(keepends=True)[1:]))
    assert fails_in_one_line(train(mini, other, run, "--resume"), "data")
    moved = make_model(tmp_path / "another")
    assert fails_in_one_line(train(moved, small_data, run, "--resume"), "base")
    cut = shutil.copytree(run, tmp_path / "cut")
    whole = (cut / "stage3.safetensors").read_bytes()
    (cut / "stage3.safetensors").write_bytes(whole[:len(whole) // 2])
    assert fails_in_one_line(train(mini, small_data, cut, "--resume"), cut / "stage3.safetensors")


def test_nan_in_the_weights_stops_with_stage_and_step(mini, small_data, tmp_path):
    folder = shutil.copytree(mini, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    result = train(mini, small_data, tmp_path / "out", "--base", folder)
    assert fails_in_one_line(result, "stage 1, step 0", "not finite", "stage1.safetensors")
    kept = weights(tmp_path / "out", 1)
    assert all(torch.isfinite(t).all() for t in kept.values())


def test_an_out_that_cannot_be_written(mini, small_data, tmp_path):
    (tmp_path / "file").write_text("")
    assert fails_in_one_line(train(mini, small_data, tmp_path / "file" / "run"), "cannot write", "file")


def test_a_full_disk_leaves_the_earlier_state(tmp_path):
    from plumbing import UserError, atomic_write
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(UserError, match="cannot write .*untouched"):
        with atomic_write(path) as tmp:
            tmp.symlink_to("/dev/full")                             # every write to it fails as on a full disk
            with open(tmp, "wb") as file:
                file.write(bytes(10**6))
    assert load_file(path)["a"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["state.safetensors"]


THREE_STEPS = """
import resource, sys
from plumbing import keep_freed_memory
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
        done = subprocess.run([sys.executable, "-c", THREE_STEPS, freed], cwd=ROOT, capture_output=True, text=True, check=True)
        pages[freed] = int(done.stdout)
    # 160 MB are 40,960 pages of 4 KB, or 80 huge ones
    assert pages["kept"] < 10
    assert pages["given back"] >= 80


@pytest.mark.parametrize("variant", ["direct", "human-like", "cot-finetuned"])
def test_a_baseline_is_one_lora_of_the_same_size(run, mini, small_data, tmp_path, variant):
    result = train(mini, small_data, tmp_path / variant, "--variant", variant)
    assert result.returncode == 0, result.stderr
    count = lambda state: sum(t.numel() for k, t in state.items() if k.startswith("base"))     # noqa: E731
    assert count(weights(tmp_path / variant)) == count(weights(run))
    assert (tmp_path / variant / "lora" / "adapter_config.json").exists()
    assert program("sample.py", "hi", "--run", tmp_path / variant, "--max-new-tokens", 5).returncode == 0


def test_a_baseline_without_its_answers_says_how_to_make_them(mini, small_data, tmp_path):
    path = tmp_path / "bare.jsonl"
    keep = ("query", "social_traits", "task_traits", "response")
    path.write_text("".join(json.dumps({k: json.loads(x)[k] for k in keep}) + "\n" for x in small_data.read_text().splitlines()))
    assert fails_in_one_line(train(mini, path, tmp_path / "o", "--variant", "direct"), "naive_response", "experiments.generate generate", "--naive")
    assert train(mini, path, tmp_path / "o").returncode == 0                    # PersonaFuse needs those four keys only
