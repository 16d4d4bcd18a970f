"""Runs whose logits start at the log frequencies of their data: losses, layouts, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import UserError
from pretrain.rundir.metrics import read_metrics
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.open import open_trained
from tests.distributed import Group, launch
from tests.parallel.training import Curve, engine_of, given, run_config, train, whole_parameters
from tests.pretrain.small import small_config, small_data, small_trainer
from tests.pretrain.train.test_run import CONFIG
from tests.running import run

SCHEMES = ("pre_ln", "b2t", "post_ln", "deepscalelm_pre_ln")
BIASED = given(tie_embeddings=False, normalization="rmsnorm", logit_bias=True)
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def trainer_of(data: Path, runs: Path, base: str, scheme: str, **model: Any) -> Any:
    init = {"unigram": True, "base": base}
    config = small_config(data, runs, 1, scheme=scheme, init=init, **model)
    config.train.eval_samples = 32
    return small_trainer(config)


def unigram_loss(trainer: Any) -> float:
    """Of the validation samples, under the frequencies of train."""
    validation, log_p = trainer.validation, trainer.train_data.blend.log_frequencies()
    return -float(log_p[validation.data.batch(range(validation.samples))["labels"]].mean())


CASES = [*((scheme, {}) for scheme in SCHEMES), ("pre_ln", BIASED)]


@pytest.mark.parametrize(("scheme", "model"), CASES)
def test_the_first_loss_is_that_of_the_frequencies(
    data: Path, tmp_path: Path, scheme: str, model: dict[str, Any]
) -> None:
    """Small logits beside the constant (base normal) add almost nothing to it.

    Without the drawn part, which the gain of the last norm lets through, nothing is added.
    """
    trainer = trainer_of(data, tmp_path, "normal", scheme, **model)
    expected = unigram_loss(trainer)
    assert trainer.validation.measure().loss == pytest.approx(expected, abs=0.02)
    trainer = trainer_of(data, tmp_path, "scheme", scheme, **model)
    last = trainer.config.model.depth_plan().last_norm
    with torch.no_grad():
        for named in trainer.engine.parameters:
            if named.name == f"{last}.weight":
                named.parameter.zero_()
    assert trainer.validation.measure().loss == pytest.approx(expected, abs=1e-5)


def start(model: dict[str, Any], layout: dict[str, Any], log_p_v: Tensor) -> Curve:
    """Inside ranks: the parameters at the start, and some steps."""
    config = run_config({"init": {"unigram": True}} | model, layout, eps=1e-6)
    engine = engine_of(config, log_p_v)
    parameters, _ = whole_parameters(engine)
    curve = train(config, engine, 0, STEPS)
    curve.parameters = parameters
    _, curve.unequal = whole_parameters(engine)
    return curve


def test_every_layout_starts_from_the_same_values_and_learns_alike() -> None:
    log_p_v = torch.log_softmax(torch.linspace(3, -3, 120, dtype=torch.float64), 0)
    layouts = (given(tensor=2, sequence_parallel=True), given(pipeline=2))
    alone = [Group(1, start, (model, {}, log_p_v)) for model in ({}, BIASED)]
    pairs = [Group(2, start, (model, layout, log_p_v)) for layout in layouts for model in ({}, BIASED)]
    found = launch(*alone, *pairs)
    for number, ranks in enumerate(found[2:]):
        (one,) = found[number % 2]
        for curve in ranks:
            assert not curve.unequal
            assert curve.losses == pytest.approx(one.losses, rel=1e-6)
            assert curve.norms == pytest.approx(one.norms, rel=1e-6)
            for name, value in one.parameters.items():
                assert torch.equal(curve.parameters[name], value), name


def test_a_run_takes_the_frequencies_of_its_data(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(data)))
    settings = ["model.init={base: normal, unigram: true}", "train.steps=1", "train.eval_interval=0"]
    settings += ["schedule.warmup_steps=0", f"runs_dir={tmp_path / 'runs'}"]
    done = run("pretrain", path, *settings, limit=240)
    assert done.code == 0, done.err
    metrics = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    # 64 tokens of some 4000: their own frequencies differ.
    assert metrics.train[0].loss == pytest.approx(metrics.starts[0].unigram_entropy, abs=0.3)


@pytest.mark.parametrize(
    ("scheme", "model", "target"),
    [
        ("pre_ln", {}, "gpt2"),  # DeepScaleLM's fold moves epsilons, which the export itself measures
        ("deepscalelm_pre_ln", {"logit_bias": True}, "fathom"),
        ("deepscalelm_pre_ln", BIASED, "fathom"),
    ],
    ids=["tied", "tied with a bias", "untied with a bias"],
)
def test_exports_are_exact(
    data: Path, tmp_path: Path, scheme: str, model: dict[str, Any], target: str
) -> None:
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(data, tmp_path / "runs", "scheme", scheme, **model)
    trainer.run()
    done = export_checkpoint(trainer.checkpoints, tmp_path / "out")
    assert done.architecture == target
    if target == "fathom":
        line = (
            r"--architecture gpt2 cannot compute this model .*: it has no bias on its logits "
            r"\(model.logit_bias=true\); use auto or fathom"
        )
        with pytest.raises(UserError, match=line):
            export_checkpoint(trainer.checkpoints, tmp_path / "stock", architecture="gpt2")
    # Our module against transformers' class, not only the proof of the export.
    from pretrain.trained.scorer import Scorer

    tokens = trainer.train_data.batch(range(4))["tokens"]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=target == "fathom")
        theirs = loaded.eval()(tokens).logits
    ours = Scorer(open_trained(trainer.checkpoints), "fp32").logits(tokens)[..., : theirs.shape[-1]]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
