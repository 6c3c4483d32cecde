"""A description as compressed bytes: a raw deflate stream (RFC 1951) that begins with what all have in common."""

import zlib

# Characters of the longest text, so that a few bytes cannot become gigabytes.
LONGEST = 1 << 22
# What a text may refer back to from its first byte on, likeliest last. It belongs to the format: files need this one.
VOCABULARY = (
    b'"shared":{"skipped":{"tied":{"channels":{"bitmap""dropout":0.0,"input_dropout":0.0,"inputs":256,"int64","uint8",'
    b'{"architecture":{"num_classes":10,"options":{"widths":[16,16,32,64]},"stem":"resnet"},'
    b'"class_names":["0","1","2","3","4","5","6","7","8","9"],"extra":{"configuration":"","seed":0,'
    b'"versions":{"commit":"","compress":"0.1.0","python":"3.1","torch":"2.1"}},"input_shape":[3,32,32],'
    b'"layers":[{"bias":true,"bits":8,"encoding":"dense","levels":256,"scale":["float32",1],"zero_point":[128,128]},'
    b'{"bias":true,"bits":2,"encoding":"entropy","levels":4,"scale":["float16",16],"zero_point":[1,2]}],'
    b'"mean":[0.5],"standard_deviation":[0.25],"state":["float32","float32","float16","float16"],"structure":,"words":'
)
RAW = -15  # zlib's word for a stream without header and checksum


def deflate(text: str) -> bytes:
    """The compressed bytes of a text in ASCII of at most LONGEST characters, which `inflate` takes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, zdict=VOCABULARY)
    return compressor.compress(text.encode()) + compressor.flush()


def inflate(content: bytes) -> str:
    """The text that `deflate` compressed; ValueError where it is damaged, too long, or followed by anything."""
    stream = zlib.decompressobj(RAW, zdict=VOCABULARY)
    try:
        text = stream.decompress(content, LONGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not stream.eof or stream.unused_data:
        raise ValueError(f"a stream of {len(content)} bytes that does not end with them")
    return text.decode()
