"""The README.md of an exported model: what it is, what made it, and how to load it.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards). A license is not
chosen: it follows from the base models and the data, which only the person knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from train.models.provenance import runs_in
from train.models.towers import EVA

CARD = "README.md"
_FRONT = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
# license: not set. It follows from the licenses of the base models and of the data.
{bases}
---
# {name}

{kind} Weights: {dtype}.

```python
{imports}
model = LlavaForConditionalGeneration.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")
content = [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]
turn = {{"role": "user", "content": content}}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""


_STOCK = "A `LlavaForConditionalGeneration` of plain transformers, with no code of its own."
_OF_EVA = """\
A `LlavaForConditionalGeneration` with an EVA vision tower, for which transformers has no class:
Warren must be installed, and `register_eva` called. vLLM and llama.cpp cannot load it."""
_IMPORTS = "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
_REGISTERED = """
from train.models.eva import register_eva

register_eva()"""


def card(name: str, training: Mapping[str, Any], facts: list[str]) -> str:
    """Return the text of README.md.

    Args:
        name: of the model, as a person would load it.
        training: its provenance (see train.models.provenance).
        facts: sentences on its weights: noise, checks, warnings.
    """
    bases = "".join(f"\n- {one}" for one in dict.fromkeys(_bases(training)))
    bases = f"base_model:{bases}" if bases else "# base_model: the base does not tell its names."
    is_eva = training["tower"] == EVA
    kind, imports = (_OF_EVA, _IMPORTS + _REGISTERED) if is_eva else (_STOCK, _IMPORTS)
    dtype = training["dtype"]
    parts = [_FRONT.format(name=name, bases=bases, dtype=dtype, kind=kind, imports=imports)]
    if facts:
        parts.append("## Weights\n\n" + "".join(f"- {one}\n" for one in facts))
    if shares := training.get("parts"):
        lines = [f"- {one['share']:g} of `{one['directory']}`\n" for one in shares]
        parts.append("## Average\n\nThe linear average of the weights of\n\n" + "".join(lines))
    if origin := training.get("base", {}).get("origin"):
        parts.append(_of_origin(origin))
    parts += [_of_run(run) for run in runs_in(training)]
    versions = ", ".join(f"{name} {one}" for name, one in training["versions"].items() if one)
    parts.append(f"## Made with\n\n{versions}\n\nAll of this, for programs: `training.json`.\n")
    return "\n".join(parts)


def _of_origin(origin: Mapping[str, Any]) -> str:
    lines = [
        f"- {role.replace('_', ' ')}: `{one['hub_name'] or one['directory']}`, "
        f"hash `{one['hash'][:16]}`\n"
        for role, one in origin["parts"].items()
    ]
    return f"## Base\n\nMade by `{origin['made_by']}` of\n\n" + "".join(lines)


def _bases(training: Mapping[str, Any]) -> Iterator[str]:
    if "base" in training:
        yield from training["base"]["models"]
        yield from _bases(training["base"]["training"] or {})
    for part in training.get("parts", []):
        yield from _bases(part["training"] or {})


def _of_run(run: Mapping[str, Any]) -> str:
    config, inputs, identity = run["config"], run["inputs"], run["identity"]
    size, epochs, seed = config["plan"]["global_batch_size"], config["epochs"], config["seed"]
    lines = [
        f"## {run['role']}\n",
        f"Stage `{config['stage']}`, template `{config['template']}`, {run['steps']} steps of "
        f"{size}, epochs: {epochs}, seed: {seed}, last loss: {_loss(run)}. {run['rows']} rows and "
        f"{run['images']} images were learned from, {run['dropped']} dropped"
        f"{_reasons(run['dropped_reasons'])}; rows refused before: "
        f"{sum(run['refused_reasons'].values())}{_reasons(run['refused_reasons'])}.\n",
        f"Base `{identity['base'][:16]}`, plan `{identity['plan'][:16]}`; data:\n",
        *(
            f"- `{directory}`, fingerprint `{fingerprint}`"
            for directory, fingerprint in zip(inputs["data_dirs"], identity["data"], strict=True)
        ),
    ]
    if inputs["subset"] is not None:
        lines.append(f"- only the rows of `{inputs['subset']}`")
    lines += [f"- doubt: {one}" for one in run["doubts"]]
    return "\n".join([*lines, "", *_table(run["sources"]), ""])


def _table(sources: Mapping[str, Mapping[str, int]] | None) -> list[str]:
    if sources is None:
        return []
    names = ("rows", "chosen", "refused", "drawn", "dropped")
    head = ["| source | rows | in the subset | refused | draws | dropped |", "|---" * 6 + "|"]
    return head + [
        f"| {source} | " + " | ".join(str(counts[name]) for name in names) + " |"
        for source, counts in sources.items()
    ]


def _loss(run: Mapping[str, Any]) -> str:
    return "unknown" if run["final_loss"] is None else f"{run['final_loss']:.4f}"


def _reasons(counts: Mapping[str, int]) -> str:
    found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f" ({found})" if found else ""
