"""Each row of the table against a log that shows its fault."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from vllm_unified.engines.reasons import LONGEST, ROWS, bare, explain

LOGS = Path(__file__).parent / "logs"


@dataclass(frozen=True)
class Case:
    """`made`: run is vLLM 0.32 (or PyTorch 2.13 alone) with the fault made; stub is the same over a driver library of
    our own that reports an old version; source is put together from the texts in the sources, because no machine
    with that fault was at hand."""

    name: str
    made: Literal["run", "stub", "source"]
    line: str
    returncode: int = 1

    def log(self) -> list[str]:
        return (LOGS / f"{self.name}.txt").read_text(encoding="utf-8").splitlines()


CASES = [
    Case(
        "memory-at-start",
        "source",
        "cuda:0 has 9.41 of 23.68 GiB free, and the model asks for 21.79 GiB (gpu_memory_utilization 0.92);"
        " lower gpu_memory_utilization or memory_gib in config/models.json, or end what else uses the GPU",
    ),
    Case(
        "memory-at-start-cpu",
        "run",
        "the machine (memory node 0) has 10.46 of 11.84 GiB free, and the model asks for 11.72 GiB "
        "(gpu_memory_utilization 0.99); lower gpu_memory_utilization or memory_gib in config/models.json",
    ),
    Case(
        "kv-cache-memory-cpu",
        "run",
        "no room for the KV cache: -0.61 GiB are left for it of a share of 0.01 GiB (machine: 11.84 GiB); "
        "raise gpu_memory_utilization or memory_gib in config/models.json, or stop other models",
    ),
    Case(
        "kv-cache-memory-cpu-fixed",
        "run",
        "the KV cache is to have 60.0 GiB and 8.63 GiB are free; lower kv_cache_memory_gib in "
        "config/models.json, or stop other models",
    ),
    Case(
        "kv-cache-none",
        "run",
        "the weights leave no room for the KV cache; raise gpu_memory_utilization, memory_gib or "
        "kv_cache_memory_gib in config/models.json, or take a smaller model",
    ),
    Case(
        "kv-cache-too-small",
        "run",
        "a context of 2048 tokens needs 0.0 GiB of KV cache and there are 0.0 GiB, enough for 384 tokens; "
        "set max_model_len to 384 or less in config/models.json, or raise gpu_memory_utilization or "
        "kv_cache_memory_gib",
    ),
    Case(
        "kv-cache-far-too-small",
        "source",
        "a context of 131072 tokens needs 16.0 GiB of KV cache and there are 0.01 GiB; lower max_model_len "
        "in config/models.json, or raise gpu_memory_utilization or kv_cache_memory_gib",
    ),
    Case(
        "memory-freed-meanwhile",
        "source",
        "another program freed GPU memory while vLLM measured it (free: 11.52 GiB, then 14.03 GiB); it is "
        "tried again by itself; if it happens again, set kv_cache_memory_gib in config/models.json",
    ),
    Case(
        "cuda-out-of-memory-warm-up",
        "source",
        "the GPU's memory ran out while warming up with 256 requests (sampler); lower "
        "gpu_memory_utilization or memory_gib, or set engine_args.max-num-seqs lower, in config/models.json",
    ),
    Case(
        "cuda-out-of-memory",
        "source",
        "GPU 0 ran out of memory: 260.00 MiB more wanted, 121.44 MiB of 23.68 GiB free; lower max_model_len"
        " or engine_args.max-num-seqs in config/models.json, move the model to another GPU (gpus), or end "
        "what else uses this one",
    ),
    Case(
        "nvidia-driver-too-old",
        "stub",
        "the NVIDIA driver is too old for this vLLM (it offers CUDA 12.4); install a newer NVIDIA driver on"
        " the host and restart; `nvidia-smi` shows the one in use",
    ),
    Case(
        "nvidia-driver-symbol",
        "stub",
        "the NVIDIA driver is too old for this vLLM (it has no cuTensorMapEncodeTiled); install a newer "
        "NVIDIA driver on the host and restart; `nvidia-smi` shows the one in use",
    ),
    Case(
        "nvidia-driver-none",
        "run",
        "PyTorch found no NVIDIA driver; install the driver on the host; in a container, start it with the "
        "GPUs (`nvidia-smi` must work in it)",
    ),
    Case(
        "no-device",
        "run",
        "vLLM found no GPU that it can use; `nvidia-smi` must list one here: install the NVIDIA driver, "
        "give the container the GPUs; without a GPU, install the CPU build",
    ),
    Case(
        "device-out-of-bounds",
        "stub",
        "PyTorch can use 0 GPUs and the model asks for number 0, counted from 0; check gpus in "
        "config/models.json; with 0 usable, the NVIDIA driver is too old or CUDA_VISIBLE_DEVICES hides the "
        "GPU",
    ),
    Case(
        "too-few-gpus",
        "source",
        "the model asks for 4 GPUs and vLLM sees 2; lower tensor_parallel_size (and pipeline_parallel_size)"
        " in config/models.json, or give it more GPUs",
    ),
    Case(
        "gpu-too-old",
        "source",
        "this GPU is too old or too new for this build of vLLM; use another GPU (gpus in "
        "config/models.json) or a vLLM built for this one",
    ),
    Case(
        "bfloat16-unsupported",
        "source",
        'Tesla T4 (compute capability 7.5) has no bfloat16, which needs 8.0; set "dtype": "half" in config/models.json',
    ),
    Case(
        "nccl",
        "source",
        "the GPUs of this model could not talk to each other (NCCL: unhandled system error (run with "
        "NCCL_DEBUG=INFO for details)); give the container more /dev/shm (shm_size), or try "
        "NCCL_P2P_DISABLE=1 in the model's env in config/models.json",
    ),
    Case(
        "cuda-fault",
        "source",
        "the GPU reported an error: an illegal memory access was encountered; it is started again by "
        "itself; if it happens again, look at `nvidia-smi` and `dmesg` on the host, and see ./deploy.sh "
        "logs NAME",
    ),
    Case(
        "no-folder",
        "run",
        "/srv/models/nowhere: no such folder; put the weights there, or correct path in config/models.json",
    ),
    Case(
        "no-config",
        "run",
        "/srv/models/empty holds no config.json, so no model; download the model again and completely, or "
        "correct path in config/models.json",
    ),
    Case(
        "config-not-json",
        "run",
        "/srv/models/badjson/config.json is no valid JSON; download this file again; it is cut short or was edited",
    ),
    Case(
        "no-weights",
        "run",
        "/srv/models/noweights holds no weights (*.safetensors); download the model again and completely, "
        "or correct path in config/models.json",
    ),
    Case(
        "weights-part-missing",
        "run",
        "the weights file /srv/models/shards/model-00002-of-00002.safetensors is missing; download the "
        "model again and completely",
    ),
    Case(
        "weights-pointer",
        "run",
        "a weights file is no safetensors file, most likely a Git LFS pointer of a few lines; fetch the "
        "real file (`git lfs pull` in the model's folder) or download the model again",
    ),
    Case(
        "weights-damaged",
        "run",
        "a weights file (*.safetensors) is cut short or damaged (incomplete metadata, file not fully "
        "covered); download the model again; a full disk or a broken-off download leaves such files",
    ),
    Case(
        "weights-shape",
        "run",
        "the weights do not fit config.json (a side of 256 wanted, 128 found); config.json and weights are "
        "of different models or versions: download the model again into an empty folder",
    ),
    Case(
        "no-processor",
        "run",
        "/srv/models/noproc holds no preprocessor_config.json; download the model again and completely",
    ),
    Case(
        "tokenizer-damaged",
        "run",
        "the model's tokenizer.json is not a complete tokenizer; download tokenizer.json again",
    ),
    Case(
        "no-tokenizer",
        "source",
        "/srv/models/chat holds no tokenizer; download the model again and completely (tokenizer.json, "
        "tokenizer_config.json)",
    ),
    Case(
        "permission",
        "run",
        "/srv/models/private/config.json may not be read by the user that runs the server; give that user "
        "the right to read it (chmod, chown)",
    ),
    Case(
        "max-model-len",
        "run",
        "max_model_len 999999 is more than the model's own 2048; lower max_model_len in config/models.json,"
        " or leave it out",
    ),
    Case(
        "max-batched-tokens",
        "run",
        "engine_args.max-num-batched-tokens 512 is less than max_model_len 2048; raise the one or lower the"
        " other in config/models.json",
    ),
    Case(
        "architecture",
        "run",
        "this vLLM has no support for the model's architecture 'NoSuchForCausalLM'; use another model, or a"
        " vLLM version that lists it as supported",
    ),
    Case(
        "model-type",
        "run",
        "the installed transformers does not know the model's type nosuch; use another model, or newer "
        "versions of vLLM and transformers",
    ),
    Case(
        "trust-remote-code",
        "run",
        "/srv/models/remotecode brings Python code of its own; if you trust where it comes from, set "
        '"trust_remote_code": true in config/models.json',
    ),
    Case(
        "not-generative",
        "run",
        'the model makes embeddings and cannot chat; set "type": "embedding" or "rerank" in '
        "config/models.json, or take a chat model",
    ),
    Case(
        "not-pooling",
        "source",
        'the model cannot make embeddings or scores; set "type": "chat" in config/models.json, or take an '
        "embedding or rerank model",
    ),
    Case(
        "dtype",
        "run",
        'a gemma2 model does not run in float16; set "dtype": "bfloat16" (or "float32") in '
        "config/models.json, or leave it out",
    ),
    Case(
        "heads",
        "run",
        "the model's 2 attention heads cannot be shared evenly by 3 devices; set tensor_parallel_size in "
        "config/models.json to a divisor of 2",
    ),
    Case(
        "quantization-unknown",
        "run",
        "vLLM does not know the model's quantization nosuch; use another version of the model, such as AWQ,"
        " GPTQ or FP8, or one that is not quantized",
    ),
    Case(
        "quantization-mismatch",
        "run",
        "the model is quantized with awq, and engine_args.quantization says gptq; remove quantization from "
        "engine_args in config/models.json; vLLM finds it by itself",
    ),
    Case(
        "flag-unknown",
        "run",
        "vLLM's server has no flag --max-modl-len; correct or remove it in engine_args in config/models.json",
    ),
    Case(
        "flag-value",
        "run",
        "vLLM does not accept the value of --dtype: invalid choice: 'int4' (choose from 'auto', 'bfloat16',"
        " 'float', 'float16', 'float32', 'half'); correct it in config/models.json (a field of that name, "
        "or engine_args)",
    ),
    Case(
        "setting-range",
        "run",
        "gpu_memory_utilization is 1.5; vLLM says: Input should be less than or equal to 1; correct it in "
        "config/models.json (a field of that name, or engine_args)",
    ),
    Case(
        "chat-template",
        "run",
        "the chat template /srv/templates/none.jinja does not exist; correct chat-template in engine_args "
        "in config/models.json; name the file with its whole path",
    ),
    Case(
        "tool-parser-wanted",
        "run",
        "enable-auto-tool-choice is set without tool-call-parser; name the parser of this model family in "
        "engine_args.tool-call-parser in config/models.json, such as hermes for Qwen",
    ),
    Case(
        "tool-parser",
        "run",
        "vLLM has no tool-call-parser nosuch; correct engine_args.tool-call-parser in config/models.json; "
        "./deploy.sh logs NAME lists the known ones",
    ),
    Case(
        "reasoning-parser",
        "run",
        "vLLM has no reasoning-parser nosuch; correct engine_args.reasoning-parser in config/models.json; "
        "./deploy.sh logs NAME lists the known ones",
    ),
    Case(
        "port-taken",
        "run",
        "another program listens on this model's port; give it another port in config/models.json, or end "
        "the other program (`ss -ltnp` names it)",
    ),
    Case(
        "address",
        "run",
        "this machine does not have the address that the server is to listen on; correct VLLM_ENGINE_HOST "
        "in .env; 127.0.0.1 always works",
    ),
    Case(
        "shared-memory",
        "run",
        "the shared memory (/dev/shm) is too small: 160 MiB wanted, 0 MiB free; in a container set shm_size"
        " (or --shm-size, --ipc=host); else remove old files from /dev/shm",
    ),
    Case(
        "disk-full",
        "run",
        "the disk is full; make room on the disk of this project's run folder and of /tmp (`df -h`), then "
        "./deploy.sh restart NAME",
    ),
    Case(
        "open-files",
        "run",
        "the server may not open more files; raise the limit for open files (`ulimit -n 65536` before "
        "./deploy.sh, or ulimits.nofile in a container)",
    ),
    Case(
        "compiler",
        "run",
        "vLLM found no C compiler, which it compiles the model's graphs with; install one (`apt-get install"
        " g++`), or set engine_args.enforce-eager to true in config/models.json, which is slower",
    ),
    Case(
        "lscpu",
        "run",
        "the program lscpu is missing, with which vLLM counts the cores; install it (`apt-get install "
        "util-linux`) or add its folder to PATH",
    ),
    Case(
        "package-missing",
        "run",
        "the model or a setting needs the Python package torchvision, which is not installed; install it "
        "beside vLLM, in the same .venv or image, or remove from engine_args what needs it",
    ),
    Case(
        "worker-out-of-memory",
        "run",
        "VllmWorker-0 was killed, most likely because the machine's own memory (RAM) ran out; stop other "
        "programs or models, lower kv_cache_memory_gib or memory_gib in config/models.json, or add RAM "
        "(`dmesg` tells)",
    ),
    Case(
        "worker-ended",
        "run",
        "a worker process of the server ended without a word, as after a kill from outside; it is started "
        'again by itself; if it happens again, look for "Out of memory" in `dmesg`, and see ./deploy.sh '
        "logs NAME",
    ),
    Case(
        "out-of-memory",
        "run",
        "the server was killed from outside, most likely because the machine's own memory (RAM) ran out; "
        "stop other programs or models, lower kv_cache_memory_gib or memory_gib in config/models.json, or "
        "add RAM (`dmesg` tells)",
        returncode=-9,
    ),
    Case(
        "engine-ended",
        "run",
        "the server's inner process (EngineCore) ended without a word, as after a kill from outside; it is "
        'started again by itself; if it happens again, look for "Out of memory" in `dmesg`, and see '
        "./deploy.sh logs NAME",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_log_is_explained(case: Case) -> None:
    assert explain(case.log(), case.returncode) == case.line
    assert len(case.line) <= LONGEST


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_other_row_matches_the_log(case: Case) -> None:
    text = "\n".join(map(bare, case.log()))
    assert [row.name for row in ROWS if row.find(text, case.returncode)] == [case.name]


def test_every_row_has_its_log() -> None:
    assert [row.name for row in ROWS] == [case.name for case in CASES]
    assert {path.stem for path in LOGS.iterdir()} == {row.name for row in ROWS} | {"healthy"}


def test_a_good_start_needs_no_explanation() -> None:
    lines = (LOGS / "healthy.txt").read_text(encoding="utf-8").splitlines()
    assert "Application startup complete." in lines[-1]
    assert explain(lines, 0) is None


def test_an_unknown_fault_is_left_to_the_caller() -> None:
    assert explain(["ValueError: never seen before"], 1) is None
    assert explain([], None) is None


def test_a_long_value_gives_way_to_the_remedy() -> None:
    path = f"/srv/{'x' * 500}/model"
    line = explain([f"RuntimeError: Cannot find any model weights with `{path}`"], 1)
    assert line is not None
    assert len(line) <= LONGEST
    assert line.startswith("/srv/")
    assert line.endswith("or correct path in config/models.json")
