"""A training that shows how far it is, goes on where it was stopped, and is shared by two processes."""

import contextlib
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

WARM_UP_STEPS = 100
LOWEST_RATE = 0.03
REPORT_SECONDS = 15.0
CHECKPOINT_SECONDS = 120.0
LARGEST_GRADIENT = 1.0
# Two processes of one thread each get 40 % more done than one of two threads, at this size of matrices. Always two, so
# that a training gives the same on every machine.
PROCESSES = 2
HIGHEST_ADAMW_RATE = 1.5e-3


@contextlib.contextmanager
def shared(train: Callable[[Path, float], object], work: Path, share: float) -> Iterator[None]:
    """While its body calls `train(work, share)`, so does another process, and both take part in every step."""
    with tempfile.TemporaryDirectory() as scratch:
        meeting = f"file://{scratch}/meeting"
        start = multiprocessing.get_context("spawn").Process
        others = [start(target=_help, args=(train, work, share, rank, meeting)) for rank in range(1, PROCESSES)]
        for each in others:
            each.daemon = True
            each.start()
        _join(0, meeting)
        try:
            yield
        finally:
            for each in others:
                each.terminate()
                each.join()
            distributed.destroy_process_group()


def _help(train: Callable[[Path, float], object], work: Path, share: float, rank: int, meeting: str) -> None:
    _join(rank, meeting)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(work, share)


def _join(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    # Each on a core of its own, where there are as many: moved about, they wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= PROCESSES:
        os.sched_setaffinity(0, {cores[rank]})
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)


class Training:
    """Stages that follow each other on one module, each with an optimizer of its own.

    What a step sees depends on its stage and number alone, so a training that is stopped and started again ends with
    the same data as one that never was. `checkpoint` holds the weights, the optimizer and the place.
    `share` shortens every stage: 1.0 is the whole training. Where processes share it (`shared`), each makes a part of
    every batch, and all take the same step along the mean of their gradients.
    """

    def __init__(self, module: nn.Module, checkpoint: Path, share: float = 1.0) -> None:
        self.module = module
        self.checkpoint = checkpoint
        self.share = share
        # Seconds that each stage has taken, those before an interruption included.
        self.seconds: dict[str, float] = {}
        self._rank: int = distributed.get_rank() if distributed.is_initialized() else 0
        self._parts: int = distributed.get_world_size() if distributed.is_initialized() else 1
        self._started = time.monotonic()
        self._done: list[str] = []
        self._saved: dict[str, Any] = {}
        if checkpoint.exists():
            self._saved = torch.load(checkpoint, weights_only=True)
            self._done = self._saved["done"]
            self.seconds = self._saved["seconds"]
            module.load_state_dict(self._saved["module"])
            print(f"goes on from {checkpoint}: {self._saved['stage']}, step {self._saved['step']}", flush=True)

    def stage(
        self,
        name: str,
        steps: int,
        loss_of: Callable[[int], Tensor],
        *,
        rate: float,
        trained: Iterable[nn.Module] | None = None,
    ) -> None:
        """`steps` steps on `trained` (everything, if not said): warm-up, then a cosine down from `rate`.

        `loss_of(number)` gives the loss of a part of a batch; each part has a number of its own.
        """
        if name in self._done:
            return
        steps = max(2, round(steps * self.share))
        modules = [self.module] if trained is None else list(trained)
        self.module.requires_grad_(False)
        for each in modules:
            each.requires_grad_(True)
        optimizers = _optimizers(modules, rate)
        first = 0
        if self._saved.get("stage") == name:
            for optimizer, state in zip(optimizers, self._saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            first = self._saved["step"]
        before = self.seconds.get(name, 0.0)
        reported = saved = began = time.monotonic()
        average = 0.0
        for step in range(first, steps):
            loss = loss_of(step * self._parts + self._rank)
            self.module.zero_grad(set_to_none=True)
            loss.backward()
            if self._parts > 1:
                self._share_gradients()
            nn.utils.clip_grad_norm_((p for p in self.module.parameters() if p.requires_grad), LARGEST_GRADIENT)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_rate"] * _share_of_rate(step, steps)
                optimizer.step()
            average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
            now = time.monotonic()
            self.seconds[name] = before + now - began
            if now - reported > REPORT_SECONDS or step in (first, steps - 1):
                reported = now
                pace = (now - began) / (step + 1 - first)
                left = pace * (steps - step - 1)
                print(
                    f"{_clock(now - self._started)}  {name}: step {step + 1} of {steps}, loss {average:.4f}, "
                    f"{pace:.2f} s a step, {_clock(left)} left of this stage",
                    flush=True,
                )
            if now - saved > CHECKPOINT_SECONDS:
                saved = now
                self._save(name, step + 1, optimizers)
        self._done.append(name)
        self._save(name, steps, optimizers)

    def _share_gradients(self) -> None:
        gradients = [each.grad for each in self.module.parameters() if each.grad is not None]
        together = torch.cat([each.flatten() for each in gradients])
        distributed.all_reduce(together)
        together /= self._parts
        for mine, mean in zip(gradients, together.split([each.numel() for each in gradients]), strict=True):
            mine.copy_(mean.view_as(mine))

    def _save(self, stage: str, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if self._rank:
            return
        document = {
            "done": self._done,
            "seconds": self.seconds,
            "stage": stage,
            "step": step,
            "module": self.module.state_dict(),
            "optimizers": [each.state_dict() for each in optimizers],
        }
        beside = self.checkpoint.with_suffix(".new")
        torch.save(document, beside)
        beside.rename(self.checkpoint)


def _optimizers(modules: Iterable[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, which learn in half the steps with it; AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim == 2 and ".layers." in f".{name}"
            (matrices if is_matrix else others).append(parameter)
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=min(rate, HIGHEST_ADAMW_RATE), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return found


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = min(WARM_UP_STEPS, steps // 10 + 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def save_generation_config(folder: Path, tokenizer: Any) -> None:
    """Greedy decoding. By hand: transformers refuses a temperature beside do_sample false, and vLLM samples without."""
    config = {
        "do_sample": False,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
