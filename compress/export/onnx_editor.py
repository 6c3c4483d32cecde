"""Nodes and constants of an ONNX graph, added and put in order."""

from itertools import count
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper


class GraphEditor:
    """The nodes of a graph in a new order of execution, and constants beside them."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.pairs: dict[tuple[Any, ...], str] = {}

    def constant(self, name: str, array: np.ndarray, kind: int | None = None) -> str:
        """Adds an initializer, of the ONNX type `kind` where numpy has none of its own; returns `name`."""
        if kind is not None:
            array = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def holds(self, name: str, array: np.ndarray, kind: int) -> bool:
        """Whether there is an initializer `name` of the ONNX type `kind` with the values of `array`."""
        held = self.constants.get(name)
        return held is not None and held.data_type == kind and np.array_equal(numpy_helper.to_array(held), array)

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def quantized(self, tensor: str, scale: float, zero_point: int, levels: int = 256) -> str:
        """The name of `tensor` on a grid of uint8 codes; readers that want the same grid share one pair of nodes."""
        key = tensor, float(scale), int(zero_point), levels
        if key not in self.pairs:
            stem = next(
                stem for stem in (f"{tensor}_grid{i}" for i in count()) if f"{stem}_scale" not in self.constants
            )
            grid = [
                self.constant(f"{stem}_scale", np.array(scale, np.float32)),
                self.constant(f"{stem}_zero_point", np.array(zero_point, np.uint8)),
            ]
            codes = self.add("QuantizeLinear", [tensor, *grid], f"{stem}_codes")
            if levels < 256:
                # Clipped as integers: a narrower type than uint8 would keep the layer out of the integer kernels.
                top = self.constant(f"{stem}_top", np.array(levels - 1, np.uint8))
                codes = self.add("Clip", [codes, "", top], f"{stem}_clipped")
            self.pairs[key] = self.add("DequantizeLinear", [codes, *grid], f"{stem}_values")
        return self.pairs[key]

    def finish(self) -> None:
        """Puts the nodes, producers before their readers, and the constants that any of them reads into the graph."""
        producers = {output: node for node in self.nodes for output in node.output}
        ordered: dict[int, NodeProto] = {}

        def place(node: NodeProto) -> None:
            # The nodes are almost in order, so this goes only a few calls deep.
            for name in node.input:
                if name in producers and id(producers[name]) not in ordered:
                    place(producers[name])
            ordered[id(node)] = node

        for node in self.nodes:
            if id(node) not in ordered:
                place(node)
        used = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(ordered.values())
        self.graph.initializer.extend(self.constants[name] for name in sorted(self.constants) if name in used)
