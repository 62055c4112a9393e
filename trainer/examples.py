"""From records to encoded batches: read and encoded as they come, or all once and kept in memory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ipa.trainer.base import BaseModel
from ipa.trainer.broken import BrokenImage, BrokenImages, check_share
from ipa.trainer.data import Record
from ipa.trainer.errors import TrainError
from ipa.trainer.images import ImageError, open_image, square_pixels

ENCODE_BATCH = 32
CACHE_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Example:
    """One record's images as numbers: pixels (3, H, W) in [-1, 1] and the image encoder's input."""

    index: int
    caption: str
    pixels: Tensor
    pixel_values: Tensor


@dataclass(frozen=True)
class EncodedBatch:
    """What one micro step needs: the latents' posterior, unscaled (batch, 4, h, w), embeddings and captions."""

    latent_mean: Tensor
    latent_std: Tensor
    image_embeds: Tensor
    captions: list[str]


class Examples(Protocol):
    """Where encoded batches come from."""

    size: int
    """Records that indices may name."""

    def batches(self, order: Iterable[list[int]]) -> Iterator[EncodedBatch]:
        """One batch per list of record indices."""

    def text_states(self, captions: list[str]) -> Tensor:
        """Text states (batch, 77, cross_attention_dim), float32, of the batch's captions or of ``""``."""


class ExampleReader(Dataset[tuple[Example | None, list[BrokenImage]]]):
    """Reads records. A broken one is replaced by the next that is not, always the same one.

    Args:
        records: all of the data set.
        resolution: side of the training images in pixels.
        image_processor: of the image encoder.
    """

    def __init__(self, records: list[Record], resolution: int, image_processor: Any) -> None:
        self.records = records
        self.resolution = resolution
        self.image_processor = image_processor

    def __getitem__(self, index: int) -> tuple[Example | None, list[BrokenImage]]:
        """The example, and the records passed over before it; None when every record is broken."""
        broken: list[BrokenImage] = []
        for offset in range(len(self.records)):
            result = self.read((index + offset) % len(self.records))
            if isinstance(result, Example):
                return result, broken
            broken.append(result)
        return None, broken

    def read(self, index: int) -> Example | BrokenImage:
        """One record, or what is wrong with it."""
        record = self.records[index]
        file = record.image
        try:
            image = open_image(file)
            file = record.reference
            reference = image if record.reference == record.image else open_image(file)
        except ImageError as problem:
            return BrokenImage(index, file, str(problem))
        pixel_values = self.image_processor(reference, return_tensors="np").pixel_values[0]
        return Example(
            index=index,
            caption=record.text,
            pixels=torch.from_numpy(square_pixels(image, self.resolution)),
            pixel_values=torch.from_numpy(np.ascontiguousarray(pixel_values, dtype=np.float32)),
        )


class LiveExamples:
    """Reads and encodes every batch when it is needed, for data sets of any size."""

    def __init__(self, base: BaseModel, reader: ExampleReader, broken: BrokenImages, num_workers: int) -> None:
        self.size = len(reader.records)
        self._base, self._reader, self._broken, self._num_workers = base, reader, broken, num_workers

    def batches(self, order: Iterable[list[int]]) -> Iterator[EncodedBatch]:
        """Encoded batches; images are read ahead by the workers.

        Raises:
            TrainError: too many images are broken.
        """
        loader = DataLoader(
            self._reader,
            batch_sampler=order,
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=_ignore_interrupts,
        )
        for results in loader:
            examples = self._usable(results)
            mean, std = self._base.encode_pixels(torch.stack([example.pixels for example in examples]))
            embeds = self._base.encode_references(torch.stack([example.pixel_values for example in examples]))
            yield EncodedBatch(mean, std, embeds, [example.caption for example in examples])

    def text_states(self, captions: list[str]) -> Tensor:
        """Text states, encoded now."""
        return self._base.encode_captions(captions)

    def _usable(self, results: list[tuple[Example | None, list[BrokenImage]]]) -> list[Example]:
        examples = []
        for example, passed_over in results:
            for broken in passed_over:
                self._broken.add(broken)
            if example is not None:
                self._broken.add_usable(example.index)
                examples.append(example)
        self._broken.check()
        return examples


class CachedExamples:
    """Everything that does not change during training, encoded once, in main memory.

    Args:
        base: the frozen models.
        reader: of the records.
        broken: told of broken images; their records are left out.
        accelerator: the processes share the work and then all hold the result.
        progress: called with the records done and the records in all, of this process.
    Raises:
        TrainError: not enough memory, or too many images are broken.
    """

    def __init__(
        self,
        base: BaseModel,
        reader: ExampleReader,
        broken: BrokenImages,
        accelerator: Any,
        progress: Callable[[int, int], None],
    ) -> None:
        captions = [record.text for record in reader.records]
        unique = ["", *sorted(set(captions) - {""})]
        _check_memory(base, reader.resolution, len(captions), len(unique), accelerator.num_processes)
        self._device = accelerator.device

        (texts,) = _encode_shared(
            accelerator, len(unique), lambda rows: (base.encode_captions([unique[row] for row in rows]),), None
        )
        encode = _RecordEncoder(base, reader, broken)
        mean, std, embeds, is_usable = _encode_shared(accelerator, len(captions), encode, progress)
        usable = is_usable[:, 0].nonzero()[:, 0]
        self.size = len(usable)
        check_share(len(captions) - self.size, len(captions))  # the same answer in every process
        self._mean, self._std, self._embeds = mean[usable], std[usable], embeds[usable]
        self._captions = [captions[row] for row in usable.tolist()]
        self._texts, self._text_row = texts, {caption: row for row, caption in enumerate(unique)}

    def batches(self, order: Iterable[list[int]]) -> Iterator[EncodedBatch]:
        """Encoded batches out of memory."""
        for indices in order:
            yield EncodedBatch(
                self._mean[indices].to(self._device),
                self._std[indices].to(self._device),
                self._embeds[indices].to(self._device),
                [self._captions[index] for index in indices],
            )

    def text_states(self, captions: list[str]) -> Tensor:
        """Text states out of memory."""
        return self._texts[[self._text_row[caption] for caption in captions]].to(self._device)


class _RecordEncoder:
    """Encodes records by number; rows of broken ones are zero and marked unusable."""

    def __init__(self, base: BaseModel, reader: ExampleReader, broken: BrokenImages) -> None:
        self._base, self._reader, self._broken = base, reader, broken
        latent_side = reader.resolution // base.vae_scale_factor
        self._latent_shape = (base.vae.config.latent_channels, latent_side, latent_side)

    def __call__(self, rows: range) -> tuple[Tensor, ...]:
        mean, std = torch.zeros(len(rows), *self._latent_shape), torch.zeros(len(rows), *self._latent_shape)
        embeds, is_usable = torch.zeros(len(rows), self._base.image_embed_dim), torch.zeros(len(rows), 1)
        examples = []
        for index in rows:
            result = self._reader.read(index)
            if isinstance(result, Example):
                self._broken.add_usable(index)
                examples.append(result)
            else:
                self._broken.add(result)
        if examples:
            places = [example.index - rows.start for example in examples]
            pixels = torch.stack([example.pixels for example in examples])
            pixel_values = torch.stack([example.pixel_values for example in examples])
            encoded_mean, encoded_std = self._base.encode_pixels(pixels)
            mean[places], std[places] = encoded_mean.cpu(), encoded_std.cpu()
            embeds[places] = self._base.encode_references(pixel_values).cpu()
            is_usable[places] = 1.0
        return mean, std, embeds, is_usable


def _encode_shared(
    accelerator: Any,
    total: int,
    encode: Callable[[range], tuple[Tensor, ...]],
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, ...]:
    """Encode the rows 0 to ``total``, an equal part in each process, and gather them in all; on the CPU."""
    share = -(-total // accelerator.num_processes)
    # A last process without work repeats the last row, so that it has tensors of the right shape to gather.
    start = min(accelerator.process_index * share, total - 1)
    stop = min(start + share, total)
    parts = []
    for first in range(start, stop, ENCODE_BATCH):
        rows = range(first, min(first + ENCODE_BATCH, stop))
        parts.append(tuple(tensor.cpu() for tensor in encode(rows)))
        if progress is not None:
            progress(rows.stop - start, stop - start)
    columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if accelerator.num_processes == 1:
        return columns
    padded = tuple(torch.cat([column, column.new_zeros(share - len(column), *column.shape[1:])]) for column in columns)
    gathered = tuple(accelerator.gather(column.to(accelerator.device)).cpu() for column in padded)
    return tuple(column[:total] for column in gathered)


def _check_memory(base: BaseModel, resolution: int, records: int, captions: int, processes: int) -> None:
    latent = base.vae.config.latent_channels * (resolution // base.vae_scale_factor) ** 2
    text = base.text_length * base.unet.config.cross_attention_dim
    floats = records * (2 * latent + base.image_embed_dim) + captions * text
    needed, available = 4 * floats * processes, _available_memory()
    if available is not None and needed > CACHE_SHARE_OF_MEMORY * available:
        raise TrainError(
            f"--cache-latents needs {needed / 1e9:.1f} GB for {records} records in {processes} process(es), "
            f"{available / 1e9:.1f} GB are available; leave the option away"
        )


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
