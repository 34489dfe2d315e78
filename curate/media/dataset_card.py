"""The dataset card of assembled shards: what is in them, how they were made, how to load them.

Holds no date and no path of this machine: the same run gives the same bytes. The YAML head is what
the Hugging Face hub and `datasets` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifests import paths
from manifests.record import canonical_json
from manifests.work import StageDir, View

_SIZE_STEPS = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
)
_SHOWN_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Contents:
    """Names and totals of the written shards; image_suffixes counts images by file suffix."""

    shards: Sequence[str]
    num_samples: int
    num_bytes: int
    image_suffixes: Mapping[str, int]


def render(view: View, contents: Contents) -> str:
    """Return the card, Markdown below a YAML head."""
    records = {name: record_of(directory) for name, directory in view.before.items()}
    pieces = [
        head(
            contents.num_samples,
            name="Coreset of image-text pairs",
            task="image-to-text",
            tag="image-text",
        ),
        _summary(view, contents),
        funnel(records),
        settings(records),
        _cutoffs(records.get("select")),
        _files(),
        _loading(contents),
        RIGHTS,
    ]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def record_of(directory: StageDir) -> dict[str, Any]:
    """Return the record of a stage before this one."""
    record = directory.record()
    assert record is not None, "a stage runs only after those before it are recorded"
    return record


def head(num_samples: int, *, name: str, task: str, tag: str) -> str:
    """Return the YAML head. Args: task: a task category of the hub."""
    size = next((size for limit, size in _SIZE_STEPS if num_samples < limit), "n>10B")
    return f"""---
pretty_name: {name}
task_categories:
- {task}
size_categories:
- {size}
tags:
- webdataset
- {tag}
configs:
- config_name: default
  data_files:
  - split: train
    path: shards/*.tar
---"""


def _summary(view: View, contents: Contents) -> str:
    num_shards = f"{len(contents.shards)} {'shard' if len(contents.shards) == 1 else 'shards'}"
    images = ", ".join(f"{n:,} {suffix}" for suffix, n in contents.image_suffixes.items())
    held = f"{num_shards}, {contents.num_bytes:,} bytes; images: {images}."
    nothing = "No sample is left, so there are no shards; the table below says where they went."
    return f"""# Coreset of {contents.num_samples:,} image-text pairs

{held if contents.num_samples else nothing}
Images are {_images_are(view)}, captions the original text. Recipe seed: {view.seed}.
Directory: `{paths.name_of(view.path)}`."""


def _images_are(view: View) -> str:
    """Say what image bytes the shards hold."""
    if "download" not in view.before:
        return "the original bytes"
    config = record_of(view.before["download"])["config"]
    if config["keep_original_bytes"]:
        return "the bytes that their URLs gave"
    size = "" if config["resize"] == "no" else f" at {config['image_size']} px"
    form = f"{config['encode_format']} ({config['resize']}{size})"
    return f"what their URLs gave, written anew as {form}"


def funnel(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what each stage kept and lost, as a table."""
    lines = [
        "## How it was made",
        "",
        "| stage | rows in | kept | dropped | quarantined | fingerprint |",
        "|---|---:|---:|---|---|---|",
    ]
    for stage, record in records.items():
        lost = (_counts(record[name]) for name in ("dropped", "quarantined"))
        cells = (stage, f"{record['rows_in']:,}", f"{record['kept']:,}", *lost)
        lines.append(f"| {' | '.join(cells)} | `{record['fingerprint'][:_SHOWN_DIGITS]}` |")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(counts.items())) or "0"


def settings(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return each stage's config."""
    lines = [f"- {stage}: `{canonical_json(one['config'])}`" for stage, one in records.items()]
    return "\n".join(["## Settings", "", *lines])


def _cutoffs(record: Mapping[str, Any] | None) -> str:
    """Return the absolute values at which the selection cut, as its record notes them."""
    notes = {} if record is None else record["notes"]
    found = {reason: value for item in notes.values() for reason, value in item.items()}
    if not found:
        return ""
    lines = [f"| {reason} | {value!r} |" for reason, value in sorted(found.items())]
    head = ["## Cutoffs of the selection", "", "| dropped as | nearest value that was kept |"]
    return "\n".join([*head, "|---|---:|", *lines])


def _files() -> str:
    return """## Files

- `shards/*.tar`: WebDataset shards; per sample the image, `.txt` (caption), `.json` (LLaVA row)
- `shards/sizes.json`: samples per shard, for open_clip; `shards/wids.json`: the list for wids
- `pretrain.json`: all rows in LLaVA format; image paths are those of the unpacked shards
- `part-*.parquet`: uid, key, and where in its shard each image and row lies
- `verdicts/`: what became of each selected row"""


def _loading(contents: Contents) -> str:
    if not contents.shards:
        return ""
    shards = pattern(contents.shards)
    names = ";".join(contents.image_suffixes)
    mixed = (
        "\n\n`datasets` wants one kind of image suffix in a data set; this one has several: "
        "use webdataset."
        if len(contents.image_suffixes) > 1
        else ""
    )
    return f"""## Load it

```python
import webdataset

samples = webdataset.WebDataset("{shards}", shardshuffle=False)
pairs = samples.decode("pil").to_tuple("{names}", "txt")
```

```python
import datasets

pairs = datasets.load_dataset("webdataset", data_files="shards/*.tar", split="train")
```

```bash
python -m open_clip_train.main --train-data '{shards}' --dataset-type webdataset
```{mixed}"""


def pattern(shards: Sequence[str]) -> str:
    """Return what WebDataset readers are given for the shards, which lie in shards/.

    Example: ["00000.tar", "00001.tar"] -> "shards/{00000..00001}.tar"
    """
    first, last = (name.removesuffix(".tar") for name in (shards[0], shards[-1]))
    if len(shards) > 1 and int(last) - int(first) + 1 == len(shards):
        return f"shards/{{{first}..{last}}}.tar"
    return "::".join(f"shards/{name}" for name in shards)  # none was written where all were bad


RIGHTS = """## Rights

The images and captions belong to their owners; this data set says where each came from (`url`,
`source`, `source_shard` in the JSON rows) and grants no rights."""
