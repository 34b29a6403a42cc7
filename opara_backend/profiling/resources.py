"""Grid, block, registers and shared memory of every kernel, read off a captured graph's own nodes.

Takes: a graph captured on one stream with an external event before each kernel and one behind the last.
Gives: per kernel the `Launch`es of its kernel nodes (a call of a library may be several), no profiler involved.
Must not change: the graph. Needs `cuda.bindings`, which CUDA builds of torch bring; errors: RuntimeError naming the
driver call and its code.
"""

from __future__ import annotations

from typing import Any

from opara_backend.profiling.occupancy import Launch


def launches_between_events(raw_graph: int, kernels: int) -> list[tuple[Launch, ...]]:
    """Launches of each of the `kernels` kernels in a chain `event, kernel 0, event, kernel 1, ..., event`.

    raw_graph: address of the cudaGraph_t (`torch.cuda.CUDAGraph.raw_cuda_graph()`).
    """
    from cuda.bindings import driver

    found: list[list[Launch]] = [[] for _ in range(kernels)]
    current = -1
    for node in _chain(driver, driver.CUgraph(raw_graph)):
        kind = _checked("cuGraphNodeGetType", driver.cuGraphNodeGetType(node))
        if kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_EVENT_RECORD:
            current += 1
        elif kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL and 0 <= current < kernels:
            found[current].append(_launch(driver, node))
    if current < kernels:
        raise RuntimeError(f"the graph holds {current + 1} events, expected {kernels + 1} or more")
    return [tuple(launches) for launches in found]


def graph_structure(raw_graph: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Nodes that do work (kernels, copies, fills) and the edges between them, as indices into the list of nodes.

    Returns (work, edges): `edges` covers all nodes, so that paths through empty nodes stay visible.
    """
    from cuda.bindings import driver

    nodes, edges = _nodes_and_edges(driver, driver.CUgraph(raw_graph))
    kinds = driver.CUgraphNodeType
    idle = (kinds.CU_GRAPH_NODE_TYPE_EMPTY, kinds.CU_GRAPH_NODE_TYPE_EVENT_RECORD, kinds.CU_GRAPH_NODE_TYPE_WAIT_EVENT)
    work = [i for i, n in enumerate(nodes) if _checked("cuGraphNodeGetType", driver.cuGraphNodeGetType(n)) not in idle]
    return work, edges


def _chain(driver: Any, graph: Any) -> list[Any]:
    """Nodes in an order that respects the edges (for a chain: the order of launch)."""
    nodes, edges = _nodes_and_edges(driver, graph)
    after: dict[int, list[int]] = {}
    waiting = [0] * len(nodes)
    for src, dst in edges:
        after.setdefault(src, []).append(dst)
        waiting[dst] += 1
    ready = [i for i, n in enumerate(waiting) if not n]
    order: list[Any] = []
    while ready:
        index = ready.pop()
        order.append(nodes[index])
        for follower in after.get(index, ()):
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    return order


def _nodes_and_edges(driver: Any, graph: Any) -> tuple[list[Any], list[tuple[int, int]]]:
    _, count = _checked("cuGraphGetNodes", driver.cuGraphGetNodes(graph))
    nodes, _ = _checked("cuGraphGetNodes", driver.cuGraphGetNodes(graph, count))
    index = {int(node): i for i, node in enumerate(nodes)}
    *_, count = _checked("cuGraphGetEdges", driver.cuGraphGetEdges(graph))
    if not count:
        return list(nodes), []
    sources, targets, *_ = _checked("cuGraphGetEdges", driver.cuGraphGetEdges(graph, count))
    return list(nodes), [(index[int(s)], index[int(t)]) for s, t in zip(sources, targets, strict=True)]


def _launch(driver: Any, node: Any) -> Launch:
    params = _checked("cuGraphKernelNodeGetParams", driver.cuGraphKernelNodeGetParams(node))
    function = params.func
    if not int(function):  # launched through a context-independent handle
        function = _checked("cuKernelGetFunction", driver.cuKernelGetFunction(params.kern))
    attribute = driver.CUfunction_attribute
    return Launch(
        grid=(params.gridDimX, params.gridDimY, params.gridDimZ),
        block=(params.blockDimX, params.blockDimY, params.blockDimZ),
        registers=_attribute(driver, attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function),
        static_shared=_attribute(driver, attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function),
        dynamic_shared=params.sharedMemBytes,
    )


def _attribute(driver: Any, attribute: Any, function: Any) -> int:
    return int(_checked("cuFuncGetAttribute", driver.cuFuncGetAttribute(attribute, function)))


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """The result behind the error code; RuntimeError if the code is not 0."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{call} failed: {error}")
    return values[0] if len(values) == 1 else tuple(values)
