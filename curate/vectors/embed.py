"""The embed stage: each part's images and captions as unit rows, in clip-retrieval's file layout.

    img_emb/img_emb_0007.npy, text_emb/text_emb_0007.npy    float16 [n, d], unit norm, uid order
    metadata/metadata_0007.parquet                          VECTORS; clip_score is the exact dot

Threads decode ahead of the forward pass. A batch is `batch_size` consecutive rows of the part,
whoever computes it, so that the same bits come out on one kind of hardware. A part of which no row
could be embedded has no files: a gap in the numbers, as clip-retrieval leaves it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field

from curate.media.images import ImageError, decode
from curate.media.originals import open_shard
from curate.media.tars import RangeReader
from curate.sources import image_root_of
from curate.vectors import clip_model, exact
from curate.vectors.clip_model import ClipModel, Pixels, Precision
from curate.vectors.halving import Halving
from manifests import ledger, paths
from manifests.schemas import VECTORS, conform
from manifests.strict import Strict
from manifests.work import Item, Output, View, part_name

if TYPE_CHECKING:
    import torch

COLUMNS = ("uid", "key", "shard", "offset", "size", "caption", "image_sha256")
BATCHES_AHEAD = 2

Float16Rows = npt.NDArray[np.float16]
Given = TypeVar("Given")
Made = TypeVar("Made")


class EmbedConfig(Strict):
    """The model, and how it is run."""

    model: str
    """An open_clip architecture (with `pretrained`), hf-hub:organisation/name, or a folder."""
    pretrained: str | None = None
    """Weights tag or weights file of an architecture, e.g. openai for ViT-L-14."""
    batch_size: int = Field(default=256, ge=1)
    """Rows of one forward pass. Halved where memory runs out; the part's notes then say so."""
    max_pixels: int = Field(default=128_000_000, ge=1)
    """Width times height; larger images are quarantined by their header, before decoding."""
    num_threads: int = Field(default=1, ge=1)
    """Threads of the forward pass on a CPU. Fixed here, not by the machine: another number may
    round otherwise."""
    gpu_precision: Precision = "fp16"
    """Type of the matrix products on a GPU (autocast); a CPU always computes in fp32."""
    decode_threads: int = Field(default=4, ge=1)
    """Threads that read and decode ahead. Changes speed only, so it enters no fingerprint."""

    def located(self) -> Self:
        """Return the same config with absolute paths of a local model or weights file."""
        found = {}
        if clip_model.find(self.model, self.pretrained).folder is not None:
            found["model"] = paths.absolute(self.model.removeprefix(clip_model.FOLDER_SCHEME))
        if self.pretrained is not None and Path(self.pretrained).is_file():
            found["pretrained"] = paths.absolute(self.pretrained)
        return self.model_copy(update=found)

    def canonical(self) -> dict[str, Any]:
        """Return what decides the result; of a local file or folder the name, its digest does."""
        values = super().canonical()
        del values["decode_threads"]
        if clip_model.find(self.model, self.pretrained).folder is not None:
            values["model"] = paths.name_of(self.model)
        if self.pretrained is not None:
            values["pretrained"] = paths.name_of(self.pretrained)
        return values


class Problem(NamedTuple):
    """Why a row cannot be embedded: the error class, and the same in words."""

    error: str
    detail: str


@dataclass(slots=True)
class Embedded:
    """What became of a part's rows.

    positions: of the embedded rows in the part, ascending; images and texts are theirs, float16
    [n, d]. problems: position -> why not.
    """

    images: list[Float16Rows] = field(default_factory=list)
    texts: list[Float16Rows] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    problems: dict[int, Problem] = field(default_factory=dict)


def identity(config: EmbedConfig) -> dict[str, Any]:
    """Return the digests of a local model's files, or the name and tag of a published one."""
    return clip_model.identity(clip_model.find(config.model, config.pretrained))


def plan(view: View) -> list[Item]:
    """One item per source part. Raises: UserError for a model that open_clip does not know."""
    config = EmbedConfig.model_validate(view.config)
    clip_model.check_known(clip_model.find(config.model, config.pretrained))
    return [Item(part_name(one["part"]), {"part": one["part"]}) for one in view.parts()]


def work(view: View, item: Item) -> Output:
    """Embed one part's rows."""
    config = EmbedConfig.model_validate(view.config)
    part = item.payload["part"]
    samples = view.samples(part, COLUMNS)
    if samples.num_rows == 0:
        return Output(verdicts=ledger.verdicts("embed", np.zeros(0, np.uint64), reasons=[]))
    name = clip_model.find(config.model, config.pretrained)
    clip = clip_model.load(name, gpu_precision=config.gpu_precision)
    halving = Halving(config.batch_size)
    with clip_model.pinned_threads(config.num_threads):
        rows, root = pl.DataFrame(samples), image_root_of(view)
        embedded = embed_rows(clip, config, rows, root, halving=halving)
    notes: dict[str, Any] = {"device": clip.device.type}
    if halving.num_halvings:
        notes |= {"batch_halvings": halving.num_halvings, "batch_size_reached": halving.num_rows}
    return _output(part, samples, embedded, notes)


def embed_rows(
    clip: ClipModel,
    config: EmbedConfig,
    samples: pl.DataFrame,
    root: str,
    *,
    halving: Halving,
) -> Embedded:
    """Return the embeddings of some SAMPLES rows.

    Results are fetched one batch late: a GPU works on one batch while the next is made ready.
    """
    embedded = Embedded()
    queued: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ExitStack() as stack:
        for pixels, captions in _batches(clip, config, samples, root, stack, embedded):
            found = halving.run(
                lambda at, px=pixels, text=captions: clip_model.encode(clip, px[at], text[at]),  # type: ignore[misc]
                len(captions),
            )
            _fetch(queued, embedded)
            queued = found
        _fetch(queued, embedded)
    return embedded


def ahead(
    function: Callable[[Given], Made], values: Iterable[Given], *, num_threads: int, depth: int
) -> Generator[Made, None, None]:
    """Yield function(value) in order, computed by threads up to `depth` values ahead."""
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        try:
            for value in values:
                pending.append(pool.submit(function, value))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for one in pending:  # the consumer has left: what has not begun need not
                one.cancel()


def _batches(
    clip: ClipModel,
    config: EmbedConfig,
    samples: pl.DataFrame,
    root: str,
    stack: ExitStack,
    embedded: Embedded,
) -> Iterator[tuple[Pixels, list[str]]]:
    """Yield (uint8 [n, height, width, 3], n captions) of every `batch_size` consecutive rows.

    Rows that cannot be decoded are noted in `embedded` and leave their batch smaller.
    """
    readers = _open_shards(root, samples["shard"], stack)
    decoded = ahead(
        lambda row: _decoded(clip, config, readers[row["shard"]], row),
        samples.iter_rows(named=True),
        num_threads=config.decode_threads,
        depth=BATCHES_AHEAD * config.batch_size,
    )
    stack.callback(decoded.close)  # before the readers, which its threads use
    for first in range(0, samples.height, config.batch_size):
        found = list(enumerate(islice(decoded, config.batch_size), start=first))
        good = [(at, one) for at, one in found if not isinstance(one, Problem)]
        embedded.problems |= {at: one for at, one in found if isinstance(one, Problem)}
        embedded.positions += [at for at, _ in good]
        if good:
            captions = samples["caption"].gather([at for at, _ in good]).to_list()
            yield np.stack([one for _, one in good]), captions


def _open_shards(root: str, shards: pl.Series, stack: ExitStack) -> Mapping[str, RangeReader]:
    """Return a reader per shard, open until the stack closes.

    Raises: UserError when a shard is gone.
    """
    names = shards.unique(maintain_order=True)
    return {shard: stack.enter_context(open_shard(root, shard)) for shard in names}


def _decoded(
    clip: ClipModel, config: EmbedConfig, reader: RangeReader, row: Mapping[str, Any]
) -> Pixels | Problem:
    """Return the pixels that the model sees of one row's image, or why there are none."""
    try:
        data = reader.read(row["offset"], row["size"])
    except EOFError as error:
        return Problem("unreadable_bytes", f"the shard has changed since it was ingested: {error}")
    digest = row["image_sha256"]
    if digest is not None and hashlib.sha256(data).digest() != digest:
        return Problem("unreadable_bytes", "the image has changed since it was ingested (SHA-256)")
    try:
        return clip_model.prepare(clip, decode(data, max_pixels=config.max_pixels))
    except ImageError as error:
        return Problem(error.error_class, error.detail)


def _fetch(queued: list[tuple[torch.Tensor, torch.Tensor]], embedded: Embedded) -> None:
    for images, texts in queued:
        embedded.images.append(images.cpu().numpy())
        embedded.texts.append(texts.cpu().numpy())


def _output(part: int, samples: pa.Table, embedded: Embedded, notes: dict[str, Any]) -> Output:
    """Return the part's files without the rows whose embedding cannot be used, and all verdicts."""
    files: dict[str, Any] = {}
    if embedded.positions:
        images, texts = np.concatenate(embedded.images), np.concatenate(embedded.texts)
        codes = exact.reject_reasons(images, texts)
        positions = np.array(embedded.positions)
        for at, code in zip(positions[codes > 0], codes[codes > 0], strict=True):
            embedded.problems[int(at)] = Problem(exact.REJECT_REASONS[code], "made by the model")
        if not codes.all():
            good = codes == 0
            files = _vectors(part, samples.take(positions[good]), images[good], texts[good])
    return Output(
        files=files,
        verdicts=_verdicts(samples, embedded.problems),
        quarantine=quarantine_of(samples, embedded.problems),
        notes=notes,
    )


def _vectors(
    part: int, samples: pa.Table, images: Float16Rows, texts: Float16Rows
) -> dict[str, Any]:
    """Return the three files of a part; row i of each belongs to row i of `samples`."""
    columns = {name: samples.column(name) for name in ("uid", "key", "caption")}
    columns["clip_score"] = pa.array(exact.clip_score(images, texts))
    columns["row"] = pa.array(np.arange(samples.num_rows, dtype=np.uint32))
    return {
        f"img_emb/img_emb_{part:04d}.npy": images,
        f"text_emb/text_emb_{part:04d}.npy": texts,
        f"metadata/metadata_{part:04d}.parquet": conform(pa.table(columns), VECTORS),
    }


def _verdicts(samples: pa.Table, problems: Mapping[int, Problem]) -> pa.Table:
    reasons = [""] * samples.num_rows
    for at, problem in problems.items():
        reasons[at] = ledger.quarantine_reason(problem.error)
    uids = samples.column("uid").to_numpy()
    return ledger.verdicts("embed", uids, reasons=reasons)


def quarantine_of(samples: pa.Table, problems: Mapping[int, Problem]) -> pa.Table:
    """Return the QUARANTINE rows of some SAMPLES. Args: problems: position -> why not."""
    named = samples.select(["uid", "key", "shard"]).take(pa.array(sorted(problems), pa.int64()))
    found = (problems[at] for at in sorted(problems))
    rows = zip(named.to_pylist(), found, strict=True)
    return ledger.quarantine([{**row, **problem._asdict()} for row, problem in rows])
