"""The report is whole, self-contained and right about its numbers.

For a long run with a resume and for one that hardly began.
"""

from __future__ import annotations

import json
import math
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markupsafe import escape

from model.cost.flops import flops_per_token
from model.errors import UserError
from pretrain.report.run_charts import (
    Context,
    all_charts,
    gradient_chart,
    layer_gradient_chart,
    loss_chart,
    share_chart,
    stream_chart,
)
from pretrain.report.run_report import (
    commands,
    facts,
    grouped_warnings,
    headlines,
    numbers,
    read_run,
    render,
    status,
    write_report,
)
from pretrain.report.style import MOST_POINTS, envelope, running_median, smoothing_window
from pretrain.rundir.environment import environment
from pretrain.rundir.metrics import Metrics, MetricsWriter, read_metrics

LAYERS = 6
CONFIG: dict[str, Any] = {
    "name": "deep",
    "runs_dir": "runs",
    "model": {
        "scheme": "b2t",
        "scheme_options": {"rescale": True},
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 100,
    },
    "data": {"corpora": [{"path": "data/wiki"}], "seq_length": 16},
    "optimizer": {"lr": 0.001, "clip_grad": 1.0},
    "train": {"steps": 60, "global_batch_size": 4},
}
ENVIRONMENT: dict[str, Any] = {
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "host": "node-7",
    "cpu": {"model": "Some CPU", "usable_cores": 4},
    "gpus": [{"name": "NVIDIA H200"}] * 2,
    "command": ["/usr/bin/python", "-m", "pretrain.train.run", "a b.yaml", "train.steps=60"],
}


def loss_at(step: int) -> float:
    return 3.0 + 2.0 * math.exp(-step / 10)


def make_run(folder: Path, resumes: tuple[int, ...] = (30,), steps: int = 60) -> Path:
    """`steps` steps of 64 tokens, 1 s each; signals every 10; a crash 5 steps after each resume."""
    clock = 1_700_000_000.0
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        begin = 0
        for stop, resumed in [*((point + 5, point) for point in resumes), (steps, None)]:
            writer.write(
                "start",
                begin,
                time=clock,
                parameters=123456,
                world_size=2,
                layout={"tp": 2, "pp": 1, "dp": 1, "zero": 1},
                precision="bfloat16",
                unigram_entropy=4.25,
            )
            for step in range(begin + 1, stop + 1):
                clock += 1.0
                speed = 64.0 if step > 1 else 8.0
                writer.write(
                    "train",
                    step,
                    time=clock,
                    loss=loss_at(step),
                    grad_norm=1.0,
                    lr=1e-3,
                    tokens=64 * step,
                    tokens_per_s=speed,
                    data_wait_share=0.01,
                    skipped=False,
                )
                if step % 10 == 0:
                    layers = [
                        {
                            "layer": i + 1,
                            "residual_rms": 1.0,
                            "grad_norm": 0.1,
                            "branch_ratio_attention": 0.2,
                            "branch_ratio_mlp": 0.3,
                            "common_share": 0.4,
                        }
                        for i in range(LAYERS)
                    ]
                    writer.write("signal", step, time=clock, layers=layers)
                    writer.write(
                        "eval",
                        step,
                        time=clock,
                        split="validation",
                        loss=3.5 - 0.01 * step + (0.2 if step == steps else 0.0),
                        samples=4,
                        tokens=64,
                    )
                    writer.write("warning", step, time=clock, message="slow <disk> & more")
            if resumed is not None:
                begin, clock = resumed, clock + 100.0
        writer.write("end", steps, time=clock, reason="all steps are done", exit_code=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "deep")


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written once, for drawing takes seconds."""
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "deep"))


class Page(HTMLParser):
    """Collects what a browser would load, the ids, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith(
                ("#", "data:")
            ):
                self.loads.append(f"{tag} {key}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] != ["style"] else ""


def test_page_is_one_self_contained_file(page_path: Path) -> None:
    html = page_path.read_text()
    page = Page(html)
    assert page_path.name == "report.html"
    assert page.loads == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert "url(http" not in html
    assert page.tags.count("svg") == 8  # every picture has something to draw
    assert len(page.ids) == len(set(page.ids))
    assert len(html) < 1_000_000


def test_page_says_what_was_run(page_path: Path) -> None:
    text = " ".join(Page(page_path.read_text()).text.split())
    for words in (
        "deep",
        "finished at step 60",
        "post-LN with the layer's input added before its last norm",
        "Takase et al. 2023",
        "6 layers, width 32, 4 heads",
        "123,456",
        "2 processes: tensor 2, ZeRO-1",
        "2 × NVIDIA H200 a host, node-7",
        "0123456789ab with local changes",
        "fathom pretrain 'a b.yaml' train.steps=60 #",
        "fathom pretrain runs/deep/config.yaml name=deep-again",
        "num_layers: 6",
        "slow <disk> & more",
    ):
        assert words in text, words


def test_headline_numbers(run_dir: Path) -> None:
    found = numbers(read_run(run_dir))
    window = smoothing_window(60)
    assert found["train_loss_steps"] == window == 5
    assert found["train_loss"] == pytest.approx(np.mean([loss_at(step) for step in range(56, 61)]))
    assert found["validation_loss"] == pytest.approx(3.1)
    assert found["validation_loss_best"] == pytest.approx(3.0)
    assert found["validation_perplexity"] == pytest.approx(math.exp(3.1))
    assert (
        found["unigram_entropy"],
        found["tokens_per_s"],
        found["step"],
        found["steps"],
        found["tokens"],
    ) == (4.25, 64.0, 60, 60, 3840)
    assert (found["resumes"], found["skipped"]) == (1, 0)
    assert (
        found["wall_seconds"] == 35.0 + 30.0
    )  # without the pause before the resume, with the five steps done twice
    # 6 x matrix weights + 6 x layers x length x width, over two H200 in bf16
    weights = LAYERS * 12 * 32 * 32 + 32 * 128
    assert found["mfu"] == pytest.approx(64.0 * (6 * weights + 6 * LAYERS * 16 * 32) / (2 * 989e12))


def test_headlines_say_what_the_numbers_are(run_dir: Path) -> None:
    shown = {label: (value, remark) for label, value, remark in headlines(read_run(run_dir))}
    assert shown["Validation loss"] == ("3.100", "nats per token, step 60; lowest 3.000")
    assert shown["Validation perplexity"][0] == "22.2"
    assert shown["Wall time"] == ("1 min 05 s", "of running, plus 1 min 40 s between stop and resume")
    assert shown["Resumed"] == ("1×", "no step skipped")


def test_an_accuracy_is_a_headline_where_evaluations_have_one(run_dir: Path) -> None:
    assert numbers(read_run(run_dir))["validation_accuracy"] is None
    assert "Validation accuracy" not in [label for label, _, _ in headlines(read_run(run_dir))]
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("eval", 60, split="validation", loss=3.0, samples=4, tokens=40, accuracy=0.4321)
    run = read_run(run_dir)
    assert numbers(run)["validation_accuracy"] == 0.4321
    shown = {label: (value, remark) for label, value, remark in headlines(run)}
    assert shown["Validation accuracy"] == ("43.2%", "of the tokens to predict are the likeliest")


def test_a_run_on_images_counts_images(run_dir: Path) -> None:
    """Nothing of its page is per token, and its share of a peak counts all patches of an image."""
    model = {**CONFIG["model"], "family": "vit", "tie_embeddings": False, "image": {"height": 6, "patch": 2}}
    model |= {"position": "learned", "vocab_multiple": 2}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["model"], config["data"]["seq_length"] = model, 10
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    run = read_run(run_dir)
    assert run.model is not None
    named = {label: (number, remark) for label, number, remark in headlines(run)}
    assert named["Throughput"][1].startswith("images per second")
    assert named["Training loss"][1].startswith("nats per image")
    assert "of knowing class frequencies alone" in named["Entropy of classes"][1]
    assert "Validation perplexity" not in named
    assert ("Images planned", "240") in facts(run)
    assert ("Batch", "4 images of 10 tokens") in facts(run)
    page = render(run)
    assert "per token" not in page
    assert "tokens per second" not in page
    found = numbers(run)
    assert found["validation_perplexity"] is None
    flops = 10 * flops_per_token(run.model, 10).model
    assert found["mfu"] == pytest.approx(64.0 * flops / (2 * 989e12))


def test_three_steps_without_evaluation_or_signals(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write("start", 0)
        for step in (1, 2, 3):
            writer.write("train", step, loss=5.0 - step, grad_norm=1.0, lr=0.1)
    run = read_run(tmp_path)
    text = Page(render(run)).text
    assert numbers(run)["train_loss"] == 2.0
    for words in (
        "No evaluation has been logged.",
        "No layer signals have been logged",
        "No throughput has been logged.",
        "no config.yaml",
        "has not ended",
    ):
        assert words in text, words
    assert [bool(chart.svg) for chart in all_charts(Context(run.metrics))] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
        False,
    ]


def test_a_run_that_only_started(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    html = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert "<svg" not in html
    assert "No training step has been logged yet." in html


def test_a_run_that_lost_its_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write("start", 0, unigram_entropy=4.0)
        for step in range(1, 31):
            writer.write(
                "train",
                step,
                loss=math.nan if step > 25 else 3.0,
                grad_norm=math.inf if step > 25 else 0.0,
                lr=0.1,
                skipped=step > 25,
            )
        writer.write("eval", 30, split="validation", loss=math.nan, samples=1, tokens=1)
        writer.write("end", 30, reason="loss or gradient is not finite at step 30", exit_code=77)
    run = read_run(tmp_path)
    assert status(run) == ("bad", "diverged at step 30: loss or gradient is not finite at step 30")
    assert (numbers(run)["skipped"], numbers(run)["train_loss"], numbers(run)["validation_loss"]) == (
        5,
        3.0,
        None,
    )
    assert "<!-- skipped or not finite -->" in loss_chart(Context(run.metrics)).svg
    assert gradient_chart(Context(run.metrics)).missing  # zeros have no place on a logarithmic scale
    assert "5 steps skipped" in render(run)


def test_steps_of_before_a_resume_that_are_not_redone_yet_are_left_out(run_dir: Path) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("start", 40)
        writer.write("train", 41, loss=9.0)
    run = read_run(run_dir)
    assert (numbers(run)["step"], len(run.metrics.train), run.metrics.eval[-1].step) == (41, 41, 40)
    assert status(run)[0] == "open"


def test_resumes_clip_level_and_entropy_are_drawn(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.jsonl")
    loss = loss_chart(Context(metrics, unigram_entropy=4.25)).svg
    for label in ("resumed", "unigram entropy, 4.25", "validation", "tokens"):
        assert f"<!-- {label} -->" in loss, label
    assert "<!-- clipped to 0.5 -->" in gradient_chart(Context(metrics, clip_grad=0.5)).svg
    assert "clipped" not in gradient_chart(Context(metrics)).svg


def test_layer_charts_show_first_and_last_measurement(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path / "deep", steps=90) / "metrics.jsonl")
    svg = layer_gradient_chart(Context(metrics)).svg
    steps = [step for step in range(10, 100, 10) if f"<!-- {step} -->" in svg]
    assert {10, 90} <= set(steps)
    assert len(steps) <= 6
    assert "<!-- RMS of the residual stream -->" in stream_chart(Context(metrics)).svg


def test_forward_variance_stands_in_for_a_missing_rms(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(
            "signal", 1, layers=[{"layer": 1, "forward_variance": 1.0}, {"layer": 2, "forward_variance": 1.1}]
        )
    assert (
        "<!-- variance of the residual stream -->"
        in stream_chart(Context(read_metrics(tmp_path / "metrics.jsonl"))).svg
    )


def test_a_run_measured_without_common_shares_says_so(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write("signal", 1, layers=[{"layer": 1, "residual_rms": 1.0}])
    chart = share_chart(Context(read_metrics(tmp_path / "metrics.jsonl")))
    assert chart.missing == "Measurements of this run do not have it."


def test_every_chart_has_one_sentence_on_how_to_read_it(page_path: Path) -> None:
    html = page_path.read_text()
    for chart in all_charts(Context(Metrics())):  # captions do not depend on the run
        assert chart.missing
        assert chart.caption.endswith(".")
        assert ". " not in chart.caption
        assert str(escape(chart.caption)) in html
        assert f'role="img" aria-label="{chart.title}"' in html


def test_what_cannot_be_read_is_left_out(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    (run_dir / "config.yaml").write_text("model: {scheme: of_the_future, num_layers: 7}\nname: <i>x</i>\n")
    (run_dir / "environment.json").write_text("{ cut")
    run = read_run(run_dir)
    html = render(run)
    assert "of_the_future" in html
    assert "<i>x</i>" not in html
    assert dict(facts(run))["Model"].startswith("7 layers")
    assert numbers(run)["mfu"] is None
    assert commands(run) == ["fathom pretrain 'runs/<i>x</i>/config.yaml' name='<i>x</i>-again'"]


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": []},
        {"gpus": None},
        {"variables": {"CUDA_VISIBLE_DEVICES": ""}},
        {"gpus": [{"name": "NVIDIA H200"}, {"name": "NVIDIA L4"}]},
    ],
)
def test_no_share_of_a_peak_without_gpus_of_one_kind(run_dir: Path, change: dict[str, Any]) -> None:
    (run_dir / "environment.json").write_text(json.dumps({**ENVIRONMENT, **change}))
    run = read_run(run_dir)
    assert numbers(run)["mfu"] is None
    assert dict(facts(run))["Machine"] == "Some CPU (4 cores), node-7"


@pytest.mark.parametrize(
    "argv",
    [
        ["/v/bin/python", "/v/bin/fathom", "pretrain", "x.yaml"],
        ["fathom", "pretrain", "x.yaml"],
        ["python", "-m", "pretrain.train.run", "x.yaml"],
    ],
)
def test_the_command_is_what_a_user_types(run_dir: Path, argv: list[str]) -> None:
    (run_dir / "environment.json").write_text(json.dumps({"command": argv}))
    assert commands(read_run(run_dir))[0] == "fathom pretrain x.yaml"


def test_the_facts_fit_what_a_run_records(run_dir: Path) -> None:
    (run_dir / "environment.json").write_text(json.dumps(environment()))
    run = read_run(run_dir)
    assert dict(facts(run))["Machine"].endswith(socket.gethostname())
    assert len(run.environment.word("git.commit") or "0" * 40) == 40
    assert run.environment.words("command")


def test_starting_a_finished_run_again_changes_nothing(run_dir: Path) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("start", 60)
        writer.write("end", 60, reason="all steps are done", exit_code=0)
    run = read_run(run_dir)
    assert status(run) == ("good", "finished at step 60")
    assert numbers(run)["resumes"] == 1


def test_state_tells_how_a_killed_run_ended(run_dir: Path) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("start", 60)
    (run_dir / "state.json").write_text(json.dumps({"state": "failed", "reason": "rank 3: out of memory"}))
    assert status(read_run(run_dir)) == ("bad", "failed at step 60: rank 3: out of memory")


def test_equal_warnings_are_one_row(run_dir: Path) -> None:
    assert grouped_warnings(read_run(run_dir)) == [("10 – 60 (6×)", "slow <disk> & more")]


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)


def test_long_series_keep_their_spikes() -> None:
    steps, values = np.arange(100_000.0), np.zeros(100_000)
    values[[12_345, 99_999]] = 7.0, -3.0
    few_steps, few = envelope(steps, values)
    assert len(few) <= MOST_POINTS + 2
    assert (few.max(), few.min()) == (7.0, -3.0)
    assert few_steps[np.argmax(few)] == 12_345
    assert np.all(np.diff(few_steps) > 0)


def test_running_median_follows_a_ramp_and_ignores_a_spike() -> None:
    ramp = np.arange(100.0)
    places, smooth = running_median(ramp, 11)
    assert places[0] == 2
    np.testing.assert_array_equal(smooth[:-5], ramp[places][:-5])
    ramp[50] = 1e9
    assert np.max(running_median(ramp, 11)[1]) < 100
