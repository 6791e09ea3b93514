"""Why a vLLM server could not start or ended: a table from what it wrote to what to do about it.

The texts are those of vLLM 0.32 and of the libraries below it; tests/engines/logs has one log for each row.
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 300
# Each process of a server writes its own prefix. What is a warning only keeps its prefix and so begins no row's line.
PREFIX = re.compile(r"^\([^)]*pid=\d+\) |^(?:ERROR|CRITICAL) [\d: -]+ \[[^\]]*\] ")


@dataclass(frozen=True)
class Row:
    """`pattern` is searched in the whole log, `^` and `$` standing at each line's ends; `what` quotes its groups."""

    name: str
    pattern: str
    what: str
    remedy: str
    returncode: int | None = None

    def find(self, text: str, returncode: int | None) -> re.Match[str] | None:
        if self.returncode not in (None, returncode):
            return None
        return re.search(self.pattern, text, re.MULTILINE)

    def explanation(self, values: dict[str, str]) -> str:
        line = f"{self.what}; {self.remedy}"
        # What is quoted gives way, so that the remedy is never cut off.
        quotes = len(re.findall(r"\{\w+\}", line))
        room = (LONGEST - len(line.format_map(dict.fromkeys(values, "")))) // max(1, quotes)
        return line.format_map({name: _shortened(value, room) for name, value in values.items()})


def explain(lines: Iterable[str], returncode: int | None) -> str | None:
    """One line, "what; remedy", or None where the table has nothing for this log.

    The first row that matches wins, and of its matches the earliest: vLLM's processes report inside out.
    """
    text = "\n".join(map(bare, lines))
    for row in ROWS:
        if match := row.find(text, returncode):
            return row.explanation(match.groupdict())
    return None


def bare(line: str) -> str:
    """The line without vLLM's prefixes."""
    while (shorter := PREFIX.sub("", line, count=1)) != line:
        line = shorter
    return line.strip()


def _shortened(value: str, room: int) -> str:
    if len(value) <= room:
        return value
    kept = room - 1
    return f"{value[: kept // 3]}…{value[len(value) - (kept - kept // 3) :]}"


# From the most specific to the least: the rows at the end tell only how it ended.
ROWS = (
    # Memory
    Row(
        "memory-at-start",
        r"^ValueError: Free memory on device (?P<device>\S+) \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup "
        r"is less than desired GPU memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        "{device} has {free} of {total} GiB free, and the model asks for {wanted} GiB (gpu_memory_utilization {share})",
        "lower gpu_memory_utilization or memory_gib in config/models.json, or end what else uses the GPU",
    ),
    Row(
        "memory-at-start-cpu",
        r"^ValueError: Available memory on node (?P<node>\d+) \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup "
        r"is less than desired CPU memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        "the machine (memory node {node}) has {free} of {total} GiB free, and the model asks for {wanted} GiB "
        "(gpu_memory_utilization {share})",
        "lower gpu_memory_utilization or memory_gib in config/models.json",
    ),
    Row(
        "kv-cache-memory-cpu",
        r"^ValueError: Available memory on node \d+ \([\d.]+/(?P<total>[\d.]+) GiB\) on kv cache allocation is "
        r"less than requested memory for kv \((?P<left>-?[\d.]+)/(?P<wanted>-?[\d.]+) GiB\)",
        "no room for the KV cache: {left} GiB are left for it of a share of {wanted} GiB (machine: {total} GiB)",
        "raise gpu_memory_utilization or memory_gib in config/models.json, or stop other models",
    ),
    Row(
        "kv-cache-memory-cpu-fixed",
        r"^ValueError: Available memory on node \d+ \((?P<free>[\d.]+)/[\d.]+ GiB\) on kv cache allocation is "
        r"less than requested memory for kv \((?P<wanted>[\d.]+) GiB\)",
        "the KV cache is to have {wanted} GiB and {free} GiB are free",
        "lower kv_cache_memory_gib in config/models.json, or stop other models",
    ),
    Row(
        "kv-cache-none",
        r"^ValueError: No available memory for the cache blocks\.",
        "the weights leave no room for the KV cache",
        "raise gpu_memory_utilization, memory_gib or kv_cache_memory_gib in config/models.json, "
        "or take a smaller model",
    ),
    Row(
        "kv-cache-too-small",
        r"^ValueError: To serve at least one request with the model's max seq len \((?P<length>\d+)\), \("
        r"(?P<needed>[\d.]+) GiB KV cache is needed.*?memory \((?P<has>[\d.]+) GiB\)\."
        r".*?estimated maximum model length is (?P<fits>\d+)",
        "a context of {length} tokens needs {needed} GiB of KV cache and there are {has} GiB, enough for {fits} tokens",
        "set max_model_len to {fits} or less in config/models.json, or raise gpu_memory_utilization or "
        "kv_cache_memory_gib",
    ),
    Row(
        "kv-cache-far-too-small",
        r"^ValueError: To serve at least one request with the model's max seq len \((?P<length>\d+)\), \("
        r"(?P<needed>[\d.]+) GiB KV cache is needed.*?memory \((?P<has>[\d.]+) GiB\)\. Try",
        "a context of {length} tokens needs {needed} GiB of KV cache and there are {has} GiB",
        "lower max_model_len in config/models.json, or raise gpu_memory_utilization or kv_cache_memory_gib",
    ),
    Row(
        "memory-freed-meanwhile",
        r"^AssertionError: Error in memory profiling\. Initial free memory (?P<before>[\d.]+) GiB, current free memory "
        r"(?P<after>[\d.]+) GiB",
        "another program freed GPU memory while vLLM measured it (free: {before} GiB, then {after} GiB)",
        "it is tried again by itself; if it happens again, set kv_cache_memory_gib in config/models.json",
    ),
    Row(
        "cuda-out-of-memory-warm-up",
        r"^RuntimeError: CUDA out of memory occurred when warming up (?P<part>\w+) with (?P<number>\d+) dummy",
        "the GPU's memory ran out while warming up with {number} requests ({part})",
        "lower gpu_memory_utilization or memory_gib, or set engine_args.max-num-seqs lower, in config/models.json",
    ),
    Row(
        "cuda-out-of-memory",
        r"^torch\.(?:cuda\.)?OutOfMemoryError: CUDA out of memory\. Tried to allocate (?P<wanted>[\d.]+ \wiB)\. GPU "
        r"(?P<number>\d+) has a total capacity of (?P<total>[\d.]+ \wiB) of which (?P<free>[\d.]+ \wiB) is free",
        "GPU {number} ran out of memory: {wanted} more wanted, {free} of {total} free",
        "lower max_model_len or engine_args.max-num-seqs in config/models.json, move the model to another GPU (gpus), "
        "or end what else uses this one",
    ),
    # Device and driver
    Row(
        "nvidia-driver-too-old",
        r"^RuntimeError: The NVIDIA driver on your system is too old \(found version (?P<major>\d+)0(?P<minor>\d)0\)",
        "the NVIDIA driver is too old for this vLLM (it offers CUDA {major}.{minor})",
        "install a newer NVIDIA driver on the host and restart; `nvidia-smi` shows the one in use",
    ),
    Row(
        "nvidia-driver-symbol",
        r"^ImportError: .*undefined symbol: (?P<symbol>cu[A-Z]\w+)$",
        "the NVIDIA driver is too old for this vLLM (it has no {symbol})",
        "install a newer NVIDIA driver on the host and restart; `nvidia-smi` shows the one in use",
    ),
    Row(
        "nvidia-driver-none",
        r"^RuntimeError: Found no NVIDIA driver on your system",
        "PyTorch found no NVIDIA driver",
        "install the driver on the host; in a container, start it with the GPUs (`nvidia-smi` must work in it)",
    ),
    Row(
        "no-device",
        r"^RuntimeError: Failed to infer device type",
        "vLLM found no GPU that it can use",
        "`nvidia-smi` must list one here: install the NVIDIA driver, give the container the GPUs; without "
        "a GPU, install the CPU build",
    ),
    Row(
        "device-out-of-bounds",
        r"^AssertionError: DP adjusted local rank (?P<rank>\d+) is out of bounds for (?P<count>\d+) devices",
        "PyTorch can use {count} GPUs and the model asks for number {rank}, counted from 0",
        "check gpus in config/models.json; with 0 usable, the NVIDIA driver is too old or "
        "CUDA_VISIBLE_DEVICES hides the GPU",
    ),
    Row(
        "too-few-gpus",
        r"Value error, World size \((?P<wanted>\d+)\) is larger than the number of available GPUs "
        r"\((?P<there>\d+)\)",
        "the model asks for {wanted} GPUs and vLLM sees {there}",
        "lower tensor_parallel_size (and pipeline_parallel_size) in config/models.json, or give it more GPUs",
    ),
    Row(
        "gpu-too-old",
        r"no kernel image is available for execution on the device",
        "this GPU is too old or too new for this build of vLLM",
        "use another GPU (gpus in config/models.json) or a vLLM built for this one",
    ),
    Row(
        "bfloat16-unsupported",
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0\. Your (?P<gpu>.+?) "
        r"GPU has compute capability (?P<has>\d+\.\d+)",
        "{gpu} (compute capability {has}) has no bfloat16, which needs 8.0",
        'set "dtype": "half" in config/models.json',
    ),
    Row(
        "nccl",
        r"^RuntimeError: NCCL error: (?P<error>[^\n]+)",
        "the GPUs of this model could not talk to each other (NCCL: {error})",
        "give the container more /dev/shm (shm_size), or try NCCL_P2P_DISABLE=1 in the model's env in "
        "config/models.json",
    ),
    Row(
        "cuda-fault",
        r"^(?:torch\.AcceleratorError|RuntimeError): CUDA error: (?P<error>(?!no kernel image)[^\n]+)",
        "the GPU reported an error: {error}",
        "it is started again by itself; if it happens again, look at `nvidia-smi` and `dmesg` on the host, "
        "and see ./deploy.sh logs NAME",
    ),
    # Files of the model
    Row(
        "no-folder",
        r"HFValidationError: Repo id must be in the form .*?: '(?P<path>/[^']*)'",
        "{path}: no such folder",
        "put the weights there, or correct path in config/models.json",
    ),
    Row(
        "no-config",
        r"Value error, Invalid repository ID or local directory specified: '(?P<path>[^']*)'",
        "{path} holds no config.json, so no model",
        "download the model again and completely, or correct path in config/models.json",
    ),
    Row(
        "config-not-json",
        r"^OSError: It looks like the config file at '(?P<path>[^']*)' is not a valid JSON file",
        "{path} is no valid JSON",
        "download this file again; it is cut short or was edited",
    ),
    Row(
        "no-weights",
        r"^RuntimeError: Cannot find any model weights with `(?P<path>[^`]*)`",
        "{path} holds no weights (*.safetensors)",
        "download the model again and completely, or correct path in config/models.json",
    ),
    Row(
        "weights-part-missing",
        r"^FileNotFoundError: Weight files referenced in index but missing: \{'(?P<path>[^']*)'",
        "the weights file {path} is missing",
        "download the model again and completely",
    ),
    Row(
        "weights-pointer",
        r"SafetensorError: Error while deserializing header: header too large",
        "a weights file is no safetensors file, most likely a Git LFS pointer of a few lines",
        "fetch the real file (`git lfs pull` in the model's folder) or download the model again",
    ),
    Row(
        "weights-damaged",
        r"SafetensorError: Error while deserializing header: (?P<fault>(?!header too large)[^\n]+)",
        "a weights file (*.safetensors) is cut short or damaged ({fault})",
        "download the model again; a full disk or a broken-off download leaves such files",
    ),
    Row(
        "weights-shape",
        r"^RuntimeError: start \(\d+\) \+ length \((?P<wanted>\d+)\) exceeds dimension size \((?P<has>\d+)\)",
        "the weights do not fit config.json (a side of {wanted} wanted, {has} found)",
        "config.json and weights are of different models or versions: download the model again into an empty folder",
    ),
    Row(
        "no-processor",
        r"^OSError: Can't load image processor for '(?P<path>[^']*)'",
        "{path} holds no preprocessor_config.json",
        "download the model again and completely",
    ),
    Row(
        "tokenizer-damaged",
        r"^KeyError: 'added_tokens'$",
        "the model's tokenizer.json is not a complete tokenizer",
        "download tokenizer.json again",
    ),
    Row(
        "no-tokenizer",
        r"^OSError: Can't load tokenizer for '(?P<path>[^']*)'",
        "{path} holds no tokenizer",
        "download the model again and completely (tokenizer.json, tokenizer_config.json)",
    ),
    Row(
        "permission",
        r"^PermissionError: \[Errno 13\] Permission denied: '(?P<path>[^']*)'",
        "{path} may not be read by the user that runs the server",
        "give that user the right to read it (chmod, chown)",
    ),
    # What the model is
    Row(
        "max-model-len",
        r"Value error, User-specified max_model_len \((?P<wanted>\d+)\) is greater than the derived "
        r"max_model_len \(\w+=(?P<own>\d+)",
        "max_model_len {wanted} is more than the model's own {own}",
        "lower max_model_len in config/models.json, or leave it out",
    ),
    Row(
        "max-batched-tokens",
        r"Value error, max_num_batched_tokens \((?P<batch>\d+)\) is smaller than max_model_len "
        r"\((?P<length>\d+)\)",
        "engine_args.max-num-batched-tokens {batch} is less than max_model_len {length}",
        "raise the one or lower the other in config/models.json",
    ),
    Row(
        "architecture",
        r"Value error, Model architectures \[(?P<architectures>[^\]]*)\] are not supported",
        "this vLLM has no support for the model's architecture {architectures}",
        "use another model, or a vLLM version that lists it as supported",
    ),
    Row(
        "model-type",
        r"Value error, The checkpoint you are trying to load has model type `(?P<type>[^`]*)` but "
        r"Transformers does not recognize",
        "the installed transformers does not know the model's type {type}",
        "use another model, or newer versions of vLLM and transformers",
    ),
    Row(
        "trust-remote-code",
        r"Value error, The repository (?P<path>\S+) contains custom code which must be executed",
        "{path} brings Python code of its own",
        'if you trust where it comes from, set "trust_remote_code": true in config/models.json',
    ),
    Row(
        "not-generative",
        r"Value error, (?:Embedding models do|This model does) not support `--runner generate`",
        "the model makes embeddings and cannot chat",
        'set "type": "embedding" or "rerank" in config/models.json, or take a chat model',
    ),
    Row(
        "not-pooling",
        r"Value error, This model does not support `--runner pooling`",
        "the model cannot make embeddings or scores",
        'set "type": "chat" in config/models.json, or take an embedding or rerank model',
    ),
    Row(
        "dtype",
        r"Value error, The model type '(?P<type>[^']*)' does not support (?P<dtype>\w+)\.",
        "a {type} model does not run in {dtype}",
        'set "dtype": "bfloat16" (or "float32") in config/models.json, or leave it out',
    ),
    Row(
        "heads",
        r"Value error, Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor "
        r"parallel size \((?P<size>\d+)\)",
        "the model's {heads} attention heads cannot be shared evenly by {size} devices",
        "set tensor_parallel_size in config/models.json to a divisor of {heads}",
    ),
    Row(
        "quantization-unknown",
        r"Value error, Unknown quantization method: (?P<method>[^.\s]+)",
        "vLLM does not know the model's quantization {method}",
        "use another version of the model, such as AWQ, GPTQ or FP8, or one that is not quantized",
    ),
    Row(
        "quantization-mismatch",
        r"Value error, Quantization method specified in the model config \((?P<own>\w+)\) does not match "
        r".*?argument \((?P<given>\w+)\)",
        "the model is quantized with {own}, and engine_args.quantization says {given}",
        "remove quantization from engine_args in config/models.json; vLLM finds it by itself",
    ),
    # What is said in config/models.json
    Row(
        "flag-unknown",
        r"error: unrecognized arguments: (?P<flags>[^\n]+)",
        "vLLM's server has no flag {flags}",
        "correct or remove it in engine_args in config/models.json",
    ),
    Row(
        "flag-value",
        r"error: argument (?P<flag>[^:\n]+): (?P<fault>[^\n]+)",
        "vLLM does not accept the value of {flag}: {fault}",
        "correct it in config/models.json (a field of that name, or engine_args)",
    ),
    Row(
        "setting-range",
        r"ValidationError: \d+ validation errors? for \w+\n(?P<field>\w+)\n(?P<fault>Input should be "
        r"[^\[\n]+?) \[.*?input_value=(?P<value>[^,]+)",
        "{field} is {value}; vLLM says: {fault}",
        "correct it in config/models.json (a field of that name, or engine_args)",
    ),
    Row(
        "chat-template",
        r"The supplied chat template string \((?P<path>[^)]*)\) appears path-like, but doesn't exist",
        "the chat template {path} does not exist",
        "correct chat-template in engine_args in config/models.json; name the file with its whole path",
    ),
    Row(
        "tool-parser-wanted",
        r"^TypeError: Error: --enable-auto-tool-choice requires --tool-call-parser",
        "enable-auto-tool-choice is set without tool-call-parser",
        "name the parser of this model family in engine_args.tool-call-parser in config/models.json, such "
        "as hermes for Qwen",
    ),
    Row(
        "tool-parser",
        r"^KeyError: 'invalid tool call parser: (?P<parser>\S+)",
        "vLLM has no tool-call-parser {parser}",
        "correct engine_args.tool-call-parser in config/models.json; ./deploy.sh logs NAME lists the known ones",
    ),
    Row(
        "reasoning-parser",
        r"^KeyError: \"Reasoning parser '(?P<parser>[^']*)' not found",
        "vLLM has no reasoning-parser {parser}",
        "correct engine_args.reasoning-parser in config/models.json; ./deploy.sh logs NAME lists the known ones",
    ),
    # The machine
    Row(
        "port-taken",
        r"^OSError: \[Errno 98\] Address already in use",
        "another program listens on this model's port",
        "give it another port in config/models.json, or end the other program (`ss -ltnp` names it)",
    ),
    Row(
        "address",
        r"^OSError: \[Errno 99\] Cannot assign requested address",
        "this machine does not have the address that the server is to listen on",
        "correct VLLM_ENGINE_HOST in .env; 127.0.0.1 always works",
    ),
    Row(
        "shared-memory",
        r"Insufficient space in /dev/shm for shared-memory allocation: (?P<wanted>\d+ \wiB) required, "
        r"(?P<free>\d+ \wiB) free",
        "the shared memory (/dev/shm) is too small: {wanted} wanted, {free} free",
        "in a container set shm_size (or --shm-size, --ipc=host); else remove old files from /dev/shm",
    ),
    Row(
        "disk-full",
        r"^(?:\S+: )?OSError: \[Errno 28\] No space left on device",
        "the disk is full",
        "make room on the disk of this project's run folder and of /tmp (`df -h`), then ./deploy.sh restart NAME",
    ),
    Row(
        "open-files",
        r"Too many open files$",
        "the server may not open more files",
        "raise the limit for open files (`ulimit -n 65536` before ./deploy.sh, or ulimits.nofile in a container)",
    ),
    Row(
        "compiler",
        r"No working C\+\+ compiler found|Failed to find C compiler",
        "vLLM found no C compiler, which it compiles the model's graphs with",
        "install one (`apt-get install g++`), or set engine_args.enforce-eager to true in "
        "config/models.json, which is slower",
    ),
    Row(
        "lscpu",
        r"Command 'lscpu [^']*' returned non-zero exit status 127",
        "the program lscpu is missing, with which vLLM counts the cores",
        "install it (`apt-get install util-linux`) or add its folder to PATH",
    ),
    Row(
        "package-missing",
        r"^ModuleNotFoundError: No module named '(?P<package>[^'.]+)",
        "the model or a setting needs the Python package {package}, which is not installed",
        "install it beside vLLM, in the same .venv or image, or remove from engine_args what needs it",
    ),
    # How it ended
    Row(
        "worker-out-of-memory",
        r"^Worker proc (?P<worker>\S+) died unexpectedly \(exit code: -9\)",
        "{worker} was killed, most likely because the machine's own memory (RAM) ran out",
        "stop other programs or models, lower kv_cache_memory_gib or memory_gib in config/models.json, or "
        "add RAM (`dmesg` tells)",
    ),
    Row(
        "worker-ended",
        r"^RuntimeError: Executor failed\.",
        "a worker process of the server ended without a word, as after a kill from outside",
        'it is started again by itself; if it happens again, look for "Out of memory" in `dmesg`, and see '
        "./deploy.sh logs NAME",
    ),
    Row(
        "out-of-memory",
        r"",
        "the server was killed from outside, most likely because the machine's own memory (RAM) ran out",
        "stop other programs or models, lower kv_cache_memory_gib or memory_gib in config/models.json, or "
        "add RAM (`dmesg` tells)",
        returncode=-signal.SIGKILL,
    ),
    Row(
        "engine-ended",
        r"MPClient: engine core exited unexpectedly",
        "the server's inner process (EngineCore) ended without a word, as after a kill from outside",
        'it is started again by itself; if it happens again, look for "Out of memory" in `dmesg`, and see '
        "./deploy.sh logs NAME",
    ),
)
