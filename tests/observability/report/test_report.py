import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slime.observability.metrics import eval_metrics, rollout_metrics
from slime.observability.report import write_report
from slime.observability.timer import PhaseTimer
from slime.observability.tracking import Tracker
from slime.observability.trajectories import write_samples
from slime.utils.types import Sample, SampleStatus

NASTY = "<script>alert('x')</script>&\"\n"


def make_rollout(rollout_id: int) -> tuple[list[Sample], list[float]]:
    samples = [
        Sample(
            group_index=rollout_id * 4 + i // 4,
            index=rollout_id * 16 + i,
            prompt=NASTY,
            tokens=[0, 1, 2, 3, 4],
            response_length=4,
            loss_mask=[1, 0, 1, 1],
            rollout_log_probs=[-0.5, 0.0, -0.25, -1.0],
            label=NASTY,
            status=SampleStatus.COMPLETED,
            weight_versions=[str(rollout_id)],
        )
        for i in range(16)
    ]
    return samples, [float(i % 3 == 0) for i in range(16)]


def token_texts(token_ids: list[int]) -> list[str]:
    return [[NASTY, "<b>", " tool ", "\n", "é"][token_id] for token_id in token_ids]


def make_run(run_dir: Path, num_rollouts: int) -> None:
    """A run of the real writers, with all that the report shows."""
    timer = PhaseTimer(run_dir, process="driver")
    with Tracker(run_dir) as tracker:
        evaluated = [Sample(tokens=[1, 2], response_length=1)] * 4
        for rollout_id in range(num_rollouts):
            timer.rollout_id = rollout_id
            samples, rewards = make_rollout(rollout_id)
            with timer.phase("step"), timer.phase(NASTY):
                metrics = rollout_metrics(samples, rewards, seconds=2.0, num_gpus=1, weight_version=rollout_id)
            write_samples(run_dir, rollout_id, samples, rewards=rewards, token_texts=token_texts)
            tracker.log("rollout/step", rollout_id, metrics)
            tracker.log("train/step", rollout_id, {"train/loss": 0.5, "train/grad_norm": math.nan})
            solved = [1.0] * (rollout_id + 1) + [0.0] * 3
            data = {f"a{NASTY}": {"rewards": solved[:4], "truncated": [False] * 4, "samples": evaluated}}
            tracker.log("eval/step", rollout_id, eval_metrics(data, 1))
    timer.close()
    (run_dir / "args.yaml").write_text("lr: 0.001\nwandb_key: hunter2\nlabel_key: answer\n")


class Page(HTMLParser):
    """Collects tags, references and text, and checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def render(run_dir: Path) -> tuple[str, Page]:
    html = write_report(run_dir).html.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path: Path):
    make_run(tmp_path, 4)
    html, page = render(tmp_path)
    assert page.references == []
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", html.replace("&lt;script", ""))
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_comes_from_samples_names_and_phases_is_escaped(tmp_path: Path):
    make_run(tmp_path, 3)
    html, page = render(tmp_path)
    assert "script" not in page.tags and "b" in page.tags
    assert "<script" not in html
    assert "alert('x')" in page.text


def test_headlines_tell_before_and_after(tmp_path: Path):
    make_run(tmp_path, 4)
    _, page = render(tmp_path)
    assert "0.250 → 1.000" in page.text
    assert "4 rollouts" in page.text


def test_tokens_are_shaded_by_loss_mask_and_tell_their_log_prob(tmp_path: Path):
    make_run(tmp_path, 1)
    html, _ = render(tmp_path)
    assert html.count('<span class="tok off"> tool </span>') == 8
    assert html.count('<span class="tok on" title="-0.2500">') == 8
    assert html.count('<span class="tok on" title="-0.5000">&lt;b&gt;</span>') == 8


def test_arguments_are_shown_without_secrets(tmp_path: Path):
    make_run(tmp_path, 1)
    html, page = render(tmp_path)
    assert "hunter2" not in html
    assert "wandb_key: (not shown)" in page.text
    assert "label_key: answer" in page.text


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path):
    Tracker(tmp_path).close()
    _, page = render(tmp_path)
    for sentence in (
        "no rollout is done yet",
        "No reward and no evaluation has been recorded yet",
        "Not recorded in this run: response length",
        "No phases.jsonl",
        "No samples were kept",
        "No args.yaml",
    ):
        assert sentence in page.text


@pytest.mark.parametrize("missing", ["phases.jsonl", "samples", "args.yaml"])
def test_a_run_with_a_part_missing_is_reported(tmp_path: Path, missing: str):
    make_run(tmp_path, 2)
    part = tmp_path / missing
    part.rename(tmp_path / "elsewhere")
    _, page = render(tmp_path)
    assert "0.250 → 0.500" in page.text


def test_a_torn_last_line_does_not_stop_the_report(tmp_path: Path):
    make_run(tmp_path, 3)
    for name in ("metrics.jsonl", "phases.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-7])
    render(tmp_path)


def test_only_nan_and_constant_values_are_drawn_or_left_out(tmp_path: Path):
    with Tracker(tmp_path / "run") as tracker:
        for step in range(3):
            tracker.log("rollout/step", step, {"rollout/raw_reward": math.nan})
            tracker.log("train/step", step, {"train/loss": 0.0, "train/grad_norm": math.inf, "train/kl_loss": 1e-30})
    html, page = render(tmp_path / "run")
    assert "nan" not in html
    assert "KL to the reference" in page.text
    assert "gradient norm" in page.text  # among what was not recorded


def test_staleness_is_shown_as_a_histogram_where_there_is_any(tmp_path: Path):
    make_run(tmp_path, 3)
    assert "Samples by staleness" not in render(tmp_path)[1].text
    with Tracker(tmp_path, start_rollout_id=3) as tracker:
        samples, rewards = make_rollout(2)
        metrics = rollout_metrics(samples, rewards, seconds=2.0, num_gpus=1, weight_version=3)
        tracker.log("rollout/step", 3, metrics | {"rollout/staleness/num_refreshed": 2.0})
    text = " ".join(render(tmp_path)[1].text.split())
    assert "versions behindsamplesshare04875%11625%" in text.replace(" ", "").replace(
        "versionsbehind", "versions behind"
    )
    assert "2 groups were too old and sampled anew" in text


def test_samples_of_rollouts_that_a_resume_took_back_are_not_shown(tmp_path: Path):
    make_run(tmp_path, 4)
    with Tracker(tmp_path, start_rollout_id=1) as tracker:
        tracker.log("rollout/step", 1, {"rollout/raw_reward": 1.0})
    _, page = render(tmp_path)
    assert "Rollout 1" in page.text and "Rollout 3" not in page.text
    assert "resumed at rollout 1" in page.text


@pytest.mark.parametrize(("name", "problem"), [("empty", "holds no metrics.jsonl"), ("absent", "is no directory")])
def test_a_directory_that_is_no_run_is_one_sentence(tmp_path: Path, name: str, problem: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=problem):
        write_report(tmp_path / name)


def test_the_command_prints_the_paths_and_fails_in_one_sentence(tmp_path: Path):
    make_run(tmp_path, 1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from slime.cli.report import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)

    done = run(str(tmp_path), "--output", str(tmp_path / "out" / "a.html"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "a.html").is_file() and (tmp_path / "out" / "learning_curve.png").is_file()
    assert str(tmp_path / "out" / "a.html") in done.stdout
    failed = run(str(tmp_path / "nowhere"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("slime report: ") and failed.stderr.count("\n") == 1


def test_observability_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from slime.observability import metrics, progress, report, timer, tracking, trajectories\n"
        "print({'torch', 'ray', 'matplotlib', 'numpy', 'tensorboard', 'wandb', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
