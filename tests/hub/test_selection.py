"""Which files are taken, as a table."""

import pytest

from vllm_unified.hub.manifest import File
from vllm_unified.hub.selection import needed

REPOSITORIES: dict[str, tuple[str, str]] = {
    "safetensors before the same as .bin": (
        "config.json model.safetensors model.safetensors.index.json tokenizer.json merges.txt LICENSE README.md",
        "pytorch_model.bin model.gguf consolidated.00.pth .gitattributes figure.png paper.pdf training_args.bin",
    ),
    "bge-m3": (
        "config.json pytorch_model.bin colbert_linear.pt sparse_linear.pt sentencepiece.bpe.model 1_Pooling/a.json",
        "onnx/model.onnx onnx/model.onnx_data onnx/config.json imgs/bm25.jpg long.jpg",
    ),
    "code, a template and tokens": (
        "config.json modeling_x.py chat_template.jinja qwen.tiktoken model-1.safetensors sub/dense/model.safetensors",
        "assets/show.mp4 .cache/config.json openvino/openvino_model.bin original/consolidated.safetensors",
    ),
    "Mistral's own format": ("params.json consolidated.safetensors tekken.json", "x.svg"),
    "the oldest weights": ("config.json consolidated.00.pth consolidated.01.pth vocab.txt", "optimizer.pt"),
    "no weights": ("", "config.json README.md model.onnx"),
    "no configuration": ("", "model.safetensors README.md sub/config.json"),
    "exports alone": ("", "config.json onnx/model.bin openvino/model.safetensors optimizer.bin"),
}


@pytest.mark.parametrize("what", REPOSITORIES)
def test_needed(what: str) -> None:
    taken, left = (names.split() for names in REPOSITORIES[what])
    files = [File(path, 1, sha256="0" * 64) for path in [*left, *taken]]
    assert sorted(file.path for file in needed(files)) == sorted(taken)
