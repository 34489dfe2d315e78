"""A run's adapters as a peft directory, and what it trained whole as files beside them.

`PeftModel.from_pretrained` reads it, and vLLM's LoRA loader, which refuses modules_to_save: so the
projector is a file of its own, to be loaded into the base first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from manifests import store
from train.learn.model import adapter_config
from train.models.checkpoint_keys import PROJECTOR
from train.models.finished_run import FinishedRun
from train.models.lora_merge import ADAPTER_CONFIG
from train.models.tensor_files import LazyTensor, file_tensors, write_file
from train.models.trained_tensors import is_lora

ADAPTER = "adapter_model.safetensors"
PROJECTOR_FILE = "projector.safetensors"
WHOLE_FILE = "whole.safetensors"
_README = """\
# Adapter

LoRA factors of a finished training run, the projector that was trained with them, and the base
model they belong to. The folder above holds the same model, merged.

| file | what |
|---|---|
| `{adapter}`, `adapter_config.json` | the factors, float32, as peft writes them |
| `{projector}` | the projector, float32, by its names in `LlavaForConditionalGeneration` |
{more}| `base.json` | directory and hash of the base model |

With peft; the projector comes first, as peft renames modules:

```python
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("{base}")
model.load_state_dict(load_file("{projector}"), strict=False)
model = PeftModel.from_pretrained(model, ".")
```

vLLM's `--lora-modules` loads the factors alone: the base it serves must have this projector.
Otherwise serve the merged model.
"""


def write_adapter(out: Path, run: FinishedRun, base: str, config: Any) -> None:
    """Write a directory that peft and vLLM load.

    Args:
        base: directory of the model that was trained.
        config: LlavaConfig of it.
    """
    folder = str(out)
    trained = list(file_tensors(Path(run.trained)))
    factors = [_renamed(one) for one in trained if is_lora(one.name)]
    projector = [one for one in trained if f".{PROJECTOR}." in one.name]
    rest = (one for one in trained if not is_lora(one.name))
    whole = [one for one in rest if one not in projector]
    files = {ADAPTER: factors, PROJECTOR_FILE: projector} | ({WHOLE_FILE: whole} if whole else {})
    for name, tensors in files.items():
        write_file(out / name, tensors)
    store.write_json(folder, "base.json", {"directory": base, "hash": run.identity["base"]})
    store.write(folder, "README.md", _readme(base, bool(whole)).encode())
    store.write_json(folder, ADAPTER_CONFIG, _settings(run, base, config))


def _renamed(factor: LazyTensor) -> LazyTensor:
    """Return a factor by the name that peft gives it in a file."""
    name = factor.name.replace(".default.weight", ".weight")
    return replace(factor, name=f"base_model.model.{name}")


def _readme(base: str, has_more: bool) -> str:
    more = f"| `{WHOLE_FILE}` | all else that was trained; loaded as the projector is |\n"
    return _README.format(
        adapter=ADAPTER, projector=PROJECTOR_FILE, base=base, more=more if has_more else ""
    )


def _settings(run: FinishedRun, base: str, config: Any) -> dict[str, Any]:
    """Return adapter_config.json of the run's own peft settings, for inference."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    found = adapter_config(model, run.config.lora)
    found.base_model_name_or_path = base
    found.inference_mode = True
    return {name: _plain(value) for name, value in found.to_dict().items()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
