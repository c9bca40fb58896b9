"""From the configuration to a plan, through the real probe."""

from __future__ import annotations

import json
from pathlib import Path

from stand_ins import StandInDaemon

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def test_a_config_alone_is_served_with_random_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    flags = ("--model_dir", str(model), "--engine.device", "cpu", "--max_req_total_len", "512")
    flags += ("--max_req_input_len", "256")
    daemon = StandInDaemon(tmp_path / "refused", *flags, fake=False)
    daemon.start(ready=False)
    assert daemon.exit_code() == 78
    assert "has no *.safetensors file" in daemon.log_text()
    with StandInDaemon(tmp_path / "served", *flags, "--load_way", "DUMMY", fake=False).start() as served:
        assert served.status()["model"]["data_type"] == "float32"
        assert "random weights" in served.log_text()
        assert "text is token ids in decimal" in served.log_text()
