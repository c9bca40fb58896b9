"""From a checkpoint to transformers' modules with their weights.

transformers knows which tensor of a checkpoint goes where, and what has to be renamed, fused or cut apart on the way,
so `from_pretrained` does it. The tensors that it asks for are read by us: with pread, so that a file that is cut off
meanwhile is an error and not SIGBUS, and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightllmd.architecture.entries import invalid
from lightllmd.errors import LightllmdError, WeightsInvalid
from lightllmd.models.hf.attention import NAME, said
from lightllmd.models.hf.fit import head_of, unfit
from lightllmd.weights.loaded import Progress
from lightllmd.weights.safetensors import SafetensorsCheckpoint

log = logging.getLogger(__name__)

TELL = 0.05  # seconds between two signs of progress
DUMMY_SEED = 0
WORDS = {"experts_implementation": "eager"}


def config_of(directory: str, trust: bool) -> Any:
    """`trust`: the checkpoint's own code may be executed. Raises ConfigInvalid."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust, local_files_only=True)
    except Exception as error:  # whatever a class of settings makes of what a file says
        raise invalid(f"{directory}: transformers makes no config of it: {said(error)}") from None


def model_of(config: Any, dtype: torch.dtype, attention: str, trust: bool) -> nn.Module:
    """On the default device, with the weights that its classes begin with. Raises ConfigInvalid."""
    try:
        made = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust, attn_implementation=attention, **WORDS
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        raise invalid(f"transformers makes no causal language model of it: {said(error)}") from None
    implementation = made.config._attn_implementation
    if implementation != attention:
        raise invalid(
            f"{type(made).__name__} does not go through transformers' attention interface (it stays with "
            f"{implementation!r} attention), so it can't run on our KV slots"
        )
    return made.eval()


def group_experts(module: Any) -> None:
    """Experts in one launch for all tokens, which waits for nothing, instead of one after the other: bf16 on a GPU.
    It takes more memory. Nothing happens to a model whose classes don't let them be chosen."""
    with suppress(ValueError):
        module.set_experts_implementation("grouped_mm")


def load(
    directory: str,
    checkpoint: SafetensorsCheckpoint | None,
    trust: bool,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    base: str | None = None,
) -> nn.Module:
    """The model with the weights of `checkpoint`, which pass through host memory, or without one the weights that its
    classes begin with, on `device`. `base`: the module that is wanted alone; what is not of it may be missing, and has
    no elements. Raises ConfigInvalid, WeightsInvalid."""
    config = config_of(directory, trust)
    with torch.device("meta"):
        kind = type(model_of(config, dtype, NAME, trust))
    stored = _Stored(checkpoint)
    with ThreadPoolExecutor(1, "load") as beside:
        if checkpoint is None:
            made = beside.submit(_dummy, config, dtype, device, trust)
        else:
            made = beside.submit(_made, kind, config, stored, dtype, directory, base)
        try:
            while not made.done():
                progress(stored.done, stored.total)
                wait([made], TELL)
        except BaseException:
            stored.cancelled = True
            raise
        module = made.result()
    if device.type == "cuda" and dtype == torch.bfloat16:
        group_experts(module)
    if base is not None:
        for name in head_of(module, base):
            module.get_parameter(name).data = torch.empty(0, dtype=dtype)
    _move(module, device, progress)
    return module


def _dummy(config: Any, dtype: torch.dtype, device: torch.device, trust: bool) -> nn.Module:
    """Drawn where they stay: a GPU draws the numbers of a large model in a second, a CPU in minutes."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.device(device):
        torch.manual_seed(DUMMY_SEED)
        return model_of(config, dtype, NAME, trust).requires_grad_(False)


def _made(kind: Any, config: Any, stored: _Stored, dtype: torch.dtype, directory: str, base: str | None) -> nn.Module:
    try:
        module, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=stored.tensors(),
            dtype=dtype,
            attn_implementation=NAME,
            output_loading_info=True,
            **WORDS,
        )
    except (MemoryError, torch.OutOfMemoryError, LightllmdError):
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        raise stored.failure or WeightsInvalid(f"{directory}: transformers can't load it: {said(error)}") from None
    if stored.failure:
        raise stored.failure
    unneeded = frozenset[str]() if base is None else head_of(module, base)
    _require_whole(found, directory, unneeded)
    return module.eval().requires_grad_(False)


def _require_whole(found: Mapping[str, Any], directory: str, unneeded: Collection[str]) -> None:
    if wrong := unfit(set(found["missing_keys"]).difference(unneeded), found["mismatched_keys"], found["error_msgs"]):
        raise WeightsInvalid(f"{directory}: {wrong}")
    if unexpected := sorted(found["unexpected_keys"]):
        log.warning("%s: %d tensors are not used, such as %s", directory, len(unexpected), unexpected[0])


def _move(module: nn.Module, device: torch.device, progress: Progress) -> None:
    """Each tensor into memory of its own on `device`; tied ones stay tied."""
    moved: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    tensors = [*module.parameters(), *module.buffers()]
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    for tensor in tensors:
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        there = moved.get(key) if tensor.numel() else None
        if there is None:
            alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            there = tensor.data.to(device) if device.type != tensor.device.type or alone else tensor.data.clone()
            moved[key] = there
        tensor.data = there.contiguous()
        done += tensor.nbytes
        if device.type != "cpu":
            progress(done, total)


# --- what transformers asks for -----------------------------------------------------------------------------------


class _Stored:
    """The tensors of a checkpoint as they are asked for, by any thread."""

    def __init__(self, checkpoint: SafetensorsCheckpoint | None) -> None:
        self.done = 0  # bytes
        self.failure: LightllmdError | None = None
        self.cancelled = False
        self._checkpoint = checkpoint
        self._infos = {
            name: info
            for name, info in (checkpoint.tensors.items() if checkpoint is not None else ())
            if checkpoint is not None and info.type in checkpoint.readable
        }
        self.total = sum(info.nbytes for info in self._infos.values())

    def tensors(self) -> dict[str, _Unread]:
        """By the checkpoint's names."""
        return {name: _Unread(self, name, list(info.shape)) for name, info in self._infos.items()}

    def read(self, name: str) -> Tensor:
        """Raises WeightsInvalid."""
        assert self._checkpoint is not None
        out = torch.empty(self._infos[name].shape, dtype=self._checkpoint.dtype(name))
        try:
            for count in self._checkpoint.read(name, out):
                self.done += count
                if self.cancelled:
                    raise InterruptedError(name)
        except LightllmdError as error:
            self.failure = error
            raise
        return out


class _Unread:
    """A tensor as safetensors' slices are: read when it is indexed."""

    def __init__(self, stored: _Stored, name: str, shape: list[int]) -> None:
        self._stored, self._name, self._shape = stored, name, shape

    def get_shape(self) -> list[int]:
        """Elements by dimension."""
        return self._shape

    def __getitem__(self, index: Any) -> Tensor:
        return self._stored.read(self._name)[index]
