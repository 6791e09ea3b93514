"""That the demonstration's models can be trained anew. Here, because it needs torch, which comes with vLLM."""

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from demo.training import chat, loop, ocr, pages
from tests.conftest import CHECKOUT

STEPS = 40
torch.set_num_threads(1)


@pytest.mark.parametrize("model", ["chat", "ocr"])
def test_a_trial_learns_and_saves_nothing(model: str, tmp_path: Path) -> None:
    before = files_of_the_demonstration()
    command = [sys.executable, "scripts/train_demo_models.py", model, "--trial", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    assert "not saved: it missed its bar" in done.stdout
    reported = re.findall(r"  (\w+): step (\d+) of \d+, loss ([\d.]+)", done.stdout)
    stage = reported[0][0]
    losses = [float(loss) for name, _, loss in reported if name == stage]
    assert losses[-1] < 0.95 * losses[0]
    assert files_of_the_demonstration() == before
    assert list(tmp_path.iterdir()) == []


def files_of_the_demonstration() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (CHECKOUT / "demo").rglob("*") if "__pycache__" not in path.parts}


def trained(checkpoint: Path, stop_at: int | None = None) -> nn.Module:
    """Two stages on a module with matrices of both optimizers; KeyboardInterrupt at a step of the second."""
    torch.manual_seed(1)
    module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 1)})

    def loss_of(first: int, step: int) -> Tensor:
        if first + step == stop_at:
            raise KeyboardInterrupt
        torch.manual_seed(first + step)
        given = torch.randn(8, 4)
        said = module["head"](torch.tanh(module["layers"][0](given)))
        return ((said - given.sum(1, keepdim=True)) ** 2).mean()

    training = loop.Training(module, checkpoint)
    training.stage("one", STEPS, lambda step: loss_of(0, step), rate=0.01, trained=[module["head"]])
    training.stage("two", STEPS, lambda step: loss_of(STEPS, step), rate=0.01)
    assert training.seconds.keys() == {"one", "two"}
    return module


@pytest.mark.parametrize("stop_at", [7, STEPS, STEPS + 30])
def test_stopped_and_started_again_it_ends_the_same(
    stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole = trained(tmp_path / "whole.pt").state_dict()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.pt", stop_at)
    parts = trained(tmp_path / "parts.pt").state_dict()
    assert "goes on from" in capsys.readouterr().out
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_both_languages_have_the_same_topics_and_all_of_them_are_examined() -> None:
    english, chinese = (chat.Lessons(language).answers for language in chat.LANGUAGES)
    examined = chat.held_out()
    assert english.keys() == chinese.keys()
    for language, answers in zip(chat.LANGUAGES, (english, chinese), strict=True):
        assert len(set(answers.values())) == len(answers), "one answer to two topics"
        assert {key for said, key, _ in examined if said == language} == set(answers)
    assert all("config/models.json" in answers[chat.FALLBACK] for answers in (english, chinese))


@pytest.mark.parametrize("language", chat.LANGUAGES)
def test_templates_expand(language: str) -> None:
    lessons = chat.Lessons(language)
    dice = Random(1)
    for topic in lessons.answers:
        asked = {lessons.question(topic, dice) for _ in range(40)}
        assert len(asked) > 8, topic
        templated = {lessons.templated(topic, dice) for _ in range(40)}
        assert not [question for question in templated if set(question) & set("()|<>")], topic


def test_what_is_learnt_is_what_a_server_sends() -> None:
    """The prompt, as the template of the saved tokenizer writes it, and an answer whose text clients get."""
    school = chat.School()
    system, earlier = "Be brief.", [("Who are you?", "I am.")]
    conversation = chat.Conversation(system, earlier, "怎样添加模型？", "add_model", "Name it.")
    example = school.example(conversation)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": earlier[0][0]},
        {"role": "assistant", "content": earlier[0][1]},
        {"role": "user", "content": [{"type": "text", "text": conversation.question}]},
    ]
    prompt = school.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert example.tokens[: example.start] == prompt
    assert school.tokenizer.decode(example.tokens[example.start :], skip_special_tokens=True) == conversation.answer


def test_what_the_reader_learns_of_a_page() -> None:
    """Of each token of an answer the patch where it stands; and what clients get of it is the page's Markdown."""
    tokenizer = ocr.make_tokenizer()
    for seed in range(20):
        page = pages.drawn_at_random(seed)
        answer, patches = ocr.answer_of(page)
        tokens = tokenizer(answer)["input_ids"]
        assert len(tokens) == len(patches)
        assert tokenizer.decode(tokens, skip_special_tokens=True) == page.markdown
        last = page.lines[-1]
        assert patches[-2] == (last.middle // ocr.PATCH, last.words[-1].centers[-1] // ocr.PATCH)


def test_a_band_is_seen_though_its_positions_jump() -> None:
    """Positions with gaps are how texts are packed, and packed texts do not see each other."""
    reader = ocr.Reader()
    image = reader.tokenizer.convert_tokens_to_ids("<image>")
    tokens = torch.tensor([[image] * ocr.GRID + reader.tokenizer("abc")["input_ids"]])
    positions = torch.arange(tokens.shape[1])[None] + torch.where(tokens == image, 0, 500)
    with torch.inference_mode():
        seen = torch.randn(2, 1, ocr.GRID, ocr.WIDTH)
        (one, _), (other, _) = (reader.read(each, tokens, positions) for each in seen)
    assert not torch.allclose(one[0, -1], other[0, -1], atol=1e-3)


@pytest.mark.parametrize(("wanted", "read", "edits"), [("abc", "abc", 0), ("abc", "", 3), ("abc", "axcd", 2)])
def test_edit_distance(wanted: str, read: str, edits: int) -> None:
    assert ocr.edit_distance(wanted, read) == edits
