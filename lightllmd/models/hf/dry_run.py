"""A forward of a model without weights or values (torch's meta device), which shows what it calls attention with, what
a step takes, and whether it can run on our KV slots at all.

What can't be seen that way, or isn't built, is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionMaskInterface

from lightllmd.architecture.entries import invalid
from lightllmd.architecture.heads import is_base_model
from lightllmd.architecture.outline import Outline, Outlined, StepBytes
from lightllmd.architecture.spec import GroupedQuery
from lightllmd.errors import ConfigInvalid, LightllmdError
from lightllmd.models.hf.attention import DRY, received, said
from lightllmd.models.hf.fit import head_of, misfit
from lightllmd.models.hf.loading import config_of, group_experts, model_of
from lightllmd.weights.headers import read_safetensors_headers

FEW, MANY = 8, 40  # tokens of the two runs that tell what a step takes
ASIDE = "not through transformers' attention interface, so it can't run on our KV slots"
FARTHEST = 1 << 20  # positions that masks are looked at up to
# What modules say to attention and needn't: nothing here changes what it computes.
HARMLESS = frozenset(
    {"cache_position", "dropout", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"past_key_values", "position_ids", "training", "use_cache"}
)


def outlined(directory: str, trust: bool, *, weights: bool = True) -> Outlined:
    """Of the model that a checkpoint's config describes. `trust`: its own code may be executed. `weights`: the tensors
    of its files have to be those of the model."""
    try:
        config = config_of(directory, trust)

        with torch.device("meta"):
            module = model_of(config, torch.float32, DRY, trust)
        outline = outline_of(module)
        head = frozenset[str]()
        if is_base_model(config.to_dict()):
            head = head_of(module, outline.base)
            stored = sum(module.get_parameter(name).numel() for name in head)
            outline = replace(outline, headless=True, parameters=outline.parameters - stored)
        if weights:
            files = read_safetensors_headers(directory)
            if wrong := misfit(module, [tensor for file in files for tensor in file.tensors], head):
                return Outlined(refused=wrong, damaged=True)
        return Outlined(outline)
    except ConfigInvalid as invalid:
        return Outlined(refused=invalid.problems[0].message)


def outline_of(module: nn.Module) -> Outline:
    """`module`: on the meta device, with the attention implementation DRY; given away. Raises ConfigInvalid."""
    run = _Run(module, FEW)
    config = _config(module)
    layers, called = int(config.num_hidden_layers), len(run.attention)
    name = type(module).__name__
    if called < layers:
        raise invalid(
            f"{name} computes attention, or a state of another kind, by itself in {layers - called} of {layers} "
            f"layers, {ASIDE}"
        )
    if getattr(module, "_is_stateful", False):
        raise invalid(f"{name} keeps a state beside keys and values, which is not available yet")
    if not run.positioned:
        raise invalid(f"{name} takes no positions from its caller, which packed sequences need")
    parameters = {id(parameter): parameter.numel() for parameter in module.parameters()}
    base, constant = run.base, sum(buffer.nbytes for buffer in module.buffers())
    assert base is not None
    wide = _step_bytes(run, _Run(module, MANY))
    module = module.to(torch.bfloat16)
    group_experts(module)
    narrow = _step_bytes(_Run(module, FEW), _Run(module, MANY))
    return Outline(
        architecture=name,
        base=base,
        vocab=run.vocab,
        hidden=run.hidden,
        attention=tuple(run.attention),
        parameters=sum(parameters.values()),
        constant_bytes=constant,
        step={"float32": wide, "bfloat16": narrow, "float16": narrow},
        longest=_longest(config),
        context=getattr(config, "max_position_embeddings", None),
    )


def _config(module: nn.Module) -> Any:
    """Of the language model, where there are others beside it."""
    config: Any = module.config
    return config.get_text_config()


def _step_bytes(few: _Run, many: _Run) -> StepBytes:
    each = -(-(many.peak - few.peak) // (MANY - FEW))
    return StepBytes(max(0, few.peak - FEW * each), each)


def _longest(config: Any) -> int | None:
    """Where rotary angles depend on a sequence's length, they do beyond the context that the model was trained for."""
    written = getattr(config, "rope_parameters", None) or {}
    kinds = [written, *(inner for inner in written.values() if isinstance(inner, dict))]
    bounds = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in kinds
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(bounds, default=None)


# --- one forward --------------------------------------------------------------------------------------------------


class _Run:
    """What a forward of `tokens` tokens showed. Receives its calls of attention."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        self.attention: list[GroupedQuery] = []
        self.positioned = False  # what attention is given depends on the positions
        self.base: str | None = None
        self.peak = self.hidden = self.vocab = 0
        self._name, self._tokens = type(module).__name__, tokens
        self._names = {child: name for name, child in module.named_modules()}
        self._context = getattr(_config(module), "max_position_embeddings", None) or FARTHEST
        self._path: list[nn.Module] = []  # whose forwards have begun and not ended
        hooks = [
            hook
            for child in self._names
            for hook in (child.register_forward_pre_hook(self._enter), child.register_forward_hook(self._leave))
        ]
        positions = torch.arange(tokens, device="meta")[None]
        self._meter = _Meter(module, positions)
        try:
            with torch.no_grad(), received(self), self._meter, torch.device("meta"):
                out = module(
                    input_ids=torch.zeros((1, tokens), dtype=torch.int64),
                    # All of them are there: a sequence by itself.
                    attention_mask=torch.ones((1, tokens), dtype=torch.int64),
                    position_ids=positions,
                    use_cache=False,
                )
            self.vocab = out.logits.shape[-1]
        except LightllmdError:
            raise
        except Exception as error:  # whatever its modules make of it
            if not self.attention and not getattr(module, "_supports_attention_backend", False):
                raise invalid(f"{self._name} computes attention by itself, {ASIDE}") from None
            raise invalid(f"{self._name} does not run on our attention: {said(error)}") from None
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, child: nn.Module, _: Any) -> None:
        self._path.append(child)

    def _leave(self, child: nn.Module, _: Any, out: Any) -> None:
        self._path.pop()
        if len(self._path) == 1 and self._names[child] == self.base:
            self.hidden = out[0].shape[-1]
            # Behind it stand logits, of as many rows at a time as the runners have.
            self.peak = self._meter.peak

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, words: dict[str, Any]
    ) -> Tensor:
        """See `Calls.attend`: nothing is computed."""
        base = self._names[self._path[1]] if len(self._path) > 1 else None
        if base is None or self.base not in (None, base):
            raise invalid(f"{self._name} calls attention outside of one base model, which is not available yet")
        self.base = base
        window = words.pop("sliding_window", None)
        cap, scale = words.pop("softcap", None), words.pop("scaling", None)
        causal = words.pop("is_causal", None)
        for word, what in words.items():
            if word not in HARMLESS and what is not None and what is not False:
                raise invalid(f"{self._name}: attention with {word} is not available yet")
        if mask is None:
            if not (getattr(module, "is_causal", False) if causal is None else causal):
                raise invalid(f"{self._name}: attention that is not causal is not available yet")
        elif isinstance(mask, _Mask):
            window = mask.window(min(self._context, FARTHEST), self._name)
        else:
            raise invalid(f"{self._name}: attention with a mask of its own making is not available yet")
        self.positioned |= self._meter.depends(query) or self._meter.depends(key)
        if not query.shape[2] == key.shape[2] == value.shape[2] == self._tokens:
            raise invalid(f"{self._name}: attention to others than the tokens of its sequence is not available yet")
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads or value.shape[1] != kv_heads or query.shape[-1] != key.shape[-1]:
            raise invalid(f"{self._name}: attention of such heads is not available yet")
        dim = max(key.shape[-1], value.shape[-1])
        scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
        cap = None if cap is None else float(cap)
        self.attention.append(GroupedQuery(heads, kv_heads, dim, scale, window=window, soft_cap=cap))
        return query.new_empty(1, query.shape[2], heads, value.shape[-1])


# --- masks --------------------------------------------------------------------------------------------------------


class _Mask:
    """Which tokens attention would see, as the function of indices that transformers makes masks of."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def window(self, context: int, name: str) -> int | None:
        """How many tokens are seen up to one's own, None: all. Raises ConfigInvalid where it is others."""
        keys, windows = torch.arange(context, device="cpu"), set()
        for query in {context - 1, context // 2 + 3, context // 3} - {0}:
            try:
                seen = self._function(0, 0, torch.tensor(query, device="cpu"), keys).expand(context)
            except (AttributeError, IndexError, RuntimeError, TypeError):
                raise invalid(f"{name}: attention with a mask of its own is not available yet") from None
            first = int(seen.to(torch.uint8).argmax())
            if int(seen.sum()) != query + 1 - first or not bool(seen[first : query + 1].all()):
                raise invalid(
                    f"{name}: attention that is neither causal nor over a sliding window is not available yet"
                )
            windows.add(query + 1 - first if first else None)
        if len(windows) > 1 and windows - {None}:
            raise invalid(f"{name}: attention that is neither causal nor over a sliding window is not available yet")
        return windows.pop()


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> _Mask:
    return _Mask(mask_function)


AttentionMaskInterface.register(DRY, _mask)


# --- memory -------------------------------------------------------------------------------------------------------


class _Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that a run makes, and follows what depends on the positions.

    Answers what the meta device can't: a number that the program asks for is 0, and of what can't be known how many
    there are, there are as many as the longest dimension: as if each token went to each expert.
    """

    def __init__(self, module: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.peak = self._live = 0  # bytes
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # by storage: depends on them
        for tensor in [*module.parameters(), *module.buffers()]:
            self._known[tensor.untyped_storage()] = False
        self._known[positions.untyped_storage()] = True

    def depends(self, tensor: Tensor) -> bool:
        """Whether it was computed from the positions."""
        return self._known.get(tensor.untyped_storage(), False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].dtype.is_floating_point else 0)
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            out = args[0].new_empty((max(args[0].shape, default=1), args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        depends = any(isinstance(one, Tensor) and self.depends(one) for one in tree_iter((args, kwargs)))
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self._note(made.untyped_storage(), depends)
        return out

    def _note(self, storage: Any, depends: bool) -> None:
        if storage in self._known:
            self._known[storage] |= depends
            return
        self._known[storage] = depends
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, count: int) -> None:
        self._live -= count
