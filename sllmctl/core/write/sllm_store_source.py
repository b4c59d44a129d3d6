"""Weights in sllm-store's own format, as the source of a conversion."""

from __future__ import annotations

from pathlib import Path

from sllmctl.core.dtypes import DTYPE_BITS, torch_shape
from sllmctl.core.fileio import SourceFile
from sllmctl.core.header import TensorEntry, total_bits
from sllmctl.core.sllm_store import parts_warning, read_sllm_store
from sllmctl.core.write.layout import TensorSpec
from sllmctl.core.write.sources import Listing, Weights
from sllmctl.core.write.tensor_bytes import TensorBytes
from sllmctl.core.write.writer import ByteSource


def open_sllm_store_files(listing: Listing) -> Weights:
    """Open the weights of a source that sllm-store wrote.

    Tensors that are not contiguous become so, and views of one storage are stored each by itself.

    Raises:
        CheckpointError: It is damaged or incomplete.
        ReadError: A file cannot be opened.
    """
    placed, files = read_sllm_store(listing.path)
    opened: list[SourceFile] = []

    def close() -> None:
        for source in opened:
            source.close()

    specs: list[TensorSpec] = []
    sources: dict[str, tuple[ByteSource, int]] = {}
    try:
        for path, _ in files:
            opened.append(SourceFile(path))
        for entry in placed.entries:
            stride = placed.strides.get(entry.name)
            if stride is None:
                specs.append(TensorSpec(entry.name, entry.dtype, entry.shape, entry.nbytes))
                sources[entry.name] = opened[entry.shard], entry.offset
            else:
                nbytes = (total_bits(entry.shape, DTYPE_BITS[entry.dtype]) or 0) >> 3
                specs.append(TensorSpec(entry.name, entry.dtype, entry.shape, nbytes))
                sources[entry.name] = _strided(files[entry.shard][0], entry, stride), 0
    except BaseException:
        close()
        raise
    warning = parts_warning(placed.parts)
    return Weights(specs, placed.aliases, {}, sources, close, (warning,) if warning else ())


def _strided(path: Path, entry: TensorEntry, stride: tuple[int, ...]) -> TensorBytes:
    """The elements of a tensor in row-major order, out of a mapping of its file."""
    import torch

    itemsize = max(8, DTYPE_BITS[entry.dtype]) // 8
    mapped = torch.from_file(
        str(path), shared=False, size=entry.offset + entry.nbytes, dtype=torch.uint8
    )
    # As bytes, whose place in the file need not be aligned to the element's size.
    shape = (*torch_shape(entry.dtype, entry.shape), itemsize)
    return TensorBytes(
        mapped.as_strided(shape, (*(step * itemsize for step in stride), 1), entry.offset)
    )
