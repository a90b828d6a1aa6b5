"""Examples in ArrayRecord files: random access, any keys, one small format for pictures and for codes.

Every record is `uint32 little-endian length of header | header in JSON | blobs, one after the other`. The header is
`{"values": {key: number or str}, "blobs": [[key, type, shape, bytes], ...]}`; type is a numpy type such as "<u2", or
"picture" for an encoded picture (JPEG, PNG, ...). Record 0 of a file is no example: its values are `format` and
`class_names`.
"""

import glob
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from jaxtok.data.images import BadRecord, decode_image

FORMAT = "jaxtok 1"


class ArrayRecord:
    """Reads what `write_array_record` wrote.

    Args:
      paths: a file, a folder (its *.array_record files), a glob pattern, or a list of these; read in order of name.

    Raises:
      FileNotFoundError: nothing there; names the paths tried and the function that writes such files.
      ValueError: a file is damaged or of another format, or the files disagree on the class names.
    """

    read_threads = 8

    def __init__(self, paths):
        from grain.sources import ArrayRecordDataSource

        self.files = find_files([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        self.lengths, names = [], []
        for file in self.files:
            try:
                with ArrayRecordDataSource(file) as records:
                    first, count = json_header(records[0])[0]["values"], len(records)
                if first["format"] != FORMAT:
                    raise ValueError(f"its format is {first['format']!r}, not {FORMAT!r}")
                names.append(tuple(first["class_names"]))
            except Exception as error:  # whatever the reader and the parser say of bytes that are not ours
                raise ValueError(
                    f"{file} is no file that jaxtok.data.records.write_array_record wrote ({error}): write it so, or "
                    "read it with data.sources.TFDS if TFDS made it."
                ) from error
            self.lengths.append(count - 1)
        if len(set(names)) > 1:
            other = next(k for k, n in enumerate(names) if n != names[0])
            raise ValueError(
                f"{self.files[0]} and {self.files[other]} differ in class names: they are no one data set."
            )
        self.class_names = names[0]
        self.records = ArrayRecordDataSource([f"{f}[1:{n + 1}]" for f, n in zip(self.files, self.lengths, strict=True)])

    def __len__(self):
        return sum(self.lengths)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"ArrayRecord: example {i} of {len(self)}")
        try:
            record = self.records[i]
        except Exception as error:
            raise BadRecord(f"{self.describe(i)}: {error}") from error
        return decode_example(record, self.describe(i))

    def describe(self, i):
        for file, length in zip(self.files, self.lengths, strict=True):
            if i < length:
                return f"{file} record {i + 1}"
            i -= length
        raise IndexError(i)


def write_array_record(path, examples, class_names=("all",)):
    """Writes examples to one ArrayRecord file, which appears only when it is complete. Returns how many.

    Args:
      path: the file; end it in ".array_record" so that a folder of them can be read.
      examples: dicts of arrays, numbers and strings. `image` is uint8 [H W 3] (stored as PNG: exact) or the encoded
        bytes of a picture (stored as they are).
      class_names: name of each `label`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")
    count = 0
    try:
        writer.write(pack({"format": FORMAT, "class_names": list(class_names)}, []))
        for example in examples:
            writer.write(encode_example(example))
            count += 1
    finally:
        writer.close()
    os.replace(unfinished, path)
    return count


def encode_example(example):
    """A dict of arrays, numbers and strings as the bytes of one record; see the top of this file."""
    values, blobs = {}, []
    for key, value in example.items():
        if key == "image":
            blobs.append((key, "picture", (), value if isinstance(value, bytes) else png(value)))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            blobs.append((key, little.dtype.str, value.shape, little.tobytes()))
        elif isinstance(value, (str, int, float, np.integer, np.floating)):
            values[key] = value.item() if isinstance(value, np.generic) else value
        else:
            raise TypeError(f"{key}: {type(value).__name__} cannot be written; use an array, a number or a str.")
    return pack(values, blobs)


def decode_example(record, name):
    """The inverse of `encode_example`; `label` comes back as int32. Raises BadRecord."""
    try:
        header, at = json_header(record)
        example = header["values"]
        for key, kind, shape, size in header["blobs"]:
            blob, at = record[at : at + size], at + size
            if kind == "picture":
                example[key] = decode_image(blob, name)
            else:
                example[key] = np.frombuffer(blob, np.dtype(kind)).reshape(shape)
    except BadRecord:
        raise
    except Exception as error:
        raise BadRecord(f"{name}: {error}") from error
    if "label" in example:
        example["label"] = np.int32(example["label"])
    return example


def pack(values, blobs):
    listed = [(key, kind, shape, len(blob)) for key, kind, shape, blob in blobs]
    header = json.dumps({"values": values, "blobs": listed}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *(blob for *_, blob in blobs)])


def json_header(record):
    end = 4 + int.from_bytes(record[:4], "little")
    return json.loads(record[4:end]), end


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def find_files(paths):
    files = []
    for path in map(str, paths):
        pattern = os.path.join(path, "*.array_record") if os.path.isdir(path) else path
        files += [path] if os.path.isfile(path) else glob.glob(pattern)
    if not files:
        raise FileNotFoundError(
            f"No ArrayRecord file at {', '.join(map(str, paths))} (a file, a folder of *.array_record files, or a "
            "pattern): jaxtok.data.records.write_array_record(path, examples) writes one."
        )
    return sorted(set(files))
