"""Changed files: bytes anywhere, words in a text, or the content behind a checksum, which then fits again."""

import csv
import io
import json
import re
import zipfile
from contextlib import suppress

import torch
from safetensors.torch import load

from compress.checksums import COLUMN, LINE, digest, rows_with_checksums
from compress.export import container
from compress.export.packed import PACKED

WORDS = (
    *(b"null", b"nan", b"-1", b"0", b"1e30", b"100000000000000000000000", b"true", b"", b"x", b"[]", b"[1]", b"{}"),
    *(
        b'"',
        b"'",
        b"..",
        b"\xff\xfe",
        b"\x00",
        b"\n",
        b"\xe2\x80\xae",
        b"\x1b[2J",
        b"${oc.env:HOME}",
        b"*a",
        b"!!python/x",
    ),
)


def changed_bytes(content, draw):
    """A bit, a stretch of bytes, or the length of `content` is another one."""
    place = draw.randrange(len(content))
    end = min(len(content), place + draw.choice((1, 4, 64, 4096)))
    noise = draw.randbytes(end - place)
    flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
    kinds = {
        "flip": content[:place] + flipped + content[place + 1 :],
        "noise": content[:place] + noise + content[end:],
        "zeros": content[:place] + bytes(end - place) + content[end:],
        "ones": content[:place] + b"\xff" * (end - place) + content[end:],
        "cut": content[:place],
        "removed": content[:place] + content[end:],
        "twice": content[:end] + content[place:],
        "empty": b"",
    }
    return kinds[draw.choice([*kinds])]


def changed_words(content, draw):
    """A word of a text is another one or gone, or a line is."""
    kind = draw.choice(("word", "word", "word", "line"))
    found = list(re.finditer(rb"[^\s,:\[\]{}]+" if kind == "word" else rb"[^\n]*\n", content))
    if not found:
        return changed_bytes(content, draw)
    place = draw.choice(found)
    other = draw.choice((*WORDS, draw.choice(found)[0]))
    return content[: place.start()] + other + content[place.end() :]


def mutate(path, draw):
    """Changes the file at `path`, and says how; every second time its checksums, where it has some, fit again."""
    content = path.read_bytes()
    change = changed_words if path.suffix in (".yaml", ".json", ".csv", ".txt", ".log") else changed_bytes
    repaired = repair(path, content, change, draw) if draw.random() < 0.6 else None
    path.write_bytes(change(content, draw) if repaired is None else repaired)
    return "with its checksum" if repaired is not None else "without"


def repair(path, content, change, draw):
    """The changed content with checksums that fit; None where it has none, or can have none any more."""
    if path.suffix in (".yaml", ".json"):
        line = LINE.match(content.decode())
        if line is None:
            return None
        rest = change((line["before"] or "").encode() + content[line.end() :], draw)
        text = rest.decode(errors="replace")
        if path.suffix == ".yaml":
            return f"# sha256: {digest(text)}\n{text}".encode()
        return text.replace("{\n", f'{{\n  "sha256": "{digest(text)}",\n', 1).encode()
    if path.name == "metrics.csv":
        rows = list(csv.DictReader(io.StringIO(change(content, draw).decode(errors="replace"))))
        if not rows or COLUMN not in rows[0]:
            return None
        for row in rows:
            row.pop(None, None)
            row.pop(COLUMN)
        written = io.StringIO()
        writer = csv.DictWriter(written, [*rows[0], COLUMN])
        writer.writeheader()
        writer.writerows(rows_with_checksums(rows))
        return written.getvalue().encode()
    if path.suffix == ".ckpt":
        written = io.BytesIO()
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(written, "w") as other:
            names = archive.namelist()
            # The pickle is where the structure is: the tensors are numbers, whatever they hold.
            chosen = draw.choice((names[0], draw.choice(names)))
            for name in names:
                part = archive.read(name)
                other.writestr(name, change(part, draw) if name == chosen and part else part)
        return written.getvalue()
    if path.suffix == ".safetensors" and "foreign" not in path.name:
        return changed_model(path, draw)
    return None


def changed_model(path, draw):
    """A model file whose description, or one of whose tensors, is another one."""
    kind, description, tensors = container.read(path)
    if draw.random() < 0.5:
        for _ in range(20):  # most changes leave no JSON, which is one case of many
            text = changed_words(json.dumps(description).encode(), draw).decode(errors="replace")
            with suppress(ValueError):
                description = json.loads(text)
                break
    else:
        name = draw.choice([*tensors])
        other = draw.choice(("gone", "shape", "type", "values", "bytes", "bytes"))
        value = tensors.pop(name)
        if other == "shape":
            tensors[name] = value.reshape(-1)[: draw.randrange(value.numel() + 1)].clone()
        elif other == "type":
            tensors[name] = value.to(draw.choice((torch.float64, torch.int64, torch.int8, torch.float16, torch.bool)))
        elif other == "values":
            tensors[name] = torch.full_like(value, draw.choice((0, 1, 127)))
        elif other == "bytes" and value.numel():
            # A stream of a packed file may also be longer or shorter by any number of bytes.
            content = changed_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes(), draw)
            width = value.element_size()
            content = content[: len(content) // width * width]
            tensors[name] = torch.frombuffer(bytearray(content or bytes(width)), dtype=value.dtype)
    written = path.with_name("changed.safetensors")
    description = description if isinstance(description, dict) else {}
    container.write(written, kind, description, tensors, deflated=kind == PACKED)
    content = written.read_bytes()
    written.unlink()
    return changed_deflated(content, draw) if kind == PACKED and draw.random() < 0.15 else content


def changed_deflated(content, draw):
    """A packed file whose compressed description is another stream of bytes of the same length."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata, place = header["__metadata__"], header["description"]["data_offsets"]
    begin, end = (start + offset for offset in place)
    changed = (changed_bytes(content[begin:end], draw) + bytes(end - begin))[: end - begin]
    content = content[:begin] + changed + content[end:]
    tensors = load(content)
    signed = container._checksum({"format": metadata["format"]}, tensors)
    return content.replace(metadata["sha256"].encode(), signed.encode(), 1)
