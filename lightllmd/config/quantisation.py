"""What `mode` comes to for one model on one device: how weights and KV cache are stored, and how attention reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.schemes import DENSE, SCHEMES, Scheme, scheme_of
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from lightllmd.config import layer_rules
from lightllmd.config.modes import MODES, Mode, groups, of_kind
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Derived, DeviceFacts, ModelFacts
from lightllmd.errors import show

WRITTEN = ("mode", "quantise.rules")  # what says how weights are stored
# Schemes of GGUF's blocks that a kind of device multiplies with faster than with dense weights, at least for few rows.
FAST_BLOCKS = {"cuda": ("w4a16", "w8a16"), "cpu": ("w4a16",)}


@dataclass(frozen=True)
class Unservable:
    """Why this model can't be served so; `keys`: the settings that say it."""

    message: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Quantisation:
    """Of a configuration that the rules let through: one mode of a kind at most."""

    config: Config
    model: ModelFacts
    architecture: Architecture | Outline
    device: DeviceFacts

    @cached_property
    def _cache_mode(self) -> tuple[str, Mode] | None:
        return next(((name, MODES[name]) for name in of_kind(self.config.params.mode, "attention", "kv")), None)

    @cached_property
    def _weight_mode(self) -> tuple[str, Mode] | None:
        return next(((name, MODES[name]) for name in of_kind(self.config.params.mode, "weights")), None)

    @property
    def decode_kernel(self) -> str:
        """See `Plan.decode_kernel`."""
        return self._cache_mode[1].kernel if self._cache_mode else "auto"

    @property
    def kv_scheme(self) -> str:
        """See `Plan.kv_scheme`."""
        return self._cache_mode[1].kv if self._cache_mode else "dense"

    @cached_property
    def schemes(self) -> WeightSchemes:
        """How each weight is stored. No layer is named that the model doesn't have, once `faults` has none."""
        return WeightSchemes(tuple(self._rules()))

    def _rules(self) -> Iterator[SchemeRule]:
        """Of a checkpoint that is quantised already those of its own: a mode beside it can only say the same. Of a GGUF
        file its own, too, but where something else is written."""
        if self.model.quantised_as:
            yield from self.model.schemes.rules
            return
        yield from self._blocks_kept
        yield from self._written_rules()

    @cached_property
    def _blocks_kept(self) -> list[SchemeRule]:
        """The matrices of a GGUF file that stay quantised, of those that a scheme holds."""
        written = self.config.engine.gguf
        if self.model.format != "gguf" or self._weight_mode or written == "dense":
            return []
        fast = FAST_BLOCKS.get(self.device.kind, ())
        return [rule for rule in self.model.schemes.rules if written == "quantised" or rule.scheme.name in fast]

    def _written_rules(self) -> Iterator[SchemeRule]:
        if self._weight_mode is not None:
            _, mode = self._weight_mode
            yield SchemeRule(self._scheme_of_mode(mode))
            if mode.kept:
                yield SchemeRule(DENSE, roles=mode.kept)
            if mode.mixdown and self._mixdown is not None:
                yield SchemeRule(DENSE, roles=("down",), layers=self._mixdown)
        for rule in self._layer_rules:
            yield rule.of_layers()

    def _scheme_of_mode(self, mode: Mode) -> Scheme:
        return scheme_of(mode.scheme, next(iter(groups(self.config.params.mode)), None))

    @cached_property
    def _layer_rules(self) -> list[layer_rules.LayerRule]:
        return list(map(layer_rules.rule, self.config.params.quantise.rules))

    @cached_property
    def _mixdown(self) -> tuple[int, ...] | None:
        """Layers whose down matrix stays dense; empty: all; None: none. `faults` tells where they are no layers."""
        if written := self.config.params.quantise.mixdown:
            return layer_rules.layers(written).numbers()
        named = self.model.hf_config.get("mixdown")
        if named is None:
            return ()
        return tuple(named) or None

    def faults(self) -> Iterator[Unservable]:
        """Why this model, or this device, can't take what is asked for."""
        yield from self._faults_of_cache()
        wrong = []
        if not isinstance(self.architecture, Outline):
            wrong = list(self._faults_of_layers(len(self.architecture.spec.layers)))
            yield from wrong
        if not wrong:  # else `schemes` would list layers by the thousand million
            yield from self._faults_of_device()
        said = [f"mode {self._weight_mode[0]}"] if self._weight_mode else []
        said += ["quantise.rules"] if self._layer_rules else []
        if not said:
            return
        what = " and ".join(said)
        if isinstance(self.architecture, Outline):
            yield Unservable(
                f"{what}: {self.architecture.architecture} is computed by transformers' modules, whose weights are "
                "stored as they are; modes of the KV cache work, such as triton_int8kv",
                WRITTEN,
            )
            return
        if self.model.quantised_as and not wrong and not self._says_the_same(self.architecture):
            yield Unservable(
                f"{what}: the weights of {self.model.path} are stored already, as {self.model.quantised_as}; "
                "without it they are served so",
                WRITTEN,
            )

    def _faults_of_device(self) -> Iterator[Unservable]:
        """Schemes that need a newer GPU."""
        has = self.device.capability
        if has is None or isinstance(self.architecture, Outline):
            return
        for scheme in dict.fromkeys(rule.scheme for rule in self.schemes.rules if rule.scheme.capability > has):
            needed, found = (".".join(map(str, version)) for version in (scheme.capability, has))
            nearest = "triton_w8a8" if SCHEMES["w8a8"].capability <= has else "triton_w8a16"
            instead = "another checkpoint of the model" if self.model.quantised_as else f"mode {nearest}"
            yield Unservable(
                f"weights stored as {scheme.title} need a GPU of compute capability {needed} or higher, "
                f"{self.device.name} has {found}; {instead} works there",
                ("model_dir",) if self.model.quantised_as else WRITTEN,
            )

    def _says_the_same(self, architecture: Architecture) -> bool:
        """Whether what is written is how the checkpoint stores its weights."""
        written, stored = WeightSchemes(tuple(self._written_rules())), self.model.schemes
        return all(written.of(weight).title == stored.of(weight).title for weight in architecture.weights)

    def _faults_of_layers(self, layers: int) -> Iterator[Unservable]:
        """Rules that name layers which a model of so many doesn't have."""
        bound = f"{self.model.path} has layers 0 to {layers - 1}"
        for text, rule in zip(self.config.params.quantise.rules, self._layer_rules, strict=True):
            if rule.layers.largest >= layers:
                yield Unservable(f"{show(text)} names layer {rule.layers.largest}; {bound}", ("quantise.rules",))
        if self._weight_mode is None or not self._weight_mode[1].mixdown:
            return
        if written := self.config.params.quantise.mixdown:
            if (largest := layer_rules.layers(written).largest) >= layers:
                yield Unservable(f"{show(written)} names layer {largest}; {bound}", ("quantise.mixdown",))
            return
        named = self.model.hf_config.get("mixdown")
        valid = isinstance(named, list) and all(type(layer) is int and 0 <= layer < layers for layer in named)
        if named is not None and not valid:
            yield Unservable(
                f"{self.model.path}: mixdown in config.json is {show(named)}, a list of layers from 0 to "
                f"{layers - 1} is needed; quantise.mixdown takes its place",
                ("model_dir",),
            )

    def _faults_of_cache(self) -> Iterator[Unservable]:
        if self._cache_mode is None or self.kv_scheme == "dense":
            return
        name = self._cache_mode[0]
        spec = self.architecture if isinstance(self.architecture, Outline) else self.architecture.spec
        for head_dim in sorted({each.head_dim for each in spec.attention}):
            if not KV_SCHEMES[self.kv_scheme].divides(head_dim):
                yield Unservable(f"mode {name}: heads of {head_dim} values are no whole bytes; int8 works", ("mode",))

    def data_type(self) -> tuple[str, str] | None:
        """The only number format that a mode computes in on a GPU, and that mode."""
        for chosen in (self._cache_mode, self._weight_mode):
            if chosen and chosen[1].data_type:
                return chosen[1].data_type, chosen[0]
        return None

    def derived(self) -> Iterator[Derived]:
        """What the modes come to."""
        if self.model.quantised_as:
            dense = "".join(f"; {said}" for said in self.model.dequantised)
            yield Derived("quantisation", self.model.quantised_as, f"as the checkpoint's matrices are{dense}")
        if blocks := self._blocks():
            yield blocks
        if self._weight_mode:
            name, mode = self._weight_mode
            yield Derived("weights", self._scheme_of_mode(mode).title, f"mode {name}: {mode.does}")
        if self._layer_rules:
            told = ", ".join(self.config.params.quantise.rules)
            yield Derived("weights of layers", told, "written; the last rule that covers a matrix counts")
        if self.kv_scheme != "dense" and self._cache_mode:
            yield Derived("kv cache", self.kv_scheme, f"mode {self._cache_mode[0]}: {self._cache_mode[1].does}")

    def _blocks(self) -> Derived | None:
        """What becomes of the quantised matrices of a GGUF file."""
        if self.model.format != "gguf" or not (self.model.schemes.rules or self.model.dequantised):
            return None
        if self._weight_mode:
            return Derived("gguf", "dense", f"mode {self._weight_mode[0]} quantises anew what is dequantised")
        kept = _titles(self._blocks_kept)
        said = ["as the file's blocks are"] if kept else []
        if left := _titles(rule for rule in self.model.schemes.rules if rule not in self._blocks_kept):
            why = "as written"
            if self.config.engine.gguf == "auto":
                why = f'{self.device.name} multiplies faster so, gguf = "quantised" takes less memory'
            said.append(f"{left} is made dense: {why}")
        return Derived("gguf", kept or "dense", "; ".join([*said, *self.model.dequantised]))

    def warnings(self) -> Iterator[str]:
        """What is served otherwise than the words of the file say."""
        if self._cache_mode and self._cache_mode[1].of_a_gpu and self.device.kind != "cuda":
            yield (
                f"mode {self._cache_mode[0]} names a decode kernel of a GPU; {self.device.name} takes its own, with "
                "the same results within rounding"
            )


def _titles(rules: Iterable[SchemeRule]) -> str:
    return ", ".join(sorted({rule.scheme.title for rule in rules}))
