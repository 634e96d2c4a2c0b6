"""Find a model's block stacks and the role of each sub-layer, by structure rather than by architecture names.

A *stack* is the outermost list of at least two children of one class, each with parameters, linear layers and more
than four sub-modules. Inside a block, an attention is the smallest module that holds query, key and value
projections; what reads from it is the attention output; the remaining linear layers are the feed-forward branch.

Fused projections (GPT-2's ``c_attn``, ModernBERT's ``Wqkv``) are listed under every role that they compute: the same
path stands under ``query``, ``key`` and ``value``. ``torch.nn.MultiheadAttention`` holds its projections as bare
parameters and never calls its output projection as a module, so only its branch is offered, no roles inside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spafit.errors import ModelError, did_you_mean
from spafit.layout import (
    ROLES,
    BlockLayout,
    is_inside,
    is_norm,
    iter_linears,
    join_path,
    parent_of,
    read_layout,
    residual_width,
)

if TYPE_CHECKING:
    from torch import nn

# Text towers whose attention modules say is_causal=False although the mask passed at call time is causal.
_CAUSAL_BY_MASK = ("clip_text_model", "clipseg_text_model", "xclip_text_model")


@dataclass(frozen=True)
class Stack:
    """One stack of blocks, named by dotted paths into the model that it was found in.

    ``roles`` maps a role of :data:`ROLES` to sub-paths inside a block (``""`` is the block itself) that hold in every
    block; a sub-layer that only some blocks have is not listed, and in one block a listed norm may be an identity
    (ModernBERT's first). ``attention_branch``, ``cross_branch`` and ``feed_forward_branch`` are the sub-paths whose
    output (first element of a tuple) is added to the residual stream; in eval mode, where dropout is the identity. In
    a shared stack (ALBERT) ``block_paths`` repeats one path, and a hook there fires once per virtual block.

    Attributes:
        name: "encoder", "decoder", "vision" or "text"; made unique where a model has two of one kind.
        path: dotted path of the list of blocks.
        block_paths: dotted path of every block, in running order.
        roles: role -> sub-paths inside a block.
        width: size of the residual stream.
        num_heads: attention heads per block; the input of ``attention_output`` holds them side by side,
            ``(..., num_heads * head_size)``. None where the model does not say.
        final_norm: dotted path of the norm applied after the last block, or None. In CLIP's vision tower it is called
            on the pooled patch only: apply the module to the last block's output rather than hooking it.
        causal: a position sees only itself and earlier ones.
        pre_norm: the residual stream itself is not normalised inside the blocks.
        attention_branch: see above; None where no attention was recognised.
        cross_branch: the same for cross-attention.
        feed_forward_branch: see above; None where no feed-forward branch was recognised.
        bias_roles: roles with a bias parameter in at least one block.
        has_biases: any block has any bias parameter.
    """

    name: str
    path: str
    block_paths: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    width: int
    num_heads: int | None
    final_norm: str | None
    causal: bool
    pre_norm: bool
    attention_branch: str | None
    cross_branch: str | None
    feed_forward_branch: str | None
    bias_roles: tuple[str, ...]
    has_biases: bool

    @property
    def num_blocks(self) -> int:
        """Number of blocks that run, virtual ones included."""
        return len(self.block_paths)

    @property
    def shared(self) -> bool:
        """Whether several (virtual) blocks are one module."""
        return len(set(self.block_paths)) < self.num_blocks

    def role_paths(self, role: str, block: int) -> tuple[str, ...]:
        """Full dotted paths of a role's modules in one block; empty where the stack has no such role."""
        return tuple(join_path(self.block_paths[block], sub) for sub in self.roles.get(role, ()))


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Return the model's stacks in the order in which the model defines them.

    Args:
        model: any module; a configuration in ``model.config`` is read for shared blocks (ALBERT) only.

    Raises:
        ModelError: there is no stack, or the outermost lists hold stages of changing width (Swin, ConvNeXt).
    """
    minimum = 2
    config = getattr(model, "config", None)
    if 1 in (getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)):
        minimum = 1
    lists = list(_outermost_lists(model, minimum))
    if not lists:
        raise ModelError(
            f"No stack of blocks in {type(model).__name__}: a list of at least two blocks of one class, each with "
            "linear layers, was looked for. Name the list of blocks, for example stack='encoder.layers'."
        )
    stacks = [_describe(model, path, name=None) for path in lists]
    return tuple(_with_names(model, stacks))


def stack_at(model: nn.Module, path: str, *, name: str | None = None) -> Stack:
    """Describe the stack at a path that the user names, for a model whose structure the finder does not recognise.

    Args:
        model: any module.
        path: dotted path of a ``ModuleList`` or ``Sequential`` (``""`` when the model itself is the list).
        name: what to call it; by default as :func:`find_stacks` would.

    Raises:
        ModelError: nothing is at ``path``, it is not a list of modules, or its blocks differ in width.
    """
    from torch import nn

    modules = dict(model.named_modules())
    if path not in modules:
        lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential)]
        raise ModelError(
            f"{type(model).__name__} has no module {path!r}.{did_you_mean(path, modules)} "
            f"Its lists of modules: {', '.join(map(repr, lists[:8])) or 'none'}."
        )
    module = modules[path]
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        raise ModelError(
            f"{path!r} is a {type(module).__name__}, not a filled ModuleList or Sequential of blocks. "
            "Name the list that holds the blocks."
        )
    stack = _describe(model, path, name=name)
    return _with_names(model, [stack])[0] if name is None else stack


def _is_block(module: nn.Module) -> bool:
    return len(list(module.modules())) - 1 > 4 and next(iter_linears(module), None) is not None


def _outermost_lists(module: nn.Module, minimum: int, prefix: str = "") -> Iterator[str]:
    from torch import nn

    if isinstance(module, nn.ModuleList | nn.Sequential):
        children = list(module.children())
        same = len({type(c) for c in children}) == 1
        if len(children) >= minimum and same and all(_is_block(c) for c in children):
            yield prefix
            return
    for name, child in module.named_children():
        yield from _outermost_lists(child, minimum, join_path(prefix, name))


def _block_paths(model: nn.Module, path: str) -> tuple[str, ...]:
    names = [join_path(path, name) for name, _ in model.get_submodule(path).named_children()]
    config = getattr(model, "config", None)
    layers, groups = getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)
    if groups == len(names) and isinstance(layers, int) and layers > groups:
        # Shared blocks: layer i runs group int(i / (layers / groups)), with the model's own rounding.
        return tuple(names[int(i / (layers / groups))] for i in range(layers))
    return tuple(names)


def _describe(model: nn.Module, path: str, *, name: str | None) -> Stack:
    from torch import nn

    block_paths = _block_paths(model, path)
    blocks = [model.get_submodule(p) for p in dict.fromkeys(block_paths)]
    if any(not isinstance(b, nn.Module) or next(iter_linears(b), None) is None for b in blocks):
        raise ModelError(f"{path!r} holds modules without a linear layer, so not blocks. Name the list of blocks.")
    widths = [residual_width(b) for b in blocks]
    if len(set(widths)) > 1 or isinstance(blocks[0], nn.ModuleList):
        raise ModelError(
            f"{path!r} of {type(model).__name__} holds stages (of width {', '.join(map(str, widths))}), not blocks "
            "of one width, so its depth is not one axis. Name one stage's own list of blocks with stack='…'."
        )
    layouts = [read_layout(b) for b in blocks]
    roles = {}
    for role in ROLES:
        found = [p for p in layouts[-1].roles.get(role, ()) if all(p in layout.paths for layout in layouts)]
        if found:
            roles[role] = tuple(found)
    attention, cross, feed_forward = (
        branch if branch is not None and all(branch in layout.paths for layout in layouts) else None
        for branch in (layouts[-1].attention_branch, layouts[-1].cross_branch, layouts[-1].feed_forward_branch)
    )
    final_norm = None if layouts[-1].ends_in_norm else _final_norm(model, path, widths[0])
    pre_norm = _norm_first(blocks[-1])
    if pre_norm is None:
        # BART and mBART have the same modules in a block and differ in order only; a stack whose residual stream
        # stays unnormalised needs a norm after its last block, the other kind has none.
        pre_norm = final_norm is not None
    heads, causal = _heads_and_causality(model, blocks[-1], layouts[-1])
    bias_roles = tuple(
        role
        for role, subs in roles.items()
        if any(getattr(b.get_submodule(s), "bias", None) is not None for b in blocks for s in subs)
    )
    return Stack(
        name=name or "",
        path=path,
        block_paths=block_paths,
        roles=roles,
        width=widths[0],
        num_heads=heads,
        final_norm=final_norm,
        causal=causal,
        pre_norm=pre_norm,
        attention_branch=attention,
        cross_branch=cross,
        feed_forward_branch=feed_forward,
        bias_roles=bias_roles,
        has_biases=any(n.endswith("bias") for b in blocks for n, _ in b.named_parameters()),
    )


def _norm_first(block: nn.Module) -> bool | None:
    for name in ("norm_first", "normalize_before", "do_layer_norm_before", "pre_norm"):
        value = getattr(block, name, None)
        if isinstance(value, bool):
            return value
    return None


def _final_norm(model: nn.Module, path: str, width: int) -> str | None:
    """The norm beside the stack, or beside a module that holds it: defined after it, or called final (OPT)."""
    place = path
    while place:
        parent = parent_of(place)
        children = list(model.get_submodule(parent).named_children())
        here = [n for n, _ in children].index(place.rpartition(".")[2])
        for i, (name, child) in enumerate(children):
            other = re.search(r"emb|pre_|pooler", name, flags=re.IGNORECASE)
            wanted = "final" in name or (i > here and not other)
            if wanted and is_norm(child, name, width) and type(child).__name__ != "Identity":
                return join_path(parent, name)
        place = parent
    return None


def _heads_and_causality(model: nn.Module, block: nn.Module, layout: BlockLayout) -> tuple[int | None, bool]:
    names = ("num_attention_heads", "num_heads", "n_heads", "n_head")
    if layout.attention_module is None:
        return None, False
    # The sizes may stand on the attention itself, on a module around it, or in the configuration that either holds.
    places = [block.get_submodule(layout.attention_module)]
    place = layout.attention_module
    while place:
        place = parent_of(place)
        places.append(block.get_submodule(place))
    configs = [c for c in (getattr(p, "config", None) for p in (*places, model)) if c is not None]
    values = [getattr(p, n, None) for p in (*places, *configs) for n in names]
    heads = next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
    causal = any(getattr(p, flag, None) is True for p in places for flag in ("is_causal", "is_decoder"))
    causal |= any(getattr(c, "model_type", None) in _CAUSAL_BY_MASK for c in configs[:-1] or configs)
    return heads, causal


def _with_names(model: nn.Module, stacks: list[Stack]) -> list[Stack]:
    def owner(stack: Stack) -> str:
        others = [s.path for s in stacks if s is not stack]
        place = stack.path
        while place and not any(is_inside(o, parent_of(place)) for o in others):
            place = parent_of(place)
        return place

    def sees_images(stack: Stack) -> bool:
        top = owner(stack)
        return any(
            type(module).__name__ in ("Conv2d", "Conv3d") and not is_inside(join_path(top, name), stack.path)
            for name, module in model.get_submodule(top).named_modules()
        )

    crossed = [s.cross_branch is not None for s in stacks]
    names = []
    for stack, cross in zip(stacks, crossed, strict=True):
        if cross:
            names.append("decoder")
        elif any(crossed):
            names.append("encoder")
        elif sees_images(stack):
            names.append("vision")
        elif len(stacks) > 1:
            names.append("text")
        else:
            names.append("decoder" if stack.causal else "encoder")
    return [
        replace(s, name=n if names.count(n) == 1 else f"{n}_{owner(s).partition('.')[0] or i}")
        for i, (s, n) in enumerate(zip(stacks, names, strict=True))
    ]
