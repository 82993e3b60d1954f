"""Engines that somebody else has started."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.e2e.cpu.helpers.runs import ENGINE, Starter
from tests.helpers.embedded_engine import running_engine


@pytest.mark.parametrize("transport", ["auto", pytest.param("distributed", marks=pytest.mark.slow)])
def test_engines_of_somebody_else_get_weights_and_requests_and_outlive_the_run(
    start: Starter, model: Path, transport: str
) -> None:
    with running_engine(model, "--random-seed", "0", "--num-threads", "1") as engine:
        address = urlparse(engine.url).netloc
        run = start(
            *("--no-colocate", "--rollout-external-engine-addrs", address, "--update-weight-transport", transport)
        )
        run.reaches("record_000000.json")
        assert run.processes(ENGINE) == []
        run.succeeds().leaves_nothing(within_s=10)
        assert {v for sample in run.samples(1) for v in sample["weight_versions"]} == {"1"}
        assert engine.get("/model_info").json["weight_version"] == "2"
        assert engine.generate(text="1+2=", sampling_params={"max_new_tokens": 1})["meta_info"]["weight_version"] == "2"
