"""Run a model's backbone over one batch and read its hidden states through hooks on the blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spafit.errors import ModelError, UsageError, did_you_mean
from spafit.layout import is_inside, join_path, linear_size, parent_of
from spafit.runtime import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from probing.batching import Batch
    from spafit.models import LoadedModel
    from spafit.stacks import Stack

SITES = ("block", "attention", "feed_forward", "heads", "final_norm")

#: Called with (site, hidden index, states of shape (rows, tokens, width)) while the model runs.
Receiver = Callable[[str, int, "torch.Tensor"], None]


@dataclass(frozen=True)
class SiteStates:
    """The states that one site offers: hidden indices, ascending, and their width."""

    site: str
    hidden: tuple[int, ...]
    width: int


def pick_stack(loaded: LoadedModel, name: str | None) -> Stack:
    """The stack named (by name or path), or the first.

    Raises:
        UsageError: no stack has that name.
        ModelError: the stack cannot be run on texts alone.
    """
    stack = loaded.stacks[0]
    if name is not None:
        named = [s for s in loaded.stacks if name in (s.name, s.path)]
        if not named:
            names = [s.name for s in loaded.stacks]
            raise UsageError(
                f"{loaded.name} has no stack {name!r}, only {', '.join(names)}.{did_you_mean(name, names)}"
            )
        stack = named[0]
    return stack


def pick_stacks(loaded: LoadedModel, names: str | None) -> tuple[Stack, ...]:
    """The stacks named, by commas, in the order given; the first where none is named. See :func:`pick_stack`."""
    if names is None:
        return (pick_stack(loaded, None),)
    found = tuple(pick_stack(loaded, name.strip()) for name in names.split(","))
    if len({s.path for s in found}) < len(found):
        raise UsageError(f"--stack {names!r} names one stack twice; name each once.")
    if len({takes_images(loaded, s) for s in found}) > 1:
        raise UsageError(f"--stack {names!r} names stacks of texts and of images, which need runs of their own.")
    return found


def takes_images(loaded: LoadedModel, stack: Stack) -> bool:
    """Whether a stack reads pixel values rather than token ids."""
    return backbone_path(loaded.model, stack)[1] == "pixel_values"


def site_states(loaded: LoadedModel, stack: Stack, sites: Sequence[str]) -> tuple[SiteStates, ...]:
    """What each site offers in this stack, in the order given.

    Raises:
        UsageError: an unknown site.
        ModelError: a site that this stack does not have.
    """
    offered = []
    for site in sites:
        if site not in SITES:
            raise UsageError(f"Site {site!r} is not one of {', '.join(SITES)}.{did_you_mean(site, SITES)}")
        hidden = tuple(range(site != "block", stack.num_blocks + 1))
        width = stack.width
        if site == "final_norm":
            hidden = (stack.num_blocks,)
            missing = stack.final_norm is None
        elif site == "heads":
            missing = any(len(stack.role_paths("attention_output", k)) != 1 for k in range(stack.num_blocks))
            if not missing:
                output = loaded.model.get_submodule(stack.role_paths("attention_output", 0)[0])
                size = linear_size(output)
                missing, width = size is None, width if size is None else size[0]
        else:
            branch = {"block": "", "attention": stack.attention_branch, "feed_forward": stack.feed_forward_branch}
            missing = branch[site] is None
        if missing:
            raise ModelError(
                f"Stack {stack.name!r} of {loaded.name} has no site {site!r} that was recognised. Leave it out."
            )
        offered.append(SiteStates(site, hidden, width))
    return tuple(offered)


class Backbone:
    """The smallest part of a model that turns token ids, or pixels, into the stack's states; no head runs.

    Attributes:
        module: the part, in the precision and on the device asked for.
        device: where it lies.
    """

    def __init__(self, loaded: LoadedModel, stack: Stack, *, dtype: str = "float32", device: str = "cpu"):
        self.stack, self.device, self.name = stack, device, loaded.name
        self.path, _ = backbone_path(loaded.model, stack)
        self.module = _converted(loaded.model.get_submodule(self.path), dtype, device)
        self.dtype = torch_dtype(dtype)
        parameters = inspect.signature(self.module.forward).parameters
        self.accepted = set(parameters)
        config = getattr(self.module, "config", None)
        # GPT-2 would add a *word's* embedding for a token type: types go only to a model that embeds them.
        self.takes_types = "token_type_ids" in parameters and (
            config is None or (getattr(config, "type_vocab_size", 0) or 0) > 1
        )

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The keyword arguments that the backbone takes, on its device."""
        wanted = {
            k: v.to(self.device, self.dtype if v.is_floating_point() else None)
            for k, v in batch.items()
            if k != "token_type_ids" or self.takes_types
        }
        if "use_cache" in self.accepted:
            return {**wanted, "use_cache": False}
        return wanted

    @contextmanager
    def reading(self, sites: Sequence[SiteStates], receive: Receiver) -> Iterator[Callable[..., torch.Tensor]]:
        """Within the block, the callable yielded runs one batch and hands every state to ``receive`` as it appears.

        It takes the backbone's inputs and the (texts, tokens) of their states, by default those of the token ids, and
        returns the first of the backbone's outputs: the states after its last block and norm. The model is in eval mode
        without gradients while a batch runs; its modes and hooks are put back on exit.
        """
        import torch

        wanted = {s.site: s.hidden for s in sites}
        seen: set[tuple[str, int]] = set()
        counters: list[list[int]] = []
        shape: list[tuple[int, ...]] = [()]
        running = [False]  # the module may also be called by others meanwhile; those states are not ours

        def hand_over(site: str, hidden: int, states: object) -> None:
            if isinstance(states, torch.Tensor) and states.dim() == 2 and len(states) == shape[0][0] * shape[0][1]:
                states = states.reshape(*shape[0], -1)  # some feed-forward branches (OPT) flatten the batch
            if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[:2] != shape[0]:
                got = tuple(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
                raise ModelError(
                    f"Site {site!r} of {self.name} gives {got} at hidden state {hidden} where "
                    f"(texts, tokens, width) = ({shape[0][0]}, {shape[0][1]}, …) was expected; a stack that "
                    "reorders or merges tokens cannot be probed."
                )
            seen.add((site, hidden))
            receive(site, hidden, states)

        def forward(batch: Mapping[str, torch.Tensor], tokens: tuple[int, int] | None = None) -> torch.Tensor:
            seen.clear()
            for counter in counters:
                counter[0] = 0
            shape[0] = tuple(batch["input_ids"].shape) if tokens is None else tokens
            # no_grad rather than inference_mode: a model may keep buffers that it makes here, and train later.
            running[0] = True
            try:
                with torch.no_grad():
                    output = self.module(**self.inputs(batch))
            finally:
                running[0] = False
            missing = [(s.site, h) for s in sites for h in s.hidden if (s.site, h) not in seen]
            if missing:
                raise ModelError(
                    f"{self.name} never ran the module of site {missing[0][0]!r}, hidden state {missing[0][1]}. "
                    "Leave that site out, or name another stack."
                )
            return output if isinstance(output, torch.Tensor) else output[0]

        with ExitStack() as undo:
            modes = {m: m.training for m in self.module.modules()}
            for module, mode in modes.items():
                undo.callback(setattr, module, "training", mode)
            self.module.eval()

            def watch(path: str, hiddens: Sequence[int], site: str, *, inputs: bool = False) -> None:
                """Hand over what goes into, or comes out of, the module's successive calls in one pass."""
                module, counter = self.submodule(path), [0]
                counters.append(counter)

                def called(states: Any) -> None:
                    if not running[0]:
                        return
                    # A shared block (ALBERT) runs several times per pass, its calls in the order of its indices.
                    if counter[0] < len(hiddens):
                        hand_over(site, hiddens[counter[0]], states)
                    counter[0] += 1

                if inputs:
                    handle = module.register_forward_pre_hook(
                        lambda _, args, kwargs: called(_first_input(args, kwargs)), with_kwargs=True
                    )
                else:
                    handle = module.register_forward_hook(lambda _, args, output: called(_first_output(output)))
                undo.callback(handle.remove)

            stack = self.stack
            if "block" in wanted:
                watch(stack.block_paths[0], [0], "block", inputs=True)
            branches = {"block": "", "attention": stack.attention_branch, "feed_forward": stack.feed_forward_branch}
            for site, branch in branches.items():
                if site in wanted:
                    for path, hiddens in _by_module([join_path(b, branch or "") for b in stack.block_paths]):
                        watch(path, hiddens, site)
            if "heads" in wanted:
                outputs = [stack.role_paths("attention_output", k)[0] for k in range(stack.num_blocks)]
                for path, hiddens in _by_module(outputs):
                    watch(path, hiddens, "heads", inputs=True)
            if "final_norm" in wanted:
                assert stack.final_norm is not None
                watch(stack.final_norm, [stack.num_blocks], "final_norm")
            yield forward

    def submodule(self, path: str) -> nn.Module:
        """The module at a dotted path of the whole model."""
        return self.module.get_submodule(path[len(self.path) :].lstrip(".") if self.path else path)


class Passes:
    """One forward pass that gives the states of one or several stacks: of a decoder, after its encoder's.

    Args:
        loaded: the model.
        stacks: the stacks that are read; stacks of different towers run one after another.
        encoder: the stack that a decoder among ``stacks`` reads.
        dtype: precision.
        device: torch device.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        stacks: Sequence[Stack],
        *,
        encoder: Stack | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ):
        feeds = encoder is not None and any(s.cross_branch is not None for s in stacks)
        run = [*([encoder] if feeds and encoder is not None else []), *stacks]
        ordered = sorted({s.path: s for s in run}.values(), key=lambda s: s.cross_branch is not None)
        self.backbones = {s.path: Backbone(loaded, s, dtype=dtype, device=device) for s in ordered}
        self.encoder = encoder.path if feeds and encoder is not None else None
        bridge = getattr(loaded.model, "enc_to_dec_proj", None) if feeds else None
        self.bridge = None if bridge is None else _converted(bridge, dtype, device)

    @contextmanager
    def reading(
        self, readers: Mapping[str, tuple[Sequence[SiteStates], Receiver]]
    ) -> Iterator[Callable[[Batch, Sequence[str]], None]]:
        """Within the block, the callable yielded runs one batch through the named stacks; see :meth:`Backbone.reading`.

        Args:
            readers: by the stack's path, the sites that are read and who receives their states.
        """
        with ExitStack() as undo:
            runs = {
                path: undo.enter_context(backbone.reading(*readers.get(path, ((), _nobody))))
                for path, backbone in self.backbones.items()
            }

            def forward(batch: Batch, wanted: Sequence[str]) -> None:
                states: torch.Tensor | None = None
                crossed = any(self.backbones[p].stack.cross_branch is not None for p in wanted)
                for path, run in runs.items():
                    if self.backbones[path].stack.cross_branch is not None:
                        if path in wanted:
                            run(self._decoder_inputs(batch, states))
                    elif path in wanted or (crossed and path == self.encoder):
                        output = run(batch.inputs, batch.shape)
                        states = output if path == self.encoder else states

            yield forward

    def _decoder_inputs(self, batch: Batch, states: torch.Tensor | None) -> dict[str, torch.Tensor]:
        import torch

        assert states is not None
        assert batch.fed is not None
        with torch.no_grad():
            read = states if self.bridge is None else self.bridge(states)
        mask = batch.inputs["attention_mask"]
        return {**batch.fed, "encoder_hidden_states": read, "encoder_attention_mask": mask}


def _nobody(site: str, hidden: int, states: torch.Tensor) -> None:
    """Receiver of an encoder that runs only to be read by its decoder."""


def _by_module(paths: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Each distinct path with the hidden indices (block + 1) that its calls compute, in running order."""
    found: dict[str, list[int]] = {}
    for block, path in enumerate(paths):
        found.setdefault(path, []).append(block + 1)
    return list(found.items())


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _first_output(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def backbone_path(model: nn.Module, stack: Stack) -> tuple[str, str]:
    """Path of the innermost module around the stack (and its final norm) that takes an input, and the input's name."""
    names = ("pixel_values", "input_ids") if stack.name.startswith("vision") else ("input_ids", "pixel_values")
    place = parent_of(stack.path)
    while True:
        accepted = inspect.signature(model.get_submodule(place).forward).parameters
        taken = next((n for n in names if n in accepted), None)
        if taken and (not place or stack.final_norm is None or is_inside(stack.final_norm, place)):
            return place, taken
        if not place:
            return "", names[0]
        place = parent_of(place)


def _converted(module: nn.Module, dtype: str, device: str) -> nn.Module:
    """The module itself if it has the precision and device already, otherwise a converted copy.

    Persistent floating-point buffers follow the weights; the others (rotary frequencies) keep their precision, as
    they do when a model is loaded in half precision.
    """
    import torch

    target, place = torch_dtype(dtype), torch.device(device)
    saved = {id(t) for t in module.state_dict(keep_vars=True).values()}
    tensors = [*module.parameters(), *module.buffers()]
    changed: dict[int, Any] = {}
    for tensor in tensors:
        follows = tensor.is_floating_point() and (isinstance(tensor, torch.nn.Parameter) or id(tensor) in saved)
        wanted = target if follows else tensor.dtype
        here = tensor.device.type == place.type and place.index in (None, tensor.device.index)
        if tensor.dtype != wanted or not here:
            new = tensor.detach().to(device=place, dtype=wanted)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            changed[id(tensor)] = torch.nn.Parameter(new, requires_grad=False) if is_parameter else new
    if not changed:
        return module
    # Tensors put into the memo are taken as they are, so that no second copy in the old precision is ever made.
    memo = {**{id(t): t for t in tensors}, **changed}
    return copy.deepcopy(module, memo)
