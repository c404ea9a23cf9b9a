"""Images in parquet files: a column of encoded images and, where there is one, a column of labels, read by row group."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from coreg.data.archives import AT_ONCE, lost_notes, shard_split
from coreg.data.decode import UnreadableImage, decode_image
from coreg.data.folders import settled, split_notes
from coreg.data.images import HELD_OUT, TEST, ImageList, Paths, lookup, translated
from coreg.data.ranges import LastFew, RangedFile, Reader
from coreg.errors import UserError
from coreg.plaintext import one_line

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "image_bytes", "content")
LABELS = ("label", "labels", "cls", "class", "fine_label", "class_name", "y", "target")
LARGEST_GROUP = 1 << 30  # bytes of images that are in memory at a time
_groups = LastFew(2)


@dataclass
class _Table:
    """What one parquet file holds."""

    ends: np.ndarray  # int64 (g,): rows up to the end of each row group
    column: str  # of the encoded images, as parquet names it
    labels: list[Any]  # an integer, a text or None for each row; none where there is no such column
    own: list[str] | None  # class names that Hugging Face datasets wrote into the file


@dataclass
class _Cells:
    """Pixels of rows of parquet files, put one after the other; a file that cannot be read has one row."""

    files: list[RangedFile]
    tables: list[_Table | str]
    starts: np.ndarray  # int64 (F,): the first row of each file

    def __call__(self, row: int) -> Image.Image:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, table = self.files[number], self.tables[number]
        if isinstance(table, str):
            raise UnreadableImage(table)
        row -= int(self.starts[number])
        group = int(np.searchsorted(table.ends, row, side="right"))
        cells = _groups.get((file, group), lambda: _read_group(file, group, table.column))
        cell = cells[row - int(table.ends[group - 1] if group else 0)].as_py()
        if cell is None:
            raise UnreadableImage("no image in this row")
        return decode_image(io.BytesIO(cell))


def _read_group(file: RangedFile, group: int, column: str) -> pa.ChunkedArray:
    """The encoded images of a row group."""
    import pyarrow as pa

    try:
        cells = _opened(file).read_row_group(group, columns=[column], use_threads=False).column(0)
        return cells if not pa.types.is_struct(cells.type) else pa.chunked_array([chunk.field(0) for chunk in cells.chunks])
    except (pa.ArrowException, OSError) as error:
        raise UnreadableImage(f"{file.place} is damaged ({one_line(error)})") from None


def _opened(file: RangedFile) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(Reader(file), pre_buffer=False)


def parquet_images(
    root: str,
    spec: str,
    files: Sequence[RangedFile | str],
    names: Sequence[str] | None,
    class_names: Sequence[str] | None,
) -> ImageList:
    """The images in parquet files; paths are `file.parquet/00000012`, with the row, or for one file without a name the row.

    The column of images holds bytes, or pairs of bytes and path, as Hugging Face datasets writes them. Labels are class
    names or numbers; where the file says its own class names they are numbers of these. The split is that of the file's
    name, such as `train-00000-of-00010.parquet`.

    Args:
        root, spec, files, names: see `coreg.data.archives.tar_images`.

    Raises:
        UserError: pyarrow is not installed, no file can be read, or they hold no column of images.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError(f"{spec} needs pyarrow, which is not installed: pip install pyarrow (the extra `data`)") from None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tables = list(pool.map(lambda file: file if isinstance(file, str) else _read_table(file), files))
    lost = {number: table for number, table in enumerate(tables) if isinstance(table, str)}
    if len(lost) == len(files):
        raise UserError(f"{lost[0]}; copy it again")
    counts = [1 if isinstance(table, str) else int(table.ends[-1]) if len(table.ends) else 0 for table in tables]
    if not sum(counts):
        raise UserError(f"{spec} holds no row; give other files")
    encoded, labels = [], []
    own = next((table.own for table in tables if not isinstance(table, str) and table.own), None)
    for number, (table, count) in enumerate(zip(tables, counts)):
        prefix = f"{names[number]}/" if names is not None else ""
        encoded += [names[number]] if number in lost else [f"{prefix}{row:08d}" for row in range(count)]
        known = table.labels if isinstance(table, _Table) and table.labels else [None] * count
        labels.append(_as_numbers(known, own, class_names))
    kinds = np.array([shard_split(name) for name in names or [""]], dtype=np.uint8)
    notes = split_notes(dict(zip(names or [""], kinds.tolist())), bool((kinds == TEST).any()))
    table = np.concatenate(labels)
    split = settled(np.repeat(kinds, counts))
    return ImageList(
        root,
        Paths([os.fsencode(path) for path in encoded]),
        table if (table >= 0).any() else None,
        split,
        own,
        _Cells(list(files), tables, np.cumsum([0, *counts[:-1]])),
        (notes if (kinds == HELD_OUT).any() else []) + lost_notes(lost, len(files)),
    )


def _as_numbers(known: Sequence[Any], own: list[str] | None, class_names: Sequence[str] | None) -> np.ndarray:
    """Labels int64 (n,) in the asked-for classes, -1 where unknown."""
    wanted = own if class_names is None else class_names
    if wanted is None:
        return np.full(len(known), -1, dtype=np.int64)
    find = lookup(wanted)
    limit = len(own or wanted)
    numbers = [
        value if isinstance(value, int) and 0 <= value < limit else find(value) if isinstance(value, str) else -1
        for value in known
    ]
    table = np.array(numbers, dtype=np.int64)
    is_number = np.array([isinstance(value, int) for value in known], dtype=bool)
    if own is not None and class_names is not None and is_number.any():
        ours = translated(table[is_number], own, class_names)
        table[is_number] = -1 if ours is None else ours
    return table


def _read_table(file: RangedFile) -> _Table | str:
    """What a file holds without its images, or in words why it cannot be read.

    Raises:
        UserError: its store does not answer, it has no column of images, or too large row groups.
    """
    import pyarrow as pa

    try:
        opened = _opened(file)
        schema, about = opened.schema_arrow, opened.metadata
        features = _features(schema)
        column = _image_column(schema, features, file.place)
        index = next(place for place in range(len(opened.schema)) if opened.schema.column(place).path == column)
        groups = [about.row_group(group) for group in range(about.num_row_groups)]
        largest = max((group.column(index).total_uncompressed_size for group in groups), default=0)
        if largest > LARGEST_GROUP:
            raise UserError(
                f"{file.place} has row groups of {largest / 1e9:.1f} GB, which would be in memory at once; write it again "
                f"with row groups of a few hundred images"
            )
        label = _label_column(schema, features)
        labels = opened.read(columns=[label], use_threads=False).column(0).to_pylist() if label else []
    except UnreadableImage as error:  # a file of several
        return f"{file.place} cannot be read ({error})"
    except (pa.ArrowException, OSError) as error:
        return f"{file.place} cannot be read as a parquet file: {one_line(error)}"
    names = features.get(label, {}).get("names") if label else None
    own = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return _Table(np.cumsum([group.num_rows for group in groups], dtype=np.int64), column, labels, own)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face datasets wrote about the columns; nothing where it did not, or it is not understood."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, dict[str, Any]], place: str) -> str:
    """The name of the column of encoded images in the file, `image.bytes` where it is a part of one.

    Raises:
        UserError: there is none, or there are several.
    """
    import pyarrow as pa

    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    columns = {}
    for field in schema:
        if is_bytes(field.type):
            columns[field.name] = field.name
        elif pa.types.is_struct(field.type):
            inner = field.type.get_field_index("bytes")
            if inner >= 0 and is_bytes(field.type.field(inner).type):
                columns[field.name] = f"{field.name}.bytes"
    named = [name for name in columns if features.get(name, {}).get("_type") == "Image"]
    named = named or [name for name in IMAGES if name in columns] or list(columns)
    if not named or (len(named) > 1 and named[0] not in IMAGES):
        have = ", ".join(named or schema.names)
        raise UserError(
            f"{place} has {'several columns' if named else 'no column'} of encoded images ({have}); call one `image`, of "
            f"bytes or of bytes and path"
        )
    return columns[named[0]]


def _label_column(schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str | None:
    """The name of the column of labels, integers or texts; None where there is none."""
    import pyarrow as pa

    def fits(name: str) -> bool:
        kind = schema.field(name).type
        return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)

    named = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    return next((name for name in (*named, *LABELS) if name in schema.names and fits(name)), None)
