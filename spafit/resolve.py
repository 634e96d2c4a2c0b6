"""A plan laid over a real model: which modules it names and which parameters train. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spafit.errors import ConfigError
from spafit.layout import is_inside, join_path, parent_of
from spafit.stacks import Stack, find_stacks
from spafit.stratum import LINEAR_ROLES, NORM_ROLES, PLACES, Stratum

if TYPE_CHECKING:
    from torch import nn

    from spafit.strata import StrataConfig


@dataclass(frozen=True)
class Part:
    """One stratum, or one place outside the blocks, on a real model.

    Attributes:
        name: ``encoder [0, 3)``; ``decoder [0, 3) cross`` for cross-attention with a method of its own; or the place:
            ``embeddings``, ``pooler``, ``head``, ``final_norm``, ``projector``.
        method: how it trains.
        stratum: the plan's stratum, or the piece of it that speaks of cross-attention; None outside the blocks.
        modules: full dotted names of the modules that the method touches, in the model's order.
        saved: those of them that train whole and are kept in the adapter (norms, blocks, heads).
        targets: those of them that get a PEFT layer.
        added: those of the targets that get a new bias.
        bias_only: those of ``added`` that get no low-rank update beside it.
        biases: names of the bias parameters that train in place.
        own: names of all of the part's parameters, trained or not.
        learning_rate: of this part, or None for the run's.
        weight_decay: of this part, or None for the run's.
    """

    name: str
    method: str
    stratum: Stratum | None
    modules: tuple[str, ...]
    saved: tuple[str, ...]
    targets: tuple[str, ...]
    biases: tuple[str, ...]
    own: tuple[str, ...]
    learning_rate: float | None = None
    weight_decay: float | None = None
    added: tuple[str, ...] = ()
    bias_only: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResolvedPlan:
    """A whole plan on a real model.

    Attributes:
        config: the plan.
        stacks: the model's stacks.
        parts: strata in the order of stacks and blocks, then the places outside that the model has.
        tied: parameters that the model uses under a second name, by that name.
        notes: what a reader must know, such as a parameter that cannot be kept in an adapter.
    """

    config: StrataConfig
    stacks: tuple[Stack, ...]
    parts: tuple[Part, ...]
    tied: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def everything_trains(self) -> bool:
        """Whether no parameter is frozen, so that there is no adapter to speak of."""
        return all(p.method == "full" for p in self.parts)

    def first_trained_block(self, stack: str) -> int:
        """Lowest block of a stack that gradients pass through; the number of blocks where none do.

        That is the first one in which anything trains; 0 where the embeddings train, and in a decoder whose encoder
        trains, since its lowest block reads the encoder's states.
        """
        own = next(s for s in self.stacks if s.name == stack)
        count = own.num_blocks
        others = [s.name for s in self.stacks if s.name != stack and s.cross_branch is None]
        if own.cross_branch is not None and any(
            p.stratum is not None and p.stratum.stack in others and p.method != "freeze" for p in self.parts
        ):
            return 0
        if self.config.outside.embeddings != "freeze" and any(p.name == "embeddings" and p.own for p in self.parts):
            return 0
        starts = [p.stratum.blocks[0] for p in self.parts if p.stratum is not None and p.stratum.stack == stack
                  and p.method != "freeze"]  # fmt: skip
        return min(starts, default=count)


def resolve(model: nn.Module, config: StrataConfig, *, stacks: tuple[Stack, ...] | None = None) -> ResolvedPlan:
    """Lay a plan over a model; the model may be on the meta device.

    Roles become full dotted names. Outside the blocks, ``head`` is what stands outside the backbone (transformers'
    ``base_model``) or, on a bare backbone, what comes after its stack; ``pooler`` and ``final_norm`` are found by
    structure; ``embeddings`` is the rest. A parameter that two places share (tied embeddings) belongs to the
    embeddings.

    Raises:
        ConfigError: the plan does not fit the model (stacks, depth, roles, biases), names a role that the model does
            not have, gives virtual blocks of one shared module different strata, or would train nothing.
        ModelError: the model has no stack.
    """
    stacks = find_stacks(model) if stacks is None else stacks
    config.check_model(
        {s.name: s.num_blocks for s in stacks},
        bias_roles={s.name: s.bias_roles if s.bias_roles or not s.has_biases else ("block",) for s in stacks},
    )
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    first_names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    tied = {name: first_names[id(p)] for name, p in parameters.items() if first_names[id(p)] != name}
    names = [n for n in parameters if n not in tied]
    notes: list[str] = []
    parts = [
        _stratum_part(model, config, stack, stratum, piece, names, notes)
        for stack in stacks
        for stratum in sorted((s for s in config.strata if s.stack == stack.name), key=lambda s: s.blocks)
        for piece in stratum.pieces
    ]
    for stack in stacks:
        _check_shared(stack, config)
    parts += _outside_parts(model, stacks, config, names, notes)
    plan = ResolvedPlan(config, stacks, tuple(parts), tied, tuple(notes))
    for part in plan.parts:
        if part.stratum is not None and part.method != "freeze" and not (part.saved or part.targets or part.biases):
            raise _located(config, part.stratum, f"method {part.method!r} would train nothing here. Write freeze.")
    if not any(p.saved or p.targets or p.biases for p in plan.parts):
        raise ConfigError(
            "This plan trains nothing: every stratum is frozen and so is what the model has outside its blocks. "
            "Set outside.head to full, or give a stratum a method."
        )
    return plan


def _stratum_part(
    model: nn.Module,
    config: StrataConfig,
    stack: Stack,
    whole: Stratum,
    stratum: Stratum,
    names: list[str],
    notes: list[str],
) -> Part:
    """One piece of the stratum ``whole``: all of its blocks, or their cross-attention, or what is left without it."""
    start, stop = stratum.blocks
    blocks = list(dict.fromkeys(stack.block_paths[start:stop]))
    own = tuple(n for n in names if any(is_inside(n, b) for b in blocks))
    method, targets, saved, biases = stratum.method, [], [], []
    crossed: list[bool] = [False, True] if whole.cross is None else [stratum is not whole]
    if whole.cross is not None:
        cross = _cross_attention(model, stack, whole, names)
        own = tuple(n for n in own if (n in cross) == crossed[0])

    def of_roles(roles: Iterable[str], *, field: str) -> list[str]:
        found: dict[str, None] = {}
        for role in roles:
            paths = [p for b in range(start, stop) for p in stack.role_paths(role, b)]
            if not paths:
                raise ConfigError(
                    f"{field} of stratum {stack.name} [{start}, {stop}): the blocks of {type(model).__name__} have no "
                    f"{role!r}. Roles there: {', '.join(stack.roles) or 'none'}."
                )
            found.update(dict.fromkeys(paths))
        return list(found)

    if stratum.lora is not None:
        targets = of_roles(stratum.lora.targets, field="lora.targets")
    elif stratum.ia3 is not None:
        targets = of_roles(stratum.ia3, field="ia3")
    elif stratum.peft is not None:
        targets = of_roles(stratum.peft.targets, field="peft.targets")
    added: list[str] = []
    bias_only: list[str] = []
    if stratum.adds_biases:
        roles = stratum.bias_added or [
            r for r in LINEAR_ROLES if r in stack.roles and r.startswith("cross_") in crossed
        ]
        added = of_roles(roles, field="bias_added")
        bias_only = [t for t in added if t not in targets]
        targets = [*targets, *bias_only]
    if "norm" in method:
        norms = [r for r in NORM_ROLES if r in stack.roles and r.startswith("cross_") in crossed]
        saved = [n for n in of_roles(norms, field="norm") if any(True for _ in model.get_submodule(n).parameters())]
    elif method == "full":
        saved = blocks if whole.cross is None else whole_modules(model, own)
        if bare := [n for n in own if not any(is_inside(n, m) for m in saved)]:
            raise _located(
                config, whole,
                f"{bare[0]} is no module of its own, so it cannot train beside cross-attention with another method. "
                "Remove 'cross'.",
            )  # fmt: skip
    if "bitfit" in method:
        own_biases = [n for n in own if n.endswith(".bias")]
        if stratum.bitfit is None:
            biases = own_biases
        else:
            chosen = {join_path(p, "bias") for p in of_roles(stratum.bitfit, field="bitfit")}
            biases = [n for n in own_biases if n in chosen]
    fused = [t for t in targets if sum(t in stack.role_paths(r, start) for r in LINEAR_ROLES) > 1]
    if fused:
        notes.append(
            f"{stack.name} [{start}, {stop}): query, key and value are one fused matrix ({fused[0]}), which gets one "
            "update for all three"
        )
    return Part(
        f"{stack.name} [{start}, {stop})" + (" cross" if stratum is not whole else ""),
        method,
        stratum,
        tuple(dict.fromkeys([*targets, *saved, *(parent_of(b) for b in biases)])),
        tuple(saved),
        tuple(targets),
        tuple(biases),
        own,
        stratum.learning_rate,
        stratum.weight_decay,
        tuple(added),
        tuple(bias_only),
    )


def _cross_attention(model: nn.Module, stack: Stack, stratum: Stratum, names: list[str]) -> set[str]:
    """Names of all parameters of the cross-attention of a stratum's blocks."""
    found = set()
    for block in range(*stratum.blocks):
        paths = [p for role in stack.roles if role.startswith("cross_") for p in stack.role_paths(role, block)]
        paths += [parent_of(p) for p in stack.role_paths("cross_query", block)]
        found |= {n for n in names if any(is_inside(n, p) for p in paths)}
    if not found:
        raise ConfigError(
            f"cross of stratum {stack.name} [{stratum.blocks[0]}, {stratum.blocks[1]}): the blocks of "
            f"{type(model).__name__} have no cross-attention that was recognised. Remove 'cross'."
        )
    return found


def _check_shared(stack: Stack, config: StrataConfig) -> None:
    """Virtual blocks that are one module cannot be treated differently."""
    if not stack.shared:
        return
    owner: dict[str, Stratum] = {}
    for stratum in (s for s in config.strata if s.stack == stack.name):
        for path in stack.block_paths[slice(*stratum.blocks)]:
            if owner.setdefault(path, stratum) is not stratum:
                raise _located(
                    config,
                    stratum,
                    f"blocks of stack {stack.name!r} are one shared module ({path}), so they cannot be trained in "
                    f"different ways. Write one stratum [0, {stack.num_blocks}).",
                )


def _located(config: StrataConfig, stratum: Stratum, sentence: str) -> ConfigError:
    from spafit.fields import FieldError

    at = next(i for i, s in enumerate(config.strata) if (s.stack, s.blocks) == (stratum.stack, stratum.blocks))
    error = FieldError(("strata", at, "method"), sentence)
    return config.origin.locate(error) if config.origin else error


# ---------------------------------------------------------------- outside the blocks


def _outside_parts(
    model: nn.Module, stacks: tuple[Stack, ...], config: StrataConfig, names: list[str], notes: list[str]
) -> list[Part]:
    places: dict[str, list[str]] = {place: [] for place in PLACES}
    for name in names:
        if not any(is_inside(name, s.path) for s in stacks):
            places[_place(model, stacks, name)].append(name)
    parts = []
    for place, own in places.items():
        method = getattr(config.outside, place)
        if not own:
            continue
        saved, biases = [], []
        if method == "full":
            saved = whole_modules(model, own)
            bare = [n for n in own if not any(is_inside(n, m) for m in saved)]
            if bare and not _all_full(config):
                notes.append(f"{place}: {', '.join(bare)} cannot be kept in an adapter and stays frozen")
        elif method == "norm":
            saved = [m for m in dict.fromkeys(parent_of(n) for n in own) if _is_norm(model.get_submodule(m))]
        elif method == "bitfit":
            biases = [n for n in own if n.endswith(".bias")]
        parts.append(
            Part(
                place,
                method,
                None,
                tuple(dict.fromkeys([*saved, *(parent_of(b) for b in biases)])),
                tuple(saved),
                (),
                tuple(biases),
                tuple(own),
                config.outside.learning_rate,
                config.outside.weight_decay,
            )
        )
    return parts


def _all_full(config: StrataConfig) -> bool:
    return all(p.method == "full" for s in config.strata for p in s.pieces) and all(
        getattr(config.outside, p) == "full" for p in PLACES
    )


def _place(model: nn.Module, stacks: tuple[Stack, ...], name: str) -> str:
    """Where a parameter outside the blocks belongs."""
    if any(s.final_norm is not None and is_inside(name, s.final_norm) for s in stacks):
        return "final_norm"
    backbone: Any = getattr(model, "base_model", model)
    prefix = str(getattr(model, "base_model_prefix", ""))
    if _in_head_of_half(model, name):
        return "head"
    if _leads_between_stacks(model, stacks, name):
        return "projector"
    if backbone is not model and prefix:
        if not is_inside(name, prefix):
            return "head"
    elif _after_every_stack(model, stacks, name) and type(model.get_submodule(parent_of(name))).__name__ != "Embedding":
        return (
            "pooler" if "pool" in name else "embeddings" if _is_norm(model.get_submodule(parent_of(name))) else "head"
        )
    return "pooler" if any("pool" in part for part in name.split(".")[:-1]) else "embeddings"


def _in_head_of_half(model: nn.Module, name: str) -> bool:
    """Whether a parameter is in the head of a whole model inside this one: an EncoderDecoderModel's decoder."""
    half, _, inner = name.partition(".")
    prefix = str(getattr(getattr(model, half, None), "base_model_prefix", ""))
    return bool(inner and prefix) and hasattr(getattr(model, half), prefix) and not is_inside(inner, prefix)


def _leads_between_stacks(model: nn.Module, stacks: tuple[Stack, ...], name: str) -> bool:
    """Whether a parameter stands beside the modules that hold a stack each, and is no table that they share.

    On a bare backbone without cross-attention, what comes after all stacks leads out of them: CLIP's projections.
    """
    from torch import nn

    common = stacks[0].path
    while not all(is_inside(s.path, common) for s in stacks):
        common = parent_of(common)
    if len(stacks) < 2 or not is_inside(name, common):
        return False
    first, _, rest = name.removeprefix(f"{common}." if common else "").partition(".")
    if rest and any(is_inside(s.path, join_path(common, first)) for s in stacks):
        return False
    if isinstance(model.get_submodule(parent_of(name)), nn.Embedding):
        return False
    crossed = any(s.cross_branch is not None for s in stacks)
    return bool(common) or crossed or not _after_every_stack(model, stacks, name)


def _after_every_stack(model: nn.Module, stacks: tuple[Stack, ...], name: str) -> bool:
    """Whether a parameter is defined after all stacks, on a level that no stack is inside of."""
    top = name.partition(".")[0]
    order = [n for n, _ in model.named_children()]
    if top not in order:  # a parameter of the model itself: CLIP's temperature
        return True
    return all(order.index(top) > order.index(s.path.partition(".")[0]) for s in stacks)


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower()


def whole_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The outermost modules all of whose parameters are in ``names``; parameters of the model itself have none."""
    wanted = set(names)
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(is_inside(path, f) for f in found):
            continue
        own = [join_path(path, n) for n, _ in module.named_parameters()]
        if own and wanted.issuperset(own):
            found.append(path)
    return found
