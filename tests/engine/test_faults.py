"""What may happen to the demonstration at night, on the real vLLM. After each fault all is back without a hand."""

import contextlib
import os
import signal
import time
from functools import partial

import psutil
import pytest

from tests.conftest import eventually, listening
from tests.engine.conftest import KEYS, Demo
from vllm_unified import state
from vllm_unified.state import Phase
from vllm_unified.supervision.ask import programs


def test_api_server_killed(demo: Demo) -> None:
    restarts = demo.state("rerank").restarts
    with demo.surviving("API server SIGKILLed", "rerank"):
        os.kill(demo.pid("rerank"), signal.SIGKILL)
        eventually(lambda: demo.ask("rerank").status_code == 503, 5)
        refused = demo.ask("rerank")
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "model_not_ready"
    assert demo.state("rerank").restarts == restarts + 1


@pytest.mark.parametrize("title", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_process_behind_the_api_server_killed(demo: Demo, title: str) -> None:
    with demo.surviving(f"{title} SIGKILLed", "embedding"):
        demo.process("embedding", title).kill()


def test_keeper_killed(demo: Demo) -> None:
    keeper = demo.state("rerank").keeper
    assert keeper is not None
    with demo.surviving("keeper SIGKILLed", "rerank"):
        os.kill(keeper.pid, signal.SIGKILL)


def test_keeper_killed_while_its_engine_hangs(demo: Demo) -> None:
    """Its API server ends at the SIGTERM that a killed keeper leaves behind, but can't end its EngineCore."""
    keeper = demo.state("chat").keeper
    assert keeper is not None
    core, worker = demo.process("chat", "VLLM::EngineCore"), demo.process("chat", "VLLM::Worker")
    with demo.surviving("keeper SIGKILLed while EngineCore is SIGSTOPped", "chat"):
        core.suspend()
        os.kill(keeper.pid, signal.SIGKILL)
    assert not core.is_running()
    assert not worker.is_running()


def test_engine_core_stopped(demo: Demo) -> None:
    """It hangs, and /health still answers 200."""
    with demo.surviving("EngineCore SIGSTOPped, found by its lack of progress", "embedding"):
        demo.process("embedding", "VLLM::EngineCore").suspend()
        eventually(lambda: "no progress" in (demo.state("embedding").note or ""), 30)
        assert demo.state("embedding").phase is Phase.READY
    assert "hung" in (demo.run_folder / "logs" / "embedding.log").read_text()


def test_router_killed(demo: Demo) -> None:
    before = {key: demo.pid(key) for key in KEYS}
    running = programs(demo.run_folder)
    assert running is not None
    with demo.surviving("router SIGKILLed", door="own", is_back=lambda: router_answers(demo)):
        os.kill(running["router"]["pid"], signal.SIGKILL)
    assert {key: demo.pid(key) for key in KEYS} == before


def router_answers(demo: Demo) -> bool:
    with contextlib.suppress(OSError, Exception):
        return all(demo.ask(key).status_code == 200 for key in KEYS)
    return False


def test_two_killed_at_the_same_moment(demo: Demo) -> None:
    with demo.surviving("two killed at the same moment on one device", "chat", "ocr"):
        for pid in (demo.pid("chat"), demo.pid("ocr")):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: Phase.STARTING in (demo.state("chat").phase, demo.state("ocr").phase))
        assert [demo.state(key).phase for key in ("chat", "ocr")].count(Phase.STARTING) == 1


def test_weights_truncated(demo: Demo) -> None:
    (weights,) = (demo.home / "models" / "demo" / "chat").glob("*.safetensors")
    whole = weights.read_bytes()
    with demo.surviving("weights truncated, then restored", "chat"):
        weights.write_bytes(whole[: len(whole) // 2])
        os.kill(demo.pid("chat"), signal.SIGKILL)
        reason = failed(demo, "chat", unlike="SIGKILL")
        weights.write_bytes(whole)
    assert "cut short or damaged" in reason, reason
    assert "download the model again" in reason, reason


def test_weights_folder_missing(demo: Demo) -> None:
    folder = demo.home / "models" / "demo" / "ocr"
    with demo.surviving("weights folder missing, then restored", "ocr"):
        folder.rename(folder.with_name("away"))
        os.kill(demo.pid("ocr"), signal.SIGKILL)
        assert "no such folder" in failed(demo, "ocr", unlike="SIGKILL")
        folder.with_name("away").rename(folder)


def test_port_taken(demo: Demo) -> None:
    with demo.surviving("port taken by a stranger, then freed", "rerank"):
        os.kill(demo.pid("rerank"), signal.SIGKILL)
        with contextlib.ExitStack() as stack:
            eventually(lambda: takes(stack, demo.ports["rerank"]), 10)
            assert f"port {demo.ports['rerank']}" in failed(demo, "rerank", unlike="SIGKILL")


def takes(stack: contextlib.ExitStack, port: int) -> bool:
    try:
        stack.enter_context(listening(port))
    except OSError:
        return False
    return True


def failed(demo: Demo, key: str, unlike: str) -> str:
    """The reason of the next failure that is not the one that we made."""
    return str(
        eventually(
            lambda: (reason := demo.state(key).reason) is not None and unlike not in reason and reason,
            180,
        )
    )


def test_log_folder_full(demo: Demo) -> None:
    logs = demo.run_folder / "logs"
    if not os.path.ismount(logs):
        pytest.skip("needs the right to mount a small disk")
    filler = logs / "filler"
    with demo.surviving("disk full in the log folder", "rerank"):
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        os.kill(demo.pid("rerank"), signal.SIGKILL)
    filler.unlink()
    before = len((logs / "embedding.log").read_bytes())
    with demo.surviving("after it: space again", "embedding"):
        os.kill(demo.pid("embedding"), signal.SIGKILL)
    assert len((logs / "embedding.log").read_bytes()) > before


def test_ten_crashes_in_a_row(demo: Demo) -> None:
    restarts = demo.state("rerank").restarts
    with demo.surviving("ten crashes in a row", "rerank"):
        for crash in range(10):
            os.kill(demo.pid("rerank"), signal.SIGKILL)
            eventually(partial(has_restarted, demo, restarts + crash + 1), 30)
            if crash < 9:
                eventually(lambda: demo.state("rerank").phase is Phase.STARTING, 30)
    assert demo.state("rerank").restarts == restarts + 10


def has_restarted(demo: Demo, times: int) -> bool:
    return demo.state("rerank").restarts == times


def test_the_clock_steps_an_hour(demo: Demo) -> None:
    before = {key: demo.state(key) for key in KEYS}
    offset = demo.home / "clock" / "offset"
    try:
        with demo.surviving("the clock steps an hour, forth and back"):
            for seconds in (3600, -3600):
                offset.write_text(str(seconds))
                time.sleep(5)
                assert all(demo.ask(key).status_code == 200 for key in KEYS)
    finally:
        offset.unlink()
    assert {key: demo.state(key) for key in KEYS} == before
    assert all(abs(state.wall_clock(each.since) - time.time()) < 3000 for each in before.values())


def test_no_process_ever_became_a_zombie(demo: Demo) -> None:
    ours = {process.pid for process in demo.processes()}
    zombies = [each for each in psutil.process_iter() if each.status() == psutil.STATUS_ZOMBIE and each.ppid() in ours]
    assert zombies == []
