"""A graph of kernels as text for Graphviz or Mermaid: kernels are boxes, streams are clusters, waits are thick.

Takes: a GraphReport. Gives: text. Must not change: the report.
"""

from __future__ import annotations

from opara_backend.report.model import GraphReport, ShapeReport


def dot(graph: GraphReport) -> str:
    """Graphviz, of the first shape: critical kernels are red, edges that need a wait bold; streams keep the rest."""
    if not graph.shapes:
        return "digraph opara {\n}\n"
    one = graph.shapes[0]
    lines = ["digraph opara {", "  rankdir=TB;", '  node [shape=box, fontname="sans-serif", fontsize=10];']
    for stream, members in _streams(one):
        lines += [f"  subgraph cluster_{stream} {{", f'    label="stream {stream}";', '    color="#888888";']
        for index in members:
            colour = ', color="#c0392b", penwidth=2' if one.kernels[index].critical else ""
            lines.append(f"    k{index} [label={_quoted(_label(one, index))}{colour}];")
        lines.append("  }")
    for (before, after), (why, waited) in _edges(graph, one).items():
        style = ", penwidth=2" if waited else ", color=gray"
        lines.append(f"  k{before} -> k{after} [tooltip={_quoted(why)}{style}];")
    return "\n".join([*lines, "}", ""])


def mermaid(graph: GraphReport) -> str:
    """Mermaid, of the first shape: critical kernels are of class `critical`, edges that need a wait are thick."""
    lines = ["flowchart TB"]
    if graph.shapes:
        one = graph.shapes[0]
        for stream, members in _streams(one):
            lines.append(f'  subgraph s{stream}["stream {stream}"]')
            lines += [f'    k{index}["{_escaped(_label(one, index))}"]' for index in members]
            lines.append("  end")
        for (before, after), (_, waited) in _edges(graph, one).items():
            lines.append(f"  k{before} {'==>' if waited else '-->'} k{after}")
        if one.critical:
            lines.append("  classDef critical stroke:#c0392b,stroke-width:3px")
            lines.append(f"  class {','.join(f'k{index}' for index in one.critical)} critical")
    return "\n".join([*lines, ""])


def _streams(shape: ShapeReport) -> list[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for index in sorted(range(len(shape.kernels)), key=lambda k: shape.kernels[k].position):
        found.setdefault(shape.kernels[index].stream, []).append(index)
    return sorted(found.items())


def _edges(graph: GraphReport, shape: ShapeReport) -> dict[tuple[int, int], tuple[str, bool]]:
    """Per pair of kernels: the conflicts between them, and whether one waits for the other."""
    waits = {(wait.awaited, wait.kernel) for wait in shape.waits}
    why: dict[tuple[int, int], list[str]] = {}
    for before, after, kind, buffer in graph.edges:
        why.setdefault((before, after), []).append(f"{kind} {buffer}")
    for pair in sorted(waits - set(why)):
        why[pair] = ["ORDER"]
    return {pair: (", ".join(found), pair in waits) for pair, found in sorted(why.items())}


def _label(shape: ShapeReport, index: int) -> str:
    row = shape.kernels[index]
    return f"{index} {row.label}\n{row.seconds * 1e6:.1f} us"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _escaped(text: str) -> str:
    for plain, code in (("&", "&amp;"), ('"', "#quot;"), ("<", "&lt;"), (">", "&gt;"), ("\n", "<br/>")):
        text = text.replace(plain, code)
    return text
