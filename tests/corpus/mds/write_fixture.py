"""Writes the shards beside this file with mosaicml-streaming itself.

To be run where that package is installed, which is not this project's environment (it pins older
versions of numpy and transformers): `python tests/corpus/mds/write_fixture.py`. Written with
mosaicml-streaming 0.13.0. `expected.json` says what the package's own reader finds in them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from streaming import MDSWriter, StreamingDataset

HERE = Path(__file__).resolve().parent
NUM_ROWS = 40


def row(number: int, dtype: str) -> dict:
    # Lengths below and above 256: the size of the stored shape changes there.
    length = 300 if number % 16 == 7 else 1 + number * 5 % 11
    ids = (np.arange(length) * 7 + number) % 250 + 2
    return {
        "input_ids": ids.astype(dtype),
        "url": f"https://h{number % 3}.org/\u00e9/{number}",
        "length": length,
        "score": number / 8,
    }


# As the MeCo authors describe theirs; compressed, with types that stand in the rows; ids as bytes.
WRITERS = {
    "authors": ({"input_ids": "ndarray:int32", "length": "int32"}, None, "int32"),
    "zstd": ({"input_ids": "ndarray", "length": "int", "score": "float64"}, "zstd:7", "int64"),
    "bytes": ({"input_ids": "bytes", "length": "uint32"}, "zstd", "uint16"),
}

expected = {}
for name, (others, compression, dtype) in WRITERS.items():
    columns = {"url": "str", **others}
    shutil.rmtree(HERE / name, ignore_errors=True)
    with MDSWriter(
        out=str(HERE / name),
        columns=columns,
        compression=compression,
        hashes=["sha1", "xxh64"],
        size_limit=2200,
    ) as writer:
        for number in range(NUM_ROWS):
            sample = {key: row(number, dtype)[key] for key in columns}
            if columns["input_ids"] == "bytes":
                sample["input_ids"] = sample["input_ids"].tobytes()
            writer.write(sample)
    # Read from a copy: the package leaves unpacked shards behind.
    copy = HERE / "unpacked"
    shutil.copytree(HERE / name, copy)
    dataset = StreamingDataset(local=str(copy), batch_size=1, shuffle=False)
    found = [dataset[i] for i in range(NUM_ROWS)]
    shutil.rmtree(copy)
    expected[name] = [
        [np.frombuffer(one["input_ids"], dtype).tolist(), one["url"]]
        if columns["input_ids"] == "bytes"
        else [one["input_ids"].tolist(), one["url"]]
        for one in found
    ]
assert all(rows == expected["authors"] for rows in expected.values())
(HERE / "expected.json").write_text(json.dumps(expected["authors"], separators=(",", ":")) + "\n")
