"""A batch byte by byte as Python 2 pickled it, which is how the published CIFAR archives were written."""

import hashlib
import pickle
import struct

import numpy as np

from compress.data.cifar import CIFAR10

GLOBAL_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY_ARRAY = GLOBAL_RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
UNSIGNED_BYTE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def text(value):
    """Python 2's `str`, which is bytes: BINSTRING."""
    return b"T" + struct.pack("<i", len(value)) + value


def python_2_batch(rows, labels):
    shape = b"(K" + bytes([len(rows)]) + b"M" + struct.pack("<H", rows.shape[1]) + b"t"
    state = b"(K\x01" + shape + UNSIGNED_BYTE + b"\x89" + text(rows.tobytes()) + b"t"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + EMPTY_ARRAY + state + b"b" + text(b"labels") + listed + b"u."


def test_batches_of_python_2_are_read(tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    content = python_2_batch(rows, [index % 10 for index in range(20)])
    # Python's own unpickler agrees that these bytes are such a batch.
    assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], rows)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (base / name).write_bytes(content)
    names = {"label_names": [f"class {index}" for index in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    monkeypatch.setattr(CIFAR10, "sums", sums)
    source = CIFAR10(root=str(tmp_path), image_size=32).read()
    assert np.array_equal(source.test_images.numpy(), rows.reshape(20, 3, 32, 32))
    assert source.test_labels.tolist() == [index % 10 for index in range(20)]
