"""A network through NNCodec, an implementation of ISO/IEC 15938-17: what our files are compared with.

As its users run it: the whole state dict by dependent (trellis-coded) quantization (Haase et al. 2020) and DeepCABAC
(Wiedemann et al. 2020), without any data. The package is no dependency of the project, and runs beside numpy 2, though
it asks for an older one:

    pip install h5py opencv-python-headless pandas && pip install --no-deps nncodec==2.1.3
"""

import tempfile

import torch
from torch import nn

from compress.errors import UserError
from compress.models.baking import copied


def missing() -> str:
    """Why the package cannot be imported; empty where it can."""
    try:
        import nncodec.nn  # noqa: F401  # takes seconds
    except ImportError as error:
        return str(error)
    return ""


def coded(network: nn.Module, qp: int) -> tuple[nn.Module, int]:
    """A copy of `network` with the float tensors that come back from a bitstream, and the bytes of that.

    qp: the steps of the weights grow with it, twofold every four; other tensors keep the codec's own, finer step.
    Raises UserError where the codec gives back other tensors than it was given.
    """
    from nncodec.nn import decode, encode

    state = {name: value.numpy() for name, value in network.state_dict().items() if value.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:  # `encode` writes the bitstream to a file, too
        bitstream = encode(state, args={"qp": qp, "use_dq": True, "verbose": False, "results": folder})
    decoded = decode(bitstream)
    if {name: value.shape for name, value in decoded.items()} != {name: value.shape for name, value in state.items()}:
        raise UserError(f"nncodec: found other tensors decoded than encoded at qp {qp}; accepted: the same")
    result = copied(network)
    result.load_state_dict(network.state_dict() | {name: torch.from_numpy(value) for name, value in decoded.items()})
    return result, len(bitstream)
