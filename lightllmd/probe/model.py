"""A model's facts, from its settings and headers, and whether it can be served at all.

All that the engine and the api workers will ask of the model's files is asked here first: the decoder that the config
describes, each tensor with its shape and type, the tokenizer with its chat template. What they would refuse is refused
when the plan is made, before anything is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lightllmd.architecture.entries import NotBuilt, not_built
from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.heads import is_base_model, scored_model
from lightllmd.architecture.outline import Outline, Outlined
from lightllmd.architecture.prefixes import PLAIN, UNPREFIXED
from lightllmd.architecture.rotary import rope_words
from lightllmd.architecture.vision import families as vision
from lightllmd.architecture.vision import text_config, vision_of
from lightllmd.architecture.vision.text import own_head_counts
from lightllmd.config.plan import STEP, ModelFacts, Pooling
from lightllmd.config.stamps import stamp, stamps_of
from lightllmd.errors import ConfigInvalid, LightllmdError, Problem, WeightsInvalid, show
from lightllmd.probe.embedding import gguf_pooling, pooling_of, settings_files
from lightllmd.probe.transformers_table import causal_language_models
from lightllmd.remote_code.host import RUNNING, ask
from lightllmd.remote_code.named import CAUSAL_LM, CONFIG, TOKENIZER, code_files, named_code, refusal, require_files
from lightllmd.weights.deepspeed import FORM as DEEPSPEED_FORM
from lightllmd.weights.deepspeed import deepspeed_files, deepspeed_tensors, is_deepspeed_file
from lightllmd.weights.gguf_header import (
    END_OF_TURN,
    GGUF_READABLE,
    ROPE_FREQUENCIES,
    gguf_dtype,
    gguf_eos_ids,
    gguf_hf_config,
    read_gguf_header,
)
from lightllmd.weights.gguf_names import hugging_face_tensors
from lightllmd.weights.gguf_schemes import made_dense, stored_schemes
from lightllmd.weights.headers import SAFETENSORS_READABLE, TensorInfo, read_safetensors_headers
from lightllmd.weights.locate import locate_model
from lightllmd.weights.model_files import (
    MAX_CONFIG,
    MAX_VOCABULARY,
    TokenizerJson,
    added_tokens,
    chat_templates,
    eos_token_ids,
    image_processor,
    invalid,
    present,
    read_json,
    read_listed,
    text_files,
    text_of,
    tokenizer_config,
    typed_eos_ids,
)
from lightllmd.weights.quantised.form import NOTHING
from lightllmd.weights.quantised.formats import quantisation_of, settings_of
from lightllmd.weights.quantised.stored import Matrices, matrices_of, schemes_of
from lightllmd.weights.verify import verify, verify_vision

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
LARGEST_ENTRY = 96 << 10  # bytes of one entry of the config that is carried on: a name for each of the most layers
CAUSAL_LMS = ("ForCausalLM", "LMHeadModel")  # how names of such classes end
# Rotations whose config.json says the context before stretching.
_STRETCHING = ("linear", "dynamic")


def model_facts(
    model_dir: str,
    *,
    load_way: str = "HF",
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    backend: str = "auto",
) -> ModelFacts:
    """`load_way`, `tokenizer_mode`: as the parameters; `backend`: as [engine] has it. With "DUMMY" weights will be
    invented, so that no weight file is needed or read. `trust_remote_code`: what the checkpoint brings along runs, in
    processes of its own; else one that does is refused.

    Raises ConfigInvalid when there is no model to be found or it can't be served, WeightsInvalid when its files are
    damaged; the message names the file.
    """
    path = locate_model(model_dir)
    try:
        code = _remote_code(path, tokenizer_mode, trust_remote_code) if path.is_dir() else {}
        if path.is_dir():
            facts = _of_directory(path, load_way, code, backend)
        elif backend == "transformers":
            raise invalid(f"{path}: [engine] backend = {show(backend)} takes Hugging Face directories, no GGUF files")
        else:
            facts = _of_gguf(path, load_way)
        facts = _with_tokenizer(facts, tokenizer_mode)
        texts = [str(path)]
        if path.is_dir():
            texts = [str(file) for file in (*text_files(path), *settings_files(path))]
        texts += [str(file) for file in code_files(path)] if code else []
        stamps = [*stamps_of(facts.files), *(stamp(file) for file in texts if file not in facts.files)]
        return msgspec.structs.replace(facts, stamps=stamps)
    except LightllmdError:
        raise
    except OSError as error:
        raise invalid(f"{error.filename or path} can't be read: {error.strerror}") from None
    except MemoryError:
        raise WeightsInvalid(f"{path}: there is not enough memory to read its settings") from None
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise WeightsInvalid(f"{path}: its files are not as their format says: {error!r}") from error


# --- code that a checkpoint brings along --------------------------------------------------------------------------


def _remote_code(path: Path, tokenizer_mode: str, trusted: bool) -> dict[str, str]:
    """As `ModelFacts.remote_code`. Raises ConfigInvalid where the checkpoint names any and it isn't trusted."""
    code = named_code(path, slow_tokenizer=tokenizer_mode == "slow")
    if code and not trusted:
        raise refusal(path, code)
    require_files(path, code)
    return {one.role: one.reference for one in code}


def _own_settings(path: Path, config: dict[str, Any], code: dict[str, str]) -> dict[str, Any]:
    """config.json as the checkpoint's own class completes it, where it has one. Raises ConfigInvalid."""
    if CONFIG not in code:
        return config
    made = ask("config", str(path), doing=f"{RUNNING}, {code[CONFIG]},", reference=code[CONFIG])
    if not isinstance(made, dict):
        raise invalid(f"{path}: {code[CONFIG]} makes no settings")
    return {**config, **{key: value for key, value in made.items() if value is not None}}


# --- what can be served -------------------------------------------------------------------------------------------


def _architecture(config: dict[str, Any], where: Path) -> Architecture:
    """`where`: the file that says so. Raises ConfigInvalid."""
    if faults := list(_unsupported(config)):
        raise ConfigInvalid([Problem("model_dir", f"{where}: {fault}") for fault in faults])
    try:
        if config.get("use_sliding_window"):
            raise not_built("use_sliding_window: attention over a sliding window is not available yet")
        vision_of(config)
        return architecture_of(config["model_type"], config)
    except ConfigInvalid as refused:
        problems = [Problem("model_dir", f"{where}: {one.message}") for one in refused.problems]
        raise type(refused)(problems) from None


def _computed(
    path: Path, config: dict[str, Any], code: dict[str, str], load_way: str, backend: str
) -> Architecture | Outline:
    """By a family of ours, or by transformers, as `backend` says. Raises ConfigInvalid, WeightsInvalid."""
    if backend == "transformers" or (backend == "auto" and _no_family(config)):
        return _outline(path, config, code, load_way)
    try:
        return _architecture(config, path / "config.json")
    except NotBuilt as refused:
        if backend != "auto" or load_way == "DS":
            raise
        try:
            return _outline(path, config, code, load_way)
        except ConfigInvalid:
            raise refused from None


def _no_family(config: dict[str, Any]) -> bool:
    kind = config.get("model_type")
    return isinstance(kind, str) and kind not in FAMILIES and vision.family_of(config) is None


def _outline(path: Path, config: dict[str, Any], code: dict[str, str], load_way: str) -> Outline:
    """What transformers' modules make of it, in a process of their own: importing them alone takes seconds, and where
    there is `code` of the checkpoint they run it. Raises ConfigInvalid."""
    where, kind, known = path / "config.json", config.get("model_type"), causal_language_models()
    if CAUSAL_LM not in code and known and kind not in known:
        neither = f"neither lightllmd ({', '.join(FAMILIES)}) nor transformers has a causal language model of it"
        raise invalid(f"{where}: models of type {show(kind)} are not available yet: {neither}")
    if settings_of(path, config)[0]:
        raise invalid(f"{where}: quantised checkpoints of models that transformers computes are not available yet")
    if load_way == "DS":
        raise invalid(f"{path}: load_way = {show(load_way)} is not available for models that transformers computes")
    if (whole := load_way != "DUMMY") and not read_safetensors_headers(path):
        raise invalid(_no_weights(path))
    doing = RUNNING if code else "looking at what transformers makes of it"
    answered = msgspec.convert(ask("outline", str(path), trust=bool(code), weights=whole, doing=doing), Outlined)
    if answered.damaged:
        raise WeightsInvalid(f"{path}: {answered.refused}")
    if answered.outline is None:
        raise invalid(f"{where}: {answered.refused}")
    made, named = answered.outline.architecture, _named_architectures(config)
    causal = made in named or any(name.endswith(CAUSAL_LMS) for name in named)
    if named and not causal and not answered.outline.headless:
        raise invalid(
            f"{where}: the architecture {show(named[0])} is not available yet; transformers makes {made} of it"
        )
    return answered.outline


def _unsupported(config: dict[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        yield f"model_type is {'missing' if kind is None else show(kind)}, a name is needed"
    elif vision.family_of(config) is not None:
        return
    elif kind not in FAMILIES:
        yield f"models of type {show(kind)} are not available yet; supported: {', '.join(FAMILIES)}"
    try:
        scored_model(config)
    except ConfigInvalid as refused:
        yield from (problem.message for problem in refused.problems)
    if config.get("is_causal") is False:
        yield "is_causal = false: attention to later tokens, as encoders have it, is not available yet"


def _named_architectures(config: dict[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _require_in_vocabulary(ids: list[int], vocab: int, where: Path) -> None:
    for number in ids:
        if not 0 <= number < vocab:
            raise invalid(f"{where}: eos_token_id {number} is not in the model's vocabulary of {vocab} tokens")


def _facts(
    path: Path,
    form: str,
    config: dict[str, Any],
    architecture: Architecture | Outline,
    tensors: list[TensorInfo],
    files: list[Path],
    dtype: str | None,
    eos_ids: list[int],
    has_tokenizer: bool,
    dummy: bool,
) -> ModelFacts:
    outline = architecture if isinstance(architecture, Outline) else None
    return ModelFacts(
        path=str(path),
        format="dummy" if dummy else form,
        model_type=str(config.get("model_type")),
        hf_config={key: value for key, value in config.items() if _is_small({key: value})},
        files=[] if dummy else [str(file) for file in files],
        weight_elements=architecture.parameters,
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        checkpoint_dtype=dtype,
        context_length=outline.context if outline else _context_length(text_config(config)),
        eos_ids=eos_ids,
        has_tokenizer=has_tokenizer,
        has_chat_template=False,
        outline=outline,
    )


def _is_small(entry: dict[str, Any]) -> bool:
    """And can be carried: the families have read what they know, the rest of a config may be anything."""
    try:
        return len(msgspec.msgpack.encode(entry)) <= LARGEST_ENTRY
    except (OverflowError, RecursionError, ValueError, TypeError):
        return False


def _context_length(config: Mapping[str, Any]) -> int | None:
    """The config has been read as a decoder's, so that its types are right."""
    context, rope = config.get("max_position_embeddings"), rope_words(config)
    if context is None:
        return None
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind in _STRETCHING:
        return int(max(context, (rope.get("original_max_position_embeddings") or context) * factor))
    return int(context)


# --- GGUF -------------------------------------------------------------------------------------------------------


def _of_gguf(path: Path, load_way: str) -> ModelFacts:
    if load_way == "DS":
        raise invalid(f'{path} is a GGUF file, load_way = "DS" reads a folder of {DEEPSPEED_FORM}')
    dummy = load_way == "DUMMY"
    header = read_gguf_header(path)
    config = gguf_hf_config(header)
    architecture = _architecture(config, path)
    tensors = hugging_face_tensors(header, architecture.family)
    if not dummy:
        verify(architecture, tensors, GGUF_READABLE, str(path))
    stored = [tensor for tensor in header.tensors if tensor.name != ROPE_FREQUENCIES]
    eos_ids = gguf_eos_ids(header)
    _require_in_vocabulary(eos_ids, architecture.spec.vocab, path)
    has_tokenizer, dtype = "tokenizer.ggml.tokens" in header.metadata, gguf_dtype(header)
    files, weights = list(header.files), [] if dummy else stored
    facts = _facts(path, "gguf", config, architecture, weights, files, dtype, eos_ids, has_tokenizer, dummy)
    if not dummy:
        schemes, dense = stored_schemes(architecture.weights, tensors), made_dense(architecture.weights, tensors)
        facts = msgspec.structs.replace(facts, schemes=schemes, dequantised=dense)
    return _pooled(facts, gguf_pooling(header))


# --- Hugging Face directory ---------------------------------------------------------------------------------------


def _of_directory(path: Path, load_way: str, code: dict[str, str], backend: str) -> ModelFacts:
    """`code`: what runs of its own, as `ModelFacts.remote_code`."""
    config = _own_settings(path, read_json(path / "config.json", MAX_CONFIG), code)
    architecture = _computed(path, config, code, load_way, backend)
    settings, where = settings_of(path, config)
    quantisation = quantisation_of(settings, where) if settings else None
    if load_way == "DS" and vision.family_of(config) is not None:
        raise invalid(f"{path}: load_way = {show(load_way)} is not available for models with vision")
    if quantisation is not None and load_way == "DS":
        raise invalid(f"{path}: load_way = {show(load_way)} is not available for quantised checkpoints")
    form, files, stored = _weights_of_directory(path, load_way, architecture)
    dummy, tensors = form == "dummy", [*stored.values()]
    if isinstance(architecture, Architecture):
        architecture = _as_stored(architecture, stored, config)
    if isinstance(architecture, Outline):
        vocab = architecture.vocab
    else:
        vocab = architecture.spec.vocab
        matrices: Matrices = {}
        if quantisation is not None:
            matrices = matrices_of(architecture.weights, quantisation, None if dummy else stored)
        if not dummy:
            ignored = NOTHING if quantisation is None else quantisation.ignored
            verify(architecture, stored, SAFETENSORS_READABLE, str(path), matrices, ignored)
        tensors = [tensor for tensor in tensors if not architecture.ignores(tensor.name)]
    preprocessor = _vision(path, form, config, architecture, stored)
    dtype, eos_ids = _dtype(config, tensors), _eos_ids(path, config, vocab)
    facts = _facts(path, form, config, architecture, tensors, files, dtype, eos_ids, _has_tokenizer(path), dummy)
    facts = msgspec.structs.replace(_pooled(facts, pooling_of(path)), remote_code=code)
    if isinstance(architecture, Outline):
        return msgspec.structs.replace(facts, headless=architecture.headless)
    facts = msgspec.structs.replace(
        facts,
        headless=architecture.spec.headless,
        prefixes=architecture.prefixes,
        untied=architecture.untied,
        preprocessor=preprocessor,
        sees=vision.family_of(config) is not None,
    )
    if quantisation is None or not matrices:
        return facts
    schemes, dense = schemes_of(architecture.weights, matrices)
    return msgspec.structs.replace(
        facts,
        quantisation=settings,
        quantised_as=quantisation.words,
        schemes=schemes,
        dequantised=[*dense, *quantisation.notes],
    )


def _pooled(facts: ModelFacts, found: Pooling | str | None) -> ModelFacts:
    if isinstance(found, str):
        return msgspec.structs.replace(facts, pooling_refused=found)
    return msgspec.structs.replace(facts, pooling=found)


def _as_stored(architecture: Architecture, stored: dict[str, TensorInfo], config: dict[str, Any]) -> Architecture:
    """As its files have it: embedding models are stored without head, most under the names that the decoder has by
    itself; models with vision under several."""
    if architecture.scored is not None:
        return architecture
    embed, head = (f"{architecture.family.names[role]}.weight" for role in ("embed", "head"))
    if (sees := vision.family_of(config)) is not None:
        prefixes = sees.prefixes.of(stored, embed, head, *sees.probes)
        own_head = prefixes.text(head) in stored and own_head_counts(config)
        return architecture.of_files(False, prefixes, architecture.spec.tied and own_head)
    unprefixed = embed not in stored and UNPREFIXED.text(embed) in stored
    headless = not architecture.spec.tied and head not in stored and (unprefixed or is_base_model(config))
    return architecture.of_files(headless, UNPREFIXED if unprefixed else PLAIN)


def _vision(
    path: Path, form: str, config: dict[str, Any], architecture: Architecture | Outline, stored: dict[str, TensorInfo]
) -> dict[str, Any]:
    """The settings of the image processor, once tower, connector and their weights are known to be as the config says;
    nothing of a model of text. Raises ConfigInvalid, WeightsInvalid."""
    if isinstance(architecture, Outline) or (sees := vision.family_of(config)) is None:
        return {}
    settings, where = image_processor(path)
    try:
        spec = vision_of(config, settings or None, architecture.prefixes)
    except ConfigInvalid as refused:
        problems = [Problem("model_dir", f"{where}: {one.message}") for one in refused.problems]
        raise type(refused)(problems) from None
    if spec is not None and form != "dummy":
        verify_vision(spec, sees, stored, SAFETENSORS_READABLE, str(path))
    return settings


def _weights_of_directory(
    path: Path, load_way: str, architecture: Architecture | Outline
) -> tuple[str, list[Path], dict[str, TensorInfo]]:
    """(format, files in order, tensors by name). Raises WeightsInvalid, ConfigInvalid."""
    if load_way == "DUMMY":
        return "dummy", [], {}
    if load_way == "DS" and not isinstance(architecture, Outline):
        parts = deepspeed_files(path, architecture)
        return "deepspeed", parts, deepspeed_tensors(parts, architecture)
    headers = read_safetensors_headers(path)
    if not headers:
        raise invalid(_no_weights(path))
    files = [header.path for header in headers]
    return "safetensors", files, {tensor.name: tensor for header in headers for tensor in header.tensors}


def _has_tokenizer(path: Path) -> bool:
    both = present(path / "vocab.json") and present(path / "merges.txt")
    return present(path / "tokenizer.json") or both or any(path.glob("*.model"))


def _no_weights(path: Path) -> str:
    if any(path.glob("*.bin")):
        return f"{path} has its weights in PyTorch's .bin files, which are not available yet; safetensors are"
    if any(map(is_deepspeed_file, path.glob("*.pt"))):
        return f'{path} has no *.safetensors file; load_way = "DS" reads {DEEPSPEED_FORM}'
    return f"{path} has no *.safetensors file"


def _dtype(config: dict[str, Any], tensors: list[TensorInfo]) -> str | None:
    """As config.json names it (`dtype` since transformers 5, `torch_dtype` before), else what most bytes are."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named in DTYPES.values():
        return str(named)
    volume: dict[str, int] = {}
    for tensor in tensors:
        if tensor.type not in DTYPES:  # of quantised matrices
            continue
        volume[tensor.type] = volume.get(tensor.type, 0) + tensor.nbytes
    return DTYPES.get(max(volume, key=lambda kind: volume[kind])) if volume else None


def _eos_ids(path: Path, config: dict[str, Any], vocab: int) -> list[int]:
    """What the settings name, and the ends of a turn of the chat template."""
    found = [] if vision.family_of(config) is None else typed_eos_ids(path / "config.json", dict(text_config(config)))
    _require_in_vocabulary(found, vocab, path / "config.json")
    for name in ("generation_config.json", "config.json"):
        ids = eos_token_ids(path / name)
        _require_in_vocabulary(ids, vocab, path / name)
        found += ids
    settings = tokenizer_config(path)
    template = "\n".join(chat_templates(path, settings).values())
    texts = {text for text in END_OF_TURN if text in template}
    if eos := text_of(settings.eos_token):
        texts.add(eos)
    added = {number: token.content for number, token in added_tokens(path, settings).items()}
    if texts:
        if not added and present(path / "tokenizer.json"):
            listed = read_listed(path / "tokenizer.json", TokenizerJson, MAX_VOCABULARY).added_tokens
            added = {token.id: token.content for token in listed if token.id is not None}
        found += [number for number, text in added.items() if text in texts and 0 <= number < vocab]
    return list(dict.fromkeys(found))


# --- tokenizer ----------------------------------------------------------------------------------------------------


def _with_tokenizer(facts: ModelFacts, mode: str) -> ModelFacts:
    """Opened as the api workers will open it. Raises ConfigInvalid, also where a model with weights has none."""
    from lightllmd.text.remote import RemoteTokenizer  # text imports more than the rest together
    from lightllmd.text.tokenizer import open_tokenizer

    if reference := facts.remote_code.get(TOKENIZER):
        own = RemoteTokenizer(facts.path, reference, eos_ids=facts.eos_ids)
        own.close()
        return msgspec.structs.replace(facts, has_tokenizer=True, has_chat_template=own.chat_template is not None)
    if facts.format == "dummy" and not facts.has_tokenizer:
        return facts
    tokenizer = open_tokenizer(facts.path, None, "fast" if mode == "auto" else mode, facts.eos_ids)
    chat, step = tokenizer.chat_template is not None, None
    scored = None if vision.family_of(facts.hf_config) else scored_model(facts.hf_config)
    if scored is not None and scored.steps:
        ids = tokenizer.encode(STEP, add_special_tokens=False)
        step = ids[0] if len(ids) == 1 and tokenizer.id_to_token(ids[0]) == STEP else None
    return msgspec.structs.replace(facts, has_tokenizer=True, has_chat_template=chat, step_token=step)
