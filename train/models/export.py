"""A finished training run as a model that needs nothing of ours: plain transformers loads it.

Adapters are merged and whole tensors put in place one at a time, so an 8B model needs no 8B of
memory; only the check of the logits loads models, one after the other.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from manifests import store
from train.config import TrainConfig
from train.models import model_card, processor_files, provenance
from train.models.adapter_files import write_adapter
from train.models.compose import (
    DTYPES,
    SHARD_BYTES,
    check_dtype,
    load_tokenizer,
    unfinished_directory,
)
from train.models.finished_run import FinishedRun
from train.models.image_token import ImageToken
from train.models.same_logits import LogitsCheck, check_same_logits, expected_logits
from train.models.tensor_files import LazyTensor, read_tensors, write_tensors
from train.models.towers import register_tower
from train.models.trained_tensors import TrainedTensors
from train.text.template import BUNNY_END_TOKENS

NOISE = "noise.json"
ADAPTER_FOLDER = "adapter"
_NUM_WORST = 5
_COPIED = (
    *("processor_config.json", "preprocessor_config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model"),
)


@dataclass(frozen=True, slots=True)
class Exported:
    """A written model.

    adapter: its peft directory, or None for a run without adapters. noise: of the layers where
    rounding drowns most of what training did, |rounding| / |change| by name, the worst first.
    """

    path: str
    dtype: str
    adapter: str | None
    noise: dict[str, float]
    check: LogitsCheck


def export(
    run_dir: str,
    out: str,
    *,
    base: str | None = None,
    dtype: str = "float16",
    shard_bytes: int = SHARD_BYTES,
    base_models: Sequence[str] = (),
) -> Exported:
    """Write `out`, a stock LLaVA directory with what a run trained, and its adapter beside it.

    Args:
        run_dir: folder of a finished run.
        out: directory to write. config.json comes last: without it the directory is unfinished,
            and written anew.
        base: directory of the model that was trained, if it has moved.
        dtype: of all weights: float16, in which Bunny serves, bfloat16, float32, or keep: each
            tensor as in the base. bfloat16 drowns much of a small change: see noise.json.
        shard_bytes: most bytes in one safetensors file.
        base_models: hub names of tower and language model, for the model card.

    Raises: UserError for an unfinished run, another base model, values that float16 cannot hold, a
        finished `out`, and a written model whose logits are not the trained one's.
    """
    path = unfinished_directory(out)
    check_dtype(dtype)
    run = FinishedRun.read(run_dir)
    model_dir = base if base is not None else run.model_dir
    run.check_base(model_dir)
    trained = TrainedTensors.of(run)
    tensors = trained.applied(read_tensors(Path(model_dir)), DTYPES.get(dtype))

    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, shard_bytes)
    values = config_in(Path(model_dir), DTYPES.get(dtype))
    _write_text_files(path, Path(model_dir), run.config, values)
    adapter = path / ADAPTER_FOLDER if trained.adapter.factors else None
    check = _checked(path, run, model_dir, adapter, values, tensors)

    worst = sorted(trained.noise.items(), key=lambda one: -one[1])
    store.write_json(str(path), NOISE, {"dtype": dtype, "rounding_by_change": dict(worst)})
    folder = None if adapter is None else str(adapter)
    made = Exported(str(path), dtype, folder, dict(worst[:_NUM_WORST]), check)
    _write_provenance(made, run, model_dir, base_models)
    store.write_json(str(path), "config.json", values)
    return made


def config_in(base: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json: the base's, in another dtype if one is given."""
    values: dict[str, Any] = json.loads((base / "config.json").read_text())
    register_tower(values)
    parts = [values, *(values[name] for name in ("text_config", "vision_config"))]
    for part in parts if dtype is not None else []:
        if part is values or {"dtype", "torch_dtype"} & part.keys():
            part.pop("torch_dtype", None)
            part["dtype"] = str(dtype).removeprefix("torch.")
    return values


def text_files(model_dir: Path) -> list[Path]:
    """Return the files of a model's processor, tokenizer, template and generation settings."""
    names = (fnmatch.filter((one.name for one in model_dir.iterdir()), like) for like in _COPIED)
    return [model_dir / name for name in sorted({name for some in names for name in some})]


def _write_text_files(
    out: Path, base: Path, config: TrainConfig, values: Mapping[str, Any]
) -> None:
    """Copy processor, tokenizer and template, and make them those that were trained with."""
    for one in text_files(base):
        shutil.copyfile(one, out / one.name)
    processor = store.read_json(str(base / "processor_config.json"))
    processor["image_processor"]["do_pad"] = config.image_mode == "pad"
    store.write_json(str(out), "processor_config.json", processor)
    if config.template in BUNNY_END_TOKENS:
        tokenizer = load_tokenizer(base)
        tokenizer.eos_token = BUNNY_END_TOKENS[config.template]
        image_id = values["image_token_index"]  # as compose and import_bunny call it
        image = ImageToken(tokenizer.convert_ids_to_tokens(image_id), image_id)
        processor_files.write_tokenizer(out, tokenizer, image, processor_files.BUNNY_TEMPLATE)
        processor_files.write_generation_config(out, base, tokenizer)


def _checked(
    path: Path,
    run: FinishedRun,
    model_dir: str,
    adapter: Path | None,
    values: Mapping[str, Any],
    tensors: list[LazyTensor],
) -> LogitsCheck:
    """Write the adapter, and compare the model that it makes with the merged one."""
    from transformers import LlavaConfig

    if adapter is not None:
        write_adapter(adapter, run, model_dir, LlavaConfig.from_pretrained(model_dir))
    dtypes = {one.name: one.dtype for one in tensors}
    expected = expected_logits(model_dir, Path(run.trained), adapter, dtypes)
    return check_same_logits(path, LlavaConfig.from_dict(json.loads(json.dumps(values))), expected)


def _write_provenance(
    made: Exported, run: FinishedRun, model_dir: str, base_models: Sequence[str]
) -> None:
    training = provenance.of_export(run, model_dir, made.dtype, base_models)
    told = {"noise": made.noise, "logits": asdict(made.check)}
    store.write_json(made.path, provenance.TRAINING, training | told)
    text = model_card.card(Path(made.path).name, training, _facts(made))
    store.write(made.path, model_card.CARD, text.encode())


def _facts(made: Exported) -> list[str]:
    check = made.check
    facts = [
        f"Logits on a fixed text and image differ from the trained model's in float32 by "
        f"{check.difference:.2g}, where the largest is {check.largest:.3g}; {check.agreement:.1%} "
        "of the likeliest next tokens are the same.",
    ]
    name, worst = next(iter(made.noise.items()), ("", 0.0))
    if worst:
        facts.append(
            f"Rounding to {made.dtype} is at most {worst:.2g} of what training changed (`{name}`); "
            f"each layer's is in `{NOISE}`."
        )
    if made.adapter is not None:
        facts.append(f"The unmerged adapter is in `{ADAPTER_FOLDER}/`.")
    return facts
