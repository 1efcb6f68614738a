"""What a step says it cost."""

import time

import pytest
import torch

from refine_harness.training.costs import Stopwatch


def test_parts_of_one_name_are_summed_and_together_are_the_whole():
    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()
    for part in ("reading", "backward", "reading", "backward"):
        time.sleep(0.01 if part == "reading" else 0.02)
        watch.mark(part)
    whole = time.perf_counter() - started
    costs = watch.costs(tokens=600, parameters=1)
    assert costs["seconds_backward"] >= 0.04 and costs["seconds_reading"] >= 0.02
    assert costs["seconds_reading"] + costs["seconds_backward"] == pytest.approx(whole, rel=0.2)
    assert costs["tokens_per_second"] == pytest.approx(600 / (costs["seconds_reading"] + costs["seconds_backward"]))
