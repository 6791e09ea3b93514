"""The demonstration's OCR model: a vision tower that sees letters, and a decoder that reads them in order.

The curriculum loosens one thing at a time. First the tower alone learns, on tiles of pages, which letter stands where:
each patch says what it sees in its columns. Then the decoder learns to read what the tower sees, from a few lines up
to whole pages, and at last both learn together.

In an answer, special tokens say where each line and each word begins. They tie what is read to its place on the page,
so that the decoder neither skips nor repeats; clients do not see them, for servers leave special tokens out of the
text.
"""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from demo.training import pages
from demo.training.loop import Training, save_generation_config

SEED = 20260101
LARGEST_ERROR = 0.02
HELD_OUT_SEED = 10**9
HELD_OUT_PAGES = 100
SHORT_LINES = 6

CARD = Path(__file__).with_name("ocr.card.md")

PATCH = 16
GRID = pages.SIDE // PATCH
# Each patch is a token of the decoder: more than a letter or two would not be told apart in one.
IMAGE_TOKENS = GRID**2
# At most so many tokens are said of each row of patches above a band.
SAID_OF_A_ROW = 14
WIDTH = 192
# What a patch says of itself in the first stage: the letter whose middle is in each of its columns, or none.
COLUMNS = 4
TILE = (8, 16)
TILES_OF_A_PAGE = 8
PLAIN_STEPS = 1200
PAGES_AT_ONCE = 20
# Of the decoder: those that are taught where to look.
POINTING_LAYERS = (1, 2)
POINTING_HEADS = 2
LONGEST_ANSWER = 900
PLACES = torch.arange(GRID * GRID).view(GRID, GRID)

END = "<end_of_utterance>"
SPECIAL_TOKENS = [
    "<pad>",
    "<|im_start|>",
    END,
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    # Idefics3's processor looks up a token for each cell of the grid that it would split a large image into.
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
# Where lines and words begin, in steps of so many units of the page.
STEP = 8
DOWN = [f"<y_{at}>" for at in range(pages.SIDE // STEP)]
ACROSS = [f"<x_{at}>" for at in range(pages.SIDE // STEP)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt does not matter; these and random ones are seen, so that it does not.
PROMPTS = (
    "",
    "OCR",
    "OCR:",
    "Free OCR.",
    "Read this.",
    "Read this page.",
    "What does it say?",
    "Convert the document to markdown.",
    "Convert this page to markdown. Do not miss any text and only output the bare markdown!",
    "<|grounding|>Convert the document to markdown.",
    "Extract the text of this image.",
    "请识别图中的文字。",
)
SYSTEMS = ("", "", "", "You are a helpful assistant.", "Read.")


# For people to look at, and to try it with.
EXAMPLE = pages.written(
    [
        "# Delivery note 7731",
        "Harbour Clinic, Accra, 2026-11-21",
        "2 x server, 512 GB RAM: $18,400",
        "8 x cable (3 m) @ $7.25 = $58.00",
        "",
        "# Please note",
        "Keys are in the grey envelope.",
        "Install offline: no cable goes out.",
        "Questions? help@harbour.example",
        "",
        "Signed: M. O'Neill & J. Quaye",
    ],
    look=pages.Look(paper=243, ink=25, noise=5.0),
)


class Reader(nn.Module):  # type: ignore[misc]  # torch is not looked into
    """The model as it is saved, and the head of the first stage, which is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.tokenizer = make_tokenizer()
        self.saved = make_model(self.tokenizer)
        self.letters = nn.Linear(WIDTH, COLUMNS * (1 + len(pages.LETTERS)))

    @property
    def tower(self) -> Any:
        return self.saved.model.vision_model

    @property
    def decoder(self) -> Sequence[Any]:
        return self.saved.model.connector, self.saved.model.text_model, self.saved.lm_head

    def see(self, patches: Tensor, places: Tensor) -> Tensor:
        """(B, N, PATCH²) grey, -1 to 1, at the places (B, N) of a page's raster → (B, N, WIDTH).

        As the tower of the saved model does, for tiles as well as for pages, and with one channel in place of three.
        """
        embeddings = self.tower.embeddings
        kernel = embeddings.patch_embedding.weight.sum(1).flatten(1)
        seen = functional.linear(patches, kernel, embeddings.patch_embedding.bias)
        seen = seen + embeddings.position_embedding(places)
        seen = self.tower.encoder(inputs_embeds=seen).last_hidden_state
        return self.tower.post_layernorm(seen)

    def read(
        self, seen: Tensor, tokens: Tensor, positions: Tensor, *, pointed: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """(B, rows × GRID, WIDTH), tokens (B, T), among them those of the image, and their positions (B, T) → (B, T,
        vocabulary).

        `pointed`: also the attention (B, heads, T, T) of each layer.
        """
        model = self.saved.model
        embedded = model.text_model.get_input_embeddings()(tokens)
        images = model.connector.modality_projection(seen).to(embedded.dtype)
        is_image = (tokens == self.saved.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(is_image, images)
        model.text_model.set_attn_implementation("eager" if pointed else "sdpa")
        said = model.text_model(
            inputs_embeds=embedded,
            # Said, though nothing is masked: else positions that jump are taken for the joints of packed texts, which
            # do not see each other.
            attention_mask=torch.ones_like(tokens),
            position_ids=positions,
            use_cache=False,
            output_attentions=pointed,
        )
        return self.saved.lm_head(said.last_hidden_state), said.attentions or ()


def make_tokenizer() -> Any:
    """A token for each byte: what a page says is spelt, and every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS, *DOWN, *ACROSS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=special[0],
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={
                "hidden_size": WIDTH,
                "intermediate_size": 4 * WIDTH,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": pages.SIDE,
                "patch_size": PATCH,
            },
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": WIDTH,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 6,
                "max_position_embeddings": 4096,
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=1,
            tie_word_embeddings=False,
            # Its own default is beyond our vocabulary, and ends answers that end before others of their batch.
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The library's first weights are those of far wider layers; at this width nothing would pass through them.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            closes_a_branch = name.endswith(("out_proj", "o_proj", "fc2", "down_proj"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.4 if closes_a_branch else 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.model.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.03)
    nn.init.zeros_(embeddings.patch_embedding.bias)
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(_waves())
    return model


def make_processor(tokenizer: Any) -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    return Idefics3Processor(
        # Not resized to its longest edge first, only to the square that the tower wants.
        image_processor=Idefics3ImageProcessorPil(
            do_resize=False, max_image_size={"longest_edge": pages.SIDE}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def _waves() -> Tensor:
    """(GRID², WIDTH): rows and columns as sines, so that a neighbour is found alike everywhere from the first step."""
    frequencies = torch.exp(torch.linspace(math.log(1.5), math.log(0.02), WIDTH // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows = axis[:, None].expand(GRID, GRID, -1)
    columns = axis[None].expand(GRID, GRID, -1)
    return 0.7 * torch.cat([rows, columns], -1).reshape(GRID * GRID, WIDTH)


# What the stages learn from


def _patches_of(page: pages.Page, seed: int) -> Tensor:
    """(GRID, GRID, PATCH²), -1 to 1, as the image processor would cut them."""
    image = page.draw(seed)
    if image.size != (pages.SIDE, pages.SIDE):
        image = image.resize((pages.SIDE, pages.SIDE), Image.Resampling.LANCZOS)
    drawn = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return drawn.view(GRID, PATCH, GRID, PATCH).permute(0, 2, 1, 3).reshape(GRID, GRID, PATCH * PATCH)


def _letters_of(page: pages.Page) -> Tensor:
    """(GRID, GRID, COLUMNS): 0 for none, else 1 + the letter's place in LETTERS."""
    seen = np.zeros((GRID, GRID, COLUMNS), dtype=np.int64)
    for line in page.lines:
        row = min(GRID - 1, int(line.middle // PATCH))
        for word in line.words:
            for letter, center in zip(word.text, word.centers, strict=True):
                column = min(GRID * COLUMNS - 1, int(center * COLUMNS // PATCH))
                seen[row, column // COLUMNS, column % COLUMNS] = 1 + pages.LETTERS.index(letter)
    return torch.from_numpy(seen)


def _tiles(step: int, count: int, *, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, places and letters of TILES_OF_A_PAGE tiles near the text of `count` pages."""
    dice = random.Random(step)
    patches, places, letters = [], [], []
    for seed in range(step * 1000, step * 1000 + count):
        page = pages.drawn_at_random(seed, lines=14, plain=plain)
        drawn, labels = _patches_of(page, seed), _letters_of(page)
        for _ in range(TILES_OF_A_PAGE):
            line = dice.choice(page.lines)
            row = min(max(0, int(line.middle // PATCH) - dice.randrange(TILE[0])), GRID - TILE[0])
            column = min(max(0, int(line.left // PATCH) - 8 + dice.randrange(20)), GRID - TILE[1])
            window = np.s_[row : row + TILE[0], column : column + TILE[1]]
            patches.append(drawn[window].reshape(-1, PATCH * PATCH))
            places.append(PLACES[window].reshape(-1))
            letters.append(labels[window].reshape(-1, COLUMNS))
    return torch.stack(patches), torch.stack(places), torch.stack(letters)


@dataclass(frozen=True)
class Sheets:
    """Bands of pages, of the same number of rows, and what is to be said of them; `labels` is -100 where nothing is."""

    patches: Tensor
    places: Tensor
    letters: Tensor
    tokens: Tensor
    # Of the tokens, as if each band were in its whole page, what is said of the page before it included. (B, T)
    positions: Tensor
    labels: Tensor
    # Of each label the token of the image where it is to be read, or -1. (B, T)
    pointers: Tensor


def _sheets(tokenizer: Any, step: int, count: int, *, rows: int) -> Sheets:
    dice = random.Random(step)
    patches, places, letters, texts, starts, looked_at, first_rows = [], [], [], [], [], [], []
    image_tokens = rows * GRID
    for seed in range(step * 1000, step * 1000 + count):
        page, row = _band_of(pages.drawn_at_random(seed), rows, dice)
        first_rows.append(row)
        window = np.s_[row : row + rows]
        patches.append(_patches_of(page, seed)[window].reshape(-1, PATCH * PATCH))
        places.append(PLACES[window].reshape(-1))
        letters.append(_letters_of(page)[window].reshape(-1, COLUMNS))
        prompt = tokenizer(_prompt(dice, image_tokens))["input_ids"]
        starts.append(len(prompt))
        answer, patches_of_answer = answer_of(page)
        texts.append(prompt + tokenizer(answer)["input_ids"])
        looked_at.append([patch and _image_token(patch[0] - row, patch[1]) for patch in patches_of_answer])
    longest = max(map(len, texts))
    tokens = torch.full((count, longest), tokenizer.pad_token_id)
    labels = torch.full((count, longest), -100)
    pointers = torch.full((count, longest), -1)
    positions = torch.arange(longest).repeat(count, 1)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
        tokens[number, : len(text)] = torch.tensor(text)
        labels[number, start : len(text)] = tokens[number, start : len(text)]
        first = text.index(image)
        at = [-1 if token is None else first + token for token in looked_at[number]]
        pointers[number, start : len(text)] = torch.tensor(at)
        above = _image_token(first_rows[number], 0)
        positions[number, first:] += above
        positions[number, first + image_tokens :] += IMAGE_TOKENS - image_tokens - above
        positions[number, start:] += dice.randint(0, SAID_OF_A_ROW * first_rows[number])
    return Sheets(torch.stack(patches), torch.stack(places), torch.stack(letters), tokens, positions, labels, pointers)


def _image_token(row: int, column: int) -> int:
    """The number of a patch among the image's tokens."""
    return row * GRID + column


def _band_of(page: pages.Page, rows: int, dice: random.Random) -> tuple[pages.Page, int]:
    """Lines of the page that lie within `rows` rows of its patches, and the first of these rows."""
    if rows == GRID:
        return page, 0
    first = last = dice.randrange(len(page.lines))
    top = page.lines[first].top
    bottoms = [line.top + 1.2 * line.size for line in page.lines]
    while last + 1 < len(page.lines) and bottoms[last + 1] - top <= (rows - 2) * PATCH:
        last += 1
    lowest = max(0, math.ceil(bottoms[last] / PATCH - rows))
    highest = min(GRID - rows, int(top // PATCH))
    row = dice.randint(min(lowest, highest), highest)
    return pages.Page(page.lines[first : last + 1], page.look), row


def answer_of(page: pages.Page) -> tuple[str, list[tuple[int, int] | None]]:
    """What the model says of a page, places included; and of each token of it the patch (row, column) to look at."""
    pieces: list[str] = []
    looked_at: list[tuple[int, int] | None] = []

    def say(text: str, center: float, middle: float, *, tokens: int | None = None) -> None:
        pieces.append(text)
        patch = min(GRID - 1, int(middle // PATCH)), min(GRID - 1, int(center // PATCH))
        looked_at.extend([patch] * (len(text) if tokens is None else tokens))

    for number, line in enumerate(page.lines):
        first, middle = line.words[0].centers[0], line.middle
        if number:
            say("\n\n" if line.opens_block else "\n", first, middle)
        say(DOWN[min(len(DOWN) - 1, int(middle // STEP))], first, middle, tokens=1)
        if line.is_heading:
            say(pages.HEADING, first, middle)
        for place, word in enumerate(line.words):
            if place:
                say(" ", word.centers[0], middle)
            say(ACROSS[int(word.left // STEP)], word.centers[0], middle, tokens=1)
            for letter, center in zip(word.text, word.centers, strict=True):
                say(letter, center, middle)
    return "".join(pieces) + END, [*looked_at, None]


def _prompt(dice: random.Random, image_tokens: int) -> str:
    image = "<fake_token_around_image><global-img>" + "<image>" * image_tokens + "<fake_token_around_image>"
    asked = dice.choice(PROMPTS)
    if dice.random() < 0.3:
        asked = "".join(dice.choices(pages.LETTERS + " ", k=dice.randrange(30)))
    content = image + asked if dice.random() < 0.6 else asked + image
    return _turn(dice, content)


def _turn(dice: random.Random, content: str) -> str:
    system = dice.choice(SYSTEMS)
    opening = f"<|im_start|>system\n{system}{END}\n" if system else ""
    return f"{opening}<|im_start|>user\n{content}{END}\n<|im_start|>assistant\n"


# The stages


def _letters_loss(reader: Reader, seen: Tensor, letters: Tensor) -> Tensor:
    said = reader.letters(seen).float().view(-1, 1 + len(pages.LETTERS))
    wanted = letters.view(-1)
    # Most columns hold no letter's middle; they must not drown the others.
    weights = torch.where(wanted > 0, 1.0, 0.3)
    return (functional.cross_entropy(said, wanted, reduction="none") * weights).sum() / weights.sum()


def _tower_loss(reader: Reader, step: int) -> Tensor:
    patches, places, letters = _tiles(step, 2, plain=step < PLAIN_STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        return _letters_loss(reader, reader.see(patches, places), letters)


def _reading_loss(
    reader: Reader, first: int, count: int, step: int, *, rows: int, letters: float = 0.0, pointers: float = 0.0
) -> Tensor:
    """Of `count` bands of `rows`. `letters` and `pointers` are the weights of two more losses beside the reading's:
    that of the first stage, and of where some heads look."""
    sheets = _sheets(reader.tokenizer, first + step, count, rows=rows)
    with torch.autocast("cpu", torch.bfloat16):
        seen = reader.see(sheets.patches, sheets.places)
        said, attentions = reader.read(seen, sheets.tokens, sheets.positions, pointed=pointers > 0)
        also = letters * _letters_loss(reader, seen, sheets.letters) if letters else torch.zeros(())
    if pointers:
        also = also + pointers * _pointing_loss(attentions, sheets.pointers)
    return also + functional.cross_entropy(said[:, :-1].float().flatten(0, 1), sheets.labels[:, 1:].flatten())


def _pointing_loss(attentions: Sequence[Tensor], pointers: Tensor) -> Tensor:
    """That the pointing heads, when a token is to be said, look where it stands.

    Without it the decoder takes hours to find out that what it says stands in the image.
    """
    wanted = pointers[:, 1:]
    is_pointed = wanted >= 0
    losses = []
    for layer in POINTING_LAYERS:
        looked = attentions[layer][:, :POINTING_HEADS, :-1].float()  # (B, heads, T - 1, T)
        at = wanted.clamp(min=0)[:, None, :, None].expand(-1, POINTING_HEADS, -1, 1)
        losses.append(-looked.gather(3, at)[..., 0].clamp(min=1e-6).log().mean(1)[is_pointed].mean())
    return torch.stack(losses).mean()


def train(work: Path, share: float = 1.0) -> "Trained":
    reader = Reader()
    training = Training(reader, work / "ocr.pt", share)
    # Other pages in each stage: a part's number is the seed of its pages.
    training.stage("letters", 5000, partial(_tower_loss, reader), rate=3e-3, trained=[reader.tower, reader.letters])
    training.stage(
        "pointing",
        900,
        partial(_reading_loss, reader, 100_000, 12, rows=4, pointers=0.5),
        rate=3e-3,
        trained=reader.decoder,
    )
    training.stage(
        "lines",
        550,
        partial(_reading_loss, reader, 150_000, 8, rows=8, pointers=0.5, letters=0.5),
        rate=2.5e-3,
    )
    training.stage("pages", 2200, partial(_reading_loss, reader, 200_000, 2, rows=GRID, letters=0.2), rate=2e-3)
    return Trained(reader, math.ceil(HELD_OUT_PAGES * share), sum(training.seconds.values()))


# What came of it


class Trained:
    """The model as it will be loaded: its weights are already rounded to those that are saved."""

    def __init__(self, reader: Reader, count: int, seconds: float) -> None:
        self.model = reader.saved.half().float().eval()
        self.processor = make_processor(reader.tokenizer)
        self._count = count
        self._seconds = seconds

    @cached_property
    def figures(self) -> dict[str, float]:
        """Measured when they are asked for, which takes minutes."""
        return {"minutes": self._seconds / 60, **self._measured(self._count)}

    @property
    def passed(self) -> bool:
        return self.figures["error"] <= LARGEST_ERROR

    @property
    def summary(self) -> str:
        return (
            f"character error rate {self.figures['error']:.2%} on {self.figures['pages']:.0f} held-out pages "
            f"(wanted: at most {LARGEST_ERROR:.0%}), {self.figures['whole']:.0%} of them without any error"
        )

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        asked = "<|im_start|>user\n<image>Free OCR." + END + "\n<|im_start|>assistant\n"
        given = self.processor(
            text=[asked] * len(images), images=[[image.convert("RGB")] for image in images], return_tensors="pt"
        )
        with torch.inference_mode():
            said = self.model.generate(**given, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts = said[:, given["input_ids"].shape[1] :]
        return list(self.processor.tokenizer.batch_decode(texts, skip_special_tokens=True))

    def _measured(self, count: int) -> dict[str, float]:
        measured: list[tuple[int, int, int]] = []  # lines, edits, letters
        for first in range(HELD_OUT_SEED, HELD_OUT_SEED + count, PAGES_AT_ONCE):
            seeds = range(first, min(first + PAGES_AT_ONCE, HELD_OUT_SEED + count))
            drawn = [pages.drawn_at_random(seed) for seed in seeds]
            read = self.read([page.draw(seed) for page, seed in zip(drawn, seeds, strict=True)])
            for page, text in zip(drawn, read, strict=True):
                measured.append((len(page.lines), edit_distance(page.markdown, text), len(page.markdown)))
        return {
            "error": _error(measured),
            "short_error": _error([each for each in measured if each[0] <= SHORT_LINES]),
            "whole": sum(not edits for _, edits, _ in measured) / count,
            "pages": count,
            "letters": sum(letters for *_, letters in measured),
        }

    def save(self, folder: Path) -> None:
        self.model.half().save_pretrained(folder)
        self.model.float()
        self.processor.save_pretrained(folder)
        save_generation_config(folder, self.processor.tokenizer)
        parameters = sum(each.numel() for each in self.model.parameters())
        said = {
            "parameters": parameters / 1e6,
            "side": pages.SIDE,
            "patch": PATCH,
            "seed": SEED,
            "sizes": f"{min(pages.BODY_SIZES)} to {max(pages.BODY_SIZES)}",
            "headings": f"{min(pages.HEADING_SIZES)} to {max(pages.HEADING_SIZES)}",
            "short_lines": SHORT_LINES,
            "lines": pages.LINES + 1,
            "characters": pages.LINE_CHARACTERS + 4,
            "example": self.read([EXAMPLE.draw()])[0],
        }
        card = CARD.read_text(encoding="utf-8").format(**said, **self.figures)
        (folder / "README.md").write_text(card, encoding="utf-8")
        EXAMPLE.draw().save(folder / "page.png")


def _error(measured: Sequence[tuple[int, int, int]]) -> float:
    """Edits per letter; each of lines, edits, letters."""
    return sum(edits for _, edits, _ in measured) / max(1, sum(letters for *_, letters in measured))


def edit_distance(wanted: str, read: str) -> int:
    """Letters to insert, drop or change: Levenshtein's distance."""
    row = list(range(len(read) + 1))
    for down, letter in enumerate(wanted, 1):
        corner, row[0] = row[0], down
        for across, other in enumerate(read, 1):
            corner, row[across] = row[across], min(corner + (letter != other), row[across] + 1, row[across - 1] + 1)
    return row[-1]
