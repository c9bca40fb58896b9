"""What a model ends in, as its config's `architectures` names it: a language model head, or one that scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllmd.architecture.entries import dimension, invalid
from lightllmd.architecture.spec import DecoderSpec, ScoreHead
from lightllmd.architecture.weights import Names
from lightllmd.errors import show

MOST_LABELS, MOST_LABEL_BYTES = 4096, 40_000  # the latter in all: plans have them
CAUSAL, CLASSIFIER, BASE = "ForCausalLM", "ForSequenceClassification", "Model"
LABEL = "LABEL_{}"  # what transformers calls those that a config doesn't name


@dataclass(frozen=True)
class ScoredModel:
    """A model whose results are vectors: of the last token, or with `steps` of each token that ends a step."""

    head: ScoreHead
    names: Names  # of the head's weights
    labels: tuple[str, ...]  # of the values
    problem_type: str | None = None  # as transformers has it
    steps: bool = False
    ending: int | None = None  # the token that a conversation ends with
    raw_pairs: bool = False  # how well two texts fit is told as the logit; else as its sigmoid

    def decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """A causal model's, with this head instead of its own."""
        return replace(spec, tied=False, logit_soft_cap=None, scores=self.head)


def scored_model(config: Mapping[str, Any]) -> ScoredModel | None:
    """None: it generates or embeds, as one does whose config names no architecture. Raises ConfigInvalid for
    others that are not built."""
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not names or any(name.endswith(CAUSAL) for name in names) or is_base_model(config):
        return None
    if make := REWARD_MODELS.get(names[0]):
        return make(config)
    # Not by the ending alone: some have the decoder of their family with attention to later tokens.
    if names[0].lower() == f"{config.get('model_type')}{CLASSIFIER}".lower():
        return _classifier(config)
    known = ", ".join(f"...{ending}" for ending in (CAUSAL, CLASSIFIER, BASE))
    raise invalid(
        f"the architecture {show(names[0])} is not available yet; {known} of a family that is built and "
        f"{', '.join(REWARD_MODELS)} are"
    )


def is_base_model(config: Mapping[str, Any]) -> bool:
    """Whether it names the decoder of its type by itself, such as "Qwen3Model": embedding models are such. Others that
    end so may be decoders with attention to later tokens."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return isinstance(first, str) and first.lower() == f"{config.get('model_type')}{BASE}".lower()


def _classifier(config: Mapping[str, Any]) -> ScoredModel:
    """transformers' own: one linear without bias, read at the last token."""
    labels, kind = _labels(config), config.get("problem_type")
    if kind is not None and not isinstance(kind, str):
        raise invalid(f"problem_type is {show(kind)}, a name is needed")
    return ScoredModel(ScoreHead(len(labels)), {"score": "score"}, labels, kind, raw_pairs=_raw_pairs(config))


def _raw_pairs(config: Mapping[str, Any]) -> bool:
    """As sentence-transformers' cross encoders write the function that scores of pairs go through."""
    ours = config.get("sentence_transformers")
    named = ours.get("activation_fn") if isinstance(ours, Mapping) else None
    named = config.get("sbert_ce_default_activation_function") if named is None else named
    match named:
        case None | "torch.nn.modules.activation.Sigmoid":
            return False
        case "torch.nn.modules.linear.Identity":
            return True
    raise invalid(f"its scores of pairs go through {show(named)}; Sigmoid and Identity of torch.nn.modules are built")


def _internlm2(config: Mapping[str, Any]) -> ScoredModel:
    """Cai et al. 2024, "InternLM2 Technical Report": a value head, read at a token that ends the conversation."""
    ending = config.get("reward_token_id")
    if ending is not None and (not isinstance(ending, int) or not 0 <= ending < dimension(config, "vocab_size")):
        raise invalid(f"reward_token_id is {show(ending)}, a token of the vocabulary is needed")
    return ScoredModel(ScoreHead(1), {"score": "v_head"}, (LABEL.format(0),), ending=ending)


def _qwen2(config: Mapping[str, Any], labels: int) -> ScoredModel:
    """Yang et al. 2024, "Qwen2.5-Math Technical Report": two linears with ReLU between them."""
    head = ScoreHead(labels, inner=dimension(config, "hidden_size"), bias=True)
    names = {"score_inner": "score.0", "score": "score.2"}
    return ScoredModel(head, names, tuple(map(LABEL.format, range(labels))))


def _qwen2_steps(config: Mapping[str, Any]) -> ScoredModel:
    """Zhang et al. 2025, "The Lessons of Developing Process Reward Models in Mathematical Reasoning": whether each step
    of a solution is bad or good, read at the token behind it."""
    return replace(_qwen2(config, 2), problem_type="single_label_classification", steps=True)


REWARD_MODELS: dict[str, Callable[[Mapping[str, Any]], ScoredModel]] = {
    "InternLM2ForRewardModel": _internlm2,
    "Qwen2ForRewardModel": lambda config: _qwen2(config, 1),
    "Qwen2ForProcessRewardModel": _qwen2_steps,
}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order of the values; two where the config names none, as in transformers."""
    named, count = config.get("id2label"), config.get("num_labels")
    if isinstance(named, Mapping) and named:
        labels = tuple(named.get(str(index)) for index in range(min(len(named), MOST_LABELS)))
        if len(labels) == len(named) and all(isinstance(label, str) for label in labels):
            size = sum(len(str(label).encode(errors="replace")) for label in labels)
            if size > MOST_LABEL_BYTES:
                raise invalid(f"id2label has names of {size} bytes in all, at most {MOST_LABEL_BYTES} are carried")
            return labels  # type: ignore[return-value]
        raise invalid(f"id2label is {show(named)}, a name for each of 0 to {len(named) - 1} is needed")
    count = 2 if count is None else count
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_LABELS:
        raise invalid(f"num_labels is {show(count)}, an integer from 1 to {MOST_LABELS} is needed")
    return tuple(map(LABEL.format, range(count)))
