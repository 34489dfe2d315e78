"""The dataset card of a mix: which rows of which sources, how they were chosen, how to load them.

Holds no date and no path of this machine: the same run gives the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from curate.media import dataset_card
from curate.media.shard_list import Facts
from manifests import paths
from manifests.work import View


def render(view: View, shards: Sequence[Facts]) -> str:
    """Return the card, Markdown below a YAML head."""
    records = {name: dataset_card.record_of(stage) for name, stage in view.before.items()}
    num_samples = sum(one["samples"] for one in shards)
    pieces = [
        dataset_card.head(
            num_samples,
            name="Instruction data for a vision-language model",
            task="image-text-to-text",
            tag="instruction-tuning",
        ),
        _summary(view, shards, num_samples),
        _sources(shards),
        dataset_card.funnel(records),
        dataset_card.settings(records),
        _FILES,
        _loading(shards),
        dataset_card.RIGHTS,
    ]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _summary(view: View, shards: Sequence[Facts], num_samples: int) -> str:
    num_bytes = sum(one["filesize"] for one in shards)
    images = sum((Counter(one["image_suffixes"]) for one in shards), Counter[str]())
    shown = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(images.items())) or "none"
    text_only = sum(one["text_only"] for one in shards)
    return f"""# Mix of {num_samples:,} instruction rows

{len(shards)} shards, {num_bytes:,} bytes; images: {shown}; {text_only:,} rows are text alone.
Images are the original bytes. Recipe seed: {view.seed}.
Directory: `{paths.name_of(view.path)}`."""


def _sources(shards: Sequence[Facts]) -> str:
    counts = sum((Counter(one["sources"]) for one in shards), Counter[str]())
    lines = [f"| {name} | {number:,} |" for name, number in sorted(counts.items())]
    return "\n".join(["## Sources", "", "| source | samples |", "|---|---:|", *lines])


def _loading(shards: Sequence[Facts]) -> str:
    if not shards:
        return ""
    names = [paths.name_of(one["shard"]) for one in shards]
    return f"""## Load it

```python
import webdataset

samples = webdataset.WebDataset("{dataset_card.pattern(names)}", shardshuffle=False)
```

The rows are shuffled already; reading in order is fine. Text-only rows have no image member."""


_FILES = """## Files

- `shards/*.tar`: WebDataset shards; per sample its images and `.json` (LLaVA row)
- `shards/sizes.json`: samples per shard; `shards/wids.json`: the list for wids
- `mix.json`: all rows in LLaVA format, in the order of the shards
- `part-*.parquet`: uid, key, and where in its shard each image and row lies
- `verdicts/`: what became of each row"""
