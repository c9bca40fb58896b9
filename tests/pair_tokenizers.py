"""Small tokenizers that put around a pair of texts what those of several families do."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SIZE = 300  # ids are below it
# What families put around a pair: Llama 3's, BERT's, and Qwen's, which is nothing.
FRAMES = {
    "llama": ("<s>:0 $A:0", "<s>:0 $A:0 <s>:1 $B:1"),
    "bert": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "qwen": None,
}


def write_tokenizer(folder: Path, frame: tuple[str, str] | None) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.ByteLevel()
    if frame is not None:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=frame[0], pair=frame[1], special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder
