"""What keepers leave in run/engines."""

import json
from pathlib import Path

from vllm_unified.state import FILE_BYTES, EngineState, Phase, path_of, read_as_written


def test_a_state_that_an_earlier_release_wrote(tmp_path: Path) -> None:
    EngineState("chat", Phase.READY, since=1.0, restarts=2).write(tmp_path)
    path = path_of(tmp_path, "chat")
    written = json.loads(path.read_text())
    assert path.stat().st_size == FILE_BYTES
    del written["hangs"], written["down_for"]
    path.write_text(json.dumps(written))
    assert read_as_written(tmp_path, "chat") == EngineState("chat", Phase.READY, since=1.0, restarts=2)
