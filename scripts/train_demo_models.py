"""Train the demonstration's chat and OCR models, evaluate them, and save into demo/ those that pass.

Runs on two CPU cores, about two hours a model. Stopped and started again it goes on where it was.

    .venv/bin/python scripts/train_demo_models.py chat
    .venv/bin/python scripts/train_demo_models.py ocr
    .venv/bin/python scripts/train_demo_models.py ocr --trial    # a minute: does it still run?

Exit code: 0 saved, 1 the model missed its bar and nothing was saved.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

TRIAL = 0.01


class Trained(Protocol):
    @property
    def passed(self) -> bool: ...
    @property
    def summary(self) -> str: ...
    def save(self, folder: Path) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("chat", "ocr"))
    parser.add_argument("--work", type=Path, default=CHECKOUT / "models" / "training", help="where checkpoints go")
    parser.add_argument("--trial", action="store_true", help="one step in a hundred, from the beginning")
    arguments = parser.parse_args()
    from demo.training import chat, loop, ocr

    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    trainers: dict[str, Callable[[Path, float], Trained]] = {"chat": chat.train, "ocr": ocr.train}
    train = trainers[arguments.model]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        place, share = (Path(scratch), TRIAL) if arguments.trial else (work, 1.0)
        with loop.shared(train, place, share):
            trained = train(place, share)
    print(trained.summary)
    if not trained.passed:
        print(f"not saved: it missed its bar{'' if arguments.trial else f'; its checkpoint stays in {work}'}")
        raise SystemExit(1)
    target = CHECKOUT / "demo" / arguments.model
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        made = Path(scratch) / "made"
        trained.save(made)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(made, target)
    print(f"saved: {target}")


if __name__ == "__main__":
    main()
