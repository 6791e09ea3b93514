"""What is read of a real vLLM's /metrics, and the smallest request of each kind."""

from typing import get_args

import pytest

from vllm_unified.engines.progress import METRIC, SMALLEST_REQUESTS
from vllm_unified.settings import Kind

# Lines of vLLM 0.32's own, with one request in it and another behind that.
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo-chat"} 1.0
vllm:num_requests_waiting{engine="0",model_name="demo-chat"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo-chat",reason="capacity"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="demo-chat"} 40.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo-chat",source="local_compute"} 40.0
vllm:prompt_tokens_created{engine="0",model_name="demo-chat"} 1.7953e+09
vllm:generation_tokens_total{engine="0",model_name="demo-chat"} 1.25e+03
vllm:request_success_total{engine="0",finished_reason="stop",model_name="demo-chat"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="demo-chat"} 3.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="demo-chat"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="demo-chat"} 9.0
vllm:iteration_tokens_total_sum{engine="0",model_name="demo-chat"} 1290.0
"""


PRESENT = [("num_requests_running", "1.0"), ("num_requests_waiting", "1.0")]
GROWING = [("", "40.0"), ("", "1.25e+03"), ("", "2.0"), ("", "3.0"), ("", "9.0")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (METRICS, PRESENT + GROWING),
        ("vllm:num_requests_running 4.0\n", [("num_requests_running", "4.0")]),
        ("", []),
        ("process_cpu_seconds_total 3.0\n", []),
    ],
)
def test_the_counters_that_count(text: str, expected: list[tuple[str, str]]) -> None:
    assert METRIC.findall(text) == expected


def test_every_kind_has_a_smallest_request() -> None:
    assert set(SMALLEST_REQUESTS) == set(get_args(Kind))
