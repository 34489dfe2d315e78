"""The same model in lmms-eval, the field's own harness: its extra model `warren`, on local data.

    python -m lmms_eval --model warren --model_args pretrained=models/mine --include_path tasks \\
        --tasks warren_mme --batch_size 8

Beside a CPU-only torch, whose torchvision cannot be imported as it is, start it by
`python -m pipelines.evaluating.lmms_plugin` instead.

It is found by the entry point group `lmms_eval.models`. lmms-eval asks and scores by rules of its
own, see train/README.md: its figures are not the paper's. `write_task` makes its stock tasks read
parquet files that are here, by which nothing is fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curate.media.torchvision_ops import ensure_torchvision_importable
from manifests import paths, store
from manifests.errors import UserError
from manifests.pixels import upright_rgb

ensure_torchvision_importable()  # lmms-eval imports it
try:
    import lmms_eval
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise UserError(
        "lmms-eval is not installed.", str(error), 'Install it: pip install "warren[lmms]"'
    ) from error

MODEL = "warren"
STOCK = {
    "mme": "mme/mme.yaml",
    "pope": "pope/pope.yaml",
    "scienceqa": "scienceqa/scienceqa_img.yaml",
    "seed": "seedbench/seedbench.yaml",
    "mmmu": "mmmu/mmmu_val.yaml",
    "mmbench": "mmbench/mmbench_en_dev.yaml",
    "vqav2": "vqav2/vqav2_val.yaml",
    "mmvet": "mmvet/mmvet.yaml",
}
"""Benchmark -> lmms-eval's task. GQA is not among them: its task fetches its pictures itself."""
_READ_HERE = ("temperature", "top_p", "max_new_tokens", "do_sample")


def manifest() -> Any:
    """Return what lmms-eval registers: the entry point `lmms_eval.models`."""
    return ModelManifest(MODEL, simple_class_path=f"{__name__}.WarrenModel")


class WarrenModel(lmms):  # type: ignore[misc]  # lmms-eval publishes no types
    """A LLaVA directory that answers lmms-eval's requests, in one process."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        device: str | None = None,
        template: str = "bunny",
        image_mode: str = "pad",
        dtype: str = "auto",
        adapter: str | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model. pretrained: its directory. Raises: UserError."""
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval gives it to every model
        if unknown or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"The model {MODEL} cannot be asked so.",
                f"Unknown: {', '.join(unknown)}." if unknown else "It runs in one process.",
                "Give pretrained, template, image_mode, dtype, adapter; no accelerate launch.",
            )
        from pipelines.training.launch import ready_for_models

        ready_for_models()
        from train.models.hub import local_directory
        from train.serve.generate import load_model

        mode: Any = image_mode
        weights: Any = dtype
        self.batch_size = int(batch_size)
        self.chatter = load_model(
            local_directory(pretrained),
            adapter=adapter,
            device=device or "auto",
            dtype=weights,
            template=template,
            image_mode=mode,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each request, cut before the first of its `until` texts.

        Requests of the same gen_kwargs are generated together. Raises: UserError for one that
        shows something else than pictures.
        """
        together: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            together.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(at)
        answers = [""] * len(requests)
        for given, places in together.items():
            for at, text in zip(places, self._answered(requests, places, given), strict=True):
                answers[at] = text
                self.cache_hook.add_partial("generate_until", requests[at].args[:2], text)
        return answers

    def _answered(self, requests: Sequence[Any], places: Sequence[int], given: str) -> list[str]:
        wanted = json.loads(given)
        decoding = _decoding(wanted)
        found: list[str] = []
        for start in range(0, len(places), self.batch_size):
            asked = [self._question(requests[at]) for at in places[start : start + self.batch_size]]
            found += self.chatter.generate_batch(
                asked, batch_size=self.batch_size, decoding=decoding
            )
        return [_cut(text, _until(wanted)) for text in found]

    def _question(self, request: Any) -> Any:
        from train.serve.prompts import Question

        context, _, doc_to_visual, doc_id, task, split = request.args
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if not all(hasattr(one, "convert") for one in shown):
            raise UserError(f"{task} shows something else than pictures.", "", "Leave it out.")
        return Question(context, [upright_rgb(one) for one in shown])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: the paper's benchmarks are answered, not ranked. Raises: UserError."""
        raise _unable("compares likelihoods of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: the paper's benchmarks have one round. Raises: UserError."""
        raise _unable("asks in several rounds")


def write_task(name: str, data: str, out: str) -> str:
    """Write a YAML by which lmms-eval's own task of a benchmark reads local parquet files.

    Args:
        name: of STOCK.
        data: a parquet file, or a folder of them, in the hub's layout of lmms-lab.
        out: folder to give as --include_path.

    Returns the task's name. Raises: UserError for another benchmark, or without parquet files.
    """
    from train.benchmarks.files import parquet_files, split_of

    tables = parquet_files(data)
    if name not in STOCK or not tables:
        raise UserError(
            f"No task of lmms-eval can read {name} from {data}.",
            f"It needs parquet files of one of {', '.join(STOCK)}.",
            "Use `warren eval`.",
        )
    by_split: dict[str, list[str]] = {}
    for one in tables:
        by_split.setdefault(split_of(one), []).append(str(one.absolute()))
    task = f"{MODEL}_{name}"
    values = {
        "include": str(Path(lmms_eval.__file__).parent / "tasks" / STOCK[name]),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": by_split},
    }
    store.write(paths.absolute(out), f"{task}.yaml", yaml.safe_dump(values).encode())
    return task


def _decoding(wanted: Mapping[str, Any]) -> Any:
    """Return the decoding that a task's generation_kwargs mean; beams are not searched.

    Raises: UserError for more than one beam.
    """
    from train.serve.generate import Decoding

    if int(wanted.get("num_beams") or 1) > 1:
        raise _unable("searches several beams")
    told = {name: wanted[name] for name in _READ_HERE if wanted.get(name) is not None}
    samples = told.pop("do_sample", float(told.get("temperature", 0)) > 0)
    values: dict[str, Any] = {"max_new_tokens": int(told.get("max_new_tokens", 128))}
    if samples:
        values["temperature"] = float(told.get("temperature", 1.0))
        values["top_p"] = float(told.get("top_p", 1.0))
    return Decoding(**values)


def _until(wanted: Mapping[str, Any]) -> list[str]:
    until = wanted.get("until") or []
    return [until] if isinstance(until, str) else [one for one in until if one]


def _cut(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of these."""
    for one in until:
        text = text.partition(one)[0]
    return text


def _unable(what: str) -> UserError:
    return UserError(
        f"The task {what}, which the model {MODEL} does not.", "", "Choose a task that generates."
    )


if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate

    cli_evaluate()
