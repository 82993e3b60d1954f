"""Settings of the FSDP backend together, from a file, on two ranks; and a run that continues with them."""

from __future__ import annotations

import pytest
import yaml
from safetensors.torch import load_file

from tests.e2e.cpu.helpers.runs import Starter

pytestmark = pytest.mark.slow

SETTINGS = {
    "fp16": True,
    "initial_loss_scale": 2.0**40,
    "fsdp_cpu_offload": True,
    "fsdp_reshard_after_forward": False,
    "gradient_checkpointing": True,
    "offload_ref": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "freeze_params_name_list": ["embed_tokens"],
    "num_steps_per_rollout": 2,
    "async_save": True,
    "max_skipped_steps": 0,
}


def test_settings_of_a_file_work_together_and_a_run_continues_with_them(start: Starter) -> None:
    file = start.folder / "fsdp.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    exports = start.folder / "hf_{rollout_id}"
    flags = ("--config", str(file), "--save", str(start.folder / "ckpt"), "--save-hf", str(exports), "--resume")
    two = ("--actor-num-gpus-per-node", "2")
    first = start(*flags, *two, "--num-rollout", "2", name="first").succeeds()
    metrics = first.metrics("train/step")
    assert [step["train/overflowed_steps"] for step in metrics] == [2, 2]  # and none was counted as skipped
    assert metrics[-1]["train/loss_scale"] == 2.0**37
    resumed = start(*flags, *two, "--num-rollout", "18", name="resumed").succeeds()
    metrics = resumed.metrics("train/step")
    assert metrics[0]["train/loss_scale"] == 2.0**35  # halved after each of five steps
    assert metrics[-1]["train/overflowed_steps"] == 0
    before, after = (
        load_file(start.model / "model.safetensors"),
        load_file(start.folder / "hf_17/model-00001.safetensors"),
    )
    assert {name for name in before if after[name].equal(before[name])} == {"model.embed_tokens.weight"}
    name = "train/train_rollout_logprob_abs_diff"
    assert 0 < metrics[-1][name] < 0.05  # of half precision
