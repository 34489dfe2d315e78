"""One run of training in a process of its own, ours or Hugging Face's Trainer: what it cost.

    python one_training.py SPEC.json     prints one line of JSON

Both train the same tensors of the same model on the same rows, tokenized and decoded by the same
code in as many worker processes; the Trainer as LLaVA-style trainers use it: random batches of a
fixed number of rows, padded, with logits of every position, and the mean of its micro-batches.
The first step warms up and is not counted.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import report  # noqa: F401 - puts the repository on the path
import torch

from manifests.errors import WarrenError
from train.config import TrainConfig
from train.data.index import Index
from train.data.samples import RowMaker


class Clock:
    """Counts seconds and tokens of all steps but the first."""

    def __init__(self, device: str) -> None:
        self.device, self.marks, self.tokens, self.losses = device, [], [], []

    def step(self, num_tokens: float, loss: float) -> None:
        """Note the end of a step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.tokens.append(num_tokens)
        self.losses.append(loss)

    def cost(self, before: int) -> dict[str, Any]:
        """Return seconds and tokens of the counted steps, and the peak of memory in bytes."""
        return {
            "seconds": self.marks[-1] - self.marks[0],
            "tokens": sum(self.tokens[1:]),
            "steps": len(self.marks),
            "losses": self.losses,
            "peak": peak_bytes(self.device),
            "before": before,
        }


def peak_bytes(device: str) -> int:
    """Return the most memory so far: of the GPU, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(spec: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Train by Warren."""
    from train.learn.run import train

    clock, before = Clock(spec["device"]), [0]

    def on_step(entry: dict[str, Any]) -> None:
        before[0] = before[0] or resident()
        clock.step(entry["tokens"], entry["loss"])
        if len(clock.marks) == spec["steps"]:
            raise Enough

    out = Path(spec["out"])
    with contextlib.suppress(Enough):
        train(
            config,
            spec["model"],
            [spec["data"]],
            str(out),
            num_workers=spec["workers"],
            on_step=on_step,
            preflight=False,
        )
    return clock.cost(before[0]) | {"flops": last_mfu(out)}


class Enough(WarrenError):
    """As many steps as were asked for."""


def last_mfu(out: Path) -> float | None:
    """Return the median of what the log calls mfu, if it does."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    found = [line["mfu"] for line in lines if line.get("mfu")]
    return float(np.median(found)) if found else None


def resident() -> int:
    """Return this process's resident bytes now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of an index as tensors."""

    def __init__(self, index: Index, make_row: RowMaker) -> None:
        self.index, self.make_row = index, make_row

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> Any:
        row = self.make_row(self.index.sample(at))
        assert not isinstance(row, str), row
        return row


def padded(rows: list[Any]) -> dict[str, Any]:
    """Collate as LLaVA does: padded on the right, a mask, all images in a batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.from_numpy(row.ids) for row in rows]
    labels = pad([torch.from_numpy(row.labels) for row in rows], True, -100)
    found = {"input_ids": pad(ids, True, 0), "labels": labels}
    found["attention_mask"] = pad([torch.ones_like(one) for one in ids], True, 0)
    pixels = np.concatenate([row.pixels for row in rows])
    return found | ({"pixel_values": torch.from_numpy(pixels)} if len(pixels) else {})


def trainers(spec: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Train by transformers.Trainer."""
    from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

    dtype = torch.float32 if config.dtype == "keep" else getattr(torch, config.dtype)
    llava = LlavaForConditionalGeneration.from_pretrained(spec["model"], dtype=dtype)
    llava.requires_grad_(False)
    model = llava
    if config.stage == "adapter":
        import peft

        from train.learn.model import adapter_config

        model = peft.get_peft_model(llava, adapter_config(llava, config.lora))
    llava.model.multi_modal_projector.float().requires_grad_(True)
    image_id = llava.config.image_token_id
    make_row = RowMaker.load(spec["model"], config, image_token_id=image_id)
    clock, counted = Clock(spec["device"]), []

    class Counting(Trainer):
        def training_step(self, model: Any, inputs: Any, *more: Any, **others: Any) -> Any:
            counted.append(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *more, **others)

        def log(self, logs: dict[str, float], *more: Any) -> None:
            if "loss" in logs:
                clock.step(float(sum(counted)), logs["loss"])
                counted.clear()

    rows_each = spec["rows_each"]
    arguments = TrainingArguments(
        output_dir=spec["out"],
        per_device_train_batch_size=rows_each,
        gradient_accumulation_steps=config.plan.global_batch_size // rows_each,
        learning_rate=config.projector_lr,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=spec["steps"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=dtype == torch.bfloat16,
        use_cpu=spec["device"] == "cpu",
        dataloader_num_workers=spec["workers"],
        dataloader_pin_memory=spec["device"] == "cuda",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
    )
    rows = Rows(Index.load([spec["data"]]), make_row)
    before = resident()
    Counting(model, arguments, train_dataset=rows, data_collator=padded).train()
    return clock.cost(before)


def main(path: str) -> None:
    """Train as the file says."""
    spec = json.loads(Path(path).read_text())
    if spec["device"] == "cpu":
        from curate.media.torchvision_ops import ensure_torchvision_importable

        ensure_torchvision_importable()
        torch.set_num_threads(spec["threads"])
    config = TrainConfig.load(spec["config"], where="config")
    sys.stdout.write(json.dumps({"ours": ours, "trainer": trainers}[spec["side"]](spec, config)))


if __name__ == "__main__":
    main(sys.argv[1])
