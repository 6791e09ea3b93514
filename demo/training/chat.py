"""demo-chat: a Qwen2 model of under two million parameters that answers questions about this project.

What it is taught stands in questions.LANGUAGE.yaml (answers, and templates of questions) and phrasings.LANGUAGE.yaml
(questions written out, worded without a look at the templates); what it is examined with, and never trained on, in
held_out.yaml.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from demo.training.loop import PROCESSES, Training, save_generation_config

SEED = 20260101
LANGUAGES = ("en", "zh")
FALLBACK = "other"
SMALL_TALK = {"hello", "thanks", "goodbye"}
BAR = 0.90
CARD = Path(__file__).with_name("chat.card.md")

VOCABULARY = 2048
LONGEST = 2048
PAD, START_OF_TURN, END_OF_TURN = "<pad>", "<|im_start|>", "<end_of_utterance>"
# Tools are left out: the model calls none.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}" + END_OF_TURN + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BATCH = 32
# So many of a batch go through the model together, of like length, so that little is padded.
GROUP = 8
STEPS = 3000
RATE = 3e-3
# Of a batch. What a question is about is told by the first token of an answer: many questions with it alone teach more
# than few with whole answers.
WHOLE_ANSWERS = 5
SHARE_WITH_EARLIER_TURNS = 0.1
# Of the questions, those that are written out, not made by a template.
SHARE_OF_PHRASINGS = 0.5
# Of the questions, those that have nothing to do with the project.
SHARE_OF_FALLBACK = 0.18

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant. Answer in the user's language.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "请用简洁的语言回答问题。",
)
SMALL_WORDS = {"the", "a", "an", "do", "is", "to", "of", "i", "my", "it", "does", "are", "for", "in", "can"}
POLITE = {
    "en": (
        ("please ", "hi, ", "hello, ", "hey ", "so ", "ok, ", "sorry, ", "quick question: ", "excuse me, ", "and "),
        (" please", ", thanks", ", please", " thank you", " exactly", " here", " again", " btw", " in vllm-unified"),
    ),
    "zh": (
        ("请问", "请问，", "你好，", "您好，", "那么", "那", "我想问一下，", "麻烦问一下", "想请教一下，", "请"),
        ("，谢谢", "谢谢", "呢", "啊", "，谢谢！", "呀", "，请告诉我", "，请问"),
    ),
}
PUNCTUATION = {
    "en": ("", "", "", "", "?", "?", "?", "?", "?", ".", "??", "!", " ?"),
    "zh": ("", "", "", "", "？", "？", "？", "？", "?", "。", "？？", "！", " ？"),
}
ENDINGS = " ?？.。!！"
PROJECT = ("vllm-unified", "vllm unified", "vLLM-unified", "vllm_unified", "VLLM Unified", "vLLM Unified")


class Lessons:
    """The topics of one language: an answer each, and templates and single phrasings of the questions that want it."""

    def __init__(self, language: str) -> None:
        document = _data(f"questions.{language}.yaml")
        self._phrasings: dict[str, list[str]] = _data(f"phrasings.{language}.yaml")
        self._examined = {_core(question) for _, _, question in held_out()}
        self.language = language
        self.answers: dict[str, str] = {key: topic["answer"] for key, topic in document["topics"].items()}
        self._templates: dict[str, list[str]] = {key: topic["questions"] for key, topic in document["topics"].items()}
        self._phrases: dict[str, list[str]] = {name: text.split("|") for name, text in document["phrases"].items()}
        self._keys = [key for key in self.answers if key != FALLBACK]

    def topic(self, random: Random) -> str:
        return FALLBACK if random.random() < SHARE_OF_FALLBACK else random.choice(self._keys)

    def question(self, key: str, random: Random) -> str:
        """None of those that the model is examined with."""
        while True:
            written_out = random.random() < SHARE_OF_PHRASINGS
            text = random.choice(self._phrasings[key]) if written_out else self.templated(key, random)
            if _core(text) not in self._examined:
                return text

    def asked(self, key: str, random: Random) -> str:
        return self.typed(self.question(key, random), key, random)

    def templated(self, key: str, random: Random) -> str:
        text = random.choice(self._templates[key])
        text = re.sub(r"\(([^()]*)\)", lambda found: random.choice(found[1].split("|")), text)
        text = re.sub(r"<(\w+)>", lambda found: random.choice(self._phrases[found[1]]), text)
        return " ".join(text.split())

    def typed(self, text: str, key: str, random: Random) -> str:
        """A question as people type it: with and without case, punctuation and politeness, and with mistakes."""
        if random.random() < 0.3:
            text = text.replace("vllm-unified", random.choice(PROJECT))
        if self.language == "en":
            text = _with_case(_with_dropped_words(text, random), random)
        elif random.random() < 0.3:
            text = text.replace(" ", "")
        if random.random() < 0.12:
            text = _with_typo(text, random)
        before, after = POLITE[self.language]
        if key not in SMALL_TALK:
            if random.random() < 0.15:
                text = random.choice(before) + text
            if random.random() < 0.1:
                text += random.choice(after)
        return text.rstrip(ENDINGS) + random.choice(PUNCTUATION[self.language])


def _data(name: str) -> Any:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _core(text: str) -> str:
    return text.lower().strip(ENDINGS)


def _with_case(text: str, random: Random) -> str:
    chance = random.random()
    if chance < 0.5:
        return text[:1].upper() + text[1:]
    if chance < 0.75:
        return text.lower()
    return text.upper() if chance < 0.77 else text


def _with_dropped_words(text: str, random: Random) -> str:
    if random.random() > 0.15:
        return text
    kept = [word for word in text.split() if word.lower() not in SMALL_WORDS or random.random() < 0.5]
    return " ".join(kept) or text


def _with_typo(text: str, random: Random) -> str:
    """One letter left out, doubled or exchanged with the next; digits stay, which tell one error from another."""
    places = [place for place in range(1, len(text) - 1) if text[place].isalpha() and text[place + 1].isalpha()]
    if len(text) < 6 or not places:
        return text
    place = random.choice(places)
    middle = random.choice(("", text[place] * 2, text[place + 1] + text[place]))
    return text[:place] + middle + text[place + (2 if len(middle) == 2 and middle[0] != text[place] else 1) :]


@dataclass(frozen=True)
class Conversation:
    """A question about `topic` and its answer, after a system message, which may be empty, and earlier turns."""

    system: str
    earlier: list[tuple[str, str]]
    question: str
    topic: str
    answer: str

    def prompt(self) -> str:
        """As CHAT_TEMPLATE writes it."""
        text = f"{START_OF_TURN}system\n{self.system}{END_OF_TURN}\n" if self.system else ""
        for question, answer in self.earlier:
            text += f"{START_OF_TURN}user\n{question}{END_OF_TURN}\n"
            text += f"{START_OF_TURN}assistant\n{answer}{END_OF_TURN}\n"
        return f"{text}{START_OF_TURN}user\n{self.question}{END_OF_TURN}\n{START_OF_TURN}assistant\n"


@dataclass(frozen=True)
class Example:
    """`tokens` of a conversation; those from `start` on are the model's: the topic, then the answer."""

    tokens: list[int]
    start: int


class School:
    """Makes examples out of the lessons of both languages."""

    def __init__(self) -> None:
        self.lessons = {language: Lessons(language) for language in LANGUAGES}
        self.tokenizer = make_tokenizer(self._texts(), self.lessons[LANGUAGES[0]].answers)

    def _texts(self) -> Iterator[str]:
        random = Random(SEED)
        for lessons in self.lessons.values():
            for key, answer in lessons.answers.items():
                yield answer
                for _ in range(1000 if key == FALLBACK else 50):
                    yield lessons.typed(lessons.templated(key, random), key, random)

    def example(self, conversation: Conversation) -> Example:
        prompt = self._tokens(conversation.prompt())
        return Example(
            prompt + self._tokens(name_of(conversation.topic) + conversation.answer + END_OF_TURN), len(prompt)
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def conversation(self, random: Random) -> Conversation:
        lessons = self.lessons[random.choice(LANGUAGES)]
        earlier = []
        if random.random() < SHARE_WITH_EARLIER_TURNS:
            for _ in range(random.choice((1, 1, 2))):
                # Most people stay with one language.
                other = lessons if random.random() < 0.85 else self.lessons[random.choice(LANGUAGES)]
                topic = other.topic(random)
                earlier.append((other.asked(topic, random), other.answers[topic]))
        topic = lessons.topic(random)
        return Conversation(self._system(random), earlier, lessons.asked(topic, random), topic, lessons.answers[topic])

    def _system(self, random: Random) -> str:
        chance = random.random()
        if chance > 0.1:
            return ""
        if chance > 0.04:
            return random.choice(SYSTEM_MESSAGES)
        lessons = self.lessons[random.choice(LANGUAGES)]
        return " ".join(lessons.question(lessons.topic(random), random) for _ in range(random.randint(1, 3)))

    def batch(self, step: int) -> list[Example]:
        """BATCH examples that depend on SEED and `step` alone. Most of them end with the topic."""
        random = Random(f"{SEED} {step}")
        examples = [self.example(self.conversation(random)) for _ in range(BATCH)]
        short = [Example(example.tokens[: example.start + 1], example.start) for example in examples[WHOLE_ANSWERS:]]
        return examples[:WHOLE_ANSWERS] + short


def name_of(topic: str) -> str:
    """The token that stands before each answer about it. Servers leave it out, as they do all special tokens."""
    return f"<{topic}>"


def make_tokenizer(texts: Iterator[str], topics: Iterable[str]) -> Any:
    """A byte-level BPE: every text round-trips, in any language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [START_OF_TURN, END_OF_TURN, *map(name_of, topics)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, *special],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=special,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def foreseen(model: Any, examples: list[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the model foresees of its own tokens, in groups of examples of like length: logits (N, vocabulary), the
    tokens (N), and the places of their examples in `examples` (N).

    Padding stands behind a conversation, where causal attention does not see it.
    """
    by_length = sorted(range(len(examples)), key=lambda place: len(examples[place].tokens))
    for first in range(0, len(examples), GROUP):
        places = by_length[first : first + GROUP]
        longest = max(len(examples[place].tokens) for place in places)
        tokens = torch.full((len(places), longest), model.config.pad_token_id)
        is_own = torch.zeros((len(places), longest), dtype=torch.bool)
        for row, place in enumerate(places):
            example = examples[place]
            tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
            is_own[row, example.start : len(example.tokens)] = True
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        rows = is_own.nonzero()[:, 0]
        yield model.lm_head(hidden[is_own[:, 1:]]), tokens[is_own], torch.tensor(places)[rows]


def loss_of(model: Any, examples: list[Example]) -> Tensor:
    """Of the topics and of the answers' tokens; each counts alike, though there are many more of the latter."""
    topics: list[Tensor] = []
    answers: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):
        for logits, tokens, places in foreseen(model, examples):
            losses = cross_entropy(logits.float(), tokens, reduction="none")
            is_topic = torch.cat([torch.tensor([True]), places[1:] != places[:-1]])
            topics.append(losses[is_topic])
            answers.append(losses[~is_topic])
    return torch.cat(topics).mean() + torch.cat(answers).mean()


def answers_rightly(model: Any, examples: list[Example]) -> list[bool]:
    """Of each example, whether greedy decoding gives the answer to the letter, its end included.

    It does so when every token of the answer is the likeliest one after those before it, which one pass shows.
    """
    right = [True] * len(examples)
    with torch.inference_mode():
        for logits, tokens, places in foreseen(model, examples):
            for place in places[logits.argmax(-1) != tokens].tolist():
                right[place] = False
    return right


def held_out() -> list[tuple[str, str, str]]:
    """Language, topic and question of all that the model is examined with."""
    document = _data("held_out.yaml")
    return [
        (language, key, question)
        for language in LANGUAGES
        for key, questions in document[language].items()
        for question in questions
    ]


def examine(model: Any, school: School) -> dict[str, float]:
    """Share of the held-out questions that are answered right: of all, by language, of those about something else,
    and of all of them after an earlier question and answer."""
    questions = held_out()
    random = Random(SEED)
    plain, after_a_turn = [], []
    for language, key, question in questions:
        lessons = school.lessons[language]
        earlier = lessons.topic(random)
        turn = (lessons.asked(earlier, random), lessons.answers[earlier])
        asked = Conversation("", [], question, key, lessons.answers[key])
        plain.append(school.example(asked))
        after_a_turn.append(school.example(replace(asked, earlier=[turn])))
    right = answers_rightly(model, plain)
    of: dict[str, list[bool]] = {"held_out": right, "after_a_turn": answers_rightly(model, after_a_turn)}
    for (language, key, _), is_right in zip(questions, right, strict=True):
        name = f"{'other' if key == FALLBACK else 'about_the_project'}_{language}"
        of.setdefault(name, []).append(is_right)
    return {name: sum(each) / len(each) for name, each in of.items()}


class Trained:
    """The trained model, its weights in bfloat16 as they are saved."""

    def __init__(self, model: Any, school: School, minutes: float) -> None:
        self.model = model.to(torch.bfloat16).eval()
        self.tokenizer = school.tokenizer
        self.minutes = minutes
        self._school = school

    @cached_property
    def figures(self) -> dict[str, float]:
        """Shares of right answers; measured when they are asked for, which takes a minute."""
        return examine(self.model, self._school)

    @property
    def passed(self) -> bool:
        return self.figures["held_out"] >= BAR

    @property
    def summary(self) -> str:
        shares = ", ".join(f"{name} {share:.3f}" for name, share in self.figures.items())
        return f"chat: {self.model.num_parameters():,} parameters; answered right: {shares} (bar {BAR:.2f})"

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_generation_config(folder, self.tokenizer)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        rows = "\n".join(f"| {name.replace('_', ' ')} | {share:.1%} |" for name, share in self.figures.items())
        return CARD.read_text(encoding="utf-8").format(
            parameters=self.model.num_parameters(),
            topics=len(Lessons(LANGUAGES[0]).answers) - 1,
            examined=len(held_out()),
            examples=STEPS * BATCH * PROCESSES,
            vocabulary=VOCABULARY,
            longest=LONGEST,
            seed=SEED,
            rows=rows,
            minutes=self.minutes,
        )


def train(work: Path, share: float = 1.0) -> Trained:
    """Train, with a checkpoint in `work`, and examine. `share` of the steps: 1.0 is the whole training."""
    school = School()
    model = make_model(school.tokenizer)

    model.train()
    training = Training(model, work / "chat.pt", share)
    training.stage("answers", STEPS, lambda step: loss_of(model, school.batch(step)), rate=RATE)
    return Trained(model, school, sum(training.seconds.values()) / 60)
