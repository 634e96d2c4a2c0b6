"""The roles of the sub-layers inside one block, read from its linear layers, its norms, their sizes and their order.

An attention is the module that holds query, key and value projections; what reads from it is the attention output;
the other linear layers that leave and re-enter the residual width are the feed-forward branch. A norm belongs to the
sub-layer that it shares a module with, otherwise to the sub-layers in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ROLES = (
    "query",
    "key",
    "value",
    "attention_output",
    "attention_norm",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "cross_attention_norm",
    "intermediate",
    "output",
    "output_norm",
)

Linear = tuple[str, int, int]  # path inside the block, inputs, outputs


@dataclass(frozen=True)
class BlockLayout:
    """What one block holds; paths are relative to it. See :class:`spafit.stacks.Stack` for the fields of one name."""

    paths: frozenset[str]
    roles: Mapping[str, tuple[str, ...]]
    attention_module: str | None
    attention_branch: str | None
    cross_branch: str | None
    feed_forward_branch: str | None
    ends_in_norm: bool


def read_layout(block: nn.Module) -> BlockLayout:
    """Read the layout of ``block``; roles that cannot be told are left out."""
    modules = dict(block.named_modules())
    multihead = [p for p, m in modules.items() if type(m).__name__ == "MultiheadAttention"]
    linears = [x for x in iter_linears(block) if not any(is_inside(x[0], m) for m in multihead)]
    width = residual_width(block)
    attentions = _attentions(modules, linears, width)
    own = _Attention.merge([a for a in attentions if not _says_cross(a.module)])
    cross = _Attention.merge([a for a in attentions if _says_cross(a.module)])
    used = {p for p, *_ in linears if any(a.holds(p) for a in attentions)}
    free = [x for x in linears if x[0] not in used]
    outputs = [x for x in free if x[2] == width and x[1] != width] or [x for x in free if x[2] == width][-1:]
    inner = {size for _, size, _ in outputs}
    firsts = [x for x in free if x not in outputs and x[1] == width and any(x[2] % size == 0 for size in inner)]
    feed_forward = [p for p, *_ in outputs] if len(outputs) == 1 else _experts(modules, outputs, used, multihead)

    sublayers = {
        "attention_norm": own.linears or multihead[:1],
        "cross_attention_norm": cross.linears or multihead[1:2],
        "output_norm": [p for p, *_ in (*firsts, *outputs)] or feed_forward,
    }
    norms = _assign_norms(modules, {role: paths for role, paths in sublayers.items() if paths}, width)
    found = {
        **own.projections,
        "attention_output": own.outputs,
        **{f"cross_{role}": paths for role, paths in cross.projections.items()},
        "cross_attention_output": cross.outputs,
        "intermediate": [p for p, *_ in firsts],
        "output": [p for p, *_ in outputs],
        **norms,
    }

    # The modules of OLMo 2 and Llama differ in the norms' names only: its branches end in their norm.
    normed_branches = any(re.search(r"post_(feed_?forward|mlp|ffn)", n) for n in norms.get("output_norm", []))

    def branch(paths: list[str], norm_role: str) -> str | None:
        if len(paths) != 1:
            return None
        own_norms = norms.get(norm_role, [])
        # With a norm before and one after the branch (Gemma 2) the later one's output is what is added.
        return own_norms[-1] if own_norms and (len(own_norms) == 2 or normed_branches) else paths[0]

    attention_branch = branch(own.outputs or multihead[:1], "attention_norm")
    cross_branch = branch(cross.outputs or multihead[1:2], "cross_attention_norm")
    feed_forward_branch = branch(feed_forward, "output_norm")
    scales = [p for p, m in modules.items() if type(m).__name__.endswith("LayerScale")]
    if len(scales) == 2:  # a learnt scale on each branch (DINOv2) is part of what is added
        attention_branch, feed_forward_branch = scales
    return BlockLayout(
        paths=frozenset(modules),
        roles={role: tuple(found[role]) for role in ROLES if found.get(role)},
        attention_module=own.module if own.linears else next(iter(multihead), None),
        attention_branch=attention_branch,
        cross_branch=cross_branch,
        feed_forward_branch=feed_forward_branch,
        ends_in_norm=_ends_in_norm(modules, firsts, outputs, norms.get("output_norm", [])),
    )


# ---------------------------------------------------------------- paths, linear layers, norms


def join_path(*parts: str) -> str:
    """Join dotted paths; empty parts (the root) disappear."""
    return ".".join(p for p in parts if p)


def parent_of(path: str) -> str:
    """Dotted path of the module that holds ``path``."""
    return path.rpartition(".")[0]


def is_inside(path: str, parent: str) -> bool:
    """Whether ``path`` is ``parent`` or lies below it."""
    return not parent or path == parent or path.startswith(parent + ".")


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, of transformers' Conv1D, or of an adapter's wrapper around one."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if type(module).__name__ == "Conv1D":
        inputs, outputs = next(module.parameters()).shape
        return int(inputs), int(outputs)
    if hasattr(module, "base_layer"):
        return linear_size(module.base_layer)  # type: ignore[arg-type]
    return None


def iter_linears(module: nn.Module, prefix: str = "") -> Iterator[Linear]:
    """Linear layers in definition order; what lies inside one (an adapter's low-rank factors) is part of it."""
    size = linear_size(module)
    if size is not None:
        yield prefix, *size
        return
    for name, child in module.named_children():
        yield from iter_linears(child, join_path(prefix, name))


def residual_width(block: nn.Module) -> int:
    """Size of the residual stream: what the query projection reads, else what the first linear layer reads."""
    linears = list(iter_linears(block))
    return next((size for path, size, _ in linears if "query" in _projected(path)), linears[0][1])


def is_norm(module: nn.Module, path: str, width: int) -> bool:
    """Whether a module normalises vectors of ``width``; norms of queries and keys are part of the attention."""
    name = path.rpartition(".")[2]
    if next(module.children(), None) is not None:
        return False
    if re.search(r"(^|_)(q|k|query|key)_?(norm|ln|layer)", name, flags=re.IGNORECASE):
        return False
    if type(module).__name__ == "Identity":
        return bool(re.search(r"norm|(^|_)ln(_|$)", name, flags=re.IGNORECASE))
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and tuple(weight.shape) == (width,)


def _projected(path: str) -> set[str]:
    """Roles among query, key, value that a linear layer computes, read from the last part of its path."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path.rpartition(".")[2]).lower()
    tokens = set(re.split(r"[^a-z]+", words))
    if tokens & {"pos", "rel", "norm"}:
        return set()
    if tokens & {"qkv", "wqkv"} or {"query", "key", "value"} <= tokens or {"in", "proj"} == tokens:
        return {"query", "key", "value"}
    if tokens & {"kv", "wkv"}:
        return {"key", "value"}
    return {role for role in ("query", "key", "value") if tokens & {role, role[0], f"w{role[0]}"}}


def _says_cross(path: str) -> bool:
    return bool(re.search(r"cross|enc(oder)?_?(dec)?_?att", path, flags=re.IGNORECASE))


# ---------------------------------------------------------------- attention


@dataclass
class _Attention:
    module: str = ""
    projections: dict[str, list[str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def linears(self) -> list[str]:
        return list(dict.fromkeys([*(p for paths in self.projections.values() for p in paths), *self.outputs]))

    def holds(self, path: str) -> bool:
        """One of its linear layers, or one inside its module, such as a relative-position projection or a gate."""
        return path in self.linears or (self.module != "" and is_inside(path, self.module))

    @classmethod
    def merge(cls, attentions: list[_Attention]) -> _Attention:
        merged = cls(attentions[0].module if attentions else "")
        for attention in attentions:
            for role, paths in attention.projections.items():
                merged.projections.setdefault(role, []).extend(paths)
            merged.outputs += attention.outputs
        return merged


def _attentions(modules: Mapping[str, nn.Module], linears: list[Linear], width: int) -> list[_Attention]:
    """Attentions in definition order; each is the nearest module of projections that include a value."""
    groups: dict[str, dict[str, set[str]]] = {}
    for path, inputs, outputs in linears:
        owner = groups.setdefault(parent_of(path), {})
        owner[path] = _projected(path)
        # A fused projection with a name of its own (c_attn in GPT-2): the first linear layer of a module whose class
        # calls itself attention, with more outputs than inputs.
        attention_class = re.search("att(entio)?n", type(modules[parent_of(path)]).__name__, flags=re.IGNORECASE)
        if attention_class and len(owner) == 1 and not owner[path] and inputs == width and outputs > inputs:
            owner[path] = {"query", "key", "value"}
    attentions = []
    taken = {path for owner in groups.values() for path, roles in owner.items() if roles}
    for module, owner in groups.items():
        separate_query = any(roles == {"query"} for roles in owner.values())
        projections: dict[str, list[str]] = {}
        for path, roles in owner.items():
            if separate_query and len(roles) == 3:  # GPT-2's cross-attention: q_attn, and c_attn for key and value
                roles = {"key", "value"}
            for role in roles:
                projections.setdefault(role, []).append(path)
        if "value" in projections:
            attention = _Attention(module, {r: projections[r] for r in ("query", "key", "value") if r in projections})
            attention.outputs = _attention_output(attention, linears, taken, width)
            taken |= set(attention.outputs)
            attentions.append(attention)
    return attentions


def _attention_output(attention: _Attention, linears: list[Linear], taken: set[str], width: int) -> list[str]:
    """The projection that reads from the heads: nearest above the attention, written to the residual width."""
    order = [path for path, *_ in linears]
    last = max(order.index(p) for p in attention.linears)
    place = attention.module
    while True:
        near = [p for p, _, outputs in linears if outputs == width and is_inside(p, place) and p not in taken]
        later = [p for p in near if order.index(p) > last]
        if later or (near and place):
            return (later or near)[:1]
        if not place:
            return []
        place = parent_of(place)


# ---------------------------------------------------------------- norms and the feed-forward branch


def _assign_norms(
    modules: Mapping[str, nn.Module], sublayers: dict[str, list[str]], width: int
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    left = []
    for norm in (p for p, m in modules.items() if is_norm(m, p, width)):
        place, owners = parent_of(norm), list[str]()
        while place and not owners:
            owners = [role for role, paths in sublayers.items() if any(is_inside(p, place) for p in paths)]
            place = parent_of(place)
        if not owners or len(owners) > 1:
            owners = ["cross_attention_norm"] if "cross_attention_norm" in sublayers and _says_cross(norm) else []
        if owners:
            found.setdefault(owners[0], []).append(norm)
        else:
            left.append(norm)
    missing = [role for role in sublayers if role not in found]
    # As many norms as sub-layers without one: in order. Twice as many, one before and one after each: in pairs.
    # Fewer, as with parallel branches behind one norm: the first sub-layer's.
    share = max(len(left) // max(len(missing), 1), 1)
    for i, norm in enumerate(left if missing else []):
        found.setdefault(missing[min(i // share, len(missing) - 1)], []).append(norm)
    return found


def _experts(
    modules: Mapping[str, nn.Module], outputs: list[Linear], used: set[str], multihead: list[str]
) -> list[str]:
    """A mixture of experts: the child that holds all their outputs, or the one left whose weights are matrices."""
    children = [p for p in modules if p and "." not in p]
    if outputs:
        return [c for c in children if all(is_inside(p, c) for p, *_ in outputs)]
    free = [c for c in children if not any(is_inside(p, c) for p in (*used, *multihead))]
    return [c for c in free if any(p.dim() > 1 for p in modules[c].parameters())]


def _ends_in_norm(
    modules: Mapping[str, nn.Module], firsts: list[Linear], outputs: list[Linear], norms: list[str]
) -> bool:
    """BERT's shape: a norm defined right beside and after the last linear layer, apart from the branch's first one.

    Such blocks normalise the residual stream itself, and a norm beside their stack (DeBERTa-v2's, for its relative
    positions) is not a final norm. Where the shape says nothing, False.
    """
    if len(outputs) != 1:
        return False
    order, path = list(modules), outputs[0][0]
    place = parent_of(path)
    return bool(place) and any(
        parent_of(n) == place
        and order.index(n) > order.index(path)
        and not any(is_inside(p, place) for p, *_ in firsts)
        for n in norms
    )
