"""Self-critical training: captions are sampled, and what CIDEr-D likes better than the others becomes likelier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataload.annotated import Items
from dataload.images import mirror_caption
from dataload.tokenizer import Tokenizer
from models.aurora import Aurora
from models.generation import Generator
from models.tokens import BOS, EOS, IGNORE, PAD
from models.writing import Writer, sample
from tests.micro import MODEL, arguments, corpus
from tests.ranks import Launch
from train import finetune
from train.checkpoint import load_model
from train.config import problems
from train.pretrain import main as pretrain
from train.scores.captioning import check, score_captions
from train.tasks.config import FinetuneConfig
from train.tasks.presets import task_preset
from train.tasks.reward import CiderReward, ended

STILL = replace(MODEL, decoder_dropout=0.0, drop_path=0.0)
WANTED = 77  # the token that the test's critic likes


class Likes:
    """A critic: the share of a caption's tokens that are WANTED."""

    def __init__(self, samples: int, prompt: Sequence[int] = ()) -> None:
        self.samples, self.prompt = samples, prompt
        self.heard: list[list[int]] = []

    def speaker(self, model: Aurora) -> Generator:
        return model

    def rewards(self, captions: Sequence[Sequence[int]]) -> Tensor:
        self.heard = [list(ids) for ids in captions]
        return torch.tensor([sum(token == WANTED for token in ids) / max(len(ids), 1) for ids in captions])


def writer(seed: int = 0) -> Writer:
    torch.manual_seed(seed)
    return Writer(Aurora(STILL))


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def test_the_gradient_is_that_of_the_likelihoods_by_hand() -> None:
    """Of each sample: its reward less the mean of the other two of its picture, times the gradient of its log-probability."""
    model, images, prompt = writer(), pictures(3), (9, 10)
    critic = Likes(3, prompt)
    model.base.decoder.embedding.weight.data[WANTED] *= 6  # so that it is said now and then
    torch.manual_seed(1)
    (loss,) = model(images, None, None, 12.0, critic=critic).values()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rewards = critic.rewards(critic.heard)
    assert rewards.std() > 0, "all samples are alike: nothing is compared"
    assert loss.item() == pytest.approx(-rewards.sum().item() / 12)

    model.zero_grad()
    total = torch.zeros(())
    memory = model.base.memory(model.base.encode_image(images))
    for i in range(3):
        for k in range(3):
            row = torch.tensor([[BOS, *prompt, *critic.heard[3 * i + k]]])
            text = model.base.decoder.read_text(row[:, :-1], causal=True)
            x = model.base.decoder.read_image(text, memory[i : i + 1], causal=True)
            logs = F.log_softmax(x @ model.base.decoder.embedding.weight.T, dim=-1)[0]
            said = logs.gather(1, row[0, 1:, None])[len(prompt) :, 0].sum()
            others = [rewards[3 * i + j] for j in range(3) if j != k]
            total = total - (rewards[3 * i + k] - sum(others) / 2) * said / 12
    total.backward()
    by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == by_hand.keys()
    assert max(p.abs().max() for p in by_hand.values()) > 1e-3
    for name, gradient in by_hand.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_a_caption_without_an_end_has_no_end_token() -> None:
    model = writer()
    model.base.decoder.embedding.weight.data[EOS] *= 5  # so that some end
    memory = model.base.memory(model.base.encode_image(pictures(40)))
    model.train()
    critic = Likes(2, (9,))
    tokens, targets, said = sample(model.base, memory, critic)
    assert model.base.decoder.training
    ended = torch.tensor([ids[-1] == EOS for ids in said])
    assert ended.any() and not ended.all() and ((tokens == EOS).sum(1) == ended).all()
    assert all(len(ids) == STILL.text_length - 2 for ids, end in zip(said, ended, strict=True) if not end)
    assert (tokens[:, 0] == BOS).all() and (tokens[:, 1] == 9).all() and (targets[:, :2] == IGNORE).all()
    assert torch.equal(targets[:, 2:] == IGNORE, tokens[:, 2:] == PAD)
    for row, ids in zip(tokens.tolist(), said, strict=True):
        assert row[2 : 2 + len(ids)] == ids


def test_what_is_liked_is_said_more_often() -> None:
    torch.manual_seed(0)
    model, critic, images = Writer(Aurora(replace(STILL, text_length=6))), Likes(8), pictures(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    liked = []
    for _ in range(80):
        (loss,) = model(images, None, None, critic=critic).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        liked.append(-loss.item())
    assert sum(liked[:5]) / 5 < 0.05 and sum(liked[-5:]) / 5 > 0.3, liked


def test_weights_that_were_cast_for_the_samples_still_learn() -> None:
    """Autocast keeps casts of weights; those that the samples made had no gradients."""
    model = writer()
    model.base.decoder.embedding.weight.data[WANTED] *= 6
    critic = Likes(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss,) = model(pictures(2), None, None, critic=critic).values()
    assert critic.rewards(critic.heard).std() > 0, "all samples are alike: nothing is compared"
    loss.backward()
    silent = [
        name for name, p in model.base.decoder.named_parameters() if p.grad is None or not p.grad.abs().sum()
    ]
    assert silent == ["queries.weight"]  # of no caption


def test_a_model_gone_wrong_shows_in_the_loss() -> None:
    """... where the engine sees it and leaves the step out; sampling does not fall over it."""
    model = writer().train()
    model.base.decoder.norm.weight.data.fill_(torch.nan)
    (loss,) = model(pictures(2), None, None, critic=Likes(2)).values()
    assert loss.isnan() and model.base.decoder.training


def test_the_reward_is_cider_of_the_training_captions() -> None:
    """The official score of the same captions, where the training pictures are the ones scored; and mirrored words."""
    tokenizer = Tokenizer.load(corpus().tokenizer)
    items = Items([str(path) for path in corpus().train], ("captions",), most=30)
    reward = CiderReward(items, tokenizer, 2)
    said = [f"{texts[0]} and a circle" for texts in reward.references]
    critic = reward.of(range(30), [False] * 30)
    ids = [[*tokenizer.encode(text), EOS] for text in said]
    found = critic.rewards([one for one in ids for _ in range(2)])
    plan = check(("CIDEr",), tokenizer="regex")
    theirs = {i: [f"{text} itsend" for text in texts] for i, texts in enumerate(reward.references)}
    official = score_captions({i: f"{text} itsend" for i, text in enumerate(said)}, theirs, plan)
    each = [official.per_image[i]["CIDEr"] for i in range(30)]
    # What did not come to an end lacks that word, which all references have.
    unended = critic.rewards([one[:-1] for one in ids for _ in range(2)])[::2]
    lacking = score_captions(dict(enumerate(said)), theirs, plan).per_image
    torch.testing.assert_close(
        unended, torch.tensor([lacking[i]["CIDEr"] for i in range(30)]), atol=2e-3, rtol=2e-3
    )
    torch.testing.assert_close(found[::2], torch.tensor(each), atol=2e-3, rtol=2e-3)
    assert torch.equal(found[::2], found[1::2])
    sided = next(i for i, texts in enumerate(reward.references) if any("left" in t.split() for t in texts))
    turned = reward.of([sided], [True]).references[0]
    assert turned == [reward.cider.weigh(ended(mirror_caption(text))) for text in reward.references[sided]]
    assert turned != reward.of([sided], [False]).references[0]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "run"
    assert pretrain(arguments(out, "--steps", "1", "--optim.warmup", "0")) == 0
    return out


def command(start: Path, out: Path, *more: str) -> list[str]:
    data = ("--data.train", *map(str, corpus().train), "--data.workers", "1")
    run = ("--device", "cpu", "--precision", "fp32", "--optim.warmup", "0", "--eval-every", "0")
    return ["captioning", "--checkpoint", str(start), *data, *run, "--out", str(out), *more]


def test_a_run_samples_saves_and_resumes_exactly(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--objectives.self-critical",
        "3",
        "--batch-size",
        "8",
        "--save-every",
        "2",
        "--task.prompt",
        "a",
    )
    assert finetune.main(command(started, tmp_path / "a", *words, "--steps", "4")) == 0
    assert (
        capsys.readouterr().out.count("self-critical: CIDEr-D of 3 captions that are sampled of each picture")
        == 1
    )
    middle = str(tmp_path / "a/checkpoints/step-000002")
    assert finetune.main(command(started, tmp_path / "b", *words, "--steps", "4", "--resume", middle)) == 0
    losses = [
        [line["losses"] for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
         if line["kind"] == "train"]
        for run in ("a", "b")
    ]  # fmt: skip
    assert losses[0][2:] == losses[1] and len(losses[1]) == 2
    assert all(set(one) == {"cider"} and -10 <= one["cider"] <= 0 for one in losses[0])
    assert any(one["cider"] < 0 for one in losses[0])


def test_two_ranks_sample_apart_and_learn_together(started: Path, tmp_path: Path) -> None:
    """Each draws its own captions of its own pictures; the loss is the mean reward of all, over micro-steps too."""
    words = ("--objectives.self-critical", "2", "--batch-size", "8", "--accumulation", "2", "--steps", "2")
    run = Launch(
        2, finetune.main, command(started, tmp_path / "two", *words), RANKS_OUTPUT=str(tmp_path / "said")
    )
    assert run.results() == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    losses = [line["losses"]["cider"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2 and all(-10 <= loss <= 0 for loss in losses) and any(losses)
    before, after = load_model(started).model.state_dict(), load_model(tmp_path / "two").model.state_dict()
    name = "decoder.crossmodal.0.self_attention.qkv.weight"
    assert not torch.equal(before[name], after[f"base.{name}"])


def test_what_cannot_be_judged_is_refused(
    started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(command(started, tmp_path / "a", "--objectives.self-critical", "1")) == 2
    assert "it must be 0 (off) or 2 and more, which are compared" in capsys.readouterr().err
    config = task_preset("vqa", FinetuneConfig(model=MODEL))
    config = replace(config, checkpoint="x", objectives=replace(config.objectives, self_critical=4))
    assert any("it is for captioning, not vqa" in line for line in problems(config, 1))
    config = task_preset("captioning", FinetuneConfig(model=MODEL))
    config = replace(config, checkpoint="x", objectives=replace(config.objectives, self_critical=4))
    both = replace(
        config,
        objectives=replace(config.objectives, word_dropout=0.1),
        data=replace(config.data, captions_per_image=2),
    )
    unread = [line for line in problems(both, 1) if "is for people's captions" in line]
    assert (
        len(unread) == 2 and "objectives.word_dropout" in unread[0] and "data.captions_per_image" in unread[1]
    )
    words = ("--task.prompt", "one two three four five six seven eight nine ten")
    assert finetune.main(command(started, tmp_path / "b", *words)) == 2
    assert "model.text_length is 12, which has room for 9 and a caption" in capsys.readouterr().err
    for engine, stage, refused in (
        ("ddp", 2, False),
        ("fsdp2", 2, True),
        ("deepspeed", 2, False),
        ("deepspeed", 3, True),
    ):
        lines = problems(replace(config, engine=engine, zero_stage=stage), 2)
        assert any("needs whole weights on every rank" in line for line in lines) == refused
